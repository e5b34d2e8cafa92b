"""Models that run before and after: what is streamed computes what a loaded model does, and every fault is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from locked_models import MODELS, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightsmith.align import running as module
from weightsmith.align.agree import Agreement, agreement, difference, outputs
from weightsmith.align.running import memory_of, running
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.io.read.open import open_source
from weightsmith.protect.run import lock

Tensors = dict[str, Tensor]

Q, K, V, OUT, UP, DOWN = (
    f"model.layers.1.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj",
                 "mlp.down_proj")
)  # fmt: skip
HEAD = 32


@pytest.mark.parametrize("name", MODELS)
def test_a_streamed_model_answers_as_one_that_is_held(name: str, tmp_path: Path) -> None:
    source = open_source(saved(name, tmp_path / "model"))
    streamed, held = running(source), running(source, hold=True)
    assert streamed.streamed
    assert not held.streamed
    for cached in (False, True):
        found, expected = (outputs(one.loaded, cached=cached) for one in (streamed, held))
        assert difference(expected, found) < 1e-5


# --- faults ----------------------------------------------------------------------------------------


def _mirror_the_slowest_pair(t: Tensors) -> None:
    """Right for neighbours: only far apart do positions turn this pair by a noticeable angle."""
    for name in (Q, K):
        t[name].view(-1, HEAD, t[name].shape[1])[:, HEAD - 1] *= -1


def _mix_pairs(t: Tensors) -> None:
    a = torch.linalg.qr(torch.randn(HEAD, HEAD, generator=torch.Generator().manual_seed(1)))[0]
    for name in (Q, K):
        mixed = a @ t[name].float().view(-1, HEAD, t[name].shape[1])
        t[name] = mixed.reshape(t[name].shape).to(t[name].dtype)


def _one_query_head_of_a_group(t: Tensors) -> None:
    t[Q][:HEAD] *= 2
    t[K][:HEAD] /= 2


def _values_without_outputs(t: Tensors) -> None:
    t[V][HEAD : HEAD + 2] = t[V][HEAD : HEAD + 2].flip(0)


def _heads_without_outputs(t: Tensors) -> None:
    for name in (Q, K, V):
        t[name] = t[name].roll(len(t[name]) // 2, 0)


def _units_without_their_readers(t: Tensors) -> None:
    t[UP] = t[UP].roll(1, 0)


def _one_scale(t: Tensors) -> None:
    t[DOWN][:, 5] *= 4


FAULTS = (_mirror_the_slowest_pair, _mix_pairs, _one_query_head_of_a_group, _values_without_outputs,
          _heads_without_outputs, _units_without_their_readers, _one_scale)  # fmt: skip


def _alongside(model: Path, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """A model beside another, with some of its tensors changed."""
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: Callable[[Tensors], None], dtype: torch.dtype, tmp_path: Path) -> None:
    """In the view that is not yet rounded, and in what was written."""
    model = saved("wide_heads", tmp_path / "model", dtype)
    wrong = _alongside(model, tmp_path / "wrong", fault)
    source, names = open_source(model), (Q, K, V, OUT, UP, DOWN)
    seen = agreement(source, open_source(wrong), model, names)
    assert seen.before is not None
    assert seen.before > 1e-4
    assert seen.after == pytest.approx(0, abs=1e-5)
    assert not seen.holds
    assert not agreement(source, source, wrong, names).holds
    assert agreement(source, source, model, names).holds


def test_padding_and_the_cache_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is wrong with a cache only, or in the padded sequence only, is seen."""
    from transformers.models.llama import modeling_llama

    model = saved("wide_heads", tmp_path / "model")
    source, first = open_source(model), modeling_llama.LlamaAttention.forward
    found = {}
    for what in ("cache", "padding"):

        def forward(self: nn.Module, hidden_states: Tensor, *a: object, what: str = what, **k: object) -> object:
            out, *rest = first(self, hidden_states, *a, **k)
            if what == "cache" and hidden_states.shape[1] == 1:
                out = out * 1.01
            if what == "padding" and k.get("past_key_values") is None:
                out = torch.cat([out[:1], out[1:] * 1.01])
            return (out, *rest)

        expected = outputs(running(source).loaded)
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
        loaded = running(source).loaded
        found[what] = difference(expected, outputs(loaded, cached=what == "cache"))
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", first)
    assert min(found.values()) > 1e-4


def test_a_model_that_answers_otherwise_with_a_cache_is_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    model = saved("wide_heads", tmp_path / "model")
    first = modeling_llama.LlamaAttention.forward

    def forward(self: nn.Module, hidden_states: Tensor, *a: object, **k: object) -> object:
        out, *rest = first(self, hidden_states, *a, **k)
        return (out * 1.1 if hidden_states.shape[1] == 1 else out, *rest)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    made = lock(model, tmp_path / "locked", tmp_path / "key")
    assert made.agreement is not None
    assert made.agreement.after < 1e-5


# --- what is held ----------------------------------------------------------------------------------


def test_a_class_that_uses_a_weight_by_itself_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are none lie where streamed weights would: they come through, and all weights are loaded."""
    from transformers.models.llama import modeling_llama

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate = nn.functional.linear(x, self.gate_proj.weight)  # type: ignore[arg-type, union-attr]
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))  # type: ignore[no-any-return, operator]

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    model = saved("wide_heads", tmp_path / "model")
    assert bool(outputs(running(open_source(model)).loaded).isnan().any())
    made = lock(model, tmp_path / "locked", tmp_path / "key")
    assert made.agreement is not None
    assert made.agreement.after < 1e-5
    monkeypatch.setattr(module, "available_memory", lambda _: 1000)
    with pytest.raises(SourceError, match=r"uses weights in a way of its own.*or pass --no-compare"):
        running(open_source(model), hold=True)


def test_large_matrices_take_no_memory_of_their_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    assert memory_of(source) < memory_of(source, hold=True) / 5
    held = [p for p in running(source).loaded.module.parameters() if p.ndim == 2]
    assert max(p.untyped_storage().nbytes() for p in held) == 4


def test_a_check_that_has_no_room_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model")
    with pytest.raises(PlanError, match=r"before and after takes about .* or pass --no-compare"):
        lock(model, tmp_path / "locked", tmp_path / "key", memory=10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_before_the_cast_the_limit_is_that_of_float32() -> None:
    assert Agreement(1e-5, 1e-2, 2e-2).holds
    assert not Agreement(1e-3, 1e-2, 2e-2).holds
    assert not Agreement(1e-5, 3e-2, 2e-2).holds
    assert Agreement(None, 1e-2, 2e-2).holds


def test_a_model_without_a_folder_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model")
    (model / "config.json").write_text(json.dumps({}))
    with pytest.raises(SourceError):
        running(open_source(model))
