"""The straightforward way to each method, as the publications write it: whole tensors, whole sorts, whole SVDs.

Each takes the experts' matrices [n, out, in], the base [out, in] and the statistic that the method reads (or nothing),
all float32, with the method's default parameters, and returns the merged matrix.  Those written for task vectors
take the differences first (`_of_deltas`), as every user has to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import plain_codecs, plain_loops
from bench.spectral import whole_svds

__all__ = ["PLAIN", "Way"]

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _of_deltas(way: Way) -> Way:
    """A way that is written for task vectors, for experts."""
    return lambda experts, base, stat: way(experts - base, base, stat)


# --- sums and cuts -----------------------------------------------------------------------------------


def linear(experts: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    return experts.mean(0)


def task_arithmetic(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    return base + deltas.sum(0)


def magnitude(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Sort, keep the larger half of each task vector, add."""
    flat = deltas.reshape(len(deltas), -1)
    kept = flat.abs().argsort(dim=1, descending=True)[:, : flat.shape[1] // 2]
    cut = torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept))
    return base + cut.sum(0).reshape(base.shape)


def breadcrumbs(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Sort, drop the first 1 % and the last 9 %, add."""
    flat = deltas.reshape(len(deltas), -1)
    size = flat.shape[1]
    kept, first = int(size * 0.9), int(size * 0.01)
    order = flat.abs().argsort(dim=1, descending=True)[:, first : first + kept]
    cut = torch.zeros_like(flat).scatter_(1, order, flat.gather(1, order))
    return base + cut.sum(0).reshape(base.shape)


def dare(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Draw, drop half, double, add."""
    return base + (deltas * torch.bernoulli(torch.full_like(deltas, 0.5)) / 0.5).sum(0)


def della(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Ranks of every row by two sorts, draw, keep the L1 norm, add."""
    ranks = deltas.abs().argsort(dim=-1).argsort(dim=-1) / (deltas.shape[-1] - 1)
    kept = deltas * torch.bernoulli(0.35 + 0.3 * ranks)
    scale = deltas.abs().sum((1, 2)) / kept.abs().sum((1, 2))
    return base + (kept * scale[:, None, None]).sum(0)


def ties(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Sort all magnitudes of a model, keep a fifth, elect, average what agrees."""
    flat = deltas.reshape(len(deltas), -1)
    cut = flat.abs().kthvalue(flat.shape[1] - int(flat.shape[1] * 0.2), dim=1, keepdim=True).values
    kept = flat * (flat.abs() >= cut)
    sign = kept.sum(0).sign()
    agree = torch.where(kept.sign() == sign, kept, 0.0)
    return base + (agree.sum(0) / (agree != 0).sum(0).clamp(min=1)).reshape(base.shape)


def emr(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    sign = deltas.sum(0).sign()
    return base + sign * torch.where(deltas.sign() == sign, deltas.abs(), 0.0).amax(0)


def magmax(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    return base + deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


def consensus(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    tau = deltas.sum(0)
    return base + tau * ((deltas.abs() > 0.4 * (tau - deltas).abs()).sum(0) >= 2)


def sce(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    energy = deltas.square().mean((1, 2))
    shares = energy / energy.sum() if energy.sum() >= 1e-6 else torch.full_like(energy, 1 / len(energy))
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    weights = shares[:, None, None] * (deltas.sign() == sign)
    return base + (weights * deltas).sum(0) / weights.sum(0).clamp(min=1e-12)


def pcb(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Sort for the clip, balance inside and between tasks, sort for the tenth that is kept."""
    count, flat = len(deltas), deltas.reshape(len(deltas), -1)
    size = flat.shape[1]

    def normal(x: Tensor) -> Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low)

    rising = flat.abs().sort(dim=1).values
    places = int(size * 1e-4), int(size * (1 - 1e-4) - 1)
    clipped = flat.abs().clamp(rising[:, places[0], None], rising[:, places[1], None])
    scores = torch.exp(count * normal(clipped).square()) * torch.tanh(flat * flat.sum(0))
    floor = scores.sort(dim=1).values[:, int(size * 0.9), None]
    scale = normal(scores.clamp(min=floor))
    merged = (flat.sign() * clipped * scale).sum(0) / scale.sum(0).clamp(min=1e-12)
    return base + merged.reshape(base.shape)


def widen(experts: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Lengths and directions of all columns, two sorts for the ranks of each, softmax over the models."""
    columns = base.shape[1]
    sizes = (experts.norm(dim=1) - base.norm(dim=0)).abs()
    turns = 1 - torch.nn.functional.cosine_similarity(experts, base.expand_as(experts), dim=1)
    total = torch.zeros_like(sizes)
    for change in (sizes, turns):
        ranks = change.argsort(dim=1, stable=True).argsort(dim=1) / columns
        total += torch.where(ranks > ranks.mean(1, keepdim=True), 1.0, ranks.softmax(0))
    return base + ((experts - base) * (total / 2)[:, None]).sum(0)


# --- angles ------------------------------------------------------------------------------------------


def slerp(experts: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    a, b = base, experts[0]
    cosine = float((a / a.norm()).flatten() @ (b / b.norm()).flatten())
    if abs(cosine) > 0.9995:
        return (a + b) / 2
    angle = math.acos(cosine)
    return (a + b) * (math.sin(angle / 2) / math.sin(angle))


def karcher(experts: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Ten steps on whole unit vectors."""
    flat = experts.reshape(len(experts), -1)
    lengths = flat.norm(dim=1, keepdim=True)
    units = flat / lengths
    mean = units.mean(0)
    mean = mean / mean.norm()
    for _step in range(10):
        angles = (units @ mean).clamp(-1, 1).acos()[:, None]
        factors = torch.where(angles > 1e-5, angles / angles.sin(), 0.0)
        pull = (factors * (units - angles.cos() * mean)).mean(0)
        length = pull.norm()
        if length < 1e-5:
            break
        mean = length.cos() * mean + length.sin() * pull / length
    return (mean * lengths.mean()).reshape(base.shape)


def model_stock(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    n, flat = len(deltas), deltas.reshape(len(deltas), -1)
    units = flat / flat.norm(dim=1, keepdim=True)
    cosine = ((units @ units.T).sum() - n) / (n * (n - 1))
    return base + deltas.mean(0) * (n * cosine / (1 + (n - 1) * cosine))


# --- whole decompositions ----------------------------------------------------------------------------


def tsvm(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    return base + whole_svds(deltas)


def iso_c(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    u, s, v = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return base + s.mean() * (u @ v)


def iso_cts(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    count, size = len(deltas), min(base.shape)
    own = min(round((size - int(size * 0.8 + 1e-9)) / count), size // count)
    common = size - own * count
    u, s, v = (part[..., :common] if i < 2 else part[:common] for i, part in enumerate(_svd(deltas.sum(0))))
    lefts, strengths, rights = [u], [s], [v]
    for delta in deltas:
        a, b, c = _svd(delta - u @ (u.T @ delta))
        lefts, strengths, rights = [*lefts, a[:, :own]], [*strengths, b[:own]], [*rights, c[:own]]
    pu, _, qu = _svd(torch.cat(lefts, 1))
    pv, _, qv = _svd(torch.cat(rights, 0))
    return base + torch.cat(strengths).mean() * (pu @ qu @ pv @ qv)


def knots(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """One SVD of all task vectors side by side; elect and average in its coordinates."""
    count = len(deltas)
    u, s, v = _svd(torch.cat(list(deltas), 1))
    z = torch.stack((s[:, None] * v).chunk(count, 1))
    sign = z.sum(0).sign()
    agree = torch.where(z.sign() == sign, z, 0.0)
    return base + u @ (agree.sum(0) / (agree != 0).sum(0).clamp(min=1))


def opcm(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """A whole SVD of what is merged so far for every model after the first."""
    total = deltas[0]
    for delta in deltas[1:]:
        u, s, v = _svd(total)
        rank = int((s.cumsum(0) / s.sum() <= 0.5).sum())
        taken = u.T @ delta @ v.T
        taken[:rank, :rank] = 0
        taken.fill_diagonal_(0)
        total = total + u @ taken @ v + (delta - u @ (u.T @ delta @ v.T) @ v)
    return base + total * (deltas.flatten(1).norm(dim=1).mean() / total.norm())


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v


# --- with statistics ---------------------------------------------------------------------------------


def fisher(experts: Tensor, base: Tensor, stat: Tensor | None) -> Tensor:
    assert stat is not None
    weights = (stat + 1e-6) / (stat.flatten(1).norm(dim=1) + 1e-6)[:, None, None]
    return (weights * experts).sum(0) / weights.sum(0)


def ota(experts: Tensor, base: Tensor, stat: Tensor | None) -> Tensor:
    assert stat is not None
    powers = stat.sqrt()
    weights = powers + 1e-6 * powers.mean()
    return (weights * experts).sum(0) / weights.sum(0)


def regmean(experts: Tensor, base: Tensor, stat: Tensor | None) -> Tensor:
    """Off-diagonal entries times 0.9, and the inverse of the sum."""
    assert stat is not None
    eye = torch.eye(stat.shape[-1])
    grams = stat * (0.9 + 0.1 * eye)
    return (experts @ grams).sum(0) @ torch.linalg.inv(grams.sum(0))


PLAIN: Mapping[str, Way] = {
    **{way.__name__: way for way in (linear, widen, slerp, karcher, fisher, ota, regmean)},
    **{
        way.__name__: _of_deltas(way)
        for way in (
            task_arithmetic,
            magnitude,
            breadcrumbs,
            dare,
            della,
            ties,
            emr,
            magmax,
            consensus,
            sce,
            pcb,
            model_stock,
            tsvm,
            iso_c,
            iso_cts,
            knots,
            opcm,
            *(getattr(plain_loops, name) for name in plain_loops.__all__),
            *(getattr(plain_codecs, name) for name in plain_codecs.__all__),
        )
    },
    "r_tsvm": _of_deltas(tsvm),
}
"""Method -> its plain way.  Filters stand before (consensus: behind) task_arithmetic, as in the measurement."""
