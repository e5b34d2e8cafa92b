"""Answer one request with mteb: JSON on standard input, JSON on standard output.  Imports nothing of weightsmith.

mteb keeps results of every local model under one name (seen with 2.26): nothing is cached here.
"""

import json
import os
import sys
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    import mteb  # type: ignore[import-not-found, unused-ignore]
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]

    device = None if request["device"] == "auto" else request["device"]
    model = SentenceTransformer(request["model"], device=device, model_kwargs={"dtype": request["dtype"]},
                                local_files_only=True)  # fmt: skip
    task = _own(request) if request["type"] else mteb.get_task(request["task"])
    out = mteb.evaluate(model, [task], cache=None, encode_kwargs={"batch_size": request["batch"]}, raise_error=True)
    return answer(out.task_results[0].scores, mteb.__version__)


def answer(scores: dict[str, Any], version: str) -> dict[str, Any]:
    """The numbers of the test split's first subset."""
    split = scores.get("test") or next(iter(scores.values()))
    found = split[0]
    metrics = {name: value for name, value in found.items()
               if isinstance(value, (int, float)) and not isinstance(value, bool)}  # fmt: skip
    return {"metrics": metrics, "library": f"mteb {version}"}


def _own(request: dict[str, Any]) -> Any:
    """A task of local JSON lines."""
    from datasets import Dataset, DatasetDict  # type: ignore[import-not-found, unused-ignore]
    from mteb.abstasks import AbsTaskClassification, AbsTaskSTS  # type: ignore[import-not-found, unused-ignore]
    from mteb.abstasks.task_metadata import TaskMetadata  # type: ignore[import-not-found, unused-ignore]

    kind = request["type"]
    parent = {"STS": AbsTaskSTS, "Classification": AbsTaskClassification}[kind]
    main_score = {"STS": "cosine_spearman", "Classification": "accuracy"}[kind]

    class Own(parent):  # type: ignore[misc, valid-type]
        metadata = TaskMetadata(
            name=request["task"], description="local",
            dataset={"path": "local", "revision": "main"},
            type=kind, eval_langs=["eng-Latn"], eval_splits=["test"], main_score=main_score,
        )  # fmt: skip
        min_score, max_score = 0, 5

        def load_data(self, **more: Any) -> None:
            self.dataset = DatasetDict({name: Dataset.from_list(rows) for name, rows in request["rows"].items()})
            self.data_loaded = True

    return Own()


if __name__ == "__main__":
    asked, told = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to the log
    with os.fdopen(told, "w") as file:
        json.dump(main(asked), file)
