"""What is known of architectures: names of tensors and modules, fields of config.json.  Data only; who asks what:

    io.read.modules   names in memory and in files, orientation, output layers
    io.read.layers    fields that count and describe layers
    io.read.experts   experts in one tensor or in many
    experts           fields that count experts
    align             which outputs of fused experts belong together
    observe           sizes that follow from no field
    plan.fitting      buffers that old files have and new ones do not
    io.read.stats     models that give probabilities
    plan.stored       tensors that stay in float32

Roles of tensors by their names (query, norm, head) are needed by methods too and stand in `core.keys`; what it takes to
write a config.json for a mixture of experts is in `moe.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# --- modules in memory and in files ----------------------------------------------------------------

Rules = Sequence[tuple[str, str]]

_LANGUAGE: Rules = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.model\b", "model.language_model"),
    (r"^(vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_QWEN_VL: Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_VIT: Rules = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
RENAMED: Mapping[str, Rules] = {
    **dict.fromkeys(
        ("aya_vision", "gemma3", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "vipllava"),
        _LANGUAGE,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("deit", "vit"), _VIT),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
    # What most language models are: nothing is renamed.
    **dict.fromkeys(
        ("bert", "bloom", "distilbert", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gptj", "llama", "mistral",
         "opt", "phi", "phi3", "qwen2", "qwen3", "roberta", "starcoder2", "t5", "xlm-roberta"), ()
    ),
}  # fmt: skip
"""model_type -> how transformers renames on loading: (pattern, replacement), one after the other."""

HEADS_IN_FILES: Mapping[str, Mapping[str, str]] = {
    **{kind: {"lm_head": "language_model.lm_head"} for kind, rules in RENAMED.items() if rules is _LANGUAGE},
    "gpt_neox": {"lm_head": "embed_out"},
}
"""model_type -> module in memory -> its name in files."""

CONV1D = frozenset(("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"))
"""The model types of transformers with layers that store their weights [in, out] (its class Conv1D)."""
CONV1D_NAMES = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))
"""What they call those layers."""
PLAIN_LINEAR = frozenset(("gpt_bigcode", "gpt_neo", "idefics", "qwen", "starcoder2"))
"""The model types that give these names to ordinary linear layers."""
FLIPPED_EXPERTS = frozenset(("aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"))
"""The model types whose files hold fused experts [experts, in, out]."""
EITHER_EXPERTS = frozenset(("qwen3_vl_moe",))
"""Those whose published files do, while transformers 5 writes [experts, out, in]; it tells them by their shape."""
UNMARKED_EXPERTS = frozenset(("llama4", "llama4_text"))
"""Those of them that peft takes for [experts, out, in] all the same: their class does not say `is_transposed`."""
INTERLEAVED_EXPERTS = frozenset(("gpt_oss",))
"""The model types whose fused experts have the outputs of gate and up in turns, not one behind the other."""

CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration")
"""Endings of the classes whose output layer is called lm_head in memory."""
OUTPUT_LAYERS: Mapping[str, str] = {
    "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "albert": "predictions.decoder", "modernbert": "decoder", "modernbert-decoder": "decoder",
    "whisper": "proj_out", "moonshine": "proj_out", "biogpt": "output_projection", "gpt_neox_japanese": "embed_out",
}  # fmt: skip
"""model_type -> the output layer over tokens of its classes, where that is not lm_head."""
WITHOUT_TOKENS_IN = frozenset(
    ("canary", "cohere_asr", "moonshine", "moonshine_streaming", "pix2struct", "speech_to_text", "whisper")
)
"""The encoder-decoders whose encoder embeds no tokens: the output layer shares with the decoder alone."""

TEXT_TO_TEXT = frozenset(
    ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led", "longt5", "m2m_100",
     "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "switch_transformers",
     "t5", "t5gemma", "umt5")
)  # fmt: skip
"""The model types that take text and generate text, from an encoder and a decoder."""

TIED = "tie_word_embeddings"
TIED_BY_DEFAULT = frozenset(
    ("albert", "aya_vision", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt",
     "blenderbot", "blenderbot-small", "blip", "bloom", "camembert", "canary", "cohere", "cohere2", "cohere2_moe",
     "cohere2_vision", "cohere_compass_text", "convbert", "cpmant", "ctrl", "data2vec-text", "deberta", "deberta-v2",
     "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma", "distilbert", "electra", "ernie", "ernie4_5",
     "ernie4_5_moe", "ernie4_5_vl_moe", "esm", "falcon", "falcon_mamba", "flaubert", "flava", "florence2", "fnet",
     "fun_asr_nano", "funnel", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4",
     "gemma4_text", "gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "glmasr", "got_ocr2",
     "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "granite_docling", "granite_speech",
     "granite_speech_plus", "granite_swa", "gte", "hunyuan_vl", "hyperclovax_vision_v2", "ibert", "internvl",
     "janus", "jetmoe", "jina_embeddings_v3", "kimi_k25", "kosmos-2", "kosmos-2.5", "layoutlm", "led", "lfm2",
     "lfm2_moe", "lfm2_vl", "lfm3", "lfm3_vl", "lighton_ocr", "longformer", "longt5", "luke", "lxmert", "m2m_100",
     "mamba", "marian", "mbart", "megatron-bert", "minicpm3", "minicpm_ocr", "mistral3", "mobilebert", "modernbert",
     "modernbert-decoder", "moonshine", "moss_transcribe_diarize", "mpnet", "mpt", "mra", "mt5", "mvp", "neomme",
     "nllb-moe", "nomic_bert", "nystromformer", "openai-gpt", "opt", "ovis2", "paddleocr_vl", "paligemma", "pegasus",
     "pegasus_x", "plbart", "pop2piano", "pp_chart2table", "prophetnet", "qwen3_asr", "recurrent_gemma", "roberta",
     "roberta-prelayernorm", "roc_bert", "roformer", "seamless_m4t", "seamless_m4t_v2", "shieldgemma2", "smollm3",
     "speech_to_text", "speecht5", "squeezebert", "starcoder2", "switch_transformers", "t5", "t5gemma", "t5gemma2",
     "tapas", "trocr", "udop", "umt5", "vaultgemma", "visual_bert", "voxtral_realtime", "whisper", "xglm", "xlm",
     "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso", "youtu", "zamba", "zamba2", "zaya")
)  # fmt: skip
"""The model types that tie output layer and embedding where config.json does not say, which transformers 4 left out."""
TIED_BY_PARTS = frozenset(
    (
        "blip-2",
        "encoder-decoder",
        "instructblip",
        "instructblipvideo",
        "speech-encoder-decoder",
        "vision-encoder-decoder",
    )
)
"""The model types whose language model, a part with a model type of its own, has its own default."""
EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "tokens_embed"),
    "word_embedding",
)
LOOKED_UP = ("position_embeddings", "token_type_embeddings", "wpe")
"""Embeddings of positions and types whose models only call them, where they are of torch's own class (BERT and its
kind, GPT-2).  Others read their weight themselves (Whisper, OPT), which peft's factors would miss."""
HEADS = ("lm_head", "embed_out")
"""What the modules with a row for each token are called."""

