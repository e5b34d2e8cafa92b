"""SVFit: fine-tune only the leading singular values of each weight (Sun et al., arXiv 2409.05926).

    from weightsmith.train import svfit

    tuned = svfit.wrap(model, r=64)                     # in place; only the singular values train
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2, weight_decay=0.0)
    ...
    tuned.save("my-values")                             # an expert for every merge, on the same base

The weight W = U diag(s) V^T becomes W + U_r diag(sigma - s_r) V_r^T.  No reference code was available: this follows the
published method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, RecipeError, SourceError, did_you_mean, some
from weightsmith.io.read.adapter import CONFIG
from weightsmith.io.read.lora import PREFIX, read_peft
from weightsmith.io.read.svfit import Singular, decomposed, fingerprint, refuse_another
from weightsmith.train.save import save_folder

__all__ = ["TARGETS", "SVFit", "SingularValues", "load", "wrap"]

TARGETS = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin")
"""Query and value projections, as the paper's runs on GLUE train them."""

Parametrize = Literal["delta", "value", "log"]


class SingularValues(nn.Module):
    """What is trained of one layer: r numbers in float32; it is added to the layer's output by a forward hook.

    weight       of the layer, as [out, in, *kernel]; only looked at
    r, energy    how many leading values: a number, or the fewest whose sum is at least this share of the sum of all
                 (share of the squares with squares=True).  energy 1 means the numerical rank
    parametrize  delta: sigma = s + d, value: sigma itself, log: sigma = s exp(d), which keeps sigma above 0.  With
                 value, weight decay would shrink the pretrained weight; give that parameter none
    dropout      on the input of the added branch, while training

    u [out, r] and v [r, in, *kernel] are not trained and no part of the state dict; they are kept in the weight's dtype
    where that has 16 bits, so for r = min(out, in) they take twice the memory of the weight.
    """

    u: Tensor
    v: Tensor
    s: Tensor

    def __init__(
        self,
        weight: Tensor,
        r: int | None = None,
        energy: float | None = None,
        *,
        squares: bool = False,
        parametrize: Parametrize = "delta",
        dropout: float = 0.0,
        vectors: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if parametrize not in ("delta", "value", "log"):
            raise RecipeError(f"parametrize must be delta, value or log, got {parametrize!r}")
        smaller = min(weight.shape[0], weight[0].numel())
        if vectors is None:
            if not bool(torch.isfinite(weight).all()) or not bool((weight != 0).any()):
                raise PlanError(["is zero everywhere or holds NaN or Inf, so it has no singular values to train"])
            u, s, v = decomposed(weight)
            count = smaller if r is energy is None else _count(s, r, energy, squares)
            if not 1 <= count <= smaller:
                raise PlanError([f"r must be in 1 .. {smaller} for a weight {list(weight.shape)}, got {r}"])
            vectors = u[:, :count], s[:count], v[:count]
        u, s, v = vectors
        run = weight.dtype if weight.dtype.itemsize == 2 else torch.promote_types(weight.dtype, torch.float32)
        own = torch.promote_types(weight.dtype, torch.float32)
        self.parametrize, self.dropout, self.merged = parametrize, dropout, False
        self.register_buffer("u", u.to(weight.device, run).contiguous(), persistent=False)
        self.register_buffer("v", v.to(weight.device, run).reshape(-1, *weight.shape[1:]), persistent=False)
        self.register_buffer("s", s.to(weight.device, own), persistent=False)
        self.train_values = nn.Parameter(self.s.clone() if parametrize == "value" else torch.zeros_like(self.s))

    @property
    def change(self) -> Tensor:
        """sigma - s: [r]."""
        return self.change_of(self.train_values)

    def change_of(self, values: Tensor) -> Tensor:
        """sigma - s of numbers that were trained in place of this module's [r]."""
        if self.parametrize == "log":
            return self.s * torch.expm1(values)
        return values - self.s if self.parametrize == "value" else values

    @torch.no_grad()
    def set_change(self, change: Tensor) -> None:
        """Train on from sigma - s = change [r]."""
        change = change.to(self.s)
        if self.parametrize == "log":
            if not bool((change > -self.s).all()):
                raise PlanError(["parametrize: log holds no singular values of 0 or less; use delta"])
            change = torch.log1p(change / self.s)
        self.train_values.copy_(self.s + change if self.parametrize == "value" else change)

    @property
    def delta(self) -> Tensor:
        """What is added to the weight, in float32 at least: [out, in, *kernel]."""
        change = self.change.detach()
        return ((self.u.to(change) * change) @ self.v.flatten(1).to(change)).reshape(-1, *self.v.shape[1:])

    def add(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """The forward hook: output + U (change * V^T x), with x the layer's input."""
        if self.merged:
            return None
        if self.training and self.train_values.dtype.itemsize < 4:
            raise PlanError(
                [f"singular values in {self.train_values.dtype} do not move; keep them in float32 (convert the model "
                 "before svfit.wrap, not after it)"]
            )  # fmt: skip
        x = nn.functional.dropout(arguments[0], self.dropout, self.training)
        scale = self.change.to(output.dtype)
        if isinstance(layer, _Convolution):
            low: Tensor = layer._conv_forward(x, self.v, None).movedim(1, -1)  # [batch, *places, r]
            return output + ((low * scale) @ self.u.T).movedim(-1, 1)
        found: Tensor = output + ((x @ self.v.T) * scale) @ self.u.T
        return found


class SVFit:
    """A model whose chosen layers train their singular values; made by `wrap` or `load`.

    model    the model itself, changed in place: other parameters are frozen, layers keep their class and their names
    modules  name of the layer -> its `SingularValues`, which is its child `svfit`
    saved    modules that are trained whole (a task head) and go along with `save`
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, SingularValues], saved: Sequence[str], config: Any
    ) -> None:
        self.model, self.modules, self.saved, self.config = model, modules, tuple(saved), dict(config)
        self._before: dict[str, Tensor] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """What trains: r numbers per layer, and the modules that are saved whole."""
        return (p for p in self.model.parameters() if p.requires_grad)

    @property
    def counts(self) -> dict[str, int]:
        """Trained singular values of each layer."""
        return {name: own.train_values.numel() for name, own in self.modules.items()}

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the changes to the weights, in float32, rounded once; `unmerge` puts the same bits back."""
        for name, own in self.modules.items():
            if not own.merged:
                layer = self.model.get_submodule(name)
                weight: Tensor = layer.weight  # type: ignore[assignment]
                self._before[name] = weight.detach().clone()
                delta = own.delta.T if transposed(layer) else own.delta
                weight.copy_(weight.to(delta.dtype) + delta)
                own.merged = True
        return self.model

    @torch.no_grad()
    def unmerge(self) -> nn.Module:
        """The weights as they were; the changes run beside them again."""
        for name, before in self._before.items():
            self.model.get_submodule(name).weight.copy_(before)  # type: ignore[operator]
            self.modules[name].merged = False
        self._before.clear()
        return self.model

    def save(
        self, out: str | Path, *, bases: bool = True, overwrite: bool = False, texts: Mapping[str, str] | None = None
    ) -> Path:
        """Write the adapter folder that `load` and every merge take.

        bases  keep u and v too (the size of the layers' LoRA of rank r).  Without them r numbers per layer are stored
               twice, and the vectors are found again by an SVD of the very same weights, else refused
        texts  more files to put beside it, name -> content
        """
        tensors: dict[str, Tensor] = {}
        for name, own in self.modules.items():
            stem = f"{PREFIX}{name}.svfit_"
            tensors |= {f"{stem}delta": own.change.detach(), f"{stem}s": own.s}
            if bases:
                tensors |= {f"{stem}u": own.u, f"{stem}v": own.v}
        for name in self.saved:
            whole = self.model.get_submodule(name).state_dict()
            tensors |= {f"{PREFIX}{name}.{leaf}": tensor.detach() for leaf, tensor in whole.items()}
        text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        how = "singular values trained with svfit"
        return save_folder(
            out, tensors, made=self.config, how=how, kind="adapter", name="adapter_model",
            texts={CONFIG: text, **(texts or {})}, overwrite=overwrite,
        )  # fmt: skip


def wrap(
    model: nn.Module,
    r: int | None = None,
    energy: float | None = None,
    *,
    target_modules: Sequence[str] | str = TARGETS,
    squares: bool = False,
    parametrize: Parametrize = "delta",
    dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> SVFit:
    """Train the leading singular values of a model's layers: the model is changed in place.

    r, energy        values per layer, see `SingularValues`; neither: all
    target_modules   last parts of the names of Linear, Conv1D or convolution layers; one text is a regular expression
                     for whole names.  A fused layer (qkv) is decomposed as one matrix
    modules_to_save  last parts of the names of modules that train whole, such as the task head

    Costs an SVD of each layer in float64.  Errors: RecipeError for values, PlanError with every layer that cannot be
    trained so: zero or not finite, tied to another, quantised, r above its smaller side.
    """
    checked(r, energy, dropout)
    names, saved = _targets(model, target_modules), _named(model, modules_to_save)
    options: dict[str, Any] = {"parametrize": parametrize, "dropout": dropout}
    found: dict[str, SingularValues] = {}
    problems = unfit(model, names)
    for name in names if not problems else ():
        weight = weight_of(model.get_submodule(name))
        try:
            found[name] = SingularValues(weight, r, energy, squares=squares, **options)
        except PlanError as error:
            problems.append(f"{name}.weight {error}")
    if problems:
        raise PlanError(problems)
    config = {
        "peft_type": "SVFIT",
        "r": max(own.s.numel() for own in found.values()),
        "energy": energy,
        "parametrize": parametrize,
        "svfit_dropout": dropout,
        "target_modules": sorted(names),
        "modules_to_save": list(modules_to_save) or None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "fan_in_fan_out": all(transposed(model.get_submodule(name)) for name in names),
        "base_weights": {name: described(model.get_submodule(name), found[name]) for name in names},
    }
    return _attached(model, found, saved, config)


def load(model: nn.Module, folder: str | Path) -> SVFit:
    """Put saved singular values on the model that they were trained on; it is changed in place.

    Errors: SourceError where the folder is no SVFit adapter, or where a weight is not the one trained on.
    """
    adapter = read_peft(Path(folder))
    config, file = adapter.config, adapter.file
    if config["peft_type"] != "SVFIT":
        raise SourceError(f"{folder}: peft_type {config['peft_type']}, not SVFIT; load it with peft")
    options = {"parametrize": config.get("parametrize", "delta"), "dropout": config.get("svfit_dropout", 0.0)}
    found: dict[str, SingularValues] = {}
    for name, module in adapter.modules.items():
        layer, update = dict(model.named_modules()).get(name), module.update
        assert isinstance(update, Singular)
        if layer is None or not _fits(layer):
            raise SourceError(f"{folder}: trains {name!r}, which this model lacks{did_you_mean(name, _layers(model))}")
        refuse_another(layer.weight, update.hash, f"{folder}: {name}.weight of this model")
        weight = weight_of(layer)
        if update.u in file.keys:
            vectors = file.read(update.u), file.read(update.s), file.read(update.v).flatten(1)
        else:
            vectors = decomposed(weight, update.rank)
        found[name] = SingularValues(weight, vectors=vectors, **options)
        found[name].set_change(file.read(update.delta))
    saved = _named(model, config.get("modules_to_save") or ())
    for name in saved:
        whole, start = model.get_submodule(name), f"{PREFIX}{name}."
        whole.load_state_dict({leaf: file.read(f"{start}{leaf}") for leaf in whole.state_dict()})
    return _attached(model, found, saved, config)


def checked(r: int | None, energy: float | None, dropout: float) -> None:
    """RecipeError for values that no model can take."""
    if r is not None and energy is not None:
        raise RecipeError("give r or energy, not both")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"energy must be in (0, 1], got {energy!r}")
    if not 0 <= dropout < 1:
        raise RecipeError(f"dropout must be in [0, 1), got {dropout!r}")


def described(layer: nn.Module, own: SingularValues) -> dict[str, Any]:
    """What a configuration says of a weight that singular values train on."""
    return {
        "shape": list(weight_of(layer).shape),
        "dtype": str(own.u.dtype).removeprefix("torch."),
        "xxh3_64": fingerprint(layer.weight),  # type: ignore[arg-type]
        "r": own.s.numel(),
    }


# --- layers ----------------------------------------------------------------------------------------

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight [in, out], as transformers' Conv1D does."""
    return type(layer).__name__ == "Conv1D"


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, *_Convolution)) or transposed(layer)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer, as [out, in, *kernel]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().T if transposed(layer) else weight.detach()


