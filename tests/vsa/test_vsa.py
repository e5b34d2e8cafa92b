"""Vectors of JSON: what is near, what is not, the same in every process; and search in folders."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.vsa import Encoder, Index, noise
from weightsmith.vsa.documents import read_document
from weightsmith.vsa.search import INDEX, find

BINDERS = ("dense", "hadamard")
RECIPE = {"models": {"a": "x/a", "b": "x/b"}, "method": "ties", "parameters": {"density": 0.5, "lambda": 1}, "seed": 3}


@pytest.fixture(scope="module", params=BINDERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(binder=request.param)


def _near(encoder: Encoder, a: Any, b: Any) -> float:
    return float(encoder.encode(a) @ encoder.encode(b))


def test_norms_are_kept_at_any_depth(encoder: Encoder) -> None:
    x = np.random.default_rng(0).standard_normal(encoder.dim)
    deep = x
    for i in range(10):
        deep = encoder._bind(f"key {i}", deep)
    assert np.linalg.norm(deep) == pytest.approx(np.linalg.norm(x), rel=1e-5)
    for i in reversed(range(10)):
        deep = encoder._unbind(f"key {i}", deep)
    assert np.allclose(deep, x, atol=1e-5)
    nested: Any = "leaf"
    for _ in range(20):
        nested = {"a": nested}
    assert np.linalg.norm(encoder.encode(nested)) == pytest.approx(1, rel=1e-5)


def test_the_order_of_keys_changes_no_bit(encoder: Encoder) -> None:
    other = dict(reversed(RECIPE.items()))
    assert encoder.encode(RECIPE).tobytes() == encoder.encode(other).tobytes()


def test_other_processes_make_the_same_vector() -> None:
    """Python's own hash is drawn anew in each."""
    code = "import json, sys, hashlib; from weightsmith.vsa import Encoder; "
    code += (
        "v = Encoder(binder='hadamard').encode(json.loads(sys.argv[1])); print(hashlib.sha256(v.tobytes()).hexdigest())"
    )
    mine = hashlib.sha256(Encoder(binder="hadamard").encode(RECIPE).tobytes()).hexdigest()
    for seed in ("1", "2"):
        words = [sys.executable, "-c", code, json.dumps(RECIPE)]
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
        assert subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout.strip() == mine


def test_nesting_does_not_commute(encoder: Encoder) -> None:
    assert _near(encoder, {"a": {"b": "x"}}, {"b": {"a": "x"}}) < 0.2
    assert _near(encoder, ["a", "b"], ["b", "a"]) < 0.9


def test_near_numbers_are_near(encoder: Encoder) -> None:
    to = [_near(encoder, {"v": 0.5}, {"v": y}) for y in (0.51, 0.6, 5, 500)]
    assert to == sorted(to, reverse=True)
    assert to[1] - to[2] > 0.2
    assert _near(encoder, 0.3, 0.1 + 0.2) == pytest.approx(1, abs=1e-6)
    assert encoder.encode(1).tobytes() == encoder.encode(1.0).tobytes()
    assert _near(encoder, 1e-5, 2e-5) > _near(encoder, 1e-5, 1e-4)
    assert _near(encoder, 0.5, -0.5) < 0.5
    assert _near(encoder, math.nan, math.inf) < 0.2
    scaled = Encoder(binder="hadamard", scales={"v": (0, 10)})
    assert _near(scaled, {"v": 1}, {"v": 2}) > _near(scaled, {"v": 1}, {"v": 5})


def test_near_words_are_near(encoder: Encoder) -> None:
    assert _near(encoder, "linear", "liner") > 0.2 > abs(_near(encoder, "linear", "slerp"))
    assert _near(encoder, "task arithmetic", "Task_Arithmetic") == pytest.approx(1, abs=1e-6)
    assert abs(_near(encoder, True, "True")) < 0.2


def test_sets_and_shifted_lists() -> None:
    encoder = Encoder(binder="hadamard")
    assert _near(encoder, {"tags": ["a", "b"]}, {"tags": ["b", "a"]}) == pytest.approx(1, abs=1e-6)
    assert _near(encoder, {"x": ["a", "b"]}, {"x": ["b", "a"]}) < 0.9
    shifted = [_near(Encoder(binder="hadamard", gamma=g), list("abcd"), list("xabc")) for g in (0.0, 0.3, 1.0)]
    assert shifted == sorted(shifted)


def test_weights_of_paths() -> None:
    light = Encoder(binder="hadamard", weights={"models": 0.1})
    a, b = ({**RECIPE, "models": {"m": name}} for name in ("first", "second"))
    assert _near(light, a, b) > 0.95 > _near(Encoder(binder="hadamard"), a, b)


