"""Recipes of the cases that go through files; paths are those of `folders.make`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LLAMA = "base: llama/base\nmodels: {e0: llama/e0, e1: llama/e1, e2: llama/e2}\n"
ODD = "base: odd/base\nmodels: {e0: odd/e0, e1: odd/e1, e2: odd/e2}\n"
STATS = "\n".join(
    ["base: odd/base", "models:", *(f"  e{i}: {{model: odd/e{i}, stats: stats/e{i}}}" for i in range(3)), ""]
)
VARIED = ODD.replace("odd/", "varied/")
LORA = "base: dense/base\nmodels: {a0: lora/a0, a1: lora/a1, full: dense/e2}\n"
WORDS = "base: words/base\nmodels: {x: words/x, y: words/y}\n"

RECIPES: Mapping[str, str] = {
    "ties": LLAMA + "method: ties",
    "ties of awkward tensors": ODD + "method: ties",
    "linear of awkward tensors": ODD + "method: linear\noutput: {dtype: bfloat16}",
    "shards": LLAMA + "method: task_arithmetic\noutput: {shard_size: 1kB}",
    "pipeline": ODD + (
        "method: [{dare: {density: 0.5}}, {ties: {density: 0.3}}, lines]\nparameters: {beta: 0.4}\nseed: 7"
    ),
    "rules": LLAMA + (
        "method: ties\nparameters: {density: 0.3}\nrules:\n  - {role: norm, method: keep}\n"
        "  - {role: [up, gate], layers: [0, 1], parameters: {density: 0.1}}\n"
        "  - {match: '*.down_proj.*', method: task_arithmetic, parameters: {lambda: 0.4}}"
    ),
    "ramp": LLAMA + "method: task_arithmetic\nparameters: {weight: {e0: [0.0, 1.0], e1: 0.0, e2: [1, 0.5, 0]}}",
    "exclude": LLAMA + "method: average\nexclude: ['*embed*', lm_head.weight]",
    "parameters of models": (
        "base: odd/base\nmodels:\n  e0: {model: odd/e0, weight: 0.7, density: 0.5}\n"
        "  e1: {model: odd/e1, weight: 0.3}\n"
        "method: ties\nparameters: {scope: tensor}"
    ),
    "fisher": STATS + "method: fisher",
    "regmean": STATS + "method: regmean\nparameters: {alpha: 0.9}",
    "nested": (
        "base: llama/base\nmodels:\n  mixed:\n    model:\n      base: llama/base\n"
        "      models: {e0: llama/e0, e1: llama/e1}\n"
        "      method: ties\n      parameters: {density: 0.5}\n  e2: llama/e2\nmethod: [dare, task_arithmetic]"
    ),
    "nested, without a base": (
        "models:\n  soup: {models: {e0: odd/e0, e1: odd/e1}, method: average}\n"
        "  ball: {models: {e1: odd/e1, e2: odd/e2}, method: slerp}\nmethod: karcher"
    ),
    "nested, model-wide": (
        "base: llama/base\nmodels:\n  a: {base: llama/base, models: {e0: llama/e0, e1: llama/e1}, method: tsvm}\n"
        "  b: {base: llama/base, models: {e1: llama/e1, e2: llama/e2}, method: [magnitude, ties]}\nmethod: ties"
    ),
    "adapters": LORA + "method: task_arithmetic\nparameters: {lambda: 0.5}",
    "adapters, ties": LORA + "method: ties\nparameters: {density: 0.6}",
    "adapters, linear": LORA + "method: linear",
    "adapters, tsvm": LORA.replace(", full: dense/e2", "") + "method: tsvm",
    "adapters, knots": LORA.replace(", full: dense/e2", "") + "method: knots",
    "adapters, iso_c": LORA.replace(", full: dense/e2", "") + "method: iso_c",
    "adapters, iso_cts": LORA.replace(", full: dense/e2", "") + "method: iso_cts",
    "adapters, dare and ties": LORA + "method: [dare, ties]\noutput: {dtype: bfloat16}",
    "adapter on another model": (
        "base: dense/base\nmodels: {e0: {model: dense/e0, adapter: lora/a0}, e1: dense/e1}\nmethod: task_arithmetic"
    ),
    "log of the trainer": (
        "models: {a: trained/checkpoint-100, b: trained/checkpoint-200}\nmethod: {mwa: {penalty: 2}}"
    ),
    "log of the trainer, since": (
        "models: {a: trained/checkpoint-100, b: trained/checkpoint-200}\nmethod: {mwa: {smooth: since, rule: softmax}}"
    ),
    "slices": (
        "models:\n  tall:\n    slices:\n"
        "      - {model: dense/e0, layers: [0, 2]}\n      - {model: dense/e1, layers: [1, 3]}\n"
        "method: passthrough"
    ),
    "slices of recipes": (
        "models:\n  tall:\n    slices:\n      - {model: dense/e0, layers: [0, 2]}\n"
        "      - models: {x: {model: dense/e0, layers: [1, 3]}, y: {model: dense/e1, layers: [1, 3]}}\n"
        "        method: linear\nmethod: passthrough\nparameters: {scale: 0.5}"
    ),
    "slices merged": (
        "models:\n  tall: {slices: [{model: dense/e0, layers: [0, 2]}, {model: dense/e1, layers: [0, 2]}]}\n"
        "  wide: {slices: [{model: dense/e2, layers: [0, 2]}, {model: dense/base, layers: [1, 3]}]}\nmethod: slerp"
    ),
    "layers": "models: {e0: {model: dense/e0, layers: [1, 3]}}\nmethod: passthrough",
    "modules": (
        "models:\n  whole:\n    modules:\n      attention: {match: '*self_attn*', model: dense/e0}\n"
        "      rest: {model: {base: dense/base, models: {e1: dense/e1, e2: dense/e2}, method: ties}}\n"
        "method: passthrough"
    ),
    "parts of single models": (
        "base: llama/base\nmodels: {eye: llama/eye, ear: llama/ear}\nmethod: task_arithmetic\n"
        "rules: [{role: [vision, audio, norm, embed, head], method: keep}]"
    ),
    "formats": (
        "base: llama/base\nmodels: {e0: formats/sharded, e1: formats/pickled, e2: formats/single.safetensors}\n"
        "method: ties\nexclude: [position_ids]"
    ),
    "fp8": (
        "base: llama/base\nmodels: {e0: formats/fp8, e2: llama/e2}\nmethod: task_arithmetic\n"
        "exclude: [position_ids]"
    ),
    "tied": (
        "base: formats/tied_base\nmodels: {a: {model: formats/tied, weight: 0.5}, b: formats/tied_too}\n"
        "method: task_arithmetic"
    ),
    "tied and free": "base: formats/tied_base\nmodels: {a: formats/tied, b: formats/sharded}\nmethod: ties",
    "tokenizer union": WORDS + "method: ties\ntokenizer: union",
    "tokenizer union, linear": WORDS + "method: linear\ntokenizer: union\noutput: {dtype: bfloat16}",
    "tokenizer of a model": WORDS + "method: task_arithmetic\ntokenizer: y",
    "tokenizer rules": WORDS + (
        "method: task_arithmetic\ntokenizer:\n  source: base\n  pad_to_multiple_of: 8\n  tokens:\n"
        "    green: {source: x}\n"
        "    '<|think|>': {source: {kind: model_token, model: x, token: w5}, force: true}\n"
        "    '<|unused|>': {source: {kind: zero}}"
    ),
}  # fmt: skip

DEMO: Mapping[str, str] = {
    "average": "average",
    **{f"task arithmetic {v}": f"{{task_arithmetic: {{lambda: {v}}}}}" for v in (0.3, 0.4, 0.5, 0.7)},
    **{f"ties {d} {v}": f"{{ties: {{density: {d}, lambda: {v}}}}}" for d in (0.2, 0.5) for v in (1.0, 1.5)},
    **{
        f"dare and ties {d} {v}": f"[{{dare: {{density: {d}}}}}, {{ties: {{density: 1.0, lambda: {v}}}}}]"
        for d in (0.5, 0.8)
        for v in (1.0, 1.5)
    },
    **{f"tsvm {v}": f"{{tsvm: {{scaling: {v}}}}}" for v in (1.0, 1.5)},
}
"""The demo's candidates."""

