"""From a golden case's metadata to a call of the public API.  One table: method -> adapter."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from goldens import adapter_cases, alignment, coefficients, mergekit, surgery, tiny_llama
from goldens.encoded import encoded
from weightsmith import merge
from weightsmith.core.method import Pipeline, Stage, registry
from weightsmith.experts import grouping
from weightsmith.moe import router
from weightsmith.ops.masks import agreed
from weightsmith.ops.moments import product, rank_one
from weightsmith.search.frank_wolfe import FrankWolfe
from weightsmith.search.surrogate import fit
from weightsmith.train import embed
from weightsmith.train.optim import DCTAdamW

State = dict[str, Tensor]

NOT_YET: Mapping[str, str] = {}
"""Methods that are not built yet, and the piece of work that brings each."""


@dataclass(frozen=True)
class Case:
    """One file: what a reference implementation made of `tiny_llama.make(seed, experts)`."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, str]:
        with safe_open(self.path, "np") as file:
            return dict(file.metadata())

    @property
    def expected(self) -> State:
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @property
    def method(self) -> str:
        return self.meta["method"]

    @property
    def params(self) -> dict[str, Any]:
        return dict(json.loads(self.meta["params"]))

    @property
    def seed(self) -> int:
        return int(self.meta["seed"])

    @property
    def count(self) -> int:
        return int(self.meta["experts"])

    @property
    def base(self) -> State:
        return _inputs(self.seed, self.count)["base"]

    @property
    def experts(self) -> dict[str, State]:
        return {n: s for n, s in _inputs(self.seed, self.count).items() if n != "base"}

    def stats(self, kind: str, make: Callable[[int, int], list[dict[str, np.ndarray]]]) -> dict[str, dict[str, State]]:
        found = make(self.seed, self.count)
        return {n: {kind: _tensors(s)} for n, s in zip(self.experts, found, strict=True)}


def _tensors(arrays: Mapping[str, np.ndarray]) -> State:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@cache
def _inputs(seed: int, experts: int) -> dict[str, State]:
    base, tuned = tiny_llama.make(seed, experts)
    return {"base": _tensors(base)} | {f"expert{i}": _tensors(t) for i, t in enumerate(tuned)}


def _number_or_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _ties(params: Mapping[str, Any], **more: Any) -> Stage:
    names = ("scope", "density", "sign", "zero_sign", "aggregate", "weight", "lambda")
    return _stage("ties", {n: _number_or_tuple(params[n]) for n in names if n in params} | more)


def _stage(method: str, parameters: Mapping[str, Any]) -> Stage:
    cls = registry(method)
    fields = {p.name: p.field for p in cls.parameters()}
    return cls(**{fields[n]: v for n, v in parameters.items()})


def ties(case: Case) -> State:
    return merge(case.experts, _ties(case.params), base=case.base)


def breadcrumbs(case: Case) -> State:
    p = case.params
    names = {
        "scope": "scope",
        "keep": "density",
        "density": "density",
        "remove_top": "remove_top",
        "remove_first": "remove_first",
    }
    crumbs = _stage("breadcrumbs", {ours: p[theirs] for theirs, ours in names.items() if theirs in p})
    return merge(case.experts, crumbs | _stage("task_arithmetic", {"lambda": p["lambda"]}), base=case.base)


def lines(case: Case) -> State:
    """`merge`: 'task-arithmetic sum' or 'ties(density=0.2,sign=mass,...)'; `alpha`, `beta`: a number or 'auto: ...'."""
    p = case.params
    inner = re.fullmatch(r"ties\((.*)\)", str(p.get("merge", "")))
    if inner:
        found = dict(pair.split("=") for pair in inner[1].split(","))
        merger = _ties({k: float(v) if k == "density" else v for k, v in found.items()})
    else:
        merger = _stage("task_arithmetic", {"lambda": 1.0})
    scales = {n: "auto" if str(p[n]).startswith("auto") else float(p[n]) for n in ("alpha", "beta") if n in p}
    return merge(case.experts, merger | _stage("lines", scales), base=case.base)


