"""Companion files: all that is not weights goes along, nothing else does, and nothing is dropped in silence."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.package.companions import companions, copy_companions, left_behind, with_dtype

GO = {
    "config.json": '{"hidden_size": 4, "torch_dtype": "bfloat16"}',
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"a": 1}',
    "chat_template.jinja": "{{ x }}",
    "additional_chat_templates/tool.jinja": "{{ y }}",
    "preprocessor_config.json": "{}",
    "LICENSE": "Apache",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
    "1_Pooling/config.json": '{"dtype": "float16"}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "dense weights",
}
MERGED = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
STAY = {
    "model.safetensors.index.json": "index of the weights",
    "pytorch_model.bin": "weights",
    "other.safetensors": "weights",
    "onnx/model.onnx": "weights",
    "openvino/openvino_model.xml": "weights",
    "README.md": "replaced by the new model card",
    "weightsmith.json": "replaced by the new manifest",
    "adapter_config.json": "describes an adapter, not the merged model",
    "checkpoint-500/config.json": "training checkpoint",
    ".git/config": "version control",
    ".cache/huggingface/x.lock": "download cache",
    "cached.pkl": "pickle: runs code when loaded",
    "modeling_x.py": "code: not copied unless allowed",
    "deep/hook.py": "code: not copied unless allowed",
}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def base(tmp_path):
    return fill(tmp_path / "base", {**GO, **dict.fromkeys(MERGED, "w"), **dict.fromkeys(STAY, "x")})


def test_every_file_is_accounted_for(base, tree):
    going = {path.as_posix() for path in companions(base, MERGED)}
    staying = left_behind(base, MERGED)
    assert going == set(GO)
    assert staying == STAY
    assert set(tree(base)) == going | set(staying) | MERGED


def test_code_goes_only_if_allowed(base):
    assert {path.as_posix() for path in companions(base, MERGED, code=True)} == {*GO, "modeling_x.py", "deep/hook.py"}
    assert not [name for name, why in left_behind(base, MERGED, code=True).items() if "code:" in why]


def test_copies_are_exact_and_listed(base, tmp_path, tree):
    copied = copy_companions(base, tmp_path / "out", MERGED)
    assert tree(tmp_path / "out") == {name: text.encode() for name, text in GO.items()}
    assert copied.files == tuple(sorted(GO))
    assert copied.modules == ("2_Dense/model.safetensors",)
    assert copied.left == STAY


def test_a_large_file_is_never_in_memory_as_a_whole(base, tmp_path):
    """The weights of an unmerged module may have gigabytes."""
    large = base / "2_Dense/model.safetensors"
    with large.open("wb") as file:
        file.write(b"begin")
        file.truncate(60_000_000)
    tracemalloc.start()
    try:
        copy_companions(base, tmp_path / "out", MERGED)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out/2_Dense/model.safetensors").read_bytes() == large.read_bytes()
    assert peak < 8_000_000


def test_a_companion_that_cannot_be_read_to_its_end(base, tmp_path, monkeypatch):
    """It is the input that fails, not the output."""
    real = system.call

    def call(function, /, *args, **kwargs):
        if getattr(function, "__name__", "") == "read" and args == (1 << 20,):
            raise OSError(5, "Input/output error")
        return real(function, *args, **kwargs)

    monkeypatch.setattr(system, "call", call)
    with pytest.raises(SourceError, match=r"cannot read .*/base/.*: Input/output error"):
        copy_companions(base, tmp_path / "out", MERGED)


def test_a_new_dtype_changes_that_field_and_no_other_byte(base, tmp_path, tree):
    copy_companions(base, tmp_path / "out", MERGED, dtype="float32")
    changed = {"config.json": b'{"hidden_size": 4, "torch_dtype": "float32"}'}
    assert tree(tmp_path / "out") == {name: text.encode() for name, text in GO.items()} | changed


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"dtype":"bfloat16"}', '{"dtype":"float16"}'),
        ('{"torch_dtype" : "torch.bfloat16", "eps": 1e-05}', '{"torch_dtype" : "torch.float16", "eps": 1e-05}'),
        ('{"a": {"dtype": "float32"}, "dtype": null}', '{"a": {"dtype": "float16"}, "dtype": null}'),
        ('{"dtype": "auto", "cache_dtype": "float32"}', '{"dtype": "auto", "cache_dtype": "float32"}'),
        ('{"x": "say \\"dtype\\": \\"float32\\""}', '{"x": "say \\"dtype\\": \\"float32\\""}'),
        ("{}", "{}"),
    ],
)
def test_dtype_fields(config, expected):
    json.loads(config)
    assert with_dtype(config, "float16") == expected


def test_the_tokenizer_may_come_from_another_model(base, tmp_path, tree):
    other = fill(
        tmp_path / "other", {"tokenizer.model": "sp", "chat_template.jinja": "new", "config.json": "no", "x.bin": ""}
    )
    copied = copy_companions(base, tmp_path / "out", MERGED, tokenizer=other)
    files = tree(tmp_path / "out")
    assert files["tokenizer.model"] == b"sp"
    assert files["chat_template.jinja"] == b"new"
    assert files["config.json"] == GO["config.json"].encode()
    gone = {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"}
    assert set(files) == set(GO) - gone | {"tokenizer.model"} == set(copied.files)
    assert {name for name, why in copied.left.items() if why == "the tokenizer comes from another model"} == gone


def test_a_tokenizer_folder_without_one_is_refused(base, tmp_path):
    other = fill(tmp_path / "other", {"config.json": "{}"})
    with pytest.raises(SourceError, match="other holds no tokenizer files; name another folder or model"):
        copy_companions(base, tmp_path / "out", MERGED, tokenizer=other)
    assert not (tmp_path / "out").exists()


def test_links_to_files_are_copied_and_links_to_folders_are_not_followed(tmp_path):
    blobs = fill(tmp_path / "blobs", {"b1": '{"a": 1}'})
    (base := tmp_path / "snapshots" / "base").mkdir(parents=True)  # as in the hub's cache
    (base / "config.json").symlink_to(blobs / "b1")
    (base / "all").symlink_to(blobs)
    (base / "dangling.json").symlink_to(tmp_path / "nowhere")
    copied = copy_companions(base, tmp_path / "out", set())
    assert (tmp_path / "out/config.json").read_text() == '{"a": 1}'
    assert not (tmp_path / "out/config.json").is_symlink()
    assert copied.left == {"all": "not a regular file", "dangling.json": "not a regular file"}


@pytest.mark.parametrize("text", ["{", '["x"]', "3", '[{"idx": 0}]'])
def test_a_broken_modules_file_is_refused(tmp_path, text):
    fill(tmp_path, {"modules.json": text})
    with pytest.raises(SourceError, match=r"modules\.json: not a list of modules with a path each .*; repair or"):
        companions(tmp_path, set())