def _layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and _fits(module)]


def _targets(model: nn.Module, wanted: Sequence[str] | str) -> list[str]:
    """The names of layers that are meant."""
    if isinstance(wanted, str):
        found = [name for name in _layers(model) if re.fullmatch(wanted, name)]
    else:
        found = [name for name in _layers(model) if any(f".{name}".endswith(f".{end}") for end in wanted)]
    if not found:
        ends = dict.fromkeys(name.rpartition(".")[2] for name in _layers(model))
        said = wanted if isinstance(wanted, str) else ", ".join(wanted)
        raise PlanError([f"target_modules {said} match no Linear or convolution layer; it has {some(list(ends), 8)}"])
    return found


def _named(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    for end in wanted:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            raise PlanError([f"modules_to_save: no module {end!r}{did_you_mean(end, names)}"])
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)]


def unfit(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Why layers cannot train their singular values, one by one."""
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    problems = []
    for name in names:
        layer = model.get_submodule(name)
        shared = owners.get(id(layer.weight), [])
        if not weight_of(layer).is_floating_point():
            problems.append(f"{name}.weight is {layer.weight.dtype}; give the model in a floating dtype")
        elif len(shared) > 1:
            problems.append(f"{' and '.join(shared)} are one tensor: changing one would change the other; leave it out")
        elif getattr(layer, "groups", 1) != 1:
            problems.append(f"{name} is a grouped convolution, which no single matrix stands for; leave it out")
        elif hasattr(layer, "svfit"):
            problems.append(f"{name} has trained singular values already; merge or load into a fresh model")
        elif isinstance(_parent(model, name), nn.MultiheadAttention):
            problems.append(f"{name} never runs by itself (torch's MultiheadAttention takes its weight); leave it out")
    return problems


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _attached(model: nn.Module, found: Mapping[str, SingularValues], saved: Sequence[str], config: Any) -> SVFit:
    """Freeze the model, and hang the singular values into their layers."""
    model.requires_grad_(False)
    for name in saved:
        model.get_submodule(name).requires_grad_(True)
    for name, own in found.items():
        layer = model.get_submodule(name)
        layer.add_module("svfit", own)
        layer.register_forward_hook(own.add)
    return SVFit(model, found, saved, config)


def _count(s: Tensor, r: int | None, energy: float | None, squares: bool) -> int:
    """r, or the fewest leading values whose sum is at least a share of the sum of all."""
    if energy is None:
        assert r is not None
        return r
    size = s**2 if squares else s
    size = torch.where(s > s[0] * len(s) * torch.finfo(torch.float32).eps, size, 0)  # below: rounding of float32
    share = size.cumsum(0) / size.sum()
    return int((share < energy * (1 - 1e-9)).sum()) + 1
