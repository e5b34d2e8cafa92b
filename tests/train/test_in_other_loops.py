"""The parts in loops of others: transformers' Trainer, accelerate, Sentence Transformers."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers

from weightsmith.train import svfit
from weightsmith.train.embed import RetrievalLoss, SimilarityLoss, info_nce
from weightsmith.train.multitask import MTAdamW
from weightsmith.train.optim import DCTAdamW, Trion
from weightsmith.train.svfit_peft import SVFitConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ROWS = [{"input_ids": (row := [(7 * i + j) % 32 for j in range(8)]), "labels": row} for i in range(12)]


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    body = [p for name, p in model.named_parameters() if "layers" in name]
    return [
        {"params": body},
        {"params": [p for p in model.parameters() if all(p is not q for q in body)], "rank": None},
    ]


MAKE: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "dct_adamw": lambda m: DCTAdamW(groups(m), 1e-2, rank=4, rotate=True, error_feedback=8),
    "trion": lambda m: Trion(groups(m), rank=4),
}


def trainer(
    model: torch.nn.Module, out: Path, optimizer: torch.optim.Optimizer | None = None, **more: Any
) -> transformers.Trainer:
    given = transformers.TrainingArguments(
        str(out), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", learning_rate=1e-2, **more,
    )  # fmt: skip
    return transformers.Trainer(model, given, train_dataset=ROWS, optimizers=(optimizer, None))


def trained(
    model: torch.nn.Module, out: Path, make: Callable[..., Any] = lambda m: None, **more: Any
) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(model, out, make(model)).train(**more)
    return model


@pytest.mark.parametrize("kind", MAKE)
def test_transformers_trainer_trains_and_resumes_to_the_same_bits(tmp_path: Path, kind: str):
    whole = trained(llama(), tmp_path, MAKE[kind])
    assert not torch.equal(whole.lm_head.weight, llama().lm_head.weight)
    again = trained(llama(), tmp_path, MAKE[kind], resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", MAKE)
def test_accelerate_prepares_and_steps(kind: str):
    plain, prepared = llama(), llama()
    optimizer = MAKE[kind](plain)
    accelerator = accelerate.Accelerator(cpu=True)
    ours, theirs = accelerator.prepare(prepared, MAKE[kind](prepared))
    for _ in range(2):
        ids = torch.arange(16).view(2, 8)
        plain(input_ids=ids, labels=ids).loss.backward()
        accelerator.backward(ours(input_ids=ids, labels=ids).loss)
        optimizer.step(), theirs.step()
        optimizer.zero_grad(), theirs.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), prepared.parameters(), strict=True))


@pytest.mark.parametrize("kind", [*MAKE, "mt_adamw"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_of_optimizers_step(kind: str, again: Callable[[Any], Any]):
    make = {**MAKE, "mt_adamw": lambda m: MTAdamW(m.parameters(), grad_norm="none")}[kind]
    model = llama()
    optimizer = make(model)
    model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    made = again(optimizer)
    for p in (p for group in made.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    made.step()
    assert getattr(made, "grad_norm", "none") == "none"


def test_singular_values_train_in_transformers_trainer(tmp_path: Path):
    for model in (llama(), peft.get_peft_model(llama(), SVFitConfig(r=4, target_modules=["q_proj"]))):
        if not isinstance(model, peft.PeftModel):
            svfit.wrap(model, 4)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained(model, tmp_path)
        moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"train_values"}
    folder = tmp_path / "checkpoint-4"
    again = peft.PeftModel.from_pretrained(llama(), folder)
    ids = torch.arange(8)[None]
    assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_embedding_losses_in_sentence_transformers(tmp_path: Path):
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    modules = importlib.import_module("sentence_transformers.models")
    samplers = importlib.import_module("sentence_transformers.training_args").MultiDatasetBatchSamplers

    table = modules.StaticEmbedding(_tokenizer(), embedding_dim=8)
    model = library.SentenceTransformer(modules=[table], device="cpu")
    words = [f"w{i}" for i in range(24)]
    columns = {
        "search": {"anchor": words, "positive": words[::-1], "negative": words[1:] + words[:1]},
        "graded": {"one": words, "two": words[5:] + words[:5], "score": [float(i % 5) for i in range(24)]},
    }
    sets = {name: datasets.Dataset.from_dict(own) for name, own in columns.items()}
    given = library.SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=16, per_device_train_batch_size=6, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_strategy="no", learning_rate=0.05,
        multi_dataset_batch_sampler=samplers.ROUND_ROBIN,
    )  # fmt: skip

    def cost() -> float:
        a, b, c = (torch.from_numpy(model.encode(t, normalize_embeddings=True)) for t in columns["search"].values())
        return float(info_nce(a, torch.stack([b, c], 1), temperature=0.2))

    before = cost()
    losses = {"search": RetrievalLoss(model, temperature=0.2), "graded": SimilarityLoss(model)}
    library.SentenceTransformerTrainer(model, given, train_dataset=sets, loss=losses).train()
    assert cost() < 0.8 * before


def _tokenizer() -> Any:
    import tokenizers

    vocabulary = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(24)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made
