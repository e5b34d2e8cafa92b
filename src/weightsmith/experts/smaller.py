"""What is asked of a mixture that is to have fewer experts, and everything that headers, config and statistics tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import PlanError, WeightsmithError, did_you_mean, problems_of
from weightsmith.core.problem import Code, Problem
from weightsmith.experts.clusters import WAYS, Seen, Way, grouped
from weightsmith.experts.grouping import budget
from weightsmith.experts.shrunk import Layer, ShrunkSource
from weightsmith.experts.stacks import Stack, expert_scope, stacks_of
from weightsmith.inputs.opened import Inputs
from weightsmith.io.architectures import CHOSEN_EXPERTS
from weightsmith.io.read.layers import config_mapping
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.read.stats import StatsSource
from weightsmith.io.read.views import JoinedSource
from weightsmith.plan.remarks import foreign_statistics

__all__ = ["CODED", "NAME", "Shrinking", "Smaller", "smaller"]

NAME = "model"
"""What the larger model is called in recipes and fingerprints."""
CODED = "mc_smoe"
"""The way whose result is a compressed folder."""
_FIELDS = ("counts", "saliency", "logits_gram", "outputs_cosine", "means_gram", "gated_means_gram")
_BLOCK = 32


@dataclass(frozen=True)
class Shrinking:
    """What is asked for.

    stats    folders that `observe --stat routing` has written; together they know every layer
    by       see `clusters.WAYS`; 'mc_smoe' merges as 'm_smoe' does and stores experts by the codec `losparse`
    experts  how many each layer keeps; or `keep`, a share of them
    budget   'layer': as many in each; 'global': so many on average, more where usage is spread
    align    put hidden units of experts in one order before averaging
    rank     project merged matrices on the leading directions of their group (Sub-MoE); None: all
    whiten   count those directions by what the experts read, from the statistic `routed`
    mtp      'refuse' or 'drop' blocks that predict further tokens: transformers does not run them, so nothing is known
    ratio    of 'mc_smoe': share of numbers in the low-rank factors;  rows: share of rows kept beside them
    """

    model: str
    stats: tuple[str, ...]
    by: str
    experts: int | None = None
    keep: float | None = None
    budget: str = "layer"
    align: bool = True
    rank: int | None = None
    whiten: bool = False
    mtp: str = "refuse"
    ratio: float | None = None
    rows: float | None = None

    @property
    def way(self) -> Way:
        """How experts are grouped."""
        return WAYS["m_smoe" if self.by == CODED else self.by]

    @property
    def codec(self) -> dict[str, float]:
        """Parameters of the codec, of 'mc_smoe', that are not its defaults."""
        given = {"ratio": self.ratio, "rows": self.rows}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def recipe(self) -> dict[str, Any]:
        """In plain values, for weightsmith.json."""
        values = {name: value for name, value in asdict(self).items() if name not in ("model", "stats")}
        return {"models": {NAME: {"model": self.model}}, "stats": list(self.stats), "shrink": values}

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Shrinking:
        """The other way round."""
        return cls(recipe["models"][NAME]["model"], tuple(recipe["stats"]), **recipe["shrink"])

    def problems(self) -> list[Problem]:
        """What is wrong with it whatever the model is."""
        found = []

        def say(where: str, text: str) -> None:
            found.append(Problem(Code.VALUE, where, text))

        ways = (*WAYS, CODED)
        if self.by not in ways:
            say("by", f"by = {self.by!r} is not known{did_you_mean(self.by, ways)}; known: {', '.join(ways)}")
        if self.by != CODED and self.codec:
            say(
                next(iter(self.codec)),
                f"{' and '.join(self.codec)}: of the factors that {CODED} stores; {self.by} has none",
            )
        if self.ratio is not None and not 0 < self.ratio <= 1:
            say("ratio", f"ratio = {self.ratio:g} is outside (0, 1]")
        if self.rows is not None and not 0 <= self.rows <= 1:
            say("rows", f"rows = {self.rows:g} is outside [0, 1]")
        if (self.experts is None) == (self.keep is None):
            say("experts", "say how many experts each layer keeps, or keep, a share of them: one of the two")
        if self.experts is not None and self.experts < 1:
            say("experts", f"experts = {self.experts} must be at least 1")
        if self.keep is not None and not 0 < self.keep < 1:
            say("keep", f"keep = {self.keep:g} is outside (0, 1)")
        if self.rank is not None and self.rank < 1:
            say("rank", f"rank = {self.rank} must be at least 1")
        if self.rank is not None and self.by in WAYS and self.way.prunes:
            say("rank", f"rank is for merged experts; {self.by} merges none")
        if self.whiten and self.rank is None:
            say("whiten", "whiten chooses the directions that a rank keeps; give a rank")
        for word, value, known in (("budget", self.budget, ("layer", "global")), ("mtp", self.mtp, ("refuse", "drop"))):
            if value not in known:
                say(word, f"{word} = {value!r} is not known{did_you_mean(value, known)}")
        if not self.stats:
            say(
                "stats",
                "no statistics; take them with: weightsmith observe MODEL --data FILE --stat routing --out FOLDER",
            )
        return found


@dataclass(frozen=True, eq=False)
class Smaller:
    """The smaller mixture before anything is computed.

    inputs   the source of its tensors, called 'model', with the statistics
    config   text of config.json
    uniform  whether every layer has as many experts, so that config.json can say it
    """

    asked: Shrinking
    original: Source
    source: ShrunkSource
    inputs: Inputs
    config: str
    chosen: int
    warnings: tuple[Problem, ...]

    @property
    def layers(self) -> list[Layer]:
        return list(self.source.layers.values())

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Experts' module -> how many there were, and are."""
        return {layer.stack.name: (layer.stack.count, layer.grouping.count) for layer in self.layers}

    @property
    def uniform(self) -> bool:
        return len({now for _, now in self.counts.values()}) == 1


