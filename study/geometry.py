"""How independently trained networks lie to each other, on pictures and verse: alignment and tangent space.

    python -m study.geometry mlp DATA          MLPs on CIFAR-10: barrier against width, aligned in three ways
    python -m study.geometry partial DATA      PLeaS at 1.0, 1.2, 1.5 and 2.0 times the operations
    python -m study.geometry transformer DATA  a small ViT on CIFAR-10 and a small Llama on Shakespeare, two seeds each
    python -m study.geometry tangent DATA      linear against ordinary fine-tuning: addition, negation, disentanglement

DATA holds cifar10_12k.npz and tinyshakespeare.txt.  Each takes a few minutes of one core; tables in Markdown.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from study.align import row
from weightsmith.align.barrier import Outcomes, curve
from weightsmith.align.data import Pair, by_activations, learned
from weightsmith.align.disentangle import disentanglement_map
from weightsmith.align.layout import layout
from weightsmith.align.leastsquares import Normal
from weightsmith.align.many import match_activations
from weightsmith.align.match import match, profits
from weightsmith.align.partial import Split, expanded, flops, ratio_for, split
from weightsmith.align.ste import straight_through
from weightsmith.align.traced import traced
from weightsmith.align.zipit import Zip, zipped, zipped_weight
from weightsmith.core.symmetry import permute
from weightsmith.io.read.open import open_source
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model
from weightsmith.observe.outcomes import outcomes
from weightsmith.observe.tangent import Linearized, advantage

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
WIDTHS = (32, 128, 512)
STEPS, BATCH = 600, 64
BUDGETS = (1.0, 1.2, 1.5, 2.0)


def pictures(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CIFAR-10 halved to 16x16: images [n, 3, 16, 16] and labels, to train and to test."""
    found = np.load(folder / "cifar10_12k.npz")
    sides = [torch.tensor(found[n]).permute(0, 3, 1, 2).float() / 128 - 1 for n in ("x_train", "x_test")]
    x, test = (nn.functional.avg_pool2d(s, 2) for s in sides)
    return x, torch.tensor(found["y_train"]).long(), test, torch.tensor(found["y_test"]).long()


