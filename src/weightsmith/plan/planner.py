"""Deciding, tensor by tensor, what becomes of it; collecting every problem on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from weightsmith.core.errors import WeightsmithError, did_you_mean, problems_of
from weightsmith.core.keys import Key, depths
from weightsmith.core.method import BASE, Grain, Pipeline, Stage
from weightsmith.core.symmetry import groups
from weightsmith.core.task import Task, Way, cuttable, parts
from weightsmith.inputs import vocabulary
from weightsmith.inputs.opened import Inputs, earlier_notes, product_ranks
from weightsmith.io.read.codec_folder import own_name
from weightsmith.io.read.layers import miscounted
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import is_output_layer
from weightsmith.plan.carried import carried_reason, has, ownerless, owners
from weightsmith.plan.logs import TrainerLogs, common_notes
from weightsmith.plan.peak import factored_peak, group_peak, kernel_peak, task_peak
from weightsmith.plan.remarks import TensorRemarks, what_inputs_say
from weightsmith.plan.way import way_of
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
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.reference = inputs.base if inputs.base is not None else next(iter(inputs.experts.values()), None)
        self.names = list(self.reference.keys) if self.reference is not None else []
        self.depth = depths(self.names)
        try:
            self.resolver: Resolver | None = Resolver(recipe)
        except WeightsmithError as error:
            self.problems += problems_of(error)
            self.resolver = None
        self._treatment: dict[str, tuple[Pipeline | None, str, str]] = {}
        self._complained, self._compared = set[str](), set[str]()
        self._remarks = TensorRemarks()
        self._notes_on: dict[str, Mapping[str, Any]] = {
            stat: common_notes(found.values()) for stat, found in inputs.stats.items()
        }
        self._notes_on["earlier"], remarks = earlier_notes(inputs)
        self._notes_on["logged"] = TrainerLogs(inputs.experts)
        self.notes += remarks

    # -- what becomes of each tensor

    def tasks(self) -> list[Task]:
        if self.resolver is None or self.reference is None:
            return []
        self._extra_tensors()
        self.notes += what_inputs_say(self.inputs)
        self.problems += (unfit := list(vocabulary.tokenizer_problems(self.recipe, self.inputs)))
        self.notes += vocabulary.what_is_lost(self.recipe, self.inputs) if not unfit and not self.encode else ()
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
        self.notes += self._remarks.lines()
        if not self.encode and self.recipe.extra == "refuse":  # compressed, each model keeps its own
            self.problems += ownerless(self.inputs, self._carried, self._reference_label())
        for pipeline, keys in groups.items():
            out += self._grouped(pipeline, keys)
        for name, first in self._carried.items():
            for owner in owners(self.inputs, name) if self.encode else (first,):
                key = self._output(self.inputs.experts[owner].key(name))
                stored = Key(own_name(name, owner), key.shape, key.dtype) if self.encode else key
                reason = f"only in {owner}, kept from there"
                if not self.encode:
                    reason = carried_reason(self.inputs, name, owner, self._reference_label())
                out += self._cut(key, None, owner, reason, stored)
        if left:
            self.notes.append(
                f"{left} tensors that a rule or exclude keeps are not stored: restored models get the base's"
            )
        if self.encode and self.inputs.base is None and len(self.inputs.experts) > 1:
            self.problems.append(
                "without a base one model is compressed by itself: add 'base:', or leave the others out"
            )
        if self.encode and not self.problems and not any(t.pipeline and t.pipeline.codec for t in out):
            self.problems.append("nothing is compressed: end 'method' with a codec such as tall_masks")
        return out

    def output_keys(self, tasks: Iterable[Task]) -> list[Key]:
        """Every output tensor once: in the order of the inputs, then what is carried over or made of them."""
        found = {key.name: key for task in tasks for key in task.keys}
        first = [found.pop(name) for name in self._treatment if name in found]
        return first + list(found.values())

    def _output(self, key: Key) -> Key:
        dtype = self.recipe.output.dtype
        return Key(key.name, key.shape, dtype) if dtype and key.floating else key

    def _treat(self, key: Key) -> tuple[Pipeline | None, str, str] | None:
        """(pipeline or None for a copy, whose copy, reason); None if a problem was noted."""
        assert self.resolver is not None
        try:
            pipeline = self.resolver(key, self.depth.get(key.name))
        except WeightsmithError as error:
            self._once(str(error))
            return None
        if _is_keep(pipeline):
            return None, self._reference_name(), "kept by rule or exclude"
        here = self._sources_with(key)
        if not key.numel and here is not None:
            return None, self._reference_name(), "empty"
        if not key.floating:
            self._compared.add(key.name)
            return None, self._reference_name(), f"{key.dtype}, must be equal everywhere"
        if here is None:
            return None
        replaced = self._in_domain(key, pipeline)
        if replaced is None:
            return None
        pipeline, reason = replaced
        if BASE in pipeline.needs and self.inputs.base is None:
            self._once(f"{pipeline.name} needs a base model: add 'base:' to the recipe")
            return None
        if pipeline.codec is not None and not self._may_encode(pipeline):
            return None
        for stage in pipeline.stages:
            self._check_stage(stage)
        try:
            informed = tuple(stage.informed(key, self._notes_on) for stage in pipeline.stages)
        except WeightsmithError as error:
            self._once(f"{pipeline.name}: {error}")
            return None
        for before, stage in zip(pipeline.stages, informed, strict=True):
            if stage != before:
                self._check_stage(stage)
        self._remarks.add(key, informed, len(self.inputs.experts))
        return Pipeline(informed), "", reason

    @cached_property
    def _miscounted(self) -> str | None:
        return miscounted(self.reference) if self.reference is not None else None

    def _may_encode(self, pipeline: Pipeline) -> bool:
        if not self.encode:
            self._once(f"{pipeline.name} keeps every model instead of making one; use weightsmith compress")
        elif pipeline.grain is Grain.GROUP:
            self._once(f"{pipeline.name}: {pipeline.method.name} merges groups of tensors, which a codec cannot follow")
        else:
            return True
        return False

    def _check_stage(self, stage: Stage) -> None:
        count = len(self.inputs.experts)
        if not count:
            return  # that no model is there is the problem
        traits = stage.traits
        if traits.by_depth and not self.depth:
            self._once(
                f"{traits.name} works by depth, but no tensor's name holds a block number (layers.0., h.0., ...)"
            )
        elif traits.by_depth and self._miscounted:
            self._once(f"{traits.name} works by depth, but {self._miscounted}; correct the one or the other")
        if text := stage.check(count, self.inputs.base is not None):
            self._once(f"{traits.name}: {text}")
        elif count < traits.min_count or (traits.max_count is not None and count > traits.max_count):
            wanted = f"{traits.min_count}" if traits.min_count == traits.max_count else f"at least {traits.min_count}"
            if traits.max_count is not None and traits.min_count != traits.max_count:
                wanted = f"{traits.min_count} to {traits.max_count}"
            self._once(f"{traits.name} takes {wanted} models, the recipe has {count}")
        if text := stage.remark(count):
            self.notes += [note for note in [f"{traits.name}: {text}"] if note not in self.notes]
        for parameter in stage.parameters():
            value = getattr(stage, parameter.field)
            if parameter.each and isinstance(value, tuple) and len(value) != count:
                self._once(f"{traits.name}: {parameter.name} has {len(value)} values for {count} models")

    def _in_domain(self, key: Key, pipeline: Pipeline) -> tuple[Pipeline, str] | None:
        """The pipeline, or what its method falls back to where it does not apply."""
        stages, reason = [], ""
        for stage in pipeline.stages:
            why = self._outside(key, stage)
            if why:
                other = stage.elsewhere()
                if other is None:
                    self._once(why[1])
                    return None
                reason = f"{stage.name} does not cover {why[0]}"
                stages.append(other)
            else:
                stages.append(stage)
        return (Pipeline(tuple(stages)), reason) if reason else (pipeline, "")

    def _outside(self, key: Key, stage: Stage) -> tuple[str, str] | None:
        """(short reason, problem text) if this stage cannot work on this tensor."""
        low_high = stage.traits.domain
        if low_high is not None and not low_high[0] <= len(key.shape) <= low_high[1]:
            return f"{len(key.shape)}-D tensors", f"{stage.name} cannot merge {key.name} of shape {list(key.shape)}"
        if self.inputs.experts and (kind := stage.leaves_out(key, len(self.inputs.experts))):
            return kind, f"{stage.name} cannot merge {key.name}: it leaves out {kind}"
        for stat in stage.traits.needs:
            if stat == BASE:
                continue
            found = self.inputs.stats.get(stat, {})
            if without := [n for n in self.inputs.experts if n not in found]:
                # Never a fallback: the user forgot the data that the method is named for.
                self._once(
                    f"{stage.name} needs the statistic {stat!r} of {', '.join(without)}; make it with "
                    f'"weightsmith observe MODEL --data FILE --stat {stat} -o STATS" and add "stats: STATS" to it'
                )
                continue
            if missing := [n for n, s in found.items() if not has(s, key.name)]:
                text = f"{stage.name} needs the statistic {stat!r} of {key.name}, missing for {', '.join(missing)}"
                return f"tensors without {stat!r}", text
        return None

    # -- fitting the inputs together

    def _sources_with(self, key: Key) -> list[Source] | None:
        """Every input's source if all hold this tensor in this shape; else a problem is noted."""
        fine = True
        for name, source in self.inputs.experts.items():
            if not has(source, key.name):
                tied = key.role == "head" and any(k.role == "embed" for k in source.keys.values())
                self.problems.append(
                    f"{key.name} is missing in {name} ({source})"
                    + ("; it may be tied to the embedding there" if tied else "")
                    + f'; to keep it from {self._reference_name() or "the base"} add it to "exclude"'
                )
                fine = False
                continue
            other = source.key(key.name)
            if other.shape != key.shape:
                self._shape_problem(key, other, name)
                fine = False
            elif other.floating != key.floating:
                self.problems.append(
                    f"{key.name} is {key.dtype} in {self._reference_label()} but {other.dtype} in {name}"
                )
                fine = False
        return list(self.inputs.experts.values()) if fine else None

    def _shape_problem(self, key: Key, other: Key, name: str) -> None:
        a, b = list(key.shape), list(other.shape)
        if vocabulary.is_of_tokens(key) and (a[1:] == b[1:] or a[:-1] == b[:-1] == [1]):
            assert self.reference is not None
            models = {self._reference_label(): self.reference, name: self.inputs.experts[name]}
            if not any(text.startswith("tokenizer:") for text in self.inputs.problems):  # that is the one to solve
                self._once(vocabulary.rows_problem(models))
        else:
            self.problems.append(
                f"{key.name} has shape {a} in {self._reference_label()} but {b} in {name}; "
                f'to keep the one of {self._reference_label()} add it to "exclude"'
            )

    def _extra_tensors(self) -> None:
        """Tensors that the reference lacks: carried over where a rule keeps them, else refused."""
        assert self.resolver is not None
        assert self.reference is not None
        self._carried: dict[str, str] = {}
        for name, source in self.inputs.experts.items():
            if source is self.reference:
                continue
            for key in source.keys.values():
                there, tied = has(self.reference, key.name), key.name in self.reference.aliases
                if there and not tied:
                    continue  # of a large model nearly all, and asking what becomes of a tensor takes time
                kept = key.name in self._carried or self._keeps(key)
                if not kept and not there and is_output_layer(source, key):
                    self.problems.append(
                        f"{key.name} is a tensor of its own in {name}, but {self._reference_label()} has none, or uses "
                        f"its embedding in another way; leave {name} out"
                    )
                    continue
                if tied and not kept:
                    self.problems.append(
                        f"{key.name} is tied to {self.reference.aliases[key.name]} in {self._reference_label()} but a "
                        f'tensor of its own in {name}; to leave it tied add it to "exclude"'
                    )
                if there:
                    continue
                if kept:
                    self._carried.setdefault(key.name, name)
                    continue
                hint = did_you_mean(key.name, self.reference.keys) if len(self.names) < 5000 else ""
                self.problems.append(
                    f"{key.name} is in {name} but not in {self._reference_label()}; to carry it over unchanged "
                    f'add it to "exclude"' + (hint if "did you" in hint else "")
                )

    def _keeps(self, key: Key) -> bool:
        try:
            return self.resolver is not None and _is_keep(self.resolver(key, None))
        except WeightsmithError as error:
            self._once(str(error))
            return False

    def _reference_name(self) -> str:
        """'' for the base, else the first expert's name."""
        return "" if self.inputs.base is not None else next(iter(self.inputs.experts), "")

    def _reference_label(self) -> str:
        return self._reference_name() or "base"

    def _once(self, text: str) -> None:
        if text and text not in self._complained:
            self._complained.add(text)
            self.problems.append(text)

    def _check_vocabularies(self) -> None:
        assert self.reference is not None
        merged = [
            name
            for name, (pipeline, _, _) in self._treatment.items()
            if pipeline is not None and self.reference.keys[name].role in ("embed", "head")
        ]
        self.problems += vocabulary.vocabulary_problems(
            self.reference, self._reference_label(), self.inputs.experts, merged
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
        rest = {k.name: k for k in keys}
        for group in groups(keys, kind=pipeline.method.traits.group):
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
                reason=f"group {pipeline.method.traits.group}",
            )
        other = pipeline.method.elsewhere()
        for key in rest.values():
            if other is None:
                self.problems.append(f"{pipeline.name} covers no group that {key.name} belongs to")
                continue
            swapped = Pipeline(tuple(other if s is pipeline.method else s for s in pipeline.stages))
            yield from self._cut(self._output(key), swapped, "", f"in no {pipeline.method.traits.group} group")

    def _stat_bytes(self, key: Key, pipeline: Pipeline | None) -> int:
        """Statistics that are whole matrices beside the tensor, float32, and a method's work on one in float64."""
        if pipeline is None:
            return 0
        work = max(stage.traits.solves for stage in pipeline.stages)
        found = [source for stat in pipeline.statistics for source in self.inputs.stats.get(stat, {}).values()]
        sizes = [source.key(key.name).numel for source in found if work and has(source, key.name)]
        return 4 * sum(sizes) + int(work * 8 * max(sizes, default=0))


def _is_keep(pipeline: Pipeline) -> bool:
    return len(pipeline.stages) == 1 and pipeline.stages[0].traits.name == "keep"
