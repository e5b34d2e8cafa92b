"""Runs the command line in forked children, with a fault in each: `python zygote.py`, one JSON request a line.

Starting a process with torch in it takes seconds, a fork milliseconds; so hundreds of runs can be ended in
hundreds of ways.  A request:

    argv      words after `weightsmith`
    log       prefix of the files that take the child's stdout, stderr and list of calls
    fault     {"kind": ..., "at": n}: what happens at the n-th call through `weightsmith.io.system` (see `faults.py`)
    signal    {"number": 9, "after": seconds}: sent by this process
    patch     changes to the child: see `faults.patch`

The answer: {"code": exit code, or minus the signal that ended it, "calls": how many it made, "seconds": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds after which a child counts as hung


def main() -> None:
    import numba  # noqa: F401
    import torch
    from faults import install, patch

    from weightsmith.cli import main as cli
    from weightsmith.kernels import compiled  # noqa: F401  (loads the compiled loops)

    torch.set_num_threads(1)
    torch.ones(3) @ torch.ones(3)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("warm"):
            _quietly(request["log"])
            answer: dict[str, Any] = {"code": cli.main(request["argv"])}
        else:
            gc.freeze()  # a collection in a child would copy every page of the parent
            began = time.monotonic()
            child = os.fork()
            if child == 0:
                _child(request, cli.main, install, patch)
            answer = {"code": _end_of(child, request.get("signal"), began), "seconds": time.monotonic() - began}
            calls = Path(request["log"] + ".calls")
            counted = calls.read_text() if calls.exists() else ""  # a kill may leave an empty file
            answer["calls"] = int(counted) if counted else None
        os.write(_ANSWERS, json.dumps(answer).encode() + b"\n")


def _quietly(log: str) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        descriptor = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def _child(request: dict[str, Any], command: Any, install: Any, patch: Any) -> None:
    code = 99
    try:
        _quietly(request["log"])
        Path(request["log"] + ".calls").unlink(missing_ok=True)
        patch(request.get("patch") or {})
        counter = install(request.get("fault"))
        code = command(request["argv"])
        Path(request["log"] + ".calls").write_text(str(counter.count))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _end_of(child: int, signal: dict[str, Any] | None, began: float) -> int:
    if signal is not None:
        time.sleep(signal["after"])
        os.kill(child, signal["number"])  # a child that has ended already is still there to be waited for
    while time.monotonic() - began < LIMIT:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1000


if __name__ == "__main__":
    _ANSWERS = os.dup(1)
    main()
