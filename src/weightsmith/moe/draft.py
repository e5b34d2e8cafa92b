"""Everything about a mixture that headers and configs tell: what goes where, and every problem."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from weightsmith.core.errors import WeightsmithError, problems_of
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem, told
from weightsmith.io.read.layers import config_mapping
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.read.vocabulary import difference
from weightsmith.moe.layouts import MLP, Facts, Layout, choose, config_json
from weightsmith.moe.recipe import PROMPTED, Expert, MoeRecipe
from weightsmith.moe.source import MoeSource, Piece

__all__ = ["Draft", "draft"]

_MLP = re.compile(rf"(?P<block>.*\blayers\.\d+)\.mlp\.(?P<part>{'|'.join(MLP)})\.(?P<kind>weight|bias)")


@dataclass(frozen=True, eq=False)
class Draft:
    """A mixture before anything is computed.

    source   its tensors; the routers are still to be made
    routers  the router tensors' names, layer by layer; `gates` those of the shared expert
    config   text of config.json
    warnings what the user should look at
    active   parameters that one token goes through
    """

    recipe: MoeRecipe
    source: MoeSource
    layout: Layout
    facts: Facts
    routers: tuple[str, ...]
    gates: tuple[str, ...]
    hidden: int
    vocabulary: int
    config: str
    warnings: tuple[Problem, ...]

    @property
    def base(self) -> Source:
        return self.source.sources["base"]

    @property
    def dense_bytes(self) -> int:
        return sum(key.nbytes for key in self.base.keys.values())

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes for key in self.source.keys.values())

    @property
    def numel(self) -> int:
        return sum(key.numel for key in self.source.keys.values())

    @property
    def active(self) -> int:
        idle = (self.facts.experts - self.facts.chosen) * len(self.routers) * 3 * self.facts.size * self.hidden
        return self.numel - idle


def draft(recipe: MoeRecipe, given: Mapping[str, Source] | None = None) -> tuple[Draft | None, list[Problem]]:
    """Open the models and lay the mixture out, or say everything that stands in the way.

    `given` holds sources that are at hand already, by name; 'base' for the base.
    """
    made, problems = _drafted(recipe, given or {})
    return made, list(told(Code.FIT, problems))


def _drafted(recipe: MoeRecipe, given: Mapping[str, Source]) -> tuple[Draft | None, Sequence[Problem | str]]:
    problems = _asked(recipe)
    sources = _opened(recipe, given, problems)
    if "base" not in sources or len(sources) != 1 + len(recipe.experts) + len(recipe.shared):
        return None, problems
    base = sources["base"]
    try:
        config = config_mapping(base)
    except WeightsmithError as error:
        return None, [*problems, *problems_of(error)]
    blocks = _blocks(base, "base", problems)
    if not blocks:
        return None, problems
    for name in (*recipe.experts, *recipe.shared):
        _check_expert(name, sources[name], base, blocks, problems)
    problems += _unlike_sizes(recipe.experts, sources, blocks)
    embedding = _embedding(base)
    if embedding is None:
        problems.append("base: no embedding of tokens (embed_tokens.weight) is in it")
    problems += _untied(base, config)
    if problems or embedding is None:
        return None, problems
    facts = _facts(recipe, sources, blocks, config)
    layout, whys = choose(recipe.architecture, facts, partial(_unused_prompts, recipe))
    if layout is None or whys:
        return None, whys
    source, routers, gates = _laid_out(recipe, sources, layout, blocks, facts)
    made = Draft(
        recipe,
        source,
        layout,
        facts,
        routers,
        gates,
        hidden=embedding.shape[1],
        vocabulary=embedding.shape[0],
        config=config_json(config, layout, facts, recipe.output.dtype),
        warnings=tuple(told(Code.SOURCE, _notes(layout, facts, config), "base")),
    )
    return made, []


def _asked(recipe: MoeRecipe) -> list[Problem | str]:
    """What is wrong with the recipe whatever the models are."""
    problems: list[Problem | str] = []
    count = len(recipe.experts)
    if recipe.experts_per_token > count:
        problems.append(f"experts_per_token = {recipe.experts_per_token}, but the recipe names {count}")
    for name in {"base"} & {*recipe.experts, *recipe.shared} | recipe.experts.keys() & recipe.shared.keys():
        problems.append(f"an expert cannot be called {name!r}: the name is taken; give it another")
    prompted = recipe.router in PROMPTED
    for name, expert in recipe.experts.items():
        if prompted and not expert.prompts:
            problems.append(f"{name}: router {recipe.router!r} needs prompts; add some, or use router: random")
    if count > 1 and not recipe.for_training:
        found = {tuple(sorted(map(repr, e.prompts))) for e in recipe.experts.values()}
        if prompted and len(found) == 1 and all(e.prompts for e in recipe.experts.values()):
            problems.append("all experts have the same prompts, so the router cannot tell them apart; "
                            "give each its own, or say for_training: true")  # fmt: skip
        if len({(e.model, e.noise, e.residual) for e in recipe.experts.values()}) == 1:
            problems.append(f"all experts are the same model ({next(iter(recipe.experts.values())).model}); "
                            "if the mixture will be trained, say for_training: true")  # fmt: skip
    return problems


def _opened(recipe: MoeRecipe, given: Mapping[str, Source], problems: list[Problem | str]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    wanted = {"base": recipe.base} | {n: e.model for n, e in (*recipe.experts.items(), *recipe.shared.items())}
    for name, ref in wanted.items():
        try:
            sources[name] = given.get(name) or open_source(ref, base=sources.get("base"))
        except WeightsmithError as error:
            problems += [one.of(name) for one in problems_of(error)]
    return sources


def _blocks(source: Source, who: str, problems: list[Problem | str]) -> dict[str, str]:
    """Block -> 'block.mlp' for every block with a gated MLP as Llama has it; anything else in an MLP is a problem."""
    parts: dict[str, set[str]] = {}
    for name in source.keys:
        found = _MLP.fullmatch(name)
        if found is None:
            if ".mlp." in name:
                problems.append(
                    f"{who}: {name} is no part of a gated MLP ({', '.join(MLP)}), which experts are made of"
                )
                return {}
        elif found["kind"] == "bias":
            problems.append(f"{who}: {name}: MLPs with biases have no place in a mixture")
            return {}
        else:
            parts.setdefault(found["block"], set()).add(found["part"])
    incomplete = [block for block, have in parts.items() if have != set(MLP)]
    if not parts or incomplete:
        where = f"no layers.N.mlp with {', '.join(MLP)}: not a Llama-like dense model"
        if incomplete:
            lacks = ", ".join(sorted(set(MLP) - parts[incomplete[0]]))
            where = f"{incomplete[0]}.mlp lacks {lacks}"
        problems.append(f"{who}: {where}")
        return {}
    return {block: f"{block}.mlp" for block in parts}


def _check_expert(
    name: str, source: Source, base: Source, blocks: Mapping[str, str], problems: list[Problem | str]
) -> None:
    own = _blocks(source, name, problems)
    if not own:
        return
    if own.keys() != blocks.keys():
        problems.append(f"{name} has {len(own)} blocks with an MLP, the base has {len(blocks)}")
        return
    for mlp in blocks.values():
        here, there = base.key(f"{mlp}.gate_proj.weight").shape[1], source.key(f"{mlp}.gate_proj.weight").shape[1]
        if here != there:
            problems.append(f"{name}: hidden size {there}, the base has {here}; experts must have the base's")
            return
    try:
        if (text := difference(base.origin.folder, source.origin.folder)) is not None:
            problems.append(f"{name}: unlike vocabularies in base and {name}: {text}; "
                            f'give {name} the base\'s tokens first with "weightsmith tokenizer"')  # fmt: skip
    except WeightsmithError as error:
        problems.append(f"{name}: {error}")


def _unlike_sizes(experts: Mapping[str, Expert], sources: Mapping[str, Source], blocks: Mapping[str, str]) -> list[str]:
    """All experts must have MLPs of one size, in every block."""
    sizes: dict[int, str] = {}
    for name in experts:
        for mlp in blocks.values():
            tensor = f"{mlp}.gate_proj.weight"
            if tensor in sources[name].keys:
                sizes.setdefault(sources[name].key(tensor).rows, name)
    if len(sizes) > 1:
        found = ", ".join(f"{size} ({name})" for size, name in sizes.items())
        return [f"MLPs of unlike sizes: {found}; all experts of a mixture have one size"]
    return []


def _embedding(base: Source) -> Key | None:
    return next((key for key in base.keys.values() if key.name.endswith("embed_tokens.weight")), None)


def _untied(base: Source, config: Mapping[str, Any]) -> list[str]:
    has_head = any(name.endswith("lm_head.weight") for name in (*base.keys, *base.aliases))
    if has_head or config.get("tie_word_embeddings"):
        return []
    return ["base: no lm_head.weight, and config.json does not say tie_word_embeddings: true; repair the base first"]


def _facts(
    recipe: MoeRecipe, sources: Mapping[str, Source], blocks: Mapping[str, str], config: Mapping[str, Any]
) -> Facts:
    gate = f"{next(iter(blocks.values()))}.gate_proj.weight"
    names = sources["base"].keys
    return Facts(
        model_type=str(config.get("model_type")),
        experts=len(recipe.experts),
        chosen=recipe.experts_per_token,
        size=sources[next(iter(recipe.experts))].key(gate).rows,
        shared=len(recipe.shared),
        shared_size=sum(sources[name].key(gate).rows for name in recipe.shared),
        biased=any(name.endswith("self_attn.q_proj.bias") for name in names),
        normed=any(name.endswith("self_attn.q_norm.weight") for name in names),
    )


def _unused_prompts(recipe: MoeRecipe, layout: Layout) -> list[str]:
    problems = []
    for name, expert in recipe.shared.items():
        if layout.shared_gate and recipe.router in PROMPTED and not expert.prompts:
            problems.append(f"{name}: {layout.name} weighs its shared expert by a gate, which needs prompts")
        if not layout.shared_gate and (expert.prompts or expert.avoid):
            problems.append(
                f"{name}: {layout.name} adds its shared experts as they are; prompts have no use, remove them"
            )
    return problems


def _laid_out(
    recipe: MoeRecipe, sources: Mapping[str, Source], layout: Layout, blocks: Mapping[str, str], facts: Facts
) -> tuple[MoeSource, tuple[str, ...], tuple[str, ...]]:
    """Where every tensor of the mixture comes from, in the order of the base's tensors."""
    base = sources["base"]
    pieces: dict[str, Piece] = {}
    routers: list[str] = []
    gates: list[str] = []

    def add(name: str, key: Key, parts: Sequence[tuple[str, str]] = (), axis: int = 0) -> None:
        experts = [{**recipe.experts, **recipe.shared}.get(model) for model, _ in parts]
        down = name.endswith(f"{layout.words['down_proj']}.weight")
        pieces[name] = Piece(
            Key(name, key.shape, key.dtype),
            tuple(parts),
            axis,
            tuple(e.noise if e else 0.0 for e in experts),
            tuple(e.residual if e and down else 1.0 for e in experts),
        )

    done: set[str] = set()
    for name, key in base.keys.items():
        found = _MLP.fullmatch(name)
        if found is None:
            add(name, key, [("base", name)])
            continue
        block = found["block"]
        if block in done:
            continue
        done.add(block)
        place, mlp = f"{block}.{layout.block}", blocks[block]
        like = base.key(f"{mlp}.gate_proj.weight")
        routers.append(f"{place}.gate.weight")
        add(routers[-1], Key("", (facts.experts, like.shape[1]), like.dtype))
        if layout.correction:
            add(f"{place}.{layout.correction}", Key("", (facts.experts,), "float32"))
        for part, word in layout.words.items():
            tensor = f"{mlp}.{part}.weight"
            for i, expert in enumerate(recipe.experts):
                own = Key("", sources[expert].key(tensor).shape, base.key(tensor).dtype)
                add(f"{place}.experts.{i}.{word}.weight", own, [(expert, tensor)])
            if recipe.shared:
                axis = 1 if part == "down_proj" else 0
                shape = list(like.shape) if axis == 0 else [like.shape[1], 0]
                shape[axis] = facts.shared_size
                donors = [(expert, tensor) for expert in recipe.shared]
                add(f"{place}.{layout.shared}.{word}.weight", Key("", tuple(shape), like.dtype), donors, axis)
        if layout.shared_gate:
            gates.append(f"{place}.{layout.shared_gate}")
            add(gates[-1], Key("", (1, like.shape[1]), like.dtype))
    source = MoeSource(pieces, sources, base.aliases, base.origin.folder, recipe.seed)
    return source, tuple(routers), tuple(gates)


def _notes(layout: Layout, facts: Facts, config: Mapping[str, Any]) -> list[str]:
    notes = [layout.foreign] if layout.foreign else []
    if facts.experts & (facts.experts - 1):
        notes.append(f"{facts.experts} experts are no power of two; some runtimes (llama.cpp) want one")
    window = config.get("sliding_window")
    if isinstance(window, int) and config.get("use_sliding_window", True):
        notes.append(f"the base's sliding window of {window} tokens is not carried over")
    return notes
