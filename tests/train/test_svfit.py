"""SVFit: closed forms, artefacts, merges."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import weightsmith as ws
from kit import noise
from weightsmith import lora
from weightsmith.core.errors import PlanError, RecipeError, SourceError
from weightsmith.io.read.open import open_source
from weightsmith.io.read.svfit import decomposed
from weightsmith.train import svfit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.pytorch_utils import Conv1D


class Net(nn.Module):
    """A convolution, a Conv1D, two linear layers; all input dimensions differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, stride=2)
        self.mix = Conv1D(9, 6)
        self.q_proj = nn.Linear(9, 5)
        self.head = nn.Linear(5, 3)
        for i, p in enumerate(self.parameters()):
            p.data = noise(*p.shape, seed=i)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.q_proj(torch.tanh(self.mix(self.conv(x).mean((2, 3)))))))


ALL = ("conv", "mix", "q_proj")
X = noise(4, 2, 8, 8, seed=99)


def tuned(net: Net, steps: int = 5, **options) -> svfit.SVFit:
    found = svfit.wrap(net, target_modules=ALL, **options)
    optimizer = torch.optim.SGD(found.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(X) ** 2).mean().backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("parametrize", ["delta", "value", "log"])
def test_the_model_starts_unchanged_and_trains_r_numbers_a_layer(parametrize):
    net = Net()
    before = net(X)
    found = svfit.wrap(net, 2, target_modules=ALL, parametrize=parametrize, modules_to_save=["head"])
    assert torch.equal(net(X), before)
    assert found.counts == {"conv": 2, "mix": 2, "q_proj": 2}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", *(f"{name}.svfit.train_values" for name in ALL)}
    assert sum(p.numel() for p in found.parameters()) == 6 + 18
    assert {n for n in net.state_dict() if "svfit" in n} == {f"{name}.svfit.train_values" for name in ALL}


def test_the_gradient_is_that_of_the_full_weight_along_the_vectors():
    """d / d sigma_i = u_i^T G v_i, with G the gradient of the layer's weight."""
    full, net = Net(), Net()
    (full(X) ** 2).sum().backward()
    found = svfit.wrap(net, 2, target_modules=ALL)
    (net(X) ** 2).sum().backward()
    for name, own in found.modules.items():
        gradient = full.get_submodule(name).weight.grad
        gradient = gradient.T if name == "mix" else gradient.flatten(1)
        want = torch.einsum("or,oi,ri->r", own.u, gradient, own.v.flatten(1))
        assert torch.allclose(own.train_values.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parametrize", ["delta", "value", "log"])
def test_merging_gives_what_runs_and_unmerging_gives_the_same_bits(parametrize):
    net = Net()
    weights = {name: net.get_submodule(name).weight.detach().clone() for name in ALL}
    found = tuned(net, r=3, parametrize=parametrize)
    running = net(X)
    assert not torch.allclose(running, Net()(X), atol=1e-3)
    found.merge()
    assert torch.allclose(net(X), running, atol=1e-5)
    assert not torch.equal(net.q_proj.weight, weights["q_proj"])
    found.unmerge()
    assert all(torch.equal(net.get_submodule(name).weight, weights[name]) for name in ALL)
    assert torch.equal(net(X), running)


def test_parametrisations_are_the_same_values():
    change = torch.tensor([-0.5, 0.25])
    for parametrize in ("delta", "value", "log"):
        own = svfit.SingularValues(noise(5, 4), 2, parametrize=parametrize)
        own.set_change(change)
        assert torch.allclose(own.change, change, atol=1e-6)
    with pytest.raises(PlanError, match="log holds no singular values of 0 or less"):
        own.set_change(-own.s)


def test_without_its_singular_values_the_weight_is_zero():
    weight = noise(5, 7)
    own = svfit.SingularValues(weight)
    own.set_change(-own.s)
    assert torch.allclose(weight + own.delta, torch.zeros(5, 7), atol=1e-6)


def test_energy_takes_the_fewest_leading_values():
    u, _, v = decomposed(noise(6, 8))
    weight = ((u * torch.tensor([4.0, 3, 2, 1, 0, 0])) @ v).float()  # shares 0.4, 0.7, 0.9, 1; of squares 0.53, 0.83
    ranks = {e: svfit.SingularValues(weight, energy=e).s.numel() for e in (0.4, 0.41, 0.7, 0.9, 0.95, 1.0)}
    assert ranks == {0.4: 1, 0.41: 2, 0.7: 2, 0.9: 3, 0.95: 4, 1.0: 4}
    assert svfit.SingularValues(weight, energy=0.8, squares=True).s.numel() == 2
    assert torch.allclose(svfit.SingularValues(weight, 3).s, torch.tensor([4.0, 3, 2]), atol=1e-6)


def test_copies_run_their_own_values():
    net = Net()
    found = tuned(net, r=2)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), net(X))
    found.modules["q_proj"].set_change(torch.tensor([9.0, 9.0]))
    assert not torch.equal(twin(X), net(X))


