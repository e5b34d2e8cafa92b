"""What the routers of a mixture of experts do on data, and what their experts make of it.

Of each layer, under the name of its experts' module (X.experts, E experts):

    X.experts.counts            [E]     how often an expert is chosen, over all tokens
    X.experts.gates             [E]     sum of the gates of those choices
    X.experts.saliency          [E]     mean of gate x length of the output over them (REAP, arXiv:2510.13999, eq. 9)
    X.experts.logits_gram       [E, E]  Z^T Z / tokens of the router's logits, without biases
    X.experts.outputs_gram      [E, E]  mean over a sample of tokens of <Y_e, Y_f>, every expert run on every one
    X.experts.outputs_cosine    [E, E]  of their cosines (Sub-MoE)
    X.experts.means_gram        [E, E]  <m_e, m_f> of the mean outputs (HC-SMoE)
    X.experts.gated_means_gram  [E, E]  of the mean of softmax-gated outputs (REAM)

and as a statistic of its own, `routed`: X.experts.inputs [E, d, d], X^T X / rows of the tokens routed to an expert.
Padding never counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightsmith.core.errors import NumericError, WeightsmithError
from weightsmith.observe.data import Batch, Example, batches
from weightsmith.observe.files import Statistic
from weightsmith.observe.gram import full_precision
from weightsmith.observe.memory import available_memory, size_text
from weightsmith.observe.mixtures import Mixture, Routed, mixtures
from weightsmith.observe.model import LoadedModel, resting

__all__ = ["SAMPLE", "Layer", "Sums", "refuse_large", "routing", "sample_of", "seen", "statistics", "token_mask"]

SAMPLE = 4096
"""Tokens on which every expert of a layer is run."""

_AT_ONCE = 1 << 25  # elements of outputs of all experts that are held together
_CHUNK = 1024


@dataclass(eq=False)
class Sums:
    """Running sums of one layer, in float64.  `moments`: also the second moments of what is routed."""

    mixture: Mixture
    moments: bool = False
    tokens: int = 0
    sampled: int = 0
    _of: dict[str, Tensor] = field(default_factory=dict)

    def see(self, routed: Routed, keep: Tensor, sample: Tensor) -> None:
        """One run: `keep` [tokens] bool, False at padding; `sample` [tokens] bool, of the common sample."""
        keep, sample = keep.to(routed.x.device), sample.to(routed.x.device)
        if len(keep) != len(routed.x):
            raise WeightsmithError(
                f"{self.mixture.name}: {len(routed.x)} rows for {len(keep)} tokens: nothing says which are padding"
            )
        count = self.mixture.count
        index, gates, norms = routed.index[keep], routed.gates[keep].double(), routed.norms[keep].double()
        self.tokens += len(index)
        for name, weight in (("counts", torch.ones_like(gates)), ("gates", gates), ("saliency", gates * norms)):
            self._add(
                name, torch.zeros(count).double().to(gates.device).index_add_(0, index.flatten(), weight.flatten())
            )
        for part in torch.split(routed.x[keep], _CHUNK):
            logits = self.mixture.logits(part)
            self._add("logits_gram", logits.T @ logits)
        if self.moments:
            self._second_moments(routed.x[keep].float(), index)
        self._common(routed.x[sample & keep])

    def _second_moments(self, x: Tensor, index: Tensor) -> None:
        count, width = self.mixture.count, self.mixture.width
        total = self._of.setdefault("inputs", torch.zeros(count, width, width, dtype=torch.float64))
        for number in range(count):
            rows = x[(index == number).any(1)]
            total[number] += (rows.T @ rows).cpu()

    def _common(self, x: Tensor) -> None:
        """Every expert on the same tokens."""
        count, width = self.mixture.count, self.mixture.width
        for part in torch.split(x, max(1, _AT_ONCE // (count * width))):
            outputs = torch.stack([out.float() for out in self.mixture.each(part)])  # [E, tokens, d]
            gates = self.mixture.logits(part).softmax(-1).T[..., None]
            lengths = outputs.norm(dim=-1, keepdim=True).clamp_min(1e-30)
            for name, values in (("outputs_gram", outputs), ("outputs_cosine", outputs / lengths)):
                flat = values.flatten(1)
                self._add(name, flat @ flat.T)
            self._add("means", outputs.double().sum(1))
            self._add("gated_means", (outputs * gates).double().sum(1))
            self.sampled += len(part)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.double().cpu()
        self._of[name] = self._of[name].add_(value) if name in self._of else value

    def finish(self) -> Layer:
        """What was seen, float32; the sums are given up, and so is the mixture."""
        of, name = self._of, self.mixture.name
        counts = of["counts"]
        made = {"counts": counts, "gates": of["gates"], "saliency": of["saliency"] / counts.clamp_min(1)}
        made["logits_gram"] = of["logits_gram"] / max(self.tokens, 1)
        for word in ("outputs_gram", "outputs_cosine"):
            made[word] = of[word] / max(self.sampled, 1)
        for word in ("means", "gated_means"):
            mean = of[word] / max(self.sampled, 1)
            made[f"{word}_gram"] = mean @ mean.T
        moments = {}
        if self.moments:
            moments[f"{name}.inputs"] = (of.pop("inputs") / counts.clamp_min(1)[:, None, None]).float()
        found = {f"{name}.{word}": ((v + v.T) / 2 if v.ndim == 2 else v).float() for word, v in made.items()}
        for full, value in (found | moments).items():
            if not torch.isfinite(value).all():
                raise NumericError(f"{full}: NaN or Inf in what runs through the experts; the model or data is damaged")
        return Layer(name, found, moments, self.tokens)


@dataclass(frozen=True, eq=False)
class Layer:
    """What was seen of one layer: tensors of 'routing' and of 'routed' by their full names, over so many tokens."""

    name: str
    found: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    tokens: int


def routing(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    batch: int = 8,
    moments: bool = False,
    seed: int = 0,
    selected: Callable[[str], bool] = lambda name: True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Statistic]:
    """Observe every mixture of a loaded model: 'routing', and with `moments` 'routed'; see the head of this file."""
    chosen = [m for m in mixtures(loaded) if selected(m.name)]
    if not chosen:
        raise WeightsmithError(f"{loaded.label}: none of its layers with experts is among the blocks asked for")
    refuse_large(chosen, moments)
    sums = [Sums(mixture, moments) for mixture in chosen]
    sample, done = sample_of(examples, seed), 0
    with resting(loaded.module), torch.no_grad(), full_precision():
        for part in batches(examples, batch):
            with seen(sums, part, sample[done : done + len(part.inputs)]):
                loaded.run(part.inputs, part.mask)
            done += len(part.inputs)
            if progress is not None:
                progress(done, len(examples))
    return statistics([one.finish() for one in sums])


@contextlib.contextmanager
def seen(sums: Sequence[Sums], part: Batch, sample: Sequence[Tensor]) -> Iterator[None]:
    """Let the sums see all runs of their mixtures, which are over the tokens of a batch."""
    keep = token_mask(part)
    taken = torch.zeros_like(keep)
    for row, chosen in enumerate(sample):
        taken[row, : len(chosen)] = chosen
    handles = []
    for one in sums:

        def see(routed: Routed, one: Sums = one) -> None:
            one.see(routed, keep.flatten(), taken.flatten())

        handles += one.mixture.watched(see)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def statistics(layers: Sequence[Layer]) -> dict[str, Statistic]:
    """The statistics of all layers."""
    found = {name: value for layer in layers for name, value in layer.found.items()}
    moments = {name: value for layer in layers for name, value in layer.moments.items()}
    rows = max(layer.tokens for layer in layers)
    skipped = {
        f"{layer.name}.{number}": "never chosen on this data"
        for layer in layers
        for number, count in enumerate(found[f"{layer.name}.counts"].tolist())
        if not count
    }
    made = {"routing": Statistic(found, rows, dict.fromkeys(found, rows), skipped=skipped)}
    return made | ({"routed": Statistic(moments, rows, dict.fromkeys(moments, rows))} if moments else {})


def token_mask(part: Batch) -> Tensor:
    """[batch, tokens] bool, False at padding."""
    return torch.ones(part.inputs.shape, dtype=torch.bool) if part.mask is None else part.mask


def sample_of(examples: Sequence[Example], seed: int) -> list[Tensor]:
    """Which tokens of each example are in the common sample: [tokens] bool each, the same whatever the batches are."""
    lengths = [len(example.inputs) for example in examples]
    total = sum(lengths)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:SAMPLE]] = True
    return list(torch.split(chosen, lengths))


def refuse_large(chosen: Sequence[Mixture], moments: bool) -> None:
    """WeightsmithError where second moments would not fit into memory."""
    needed = sum(8 * m.count * m.width * m.width for m in chosen) if moments else 0
    free = available_memory(torch.device("cpu"))
    if free is not None and needed > 0.9 * free:
        raise WeightsmithError(
            f"the second moments of {len(chosen)} layers' experts need {size_text(needed)} of memory, "
            f"{size_text(free)} is free; observe some blocks at a time (layers), each into a folder of its own, or "
            "leave out 'routed'"
        )
