"""The learnable scale of inner products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ScaledLoss(nn.Module):
    """Has a scale s = ``exp(log_scale)``.

    Args:
        scale: first value of s.
        learnable: whether ``log_scale`` is trained; else it is a buffer.
        max_scale: limit for s. ``clamp_()`` applies it and belongs after each step of the optimiser: a clamp in the
            forward would leave a scale at the limit without a gradient.
    """

    def __init__(self, scale: float, learnable: bool, max_scale: float) -> None:
        super().__init__()
        if not 0 < scale <= max_scale < math.inf:
            raise ValueError(f"scale: got {scale} with max_scale {max_scale}; 0 < scale <= max_scale is needed")
        self.learnable, self.max_scale = learnable, max_scale
        log_scale = torch.tensor(math.log(scale))
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """s, one element, differentiable."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings s back to ``max_scale`` if a step took it above."""
        self.log_scale.clamp_(max=math.log(self.max_scale))
