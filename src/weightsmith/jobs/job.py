"""A job: what is read, what is done to it, and what goes with the weights.  Every output is made by one of these."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError
from weightsmith.core.parameter import in_words
from weightsmith.core.problem import Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.core.units import parse_size
from weightsmith.engine import carry
from weightsmith.inputs.opened import Inputs
from weightsmith.inputs.vocabulary import tokenizer_folder
from weightsmith.io.package.card import UNKNOWN, licence_problems, licences
from weightsmith.io.package.manifest import MANIFEST, build_manifest, read_manifest, story, write_manifest
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url, destination, without_secrets
from weightsmith.io.write.layout import Stores
from weightsmith.io.write.output import FolderSink, check_output, tidy
from weightsmith.io.write.sink import MemorySink
from weightsmith.io.write.staging import AT_ONCE
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.plan.remarks import what_models_say, what_was_found
from weightsmith.plan.room import Room
from weightsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.engine.runner import Runner
    from weightsmith.io.write.upload import UrlSink

__all__ = ["Job", "Packager", "Records", "Result", "Storage", "carried_out", "with_fingerprints"]

Records = Mapping[str, Any]
"""Task id -> what `engine.execute` returned for it."""

Packager = Callable[["Job", Records, Path], None]


@dataclass(frozen=True)
class Storage:
    """Bytes of tensors: the compressed folder and the base that it needs, against the experts in full.

    error   expert -> relative Frobenius error of its change (of its weights, where there is no base) over all tensors
            that are stored: 0 is the expert, 1 is the bare base
    worst   expert -> the tensor whose error is largest, and that
    """

    base: int
    stored: int
    experts: int
    count: int
    error: Mapping[str, float] = field(default_factory=dict)
    worst: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """What is kept, base included, as a share of the full experts."""
        return (self.base + self.stored) / max(self.experts, 1)


@dataclass(frozen=True)
class Result:
    """What a run did.

    warnings  things the user should look at
    storage   of a compression
    lost      of a restored model: the share of its change (of its weights, without a base) that compression lost
    complete  the run to resume had got through: nothing was done
    resumed   a part may have been done by an earlier run
    """

    out: Path | Url
    seconds: float
    read_bytes: int
    write_bytes: int
    peak_bytes: int
    warnings: tuple[Problem, ...] = ()
    storage: Storage | None = None
    lost: float | None = None
    complete: bool = False
    resumed: bool = False


@dataclass(frozen=True)
class Job:
    """One output.

    package   (the job, records, folder): writes what goes beside the weights
    weights   how the names of the weight files begin: of all, or by the beginning of tensors' names
    recipe    as the user wrote it, in plain JSON values
    parents   the models whose licences bind the result
    identify  returns what identifies every input's data
    ready     makes what needs the inputs' data (routers), once nothing speaks against the run; returns warnings
    """

    inputs: Inputs
    plan: Plan
    package: Packager
    weights: str | Stores = "model"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, Source] = field(default_factory=dict)
    identify: Callable[[], Mapping[str, Any]] = dict
    ready: Callable[[], Iterable[Problem]] = tuple

    @classmethod
    def planned(
        cls,
        recipe: Recipe,
        settings: Settings,
        package: Packager,
        *,
        out: Path | None = None,
        sources: Inputs | None = None,
        encode: bool = False,
        weights: str | Stores | None = None,
    ) -> Job:
        """The job of a user's recipe, from headers alone; its plan holds every problem.

        sources  the inputs, where they are open already
        encode   write a compressed folder instead of a model
        weights  how the names of the weight files begin; default: as those of the first model
        """
        inputs = with_fingerprints(sources if sources is not None else open_inputs(recipe), settings)
        plan = make_plan(recipe, settings, sources=inputs, out=out, strict=False, encode=encode)
        told = recipe.model_dump(mode="json", exclude_defaults=True, fallback=in_words)
        stores = weights or next((source.origin.stores for _, source in inputs.models), {}) or "model"
        return cls(inputs, plan, package, stores, told, dict(inputs.models), identify=inputs.fingerprints)

    # -- carrying it out

    def run(self, out: Path, settings: Settings = DEFAULT) -> Result:
        """Write the folder `out`, which appears complete or not at all; or a URL, see `io.write.upload`.

        Raises PlanError with every problem before anything is written.
        """
        began = time.perf_counter()
        if settings.resume and self.finished(out):
            return self.result(out, time.perf_counter() - began, self.plan.warnings, complete=True)
        if problems := [*self.plan.problems, *self.obstacles(out, settings)]:
            raise PlanError(problems)
        (warnings,) = carried_out({out: self}, self.plan.room, settings)
        made = self.result(out, time.perf_counter() - began, warnings)
        return replace(made, resumed=settings.resume)

    def tensors(self, settings: Settings = DEFAULT) -> dict[str, Tensor]:
        """The output's tensors, tied ones under each of their names, and nothing on disk."""
        self.prepare()
        sink = MemorySink()
        carry.carry_out(self.plan, self.inputs, sink, progress=settings.progress)
        return self.with_aliases(sink.tensors())

    def with_aliases(self, merged: dict[str, Tensor]) -> dict[str, Tensor]:
        """The output's tensors, tied ones under each of their names."""
        _, reference = self.inputs.models[0]
        return merged | {alias: merged[name] for alias, name in reference.aliases.items() if name in merged}

    def prepare(self) -> Iterable[Problem]:
        """Fetch what is missing here, and make what is needed of it; return warnings."""
        for _, source in self.inputs.models:
            source.prepare()
        return self.ready()

    def obstacles(self, out: Path, settings: Settings) -> list[Problem]:
        """What stands in the way of writing to `out`."""
        staged = min(self.plan.write_bytes, AT_ONCE * parse_size(self.plan.recipe.output.shard_size))
        return check_output(
            out, (*self.reads(), *settings.files), settings.overwrite, settings.resume, self.plan.write_bytes,
            local_bytes=staged,
        )  # fmt: skip

    def reads(self) -> tuple[Path, ...]:
        """Every folder and file that is read: nothing may be written over them."""
        tokenizer = tokenizer_folder(self.plan.recipe, self.inputs)
        return self.inputs.locations() if tokenizer is None else (*self.inputs.locations(), tokenizer)

    def sink(self, out: Path, settings: Settings) -> FolderSink | UrlSink:
        """What takes the blocks and makes the folder of them."""
        place = destination(out)
        options: dict[str, Any] = {
            "shard_size": parse_size(self.plan.recipe.output.shard_size),
            "identity": self.identity(),
            "resume": settings.resume,
            "overwrite": settings.overwrite,
            "weight_name": self.weights,
            "metadata": self.metadata,
        }
        if not isinstance(place, Url):
            return FolderSink(place, **options)
        from weightsmith.io.write.upload import UrlSink

        return UrlSink(place, **options)

    @property
    def metadata(self) -> dict[str, str]:
        """What stands in the files' headers: tied name -> the name that is written, as safetensors notes them."""
        written = {key.name for key in self.plan.keys}
        tied = {alias: name for alias, name in self.inputs.models[0][1].aliases.items() if name in written}
        return {"format": "pt", **tied}

    # -- what is noted of it

    def identity(self) -> dict[str, Any]:
        """What the output's bytes depend on: a run is resumed, and can be repeated, under the same identity only."""
        device = {"device": self.plan.device} if self.plan.device else {}
        return {
            "recipe": without_secrets(self.recipe),
            "inputs": self.identify(),
            "version": __version__,
            **device,
        }

    def finished(self, out: Path) -> bool:
        """Whether `out` is what this job makes: the run to resume got through.  Tidies up after it."""
        place = destination(out)
        if self.plan.problems or not (isinstance(place, Url) or (place / MANIFEST).is_file()):
            return False
        try:
            made = read_manifest(place)
        except OutputError:
            return False
        noted = {"recipe": made["recipe"], "inputs": made["inputs"], "version": made["weightsmith"]}
        noted |= {"device": made["device"]} if "device" in made else {}
        if json.dumps(noted) != json.dumps(self.identity()):  # as texts: the order of the models counts
            return False
        if isinstance(place, Url):
            from weightsmith.io.write.upload import clear_marks

            clear_marks(place)
        else:
            tidy(place)
        return True

    def licences(self) -> dict[str, str]:
        """Model -> the licence that its folder states; of one that is made of others, each of theirs."""
        parts = [source.origin.parts(name) for name, source in self.parents.items()]
        return licences({name: origin.folder for models in parts for name, origin in models.items()})

    def manifest(self, folder: Path, records: Records, kind: str, made_by: Mapping[str, str], **more: Any) -> Path:
        """Write weightsmith.json and return its path; `more`: companions, and fields that hold something."""
        companions = more.pop("companions", {})
        places = {name: _place(self.recipe, name) for name in self.parents}
        behind = {name: found for name, place in places.items() if place is not None and (found := story(place))}
        noted = build_manifest(
            folder,
            recipe=self.recipe,
            inputs=self.identify(),
            keys=self.plan.keys,
            records=records.values(),
            made_by=made_by,
            licences=self.licences(),
            companions=companions,
            kind=kind,
            stores={} if isinstance(self.weights, str) else self.weights,
        )
        noted |= {"made_from": behind} if behind else {}
        noted |= self.plan.tangent.plain() if self.plan.tangent is not None else {}
        return write_manifest(folder, noted | {name: value for name, value in more.items() if value is not None})

    def result(self, out: Path, seconds: float, warnings: Iterable[Problem], complete: bool = False) -> Result:
        """What there is to say about a finished run."""
        stated = self.licences()  # nothing is said where no model states any
        of_licences = licence_problems(stated) if set(stated.values()) != {UNKNOWN} else []
        return Result(
            out=destination(out),
            seconds=seconds,
            read_bytes=self.plan.read_bytes,
            write_bytes=self.plan.write_bytes,
            peak_bytes=self.plan.peak_bytes,
            warnings=(*warnings, *of_licences),
            complete=complete,
        )


