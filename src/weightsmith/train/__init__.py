"""Parts for fine-tuning and distillation beside merging: plain torch, for any training loop.

optim   DCTAdamW, Trion and their projector: low-rank optimizers without an SVD
    svfit   fine-tuning of singular values, whose result is an expert for merges
    dmm     distillation of several denoisers into one with a style
    embed   CoDiEmb's losses and batches for embeddings of text
    fuse    one language model from the token distributions of several
"""
