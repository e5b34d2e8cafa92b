"""Parts for fine-tuning and distillation beside merging: plain torch, for any training loop.

optim   DCTAdamW, Trion and their projector: low-rank optimizers without an SVD
    embed   CoDiEmb's losses and batches for embeddings of text
"""
