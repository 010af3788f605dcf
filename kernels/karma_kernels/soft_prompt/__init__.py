"""Vectors -> soft tokens of a language model, and their place in a prompt: checks and choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..info_nce import transformed
from ..numerics import compute_dtype
from . import op
from .checks import check_backend, check_floats, check_places, check_projection, check_values
from .reference import insert_rows, soft_prompt_rows
from .routing import route

__all__ = ["embed_prompt", "insert_soft_tokens", "soft_prompt"]


def soft_prompt(vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *, num_tokens: int = 1,
                token_norm: float | Tensor = 1.0, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    r"""Projects item vectors into the input space of a language model.

    .. math:: z = W_2 \, \mathrm{GELU}(W_1 \, \mathrm{RMSNorm}(v) + b_1), \qquad
              x_k = \mathrm{token\_norm} \cdot z_k / |z_k|

    The first linear layer has a bias. The second has none: its output is rescaled to a fixed length, and a bias would
    pull all items towards one direction. GELU is the exact one (erf).

    Args:
        vectors: (R, in), any floating dtype.
        norm_weight: (in,), weight of the RMSNorm.
        w1, b1: (mid, in) and (mid,).
        w2: (num_tokens * hidden, mid). The four weights have one dtype: float64, float32, float16 or bfloat16.
        num_tokens: soft tokens made from one vector.
        token_norm: length of each of them, a number or a tensor with one element.
        eps: added to the mean square in the RMSNorm.
        backend: as for :func:`embed_prompt`, with ``w2`` in the place of the token embeddings.

    Returns:
        (R, num_tokens, hidden), dtype of ``w2``; half precision is computed in float32, under autocast too, but for
        "fused", which rounds the factors of matrix products to bfloat16 where ``w2`` is. A token whose z is exactly 0
        stays 0 and gets no gradient.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or options. RuntimeError: as in
            :func:`embed_prompt`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tokens = soft_prompt(torch.randn(3, 4), torch.ones(4), torch.randn(8, 4), torch.zeros(8),
        ...                      torch.randn(2 * 16, 8), num_tokens=2, token_norm=5.0)
        >>> tokens.shape, tokens.norm(dim=-1)[0]
        (torch.Size([3, 2, 16]), tensor([5., 5.]))
    """
    check_projection(vectors, norm_weight, w1, b1, w2, num_tokens, token_norm)
    rows, hidden = vectors.shape[0], w2.shape[0] // num_tokens
    table = w2.new_empty(1, hidden)  # only its type and width count
    backend = chosen(backend, table, rows * num_tokens, token_norm, vectors, norm_weight, w1, b1, w2)
    with torch.autocast(vectors.device.type, enabled=False):
        if backend == "reference":
            return soft_prompt_rows(vectors, norm_weight, w1, b1, w2, num_tokens, scalar(token_norm), eps)
        # the first token of every vector, then the second, ...: tokens side by side read the same part of w2
        slots = torch.arange(rows * num_tokens, device=vectors.device).view(rows, num_tokens).T.reshape(1, -1)
        out, _ = op.embed_prompt_op(slots, slots, vectors, norm_weight, w1, b1, w2, table, None,
                                    on_device(token_norm, table), num_tokens, eps, backend)
    return out.view(num_tokens, rows, hidden).transpose(0, 1)


def insert_soft_tokens(token_ids: Tensor, slots: Tensor, soft: Tensor, embedding_weight: Tensor, *,
                       learned: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Writes soft tokens and token embeddings into one prompt.

    Args:
        token_ids: (B, T) integers, rows of ``embedding_weight``; read only where slots is -1.
        slots: (B, T) integers: row of the soft token that stands there (``r * num_tokens + k`` for token k of vector
            r), -1 for the token embedding, -2 - e for row e of ``learned``. A row may stand in several places; its
            gradients add up.
        soft: (R, num_tokens, hidden) or (S, hidden).
        embedding_weight: (V, hidden), the token embeddings of the model. Gets a gradient only if it requires one.
        learned: (E, hidden), tokens of a prompt that are trained themselves.
        backend: "auto" or "reference"; :func:`embed_prompt` has faster ones, as it makes the soft tokens itself.

    Returns:
        (B, T, hidden) in the dtype of ``embedding_weight``. Same inputs, same bits, for gradients too; on a GPU torch
        adds those of a row in several places in a fixed order only after ``torch.use_deterministic_algorithms(True)``.

    Raises:
        IndexError: on a CPU, a slot or a token id that does not exist. On other devices that row becomes NaN, so that
            nothing has to wait for a check. TypeError, ValueError: wrong dtypes, shapes or devices.

    Example:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> soft = torch.tensor([[[5.0, 6.0]]])
        >>> insert_soft_tokens(torch.tensor([[1, 0, 0]]), torch.tensor([[-1, 0, -1]]), soft, table)
        tensor([[[1., 1.],
                 [5., 6.],
                 [0., 0.]]])
    """
    check_floats(embedding_weight=embedding_weight, soft=soft)
    if soft.ndim not in (2, 3):
        raise ValueError(f"soft: got shape {tuple(soft.shape)}; (rows, num_tokens, hidden) or (rows, hidden) is "
                         "needed")
    check_places(token_ids, slots, soft.shape[-1], embedding_weight, learned)
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: got {backend!r}; there is only 'reference' (and 'auto', which takes it); see "
                         "embed_prompt for others")
    soft = soft.flatten(0, -2)
    token_ids, slots = token_ids.long(), slots.long()
    check_values(token_ids, slots, soft.shape[0], 0 if learned is None else learned.shape[0],
                 embedding_weight.shape[0])
    return insert_rows(token_ids, slots, soft, embedding_weight, learned)


