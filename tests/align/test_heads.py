"""Channels between heads: exact identities, planted ones found, and edits that change what they say and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kit import noise
from weightsmith.align.composition import Kind, baseline, components, composition, reads
from weightsmith.align.edit import Scale, edit, parse_scales, scaled, steering
from weightsmith.align.heads import Heads, Rotation, centred, heads_of, places, rotation
from weightsmith.align.parts import Model
from weightsmith.cli.main import main
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.io.read.open import open_source

N, H, D = 3, 5, 24


def random_heads(seed: int) -> Heads:
    return Heads(seed, *(noise(N, H, D, seed=10 * seed + i, dtype=torch.float64) for i in range(4)))


def whole(heads: Heads, kind: Kind) -> Tensor:
    """M of every head by brute force: [heads, width, width]."""
    qk = heads.q.mT @ heads.k
    return {"q": qk, "k": qk.mT, "v": heads.v.mT @ heads.o}[kind]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "gpt_neox", "phi3", "qwen3", "bert", "olmo2"):
        saved(family, home / family)
    return home


def test_components_rebuild_ov() -> None:
    heads = random_heads(1)
    u, s, v = components(heads)
    ov = heads.v.mT @ heads.o
    assert torch.allclose(u * s[:, None] @ v, ov, atol=1e-9)
    assert torch.allclose(u.mT @ u, torch.eye(H, dtype=u.dtype).expand(N, -1, -1), atol=1e-9)
    assert torch.allclose(s, torch.linalg.svdvals(ov)[:, :H], atol=1e-9)


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_norms_are_those_of_whole_matrices(kind: Kind) -> None:
    early, late = random_heads(1), random_heads(2)
    _, s, v = components(early)
    left, gram = reads(late, kind)
    m = whole(late, kind)
    for head in range(N):
        read = v @ left[head]
        squares = ((read @ gram[head]) * read).sum(-1)
        assert torch.allclose(squares, (v @ m[head]).square().sum(-1), atol=1e-8)
        product = (early.v.mT @ early.o) @ m[head]
        assert torch.allclose((s.square() * squares).sum(1), product.square().sum((1, 2)), atol=1e-6)


def test_rotations_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = noise(1, 1, 1, 8, dtype=torch.float64), noise(1, 1, 1, 8, seed=1, dtype=torch.float64)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = (f(torch.cat([angles, angles], -1))[None] for f in (torch.cos, torch.sin))
    turned_q = apply_rotary_pos_emb(q, q, cos[:, 7:8], sin[:, 7:8])[0]
    turned_k = apply_rotary_pos_emb(k, k, cos[:, 4:5], sin[:, 4:5])[0]
    expected = (turned_q * turned_k).sum()
    assert torch.allclose((q @ Rotation(8, 100.0).matrix(8, 3) @ k.mT).sum(), expected)
    assert torch.equal(Rotation(4, 100.0).matrix(8, 3)[4:, 4:], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_heads_are_those_of_the_running_model(family: str, models: Path) -> None:
    """An attention over one token copies its value: what it writes is x W_V W_O, and biases."""
    from transformers import AutoModelForCausalLM

    model = Model(open_source(models / family))
    place = places(model)[1]
    heads = heads_of(model, place, fold=False)
    net = AutoModelForCausalLM.from_pretrained(models / family, local_files_only=True, dtype=torch.float64).eval()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], out[0]))

    net.get_submodule(place.module).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for token in (3, 7):
            net(torch.tensor([[token]]))
    (x, y), (x2, y2) = seen
    ov = (heads.v.mT @ heads.o).sum(0)
    assert torch.allclose((x - x2).double() @ ov, (y - y2).double(), atol=1e-5)
    assert centred(model) == (family in ("gpt2", "gpt_neox"))
    assert (rotation(model, place.shape.query) is None) == (family == "gpt2")


def test_folding_is_what_the_norm_does(models: Path) -> None:
    model = Model(open_source(models / "gpt2"))
    place = places(model)[1]
    assert place.norm == "transformer.h.1.ln_1.weight"
    plain, folded = (heads_of(model, place, fold) for fold in (False, True))
    gain = model.source.read(place.norm).double()
    assert torch.allclose(folded.q, plain.q * gain)
    assert torch.allclose(folded.o.mean(-1), torch.zeros(1, dtype=torch.float64), atol=1e-12)
    with pytest.raises(SourceError, match="no norm stands before it"):
        composition(open_source(models / "olmo2"), "v")
    assert composition(open_source(models / "olmo2"), "v", fold=False).channels
    with pytest.raises(SourceError, match="norms of queries and keys stand between their matrices"):
        composition(open_source(models / "qwen3"))


def test_random_heads_score_what_chance_gives(models: Path) -> None:
    directions = torch.nn.functional.normalize(noise(2000, D, dtype=torch.float64), dim=1)
    left, gram = reads(random_heads(2), "q")
    read = directions @ left[0]
    size = whole(random_heads(2), "q")[0].norm()
    squares = ((read @ gram[0]) * read).sum(-1) / size**2
    assert float(squares.mean().sqrt()) == pytest.approx(baseline(D, False), rel=0.05)


def planted(models: Path, folder: Path, family: str = "llama") -> tuple[Path, Tensor]:
    """A model whose head 0.1 writes strongly along the one direction in which head 1.2 reads its queries."""
    folder.mkdir()
    for file in (models / family).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    way = torch.nn.functional.normalize(noise(40), dim=0)
    name = "model.layers.{}.self_attn.{}_proj.weight"
    state[name.format(0, "o")][:, 10] = 30 * way  # head 1, entry 0
    gain = state["model.layers.1.input_layernorm.weight"]
    state[name.format(1, "q")][20] = 30 * way / gain  # head 2, entry 0
    state["model.layers.1.input_layernorm.weight"] = gain
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder, way


def test_a_planted_channel_is_the_first_found(models: Path, tmp_path: Path) -> None:
    folder, _ = planted(models, tmp_path / "planted")
    found = composition(open_source(folder))
    first = found.channels[0]
    assert (first.layer, first.head, first.component, first.to_layer, first.to_head) == (0, 1, 0, 1, 2)
    assert first.score + found.baseline > 0.95
    assert first.z > 2
    assert found.names == tuple(f"{layer}.{head}" for layer in (0, 1) for head in range(4))
    assert bool(torch.isnan(found.matrix[4:]).all())
    assert bool(torch.isfinite(found.matrix[:4, 4:]).all())
    chosen = composition(open_source(folder), targets=[(1, 2)])
    assert chosen.channels[0] == replace(first, z=chosen.channels[0].z)
    assert bool(torch.isnan(chosen.matrix[:4, 5]).all())
    with pytest.raises(RecipeError, match=r"no head 2\.0; the last one is 1\.3"):
        composition(open_source(folder), targets=[(2, 0)])
    far = composition(open_source(folder), distances=(0, 5, 20))
    assert far.channels[0].score != first.score
    plain = composition(open_source(folder), subtract=False)
    assert plain.baseline == 0
    assert plain.channels[0].score == pytest.approx(first.score + found.baseline)


def test_another_basis_inside_a_head_changes_no_score(models: Path, tmp_path: Path) -> None:
    state = load_file(models / "gpt2" / "model.safetensors")
    change = noise(10, 10) + 3 * torch.eye(10)
    for i in range(2):
        v = slice(80, 90)  # values of head 0, in columns of c_attn
        state[f"transformer.h.{i}.attn.c_attn.weight"][:, v] @= change
        state[f"transformer.h.{i}.attn.c_proj.weight"][:10] = torch.linalg.solve(
            change, state[f"transformer.h.{i}.attn.c_proj.weight"][:10]
        )
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "config.json").write_bytes((models / "gpt2" / "config.json").read_bytes())
    save_file(state, tmp_path / "changed" / "model.safetensors")
    for kind in ("q", "k", "v"):
        a, b = (composition(open_source(p), kind) for p in (models / "gpt2", tmp_path / "changed"))  # type: ignore[arg-type]
        assert torch.allclose(a.matrix, b.matrix, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edit_scales_one_component_and_nothing_else(family: str, models: Path, tmp_path: Path) -> None:
    source = open_source(models / family)
    before = load_file(models / family / "model.safetensors")
    same = scaled(source, [Scale(1, 2, 3, 1.0)])
    assert all(torch.equal(same.read(name), before[name]) for name in source.keys)
    edit(models / family, tmp_path / "out", [Scale(1, 2, 3, 0.0), Scale(1, 0, 1, 2.0)])
    after = load_file(tmp_path / "out" / "model.safetensors")
    output = places(Model(source))[1].weights["o"].key.name
    assert [n for n in before if not torch.equal(before[n], after[n])] == [output]
    old, new = (heads_of(m, places(m)[1]) for m in (Model(source), Model(open_source(tmp_path / "out"))))
    u, s, v = components(old)
    for head in range(4):
        core = u[head].T @ (new.v[head].T @ new.o[head]) @ v[head].T
        expected = s[head].clone()
        expected[3] *= 0.0 if head == 2 else 1.0
        expected[1] *= 2.0 if head == 0 else 1.0
        assert torch.allclose(core, torch.diag(expected), atol=1e-4)


def test_scales_are_read_and_refused(models: Path) -> None:
    assert parse_scales(["7.9.0=0", "1.2.3=-0.5"]) == [Scale(7, 9, 0, 0.0), Scale(1, 2, 3, -0.5)]
    for word in ("7.9=0", "7.9.0", "a.b.c=1"):
        with pytest.raises(RecipeError, match=r"is no scale; write LAYER\.HEAD\.COMPONENT=FACTOR"):
            parse_scales([word])
    source = open_source(models / "llama")
    for scales, said in (
        ([Scale(2, 0, 0, 0.0)], r"2\.0\.0: there is no such head"),
        ([Scale(1, 4, 0, 0.0)], r"1\.4\.0: there is no such head"),
        ([Scale(1, 0, 10, 0.0)], r"1\.0\.10: a head has 10 components, numbered from 0"),
        ([Scale(1, 0, 1, 0.0)] * 2, r"1\.0\.1 is scaled twice"),
    ):
        with pytest.raises(RecipeError, match=said):
            scaled(source, scales)


def test_steering_sets_coordinates_in_a_subspace() -> None:
    layer, ways = nn.Linear(6, 6).double(), noise(2, 6, dtype=torch.float64)
    x = noise(3, 6, dtype=torch.float64)
    plain = layer(x).detach()
    hook = layer.register_forward_hook(steering(ways, torch.tensor([2.0, -1.0])))
    basis = torch.linalg.qr(ways.T).Q
    found = layer(x).detach()
    hook.remove()
    assert torch.allclose(found @ basis, torch.tensor([2.0, -1.0], dtype=torch.float64).expand(3, 2))
    rest = torch.eye(6, dtype=torch.float64) - basis @ basis.T
    assert torch.allclose(found @ rest, plain @ rest)
    hook = layer.register_forward_hook(steering(ways, scale=1.0))
    assert torch.allclose(layer(x).detach(), plain)
    hook.remove()


def test_the_verbs(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = planted(models, tmp_path / "planted")
    assert main(["heads", str(folder), "--top", "3", "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "  0.1.0" in said.splitlines()[2]
    assert "Largest channels" in (tmp_path / "page.html").read_text()
    assert main(["heads", str(folder), "--target", "1.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["channels"][0]["component"] == 0
    assert main(["heads", str(folder), "--target", "12"]) == 2
    assert "'12' is no head; write LAYER.HEAD" in capsys.readouterr().err
    assert main(["edit", str(folder), str(tmp_path / "out"), "--scale", "0.1.0=0", "--quiet"]) == 0
    assert main(["heads", str(tmp_path / "out"), "--target", "1.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["channels"][0]["score"] < 0.8  # it was above 0.95


def test_models_without_heads(models: Path) -> None:
    from weightsmith.io.read.source import MemorySource

    with pytest.raises(SourceError, match="no attention with queries, keys, values and an output was found"):
        places(Model(MemorySource({"w": torch.ones(2, 2)})))