def smaller(asked: Shrinking, given: Source | None = None) -> Smaller:
    """Open the model and its statistics and decide what becomes of every expert; PlanError with every problem.

    given  the opened model, where it is at hand
    """
    problems = asked.problems()
    try:
        source = given or open_source(asked.model)
        config = config_mapping(source)
    except WeightsmithError as error:
        raise PlanError([*problems, *problems_of(error)]) from error
    stacks, beyond, unfit = stacks_of(source, config)
    problems += unfit
    stats, missing = _statistics(asked.stats)
    problems += missing
    if beyond and asked.mtp == "refuse":
        text = (f"{beyond[0]}: a block that config.json does not count (a head for further tokens), of whose routing "
                "nothing is known; --mtp drop leaves such blocks out")  # fmt: skip
        problems.append(Problem(Code.FIT, beyond[0], text))
    if problems:
        raise PlanError(problems)
    seen, missing = _seen(stacks, stats)
    problems += missing
    limits = _Limits.of(config, stacks)
    if isinstance(limits, Problem):
        raise PlanError([*problems, limits])
    wanted = _wanted(asked, limits.count)
    problems += limits.problems(wanted, asked)
    inputs = Inputs(None, {NAME: source}, {f"{s.stat} {i}": {NAME: s} for i, s in enumerate(stats)})
    problems += _foreign(source, stats)
    routed, lacking = _moments(asked, stacks, stats)
    problems += lacking
    if problems:
        raise PlanError(problems)
    counts = _counts(asked, seen, wanted, limits)
    layers = [
        Layer(
            stack,
            grouped(asked.way, seen[stack.name], count, limits.parts),
            mean=asked.way.router == "mean",
            rank=asked.rank,
            moments=f"{stack.name}.inputs",
        )
        for stack, count in zip(stacks, counts, strict=True)
    ]
    shrunk = ShrunkSource(source, layers, beyond if asked.mtp == "drop" else (), routed)
    text = _config(config, limits, max(counts), bool(beyond))
    inputs = replace(inputs, experts={NAME: shrunk})
    warnings = _warnings(asked, limits, layers, seen, stats, beyond)
    return Smaller(asked, source, shrunk, inputs, text, limits.chosen, tuple(warnings))


# --- statistics ------------------------------------------------------------------------------------


