"""What merging with a locked model does, what the attack takes back, and tensors that are unlike the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from locked_models import saved
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightsmith.align.canonical import canonical, least_squares
from weightsmith.align.invariance import known
from weightsmith.cli.main import main
from weightsmith.core.errors import SourceError
from weightsmith.engine.compare import compare_tensors, gathered
from weightsmith.io.read.open import open_source
from weightsmith.protect.audit import audit, plain_words
from weightsmith.protect.outliers import outliers
from weightsmith.protect.run import lock

_TEXT = "".join(f"the {a} {b} of a {c} model. " for a in ("first", "second", "last") for b in ("weight", "row", "head")
                for c in ("small", "large", "merged", "locked"))  # fmt: skip


def _trained(folder: Path, start: Path | None, text: str, steps: int, rate: float) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = t.LlamaConfig(**sizes, intermediate_size=64, vocab_size=256, max_position_embeddings=128)
    model = t.LlamaForCausalLM(config) if start is None else t.LlamaForCausalLM.from_pretrained(start)
    step = torch.optim.AdamW(model.parameters(), lr=rate)
    data = torch.tensor(list(text.encode()))
    for _ in range(steps):
        places = torch.randint(0, len(data) - 33, (8,))
        ids = torch.stack([data[i : i + 32] for i in places])
        loss = model(input_ids=ids, labels=ids).loss
        step.zero_grad()
        loss.backward()
        step.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained base, two fine-tunes, one of them locked, and a text."""
    folder = tmp_path_factory.mktemp("family")
    _trained(folder / "base", None, _TEXT, 150, 5e-3)
    _trained(folder / "tuned", folder / "base", _TEXT.upper() + _TEXT, 12, 1e-3)
    _trained(folder / "other", folder / "base", _TEXT[::-1] + _TEXT, 12, 1e-3)
    lock(folder / "tuned", folder / "locked", folder / "key", compare=False)
    (folder / "text.txt").write_text(_TEXT)
    return folder


def test_merges_fail_and_the_attack_takes_it_back(family: Path) -> None:
    found = audit(
        family / "locked", family / "base", experts={"other": family / "other"}, unlocked=family / "tuned",
        data=family / "text.txt", examples=4, length=64,
    )  # fmt: skip
    assert found.alone["model"].loss == pytest.approx(found.alone["unlocked"].loss, abs=1e-3)
    scored = {(d.method, d.partner): d for d in found.damage}
    assert len(scored) == 8
    for partner in ("base", "other"):
        one = scored["average", partner]
        assert one.given is not None
        assert one.restored is not None
        assert one.unlocked is not None
        assert one.given.perplexity > 1.5 * one.unlocked.perplexity
        assert one.restored.perplexity == pytest.approx(one.unlocked.perplexity, rel=0.05)
    assert found.attack is not None
    assert found.attack.error is not None
    assert found.attack.error[0] < 0.1
    before, after = found.attack.distances["attentions"]
    assert before >= 1 > 0.5 > after
    said = " ".join(plain_words(found))
    assert "says that it is locked" in said
    assert "the lock is worth nothing" in said
    assert "protected" not in said


def test_an_unlocked_model_takes_no_harm(family: Path) -> None:
    found = audit(family / "tuned", family / "base", data=family / "text.txt", examples=4, length=64)
    said = " ".join(plain_words(found))
    assert "does not say that it is locked" in said
    assert "no lock here that stops it" in said


