"""Models in several folders, and weights that a library looks for under names of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from kit import noise
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.io.package.manifest import verify_folder

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


def put(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".safetensors"), {"format": "pt"})
    (path.parent / "config.json").write_text(json.dumps(config))


def merged(tmp_path: Path, out: str = "out", **tree: Any) -> list[str]:
    result = ws.Recipe.model_validate(tree).run(tmp_path / out)
    return [str(warning) for warning in result.warnings]


# --- diffusers -------------------------------------------------------------------------------------


def test_a_component_keeps_the_name_that_diffusers_looks_for(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        put(tmp_path / name / "diffusion_pytorch_model", {"conv_in.weight": noise(4, 4, 3, 3, seed=seed)},
            _class_name="UNet2DConditionModel")  # fmt: skip
    models = {name: str(tmp_path / name) for name in "ab"}
    merged(tmp_path, models=models, method="linear")
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").is_file()
    merged(tmp_path, "sharded", models=models, method="linear", output={"shard_size": 1})
    assert not verify_folder(tmp_path / "sharded")
    assert not (tmp_path / "sharded/model.safetensors").exists()
    files = {name: str(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in "ab"}
    merged(tmp_path, "files", models=files, method="linear")
    assert (tmp_path / "files/diffusion_pytorch_model.safetensors").is_file()


def pipeline(folder: Path, seed: int) -> str:
    put(folder / UNET, {"down_blocks.0.w": noise(4, 3, seed=seed), "conv_in.w": noise(3, seed=seed + 1)}, sample_size=8)
    put(folder / VAE, {"encoder.w": noise(3, seed=seed + 2)})
    put(folder / TEXT, {"text_model.embeddings.w": noise(5, 2, seed=seed + 3)}, torch_dtype="float32")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    index |= {name: ["library", "Class"] for name in ("unet", "vae", "text_encoder", "scheduler")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def test_a_pipeline_is_merged_by_component(tmp_path: Path) -> None:
    models = {name: pipeline(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    rules = [{"match": "vae.*", "method": "keep"}]
    weights = {"a": {"model": models["a"], "weight": 1}, "b": {"model": models["b"], "weight": 3}}
    said = merged(tmp_path, models=weights, method="linear", rules=rules, output={"dtype": "float16"})
    assert not said
    out = tmp_path / "out"
    a, b, made = ({stem: load_file(p / f"{stem}.safetensors") for stem in (UNET, VAE, TEXT)}
                  for p in (tmp_path / "a", tmp_path / "b", out))  # fmt: skip
    for stem in (UNET, TEXT):
        for name, tensor in made[stem].items():
            torch.testing.assert_close(tensor, ((a[stem][name] + 3 * b[stem][name]) / 4).half())
    assert torch.equal(made[VAE]["encoder.w"], a[VAE]["encoder.w"].half())
    for file in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (out / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    assert json.loads((out / "text_encoder/config.json").read_text()) == {"torch_dtype": "float16"}
    assert not list(out.glob("*.safetensors"))
    assert not verify_folder(out)
    (out / f"{UNET}.safetensors").write_bytes((out / f"{UNET}.safetensors").read_bytes()[:-1] + b"\7")
    assert any("unet.down_blocks.0.w" in line or "unet.conv_in.w" in line for line in verify_folder(out))


def test_shards_of_a_pipeline_and_a_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: pipeline(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    tree = {"models": models, "method": "linear", "output": {"shard_size": 12}}
    recipe = ws.Recipe.model_validate(tree)
    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.jobs.job.build_manifest", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipe.run(tmp_path / "out")
    result = recipe.run(tmp_path / "out", resume=True)
    assert not result.complete
    index = json.loads((tmp_path / f"out/{UNET}.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"down_blocks.0.w", "conv_in.w"}
    assert all(file.startswith("diffusion_pytorch_model-0000") for file in index["weight_map"].values())
    assert not verify_folder(tmp_path / "out")
    merged(tmp_path, "again", models={"a": models["a"], "out": str(tmp_path / "out")}, method="linear")


def test_a_component_that_one_pipeline_lacks(tmp_path: Path) -> None:
    models = {name: pipeline(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    (tmp_path / f"b/{VAE}.safetensors").unlink()
    with pytest.raises(PlanError, match=r"vae\.encoder\.w is missing in b"):
        merged(tmp_path, models=models, method="linear")
    (tmp_path / "b/model_index.json").write_text("{}")
    with pytest.raises(PlanError, match=r"none of the components that model_index\.json names has weights"):
        merged(tmp_path, models=models, method="linear")


def test_components_as_pytorch_writes_them(tmp_path: Path) -> None:
    """Those that are pickled count like others; those of another kind are not left out in silence."""
    models = {name: pipeline(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    values = [load_file(tmp_path / f"{name}/{UNET}.safetensors") for name in "ab"]
    for name, tensors in zip("ab", values, strict=True):
        torch.save(tensors, tmp_path / f"{name}/{UNET}.bin")
        (tmp_path / f"{name}/{UNET}.safetensors").unlink()
    merged(tmp_path, models=models, method="linear")
    made = load_file(tmp_path / f"out/{UNET}.safetensors")
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (values[0][name] + values[1][name]) / 2)
    assert sorted(path.name for path in (tmp_path / "out/unet").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    (tmp_path / f"b/{UNET}.bin").rename(tmp_path / "b/unet/diffusion_flax_model.msgpack")
    with pytest.raises(
        PlanError, match=r"b/unet/diffusion_flax_model.msgpack: weights of this kind are not read; save unet as"
    ):
        merged(tmp_path, models=models, method="linear")


# --- Sentence-Transformers -------------------------------------------------------------------------


def sentence(folder: Path, seed: int, pooling: str = "mean", dense: bool = True, **settings: Any) -> str:
    put(folder / "model", {"encoder.w": noise(4, 4, seed=seed)}, model_type="bert")
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    if dense:
        put(folder / "2_Dense/model", {"linear.weight": noise(3, 4, seed=seed + 1)}, in_features=4, out_features=3)
        modules.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 4, "pooling_mode": pooling}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, **settings}))
    return str(folder)


def test_dense_modules_are_merged_like_other_weights(tmp_path: Path) -> None:
    models = {name: sentence(tmp_path / name, 10 * i) for i, name in enumerate(("base", "a", "b"))}
    base = models.pop("base")
    said = merged(tmp_path, base=base, models=models, method={"task_arithmetic": {"lambda": 0.5}})
    assert not said
    base_, a, b, made = (load_file(tmp_path / n / "2_Dense/model.safetensors")["linear.weight"]
                         for n in ("base", "a", "b", "out"))  # fmt: skip
    torch.testing.assert_close(made, base_ + 0.5 * (a - base_) + 0.5 * (b - base_))
    assert (tmp_path / "out/2_Dense/config.json").is_file()
    assert not verify_folder(tmp_path / "out")


def test_unlike_modules_are_said_with_both_values(tmp_path: Path) -> None:
    models = {"a": sentence(tmp_path / "a", 0, max_seq_length=16)}
    models["b"] = sentence(tmp_path / "b", 10, "cls", prompts={"query": "q: "}, max_seq_length=32)
    said = merged(tmp_path, models=models, method="linear")
    assert said == [
        "1_Pooling: pooling is mean in a, cls in b; the result has that of a",
        "max_seq_length is 16 in a, 32 in b; the result has that of a",
        'prompts is not there in a, {"query": "q: "} in b; the result has that of a',
    ]
    old = {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (tmp_path / "b/1_Pooling/config.json").write_text(json.dumps(old))  # as releases before 5 wrote it
    assert not any("pooling" in line for line in merged(tmp_path, "old", models=models, method="linear"))


def test_a_module_that_one_model_lacks_stays_the_first_models(tmp_path: Path) -> None:
    models = {"a": sentence(tmp_path / "a", 0), "b": sentence(tmp_path / "b", 10, dense=False)}
    said = merged(tmp_path, models=models, method="linear")
    assert said == ["2_Dense (Dense) is in a, not in b: the result has that of a, as it is"]
    files = [tmp_path / name / "2_Dense/model.safetensors" for name in ("a", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    said = merged(tmp_path, "other", models=dict(reversed(models.items())), method="linear")
    assert said == ["2_Dense (Dense) is in a, not in b: the result has none"]
    assert not (tmp_path / "other/2_Dense").exists()


def test_modules_that_all_have_are_merged_beside_those_that_one_lacks(tmp_path: Path) -> None:
    models = {name: sentence(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    put(tmp_path / "b/3_LayerNorm/model", {"norm.weight": noise(3)}, dimension=3)
    listed = json.loads((tmp_path / "b/modules.json").read_text())
    entry = {"path": "3_LayerNorm", "type": "sentence_transformers.models.LayerNorm"}
    (tmp_path / "b/modules.json").write_text(json.dumps([*listed, entry]))
    said = merged(tmp_path, models=models, method="linear")
    assert said == ["3_LayerNorm (LayerNorm) is in b, not in a: the result has none"]
    a, b, made = (load_file(tmp_path / n / "2_Dense/model.safetensors")["linear.weight"] for n in ("a", "b", "out"))
    torch.testing.assert_close(made, (a + b) / 2)


def test_a_base_without_modules_makes_a_result_without(tmp_path: Path) -> None:
    models = {name: sentence(tmp_path / name, 10 * i) for i, name in enumerate("ab")}
    put(tmp_path / "base/model", {"encoder.w": noise(4, 4, seed=5)}, model_type="bert")
    said = merged(tmp_path, base=str(tmp_path / "base"), models=models, method={"task_arithmetic": {"lambda": 0.5}})
    assert "base has no modules.json of Sentence-Transformers, nor has the result; a, b have one" in said
    assert not (tmp_path / "out/2_Dense").exists()


def test_models_whose_weights_lie_in_modules_alone(tmp_path: Path) -> None:
    """A router of two static embeddings, in the folder itself (as Sentence-Transformers 6 saves it) or one below."""
    for seed, name in enumerate("ab"):
        for part in ("document_0_StaticEmbedding", "query_0_StaticEmbedding"):
            put(tmp_path / name / part / "model", {"embedding.weight": noise(6, 3, seed=seed)})
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
    models = {name: str(tmp_path / name) for name in "ab"}
    merged(tmp_path, "flat", models=models, method="linear")
    made = load_file(tmp_path / "flat/query_0_StaticEmbedding/model.safetensors")
    torch.testing.assert_close(made["embedding.weight"], (noise(6, 3, seed=0) + noise(6, 3, seed=1)) / 2)
    (tmp_path / "a/modules.json").write_text("[]")
    with pytest.raises(SourceError, match="no model here"):
        ws.merge([tmp_path / "a", tmp_path / "b"], "average")
    for name in "ab":
        modules = [{"idx": 0, "name": "0", "path": "0_Router", "type": "sentence_transformers.models.Router"}]
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
        (tmp_path / name / "0_Router").mkdir()
        for part in ("document_0_StaticEmbedding", "query_0_StaticEmbedding"):
            (tmp_path / name / part).rename(tmp_path / name / "0_Router" / part)
    merged(tmp_path, models=models, method="linear")
    made = load_file(tmp_path / "out/0_Router/query_0_StaticEmbedding/model.safetensors")
    torch.testing.assert_close(made["embedding.weight"], (noise(6, 3, seed=0) + noise(6, 3, seed=1)) / 2)
