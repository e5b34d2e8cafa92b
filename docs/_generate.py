"""Reference pages from what the code says of itself: methods, recipe, command line, errors, Python, layers, advice.

Nothing on these pages is written by hand, so nothing on them can fall behind the code.  When to use a method is what
`choose.md` says: the problems under which it names it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import weightsmith
from weightsmith import lora
from weightsmith.cli import main as cli
from weightsmith.core import checks, errors, method, site
from weightsmith.core.checks import Dims
from weightsmith.core.costs import Costs
from weightsmith.core.keys import DTYPES, ROLES, RULE_ROLES, role_of
from weightsmith.inspect import advice
from weightsmith.inspect.catalogue import by_purpose, cost_at_7b, describe
from weightsmith.jobs.compress import compress, restore
from weightsmith.jobs.job import Result
from weightsmith.jobs.merge import run
from weightsmith.plan.costs import costs_of
from weightsmith.recipe import resolve, schema
from weightsmith.recipe.aliases import PIPELINES, spelled
from weightsmith.recipe.json_schema import schema as json_schema
from weightsmith.report.units import roughly
from weightsmith.train import recipe as train_recipe
from weightsmith.train.multitask import recipe as multitask_recipe

__all__ = ["generate", "markdown", "pages", "problems_by_method"]

CHOOSE = Path(__file__).with_name("choose.md")
HOUSE = Path(__file__).parents[1] / "tests" / "house" / "tree.py"

WIDTH = 96
"""Columns of the command line's help."""


def generate(folder: Path) -> None:
    """Write every reference page anew; pages of methods that are gone go."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> MyST text."""
    stages = [(cls, describe(cls)) for cls in method.registered().values() if _is_built_in(cls)]
    problems = problems_by_method(CHOOSE.read_text("utf-8"))
    made = {
        f"methods/{facts['name']}.md": _method_page(cls, facts, problems.get(facts["name"], ()))
        for cls, facts in stages
    }
    return {
        **made,
        "methods.md": _methods_index([facts for _, facts in stages]),
        "recipe.md": _recipe_page(),
        "cli.md": _cli_page(),
        "errors.md": _errors_page(),
        "python.md": _python_page(),
        "train.md": _train_page(),
        "layers.md": _layers_page(),
        "advice.md": _advice_page(),
    }