def tsvm(case: Case) -> State:
    names = {n: n for n in ("scaling", "rank_fraction", "orthogonalise")} | {"sv_reduction": "rank_fraction"}
    given = {ours: _number_or_tuple(case.params[n]) for n, ours in names.items() if case.params.get(n) is not None}
    return merge(case.experts, _stage("tsvm", given), base=case.base)


def isotropic(case: Case) -> State:
    return merge(case.experts, _stage(case.method, case.params), base=case.base)


def knots(case: Case) -> State:
    """`topK` in percent; `merging_type` and the sign rules in the authors' words; `tv` keeps every sign."""
    p = {"topK": 100, "scaling": 1.0, "merging_type": "mean", **case.params}
    rule = str(p.get("merge_method", p.get("merge", case.method.removeprefix("knots_"))))
    words = {"sum_of_values": "mass", "sum_of_signs": "count"}
    given = {
        "density": p["topK"] / 100 if p["topK"] > 1 else p["topK"],
        "scaling": _number_or_tuple(p["scaling"]),
        "rule": "mean" if rule in ("tv", "mean") else "ties",
        "sign": words[p.get("sign_resolve_mode", "sum_of_values")],
        "aggregate": p["merging_type"],
        "shared": "left" if p.get("concat_across_output", True) else "right",
    }
    return merge(case.experts, _stage("knots", given), base=case.base)


def tsvc(case: Case) -> State:
    made = encoded({"tsvc": {"rank_fraction": case.params["sv_reduction"]}}, case.base, case.experts)
    return {f"{e}/{n}": made.rebuilt(n, e, base) for e in case.experts for n, base in case.base.items()}


def fwsvd(case: Case) -> State:
    """The base itself is compressed, every matrix but the embedding, whether that saves room or not."""
    chosen = {n: t for n, t in _inputs(case.seed, 1)["base"].items() if t.ndim == 2 and "embed" not in n}
    scores = _tensors(tiny_llama.positive(case.seed, 1)[0])
    words = {"rank": case.params["rank"], "head": True, "always": True}
    fisher = {"fisher": {"one": {n: scores[n] for n in chosen}}}
    made = encoded({"fwsvd": words}, chosen, {"one": chosen}, stats=fisher)
    return {n: made.rebuilt(n, "one", t) for n, t in chosen.items()}


def opcm(case: Case) -> State:
    return merge(case.experts, _stage("opcm", {"alpha": case.params["alpha"]}), base=case.base)


def fisher(case: Case) -> State:
    p = case.params
    given = {
        "weight": _number_or_tuple(p.get("coefficients") or 1.0),
        "normalize": p["normalize"],
        "floor": p["fisher_floor"],
    }
    if "floor_mode" in p:
        given["floor_mode"] = p["floor_mode"].replace("-", "_")
    return merge(case.experts, _stage("fisher", given), stats=case.stats("fisher", tiny_llama.positive))


def regmean(case: Case) -> State:
    method = _stage("regmean", {"alpha": case.params["reduce_non_diagonal_ratio"]})
    return merge(case.experts, method, stats=case.stats("gram", tiny_llama.grams))


def ota(case: Case) -> State:
    """`precond_threshold` masks first; the second moments are compressed before anything sees them."""
    p = case.params
    stats = case.stats("second_moment", tiny_llama.positive)
    if p["rank1_approx"]:
        for kinds in stats.values():
            kinds["second_moment"] = {
                n: product(*rank_one(v)) if v.ndim == 2 else v for n, v in kinds["second_moment"].items()
            }
    given = {
        **{n: p[n] for n in ("power", "epsilon")},
        "epsilon_mode": "absolute",
        "normalize": {"none": "none", "global": "mean"}[p["normalise"]],
        "weight": 1.0 if p["scaling_factor"] is None else _number_or_tuple(p["scaling_factor"]),
        "fallback": "base" if p["fallback_to_base"] else "mean",
    }
    stages: Stage | Pipeline = _stage("ota", given)
    if p["precond_threshold"] is not None:
        stages = _stage("ffg", {"threshold": _number_or_tuple(p["precond_threshold"])}) | stages
    return merge(case.experts, stages, base=case.base if p["use_base"] else None, stats=stats)


