"""The statistic `routing`: against plain loops, with padding, streamed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from observe_models import saved, tiny_llama, token_rows
from safetensors.torch import load_file

from experts.mixture_models import EXPERTS, FAMILIES, mixture, mixture_saved
from weightsmith.core.errors import WeightsmithError
from weightsmith.observe import routing as module
from weightsmith.observe.collect import observe
from weightsmith.observe.mixtures import Mixture, Routed, mixtures
from weightsmith.observe.model import load_model

ROWS = token_rows(5, 12)
TOKENS = sum(map(len, ROWS))


def stats(folder: Path, stat: str = "routing") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{stat}.safetensors")


def runs(model: Any, rows: list[list[int]]) -> list[tuple[Mixture, list[Routed]]]:
    """Every mixture with what it did with each text by itself: no padding."""
    found = mixtures(load_model(model))
    seen: list[list[Routed]] = [[] for _ in found]
    for one, into in zip(found, seen, strict=True):
        one.watched(into.append)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    return list(zip(found, seen, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_and_gates_make_up_what_the_layer_gives(family: str) -> None:
    """The layer's output is the sum of the chosen experts' own outputs times the gates (inside, in Llama 4)."""
    model = mixture(family)
    given: list[torch.Tensor] = []
    for one in (watched := mixtures(load_model(model))):
        one.experts.register_forward_hook(lambda m, a, out: given.append(out.detach()))
    made: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []

    def see(routed: Routed, one: Mixture) -> None:
        total = torch.zeros_like(routed.x)
        expected = torch.zeros_like(routed.norms)
        for token in range(len(routed.x)):
            for slot, expert in enumerate(routed.index[token].tolist()):
                gate = routed.gates[token, slot]
                x = routed.x[token : token + 1] * (gate if family == "llama4" else 1)
                y = list(one.each(x))[expert][0] * (1 if family == "llama4" else gate)
                total[token] += y
                expected[token, slot] = y.norm() / gate
        made.append(total)
        lengths.append((expected - routed.norms).abs().max())

    for one in watched:
        one.watched(lambda routed, one=one: see(routed, one))  # type: ignore[misc]
    with torch.no_grad():
        model(input_ids=torch.tensor([ROWS[0]]))
    outputs = [g.reshape(EXPERTS, -1, g.shape[-1]).sum(0) if family == "llama4" else g for g in given]
    assert len(made) == len(watched) == len(outputs) >= 1
    for total, out in zip(made, outputs, strict=True):
        torch.testing.assert_close(total, out, rtol=1e-4, atol=1e-6)
    assert max(lengths) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_loops_whatever_the_padding(family: str, tmp_path: Path) -> None:
    folder = mixture_saved(tmp_path / "m", family)
    observe(folder, ROWS, ["routing", "routed"], tmp_path / "s", batch=3, device="cpu")
    found, moments = stats(tmp_path / "s"), stats(tmp_path / "s", "routed")
    model = mixture(family)
    for one, seen in runs(model, ROWS):
        name = next(n.removesuffix(".counts") for n in found if n.endswith(".counts") and _block(n) == _block(one.name))
        index = torch.cat([r.index for r in seen])
        gates, norms = torch.cat([r.gates for r in seen]), torch.cat([r.norms for r in seen])
        x = torch.cat([r.x for r in seen])
        assert len(x) == TOKENS
        outputs = torch.stack(list(one.each(x))).detach().double()
        z = (x @ one.router.weight.T).detach().double()  # type: ignore[operator]
        for e in range(EXPERTS):
            hit = index == e
            assert found[f"{name}.counts"][e] == hit.sum()
            torch.testing.assert_close(found[f"{name}.gates"][e], gates[hit].sum())
            mean = (gates * norms)[hit].mean() if hit.any() else torch.tensor(0.0)
            torch.testing.assert_close(found[f"{name}.saliency"][e], mean.detach())
            rows = x[hit.any(1)].detach()
            torch.testing.assert_close(
                moments[f"{name}.inputs"][e], rows.T @ rows / max(len(rows), 1), rtol=1e-4, atol=1e-6
            )
        cosine = torch.nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1).mean(-1)
        means, gated = outputs.mean(1), (outputs * z.softmax(-1).T[..., None]).mean(1)
        expected = {
            "logits_gram": z.T @ z / TOKENS,
            "outputs_gram": torch.einsum("etd,ftd->ef", outputs, outputs) / TOKENS,
            "outputs_cosine": cosine,
            "means_gram": means @ means.T,
            "gated_means_gram": gated @ gated.T,
        }
        for word, value in expected.items():
            torch.testing.assert_close(found[f"{name}.{word}"].double(), value, rtol=1e-4, atol=1e-6)


def _block(name: str) -> str:
    return name.partition("layers.")[2].partition(".")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gives_the_same(family: str, tmp_path: Path) -> None:
    folder = mixture_saved(tmp_path / "m", family)
    for name, stream in (("whole", False), ("stream", True)):
        observe(folder, ROWS, ["routing"], tmp_path / name, batch=2, stream=stream, device="cpu")
    whole, stream = stats(tmp_path / "whole"), stats(tmp_path / "stream")
    assert whole.keys() == stream.keys()
    for name, value in whole.items():
        torch.testing.assert_close(stream[name], value, rtol=1e-5, atol=1e-7)
    assert [p.name for p in (tmp_path / "stream").iterdir()] == ["routing.safetensors"]


def test_blocks_asked_for(tmp_path: Path) -> None:
    folder = mixture_saved(tmp_path / "m", "mixtral")
    for name, stream in (("whole", False), ("stream", True)):
        observe(folder, ROWS, ["routing"], tmp_path / name, layers=(1, 2), stream=stream, device="cpu")
    whole, stream = stats(tmp_path / "whole"), stats(tmp_path / "stream")
    assert {_block(name) for name in whole} == {"1"}
    assert whole.keys() == stream.keys()
    for layers in ((2, 3), (5, 9)):
        for stream in (False, True):
            with pytest.raises(WeightsmithError, match="block"):
                observe(folder, ROWS, ["routing"], tmp_path / "none", layers=layers, stream=stream, device="cpu")
    assert not (tmp_path / "none" / "routing.safetensors").exists()


def test_blocks_that_config_does_not_count_are_left_out(tmp_path: Path) -> None:
    """A head for further tokens is not run; transformers drops it, too."""
    from experts.mixture_models import edited

    folder = mixture_saved(tmp_path / "m", "deepseek_v3", num_nextn_predict_layers=1)
    edited(folder, lambda t: t | {n.replace(".1.", ".2."): v.clone() for n, v in t.items() if ".layers.1." in n})
    observe(folder, ROWS, ["routing"], tmp_path / "s", stream=True, device="cpu")
    assert {_block(name) for name in stats(tmp_path / "s")} == {"1"}


def test_the_sample_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 7)
    folder = mixture_saved(tmp_path / "m", "mixtral")
    for batch in (1, 5):
        observe(folder, ROWS, ["routing"], tmp_path / str(batch), batch=batch, device="cpu")
    one, five = stats(tmp_path / "1"), stats(tmp_path / "5")
    for name, value in one.items():
        torch.testing.assert_close(five[name], value, rtol=1e-4, atol=1e-6)
    observe(folder, ROWS, ["routing"], tmp_path / "other", batch=5, seed=3, device="cpu")
    name = "model.layers.0.block_sparse_moe.experts.outputs_gram"
    assert not torch.allclose(stats(tmp_path / "other")[name], five[name], rtol=1e-3)


def test_experts_never_chosen_are_named(tmp_path: Path) -> None:
    model = mixture("gpt_oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e4
    observe(model, ROWS, ["routing"], tmp_path / "s", device="cpu")
    found = stats(tmp_path / "s")
    assert found["model.layers.0.mlp.experts.counts"][3] == 0 == found["model.layers.0.mlp.experts.saliency"][3]
    from weightsmith.io.read.stats import StatsSource

    notes = StatsSource(tmp_path / "s" / "routing.safetensors").origin.metadata
    assert {"name": "model.layers.0.mlp.experts.3", "reason": "never chosen on this data"} in notes["skipped"]
    assert notes["rows"] == TOKENS


@pytest.mark.parametrize(
    ("stats", "more", "words"),
    [
        (["routing"], {}, "no layer with experts"),
        (["gram"], {"stream": True}, "stream is for routing and routed"),
        (["routing"], {"stream": True}, "no single stack of blocks with experts"),
    ],
)
def test_refusals(stats: list[str], more: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "llama")
    with pytest.raises(WeightsmithError, match=words):
        observe(folder, ROWS, stats, tmp_path / "out", device="cpu", **more)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_unknown_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = mixture("mixtral")
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    with pytest.raises(WeightsmithError, match=r"MixtralExperts beside a Identity"):
        observe(model, ROWS, ["routing"], tmp_path / "out", device="cpu")


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    folder = mixture_saved(tmp_path / "m", "mixtral", vocab_size=300)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "some words"}))
    for stream in (False, True):
        with pytest.raises(WeightsmithError, match="no tokenizer files"):
            observe(folder, tmp_path / "t.jsonl", ["routing"], tmp_path / "out", stream=stream, device="cpu")
