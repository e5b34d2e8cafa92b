"""The copy floor: read every input once, write one output of the first one's size.  Nothing is computed.

Plain `preadv` into a buffer that is used again and `pwrite` from it, on as many threads as there are cores.
    python -I -S floor.py OUT [--fsync] INPUT...
"""

import os
import sys
import threading

BLOCK = 4 << 20


def copy(inputs: list[int], out: int, places: range, size: int) -> None:
    buffer = memoryview(bytearray(BLOCK))
    for place in places:
        for descriptor in reversed(inputs):  # the first input last, so that its bytes are the ones written
            count = os.preadv(descriptor, [buffer], place)
        if place < size:
            os.pwrite(out, buffer[: min(count, size - place)], place)


def main() -> None:
    path, *inputs = sys.argv[1:]
    durable = inputs[0] == "--fsync"
    descriptors = [os.open(name, os.O_RDONLY) for name in inputs[durable:]]
    size = os.fstat(descriptors[0]).st_size
    longest = max(os.fstat(descriptor).st_size for descriptor in descriptors)
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120  (pathlib would be half of this process)
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    cores = len(os.sched_getaffinity(0))
    threads = [
        threading.Thread(target=copy, args=(descriptors, out, range(i * BLOCK, longest, cores * BLOCK), size))
        for i in range(cores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if durable:
        os.fsync(out)


main()