def fit(
    run: Callable[[Tensor], Tensor], parameters: Any, x: Tensor, y: Tensor, seed: int, steps: int, lr: float
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - step / steps)
        chosen = torch.randint(len(x), (BATCH,), generator=draw)
        loss = cross_entropy(run(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measured(module: nn.Module, x: Tensor, y: Tensor) -> Outcomes:
    with torch.no_grad():
        logits = module(x)
    loss = cross_entropy(logits, y, reduction="none")
    return Outcomes(*(t.double().numpy() for t in (loss, logits.argmax(-1) == y, torch.ones(len(y)))))


# --- MLPs ------------------------------------------------------------------------------------------


def net(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (768, width, width):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def heads(*first: str) -> None:
    """Columns of a table: what was trained, midpoint and barrier, plain and aligned in each way."""
    ways = ("weights", "activations", "gradients")
    names = (*first, "midpoint", *ways, "barrier", *ways)
    row(names)
    row(["---"] * len(names))


def trained(width: int, seed: int, x: Tensor, y: Tensor) -> nn.Sequential:
    torch.manual_seed(seed)
    made = net(width)
    fit(made, made.parameters(), x, y, seed, STEPS, 1e-3)
    return made.eval()


def mlp(data: Path) -> None:
    x, y, test, labels = pictures(data)
    heads("width", "accuracy")
    for width in WIDTHS:
        first, second = (trained(width, seed, x, y) for seed in (0, 1))
        groups = traced(first, test[:2]).groups
        a, b = dict(first.state_dict()), dict(second.state_dict())
        acts = [{g.name: m[: int(g.name) + 2](x[:2000]).detach() for g in groups} for m in (first, second)]
        parts = [(x[i : i + 500], y[i : i + 500]) for i in range(0, 6000, 500)]
        found = [
            match(groups, a, b, restarts=3).orders,
            match_activations(groups, acts[0], acts[1]),
            straight_through(net(width), groups, a, b, parts, lambda run, p: cross_entropy(run(p[0]), p[1])).orders,
        ]
        others = [second]
        for orders in found:
            state = dict(b)
            for group in groups:
                state |= permute(state, group, orders)
            others.append(net(width).eval())
            others[-1].load_state_dict(state)
        lines = [curve(first, o, lambda m: measured(m, test, labels), points=11, resamplings=0) for o in others]
        ends = (lines[0].accuracy[0] + lines[0].accuracy[-1]) / 2
        row(
            [
                width,
                f"{ends:.1%}",
                *(f"{line.accuracy[5]:.1%}" for line in lines),
                *(f"{line.barrier:.3f}" for line in lines),
            ]
        )


def partial(data: Path) -> None:
    """Two MLPs of 128 units; every layer's weights by the profits alone, and by least squares."""
    x, y, test, labels = pictures(data)
    first, second = (trained(128, seed, x, y) for seed in (0, 1))
    groups = traced(first, test[:2]).groups
    a, b = dict(first.state_dict()), dict(second.state_dict())
    orders = match(groups, a, b, restarts=3).orders
    sizes = [(128.0 * 768, None, True), (128.0 * 128, True, True), (128.0 * 128, True, True), (1280.0, True, None)]

    def cost(ratio: float) -> float:
        return flops([(n, ratio if i else None, ratio if o else None) for n, i, o in sizes])

    with torch.no_grad():
        hidden = [[m[: int(g.name) + 2](x) for m in (first, second)] for g in groups]
    with np.errstate(invalid="ignore"):  # units that are never on: NaN, which counts as no likeness
        alike = [np.corrcoef(torch.cat(pair, 1).numpy(), rowvar=False) for pair in hidden]

    def zipit(width: int) -> nn.Module:
        """Both networks as one by correlated features, all its layers of a width and without zeros inside."""
        zips: list[Zip | None] = [None, *(zipped(one, 1 - width / 256) for one in alike), None]
        layers: list[nn.Module] = [nn.Flatten()]
        for i, number in enumerate((1, 3, 5, 7)):
            weight = zipped_weight(a[f"{number}.weight"], b[f"{number}.weight"], zips[i + 1], zips[i])
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            bias = zipped_weight(a[f"{number}.bias"], b[f"{number}.bias"], zips[i + 1])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1]).eval()

    row(("budget", "kept apart", "width", "weights alone", "least squares", "ZipIt of that width"))
    row(["---"] * 6)
    for budget in BUDGETS:
        keep = ratio_for(budget, cost)
        splits: list[Split | None] = [
            None,
            *(split(profits(g, a, b, orders, groups), orders[g.name], keep) for g in groups),
            None,
        ]
        scores = []
        for fitting in (False, True):
            layers: list[nn.Module] = [nn.Flatten()]
            for i, number in enumerate((1, 3, 5, 7)):
                columns, rows = splits[i], splits[i + 1]
                weight = expanded(a[f"{number}.weight"], b[f"{number}.weight"], rows, columns)
                bias = expanded(a[f"{number}.bias"], b[f"{number}.bias"], rows)
                if fitting:
                    sums = Normal(rows, columns)
                    with torch.no_grad():
                        into = (first[:number](x), second[:number](x))
                        sums.add(into, (first[number](into[0]), second[number](into[1])))
                    done = sums.solve()
                    weight, bias = done.weight.float(), done.bias.float()
                layer = nn.Linear(weight.shape[1], weight.shape[0])
                layer.load_state_dict({"weight": weight, "bias": bias})
                layers += [layer, nn.ReLU()]
            scores.append(measured(nn.Sequential(*layers[:-1]).eval(), test, labels).hits.mean())
        one = splits[1]
        assert one is not None
        scores.append(measured(zipit(one.width), test, labels).hits.mean())
        row([budget, f"{keep:.0%}", one.width, *(f"{s:.1%}" for s in scores)])
    alone = [measured(m, test, labels).hits.mean() for m in (first, second)]
    with torch.no_grad():
        both = (first(test).softmax(-1) + second(test).softmax(-1)).argmax(-1) == labels
    row(["ensemble", "", "", f"{both.float().mean():.1%}", "", f"each alone {np.mean(alone):.1%}"])


# --- transformers ----------------------------------------------------------------------------------


def transformer(data: Path) -> None:
    import transformers

    x, y, test, labels = pictures(data)
    text = torch.tensor(list((data / "tinyshakespeare.txt").read_bytes()))
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    heads("model", "loss")
    with tempfile.TemporaryDirectory() as name:
        for kind in ("vit", "llama"):
            places = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                made: Any
                if kind == "vit":
                    made = transformers.ViTForImageClassification(
                        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10)
                    )
                    fit(lambda xs, made=made: made(xs).logits, made.parameters(), x, y, seed, STEPS, 1e-3)
                else:
                    made = transformers.LlamaForCausalLM(
                        transformers.LlamaConfig(**sizes, vocab_size=256, num_key_value_heads=2)
                    )
                    blocks = text[: len(text) // 65 * 65].reshape(-1, 65)
                    fit(lambda xs, made=made: made(xs).logits.transpose(1, 2), made.parameters(), blocks[:, :-1],
                        blocks[:, 1:], seed, STEPS, 1e-3)  # fmt: skip
                places.append(Path(name) / f"{kind}{seed}")
                made.save_pretrained(places[-1])
            _line(kind, places, x, y, test, labels, text)


def _line(kind: str, places: Sequence[Path], x: Tensor, y: Tensor, test: Tensor, labels: Tensor, text: Tensor) -> None:
    one, two = (load_model(p, device="cpu") for p in places)
    if kind == "vit":
        known: list[Any] = list(zip(x[:600], y[:600].tolist(), strict=True))
        held: list[Any] = list(zip(test[:1000], labels[:1000].tolist(), strict=True))
    else:
        known, held = ([part[i * 64 : (i + 1) * 64] for i in range(200)] for part in (text, text[-13000:]))
    pair = Pair(one, two, read_examples(known, one, examples=len(known)), 32)
    seen = read_examples(held, one, examples=len(held))
    sources = [open_source(p) for p in places]
    groups = layout(sources[0]).groups
    states = [{n: s.read(n) for n in s.keys} for s in sources]
    found = [
        match(groups, states[0], states[1], restarts=3).orders,
        by_activations(sources[1], groups, pair),
        learned(groups, pair, epochs=2, lr=1e-2),
    ]

    def module(orders: Mapping[str, np.ndarray] | None) -> nn.Module:
        state = dict(states[1])
        for group in groups if orders is not None else ():
            state |= permute(state, group, orders)
        return load_model(places[1], kind=one.kind, device="cpu", state=state).module

    def measure(network: nn.Module) -> Outcomes:
        from dataclasses import replace

        return Outcomes(*outcomes(replace(one, module=network), seen, 64))

    lines = [curve(one.module, module(orders), measure, points=11, resamplings=0) for orders in (None, *found)]
    ends = (lines[0].loss[0] + lines[0].loss[-1]) / 2
    row([kind, f"{ends:.3f}", *(f"{line.loss[5]:.3f}" for line in lines), *(f"{line.barrier:.3f}" for line in lines)])


# --- tangent space ---------------------------------------------------------------------------------


def tangent(data: Path) -> None:
    """Two tasks: the first and the last five classes of CIFAR-10, from a network that knows all of them a little."""
    x, y, test, labels = pictures(data)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.Flatten(),
                         nn.Linear(1024, 128), nn.GELU(), nn.Linear(128, 10))  # fmt: skip
    fit(base, base.parameters(), x, y, 0, 200, 1e-3)
    base.eval()
    tasks = [(y < 5, labels < 5), (y >= 5, labels >= 5)]
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    vectors: dict[str, list[dict[str, Tensor]]] = {"ordinary": [], "linear": []}
    for own, _ in tasks:
        linear = Linearized(base)
        fit(linear, linear.theta.parameters(), x[own], y[own], 1, 400, 3e-4)
        vectors["linear"].append({n: d.detach() for n, d in linear.delta.items()})
        other = Linearized(base).origin.requires_grad_(True)
        fit(other, other.parameters(), x[own], y[own], 1, 400, 3e-4)
        vectors["ordinary"].append({n: p.detach() - start[n] for n, p in other.named_parameters()})
    vectors["post hoc"] = vectors["ordinary"]

    def accuracy(kind: str, coefficients: Sequence[float], inside: Tensor) -> float:
        delta = {n: sum(a * v[n] for a, v in zip(coefficients, vectors[kind], strict=True)) for n in start}
        with torch.no_grad():
            if kind == "ordinary":
                out = torch.func.functional_call(base, {n: start[n] + delta[n] for n in start}, (test[inside],))
            else:
                out = sum(Linearized(base).terms(delta, test[inside]))  # type: ignore[arg-type, assignment]
        return float((out.argmax(-1) == labels[inside]).float().mean())

    everything = torch.ones(len(test), dtype=torch.bool)
    row(
        (
            "fine-tuning",
            "one task",
            "both added",
            "coefficient",
            "of single",
            "target after negation",
            "control",
            "xi (mean)",
            "xi (1, 1)",
        )
    )
    row(["---"] * 9)
    kept = [accuracy("ordinary", (0, 0), inside) for _, inside in tasks]
    row(["none", f"{np.mean(kept):.1%}", f"{accuracy('ordinary', (0, 0), everything):.1%}", *[""] * 6])
    singles = {}
    for kind in ("ordinary", "post hoc", "linear"):
        alone = [accuracy(kind, (1, 0), tasks[0][1]), accuracy(kind, (0, 1), tasks[1][1])]
        singles[kind] = float(np.mean(alone))
        best = max((np.mean([accuracy(kind, (a, a), inside) for _, inside in tasks]), a) for a in np.linspace(0, 1, 11))
        gone = []
        for t in (0, 1):
            tried = [(a, [0.0, 0.0]) for a in np.linspace(0, 1, 11)]
            scores = []
            for a, c in tried:
                c[t] = -float(a)
                scores.append((accuracy(kind, c, tasks[t][1]), accuracy(kind, c, tasks[1 - t][1])))
            gone.append(min(s for s in scores if s[1] >= 0.95 * kept[1 - t]))
        model: nn.Module = base if kind == "ordinary" else Linearized(base)
        xi = disentanglement_map(
            model, vectors[kind], [[test[inside]] for _, inside in tasks], tuple(np.linspace(-2, 2, 9))
        )
        target, control = np.mean(gone, axis=0)
        row([kind, f"{singles[kind]:.1%}", f"{best[0]:.1%}", f"{best[1]:.1f}", f"{best[0] / singles[kind]:.2f}",
             f"{target:.1%}", f"{control:.1%}", f"{xi.mean():.3f}", f"{xi[6, 6]:.3f}"])  # fmt: skip
    lost = advantage(1 - singles["linear"], 1 - singles["ordinary"], 5)
    row([f"non-linear advantage {lost:.3f}", *[""] * 8])


def main() -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], None]] = {
        "mlp": mlp, "partial": partial, "transformer": transformer, "tangent": tangent
    }  # fmt: skip
    parts[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
