"""Frank-Wolfe through a pool of checkpoints, in its coefficients: every iterate is a recipe.

All iterates are base + sum_v c_v (x_v - base) tensor by tensor, so that a step towards a vertex is a step of the c.
The gradient of the loss by c is <gradient, x_v - base>, which `engine.gradient` finds block by block: memory is that of
one model and one gradient, whatever the pool.

Source: "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization" (Chen et al., ICCV 2025), hard and soft, with
task arithmetic as the local merge; `search.local` has TIES and DARE.  `search.frank_wolfe` is the same for weights in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import NumericError, PlanError, RecipeError, SourceError, nearest
from weightsmith.search.frank_wolfe import GRANULARITIES, INITIAL, SCORES
from weightsmith.tune.objective import Objective
from weightsmith.tune.resident import Resident
from weightsmith.tune.setting import Setting
from weightsmith.tune.space import Free
from weightsmith.tune.work import prepared

__all__ = ["TRIMMED", "Look", "Options", "Stride", "Walk"]

VARIANTS = ("hard", "soft")
TRIMMED = ("ties", "dare")
"""Local merges that drop entries of the way to a vertex."""
LOCAL = ("task_arithmetic", *TRIMMED, "adamerging")
SEARCHES = 8
"""Evaluations of the loss of one line search."""


@dataclass(frozen=True)
class Options:
    """Options of the walk.

    variant      hard: one vertex an iteration; soft: for each task in turn the best one that no other task took
    granularity  task: one vertex for all tensors; layer: one for each tensor
    score        cosine of gradient and weights (the reference); inner, inner_delta: inner product, which choose alike
    step_size    factor of 2 / (t + 2)
    scaling      coefficient of the local merge
    start        all: base + scaling sum of all changes; base: the base
    line_search  the step that the loss likes best in place of the schedule; it never rises then
    tolerance    end where the gap is below it
    local        how the chosen are merged around the current weights: task_arithmetic, ties, dare, or (soft) adamerging
                 by the objective
    density      ties, dare: share of the way to a vertex that is kept
    inner_steps, inner_lr  of adamerging
    """

    variant: str = "hard"
    granularity: str = "task"
    score: str = "cosine"
    step_size: float = 0.1
    scaling: float = 0.3
    start: str = "all"
    line_search: bool = False
    tolerance: float = 0.0
    local: str = "task_arithmetic"
    density: float = 0.2
    inner_steps: int = 100
    inner_lr: float = 1e-3

    def __post_init__(self) -> None:
        if wrong := [f"frank_wolfe: {text}" for text in self._wrong()]:
            raise RecipeError(*wrong)

    def _wrong(self) -> Iterator[str]:
        known: Mapping[str, Sequence[str]] = {
            "variant": VARIANTS, "granularity": GRANULARITIES, "score": SCORES, "start": ("all", "base"), "local": LOCAL
        }  # fmt: skip
        for name, words in known.items():
            if (given := getattr(self, name)) not in words:
                hint = nearest(str(given), words)
                yield f"{name} = {given!r}; expected one of {', '.join(words)}{hint}"
        for name in ("step_size", "scaling", "inner_lr"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                yield f"{name} = {value!r}; expected a number above 0"
        if type(self.density) not in (int, float) or not 0 < self.density <= 1:
            yield f"density = {self.density!r}; expected a number above 0, at most 1"
        if self.local == "adamerging" and self.variant == "hard":
            yield "local: adamerging weighs several vertices; write variant: soft, too"
        if self.line_search and (self.local != "task_arithmetic" or self.variant == "soft"):
            yield "line_search looks along the line to one vertex: take variant: hard and local: task_arithmetic"
        line: Any = self.line_search
        if type(line) is not bool:
            yield f"line_search = {line!r}; expected true or false"
        if type(self.tolerance) not in (int, float) or not 0 <= self.tolerance < math.inf:
            yield f"tolerance = {self.tolerance!r}; expected a number from 0 on"
        if type(self.inner_steps) is not int or self.inner_steps < 1:
            yield f"inner_steps = {self.inner_steps!r}; expected a whole number from 1 on"

    def size(self, t: int) -> float:
        """The share of the way that iteration t goes."""
        if self.variant == "soft" and t == 0:
            return self.scaling
        return self.scaling * self.step_size * 2 / (t + 2)


@dataclass(frozen=True, eq=False)
class Look:
    """What an iteration sees before it moves.

    rounds  a vertex for each tensor (None: no move), once, or once for each task
    ways    for each round float64 [tensors, models], from here to the vertices
    """

    rounds: Sequence[Sequence[int | None]]
    ways: Sequence[Tensor]
    gap: float
    loss: float


@dataclass(frozen=True, eq=False)
class Stride:
    """One iteration: the choice for each tensor (None: no move), gap and loss before it, the share of the way."""

    chosen: Mapping[str, str | None]
    gap: float
    size: float
    loss: float


class Walk:
    """A pool, a module that holds the current merge, and data whose loss is followed.

    coefficients  float64 [tensors, models], of the current iterate; names: of the tensors
    """

    def __init__(
        self,
        tree: Mapping[str, Any],
        given: Mapping[str, Any] | None,
        module: nn.Module,
        data: Mapping[str, Sequence[Any]],
        function: Callable[[nn.Module, Any], Any],
        objective: Objective,
        options: Options = Options(),
        threads: int = 1,
        leave: bool = False,
    ) -> None:
        """`leave`: begin at the base, whatever the options say of the start."""
        if not tree.get("models"):
            raise RecipeError("frank_wolfe: the pool is empty; name at least one checkpoint under models")
        if not data or not all(data.values()):
            raise SourceError("frank_wolfe: no data whose loss could be followed")
        self.options, self.data, self.function, self.objective = options, data, function, objective
        kept = {key: value for key, value in tree.items() if key not in ("method", "parameters", "rules")}
        plain = {**kept, "method": [{"name": "task_arithmetic"}], "parameters": {"lambda": 1.0}}
        setting = Setting({"weight": Free("tensor", start=1.0)}, objective)
        self.work = prepared(plain, given, setting, module)
        if self.work.inputs.base is None:
            raise PlanError(["frank_wolfe needs a base: the pool's changes are measured from it"])
        (self._numbers,) = self.work.numbers
        self.resident = Resident(module, self.work.places, self.work.plan, self.work.inputs, threads)
        self._threads = threads
        self.names = list(self._numbers.learned())
        self.models = list(self.work.inputs.experts)
        count = len(self.models)
        first = options.scaling if options.start == "all" and not leave else 0.0
        self.coefficients = torch.full((len(self.names), count), first, dtype=torch.float64)
        self._begin = self.coefficients.clone()
        self._squares: Tensor | None = None

    # -- iterations

    def step(self, t: int) -> Stride:
        """Take iteration t, counted from 0."""
        look, size = self.look(), self.options.size(t)
        if self.options.line_search:
            size = self._searched(self.coefficients + look.ways[0], look.loss)
        if self.options.local == "adamerging":
            self.coefficients = self._adamerged(look.ways, 0.3 if t == 0 else 1e-8)
            size = math.nan
        else:
            self.coefficients = self.coefficients + size * torch.stack(list(look.ways)).sum(0)
        return Stride(self.called(look), look.gap, size, look.loss)

    def look(self) -> Look:
        """Find what the loss gradient at the current weights points away from."""
        soft = self.options.variant == "soft"
        vertices, taken = self._vertices(), dict[int, set[int]]()
        rounds: list[list[int | None]] = []
        ways: list[Tensor] = []
        loss = gap = 0.0
        for data in [{task: batches} for task, batches in self.data.items()] if soft else [self.data]:
            slopes, extra, part = self._slopes(data)
            loss += part
            chosen = self._choose(slopes, extra, vertices, taken)
            for row, vertex in enumerate(chosen):
                if vertex is not None:
                    taken.setdefault(row, set()).add(vertex)
            rounds.append(chosen)
            ways.append(self._towards(chosen, vertices) - self.coefficients)
            gap -= float((slopes * ways[-1]).sum())
            if len(rounds) >= len(self.models):
                break
        return Look(rounds, ways, gap, loss)

    def called(self, look: Look) -> dict[str, str | None]:
        """Tensor -> the names of its vertices, with + between; None: no move."""
        words = [*self.models, INITIAL]
        return {
            name: "+".join(words[i] for chosen in look.rounds if (i := chosen[row]) is not None) or None
            for row, name in enumerate(self.names)
        }

    def _adamerged(self, ways: Sequence[Tensor], start: float) -> Tensor:
        """Learn, tensor by tensor, how far to go each way (AdaMerging around the current weights)."""
        far = torch.full((len(ways), len(self.names), 1), start, dtype=torch.float64, requires_grad=True)
        directions, begin = torch.stack(list(ways)), self.coefficients
        optimizer = torch.optim.Adam([far], lr=self.options.inner_lr)
        for _ in range(self.options.inner_steps):
            self.coefficients = begin + (far.detach() * directions).sum(0)
            slopes, _, _ = self._slopes(self.data)
            far.grad = (slopes * directions).sum(-1, keepdim=True)
            optimizer.step()
        return begin + (far.detach() * directions).sum(0)

    def _vertices(self) -> Tensor:
        """[vertices, tensors, models]: each checkpoint, and the start if it is none of them."""
        eye = torch.eye(len(self.models), dtype=torch.float64)[:, None].expand(-1, len(self.names), -1)
        return eye if INITIAL in self.models else torch.cat([eye, self._begin[None]])

    def _choose(
        self, slopes: Tensor, extra: _Extra, vertices: Tensor, taken: Mapping[int, set[int]]
    ) -> list[int | None]:
        """For each tensor the vertex of the least score, the first of equals; None where the gradient is zero."""
        inner = torch.einsum("tm,vtm->vt", slopes, vertices)
        if self.options.score == "cosine":
            norms = extra.norms * self._lengths().sqrt()
            inner = torch.where(norms > 0, (inner + extra.base) / norms.clamp(min=1e-300), 0.0)
        scores = torch.where(extra.norms > 0, inner, 0.0)
        if self.options.granularity == "task":
            total = scores.sum(1)
            total[sorted({v for row in taken.values() for v in row})] = math.inf
            best = [int(total.argmin())] * len(self.names)
        else:
            for row, out in taken.items():
                scores[sorted(out), row] = math.inf
            best = scores.argmin(0).tolist()
        return [vertex if norm > 0 else None for vertex, norm in zip(best, extra.norms.tolist(), strict=True)]

    def _towards(self, chosen: Sequence[int | None], vertices: Tensor) -> Tensor:
        rows = [self.coefficients[r] if v is None else vertices[v, r] for r, v in enumerate(chosen)]
        return torch.stack(rows)

    def _searched(self, towards: Tensor, loss: float) -> float:
        """The share of the way with the least loss, by golden sections; 0 where none is better than here."""
        begin, ratio = self.coefficients, (math.sqrt(5) - 1) / 2
        known: dict[float, float] = {0.0: loss}

        def at(share: float) -> float:
            if share not in known:
                self.coefficients = begin + share * (towards - begin)
                known[share] = self.loss()
            return known[share]

        low, high = 0.0, 1.0
        at(1.0)
        for _ in range(SEARCHES):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            low, high = (low, b) if at(a) <= at(b) else (a, high)
        self.coefficients = begin
        return min(known, key=lambda share: (known[share], share))

    # -- losses and gradients

    def loss(self) -> float:
        """The loss at the current coefficients."""
        self._put()
        with torch.no_grad():
            return sum(float(part) for _, part in self._losses(self.data))

    def _put(self) -> None:
        with torch.no_grad():
            self._numbers.raw[0].copy_(self.coefficients)
        self._numbers.put()
        self.resident.refresh()

    def _losses(self, data: Mapping[str, Sequence[Any]]) -> Any:
        count = sum(len(batches) for batches in data.values())
        for task, batches in data.items():
            for batch in batches:
                part = self.objective.loss(self.function(self.resident.module, batch), batch, task) / count
                yield task, part

    def _slopes(self, data: Mapping[str, Sequence[Any]]) -> tuple[Tensor, _Extra, float]:
        """<gradient, x_v - base> by tensor and model, what the cosine needs, and the loss."""
        self._put()
        total = 0.0
        for task, part in self._losses(data):
            value = float(part.detach())
            if not math.isfinite(value):
                raise NumericError(f"frank_wolfe: the loss of {task} is {value:g}")
            total += value
            torch.autograd.backward(part)
        places = self.work.places
        gradients = {name: g for name in self.names if (g := places[name].grad) is not None}
        assert self.resident.pullback is not None
        found = self.resident.pullback.all(gradients, self._threads)
        raw: Any = self._numbers.raw[0]
        raw.grad = None
        self._numbers.backward({leaf: found[leaf] for leaf in self.resident.tensors})
        extra = self._extra(gradients)
        for parameter in self.resident.module.parameters():
            parameter.grad = None
        slopes: Tensor = raw.grad.double().clone()
        return slopes, extra, total

    def _extra(self, gradients: Mapping[str, Tensor]) -> _Extra:
        """|gradient| and <gradient, base> of each tensor; where there is no gradient 0."""
        norms, products = [], []
        base = self.work.inputs.base
        assert base is not None
        for name in self.names:
            g = gradients.get(name)
            norms.append(0.0 if g is None else float(torch.linalg.vector_norm(g.double())))
            wanted = g is not None and self.options.score == "cosine"
            products.append(float((g.double().cpu() * base.read(name).double()).sum()) if wanted else 0.0)  # type: ignore[union-attr]
        return _Extra(torch.tensor(norms, dtype=torch.float64), torch.tensor(products, dtype=torch.float64))

    def _lengths(self) -> Tensor:
        """|x_v|^2 by vertex and tensor: one tensor of the pool at a time, once."""
        if self._squares is None:
            now, self.coefficients = self.coefficients, self._begin
            self._put()
            begin = [float(self.work.places[name].detach().double().square().sum()) for name in self.names]
            self.coefficients = now
            rows = [
                [float(source.read(name).double().square().sum()) for name in self.names]
                for source in self.work.inputs.experts.values()
            ]
            self._squares = torch.tensor(rows if INITIAL in self.models else [*rows, begin], dtype=torch.float64)
        return self._squares

    def table(self) -> dict[str, Tensor]:
        """Tensor -> coefficients [models] of the current iterate."""
        return dict(zip(self.names, self.coefficients.clone().unbind(), strict=True))


@dataclass(frozen=True, eq=False)
class _Extra:
    """Of each tensor |gradient|, and <gradient, base>."""

    norms: Tensor
    base: Tensor
