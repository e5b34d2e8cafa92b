"""Loss and accuracy along the straight line between two networks, and how high it rises above its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from weightsmith.core.errors import NumericError, SourceError
from weightsmith.observe.tangent import Linearized
from weightsmith.report.figures import Curve as Line
from weightsmith.report.figures import Curves
from weightsmith.report.html import page

__all__ = ["Curve", "Measure", "Outcomes", "as_page", "curve", "height", "plane", "recalibrate", "rows"]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What a network makes of n examples: [n] float64 each.

    loss  summed over the example's predictions;  hits  right ones of them;  count  how many there are
    """

    loss: np.ndarray
    hits: np.ndarray
    count: np.ndarray


Measure = Callable[[nn.Module], Outcomes]
"""Runs a network on always the same examples."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A line (1 - lambda) A + lambda B.

    points    [m] lambda, from 0 to 1
    loss      [m] mean loss per prediction;  accuracy  [m] share of right ones
    barrier   see `height`, of the loss;  dip  that of the accuracy, downwards
    interval  of the barrier: 95% of resamplings of the examples
    """

    points: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    barrier: float
    interval: tuple[float, float]
    dip: float

    def plain(self) -> dict[str, Any]:
        """The curve as JSON has it."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}


def height(values: np.ndarray, points: np.ndarray) -> Any:
    """max over lambda of L(lambda) - ((1 - lambda) L(0) + lambda L(1)): values [..., m], points [m] from 0 to 1.

    At least 0, as the ends lie on the chord.
    """
    chord = (1 - points) * values[..., :1] + points * values[..., -1:]
    return (values - chord).max(axis=-1)


def curve(
    first: nn.Module,
    second: nn.Module,
    measure: Measure,
    *,
    points: int = 25,
    refresh: Callable[[nn.Module], object] | None = None,
    resamplings: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Curve:
    """Measure the networks between two of one shape.

    Floating parameters and buffers are interpolated, others are those of `first`; neither network is changed.
    refresh  called with each network on the way, before it is measured (`recalibrate`)
    Raises SourceError for networks of unlike shape, NumericError for a loss that is no number at an end.
    """
    if points < 2:
        raise SourceError(f"a line has at least its two ends, not {points} points")
    ends = _states((first, second))
    module = copy.deepcopy(first)
    places = np.linspace(0, 1, points)
    found: list[Outcomes] = []
    for i, place in enumerate(places):
        _put(module, ends, (1 - float(place), float(place)))
        if refresh is not None and 0 < place < 1:
            refresh(module)
        found.append(measure(module))
        if progress:
            progress(i + 1, points)
    return _curve(places, found, resamplings, seed)


def plane(
    corners: Sequence[nn.Module],
    measure: Measure,
    *,
    points: int = 11,
    margin: float = 0.2,
    refresh: Callable[[nn.Module], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The loss on the plane through three networks: coordinates [points], and losses [points, points].

    Entry (i, j) is of A + x_i (B - A) + x_j (C - A), x from -margin to 1 + margin; the corners are at (0, 0), (1, 0)
    and (0, 1).  No network is changed; see `curve`.
    """
    if len(corners) != 3:
        raise SourceError(f"a plane goes through three networks, not {len(corners)}")
    states = _states(corners)
    module = copy.deepcopy(corners[0])
    places = np.linspace(-margin, 1 + margin, points)
    losses = np.empty((points, points))
    for i, x in enumerate(places):
        for j, y in enumerate(places):
            _put(module, states, (1 - float(x) - float(y), float(x), float(y)))
            if refresh is not None:
                refresh(module)
            found = measure(module)
            losses[i, j] = found.loss.sum() / found.count.sum()
    return places, losses


