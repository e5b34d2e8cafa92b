"""The model card: README.md with the front matter that the Hugging Face hub reads, and the licences of the parts."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.problem import Code, Problem, told
from weightsmith.io import system
from weightsmith.io.read.folder import is_inside
from weightsmith.io.url import without_secrets

__all__ = [
    "UNKNOWN",
    "CardModel",
    "Citation",
    "about",
    "front_matter",
    "licence_problems",
    "licences",
    "model_card",
    "yaml_text",
]

UNKNOWN = "unknown"
_ABOUT: Mapping[str, Any] = {"library_name": "transformers"}
_FRONT = r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)"
_CARD_LIMIT = 1 << 16  # bytes of an input's card that are looked at: front matter is short
_DEEPEST = 20  # levels; the parser's time grows with the square of the depth
_HUB_LICENCE = r"[a-z0-9][a-z0-9.+-]*"
_NONCOMMERCIAL = r"-nc\b|non-?commercial|research|academic"
_NO_DERIVATIVES = r"-nd\b|no-?deriv"
_COMMUNITY = r"other \(|llama|gemma|openrail|bigscience|bigcode|deepfloyd|apple-|h-research"


@dataclass(frozen=True)
class CardModel:
    """One row of the card's table: the model's name in the recipe, its hub id if it has one, its own parameters."""

    name: str
    hub_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Citation:
    """Where a method comes from: its name and paper ('arXiv:2306.01708')."""

    method: str
    paper: str


def model_card(
    *,
    title: str,
    models: Sequence[CardModel],
    method: str,
    recipe: Mapping[str, Any],
    base: CardModel | None = None,
    licences: Mapping[str, str] | None = None,
    citations: Sequence[Citation] = (),
    about: Mapping[str, Any] = _ABOUT,
    merged: int | None = None,
    stacked: int = 0,
    version: str = "",
    command: str = "weightsmith merge recipe.yaml OUT",
) -> str:
    """Return the text of README.md.

    method     what was done, in a sentence or two
    recipe     as given to `weightsmith merge`; folders outside the working folder are cut to their last name here
    licences   name -> licence, as `licences` returns them
    about      library_name, pipeline_tag and tags, as `about` returns them
    merged     how many models were merged, where `models` lists what they are made of
    stacked    how many models its layers or modules are taken from, if it is put together of such
    command    what makes the same folder again from the recipe; '': nothing does without a key
    Only hub ids go into `base_model`: the hub refuses a card that names a local folder there.
    """
    known = licences or {}
    everyone = [*([base] if base else []), *models]
    front: dict[str, Any] = {}
    repeated = command != ""
    hub_ids = list(dict.fromkeys(model.hub_id for model in everyone if model.hub_id))
    if hub_ids:
        front |= {"base_model": hub_ids, "base_model_relation": "merge"}
    tags = list(dict.fromkeys([*about.get("tags", ()), *(["merge"] if repeated else []), "weightsmith"]))
    front |= {"library_name": about.get("library_name", "transformers")}
    front |= {"pipeline_tag": about["pipeline_tag"]} if about.get("pipeline_tag") else {}
    front |= {"tags": tags, **_licence_fields(known)}
    run = f"weightsmith {version}".strip()
    count = len(models) if merged is None else merged
    shown = _public(without_secrets(recipe))
    parts = [
        f"---\n{yaml_text(front)}---\n",
        f"# {title}\n",
        f"This model was {_made_from(count, base is not None, stacked)} with {run}.\n",
        f"## Method\n\n{method}\n",
        f"## Models\n\n{_table(models, base, known)}",
        *_notes(known),
        f"## Recipe\n\n```yaml\n{yaml_text(shown)}```\n",
    ]
    if repeated:
        parts.append(
            "## Reproduce\n\nSave the recipe as `recipe.yaml`, then\n\n"
            f"```\n{command}\n```\n\n"
            f"gives the same bytes{_PATHS if shown != without_secrets(recipe) else ''}; "
            "`weightsmith.json` holds the checksums of inputs and output.\n"
        )
    if citations:
        lines = [f"- {each.method}: {_link(each.paper)}" for each in dict.fromkeys(citations)]
        parts.append("## Citation\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


_PATHS = ", once the folders are written out (above they are cut to their last names)"


def _made_from(count: int, has_base: bool, stacked: int) -> str:
    if stacked:
        return f"put together from parts of {stacked} model{'s' * (stacked != 1)}"
    if count == 1:
        return "made from one model and its base" if has_base else "made from one model"
    return f"merged from {count} models"


def about(folder: Path | None, made: Path) -> dict[str, Any]:
    """Library, pipeline and tags of the folder `made`, as the card of the model that it takes the place of says.

    A folder of sentence-transformers is one, whatever the card says.
    """
    said = front_matter(folder / "README.md") if folder is not None else {}
    tags = [tag for tag in said.get("tags", []) if re.fullmatch(_TAG, tag) and tag not in _OF_ITS_TRAINING]
    library, pipeline = (next(iter(said.get(name, [])), "") for name in ("library_name", "pipeline_tag"))
    if (made / "modules.json").exists():
        library = "sentence-transformers"
        tags = list(dict.fromkeys([library, *tags]))
        pipeline = pipeline or "sentence-similarity"
    elif not re.fullmatch(_TAG, library) or library == "peft":
        library = "transformers" if (made / "config.json").exists() else "pytorch"
    return {"library_name": library, "pipeline_tag": pipeline if re.fullmatch(_TAG, pipeline) else "", "tags": tags}


_TAG = r"[\w.+-]{1,60}"
_OF_ITS_TRAINING = ("generated_from_trainer", "autotrain", "trl", "sft", "dpo", "unsloth")


def licences(inputs: Mapping[str, Path | None]) -> dict[str, str]:
    """Name -> licence as stated in the front matter of README.md in the model's folder.

    'unknown' where there is no folder, no card, or no licence in it; 'other (NAME)' for a licence of the
    author's own; several are joined with ' + '.
    """
    return {name: _licence(folder) for name, folder in inputs.items()}


def licence_problems(licences: Mapping[str, str]) -> list[Problem]:
    """What a publisher of the merge should look at: terms that bind all of it, or do not go together."""
    problems = []
    named = {name: text for name, text in licences.items() if text != UNKNOWN}
    if len(set(licences.values())) > 1:
        bound = {name: text for name, text in named.items() if re.search(_NONCOMMERCIAL, text, re.IGNORECASE)}
        if bound and len(bound) < len(licences):
            problems.append(f"{_list(bound)} may not be used commercially, and so may not the merge with the others")
        community = {name: text for name, text in named.items() if re.search(_COMMUNITY, text, re.IGNORECASE)}
        if len(set(community.values())) > 1:
            problems.append(f"{_list(community)} are community licences with terms of their own; read them together")
    for name, text in named.items():
        if re.search(_NO_DERIVATIVES, text, re.IGNORECASE):
            problems.append(f"{name} ({text}) allows no derived works, and a merge is one")
    missing = [name for name, text in licences.items() if text == UNKNOWN]
    if missing:
        whom = "its author" if len(missing) == 1 else "their authors"
        problems.append(f"no licence is stated by {', '.join(missing)}; ask {whom} before you publish the merge")
    return list(told(Code.LICENCE, problems, "licence"))


def _licence(folder: Path | None) -> str:
    front = front_matter(folder / "README.md") if folder is not None else {}
    words = [_plain(word) for word in front.get("license", []) if word.strip()]
    own = _plain(" ".join(front.get("license_name", [])))
    return " + ".join(f"other ({own})" if word == "other" and own else word for word in words) or UNKNOWN


def _plain(text: str) -> str:
    """A stranger's words on one line of moderate length, without anything that drives a terminal or makes a table."""
    kept = "".join(c if c.isprintable() and c not in "|<>`[]" else " " for c in text)
    return " ".join(kept.split())[:100]


