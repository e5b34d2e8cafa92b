"""Second moments out of what trainers save."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from observe_models import saved, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from kit import noise
from weightsmith.cli.main import main
from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.io.read.stats import open_stats
from weightsmith.observe.moments import second_moment

STEPS = 3


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Three steps of made-up gradients; the moments by parameter, as Adam defines them."""
    moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(STEPS):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = noise(*p.shape, seed=100 * step + i)
            moments[name] = 0.999 * moments[name] + 0.001 * p.grad.square()
        optimizer.step()
    return {name: (value / (1 - 0.999**STEPS)).detach() for name, value in moments.items()}


def grouped(model: nn.Module) -> list[dict]:
    """As transformers' Trainer does: matrices decay, norms and biases do not."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": wide, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1]}]


@pytest.mark.parametrize("form", ["one group", "groups", "names", "wrapped", "safetensors"])
def test_moments_come_under_the_checkpoints_names(form: str, tmp_path: Path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    given = {"groups": grouped(model), "names": list(model.named_parameters())[::-1]}.get(form)
    optimizer = torch.optim.AdamW(list(model.parameters()) if given is None else given)
    wanted = trained(model, optimizer)
    file = tmp_path / "optimizer.pt"
    state = optimizer.state_dict()
    if form == "wrapped":
        names = [name for name, _ in model.named_parameters()]
        state = {"state": {f"module.{names[n]}": entry for n, entry in state["state"].items()}, "param_groups": []}
    if form == "safetensors":
        file = tmp_path / "moments.safetensors"
        save_file({f"{name}.exp_avg_sq": value for name, value in wanted.items()}, file)
    else:
        torch.save({"optimizer": state} if form == "groups" else state, file)
    second_moment(folder, file, tmp_path / "stats")
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    assert set(found) == set(wanted)
    if form == "wrapped":  # no groups, no beta2: as they were saved
        wanted = {name: value * (1 - 0.999**STEPS) for name, value in wanted.items()}
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=0), name


def test_transformers_own_trainer(tmp_path: Path) -> None:
    """Tied weights, biases and layer norms, in its two groups; against the gradients that it had."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *told, **named):
            for name, p in model.named_parameters():
                moments[name] = 0.999 * moments[name] + 0.001 * p.grad.square()

    rows = [{"input_ids": row, "labels": row} for row in torch.arange(64).reshape(8, 8) % 32]
    told = TrainingArguments(
        str(tmp_path), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=2, weight_decay=0.1,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, told, train_dataset=rows, callbacks=[Watch()]).train()
    made = tmp_path / f"checkpoint-{STEPS}"
    assert [len(g["params"]) for g in torch.load(made / "optimizer.pt")["param_groups"]] == [10, 18]
    second_moment(made, made, tmp_path / "stats")  # its folder is both
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    assert set(found) == set(moments)
    for name, value in moments.items():
        assert torch.allclose(found[name], value / (1 - 0.999**STEPS), rtol=1e-4, atol=1e-14), name


def test_groups_of_older_transformers(tmp_path: Path) -> None:
    """They knew a norm by its class, and this one's not: all decay, and a group is empty."""
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}, {"params": [], "weight_decay": 0.0}])
    wanted = trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second_moment(folder, tmp_path / "optimizer.pt", tmp_path / "stats")
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=0) for name, value in wanted.items())


