"""All commands that write a folder are as hard to hurt as merge: the same trials, a part of them."""

from __future__ import annotations

import itertools
import random

import pytest

from reliability.trials import ERRORS, calls_of, end_at, fail_at

WRITERS = ["compress", "restore", "sweep", "moe", "shrink", "lora", "lock", "unlock", "transplant"]
KINDS = itertools.cycle(ERRORS)


def test_every_writer_is_here(writers):
    assert sorted(writers) == sorted(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_kills_and_power_cuts(zygote, writers, tmp_path, note, name):
    scene, chance = writers[name], random.Random(name)
    count = calls_of(zygote, scene, tmp_path)
    killed = [*chance.sample(range(1, count), 3), count - chance.randrange(12)]
    note("SIGKILL at a call of another command", end_at(zygote, scene, tmp_path, "kill", killed))
    cut = chance.sample(range(count // 3, count), 2)
    note("power cuts of another command", end_at(zygote, scene, tmp_path, "power", cut, interval=0.0))


@pytest.mark.parametrize("name", WRITERS)
def test_failing_calls(zygote, writers, tmp_path, note, name):
    count = calls_of(zygote, writers[name], tmp_path)
    cases = [(n, next(KINDS)) for n in random.Random(name).sample(range(1, count + 1), 6)]
    note("failing calls of another command", fail_at(zygote, writers[name], tmp_path, cases))


RERUN = dict.fromkeys(WRITERS, "") | {
    "lora": "was made by weightsmith lora; run that again into another folder",
    **{name: f"was made with a key; run weightsmith {name} again to compare" for name in ("lock", "unlock")},
}


@pytest.mark.parametrize("name", WRITERS)
def test_verify_proves_what_every_command_makes(zygote, writers, tmp_path, name):
    """Whole as it is, made again by its recipe, and no longer whole with a bit flipped in any of its files."""
    scene = writers[name]
    assert zygote.run(scene.argv(tmp_path)).code == 0
    for out in sorted((tmp_path / "out").iterdir()) if scene.apart else [tmp_path / "out"]:
        assert zygote.run(["verify", str(out)]).code == 0
        again = zygote.run(["verify", str(out), "--rerun"])
        assert RERUN[name] in again.stderr
        assert again.code == (2 if RERUN[name] else 0), again
        for path in sorted(each for each in out.rglob("*") if each.is_file()):
            data = bytearray(path.read_bytes())
            at = random.Random(path.name).randrange(len(data))
            data[at] ^= 4
            path.write_bytes(data)
            found = zygote.run(["verify", str(out)])
            assert found.code == 2, (path, at)
            data[at] ^= 4
            path.write_bytes(data)
        assert zygote.run(["verify", str(out)]).code == 0
