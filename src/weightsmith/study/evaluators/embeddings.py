"""Embedding models: retrieval and similarity of sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import NumericError, SourceError
from weightsmith.io import system
from weightsmith.observe.model import resting, text_coder
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.lines import rows, texts
from weightsmith.study.evaluators.specs import Embedded, Retrieval, Sts
from weightsmith.study.evaluators.subject import Subject

__all__ = ["embed", "retrieval", "spearman", "sts"]

TOP = 10


def embed(subject: Subject, sentences: Sequence[str], spec: Embedded) -> tuple[Tensor, dict[str, float]]:
    """[sentences, width] float32 of length 1, and notes: texts cut at `length`, texts that are others' same tokens.

    Raises SourceError for a model of Sentence-Transformers with a module between pooling and the end.
    """
    _no_module_more(subject.folder)
    loaded = subject.loaded("encoder")
    decoder = type(loaded.module).__name__.endswith("ForCausalLM")
    loaded = replace(loaded, module=getattr(loaded.module, "base_model", loaded.module))  # hidden states, no head
    coder, pooling = text_coder(loaded), spec.pooling or _pooling(subject.folder, "last" if decoder else "mean")
    length = loaded.clip_length(spec.length)
    encoded = [coder.example(text, length) or list(coder.prefix) or [0] for text in sentences]
    order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at]))
    found: dict[int, Tensor] = {}
    with resting(loaded.module), torch.no_grad():
        for start in range(0, len(order), subject.setting.batch):
            part = order[start : start + subject.setting.batch]
            inputs = [torch.tensor(encoded[at]) for at in part]
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in inputs], True)
            out = loaded.run(torch.nn.utils.rnn.pad_sequence(inputs, True), mask)
            pooled = _pooled(out.last_hidden_state.float().cpu(), mask, pooling)
            found.update(zip(part, torch.nn.functional.normalize(pooled, dim=-1), strict=True))
    vectors = torch.stack([found[at] for at in range(len(encoded))])
    if not bool(torch.isfinite(vectors).all()):
        raise NumericError(f"{subject.label}: NaN or Inf in its embeddings")
    full = {text for text, ids in zip(sentences, encoded, strict=True) if len(ids) >= length}
    notes = {
        "texts cut": float(sum(len(coder.example(text, length + 1)) > length for text in full)),
        "texts that the tokenizer takes for others": float(len(set(sentences)) - len(set(map(tuple, encoded)))),
    }
    return vectors, {name: count for name, count in notes.items() if count}


def _no_module_more(folder: Path) -> None:
    file = folder / "modules.json"
    try:
        listed = json.loads(system.read_file(file)) if file.is_file() else []
        kinds = [str(one["type"]).rpartition(".")[2] for one in listed]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SourceError(f"{file}: cannot be read: {error}") from None
    if more := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise SourceError(f"{file}: the model has {', '.join(more)}, which is not run here; measure it with mteb")


def _pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """hidden: [n, tokens, width] -> [n, width]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
    weights = mask[:, :, None].float()
    return (hidden * weights).sum(1) / weights.sum(1)


def _pooling(folder: Path, otherwise: str) -> str:
    """What sentence-transformers' files say; without them as that does: of decoders the last token, else the mean."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return otherwise
    try:
        told = json.loads(system.read_file(file))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read: {error}") from None
    modes = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
    chosen = [modes.get(name) for name, on in told.items() if name.startswith("pooling_mode_") and on is True]
    if isinstance(told.get("pooling_mode"), str):  # how later versions write it
        chosen = [{"cls": "cls", "lasttoken": "last", "mean": "mean"}.get(told["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] is None:
        raise SourceError(f"{file}: pools in a way that is not known here; say which: pooling: mean, cls or last")
    return chosen[0]


def retrieval(subject: Subject, spec: Retrieval) -> Found:
    """The ten nearest texts of the corpus by cosine; binary relevance; of equal ones the first in the corpus."""
    corpus = rows(Path(spec.corpus), None, lambda item: (str(item["id"]), texts(item, "text")))
    known = {name for name, _ in corpus}
    if len(known) < len(corpus):
        raise SourceError(f"{spec.corpus}: an id stands twice in it")

    def query(item: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
        wanted = item["relevant"]
        right = frozenset(map(str, wanted if isinstance(wanted, list) else [wanted]))
        if not right or (lost := sorted(right - known)):
            raise ValueError(f"relevant {', '.join(lost) if right else 'is empty'}: not in {Path(spec.corpus).name}")
        return texts(item, "query"), right

    queries = rows(Path(spec.file), subject.setting.limit, query)
    vectors, notes = embed(subject, [*(text for text, _ in queries), *(text for _, text in corpus)], spec)
    near = (vectors[: len(queries)] @ vectors[len(queries) :].T).sort(dim=1, descending=True, stable=True).indices
    ndcg, recall, reciprocal = [], [], []
    for (_, right), row in zip(queries, near[:, :TOP].tolist(), strict=True):
        hits = [corpus[at][0] in right for at in row]
        best = sum(1 / math.log2(rank + 2) for rank in range(min(len(right), TOP)))
        ndcg.append(sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits)) / best)
        recall.append(sum(hits) / len(right))
        reciprocal.append(next((1 / (rank + 1) for rank, hit in enumerate(hits) if hit), 0.0))
    return of_examples({"ndcg_at_10": ndcg, "recall_at_10": recall, "mrr_at_10": reciprocal}, notes)


def sts(subject: Subject, spec: Sts) -> Found:
    """Rank correlation (and Pearson's) of cosines with the scores; no mean of examples, so without resampling."""
    pairs = rows(Path(spec.file), subject.setting.limit, _pair)
    count = len(pairs)
    vectors, notes = embed(subject, [one for one, _, _ in pairs] + [other for _, other, _ in pairs], spec)
    cosines = (vectors[:count] * vectors[count:]).sum(1).tolist()
    scores = [score for _, _, score in pairs]
    if len(set(scores)) < 2:
        raise SourceError(f"{spec.file}: all scores are equal; nothing can be ranked")
    return Found({"spearman": spearman(cosines, scores), "pearson": _pearson(cosines, scores)}, notes=notes)


def _pair(item: Mapping[str, Any]) -> tuple[str, str, float]:
    score = item["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"score should be a number, is {score!r}")
    return texts(item, "sentence1"), texts(item, "sentence2"), float(score)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; 0 where one list is constant."""
    from scipy.stats import rankdata

    return _pearson(rankdata(a).tolist(), rankdata(b).tolist())


def _pearson(a: Sequence[float], b: Sequence[float]) -> float:
    x, y = torch.tensor([a, b], dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0
