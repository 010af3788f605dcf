"""Cross-entropy of a text under the language model, per text, from the positions that predict it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def text_cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor, num_texts: float) -> Tensor:
    """Mean over texts of the mean token loss of each.

    Args:
        logits: (G, V) of the positions that predict a token of a text.
        labels: (G,) the tokens.
        rows: (G,) the text each belongs to, counted from 0.
        num_texts: what the sum is divided by. It counts empty texts too (or is their expected number), so that the
            loss is a plain sum over a batch and does not depend on how the batch is cut into parts.

    Returns:
        () float32. Source: Sun et al. 2026, arXiv 2603.22779, for the terms; averaging per text is ours.

    Example:
        >>> logits = torch.zeros(3, 4)
        >>> text_cross_entropy(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2).item()  # log 4
        1.3862943649291992
    """
    if labels.numel() == 0:
        return logits.sum() * 0.0
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return (losses / torch.bincount(rows)[rows]).sum() / num_texts


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
