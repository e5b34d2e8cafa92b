"""An empty shell of a model, made by transformers from a config.json: what it knows that no table here holds."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from weightsmith.core.lazy import torch

__all__ = ["Shell", "made", "no_bars", "quiet", "shell_of"]


class Shell:
    """A model without weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._state = model.state_dict()
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        with contextlib.suppress(ImportError, AttributeError):  # transformers below 5 renames nothing in this way
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            found = get_model_conversion_mapping(model)
            self._renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
            self._converters = [entry for entry in found if isinstance(entry, WeightConverter)]

    def renamed(self, name: str) -> str:
        """What a tensor of the files is called in memory."""
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self.model, "base_model_prefix", "")
        found, converter = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        return name if converter is not None else str(found)  # a converter makes other tensors than those of the file

    def saved(self, name: str) -> str:
        """What a tensor of memory is called in files that transformers writes."""
        for renaming in [entry.reverse_transform() for entry in reversed(self._renamings)]:
            name, _ = renaming.rename_source_key(name)
        return name

    def has(self, name: str) -> bool:
        """Whether the model has a tensor of this name in memory."""
        return name in self._state

    def kind(self, module: str) -> str:
        """'linear' [out, in], 'conv1d' [in, out], 'embedding', 'other', or '' where there is no module of this name."""
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            return ""
        if isinstance(found, torch.nn.Embedding):
            return "embedding"
        if type(found).__name__ == "Conv1D":
            return "conv1d"
        # A router may be a linear layer that returns more than its product, which peft's layers cannot wrap.
        return "linear" if getattr(type(found), "forward", None) is torch.nn.Linear.forward else "other"

    def looks_up_plainly(self, name: str) -> bool:
        """Whether a tensor of the files is the weight of an `nn.Embedding` itself, whose look-up is what peft knows."""
        try:
            found = self.model.get_submodule(self.renamed(name).removesuffix(".weight"))
        except AttributeError:
            return False
        return type(found) is torch.nn.Embedding

    @property
    def output_layer(self) -> str | None:
        """The module that gives the logits of tokens."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if head is not None and module is head), None)


@lru_cache(maxsize=4)
def shell_of(config: str) -> Shell | None:
    """The shell of the model that a config.json describes; None where transformers is not there or cannot make it."""
    if find_spec("transformers") is None:
        return None
    model = made(json.loads(config))
    return None if model is None else Shell(model)


def made(config: dict[str, Any], name: str = "") -> Any:
    """A model of the class `name` (default: the first of `architectures`) on torch's meta device, or None."""
    import transformers

    names = config.get("architectures") or [name]
    cls = getattr(transformers, name or str(names[0]), None)
    kind = config.get("model_type")
    if cls is None or not hasattr(cls, "base_model_prefix") or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        with quiet(transformers), torch.device("meta"):
            return cls(transformers.CONFIG_MAPPING[kind].from_dict(config))
    except Exception:  # a config that this version does not take: what it would tell stays unknown
        return None


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without what transformers logs and warns of."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without the progress bars of transformers and of the hub's client, also where they are imported inside."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # by the environment, which nothing overrides
    hub = not asked_for and not are_progress_bars_disabled()
    before = sys.modules.get("transformers.utils.logging")
    shown = before.is_progress_bar_enabled() if before is not None else hub
    if hub:
        disable_progress_bars()
    if before is not None:
        before.disable_progress_bar()
    try:
        yield
    finally:
        if hub:
            enable_progress_bars()
        after = sys.modules.get("transformers.utils.logging")
        if after is not None and shown:
            after.enable_progress_bar()
