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


def insert_rows(token_ids: Tensor, slots: Tensor, soft: Tensor, embedding_weight: Tensor,
                learned: Tensor | None = None) -> Tensor:
    """(B, T) ids, (B, T) slots, (S, hidden) soft tokens, (V, hidden) table, (E, hidden) learned -> (B, T, hidden)."""
    places = [(slots, soft)] if learned is None else [(slots, soft), (-2 - slots, learned)]
    # ids are read at text tokens only: elsewhere 0 stands for them
    ids = token_ids.masked_fill(slots != -1, 0)
    bad = (ids < 0) | (ids >= embedding_weight.shape[0])
    # F.embedding, as on a CPU its backward adds repeated rows in a fixed order; that of plain indexing does not
    out = F.embedding(ids.clamp(0, embedding_weight.shape[0] - 1), embedding_weight)
    found = slots == -1
    for rows, values in places:
        if values.shape[0]:
            inside = (rows >= 0) & (rows < values.shape[0])
            taken = F.embedding(rows.clamp(0, values.shape[0] - 1), values.to(out.dtype))
            out = torch.where(inside.unsqueeze(-1), taken, out)
            found = found | inside
    return out.masked_fill((bad | ~found).unsqueeze(-1), torch.nan)