def test_adafactors_rows_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its decay is 1 - step^-0.8, so that moments have no bias; matrices are products of row and column means."""
    from transformers.optimization import Adafactor

    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    trained(model, optimizer)
    wanted = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        v = torch.zeros(p.shape, dtype=torch.float64)
        for step in range(STEPS):
            v += (noise(*p.shape, seed=100 * step + i).double().square() - v) * (step + 1) ** -0.8
        wanted[name] = torch.outer(v.mean(1), v.mean(0)) / v.mean() if p.ndim == 2 else v
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    words = ["observe", str(folder), "--optimizer", str(tmp_path / "optimizer.pt"), "-o", str(tmp_path / "stats")]
    assert main(words) == 0
    assert "moments are as they were saved" not in capsys.readouterr().out
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-12), name


def test_numbers_without_names_are_refused(tmp_path: Path):
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1])
    trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(SourceError, match=r"states are numbered, and neither the order of .* nor transformers' groups"):
        second_moment(folder, tmp_path / "optimizer.pt", tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": torch.ones(2)}, "not an optimizer's state; expected the entries 'state' and 'param_groups'"),
        ({"state": {"x": {"momentum_buffer": torch.ones(2)}}}, "no parameter has 'exp_avg_sq'; only Adam"),
        ({"state": {"lm_head.weight": {"exp_avg_sq": -torch.ones(2)}}}, "second moment of lm_head.weight is negative"),
        (
            {"state": {"lm_head.weight": {"exp_avg_sq": torch.full((4,), 1e-9, dtype=torch.float16)}}},
            "100% of the float16 second moments of lm_head.weight are 0; save them as bfloat16 or float32",
        ),
        ({"state": {"other.weight": {"exp_avg_sq": torch.ones(2)}}}, "none of its 1 moments belongs to"),
    ],
)
def test_what_cannot_be_used_is_named(state: dict, text: str, tmp_path: Path):
    folder = saved(tiny_llama(), tmp_path / "model")
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(SourceError, match=text):
        second_moment(folder, tmp_path / "optimizer.pt", tmp_path / "stats")
    moments = state.get("state", {}).get("lm_head.weight")
    if moments is not None:
        save_file({f"lm_head.weight.{name}": value for name, value in moments.items()}, tmp_path / "m.safetensors")
        with pytest.raises(SourceError, match=text):
            second_moment(folder, tmp_path / "m.safetensors", tmp_path / "stats")


@pytest.mark.parametrize("rank", [1, 3])
def test_moments_kept_as_products(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = torch.optim.AdamW(model.named_parameters())
    wanted = trained(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    words = ["observe", str(folder), "--optimizer", str(tmp_path / "optimizer.pt"), "--rank", str(rank)]
    assert main([*words, "-o", str(tmp_path / "stats")]) == 0
    said = re.search(r"(\d+) matrices are kept as products of rank (\d), which miss (.*)% of", capsys.readouterr().out)
    assert said is not None
    source = open_stats([tmp_path / "stats"])["second_moment"]
    assert set(source.keys) == set(wanted)
    left_out, squares = 0.0, 0.0
    for name, v in wanted.items():
        found = source.read(name)
        if v.ndim == 1 or (rank > 1 and ("embed" in name or "head" in name)):
            assert torch.allclose(found, v, rtol=1e-5, atol=0)
            assert not source.computes(name)
            continue
        u, s, vt = torch.linalg.svd(v.double())
        best = ((u[:, :rank] * s[:rank]) @ vt[:rank]).clamp(min=0)
        sums = torch.outer(v.double().sum(1), v.double().sum(0)) / v.double().sum()
        assert torch.allclose(found.double(), sums if rank == 1 else best, rtol=1e-4, atol=1e-10), name
        assert torch.equal(torch.cat([source.read(name, 0, 3), source.read(name, 3)]), found)
        left_out += float((found - v).square().sum())
        squares += float(v.square().sum())
    assert said[2] == str(rank)
    expert = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += 0.01 * noise(*p.shape, seed=i)
    base = load_file(saved(model, tmp_path / "base") / "model.safetensors")
    recipe = {"base": str(tmp_path / "base"), "models": {"a": {"model": str(folder), "stats": str(tmp_path / "stats")}},
              "method": [{"ffg": {"density": 0.4}}, "ota"]}  # fmt: skip
    (tmp_path / "ota.yaml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "ota.yaml"), str(tmp_path / "merged"), "--quiet"]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    kept = {name: merged[name] != base[name] for name in base}
    scores = {name: source.read(name) * (expert[name] - base[name]).square() for name in base}
    assert min(scores[n][k].min() for n, k in kept.items() if k.any()) >= 0.999 * max(
        scores[n][~k].max() for n, k in kept.items() if not k.all()
    )
    assert sum(int(k.sum()) for k in kept.values()) == pytest.approx(
        0.4 * sum(map(torch.numel, kept.values())), rel=0.1
    )
    assert all(torch.allclose(merged[n][k], expert[n][k], atol=1e-6) for n, k in kept.items())


def test_a_product_whose_parts_do_not_fit(tmp_path: Path) -> None:
    notes = {"stat": "second_moment", "examples": 0, "factored": ["w"]}
    for parts in ({"w.left": torch.ones(3, 2)}, {"w.left": torch.ones(3, 2), "w.right": torch.ones(1, 4)}):
        save_file(parts, tmp_path / "s.safetensors", {"weightsmith": json.dumps(notes)})
        with pytest.raises(SourceError, match=r"'w' should be a product of w.left and w.right, which do not fit"):
            open_stats([tmp_path / "s.safetensors"])
    with pytest.raises(WeightsmithError, match="rank = 0; expected a whole number from 1 on"):
        second_moment(tmp_path, tmp_path / "o.pt", tmp_path / "out", rank=0)


def test_moments_without_a_step_are_said_to_be_as_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny_llama(), tmp_path / "model")
    save_file({f"{n}.exp_avg_sq": p.detach().square() for n, p in tiny_llama().named_parameters()},
              tmp_path / "m.safetensors")  # fmt: skip
    words = ["observe", str(folder), "-o", str(tmp_path / "s")]
    assert main([*words, "--optimizer", str(tmp_path / "m.safetensors")]) == 0
    assert "moments are as they were saved, since the file does not say step and beta2" in capsys.readouterr().out
    assert main([*words, "--data", "x.txt", "--stat", "gram", "--rank", "1"]) == 2
    assert "rank is for the second moments of an optimizer" in capsys.readouterr().err
