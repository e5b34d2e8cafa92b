"""Averages of networks that were trained independently: as they are, aligned by weights, by activations, and in part.

    python -m study.align            two-layer MLPs on scikit-learn's digits, three pairs of seeds, a minute of one core

Prints two tables in Markdown: barriers against width, and partial merges against width of the result.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from weightsmith.align.barrier import Outcomes, curve
from weightsmith.align.leastsquares import Normal
from weightsmith.align.many import match_activations
from weightsmith.align.match import match, profits
from weightsmith.align.partial import Split, expanded, split
from weightsmith.align.traced import traced
from weightsmith.core.symmetry import Orders, SymmetryGroup, permute

WIDTHS = (16, 64, 256, 1024)
PAIRS = ((0, 1), (2, 3), (4, 5))
KEPT = (0.0, 0.2, 0.5, 1.0)
STEPS, BATCH, RATE = 300, 128, 1e-3
PARTIAL = 64  # units of the models that are merged in part


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 64] and labels: a seeded 80% to train on, the rest to test."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = torch.tensor(digits.data[order] / 16 - 0.3, dtype=torch.float32), torch.tensor(digits.target[order])
    cut = int(0.8 * len(x))
    return x[:cut], y[:cut], x[cut:], y[cut:]


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def trained(width: int, seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    made = net(width)
    optimizer = torch.optim.Adam(made.parameters(), RATE)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(made(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


def outcomes(module: nn.Module, x: Tensor, y: Tensor) -> Outcomes:
    with torch.no_grad():
        logits = module(x)
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    return Outcomes(*(t.double().numpy() for t in (loss, logits.argmax(-1) == y, torch.ones(len(y)))))


def hidden(module: nn.Sequential, groups: Sequence[SymmetryGroup], x: Tensor) -> dict[str, Tensor]:
    """Activations of each group: those of the layer that its name is of."""
    with torch.no_grad():
        return {group.name: module[: int(group.name) + 2](x) for group in groups}


def placed(module: nn.Sequential, groups: Sequence[SymmetryGroup], orders: Orders) -> nn.Sequential:
    state = dict(module.state_dict())
    for group in groups:
        state |= permute(state, group, orders)
    made = net(module[0].out_features)
    made.load_state_dict(state)
    return made.eval()


def wide(first: nn.Sequential, second: nn.Sequential, keep: float, x: Tensor | None) -> nn.Sequential:
    """A partial merge; x: inputs to fit its layers to, or None for the weights alone."""
    groups = traced(first, torch.zeros(2, 64)).groups
    a, b = first.state_dict(), second.state_dict()
    orders = match(groups, a, b).orders
    splits: list[Split | None] = [
        None,
        *(split(profits(g, a, b, orders, groups), orders[g.name], keep) for g in groups),
        None,
    ]
    layers: list[nn.Module] = []
    for i, number in enumerate((0, 2, 4)):
        columns, rows = splits[i], splits[i + 1]
        weight = expanded(a[f"{number}.weight"], b[f"{number}.weight"], rows, columns)
        bias = expanded(a[f"{number}.bias"], b[f"{number}.bias"], rows)
        if x is not None:
            fit = Normal(rows, columns)
            with torch.no_grad():
                into = (first[:number](x), second[:number](x))
                fit.add(into, (first[number](into[0]), second[number](into[1])))
            found = fit.solve()
            weight, bias = found.weight.float(), found.bias.float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def row(cells: Sequence[object]) -> None:
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
    sys.stdout.flush()


def main() -> None:
    x, y, test_x, test_y = data()

    def measure(module: nn.Module) -> Outcomes:
        return outcomes(module, test_x, test_y)

    row(("width", "accuracy", "midpoint", "by weights", "by activations", "barrier", "by weights", "by activations"))
    row(["---"] * 8)
    for width in WIDTHS:
        found = []
        for seeds in PAIRS:
            first, second = (trained(width, seed, x, y) for seed in seeds)
            groups = traced(first, torch.zeros(2, 64)).groups
            by_weights = match(groups, first.state_dict(), second.state_dict(), restarts=3).orders
            by_acts = match_activations(groups, hidden(first, groups, x), hidden(second, groups, x))
            others = [second, *(placed(second, groups, orders) for orders in (by_weights, by_acts))]
            lines = [curve(first, other, measure, points=11, resamplings=0) for other in others]
            ends = (lines[0].accuracy[0] + lines[0].accuracy[-1]) / 2
            found.append([ends, *(line.accuracy[5] for line in lines), *(line.barrier for line in lines)])
        mean = np.mean(found, axis=0)
        row([width, *(f"{v:.1%}" for v in mean[:4]), *(f"{v:.3f}" for v in mean[4:])])
    row(())
    row(("kept apart", "width", "weights alone", "least squares"))
    row(["---"] * 4)
    pairs = [[trained(PARTIAL, seed, x, y) for seed in seeds] for seeds in PAIRS]
    for keep in KEPT:
        made = [[wide(*pair, keep, fit) for fit in (None, x)] for pair in pairs]
        right = np.mean([[measure(m).hits.mean() for m in both] for both in made], axis=0)
        row([f"{keep:.0%}", made[0][0][0].out_features, *(f"{v:.1%}" for v in right)])


if __name__ == "__main__":
    main()