def _place(recipe: Mapping[str, Any], name: str) -> Path | None:
    """The folder that a recipe names for its base or one of its models; None where it is no path here."""
    groups = [recipe.get(group) or {} for group in ("models", "experts", "shared")]
    ref = recipe.get("base") if name == "base" else next((group[name] for group in groups if name in group), None)
    model = ref.get("model") if isinstance(ref, Mapping) else ref
    place = Path(model) if isinstance(model, str) else None
    # A relative one is a name, of a model that was handed over in Python.
    return place if place is not None and place.is_absolute() and place.is_dir() else None


def carried_out(jobs: Mapping[Path, Job], room: Room, settings: Settings) -> list[list[Problem]]:
    """Carry out jobs side by side, each into its folder; return the warnings of each.

    Every block that several of them read is read once.
    """
    warnings = [[*job.plan.warnings, *job.prepare()] for job in jobs.values()]
    sinks = [job.sink(out, settings) for out, job in jobs.items()]
    for said, job, sink in zip(warnings, jobs.values(), sinks, strict=True):
        said += what_models_say(job.plan.tasks, job.inputs, sink.identity["inputs"])
    work = [carry.Job(job.plan, job.inputs, sink) for job, sink in zip(jobs.values(), sinks, strict=True)]
    with _runner(settings, room) as runner:
        records = carry.carry_out_all(
            work, threads=room.threads, fit=room.fit, progress=settings.progress, runner=runner
        )
    try:
        for job, sink, found in zip(jobs.values(), sinks, records, strict=True):
            with sink.finishing() as folder:
                job.package(job, found, folder)
    except BaseException:  # the one has let go of its place; so must those that wait for their turn
        for sink in sinks:
            sink.abort()
        raise
    for said, job, found in zip(warnings, jobs.values(), records, strict=True):
        said += what_was_found(job.plan.tasks, found, list(job.inputs.experts))
    return warnings


def _runner(settings: Settings, room: Room) -> AbstractContextManager[Runner | None]:
    """What carries the tasks of a cluster; None for this machine."""
    if settings.ray is None:
        return nullcontext()
    from weightsmith.engine.cluster import ray_runner

    return ray_runner(settings.ray, cpus=room.threads, memory=room.task_bytes)


def with_fingerprints(inputs: Inputs, settings: Settings) -> Inputs:
    """Inputs whose fingerprints are of the kind that is asked for."""
    full = settings.fingerprint == "full"
    return inputs if inputs.full == full else replace(inputs, full=full)  # the same object is read once
