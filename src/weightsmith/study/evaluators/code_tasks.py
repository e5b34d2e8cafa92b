"""pass@k: programs that the model writes are run, in a process with limits, only where the user allows it.

The limits (seconds, memory, size of files, no further process, no network where the system grants that) stop accidents.
They are no prison: whoever fears malice runs the whole in a virtual machine, and never as the superuser.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from weightsmith.core.settings import cores
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.language import language
from weightsmith.study.evaluators.lines import rows, texts
from weightsmith.study.evaluators.specs import Code
from weightsmith.study.evaluators.subject import Subject

__all__ = ["code", "pass_at_k", "passes"]

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")
"""Where a completion of a function ends."""


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(samples - right, k) / C(samples, k): the unbiased estimate (Chen et al. 2021, arXiv:2107.03374)."""
    return 1.0 if samples - right < k else 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def code(subject: Subject, spec: Code) -> Found:
    """pass@1 and pass@k of HumanEval's kind: prompt + completion + test, `check(entry_point)` is called."""
    items = rows(Path(spec.file), subject.setting.limit, _problem)
    model, completions, notes = language(subject), [], dict[str, float]()
    for sample in range(spec.samples):
        seed = subject.setting.seed + sample
        made, cut = model.written([prompt for prompt, _ in items], spec.max_new_tokens, STOPS,
                                  temperature=spec.temperature, seed=seed)  # fmt: skip
        completions.append(made)
        notes = {name: notes.get(name, 0) + count for name, count in {**notes, **cut}.items()} if cut else notes
    programs = [prompt + completions[n][at] + "\n" + test for at, (prompt, test) in enumerate(items)
                for n in range(spec.samples)]  # fmt: skip
    with ThreadPoolExecutor(cores()) as pool:
        passed = list(pool.map(lambda program: passes(program, spec.seconds, spec.megabytes), programs))
    right = [sum(passed[at * spec.samples : (at + 1) * spec.samples]) for at in range(len(items))]
    return of_examples(
        {f"pass@{k}": [pass_at_k(spec.samples, count, k) for count in right] for k in sorted({1, spec.k})}, notes
    )


def _problem(item: Mapping[str, Any]) -> tuple[str, str]:
    return texts(item, "prompt"), f"{texts(item, 'test')}\ncheck({texts(item, 'entry_point')})\n"


_LIMITS = """
import ctypes, os, resource, sys
seconds, size = int(sys.argv[1]), int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process of its own; does not bind the superuser
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # a user and a network of its own, where the system grants it
except Exception:
    pass
del ctypes, resource
program = sys.stdin.read()
sys.stdin = open(os.devnull)
sys.argv = ["program"]
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
os._exit(77)  # whoever calls exit(0) before its tests has not passed them
"""

_PASSED = 77


def passes(program: str, seconds: float, megabytes: int) -> bool:
    """Whether a program runs to its end, in an empty folder, without the user's environment, within the limits."""
    with tempfile.TemporaryDirectory(prefix="weightsmith-code-") as room:
        words = [sys.executable, "-I", "-S", "-c", _LIMITS, str(math.ceil(seconds)), str(megabytes)]
        child = subprocess.Popen(
            words, cwd=room, env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(program.encode(errors="replace"), timeout=seconds + 1)
            return child.returncode == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
