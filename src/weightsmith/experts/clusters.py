"""Which experts become one, or which stay: the ways of the literature, from statistics of `observe --stat routing`.

    reap     keep those with the largest mean of gate x output length (Lasby et al., arXiv:2510.13999)
    m_smoe   the most used ones found groups, the others join by router logits (Li et al., arXiv:2310.01334)
    sub_moe  k-means on outputs of unit length (Li et al., arXiv:2506.23266; from the paper's text)
    hc_smoe  average linkage of mean outputs (Chen et al., arXiv:2410.08589)
    ream     the most salient ones take the nearest, group by group (Jha et al., arXiv:2604.04356)

REAM's authors also merge layer after layer with new activations, and align by activations too: not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsmith.experts.grouping import cosines, group, shares

__all__ = ["WAYS", "Grouping", "Seen", "Way", "average_linkage", "grouped", "k_means", "pseudo_groups"]

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

_GROUP = 16  # REAM: experts in a group, at most
_RESTARTS = 10


@dataclass(frozen=True)
class Seen:
    """What was observed of one layer's E experts; see `observe.routing`."""

    counts: Floats
    saliency: Floats
    logits_gram: Floats
    outputs_cosine: Floats
    means_gram: Floats
    gated_means_gram: Floats

    def cut(self, low: int, high: int) -> Seen:
        """Of experts low..high alone."""
        cut = slice(low, high)
        return Seen(*(v[cut] if v.ndim == 1 else v[cut, cut] for v in vars(self).values()))

    @property
    def usage(self) -> Floats:
        """Share of all choices that fell on each expert."""
        return self.counts / max(float(self.counts.sum()), 1.0)


@dataclass(frozen=True)
class Grouping:
    """What becomes of a layer's experts.

    labels   of each: its new number, -1 if it goes; numbered by their smallest members
    shares   of each: its weight in the new one
    leaders  of each new one: the expert whose hidden units are the pattern for the others'
    """

    labels: tuple[int, ...]
    shares: tuple[float, ...]
    leaders: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.leaders)

    def members(self, number: int) -> list[int]:
        """Who a new expert is made of, its leader first."""
        found = [e for e, label in enumerate(self.labels) if label == number]
        return sorted(found, key=lambda e: e != self.leaders[number])

    @property
    def merges(self) -> bool:
        """Whether any new expert is made of several."""
        return self.count < sum(label >= 0 for label in self.labels)


@dataclass(frozen=True)
class Way:
    """A way to group.

    labels   (what was seen, number of groups) -> label of each expert, -1 if it goes
    weight   'usage' or 'saliency': how much a member counts, and who leads
    router   'mean': rows of the router are averaged as the weights are; 'leader': the leader's stays
    purpose  one line for tables
    prunes   experts go, none are merged
    """

    labels: Callable[[Seen, int], Labels]
    purpose: str
    weight: str = "usage"
    router: str = "mean"
    prunes: bool = False


def _kept(seen: Seen, count: int) -> Labels:
    labels = np.full(len(seen.saliency), -1, np.int64)
    labels[np.argsort(-seen.saliency, kind="stable")[:count]] = np.arange(count)
    return labels


def _by_logits(seen: Seen, count: int) -> Labels:
    return group(seen.usage, (cosines(seen.logits_gram) + 1) / 2, count)


def _by_outputs(seen: Seen, count: int) -> Labels:
    values, vectors = np.linalg.eigh(np.asarray(seen.outputs_cosine, np.float64))
    return k_means(vectors * np.sqrt(np.clip(values, 0, None)), count)


def _by_means(seen: Seen, count: int) -> Labels:
    return average_linkage(_distances(seen.means_gram), count)


def _by_both(seen: Seen, count: int) -> Labels:
    logits = np.sqrt(np.clip(2 - 2 * cosines(seen.logits_gram), 0, None))
    alike = (cosines(seen.gated_means_gram) + 1) / 2 + 1 - logits / max(float(logits.max()), 1e-300)
    return pseudo_groups(seen.saliency, 1 - alike / 2, count)


WAYS: Mapping[str, Way] = {
    "reap": Way(_kept, "keep the experts with the largest gate x output length", "saliency", "leader", True),
    "m_smoe": Way(_by_logits, "merge by router logits around the most used"),
    "sub_moe": Way(_by_outputs, "merge by k-means of outputs, in a shared subspace"),
    "hc_smoe": Way(_by_means, "merge by hierarchical clustering of mean outputs"),
    "ream": Way(_by_both, "merge around the most salient", "saliency", "leader"),
}


