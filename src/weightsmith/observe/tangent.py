"""A network's tangent space: linearised models, and task arithmetic in them (arXiv:2305.12827).

    f_lin(x; theta) = f(x; theta_0) + J f(x; theta_0) (theta - theta_0)

is one forward-mode pass, which gives both terms.  Task vectors trained in it add exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from weightsmith.core.errors import SourceError, WeightsmithError, did_you_mean

__all__ = ["Linearized", "advantage", "linearize", "logits_of", "unsupported"]

Pick = Callable[[Any], Tensor]
"""What of a network's output is linearised."""
Delta = Mapping[str, Tensor]
"""Parameter name -> theta - theta_0; parameters that are left out stay as they are."""
Only = Callable[[str], bool]


def logits_of(output: Any) -> Tensor:
    """The output itself, or what transformers calls its logits."""
    found: Tensor = getattr(output, "logits", output)
    return found


def linearize(
    module: nn.Module,
    *args: Any,
    pick: Pick = logits_of,
    only: Only | None = None,
    rank: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Linearized:
    """The tangent model of a network around its present weights, in eval mode; the network itself is not changed.

    args, kwargs  an input to try forward-mode differentiation with, if there is one
    only          which parameters move, by name; everything outside has no tangent and costs nothing
    rank, seed    matrices move by U V, V [rank, in] drawn at random, and U [out, rank] trains; nothing else moves
                  (the tangent of LoRA at its start, L-LoRA)
    Attention and experts of transformers are switched to implementations that have it (`Linearized.switched`).
    Raises SourceError that names the first module without it.
    """
    made = Linearized(module, pick, only, rank, seed)
    if args or kwargs:
        made.refuse_unsupported(*args, **kwargs)
    return made


class Linearized(nn.Module):
    """See `linearize`.  Parameters: `theta`, in float32 at least, and frozen `origin` (theta_0), by the same names.

    Gradients with respect to theta flow through the forward-mode pass.  A tied weight has one tangent.  With a `rank`,
    theta are the factors U, by the names of their matrices.
    """

    def __init__(
        self,
        module: nn.Module,
        pick: Pick = logits_of,
        only: Only | None = None,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.origin = copy.deepcopy(module).eval().requires_grad_(False)
        self.switched = _with_forward_mode(self.origin)
        self.theta = nn.ParameterDict()
        self.down: dict[str, Tensor] = {}
        self._names = {}
        draw = torch.Generator().manual_seed(seed)
        for name, parameter in self.origin.named_parameters():
            if not parameter.is_floating_point() or not (only is None or only(name)):
                continue
            if rank is not None and (parameter.ndim != 2 or min(parameter.shape) < rank):
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)  # bfloat16 would lose the small difference
            self._names[name] = name.replace(".", "|")  # no dots in names of a ParameterDict
            start = parameter.detach().clone().to(wide)
            if rank is not None:
                size = parameter.shape[1]
                self.down[name] = (torch.randn(rank, size, generator=draw, dtype=wide) / size**0.5).to(parameter.device)
                start = start.new_zeros(len(start), rank)
            self.theta[self._names[name]] = nn.Parameter(start)
        if not self._names:
            low = "" if rank is None else f"; a rank of {rank} is of matrices with both sides at least as long"
            raise SourceError(f"{type(module).__name__}: no parameter of it moves{low}")
        self.pick = pick

    @property
    def config(self) -> Any:
        """The network's transformers configuration; None of others."""
        return getattr(self.origin, "config", None)

    @property
    def main_input_name(self) -> str:
        """What transformers calls the network's input."""
        return str(self.origin.main_input_name)

    def train(self, mode: bool = True) -> Linearized:
        """Dropout and batch statistics stay off: f must be a function."""
        super().train(mode)
        self.origin.eval()
        return self

    @property
    def delta(self) -> dict[str, Tensor]:
        """The task vector theta - theta_0, by parameter name; part of the graph."""
        if self.down:
            return {name: self.theta[key] @ self.down[name] for name, key in self._names.items()}
        origin = dict(self.origin.named_parameters())
        return {name: self.theta[key] - origin[name].to(self.theta[key].dtype) for name, key in self._names.items()}

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """With a `rank`: name of a matrix -> U and V of its change U V."""
        return {name: (self.theta[key], self.down[name]) for name, key in self._names.items() if name in self.down}

    def load_delta(self, delta: Delta) -> None:
        """Set theta = theta_0 + delta; an ordinary task vector makes the post-hoc linearised model.

        Raises SourceError for names or shapes that the network does not have, and for a model of some `rank`.
        """
        if self.down:
            raise SourceError("a task vector has no place in a model whose changes are of low rank; linearize without")
        origin = dict(self.origin.named_parameters())
        _refuse_unknown(delta, {name: origin[name] for name in self._names})
        with torch.no_grad():
            for name, key in self._names.items():
                start = origin[name].to(self.theta[key].dtype)
                self.theta[key].copy_(start + delta[name].to(start) if name in delta else start)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        value, change = self.terms(self.delta, *args, **kwargs)
        return value + change

    def terms(self, delta: Delta, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """f(x; theta_0) and J delta: f_lin at theta_0 + a delta is the first plus a times the second, for every a."""
        origin = {name: p.detach() for name, p in self.origin.named_parameters()}
        _refuse_unknown(delta, origin)
        moving = {name: origin[name] for name in delta}
        tangents = {name: delta[name].to(origin[name].dtype) for name in delta}

        def value(chosen: dict[str, Tensor]) -> Tensor:
            return self.pick(functional_call(self.origin, {**origin, **chosen}, args, kwargs))

        found: tuple[Tensor, Tensor] = jvp(value, (moving,), (tangents,))  # type: ignore[assignment]
        return found

    def sweep(self, delta: Delta, alphas: Sequence[float], *args: Any, **kwargs: Any) -> Tensor:
        """f_lin at theta_0 + a delta for every a, from one forward-mode pass: [alphas, *output]."""
        first, second = self.terms(delta, *args, **kwargs)
        scale = torch.tensor(list(alphas), dtype=second.dtype, device=second.device)
        return first + scale.reshape(-1, *[1] * second.ndim) * second

    def refuse_unsupported(self, *args: Any, **kwargs: Any) -> None:
        """Raise SourceError that names the first module without forward-mode differentiation, for an input."""
        self.refuse_unsupported_run(lambda: self(*args, **kwargs))

    def refuse_unsupported_run(self, run: Callable[[], object]) -> None:
        """The same for whatever runs the model."""
        if (found := unsupported(self.origin, run)) is not None:
            name, error = found
            raise SourceError(f"{name} has no forward-mode differentiation, so it cannot be linearised: {error}")


def unsupported(module: nn.Module, run: Callable[[], object]) -> tuple[str, str] | None:
    """The innermost module in which `run` fails, with the error's first line; None if it does not."""
    inside: list[str] = []
    names = {part: name for name, part in module.named_modules()}
    with _watched(names, inside):
        try:
            run()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            place = inside[-1] if inside and inside[-1] else type(module).__name__
            return place, said
    return None


@contextmanager
def _watched(names: Mapping[nn.Module, str], inside: list[str]) -> Iterator[None]:
    """Keep the names of the modules that have been entered and not left."""

    def leave(*_: object) -> None:
        inside.pop()

    hooks = []
    for part, name in names.items():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(part.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_forward_mode(module: nn.Module) -> tuple[str, ...]:
    """Switch fused kernels of transformers to eager ones, and say which."""
    switched = []
    for what in ("attn", "experts"):
        switch = getattr(module, f"set_{what}_implementation", None)
        if switch is not None and getattr(module.config, f"_{what}_implementation", None) not in (None, "eager"):
            try:
                switch("eager")
            except ValueError:  # a model with one implementation only
                continue
            switched.append("attention" if what == "attn" else what)
    return tuple(switched)


def _refuse_unknown(delta: Delta, known: Mapping[str, Tensor]) -> None:
    for name, tensor in delta.items():
        if name not in known:
            raise SourceError(f"the network has no parameter {name!r}{did_you_mean(name, known)}")
        if tensor.shape != known[name].shape:
            raise SourceError(
                f"{name} is {list(tensor.shape)} in the task vector, {list(known[name].shape)} in the network"
            )


def advantage(error_linear: float, error_ordinary: float, classes: int) -> float:
    """Non-linear advantage: how much of what could be right is lost by linearising, (e_lin - e) / (1 - 1 / C)."""
    if classes < 2:
        raise WeightsmithError(f"a classifier has two classes or more, not {classes}")
    return (error_linear - error_ordinary) / (1 - 1 / classes)