def frank_wolfe(case: Case) -> State:
    """L(w) = 1/2 sum_i sum(H_i (w - theta_i)^2) over the experts; `init`: base, or the merge of all."""
    p, weights = case.params, [_tensors(h) for h in tiny_llama.positive(case.seed, case.count)]
    start = case.base
    if p["init"] != "base":
        start = merge(case.experts, _stage("task_arithmetic", {"lambda": p["scaling_factor"]}), base=start)

    def gradient(at: Mapping[str, Tensor]) -> State:
        pairs = list(zip(weights, case.experts.values(), strict=True))
        return {n: sum(h[n] * (w - e[n]) for h, e in pairs) for n, w in at.items()}  # type: ignore[misc]

    options = FrankWolfe(p["granularity"], "cosine", p["step_size"], p["scaling_factor"], p["max_iters"])
    pool = {name: state.__getitem__ for name, state in case.experts.items()}
    *_, last = options.run(start, pool, gradient)
    return dict(last.weights)


def quadratic(case: Case) -> State:
    """Points and metrics lie in the file; the coefficients are informative there, so they are given back."""
    given = case.expected
    points, metrics, query = (given[n].numpy().astype("float64") for n in ("X", "Y", "query"))
    fits = [fit(points, metrics[:, k], case.params["link"]) for k in range(metrics.shape[1])]
    prediction = torch.from_numpy(np.stack([one(query) for one in fits], 1)).to(given["prediction"].dtype)
    return {**given, "prediction": prediction}


def mc_smoe(case: Case) -> State:
    """Experts are the MLPs of the expert models; usage, router logits and the switch's units lie in the file."""
    p, given = case.params, case.expected
    kinds = ("gate_proj", "up_proj", "down_proj")
    models = list(case.experts.values())
    usage = given["input.usage"].numpy()
    layers = range(tiny_llama.LAYERS)
    out = {n: t for n, t in given.items() if n.startswith(("input.", "switch.input_perm."))}

    def weights(layer: int, kind: str) -> list[Tensor]:
        return [state[f"model.layers.{layer}.mlp.{kind}.weight"] for state in models]

    counts = grouping.budget([usage[i] for i in layers], p["num_groups"] * len(layers))
    for i in layers:
        flat = [
            torch.cat([w.flatten() for w in of_expert])
            for of_expert in zip(*(weights(i, k) for k in kinds), strict=True)
        ]
        vectors = given["input.router_logits"][i] if p["similarity"] == "router-logits" else torch.stack(flat)
        alike = grouping.affinity(vectors)
        labels = grouping.group(usage[i], alike.numpy(), counts[i])
        out |= {f"group_labels.{i}": torch.from_numpy(labels), f"similarity.{i}": alike.float()}
        for label in range(counts[i]):
            members = [e for e in range(len(models)) if labels[e] == label]
            for kind in kinds:
                chosen = [weights(i, kind)[e] for e in members]
                out[f"merged.{i}.{label}.{kind}.weight"] = grouping.merged(chosen, [usage[i][e] for e in members])
    orders = [given[f"switch.input_perm.{e}"] for e in range(len(models))]
    inward = [w[order] for w, order in zip(weights(0, "gate_proj"), orders, strict=True)]
    outward = [w[:, order] for w, order in zip(weights(0, "down_proj"), orders, strict=True)]
    for e in range(1, len(models)):
        order = grouping.unit_order(((inward[0],), (outward[0],)), ((inward[e],), (outward[e],)), p["include_wo"])
        out[f"switch.perm.{e}"] = order
        inward[e], outward[e] = inward[e][order], outward[e][:, order]
    out["switch.merged.wi"], out["switch.merged.wo"] = (grouping.merged(w, list(usage[0])) for w in (inward, outward))
    return out


