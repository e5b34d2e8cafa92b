"""Run many configs through mergekit in one process.  Runs in mergekit's environment, without weightsmith.

Reads [[config text, output folder], ...] as JSON from the file named first; writes, as JSON to the file named
second, the error of each (its last line) or null.  Of several documents those before the last are run into folders of
their own first, as mergekit-multi does.
"""

import json
import sys
import traceback
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.lazy_tensor_loader import LazyTensorLoader  # noqa: F401  (fails early in another environment)
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    cache = str(Path(sys.argv[1]).parent / "adapters-merged")
    errors = []
    for text, out in jobs:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, lora_merge_cache=cache)
        try:
            *stages, last = yaml.safe_load_all(text)
            if stages:
                text = _staged(stages, last, out, options)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
            errors.append(None)
        except Exception as error:
            said = traceback.format_exception_only(error)[-1].strip().splitlines()
            errors.append(" ... ".join(dict.fromkeys([said[0], said[-1]])) if said else type(error).__name__)
        print(".", end="", flush=True)
    Path(sys.argv[2]).write_text(json.dumps(errors))


def _staged(stages: list[dict], last: dict, out: str, options: MergeOptions) -> str:
    """Run the stages, and give the last one's text with their folders in the place of their names."""
    folders = {}
    for stage in [*stages, last]:
        name = stage.pop("name", None)
        text = yaml.safe_dump(_placed(stage, folders))
        if stage is last:
            return text
        folders[name] = f"{out}-{name}"
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), folders[name], options)
    raise AssertionError


def _placed(value: object, folders: dict[str, str]) -> object:
    if isinstance(value, dict):
        return {key: _placed(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_placed(inner, folders) for inner in value]
    return folders.get(value, value) if isinstance(value, str) else value


main()