def _statistics(folders: Sequence[str]) -> tuple[list[StatsSource], list[Problem]]:
    """Every file of 'routing' and 'routed' in the folders."""
    found, problems = list[StatsSource](), list[Problem]()
    for folder in folders:
        here = 0
        for stat in ("routing", "routed"):
            path = Path(folder).expanduser() / f"{stat}.safetensors"
            if not path.is_file():
                continue
            try:
                found.append(StatsSource(path))
                here += stat == "routing"
            except WeightsmithError as error:
                problems += problems_of(error)
        if not here and not problems:
            text = (f"{folder}: no routing.safetensors in it; make it with: weightsmith observe MODEL --data FILE "
                    f"--stat routing --out {folder}")  # fmt: skip
            problems.append(Problem(Code.STATISTIC, folder, text))
    return found, problems


def _foreign(source: Source, stats: Sequence[StatsSource]) -> list[Problem]:
    """Statistics of other files than the model's: an expert's number is no name, so that nothing else would tell."""
    found = []
    for one in stats:
        if any(foreign_statistics(Inputs(None, {NAME: source}, {one.stat: {NAME: one}}))):
            text = f"{one} was taken of other files than {source}'s; take the statistics of this model with observe"
            found.append(Problem(Code.STATISTIC, "stats", text))
    return found


def _seen(stacks: Sequence[Stack], stats: Sequence[StatsSource]) -> tuple[dict[str, Seen], list[Problem]]:
    """What was observed of each layer."""
    found, problems = dict[str, Seen](), list[Problem]()
    for stack in stacks:
        names = {field: f"{stack.name}.{field}" for field in _FIELDS}
        holder = next((s for s in stats if all(name in s.keys for name in names.values())), None)
        if holder is None:
            text = f"{stack.name}: not in the statistics; observe its block, too (--layers), and give every folder"
            problems.append(Problem(Code.STATISTIC, stack.name, text))
            continue
        tensors = {field: holder.read(name).double().numpy() for field, name in names.items()}
        if wrong := next((f for f, t in tensors.items() if set(t.shape) != {stack.count}), None):
            text = (f"{names[wrong]} is {list(tensors[wrong].shape)} in {holder}, for {stack.count} experts: "
                    "statistics of another model")  # fmt: skip
            problems.append(Problem(Code.STATISTIC, stack.name, text))
        elif not all(np.isfinite(t).all() for t in tensors.values()):
            problems.append(Problem(Code.NUMBER, stack.name, f"{stack.name}: NaN or Inf in {holder}; observe again"))
        else:
            found[stack.name] = Seen(**tensors)
    return found, problems


def _moments(
    asked: Shrinking, stacks: Sequence[Stack], stats: Sequence[StatsSource]
) -> tuple[Source | None, list[Problem]]:
    """The second moments of all layers, where they are wanted."""
    if not asked.whiten:
        return None, []
    held = {name: (i, name) for i, s in enumerate(stats) if s.stat == "routed" for name in s.keys}
    lacking = [stack.name for stack in stacks if f"{stack.name}.inputs" not in held]
    if lacking:
        text = f"whiten needs the statistic 'routed' of {lacking[0]}; observe with --stat routing,routed"
        return None, [Problem(Code.STATISTIC, lacking[0], text)]
    return JoinedSource(stats, held), []