SWEEPS: Mapping[str, tuple[str, Sequence[str]]] = {
    "ties": (LLAMA + "method: ties", ("parameters.density=0.1,0.4,1", "parameters.lambda=0.5,1")),
    "ties of tensors": (
        VARIED + "method: ties\nparameters: {scope: tensor}",
        ("parameters.density=0.2,0.5", "parameters.sign=mass,count", "parameters.aggregate=mean,max"),
    ),
    "dare and ties": (LLAMA + "method: [{dare: {density: 0.5}}, ties]", ("method.0.dare.density=0.3,0.6", "seed=1,2")),
    "magnitude": (VARIED + "method: [magnitude, task_arithmetic]", ("parameters.density=0.1,0.5,1",)),
    "breadcrumbs": (
        VARIED + "method: [{breadcrumbs: {density: 0.5}}, ties]",
        ("method.0.breadcrumbs.density=0.5,0.9",),
    ),
    "tsvm": (LLAMA + "method: tsvm", ("parameters.scaling=0.5,1,[1, 0.5]",)),
    "methods": (LLAMA, ("method=linear,ties,karcher,model_stock,multislerp",)),
    "dtypes": (VARIED + "method: task_arithmetic", ("output.dtype=float32,bfloat16", "parameters.lambda=0.3,1")),
    "models": ("models: {a: llama/e0, b: llama/e1}\nmethod: linear", ("models.b.model=llama/e1,llama/e2",)),
    "adapters": (LORA + "method: ties", ("parameters.density=0.3,0.8",)),
}