def tall_masks(case: Case) -> State:
    """`multitask`: 'sum' or 'ties(density=0.2,...)'; the case: masks, their consensus, a rebuilt task, the merge."""
    p = case.params
    inner = re.fullmatch(r"ties\((.*)\)", p["multitask"])
    front: list[Any] = []
    if inner:
        found = dict(pair.split("=") for pair in inner[1].split(","))
        front = [{"ties": {k: float(v) if k == "density" else v for k, v in found.items()}}]
    strict = dict(zip(case.experts, p["tall_mask_lambda"], strict=True))
    codec = encoded([*front, {"tall_masks": {"lambda": strict}}], case.base, case.experts)
    filtered = {"consensus": {"k": p["k"], "lambda": p["lambda"], "tall_mask_lambda": strict}}
    out = {f"merged.{n}": t for n, t in merge(case.experts, [*front, filtered], base=case.base).items()}
    for name, base in case.base.items():
        masks = torch.stack([codec.mask(name, expert) for expert in case.experts])
        out |= {f"mask.{i}.{name}": mask.to(torch.uint8) for i, mask in enumerate(masks)}
        out[f"consensus.{name}"] = agreed(masks, p["k"]).to(torch.uint8)
        out[f"rebuilt.0.{name}"] = codec.rebuilt(name, next(iter(case.experts)), base)
    return out


def doge(case: Case) -> State:
    """`K`: a share, or above 1 a percentage."""
    p = case.params
    names = {"lamda": "lambda", "subspace": "subspace", "iters": "iters", "lr": "lr"}
    density = p["K"] / 100 if p["K"] > 1 else p["K"]
    given = {ours: p[theirs] for theirs, ours in names.items()} | {"density": density, "embeddings": True}
    return merge(case.experts, _stage("doge", given), base=case.base)


def wudi(case: Case) -> State:
    """Names in `exclude_keys` get the plain mean."""
    p = case.params
    mean = {"match": p["exclude_keys"], "method": {"task_arithmetic": {"normalize": True}}}
    stage = _stage("wudi", {"iters": p["iter_num"], "lr": p["lr"]})
    return merge(case.experts, stage, base=case.base, rules=[mean] if p["exclude_keys"] else [])


def _matching(case: Case, patterns: list[str]) -> list[str]:
    """The parameters whose names begin as one of some regular expressions says."""
    return [name for name in case.base if any(re.match(pattern, name) for pattern in patterns)]


def optmerge(case: Case) -> State:
    p = case.params
    names = {"iter_num": "iters", **{n: n for n in ("variant", "scaling", "optimizer", "lr", "momentum", "init")}}
    given = {ours: p[theirs] for theirs, ours in names.items() if p.get(theirs) is not None}
    return merge(case.experts, _stage("optmerge", given), base=case.base, exclude=_matching(case, p["exclude"]))


