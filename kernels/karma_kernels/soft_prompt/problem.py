"""What the implementations with bounded memory are given, and all that they have in common.

With G_rk the sum of the output's gradient over the places of token k of vector r, and z its projection, the gradient
for z is ``token_norm / |z| (G - z (z . G) / |z|^2)``. z is formed again, some rows at a time, so nothing of its size
is kept. The other way, from G W_2 and the (mid, mid) matrix W_2^T W_2, needs no z, but where G points along z its
gradient of W_2 loses all digits in bfloat16, and it has 2 to 9 times the error in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..info_nce.problem import pieces
from ..numerics import add_product, compute_dtype, product

WORKSPACE_BYTES = 64 << 20  # of temporary memory, besides a (R, mid) copy and copies of the weights in another dtype


@dataclass(frozen=True)
class Problem:
    """Checked inputs of :func:`karma_kernels.embed_prompt`, positions in one dimension."""

    token_ids: Tensor  # (N,)
    slots: Tensor  # (N,)
    vectors: Tensor  # (R, in)
    norm_weight: Tensor  # (in,)
    w1: Tensor  # (mid, in)
    b1: Tensor  # (mid,)
    w2: Tensor  # (num_tokens * hidden, mid)
    table: Tensor  # (V, hidden)
    learned: Tensor | None  # (E, hidden)
    token_norm: Tensor  # ()
    num_tokens: int
    eps: float
    products: torch.dtype  # of the factors of matrix products, which are added in `dtype`

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the factors of products."""
        return compute_dtype(self.table.dtype)

    @property
    def hidden(self) -> int:
        return self.table.shape[1]

    @property
    def num_soft(self) -> int:
        return self.vectors.shape[0] * self.num_tokens

    @property
    def num_learned(self) -> int:
        return 0 if self.learned is None else self.learned.shape[0]

    @property
    def text_rows(self) -> Tensor:
        """(N,) row of the table that stands at each place; V where none does."""
        count = self.table.shape[0]
        real = (self.slots == -1) & (self.token_ids >= 0) & (self.token_ids < count)
        return torch.where(real, self.token_ids, count)

    @cached_property
    def first_weight(self) -> Tensor:
        return self.w1.to(self.products)

    @cached_property
    def second_weight(self) -> Tensor:
        return self.w2.to(self.products).contiguous()

    def rows(self) -> Iterator[slice]:
        """Of the vectors, as many at a time as the workspace holds with all that is made of them."""
        per_row = 4 * self.w2.shape[0] + 6 * self.w2.shape[1] + 5 * self.vectors.shape[1]
        return pieces(0, self.vectors.shape[0], max(1, WORKSPACE_BYTES // (per_row * self.dtype.itemsize)))

    def unit(self, r: slice) -> tuple[Tensor, Tensor]:
        """(n, in) vectors of mean square 1, and (n, 1) what they were multiplied with."""
        x = self.vectors[r].to(self.dtype)
        factor = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return x * factor, factor

    def before_gelu(self, r: slice) -> Tensor:
        """(n, mid)."""
        x = (self.unit(r)[0] * self.norm_weight.to(self.dtype)).to(self.products)
        return product(x, self.first_weight.T, self.dtype).add_(self.b1.to(self.dtype))

    def after_gelu(self, before: Tensor) -> Tensor:
        return F.gelu(before).to(self.products)

    def project(self, after: Tensor) -> Tensor:
        """(n, mid) -> (n * num_tokens, hidden), not yet of the right length."""
        return product(after, self.second_weight.T, self.dtype).view(-1, self.hidden)


@dataclass
class Gradients:
    """In the order of the inputs; None where not wanted."""

    vectors: Tensor | None = None
    norm_weight: Tensor | None = None
    w1: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    table: Tensor | None = None
    learned: Tensor | None = None

    def all(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]


NAMES = tuple(f.name for f in fields(Gradients))


def by_row(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N,) row of each place -> places in the order of their rows, and (count + 1,) where those of each row begin."""
    ordered, order = rows.int().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, dtype=torch.int32, device=rows.device),
                                out_int32=True)
    return order, starts


def backward(x: Problem, before: Tensor, wanted: frozenset[str],
             through_norm: Callable[[slice, Tensor], Tensor]) -> Gradients:
    """(R, mid) numbers before GELU -> gradients in compute dtype, all but those of ``table`` and ``learned``.

    ``through_norm``: gives for rows of the vectors and their z (n * num_tokens, hidden) the gradient for z, (n,
    num_tokens * hidden) in the dtype of products.
    """
    out = Gradients()
    for name in wanted - {"table", "learned"}:
        like = getattr(x, name)
        dtype = like.dtype if name == "vectors" else x.dtype
        setattr(out, name, torch.zeros(like.shape, dtype=dtype, device=like.device))
    inner = wanted & {"vectors", "norm_weight", "w1", "b1"}
    for r in x.rows() if inner or "w2" in wanted else ():
        after = x.after_gelu(before[r])
        grad_z = through_norm(r, x.project(after))
        if out.w2 is not None:
            add_product(out.w2, grad_z.T, after)
        if inner:
            through_inner(x, r, before[r], product(grad_z, x.second_weight, x.dtype), out)
    return out


def through_inner(x: Problem, r: slice, before: Tensor, grad: Tensor, out: Gradients) -> None:
    """Adds what the (n, mid) gradient for the output of GELU means for RMSNorm and the first layer."""
    grad = torch.ops.aten.gelu_backward(grad, before)
    if out.b1 is not None:
        out.b1 += grad.sum(0)
    if out.w1 is None and out.norm_weight is None and out.vectors is None:
        return
    grad, (unit, factor), norm_weight = grad.to(x.products), x.unit(r), x.norm_weight.to(x.dtype)
    if out.w1 is not None:
        add_product(out.w1, grad.T, (unit * norm_weight).to(x.products))
    if out.norm_weight is None and out.vectors is None:
        return
    grad_x = product(grad, x.first_weight, x.dtype)
    if out.norm_weight is not None:
        out.norm_weight += (grad_x * unit).sum(0)
    if out.vectors is not None:
        grad_x *= norm_weight
        along = (grad_x * unit).mean(dim=-1, keepdim=True)
        out.vectors[r] = grad_x.addcmul_(unit, along, value=-1).mul_(factor)
