"""Run many configs through mergekit in one process.  Runs in mergekit's environment, without weightsmith.

Reads [[config text, output folder], ...] as JSON from the file named first; writes, as JSON to the file named
second, the error of each (its last line) or null.
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
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
            errors.append(None)
        except Exception as error:
            said = traceback.format_exception_only(error)[-1].strip().splitlines()
            errors.append(said[0] if said else type(error).__name__)
        print(".", end="", flush=True)
    Path(sys.argv[2]).write_text(json.dumps(errors))


main()
