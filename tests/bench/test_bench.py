"""The benchmark's own parts: a wrong ratio or a comparison that sees nothing would make every figure worthless."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.__main__ import main
from bench.agree import at_the_cut, check_exact, compare
from bench.measure import BenchError, Usage, forget_cached, measure
from bench.merges import MERGES
from bench.models import SHAPES, decode, encode, make_models, read_tensors
from bench.series import Bench, Memory, Run
from bench.table import markdown, memory_rows, ratio, ratio_rows, usage_rows
from safetensors.torch import load_file

from bench import filters

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def changed(folder: Path, copy: Path, index: int) -> Path:
    """The same folder with one bit of stored data flipped."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[index] ^= 0x40
    file.write_bytes(data)
    return copy


# --- models ----------------------------------------------------------------------------------------


def test_a_full_model_has_the_parameters_of_qwen2_half_b() -> None:
    assert sum(int(np.prod(dims)) for dims in SHAPES["full"].tensors().values()) == 494_032_768


def test_bits_are_rounded_as_torch_rounds_them() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    halfway = decode(np.array([0x3F808000, 0x3F818000], np.uint32))  # ties: one down to even, one up
    values = np.concatenate([values, halfway])
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(decode(encode(values, "bfloat16")), expected)


def test_models_are_readable_by_safetensors_and_differ_by_their_change(root: Path) -> None:
    base, expert = make_models(root, "tiny", 1)
    assert json.loads((base / "config.json").read_text())["model_type"] == "qwen2"
    stored = {name: tensor.float().numpy() for name, tensor in load_file(base / "model.safetensors").items()}
    assert stored.keys() == SHAPES["tiny"].tensors().keys()
    for (name, mine), (_, theirs) in zip(read_tensors(base), read_tensors(expert), strict=True):
        np.testing.assert_array_equal(mine, stored[name])
        assert not np.array_equal(mine, theirs)
    embedding = "model.embed_tokens.weight"
    change = dict(read_tensors(expert))[embedding] - stored[embedding]
    assert change.std() / stored[embedding].std() == pytest.approx(0.05, rel=0.02)


def test_models_are_made_once(root: Path) -> None:
    (base,) = make_models(root, "tiny", 0)
    before = (base / "model.safetensors").stat().st_mtime_ns
    make_models(root, "tiny", 1)
    assert (base / "model.safetensors").stat().st_mtime_ns == before


# --- measuring ---------------------------------------------------------------------------------------


def test_a_process_is_measured_with_its_memory_and_its_work() -> None:
    hold = np.ones(300 << 20, np.uint8)  # a child must not be charged for what its parent holds
    idle = measure([sys.executable, "-I", "-S", "-c", "import time; time.sleep(0.3)"])
    busy = measure([sys.executable, "-I", "-S", "-c", "x = b'1' * (200 << 20); sum(range(5_000_000))"])
    assert hold.any()
    assert idle.wall > 0.3
    assert idle.rss < 50 << 20
    assert idle.cpu < busy.cpu
    assert 200 << 20 < busy.rss < 260 << 20


