"""SVFit beside LoRA with as many trained numbers: a byte-level Llama that knows maths and prose learns code.

The base is trained from scratch on two kinds of texts; each adapter then trains on the third at the best of several
rates, and everything else stays frozen.  LoRA is peft's; its modules and rank are chosen so that the counts are equal.
Figures are losses per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from study.train.cells import Figures, Room, searched, table
from study.train.languages import WIDTH, Texts, batches, llama, loss_of, read, rows_of, train
from weightsmith.io.read.svfit import decomposed
from weightsmith.train import svfit

__all__ = ["study"]

SEEDS, STEPS = (0,), 80
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATES: Mapping[str, tuple[float, ...]] = {
    "svfit": (3e-2, 1e-1, 3e-1), "lora": (3e-3, 1e-2, 3e-2, 1e-1), "full": (1e-3,)
}  # fmt: skip


def values(model: nn.Module, r: int | None, modules: tuple[str, ...] = EVERY, bottom: bool = False) -> None:
    """SVFit, of the leading values or of the last."""
    tuned = svfit.wrap(model, r, target_modules=modules)
    if not bottom:
        return
    for name, own in tuned.modules.items():
        u, s, v = decomposed(model.get_submodule(name).weight)
        chosen = torch.arange(len(s) - len(own.s), len(s))
        own.u.copy_(u[:, chosen])
        own.s.copy_(s[chosen])
        own.v.copy_(v[chosen])


def lora(model: nn.Module, modules: tuple[str, ...], r: int = 1) -> None:
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(modules)), model)


WAYS: Mapping[str, tuple[str, Callable[[nn.Module], None]]] = {
    "nothing trains": ("full", lambda m: m.requires_grad_(False)),
    "everything": ("full", lambda m: None),
    "SVFit, all values of q and v": ("svfit", lambda m: values(m, None, ("q_proj", "v_proj"))),
    "LoRA, r = 1, q": ("lora", lambda m: lora(m, ("q_proj",))),
    "SVFit, all values of 7 matrices": ("svfit", lambda m: values(m, None)),
    "LoRA, r = 1, q, v, gate": ("lora", lambda m: lora(m, ("q_proj", "v_proj", "gate_proj"))),
    "SVFit, top 24 of 7 matrices": ("svfit", lambda m: values(m, 24)),
    "SVFit, bottom 24": ("svfit", lambda m: values(m, 24, bottom=True)),
}


def base(room: Room, texts: Texts, seed: int) -> nn.Module:
    """Trained on maths and prose; kept."""

    def make(place: object) -> None:
        model = llama(seed)
        given = batches([*texts["maths"]["train"][:2000], *texts["prose"]["train"]], seed)
        train(model, torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0), given, room.steps(400))
        save_model(model, str(place / "model.safetensors"))  # type: ignore[operator]

    model = llama(seed)
    load_model(model, str(room.folder(f"adapters/base-{seed}", make) / "model.safetensors"))
    return model


def adapted(room: Room, texts: Texts, way: str, rate: float, seed: int) -> Figures:
    model = base(room, texts, seed)
    WAYS[way][1](model)
    chosen = [p for p in model.parameters() if p.requires_grad]
    if chosen:
        optimizer = torch.optim.AdamW(chosen, rate, weight_decay=0.0)
        train(model, optimizer, batches(texts["code"]["train"], seed), room.steps(STEPS))
    model.eval()
    with torch.no_grad():
        found = {kind: float(loss_of(model, rows_of(texts[kind]["test"]))) for kind in ("code", "maths")}
    return {**found, "numbers": sum(p.numel() for p in chosen), "rate": rate}


def study(room: Room) -> str:
    """The table."""
    assert WIDTH == 96  # the counts are equal for this width
    texts = read(room.data)
    rows = {
        way: searched(
            room,
            f"adapters/{way}",
            (0.0,) if way == "nothing trains" else RATES[kind],
            lambda rate, seed, way=way: adapted(room, texts, way, rate, seed),
            SEEDS,
            "code",
        )
        for way, (kind, _) in WAYS.items()
    }
    return table("loss per byte, nats", rows, ("code", "maths", "numbers", "rate", "seconds"))
