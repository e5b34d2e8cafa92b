"""Second moments out of folders: torch.distributed.checkpoint and DeepSpeed's universal form."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from observe_models import saved, tiny_llama
from safetensors.torch import load_file

from kit import noise
from weightsmith.core.errors import SourceError
from weightsmith.observe.moments import second_moment

STEPS = 3


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    for step in range(STEPS):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(*p.shape, seed=100 * step + i)
        optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    correction = 1 - 0.999**STEPS
    return {names[id(p)]: (s["exp_avg_sq"] / correction).detach() for p, s in optimizer.state.items()}


def save(state: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process only
        dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("form", ["numbers", "names", "flat"])
def test_distributed_checkpoints(form: str, tmp_path: Path) -> None:
    """As torch hands the state over: numbered, by names in a folder of accelerate's, and flattened as torchtitan's."""
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = torch.optim.AdamW(model.parameters())
    wanted = trained(model, optimizer)
    state = optimizer.state_dict()
    if form != "numbers":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat")
        state = get_optimizer_state_dict(model, optimizer, options=options)
    inside = "dcp/optimizer_0" if form == "names" else "dcp"
    save({"model": model.state_dict(), "optimizer": state, "epoch": 2}, tmp_path / inside)
    second_moment(folder, tmp_path / "dcp", tmp_path / "stats")
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        # by numbers betas stand with the groups; by names torch keeps them there too
        assert torch.allclose(found[name], value, rtol=1e-5, atol=0), name


def test_deepspeeds_universal_form(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    optimizer = torch.optim.AdamW(model.parameters())
    wanted = trained(model, optimizer)
    zero = tmp_path / "universal" / "zero"
    for name, p in model.named_parameters():
        (zero / name).mkdir(parents=True)
        torch.save({"param": optimizer.state[p]["exp_avg_sq"]}, zero / name / "exp_avg_sq.pt")
        torch.save(STEPS, zero / name / "step.pt")
    torch.save({"param_groups": [{"betas": (0.9, 0.999)}]}, zero / "optimizer_state.pt")
    second_moment(folder, tmp_path / "universal", tmp_path / "stats")
    found = load_file(tmp_path / "stats" / "second_moment.safetensors")
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=0), name


def test_what_cannot_be_known(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = saved(model, tmp_path / "model")
    shards = tmp_path / "checkpoint-3" / "global_step3"
    shards.mkdir(parents=True)
    (shards / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    for given in (shards, shards.parent):
        with pytest.raises(SourceError, match=r"ds_to_universal\.py"):
            second_moment(folder, given, tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="neither a folder of torch"):
        second_moment(folder, tmp_path / "empty", tmp_path / "a")
    save({"model": model.state_dict()}, tmp_path / "bare")
    with pytest.raises(SourceError, match="no optimizer's state"):
        second_moment(folder, tmp_path / "bare", tmp_path / "a")
    optimizer = torch.optim.AdamW(list(model.parameters())[::-1])
    trained(model, optimizer)
    save({"optim": optimizer.state_dict()}, tmp_path / "reversed")
    with pytest.raises(SourceError, match="numbered"):
        second_moment(folder, tmp_path / "reversed", tmp_path / "a")
