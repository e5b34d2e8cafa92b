"""TIES: closed forms, and the whole against a plain calculation over flat vectors."""

from __future__ import annotations

import itertools

import pytest
import torch
from driver import every, merge

import weightsmith
from kit import noise, remarks
from weightsmith.methods.ties import Ties

SHAPES = {"a": (7, 5), "b": (6,), "c": (4, 3, 2), "d": ()}
BASE = {n: noise(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
# A coarse grid makes equal magnitudes and exact cancellations common; a base of zeros keeps them exact.
ZERO = {n: torch.zeros(s) for n, s in SHAPES.items()}
COARSE = {f"e{j}": {n: noise(*s, seed=10 * j + i).round() for i, (n, s) in enumerate(SHAPES.items())} for j in range(4)}


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in state.values()])


def plain_ties(deltas: torch.Tensor, ties: Ties) -> torch.Tensor:
    """The formulas on vectors [n, d] held in memory, for one density and no weights."""
    d, kept = deltas.shape[1], []
    for delta in deltas:
        if ties.density == 1:
            kept.append(delta)
        elif ties.scope_ == "global":
            threshold = delta.abs().sort().values[d - int(d * ties.density) - 1]  # k-th smallest, from 1
            kept.append(torch.where(delta.abs() >= threshold, delta, 0.0))
        else:
            order = sorted(range(d), key=lambda i: (-abs(float(delta[i])), i))
            mask = torch.zeros(d, dtype=torch.bool)
            mask[order[: max(1, int(d * ties.density))]] = True
            kept.append(torch.where(mask, delta, 0.0))
    v = torch.stack(kept)
    norm = v.norm(dim=1, keepdim=True)
    share = torch.where(norm > 0, v / norm, 0.0)
    signs = {
        "mass": v.sum(0),
        "count": v.sign().sum(0),
        "normmass": (share * share.abs()).sum(0),
        "normfrac": v.gather(0, share.abs().argmax(0, keepdim=True))[0],
    }[ties.sign].sign()
    majority = {"majority": 1, "minority": -1}.get(ties.zero_sign, 0) * signs.sum().sign()
    signs[signs == 0] = majority if majority != 0 else 1.0
    agree = (v.sign() == signs) & (v != 0)
    total = torch.where(agree, v, 0.0).sum(0)
    if ties.aggregate == "max":
        return signs * torch.where(agree, v.abs(), 0.0).amax(0)
    return total if ties.aggregate == "sum" else total / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize(
    ("sign", "zero_sign", "aggregate"),
    [
        *itertools.product(["mass"], ["majority", "minority", "plus"], ["mean", "sum", "max"]),
        *itertools.product(["count", "normmass", "normfrac"], ["majority"], ["mean"]),
    ],
)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_equal_to_the_plain_calculation(density, sign, zero_sign, aggregate):
    flip = {m: {n: -t for n, t in e.items()} for m, e in COARSE.items()}  # so that each majority occurs
    for experts in (COARSE, flip) if sign == "mass" and aggregate == "mean" else (COARSE,):
        for scope in ("global", "tensor"):
            ties = Ties(density=density, sign=sign, zero_sign=zero_sign, aggregate=aggregate, scope_=scope)
            got = merge(experts, ties, base=ZERO, cut=every(4))
            if scope == "global":
                wanted = plain_ties(torch.stack([flat(e) for e in experts.values()]), ties)
                assert torch.allclose(flat(got), wanted, atol=1e-6)
            else:
                for name in SHAPES:
                    wanted = plain_ties(torch.stack([e[name].reshape(-1) for e in experts.values()]), ties)
                    assert torch.allclose(got[name].reshape(-1), wanted, atol=1e-6), name


def test_the_hand_case():
    experts = {"a": {"w": torch.tensor([3.0, -2.0, 1.0, 0.0])}, "b": {"w": torch.tensor([-1.0, -2.0, 2.0, 4.0])}}
    got = merge(experts, "ties", base={"w": torch.zeros(4)}, density=1.0)["w"]
    assert got.tolist() == [3, -2, 1.5, 4]


def test_one_expert_and_copies_of_one():
    expert = {n: b + noise(*SHAPES[n], seed=99) for n, b in BASE.items()}
    one = merge({"a": expert}, "ties", base=BASE, density=1.0)
    assert torch.allclose(flat(one), flat(expert), rtol=1e-6, atol=1e-6)
    copies = {f"e{i}": expert for i in range(3)}
    mean = merge(copies, "ties", base=BASE, density=1.0)
    assert torch.allclose(flat(mean), flat(expert), rtol=1e-6, atol=1e-6)
    total = merge(copies, "ties", base=BASE, density=1.0, aggregate="sum")
    assert torch.allclose(flat(total) - flat(BASE), 3 * (flat(expert) - flat(BASE)), atol=1e-5)


def test_global_keeps_where_the_changes_are_large():
    expert = {"quiet": noise(10, 10, seed=1), "loud": 100 * noise(10, 10, seed=2)}
    base = {n: torch.zeros(10, 10) for n in expert}
    got = merge({"e": expert}, "ties", base=base, density=0.4)
    assert [int((got[n] != 0).sum()) for n in ("quiet", "loud")] == [0, 81]  # int(200 * 0.4) + 1
    got = merge({"e": expert}, "ties", base=base, density=0.4, scope="tensor")
    assert [int((got[n] != 0).sum()) for n in ("quiet", "loud")] == [40, 40]


