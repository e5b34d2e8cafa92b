"""An inspection as tables, as plain values for JSON, and as one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from weightsmith.core.errors import SourceError, some
from weightsmith.inspect.advice import Advice
from weightsmith.inspect.facts import Matrix, Measures, SpectralMeasures, pairs
from weightsmith.inspect.run import Inspection
from weightsmith.inspect.spectra import POINTS
from weightsmith.report.figures import BLUE, BOTH, RED, Curve, Curves, Heat
from weightsmith.report.html import Section, Text, page
from weightsmith.report.table import Column, Table

__all__ = ["advice_lines", "figures", "from_plain", "html_page", "plain", "summary", "tables"]

Number = float | None


def plain(found: Inspection) -> dict[str, Any]:
    """What `--json` prints: `Measures` under their own names."""
    return {name: getattr(found, name) for name in found.__dataclass_fields__}


def from_plain(told: Mapping[str, Any]) -> Inspection:
    """The inspection that `--json` has printed; SourceError where it is none."""

    def read(one: Mapping[str, Any]) -> Measures:
        spectra = one["spectra"]
        return Measures(**{**one, "spectra": None if spectra is None else SpectralMeasures(**spectra)})

    def each(some: Mapping[str, Any]) -> dict[str, Measures]:
        return {name: read(one) for name, one in some.items()}

    try:
        return Inspection(
            experts=tuple(told["experts"]),
            model=read(told["model"]),
            layers=each(told["layers"]),
            roles=each(told["roles"]),
            cells={layer: each(roles) for layer, roles in told["cells"].items()},
            tensors=each(told["tensors"]),
            left_out=dict(told["left_out"]),
            side=int(told["side"]),
            advice=tuple(Advice(**one) for one in told["advice"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError('not what "weightsmith inspect --json" prints') from None


def advice_lines(found: Inspection) -> list[str]:
    """One sentence per rule that holds, its source behind it."""
    return [f"{advice.text}. [{advice.source}]" for advice in found.advice]


def summary(found: Inspection) -> list[str]:
    """The whole model in sentences."""
    model = found.model
    lines = [f"{model.tensors} tensors, {model.entries:,} weights, {len(found.experts)} experts"]
    if len(found.experts) > 1:
        lines.append(
            f"sign conflict at {_percent(model.conflict)} of the weights that several experts changed; "
            f"{_percent(model.outvoted)} of the weight mass is outvoted"
        )
    if model.spectra:
        chance = "" if model.spectra.by_chance is None else f", {model.spectra.by_chance:.2f} times that by chance"
        several = f"; singular interference {model.spectra.interference:.3g}{chance}" if len(found.experts) > 1 else ""
        lines.append(f"spectra of {max(model.spectra.matrices)} matrices, smaller side up to {found.side}{several}")
    else:
        lines.append(f"no spectra: no matrix has a smaller side up to {found.side}" if found.side else "no spectra")
    if found.left_out:
        lines.append(f"not looked at: {some([f'{name} ({why})' for name, why in found.left_out.items()])}")
    return lines


def _percent(value: Number) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


# --- tables ------------------------------------------------------------------------------------------


def tables(found: Inspection) -> list[Table]:
    """The whole model by expert, its cosines and overlaps, and the layers."""
    several = len(found.experts) > 1
    both = [_square("Cosines of task vectors", found, found.model.cosine),
            _square("Overlap of top-20% masks (Jaccard; independent: 0.11)", found, found.model.overlap)]  # fmt: skip
    return [_experts(found), *(both if several else []), _groups("Layers", found.layers), _groups("Roles", found.roles)]


_EXPERT_COLUMNS = (
    Column("expert", "Expert"),
    Column("norm", "|tau|", 3, meaning="L2 norm of the task vector"),
    Column("relative", "|tau|/|base|", 2, percent=True),
    Column("size", "mean |tau_i|", 6, meaning="mean magnitude over the weights that changed"),
    Column("base_cosine", "cos to base", 3),
    Column("zeros", "unchanged", 1, percent=True, meaning="share of weights that are exactly as in the base"),
    Column("outliers", "above 6 rms", 4, percent=True, meaning="share of entries above 6 root mean squares"),
    Column("peak", "top 0.1% hold", 1, percent=True, meaning="their share of the sum of squares"),
    Column("effective_share", "effective rank", 1, percent=True, meaning="mean over matrices, of the smaller side"),
    Column("stable_rank", "stable rank", 1, meaning="mean over matrices"),
    Column("kept", "kept by 1/n rank", 1, percent=True, meaning="share of squares in the leading 1/n of the rank"),
)


def _experts(found: Inspection) -> Table:
    rows = []
    for i, name in enumerate(found.experts):
        values = {c.key: getattr(found.model, c.key)[i] for c in _EXPERT_COLUMNS[1:] if hasattr(found.model, c.key)}
        if found.model.spectra:
            values |= {k: getattr(found.model.spectra, k)[i] for k in ("effective_share", "stable_rank", "kept")}
        rows.append({"expert": name, **values})
    return Table("Whole model (tau: task vector, the expert minus the base)", _known(_EXPERT_COLUMNS, rows), rows)


def _known(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns that hold anything."""
    return tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))