def problems_by_method(text: str) -> dict[str, tuple[str, ...]]:
    """Method -> the headings of `choose.md` under which its page is linked, in order."""
    found: dict[str, dict[str, None]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        for name in re.findall(r"\(reference/_generated/methods/(\w+)\.md\)", body):
            found.setdefault(name, {})[heading.strip()] = None
    return {name: tuple(headings) for name, headings in found.items()}


def _slug(heading: str) -> str:
    """The anchor that MyST gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _is_built_in(cls: type) -> bool:
    return cls.__module__.startswith(("weightsmith.methods.", "weightsmith.codecs."))


# --- methods ---------------------------------------------------------------------------------------

_GRAINS = {
    "element": "any block of rows",
    "tensor": "one whole tensor at a time",
    "group": "several whole tensors that belong together",
}


def _methods_index(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "# Methods",
        "",
        "See [](../../choose.md) for which one to take. `weightsmith methods` prints this list, with a name one page.",
        "A *method* makes one tensor of many, and a pipeline has exactly one. A *filter* edits task vectors:",
        "before a method each model's, after it the merged one. A *codec* keeps every model, and stands last.",
        "",
        f"Names of pipelines: {'; '.join(f'`{name}` is `{spelled(name)}`' for name in PIPELINES)}.",
    ]
    for purpose, members in by_purpose(found).items():
        rows = [
            (f"[{m['name']}](methods/{m['name']}.md)", m["kind"], _escaped(m["summary"]), _needs(m) or "-",
             "" if m["seconds_at_7b"] is None else roughly(m["seconds_at_7b"]))
            for m in members
        ]  # fmt: skip
        lines += ["", f"## {purpose}", "", *_table(("name", "kind", "what it does", "needs", "at 7B, per model"), rows)]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *(f"methods/{m['name']}" for m in found), "```"])


def _method_page(cls: type[method.Stage], facts: Mapping[str, Any], problems: Sequence[str]) -> str:
    top = facts["max_models"]
    low = facts["min_models"]
    models = str(low) if top == low else f"{low} to {top}" if top else f"{low} or more"
    domain = next((check for check in cls.traits.checks if isinstance(check, Dims)), None)
    rows = [
        ("kind", facts["kind"]),
        ("when", "; ".join(f"[{problem}](../../../choose.md#{_slug(problem)})" for problem in problems)),
        ("also called", ", ".join(facts["aliases"])),
        ("in Python", f"`weightsmith.{cls.__name__}`"),
        ("paper", _escaped(facts["paper"])),
        ("needs", _needs(facts) or "nothing but the models"),
        ("number of models", models),
        ("sees at once", _GRAINS[facts["grain"]]),
        ("tensors", _dimensions(domain) if domain else "of any shape"),
        ("other tensors", f"are merged by {facts['otherwise']}" if facts["otherwise"] else ""),
        ("scratch memory", _scratch(costs_of(cls))),
        ("cost at 7B", _time(facts)),
    ]
    title = f"{facts['name']} ({facts['kind']})"
    lines = [f"# {title}", "", markdown(facts["text"]), ""]
    lines += _table(("", ""), [row for row in rows if row[1]])
    lines += ["", "## Parameters", ""]
    if facts["parameters"]:
        lines += _table(
            ("name", "default", "range", "one per model", "meaning"),
            [
                (f"`{p['name']}`", f"`{_yaml(p['default'])}`", _escaped(p["range"]), "yes" if p["per_model"] else "no",
                 _escaped(p["meaning"]))
                for p in facts["parameters"]
            ],
        )  # fmt: skip
    else:
        lines.append("None.")
    return "\n".join(lines)


def _time(facts: Mapping[str, Any]) -> str:
    return "" if facts["seconds_at_7b"] is None else f"about {cost_at_7b(facts)}; see [](../../../benchmarks.md)"


def _scratch(costs: Costs) -> str:
    """What a method takes beside its inputs, in words."""
    found = {"all models' float32 blocks": costs.scratch, "one of them": costs.matrix}
    found[f"a square matrix of {costs.side if costs.side != 'smaller' else 'the smaller side'}"] = costs.square
    words = ", ".join(f"{value:g} of {what}" for what, value in found.items() if value)
    counted = f"; histograms of half a megabyte for each model: {costs.histograms}" if costs.histograms else ""
    return (f"bytes per byte: {words}" if words else "none") + counted


def _needs(facts: Mapping[str, Any]) -> str:
    return ", ".join("a base model" if n == "base" else f"the statistic `{n}`" for n in facts["needs"])


def _dimensions(domain: Dims) -> str:
    low, high = domain.low, domain.high
    return f"with {low} dimensions" if low == high else f"with {low} to {high} dimensions"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- recipe ----------------------------------------------------------------------------------------


def _recipe_page() -> str:
    defs = json_schema(plugins=False)["$defs"]
    lines = [
        "# Recipe",
        "",
        "A recipe is YAML or JSON. `weightsmith schema` prints its JSON Schema; put the schema beside your recipes and",
        "`# yaml-language-server: $schema=recipe.schema.json` into their first line, and editors complete them.",
        "An unknown key is an error that names the nearest known one.",
    ]
    parts: list[tuple[str, type[BaseModel]]] = [
        ("The recipe", schema.Recipe),
        ("A model", schema.ModelRef),
        ("Slices", schema.Slices),
        ("Modules", schema.Modules),
        ("A module", schema.Module),
        ("A rule", schema.Rule),
        ("The tokenizer", schema.Tokenizer),
        ("The output", schema.Output),
    ]
    for title, cls in parts:
        lines += ["", f"## {title}", "", markdown(inspect.cleandoc(cls.__doc__ or "")), ""]
        lines += _fields(cls, defs[cls.__name__]["properties"])
    lines += [
        "",
        "A model may be written in short, as its path or hub id alone, and a stage as its name alone:",
        "`method: ties` is `method: [{name: ties}]` is `method: {ties: {}}`.",
        "Sizes are written like `500MB`, `5GB` or `2GiB`, or as a number of bytes.",
        "A path that exists beside the recipe file is meant relative to it.",
        "",
        "## Values that depend on the tensor",
        "",
        "A value may be a list of cases, the first of which that matches a tensor counts; `match`, `role` and `layers`",
        "are those of rules:",
        "",
        "```yaml",
        'weight: [{match: "*mlp*", value: [0.2, 0.8]}, {layers: outside, value: 1}, 0.5]',
        "```",
        "",
        "A bare value stands for every tensor, `null` for none: a tensor that gets that far is an error. Where no case",
        "matches, the value is looked for in the next place.",
        "",
        "## Where a parameter's value comes from",
        "",
        markdown(inspect.cleandoc(resolve.Resolver.__doc__ or "").split("\n\n", 1)[1]),
        "",
        "`exclude` comes before all rules; of the rules the first that matches a tensor decides.",
        "",
        "## Roles",
        "",
        "A tensor's role follows from its name:",
        "",
        *_table(("name", "role"), [(f"`{n}`", f"`{role_of(n)}`") for n in _EXAMPLES]),
        "",
        f"All roles: {', '.join(f'`{role}`' for role in ROLES)}.",
        "",
        f"A rule also takes {', '.join(f'`{role}`' for role in RULE_ROLES[len(ROLES) :])}: biases, and the parts of "
        "models that see or hear, whatever role a tensor has within them. `visual.merger.mlp.0.weight` is a connector.",
        "",
        "## Storage formats",
        "",
        f"Merged, and possible as `output.dtype`: {_names(d.name for d in DTYPES.values() if d.floating)}.",
        f"Copied if equal in all models, else refused: {_names(d.name for d in DTYPES.values() if not d.floating)}.",
    ]
    return "\n".join(lines)


_EXAMPLES = (
    "model.embed_tokens.weight",
    "model.layers.5.self_attn.q_proj.weight",
    "model.layers.5.mlp.down_proj.weight",
    "model.layers.5.input_layernorm.weight",
    "lm_head.weight",
    "visual.merger.0.weight",
)


def _fields(cls: type[BaseModel], properties: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, info in cls.model_fields.items():
        default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
        rows.append((f"`{name}`", _escaped(_kind(properties[name])), default, _escaped(info.description or "")))
    return _table(("key", "value", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        return "-"
    return f"`{next(iter(value)) if isinstance(value, tuple) else value}`"


def _kind(spec: Mapping[str, Any]) -> str:
    """A JSON Schema type in words."""
    if "$ref" in spec:
        name = str(spec["$ref"].rpartition("/")[2]).lower()
        return {"parameters": "mapping", "recipe": "model"}.get(name, name)
    if "anyOf" in spec:
        kinds = dict.fromkeys(_kind(s) for s in spec["anyOf"] if s != {"type": "null"})
        return "model" if "model" in kinds else " or ".join(kinds)
    if "enum" in spec:
        return "word" if len(spec["enum"]) > 4 else " | ".join(map(str, spec["enum"]))
    if spec.get("type") == "array":
        return "[start, end]" if "maxItems" in spec else f"list of {_kind(spec['items'])}s"
    if spec.get("type") == "object":
        inside = spec.get("additionalProperties")
        return f"names to {_kind(inside)}" if isinstance(inside, dict) else "mapping"
    return {"string": "text", "integer": "whole number"}.get(spec["type"], str(spec["type"]))


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


# --- command line ----------------------------------------------------------------------------------


_WORDS_OF = {"lora": ("merge", "extract", "average", "resize")}


def _cli_page() -> str:
    doc = inspect.cleandoc(cli.__doc__ or "")
    codes = next(line for line in doc.splitlines() if line.startswith("Exit codes"))
    lines = ["# Command line", "", codes, "", "```text", _help(), "```"]
    for verb in cli._VERBS:
        lines += ["", f"## weightsmith {verb}", "", "```text", _help(verb), "```"]
        for word in _WORDS_OF.get(verb, ()):
            lines += ["", f"### weightsmith {verb} {word}", "", "```text", _help(verb, word), "```"]
    return "\n".join(lines)


def _help(*words: str) -> str:
    """What `weightsmith WORDS --help` prints."""
    with _environment(COLUMNS=str(WIDTH), TERM="dumb"), contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main([*words, "--help"])
    if code:
        raise RuntimeError(f"weightsmith {' '.join(words)} --help returned {code}")
    return out.getvalue().strip()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# --- layers, advice ----------------------------------------------------------------------------------


def layers(text: str) -> tuple[tuple[str, ...], ...]:
    """The order of imports, from the lowest layer up, as the house test states it."""
    assigned = (node for node in ast.parse(text).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(a.value) for a in assigned if getattr(a.targets[0], "id", "") == "LAYERS")


def _layers_page() -> str:
    rows = []
    for names in reversed(layers(HOUSE.read_text("utf-8"))):
        for name in (n for n in names if not n.startswith("_")):
            doc = inspect.cleandoc(importlib.import_module(f"weightsmith.{name}").__doc__ or "")
            rows.append((f"`{name}`", _escaped(doc.split("\n\n")[0].replace("\n", " "))))
    lines = [
        "# Layers",
        "",
        "A part may import what stands below its own layer in this list, never what stands above.",
    ]
    return "\n".join([*lines, "", *_table(("part", "what is in it"), rows)])


_WORDS = {"far": "one expert", "long": "one expert", "short": "another", "pair": "two experts", "lambdas": "1/n up"}
"""What stands for the figures and names that a rule of `weightsmith inspect` fills in."""


def _advice_page() -> str:
    rows = [
        (f"`{rule.condition}`", _escaped(re.sub(r"\{(\w+)\}", lambda word: _WORDS.get(word[1], word[1]), rule.says)),
         _escaped(rule.source))
        for rule in advice.RULES
    ]  # fmt: skip
    lines = [
        "# Rules of `weightsmith inspect`",
        "",
        "Each rule reads one figure of the whole model. Its threshold is published (found by a paper, on its models),",
        "measured (seen on small models) or heuristic (our judgement). None replaces validation data.",
    ]
    return "\n".join([*lines, "", *_table(("if", "then", "where the threshold is from"), rows)])


# --- errors ----------------------------------------------------------------------------------------


def _errors_page() -> str:
    title, *rest = inspect.cleandoc(errors.__doc__ or "").split("\n\n")
    lines = ["# Errors", "", markdown(title), "", "```text", inspect.cleandoc(rest[0]), "```", ""]
    lines += [markdown(part) for part in rest[1:]]
    for name in errors.__all__:
        cls = getattr(errors, name)
        if isinstance(cls, type):
            lines += ["", f"## {name}", "", *_directive("py:exception", f"weightsmith.{name}", cls)]
    return "\n".join(lines)


# --- Python ----------------------------------------------------------------------------------------

_PYTHON: Mapping[str, Sequence[tuple[str, Any]]] = {
    "Merging": [
        ("weightsmith.merge", weightsmith.merge),
        ("weightsmith.greedy_soup", weightsmith.greedy_soup),
        ("weightsmith.open_source", weightsmith.open_source),
    ],
    "Recipes": [
        ("weightsmith.Recipe", weightsmith.Recipe),
        ("weightsmith.Recipe.load", weightsmith.Recipe.load),
        ("weightsmith.Recipe.run", weightsmith.Recipe.run),
        ("weightsmith.jobs.merge.run", run),
        ("weightsmith.jobs.job.Result", Result),
        ("weightsmith.Settings", weightsmith.Settings),
    ],
    "Compressing": [
        ("weightsmith.jobs.compress.compress", compress),
        ("weightsmith.jobs.compress.restore", restore),
    ],
    "Adapters": [
        ("weightsmith.lora.merge", lora.merge),
        ("weightsmith.lora.extract", lora.extract),
        ("weightsmith.lora.average", lora.average),
        ("weightsmith.lora.resize", lora.resize),
        ("weightsmith.lora.Written", lora.Written),
        ("weightsmith.lora.ModuleReport", lora.ModuleReport),
    ],
    "Methods as values": [
        ("weightsmith.Pipeline", method.Pipeline),
        ("weightsmith.registered", method.registered),
    ],
    "Writing a method": [
        ("weightsmith.Method", method.Method),
        ("weightsmith.Method.merge", method.Method.merge),
        ("weightsmith.Filter", method.Filter),
        ("weightsmith.Filter.apply", method.Filter.apply),
        ("weightsmith.core.method.Codec", method.Codec),
        ("weightsmith.core.method.Stage.passes", method.Stage.passes),
        ("weightsmith.core.method.Pass", method.Pass),
        ("weightsmith.core.method.Pass.see", method.Pass.see),
        ("weightsmith.core.method.Pass.end", method.Pass.end),
        ("weightsmith.core.method.Stage.check", method.Stage.check),
        ("weightsmith.core.checks.Case", checks.Case),
        ("weightsmith.core.costs.Costs", Costs),
        ("weightsmith.core.site.Site", site.Site),
        ("weightsmith.core.method.number", method.number),
        ("weightsmith.core.method.integer", method.integer),
        ("weightsmith.core.method.flag", method.flag),
        ("weightsmith.core.method.choice", method.choice),
    ],
}


def _python_page() -> str:
    lines = [
        "# Python",
        "",
        "`import weightsmith` imports nothing heavy; torch is loaded at first use. Every method is an attribute under",
        "its class name (`weightsmith.Ties`), see [](methods.md).",
    ]
    for title, members in _PYTHON.items():
        lines += ["", f"## {title}"]
        for name, thing in members:
            lines += ["", *_directive("py:class" if isinstance(thing, type) else "py:function", name, thing)]
    return "\n".join(lines)


_TRAIN = ("optim", "svfit", "dmm", "embed", "fuse", "multitask")
"""Modules of `weightsmith.train`, in the order of the page."""

_TRAIN_PARTS = (
    *(train_recipe.Tune, train_recipe.Svfit, train_recipe.Optimizer),
    *(train_recipe.AdamW, train_recipe.DctAdamw, train_recipe.Trion),
)


_MULTITASK_PARTS = (
    *(multitask_recipe.MultiTaskRecipe, multitask_recipe.TaskSpec, multitask_recipe.InstructionSpec),
    *(multitask_recipe.By, multitask_recipe.UniPerceiver, multitask_recipe.TaskExpert, multitask_recipe.Instruct),
    *(multitask_recipe.Prompt, multitask_recipe.SoftTokens, multitask_recipe.MTAdamWSpec, multitask_recipe.NetSpec),
)


def _train_page() -> str:
    lines = ["# Training", "", "See [](../../howto/train.md).", "", "## The recipe of weightsmith train"]
    defs = train_recipe.TrainRecipe.model_json_schema()
    for cls in (train_recipe.TrainRecipe, *_TRAIN_PARTS):
        spec = defs if cls is train_recipe.TrainRecipe else defs["$defs"][cls.__name__]
        lines += ["", f"### {cls.__name__}", "", markdown(inspect.cleandoc(cls.__doc__ or "")), ""]
        lines += _fields(cls, spec["properties"])
    lines += ["", "## The recipe of weightsmith train multitask"]
    defs = multitask_recipe.MultiTaskRecipe.model_json_schema()
    for made in _MULTITASK_PARTS:
        spec = defs if made is multitask_recipe.MultiTaskRecipe else defs["$defs"][made.__name__]
        if spec.get("properties"):
            lines += ["", f"### {made.__name__}", "", markdown(inspect.cleandoc(made.__doc__ or "")), ""]
            lines += _fields(made, spec["properties"])
    lines += ["", "The other parts are plain torch, for any training loop."]
    for name in _TRAIN:
        module = importlib.import_module(f"weightsmith.train.{name}")
        lines += ["", f"## weightsmith.train.{name}", "", markdown((module.__doc__ or "").partition("\n")[0])]
        for thing in filter(callable, (getattr(module, public) for public in module.__all__)):
            kind = "py:class" if isinstance(thing, type) else "py:function"
            lines += ["", *_directive(kind, f"weightsmith.train.{name}.{thing.__name__}", thing)]
    return "\n".join(lines)


def _directive(kind: str, name: str, thing: Any) -> list[str]:
    signature = f"{name}({_arguments(thing)})" if not isinstance(thing, type) else name
    return [f"````{{{kind}}} {signature}", "", markdown(inspect.cleandoc(thing.__doc__ or "")), "````"]


def _arguments(function: Callable[..., Any]) -> str:
    """Names and defaults; what the arguments are is in the text below."""
    given = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given if p.name not in ("self", "cls")]
    return str(inspect.Signature(bare))[1:-1]


# --- text ------------------------------------------------------------------------------------------

_TERM = re.compile(r"(?P<indent> *)(?P<term>[\w/<>*]+(?:, \w+)*) {2,}(?P<rest>\S.*)")
_ITEM = re.compile(r" *\d+\. ")


def markdown(text: str) -> str:
    """A docstring as Markdown: aligned 'term  meaning' lines become a list, all else is taken literally."""
    out: list[str] = []
    for line in text.splitlines():
        term = _TERM.fullmatch(line)
        previous = out[-1] if out else ""
        if term and not _ITEM.match(line):
            if previous and not previous.startswith("- "):
                out.append("")
            out.append(f"- `{term['term']}`: {_escaped(term['rest'])}")
        elif line.startswith("  ") and previous:
            out[-1] = f"{previous} {_escaped(line.strip())}"  # goes on with the item or sentence above
        elif line and previous.startswith("- "):
            out += ["", _escaped(line)]
        else:
            out.append(_escaped(line.strip()))
    return "\n".join(out)


def _escaped(text: str) -> str:
    """Text in which *, _, [, < and the like mean themselves; `code` stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]\\$])", r"\\\1", p) for p in parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]