def test_weights_come_before_the_vote_and_divide_the_mean():
    experts = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([-3.0, 4.0])}}
    base = {"w": torch.zeros(2)}
    got = merge(experts, "ties", base=base, density=1.0, weight=(4.0, 1.0))["w"]
    assert got.tolist() == pytest.approx([1.0, (4 * 2 + 4) / 5])
    got = merge(experts, "ties", base=base, density=1.0, weight=(4.0, 1.0), aggregate="sum", **{"lambda": 0.5})["w"]
    assert got.tolist() == [2.0, 6.0]


def test_a_negative_weight_keeps_its_sign_in_the_divisor_of_the_mean():
    """mergekit 0.1.5: sum w delta / sum w over what agrees, 0 counts as 1."""
    experts = {"a": {"w": torch.tensor([1.0, 2.0, 3.0, 1.0])}, "b": {"w": torch.tensor([4.0, -2.0, -1.0, -1.0])}}
    base = {"w": torch.zeros(4)}
    got = merge(experts, "ties", base=base, density=1.0, zero_sign="plus", weight=(1.0, -0.5))["w"]
    # Votes: 1 - 2 (only b agrees: -2 / -0.5), 2 + 1, 3 + 0.5 (both: / 0.5), 1 + 0.5.
    assert got.tolist() == [4.0, 6.0, 7.0, 3.0]
    got = merge(experts, "ties", base=base, density=1.0, zero_sign="plus", weight=(1.0, -1.0))["w"]
    assert got.tolist() == [4.0, 4.0, 4.0, 2.0]
    (remark,) = remarks(Ties(weight=(1.0, -0.9)), 2)
    assert remark.startswith("weight -0.9 (model 2 of 2): with aggregate mean the divisor is the sum of the weights")
    assert remarks(Ties(weight=(1.0, -0.9), aggregate="sum"), 2) == []
    assert remarks(Ties(weight=(1.0, 0.0)), 2) == []


def test_each_expert_has_its_own_density_and_names_do_not_matter():
    got = merge(COARSE, "ties", base=ZERO, density=(1.0, 0.1, 0.1, 0.1), zero_sign="plus")
    turned = {m: dict(reversed(e.items())) for m, e in COARSE.items()}
    other = merge(turned, "ties", base=dict(reversed(ZERO.items())), density=(1.0, 0.1, 0.1, 0.1), zero_sign="plus")
    assert all(torch.equal(got[n], other[n]) for n in SHAPES)


def test_how_often_it_reads():
    looks = [[one.rounds for one in method.passes(2)] for method in (
        Ties(zero_sign="plus", density=1.0), Ties(zero_sign="plus"), Ties(scope_="tensor", sign="normmass")
    )]  # fmt: skip
    assert looks == [[], [2], [3, 1, 1]]


def test_nothing_trimmed_and_nothing_to_ask_of_the_tensor():
    """density 1 in tensor scope with ties counting as plus needs no measuring pass at all."""
    experts = {"x": {"w": torch.tensor([1.0, -3.0, 2.0])}, "y": {"w": torch.tensor([3.0, 1.0, -2.0])}}
    base = {"w": torch.zeros(3)}
    got = merge(experts, "ties", base=base, density=1.0, scope="tensor", zero_sign="plus")
    assert got["w"].tolist() == [2.0, -3.0, 2.0]


@pytest.mark.parametrize("sign", ["normfrac", "normmass"])
def test_an_expert_equal_to_the_base_has_no_voice(sign):
    """Its norm is 0, and 0 / 0 must not win the vote."""
    given = {"w": torch.tensor([3.0, -2.0, 1.0])}
    experts = {"still": {"w": torch.zeros(3)}, "a": given}
    got = merge(experts, "ties", base={"w": torch.zeros(3)}, density=1.0, sign=sign)["w"]
    assert torch.equal(got, given["w"])


def test_tied_embeddings_count_once_among_the_largest():
    """60 loud entries, stored once under two names, and 60 quiet ones: the largest half is the loud ones or not."""
    quiet, loud = noise(12, 5, seed=1), 100 * noise(12, 5, seed=2)
    tied = {"embed_tokens.weight": loud, "lm_head.weight": loud, "up.weight": quiet}
    apart = {n: t.clone() for n, t in tied.items()}
    once = {n: t for n, t in tied.items() if n != "lm_head.weight"}

    def kept(state: dict[str, torch.Tensor]) -> int:
        ground = torch.zeros(12, 5)
        base = {n: ground if n != "up.weight" else ground.clone() for n in state}
        base = base if state is tied else {n: t.clone() for n, t in base.items()}
        merged = weightsmith.merge({"a": state}, Ties(density=0.75), base)
        assert state is not tied or torch.equal(merged["lm_head.weight"], merged["embed_tokens.weight"])
        return int((merged["up.weight"] != 0).sum())

    assert kept(tied) == kept(once) == 31  # int(120 * 0.75) + 1 - 60
    assert kept(apart) == 16  # int(180 * 0.75) + 1 - 120: the loud ones count twice
