"""Embedding models: pooling, retrieval and similarity, against closed forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness_toy import lines, subject

from weightsmith.core.errors import SourceError
from weightsmith.study.evaluators.embeddings import embed, retrieval, spearman, sts
from weightsmith.study.evaluators.specs import Retrieval, Sts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("bert")
    BertModel(config).save_pretrained(place)
    return place


def test_embeddings_pool_over_what_is_no_padding(encoder: Path) -> None:
    spec = Sts.model_construct(file="", pooling=None, length=64)
    texts = ["a", "a longer sentence", "bc"]
    together, notes = embed(subject(encoder), texts, spec)
    assert not notes
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-6)
    for pooling in ("mean", "cls", "last"):
        spec = Sts.model_construct(file="", pooling=pooling, length=64)
        apart = torch.cat([embed(subject(encoder), [text], spec)[0] for text in texts])
        assert torch.allclose(embed(subject(encoder), texts, spec)[0], apart, atol=1e-5)
    module = subject(encoder).loaded("encoder").module
    with torch.no_grad():
        hidden = module(input_ids=torch.tensor([list(b"bc")])).last_hidden_state[0].mean(0)
    assert torch.allclose(together[2], hidden / hidden.norm(), atol=1e-5)


def test_the_pooling_of_the_folder_is_taken(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "st"
    shutil.copytree(encoder, place)
    (place / "1_Pooling").mkdir()
    file = place / "1_Pooling" / "config.json"
    plain = Sts.model_construct(file="", pooling=None, length=64)
    file.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    first, _ = embed(subject(place), ["abc"], plain)
    told = Sts.model_construct(file="", pooling="cls", length=64)
    assert torch.equal(first, embed(subject(encoder), ["abc"], told)[0])
    file.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(SourceError, match="say which: pooling"):
        embed(subject(place), ["abc"], plain)


def test_what_an_embedding_leaves_out_is_said(encoder: Path, tmp_path: Path) -> None:
    short = Sts.model_construct(file="", pooling=None, length=3)
    _, notes = embed(subject(encoder), ["abc", "abcd", "abce", "abc"], short)
    assert notes == {"texts cut": 2, "texts that the tokenizer takes for others": 2}
    shutil.copytree(encoder, tmp_path / "st")
    kinds = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Normalize")]
    (tmp_path / "st" / "modules.json").write_text(json.dumps([{"type": kind} for kind in kinds]))
    with pytest.raises(SourceError, match="the model has Dense, which is not run here; measure it with mteb"):
        embed(subject(tmp_path / "st"), ["abc"], short)


def test_retrieval(encoder: Path, tmp_path: Path) -> None:
    corpus = [{"id": n, "text": text} for n, text in enumerate(["red apples", "blue skies", "nine lives"])]
    queries = [{"query": "blue skies", "relevant": [1]}, {"query": "red apples", "relevant": [0, 2]}]
    spec = Retrieval(file=lines(tmp_path / "q.jsonl", queries), corpus=lines(tmp_path / "c.jsonl", corpus))
    found = retrieval(subject(encoder), spec)
    assert found.examples["mrr_at_10"] == [1.0, 1.0]
    assert found.examples["recall_at_10"] == [1.0, 1.0]
    assert found.examples["ndcg_at_10"][0] == 1.0
    assert 0.9 < found.examples["ndcg_at_10"][1] <= 1.0
    lines(tmp_path / "q.jsonl", [{"query": "x", "relevant": [7]}])
    with pytest.raises(SourceError, match=r"q\.jsonl, example 1: relevant 7: not in c\.jsonl"):
        retrieval(subject(encoder), spec)
    lines(tmp_path / "c.jsonl", corpus[:1] * 2)
    with pytest.raises(SourceError, match="an id stands twice"):
        retrieval(subject(encoder), spec)


def test_sts_and_rank_correlation(encoder: Path, tmp_path: Path) -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    pairs = [
        {"sentence1": "same", "sentence2": "same", "score": 5},
        {"sentence1": "same", "sentence2": "no", "score": 0},
    ]
    assert sts(subject(encoder), Sts(file=lines(tmp_path / "s.jsonl", pairs))).metrics["spearman"] == pytest.approx(1)
    lines(tmp_path / "s.jsonl", [{**pairs[0], "score": "high"}])
    with pytest.raises(SourceError, match="score should be a number, is 'high'"):
        sts(subject(encoder), Sts(file=str(tmp_path / "s.jsonl")))
    lines(tmp_path / "s.jsonl", pairs[:1] * 2)
    with pytest.raises(SourceError, match="all scores are equal"):
        sts(subject(encoder), Sts(file=str(tmp_path / "s.jsonl")))
