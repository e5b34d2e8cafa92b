"""Chat templates: the Jinja text that turns a conversation into a prompt, in a model's folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from weightsmith.core.errors import SourceError
from weightsmith.io.disk import write_file
from weightsmith.io.read.small import read_json, read_small

__all__ = ["AUTO", "CHATML", "most_common_template", "template_of", "write_template"]

AUTO = "auto"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The format that `chatml` names: every message between <|im_start|>role and <|im_end|>."""

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_LIMIT = 16_000_000


def template_of(folder: Path) -> str | None:
    """A folder's chat template: the file, else the (default) one in tokenizer_config.json."""
    if (folder / _FILE).is_file():
        return read_small(folder / _FILE, _LIMIT).decode(errors="surrogateescape")
    if not (folder / _CONFIG).is_file():
        return None
    config = read_json(folder / _CONFIG, _LIMIT)
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def most_common_template(folders: Iterable[Path]) -> str | None:
    """The template that most folders have; of equals the first."""
    found = [text.strip() for folder in folders if (text := template_of(folder))]
    return Counter(found).most_common(1)[0][0] if found else None


def write_template(folder: Path, text: str) -> None:
    """Put the template into a folder, in place of any other."""
    write_file(folder / _FILE, text.encode(errors="surrogateescape"))
    config = folder / _CONFIG
    if config.is_file():
        found = read_json(config, _LIMIT)
        if not isinstance(found, dict):
            raise SourceError(f"{config}: not a mapping")
        write_file(config, json.dumps(found | {"chat_template": text}, indent=2, ensure_ascii=False) + "\n")
