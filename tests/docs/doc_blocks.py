"""The fenced blocks of a Markdown page, and what running them means.

    ```python                 runs, in one namespace per page
    ```python file=NAME       is written to NAME
    ```yaml                   is a recipe whose plan has no problems
    ```yaml file=NAME         is written to NAME, and is a recipe that loads (study.yaml: a study, run.yaml: a suite's)
    ```yaml moe file=NAME     the same, for a mixture of experts
    ```yaml train file=NAME     a training run that loads
    ```yaml multitask file=NAME one of several tasks
    ```yaml fuse file=NAME      the same, from several models
    ```yaml adapters file=NAME  is a recipe of adapters that loads
    ```sh                     every line is run: weightsmith, python, make (whose target must exist; it is not run)
    ```sh exit=2              the last command ends with this code
    ```text output            is what the block before has printed; '...' stands for anything
    ```text                   is an illustration
    ```LANGUAGE norun         is not run
    ```{...}                  is a directive of the page

Any other block is a mistake in the page.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith import lora
from weightsmith.cli.main import main
from weightsmith.core.method import Codec, registry
from weightsmith.io.read.shell import no_bars
from weightsmith.jobs.nested import open_inputs
from weightsmith.moe.recipe import load as load_moe
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.load import load, loads
from weightsmith.search.schema import load as load_search
from weightsmith.study.schema import load_study
from weightsmith.study.suite_file import load_run
from weightsmith.train.fuse.recipe import load as load_fuse
from weightsmith.train.multitask.recipe import load as load_multitask
from weightsmith.train.recipe import load as load_train

__all__ = ["Block", "Page", "blocks"]

_FENCE = re.compile(r"^(?P<fence> *`{3,})(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is where it starts, `words` what follows the language."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int

    def option(self, name: str) -> str | None:
        """The VALUE of a word NAME=VALUE."""
        return next((w.partition("=")[2] for w in self.words if w.startswith(f"{name}=")), None)


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        language, *words = found["info"].split() or [""]
        yield Block(language, tuple(words), textwrap.dedent(found["text"]), text[: found.start()].count("\n") + 1)


class Page:
    """Runs the blocks of one page in order, in the working directory, and counts them by what was done."""

    def __init__(self, name: str, text: str, makefile: str) -> None:
        self.name, self.blocks, self._makefile = name, list(blocks(text)), makefile
        self.counts: Counter[str] = Counter()
        self._namespace: dict[str, Any] = {"__name__": "__main__"}
        self._printed = ""

    def run(self) -> None:
        for block in self.blocks:
            try:
                self.counts[self._do(block)] += 1
            except BaseException as error:
                error.add_note(f"in the block at {self.name}:{block.line}")
                raise

    def _do(self, block: Block) -> str:
        if block.language.startswith("{"):
            return "directive"
        if "norun" in block.words:
            return "not run"
        unknown = [
            w for w in block.words if not re.fullmatch(r"output|moe|adapters|train|multitask|fuse|file=\S+|exit=\d+", w)
        ]
        assert not unknown, f"unknown words {unknown}"
        if (name := block.option("file")) is not None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(block.text)
        match block.language:
            case "python" if name is None:
                self._printed = _captured(lambda: exec(compile(block.text, self.name, "exec"), self._namespace))
                return "python"
            case "yaml" if "moe" in block.words:
                assert name is not None
                load_moe(name)
                return "recipe"
            case "yaml" if "adapters" in block.words:
                assert name is not None
                lora.load(name)
                return "recipe"
            case "yaml" if "multitask" in block.words:
                assert name is not None
                load_multitask(name)
                return "recipe"
            case "yaml" if "train" in block.words:
                assert name is not None
                load_train(name)
                return "recipe"
            case "yaml" if "fuse" in block.words:
                assert name is not None
                load_fuse(name)
                return "recipe"
            case "yaml":
                _checked(block.text, name)
                return "recipe"
            case "python":
                assert name is not None
                return "file"
            case "sh":
                self._printed = _captured(lambda: self._shell(block))
                return "commands"
            case "text" if "output" in block.words:
                wanted = ".*".join(re.escape(part) for part in block.text.strip().split("..."))
                assert re.fullmatch(wanted, self._printed.strip(), re.DOTALL), f"printed:\n{self._printed}"
                return "output"
            case "text":
                return "illustration"
        raise AssertionError(f"unknown kind of block {block.language!r}")

    def _shell(self, block: Block) -> None:
        code = 0
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            assert code == 0, f"{line!r} would not be reached"
            match words[0]:
                case "weightsmith":
                    code = main(words[1:])
                case "python":
                    done = subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True)
                    sys.stdout.write(done.stdout)
                case "make":
                    assert re.search(rf"^{words[1]}:", self._makefile, re.MULTILINE), f"no target {words[1]}"
                case _:
                    raise AssertionError(f"{line!r}: cannot be run here; mark the block norun")
        assert code == int(block.option("exit") or 0), f"exit code {code}"


def _checked(text: str, name: str | None) -> None:
    if name is None:
        _planned(text)
    elif Path(name).name == "study.yaml":
        load_study(name)
    elif Path(name).name == "run.yaml":
        load_run(name)
    elif Path(name).name == "search.yaml":
        load_search(name)
    else:
        load(name)


def _planned(text: str) -> None:
    recipe = loads(text)
    make_plan(recipe, sources=open_inputs(recipe), encode=issubclass(registry(recipe.method[-1].name), Codec))


def _captured(action: Any) -> str:
    """What an action prints, to stdout and stderr in order, but for bars of transformers; shown if it fails."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), no_bars():
            action()
    except BaseException as error:
        error.add_note(f"printed:\n{out.getvalue()}")
        raise
    return out.getvalue()
