"""Deciding, tensor by tensor, what becomes of it; collecting every problem on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from weightsmith.core.checks import Case, Level
from weightsmith.core.errors import WeightsmithError, problems_of, some
from weightsmith.core.keys import Key, depths
from weightsmith.core.method import BASE, Grain, GroupMethod, Pipeline, Stage
from weightsmith.core.problem import Code, Problems, Tensors
from weightsmith.core.symmetry import groups
from weightsmith.core.task import Task, Way, cuttable, parts
from weightsmith.inputs import vocabulary
from weightsmith.inputs.configs import unlike_configs
from weightsmith.inputs.opened import Inputs, earlier_notes, product_ranks
from weightsmith.io.read.layers import miscounted
from weightsmith.io.read.stats import missing as missing_statistic
from weightsmith.plan.carried import carried_reason, has, own_key, ownerless, owners
from weightsmith.plan.costs import costs_of
from weightsmith.plan.fitting import Fitting
from weightsmith.plan.gathered import STATISTICS, averaged, averaged_kind, averaging
from weightsmith.plan.logs import TrainerLogs, common_notes
from weightsmith.plan.peak import factored_peak, group_peak, kernel_peak, task_peak
from weightsmith.plan.remarks import foreign_statistics, what_inputs_say
from weightsmith.plan.stored import Dtypes
from weightsmith.plan.unmatched import Unmatched
from weightsmith.plan.way import way_of
from weightsmith.recipe.cases import NoValueError
from weightsmith.recipe.resolve import Resolver
from weightsmith.recipe.schema import Recipe

__all__ = ["Planner"]


class Planner:
    """Goes through the tensors once and collects tasks and problems.

    encode   the output is a compressed folder: tensors under a codec become its parts, what is kept from the
             base stays there, and what only experts have is stored for each of them
    kernels  whether the run will have the kernels
    """

    def __init__(self, recipe: Recipe, inputs: Inputs, *, encode: bool = False, kernels: bool = False) -> None:
        self.recipe, self.inputs, self.encode, self.kernels = recipe, inputs, encode, kernels
        self.problems, self.warnings = Problems(), Problems()
        self.reference = inputs.base if inputs.base is not None else next(iter(inputs.experts.values()), None)
        self.names = list(self.reference.keys) if self.reference is not None else []
        self.depth = depths(self.names)
        try:
            self.resolver: Resolver | None = Resolver(recipe)
        except WeightsmithError as error:
            self.problems.add(*problems_of(error))
            self.resolver = None
        self._treatment: dict[str, tuple[Pipeline | None, str, str]] = {}
        self._compared = set[str]()
        self._notes_on: dict[str, Mapping[str, Any]] = {
            stat: common_notes(found.values()) for stat, found in inputs.stats.items()
        }
        self._notes_on["earlier"], remarks = earlier_notes(inputs)
        self._notes_on["logged"] = TrainerLogs(inputs.experts)
        self.warnings.add(*remarks)

    # -- what becomes of each tensor

    def tasks(self) -> list[Task]:
        if self.resolver is None:
            return []
        if self.reference is None:
            self._check_without_tensors()
            return []
        numbered = self.recipe.tokenizer is None or not self.inputs.missing
        self.fitting = Fitting(self.inputs, self.reference, self.problems, numbered=numbered)
        self._check_selectors()
        self._output = Dtypes(self.resolver, self.inputs, self.recipe.output.dtype, self.warnings)
        self.fitting.extra_tensors(self._keeps)
        self.warnings.add(*what_inputs_say(self.inputs))
        if self.inputs.stats:
            of_others, of_other_files = foreign_statistics(self.inputs)
            self.problems.add(*of_others)
            self.warnings.add(*of_other_files)
        for refused, unlike in unlike_configs(self.inputs):
            (self.problems if refused else self.warnings).add(unlike)
        self.problems.add(*(unfit := list(vocabulary.tokenizer_problems(self.recipe, self.inputs))))
        if not unfit and not self.encode and not self.inputs.missing:
            self.warnings.add(*vocabulary.what_is_lost(self.recipe, self.inputs))
        out: list[Task] = []
        groups: dict[Pipeline, list[Key]] = {}
        left = 0
        for name in self.names:
            key = self.reference.keys[name]
            if (treatment := self._treat(key)) is None:
                continue
            pipeline, source, reason = treatment
            if self.encode and self.inputs.base is not None and pipeline is None and key.floating:
                left += key.numel > 0  # the base has it, and whoever decodes has the base
                continue
            self._treatment[name] = treatment
            if pipeline is not None and pipeline.grain is Grain.GROUP:
                groups.setdefault(pipeline, []).append(key)
            else:
                out += self._cut(self._output(key), pipeline, source, reason)
        self._check_vocabularies()
        if not self.encode and self.recipe.extra == "refuse":  # compressed, each model keeps its own
            self.problems.add(*ownerless(self.inputs, self.fitting.carried, self.fitting.label))
        for pipeline, keys in groups.items():
            out += self._grouped(pipeline, keys)
        for name, first in self.fitting.carried.items():
            for owner in owners(self.inputs, name) if self.encode else (first,):
                key = self._output(self.inputs.experts[owner].key(name))
                stored = own_key(key, owner) if self.encode else key
                reason = f"only in {owner}, kept from there"
                if not self.encode:
                    reason = carried_reason(self.inputs, name, owner, self.fitting.label)
                out += self._cut(key, None, owner, reason, stored)
        if left:
            text = f"{left} tensors that a rule or exclude keeps are not stored: restored models get the base's"
            self.warnings.say(Code.DROPPED, "", text)
        if self.encode and not self.inputs.has_base and self.inputs.count > 1:
            text = "without a base one model is compressed by itself: add 'base:', or leave the others out"
            self.problems.say(Code.NO_BASE, "base", text)
        if self.encode and not self.problems and not any(t.pipeline and t.pipeline.codec for t in out):
            self.problems.say(
                Code.CODEC, "method", "nothing is compressed: end 'method' with a codec such as tall_masks"
            )
        return out

    def output_keys(self, tasks: Iterable[Task]) -> list[Key]:
        """Every output tensor once: in the order of the inputs, then what is carried over or made of them."""
        found = {key.name: key for task in tasks for key in task.keys}
        first = [found.pop(name) for name in self._treatment if name in found]
        return first + list(found.values())

    def _treat(self, key: Key) -> tuple[Pipeline | None, str, str] | None:
        """(pipeline or None for a copy, whose copy, reason); None if a problem was noted."""
        pipeline = self._resolved(key, self.depth.get(key.name))
        if pipeline is None:
            return None
        if _is_keep(pipeline):
            return None, self.fitting.name, "kept by rule or exclude"
        if self.fitting.is_loose(key):
            self.warnings.share(Code.MISSING, key.name, "loose", partial(_loose, self.fitting.label))
            return None, self.fitting.name, "a buffer that not all models have: kept"
        here = self.fitting.everywhere(key)
        if not key.numel and here:
            return None, self.fitting.name, "empty"
        if here and (found := self._averaged(key, pipeline)) is not None:
            return found
        if not key.floating:
            self._compared.add(key.name)
            return None, self.fitting.name, f"{key.dtype}, must be equal everywhere"
        if not here:
            return None
        replaced = self._in_domain(key, pipeline)
        if replaced is None:
            return None
        pipeline, reason = replaced
        if not self._has_base(pipeline):
            return None
        if pipeline.codec is not None and not self._may_encode(pipeline):
            return None
        for stage in pipeline.stages:
            self._check_stage(stage)
        try:
            informed = tuple(stage.informed(key, self._notes_on) for stage in pipeline.stages)
        except WeightsmithError as error:
            self.problems.add(*(one.of(pipeline.name) for one in problems_of(error)))
            return None
        for before, stage in zip(pipeline.stages, informed, strict=True):
            if stage != before:
                self._check_stage(stage)
        for stage in informed if self.inputs.count else ():
            for verdict in stage.verdicts(self._case(key)):
                if verdict.level is Level.HERE:
                    words = f"{stage.name}: {verdict.text}"
                    self.warnings.share(verdict.code, key.name, words, partial(_remark, words))
        return Pipeline(informed), "", reason

    def _averaged(self, key: Key, pipeline: Pipeline) -> tuple[Pipeline | None, str, str] | None:
        """What becomes of tensors that are averaged, unless a rule singles them out; None: what becomes of any."""
        assert self.resolver is not None
        kind = averaged_kind(key, self.inputs)
        neighbour = Key(f"{key.name.rpartition('.')[0]}.weight", key.shape, key.dtype)
        if not kind or pipeline.codec is not None or pipeline.grain is Grain.GROUP:
            return None
        if self.resolver.singles_out(key, neighbour):
            return None
        if not key.floating:
            return None, self.fitting.name, "counts batches: kept"
        mean = averaged(pipeline, len(self.inputs.experts))
        if mean is not None and kind == STATISTICS:
            self.warnings.share(Code.STAGE, key.name, averaged, averaging)
        return None if mean is None else (mean, "", f"{kind}: averaged")

    def _has_base(self, pipeline: Pipeline) -> bool:
        if BASE not in pipeline.needs or self.inputs.has_base:
            return True
        text = f"{pipeline.name} needs a base model: add 'base:' to the recipe"
        self.problems.say(Code.NO_BASE, "base", text)
        return False

    def _check_without_tensors(self) -> None:
        """What can be said of the recipe's method where no model could be opened."""
        assert self.resolver is not None
        try:
            pipeline = self.resolver(Key("weight", (1, 1), "float32"), None)
        except WeightsmithError:  # only some tensors have a value
            return
        for stage in pipeline.stages if self._has_base(pipeline) else ():
            self._check_stage(stage)

    def _check_selectors(self) -> None:
        """Globs, roles and blocks of the recipe that no tensor meets."""
        if self.inputs.partial:  # they may meet one that is not shown
            return
        for problem, optional in Unmatched.among(self.inputs).problems(self.recipe):
            (self.warnings if optional else self.problems).add(problem)

    def _case(self, key: Key | None = None) -> Case:
        return Case(self.inputs.count, self.inputs.has_base, key, self._blocks)

    @cached_property
    def _blocks(self) -> str:
        """What is wrong with the block numbers in the tensors' names."""
        if self.names and not self.depth:
            return "no tensor's name holds a block number (layers.0., h.0., ...)"
        found = miscounted(self.reference) if self.reference is not None else None
        return f"{found}; correct the one or the other" if found else ""

    def _may_encode(self, pipeline: Pipeline) -> bool:
        if not self.encode:
            text = f"{pipeline.name} keeps every model instead of making one; use weightsmith compress"
        elif pipeline.grain is Grain.GROUP:
            text = f"{pipeline.name}: {pipeline.method.name} merges groups of tensors, which a codec cannot follow"
        else:
            return True
        self.problems.say(Code.CODEC, "method", text)
        return False

    def _check_stage(self, stage: Stage) -> None:
        count = self.inputs.count
        if not count:
            return  # that no model is there is the problem
        for level, text, code in stage.verdicts(self._case()):
            if level in (Level.REFUSE, Level.REMARK):
                said = self.problems if level is Level.REFUSE else self.warnings
                said.say(code, stage.name, f"{stage.name}: {text}")
        for parameter in stage.parameters():
            value = getattr(stage, parameter.field)
            if parameter.each and isinstance(value, tuple) and len(value) != count:
                text = f"{stage.name}: {parameter.name} has {len(value)} values for {count} models"
                self.problems.say(Code.COUNT, stage.name, text)

    def _in_domain(self, key: Key, pipeline: Pipeline) -> tuple[Pipeline, str] | None:
        """The pipeline, or what its method falls back to where it does not apply."""
        stages, reason = [], ""
        for stage in pipeline.stages:
            why = self._outside(key, stage)
            if why:
                kind, code, text = why
                other = stage.elsewhere()
                if other is None:
                    self.problems.share(code, key.name, (stage.name, kind), text)
                    return None
                reason = f"{stage.name} does not cover {kind}"
                stages.append(other)
            else:
                stages.append(stage)
        return (Pipeline(tuple(stages)), reason) if reason else (pipeline, "")

    def _outside(self, key: Key, stage: Stage) -> tuple[str, Code, Callable[[Tensors], str]] | None:
        """(short reason, code and text of a problem) if this stage cannot work on this tensor."""
        for level, kind, _ in stage.verdicts(self._case(key)) if self.inputs.count else ():
            if level is Level.LEAVE:
                return kind, Code.OUTSIDE, partial(_left_out, stage.name, kind, key.shape)
        for stat in stage.traits.needs:
            if stat == BASE:
                continue
            found = self.inputs.stats.get(stat, {})
            if without := [n for n in self.inputs.experts if n not in found and n not in self.inputs.silent]:
                # Never a fallback: the user forgot the data that the method is named for.
                text = missing_statistic(stage.name, stat, {n: self.inputs.experts[n] for n in without})
                self.problems.say(Code.STATISTIC, stage.name, text)
                continue
            if missing := [n for n, s in found.items() if not has(s, key.name)]:
                return f"tensors without {stat!r}", Code.STATISTIC, partial(_no_statistic, stage.name, stat, missing)
        return None

    def _keeps(self, key: Key) -> bool:
        pipeline = self._resolved(key, None)
        return pipeline is not None and _is_keep(pipeline)

    def _resolved(self, key: Key, depth: float | None) -> Pipeline | None:
        """What the recipe says about a tensor; None if that was noted as a problem."""
        assert self.resolver is not None
        try:
            return self.resolver(key, depth)
        except NoValueError as error:
            text = partial(_no_value, error.parameter)
            self.problems.share(Code.UNMATCHED, key.name, error.parameter, text)
        except WeightsmithError as error:
            self.problems.add(*problems_of(error))
        return None

    def _check_vocabularies(self) -> None:
        assert self.reference is not None
        merged = [
            name
            for name, (pipeline, _, _) in self._treatment.items()
            if pipeline is not None and self.reference.keys[name].role in ("embed", "head")
        ]
        self.problems.add(
            *vocabulary.vocabulary_problems(self.reference, self.fitting.label, self.inputs.experts, merged)
        )

    # -- cutting

    def _cut(
        self, key: Key, pipeline: Pipeline | None, source: str, reason: str, stored: Key | None = None
    ) -> Iterable[Task]:
        count, has_base = len(self.inputs.experts), self.inputs.base is not None
        stats = pipeline.statistics if pipeline is not None else ()
        codec = pipeline.codec if pipeline is not None else None
        encoded = codec.parts(key, tuple(self.inputs.experts)) if codec is not None else ()
        keys = tuple(part.key for part in encoded) or (stored or key,)
        ranges = parts(key, [part.span for part in encoded]) if cuttable(pipeline, count) else [(0, key.rows)]
        extra = max((s.read_cost(key.name) for s in self.inputs.experts.values() if has(s, key.name)), default=0.0)
        ranks = product_ranks(key, pipeline, self.inputs)
        way = way_of(key, pipeline, self.inputs, kernels=self.kernels, nonfinite=self.recipe.nonfinite)
        row = sum(s.key(key.name).nbytes for _, s in self.inputs.models if has(s, key.name)) // max(key.rows, 1)
        for low, high in ranges:
            peak = int(task_peak(key, high - low, count, has_base, pipeline) * (1 + extra))
            peak = (factored_peak(key, ranks, pipeline) if ranks else peak) + self._stat_bytes(key, pipeline)
            if pipeline is not None and way is Way.KERNEL:
                peak = kernel_peak(key, high - low, row, count, has_base, pipeline)
            yield Task(
                id=f"{keys[0].name}:{low}",
                keys=keys,
                pipeline=pipeline,
                source=source,
                start=low,
                stop=high,
                depth=self.depth.get(key.name),
                stats=stats,
                reason=reason,
                compared=key.name in self._compared,
                peak=peak,
                way=way,
                of=None if keys == (key,) else key,
                experts=tuple(self.inputs.experts) if encoded else (),
            )

    def _grouped(self, pipeline: Pipeline, keys: list[Key]) -> Iterable[Task]:
        assert self.reference is not None
        method = pipeline.method
        assert isinstance(method, GroupMethod)
        rest = {k.name: k for k in keys}
        for group in groups(keys, kind=method.kind):
            members = [rest.pop(n) for n in group.names if n in rest]
            peak = group_peak(members, group.size, len(self.inputs.experts), self.inputs.base is not None, pipeline)
            yield Task(
                id=f"group {group.name}",
                keys=tuple(self._output(k) for k in members),
                pipeline=pipeline,
                start=0,
                stop=members[0].rows,
                depth=self.depth.get(members[0].name),
                peak=peak,
                way=Way.GROUP,
                group=group.name,
                reason=f"group {method.kind}",
            )
        other = method.elsewhere()
        for key in rest.values():
            if other is None:
                self.problems.share(Code.OUTSIDE, key.name, pipeline.name, partial(_in_no_group, pipeline.name))
                continue
            swapped = Pipeline(tuple(other if s is method else s for s in pipeline.stages))
            yield from self._cut(self._output(key), swapped, "", f"in no {method.kind} group")

    def _stat_bytes(self, key: Key, pipeline: Pipeline | None) -> int:
        """Statistics that are whole matrices beside the tensor, float32, and a method's work on one in float64."""
        if pipeline is None:
            return 0
        work = max(costs_of(stage).solves for stage in pipeline.stages)
        found = [source for stat in pipeline.statistics for source in self.inputs.stats.get(stat, {}).values()]
        sizes = [source.key(key.name).numel for source in found if work and has(source, key.name)]
        return 4 * sum(sizes) + int(work * 8 * max(sizes, default=0))


def _no_value(parameter: str, tensors: Tensors) -> str:
    return str(NoValueError(parameter, tensors))


def _remark(words: str, tensors: Tensors) -> str:
    return f"{words}: {some(tensors.names, 1)}"


def _left_out(stage: str, kind: str, shape: tuple[int, ...], tensors: Tensors) -> str:
    of_shape = f" of shape {list(shape)}" if len(tensors.names) == 1 else ""
    return f"{stage} cannot merge {tensors}{of_shape}: it does not cover {kind}"


def _no_statistic(stage: str, stat: str, models: Sequence[str], tensors: Tensors) -> str:
    return f"{stage} needs the statistic {stat!r} of {tensors}, missing for {', '.join(models)}"


def _in_no_group(name: str, tensors: Tensors) -> str:
    return f"{name} covers no group that {tensors} {tensors['belongs|belong']} to"


def _loose(label: str, tensors: Tensors) -> str:
    return f"{tensors} {tensors['is a buffer|are buffers']} that not all models have: kept from {label}"


def _is_keep(pipeline: Pipeline) -> bool:
    return len(pipeline.stages) == 1 and pipeline.stages[0].name == "keep"