MERGEKIT: Mapping[str, str] = {
    "ties": """
models:
  - {model: llama/base}
  - {model: llama/e0, parameters: {weight: 0.6, density: [1, 0.5]}}
  - model: llama/e1
    parameters: {density: 0.4, weight: [{filter: up_proj, value: 0.3}, {value: 0.5}]}
merge_method: ties
base_model: llama/base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16""",
    "slerp of slices": """
slices:
  - sources: [{model: dense/e0, layer_range: [0, 2]}, {model: dense/e1, layer_range: [0, 2]}]
  - sources: [{model: dense/e0, layer_range: [2, 3]}, {model: dense/e1, layer_range: [1, 2]}]
merge_method: slerp
base_model: dense/e0
parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0.5]}, {value: 0.5}]}
dtype: float32""",
    "stacked": """
slices:
  - sources: [{model: dense/e0, layer_range: [0, 2]}]
  - sources:
      - {model: dense/e1, layer_range: [1, 3], parameters: {scale: [{filter: down_proj, value: 0.0}, {value: 1.0}]}}
merge_method: passthrough
dtype: bfloat16""",
    "modules": """
modules:
  text_decoder:
    slices:
      - sources: [{model: sees/e0, layer_range: [0, 1]}]
      - sources: [{model: sees/e1, layer_range: [0, 3]}]
  vision_tower: {models: [{model: sees/e1}]}
merge_method: passthrough""",
    "adapter": """
models: [{model: dense/e0+lora/a0}, {model: dense/e1}]
merge_method: linear
parameters: {weight: 0.5}""",
    "union": """
models: [{model: words/x}, {model: words/y}]
base_model: words/base
merge_method: task_arithmetic
parameters: {weight: 0.5}
tokenizer_source: union""",
    "several": """
name: first
models: [{model: llama/e0}, {model: llama/e1}]
merge_method: linear
parameters: {weight: 1.0}
dtype: float32
---
models: [{model: first}, {model: llama/e2}]
base_model: llama/base
merge_method: dare_ties
parameters: {weight: 0.5, density: 0.6}
dtype: float32""",
    **{
        method: f"models: [{{model: llama/e0}}, {{model: llama/e1}}]\nbase_model: llama/base\nmerge_method: {method}\n"
        f"parameters: {{{more}}}\ndtype: bfloat16"
        for method, more in {
            "breadcrumbs": "weight: 0.5, density: 0.6, gamma: 0.05",
            "breadcrumbs_ties": "weight: 0.5, density: 0.6, gamma: 0.05, rescale: true",
            "dare_linear": "weight: 0.5, density: 0.5",
            "della": "weight: 0.5, density: 0.5, epsilon: 0.2",
            "della_linear": "weight: 0.5, density: 0.5, epsilon: 0.2, lambda: 0.7",
            "karcher": "max_iter: 5",
            "model_stock": "filter_wise: true",
            "multislerp": "weight: 0.5",
            "nuslerp": "weight: 0.5, nuslerp_flatten: false",
            "ram": "epsilon: 0.01",
            "ramplus_tl": "epsilon: 0.01, r: 0.3",
            "sce": "select_topk: 0.4",
            "task_arithmetic": "weight: 0.5, normalize: true",
        }.items()
    },
}

