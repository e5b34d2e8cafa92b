"""XkvCache in models of transformers: what it holds, and that a full rank loses nothing."""

from __future__ import annotations

import pytest
import torch
from runtime_models import gap, generate, prompts, tiny
from torch import Tensor

from weightsmith.core.errors import NumericError, PlanError
from weightsmith.runtime import MiniCache, XkvCache, release

FULL = {"rank_k": 1000, "rank_v": 1000, "always": True}
UNEVEN = prompts((90, 61, 30))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"group": 2}),
        ("llama", {"group": 3, "tiles": False}),
        ("llama", {"groups": [[1, 3]]}),
        ("llama", {"group": 2, "every": 7, "recent": 4, "least": 8}),
        ("qwen3", {"group": 5, "every": 16}),
        ("phi", {"group": 2}),
        ("glm", {"group": 2}),
        ("gpt2", {"group": 2, "every": 16}),
        ("deepseek", {"group": 3, "every": 16}),
        ("deepseek", {"group": 3, "every": 16, "rank_v": None}),
        ("llama", {"group": 3, "every": 16, "rank_k": None}),
    ],
)
def test_a_full_rank_generates_what_the_plain_cache_does(kind: str, options: dict) -> None:
    model = tiny(kind)
    want = generate(model, UNEVEN, 40)
    cache = XkvCache(model, **{**FULL, **options})
    assert gap(want, generate(model, UNEVEN, 40, past_key_values=cache)) < 3e-4
    assert cache.sizes["factors"] > 0
    assert cache.get_seq_length() == 129


def test_bfloat16_stays_as_near_as_its_rounding() -> None:
    model = tiny(initializer_range=0.1).bfloat16()
    inputs = UNEVEN["input_ids"][:1]
    with torch.no_grad():
        first = model(inputs, past_key_values=(cache := XkvCache(model, **FULL)))
        token = first.logits[:, -1:].argmax(-1)
        got = model(token, past_key_values=cache).logits
        want = model(torch.cat([inputs, token], 1)).logits[:, -1:]
    assert cache.sizes["factors"] > 0
    assert float((got - want).abs().max()) < 0.03 * float(want.abs().max())


def test_beams_are_reordered() -> None:
    model = tiny()
    want = generate(model, UNEVEN, 30, num_beams=3)
    cache = XkvCache(model, **FULL, group=2, every=8)
    assert torch.equal(want.sequences, generate(model, UNEVEN, 30, num_beams=3, past_key_values=cache).sequences)


def test_a_batch_equals_its_sequences_over_100_tokens() -> None:
    """Ranks are given, so each sequence is compressed as it is alone."""
    model, options = tiny(), {"rank_k": 24, "rank_v": 40, "group": 2, "every": None, "recent": 2}
    options |= {"least": 20, "always": True}  # the shortest alone is too short to save anything
    found = generate(model, UNEVEN, 110, past_key_values=XkvCache(model, **options))
    for row, length in enumerate((90, 61, 30)):
        alone = {name: value[row : row + 1, -length:] for name, value in UNEVEN.items()}
        own = generate(model, alone, 110, past_key_values=(cache := XkvCache(model, **options)))
        assert cache.sizes["factors"] > 0
        assert torch.equal(found.sequences[row, 90:], own.sequences[0, length:])


def test_turns_of_a_conversation_and_pieces_of_a_prompt() -> None:
    model = tiny()
    ids = torch.randint(1, 100, (2, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = model(ids).logits
        cache = XkvCache(model, **FULL, group=2, every=30)
        got = [
            model(ids[:, low:high], past_key_values=cache).logits
            for low, high in ((0, 70), (70, 80), (80, 81), (81, 120))
        ]
    assert float((torch.cat(got, 1) - want).abs().max()) < 3e-4
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_first_tokens_stay_exact() -> None:
    model = tiny()
    cache, inputs = XkvCache(model, rank_k=2, rank_v=2, sink=3, recent=5), prompts((90,))
    model(**inputs, past_key_values=cache)
    plain = model(**inputs, use_cache=True).past_key_values.layers[4].keys
    place = cache.groups[1]
    keys, _ = place._reading(0).whole()
    assert torch.equal(keys[:, :, :3], plain[:, :, :3])
    assert torch.equal(keys[:, :, -5:], plain[:, :, -5:])
    assert not torch.allclose(keys, plain, atol=1e-2)
    with pytest.raises(PlanError, match="padding"):
        model(**UNEVEN, past_key_values=XkvCache(model, rank_k=2, rank_v=2, sink=3))


def test_bytes_held_are_those_of_the_formula() -> None:
    model, (layers, width, length, recent) = tiny(), (5, 32, 200, 10)
    cache = XkvCache(model, group=3, rank_k=9, rank_v=17, recent=recent)
    model(**prompts((length,)), past_key_values=cache)
    kept = length - recent
    factors = sum(r * (kept + g * width) for g in (3, 2) for r in (9, 17))
    assert cache.sizes["factors"] == 4 * factors
    assert cache.sizes["exact"] == 4 * 2 * layers * recent * width
    assert cache.exact_nbytes == 4 * 2 * layers * length * width
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(cache)}
    assert sum(held.values()) == cache.nbytes  # no slice keeps a larger tensor alive


def test_prefill_holds_one_group_exactly() -> None:
    model, most = tiny(num_hidden_layers=8), 0
    cache = XkvCache(model, group=2, rank_k=8, rank_v=8)

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, cache.sizes["exact"])

    for layer in model.model.layers:
        layer.register_forward_hook(look)
    model(**prompts((150,)), past_key_values=cache)
    assert 0 < most <= 2 * 2 * 150 * 32 * 4
    assert cache.sizes["exact"] == 0


