"""Calibration data: text, token ids or images, as examples of one kind."""

from __future__ import annotations

import importlib
import itertools
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import MissingExtra, SourceError, WeightsmithError, did_you_mean
from weightsmith.io.read.small import json_lines
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel, TextCoder, text_coder

__all__ = ["Batch", "Example", "batches", "read_examples", "read_texts"]

_IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_ARRAYS = ("x", "x_train", "images", "pixel_values", "input_features", "input_values")
_LABEL_ARRAYS = ("y", "y_train", "labels")
# Fields of well-known data sets that together make one text, joined by a line break; the first that fits.
_TEXT_FIELDS = (
    ("text",),
    ("content",),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt",),
    ("question",),
)


@dataclass(frozen=True, eq=False)
class Example:
    """inputs: [tokens] int64 or one image [...] float; label: the class, if known."""

    inputs: Tensor
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """inputs: [batch, ...]; mask: [batch, tokens], False at padding, or None where there is none."""

    inputs: Tensor
    mask: Tensor | None


def read_examples(
    data: str | Path | Iterable[Any],
    loaded: LoadedModel,
    *,
    examples: int = 256,
    length: int = 512,
    seed: int = 0,
    field: str | None = None,
    trust_remote_code: bool = False,
) -> list[Example]:
    """At most `examples` of the data: the first ones of an iterable, a seeded choice (in file order) of a file.

    Files: .txt (cut into blocks of `length` tokens), .jsonl (`field`, or text / question + answer / ...; cut to
    `length`; for a classifier of texts also `label`), .npz (images or sounds `field`, `x` or `x_train`, labels `y` or
    `y_train`), a folder of .txt or of images.  An iterable gives texts, token ids, tensors, (input, label) pairs, or
    mappings with input_ids, pixel_values or input_values and, if wanted, labels: one example each, no batch axis.
    """
    length = loaded.clip_length(length)
    if isinstance(data, (str, Path)):
        reader = _Reader(loaded, length, seed, examples, field, trust_remote_code)
        found = reader.read(Path(data).expanduser())
    else:
        coder: list[TextCoder] = []  # made for the first text, if there is one
        found = []
        for item in itertools.islice(data, examples):
            if isinstance(item[0] if isinstance(item, tuple) and item else item, str) and not coder:
                coder.append(text_coder(loaded, trust_remote_code=trust_remote_code))
            found.append(_example_of(item, loaded.kind, length, coder[0] if coder else None))
    if not found:
        raise SourceError(f"{_label(data)}: no example in it")
    return found


def read_texts(data: str | Path, field: str | None = None) -> list[str]:
    """The texts of a .txt, of a folder of .txt (a text each), or of a .jsonl (one a line, as in `read_examples`)."""
    path = Path(data).expanduser()
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder of texts")
    files = sorted(p for p in path.iterdir() if p.suffix == ".txt") if path.is_dir() else [path]
    if path.suffix == ".jsonl":
        found = [_text_of(row, place, field) for place, row in _rows(path)]
    elif not files or files[0].suffix != ".txt":
        raise SourceError(f"{path}: unknown kind of texts; use .txt, .jsonl, or a folder of .txt")
    else:
        found = [_read_text(file) for file in files]
    if not any(found):
        raise SourceError(f"{path}: no text in it")
    return found