def spectral_wudi(case: Case) -> State:
    """swudi and aswudi: the head gets the mean; a filter of none is time inf, `cumvar_x` the rule cumulative, and
    None stands for no cut, or no end."""
    whole = {"truncate_rank_ratio": 1.0, "exp_time": "inf", "auto_rank_method": "none", "max_rank_ratio": 1.0}
    p = {n: whole[n] if v is None and n in whole else v for n, v in case.params.items()}
    names = {
        **{"exp_time": "time", "truncate_rank_ratio": "rank_ratio", "init_mode": "init", "init": "init"},
        **{"scaling": "scaling", "scaling_coefficient": "scaling", "min_eigenvalue": "min_eigenvalue"},
        **{"min_rank": "min_rank", "auto_rank_method": "rule", "auto_rank": "rule"},
    }
    given = {ours: p[theirs] for theirs, ours in names.items() if theirs in p}
    scaling = given.setdefault("scaling", 1.0)
    if case.method == "swudi":
        given.setdefault("rank_ratio", 0.65)  # the authors' own default
    filtered = p.get("filter_type", p.get("filter", "exponential" if case.method == "swudi" else "none"))
    if filtered == "none":
        given["time"] = "inf"
    if found := re.fullmatch(r"cumvar_(.+)", str(given.get("rule"))):
        given |= {"rule": "cumulative", "share": float(found[1])}
    assert p.get("max_rank_ratio", 1.0) == p.get("rank_scale", 1.0) == 1.0, "limits of the rank that are not mapped"
    head = {"role": "head", "method": {"task_arithmetic": {"normalize": True, "lambda": scaling}}}
    stage = _stage(case.method, given)
    return merge(case.experts, stage, base=case.base, rules=[head], exclude=_matching(case, p.get("exclude", [])))


def pcb(case: Case) -> State:
    given = {n: _number_or_tuple(v) for n, v in case.params.items()}
    return merge(case.experts, _stage("pcb", given), base=case.base)


def widen(case: Case) -> State:
    return merge(case.experts, _stage("widen", case.params), base=case.base)


def moe_build(case: Case) -> State:
    """Router rows from prompts given as token numbers; every layer has the same."""
    p, embedding = case.params, case.base["model.embed_tokens.weight"]
    assert p["gate_mode"] == "cheap_embed"

    def state(prompts: list[list[int]] | None) -> Tensor | None:
        return None if not prompts else router.cheap_embed(lambda token: embedding[token], prompts)

    made = router.rows([state(ids) for ids in p["positive_ids"]], [state(ids) for ids in p["negative_ids"]])
    out = {f"model.layers.{i}.mlp.gate.weight": made for i in range(tiny_llama.LAYERS)}
    return out | {"condition_numbers": torch.full((tiny_llama.LAYERS,), router.condition(made))}


def lora_tools(case: Case) -> State:
    return adapter_cases.outcome(case.seed, case.params)


def mergekit_yaml(case: Case) -> State:
    """Every output tensor names its own call; tensors of equal calls are merged together."""
    config = mergekit.read(case.params["yaml"])
    inputs = _inputs(case.seed, case.count)
    grouped: dict[mergekit.Call, list[mergekit.Output]] = {}
    for output in mergekit.outputs(config, list(case.base), tiny_llama.LAYERS):
        grouped.setdefault(output.call, []).append(output)
    dtype = config.get("dtype", "float32")
    out: State = {}
    for call, outputs in grouped.items():

        def state(model: str, outputs: list[mergekit.Output] = outputs) -> State:
            return {o.name: inputs[model][o.sources[model]].to(getattr(torch, dtype)) for o in outputs}

        models = {name: state(name) for name in call.experts}
        base = None if call.base is None else state(call.base)
        stages = tuple(_stage(name, dict(parameters)) for name, parameters in call.stages)
        out |= merge(models, Pipeline(stages), base=base, dtype=config.get("out_dtype", dtype))
    return out


def tokenizer_surgery(case: Case) -> State:
    return surgery.embeddings(case.seed, case.params) | surgery.pursuit(case.expected, case.params["omp_k"])


