"""The gradients in float64 and a part of the prompt, some vectors at a time; and how far an implementation is off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..exact import distance, spread
from .cases import EPS, TOKEN_NORM, Inputs

PIECE_BYTES = 256 << 20
SAMPLE = 1024  # positions of the prompt that are compared
# What a right implementation may be off by, relative. float32 leaves room for TF32 products; half precision for
# factors that were rounded to it and, in plain torch, for gradients of repeated items that were added in it.
LIMITS = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass
class Exact:
    positions: Tensor  # (S,) of the flattened prompt
    prompt: Tensor  # (S, hidden) float64
    gradients: dict[str, Tensor]  # float64, of what wants one


def exact(inputs: Inputs, sample: int = SAMPLE) -> Exact:
    """``sample`` evenly spaced positions and all gradients, which are sums over vectors and thus found in parts."""
    from karma_kernels.soft_prompt.reference import soft_prompt_rows

    tensors = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.tensors.items()}
    learned = tensors.pop("learned", None)
    slots, table, k = inputs.slots.flatten(), inputs.embedding_weight, inputs.num_tokens
    hidden, upstream = table.shape[1], inputs.upstream.reshape(len(slots), -1)
    positions = spread(len(slots), sample, slots.device)
    asked = slots[positions]
    prompt = table[inputs.token_ids.flatten()[positions]].double()
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    sums = {name: torch.zeros_like(x) for name, x in wanted.items()}
    vectors, weights = tensors["vectors"], [tensors[name] for name in ("norm_weight", "w1", "b1", "w2")]
    for r in torch.arange(len(vectors), device=slots.device).split(max(1, PIECE_BYTES // (8 * 8 * k * hidden))):
        first, last = int(r[0]) * k, (int(r[-1]) + 1) * k
        soft = soft_prompt_rows(vectors[r], *weights, k, TOKEN_NORM, EPS).flatten(0, 1)
        here = ((slots >= first) & (slots < last)).nonzero().squeeze(1)
        grad = torch.zeros_like(soft).index_add_(0, slots[here] - first, upstream[here].double())
        for name, found in zip(wanted, torch.autograd.grad(soft, list(wanted.values()), grad), strict=True):
            sums[name] += found
        here = ((asked >= first) & (asked < last)).nonzero().squeeze(1)
        prompt[here] = soft.detach()[asked[here] - first]
    if learned is not None:
        prompt[asked == -2] = learned.detach()
        sums["learned"] = upstream[slots == -2].double().sum(0, keepdim=True)
    return Exact(positions, prompt, sums)


def errors(prompt: Tensor, gradients: list[Tensor], inputs: Inputs, truth: Exact) -> dict[str, float]:
    """Relative errors of the sampled positions and of every gradient, those given in the order of inputs.leaves."""
    names = [name for name, x in inputs.tensors.items() if x.requires_grad]
    own = prompt.reshape(inputs.slots.numel(), -1)[truth.positions]
    return {"prompt": distance(own, truth.prompt)} | {
        name: distance(x, truth.gradients[name]) for name, x in zip(names, gradients, strict=True)}


def too_far(found: dict[str, float], dtype: torch.dtype) -> bool:
    """Whether an error is above the limit, or not a number."""
    return not all(error <= LIMITS[dtype] for error in found.values())