def front_matter(path: Path) -> Mapping[str, list[str]]:
    """Words and lists of words at the top level of a card's YAML; a card that cannot be read states nothing."""
    from ruamel.yaml.error import YAMLError

    try:
        if not path.is_file() or not is_inside(path.parent, path.name):
            return {}
        found = re.match(_FRONT, system.read_file(path, _CARD_LIMIT).decode(errors="replace"), re.DOTALL)
        return _top_level(found[1]) if found else {}
    except (FileNotFoundError, YAMLError, ValueError, RecursionError):
        return {}
    except OSError as error:  # "no licence" would then be a guess
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error


def _top_level(text: str) -> dict[str, list[str]]:
    """Read from parser events: nothing is built, so there is nothing that aliases could blow up or a tag could name."""
    from ruamel.yaml import YAML, events

    found: dict[str, list[str]] = {}
    depth, key = 0, None
    for event in YAML(typ="safe", pure=True).parse(text):
        if getattr(event, "tag", None) is not None:
            return {}
        if isinstance(event, events.CollectionStartEvent):
            depth += 1
            if depth > _DEEPEST:
                return {}
            key = key if isinstance(event, events.SequenceStartEvent) else None
        elif isinstance(event, events.CollectionEndEvent):
            depth -= 1
            key = key if depth > 1 else None
        elif not isinstance(event, events.ScalarEvent):
            key = key if depth > 1 else None
        elif depth == 1 and key is None:
            key = event.value
            if key in found:
                return {}  # said twice: neither is meant more than the other
        elif key is not None and depth in (1, 2):
            if event.style is not None or event.value not in ("", "~", "null"):
                found.setdefault(key, []).append(event.value)
            key = key if depth > 1 else None
    return found