def batches(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Consecutive examples; token sequences of unlike length are padded on the right with 0 and masked."""
    for start in range(0, len(examples), size):
        inputs = [example.inputs for example in examples[start : start + size]]
        shapes = {tuple(x.shape) for x in inputs}
        if len(shapes) == 1:
            yield Batch(torch.stack(inputs), None)
        elif all(x.ndim == 1 and x.dtype == torch.int64 for x in inputs):
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in inputs], True)
            yield Batch(torch.nn.utils.rnn.pad_sequence(inputs, True), mask)
        else:
            raise SourceError(f"images of unlike shapes {sorted(shapes)}; resize them to one")


# --- one example -----------------------------------------------------------------------------------


def _example_of(item: Any, kind: str, length: int, coder: TextCoder | None) -> Example:
    label = None
    if isinstance(item, str):
        assert coder is not None
        return _token_example(coder.example(item, length), length)
    labelled = kind in _LABELLED
    text = KINDS[kind].reads == "text"
    if isinstance(item, Mapping):
        names = {"text": ("input_ids",), "image": ("pixel_values",), "sound": ("input_values", "input_features")}
        wanted = names.get(KINDS[kind].reads, ("input_ids", "pixel_values"))
        name = next((name for name in wanted if name in item), None)
        if name is None:
            which = " or ".join(map(repr, wanted))
            raise SourceError(f"an example for {kind} needs {which}; it has {', '.join(map(str, item))}")
        text = name == "input_ids"
        keep = item.get("attention_mask")
        inputs = torch.as_tensor(item[name])
        if keep is not None:
            inputs = inputs[torch.as_tensor(keep).bool()]
        label = item.get("labels") if labelled else None
    elif isinstance(item, tuple) and len(item) == 2 and labelled:
        if isinstance(item[0], str):
            return replace(_example_of(item[0], kind, length, coder), label=int(item[1]))
        inputs, label = torch.as_tensor(item[0]), item[1]
    else:
        inputs = torch.as_tensor(item)
        text = text or (KINDS[kind].reads == "text or image" and not inputs.is_floating_point())
    if text:
        if inputs.ndim != 1 or inputs.is_floating_point():
            raise SourceError(
                f"an example for {kind} is a list of token ids, without a batch axis; got {inputs.dtype} of shape "
                f"{tuple(inputs.shape)}"
            )
        return _token_example(inputs.tolist(), length, None if label is None else int(label))
    return Example(inputs, None if label is None else int(label))


_LABELLED = ("image-classification", "sequence-classification")


def _token_example(ids: Sequence[int], length: int, label: int | None = None) -> Example:
    if not ids:
        raise SourceError("an empty text among the examples; leave it out")
    return Example(torch.tensor(ids[:length], dtype=torch.int64), label)


def _label(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


# --- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    loaded: LoadedModel
    length: int
    seed: int
    examples: int
    field: str | None
    trust_remote_code: bool

    def read(self, path: Path) -> list[Example]:
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder of calibration data")
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        texts = [p for p in files if p.suffix == ".txt"]
        images = [p for p in files if p.suffix.lower() in _IMAGE_ENDINGS]
        suffix = ".txt" if texts else "image" if images else path.suffix
        if suffix not in (".txt", ".jsonl", ".npz", "image"):
            raise SourceError(f"{path}: unknown kind of data; use .txt, .jsonl, .npz, or a folder of .txt or images")
        given = {"image": ("image",), ".npz": ("image", "sound")}.get(suffix, ("text",))
        reads = KINDS[self.loaded.kind].reads
        if not any(one in reads for one in given):
            raise SourceError(
                f"{path}: {' or '.join(given)} data, but {self.loaded.label} ({self.loaded.kind}) reads {reads}"
            )
        if suffix == ".npz":
            return self._arrays(path)
        if suffix == "image":
            return [Example(x) for x in self._pixels([_open_image(images[i]) for i in self._choice(len(images))])]
        coder = text_coder(self.loaded, trust_remote_code=self.trust_remote_code)
        if suffix == ".txt":
            return self._blocks(texts, coder)
        lines = list(self._lines(path))
        chosen = [lines[i] for i in self._choice(len(lines))]
        return [_token_example(coder.example(text, self.length), self.length, label) for text, label in chosen]

    def _choice(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen: list[int] = torch.randperm(count, generator=generator)[: self.examples].sort().values.tolist()
        return chosen

    def _blocks(self, paths: Sequence[Path], coder: TextCoder) -> list[Example]:
        """Each file as one run of tokens, cut into blocks; the last one of a file may be shorter."""
        size = max(1, self.length - len(coder.prefix) - len(coder.suffix))
        runs = [coder.encode(_read_text(path)) for path in paths]
        blocks = [ids[i : i + size] for ids in runs for i in range(0, len(ids), size)]
        return [
            _token_example([*coder.prefix, *blocks[i], *coder.suffix], self.length) for i in self._choice(len(blocks))
        ]

    def _lines(self, path: Path) -> Iterator[tuple[str, int | None]]:
        """Texts and, for a classifier of texts, their labels."""
        for place, row in _rows(path):
            label = row.get("label") if self.loaded.kind in _LABELLED else None
            yield _text_of(row, place, self.field), label if isinstance(label, int) else None

    def _arrays(self, path: Path) -> list[Example]:
        try:
            with np.load(path, allow_pickle=False) as file:
                wanted = (self.field,) if self.field else _ARRAYS
                names = (_first(file.files, wanted, path), _first(file.files, _LABEL_ARRAYS, None))
                images, labels = (None if name is None else file[name] for name in names)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise SourceError(f"{path}: not a readable .npz file ({error})") from None
        assert images is not None
        if labels is not None and len(labels) != len(images):
            raise SourceError(f"{path}: {len(images)} images but {len(labels)} labels")
        chosen = self._choice(len(images))
        known = [None] * len(chosen) if labels is None else [int(labels[i]) for i in chosen]
        return [Example(x, y) for x, y in zip(self._pixels(images[chosen]), known, strict=True)]

    def _pixels(self, images: Sequence[np.ndarray] | np.ndarray) -> list[Tensor]:
        """Floating-point arrays are taken as the model's input; 8-bit ones go through its image processor
        where the folder has one, else they are scaled to 0..1.  [H, W], [H, W, C] and [C, H, W] all do."""
        arrays = [np.asarray(image) for image in images]
        if not arrays:
            return []
        if arrays[0].dtype != np.uint8:
            channels = getattr(self.loaded.config, "num_channels", None)
            return [_channels_first(torch.from_numpy(a.astype(np.float32)), channels) for a in arrays]
        folder = self.loaded.folder
        if folder is not None and (folder / "preprocessor_config.json").exists():
            return self._processed(arrays, folder)
        scaled = [torch.from_numpy(a.astype(np.float32) / 255) for a in arrays]
        channels = getattr(self.loaded.config, "num_channels", None)
        images_first = [_channels_first(x, channels) for x in scaled]
        size = getattr(self.loaded.config, "image_size", None)
        if isinstance(size, int) and any(tuple(x.shape[-2:]) != (size, size) for x in images_first):
            raise SourceError(
                f"images of {tuple(images_first[0].shape[-2:])} pixels for a model of {size} x {size}; resize them, "
                "or put the model's preprocessor_config.json into its folder"
            )
        return images_first

    def _processed(self, arrays: Sequence[np.ndarray], folder: Path) -> list[Tensor]:
        try:
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=self.trust_remote_code
            )
        except ImportError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SourceError(f"{folder}: its image processor cannot be loaded: {' '.join(lines[:2])}") from None
        colour = [np.repeat(a[..., None], 3, axis=-1) if a.ndim == 2 else a for a in arrays]
        pixels: Tensor = processor(images=colour, return_tensors="pt")["pixel_values"]
        return list(pixels)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a .jsonl, and how messages call their places."""
    for place, row in json_lines(_read_text(path), path):
        if not isinstance(row, dict):
            raise SourceError(f"{place}: {type(row).__name__} instead of an object")
        yield place, row


def _text_of(row: Mapping[str, Any], place: str, field: str | None) -> str:
    for names in ((field,),) if field else _TEXT_FIELDS:
        values = [row[name] for name in names if isinstance(row.get(name), str)]
        if len(values) == len(names) and any(values):
            return "\n".join(values)
    if field:
        raise SourceError(f"{place}: no text in field {field!r}{did_you_mean(field, row)}")
    raise SourceError(f"{place}: no known text field among {', '.join(row)}; name it with --field (Python: field=)")


def _first(present: Iterable[str], wanted: Sequence[str], path: Path | None) -> str | None:
    present = list(present)
    found = next((name for name in wanted if name in present), None)
    if found is None and path is not None:
        raise SourceError(
            f"{path}: no array called {', '.join(wanted)}; it has {', '.join(present)} (--field names one)"
        )
    return found


def _channels_first(image: Tensor, channels: int | None) -> Tensor:
    """[H, W] or [H, W, C] -> [C, H, W] for a model that has channels; anything else stays."""
    if channels is None:
        return image
    if image.ndim == 2:
        return image.expand(channels, *image.shape).contiguous()
    if image.ndim == 3 and image.shape[0] != channels and image.shape[-1] == channels:
        return image.permute(2, 0, 1).contiguous()
    return image


def _open_image(path: Path) -> np.ndarray:
    try:
        pillow = importlib.import_module("PIL.Image")
    except ModuleNotFoundError:
        raise MissingExtra("pillow", "models", "reading image files") from None
    try:
        with pillow.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not a readable image ({error})") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsmithError(f"{path}: not readable as UTF-8 text ({error})") from None
