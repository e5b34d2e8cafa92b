"""Gram matrices of linear layers' inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observe_models import saved, tiny_gpt2, tiny_llama, tiny_vit, token_rows
from safetensors.torch import load_file
from torch import nn

from weightsmith.core.errors import NumericError, WeightsmithError
from weightsmith.io.read.stats import StatsSource
from weightsmith.observe import gram as gram_module
from weightsmith.observe.collect import observe

torch.set_num_threads(1)


def collected(out: Path, stat: str = "gram") -> tuple[dict[str, torch.Tensor], dict]:
    path = out / f"{stat}.safetensors"
    return load_file(path), StatsSource(path).origin.metadata


def inputs_of(model: nn.Module, layer: str, rows: list[list[int]]) -> torch.Tensor:
    """The rows that enter a layer, one sequence at a time: [n, d_in] float64."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in rows:
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_gram_is_the_mean_outer_product_of_the_inputs(tmp_path: Path) -> None:
    x = torch.randn(20, 6)
    model = Mlp()
    observe(model, list(x), ["gram"], tmp_path, kind="image-classification", batch=7)
    grams, story = collected(tmp_path)
    hidden = torch.tanh(model.up(x)).detach().double()
    torch.testing.assert_close(grams["up.weight"].double(), x.double().T @ x.double() / 20, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grams["down.weight"].double(), hidden.T @ hidden / 20, rtol=1e-6, atol=1e-7)
    assert (story["stat"], story["examples"], story["rows"]) == ("gram", 20, 20)
    assert story["counts"] == {"up.weight": 20, "down.weight": 20}
    assert grams["up.weight"].dtype == torch.float32


def test_streaming_equals_one_shot(tmp_path: Path) -> None:
    x = list(torch.randn(50, 6) * 100)
    results = []
    for batch in (1, 7, 50):
        out = observe(Mlp(), x, ["gram"], tmp_path / str(batch), kind="image-classification", batch=batch)
        results.append(collected(out)[0])
    for other in results[1:]:
        for name, gram in results[0].items():
            torch.testing.assert_close(other[name], gram, rtol=3e-7, atol=1e-7 * float(gram.abs().max()))
            assert torch.equal(gram, gram.T)


