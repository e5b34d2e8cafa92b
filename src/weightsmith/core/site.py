"""All that a method may see of one output block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Found, Pass

if TYPE_CHECKING:
    from torch import Tensor


def _alone(question: Any, make: Callable[[], Tensor]) -> Tensor:
    return make()


__all__ = ["Group", "Site"]

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Site:
    """One block of one tensor: rows `start` to `start + block rows` of `key`, from every input.

    Tensors are float32 (float64 where the inputs are), contiguous, on one device, and never
    written to.  With n experts and a block of shape [rows, *rest] (a 0-dim tensor: []):

    key       the whole tensor's name, shape, stored dtype, role and layer
    stack     [n, *block]; the experts, or after a filter their deltas (`is_delta`)
    base      [*block], or None where the recipe has no base
    names     the experts' names, in recipe order
    start     first row of the block within the tensor
    depth     0 (first block of the stack) to 1 (last); None outside the blocks
    stats     statistic -> one tensor per expert: row blocks if shaped like the parameter, else whole
    found     results of the stage's passes so far, see `result`
    seed      of the recipe; noise is keyed by (seed, tensor name, expert) and flat position
    origin    the site before the pipeline's first stage, for stages that compare with it
    each      the task vectors, read anew whenever one is asked for, for methods that look at one at a time
              (`Traits.streams`); `stack` then has a shape but no data (device meta).  Else ()
    factors   one (left [rows, r], right [r, columns]) per expert with delta = left right, float32, for methods that
              ask for them (`Factored`); `stack` then has a shape but no data (device meta).  Else ()
    once      once(question, make) is make(), or what it gave a sweep's other variant that asked the same of this site:
              for what a factor of the result does not change.  Never written to
    told      figures that a method found on the way, see `tell`
    """

    key: Key
    stack: Tensor
    base: Tensor | None = None
    is_delta: bool = False
    names: tuple[str, ...] = ()
    start: int = 0
    depth: float | None = None
    stats: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    found: Found = field(default_factory=dict)
    seed: int = 0
    origin: Site | None = None
    factors: tuple[tuple[Tensor, Tensor], ...] = ()
    each: Sequence[Tensor] = ()
    once: Callable[[Any, Callable[[], Any]], Any] = _alone
    told: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.stack.shape[0]

    @property
    def block_shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    @property
    def offset(self) -> int:
        """Flat position of the block's first element within the tensor."""
        return self.start * self.key.row_numel

    @property
    def deltas(self) -> Tensor:
        """Task vectors, expert - base: [n, *block]."""
        if self.factors:
            return torch.stack([left @ right for left, right in self.factors])
        if len(self.each):
            return torch.stack(list(self.each))
        if self.is_delta:
            return self.stack
        if self.base is None:
            raise NumericError(f"{self.key.name}: a task vector needs a base model")
        return self.stack - self.base

    @property
    def tasks(self) -> Sequence[Tensor]:
        """The task vectors, [*block] each; walk through them one by one: where `each` is set they are read then."""
        return self.each if len(self.each) else self.deltas.unbind()

    @property
    def experts(self) -> Tensor:
        """The experts' weights: [n, *block] (base + delta after a filter)."""
        if not self.is_delta and not self.factors:
            return self.stack
        return self.deltas if self.base is None else self.base + self.deltas

    def with_deltas(self, deltas: Tensor) -> Site:
        """The same site with other task vectors; the first such edit is remembered as `origin`."""
        return replace(self, stack=deltas, is_delta=True, origin=self.origin or self, factors=(), each=())

    def with_found(self, found: Found) -> Site:
        return replace(self, found=found)

    def result(self, asked: Pass[R]) -> R:
        """What a pass of this stage has found."""
        found: R = self.found[asked]
        return found

    def at_zero(self) -> Site:
        """The same task vectors around a base of zeros: what a method returns here is its merged task vector."""
        if self.factors or len(self.each):
            like = self.factors[0][0] if self.factors else self.base
            assert like is not None
            zeros = torch.zeros(self.block_shape, dtype=like.dtype, device=like.device)
            return replace(self, is_delta=True, base=zeros, origin=self.origin or self)
        deltas = self.deltas
        return replace(self, stack=deltas, is_delta=True, base=torch.zeros_like(deltas[0]), origin=self.origin or self)

    def tell(self, what: str, figure: float) -> None:
        """Keep a figure, the largest of a name, for what the run says at its end (`Stage.says`).  No result uses it.

        A method that kernels may carry out has no site then: it has `Stage.figures`.
        """
        self.told[what] = max(figure, self.told.get(what, figure))

    def spread(self, value: float | tuple[float, ...]) -> tuple[float, ...]:
        """A parameter that is one number or one per expert, as one per expert."""
        if isinstance(value, tuple):
            if len(value) != self.count:
                raise ValueError(f"{len(value)} values for {self.count} experts")
            return value
        return (float(value) if isinstance(value, (int, float)) else value,) * self.count


@dataclass(frozen=True, eq=False)
class Group:
    """Several whole tensors at once, for methods of GROUP grain: tensor name -> Site."""

    name: str
    sites: Mapping[str, Site]