def embed_prompt(token_ids: Tensor, slots: Tensor, vectors: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor,
                 w2: Tensor, embedding_weight: Tensor, *, learned: Tensor | None = None, num_tokens: int = 1,
                 token_norm: float | Tensor = 1.0, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """:func:`soft_prompt` and :func:`insert_soft_tokens` in one.

    Memory beyond inputs, output and gradients: (R, mid) numbers kept for the backward, copies of the weights in the
    dtype of products, and 64 MiB; "reference" keeps the soft tokens several times.

    Args:
        token_ids: (B, T) integers, rows of ``embedding_weight``; read only where slots is -1.
        slots: (B, T) integers: ``r * num_tokens + k`` for token k of vector r, -1 for the token embedding, -2 - e for
            row e of ``learned``. A row may stand in several places or in none.
        vectors, norm_weight, w1, b1, w2: (R, in), (in,), (mid, in), (mid,), (num_tokens * hidden, mid), see
            :func:`soft_prompt`. The weights may have another dtype than the token embeddings.
        embedding_weight: (V, hidden), the token embeddings of the model. Gets a gradient only if it requires one.
        learned: (E, hidden), tokens of a prompt that are trained themselves, any floating dtype.
        num_tokens, token_norm, eps: see :func:`soft_prompt`. ``token_norm`` gets a gradient from "reference" alone.
        backend: "reference" is the definition, keeps what it computes and alone has second derivatives and
            forward-mode ones. "chunked" works on some rows at a time. "fused" are Triton kernels for CUDA devices;
            with bfloat16 token embeddings the factors of matrix products are rounded to bfloat16, as autocast does,
            and all else is float32. "auto" takes the fastest.

    Returns:
        (B, T, hidden) in the dtype of ``embedding_weight``. Same inputs, same bits, for gradients too, but for those
        of "reference" on a GPU, see :func:`insert_soft_tokens`.

    Raises:
        IndexError: on a CPU, a slot or a token id that does not exist. On other devices, and in a compiled function,
            that row becomes NaN, so that nothing has to wait for a check. TypeError: wrong dtypes. ValueError: wrong
            shapes, devices or options. RuntimeError: "fused" without a CUDA device or without Triton; derivatives
            that only "reference" has.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weights = torch.ones(4), torch.randn(8, 4), torch.zeros(8), torch.randn(2, 8)
        >>> table, learned = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> out = embed_prompt(torch.tensor([[1, 0, 0]]), torch.tensor([[-1, 2, -2]]), torch.randn(3, 4), *weights,
        ...                    table, learned=learned, token_norm=5.0)
        >>> out[0, 0], out[0, 1].norm(), out[0, 2]
        (tensor([1., 1.]), tensor(5.), tensor([0.5000, 0.5000]))
    """
    check_projection(vectors, norm_weight, w1, b1, w2, num_tokens, token_norm)
    check_places(token_ids, slots, w2.shape[0] // num_tokens, embedding_weight, learned)
    if vectors.device != slots.device:
        raise ValueError(f"vectors are on {vectors.device} and slots on {slots.device}; move one of them")
    num_soft = vectors.shape[0] * num_tokens
    backend = chosen(backend, embedding_weight, num_soft, token_norm, vectors, norm_weight, w1, b1, w2,
                     embedding_weight, learned)
    check_values(token_ids, slots, num_soft, 0 if learned is None else learned.shape[0],
                 embedding_weight.shape[0])
    with torch.autocast(vectors.device.type, enabled=False):
        if backend == "reference":
            soft = soft_prompt_rows(vectors, norm_weight, w1, b1, w2, num_tokens, scalar(token_norm), eps)
            return insert_rows(token_ids.long(), slots.long(), soft.flatten(0, 1), embedding_weight, learned)
        return op.embed_prompt_op(token_ids, slots, vectors, norm_weight, w1, b1, w2, embedding_weight, learned,
                                  on_device(token_norm, embedding_weight), num_tokens, eps, backend)[0]


def chosen(backend: str, table: Tensor, num_soft: int, token_norm: float | Tensor, *tensors: Tensor | None) -> str:
    """The implementation to take, "auto" resolved."""
    check_backend(backend, table, token_norm)
    if transformed(*tensors, token_norm):
        if backend not in ("auto", "reference"):
            raise RuntimeError(f"backend {backend!r} has no forward-mode derivatives and does not run under "
                               "torch.func's transforms; take backend='reference' or 'auto'")
        return "reference"
    if backend != "auto":
        return backend
    if isinstance(token_norm, Tensor) and token_norm.requires_grad:
        return "reference"
    return route(table.dtype, num_soft, table.shape[1], table.device)


def scalar(token_norm: float | Tensor) -> float | Tensor:
    return token_norm.reshape(()) if isinstance(token_norm, Tensor) else token_norm


def on_device(token_norm: float | Tensor, table: Tensor) -> Tensor:
    """Filled there: no copy that a CUDA graph could not capture."""
    if isinstance(token_norm, Tensor):
        return token_norm.detach().reshape(())
    return torch.full((), float(token_norm), dtype=compute_dtype(table.dtype), device=table.device)
