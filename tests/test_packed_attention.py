"""Packed sequences give the states of each sequence by itself, or the model is left as it was."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from karma_fast.data.packing import TEXT, Packed
from karma_fast.model.packed_attention import (
    PACKED,
    fused,
    packed_attention,
    run_packed,
    torch_varlen,
    use_packed_attention,
    written_out,
)
from karma_fast.planning.simulated import Simulation

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "initializer_range": 0.3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": SMALL | HEADS, "qwen2": SMALL | HEADS, "qwen3": SMALL | HEADS | {"head_dim": 8},
    "mistral": SMALL | HEADS | {"sliding_window": 4}, "gemma": SMALL | HEADS | {"head_dim": 8},
    "granite": SMALL | HEADS, "olmo2": SMALL | HEADS, "phi3": SMALL | HEADS | {"pad_token_id": 0},
    "gpt_neox": SMALL | {"num_attention_heads": 4},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}}
OTHERS = {  # softcapped scores; states that run on through a sequence; a window that only the mask knows
    "qwen2_moe": SMALL | HEADS | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0,
                                  "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2,
                                  "num_experts_per_tok": 1},
    "gemma2": SMALL | HEADS | {"head_dim": 8}, "mamba": SMALL | {"state_size": 4},
    "recurrent_gemma": SMALL | HEADS | {"lru_width": 32, "attention_window_size": 8}}


def tiny(family: str, values: dict, attention: str = "eager"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed_of(*lengths: int) -> Packed:
    lengths = np.array(lengths)
    return Packed.of(lengths, np.zeros(lengths.sum(), np.int64), np.full(lengths.sum(), TEXT))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_each_sequence_alone(family):
    model, packed = tiny(family, FAMILIES[family]), packed_of(9, 1, 6)
    x = torch.randn(16, 32, requires_grad=True)
    alone = torch.cat([model.base_model(inputs_embeds=part[None], use_cache=False).last_hidden_state[0]
                       for part in x.split([9, 1, 6])])
    upstream = torch.randn_like(alone)
    (expected,) = torch.autograd.grad(alone, x, upstream)
    assert use_packed_attention(model) and model.config._attn_implementation == PACKED
    states = run_packed(model, x, packed)
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(states, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    other = torch.cat([torch.randn(9, 32), x[9:]])
    assert torch.allclose(run_packed(model, other, packed)[9:], states[9:], rtol=1e-5, atol=1e-5)  # nothing leaks


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_stay_as_they_were(family):
    model = tiny(family, OTHERS[family], "eager")
    assert not use_packed_attention(model) and model.config._attn_implementation == "eager"
    x, packed = torch.randn(8, 32), packed_of(5, 3)
    alone = torch.cat([model.base_model(inputs_embeds=part[None], use_cache=False)[0][0] for part in x.split([5, 3])])
    torch.testing.assert_close(run_packed(model, x, packed), alone, rtol=1e-4, atol=1e-4)


def test_a_state_that_half_precision_hides_is_seen_by_its_convolution():
    sizes = {"num_hidden_layers": 4, "intermediate_size": 64, "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
             "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "initializer_range": 0.02}
    model = tiny("jamba", SMALL | HEADS | sizes, "sdpa").to(torch.bfloat16)
    assert not use_packed_attention(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_both_blocks_are_causal_attention(window, groups):
    q = torch.randn(2, 7, 4, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 7, groups, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    place = torch.arange(7)
    unseen = place[:, None] < place
    if window:
        unseen |= place[:, None] - place >= window
    wide_k, wide_v = (x.repeat_interleave(4 // groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, wide_k) * 0.3
    expected = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(unseen, -torch.inf).softmax(-1), wide_v)
    upstream = torch.randn_like(expected)
    for block in (written_out, fused):
        out = block(q, k, v, 0.3, 0.0, window)
        torch.testing.assert_close(out, expected)
        for found, right in zip(torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True),
                                torch.autograd.grad(expected, (q, k, v), upstream, retain_graph=True), strict=True):
            torch.testing.assert_close(found, right)


def test_no_heads_share_keys_on_a_gpu(monkeypatch):
    """There, the kernel that takes float32 or a mask wants as many heads of keys, and without it scores are stored."""
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: calls.append((args, options))
                        or args[0])
    with Simulation("cuda").entered():
        q, k = torch.zeros(2, 7, 4, 5, device="cuda"), torch.zeros(2, 7, 2, 5, device="cuda")
        fused(q, k, k, 1.0, 0.0, None)
    (q, k, v, *_), options = calls[0]
    assert q.shape == k.shape == v.shape and not options["enable_gqa"]


def test_what_is_not_known_is_refused():
    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(NotImplementedError, match="softcap"):
        packed_attention(torch.nn.Module(), x, x, x, None, packed=packed_of(5, 3), softcap=30.0)


def test_dropout_of_attention_is_drawn():
    model = tiny("llama", FAMILIES["llama"] | {"attention_dropout": 0.5})
    assert use_packed_attention(model)
    x, packed = torch.randn(8, 32), packed_of(5, 3)
    assert torch.equal(run_packed(model, x, packed), run_packed(model, x, packed))
    model.train()
    assert not torch.allclose(run_packed(model, x, packed), run_packed(model, x, packed))


def test_generation_and_masks_are_those_of_sdpa():
    model = tiny("llama", FAMILIES["llama"], "sdpa")
    ids, mask = torch.arange(12).reshape(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert use_packed_attention(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0),
                       tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flash_attention_over_a_stream(window, groups):
    if torch_varlen() is None:
        pytest.skip("this torch has no attention over streams")
    packed = packed_of(9, 1, 40).to("cuda")
    q = torch.randn(50, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(50, groups, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    expected = packed.unpadded(written_out(*(packed.padded(x.double()) for x in (q, k, v)), 0.125, 0.0, window))
    found = torch_varlen()(q, k, v, packed, 0.125, window)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), upstream),
                    torch.autograd.grad(expected, (q, k, v), upstream.double()), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-2, atol=5e-2)
