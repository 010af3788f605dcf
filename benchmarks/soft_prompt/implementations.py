"""Every way to make the prompt that is compared: a function from inputs to (B, T, hidden)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..implementations import why_not
from .cases import EPS, TOKEN_NORM, Inputs


@dataclass(frozen=True)
class Implementation:
    name: str
    prompt: Callable[[Inputs], Tensor]
    probe: Callable[[str], object] = lambda device: None  # given the device; raises where it cannot run


def absent(implementation: Implementation, device: str) -> str | None:
    """Why it cannot be measured here, or None."""
    return why_not(implementation.probe, device)


def karma(inputs: Inputs, backend: str) -> Tensor:
    from karma_kernels import embed_prompt

    return embed_prompt(inputs.token_ids, inputs.slots, **inputs.tensors, embedding_weight=inputs.embedding_weight,
                        num_tokens=inputs.num_tokens, token_norm=TOKEN_NORM, eps=EPS, backend=backend)


def probe_karma(device: str, backend: str) -> None:
    """Asks for the tokens of no vectors: says whether the backend exists here, without running a kernel."""
    from karma_kernels import soft_prompt

    one = torch.ones(1, 16, device=device)
    soft_prompt(one[:0], one[0], one, one[0, :1], one[:, :1].repeat(16, 1), backend=backend)


def ours(backend: str) -> Implementation:
    return Implementation(f"karma {backend}", functools.partial(karma, backend=backend),
                          functools.partial(probe_karma, backend=backend))


# ------------------------------------------------------------------------------------------------ plain torch

def soft_tokens(vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, hidden: int,
                dtype: torch.dtype) -> Tensor:
    """(tokens, hidden) of ``dtype``, the layers under autocast to it unless it is float32."""
    with torch.autocast(vectors.device.type, dtype, enabled=dtype != torch.float32):
        x = F.rms_norm(vectors, norm_weight.shape, norm_weight, EPS)
        z = F.linear(F.gelu(F.linear(x, w1, b1)), w2).view(-1, hidden)
    return (TOKEN_NORM * F.normalize(z.float(), dim=-1)).to(dtype)


def eager_prompt(token_ids: Tensor, places: Tensor, sources: Tensor, embedding_weight: Tensor,
                 tensors: dict[str, Tensor]) -> Tensor:
    """Token embeddings of all positions, those of soft and learned tokens overwritten: the places come from the
    collator, so that nothing waits for the GPU."""
    weights = dict(tensors)
    learned = weights.pop("learned", None)
    dtype, hidden = embedding_weight.dtype, embedding_weight.shape[1]
    made = soft_tokens(**weights, hidden=hidden, dtype=dtype)
    if learned is not None:
        made = torch.cat([made, learned.to(dtype)])
    out = F.embedding(token_ids.flatten(), embedding_weight)
    return out.index_copy(0, places, made.index_select(0, sources)).view(*token_ids.shape, hidden)


def eager(inputs: Inputs, function: Callable[..., Tensor] = eager_prompt) -> Tensor:
    return function(inputs.token_ids, inputs.places, inputs.sources, inputs.embedding_weight, inputs.tensors)


@functools.cache
def compiled_prompt() -> Callable[..., Tensor]:
    # for each shape anew: a kernel for any shape would be slower; the runner resets the compiler between cases
    return torch.compile(eager_prompt, dynamic=False, fullgraph=True)


def compiled(inputs: Inputs) -> Tensor:
    return eager(inputs, compiled_prompt())


def row_by_row(inputs: Inputs) -> Tensor:
    """Each row concatenated, then all padded, as many training loops have it."""
    weights, table = dict(inputs.tensors), inputs.embedding_weight
    learned = weights.pop("learned", None)
    soft = soft_tokens(**weights, hidden=table.shape[1], dtype=inputs.dtype)
    emb = [] if learned is None else [learned.to(inputs.dtype)]
    return pad_sequence([torch.cat([F.embedding(head, table), soft[items], *emb, F.embedding(tail, table)])
                         for head, items, tail in inputs.rows], batch_first=True)


IMPLEMENTATIONS = (ours("auto"), ours("chunked"), ours("fused"), Implementation("eager", eager),
                   Implementation("torch.compile", compiled), Implementation("row by row", row_by_row))