def test_a_field_is_read_out_of_ten_among_a_thousand(encoder: Encoder) -> None:
    draw = np.random.default_rng(1)
    values = [f"value{draw.integers(1 << 40)}" for _ in range(1000)]
    known = np.stack([encoder.encode(value) for value in values])
    right, strength, others = 0, [], []
    for _ in range(40):
        chosen = draw.choice(1000, 10)
        whole = encoder.encode({f"f{i}": values[c] for i, c in enumerate(chosen)})
        cosines = known @ encoder.probe(whole, "f3")
        right += int(np.argmax(cosines) == chosen[3])
        strength.append(cosines[chosen[3]])
        others.append(np.delete(cosines, chosen))
    assert right == 40
    foretold = noise(10, encoder.dim, 1000)
    assert foretold.reliable
    assert np.mean(strength) == pytest.approx(foretold.signal, rel=0.1)
    assert np.std(np.concatenate(others)) == pytest.approx(foretold.spread, rel=0.15)


def test_nested_probes_and_a_raw_sum() -> None:
    encoder = Encoder(binder="hadamard")
    vector = encoder.encode(RECIPE)
    found = encoder.nearest(encoder.probe(vector, "parameters.density"), [0.1, 0.5, 0.9], "parameters.density")
    assert found[0][1] == 0.5
    raw = encoder.encode({"a": "x"}, raw=True)
    assert np.allclose(encoder.probe(raw, "a"), encoder.encode("x"), atol=1e-5)
    dotted = encoder.encode({"a.b": 1})
    assert encoder.nearest(encoder.probe(dotted, r"a\.b"), [1, 2, 3000])[0][1] == 1


def test_your_own_vectors_of_texts() -> None:
    def text(value: str) -> list[float]:
        return [float(len(value)), 1.0]

    encoder = Encoder(binder="hadamard", text=text)
    assert _near(encoder, "abc", "xyz") == pytest.approx(1, abs=1e-6)
    with pytest.raises(RecipeError, match="more than dim"):
        Encoder(dim=16, binder="hadamard", text=lambda value: [1.0] * 17).encode("a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dim": 8}, r"dim = 8 is outside \[16, 65536\]"),
        ({"dim": 1000, "binder": "hadamard"}, "no power of two"),
        ({"binder": "random"}, "binder = 'random'; known: dense, hadamard"),
        ({"dim": 8192, "binder": "dense"}, "too large for binder dense"),
    ],
)
def test_bad_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Encoder(**options)


def test_bad_values() -> None:
    encoder = Encoder(binder="hadamard", dim=64)
    deep: Any = 1
    for _ in range(66):
        deep = {"a": deep}
    with pytest.raises(RecipeError, match="nested deeper than 64 levels"):
        encoder.encode(deep)
    with pytest.raises(RecipeError, match="x: set is no JSON value"):
        encoder.encode({"x": {1, 2}})
    said: list[str] = []
    long = Encoder(binder="hadamard", dim=64, warn=said.append)
    assert np.isfinite(long.encode({"x": [0] * 5000})).all()
    assert said == ["x has 5000 entries; the first 4096 are encoded"]


# --- indexes ---------------------------------------------------------------------------------------


def test_an_index_comes_back_and_mixes_with_its_like_only(tmp_path: Path) -> None:
    encoder = Encoder(binder="hadamard", dim=256)
    index = Index.of(encoder, {f"r{i}": {**RECIPE, "seed": 10**i} for i in range(5)}, {"r0": [1]})
    again = Index.load(index.save(tmp_path / "index"))
    assert again.names == index.names
    assert again.notes == index.notes
    assert again.vectors.tobytes() == index.vectors.tobytes()
    assert again.query(encoder.encode({**RECIPE, "seed": 100}))[0].name == "r2"
    for other in (Encoder(binder="hadamard", dim=256, seed=1), Encoder(binder="dense", dim=256)):
        with pytest.raises(SourceError, match="unlike schemas cannot be compared"):
            again.joined(Index.of(other, {"x": RECIPE}))
        with pytest.raises(SourceError, match=r"unlike schemas cannot be compared .*--rebuild"):
            again.checked(other)
    with pytest.raises(SourceError, match="r0 is in both"):
        again.joined(index)
    assert len(again.joined(Index.of(encoder, {"x": RECIPE}))) == 6
    data = (tmp_path / "index").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-5])
    with pytest.raises(SourceError):
        Index.load(tmp_path / "cut")
    (tmp_path / "other").write_bytes(data.replace(b'"index"', b'"indeX"'))
    with pytest.raises(SourceError, match="no index of weightsmith find"):
        Index.load(tmp_path / "other")


