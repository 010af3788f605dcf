"""Causal attention within each of several sequences that stand side by side in one stream.

Everything else in a decoder layer works token by token, so a stream without padding saves the share of the work that
padding was. transformers calls `packed_attention` under the name `PACKED`; given no `Packed` it is transformers' own
"sdpa".
"""

from __future__ import annotations

import functools
import inspect
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..data.packing import TEXT, Packed

PACKED = "karma_fast_packed"
NOT_SAID = object()
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what some families add to attention, and this one does not know
# Longest sequence for which a CPU writes the scores out. Forward and backward in bfloat16 of 9 heads of 64 on 3 of
# keys, 2 threads of an AMD EPYC (AVX512-BF16) that others used too, torch 2.13.0, ms, against scaled_dot_product_
# attention: 32 sequences of 32: 11 / 49, 16 of 128: 46 / 124, 4 of 512: 177 / 222.
WRITTEN_OUT = 512


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     dropout: float = 0.0, scaling: float | None = None, packed: Packed | None = None,
                     sliding_window: int | None = NOT_SAID, **kwargs) -> tuple[Tensor, None]:
    """(1, heads, N, d) query, (1, key heads, N, d) key and value -> (1, N, heads, d)."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    if sliding_window is NOT_SAID:
        config = getattr(module, "config", None)
        if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")):
            raise NotImplementedError("this family says its attention's window by a mask alone")
        sliding_window = None
    found = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if found:
        raise NotImplementedError(f"attention with {', '.join(found)} is not known to work on packed sequences")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < packed.longest else None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        flash = flash_varlen()
        if flash is not None and q.shape[-1] == v.shape[-1]:
            return flash(q, k, v, packed, scaling, window)[None], None
    block = written_out if q.device.type == "cpu" and packed.longest <= WRITTEN_OUT else fused
    out = block(*(packed.padded(x) for x in (q, k, v)), scaling, dropout, window)
    return packed.unpadded(out)[None], None


def written_out(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None) -> Tensor:
    """(S, T, heads, d), twice (S, T, key heads, d) -> (S, T, heads, d), with the scores in memory."""
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    # the heads that share keys become rows of one product
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(rows * groups, -1, width)
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    mask = hidden(length, window, q.device, q.dtype).repeat(heads // groups, 1)
    scores = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scaling)
    out = F.dropout(scores.softmax(dim=-1), dropout) @ v
    return out.view(rows, groups, heads // groups, length, -1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def fused(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None) -> Tensor:
    """The same by torch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if window is None else hidden(q.shape[2], window, q.device, q.dtype)
    shared = q.shape[1] != k.shape[1]
    if shared and q.is_cuda and (mask is not None or q.dtype == torch.float32):  # torch would write the scores out
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scaling,
                                          enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def hidden(length: int, window: int | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T, T): -inf where a row must not look, else 0."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(length, length, device=device, dtype=dtype).masked_fill_(unseen, -math.inf)


@functools.cache
def flash_varlen():
    """Flash attention over a stream: flash-attn's where installed, else torch's, else None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return torch_varlen()

    def attend(q, k, v, packed, scaling, window):
        return flash_attn_varlen_func(q, k, v, packed.offsets, packed.offsets, packed.longest, packed.longest,
                                      softmax_scale=scaling, causal=True, window_size=looks_back(window))

    return attend


def torch_varlen():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    if not {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys():  # as it first was
        return None

    def attend(q, k, v, packed, scaling, window):
        if q.shape[1] != k.shape[1]:  # whether heads may share keys differs between versions and back-ends
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, packed.offsets, packed.offsets, packed.longest, packed.longest, scale=scaling,
                           window_size=looks_back(window))

    return attend


def looks_back(window: int | None) -> tuple[int, int]:
    """As flash attention says it: how many positions before and after a token it sees besides itself."""
    return (-1 if window is None else window - 1, 0)


def run_packed(model: PreTrainedModel, inputs_embeds: Tensor, packed: Packed) -> Tensor:
    """(N, hidden) -> (N, hidden) last states of the sequences, each by itself."""
    if model.config._attn_implementation != PACKED:  # in a causal model right padding needs no mask
        states = model.base_model(inputs_embeds=packed.padded(inputs_embeds), use_cache=False).last_hidden_state
        return packed.unpadded(states)
    # a ready mask, which nobody looks at, keeps transformers from making one of N x N
    ready = inputs_embeds.new_zeros(1, 1, 1, 1)
    return model.base_model(inputs_embeds=inputs_embeds[None], position_ids=packed.positions[None],
                            attention_mask=ready, use_cache=False, packed=packed).last_hidden_state[0]


@torch.no_grad()
def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switches a model to packed attention if its states of two sequences stay what they are one by one.

    Families whose layers are not plain attention, such as state-space models, fail this and are left as they were.
    Those with convolutions along the stream carry a state, which small numbers may hide from the comparison.
    """
    if any(isinstance(part, nn.Conv1d) for part in model.modules()):
        return False
    before, training = model.config._attn_implementation, model.training
    table = model.get_input_embeddings().weight
    ids = torch.arange(12, device=table.device) * 7 % len(table)
    both = Packed.of(np.array([7, 5]), np.zeros(12, np.int64), np.full(12, TEXT)).to(table.device)
    embeds = F.embedding(ids, table).to(model.dtype)
    model.eval()
    try:
        expected = run_packed(model, embeds, both)
        model.set_attn_implementation(PACKED)
        found = run_packed(model, embeds, both)
        error = (found - expected).float().norm() / expected.float().norm()
        same = bool(error < (1e-4 if model.dtype == torch.float32 else 5e-2))
    except Exception:  # whatever a family does not support
        same = False
    finally:
        model.train(training)
    if not same:
        model.set_attn_implementation(before)
    return same


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
