"""A model that can be run: loaded through transformers, or handed over as an `nn.Module`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import MissingExtra, SourceError, WeightsmithError, did_you_mean
from weightsmith.core.keys import layer_of
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.hub import looks_like_hub_id, open_hub
from weightsmith.io.read.source import Source
from weightsmith.jobs.verify import lasting
from weightsmith.observe.kinds import KINDS, class_of, kind_of
from weightsmith.observe.names import Naming
from weightsmith.observe.tangents import in_tangent_space

__all__ = ["LoadedModel", "TextCoder", "block_model", "folder_coder", "identity", "load_model", "pick_device",
           "resting", "text_coder", "unweighted"]  # fmt: skip

SENTENCES = "modules.json"
"""What marks a folder of sentence-transformers."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in float32, with what is known of its files.

    module   the network, on its device
    kind     see `kinds.KINDS`
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

    @property
    def text_config(self) -> Any:
        """The part of the configuration that is about text."""
        inner = getattr(self.config, "get_text_config", None)
        return self.config if inner is None else inner()

    def run(self, inputs: Tensor, mask: Tensor | None = None) -> Any:
        """Run the model; returns what it returns.

        inputs: [batch, tokens] int64, or [batch, ...] images or sound; mask: [batch, tokens] bool, False at padding.
        A decoder beside an encoder gets the first tokens of the same text.
        """
        inputs = inputs.to(self.device)
        if self.config is None:
            return self.module(inputs)
        module: Any = self.module
        attention = None if mask is None else mask.to(self.device, torch.int64)
        if inputs.is_floating_point():
            if hasattr(module, "get_image_features"):
                return _embedding(module.get_image_features(pixel_values=inputs))
            name = "pixel_values" if KINDS[self.kind].reads == "image" else module.main_input_name
            return module(**{name: inputs}, **self._decoder(inputs[:, :0].long()))
        if self.kind != "causal-lm" and hasattr(module, "get_text_features"):
            return _embedding(module.get_text_features(input_ids=inputs, attention_mask=attention))
        more: dict[str, Any] = {"use_cache": False} if self.kind == "causal-lm" else self._decoder(inputs)
        return module(input_ids=inputs, attention_mask=attention, **more)

    def logits(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, tokens, vocabulary], [batch, tokens, classes] or [batch, classes], of kinds that give them."""
        out = self.run(inputs, mask)
        logits: Tensor = getattr(out, "logits", out)
        return logits

    def _decoder(self, inputs: Tensor) -> dict[str, Tensor]:
        if not getattr(self.config, "is_encoder_decoder", False):
            return {}
        ids = (getattr(self.config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        start = torch.full((len(inputs), 1), next((i for i in ids if isinstance(i, int)), 0), device=self.device)
        return {"decoder_input_ids": torch.cat([start, inputs[:, :15].reshape(len(inputs), -1)], 1)}

    def clip_length(self, length: int) -> int:
        """The wanted number of tokens, or the longest the model has positions for."""
        positions = getattr(self.text_config, "max_position_embeddings", None)
        if not isinstance(positions, int) or positions < 1:
            return length
        tables = (m for n, m in self.module.named_modules() if n.endswith("position_embeddings"))
        # RoBERTa and its like number positions from behind the padding's.
        used = max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)
        return min(length, positions - used)


def load_model(
    model: str | Path | nn.Module,
    *,
    kind: str = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    state: Mapping[str, Tensor] | None = None,
) -> LoadedModel:
    """Load a folder or hub id[@revision] through transformers in float32, without dropout.

    A module is used where and as it is; `resting` puts its modes back.  A folder that was trained in a tangent space
    gives its `Linearized` model, around the model that it names.
    state  the weights, where they are not to be the folder's: names and shapes as there.  float32 ones are not copied
    Raises SourceError for what cannot be loaded or would be partly random, MissingExtra without transformers.
    """
    if kind not in ("auto", *KINDS):
        raise WeightsmithError(f"kind = {kind!r} is not known{did_you_mean(kind, ('auto', *KINDS))}")
    if isinstance(model, nn.Module):
        label = type(model).__name__
        if not any(True for _ in model.parameters()):
            raise SourceError(f"{label}: the module has no parameters to observe")
        names = [*(getattr(getattr(model, "config", None), "architectures", None) or ()), label]
        chosen = kind_of(names, label, type(model)) if kind == "auto" else kind
        return LoadedModel(model, chosen, label, Naming(model))
    folder, label = _folder_of(model), str(model)
    config = _read_config(folder, label)
    architectures = config.get("architectures") or []
    if kind == "auto":
        _transformers()
        kind = kind_of(architectures, label)
        if kind == "causal-lm" and (folder / SENTENCES).is_file():
            kind = "encoder"
    module = _from_pretrained(folder, label, kind, architectures, trust_remote_code, state)
    module = module.eval().to(pick_device(device))
    found = LoadedModel(module, kind, label, Naming(module, FolderSource(folder)), folder)
    return found if state is not None else in_tangent_space(found, device, load_model)


def unweighted(model: str | Path, *, kind: str = "auto", trust_remote_code: bool = False) -> LoadedModel:
    """A language model's folder or hub id as its config describes it, without weights: on torch's device `meta`."""
    folder, label = _folder_of(model), str(model)
    architectures = _read_config(folder, label).get("architectures") or []
    transformers = _transformers()
    chosen = kind_of(architectures, label) if kind == "auto" else kind
    if chosen != "causal-lm":
        raise SourceError(f"{label}: a model for {chosen}, not a causal language model")
    with _quiet(transformers), _load_errors(label, "transformers cannot build it"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return LoadedModel(module, chosen, label, Naming(module, FolderSource(folder)), folder)


def block_model(loaded: LoadedModel, config: Mapping[str, Any], source: Source, device: torch.device) -> LoadedModel:
    """The tensors of `source` as the bare model, without a head, that `config` describes, in float32."""
    transformers = _transformers()
    with _quiet(transformers), _load_errors(loaded.label, "transformers cannot load a block of it"):
        made = type(loaded.config).from_dict(dict(config))
        factory = transformers.AutoModel
        module, info = factory._model_mapping[type(made)].from_pretrained(
            None, config=made, state_dict={name: source.read(name) for name in source.keys}, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    absent = [str(key) for key in info["missing_keys"] if layer_of(str(key)) is not None]
    if absent or info["mismatched_keys"]:
        raise SourceError(f"{loaded.label}: {[*absent, *info['mismatched_keys']][0]} has no fitting weights; "
                          "observe the model without stream")  # fmt: skip
    return replace(loaded, module=module.eval().to(device), names=Naming(module, source))


def _embedding(out: Any) -> Any:
    """What a tower of CLIP gives: a tensor, or since transformers 5 an output that holds it."""
    return getattr(out, "pooler_output", out)


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
    """Text to token ids: `encode` adds no special tokens, `prefix` is what the model expects first (BOS, CLS)."""

    tokenizer: Any = None  # None: the bytes are the tokens
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    """And what it expects last (SEP); none for language models, which go on."""

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return list(text.encode())
        # It is cut into pieces afterwards: no warning that all of it would be too long for the model.
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def example(self, text: str, length: int) -> list[int]:
        """A text with all that the model expects around it, cut to `length` tokens."""
        room = max(length - len(self.prefix) - len(self.suffix), 0)
        return [*self.prefix, *self.encode(text)[:room], *self.suffix][:length]

    def bytes_of(self, ids: list[int]) -> int:
        """Length in UTF-8 bytes of the text that `ids` stand for."""
        return len(ids) if self.tokenizer is None else len(self.tokenizer.decode(ids).encode())


def text_coder(loaded: LoadedModel, *, trust_remote_code: bool = False) -> TextCoder:
    """The folder's own tokenizer; without one, and with a vocabulary of 256, bytes."""
    vocabulary, goes_on = getattr(loaded.text_config, "vocab_size", None), loaded.kind == "causal-lm"
    return folder_coder(loaded.folder, loaded.label, vocabulary, goes_on=goes_on, trust_remote_code=trust_remote_code)


