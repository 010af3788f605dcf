"""Cross-entropy of a text under the language model, per text, from the positions that predict it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def text_losses(logits: Tensor, labels: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean token loss of each text.

    Args:
        logits: (G, V) of the positions that predict a token of a text.
        labels: (G,) the tokens.
        rows: (G,) the text each belongs to, 0..num_rows-1.

    Returns:
        (num_rows,) float32; 0 for a text without tokens. Source: Sun et al. 2026, arXiv 2603.22779, for the terms; the
        mean per text is ours.

    Example:
        >>> text_losses(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 3)  # log 4
        tensor([1.3863, 1.3863, 0.0000])
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    lengths = torch.bincount(rows, minlength=num_rows).clamp_min(1)
    return losses.new_zeros(num_rows).index_add(0, rows, losses) / lengths


class _ThroughSoftTokens(torch.autograd.Function):
    """A loss of soft tokens under a frozen decoder whose gradient is made in the forward.

    A decoder that is the trained model with its adapters off cannot wait for the backward: a checkpointed layer would
    be recomputed with the adapters on, and a backward inside the toggle would lose the adapters' own gradients.
    """

    @staticmethod
    def forward(ctx, soft: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = soft.detach().requires_grad_()
            loss = loss_of(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(gradient.dtype), None


def frozen_decoder_loss(soft: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``loss_of(soft)`` with a gradient for ``soft`` only, complete when this returns.

    Example:
        >>> soft = torch.ones(2, requires_grad=True)
        >>> weight = torch.ones(2, requires_grad=True)
        >>> (3 * frozen_decoder_loss(soft, lambda s: (weight * s * s).sum())).backward()
        >>> soft.grad, weight.grad
        (tensor([6., 6.]), None)
    """
    if torch.is_grad_enabled() and soft.requires_grad:
        return _ThroughSoftTokens.apply(soft, loss_of)
    return loss_of(soft).detach()
