"""What a prompt's positions look at: the mean attention map of one request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..model.backbone import causal_lm

if TYPE_CHECKING:
    from ..model.recommender import Recommender


class NoAttention(ValueError):
    """The language model has no attention layer that can report its weights."""


def attention_map(model: Recommender, history: np.ndarray, query: str = "") -> tuple[list[str], np.ndarray]:
    """Mean attention over the heads and layers of the language model for one request, as serving reads it.

    Args:
        model: its attention may be of any kind; this one prompt is computed eagerly, as only that keeps the weights.
        history: (H,) catalogue indices, oldest first; the last ``model.config.max_history`` count. May be empty.
        query: the request's text, "" for none.

    Returns:
        T labels (tokens of the instruction and the query, titles of the items, "[EMB]"), and (T, T) float32: row =
        where the model stands, column = what it looks at. Rows sum to 1, up to the rounding of the model's dtype.

    Raises:
        NoAttention: the language model has no attention layer that can report its weights.

    What the served embedding looks at is the last row: ``dict(zip(labels, weights[-1]))``.
    """
    layers: list[torch.Tensor] = []
    with recorded(causal_lm(model.backbone), lambda layer: layers.append(layer.float().mean(dim=0).cpu())):
        model.encode_users([history], [query])
    if not layers:
        name = type(causal_lm(model.backbone)).__name__
        raise NoAttention(f"{name}: none of its layers reports attention weights, so there is no map; use a backbone "
                          "with softmax attention")
    return model.prompts.labels(history, query, model.items), torch.stack(layers).mean(dim=0).numpy()


@contextlib.contextmanager
def recorded(model, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands every layer's (heads, T, T) weights of the first prompt of each pass to ``receive``."""

    def ask(module, args, kwargs):
        return args, kwargs | {"output_attentions": True}

    def collect(module, args, output):
        for layer in getattr(output, "attentions", None) or ():  # Mamba's output has no such field
            if layer is not None and layer.ndim == 4:  # None without softmax attention; RWKV has states there
                receive(layer[0])

    core = model.base_model
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_attention(model))
        stack.callback(core.register_forward_pre_hook(ask, with_kwargs=True).remove)
        stack.callback(core.register_forward_hook(collect).remove)
        yield


@contextlib.contextmanager
def eager_attention(model):
    """Attention written out, for the time of a `with` block."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
