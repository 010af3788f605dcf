"""Soft prompts against float64; a part of ``benchmarks.check``.

The prompt and all gradients are compared with the definition in float64. An error may be twice that of plain torch
with everything in the dtype of the token embeddings, plus one rounding of the result to it, plus a small share of the
terms that the result is the difference of: gradients through both normalisations lose the part that changes lengths
alone, which may be nearly all, and in small problems the errors of plain torch may cancel by chance.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int, int, int, int, int]  # vectors, width, mid, hidden, tokens a vector, rows, length
# mid above 512 takes the other way through the Triton kernels, see karma_kernels.soft_prompt.routing
SHAPES = ((300, 96, 112, 200, 1, 3, 257), (5, 7, 9, 21, 2, 2, 9), (3, 5, 17, 8, 1, 1, 4),
          (130, 64, 520, 576, 1, 1, 99), (700, 256, 256, 1536, 1, 40, 33), (64, 33, 513, 100, 4, 64, 16),
          (40, 704, 704, 577, 2, 5, 50), (1000, 3, 18, 7, 3, 1, 3000), (33, 256, 256, 2048, 4, 33, 12))
KINDS = ("plain", "along", "one vector", "weights alone", "nothing learned", "text alone")
DTYPES = ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
          (torch.bfloat16,) * 2, (torch.float16,) * 2)  # of the token embeddings and of the weights
VOCABULARY, LEARNED, TOKEN_NORM = 50, 2, 3.0
WEIGHTS = ("norm_weight", "w1", "b1", "w2")
# of the terms; "fused" rounds factors to bfloat16 (4e-3), everything else computes in float32
ROUNDINGS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@dataclass
class Problem:
    tensors: dict[str, Tensor]  # vectors, norm_weight, w1, b1, w2, embedding_weight, maybe learned
    wanted: tuple[str, ...]  # of these the ones whose gradients are asked for
    token_ids: Tensor  # (B, T)
    slots: Tensor  # (B, T)
    num_tokens: int
    upstream: Tensor  # (B, T, hidden)


def draw(shape: Shape, dtypes: tuple[torch.dtype, torch.dtype], kind: str, seed: int, device: str) -> Problem:
    """The kinds: normal numbers; an upstream gradient that points nearly along the prompt, so that next to nothing of
    it is left; one vector in all places; vectors and token embeddings frozen; no learned tokens; no soft tokens."""
    count, width, mid, hidden, num_tokens, rows, length = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    tensors = {"vectors": normal(count, width), "norm_weight": 1 + 0.2 * normal(width),
               "w1": normal(mid, width) / width**0.5, "b1": 0.2 * normal(mid),
               "w2": normal(num_tokens * hidden, mid) / mid**0.5}
    learned = 0 if kind == "nothing learned" else LEARNED
    if learned:
        tensors["learned"] = normal(learned, hidden)
    tensors = {name: x.to(device, dtypes[1]) for name, x in tensors.items()}
    tensors["embedding_weight"] = normal(VOCABULARY, hidden).to(device, dtypes[0])
    ends = {"one vector": (-1, 1), "text alone": (-1 - learned, 0)}
    first, last = ends.get(kind, (-1 - learned, count * num_tokens))
    slots = torch.randint(first, last, (rows, length), generator=g).to(device)
    token_ids = torch.randint(VOCABULARY, (rows, length), generator=g).to(device)
    wanted = WEIGHTS if kind == "weights alone" else tuple(tensors)
    problem = Problem(tensors, wanted, token_ids, slots, num_tokens, normal(rows, length, hidden).to(device))
    if kind == "along":
        problem.upstream = 0.01 * problem.upstream + run(problem, "reference", torch.float64)["prompt"]
    problem.upstream = problem.upstream.to(dtypes[0])
    return problem


def run(problem: Problem, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The prompt and the gradients, with all tensors cast to ``dtype`` first if that is given. backend: of
    embed_prompt; or "plain", "terms", see `plain`."""
    from karma_kernels import embed_prompt

    tensors = {name: x.to(dtype or x.dtype, copy=True).requires_grad_(name in problem.wanted)
               for name, x in problem.tensors.items()}
    if backend in ("plain", "terms"):
        out = plain(**tensors, token_ids=problem.token_ids, slots=problem.slots, fixed=backend == "terms")
    else:
        out = embed_prompt(problem.token_ids, problem.slots, **tensors, num_tokens=problem.num_tokens,
                           token_norm=TOKEN_NORM, backend=backend)
    leaves = [tensors[name] for name in problem.wanted]
    grads = torch.autograd.grad(out, leaves, problem.upstream.to(out.dtype), allow_unused=True)
    return {"prompt": out.detach()} | {name: torch.zeros_like(x) if grad is None else grad
                                       for name, x, grad in zip(problem.wanted, leaves, grads, strict=True)}


def plain(vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, embedding_weight: Tensor,
          token_ids: Tensor, slots: Tensor, learned: Tensor | None = None, fixed: bool = False) -> Tensor:
    """The same in torch's own arithmetic in the dtype of the tensors. fixed: gradients take lengths for constants."""
    factor = torch.rsqrt(vectors.detach().square().mean(dim=1, keepdim=True) + 1e-6)
    x = vectors * factor * norm_weight if fixed else F.rms_norm(vectors, norm_weight.shape, norm_weight, 1e-6)
    z = F.linear(F.gelu(F.linear(x, w1, b1)), w2).view(-1, embedding_weight.shape[1])
    norm = z.norm(dim=1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    rows = [TOKEN_NORM * z / (norm.detach() if fixed else norm), embedding_weight]
    rows += [] if learned is None else [learned]
    at = torch.where(slots >= 0, slots, len(z) + token_ids)
    at = torch.where(slots < -1, len(z) + len(embedding_weight) - 2 - slots, at)
    return F.embedding(at, torch.cat(rows))


def expected(problem: Problem) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is right, in float64, and the largest |got - right| that is allowed, of each output."""
    dtype = problem.tensors["embedding_weight"].dtype
    true, terms = (run(problem, backend, torch.float64) for backend in ("reference", "terms"))
    rough, eps = run(problem, "plain", dtype), torch.finfo(dtype).eps
    return true, {name: 2 * (rough[name].double() - x).norm().item() + eps * x.norm().item()
                  + ROUNDINGS[dtype] * terms[name].norm().item() + 1e-30 for name, x in true.items()}


def combinations(rounds: int) -> Iterator[tuple[Shape, tuple[torch.dtype, torch.dtype], str]]:
    """Every pair of dtypes and kind once a round, each time with another shape."""
    kinds = list(itertools.product(DTYPES, KINDS))
    random.Random(0).shuffle(kinds)  # so that little time still sees all of both
    for at in range(rounds):
        for number, (dtypes, kind) in enumerate(kinds):
            yield SHAPES[(number + at * 2) % len(SHAPES)], dtypes, kind
