"""The backends of info_nce against float64, with every combination of flags; a part of ``benchmarks.check``.

The losses and all gradients are compared with the dense float64 computation. An error may be twice that of the same
dense computation in the dtype of the inputs, plus rounding.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .implementations import dense_loss

FLAGS = ("labels", "ids", "log_q", "symmetric", "normalize")
SHAPES = ((1, 1, 16), (5, 3, 8), (33, 47, 64), (127, 300, 65), (64, 64, 128), (256, 256, 256), (257, 1000, 513),
          (40, 4099, 768), (1030, 1030, 96), (70, 133, 2048),
          (2100, 150, 40))  # the last: whole rows of scores, and more of them than fit at once
REDUCTIONS = ("none", "mean", "sum")
WORKSPACES = (1 << 16, 1 << 20, 64 << 20)  # bytes; the small ones make many pieces of these small shapes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Problem:
    """One draw; ``upstream`` is the gradient that reaches the loss, (B,) for reduction "none" and else one number."""

    tensors: dict[str, Tensor]  # query, key, scale and maybe log_q
    fixed: dict[str, Tensor | bool | None]
    reduction: str
    upstream: Tensor


def draw(shape: tuple[int, int, int], dtype: torch.dtype, flags: frozenset[str], seed: int, device: str) -> Problem:
    rows, keys, width = shape
    g = torch.Generator().manual_seed(seed)
    keys = max(keys, rows) if "labels" not in flags or "symmetric" in flags else keys
    length = 5.0 if "normalize" in flags else width**-0.5
    query, key = (torch.randn(n, width, generator=g) * length for n in (rows, keys))
    key += 0.5 * length * torch.randn(width, generator=g)  # all of them point somewhat the same way
    distinct = torch.randperm(keys, generator=g)[:rows]
    labels = None
    if "labels" in flags:
        labels = distinct if "symmetric" in flags else torch.randint(keys, (rows,), generator=g)
    query += key[torch.arange(rows) if labels is None else labels] * 0.7
    tensors = {"query": query.to(dtype), "key": key.to(dtype), "scale": 4 + 8 * torch.rand((), generator=g)}
    if "log_q" in flags:
        tensors["log_q"] = torch.rand(keys, generator=g) * 6 - 9
    chance = random.Random(seed)
    reduction, kinds = chance.choice(REDUCTIONS), chance.choice(((), (2,)))  # one id of a key, or two
    ids = torch.randint(max(2, keys // 3), (keys, *kinds), generator=g)
    fixed = {"labels": labels, "key_ids": ids if "ids" in flags else None, "symmetric": "symmetric" in flags,
             "normalize": "normalize" in flags}
    return Problem({k: x.to(device) for k, x in tensors.items()},
                   {k: x.to(device) if isinstance(x, Tensor) else x for k, x in fixed.items()}, reduction,
                   torch.randn((rows,) if reduction == "none" else (), generator=g).to(device))


def run(problem: Problem, loss: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss and all gradients, with the inputs cast to ``dtype`` first if that is given."""
    tensors = {k: x.to(dtype or x.dtype, copy=True).requires_grad_() for k, x in problem.tensors.items()}
    out = loss(**tensors, **problem.fixed, reduction=problem.reduction)
    out.backward(problem.upstream.to(out.dtype))
    return {"loss": out.detach()} | {k: x.grad for k, x in tensors.items()}


def allowed(problem: Problem, true: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, float]:
    """Largest |got - true| of each output: twice the error of plain torch, one rounding of the result to the dtype of
    the inputs, and a few float32 roundings of the terms that it is summed from."""
    query, key, scale = (problem.tensors[x].double() for x in ("query", "key", "scale"))
    if problem.fixed["normalize"]:
        shrink = {"query": query.norm(dim=1).min().item(), "key": key.norm(dim=1).min().item()}
        query, key = torch.nn.functional.normalize(query), torch.nn.functional.normalize(key)
    else:
        shrink = {"query": 1.0, "key": 1.0}
    score, s, rows = (query @ key.T).abs().max().item(), scale.item(), len(query)
    reduced = {"none": 1.0, "sum": rows**0.5, "mean": rows**-0.5}[problem.reduction]  # norm of the weights of the rows
    weight = problem.upstream.double().norm().item() * reduced
    longest = {"query": key.norm(dim=1).max().item(), "key": query.norm(dim=1).max().item()}
    terms = {"loss": s * score * reduced * rows**0.5, "scale": weight * score, "log_q": weight}
    terms |= {name: weight * s * longest[name] / shrink[name] for name in longest}
    eps, eps32 = torch.finfo(problem.tensors["query"].dtype).eps, torch.finfo(torch.float32).eps
    # one number that is the sum over all rows may be near zero by chance, for plain torch and for us
    size = {name: terms["scale"] if name == "scale" else x.norm().item() for name, x in true.items()}
    return {name: 2 * (plain[name].double() - x).norm().item() + eps * size[name] + 8 * eps32 * terms[name]
            for name, x in true.items()}


def expected(problem: Problem) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is right, in float64, and the largest |got - right| that is allowed, of each output."""
    true = run(problem, dense_loss, torch.float64)
    return true, allowed(problem, true, run(problem, dense_loss))


def combinations(rounds: int) -> Iterator[tuple[tuple[int, int, int], torch.dtype, frozenset[str]]]:
    """Every dtype and set of flags once a round, each time with another shape."""
    kinds = [(dtype, frozenset(f for f, on in zip(FLAGS, bits, strict=True) if on))
             for bits in itertools.product((False, True), repeat=len(FLAGS)) for dtype in DTYPES]
    random.Random(0).shuffle(kinds)  # so that little time still sees each of them
    for at in range(rounds):
        for number, (dtype, flags) in enumerate(kinds):
            yield SHAPES[(number * 7 + at * 3) % len(SHAPES)], dtype, flags
