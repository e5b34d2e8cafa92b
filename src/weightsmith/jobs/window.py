"""Averages over the checkpoints of one training run, weighted by their steps.

An average of checkpoints equals one run whose updates were scaled down towards its end: with
theta = theta_1 + sum_i w_i (theta_{i+1} - theta_i) the weight of checkpoint i is w_{i-1} - w_i.  So each schedule by
which a learning rate may fall has its average.  Source: "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging"
(2025), its theorem; the shapes are those of "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"
(Haegele et al., NeurIPS 2024).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.io import system
from weightsmith.recipe.load import load
from weightsmith.recipe.schema import Recipe

__all__ = ["WINDOWS", "steps_in", "weights", "window"]

_STEP = re.compile(r"(\d+)(?!.*\d)")

_LEFT: Mapping[str, Callable[[float], float]] = {
    "linear": lambda s: 1 - s,
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    "minus-sqrt": lambda s: 1 - math.sqrt(s),
}
"""What is left of the learning rate at 0..1 of the window."""

WINDOWS = ("uniform", *_LEFT, "ema")


def weights(steps: Sequence[int], kind: str, decay: float = 0.9) -> list[float]:
    """The weight of each checkpoint, which sum to 1; steps rise.

    uniform     1 / K
    linear, cosine, minus-sqrt  f(s_{i-1}) - f(s_i), f = 1 - s, (1 + cos pi s) / 2, 1 - sqrt s, at
                s_i = (t_i - t_0) / (t_K - t_0), t_0 one interval before the first: linear is uniform where the steps
                are even, cosine prefers the middle, minus-sqrt the beginning
    ema         decay^(K - i) (1 - decay), the first decay^(K - 1): the exponential mean over the checkpoints

    Raises RecipeError for an unknown kind, no checkpoint, steps that do not rise, and a decay outside (0, 1).
    """
    if kind not in WINDOWS:
        raise RecipeError(f"--window {kind}: expected one of {', '.join(WINDOWS)}{did_you_mean(kind, WINDOWS)}")
    if not steps:
        raise RecipeError("--window: no checkpoint")
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise RecipeError(f"--window: two checkpoints of one step, or steps that fall: {list(steps)[:8]}")
    if not 0 < decay < 1:
        raise RecipeError(f"--decay {decay:g} is outside (0, 1)")
    count = len(steps)
    if kind == "uniform" or count == 1:
        return [1 / count] * count
    if kind == "ema":
        return [decay ** (count - 1), *((1 - decay) * decay ** (count - i) for i in range(2, count + 1))]
    begin = 2 * steps[0] - steps[1]
    left = [_LEFT[kind]((step - begin) / (steps[-1] - begin)) for step in (begin, *steps)]
    return [before - after for before, after in itertools.pairwise(left)]


def steps_in(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint, rising: the entries of a folder whose names end in a number, as checkpoint-500 or step_1000.

    Raises RecipeError where two have one step.
    """
    found: dict[int, Path] = {}
    for path in sorted(system.call(list, folder.iterdir())):
        model = path.is_dir() or path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
        step = _STEP.search(path.stem if path.is_file() else path.name)
        if not model or step is None or path.name.startswith("."):
            continue
        if int(step[1]) in found:
            raise RecipeError(f"{folder}: {found[int(step[1])].name} and {path.name} are both of step {int(step[1])}")
        found[int(step[1])] = path
    return dict(sorted(found.items()))


def window(source: Path, kind: str, *, last: int | None = None, decay: float = 0.9) -> Recipe:
    """The recipe that averages a run: a folder's checkpoints, or a recipe's models by the steps in their names.

    last  take the last so many only
    """
    if last is not None and last < 1:
        raise RecipeError(f"--last {last} is below 1")
    if source.is_dir():
        paths = list(steps_in(source).items())
        if not paths:
            raise RecipeError(f"{source}: no checkpoint in it; their names end in their steps, as checkpoint-500")
        paths = paths[-(last or len(paths)) :]
        steps = [step for step, _ in paths]
        tree = {"models": {f"step {step}": str(path.absolute()) for step, path in paths}}
    else:
        recipe = load(source)
        found = sorted((_step_of(name, ref.model), name) for name, ref in recipe.models.items())
        found = found[-(last or len(found)) :]
        steps = [step for step, _ in found]
        given = recipe.model_dump(mode="json", exclude_defaults=True)
        kept = {key: value for key, value in given.items() if key not in ("method", "parameters", "rules", "base")}
        tree = {**kept, "models": {name: given["models"][name] for _, name in found}}
    shares = weights(steps, kind, decay)
    weight = dict(zip(tree["models"], shares, strict=True))
    return Recipe.model_validate({**tree, "method": "linear", "parameters": {"weight": weight}})


def _step_of(name: str, model: object) -> int:
    for text in (name, Path(str(model)).name):
        if (found := _STEP.search(text)) is not None:
            return int(found[1])
    raise RecipeError(f"--window: neither {name!r} nor {model} ends in a step; call it step 500")
