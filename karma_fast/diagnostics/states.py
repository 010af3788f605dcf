"""The language model's states of token sequences, with or without its adapters, and its original for comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.packing import TEXT, Packed
from ..model.backbone import adapters_off, causal_lm, load_backbone
from ..model.reading import decoder_states

if TYPE_CHECKING:
    from ..model.karma import KarmaModel
    from .plain import PlainModel


@torch.no_grad()
def text_states(backbone: nn.Module, rows: Sequence[list[int]], batch_tokens: int = 4096
                ) -> Iterator[tuple[np.ndarray, Packed, Tensor]]:
    """(places in rows, their tokens, (N, hidden) states), batch after batch; sequences without tokens are left out."""
    model = causal_lm(backbone)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    training = backbone.training
    backbone.eval()
    while len(order):
        # no more than batch_tokens sequences can fit
        size = max(1, int((np.cumsum(lengths[order[:batch_tokens]]) <= batch_tokens).sum()))
        part, order = order[:size], order[size:]
        ids = np.fromiter((i for place in part for i in rows[place]), np.int64, int(lengths[part].sum()))
        tokens = Packed.of(lengths[part], ids, np.full(len(ids), TEXT)).to(model.device)
        table = model.get_input_embeddings().weight
        yield part, tokens, decoder_states(backbone, F.embedding(tokens.token_ids, table), tokens)
    backbone.train(training)


class Untuned:
    """The language model as it was before tuning, around the same projections."""

    def __init__(self, model: KarmaModel | PlainModel) -> None:
        """Raises ValueError with the reason if the untuned language model cannot be had."""
        self.model, self.original = model, None
        if hasattr(model.backbone, "disable_adapter"):
            self.how = "adapters off"
        elif getattr(model.config, "tuning", "frozen") != "full":
            self.how = "the language model was not tuned, so it is its own untuned form"
        elif getattr(model, "base", model.config.backbone) is None:
            raise ValueError("the language model before tuning is not known; name it with base (--base)")
        else:
            self.how = "original weights of the language model"
            config = model.config if not hasattr(model, "base") else model.base_config()
            self.original = load_backbone(config, model.device)[0].requires_grad_(False).eval()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Every use of the model within the `with` block is of its untuned language model."""
        if self.original is None:
            with adapters_off(self.model.backbone):
                yield
            return
        tuned, self.model.backbone = self.model.backbone, self.original
        try:
            yield
        finally:
            self.model.backbone = tuned