def dct_adamw(case: Case) -> State:
    """`params` in the authors' words; gradient of step s: task vector s, in turn.  Their FFT path ranks by norm 1."""
    p = case.params
    by_fft = p.get("sim_type", "matmul") == "makhoul"
    norm = p.get("ell_norm", 1)
    named = {
        "proj": "basis",
        **{n: n for n in ("lr", "weight_decay", "betas", "eps", "rank")},
        **{"update_proj_gap": "interval", "rotate_subspace": "rotate", "max_shape": "max_size"},
    }
    given = {ours: _number_or_tuple(p[theirs]) for theirs, ours in named.items() if theirs in p}
    given["basis"] = "random" if p.get("proj") == "rqr" else "dct2" if by_fft else "dct3"
    given["norm"] = norm if not by_fft or norm == -1 else 1
    given["error_feedback"] = (p.get("q_ef") or True) if p.get("use_ef") else False
    start = {name: tensor.double() for name, tensor in case.base.items()}
    weights = {name: torch.nn.Parameter(start[name].clone()) for name in case.expected}
    optimizer = DCTAdamW(weights.values(), **given)
    experts = list(case.experts.values())
    for step in range(p["steps"]):
        for name, weight in weights.items():
            weight.grad = experts[step % len(experts)][name].double() - start[name]
        optimizer.step()
    return {name: weight.detach().float() for name, weight in weights.items()}


def codiemb_losses(case: Case) -> State:
    """Each loss and its gradient with respect to similarities or queries; the inputs lie in the file itself."""
    p, given = case.params, case.expected
    out = {name: given[name] for name in ("query", "passages", "similarity", "label")}

    def add(name: str, inner: str, at: str, loss: Callable[[Tensor], Tensor]) -> None:
        point = given[at].clone().requires_grad_()
        value = loss(point)
        value.backward()
        assert point.grad is not None
        out.update({name: value.detach().reshape(1), f"{name}_{inner}": point.grad})

    groups = given["passages"].unflatten(0, (len(given["query"]), -1))
    add("ir", "query_grad", "query", lambda q: embed.info_nce(q, groups, p["positives"], p["ir_temperature"]))
    add("pearson", "grad", "similarity", lambda s: embed.pearson(s, given["label"]))
    add("rank_kl", "grad", "similarity", lambda s: embed.rank_kl(s, given["label"], p["sts_temperature"]))
    add("pro", "grad", "similarity", lambda s: embed.pro(s, given["label"], p["sts_temperature"]))
    return out


ADAPTERS: Mapping[str, Callable[[Case], State]] = {
    "ties": ties,
    "breadcrumbs": breadcrumbs,
    "lines": lines,
    "tsvm": tsvm,
    "knots_ties": knots,
    "knots_tv": knots,
    "opcm": opcm,
    "iso_c": isotropic,
    "tsv_compress": tsvc,
    "fwsvd": fwsvd,
    "dct_adamw": dct_adamw,
    "codiemb losses": codiemb_losses,
    "iso_cts": isotropic,
    "fisher": fisher,
    "regmean": regmean,
    "ota": ota,
    "ota+ffg": ota,
    "fw-merging (hard)": frank_wolfe,
    "map quadratic surrogate": quadratic,
    "mc-smoe": mc_smoe,
    "tall-masks": tall_masks,
    "pcb": pcb,
    "widen": widen,
    "doge_ta": doge,
    "wudi": wudi,
    "optmerge": optmerge,
    "swudi": spectral_wudi,
    "aswudi": spectral_wudi,
    "moe-build": moe_build,
    "lora-tools": lora_tools,
    "tokenizer-surgery": tokenizer_surgery,
    "weight-matching": alignment.weight_matching,
    "pleas": alignment.pleas,
    "adamerging++ composition": coefficients.adamerging,
    "expert-merging composition": coefficients.expert_merging,
    **{f"mergekit:{name}": mergekit_yaml for name in mergekit.METHODS},
}
"""Metadata's `method` -> how to call it."""


def folders() -> list[Path]:
    """The project's own cases, and those of WEIGHTSMITH_GOLDENS if it is set."""
    found = [Path(__file__).parent / "cases"]
    if more := os.environ.get("WEIGHTSMITH_GOLDENS"):
        place = Path(more)
        found.append(place / "cases" if (place / "cases").is_dir() else place)
    return found


def cases() -> list[Case]:
    return [Case(path) for folder in folders() for path in sorted(folder.glob("*.safetensors"))]