# --- layers in config.json -------------------------------------------------------------------------

COUNTS = ("num_layers_per_stack", "num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What a configuration calls the number of blocks of the (language) model: the first name present counts.  A model that
goes through its blocks several times (HRM) has a number for each stack, and counts the calls in the other field."""
GLOBAL_EVERY: Mapping[str, int] = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
"""Every so many layers one without a sliding window, where old config files leave it to the model's code."""
PERIODIC = ("attn_layer", "expert_layer")
"""Fields <word>_period and <word>_offset: layer i is special where i % period == offset."""
SIZED_OTHERWISE = (
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "gemma3n", "gemma3n_text"),
)
"""Model types whose q_proj or MLP has other sizes than the fields of the configuration say (gates, ramps)."""
SIZES_OF_THEIR_OWN = (
    *("attn_output_gate", "block_configs", "global_head_dim", "kv_lora_rank", "swa_head_dim", "v_head_dim"),
)
"""Fields that say so: gates, blocks or kinds of layers with unlike sizes, latent attention (Gemma 4, DeepSeek)."""

GAIN_PLUS_ONE = frozenset(("gemma", "gemma2", "gemma3", "gemma3_text"))
"""Model types whose norms multiply by one plus their weight."""

# --- experts ---------------------------------------------------------------------------------------

EXPERT_WORDS: Mapping[str, tuple[str, str, str]] = {
    "mixtral": ("w1", "w3", "w2"),
    "": ("gate_proj", "up_proj", "down_proj"),
}
"""Family -> what it calls the three matrices of an expert; '' is all others."""
MIXTRAL_MODULE = ("block_sparse_moe", "mlp")
"""Where Mixtral's experts are: in files with a tensor for each, and with all in one."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of routed experts of a layer."""
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts")
"""And of those that a token goes through."""

# --- buffers ---------------------------------------------------------------------------------------

BUFFERS = (
    r"(?:.*\.)?(?:position_ids|token_type_ids|inv_freq|num_batches_tracked|relative_position_index|rope_freqs)",
    r".*\b(?:attn|attention)\.masked_bias",
    r"(?:.*\.)?(?:cos_cached|sin_cached)",
)
"""Names of tensors that follow from config.json or count batches: older releases of transformers wrote them, newer ones
do not, and both load files with or without them."""
CAUSAL_MASKS = r".*\b(?:attn|attention)\.bias"
"""The same of masks, where they have four axes (GPT-2, GPT-NeoX)."""

# --- what comes out ---------------------------------------------------------------------------------

GIVE_PROBABILITIES = (
    "ForCausalLM", "LMHeadModel", "ForImageClassification", "ForSequenceClassification", "ForTokenClassification",
    "ForConditionalGeneration",
)  # fmt: skip
"""How the names of classes end that give probabilities of classes or tokens, of which a Fisher information is made."""

# --- dtypes ----------------------------------------------------------------------------------------

WIDE = (
    r"(?:.*\.)?(?:e_score_correction_bias|expert_bias)",  # router biases: small steps far from zero
    r".*\b(?:router|gate)\.bias",
    r"(?:.*\.)?(?:A_log|dt_bias)",  # state-space models: exponents
    r"(?:.*\.)?(?:inv_freq|rope_freqs|freqs|freqs_cis)",
    r"(?:.*\.)?(?:latent_mean|latent_std|hc_scale|hc_base|hc_fn|logit_scale)",
)
"""Names of tensors whose numbers mean nothing once they are rounded to 16 bits; transformers 5.24 keeps most of them in
float32 (`_keep_in_fp32_modules_strict`)."""
WIDE_ROUTERS = frozenset(
    ("axk1", "axk2", "beam", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
     "ernie4_5_vl_moe", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hy_v3")
)  # fmt: skip
"""The model types whose routers (`gate.weight`) transformers 5.24 keeps in float32 too."""
