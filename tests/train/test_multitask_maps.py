"""Priors and widened layers, experts with gates, soft tokens: closed forms, laws, toys that each mechanism solves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multitask_cases import bright, images, save
from torch import Tensor, nn

from kit import noise
from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask import TaskExpertDecoder, expected, gradient, mask_augment, sauvola, widen
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.build import build, open_body
from weightsmith.train.multitask.data import read_tasks
from weightsmith.train.multitask.experts import resized
from weightsmith.train.multitask.net import Net
from weightsmith.train.multitask.priors import PRIORS, background, coordinates, prior, shading
from weightsmith.train.multitask.recipe import MultiTaskRecipe
from weightsmith.train.multitask.run import fit_system
from weightsmith.train.multitask.soft_tokens import Codebook, masked_error
from weightsmith.train.multitask.system import System

FAST = {"optimizer": {"adamw": {"lr": 0.005}}, "every": 1000, "valid": 0.2, "schedule": "cosine"}


def made(recipe: MultiTaskRecipe) -> System:
    tasks = read_tasks(recipe)
    body = open_body(recipe, tasks, device="cpu")
    return build(recipe, body, body.prepared(tasks))


def trained(recipe: MultiTaskRecipe) -> System:
    system = made(recipe)
    fit_system(recipe, system)
    return system


def scores(system: System) -> dict[str, float]:
    return {name: system.score(task, task.parts["valid"], 16) for name, task in system.tasks.items()}


# --- priors ------------------------------------------------------------------------------------------


def test_gradient_of_a_step_and_a_ramp():
    edge = torch.zeros(3, 5, 6)
    edge[:, :, 3:] = 0.1
    want = torch.zeros(5, 6)
    want[:, 2:4] = 0.5 * 4 * 0.1  # half of |Sobel x|
    torch.testing.assert_close(gradient(edge), want.expand(3, -1, -1))
    ramp = (0.01 * torch.arange(5.0))[:, None].expand(3, 5, 6)
    torch.testing.assert_close(gradient(ramp.contiguous())[0, 1:-1, 1:-1], torch.full((3, 4), 0.5 * 0.08))


def test_sauvola_by_hand():
    """The middle of 3 x 3: mean and deviation of all nine; the corner: of its four."""
    grey = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = sauvola(grey.expand(3, -1, -1).contiguous(), window=3, k=0.2, reach=0.5)

    def threshold(values: list[float]) -> float:
        return np.mean(values) * (1 + 0.2 * (np.std(values) / 0.5 - 1))

    assert found[0, 1, 1].item() == pytest.approx(threshold([1] + [0] * 8), rel=1e-5)
    assert found[0, 0, 0].item() == pytest.approx(threshold([1, 0, 0, 0]), rel=1e-5)
    assert found[2].tolist() == grey.tolist()


def test_background_drops_ink_and_shading_stretches():
    page = torch.full((3, 40, 40), 0.8)
    page[:, 18:20, 10:30] = 0.1
    assert torch.allclose(background(page), torch.full_like(page, 0.8))
    flat = shading(page)
    assert flat[:, 18:20, 10:30].max() == 0
    assert flat[:, 0].min() == 1
    place = coordinates(page)
    assert place[0, 19, 15] == 0
    assert place[1, 0].tolist() == pytest.approx(np.linspace(0, 1, 40), abs=1e-6)


@pytest.mark.parametrize("name", ["background", "gradient", "sauvola"])
def test_the_interior_of_a_prior_moves_with_the_image(name: str):
    big = noise(3, 96, 96, seed=2).sigmoid()
    border = {"background": 14, "gradient": 2, "sauvola": 9}[name]
    part = PRIORS[name](big[:, 10:74, 20:84])
    inner = slice(border, 64 - border)
    torch.testing.assert_close(
        part[:, inner, inner], PRIORS[name](big)[:, 10:74, 20:84][:, inner, inner], atol=1e-6, rtol=0
    )


def test_what_is_no_image_is_refused():
    with pytest.raises(RecipeError, match=r"numbers from 0 to 1, got 0 to 255; divide by 255"):
        prior("gradient", torch.tensor([0.0, 255.0]).view(1, 1, 2).expand(3, 1, 2))
    with pytest.raises(RecipeError, match=r"needs an image \[3, H, W\] of numbers from 0 to 1, got torch.uint8"):
        prior("gradient", torch.zeros(3, 4, 4, dtype=torch.uint8))


# --- conditioned inputs ------------------------------------------------------------------------------


def test_a_widened_layer_gives_what_it_gave():
    net = Net.seeded(0, 8, 2)
    x, extra = noise(2, 3, 12, 10), noise(2, 3, 12, 10, seed=1)
    want = net(x)
    widen(net, "enter", 3)
    assert torch.equal(net(torch.cat([x, extra], 1)), want)
    layers = nn.Sequential(nn.Linear(4, 3))
    want = layers(noise(2, 4))
    widen(layers, "0", 2)
    assert torch.equal(layers(torch.cat([noise(2, 4), noise(2, 2)], 1)), want)
    with pytest.raises(RecipeError, match="there is no module 'entre'; did you mean 'enter'"):
        widen(net, "entre", 1)
    with pytest.raises(RecipeError, match="only Linear and Conv2d"):
        widen(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0", 1)


def blurred(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), "edge")
    return (sum(padded[i : i + 16, j : j + 16] for i in range(3) for j in range(3)) / 9).astype(np.uint8)


def test_a_prior_tells_the_task_and_swapping_it_switches(tmp_path: Path):
    """Blur or invert the same images: without a prior the mean of both, with one each."""
    files = {
        "blur": images(tmp_path / "a.npz", 48, blurred),
        "invert": images(tmp_path / "b.npz", 48, lambda x: 255 - x),
    }
    found = {}
    for kind, priors in {
        "none": ("none", "none"),
        "priors": ("gradient", "background"),
        "fixed": ("fixed", "fixed"),
    }.items():
        tasks = {
            name: {"data": str(file), "prior": p, "metric": "mae"}
            for (name, file), p in zip(files.items(), priors, strict=True)
        }
        recipe = MultiTaskRecipe(
            tasks=tasks, net={"width": 12, "depth": 2}, by="conditioned", steps=200, batch=8, sampling="mixed", **FAST
        )
        system = trained(recipe)
        found[kind] = scores(system)
        if kind == "priors":
            task = system.tasks["blur"]
            with torch.no_grad():
                swapped: Any = system.predict(task, task.parts["valid"], by="background")  # type: ignore[call-arg]
            inverted = torch.stack([1 - p.input for p in task.parts["valid"] if isinstance(p.input, Tensor)])
            assert (torch.stack(swapped) - inverted).abs().mean() < 0.12
            wanted = torch.stack([p.answer for p in task.parts["valid"] if isinstance(p.answer, Tensor)])
            assert (torch.stack(swapped) - wanted).abs().mean() > 0.2
    assert min(found["none"].values()) > 0.1
    assert max(found["priors"].values()) < 0.08
    assert max(found["fixed"].values()) < 0.08


# --- experts -----------------------------------------------------------------------------------------


def levels(n: int = 2, d: int = 6) -> list[Tensor]:
    return [noise(2, 5, d, seed=i) for i in range(n)]


def test_gates_start_even_and_sum_to_one():
    decoder = TaskExpertDecoder(6, ["a", "b"], experts=3, levels=1, width=4)
    x = levels(1)
    _, gates = decoder(x, "a")
    assert torch.allclose(gates, torch.full_like(gates, 1 / 4))
    outs = [expert(x[0]) for expert in decoder.experts[0]]  # type: ignore[union-attr]
    m = decoder.start[0].expand(2, 5, -1)
    z = (sum(outs) + decoder.carry[0](m)) / 4
    want = decoder.norms[0][0](m + decoder.update[0][0](torch.cat([z, m], -1)))  # type: ignore[index]
    torch.testing.assert_close(decoder(x, "a")[0], want)
    for p in decoder.parameters():
        nn.init.normal_(p)
    torch.testing.assert_close(decoder(x, "b")[1].sum(-1), torch.ones(1, 2, 5))


def test_one_expert_without_memory_is_a_shared_layer():
    decoder = TaskExpertDecoder(6, ["a", "b"], experts=1, levels=2, width=4, memory=False)
    x = levels()
    want = decoder.experts[1][0](x[1])  # type: ignore[index]
    torch.testing.assert_close(decoder(x, "a")[0], want)
    torch.testing.assert_close(decoder(x, "b")[0], want)


def test_the_order_of_the_experts_does_not_count():
    decoder = TaskExpertDecoder(6, ["a"], experts=3, levels=1, width=4)
    nn.init.normal_(decoder.gates[0][0][2].weight)  # type: ignore[index]
    x = levels(1)
    want = decoder(x, "a")[0]
    order = [2, 0, 1]
    decoder.experts[0] = nn.ModuleList(decoder.experts[0][i] for i in order)  # type: ignore[index]
    last = decoder.gates[0][0][2]  # type: ignore[index]
    with torch.no_grad():
        last.weight.copy_(last.weight[[*order, 3]])
        last.bias.copy_(last.bias[[*order, 3]])
    torch.testing.assert_close(decoder(x, "a")[0], want)


def test_the_memory_costs_what_it_should_and_every_expert_learns():
    d, w, t, n, h = 6, 4, 2, 2, 1

    def size(memory: bool) -> int:
        return sum(p.numel() for p in TaskExpertDecoder(d, ["a", "b"], 3, n, w, memory=memory).parameters())

    per_level = w * w + w + t * (2 * w * w + w + 2 * w) + t * (w * h + h + 1)  # carry, update and norm, wider gates
    assert size(True) - size(False) == t * w + n * per_level
    decoder = TaskExpertDecoder(d, ["a"], 3, n, w)
    decoder(levels(), "a")[0].square().sum().backward()
    for level in decoder.experts:
        assert all(float(p.grad.abs().sum()) > 0 for expert in level for p in expert.parameters())  # type: ignore[union-attr]


def test_the_memory_follows_the_resolution():
    """Four tokens a side to two: bilinear, so means of blocks of four."""
    decoder = TaskExpertDecoder(6, ["a"], experts=2, levels=2, width=4)
    assert decoder([noise(2, 16, 6), noise(2, 4, 6, seed=1)], "a")[0].shape == (2, 4, 4)
    memory = torch.arange(16.0).view(1, 16, 1)
    assert resized(memory, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(RecipeError, match="levels of 15 and 4 tokens; only square maps can be resized"):
        resized(memory[:, :15], 4)


def test_gates_specialise_where_tasks_read_different_halves():
    """A narrow decoder: each task needs its own half of the input; static mixing of one expert cannot serve both."""
    torch.manual_seed(0)
    x = noise(256, 1, 8, seed=3)
    wanted = {"a": x[..., :4], "b": x[..., 4:]}
    losses = {}
    for kind, experts in (("shared", 1), ("gated", 4)):
        decoder = TaskExpertDecoder(8, ["a", "b"], experts, 1, 4, memory=False)
        heads = nn.ModuleDict({name: nn.Linear(4, 4) for name in wanted})
        optimizer = torch.optim.Adam([*decoder.parameters(), *heads.parameters()], 0.02)
        for _ in range(250):
            loss = sum((heads[n](decoder([x], n)[0]) - y).square().mean() for n, y in wanted.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[kind] = float(loss.detach())
    assert losses["gated"] < 0.6 * losses["shared"]
    means = {n: decoder([x], n)[1].mean((0, 1, 2)) for n in wanted}
    assert (means["a"] - means["b"]).abs().sum() > 0.5
    collapsed = torch.tensor([[0.999, 0.001]])
    assert float(decoder.bonus(collapsed).detach()) > 0
    assert float(decoder.bonus(torch.tensor([[0.5, 0.5]]))) == 0


def test_experts_from_checkpoints_are_frozen_and_routed(tmp_path: Path):
    from weightsmith.observe.model import load_model

    path = save("vit", tmp_path / "vit")
    tasks = {"a": {"data": str(images(tmp_path / "a.npz", 20, bright, key="y"))}}
    by = {"task_expert": {"init_experts_from": [str(path), str(path)], "levels": 2, "memory": False}}
    system = made(MultiTaskRecipe(tasks=tasks, model=str(path), by=by, valid=0.2))
    task = system.tasks["a"]
    pairs = task.parts["valid"]
    found = Body(load_model(path), 8).hidden([p.input for p in pairs]).levels[-1]
    out = system.own["decoder"]([found] * 2, "a", None, [[found] * 2] * 2)[0]
    torch.testing.assert_close(out, found)  # equal experts: their mean
    names = {name.split(".")[0] for name, p in system.named_parameters() if p.requires_grad}
    assert names == {"own"}
    assert system.score(task, pairs, 4) >= 0
    assert system.told()["gates"]["a"] == pytest.approx([0.5, 0.5])


# --- soft tokens -------------------------------------------------------------------------------------


def test_certain_logits_decode_alike():
    codes = noise(5, 3)
    logits = torch.full((2, 5), -100.0)
    logits[0, 3] = logits[1, 1] = 100.0
    assert torch.equal(expected(logits, codes), expected(logits, codes, soft=False))
    assert torch.equal(expected(logits, codes), codes[[3, 1]])


def test_gradients_flow_through_soft_codes_only():
    codes, z = noise(5, 3), noise(2, 5, seed=1).requires_grad_()
    decoder = nn.Linear(3, 4)
    decoder(expected(z, codes)).sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().sum()) > 0
    assert not expected(z, codes, soft=False).requires_grad
    p = z.detach().softmax(-1)  # of a linear decoder, the expectation over its outputs for each code
    torch.testing.assert_close(decoder(expected(z, codes)), p @ decoder(codes))


def test_augmentation_masks_as_many_patches_as_it_says():
    maps = torch.ones(7, 2, 12, 8)
    found = mask_augment(maps, 0.4, 4, torch.Generator().manual_seed(0))
    patches = found.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert set(patches.flatten().tolist()) == {0.0, 1.0}
    assert patches.amax(-1).eq(patches.amin(-1)).all()
    assert (patches[:, 0, ..., 0] == 0).sum((1, 2)).tolist() == [math.ceil(0.4 * 6)] * 7
    with pytest.raises(RecipeError, match="maps of 12 x 8 are not divisible by patches of 5"):
        mask_augment(maps, 0.4, 5)


def test_pixels_without_a_label_do_not_count():
    out, target, valid = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    valid[..., 0] = False
    changed = target.clone()
    changed[..., 0] = 1e6
    assert masked_error(out, changed, valid) == masked_error(out, target, valid)
    books = [Codebook(1, 4, 6, 2) for _ in range(2)]
    books[1].load_state_dict(books[0].state_dict())
    losses = [b.learn(t, valid, steps=3) for b, t in zip(books, (target, changed), strict=True)]
    assert losses[0] == losses[1]


def ramp(image: np.ndarray) -> np.ndarray:
    """A smooth map: the brightness of the whole image, as a plane."""
    level = (image.astype(float).mean() - 127) / 6
    return (
        np.clip(0.5 + 0.4 * level + 0.1 * np.linspace(-1, 1, 16)[None, :].repeat(16, 0), 0, 1).astype(np.float32) + 0.2
    )


def test_soft_decoding_is_nearer_than_hard(tmp_path: Path):
    """Few codes for continuous values: an expectation lies between them; and blocks keep their probability."""
    tasks = {
        "depth": {
            "data": str(images(tmp_path / "a.npz", 60, ramp)),
            "metric": "rmse",
            "invalid": 0.0,
            "legal": [0.1, 2],
        },
        "kind": {"data": str(images(tmp_path / "b.npz", 60, bright, key="y"))},
    }
    by = {"soft_tokens": {"codes": 8, "patch": 8, "width": 32, "vae_steps": 80}}
    recipe = MultiTaskRecipe(
        tasks=tasks, net={"width": 12, "depth": 2}, by=by, steps=60, batch=8, sampling="mixed", **FAST
    )
    system: Any = trained(recipe)
    task = system.tasks["depth"]
    pairs = task.parts["valid"]
    with torch.no_grad():
        wanted = torch.stack([p.answer for p in pairs])
        soft, hard = (torch.stack(system.predict(task, pairs, soft=how)) for how in (True, False))
        assert (soft - wanted).square().mean() < (hard - wanted).square().mean()
        z = system.logits(system.tasks["kind"], system._seen([pairs[0].input]), torch.zeros(1, 0, 32))
    assert z.shape[-1] == 2
    told = system.told()
    assert told["blocks"] == {"depth": [0, 8], "kind": [8, 10]}
    assert told["codes_used"]["depth"] > 0.3


def test_images_must_fit_the_patches(tmp_path: Path):
    tasks = {"a": {"data": str(images(tmp_path / "a.npz", 8, lambda x: x))}}
    with pytest.raises(
        RecipeError, match=r"task 'a': an image of 16 x 16 pixels is not divisible by patches of 5; resize"
    ):
        made(MultiTaskRecipe(tasks=tasks, net={}, by={"soft_tokens": {"patch": 5}}))
