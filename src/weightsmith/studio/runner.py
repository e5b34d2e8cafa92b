"""python -m weightsmith.studio.runner FOLDER LOCK: carries out one job, and notes how it ended.

It outlives the server that started it.  Both it and the command hold the inherited lock (a file descriptor), so
that whoever looks at the folder later can tell a running job from one that was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from weightsmith.io import system
from weightsmith.io.disk import replace_file
from weightsmith.io.read.small import read_json

__all__ = ["main"]


def main(folder: str, lock: str) -> int:
    """Run the command that FOLDER/job.json holds; its output goes to FOLDER/out, what it says to FOLDER/log."""
    place = Path(folder)
    job = read_json(place / "job.json", 1_000_000)
    words = [*job["words"], *job.get("more", ())]
    alive = system.call((place / "runner").open, "wb")  # kept locked while this process lives
    fcntl.flock(alive, fcntl.LOCK_EX)
    with system.call((place / "out").open, "wb") as out, system.call((place / "log").open, "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "weightsmith", *words],
            stdin=subprocess.DEVNULL, stdout=out, stderr=log, pass_fds=(int(lock),),
            env={**os.environ, "WEIGHTSMITH_PROGRESS": str(place / "progress")},
        )  # fmt: skip
        replace_file(place / "pid", str(child.pid).encode())
        code = child.wait()
    ended = {"code": code if code >= 0 else 128 - code, "ended": time.time()}
    replace_file(place / "done", json.dumps(ended).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