def folder_coder(
    folder: Path | None, label: str, vocabulary: int | None, *, goes_on: bool = True, trust_remote_code: bool = False
) -> TextCoder:
    """A folder's tokenizer, without its model; without tokenizer files, and with a vocabulary of 256, bytes."""
    if folder is not None and any((folder / name).exists() for name in _TOKENIZER_FILES):
        transformers = _transformers()
        with _quiet(transformers), _load_errors(label, "its tokenizer cannot be loaded"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        if not goes_on:
            return TextCoder(tokenizer, *_around(tokenizer))
        first = tokenizer.encode("")[:1]
        return TextCoder(tokenizer, tuple(first) if first == [tokenizer.bos_token_id] else ())
    if vocabulary == 256:
        return TextCoder()
    raise SourceError(
        f"{label}: no tokenizer files beside a vocabulary of {vocabulary}; "
        "copy the model's tokenizer into its folder, or give token ids instead of text"
    )


def _around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    bare, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


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


_AUTO = {"causal-lm": "AutoModelForCausalLM", "image-classification": "AutoModelForImageClassification"}


def _from_pretrained(
    folder: Path,
    label: str,
    kind: str,
    architectures: list[str],
    trust_remote_code: bool,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    transformers = _transformers()
    named: Any = next((made for name in architectures if (made := class_of(name))), None)
    fits = named is not None and (kind not in _AUTO or kind_of([], label, named) == kind)
    if (folder / SENTENCES).is_file() and kind == "encoder":
        fits = False  # the hidden states, without the head of a language model
    factory: Any = named if fits else getattr(transformers, _AUTO.get(kind, "AutoModel"))
    given: dict[str, Any] = {}
    with _quiet(transformers), _load_errors(label, "transformers cannot load it"):
        if state is not None:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            if named is None or not fits:  # the automatic classes take a folder only
                with torch.device("meta"):
                    factory = type(factory.from_config(config))
            given = {"config": config, "state_dict": dict(state)}
        module, info = factory.from_pretrained(
            None if state is not None else folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,  # None would ask on the terminal
            output_loading_info=True,
            dtype=torch.float32,
            **given,
        )
    for problem in ("missing_keys", "mismatched_keys"):
        found = sorted(str(key) for key in info.get(problem) or ())
        if kind in ("encoder", "image-encoder", "masked-lm"):  # what pools is often left out, and is not used here
            found = [key for key in found if "pooler" not in key.split(".")]
        if found:
            raise SourceError(
                f"{label}: {len(found)} tensors have no fitting weights in the checkpoint and would be random "
                f"({problem}: {', '.join(found[:3])}); the file does not hold this model for {kind}"
            )
    loaded: nn.Module = module
    return loaded


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """What tells these weights from others; nothing of a module."""
    if loaded.folder is None:
        return {}
    return {"fingerprint": lasting(FolderSource(loaded.folder).fingerprint())}