def grouped(way: Way, seen: Seen, count: int, parts: int = 1) -> Grouping:
    """What becomes of a layer's experts: `count` in all, as many of each of the `parts` that the router has them in."""
    total, labels = len(seen.counts), list[int]()
    size = total // parts
    for low in range(0, total, size):
        found = way.labels(seen.cut(low, low + size), count // parts)
        labels += [int(v) + low * total if v >= 0 else -1 for v in found]  # unlike numbers in unlike parts
    order = {label: n for n, label in enumerate(dict.fromkeys(label for label in labels if label >= 0))}
    labels = [order.get(label, -1) for label in labels]
    weight = seen.usage if way.weight == "usage" else _positive(seen.saliency)
    parted, leaders = np.zeros(total), list[int]()
    for number in range(len(order)):
        members = [e for e, label in enumerate(labels) if label == number]
        parted[members] = shares([float(weight[e]) for e in members])
        leaders.append(max(members, key=lambda e: (weight[e], -e)))
    return Grouping(tuple(labels), tuple(parted.tolist()), tuple(leaders))


def _positive(saliency: Floats) -> Floats:
    """Experts that never ran count as the least of those that did, and half at most, as REAM's authors have it."""
    used = saliency[saliency > 0]
    return np.where(saliency > 0, saliency, min(0.5, float(used.min())) if len(used) else 1.0)


# --- clustering ------------------------------------------------------------------------------------


def k_means(points: Floats, count: int, seed: int = 0) -> Labels:
    """Labels [n] of points [n, m]: k-means++, the best of ten starts; an empty cluster takes the farthest point."""
    random = np.random.default_rng(seed)
    best, lowest = np.zeros(len(points), np.int64), np.inf
    for _ in range(_RESTARTS):
        centres = _spread(points, count, random)
        labels = np.full(len(points), -1, np.int64)
        for _ in range(100):
            squares = ((points[:, None] - centres[None]) ** 2).sum(-1)
            now = squares.argmin(1)
            for empty in set(range(count)) - set(now.tolist()):
                counts = np.bincount(now, minlength=count)
                far = np.where(counts[now] > 1, squares[np.arange(len(points)), now], -1).argmax()
                now[far] = empty
            if (now == labels).all():
                break
            labels = now
            centres = np.stack([points[labels == c].mean(0) for c in range(count)])
        spread = float(((points - centres[labels]) ** 2).sum())
        if spread < lowest - 1e-12:
            best, lowest = labels, spread
    return best


def _spread(points: Floats, count: int, random: np.random.Generator) -> Floats:
    """Centres far from each other: each drawn by its squared distance to those before."""
    chosen = [int(random.integers(len(points)))]
    while len(chosen) < count:
        squares = ((points[:, None] - points[chosen][None]) ** 2).sum(-1).min(1)
        squares[chosen] = 0
        free = [i for i in range(len(points)) if i not in chosen]
        odds = squares / squares.sum() if squares.sum() > 0 else np.isin(np.arange(len(points)), free) / len(free)
        chosen.append(int(random.choice(len(points), p=odds)))
    return points[chosen]


def average_linkage(distances: Floats, count: int) -> Labels:
    """Labels [n] of n points with distances [n, n]: the two nearest clusters, on average, become one until `count`."""
    far = np.array(distances, np.float64)
    np.fill_diagonal(far, np.inf)
    sizes, labels = np.ones(len(far)), np.arange(len(far))
    for _ in range(len(far) - count):
        i, j = sorted(divmod(int(far.argmin()), len(far)))
        with np.errstate(invalid="ignore"):
            merged = (sizes[i] * far[i] + sizes[j] * far[j]) / (sizes[i] + sizes[j])
        far[i], far[:, i] = merged, merged
        far[i, i] = far[j] = far[:, j] = np.inf
        sizes[i] += sizes[j]
        labels[labels == j] = i
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def pseudo_groups(saliency: Floats, distances: Floats, count: int, size: int = _GROUP) -> Labels:
    """Labels [n]: the `count` most salient in turn take the nearest that are left, until they are `size` together."""
    size = max(size, -(-len(saliency) // count))
    centres = np.argsort(-saliency, kind="stable")[:count]
    labels = np.full(len(saliency), -1, np.int64)
    labels[centres] = np.arange(count)
    for number, centre in enumerate(centres):
        free = [e for e in np.argsort(distances[centre], kind="stable") if labels[e] < 0]
        labels[free[: size - 1]] = number
    return labels


def _distances(gram: Floats) -> Floats:
    squares = np.diag(gram)
    return np.sqrt(np.clip(squares[:, None] + squares[None] - 2 * np.asarray(gram, np.float64), 0, None))
