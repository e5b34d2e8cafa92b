"""The mixtures of experts in a running model: what was routed where, and every expert on its own.

transformers 5 keeps the experts of a layer in one module.  Nearly all families call it with the tokens, the experts
chosen for each, and their gates; Llama 4 with a row for each expert and token, times its gate.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import WeightsmithError
from weightsmith.observe.model import LoadedModel

__all__ = ["Mixture", "Routed", "mixtures"]

_ROUTERS = ("gate", "router")
_STORED = re.compile(r"\.(?:gate|router)(?:\.\w+)?\.weight$")  # not always the word in memory (Phi-MoE, Granite)


@dataclass(frozen=True, eq=False)
class Routed:
    """What one run of a mixture did with its tokens.

    x      [tokens, hidden], what router and experts read
    index  [tokens, k] int64, the experts chosen
    gates  [tokens, k], what their outputs (Llama 4: their inputs) are multiplied by; free of correction biases
    norms  [tokens, k], lengths of the outputs before the gate (Llama 4: of those with the gate inside, over it)
    """

    x: Tensor
    index: Tensor
    gates: Tensor
    norms: Tensor


@dataclass(frozen=True, eq=False)
class Mixture(ABC):
    """Router and experts of one layer.

    name   what the checkpoint calls the module of its experts
    bias   [experts], the router's correction bias where its block keeps and hands it over (MiniMax)
    """

    name: str
    router: nn.Module
    experts: nn.Module
    bias: Tensor | None = None

    @property
    def count(self) -> int:
        weight: Any = self.router.weight
        count: int = weight.shape[0]
        return count

    @property
    def width(self) -> int:
        weight: Any = self.router.weight
        width: int = weight.shape[1]
        return width

    def logits(self, x: Tensor) -> Tensor:
        """What the router's rows have in common with tokens, without any bias: [tokens, experts]."""
        weight: Any = self.router.weight
        return torch.nn.functional.linear(x.float(), weight.float())

    @abstractmethod
    def watched(self, seen: Callable[[Routed], None]) -> list[Any]:
        """Have `seen` called after each run; returns what is to be removed at the end."""

    @abstractmethod
    def traced(self, seen: Callable[[Tensor, Tensor], None]) -> list[Any]:
        """The same with (what router and experts read, the sum of the experts' outputs), [tokens, hidden] each."""

    @abstractmethod
    def output(self, x: Tensor) -> Tensor:
        """Route tokens and run the experts chosen: [tokens, hidden]; has a derivative by the router's parameters."""

    @abstractmethod
    def each(self, x: Tensor) -> Iterator[Tensor]:
        """The output of one expert after the other for all tokens: [tokens, hidden]."""


class _Indexed(Mixture):
    """Experts that are called with (tokens, index, gates)."""

    def watched(self, seen: Callable[[Routed], None]) -> list[Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, index, gates = (a.detach() for a in (*args, *kwargs.values())[:3])
            x = x.reshape(-1, x.shape[-1])
            ones = torch.ones_like(gates[:, :1])
            # Called past its hooks, one choice at a time: so their sum comes apart.
            norms = [module.forward(x, index[:, j : j + 1], ones).float().norm(dim=-1) for j in range(index.shape[1])]
            seen(Routed(x, index, gates.float(), torch.stack(norms, 1)))

        return [self.experts.register_forward_pre_hook(hook, with_kwargs=True)]

    def traced(self, seen: Callable[[Tensor, Tensor], None]) -> list[Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            x = next(iter((*args, *kwargs.values())))
            seen(x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1]))

        return [self.experts.register_forward_hook(hook, with_kwargs=True)]

    def output(self, x: Tensor) -> Tensor:
        _, gates, index = self.router(x) if self.bias is None else self.router(x, self.bias)
        out: Tensor = self.experts(x, index, gates)
        return out

    def each(self, x: Tensor) -> Iterator[Tensor]:
        ones = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        for number in range(self.count):
            yield self.experts.forward(x, torch.full_like(ones, number, dtype=torch.int64), ones)


class _Rows(Mixture):
    """Experts that are called with [experts * tokens, hidden], each token times its gate (Llama 4)."""

    def watched(self, seen: Callable[[Routed], None]) -> list[Any]:
        last: list[tuple[Tensor, Tensor]] = []

        def routed(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            last[:] = [(args[0].detach(), out[0].detach().float())]  # scores [tokens, experts], 0 where not chosen

        def ran(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            ((x, scores),) = last
            gates, index = scores.topk(int((scores > 0).sum(1).max()), dim=1)
            lengths = out.detach().float().norm(dim=-1).reshape(self.count, -1).T.gather(1, index)
            seen(Routed(x.reshape(-1, x.shape[-1]), index, gates, lengths / gates.clamp_min(1e-30)))

        return [self.router.register_forward_hook(routed), self.experts.register_forward_hook(ran)]

    def traced(self, seen: Callable[[Tensor, Tensor], None]) -> list[Any]:
        last: list[Tensor] = []

        def routed(_: nn.Module, args: tuple[Any, ...]) -> None:
            last[:] = [args[0].reshape(-1, args[0].shape[-1])]

        def ran(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            seen(last[0], out.reshape(self.count, *last[0].shape).sum(0))

        return [self.router.register_forward_pre_hook(routed), self.experts.register_forward_hook(ran)]

    def output(self, x: Tensor) -> Tensor:
        scores, _ = self.router(x)
        rows = x.repeat(self.count, 1) * scores.T.reshape(-1, 1)
        out: Tensor = self.experts(rows).reshape(self.count, *x.shape).sum(0)
        return out

    def each(self, x: Tensor) -> Iterator[Tensor]:
        rows = self.experts.forward(x.repeat(self.count, 1))
        yield from rows.reshape(self.count, *x.shape)


def mixtures(loaded: LoadedModel, called: Callable[[str], str] = lambda name: name) -> list[Mixture]:
    """Every mixture of a model, in its order.

    called  what becomes of the checkpoint's names

    Raises WeightsmithError for a model without any, and for experts that are called in a way not known here.
    """
    found: list[Mixture] = []
    for prefix, module in loaded.module.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        router = next((getattr(module, name) for name in _ROUTERS if hasattr(module, name)), None)
        if router is None or not _known(router, experts):
            raise WeightsmithError(
                f"{loaded.label}: {prefix}.experts is a {type(experts).__name__} beside a {type(router).__name__}, "
                "whose routing cannot be read"
            )
        word = next(name for name in _ROUTERS if hasattr(module, name))
        stored = loaded.names.name(f"{prefix}.{word}.weight")
        if stored is None:
            raise WeightsmithError(f"{loaded.label}: the checkpoint has no tensor for {prefix}.{word}.weight")
        name = f"{_STORED.sub('', called(stored))}.experts"
        kind = _Rows if type(experts).__name__.startswith("Llama4") else _Indexed
        found.append(kind(name, router, experts, getattr(module, "e_score_correction_bias", None)))
    if not found:
        raise WeightsmithError(f"{loaded.label}: no layer with experts; routing is observed of mixtures of experts")
    return found


def _known(router: nn.Module, experts: nn.Module) -> bool:
    """Whether the router is a matrix with a row for each expert, and the experts are in one tensor."""
    weight, stacked = getattr(router, "weight", None), getattr(experts, "down_proj", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and isinstance(stacked, Tensor)
        and stacked.ndim == 3
        and stacked.shape[0] == weight.shape[0]
    )
