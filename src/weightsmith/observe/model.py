"""A model that can be run: loaded through transformers, or handed over as an `nn.Module`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import MissingExtra, SourceError, WeightsmithError, did_you_mean
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.hub import looks_like_hub_id, open_hub
from weightsmith.observe.names import Naming

__all__ = ["KINDS", "LoadedModel", "TextCoder", "folder_coder", "load_model", "pick_device", "resting", "text_coder"]

KINDS: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
    "image-classification": ("ForImageClassification",),
}
"""What can be observed -> endings of the architectures' names."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in float32, with what is known of its files.

    module   the network, on its device
    kind     'causal-lm' or 'image-classification'
    label    how messages call it
    folder   where its config and tokenizer lie, or None
    names    what the checkpoint calls its parameters
    """

    module: nn.Module
    kind: str
    label: str
    names: Naming
    folder: Path | None = None

    @property
    def config(self) -> Any:
        """The transformers configuration, or None for a plain module."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        return next(iter(self.module.parameters())).device

    def logits(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the model.

        inputs: [batch, tokens] int64 or [batch, ...] images; mask: [batch, tokens] bool, False at padding.
        Returns [batch, tokens, vocabulary] or [batch, classes].
        """
        inputs = inputs.to(self.device)
        if self.config is None:
            out = self.module(inputs)
        elif self.kind == "causal-lm":
            attention = None if mask is None else mask.to(self.device, torch.int64)
            out = self.module(input_ids=inputs, attention_mask=attention, use_cache=False)
        else:
            out = self.module(pixel_values=inputs)
        logits: Tensor = getattr(out, "logits", out)
        return logits

    def clip_length(self, length: int) -> int:
        """The wanted number of tokens, or the longest the model has positions for."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return min(length, positions) if isinstance(positions, int) and positions > 0 else length


def load_model(
    model: str | Path | nn.Module,
    *,
    kind: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a folder or hub id[@revision] through transformers in float32, without dropout.

    A module is used where and as it is; `resting` puts its modes back.
    Raises SourceError for what cannot be loaded or would be partly random, MissingExtra without transformers.
    """
    if kind not in ("auto", *KINDS):
        raise WeightsmithError(f"kind = {kind!r} is not known{did_you_mean(kind, ('auto', *KINDS))}")
    if isinstance(model, nn.Module):
        label = type(model).__name__
        if not any(True for _ in model.parameters()):
            raise SourceError(f"{label}: the module has no parameters to observe")
        names = [*(getattr(getattr(model, "config", None), "architectures", None) or ()), label]
        return LoadedModel(model, _kind_of(kind, names, label), label, Naming(model))
    folder, label = _folder_of(model), str(model)
    config = _read_config(folder, label)
    chosen = _kind_of(kind, config.get("architectures") or [], label)
    module = _from_pretrained(folder, label, chosen, trust_remote_code)
    module = module.eval().to(pick_device(device))
    return LoadedModel(module, chosen, label, Naming(module, FolderSource(folder)), folder)


def pick_device(device: str | torch.device) -> torch.device:
    """'auto' is the GPU if there is one, else the CPU; anything else is what torch understands by it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError:
        raise WeightsmithError(f"device = {str(device)!r} is not known; use auto, cpu or cuda[:number]") from None


@contextlib.contextmanager
def resting(module: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, and leave the module's modes and `requires_grad` as they were."""
    modes = [(m, m.training) for m in module.modules()]
    wants = [(p, p.requires_grad) for p in module.parameters()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p, wanted in wants:
            p.requires_grad_(wanted)


# --- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextCoder:
    """Text to token ids: `encode` adds no special tokens, `prefix` is what the model expects first (BOS)."""

    tokenizer: Any = None  # None: the bytes are the tokens
    prefix: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return list(text.encode())
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def bytes_of(self, ids: list[int]) -> int:
        """Length in UTF-8 bytes of the text that `ids` stand for."""
        return len(ids) if self.tokenizer is None else len(self.tokenizer.decode(ids).encode())


def text_coder(loaded: LoadedModel, *, trust_remote_code: bool = False) -> TextCoder:
    """The folder's own tokenizer; without one, and with a vocabulary of 256, bytes."""
    vocabulary = getattr(loaded.config, "vocab_size", None)
    return folder_coder(loaded.folder, loaded.label, vocabulary, trust_remote_code=trust_remote_code)


def folder_coder(
    folder: Path | None, label: str, vocabulary: int | None, *, trust_remote_code: bool = False
) -> TextCoder:
    """A folder's tokenizer, without its model; without tokenizer files, and with a vocabulary of 256, bytes."""
    if folder is not None and any((folder / name).exists() for name in _TOKENIZER_FILES):
        transformers = _transformers()
        with _quiet(transformers), _load_errors(label, "its tokenizer cannot be loaded"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        first = tokenizer.encode("")[:1]
        return TextCoder(tokenizer, tuple(first) if first == [tokenizer.bos_token_id] else ())
    if vocabulary == 256:
        return TextCoder()
    raise SourceError(
        f"{label}: no tokenizer files beside a vocabulary of {vocabulary}; "
        "copy the model's tokenizer into its folder, or give token ids instead of text"
    )


# --- transformers ----------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtra("transformers", "models", "running a model") from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice in the log: what matters is checked and raised here."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


@contextlib.contextmanager
def _load_errors(label: str, what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    known = (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError, AttributeError, SafetensorError)
    try:
        yield
    except Exception as error:
        # Libraries that check a configuration have errors of their own; those of this one pass as they are.
        if not isinstance(error, known) and not type(error).__module__.startswith("huggingface_hub"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise SourceError(f"{label}: {what}: {lines[0]}") from error


def _folder_of(model: str | Path) -> Path:
    """A local folder as it is; a hub id as its snapshot in the cache, downloaded if need be."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    text = str(model)
    if isinstance(model, Path) or not looks_like_hub_id(text):
        raise SourceError(f"{text}: not a model folder; give a folder with config.json, or a hub id such as org/name")
    source = open_hub(text)
    source.prepare()
    if source.origin.folder is None:
        raise SourceError(f"{text}: no config.json in this repository to build the model from")
    return source.origin.folder


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{label}: no config.json, so the model cannot be built; pass the nn.Module instead"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path}: holds {type(config).__name__}, not an object")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SourceError(f"{path}: architectures should be a list of words")
    return config


def _kind_of(kind: str, architectures: list[str], label: str) -> str:
    if kind != "auto":
        return kind
    for name in architectures:
        for found, endings in KINDS.items():
            if name.endswith(endings):
                return found
    says = f"architectures = {architectures} say" if architectures else "no architectures in config.json: nothing says"
    raise SourceError(f"{label}: {says} neither of {', '.join(KINDS)}; pass kind= to choose")


def _from_pretrained(folder: Path, label: str, kind: str, trust_remote_code: bool) -> nn.Module:
    transformers = _transformers()
    factory = {
        "causal-lm": "AutoModelForCausalLM",
        "image-classification": "AutoModelForImageClassification",
    }[kind]
    with _quiet(transformers), _load_errors(label, "transformers cannot load it"):
        module, info = getattr(transformers, factory).from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,  # None would ask on the terminal
            output_loading_info=True,
            dtype=torch.float32,
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(str(key) for key in info.get(problem) or ()):
            raise SourceError(
                f"{label}: {len(found)} tensors have no fitting weights in the checkpoint and would be random "
                f"({problem}: {', '.join(found[:3])}); the file does not hold this model for {kind}"
            )
    loaded: nn.Module = module
    return loaded
