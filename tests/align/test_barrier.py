"""Loss on the line between two networks: closed forms, batch statistics, the verb."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.align.barrier import Outcomes, curve, height, plane, recalibrate
from weightsmith.align.run import align
from weightsmith.cli.main import main
from weightsmith.core.errors import NumericError, SourceError


def linear(weight: float, bias: float = 0.0) -> nn.Linear:
    made = nn.Linear(1, 1)
    nn.init.constant_(made.weight, weight)
    nn.init.constant_(made.bias, bias)
    return made


def squares(module: nn.Module) -> Outcomes:
    """The loss (w - 1)^2 for one half of the examples and (w + 1)^2 for the other; right where w > 0."""
    weight = float(module.weight.detach())  # type: ignore[operator, union-attr]
    loss = np.where(np.arange(10) < 5, (weight - 1) ** 2, (weight + 1) ** 2)
    return Outcomes(loss, np.full(10, float(weight > 0)), np.ones(10))


def test_a_convex_loss_has_no_barrier_and_its_negative_has() -> None:
    found = curve(linear(-2.0), linear(2.0), squares)
    assert found.points.tolist() == np.linspace(0, 1, 25).tolist()
    assert found.loss == pytest.approx((4 * found.points - 2) ** 2 + 1)
    assert found.barrier == 0
    assert found.interval == (0, 0)
    upside_down = curve(linear(-2.0), linear(2.0), lambda m: replace(squares(m), loss=-squares(m).loss))
    assert upside_down.barrier == pytest.approx(4)
    assert upside_down.interval[0] <= 4 <= upside_down.interval[1]


def test_the_height_is_above_the_chord() -> None:
    points = np.linspace(0, 1, 5)
    assert height(np.array([1.0, 2, 4, 2, 3]), points) == pytest.approx(2.0)
    assert height(np.array([[1.0, 1, 1, 1, 1], [0, 0, 0, 0, 4]]), points).tolist() == [0, 0]


def test_neither_network_is_changed_and_ends_are_exact() -> None:
    a, b = linear(0.1, 0.3), linear(0.7, -0.2)
    seen: list[float] = []

    def measure(module: nn.Module) -> Outcomes:
        seen.append(float(module.weight.detach()))  # type: ignore[operator, union-attr]
        return squares(module)

    curve(a, b, measure, points=3)
    assert seen == [a.weight.item(), pytest.approx(0.4), b.weight.item()]
    assert (a.weight.item(), b.weight.item()) == (linear(0.1).weight.item(), linear(0.7).weight.item())


def test_a_plane_through_three_networks() -> None:
    corners = [linear(0.0), linear(2.0), linear(-4.0)]
    places, losses = plane(corners, squares, points=5, margin=0.5)
    assert places.tolist() == [-0.5, 0, 0.5, 1, 1.5]
    weights = 2 * places[:, None] - 4 * places[None]
    assert losses == pytest.approx(weights**2 + 1)  # the mean of (w - 1)^2 and (w + 1)^2
    assert [c.weight.item() for c in corners] == [0, 2, -4]
    with pytest.raises(SourceError, match="a plane goes through three networks, not 2"):
        plane(corners[:2], squares)


def test_statistics_of_batches_are_those_of_the_network_on_the_way() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    data = torch.randn(64, 3)
    assert recalibrate(net, lambda m: [m(part) for part in data.split(16)])
    hidden = net[0](data)
    assert torch.allclose(net[1].running_mean, hidden.mean(0), atol=1e-5)  # type: ignore[arg-type]
    assert net[1].momentum == 0.1
    assert not net[1].training
    assert not recalibrate(nn.Linear(1, 1), lambda m: m(data))
    calls: list[int] = []
    curve(linear(0.0), linear(1.0), squares, points=4, refresh=lambda m: calls.append(1))
    assert len(calls) == 2  # the ends are as they were trained


def test_lines_that_cannot_be_drawn() -> None:
    with pytest.raises(SourceError, match=r"no line from one to the other: weight is \[1, 1\] and \[1, 2\]"):
        curve(linear(1.0), nn.Linear(2, 1), squares)
    with pytest.raises(SourceError, match="at least its two ends, not 1 points"):
        curve(linear(1.0), linear(1.0), squares, points=1)
    with pytest.raises(NumericError, match="the loss at an end of the line is no finite number"):
        curve(linear(float("nan")), linear(1.0), squares)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=4)).save_pretrained(tmp_path / f"m{seed}")
    align(tmp_path / "m1", tmp_path / "m0", tmp_path / "aligned")
    (tmp_path / "data.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    words = ["barrier", *(str(tmp_path / n) for n in ("m0", "m1")), "--data", str(tmp_path / "data.txt")]
    words += ["--points", "5", "--length", "32", "--align", str(tmp_path / "aligned")]
    assert main([*words, "--html", str(tmp_path / "page.html")]) == 0
    assert "as they are: barrier" in (tmp_path / "page.html").read_text()
    said = capsys.readouterr().out
    assert "as they are" in said
    assert "aligned" in said
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["aligned"]["loss"][0] == found["as they are"]["loss"][0]
    assert found["aligned"]["loss"][-1] == pytest.approx(found["as they are"]["loss"][-1], rel=1e-5)
    assert found["aligned"]["loss"][2] != found["as they are"]["loss"][2]
    assert main([*words[:-2], "--third", str(tmp_path / "m1"), "--html", str(tmp_path / "plane.html"), "--json"]) == 0
    plane = json.loads(capsys.readouterr().out)["plane"]
    drawn = np.array(plane["loss"])
    at = np.array(plane["grid"]).round(6).tolist()
    corner = at.index(0.0), at.index(1.0)  # A, and the second and third model, which are one here
    assert drawn[corner[0], corner[0]] == pytest.approx(found["as they are"]["loss"][0], rel=1e-5)
    assert drawn[corner[1], corner[0]] == pytest.approx(drawn[corner[0], corner[1]], rel=1e-5)
    np.testing.assert_allclose(drawn, drawn.T, rtol=1e-5)
    assert "Loss on the plane" in (tmp_path / "plane.html").read_text()