def _square(title: str, found: Inspection, matrix: Matrix) -> Table:
    # Keys by position: an expert may have any name.
    columns = (Column("name", ""), *(Column(str(i), name, 3) for i, name in enumerate(found.experts)))
    rows = [
        {"name": name, **{str(j): v for j, v in enumerate(row)}}
        for name, row in zip(found.experts, matrix, strict=True)
    ]
    return Table(title, columns, rows)


_GROUP_COLUMNS = (
    Column("name", "Name"),
    Column("entries", "Weights"),
    Column("relative", "|tau|/|base|", 2, percent=True, meaning="mean over experts"),
    Column("cosine", "mean cos", 3, meaning="mean over pairs of experts"),
    Column("conflict", "sign conflict", 1, percent=True, meaning="of weights that several experts changed"),
    Column("outvoted", "outvoted mass", 1, percent=True, meaning="share of the weight mass against the elected sign"),
    Column("overlap", "overlap", 3, meaning="mean Jaccard index of top-20% masks"),
    Column("peak", "top 0.1% hold", 1, percent=True, meaning="mean over experts"),
    Column("effective_share", "effective rank", 1, percent=True, meaning="mean over experts and matrices"),
    Column("by_chance", "interference", 2, unit="x", meaning="shared singular directions; random ones: 1"),
)


def _groups(title: str, groups: Mapping[str, Measures]) -> Table:
    rows = [{"name": name, "entries": m.entries, **{k: f(m) for k, f in _MEANS.items()}} for name, m in groups.items()]
    return Table(title, _known(_GROUP_COLUMNS, rows), rows)


def _mean(values: Iterable[Number]) -> Number:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


_MEANS: Mapping[str, Callable[[Measures], Number]] = {
    "relative": lambda m: _mean(m.relative),
    "cosine": lambda m: _mean(pairs(m.cosine)),
    "conflict": lambda m: m.conflict,
    "outvoted": lambda m: m.outvoted if len(m.norm) > 1 else None,
    "overlap": lambda m: _mean(pairs(m.overlap)),
    "peak": lambda m: _mean(m.peak),
    "effective_share": lambda m: _mean(m.spectra.effective_share) if m.spectra else None,
    "by_chance": lambda m: m.spectra.by_chance if m.spectra else None,
}


# --- the page ----------------------------------------------------------------------------------------


def html_page(found: Inspection, title: str) -> str:
    """One self-contained page: advice, heat maps, tables."""
    sections: list[Section] = [
        Text("", [*summary(found), "tau is the task vector of an expert: its weights minus those of the base."]),
        Text("What the figures speak for", advice_lines(found) or ["No rule holds."]),
        Text("The whole model"),
        _experts(found),
    ]
    maps = figures(found)
    whole = [figure for figure in maps if figure.title in _WHOLE]
    sections += [*whole, Text("By layer"), *(figure for figure in maps if figure.title not in _WHOLE)]
    sections += [_groups("Layers", found.layers), _groups("Roles", found.roles)]
    return page(title, sections)


