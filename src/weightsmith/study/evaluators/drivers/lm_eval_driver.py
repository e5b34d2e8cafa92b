"""Answer one request with lm_eval: JSON on standard input, JSON on standard output.  Imports nothing of weightsmith.

Numbers depend on the batch and, below float32, on the dtype of the softmax (seen with 0.4.13): the batch is fixed, the
softmax is float32, and no generator is seeded anew.
"""

import json
import os
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    import lm_eval  # type: ignore[import-not-found, unused-ignore]
    import torch
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, unused-ignore]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, unused-ignore]

    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if request["device"] == "auto" else request["device"]
    model = HFLM(pretrained=request["model"], dtype=request["dtype"], softmax_dtype="float32",
                 batch_size=request["batch"], device=device)  # fmt: skip
    defaults = bool(request["defaults"]) or request["include"] is None
    manager = TaskManager(include_path=request["include"], include_defaults=defaults)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    out = lm_eval.simple_evaluate(
        model=model, tasks=[request["task"]], num_fewshot=request["shots"], limit=request["limit"], bootstrap_iters=0,
        task_manager=manager, log_samples=True, apply_chat_template=request["chat"], **dict.fromkeys(seeds),
    )  # fmt: skip
    return answer(out, request["task"], getattr(lm_eval, "__version__", ""))


def answer(out: dict[str, Any], task: str, version: str) -> dict[str, Any]:
    """What simple_evaluate returned, as weightsmith reads it: 'acc,none' is acc, other filters keep their name."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, value in out["results"][task].items():
        key, _, chosen = name.partition(",")
        if not chosen or isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
            continue  # alias, name, sample_len, and "N/A" for an error
        named = key.replace("_stderr", "") if key.endswith("_stderr") else key
        full = named if chosen == "none" else f"{named},{chosen}"
        (errors if key.endswith("_stderr") else metrics)[full] = value
    samples = (out.get("samples") or {}).get(task) or []
    examples: dict[str, list[float]] = {}
    for name in metrics:
        key, _, chosen = name.partition(",")
        mine = [s for s in samples if s.get("filter", "none") == (chosen or "none")]
        values = [s.get(key) for s in sorted(mine, key=lambda s: s["doc_id"])]
        if values and all(isinstance(value, (int, float)) for value in values):
            mean = sum(map(float, values)) / len(values)
            if abs(mean - metrics[name]) < 1e-9:  # a metric that is no mean of its samples is left alone
                examples[name] = [float(value) for value in values]
                spread = sum((float(value) - mean) ** 2 for value in values)
                if len(values) > 1:
                    errors.setdefault(name, (spread / (len(values) - 1) / len(values)) ** 0.5)
    versions = out.get("versions") or {}
    return {"metrics": metrics, "errors": errors, "examples": examples, "library": f"lm_eval {version}",
            "version": versions.get(task)}  # fmt: skip


if __name__ == "__main__":
    asked, told = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    with os.fdopen(told, "w") as file:
        json.dump(main(asked), file)