def test_llama_shares_qkv_and_gate_up_and_counts_no_padding(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows()
    observe(model, rows, ["gram"], tmp_path, batch=5)
    grams, story = collected(tmp_path)
    for block in ("model.layers.0", "model.layers.1"):
        for name, leader in [("k_proj", "q_proj"), ("v_proj", "q_proj")]:
            alias, stored = f"{block}.self_attn.{name}.weight", f"{block}.self_attn.{leader}.weight"
            assert story["aliases"][alias] == stored
        assert story["aliases"][f"{block}.mlp.up_proj.weight"] == f"{block}.mlp.gate_proj.weight"
    assert len(story["aliases"]) == 6
    assert len(grams) == 2 * 4 + 1
    total = sum(map(len, rows))
    assert story["rows"] == total < 5 * len(rows[0])
    assert set(story["counts"].values()) == {total}
    for name, gram in grams.items():
        x = inputs_of(model, name.removesuffix(".weight"), rows)
        torch.testing.assert_close(gram.double(), x.T @ x / total, rtol=1e-4, atol=1e-6 * float(gram.abs().max()))


def test_unshared_grams_equal_shared_ones(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows()
    shared, story = collected(observe(model, rows, ["gram"], tmp_path / "a"))
    alone, lonely = collected(observe(model, rows, ["gram"], tmp_path / "b", share=False))
    assert lonely["aliases"] == {}
    assert set(alone) == set(shared) | set(story["aliases"])
    for name, gram in alone.items():
        assert torch.equal(gram, shared[story["aliases"].get(name, name)])


def test_skip_first_leaves_out_one_row_per_text(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows()
    observe(model, rows, ["gram"], tmp_path, skip_first=True)
    grams, story = collected(tmp_path)
    assert story["rows"] == sum(map(len, rows)) - len(rows)
    name = "model.layers.1.mlp.gate_proj.weight"
    x = torch.cat([inputs_of(model, name.removesuffix(".weight"), [ids])[1:] for ids in rows])
    torch.testing.assert_close(grams[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


class Rewriting(nn.Module):
    """Two layers get the same memory, but not the same values; two others the same values in unlike memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third, self.fourth = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        a = self.first(x)
        x.mul_(2)
        b = self.second(x)
        c = self.third(a + b)  # an unnamed tensor: its memory is free again for the next one
        return self.fourth(c + a)


def test_only_the_very_same_input_is_shared(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    grams, story = collected(observe(Rewriting(), list(x), ["gram"], tmp_path, kind="image-classification"))
    assert story["aliases"] == {}
    torch.testing.assert_close(grams["second.weight"], 4 * grams["first.weight"])


class Fickle(nn.Module):
    """Two layers that share their input for the first example only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x if x[0, 0] > 0 else x + 1)


def test_sharing_that_ends_is_an_error(tmp_path: Path) -> None:
    x = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])]
    with pytest.raises(WeightsmithError, match="share = False"):
        observe(Fickle(), x, ["gram"], tmp_path, kind="image-classification", batch=1)
    grams, _ = collected(observe(Fickle(), x, ["gram"], tmp_path, kind="image-classification", batch=1, share=False))
    shifted = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    torch.testing.assert_close(grams["b.weight"], shifted.T @ shifted / 2)


def test_conv1d_is_marked_and_a_tied_head_is_skipped(tmp_path: Path) -> None:
    model, rows = tiny_gpt2(), token_rows(longest=10)
    observe(model, rows, ["gram"], tmp_path)
    grams, story = collected(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert name in story["transposed"]
    assert len(story["transposed"]) == 8
    assert story["skipped"] == [{"name": "lm_head.weight", "reason": "tied to transformer.wte.weight"}]
    weight = model.get_parameter(name)
    assert (weight.shape, grams[name].shape) == ((32, 128), (32, 32))
    x = inputs_of(model, name.removesuffix(".weight"), rows)
    torch.testing.assert_close(grams[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6 * float(x.square().mean()))


def test_vit_counts_patches(tmp_path: Path) -> None:
    images = torch.randn(6, 1, 8, 8)
    model = tiny_vit()
    grams, story = collected(observe(model, list(images), ["gram"], tmp_path, batch=4))
    assert (story["kind"], story["rows"]) == ("image-classification", 6)
    patches = {count for name, count in story["counts"].items() if name != "classifier.weight"}
    assert patches == {6 * 5}  # 4 patches and the class token
    assert story["counts"]["classifier.weight"] == 6
    hidden: list[torch.Tensor] = []
    model.vit.layers[0].mlp.fc1.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach().double()))
    with torch.no_grad():
        model(pixel_values=images)
    x = hidden[0].reshape(-1, 16)
    torch.testing.assert_close(grams["vit.layers.0.mlp.fc1.weight"].double(), x.T @ x / 30, rtol=1e-5, atol=1e-6)


def test_checkpoint_names_are_those_of_the_file(tmp_path: Path) -> None:
    """A checkpoint of the bare backbone lacks the prefix that the language model adds."""
    model = tiny_gpt2()
    model.config.architectures = ["GPT2LMHeadModel"]
    saved(model, tmp_path / "model")
    from safetensors.torch import save_file

    backbone = {n: p.detach().clone() for n, p in model.transformer.named_parameters()}
    save_file(backbone, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    grams, story = collected(observe(tmp_path / "model", token_rows(longest=10), ["gram"], tmp_path / "out"))
    assert set(grams) <= set(backbone)
    assert story["skipped"] == [{"name": "lm_head.weight", "reason": "tied to wte.weight"}]


def test_renamed_modules_get_the_names_of_the_file(tmp_path: Path) -> None:
    """transformers calls a ViT's `query` `q_proj`."""
    folder = saved(tiny_vit(), tmp_path / "vit")
    grams, story = collected(observe(folder, list(torch.randn(2, 1, 8, 8)), ["gram"], tmp_path / "out"))
    stored = load_file(folder / "model.safetensors")
    linear = {n for n, t in stored.items() if t.ndim == 2 and n.endswith(".weight")}
    assert set(grams) | set(story["aliases"]) == linear
    assert all(grams[story["aliases"].get(n, n)].shape[0] == stored[n].shape[1] for n in linear)
    assert story["skipped"] == []


def test_ranges_of_blocks_together_are_the_whole(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows()
    whole, _ = collected(observe(model, rows, ["gram"], tmp_path / "all"))
    parts = [collected(observe(model, rows, ["gram"], tmp_path / f"{r}", layers=r))[0] for r in ((0, 1), (1, 2))]
    assert set(parts[0]).isdisjoint(parts[1])
    assert set(parts[1]) == {name for name in whole if ".layers.1." in name}
    for name, gram in (parts[0] | parts[1]).items():
        assert torch.equal(gram, whole[name])
    assert set(parts[0] | parts[1]) == set(whole)


def test_too_little_memory_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "available_memory", lambda device: 100)
    # 2 blocks x (q/k/v, o, gate/up: 32 wide; down: 48 wide) and the head, 8 bytes a value
    with pytest.raises(WeightsmithError, match=r"9 gram matrices need 94\.2 kB of memory, 100 bytes is free.*layers"):
        observe(tiny_llama(), token_rows(), ["gram"], tmp_path)
    # 2 blocks x (qkv, attention output, MLP in: 32 wide; MLP out: 128 wide): of [in, out] the inputs count
    with pytest.raises(WeightsmithError, match=r"8 gram matrices need 311\.3 kB"):
        observe(tiny_gpt2(), token_rows(), ["gram"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_activations_are_refused(tmp_path: Path) -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.bias[0] = float("nan")
    with pytest.raises(NumericError, match=r"down\.weight: NaN or Inf"):
        observe(model, list(torch.randn(3, 6)), ["gram"], tmp_path, kind="image-classification")
    assert not list(tmp_path.iterdir())


def test_a_layer_that_never_runs_is_listed(tmp_path: Path) -> None:
    model = Mlp()
    model.spare = nn.Linear(4, 4)
    _, story = collected(observe(model, list(torch.randn(3, 6)), ["gram"], tmp_path, kind="image-classification"))
    assert story["skipped"] == [{"name": "spare.weight", "reason": "the layer never ran on this data"}]


def test_padding_that_cannot_be_placed_is_an_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids).repeat(1, 2, 1))

    with pytest.raises(WeightsmithError, match="which rows are padding; observe with batch = 1"):
        observe(Odd(), [[1, 2, 3], [4, 5]], ["gram"], tmp_path, kind="causal-lm")
    _, story = collected(observe(Odd(), [[1, 2, 3], [4, 5]], ["gram"], tmp_path, kind="causal-lm", batch=1))
    assert story["counts"] == {"head.weight": 10}
