"""The diagonal Fisher information."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observe_models import saved, tiny_llama, tiny_mixtral, tiny_vit, token_rows
from safetensors.torch import load_file
from torch import nn

from weightsmith.core.errors import NumericError, WeightsmithError
from weightsmith.io.read.stats import StatsSource
from weightsmith.observe.collect import observe

torch.set_num_threads(1)


def fisher_of(model: nn.Module, data: list, out: Path, **options: object) -> tuple[dict[str, torch.Tensor], dict]:
    observe(model, data, ["fisher"], out, overwrite=True, **options)  # type: ignore[arg-type]
    path = out / "fisher.safetensors"
    return load_file(path), StatsSource(path).origin.metadata


class Logistic(nn.Module):
    """Two classes with logits (0, w.x + b)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.line = nn.Linear(features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logit = self.line(x)
        return torch.cat([torch.zeros_like(logit), logit], dim=-1)


@pytest.fixture
def logistic() -> tuple[Logistic, torch.Tensor]:
    torch.manual_seed(0)
    return Logistic(5), torch.randn(40, 5)


def test_logistic_regression_has_the_closed_form(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    found, story = fisher_of(model, list(x), tmp_path, kind="image-classification")
    p = torch.sigmoid(model.line(x)).detach()
    torch.testing.assert_close(found["line.weight"], (p * (1 - p) * x**2).mean(0, keepdim=True), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found["line.bias"], (p * (1 - p)).mean(0), rtol=1e-5, atol=1e-8)
    assert (story["fisher"], story["examples"], story["rows"]) == ("exact", 40, 40)


def test_dropout_is_off_and_gradients_start_anew(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    dropping = nn.Sequential(nn.Dropout(0.5), model).train()
    model.line.weight.grad = torch.full_like(model.line.weight, 1e3)  # of a training step before
    found, _ = fisher_of(dropping, list(x), tmp_path, kind="image-classification")
    p = torch.sigmoid(model.line(x)).detach()
    want = (p * (1 - p) * x**2).mean(0, keepdim=True)
    torch.testing.assert_close(found["1.line.weight"], want, rtol=1e-5, atol=1e-8)
    assert dropping.training


def test_squares_are_taken_per_example(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    found, _ = fisher_of(model, list(x), tmp_path, kind="image-classification", batch=8)
    p = torch.softmax(model(x), -1)
    batched = (p.detach().sqrt() * p.log()).sum()  # one backward per batch, squared afterwards: cross terms
    (gradient,) = torch.autograd.grad(batched, [model.line.weight])
    assert not torch.allclose(found["line.weight"], gradient**2 / len(x), rtol=0.2)


def test_sampling_tends_to_the_exact_value(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    exact, _ = fisher_of(model, list(x), tmp_path, kind="image-classification")
    many = [row for row in x for _ in range(50)]
    sampled, story = fisher_of(model, many, tmp_path, kind="image-classification", fisher="sampled", examples=2000)
    assert story["fisher"] == "sampled"
    torch.testing.assert_close(sampled["line.weight"], exact["line.weight"], rtol=0.15, atol=0)


def test_empirical_uses_the_labels(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    y = torch.arange(40) % 2
    found, _ = fisher_of(model, list(zip(x, y, strict=True)), tmp_path, kind="image-classification", fisher="empirical")
    residual = y[:, None] - torch.sigmoid(model.line(x)).detach()
    torch.testing.assert_close(found["line.weight"], (residual * x).square().mean(0, keepdim=True))
    with pytest.raises(WeightsmithError, match="example 0 has no label; fisher = 'empirical' needs labels"):
        fisher_of(model, list(x), tmp_path, kind="image-classification", fisher="empirical")
    with pytest.raises(WeightsmithError, match="example 0 has label 7, the model has 2 classes"):
        fisher_of(model, [(x[0], 7)], tmp_path, kind="image-classification", fisher="empirical")


def test_llama_covers_every_parameter_once(tmp_path: Path) -> None:
    model, rows = tiny_llama(tied=True), token_rows()
    for p in model.parameters():
        p.requires_grad_(False)  # frozen parameters have a Fisher too
    model.train()
    found, story = fisher_of(model, rows, tmp_path)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(f.shape) for name, f in found.items()} == expected
    assert story["skipped"] == [{"name": "lm_head.weight", "reason": "tied to model.embed_tokens.weight"}]
    assert (story["fisher"], story["rows"]) == ("sampled", sum(map(len, rows)))
    assert all((f >= 0).all() and f.any() for f in found.values())
    assert model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_empirical_language_model_is_the_squared_gradient_of_each_text(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows(3)
    found, _ = fisher_of(model, rows, tmp_path, fisher="empirical")
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    squares = []
    for ids in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        squares.append(torch.autograd.grad(loss, [weight])[0] ** 2)
    expected = torch.stack(squares).mean(0)
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj.weight"], expected, rtol=1e-4, atol=1e-9)


def test_sampling_depends_on_seed_and_example_only(tmp_path: Path) -> None:
    model, rows = tiny_llama(), token_rows(4)
    name = "model.layers.1.self_attn.q_proj.weight"
    first = fisher_of(model, rows, tmp_path, seed=3)[0][name]
    assert torch.equal(first, fisher_of(model, rows, tmp_path, seed=3)[0][name])
    assert torch.equal(first, fisher_of(model, rows, tmp_path, seed=3, layers=(1, 2))[0][name])
    assert not torch.equal(first, fisher_of(model, rows, tmp_path, seed=4)[0][name])


def test_vit_from_a_folder_with_arrays(tmp_path: Path) -> None:
    import numpy as np

    folder = saved(tiny_vit(), tmp_path / "vit")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.integers(0, 256, (9, 8, 8), dtype=np.uint8), y=np.arange(9) % 3)
    out = observe(folder, tmp_path / "d.npz", ["fisher"], tmp_path / "out", examples=4)
    found, story = load_file(out / "fisher.safetensors"), StatsSource(out / "fisher.safetensors").origin.metadata
    assert (story["kind"], story["fisher"], story["examples"]) == ("image-classification", "exact", 4)
    stored = load_file(folder / "model.safetensors")  # whose names are not those of the module's parameters
    assert {name: f.shape for name, f in found.items()} == {name: t.shape for name, t in stored.items()}
    assert story["skipped"] == []


def test_experts_stacked_in_the_module_are_cut_as_in_the_file(tmp_path: Path) -> None:
    model, rows = tiny_mixtral(), token_rows(3)
    folder = saved(model, tmp_path / "moe")
    out = observe(folder, rows, ["fisher"], tmp_path / "out", fisher="empirical")
    found = load_file(out / "fisher.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert {name: f.shape for name, f in found.items()} == {name: t.shape for name, t in stored.items()}
    inside, _ = fisher_of(model, rows, tmp_path / "module", fisher="empirical")  # under the module's own names
    stacked = inside["model.layers.0.mlp.experts.down_proj"]
    expert = next(name for name in found if "experts.1.w2" in name)
    torch.testing.assert_close(found[expert], stacked[1], rtol=1e-3, atol=1e-10)
    assert found[expert].any()


def test_many_classes_are_sampled_and_exact_is_refused_for_text(tmp_path: Path) -> None:
    images = list(torch.randn(2, 1, 8, 8))
    assert fisher_of(tiny_vit(classes=11), images, tmp_path)[1]["fisher"] == "sampled"
    with pytest.raises(WeightsmithError, match="would take 256 backward passes per position of a causal-lm"):
        fisher_of(tiny_llama(), token_rows(), tmp_path, fisher="exact")


def test_nan_output_is_refused(logistic: tuple[Logistic, torch.Tensor], tmp_path: Path) -> None:
    model, x = logistic
    x[3, 0] = float("nan")
    with pytest.raises(NumericError, match="NaN or Inf in the output for example 3"):
        fisher_of(model, list(x), tmp_path, kind="image-classification")