def _licence_fields(licences: Mapping[str, str]) -> dict[str, str]:
    """The hub's fields: the licence that all parts share, or 'other'."""
    stated = set(licences.values())
    if not stated:
        return {"license": UNKNOWN}
    if len(stated) > 1:
        return {"license": "other", "license_name": "see-the-parts"}
    (common,) = stated
    own = re.fullmatch(r"other \((.*)\)", common)
    if own:
        return {"license": "other", "license_name": own[1]}
    return {"license": common if re.fullmatch(_HUB_LICENCE, common) else "other"}


def _notes(licences: Mapping[str, str]) -> list[str]:
    texts = [str(problem) for problem in licence_problems(licences)]
    if len(set(licences.values())) > 1:
        texts.insert(0, "the parts have different licences (see the table); the merge is bound by all of them")
    return ["## Licence\n\n" + "\n".join(f"- {text}" for text in texts) + "\n"] if texts else []


def _table(models: Sequence[CardModel], base: CardModel | None, licences: Mapping[str, str]) -> str:
    rows = [("name", "model", "parameters", "licence"), ("---", "---", "---", "---")]
    for model in [*([base] if base else []), *models]:
        where = f"[{model.hub_id}](https://huggingface.co/{model.hub_id})" if model.hub_id else "local"
        values = ", ".join(f"{name} = {value}" for name, value in model.parameters.items())
        rows.append((model.name, where, "base" if model is base else values, licences.get(model.name, UNKNOWN)))
    return "".join("| " + " | ".join(_cell(text) for text in row) + " |\n" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _public(value: Any) -> Any:
    """The recipe without the author's folder names: an absolute path is cut to its last part."""
    if isinstance(value, Mapping):
        return {name: _public(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name or value
    return value


def yaml_text(value: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the order of the models
    yaml.width = 4096
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def _link(paper: str) -> str:
    number = re.fullmatch(r"arXiv:(\S+)", paper)
    return f"[{paper}](https://arxiv.org/abs/{number[1]})" if number else paper


def _list(licences: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({text})" for name, text in licences.items())