_COSINES = "Cosines of task vectors"
_OVERLAP = "Overlap of the largest 20% of changes (Jaccard index)"
_SPECTRA = "Singular spectra of task vectors"
_WHOLE = (_COSINES, _OVERLAP, _SPECTRA)


def figures(found: Inspection) -> list[Heat | Curves]:
    """All figures: those of the whole model, then those by layer."""
    names = found.experts
    drawn: list[Heat | Curves] = []
    if len(names) > 1:
        drawn.append(_heat(_COSINES, found.model.cosine, names, names, BOTH, (-1, 1), ".2f"))
        note = "Independent task vectors: 0.11."
        drawn.append(_heat(_OVERLAP, found.model.overlap, names, names, BLUE, (0, 1), ".2f", note))
    if found.model.spectra:
        drawn.append(_curves(found))
    moved = [[None if v is None else 100 * v for v in m.relative] for m in found.layers.values()]
    title = "How far each expert moved, |tau| / |base|, %"
    drawn.append(_heat(title, moved, names, list(found.layers), BLUE, (0, None), ".2f"))
    return [*drawn, *(figure for figure in (_cells(found, *spec) for spec in _MAPS) if figure is not None)]


_MAPS = (
    ("conflict", "Sign conflict by layer and role, %", 100.0, RED, ".1f",
     "Share of the weights changed by several experts that one raised and another lowered."),
    ("outvoted", "Outvoted weight mass by layer and role, %", 100.0, RED, ".1f",
     "Share of the sum of magnitudes whose sign has less mass at its weight."),
    ("cosine", "Mean cosine of task vectors by layer and role", 1.0, BOTH, ".2f", ""),
    ("by_chance", "Singular task interference by layer and role, against random directions", 1.0, RED, ".2f",
     "1: experts share singular directions no more than random ones would."),
)  # fmt: skip


def _cells(found: Inspection, key: str, title: str, factor: float, colours: str, digits: str, note: str) -> Heat | None:
    """One of `_MEANS` for every layer and role; None if it has no values."""
    value = _MEANS[key]
    roles = list(found.roles)
    rows = [
        [None if role not in cells or (v := value(cells[role])) is None else factor * v for role in roles]
        for cells in found.cells.values()
    ]
    if all(v is None for row in rows for v in row):
        return None
    # What layers or roles without a value would only take place.
    columns = [i for i in range(len(roles)) if any(row[i] is not None for row in rows)]
    named = [(n, [row[i] for i in columns]) for n, row in zip(found.cells, rows, strict=True)]
    named = [(n, row) for n, row in named if any(v is not None for v in row)]
    span = (-1, 1) if colours == BOTH else (0, None)
    labels, across = [n for n, _ in named], [roles[i] for i in columns]
    return _heat(title, [row for _, row in named], across, labels, colours, span, digits, note)


def _heat(
    title: str,
    values: Sequence[Sequence[Number]],
    across: Sequence[str],
    down: Sequence[str],
    colours: str,
    span: tuple[float, float | None],
    digits: str,
    note: str = "",
) -> Heat:
    """A heat map, its first row on top."""
    largest = max((v for row in values for v in row if v is not None), default=1.0)
    texts = [["" if v is None else f"{v:{digits}}".replace("-", "−") for v in row] for row in values]
    top = span[1] if span[1] is not None else largest or 1.0
    return Heat(title, list(down), list(across), values, texts, colours, (span[0], top), note=note)


def _curves(found: Inspection) -> Curves:
    """Mean spectra of the experts' task vectors."""
    assert found.model.spectra is not None
    places = [100 * i / (POINTS - 1) for i in range(POINTS)]
    spectra = zip(found.experts, found.model.spectra.curve, strict=True)
    lines = [Curve(name, places, [v or 0.0 for v in curve]) for name, curve in spectra]
    note = f"Mean over matrices with a smaller side of up to {found.side}."
    across, up = "place in the spectrum, %", "singular value / largest"
    return Curves(_SPECTRA, lines, across, up, note)
