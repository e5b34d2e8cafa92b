"""SVFit as a tuner of peft: importing this module registers it.

    from weightsmith.train.svfit_peft import SVFitConfig

    model = peft.get_peft_model(model, SVFitConfig(r=64, target_modules=["q_proj", "v_proj"]))
    ...
    model.save_pretrained("my-values")                  # an expert for every merge, as `svfit.SVFit.save` writes it

peft's own registration takes only names of its enumeration, so three entries are added to its tables: enough for
`get_peft_model`, `PeftModel.from_pretrained`, several adapters, saving and merging.  transformers' `load_adapter` and
mixed adapters ask the enumeration, and do not know it; a process that loads a folder has to import this module first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.io.read.lora import PREFIX
from weightsmith.io.read.svfit import refuse_another
from weightsmith.train.svfit import (
    TARGETS,
    Parametrize,
    SingularValues,
    checked,
    described,
    transposed,
    unfit,
    weight_of,
)

__all__ = ["SVFitConfig", "SVFitLayer", "SVFitModel"]

TYPE = "SVFIT"


@dataclass
class SVFitConfig(PeftConfig):  # type: ignore[misc]
    """What `svfit.wrap` takes, as a configuration of peft; `bases` as in `svfit.SVFit.save`.

    base_weights  shape, dtype, hash and r of each weight trained on, filled in when the model is wrapped; `r` is then
                  the largest
    """

    r: int | None = None
    energy: float | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    squares: bool = False
    parametrize: Parametrize = "delta"
    svfit_dropout: float = 0.0
    bases: bool = True
    fan_in_fan_out: bool = False
    base_weights: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE
        checked(None if self.base_weights else self.r, self.energy, self.svfit_dropout)


class SVFitLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer, and the singular values of each adapter that train beside it."""

    adapter_layer_names = ("svfit",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.svfit = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._before: Tensor | None = None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the layer gives, and what the active adapters add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(*arguments, **options)
        if not self.disable_adapters and not self.merged:
            active: Any = self.active_adapters  # inherited from a class that mypy does not see
            for name in active:
                if name in self.svfit:
                    own: Any = self.svfit[name]
                    out = own.add(self.base_layer, arguments, out)
        return out

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, as it is stored."""
        own: Any = self.svfit[adapter]
        found: Tensor = own.delta.T if transposed(self.base_layer) else own.delta
        return found

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, in float32, rounded once; `unmerge` puts the same bits back."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svfit]
        if not names:
            return
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        total: Tensor = sum(self.get_delta_weight(name) for name in names)  # type: ignore[assignment]
        merged = weight.to(total.dtype) + total
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"NaNs detected in the merged weights of {names}")
        if self._before is None:
            self._before = weight.detach().clone()
        weight.copy_(merged)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all adapters out of the weight."""
        if self._before is not None:
            self.base_layer.weight.copy_(self._before)  # type: ignore[operator]
        self._before = None
        self.merged_adapters.clear()


class SVFitModel(BaseTuner):  # type: ignore[misc]
    """What peft makes of a model and an `SVFitConfig`."""

    prefix = "svfit"
    tuner_layer_cls = SVFitLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(TARGETS)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *arguments: Any, **options: Any) -> None:
        super().inject_adapter(model, adapter_name, *arguments, **options)
        config = self.peft_config[adapter_name]
        config.r = max(one["r"] for one in config.base_weights.values())

    def _create_and_replace(
        self, config: Any, adapter: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        **_: Any,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, SVFitLayer) else None
        inner = target.base_layer if isinstance(target, SVFitLayer) else target
        assert isinstance(inner, nn.Module)
        if layer is None and (problems := unfit(self.model, [current_key])):
            raise PlanError(problems)
        said = config.base_weights.get(current_key)
        if said is not None:
            refuse_another(inner.weight, said["xxh3_64"], f"{current_key}.weight of this model")  # type: ignore[arg-type]
        r, energy = (said["r"], None) if said is not None and "r" in said else (config.r, config.energy)
        options = {"parametrize": config.parametrize, "dropout": config.svfit_dropout, "squares": config.squares}
        try:
            own = SingularValues(weight_of(inner), r, energy, **options)
        except PlanError as error:
            raise PlanError([f"{current_key}.weight {error}"]) from None
        config.base_weights[current_key] = described(inner, own)
        config.fan_in_fan_out = transposed(inner)
        if layer is None:
            layer = SVFitLayer(inner)
            self._replace_module(parent, target_name, layer, target)
        layer.svfit[adapter] = own
        made: Any = layer
        made.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, own in _values(model, adapter_name):
            trained = state_dict.get(f"{name}.svfit.{adapter_name}.train_values", own.train_values.detach())
            stem = f"{name}.svfit_"
            found |= {f"{stem}delta": own.change_of(trained), f"{stem}s": own.s}
            if config.bases:
                found |= {f"{stem}u": own.u, f"{stem}v": own.v}
        return {key: tensor.contiguous() for key, tensor in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        left = dict(state_dict)
        for name, own in _values(model, adapter_name):
            at = name if f"{name}.svfit_delta" in left else f"{PREFIX}{name}"
            parts = {part: left.pop(f"{at}.svfit_{part}", None) for part in ("delta", "s", "u", "v")}
            change, s = parts["delta"], parts["s"]
            if change is None or s is None or change.shape != own.s.shape:
                got = "none" if change is None else list(change.shape)
                raise SourceError(f"{name}: expected {list(own.s.shape)} singular values in the adapter, got {got}")
            if not bool(((s.to(own.s) - own.s).abs() <= 1e-4 * own.s[0]).all()):
                raise SourceError(f"{name}: the singular values of this model are not the ones trained from")
            if parts["u"] is not None and parts["v"] is not None:
                own.u.copy_(parts["u"])
                own.v.copy_(parts["v"])
            own.set_change(change)
            left[f"{name}.svfit.{adapter_name}.train_values"] = own.train_values.detach().clone()
        return left


def _values(model: nn.Module, adapter: str) -> list[tuple[str, SingularValues]]:
    """Name of a layer -> its singular values of an adapter."""
    found = [
        (n, m.svfit[adapter]) for n, m in model.named_modules() if isinstance(m, SVFitLayer) and adapter in m.svfit
    ]
    return [(name, own) for name, own in found if isinstance(own, SingularValues)]


PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = SVFitConfig
PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = SVFitModel
PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = SVFitModel.prefix