def test_more_dimensions_find_better() -> None:
    draw = np.random.default_rng(0)
    words = [f"{draw.integers(1 << 40):x}" for _ in range(300)]
    right = []
    for dim in (16, 64, 512):
        encoder = Encoder(binder="hadamard", dim=dim)
        fields = [{f"f{k}": words[(i + 37 * k) % 300] for k in range(6)} for i in range(300)]
        index = Index.of(encoder, {f"r{i}": one for i, one in enumerate(fields)})
        right.append(sum(index.query(encoder.encode({"f2": fields[i]["f2"]}))[0].name == f"r{i}" for i in range(60)))
    assert right[0] < right[1] <= right[2] == 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "recipes"
    (place / "deep").mkdir(parents=True)
    for i, (method, density) in enumerate([("ties", 0.2), ("ties", 0.5), ("dare", 0.5), ("slerp", 0.9)]):
        text = f"models: {{a: x/a{i}, b: x/b}}\nmethod: {{{method}: {{density: {density}}}}}\n"
        (place / ("deep" if i % 2 else ".") / f"r{i}.yaml").write_text(text)
    (place / "config.json").write_text("{}")
    (place / "README.md").write_text("---\ntags:\n- merge\n- ties\nlicense: mit\n---\n# A card\n")
    (place / "weightsmith.json").write_text(json.dumps({"recipe": {"method": "linear", "models": {"q": "y"}}}))
    return place


def test_a_folder_is_searched_by_example(folder: Path, tmp_path: Path) -> None:
    query = tmp_path / "query.yaml"
    query.write_text("method: {ties: {density: 0.21}}\n")
    encoder = Encoder(binder="hadamard")
    found = find(query, folder, encoder, path="method.ties.density", count=3)
    assert [hit.name for hit in found.hits[:2]] == ["r0.yaml", "deep/r1.yaml"]
    assert found.probed["r0.yaml"][0] == 0.2
    assert (found.total, found.read) == (6, 6)
    assert (folder / INDEX).is_file()
    assert find(query, folder, encoder).read == 0
    (folder / "r0.yaml").write_text("method: {ties: {density: 0.9}}\n")
    (folder / "deep" / "r1.yaml").unlink()
    again = find(query, folder, encoder)
    assert (again.total, again.read) == (5, 1)
    query.write_text("license: mit\n")
    assert find(query, folder, encoder).hits[0].name == "README.md"
    query.write_text("method: linear\nmodels: {q: y}\n")
    assert find(query, folder, encoder).hits[0].name == "weightsmith.json"
    with pytest.raises(SourceError, match="unlike schemas"):
        find(query, folder, Encoder(binder="hadamard", seed=1))
    assert find(query, folder, Encoder(binder="hadamard", seed=1), rebuild=True).read == 5


def test_a_field_that_a_hit_lacks_is_not_read_out_of_noise(folder: Path, tmp_path: Path) -> None:
    for i in range(9):
        (folder / f"other{i}.yaml").write_text(f"unlike{i}: {i}\n")
    query = tmp_path / "q.yaml"
    query.write_text("method: {ties: {density: 0.2}}\n")
    found = find(query, folder, Encoder(binder="hadamard"), path="method.ties.density", count=20)
    assert found.probed["r0.yaml"][0] == 0.2
    assert not any(name.startswith("other") for name in found.probed)


def test_numbers_beyond_floats_and_links_to_nowhere_stop_no_search(folder: Path, tmp_path: Path) -> None:
    (folder / "large.json").write_text('{"a": 1e305, "b": 1' + "0" * 400 + ', "c": 1e999}')
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    query = tmp_path / "q.yaml"
    query.write_text("a: 1.0e+306\n")
    found = find(query, folder, Encoder(binder="hadamard"))
    assert found.hits[0].name == "large.json"
    for weight in (math.nan, math.inf):
        with pytest.raises(RecipeError, match="no finite number"):
            Encoder(weights={"a": weight})


def test_what_cannot_be_read_is_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    (folder / "twice.json").write_text('{"a": {"b": 1, "b": 2}}')
    (folder / "deep.json").write_text('{"a":' * 70 + "1" + "}" * 70)
    query = tmp_path / "q.yaml"
    query.write_text("method: ties\n")
    found = find(query, folder, Encoder(binder="hadamard"))
    assert any("'a.b' is there twice" in text for text in found.warnings)
    assert any("nested deeper than 64 levels" in text for text in found.warnings)
    for name in ("twice.json", "deep.json"):
        with pytest.raises(SourceError):
            read_document(folder / name)
    query.write_text("a: 1\na: 2\n")
    with pytest.raises(SourceError, match=r"q\.yaml:2"):
        find(query, folder)
    query.write_text("[]\n")
    with pytest.raises(SourceError, match="a query is a mapping"):
        find(query, folder)
    query.write_text("a: 1\n")
    with pytest.raises(SourceError, match="no such folder"):
        find(query, tmp_path / "nowhere")


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = tmp_path / "query.yaml"
    query.write_text("method: {ties: {density: 0.5}}\n")
    words = ["find", str(query), "--in", str(folder), "--dim", "512"]
    assert main([*words, "--probe", "method.ties.density"]) == 0
    said = capsys.readouterr().out
    assert "deep/r1.yaml" in said.splitlines()[2]
    assert "by chance the best of 6" in said
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["name"] == "deep/r1.yaml"
    assert main([*words, "--seed", "2"]) == 2
    assert "make the index anew with --rebuild" in capsys.readouterr().err
    assert main([*words, "--weight", "models"]) == 2
