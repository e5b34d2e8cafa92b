"""PyTorch checkpoints: never any code, nothing dropped in silence."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import SourceError
from weightsmith.io.read.pickle import PickleSource


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def refuse(path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=text) as error:
        PickleSource(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("modern", [True, False])
def test_a_state_dict(path: Path, modern: bool) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    state = {"w": weight, "t": weight.T, "tied": weight, "half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    source = PickleSource(path)
    assert source.aliases == {"tied": "w"}
    assert source.read("t", 1, 2).equal(weight.T[1:2])
    assert source.bits("half").tolist() == [0x3F80, 0x3F80]
    assert source.extras == ()
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("w").equal(weight)
    assert copy.fingerprint() == source.fingerprint()


VIEWS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "turned twice": lambda x: x.permute(1, 2, 0),
    "every other row": lambda x: x[1::2],
    "every other column": lambda x: x[:, :, ::2],
    "a corner": lambda x: x[1:3, 1:, 2:],
    "expanded": lambda x: x[0, 0, :3].expand(4, 3),
    "expanded before": lambda x: x[:, :1, 0].expand(4, 7),
    "diagonal": lambda x: x.as_strided((3, 3), (7, 1), 2),
    "one row": lambda x: x[2:3],
    "none": lambda x: x[:0],
    "no axes": lambda x: x[1, 2, 3],
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_as_torch_reads_them(path: Path, view: str, modern: bool) -> None:
    whole = VIEWS[view](torch.arange(60, dtype=torch.int16).reshape(4, 3, 5))
    torch.save({"before": torch.ones(7), "w": whole}, path, _use_new_zipfile_serialization=modern)
    source = PickleSource(path)
    assert source.read("w").equal(whole)
    for start, stop in [(0, 1), (1, 2), (1, 3), (2, None), (3, 3)]:
        assert source.read("w", start, stop).equal(whole[start:stop] if whole.ndim else whole)


def test_a_checkpoint_that_another_program_has_packed(path: Path, tmp_path: Path) -> None:
    """Its parts lie in another order, and not where PyTorch would put them."""
    state = {name: torch.full((3, 5), float(i)) for i, name in enumerate("abc")}
    torch.save(state, tmp_path / "theirs.pt")
    with zipfile.ZipFile(tmp_path / "theirs.pt") as theirs, zipfile.ZipFile(path, "w") as mine:
        for name in sorted(theirs.namelist(), reverse=True):
            mine.writestr(name, theirs.read(name))
    source = PickleSource(path)
    assert all(source.read(name).equal(tensor) for name, tensor in state.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_checkpoint_cut_while_in_use_is_an_error(path: Path) -> None:
    """PyTorch's mapping would end the process with SIGBUS; nothing is mapped any more once it is open."""
    torch.save({"w": torch.arange(1_000_000.0)}, path)
    source = PickleSource(path)
    assert source.read("w", 0, 2).tolist() == [0, 1]
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.truncate(path, 5000)
    with pytest.raises(SourceError, match=r"model\.bin: 'w': the file ends \d+ bytes early; it was cut while in use"):
        source.read("w")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_a_checkpoint_is_unwrapped_and_its_rest_named(path: Path, wrapper: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}
    torch.save({"epoch": 3, wrapper: {"w": torch.ones(2), "_extra_state": None}, "optimizer": optimizer}, path)
    source = PickleSource(path)
    assert list(source.keys) == ["w"]
    assert source.extras == ("epoch", "optimizer", f"{wrapper}._extra_state")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, r"found 'model', 'ema'"),
        ({"state_dict": {"w": torch.ones(1)}, "loose": torch.ones(1)}, "cannot tell which entry"),
        ({"teacher": {"w": torch.ones(1)}}, "found 'teacher'"),
        ({"epoch": 3}, "found 'epoch'"),
        ({}, "found nothing"),
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        ({5: torch.ones(1)}, "stored under 5, which is not a name"),
        ({"s": torch.ones(2, 2).to_sparse()}, "'s' is a sparse"),
        ({"c": torch.ones(1, dtype=torch.complex64)}, "c has dtype complex64"),
    ],
)
def test_what_is_no_state_dict(path: Path, content: Any, text: str) -> None:
    torch.save(content, path)
    refuse(path, text)


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_pickle_is_named_and_not_run(path: Path, tmp_path: Path, modern: bool) -> None:
    trace = tmp_path / "it-ran"
    torch.save({"w": torch.ones(1), "x": Runs(os.mkdir, str(trace))}, path, _use_new_zipfile_serialization=modern)
    refuse(path, r"the pickle asks for code \((posix|nt)\.mkdir\), which is never run; convert it to safetensors")
    assert not trace.exists()


def test_a_pickled_module_is_refused_by_its_class(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)
    refuse(path, r"asks for code \(torch\.nn\.modules\.linear\.Linear\)")


def test_a_plain_pickle_and_rubbish(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(os.getcwd)))
    refuse(path, r"never run|not a readable PyTorch checkpoint")
    path.write_bytes(b"")
    refuse(path, "not a readable PyTorch checkpoint")
    torch.save({"w": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\6\7") + 16] = 2  # a zip archive over two disks
    path.write_bytes(bytes(data))
    refuse(path, "not a readable PyTorch checkpoint")
    torch.save({"w": torch.ones(1000)}, path)
    os.truncate(path, 2000)
    refuse(path, "not a readable PyTorch checkpoint")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_checkpoints_give_only_source_errors(path: Path, changes: list[tuple[int, int]]) -> None:
    torch.save({"w": torch.ones(3)}, path)
    data = bytearray(path.read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    path.write_bytes(bytes(data))
    try:
        source = PickleSource(path)
    except SourceError:
        return
    for name in source.keys:
        source.bits(name)
