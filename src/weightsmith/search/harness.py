"""Tasks of lm-evaluation-harness: run in a process of its own, which needs no network and not this package."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import did_you_mean
from weightsmith.search.program import ProgramError
from weightsmith.search.schema import LmEval

__all__ = ["OFFLINE", "command", "picked", "there"]

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "0",
}

# Seeds are fixed; batch size too, for log-likelihoods move with it.  Without include_defaults the index of all tasks
# would take half a minute.
_SCRIPT = """
import json, sys, torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
asked = json.loads(sys.argv[1])
manager = TaskManager(include_path=asked["include"], include_defaults=asked["include"] is None)
found = simple_evaluate(
    model="hf", model_args=asked["model_args"], tasks=asked["tasks"], num_fewshot=asked["shots"], limit=asked["limit"],
    batch_size=asked["batch"], task_manager=manager, log_samples=True, bootstrap_iters=0,
    device="cuda" if torch.cuda.is_available() else "cpu", verbosity="ERROR",
)
names = {task: metric.partition(",")[0] for task, metric in asked["metrics"].items()}
items = {}
for task, samples in found["samples"].items():
    values = [sample.get(names.get(task)) for sample in samples]
    items[task] = values if all(isinstance(v, (int, float)) for v in values) else None
results = {t: {k: v for k, v in r.items() if isinstance(v, (int, float))} for t, r in found["results"].items()}
print()
print(json.dumps({"results": results, "items": items}))
"""


@cache
def there(python: str) -> bool:
    """Whether a python has lm_eval."""
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('lm_eval') is None)"
    try:
        return subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def command(python: str, model: Path, metrics: Mapping[str, str], asked: LmEval, limit: int | None) -> list[str]:
    """The words of the process that scores a model on tasks; metrics: task -> what is asked of it."""
    arguments = ",".join(word for word in (f"pretrained={model}", asked.arguments) if word)
    told = {
        "model_args": arguments,
        "tasks": list(metrics),
        "shots": asked.shots,
        "limit": limit,
        "batch": asked.batch,
        "include": asked.include,
        "metrics": dict(metrics),
    }
    return [python, "-c", _SCRIPT, json.dumps(told)]


def picked(found: Any, wanted: Mapping[str, str], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Score -> its items, or its value where there are none that make it up."""
    scores: dict[str, Any] = {}
    for name, task in wanted.items():
        results, metric = found["results"].get(task, {}), metrics[task]
        if "," not in metric and f"{metric},none" in results:  # lm_eval puts the filter behind it
            metric = f"{metric},none"
        if metric not in results:
            known = sorted(key for key in results if "stderr" not in key)
            raise ProgramError(
                f"lm_eval: {task} has no metric {metric!r}{did_you_mean(metric, known)}; it has {', '.join(known)}"
            )
        items = found["items"].get(task)
        mean = sum(items) / len(items) if items else None
        scores[name] = items if mean is not None and abs(mean - results[metric]) < 1e-9 else results[metric]
    return scores
