"""The diagonal Fisher information (Matena & Raffel, arXiv:2111.09832, eq. 3).

    F[j] = mean over x of E over y ~ p(y|x) of (d log p(y|x) / d theta_j)^2

The square is taken per example (and per class) before anything is summed: the square of a batch's
gradient holds cross terms between examples and is another quantity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from weightsmith.core.errors import NumericError, WeightsmithError, did_you_mean
from weightsmith.observe.data import Example
from weightsmith.observe.files import Statistic
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.memory import available_memory, size_text
from weightsmith.observe.model import LoadedModel, resting

__all__ = ["MODES", "choose_mode", "fisher"]

_log = logging.getLogger(__name__)

MODES = ("exact", "sampled", "empirical")
_MOST_CLASSES = 10
"""The exact expectation takes one backward pass per class and example."""


def choose_mode(mode: str, kind: str, classes: int) -> str:
    """'auto': exact for up to 10 classes, sampled for more and for language models."""
    if mode not in ("auto", *MODES):
        raise WeightsmithError(f"fisher = {mode!r} is not known{did_you_mean(mode, ('auto', *MODES))}")
    about = KINDS.get(kind)
    if about is not None and not about.classes:
        able = ", ".join(name for name, other in KINDS.items() if other.classes)
        raise WeightsmithError(
            f"fisher needs a model that gives probabilities ({able}), not {kind}; the statistic gram needs none "
            "(--stat gram)"
        )
    tokens = about is not None and about.tokens
    if mode == "exact" and tokens:
        raise WeightsmithError(
            f"fisher = 'exact' would take {classes} backward passes per position of a {kind}; use 'sampled'"
        )
    if mode == "empirical" and kind == "token-classification":
        raise WeightsmithError("fisher = 'empirical' is not for token-classification; use 'sampled'")
    if mode != "auto":
        return mode
    return "exact" if not tokens and classes <= _MOST_CLASSES else "sampled"


def fisher(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    mode: str = "auto",
    seed: int = 0,
    selected: Callable[[str], bool] = lambda name: True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Statistic, str]:
    """Observe every floating-point parameter, frozen ones too; returns the statistic and the mode it was taken in.

    exact      all classes, weighted by p(y|x)
    sampled    y drawn from the model, noise keyed by (seed, example); in a language model a token at every
               position, and log p is the sum over the sequence
    empirical  the labels; in a language model the text's own next tokens
    """
    parameters, skipped = _parameters(loaded, selected)
    _check_memory(loaded, parameters)
    sums = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in parameters.items()}
    chosen = ""
    with resting(loaded.module):
        loaded.module.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for index, example in enumerate(examples):
            log_p = torch.log_softmax(loaded.logits(example.inputs[None])[0].to(torch.float32), dim=-1)
            if not torch.isfinite(log_p.detach().logsumexp(-1)).all():
                raise NumericError(f"{loaded.label}: NaN or Inf in the output for example {index}")
            chosen = chosen or choose_mode(mode, loaded.kind, log_p.shape[-1])
            for weight, scalar, last in _terms(log_p, example, chosen, loaded.kind, seed, index):
                found = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=not last, allow_unused=True)
                for total, gradient in zip(sums.values(), found, strict=True):
                    if gradient is not None:  # None: the output does not depend on it, so its Fisher is 0
                        gradient = gradient.to(total.dtype)
                        total.addcmul_(gradient, gradient, value=weight)
            if progress is not None:
                progress(index + 1, len(examples))
    means = {}
    for name in parameters:
        means[name] = sums.pop(name).div_(len(examples)).to("cpu", torch.float32)
        if not torch.isfinite(means[name]).all():
            raise NumericError(f"{name}: NaN or Inf in the gradients; the model or the data is damaged")
    tensors, lost = loaded.names.convert(means)
    skipped |= dict.fromkeys(lost, "the checkpoint has no such tensor")
    tokens = sum(e.inputs.numel() for e in examples) if KINDS[loaded.kind].tokens else len(examples)
    return Statistic(tensors=tensors, rows=tokens, skipped=skipped), chosen


def _terms(
    log_p: Tensor, example: Example, mode: str, kind: str, seed: int, index: int
) -> Iterator[tuple[float, Tensor, bool]]:
    """(weight, log p(y|x) as a scalar, is it the last) for each y.  log_p: [classes] or [tokens, vocabulary]."""
    if mode == "exact":
        weights = log_p.detach().exp().tolist()
        for label, weight in enumerate(weights):
            yield weight, log_p[label], label == len(weights) - 1
        return
    if mode == "sampled":
        generator = torch.Generator().manual_seed(_mix(seed, index))
        y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
    elif kind == "causal-lm":
        if len(example.inputs) < 2:
            raise WeightsmithError(f"example {index} has one token and so no next one; fisher = 'empirical' needs two")
        log_p, y = log_p[:-1], example.inputs[1:, None].to(log_p.device)
    elif example.label is None:
        raise WeightsmithError(f"example {index} has no label; fisher = 'empirical' needs labels, 'sampled' does not")
    elif not 0 <= example.label < log_p.shape[-1]:
        raise WeightsmithError(f"example {index} has label {example.label}, the model has {log_p.shape[-1]} classes")
    else:
        y = torch.tensor([example.label], device=log_p.device)
    yield 1.0, log_p.gather(-1, y).sum(), True


def _mix(seed: int, index: int) -> int:
    """One seed per example, so that what is drawn does not depend on which examples came before."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % 2**63


def _parameters(loaded: LoadedModel, selected: Callable[[str], bool]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Module's name -> parameter, each tied one once; and name -> reason for those that are left out."""
    names: dict[int, list[str]] = {}
    for name, parameter in loaded.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for name, parameter in loaded.module.named_parameters():
        if not selected(name):
            continue
        if not parameter.is_floating_point():
            skipped[name] = f"{parameter.dtype} has no gradient"
            continue
        parameters[name] = parameter
        others = names[id(parameter)][1:]
        skipped |= {other: f"tied to {loaded.names.name(name, *others) or name}" for other in others}
    if not parameters:
        raise WeightsmithError(f"{loaded.label}: no floating-point parameter is selected for fisher")
    return parameters, skipped


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _check_memory(loaded: LoadedModel, parameters: dict[str, Tensor]) -> None:
    needed = sum(p.numel() * (_wide(p).itemsize + 2 * p.element_size()) for p in parameters.values())
    free = available_memory(loaded.device)
    _log.info("fisher sums and gradients need %s", size_text(needed))
    if free is not None and needed > 0.9 * free:
        raise WeightsmithError(
            f"fisher sums and gradients need {size_text(needed)} of memory, {size_text(free)} is free; observe some "
            "blocks at a time, each into a folder of its own: layers = (0, 8), then (8, 16), ..."
        )
