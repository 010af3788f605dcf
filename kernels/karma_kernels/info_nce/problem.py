"""What every implementation is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import compute_dtype


@dataclass(frozen=True)
class Problem:
    """Checked inputs of :func:`karma_kernels.info_nce`; ``labels`` (B,) int64, ``scale`` has no dimensions."""

    query: Tensor  # (B, D)
    key: Tensor  # (N, D)
    labels: Tensor  # (B,), within range
    scale: Tensor  # (), compute dtype
    query_ids: Tensor | None  # (B,) or (B, 2), given whenever key_ids is
    key_ids: Tensor | None  # (N,) or (N, 2)
    log_q: Tensor | None  # (N,)
    symmetric: bool
    normalize: bool
    valid: Tensor  # (), bool: labels within range, and distinct if symmetric; scale and log_q finite
    workspace_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Of losses, statistics and gradient accumulators."""
        return compute_dtype(self.query.dtype)

    @property
    def plain(self) -> bool:
        """Neither ids nor log_q, one direction: kernels need far fewer registers."""
        return self.key_ids is None and self.log_q is None and not self.symmetric

    def by_key(self, values: Tensor, other: float) -> Tensor:
        """(B,) values of the positives -> (N,), ``other`` for keys that are nobody's positive."""
        return values.new_full((self.key.shape[0],), other).scatter_(0, self.labels, values)

    @property
    def direction_weight(self) -> float:
        return 0.5 if self.symmetric else 1.0


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    query: bool
    key: bool
    scale: bool
    log_q: bool

    @property
    def any(self) -> bool:
        return self.query or self.key or self.scale or self.log_q

    # the gradient of the scale is sum <x, dL/dx> / s of either side: free where that side's gradient is wanted anyway
    @property
    def over_query(self) -> bool:
        return self.query or (self.scale and not self.key)

    @property
    def over_key(self) -> bool:
        return self.key or self.log_q


@dataclass
class Gradients:
    """In compute dtype; None where not wanted."""

    query: Tensor | None = None  # (B, D)
    key: Tensor | None = None  # (N, D)
    scale: Tensor | None = None  # ()
    log_q: Tensor | None = None  # (N,)


@dataclass(frozen=True)
class Statistics:
    """One direction's softmax with the positive kept apart: what the backward needs.

    With z the logits, y the positive and j the other candidates: ``top = max(z_y, max_j z_j)``, exactly one of the
    logits, ``rest = sum_j exp(z_j - top)``, ``norm = rest + exp(z_y - top)``. Then ``p_j = exp(z_j - top) / norm``,
    ``p_y - 1 = -rest / norm`` without cancellation, and norm lies in [1, C].
    """

    top: Tensor  # (R,)
    rest: Tensor  # (R,)
    norm: Tensor  # (R,)
    loss: Tensor  # (R,)

    @staticmethod
    def of(positive: Tensor, top: Tensor, rest: Tensor) -> Statistics:
        below = positive - top
        return Statistics(top, rest, rest + torch.exp(below), torch.log1p(rest + torch.expm1(below)) - below)

    def stacked(self) -> Tensor:
        """(3, R), all that a backward needs."""
        return torch.stack([self.top, self.rest, self.norm])


def kinds(ids: Tensor) -> tuple[Tensor, ...]:
    """(R,) ids, or (R, 2) of two kinds -> those of each kind, (R,)."""
    return ids.unbind(1) if ids.ndim > 1 else (ids,)


def pieces(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