@pytest.mark.parametrize("bases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_values_run_again_and_merge_exactly(tmp_path: Path, bases: bool, dtype: torch.dtype):
    net, x = Net().to(dtype), X.to(dtype)
    base = {name: t.clone() for name, t in net.state_dict().items()}
    found = svfit.wrap(net, 3, target_modules=ALL, modules_to_save=["head"])
    for own in found.modules.values():
        own.set_change(0.3 * noise(3))
    net.head.bias.data.add_(1)
    running = net(x)
    found.save(tmp_path / "values", bases=bases)
    sizes = [key.numel for name, key in open_source(tmp_path / "values/adapter_model.safetensors").keys.items()]
    assert sum(sizes) == 18 + 2 * 9 + bases * 3 * (6 + 18 + 6 + 9 + 5 + 9)
    again = Net().to(dtype)
    svfit.load(again, tmp_path / "values")
    assert torch.equal(again(x), running)
    found.merge()
    merged = ws.merge({"values": tmp_path / "values"}, "average", base=base)
    for name, tensor in merged.items():
        want = net.state_dict()[name]
        assert tensor.dtype == want.dtype
        assert torch.allclose(tensor, want, rtol=0, atol=1e-6 if dtype == torch.float32 else 0), name


def test_values_that_ran_in_float32_merge_into_stored_bfloat16(tmp_path: Path):
    """A trainer widens the stored weights; the vectors must not be rounded to the stored dtype again."""
    stored = {name: t.bfloat16() for name, t in Net().state_dict().items()}
    net = Net()
    net.load_state_dict({name: t.float() for name, t in stored.items()})
    found = svfit.wrap(net, 3, target_modules=["q_proj"])
    found.modules["q_proj"].set_change(5 * noise(3))
    found.save(tmp_path / "values", bases=False)
    merged = ws.merge({"values": tmp_path / "values"}, "average", base=stored, dtype="float32")
    assert torch.allclose(merged["q_proj.weight"], found.merge().q_proj.weight, rtol=0, atol=1e-5)


def test_values_are_task_vectors(tmp_path: Path):
    """Two of them under task arithmetic: the sum of their changes; and lora merge takes them with their vectors."""
    base = Net().state_dict()
    for i in range(2):
        found = svfit.wrap(Net(), 3, target_modules=["q_proj", "mix"])
        for own in found.modules.values():
            own.set_change(noise(3, seed=i))
        found.save(tmp_path / f"v{i}", bases=i == 0)
    experts = {"a": tmp_path / "v0", "b": tmp_path / "v1"}
    merged = ws.merge(experts, ws.TaskArithmetic(), base=base)
    own.set_change(noise(3, seed=0) + noise(3, seed=1))
    assert torch.allclose(merged["q_proj.weight"], base["q_proj.weight"] + found.modules["q_proj"].delta, atol=1e-5)
    assert torch.equal(merged["conv.weight"], base["conv.weight"])
    lora.merge({"a": tmp_path / "v0"}, "cat", tmp_path / "as-lora")
    as_lora = ws.merge({"a": tmp_path / "as-lora"}, "average", base=base)
    direct = ws.merge({"a": tmp_path / "v0"}, "average", base=base)
    assert torch.allclose(as_lora["q_proj.weight"], direct["q_proj.weight"], atol=1e-5)
    with pytest.raises(SourceError, match=r"singular values without their vectors; save it with bases=True"):
        lora.merge({"a": tmp_path / "v1"}, "cat", tmp_path / "never")


def test_another_base_is_refused(tmp_path: Path):
    net = Net()
    svfit.wrap(net, 2, target_modules=ALL).save(tmp_path / "values", bases=False)
    other = Net()
    other.q_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(SourceError, match=r"q_proj\.weight of this model is not the weight that these singular values"):
        svfit.load(other, tmp_path / "values")
    with pytest.raises(SourceError, match=r"'q_proj\.weight' of .* is not the weight that these singular values were"):
        ws.merge({"values": tmp_path / "values"}, "average", base=other.state_dict())
    rounded = {name: t.bfloat16() for name, t in Net().state_dict().items()}
    with pytest.raises(SourceError, match="or rounded to another dtype"):
        ws.merge({"values": tmp_path / "values"}, "average", base=rounded)
    with pytest.raises(SourceError, match=r"trains 'conv', which this model lacks"):
        svfit.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "values")


