"""Start one command, wait for it, and write down what it used.

A process of its own, without site packages: Linux starts a child's peak memory at that of the process it was
forked from, so whoever starts it must be small.
    python -I -S launch.py REPORT LOG COMMAND...
"""

import json
import os
import sys
import time


def main() -> None:
    report, log, *command = sys.argv[1:]
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - began
    numbers = {
        "code": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": used.ru_utime + used.ru_stime,
        "rss": used.ru_maxrss * 1024,
    }
    with open(report, "w") as file:  # noqa: PTH123  (pathlib would be most of this process)
        json.dump(numbers, file)


main()
