"""A language model's states of token sequences, and its logits, in the precision that the device computes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.packing import Packed
from .backbone import as_embedded, causal_lm, compute_dtype, token_logits
from .packed_attention import run_packed


def autocast(device: torch.device) -> torch.autocast:
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def decoder_states(backbone: nn.Module, embeds: Tensor, tokens: Packed) -> Tensor:
    """(N, hidden) rows of the embedding table, or what stands for such -> (N, hidden) last states of each sequence."""
    model = causal_lm(backbone)
    with autocast(model.get_input_embeddings().weight.device):
        return run_packed(model, as_embedded(model, embeds), tokens)


def logits(backbone: nn.Module, states: Tensor) -> Tensor:
    """(n, hidden) last states -> (n, V) float32."""
    model = causal_lm(backbone)
    with autocast(model.get_input_embeddings().weight.device):
        return token_logits(model, states)
