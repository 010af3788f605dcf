"""The module that turns item vectors into soft tokens of a language model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from karma_kernels import embed_prompt, soft_prompt


class SoftPromptProjection(nn.Module):
    """RMSNorm -> Linear with bias -> GELU -> Linear without bias -> tokens of one fixed length.

    Args:
        in_features: width of an item's vector.
        hidden_size: width of the language model.
        num_tokens: soft tokens made from one vector.
        mid_features: width between the two linear layers; default: ``in_features``.
        token_norm: length of each soft token. It should be the usual length of the model's token embeddings:
            ``projection.token_norm.fill_(embedding.weight.norm(dim=-1).mean())``. Saved with the weights.

    Called with vectors (R, in_features) of any floating dtype; gives (R, num_tokens, hidden_size) in the dtype of the
    weights.

    Example:
        >>> projection = SoftPromptProjection(in_features=4, hidden_size=8, num_tokens=2, token_norm=3.0)
        >>> projection(torch.randn(5, 4)).shape
        torch.Size([5, 2, 8])
        >>> token_ids = torch.tensor([[1, 0, 0, 2]])
        >>> slots = torch.tensor([[-1, 6, 7, -1]])  # both tokens of vector 3
        >>> projection.insert(token_ids, slots, torch.randn(5, 4), torch.randn(10, 8)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, in_features: int, hidden_size: int, num_tokens: int = 1, *, mid_features: int | None = None,
                 token_norm: float = 1.0) -> None:
        super().__init__()
        mid_features = in_features if mid_features is None else mid_features
        for name, value in (("in_features", in_features), ("hidden_size", hidden_size), ("num_tokens", num_tokens),
                            ("mid_features", mid_features)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; at least 1 is needed")
        if not 0 < token_norm < math.inf:
            raise ValueError(f"token_norm: got {token_norm}; a positive number is needed")
        self.in_features, self.hidden_size, self.num_tokens = in_features, hidden_size, num_tokens
        self.mid_features = mid_features
        self.norm = nn.RMSNorm(in_features, eps=1e-6)
        self.up = nn.Linear(in_features, mid_features)
        self.down = nn.Linear(mid_features, num_tokens * hidden_size, bias=False)
        self.register_buffer("token_norm", torch.tensor(float(token_norm)))

    def forward(self, vectors: Tensor) -> Tensor:
        if vectors.ndim != 2 or vectors.shape[1] != self.in_features:
            raise ValueError(f"vectors: got shape {tuple(vectors.shape)}; (rows, {self.in_features}) is needed")
        return soft_prompt(vectors, *self._weights(), num_tokens=self.num_tokens, token_norm=self.token_norm,
                           eps=self.norm.eps)

    def insert(self, token_ids: Tensor, slots: Tensor, vectors: Tensor, embedding_weight: Tensor,
               learned: Tensor | None = None) -> Tensor:
        """Embeds a prompt whose tokens are partly items.

        Args:
            token_ids: (B, T) integers; read only where slots is -1.
            slots: (B, T) integers: ``row * num_tokens + k`` for token k of ``vectors[row]``, -1 for a token of text,
                -2 - e for row e of ``learned``.
            vectors: (R, in_features); one row may stand in several places.
            embedding_weight: (V, hidden_size) token embeddings of the model.
            learned: (E, hidden_size) tokens that are trained themselves.

        Returns:
            (B, T, hidden_size), the ``inputs_embeds`` of the model, in the dtype of ``embedding_weight``. Nothing of
            the size of the soft tokens is kept for the backward, see :func:`karma_kernels.embed_prompt`.

        Raises:
            IndexError: on a CPU, a slot or token id that does not exist; on other devices such a row becomes NaN.
        """
        return embed_prompt(token_ids, slots, vectors, *self._weights(), embedding_weight, learned=learned,
                            num_tokens=self.num_tokens, token_norm=self.token_norm, eps=self.norm.eps)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.norm.weight, self.up.weight, self.up.bias, self.down.weight

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, hidden_size={self.hidden_size}, num_tokens={self.num_tokens}, "
                f"mid_features={self.mid_features}, token_norm={self.token_norm.item():.4g}")