def test_a_failing_process_is_an_error_with_its_output() -> None:
    with pytest.raises(BenchError, match="no such thing"):
        measure([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_floor_writes_the_first_input(tmp_path: Path) -> None:
    size = (9 << 20) + 12345  # several blocks and a part of one
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(data)
    second.write_bytes(bytes(size + (5 << 20)))
    measure(
        [sys.executable, "-I", "-S", str(ROOT / "bench/floor.py"), str(tmp_path / "o/out"), str(first), str(second)]
    )
    assert (tmp_path / "o/out").read_bytes() == data


def test_dropping_from_the_page_cache_says_whether_it_worked(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert forget_cached([file]) in (True, False)  # a memory file system keeps it


# --- ratios ------------------------------------------------------------------------------------------


def test_ratios_are_taken_pair_by_pair() -> None:
    found = ratio([10.0, 40.0, 90.0], [1.0, 2.0, 30.0])
    assert (found.median, found.low, found.high) == (10.0, 3.0, 20.0)  # the medians' ratio would be 20
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_tables_hold_medians_and_ratios() -> None:
    walls = {"weightsmith": (1.0, 2.0), "mergekit": (20.0, 30.0), "copy": (0.5, 0.5), "copy + fsync": (1.0, 1.0)}
    runs = [
        Run("linear", program, i, Usage(wall, cpu=2 * wall, rss=100_000_000, load=0.5))
        for program, found in walls.items()
        for i, wall in enumerate(found)
    ]
    assert usage_rows(runs)[1] == ["linear", "weightsmith", "1.50", "3.00", "100", "0.5"]
    assert ratio_rows(runs)[1] == [
        "linear",
        "17.5 (15.0 to 20.0)",
        "17.5 (15.0 to 20.0)",
        "1.0 (1.0 to 1.0)",
        "3.0 (2.0 to 4.0)",
        "1.5 (1.0 to 2.0)",
    ]
    alone = [run for run in runs if run.program != "mergekit"]
    assert ratio_rows(alone)[1][1:4] == ["-", "-", "-"]


def test_memory_is_compared_with_the_plan_and_with_fewer_experts() -> None:
    found = [Memory("ties", 12, 400_000_000, 440_000_000), Memory("ties", 3, 400_000_000, 400_000_000)]
    assert memory_rows(found)[1:] == [
        ["ties", "12", "400", "440", "1.10", "1.10"],
        ["ties", "3", "400", "400", "1.00", ""],
    ]


def test_markdown_is_a_table() -> None:
    assert markdown([["a", "bb"], ["ccc", "1"]]) == "| a   | bb |\n|-----|---:|\n| ccc |  1 |"


# --- agreement ---------------------------------------------------------------------------------------


def test_equal_outputs_agree_and_one_bit_is_seen(root: Path, tmp_path: Path) -> None:
    base, expert = make_models(root, "tiny", 1, "float32")
    assert compare(expert, expert, base).unlike == 0
    assert check_exact(expert, expert, base, [expert], None) == (138_304, 0)
    other = changed(expert, tmp_path / "other", -2)  # of the last tensor's last value: upper mantissa
    one = compare(expert, other, base)
    assert one.unlike == pytest.approx(1 / one.entries)
    assert one.largest > 0
    with pytest.raises(BenchError, match="model"):
        check_exact(expert, other, base, [expert], None)


def test_only_equals_that_the_cut_divides_are_left_to_the_sort() -> None:
    delta = np.array([3.0, -2.0, 2.0, 1.0, 0.5, 0.1], np.float32)
    assert at_the_cut(delta, 1 / 3).tolist() == [False, True, True, False, False, False]
    assert not at_the_cut(delta, 1 / 2).any()


# --- merges ------------------------------------------------------------------------------------------


def test_both_programs_are_told_the_same(tmp_path: Path) -> None:
    base, experts = tmp_path / "base", [tmp_path / f"e{i}" for i in range(3)]
    ours = json.loads(MERGES["ties"].recipe(tmp_path / "ours.json", base, experts).read_text())
    theirs = json.loads(MERGES["ties"].config(tmp_path / "theirs.yml", base, experts).read_text())
    assert ours["base"] == theirs["base_model"] == str(base)
    assert [m["weight"] for m in ours["models"].values()] == [m["parameters"]["weight"] for m in theirs["models"]]
    assert {m["parameters"]["density"] for m in theirs["models"]} == {ours["method"][0]["ties"]["density"]}
    assert len(json.loads(MERGES["slerp"].recipe(tmp_path / "ours.json", base, experts).read_text())["models"]) == 1


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
def test_weightsmith_computes_the_formula_that_both_are_told(name: str, root: Path, tmp_path: Path) -> None:
    """The float32 output against the formula in float64: the agreement does not rest on mergekit alone."""
    bench = Bench(root, None)
    base, experts = bench.folders("tiny", 3, "float32")
    recipe = MERGES[name].recipe(tmp_path / "recipe.json", base, experts)
    measure([str(Path(sys.executable).with_name("weightsmith")), "merge", str(recipe), str(tmp_path / "out")])
    weights = np.array([0.5, 0.3, 0.4])
    for (_, found), (_, origin), *models in zip(
        read_tensors(tmp_path / "out"), read_tensors(base), *map(read_tensors, experts), strict=True
    ):
        stack = np.stack([values for _, values in models]).astype(np.float64)
        mean = np.tensordot(weights, stack, 1) / weights.sum()
        added = origin + 0.7 * np.tensordot(weights, stack - origin, 1)
        np.testing.assert_allclose(found, mean if name == "linear" else added, rtol=1e-6, atol=1e-8)


def test_a_small_run_writes_its_tables(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "tiny", "--no-mergekit", "--methods", "linear", "--repeat", "1", "--memory", "2", "3"]
    assert main([*arguments, "--folder", str(root / "run")]) == 0
    assert "weightsmith : copy" in capsys.readouterr().out
    record = json.loads((root / "run/results.json").read_text())
    assert [run["program"] for run in record["runs"]] == ["weightsmith", "copy", "copy + fsync"]
    assert [one["experts"] for one in record["memory"]] == [2, 3]
    assert all(one["predicted"] > 0 and one["measured"] > 0 for one in record["memory"])
    assert not any((root / "run/out").iterdir())


def test_filters_are_measured_beside_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert filters.main(["--size", "tiny", "--repeat", "1", "--folder", str(tmp_path), "agree"]) == 0
    assert "| agree " in capsys.readouterr().out


def test_a_missing_mergekit_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MERGEKIT_PYTHON", str(tmp_path / "nowhere"))
    assert main(["--folder", str(tmp_path), "--size", "tiny"]) == 1
    assert "MERGEKIT_PYTHON" in capsys.readouterr().err