CODECS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "tall_masks": ("varied", (
        "tall_masks", "{tall_masks: {lambda: 0.1}}",
        "[{ties: {aggregate: sum, density: 0.5}}, {tall_masks: {lambda: 0.4}}]",
        "[dare, task_arithmetic, tall_masks]", "{tall_masks: {lambda: {e0: 0.2, e1: 0.4, e2: 0.8}}}",
    )),
    "emr_masks": ("varied", ("[emr, emr_masks]", "[ties, emr_masks]", "[magnitude, emr, emr_masks]")),
    "bitdelta": ("odd", ("bitdelta",)),
    "exact": ("odd", ("exact",)),
    "randes": ("odd", ("randes",)),
    "mbat": ("odd", (
        "{mbat: {binder: hadamard, denoise: sparse}}", "{mbat: {denoise: lowrank, rank: 2}}",
        "{mbat: {binder: dense, denoise: sparse}}",
    )),
    "fwsvd": ("stats", (
        "fwsvd", "{fwsvd: {rank: 2}}", "{fwsvd: {weighting: none, head: true, always: true}}",
        "{fwsvd: {weighting: element, ratio: 0.8}}", "{fwsvd: {transposed: true, balanced: true, always: true}}",
    )),
    "losparse": ("odd", ("losparse", "{losparse: {ratio: 0.3, rows: 0}}", "{losparse: {rows: 0.4, head: true}}")),
    "rmm": ("lora", (
        "{rmm: {rank: 2, basis: 1}}", "{rmm: {rank: 2, basis: 1, center: false}}",
        "{rmm: {rank: 2, level: tensor, basis: 1}}",
        "{rmm: {rank: 2, basis: 1, canonicalise: svd}}", "{rmm: {rank: 3, basis: 1, canonicalise: none}}",
    )),
    "tsvc": ("varied", ("tsvc", "{tsvc: {rank_fraction: 0.5}}")),
    "twin": ("varied", (
        "twin", "{twin: {density: 0.5, strategy: magnitude}}", "{twin: {density: 0.5, strategy: random}}",
        "[{ties: {density: 0.5}}, twin]",
    )),
}  # fmt: skip
FAMILIES = {
    "odd": ODD,
    "varied": VARIED,
    "stats": STATS,
    "lora": "base: dense/base\nmodels: {a0: lora/a0, a1: lora/a1, a2: lora/a2, a3: lora/a3, a4: lora/a4}\n",
}

ADAPTERS: tuple[tuple[str, str], ...] = (
    ("cat", ""), ("svd", "rank: 2"), ("svd", "rank: 3, clamp: 0.9"), ("linear", ""), ("ties", "density: 0.5"),
    ("ties", "density: 0.5, vote: frequency"), ("ties_svd", "density: 0.5, rank: 3"), ("dare_linear", "density: 0.6"),
    ("dare_linear_svd", "density: 0.6"), ("dare_ties", "density: 0.6"), ("dare_ties_svd", "density: 0.6"),
    ("magnitude_prune", "density: 0.4"), ("magnitude_prune_svd", "density: 0.4"), ("knots", "rank: 4, density: 0.5"),
    ("average", ""),
)  # fmt: skip

MIXTURES: Mapping[str, tuple[str, ...]] = {
    "random": ("router: random",),
    "uniform_random": ("router: uniform_random\nseed: 3\nexperts_per_token: 1",),
    "cheap_embed": ("router: cheap_embed",),
    "cheap_embed, bfloat16": ("router: cheap_embed\noutput: {dtype: bfloat16, shard_size: 4kB}",),
    "deepseek": ("router: random\narchitecture: deepseek\nshared: {always: dense/base}",),
    "glm4_moe": ("router: random\narchitecture: glm4_moe\nshared: {always: dense/base}",),
    "qwen": ("router: cheap_embed\narchitecture: qwen\nshared: {always: {model: dense/base, prompts: [[7, 8]]}}",),
}
MERGEKIT_MOE = """
base_model: dense/base
gate_mode: cheap_embed
experts_per_token: 1
dtype: bfloat16
experts:
  - {source_model: dense/e0, positive_prompts: [[2, 3], [4]], negative_prompts: [[6]]}
  - {source_model: dense/e1, positive_prompts: [[7, 8]], noise_scale: 0.1, residual_scale: 0.5}
"""
EXPERTS = (
    "\nexperts:\n  e0: {model: dense/e0, prompts: [[2, 3, 4], [5]], avoid: [[6]]}\n"
    "  e1: {model: dense/e1, prompts: [[7, 8]], noise: 0.1, residual: 0.5}\n"
)

TRANSPLANTS = (
    ("omp", "--k", "3"), ("omp", "--k", "3", "--magikarp"), ("mean", "--prefix-match", "yes", "--byte-match", "yes"),
    ("common_interpolation", "--k", "3"),
    ("common_interpolation", "--k", "3", "--metric", "cosine", "--weights", "barycentric"),
    ("common_interpolation", "--k", "3", "--weights", "least_squares"), ("subword",), ("subword", "--subword", "sum"),
    ("mean",), ("zero",), ("randn", "--seed", "3"), ("john_hewitt",), ("landmark_pca",), ("stb", "--k", "3"),
    ("mp_rope", "--k", "3"), ("omp", "--k", "2", "--noise", "0.1", "--scale", "0.5", "--pad-to-multiple-of", "8"),
)  # fmt: skip
