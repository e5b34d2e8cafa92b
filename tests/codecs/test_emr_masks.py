"""EMR: the elected task vector, masks and factors against their closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import kit
import weightsmith
from goldens.encoded import encoded
from weightsmith.codecs.emr_masks import EmrMasks
from weightsmith.core.keys import Key
from weightsmith.ops.masks import unpack_bits

SHAPES = {"embed_tokens.weight": (300, 301), "layers.0.conv.weight": (5, 3, 3), "norm.weight": (13,), "scalar": ()}
METHOD = ["emr", "emr_masks"]

state = partial(kit.state, SHAPES)


BASE = state(0, 1.0)
DELTAS = [state(i + 1, 0.02 * (i + 1)) for i in range(3)]
EXPERTS = {f"e{i}": {n: BASE[n] + d[n] for n in BASE} for i, d in enumerate(DELTAS)}
DELTAS = [{n: e[n] - BASE[n] for n in BASE} for e in EXPERTS.values()]  # as float32 has them


def elected(name: str) -> Tensor:
    stack = torch.stack([d[name].double() for d in DELTAS])
    sign = stack.sum(0).sign()
    return sign * torch.where(stack.sign() == sign, stack.abs(), 0.0).amax(0)


def rebuilt(made, name: str, expert: str) -> Tensor:
    kinds = {"tau": f"{name}::tau", "mask": f"{name}::mask.{expert}", "factor": f"{name}::factor.{expert}"}
    return EmrMasks().decode({kind: made.tensors[full] for kind, full in kinds.items()}, BASE[name], 0)


def test_elect_mask_and_rescale():
    made = encoded(METHOD, BASE, EXPERTS)
    for i, (expert, delta) in enumerate(zip(EXPERTS, DELTAS, strict=True)):
        masks = {n: delta[n] * elected(n) > 0 for n in BASE}
        own = sum(float(delta[n].double().abs().sum()) for n in BASE)
        kept = sum(float((masks[n] * elected(n)).abs().sum()) for n in BASE)
        assert kept > 0
        for n in BASE:
            want = BASE[n] + own / kept * masks[n] * elected(n)
            assert torch.allclose(rebuilt(made, n, expert), want.float(), atol=1e-6), (i, n)


def test_one_expert_comes_back_and_disjoint_ones_at_a_common_factor():
    alone = encoded(METHOD, BASE, {"e0": EXPERTS["e0"]})
    for n in BASE:
        assert torch.allclose(rebuilt(alone, n, "e0"), EXPERTS["e0"][n], atol=1e-6)
    halves = {}
    for i in range(2):
        mine = {n: (torch.arange(BASE[n].numel()) % 2 == i).reshape(BASE[n].shape) for n in BASE}
        halves[f"e{i}"] = {n: torch.where(mine[n], EXPERTS["e0"][n], BASE[n]) for n in BASE}
    made = encoded(METHOD, BASE, halves)
    for expert, models in halves.items():
        for n in BASE:
            assert torch.allclose(rebuilt(made, n, expert), models[n], atol=1e-6)


def test_behind_the_plain_sum_and_masks_of_the_same_sign():
    made = encoded(["task_arithmetic", "emr_masks"], BASE, EXPERTS)
    for n in BASE:
        tau = weightsmith.merge(EXPERTS, "task_arithmetic", base=BASE)[n] - BASE[n]
        mask = unpack_bits(made.tensors[f"{n}::mask.e0"], 0, tau.numel()).reshape(tau.shape)
        agree = DELTAS[0][n].sign() == made.tensors[f"{n}::tau"].sign()
        assert torch.equal(mask, agree & (made.tensors[f"{n}::tau"] != 0))


def test_needs_a_method_in_front():
    from weightsmith.core.errors import RecipeError
    from weightsmith.core.site import Site

    site = Site(key=Key("w", (2, 2), "float32"), stack=torch.ones(1, 2, 2), base=torch.ones(2, 2))
    with pytest.raises(RecipeError, match="emr_masks stores a merged task vector; put it behind the merging method"):
        EmrMasks().encode(site)