def broken(what: str) -> Net:
    net = Net()
    if what == "zero":
        net.q_proj.weight.data.zero_()
    if what == "nan":
        net.q_proj.weight.data[0, 0] = torch.nan
    if what == "tied":
        net.twin = nn.Linear(9, 5)
        net.twin.weight = net.q_proj.weight
    if what == "whole numbers":
        net.q_proj.weight = nn.Parameter(torch.ones(5, 9, dtype=torch.int8), requires_grad=False)
    if what == "groups":
        net.q_proj = nn.Conv2d(4, 4, 3, groups=2)
    return net


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("zero", r"^q_proj\.weight is zero everywhere or holds NaN or Inf"),
        ("nan", r"^q_proj\.weight is zero everywhere or holds NaN or Inf"),
        ("tied", r"^q_proj\.weight and twin\.weight are one tensor"),
        ("whole numbers", r"^q_proj\.weight is torch\.int8; give the model in a floating dtype"),
        ("groups", r"^q_proj is a grouped convolution"),
    ],
)
def test_layers_that_cannot_train_so_are_named(what: str, text: str):
    net = broken(what)
    with pytest.raises(PlanError, match=text):
        svfit.wrap(net, 2)
    assert not hasattr(net.q_proj, "svfit")


def test_wrong_values_are_refused():
    for options, text in [
        ({"r": 0}, r"r must be in 1 \.\. 5 for a weight \[5, 9\], got 0"),
        ({"r": 6}, r"r must be in 1 \.\. 5 for a weight \[5, 9\], got 6"),
        ({"target_modules": ["k_proj"]}, "target_modules k_proj match no Linear .* it has conv, mix, q_proj, head"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: no module 'haed'; did you mean 'head'"),
    ]:
        with pytest.raises(PlanError, match=text):
            svfit.wrap(Net(), **options)
    for options, text in [
        ({"r": 2, "energy": 0.5}, "give r or energy, not both"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1\.5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"parametrize": "exp"}, "parametrize must be delta, value or log, got 'exp'"),
    ]:
        with pytest.raises(RecipeError, match=text):
            svfit.wrap(Net(), **options)
    twice = Net()
    svfit.wrap(twice, 2)
    with pytest.raises(PlanError, match="q_proj has trained singular values already"):
        svfit.wrap(twice, 2)
    with pytest.raises(PlanError, match=r"out_proj never runs by itself"):
        svfit.wrap(nn.MultiheadAttention(4, 2), target_modules=["out_proj"])


def test_16_bit_values_are_refused_in_training():
    net = Net()
    svfit.wrap(net, 2)
    net.to(torch.bfloat16)
    with pytest.raises(PlanError, match=r"singular values in torch\.bfloat16 do not move"):
        net(X.bfloat16())


def test_damaged_folders_are_refused(tmp_path: Path):
    svfit.wrap(Net(), 2).save(tmp_path / "values")
    path = tmp_path / "values/adapter_config.json"
    config = json.loads(path.read_text())
    config["base_weights"]["q_proj"]["shape"] = [5, 8]
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"svfit_v' is float32 \[2, 9\], expected \[2, 8\] for a weight of \[5, 8\]"):
        svfit.load(Net(), tmp_path / "values")
    del config["base_weights"]
    path.write_text(json.dumps(config))
    with pytest.raises(SourceError, match="lacks shape, dtype and hash of 'q_proj'"):
        ws.merge({"values": tmp_path / "values"}, "average", base=Net().state_dict())
