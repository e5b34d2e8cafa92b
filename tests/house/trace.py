"""Trace one real merge, a tiny TIES recipe from the command line to the bytes; print the findings as JSON.

    python -m house.trace SRC        # SRC: the folder that holds the package

Runs in a process of its own: what an import executes is only seen where nothing has been imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

__all__ = ["Function", "Trace"]

Function = tuple[str, str]
"""(module without 'weightsmith.', qualified name); functions inside functions count as the outer one."""

TOUCHES = {"pread", "preadv", "pwrite", "pwritev"}
"""The calls that move bytes of files."""


class Trace:
    """Functions of the package that are called, by whom, and which of them are on the stack at a byte."""

    def __init__(self, package: Path) -> None:
        self._root = f"{package}/"
        self.calls: set[tuple[Function, Function]] = set()  # caller, callee
        self.way: set[Function] = set()  # on the stack when bytes are read, computed or written
        self.depth = 0  # the most frames between `run` and a kernel

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """See `sys.setprofile`."""
        if event == "call" and self._ours(frame):
            caller = frame.f_back
            while caller is not None and not self._ours(caller):
                caller = caller.f_back
            if caller is not None and self._name(caller) != self._name(frame):
                self.calls.add((self._name(caller), self._name(frame)))
        elif event == "c_call" and getattr(argument, "__name__", "") in TOUCHES:
            self.way.update(self._stack(frame))

    def kernel(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The kernel, noting who calls it."""

        def noted(*arguments: Any) -> Any:
            stack = self._stack(sys._getframe(1))
            self.way.update(stack)
            after_run = [i for i, name in enumerate(stack) if name == ("jobs.merge", "run")]
            self.depth = max(self.depth, len(stack) - 1 - after_run[-1])
            return call(*arguments)

        return noted

    def _ours(self, frame: FrameType) -> bool:
        code = frame.f_code  # not the body of a module or a class, which an import runs
        return code.co_filename.startswith(self._root) and bool(code.co_flags & CO_OPTIMIZED)

    def _name(self, frame: FrameType) -> Function:
        module = frame.f_code.co_filename.removeprefix(self._root).removesuffix(".py").replace("/", ".")
        return module, frame.f_code.co_qualname.split(".<locals>")[0]

    def _stack(self, innermost: FrameType | None) -> list[Function]:
        """Outermost first; a comprehension and its function are one."""
        found: list[Function] = []
        while innermost is not None:
            if self._ours(innermost) and (not found or found[-1] != self._name(innermost)):
                found.append(self._name(innermost))
            innermost = innermost.f_back
        return found[::-1]


def is_dispatch(callee: Function) -> bool:
    """Whether the function is a method that a base class of its class declares: then the caller knows the base only."""
    owner, _, method = callee[1].rpartition(".")
    held: Any = sys.modules.get(f"weightsmith.{callee[0]}")
    for name in owner.split(".") if owner else ():
        held = getattr(held, name, None)
    return isinstance(held, type) and any(method in vars(base) for base in held.__mro__[1:-1])


def models(folder: Path) -> Path:
    """Write a base, two experts of one bfloat16 matrix, and the recipe."""
    head = {"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [64, 96], "data_offsets": [0, 12288]}}
    text = json.dumps(head).encode()
    for seed, name in enumerate(("base", "a", "b")):
        values = np.random.default_rng(seed).standard_normal(64 * 96, dtype=np.float32)
        (folder / name).mkdir()
        bits = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        (folder / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bits)
    recipe = folder / "recipe.yaml"
    recipe.write_text("base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\n")
    return recipe


def main(source: Path) -> None:
    """Merge once untraced, so that the kernels are compiled and kept; then once traced."""
    trace = Trace(source.resolve() / "weightsmith")
    from weightsmith.cli.main import main as command
    from weightsmith.kernels import native

    with tempfile.TemporaryDirectory() as folder:
        recipe = models(Path(folder))
        words = ["merge", str(recipe), f"{folder}/out", "--threads", "1", "--quiet", "--overwrite"]
        loaded = native.kernels()
        assert loaded is not None, "the trace needs the kernels"
        noted = {name: trace.kernel(call) for name, call in loaded.items()}
        native.kernels = lambda: noted  # type: ignore[assignment]
        threading.setprofile(trace)
        sys.setprofile(trace)
        code = command(words)
        sys.setprofile(None)
        assert code == 0
    json.dump(
        {
            "calls": [[a, b, is_dispatch(b)] for a, b in sorted(trace.calls)],
            "way": sorted(trace.way),
            "depth": trace.depth,
            "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "weightsmith"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