def test_keys_are_rotated_by_the_positions_that_they_had() -> None:
    model = tiny()
    position = torch.tensor([[*range(5), *range(40, 90), *range(7)], [*range(200, 262)]])
    ids = torch.randint(1, 100, (2, 62), generator=torch.Generator().manual_seed(3))
    kept: list[Tensor] = []
    handle = model.model.layers[3].self_attn.k_proj.register_forward_hook(lambda _, __, out: kept.append(out))
    cache = XkvCache(model, group=5, rank_k=7, rank_v=7, least=10)
    with torch.no_grad():
        model(ids, position_ids=position, past_key_values=cache)
    handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    group = cache.groups[0]
    assert group.keys is not None
    before = group.keys.rows(3, 0, 62).view(2, 62, 2, 16).transpose(1, 2)
    cos, sin = model.model.rotary_emb(before, position)
    want = apply_rotary_pos_emb(before, before, cos, sin)[1]
    assert torch.allclose(group._reading(3).whole()[0], want, atol=1e-5)
    # What was compressed are the keys before their rotation: their projection on the basis.
    basis = torch.cat(group.keys.e, 2)
    assert float((basis @ basis.mT - torch.eye(7)).abs().max()) < 1e-4
    assert kept[0].shape == (2, 62, 32)


def test_a_bound_model_runs_other_caches_as_before() -> None:
    model = tiny()
    want = generate(model, UNEVEN, 12)
    XkvCache(model)
    assert gap(want, generate(model, UNEVEN, 12)) < 1e-4
    assert gap(want, generate(model, UNEVEN, 12, cache_implementation="static")) < 1e-4
    release(model)
    assert model.config._attn_implementation == "sdpa"
    assert gap(want, generate(model, UNEVEN, 12)) == 0


def test_another_attention_chosen_later_is_served_whole() -> None:
    model = tiny()
    want = generate(model, UNEVEN, 12)
    cache = XkvCache(model, **FULL)
    model.set_attn_implementation("eager")
    assert gap(want, generate(model, UNEVEN, 12, past_key_values=cache)) < 3e-4


def test_assisted_decoding_is_refused() -> None:
    model = tiny()
    with pytest.raises(PlanError, match="assisted decoding"):
        generate(model, prompts((90,)), 12, past_key_values=XkvCache(model), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "text"),
    [
        ("mistral", {"sliding_window": 32}, {}, "sliding window of 32"),
        ("qwen3", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, {}, "partly sliding_attention"),
        ("gpt2", {"add_cross_attention": True}, {}, "cross-attention"),
        ("t5", {}, {}, "cross-attention"),
        ("llama", {}, {"rank_k": 128}, "rank_k = 128 is no compression of 4 layers of 32"),
        ("llama", {}, {"groups": [[0, 1], [1, 2]]}, "layer 1 is in two groups"),
        ("llama", {}, {"groups": [[2, 7]]}, "layer 7 of a group"),
        ("llama", {}, {"energy": 1.5}, "energy must be above 0"),
        ("llama", {}, {"group": 0, "recent": -1}, "2 problems"),
        ("llama", {"output_attentions": True, "attn_implementation": "eager"}, {}, "output_attentions"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(kind: str, changes: dict, options: dict, text: str) -> None:
    model = tiny(kind, **changes)
    with pytest.raises(PlanError, match=text):
        XkvCache(model, **options)


def test_a_quantised_cache_in_the_configuration_is_refused() -> None:
    model = tiny()
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(PlanError, match="'quantized' is another cache"):
        XkvCache(model)


def test_states_that_are_not_finite_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericError, match="NaN"):
        model(**prompts((90,)), past_key_values=XkvCache(model))


def test_short_prompts_and_full_spectra_stay_exact() -> None:
    model = tiny()
    short = XkvCache(model)
    model(**prompts((20,)), past_key_values=short)
    assert short.sizes["factors"] == 0
    full = XkvCache(model, energy=1.0, group=2)
    want = generate(model, UNEVEN, 10)
    assert gap(want, generate(model, UNEVEN, 10, past_key_values=full)) < 1e-4
    assert (full.sizes["factors"], full.sizes["exact"]) == (0, full.exact_nbytes)


def test_minicache_generates_and_holds_less() -> None:
    model = tiny()
    cache = MiniCache(model, every=16)
    found = generate(model, UNEVEN, 40, past_key_values=cache)
    assert found.sequences.shape == (3, 130)
    assert cache.sizes["factors"] > 0
    assert cache.nbytes < cache.exact_nbytes
    generate(model, UNEVEN, 20, num_beams=2, past_key_values=MiniCache(model, every=8))
    with pytest.raises(PlanError, match="latent"):
        MiniCache(tiny("deepseek"))


def _tensors(cache: XkvCache) -> list[Tensor]:
    found = [x for pair in (cache._turns._held,) for x in pair or ()]
    for group in cache.groups:
        for part in (group.keys, group.values):
            assert part is not None
            found += [part.p, *part.e]
        found += [x for pair in group._last if pair is not None for x in pair]
    return found
