"""Mixtures of experts packed and unpacked: either way round, and what transformers makes of a checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith.io.read.experts import PackedExperts, UnpackedExperts, laid_out_like
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource

SIZES = {
    **{"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 32},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 24, "head_dim": 8},
}


def model(family: str, seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_and_its_checkpoint_are_the_same(family: str, tmp_path: Path) -> None:
    """In memory transformers packs, on disk it does not: each as a view in the other's layout."""
    module = model(family, 0)
    module.save_pretrained(tmp_path)
    memory, disk = open_source(module), open_source(tmp_path)
    assert any(name.endswith("experts.gate_up_proj") for name in memory.keys)
    assert any(".experts.2." in name for name in disk.keys)
    for one, other, kind in ((memory, disk, UnpackedExperts), (disk, memory, PackedExperts)):
        view = pickle.loads(pickle.dumps(laid_out_like(one, other)))
        assert isinstance(view, kind)
        assert set(view.keys) == set(other.keys)
        for name, key in other.keys.items():
            assert view.key(name) == key
            assert torch.equal(view.read(name), other.read(name)), name
            assert (view.bits(name) == other.bits(name)).all()
            for start, stop in ((0, 1), (1, key.rows), (2, 2)):
                assert torch.equal(view.read(name, start, stop), other.read(name, start, stop))
                assert (view.bits(name, start, stop) == other.bits(name, start, stop)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_merge_with_each_other(family: str, tmp_path: Path) -> None:
    one, two = model(family, 0), model(family, 1)
    two.save_pretrained(tmp_path)
    want = {n: (t + two.state_dict()[n]) / 2 for n, t in one.state_dict().items()}
    packed = ws.merge({"one": one, "two": tmp_path}, "linear")
    assert set(packed) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(packed[name], value)
    unpacked = ws.merge({"two": tmp_path, "one": one}, "linear")
    assert set(unpacked) == set(open_source(tmp_path).keys)
    gate = next(n for n in packed if n.endswith("layers.1.mlp.experts.gate_up_proj"))
    halves = [
        unpacked[n] for n in unpacked if "layers.1" in n and ".experts.2." in n and ("w1" in n or "gate_proj" in n)
    ]
    assert torch.equal(halves[0], packed[gate][2][:24])


def test_what_does_not_fit_stays_as_it_is() -> None:
    packed = MemorySource(
        {"x.mlp.experts.gate_up_proj": torch.ones(2, 6, 4), "x.mlp.experts.down_proj": torch.ones(2, 4, 3)}
    )
    transposed = MemorySource(
        {"x.mlp.experts.gate_up_proj": torch.ones(2, 4, 6), "x.mlp.experts.down_proj": torch.ones(2, 3, 4)}
    )
    words = {f"x.mlp.experts.{e}.{w}.weight": torch.ones(3, 4) for e in (0, 1) for w in ("gate_proj", "up_proj")}
    words |= {f"x.mlp.experts.{e}.down_proj.weight": torch.ones(4, 3) for e in (0, 1)}
    unpacked = MemorySource(words)
    assert isinstance(laid_out_like(packed, unpacked), UnpackedExperts)
    assert laid_out_like(transposed, unpacked) is transposed
    assert laid_out_like(packed, packed) is packed
    gap = MemorySource({n.replace("experts.1.", "experts.2."): t for n, t in words.items()})
    assert laid_out_like(gap, packed) is gap
    dense = MemorySource({"w": torch.ones(2)})
    assert laid_out_like(dense, packed) is dense
    assert laid_out_like(packed, dense) is packed
