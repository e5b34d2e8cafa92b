"""LoHa and LoKr of convolutions: as LoRA that peft loads where the kernel is known, else refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from weightsmith import lora
from weightsmith.core.errors import PlanError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.head = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 6)
        self.conv = nn.Conv2d(4, 8, 3)


def adapters(at: Path, kind: type, targets: list[str], **more: bool) -> dict[str, Path]:
    for i, name in enumerate("ab"):
        torch.manual_seed(i)
        config = kind(r=2, alpha=2, target_modules=targets, init_weights=False, **more)
        get_peft_model(Net(), config).save_pretrained(at / name)
    return {name: at / name for name in "ab"}


def change(base: nn.Module, path: Path, module: str) -> Tensor:
    tuned = PeftModel.from_pretrained(copy.deepcopy(base), path).merge_and_unload()
    return tuned.get_submodule(module).weight.detach() - base.get_submodule(module).weight.detach()


@pytest.mark.parametrize(
    ("kind", "targets", "more", "told"),
    [
        (LoHaConfig, ["stem"], {"use_effective_conv2d": True}, True),
        (LoKrConfig, ["stem", "point", "head"], {}, True),
        (LoHaConfig, ["stem", "point", "head"], {}, False),
    ],
)
def test_peft_loads_the_sum(kind: type, targets: list[str], more: dict[str, bool], told: bool, tmp_path: Path) -> None:
    """The file has the kernel, or the base's folder tells it."""
    both, base = adapters(tmp_path, kind, targets, **more), Net()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "base/model.safetensors")
    lora.merge(both, "cat", tmp_path / "out", base=None if told else str(tmp_path / "base"))
    for module in targets:
        want = change(base, both["a"], module) + change(base, both["b"], module)
        torch.testing.assert_close(change(base, tmp_path / "out", module), want, rtol=1e-5, atol=1e-6)
    if told:
        lora.resize(both["a"], tmp_path / "less", rank=64)
        torch.testing.assert_close(
            change(base, tmp_path / "less", "stem"), change(base, both["a"], "stem"), rtol=1e-4, atol=1e-5
        )


def test_unknown_kernels_are_refused(tmp_path: Path) -> None:
    both = adapters(tmp_path, LoHaConfig, ["stem", "conv", "head"])
    unknown = (
        r"stem may be a linear layer or a convolution, which a flattened LoHa or LoKr does not tell; name the base's "
        r"folder \(base, or base_model_name_or_path in adapter_config.json\), or merge it into its base with"
    )
    for run in (
        lambda: lora.merge(both, "cat", tmp_path / "out"),
        lambda: lora.resize(both["a"], tmp_path / "out", rank=2),
    ):
        with pytest.raises(PlanError, match=unknown) as refused:
            run()
        assert "conv is a convolution" in str(refused.value)
        assert "head" not in str(refused.value)
        assert not (tmp_path / "out").exists()
