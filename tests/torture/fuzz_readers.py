"""Coverage-guided fuzzing of everything that reads a stranger's bytes: `make torture`.

Each target runs in a process of its own, because atheris does not return: `python fuzz_readers.py TARGET`.
WEIGHTSMITH_FUZZ_SECONDS says for how long (60 by default).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from safety.readers import SEEDS, TARGETS

TESTS = str(Path(__file__).parents[1])
SECONDS = int(os.environ.get("WEIGHTSMITH_FUZZ_SECONDS", "60"))
SLOWEST = 10  # seconds for one input
MEMORY = 2048  # MB


@pytest.mark.parametrize("target", SEEDS)
def test_only_our_own_errors_come_out(target: str, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(SEEDS[target]()):
        (seeds / str(i)).write_bytes(seed)
    limits = [f"-max_total_time={SECONDS}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", "-max_len=4096"]
    words = [sys.executable, __file__, target, *limits, f"-artifact_prefix={tmp_path}/", str(seeds)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", timeout=SECONDS + 300, check=False, env=environment
    )
    kept = [f"{path.name}: {path.read_bytes()[:4096]!r}" for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{kept}"
    count = next(line for line in reversed(done.stderr.splitlines()) if line.startswith("Done "))
    sys.stderr.write(f"{target}: {count}\n")


def fuzz(target: str, options: list[str]) -> None:
    import atheris

    ours = [f"weightsmith.{part}" for part in ("io", "recipe", "tokens", "moe.recipe", "lora.recipe")]
    with atheris.instrument_imports(include=[*ours, "ruamel.yaml.scanner", "torch._weights_only_unpickler"]):
        read = TARGETS[target](Path(tempfile.mkdtemp(dir=Path(options[-1]).parent)))
        from safety.refusal import outcome

    def once(data: bytes) -> None:
        outcome(lambda: read(data))

    once(b"")  # what is imported late is not timed
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
