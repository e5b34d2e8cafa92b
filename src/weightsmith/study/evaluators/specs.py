"""The grammar of a task's evaluator: what stands under `tasks: NAME:` in a run's file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from weightsmith.core.errors import did_you_mean
from weightsmith.recipe.fields import Located, Words
from weightsmith.recipe.grammar import Fault, Grammar, Reading

__all__ = ["EVALUATORS", "Choices", "Code", "Data", "Embedded", "Generate", "LmEval", "Mteb", "Program", "Spec", "Svg",
           "Texts"]  # fmt: skip


def _file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    return path


def _there(path: str) -> str:
    if not Path(path).exists():
        raise ValueError(f"no file or folder {path}")
    return path


File = Annotated[Located, AfterValidator(_file)]
Place = Annotated[Located, AfterValidator(_there)]
Count = Annotated[int, Field(ge=1)]


class Spec(Grammar):
    """What an evaluator is told.  `METRICS`: the keys that it gives; () if only a run shows them."""

    METRICS: ClassVar[tuple[str, ...]] = ()
    MAIN: ClassVar[str] = "score"
    """The metric where nothing else is said and METRICS is empty."""
    KIND: ClassVar[str] = "causal-lm"
    """What the model is loaded as; '' where a process of its own loads it."""

    def files(self) -> list[Path]:
        """What it reads: their contents are the task's version."""
        names = (name for name in type(self).model_fields if name in _FILES)
        return [Path(value) for name in names if isinstance(value := getattr(self, name), str) and value]

    def limited(self) -> bool:
        """Whether a limit on examples reaches the evaluator."""
        return True


_FILES = ("file", "corpus", "train", "include")


class Texts(Spec):
    """Likelihood of the target behind the prompt, JSON lines with `target` or `text`, and maybe `prompt`."""

    SHORT: ClassVar[str] = "file"
    METRICS = ("token_accuracy", "log_likelihood", "perplexity", "bits_per_byte", "exact")
    file: File = Field(examples=["FILE.jsonl"])
    prefix: str = ""


class Choices(Spec):
    """Multiple choice by likelihood, JSON lines with `question`, `choices` and `answer` (index, letter or text)."""

    SHORT: ClassVar[str] = "file"
    METRICS = ("acc", "acc_norm")
    file: File = Field(examples=["FILE.jsonl"])
    prefix: str = ""
    joint: str = " "


class Generate(Spec):
    """The answer that the model writes (greedy) against the right one, JSON lines with `question` and `answer`.

    rule   gsm8k: the number behind '####', or the last one (`flexible_extract`); exact: the text; contains: the answer
           is in it; json: it parses and equals
    """

    SHORT: ClassVar[str] = "file"
    METRICS = ("exact_match", "flexible_extract")
    file: File = Field(examples=["FILE.jsonl"])
    rule: Literal["gsm8k", "exact", "contains", "json"] = "exact"
    prefix: str = ""
    form: str = "Question: {question}\nAnswer:"
    stop: Words = ("\nQuestion:", "\n\n")
    max_new_tokens: Count = 256

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        if isinstance(form := tree.get("form"), str) and "{question}" not in form:
            yield Fault(("form",), f"should have {{question}} in it, is {form[:40]!r}", "value")
        stop = tree.get("stop", ())
        if stop == "" or (isinstance(stop, (list, tuple)) and "" in stop):
            yield Fault(("stop",), "has an empty text, which cuts every answer to nothing", "value")


class Code(Spec):
    """pass@k of Python programs as HumanEval has them (`prompt`, `test`, `entry_point`); they are run."""

    SHORT: ClassVar[str] = "file"
    file: File = Field(examples=["FILE.jsonl"])
    k: Count = 1
    samples: Count = 10
    temperature: float = Field(default=0.2, ge=0)
    max_new_tokens: Count = 512
    seconds: float = Field(default=5.0, gt=0)
    megabytes: Count = 1024

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        k, samples = tree.get("k", 1), tree.get("samples", 10)
        if isinstance(k, int) and isinstance(samples, int) and k > samples:
            yield Fault(("k",), f"pass@{k} needs at least {k} samples, has {samples}", "value")
        if tree.get("temperature") == 0 and samples != 1:
            yield Fault(("temperature",), "0 writes the same program every time; take one sample", "value")


class Bytes(Spec):
    """Bits per byte of a UTF-8 text."""

    SHORT: ClassVar[str] = "file"
    METRICS = ("bits_per_byte", "perplexity")
    file: File = Field(examples=["FILE.txt"])


