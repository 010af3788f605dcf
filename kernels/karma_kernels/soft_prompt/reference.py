"""The definition of the soft-prompt projection and of its insertion, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics import compute_dtype, unit_rows


def soft_prompt_rows(vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, num_tokens: int,
                     token_norm: float | Tensor, eps: float) -> Tensor:
    """Checked inputs -> (R, num_tokens, hidden) in the dtype of ``w2``; half precision is computed in float32."""
    dtype = compute_dtype(w2.dtype)
    norm_weight, w1, b1, weight2 = (x.to(dtype) for x in (norm_weight, w1, b1, w2))
    x = vectors.to(dtype)
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * norm_weight
    z = F.linear(F.gelu(F.linear(x, w1, b1)), weight2)
    z = z.view(vectors.shape[0], num_tokens, w2.shape[0] // num_tokens)
    return (token_norm * unit_rows(z)).to(w2.dtype)


def insert_rows(token_ids: Tensor, slots: Tensor, soft: Tensor, embedding_weight: Tensor) -> Tensor:
    """(B, T) ids, (B, T) slots, (S, hidden) soft tokens, (V, hidden) table -> (B, T, hidden)."""
    is_soft = slots >= 0
    # ids under a soft token and slots at a text token are never read: 0 stands there
    ids = token_ids.masked_fill(is_soft, 0)
    bad = (slots < -1) | (slots >= soft.shape[0]) | (ids < 0) | (ids >= embedding_weight.shape[0])
    # F.embedding, as its backward adds repeated rows in a fixed order; plain indexing does not
    out = F.embedding(ids.clamp(0, embedding_weight.shape[0] - 1), embedding_weight)
    if soft.shape[0]:
        rows = F.embedding(slots.clamp(0, soft.shape[0] - 1), soft.to(out.dtype))
        out = torch.where(is_soft.unsqueeze(-1), rows, out)
    return out.masked_fill(bad.unsqueeze(-1), torch.nan)
