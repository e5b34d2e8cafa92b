"""A compressed folder of twin experts as one running model: shared weights, branches, and a router that weighs them.

Twin-Merging (Lu et al., NeurIPS 2024, arXiv:2406.15479): theta(x) = theta_s + sum_t w_t(x) v_t.  The paper's code
builds the weights of every sample; here the v_t of a linear layer are low-rank branches, weighted per sample.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, SourceError, did_you_mean, some
from weightsmith.io.read.codec_folder import CodecFolder
from weightsmith.io.read.open import open_source
from weightsmith.observe.data import Example, read_examples
from weightsmith.observe.model import LoadedModel, load_model, pick_device
from weightsmith.runtime.branches import Branch, Mix, RoutedEmbedding, RoutedLinear, RoutedNorm
from weightsmith.runtime.changes import Change, changes_of, unfit
from weightsmith.runtime.router import Router

__all__ = ["Comparison", "Routed", "compare"]

Chosen = Sequence[str | None] | Mapping[str, float] | Tensor


class Routed(nn.Module):
    """One shared model and the low-rank branches of T experts; each sample of a batch has its own weights.

        model = Routed.load("twins", router="router")
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20)            # the router decides
        model(input_ids=ids, attention_mask=mask, experts=["math", "code", None]).logits  # or you do; None: shared

    top_k   experts per sample, the likeliest, their weights scaled to a sum of 1; None: all
    reject  below this largest probability a sample gets the shared model alone
    """

    def __init__(self, loaded: LoadedModel, changes: Mapping[str, Change], experts: Sequence[str]) -> None:
        super().__init__()
        self.experts, self.mix = tuple(experts), Mix()
        self.kind, self.label = loaded.kind, loaded.label
        self._loaded = loaded
        self.router: Router | None = None
        self.top_k: int | None = None
        self.reject = 0.0
        self.module: Any = loaded.module
        self._wrapped: dict[str, RoutedLinear | RoutedEmbedding | RoutedNorm] = {}
        self._install(loaded, changes)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | Path | None = None,
        router: str | Path | None = None,
        top_k: int | None = None,
        reject: float = 0.0,
        device: str | torch.device = "auto",
    ) -> Routed:
        """Load a folder that `weightsmith compress` made with `twin` (strategy svd), in float32.

        Any codec will do whose matrices are singular triplets, with a shared change or without.


        base    where the base is now, if not where it was; a model with other weights is refused
        router  a folder that `weightsmith train router` made; its outputs are tied to the experts by name
        Scales, shifts and biases are stored per expert only: the shared ones are the experts' mean.

        Errors: SourceError, PlanError with all that is in the way.
        """
        opened = CodecFolder(Path(folder).expanduser(), open_source)
        origin = opened.base(None if base is None else open_source(base), strict=base is not None)
        opened.refuse_other(origin)
        if origin.origin.folder is None:
            raise SourceError(f"{folder}: its base {origin} is not a model folder, so it cannot run")
        if problems := [*unfit(opened, origin)]:
            raise PlanError(problems)
        loaded = load_model(origin.origin.folder, device="cpu")
        where = pick_device(device)
        made = cls(loaded, changes_of(opened, origin), opened.experts).to(where).eval()
        if router is not None:
            made.router = Router.load(router, made.experts).to(where)
        made.limit(top_k, reject)
        return made

    def limit(self, top_k: int | None = None, reject: float = 0.0) -> Routed:
        """Set how routed weights are cut; see the class."""
        if top_k is not None and not 1 <= top_k <= len(self.experts):
            raise PlanError([f"top_k = {top_k} is outside [1, {len(self.experts)}], the number of experts"])
        if not 0 <= reject <= 1:
            raise PlanError([f"reject = {reject:g} is outside [0, 1]"])
        self.top_k, self.reject = top_k, reject
        return self

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.module.parameters()).device
        return found

    # --- choosing --------------------------------------------------------------------------------

    def use(self, chosen: Chosen | None) -> Routed:
        """Choose for the samples of the following batches: until it is called again.

        chosen  per sample a name, or None for the shared model; or {name: weight} for all samples; or weights
                [samples, experts] in the order of `experts`; None: the shared model
        """
        self.mix.set(None if chosen is None else self.weights(chosen).to(self.device))
        for layer in self._wrapped.values():
            if not isinstance(layer, RoutedNorm) and layer.branch is not None:
                layer.branch.drop()
        return self

    def weights(self, chosen: Chosen) -> Tensor:
        """Weights [samples, experts] of a choice; see `use`."""
        count = len(self.experts)
        if isinstance(chosen, Tensor):
            if chosen.ndim != 2 or chosen.shape[1] != count:
                raise PlanError([f"weights must be [samples, {count}], got {list(chosen.shape)}"])
            if not bool(torch.isfinite(chosen).all()):
                raise PlanError(["weights of experts must be finite numbers"])
            return chosen.float()
        rows: Iterable[Mapping[str, float]]
        rows = [chosen] if isinstance(chosen, Mapping) else [{} if name is None else {name: 1.0} for name in chosen]
        for name in (name for row in rows for name in row):
            if name not in self.experts:
                raise PlanError([f"{name!r} is not an expert{did_you_mean(name, self.experts)}"])
        return torch.tensor([[row.get(name, 0.0) for name in self.experts] for row in rows])

    @torch.no_grad()
    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Means over tokens of the shared model's last hidden state: [samples, width] float32.

        inputs  [samples, tokens] int64, or images; mask: [samples, tokens], 0 at padding
        """
        kept = self.mix.index, self.mix.weights
        self.mix.set(None)
        try:
            inner = getattr(self.module, "base_model", self.module)
            if inputs.is_floating_point():
                states = inner(pixel_values=inputs.to(self.device)).last_hidden_state
            else:
                seen = None if mask is None else mask.to(self.device)
                states = inner(input_ids=inputs.to(self.device), attention_mask=seen).last_hidden_state
        finally:
            self.mix.index, self.mix.weights = kept
        states = states.float().flatten(2).mT if states.ndim == 4 else states.float()
        if mask is None or inputs.is_floating_point():
            found: Tensor = states.mean(1)
            return found
        share = mask.to(states)[..., None]
        total: Tensor = (states * share).sum(1) / share.sum(1).clamp(min=1)
        return total

    def examples(self, data: Mapping[str, Any], **options: Any) -> dict[str, list[Example]]:
        """Samples of the experts out of files, see `observe.data.read_examples`; PlanError for names without expert."""
        wrong = [f"data for {name!r}, which is not an expert{did_you_mean(name, self.experts)}" for name in data
                 if name not in self.experts]  # fmt: skip
        wrong += [f"no data for the expert {name}; a router knows only what it saw" for name in self.experts
                  if name not in data]  # fmt: skip
        if wrong:
            raise PlanError(wrong)
        return {name: read_examples(own, self._loaded, **options) for name, own in data.items()}

    @torch.no_grad()
    def route(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """The router's weights of samples, cut by `top_k` and `reject`: [samples, experts]."""
        if self.router is None:
            raise PlanError(["no router was loaded; pass experts=, or load one that `weightsmith train router` made"])
        found = self.router.eval()(self.features(inputs, mask)).softmax(1)
        sure = found.amax(1, keepdim=True) >= self.reject
        if self.top_k is not None:
            values, places = found.topk(self.top_k, 1)
            found = torch.zeros_like(found).scatter(1, places, values / values.sum(1, keepdim=True))
        cut: Tensor = found * sure
        return cut

    def forward(self, *, experts: Chosen | None = None, **inputs: Any) -> Any:
        """What the model gives for inputs by name; `experts` as in `use`, else the router chooses."""
        self._choose(experts, inputs)
        return self.module(**inputs)

    def generate(self, *, experts: Chosen | None = None, **inputs: Any) -> Any:
        """The model's `generate`: prompts are routed once."""
        self._choose(experts, inputs)
        return self.module.generate(**inputs)

    def _choose(self, experts: Chosen | None, inputs: Mapping[str, Any]) -> None:
        data = inputs.get("input_ids", inputs.get("pixel_values"))
        if data is None:
            raise PlanError(["inputs are given by name: input_ids= or pixel_values="])
        chosen = self.weights(experts) if experts is not None else self.route(data, inputs.get("attention_mask"))
        if chosen.shape[0] not in (1, data.shape[0]):
            raise PlanError([f"experts of {chosen.shape[0]} samples for a batch of {data.shape[0]}"])
        self.use(chosen)

    # --- building --------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the shared model, of what the experts add, and of the same experts as whole models."""
        shared = sum(p.nbytes for p in self.module.parameters())
        added = {x.data_ptr(): x.nbytes for layer in self._wrapped.values() for x in layer.buffers()}
        return {"shared": shared, "branches": sum(added.values()), "experts": shared * len(self.experts)}

    @torch.no_grad()
    def explicit(self, weights: Mapping[str, float] | Tensor) -> dict[str, Tensor]:
        """The built weights of one sample: parameter -> tensor, of those that the experts change."""
        row = weights if isinstance(weights, Tensor) else self.weights(weights)[0]
        row = row.to(self.device)
        found: dict[str, Tensor] = {}
        for name, layer in self._wrapped.items():
            found |= {f"{name}.{leaf}": value for leaf, value in layer.explicit(row).items()}
        return found

    @torch.no_grad()
    def _install(self, loaded: LoadedModel, changes: Mapping[str, Change]) -> None:
        """Put the shared values into the model, and branches where the experts differ from them."""
        left = dict(changes)
        found: dict[str, dict[str, Change]] = {}
        tied: dict[int, list[str]] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        for names in tied.values():
            stored = loaded.names.name(*names)
            if stored is None or stored not in changes:
                continue
            left.pop(stored, None)
            self.module.get_parameter(names[0]).copy_(changes[stored].shared)
            if changes[stored].factors is not None or changes[stored].more is not None:
                for owner, _, leaf in (name.rpartition(".") for name in names):
                    found.setdefault(owner, {})[leaf] = changes[stored]
        if left:
            raise PlanError([f"{loaded.label}: {some(list(left), 4)} has no parameter of its own in the running model"])
        problems = []
        branches: dict[int, Branch] = {}  # tied weights share theirs
        for owner, own in found.items():
            layer = self._layer(self.module.get_submodule(owner), own, branches)
            if layer is None:
                kind = type(self.module.get_submodule(owner)).__name__
                problems.append(
                    f"{owner} ({kind}): experts differ in {', '.join(own)}, which cannot be mixed per sample"
                )
                continue
            self._wrapped[owner] = layer
            parent, _, last = owner.rpartition(".")
            setattr(self.module.get_submodule(parent), last, layer)
        if problems:
            raise PlanError(problems)

    def _layer(
        self, inner: nn.Module, own: Mapping[str, Change], branches: dict[int, Branch]
    ) -> RoutedLinear | RoutedEmbedding | RoutedNorm | None:
        turned = type(inner).__name__ == "Conv1D"
        if isinstance(inner, nn.Linear) or turned:
            weight, bias = own.get("weight"), own.get("bias")
            branch = None if weight is None else _branch(weight, branches, turned)
            return RoutedLinear(inner, self.mix, branch, None if bias is None else bias.more, turned)
        if isinstance(inner, nn.Embedding):
            return RoutedEmbedding(inner, self.mix, _branch(own["weight"], branches, False))
        more = {leaf: change.more for leaf, change in own.items() if change.more is not None and change.more.ndim == 2}
        if "Norm" in type(inner).__name__ and "Batch" not in type(inner).__name__ and len(more) == len(own):
            return RoutedNorm(inner, self.mix, more)
        return None


def _branch(change: Change, made: dict[int, Branch], turned: bool) -> Branch:
    if id(change) not in made:
        assert change.factors is not None
        left, right = change.factors
        made[id(change)] = Branch(right, left) if turned else Branch(left, right)
    return made[id(change)]


# --- against building the weights ------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Routed against weights that are built anew for every sample.

    routed, built  tokens per second; bytes as in `Routed.sizes`
    """

    routed: float
    built: float
    sizes: Mapping[str, int]

    @property
    def ratio(self) -> float:
        return self.routed / self.built


@torch.no_grad()
def compare(
    model: Routed, inputs: Mapping[str, Tensor], weights: Tensor, *, new_tokens: int = 0, repeat: int = 3
) -> Comparison:
    """Time a batch both ways, the quickest of `repeat`: routed in one, and sample by sample with weights built for it.

    weights     [samples, experts]
    new_tokens  generated for each sample; 0: one forward pass of the prompts

    Building needs a second model for the time being.
    """
    plain, ids = _plain(model), inputs["input_ids"]
    count = ids.shape[0] * new_tokens or ids.numel()
    run = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False} if new_tokens else {}
    times: dict[str, list[float]] = {"routed": [], "built": []}
    for _ in range(repeat):
        began = time.perf_counter()
        (model.generate if new_tokens else model)(**inputs, experts=weights, **run)
        times["routed"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for row in range(ids.shape[0]):
            plain.load_state_dict(model.explicit(weights[row]), strict=False)
            own = {name: value[row : row + 1] for name, value in inputs.items()}
            (plain.generate if new_tokens else plain)(**own, **run)
        times["built"].append(time.perf_counter() - began)
    return Comparison(count / min(times["routed"]), count / min(times["built"]), model.sizes)


def _plain(model: Routed) -> Any:
    """The shared model without branches, a copy."""
    bare = copy.deepcopy(model.module)
    for name, module in list(bare.named_modules()):
        if isinstance(module, (RoutedLinear, RoutedEmbedding, RoutedNorm)):
            parent, _, last = name.rpartition(".")
            setattr(bare.get_submodule(parent), last, module.inner)
    return bare