class Data(Spec):
    """Share of the labelled images of an .npz file whose class is found."""

    SHORT: ClassVar[str] = "file"
    METRICS = ("acc",)
    KIND: ClassVar[str] = "image-classification"
    file: File = Field(examples=["FILE.npz"])


class Embedded(Spec):
    """What embedding models share.  pooling: over tokens; default: the folder's own, else of decoders the last."""

    KIND: ClassVar[str] = "encoder"
    pooling: Literal["mean", "cls", "last"] | None = None
    length: Count = 512


class Retrieval(Embedded):
    """JSON lines with `query` and `relevant` (ids), against a `corpus` of JSON lines with `id` and `text`."""

    METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
    file: File = Field(examples=["QUERIES.jsonl"])
    corpus: File = Field(examples=["CORPUS.jsonl"])


class Sts(Embedded):
    """JSON lines with `sentence1`, `sentence2` and `score`: rank correlation of the cosines with the scores."""

    SHORT: ClassVar[str] = "file"
    METRICS = ("spearman", "pearson")
    file: File = Field(examples=["PAIRS.jsonl"])


class Svg(Spec):
    """Seeded scenes, or a file of cases with `task`, `svg`, `instruction` and `answer`."""

    SHORT: ClassVar[str] = "task"
    METRICS = (
        "one_minus_mse", "mse", "validity", "unchanged", "do_nothing", "compression",
        "letter_acc", "likelihood_acc", "consistency", "rules", "elements", "commands", "bytes", "tokens",
    )  # fmt: skip
    task: Literal["edit", "understand", "generate"] = "edit"
    operations: Words = ()
    count: Count = 100
    seed: int = Field(default=0, ge=0)
    render: Count = 72
    max_new_tokens: Count = 2048
    file: File | None = None

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        from weightsmith.study.svg.scenes import OPERATIONS

        wanted = tree.get("operations", ())
        for name in [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, (list, tuple)) else ():
            if name not in OPERATIONS:
                yield Fault(("operations",), f"unknown operation {name!r}{did_you_mean(str(name), OPERATIONS)}")


class Process(Spec):
    """What processes of their own have in common.  seconds: after which one is stopped."""

    KIND: ClassVar[str] = ""
    seconds: float = Field(default=3600.0, gt=0)


class LmEval(Process):
    """A task of lm_eval (0.4.13 or later) in an environment of its own, offline; `include`: folder of task files."""

    SHORT: ClassVar[str] = "task"
    MAIN: ClassVar[str] = "acc"
    task: str = Field(examples=["gsm8k"])
    include: Place | None = None
    shots: int | None = Field(default=None, ge=0)
    defaults: bool = False


class Mteb(Process):
    """A task of mteb (2.26 or later) in an environment of its own, offline: one of its own, or JSON lines of a type."""

    SHORT: ClassVar[str] = "task"
    MAIN: ClassVar[str] = "main_score"
    task: str = Field(examples=["STSBenchmark"])
    type: Literal["STS", "Classification"] | None = None
    file: File | None = None
    train: File | None = None

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        kind = tree.get("type")
        if (kind is None) != (tree.get("file") is None):
            yield Fault((), "a task of your own has both: type and file", "value")
        if (kind == "Classification") != (tree.get("train") is not None):
            yield Fault((), "train goes with type: Classification, which learns its classes from it", "value")

    def limited(self) -> bool:
        return self.file is not None  # mteb's own tasks have no limit


class Program(Process):
    """Any program that prints JSON last: a number, {"score": ...}, or {"metrics", "errors", "examples"}.

    {model}, {task} and {limit} in the command are replaced.  Files that the command names are a part of its version;
    `version` is for what else it reads.
    """

    SHORT: ClassVar[str] = "command"
    command: str = Field(examples=["python score.py {model}"])
    version: str = Field(default="", description="changes when the program's data do")

    def files(self) -> list[Path]:
        try:
            words = shlex.split(self.command)
        except ValueError:  # said when it is run
            return []
        return [path for word in words if (path := Path(word).expanduser()).is_file()]

    def limited(self) -> bool:
        return "{limit}" in self.command


EVALUATORS: Mapping[str, type[Spec]] = {
    "likelihood": Texts,
    "choices": Choices,
    "generate": Generate,
    "code": Code,
    "bits_per_byte": Bytes,
    "accuracy": Data,
    "retrieval": Retrieval,
    "sts": Sts,
    "svg": Svg,
    "lm_eval": LmEval,
    "mteb": Mteb,
    "program": Program,
}
