"""Which experts become one: planted clusters, references of scipy, closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightsmith.experts.clusters import WAYS, Seen, average_linkage, grouped, k_means, pseudo_groups
from weightsmith.experts.grouping import affinity, budget, cosines, shares
from weightsmith.experts.stacks import Part


def seen(labels: list[int], counts: list[float] | None = None, seed: int = 0) -> Seen:
    """Experts whose logits and outputs are near to those of their cluster."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(max(labels) + 1, 40))
    points = np.stack([centres[label] + 0.05 * random.normal(size=40) for label in labels])
    gram = points @ points.T
    used = np.asarray(counts or random.integers(1, 50, len(labels)), np.float64)
    return Seen(used, used[::-1].copy(), gram, cosines(gram), gram, gram)


@pytest.mark.parametrize("by", ["sub_moe", "hc_smoe"])
def test_separated_clusters_are_found(by: str) -> None:
    for seed in range(5):
        labels = [0, 1, 2, 0, 2, 1, 1, 3]
        found = grouped(WAYS[by], seen(labels, seed=seed), 4)
        assert list(found.labels) == labels


def test_the_most_used_expert_of_each_cluster_founds_it() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    counts = [9.0, 1, 8, 1, 7, 1]
    found = grouped(WAYS["m_smoe"], seen(labels, counts), 3)
    assert list(found.labels) == labels
    assert found.leaders == (0, 2, 4)
    assert found.shares == pytest.approx([0.9, 0.1, 8 / 9, 1 / 9, 7 / 8, 1 / 8], rel=1e-4)


def test_pruning_keeps_the_most_salient_in_their_order() -> None:
    observed = seen([0, 1, 2, 3, 4], [5.0, 1, 4, 2, 3])  # saliency is the counts backwards
    found = grouped(WAYS["reap"], observed, 3)
    assert found.labels == (0, -1, 1, -1, 2)
    assert found.leaders == (0, 2, 4)
    assert not found.merges


def test_parts_of_a_router_stay_apart() -> None:
    labels = [0, 1, 0, 1, 0, 1, 0, 1]
    found = grouped(WAYS["hc_smoe"], seen(labels), 4, parts=2)
    assert found.labels == (0, 1, 0, 1, 2, 3, 2, 3)
    pruned = grouped(WAYS["reap"], seen(labels, [8.0, 7, 6, 5, 4, 3, 2, 1]), 4, parts=2)
    assert pruned.labels == (-1, -1, 0, 1, -1, -1, 2, 3)


def test_average_linkage_is_scipys() -> None:
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist, squareform

    for seed in range(8):
        points = np.random.default_rng(seed).normal(size=(12, 3))
        theirs = fcluster(linkage(points, "average"), 4, "maxclust")
        ours = average_linkage(squareform(pdist(points)), 4)
        assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == 4


def test_k_means_is_no_worse_than_scikits() -> None:
    from sklearn.cluster import KMeans

    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(30, 4))
        ours = k_means(points, 5)
        within = sum(((points[ours == c] - points[ours == c].mean(0)) ** 2).sum() for c in range(5))
        assert within <= 1.03 * KMeans(5, n_init=10, random_state=0).fit(points).inertia_
    same = k_means(np.zeros((6, 2)), 3)
    assert sorted(set(same.tolist())) == [0, 1, 2]  # no group stays empty


def test_k_means_of_the_gram_is_that_of_the_outputs() -> None:
    """Squared distances of unit vectors are 2 - 2 cos: their Gram is all that is needed."""
    random = np.random.default_rng(1)
    outputs = random.normal(size=(9, 50, 6))
    outputs /= np.linalg.norm(outputs, axis=-1, keepdims=True)
    flat = outputs.reshape(9, -1) / np.sqrt(50)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    rows = vectors * np.sqrt(np.clip(values, 0, None))
    ours, theirs = k_means(rows, 3), k_means(flat, 3)
    assert len({*zip(ours.tolist(), theirs.tolist(), strict=True)}) == 3


def test_pseudo_groups_fill_up_in_turn() -> None:
    distances = np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    labels = pseudo_groups(np.array([6.0, 0, 0, 5, 0, 0]), distances, 2, size=3)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    crowded = pseudo_groups(np.array([6.0, 0, 0, 5, 0, 0]), distances, 2, size=2)  # two of two would leave some
    assert (crowded >= 0).all()
    assert pseudo_groups(np.array([6.0, 0, 0, 5, 0, 0]), distances, 2).tolist() == [0, 0, 0, 1, 0, 0]


def test_ream_looks_at_outputs_and_logits() -> None:
    """The most salient expert takes those that are left, up to 16, by the mean of both likenesses."""
    observed = seen([0, 1, 2, 0], [1.0, 2, 8, 9])  # saliency is the counts backwards: 9, 8, 2, 1
    found = grouped(WAYS["ream"], observed, 2)
    assert found.labels == (0, 1, 0, 0)
    assert found.leaders == (0, 1)
    assert found.shares == pytest.approx([0.75, 1, 1 / 6, 1 / 12], rel=1e-4)
    many = grouped(WAYS["ream"], seen([i % 2 for i in range(40)], [1.0] * 38 + [8, 9]), 3)
    assert sorted(many.labels.count(n) for n in range(3)) == [8, 16, 16]
    first = many.labels[0]  # its own kind comes first: 20 of the 40, but the next two centres
    assert {e % 2 for e, label in enumerate(many.labels) if label == first} == {0}


def test_unused_experts_count_alike() -> None:
    assert shares([0, 0]) == [0.5, 0.5]
    assert shares([1.0, 0.0]) == pytest.approx([1.0, 0.0], abs=1e-6)
    found = grouped(WAYS["hc_smoe"], seen([0, 0, 1, 1], [0, 0, 3, 1.0]), 2)
    assert found.shares == pytest.approx([0.5, 0.5, 0.75, 0.25], abs=1e-5)


def test_cosines_from_a_gram_are_affinities() -> None:
    points = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    points[3] = 0
    found = (cosines((points.double() @ points.double().T).numpy()) + 1) / 2
    torch.testing.assert_close(torch.from_numpy(found), affinity(points))


def test_a_budget_leaves_every_layer_enough() -> None:
    usage = [np.array([0.97, 0.01, 0.01, 0.01]), np.array([0.25, 0.25, 0.25, 0.25])]
    assert budget(usage, 5) == [1, 4]
    assert budget(usage, 5, least=2) == [2, 3]
    assert budget(usage, 6, least=2) == [2, 4]


@pytest.mark.parametrize("part", [Part(0), Part(1), Part(1, out=1), Part(0, 2), Part(0, 2, True), Part(1, 2, True, 1)])
def test_hidden_units_of_a_part(part: Part) -> None:
    shape = (8, 6) if part.axis == 0 else (6, 8)
    tensor = torch.arange(48.0).reshape(shape)
    units = part.units(tensor)
    assert units is not None
    order = torch.tensor([2, 0, 3, 1]) if part.folds == 2 else torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])
    moved = part.ordered(tensor, order)
    again = part.units(moved)
    assert again is not None
    assert torch.equal(again, units[order])
    if part.axis == (1 if part.out else 0):
        assert torch.equal(part.joined(part.matrices(tensor)), tensor)


def test_a_bias_of_the_output_has_no_units() -> None:
    bias = torch.arange(6.0)
    assert Part(None).units(bias) is None
    assert Part(None).ordered(bias, torch.tensor([1, 0])) is bias
