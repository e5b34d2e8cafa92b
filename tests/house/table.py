"""Every figure of the house beside its aim."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from house.tree import ROOT, House, length, part

__all__ = ["LONGEST", "Row", "best", "ratchet", "rows"]

NOTED = Path(__file__).with_name("best.json")
LONGEST = 420

LINES = {
    "core": 1200,
    "ops": 2150,
    "kernels": 1750,  # ranks, cuts and looks came from ops
    "methods": 3300,
    "codecs": 750,
    "io": 6800,
    "recipe": 2000,
    "inputs": 400,
    "plan": 950,
    "devices": 450,
    "engine": 1700,
    "jobs": 800,
    **dict.fromkeys(("experts", "lora", "moe", "tokens", "inspect", "observe", "study", "train"), 1500),
}
"""Part -> lines of source it is to have at most."""

RUN_OPTIONS = {"memory", "threads", "device", "resume", "overwrite", "progress", "sources", "files", "fingerprint",
               "ray"}  # fmt: skip
ASKS = {"is_fused", "fits_kernels", "available"}
"""Functions that find out whether the kernels do a task; `available` counts on the module `fused` only."""

ONE_OF = {"method": "magmax", "codec": "tsvc", "input format": "gguf", "verb": "lineage"}
"""Kinds of things that are added, and one of each: how many files must know it by name?"""


@dataclass(frozen=True)
class Row:
    """One figure.

    aim      at most this, or at least, see `least`
    kept     may only become better; else it may do as it likes until it has reached its aim
    """

    key: str
    what: str
    now: float
    aim: float
    least: bool = False
    kept: bool = True

    @property
    def reached(self) -> bool:
        return self.now >= self.aim if self.least else self.now <= self.aim

    def better(self, one: float, other: float) -> float:
        return max(one, other) if self.least else min(one, other)

    def allowed(self, noted: float | None) -> float | None:
        """The worst that `now` may be; None: anything."""
        if noted is None or not (self.kept or replace(self, now=noted).reached):
            return None
        return min(self.aim, noted) if self.least else max(self.aim, noted)


# --- the rows ------------------------------------------------------------------------------------------


def rows(house: House) -> list[Row]:
    """Every figure, in the order in which they are shown."""
    return [*_ways(house), *_arrows(house), *_contract(house), *_engines(house), *_texts(house)]


def _ways(house: House) -> Iterator[Row]:
    way = house.trace["way"]
    yield Row("way", "functions on the way of a TIES merge to its bytes", len(way), 40, kept=False)
    yield Row("way_modules", "  and the modules they are in", len({module for module, _ in way}), 20, kept=False)
    yield Row("back_up", "  calls back up to a higher layer", len(house.back_up), 0)
    yield Row("frames", "frames between run() and a kernel", house.trace["depth"], 7)
    called = {function[0] for caller, callee, _ in house.trace["calls"] for function in (caller, callee)}
    files = [path for path in house.files if house.module(path) in called]
    yield Row("files", "files that a TIES merge runs through", len(files), 40, kept=False)
    yield Row("files_lines", "  and their lines", sum(map(length, files)), 9000, kept=False)
    for kind, one in ONE_OF.items():
        word = re.compile(rf"\b{one}\b", re.IGNORECASE)
        count = sum(bool(word.search(path.read_text())) for path in house.files)
        yield Row(f"names_{kind.replace(' ', '_')}", f"files that name one {kind} ({one})", count, 3)


def _arrows(house: House) -> Iterator[Row]:
    yield Row("circles", "files in import circles, lazy imports counted", sum(map(len, house.circles)), 0)
    yield Row("arrows", "imports that run upwards or sideways", sum(map(len, house.arrows.values())), 0)


def _contract(house: House) -> Iterator[Row]:
    traits = house.named("Traits")
    fields = sum(isinstance(node, ast.AnnAssign) for node in traits.body) if traits is not None else 0
    yield Row("traits", "fields of Traits", fields, 10)
    yield Row("hooks", "hooks of Stage, besides merge, apply, encode, decode", hooks(house.named("Stage")), 6)
    stages = list(house.classes("methods"))
    yield Row("header", "header of a method, lines, median", median(map(header_lines, stages)), 4)
    # Of `ops.length.Scaled` it is merged(), which the factor comes after.
    merges = [f for stage in stages for f in _functions(stage) if f.name in ("merge", "merged")]
    yield Row("merge", "its merge(), lines, median", median(map(body_lines, merges)), 5)


def _engines(house: House) -> Iterator[Row]:
    calls = [(module, node.func) for module, node in house.nodes if isinstance(node, ast.Call)]
    asks = [
        where
        for where, function in calls
        if (isinstance(function, ast.Name) and function.id in ASKS)
        or (isinstance(function, ast.Attribute) and function.attr in ASKS and ast.unparse(function.value) == "fused")
    ]
    yield Row("asks", 'places that ask "do the kernels do this?"', len(asks), 1)
    specs = {
        node.name for node in house.trees.get("core.kernel", ast.Module([], [])).body if isinstance(node, ast.ClassDef)
    }
    tests = sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and bool(specs & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)})
        for _, node in house.nodes
    )
    yield Row("isinstance", "isinstance tests on the kernels' specs", tests, 0)
    many = [
        node.name
        for _, node in house.nodes
        if isinstance(node, ast.FunctionDef)
        and len(RUN_OPTIONS & {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}) >= 4
    ]
    yield Row("options", "functions with four or more of the run options", len(many), 0)


_VERB = r'(?m)\A"""`weightsmith '


def _texts(house: House) -> Iterator[Row]:
    for name in ("ops", "kernels", "methods"):
        paths = [path for path in house.files if part(house.module(path)) == name]
        share = round(comment_share(paths), 1)
        yield Row(f"comments_{name}", f"comments in {name}/, % of lines of code", share, 10, least=True, kept=False)
    yield Row("lines", "lines of src, comments apart", house.lines(), 34_000, kept=False)
    for name, most in LINES.items():
        yield Row(f"lines_{name}", f"  {name}", house.lines(name), most, kept=False)
    verbs = [path for path in house.files if "cli" in path.parts and re.search(_VERB, path.read_text())]
    yield Row("verbs", "verbs of more than 60 lines", sum(length(path) > 60 for path in verbs), 0)
    longest = max(map(length, house.files))
    yield Row("longest", "longest file", longest, LONGEST)
    schemas = [path for path in tracked("src/*.json", "docs/*.json") if path.name != "costs.json"]  # that is measured
    yield Row("schema", "lines of generated JSON under version control", sum(map(length, schemas)), 0)
    yield Row("lines_tests", "lines of tests", sum(map(length, tracked("tests/*.py"))), 27_700, kept=False)
    words = sum(len(path.read_text().split()) for path in tracked("docs/*.md", "README.md"))
    yield Row("words", "words of docs and README", words, 30_000, kept=False)
    readme = (ROOT / "README.md").read_text().partition("\n## What `make demo`")[0]
    yield Row("words_readme", "  README", len(readme.split()), 400, kept=False)


# --- figures of the text -----------------------------------------------------------------------------


def comment_share(paths: Iterable[Path]) -> float:
    """Lines with a comment, in percent of the lines with code; docstrings are neither."""
    code = comments = 0
    for path in paths:
        marks: dict[int, set[bool]] = {}
        previous = tokenize.NEWLINE
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type == tokenize.COMMENT:
                if not re.match(r"# (fmt|type|noqa|mypy)\b", token.string):
                    marks.setdefault(token.start[0], set()).add(True)
                continue
            blank = token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
            text = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
            if not blank and not text:
                for line in range(token.start[0], token.end[0] + 1):
                    marks.setdefault(line, set()).add(False)
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                previous = token.type
        code += sum(False in mark for mark in marks.values())
        comments += sum(True in mark for mark in marks.values())
    return 100 * comments / max(code, 1)


def header_lines(node: ast.ClassDef) -> int:
    """Lines of decorators and of the class statement: what a stage declares before it says anything."""
    first = min([decorator.lineno for decorator in node.decorator_list] + [node.lineno])
    return node.body[0].lineno - first


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function behind its docstring, comments apart."""
    body = function.body[bool(ast.get_docstring(function)) :]
    nodes = [node for statement in body for node in ast.walk(statement) if hasattr(node, "lineno")]
    return len({line for node in nodes for line in (node.lineno, node.end_lineno)})


def _functions(node: ast.ClassDef | None) -> list[ast.FunctionDef]:
    return [inner for inner in node.body if isinstance(inner, ast.FunctionDef)] if node is not None else []


def hooks(stage: ast.ClassDef | None) -> int:
    """Public methods of Stage that a subclass may define."""
    fixed = {"describe", "name", "parameters"}  # the same for all

    def final(function: ast.FunctionDef) -> bool:
        return any(ast.unparse(decorator) == "final" for decorator in function.decorator_list)

    public = [function for function in _functions(stage) if not function.name.startswith("_")]
    return sum(function.name not in fixed and not final(function) for function in public)


def tracked(*patterns: str) -> list[Path]:
    """Files under version control; all of them where there is none (an unpacked archive)."""
    done = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


# --- what is noted ---------------------------------------------------------------------------------------


def best() -> dict[str, Any]:
    """What best.json holds: {'rows': key -> best figure, 'arrows': pair of parts -> count}."""
    found: dict[str, Any] = json.loads(NOTED.read_text()) if NOTED.exists() else {"rows": {}, "arrows": {}}
    return found


def ratchet(house: House) -> None:
    """Note what is better than before; a figure that became worse stays as noted, and its test fails."""
    noted = best()
    found = [row for row in rows(house) if row.kept or row.reached]
    figures = {row.key: row.better(row.now, noted["rows"].get(row.key, row.now)) for row in found}
    counts = {pair: len(found) for pair, found in sorted(house.arrows.items())}
    if noted["arrows"]:
        counts = {pair: min(n, noted["arrows"].get(pair, 0)) for pair, n in counts.items()}
    NOTED.write_text(json.dumps({"rows": figures, "arrows": {p: n for p, n in counts.items() if n}}, indent=2) + "\n")
