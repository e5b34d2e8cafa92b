"""What `weightsmith tune` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weightsmith.cli.show import say, show_json
from weightsmith.core.errors import PlanError

if TYPE_CHECKING:
    from weightsmith.tune.api import Tuned

__all__ = ["listing", "prediction", "preset", "result"]


def listing(json: bool) -> None:
    """Presets and objectives, a line each."""
    from weightsmith.tune.objective import Objective
    from weightsmith.tune.registry import named
    from weightsmith.tune.setting import Preset

    kinds: Mapping[str, Any] = {"presets": named(Preset), "objectives": named(Objective)}
    if json:
        show_json({kind: {name: cls.help() for name, cls in found.items()} for kind, found in kinds.items()})
        return
    for kind, found in kinds.items():
        say(f"{kind.capitalize()}:")
        width = max(map(len, found))
        for name, cls in found.items():
            say(f"  {name:<{width}}  {cls.help()}")


def preset(name: str) -> dict[str, Any]:
    """All that a preset says of itself."""
    from dataclasses import fields
    from inspect import cleandoc

    from weightsmith.inspect.catalogue import describe_preset
    from weightsmith.tune.registry import named
    from weightsmith.tune.setting import Preset

    kind: Any = Preset
    cls = named(kind)[name]
    text = cleandoc(cls.__doc__ or "")
    return describe_preset(name, cls.help(), text, {field.name: field.default for field in fields(cls)})


def prediction(predicted: Mapping[str, int], limit: int | None, *, show: bool, json: bool) -> None:
    """The memory that a tuning will take; PlanError where that is more than allowed."""
    if limit is not None and predicted["in all"] > limit:
        raise PlanError(
            [f"--memory {limit / 1e9:.3g} GB: about {predicted['in all'] / 1e9:.3g} GB are needed, most of it for the "
             f"{max((k for k in predicted if k != 'in all'), key=predicted.__getitem__)}; a smaller batch or length "
             "takes less"]
        )  # fmt: skip
    if show and json:
        show_json(dict(predicted))
    elif show:
        for name, count in predicted.items():
            say(f"{name:<17} {count / 1e9:8.3f} GB")


def result(made: Tuned) -> dict[str, Any]:
    """What there is to say of a finished run."""
    from weightsmith.tune.report import summary

    said = summary(made)
    best = None if made.best is None else {"validation": made.best[0], "step": made.best[1]}
    return {"out": str(made.out), "best": best, "stopped": made.stopped, "classes": made.classes, "said": said}