# --- counts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limits:
    """What a configuration says of experts: how many, in how many parts of which the router takes some, and how many
    a token goes through."""

    count: int
    fields: tuple[str, ...]
    chosen: int
    parts: int
    parts_chosen: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], stacks: Sequence[Stack]) -> _Limits | Problem:
        counts = {stack.count for stack in stacks}
        if len(counts) > 1:
            text = f"layers of {sorted(counts)} experts; a model whose layers differ is not made smaller again"
            return Problem(Code.FIT, "config.json", text)
        (count,) = counts
        scope = expert_scope(config, count)
        if scope is None:
            return Problem(Code.FIT, "config.json", f"no field of config.json says that there are {count} experts")
        said = scope[0]
        chosen = next((said[n] for n in CHOSEN_EXPERTS if type(said.get(n)) is int), 1)
        parts = said["n_group"] if type(said.get("n_group")) is int else 1
        taken = said["topk_group"] if type(said.get("topk_group")) is int else parts
        return cls(count, scope[1], chosen, max(parts, 1), taken, tuple({stack.hidden for stack in stacks}))

    @property
    def least(self) -> int:
        """Experts of a layer that the router can still choose from."""
        each = -(-self.chosen // self.parts_chosen) if self.parts > 1 else self.chosen
        return self.parts * max(each, 2) if self.parts > 1 else each  # its parts are compared by their two best

    def problems(self, wanted: int, asked: Shrinking) -> list[Problem]:
        found = []
        if wanted >= self.count:
            found.append(f"{wanted} experts of {self.count} are no fewer")
        if wanted < self.least:
            found.append(f"{wanted} experts a layer, but a token goes through {self.chosen}"
                         + (f" from {self.parts_chosen} of {self.parts} parts" if self.parts > 1 else "")
                         + f": at least {self.least}")  # fmt: skip
        if wanted % self.parts:
            low = wanted - wanted % self.parts
            found.append(f"{wanted} experts a layer do not fall into the router's {self.parts} parts (n_group); "
                         f"take {low} or {low + self.parts}")  # fmt: skip
        if asked.budget == "global" and self.parts > 1:
            found.append(f"budget 'global' with a router of {self.parts} parts (n_group): use 'layer'")
        return [Problem(Code.COUNT, "experts", text) for text in found]


def _wanted(asked: Shrinking, count: int) -> int:
    """Experts of a layer, on average."""
    if asked.experts is not None:
        return asked.experts
    assert asked.keep is not None
    return max(1, round(count * asked.keep))


def _counts(asked: Shrinking, seen: Mapping[str, Seen], wanted: int, limits: _Limits) -> list[int]:
    """Experts of each layer."""
    if asked.budget == "layer":
        return [wanted] * len(seen)
    weights = [s.usage if asked.way.weight == "usage" else s.saliency / max(s.saliency.sum(), 1e-300)
               for s in seen.values()]  # fmt: skip
    return budget(weights, wanted * len(seen), limits.least)


def _config(config: Mapping[str, Any], limits: _Limits, count: int, headless: bool) -> str:
    """config.json of the smaller model."""
    made = json.loads(json.dumps(config))
    found = expert_scope(made, limits.count)
    assert found is not None
    scope: Any = found[0]
    scope |= dict.fromkeys(found[1], count)
    for place in (made, scope):
        for field in ("num_nextn_predict_layers", "num_mtp_layers"):
            if headless and type(place.get(field)) is int:
                place[field] = 0
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _warnings(
    asked: Shrinking,
    limits: _Limits,
    layers: Sequence[Layer],
    seen: Mapping[str, Seen],
    stats: Sequence[StatsSource],
    beyond: Sequence[str],
) -> list[Problem]:
    found = []

    def say(code: Code, where: str, text: str) -> None:
        found.append(Problem(code, where, text))

    unused = sum(int((s.counts == 0).sum()) for s in seen.values())
    if unused:
        rows = max(s.rows for s in stats)
        say(Code.STATISTIC, "stats", f"{unused} of {limits.count * len(seen)} experts were never chosen on the {rows} "
                                     "tokens observed: look whether the data is what the model is for")  # fmt: skip
    counts = [layer.grouping.count for layer in layers]
    if len(set(counts)) > 1:
        text = f"layers keep {min(counts)} to {max(counts)} experts: config.json has one number, so that only "
        say(Code.FIT, "budget", f"{text}weightsmith.experts.mapped.load loads the result")
    elif any(layer.merges and layer.mean for layer in layers):
        text = "the router's rows are averaged, so that the folder loads everywhere; "
        say(Code.FIT, "router", f"{text}weightsmith.experts.mapped.load maps the choices of the original rows instead")
    if asked.by in ("m_smoe", CODED) and 2 * sum(counts) <= limits.count * len(counts):
        say(Code.FOUND, "by", "merging by router logits is known to collapse at half of the experts without training "
                              "(Mixtral: perplexity 854, published); try sub_moe, hc_smoe or reap")  # fmt: skip
    if odd := next((width for width in limits.widths if width % _BLOCK), None):
        say(Code.FIT, "", f"experts of {odd} hidden units: no multiple of {_BLOCK}, which llama.cpp's quantising needs")
    if beyond:
        say(Code.DROPPED, beyond[0], f"{len(beyond)} tensors of heads for further tokens are left out ({beyond[0]})")
    return found
