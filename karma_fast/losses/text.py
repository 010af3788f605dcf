"""Cross-entropy of texts under a language model without ever holding the logits of all their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits of so many tokens at a time that these bytes suffice for them, in both precisions, and for their gradient
LOGITS_BYTES, BYTES_PER_LOGIT = 256 << 20, 16

Head = Callable[[Tensor], Tensor]  # (n, hidden) states -> (n, V) logits


def text_loss(head: Head, states: Tensor, labels: Tensor, weights: Tensor, vocabulary: int, *,
              frozen: bool = True) -> Tensor:
    """Sum over the texts of the mean loss of their tokens.

    Args:
        head: (n, hidden) -> (n, V) logits.
        states: (G, hidden) of the positions that predict a token of a text.
        labels: (G,) the tokens.
        weights: (G,) 1 / length of the text that each belongs to.
        vocabulary: V.
        frozen: whether no weight of ``head`` is trained. Gradients for the states are then formed with the loss, and
            no product is done twice.

    Returns:
        () float32. Source: Sun et al. 2026, arXiv 2603.22779, for the terms; the mean per text is ours.

    Example:
        >>> labels, weights = torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.5, 1.0])  # of two texts
        >>> text_loss(torch.nn.Linear(8, 4, bias=False), torch.zeros(3, 8), labels, weights, 4)  # twice log 4
        tensor(2.7726)
    """

    def loss_of(states: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return (token_losses(head, states, labels) * weights).sum()

    parts = []
    for x, *rest in _at_once(vocabulary, states, labels, weights):
        if frozen:
            parts.append(frozen_decoder_loss(x, lambda x, rest=rest: loss_of(x, *rest)))
        else:
            parts.append(checkpoint(loss_of, x, *rest, use_reentrant=False))
    return torch.stack(parts).sum() if parts else states.sum().float() * 0


@torch.no_grad()
def text_losses(head: Head, states: Tensor, labels: Tensor, weights: Tensor, rows: Tensor, num_texts: int,
                vocabulary: int) -> Tensor:
    """(num_texts,) float32: the mean token loss of each text, 0 for one without tokens; see `text_loss`.

    rows: (G,) the text that each token belongs to, 0..num_texts-1.
    """
    out = torch.zeros(num_texts, device=states.device)
    for x, label, weight, row in _at_once(vocabulary, states, labels, weights, rows):
        out.index_add_(0, row, token_losses(head, x, label) * weight)
    return out


def token_losses(head: Head, states: Tensor, labels: Tensor) -> Tensor:
    """(n, hidden), (n,) -> (n,) float32."""
    return F.cross_entropy(head(states).float(), labels, reduction="none")


def _at_once(vocabulary: int, *tensors: Tensor):
    """Rows of the tensors whose logits are formed together, part after part."""
    rows = max(1, LOGITS_BYTES // (BYTES_PER_LOGIT * vocabulary))
    return zip(*(x.split(rows) for x in tensors), strict=True) if len(tensors[0]) else ()


class _GradientAtOnce(torch.autograd.Function):
    """A loss of its inputs under frozen weights, whose gradient is made in the forward.

    A decoder that is the trained model with its adapters off cannot wait for the backward: a checkpointed layer would
    be recomputed with the adapters on, and a backward inside the toggle would lose the adapters' own gradients.
    """

    @staticmethod
    def forward(ctx, x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            loss = loss_of(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient).to(gradient.dtype), None


def frozen_decoder_loss(x: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """``loss_of(x)`` with a gradient for ``x`` only, complete when this returns.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> weight = torch.ones(2, requires_grad=True)
        >>> (3 * frozen_decoder_loss(x, lambda x: (weight * x * x).sum())).backward()
        >>> x.grad, weight.grad
        (tensor([6., 6.]), None)
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _GradientAtOnce.apply(x, loss_of)
    return loss_of(x).detach()