def _states(modules: Sequence[nn.Module]) -> list[dict[str, torch.Tensor]]:
    """Their tensors; SourceError unless they are of the same names and shapes, and all ordinary or around one point."""
    if len({type(module) is Linearized for module in modules}) > 1:
        raise SourceError("no line from one to the other: one is linearised, the other an ordinary model")
    found = [{n: t.detach() for n, t in module.state_dict().items()} for module in modules]
    for other in found[1:]:
        for name in found[0].keys() | other.keys():
            shapes = [list(state[name].shape) if name in state else None for state in (found[0], other)]
            if shapes[0] != shapes[1]:
                raise SourceError(f"no line from one to the other: {name} is {shapes[0]} and {shapes[1]}")
            if name.startswith("origin.") and not torch.equal(found[0][name], other[name]):
                raise SourceError("no line from one to the other: they are linearised around different points")
    return found


def _put(module: nn.Module, ends: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> None:
    """Make a network the weighted sum of some, exactly one of them where it has all the weight."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if 1.0 in weights and not any(w not in (0.0, 1.0) for w in weights):
                tensor.copy_(ends[weights.index(1.0)][name])
            else:
                tensor.copy_(sum(w * end[name].double() for w, end in zip(weights, ends, strict=True)))


def _curve(points: np.ndarray, found: Sequence[Outcomes], resamplings: int, seed: int) -> Curve:
    loss, hits, count = (np.stack([getattr(one, what) for one in found]) for what in ("loss", "hits", "count"))
    mean = loss.sum(1) / count.sum(1)
    share = hits.sum(1) / count.sum(1)
    if not np.isfinite(mean[[0, -1]]).all():
        raise NumericError("the loss at an end of the line is no finite number; nothing rises above it")
    draw = np.random.default_rng(seed)
    examples = loss.shape[1]
    rises = []
    for _ in range(resamplings):
        chosen = np.bincount(draw.integers(examples, size=examples), minlength=examples).astype(float)
        rises.append(float(height((loss @ chosen) / (count @ chosen), points)))
    low, high = (float(x) for x in np.quantile(rises, (0.025, 0.975))) if rises else (np.nan, np.nan)
    return Curve(points, mean, share, float(height(mean, points)), (low, high), float(height(-share, points)))


def recalibrate(module: nn.Module, run: Callable[[nn.Module], object]) -> bool:
    """Recompute the statistics of every batch normalisation as means over what `run` feeds through the network.

    Averages of weights have other activations than the statistics' average says.  False where there are none.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        if norms:
            with torch.no_grad():
                run(module)
    finally:
        for norm, momentum, training in kept:
            norm.momentum = momentum
            norm.train(training)
    return bool(norms)


# --- what is shown -----------------------------------------------------------------------------------


def rows(curves: Mapping[str, Curve]) -> tuple[str, Sequence[str], list[tuple[object, ...]], Sequence[int]]:
    """A table of some lines: title, columns, rows, and which columns are numbers."""
    found: list[tuple[object, ...]] = []
    for name, c in curves.items():
        middle = int(np.argmin(np.abs(c.points - 0.5)))
        losses = (f"{c.loss[i]:.4f}" for i in (0, middle, -1))
        found.append((name, *losses, f"{c.barrier:.4f}", f"{c.interval[0]:.4f} to {c.interval[1]:.4f}",
                      f"{c.accuracy[middle]:.2%}", f"{c.dip:.2%}"))  # fmt: skip
    columns = ("line", "loss first", "middle", "second", "barrier", "95%", "accuracy middle", "barrier of it")
    return "on the line between the models", columns, found, (1, 2, 3, 4, 6, 7)


def as_page(title: str, curves: Mapping[str, Curve], more: Sequence[Any] = ()) -> str:
    """The losses along some lines as an HTML page;  more: sections behind them."""
    lines = [Line(name, c.points.tolist(), c.loss.tolist()) for name, c in curves.items()]
    notes = [f"{n}: barrier {c.barrier:.3g}, 95% {c.interval[0]:.3g} to {c.interval[1]:.3g}" for n, c in curves.items()]
    line = Curves("Loss on the line between the models", lines, "lambda", "loss", "; ".join(notes))
    return page(title, [line, *more])