def test_the_command_line(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["audit", str(family / "locked"), "--base", str(family / "base")]
    assert main([*words, "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "what merging does to the model was not measured" in said
    assert "does not say that a model is safe" in said
    assert "Audit of" in (tmp_path / "page.html").read_text()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attack"]["distances"]["attentions"][0] > 1
    assert found["words"]
    assert main(["audit", str(family / "locked"), "--base", str(tmp_path)]) == 2


@pytest.mark.parametrize("name", ["wide_heads", "qwen3", "olmo2", "gpt2", "phi3", "deepseek", "mixtral", "bert"])
@pytest.mark.parametrize(("share", "most"), [(0.0, 1e-5), (0.1, 0.06)])
def test_every_layout_is_recovered(name: str, share: float, most: float, tmp_path: Path) -> None:
    """Exactly where the model is its base, and within a part of what it learned where it moved."""
    base = saved(name, tmp_path / "base")
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "config.json").write_text((base / "config.json").read_text())
    draw = torch.Generator().manual_seed(1)

    def moved(x: Tensor) -> Tensor:
        floats = x.is_floating_point() and x.numel() > 1
        return x + share * x.std() * torch.randn(x.shape, generator=draw) if floats else x

    tensors = {n: moved(x) for n, x in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    lock(tmp_path / "tuned", tmp_path / "locked", tmp_path / "key", compare=False)
    start, truth, given = (open_source(tmp_path / n) for n in ("base", "tuned", "locked"))
    found = canonical(given, start, known(given))
    names = [n for n, k in truth.keys.items() if len(k.shape) > 1]
    assert gathered(compare_tensors(truth, given, names)).relative > 0.5
    assert gathered(compare_tensors(truth, found.source, names)).relative < most
    assert found.moved
    if name == "mixtral":  # experts are compared as they are packed
        attack = audit(given, start, unlocked=truth).attack
        assert attack is not None
        assert attack.error is not None
        assert attack.distances["MLPs"][0] > 1
        assert attack.error[0] < most


def test_least_squares_are_the_smallest() -> None:
    draw = np.random.default_rng(0)
    f, s, first, second = (draw.standard_normal((4, 9)) for _ in range(4))
    best = least_squares(first, f, second, s)

    def error(a: np.ndarray) -> float:
        return float(((first - a @ f) ** 2).sum() + ((a.T @ second - s) ** 2).sum())

    assert all(error(best) < error(best + 1e-3 * draw.standard_normal((4, 4))) for _ in range(20))


# --- outliers --------------------------------------------------------------------------------------


def _strangers(folder: Path) -> dict[str, Path]:
    shapes = {"model.embed_tokens.weight": (120, 16), "model.layers.0.mlp.down_proj.weight": (16, 24)}
    shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (16, 16) for i in range(3)}
    draw = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    task = {n: 0.05 * torch.randn(s, generator=draw) for n, s in shapes.items()}
    out = {}
    for name in ("base", "a", "b", "c", "model"):
        own = {
            n: x + (name != "base") * (task[n] + 0.02 * torch.randn(x.shape, generator=draw)) for n, x in base.items()
        }
        if name == "model":
            own["model.embed_tokens.weight"][[7, 9]] += 3
            own["model.layers.0.mlp.down_proj.weight"] += torch.outer(torch.ones(16), torch.randn(24, generator=draw))
            q = "model.layers.1.self_attn.q_proj.weight"
            own[q] = base[q] - task[q]
        (folder / name).mkdir()
        save_file(own, folder / name / "model.safetensors", {"format": "pt"})
        out[name] = folder / name
    return out


def test_planted_tensors_are_named_by_their_rule(tmp_path: Path) -> None:
    folders = _strangers(tmp_path)
    base, model, *others = (open_source(folders[n]) for n in ("base", "model", "a", "b", "c"))
    found = {(o.tensor, o.rule) for o in outliers(base, model, dict(zip("abc", others, strict=True)))}
    assert ("model.embed_tokens.weight", "rows") in found
    assert ("model.layers.0.mlp.down_proj.weight", "spectrum") in found
    assert ("model.layers.1.self_attn.q_proj.weight", "signs") in found
    assert not {tensor for tensor, _ in found} & {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2)}
    assert outliers(base, others[0], dict(zip("bc", others[1:], strict=True))) == []
    assert {o.rule for o in outliers(base, model, {})} >= {"rows", "spectrum"}


def test_a_stranger_whose_layout_is_not_known_is_looked_at_all_the_same(tmp_path: Path) -> None:
    folders = _strangers(tmp_path)
    found = audit(folders["model"], folders["base"], experts={n: folders[n] for n in "abc"})
    assert found.attack is None
    assert "no config.json" in found.failed
    assert found.outliers
    assert "that somebody else can is likely" in " ".join(plain_words(found))


def test_models_that_do_not_go_together(tmp_path: Path, family: Path) -> None:
    saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(SourceError, match="no tensor in common"):
        audit(family / "locked", tmp_path / "gpt2")
    saved("llama", tmp_path / "llama")
    with pytest.raises(SourceError, match=r"is \[\d+, 32\] in .* and \[60, 32\] in"):
        audit(family / "locked", tmp_path / "llama")
