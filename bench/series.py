"""Measured runs: repetitions of all programs in turn, and peak memory against the plan."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import mergekit
from bench.agree import Agreement, check_exact, compare
from bench.measure import BenchError, Usage, forget_cached, measure, plain_environment
from bench.merges import UNDRAWN, Merge
from bench.models import make_models

__all__ = ["OURS", "PROGRAMS", "THEIRS", "Bench", "Memory", "Run"]

OURS, THEIRS, COPY, DURABLE = PROGRAMS = ("weightsmith", "mergekit", "copy", "copy + fsync")
"""Who is measured.  weightsmith flushes its output to the disk before it ends, mergekit does not: hence two copies."""

SETTLE = 6
"""Copies at most before each measured run."""

WEIGHTSMITH = Path(sys.executable).with_name("weightsmith")
_FLOOR = Path(__file__).with_name("floor.py")


@dataclass(frozen=True)
class Run:
    """One measured process."""

    merge: str
    program: str
    repetition: int
    usage: Usage


@dataclass(frozen=True)
class Memory:
    """Peak memory of one merge: bytes that `weightsmith plan` predicts, and bytes measured."""

    merge: str
    experts: int
    predicted: int
    measured: int


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    root  folder for models, outputs and mergekit's environment
    rival mergekit's interpreter, or None to leave mergekit out
    cold  drop the inputs from the page cache before each run
    """

    root: Path
    rival: Path | None
    cold: bool = False

    def folders(self, size: str, experts: int, dtype: str = "bfloat16") -> tuple[Path, list[Path]]:
        base, *rest = make_models(self.root / "models", size, experts, dtype)
        return base, rest

    def repeat(self, merge: Merge, size: str, experts: int, times: int, say: Callable[[Run], None]) -> list[Run]:
        """Measure every program `times` times, in turn; the outputs of the last round stay."""
        commands = self._commands(merge, *self.folders(size, experts))
        inputs = [
            file for folder in merge.inputs(*self.folders(size, experts)) for file in folder.glob("*.safetensors")
        ]
        runs = []
        for repetition in range(times):
            for program, command in commands.items():
                # The same start for everyone: inputs in the page cache, memory at hand, nothing waiting to be written.
                self._settle(commands[COPY])
                self._clear(program)
                os.sync()
                if self.cold and not forget_cached(inputs):
                    raise BenchError("the inputs cannot be dropped from the page cache here; leave --cold out")
                runs.append(Run(merge.name, program, repetition, measure(command)))
                say(runs[-1])
        return runs

    def _settle(self, copy: list[str]) -> None:
        """Copy until that gets no quicker: a virtual machine may have to fetch its page cache back first."""
        last = float("inf")
        for _ in range(SETTLE):
            took = measure(copy).wall
            self._clear(COPY)
            if took > 0.8 * last:
                break
            last = took

    def agreement(self, merge: Merge, size: str, experts: int) -> Agreement:
        """Compare the outputs that `repeat` has left."""
        base, _ = self.folders(size, experts)
        return compare(self._out(OURS), self._out(THEIRS), base)

    def exact(self, merge: Merge, size: str = "small", experts: int = 3) -> tuple[int, int]:
        """Run both programs in float32 on float32 models and hold every entry equal; see `agree.check_exact`."""
        base, models = self.folders(size, experts, "float32")
        merge = UNDRAWN if merge.random else merge
        self.clear()
        commands = self._commands(merge, base, models, "float32")
        for program in (OURS, THEIRS):
            measure(commands[program])
        density = merge.density if merge.tied else None
        return check_exact(self._out(OURS), self._out(THEIRS), base, models, density, merge.close)

    def memory(self, merge: Merge, size: str, experts: int) -> Memory:
        """Measure weightsmith's peak memory, and ask its plan for it."""
        recipe = merge.recipe(self.root / "recipes" / f"{merge.name}.json", *self.folders(size, experts))
        self.clear()
        plan = [str(WEIGHTSMITH), "plan", str(recipe), "--json"]
        found = subprocess.run(plan, env=plain_environment(), check=True, capture_output=True, text=True)
        used = measure([str(WEIGHTSMITH), "merge", str(recipe), str(self._out(OURS))])
        self.clear()
        return Memory(merge.name, experts, int(json.loads(found.stdout)["peak_bytes"]), used.rss)

    def warm_up(self, merges: Sequence[Merge]) -> None:
        """Let weightsmith compile its kernels, and Python its modules, before anything is measured."""
        for merge in merges:
            self.clear()
            commands = self._commands(merge, *self.folders("tiny", 3))
            for program in (OURS, *([THEIRS] if self.rival else [])):
                measure(commands[program])
        self.clear()

    def clear(self) -> None:
        """Remove all outputs."""
        for program in PROGRAMS:
            self._clear(program)

    def _clear(self, program: str) -> None:
        """Remove a program's output, and what an interrupted run has left beside it."""
        shutil.rmtree(self._out(program).parent, ignore_errors=True)

    def _out(self, program: str) -> Path:
        return self.root / "out" / program.replace(" + ", "-") / "merged"

    def _commands(
        self, merge: Merge, base: Path, experts: Sequence[Path], dtype: str = "bfloat16"
    ) -> Mapping[str, list[str]]:
        recipe = merge.recipe(self.root / "recipes" / f"{merge.name}.json", base, experts)
        commands = {OURS: [str(WEIGHTSMITH), "merge", str(recipe), str(self._out(OURS))]}
        if self.rival is not None:
            config = merge.config(self.root / "recipes" / f"{merge.name}.mergekit.yml", base, experts, dtype)
            commands[THEIRS] = mergekit.command(self.rival, config, self._out(THEIRS))
        inputs = [str(folder / "model.safetensors") for folder in merge.inputs(base, experts)]
        copy = [sys.executable, "-I", "-S", str(_FLOOR)]
        commands[COPY] = [*copy, str(self._out(COPY) / "model.safetensors"), *inputs]
        commands[DURABLE] = [*copy, str(self._out(DURABLE) / "model.safetensors"), "--fsync", *inputs]
        return commands
