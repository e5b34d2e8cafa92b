"""The loop and its command: gradients, schedules, resuming to the bit, results that merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from kit import noise
from weightsmith.cli.main import main
from weightsmith.core.errors import NumericError, OutputError, RecipeError
from weightsmith.io.read.open import open_source
from weightsmith.observe.data import _rows
from weightsmith.train import loop
from weightsmith.train.checkpoints import Checkpoints
from weightsmith.train.loop import Pace, fit
from weightsmith.train.multitask import recipe as multitask
from weightsmith.train.optim import DCTAdamW, Trion
from weightsmith.train.recipe import TrainRecipe, loads
from weightsmith.train.run import optimizer_of

# --- the loop ----------------------------------------------------------------------------------------

XS, YS = noise(12, 6), noise(12, 4, seed=1)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))


def squares(net: nn.Module) -> loop.Loss:
    def loss(numbers: list[int]) -> tuple[Tensor, int]:
        return (net(XS[numbers]) - YS[numbers]).square().sum(), len(numbers)

    return loss


def test_lines_of_examples_end_at_line_feeds_only(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n{"text": "c\x85"}\n', "utf-8")
    assert [row["text"] for _, row in _rows(tmp_path / "a.jsonl")] == ["a\u2028b", "c\x85"]


def test_a_step_is_that_of_the_mean_over_its_examples():
    """Micro-batches of 2, 2 and 2 give the step of one batch of 6; clipped to a norm of 0.1."""
    net, other = network(), network()
    pace = Pace(1, 2, 3, "constant", clip=0.1)
    rows = fit(net, torch.optim.SGD(net.parameters(), 0.5), squares(net), range(12), pace)
    used = [i for micro in pace.micro_batches(1, 12) for i in micro]
    assert len(set(used)) == 6
    value = (other(XS[used]) - YS[used]).square().sum() / 6
    value.backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    torch.optim.SGD(other.parameters(), 0.5).step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert rows[-1].loss == pytest.approx(value.item())
    assert rows[-1].gradient == pytest.approx(norm.item())


def test_every_example_comes_once_an_epoch():
    pace = Pace(6, 5, 1, seed=4)
    epochs = [[i for s in steps for micro in pace.micro_batches(s, 12) for i in micro] for steps in ([1, 2], [3, 4])]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert sorted(next(iter(Pace(1, 100).micro_batches(1, 12)))) == list(range(12))


def test_rates():
    assert [Pace(10, 1, schedule="linear", warmup=0.2).rate(s) for s in (1, 2, 3, 7, 10)] == [0.5, 1, 1, 0.5, 0.125]
    assert [Pace(4, 1, schedule="constant").rate(s) for s in (1, 4)] == [1, 1]
    assert Pace(4, 1, schedule="cosine").rate(3) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["adamw", "dct_adamw", "trion"])
def test_a_broken_run_goes_on_to_the_same_bits(tmp_path: Path, kind: str):
    """Dropout draws on, moments and directions are there, the curve is whole."""
    pace = Pace(9, 3, 2, "cosine", 0.2, every=3, seed=7)

    def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = network(dropout=0.4)
        recipe = TrainRecipe(model="m", data="d", optimizer={kind: {} if kind == "adamw" else {"rank": 3}})
        return net, optimizer_of(recipe.optimizer, net)[0]

    net, optimizer = parts()
    rows = fit(net, optimizer, squares(net), range(10), pace, valid=[10, 11])
    assert [row.step for row in rows] == [0, 3, 6, 9]
    half, optimizer = parts()

    def stop(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    store = Checkpoints(tmp_path / "out", {"a": 1}, resume=False, overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        fit(half, optimizer, squares(half), range(10), pace, valid=[10, 11], store=store, progress=stop)
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["step-00000006"]
    again, optimizer = parts()
    store = Checkpoints(tmp_path / "out", {"a": 1}, resume=True, overwrite=False)
    resumed = fit(again, optimizer, squares(again), range(10), pace, valid=[10, 11], store=store)
    assert resumed == rows
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(OutputError, match=r"belongs to a run with another a; pass --overwrite to start anew"):
        Checkpoints(tmp_path / "out", {"a": 2}, resume=True, overwrite=False)
    with pytest.raises(OutputError, match=r"out\.training: a previous run was interrupted; pass --resume to go on"):
        Checkpoints(tmp_path / "out", {"a": 1}, resume=False, overwrite=False)
    state = tmp_path / "out.training/step-00000009/model.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(OutputError, match=r"cannot resume: .*step-00000009 is damaged"):
        Checkpoints(tmp_path / "out", {"a": 1}, resume=True, overwrite=False)
    Checkpoints(tmp_path / "out", {"a": 2}, resume=False, overwrite=True)
    assert not (tmp_path / "out.training").exists()


def test_numbers_outside_stop_the_run(tmp_path: Path):
    net = network()
    xs = XS.clone()
    xs[5] = torch.nan

    def loss(numbers: list[int]) -> tuple[Tensor, int]:
        return (net(xs[numbers]) - YS[numbers]).square().sum(), len(numbers)

    store = Checkpoints(tmp_path / "out", {}, resume=False, overwrite=False)
    with pytest.raises(NumericError, match=r"step \d+: the loss is nan on examples \[\d+(, \d+){2}\]; lower"):
        fit(net, torch.optim.SGD(net.parameters(), 0.1), loss, range(12), Pace(9, 3, every=1), store=store)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    steep = network()
    nn.init.zeros_(steep[3].weight)
    nn.init.zeros_(steep[3].bias)
    optimizer = torch.optim.SGD(steep.parameters(), 0.1)
    with pytest.raises(NumericError, match=r"step 1: the gradient is inf on examples"):
        fit(steep, optimizer, lambda numbers: (steep(XS[numbers]).sum() * 1e30 * 1e8, 1), range(12), Pace(1, 3))


def test_the_global_random_state_is_left_alone():
    net = network(dropout=0.5)
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    fit(net, torch.optim.SGD(net.parameters(), 0.1), squares(net), range(12), Pace(2, 3))
    assert torch.equal(torch.rand(3), want)


# --- the recipe --------------------------------------------------------------------------------------


def test_groups_follow_shapes():
    net = nn.ModuleDict({"wide": nn.Linear(9, 6), "small": nn.Linear(6, 2), "norm": nn.LayerNorm(6)})
    recipe = loads("{model: m, data: d, optimizer: {dct_adamw: {rank: 4, weight_decay: 0.1, norm: 2}}}")
    optimizer, projected = optimizer_of(recipe.optimizer, net)
    assert isinstance(optimizer, DCTAdamW)
    assert projected == 1
    groups = {tuple(g["param_names"]): (g["rank"], g["weight_decay"], g["norm"]) for g in optimizer.param_groups}
    assert groups == {
        ("wide.weight",): (4, 0.1, 2),
        ("wide.bias", "small.bias", "norm.weight", "norm.bias"): (None, 0.0, 2),
        ("small.weight",): (None, 0.1, 2),
    }
    trion, _ = optimizer_of(loads("{model: m, data: d, optimizer: {trion: {rank: 4, scale: dion}}}").optimizer, net)
    assert isinstance(trion, Trion)
    assert trion.defaults["scale"] == "dion"
    plain, _ = optimizer_of(loads("{model: m, data: d, optimizer: adamw}").optimizer, net)
    assert type(plain) is torch.optim.AdamW


@pytest.mark.parametrize("said", ["null", "none"])
def test_no_clipping_is_said_in_two_ways(said: str):
    assert loads(f"{{model: m, data: d, clip: {said}}}").clip == "none"
    assert loads("{model: m, data: d}", overrides=[f"clip={said}"]).clip == "none"
    assert multitask.loads(f"{{model: m, tasks: {{a: {{data: d}}}}, clip: {said}}}").clip == "none"
    net = network()
    large: loop.Loss = lambda numbers: (1e3 * squares(net)(numbers)[0], len(numbers))  # noqa: E731
    fit(net, torch.optim.SGD(net.parameters(), 1e-6), large, range(12), Pace(1, 12, clip="none"))
    moved = [(a - b).norm() for a, b in zip(net.parameters(), network().parameters(), strict=True)]
    assert torch.stack(moved).norm() > 10e-6  # a norm cut to 1 moves by 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: d", "recipe:1:1: the recipe has no 'model'; write model: PATH"),
        ("{model: m, data: d, steps: 0}", "steps should be greater than or equal to 1, is 0"),
        ("{model: m, data: d, tune: lora}", "recipe:1:21: tune: names no kind, is 'lora'; known: full, linear, svfit"),
        ("{model: m, data: d, tune: {svfit: {r: 2, energy: 0.5}}}", "tune.svfit takes r or energy, not both"),
        ("{model: m, data: d, optimizer: {adamw: {}, trion: {}}}", "should name one of adamw, dct_adamw, trion"),
        ("{model: m, data: d, optimizer: {dct_adamw: {rnak: 2}}}", "unknown key 'rnak' in optimizer.dct_adamw; did"),
        ("{model: m, data: d, schedule: linaer}", "schedule .* did you mean 'linear'"),
    ],
)
def test_wrong_recipes_are_refused(text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        loads(text)


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    more = {"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    llama = LlamaConfig(vocab_size=256, **sizes, **more)
    LlamaForCausalLM(llama).bfloat16().save_pretrained(root / "llama")
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    rows = [json.dumps({"text": f"{i} and {i} are {2 * i}."}) for i in range(40)]
    (root / "texts.jsonl").write_text("\n".join(rows))
    images = noise(30, 8, 8).numpy()
    np.savez(root / "images.npz", x=images, y=(images.mean((1, 2)) > 0).astype(np.int64))
    return root


def train(folder: Path, text: str, out: str, *words: str) -> int:
    (folder / f"{out}.yaml").write_text(text)
    return main(["train", str(folder / f"{out}.yaml"), str(folder / out), "--device", "cpu", *words])


LLAMA = "{model: llama, data: texts.jsonl, steps: 6, batch: 4, every: 3, valid: 0.2, length: 32, optimizer: %s}"


def test_a_model_comes_out_that_merges(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert train(folder, LLAMA % "{dct_adamw: {lr: 0.01, rank: 8}}", "tuned") == 0
    shown = capsys.readouterr().out
    assert "32 examples, 8 kept for validation" in shown
    assert "8 matrices in subspaces" in shown  # q, o, gate, up, down, embedding: k and v have 16 rows
    base, tuned = open_source(folder / "llama"), open_source(folder / "tuned")
    assert list(base.keys.values()) == list(tuned.keys.values())
    assert {key.dtype for key in tuned.keys.values()} == {"bfloat16"}
    assert all(not torch.equal(base.read(n), tuned.read(n)) for n in base.keys if "norm" not in n)
    assert (folder / "tuned/config.json").read_text() == (folder / "llama/config.json").read_text()
    assert "Training" in (folder / "tuned/training.html").read_text()
    assert not (folder / "tuned.training").exists()
    assert main(["verify", str(folder / "tuned")]) == 0
    merged = ws.merge({"a": folder / "tuned", "b": folder / "llama"}, "average")
    assert set(merged) == set(base.keys)
    capsys.readouterr()
    assert train(folder, LLAMA % "{dct_adamw: {lr: 0.01, rank: 8}}", "again", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[-1]["valid"] < rows[0]["valid"]
    again = open_source(folder / "again")
    assert all(torch.equal(again.read(n), tuned.read(n)) for n in tuned.keys)


def test_singular_values_come_out_as_an_expert(folder: Path, capsys: pytest.CaptureFixture[str]):
    text = "{model: vit, data: images.npz, steps: 8, batch: 5, valid: 0, optimizer: {adamw: {lr: 0.02}}, tune: %s}"
    assert train(folder, text % "{svfit: {r: 4, modules_to_save: classifier}}", "values") == 0
    assert f"{2 * 4 + 3 * 32 + 3:,} numbers trained on 30 examples, 0 kept" in capsys.readouterr().out
    merged = ws.merge({"values": folder / "values"}, "average", base=folder / "vit")
    base = open_source(folder / "vit")
    changed = {n for n in base.keys if not torch.equal(base.read(n), merged[n])}
    ends = ("attention.query.weight", "attention.value.weight", "classifier.weight", "classifier.bias")
    assert len(changed) == 4
    assert all(name.endswith(ends) for name in changed)


def test_what_is_in_the_way_is_said_first(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert train(folder, LLAMA % "adamw", "llama") == 2
    assert "llama exists and is not empty" in capsys.readouterr().err
    text = "{model: vit, data: texts.jsonl}"
    assert train(folder, text, "never") == 2
    assert "texts.jsonl" in capsys.readouterr().err
    np.savez(folder / "unlabelled.npz", x=noise(4, 8, 8).numpy())
    assert train(folder, "{model: vit, data: unlabelled.npz}", "never") == 2
    assert "example 0 has no label, which image-classification needs to train" in capsys.readouterr().err
    np.savez(folder / "labelled.npz", x=noise(4, 8, 8).numpy(), y=np.array([0, 1, 7, 1]))
    assert train(folder, "{model: vit, data: labelled.npz, batch: 4, valid: 0}", "never") == 2
    assert f"example 2: label 7 is none of the 3 classes of {folder / 'vit'}" in capsys.readouterr().err
    bad = "{model: llama, data: texts.jsonl, tune: {svfit: {target_modules: quary}}}"
    assert train(folder, bad, "never") == 2
    assert "target_modules quary match no Linear or convolution layer; it has q_proj" in capsys.readouterr().err
    assert not (folder / "never").exists()
    assert not (folder / "never.training").exists()


def test_an_interrupted_command_is_resumed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    text = LLAMA % "{dct_adamw: {rank: 4, error_feedback: 8}}"
    assert train(folder, text, "unbroken") == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.train.loop._mean", stop)  # at the first checkpoint's validation, then before it
        assert train(folder, text, "broken") == 130
    assert capsys.readouterr().err == "interrupted; continue with --resume\n"
    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.train.run._curve", stop)
        assert train(folder, text, "broken", "--resume") == 130
    assert train(folder, text, "broken") == 2
    assert "a previous run was interrupted; pass --resume" in capsys.readouterr().err
    assert train(folder, text.replace("steps: 6", "steps: 9"), "broken", "--resume") == 2
    assert "broken.training belongs to a run with another recipe" in capsys.readouterr().err
    assert train(folder, text, "broken", "--resume") == 0
    one, other = open_source(folder / "unbroken"), open_source(folder / "broken")
    assert all(torch.equal(one.read(n), other.read(n)) for n in one.keys)
    assert not (folder / "broken.training").exists()
