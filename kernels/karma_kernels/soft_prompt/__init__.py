"""Vectors -> soft tokens of a language model, and their place in a prompt: checks and choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import insert_rows, soft_prompt_rows

__all__ = ["insert_soft_tokens", "soft_prompt"]

AVAILABLE = ("auto", "reference")


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
        backend: "auto" or "reference".

    Returns:
        (R, num_tokens, hidden), dtype of ``w2``; half precision is computed in float32, under autocast too. A token
        whose z is exactly 0 stays 0 and gets no gradient.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices or options.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> tokens = soft_prompt(torch.randn(3, 4), torch.ones(4), torch.randn(8, 4), torch.zeros(8),
        ...                      torch.randn(2 * 16, 8), num_tokens=2, token_norm=5.0)
        >>> tokens.shape, tokens.norm(dim=-1)[0]
        (torch.Size([3, 2, 16]), tensor([5., 5.]))
    """
    _check_floats(vectors=vectors, norm_weight=norm_weight, w1=w1, b1=b1, w2=w2)
    weights = {"norm_weight": norm_weight, "w1": w1, "b1": b1, "w2": w2}
    if len({x.dtype for x in weights.values()}) > 1:
        found = ", ".join(f"{name} {x.dtype}" for name, x in weights.items())
        raise TypeError(f"got {found}; all weights need the same dtype")
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"vectors: got shape {tuple(vectors.shape)}; (rows, width) is needed")
    width, mid = vectors.shape[1], b1.shape[0] if b1.ndim == 1 else -1
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens: got {num_tokens!r}; a whole number >= 1 is needed")
    if norm_weight.shape != (width,) or w1.shape != (mid, width) or w2.ndim != 2 or w2.shape[1] != mid:
        raise ValueError(f"vectors {tuple(vectors.shape)}, norm_weight {tuple(norm_weight.shape)}, w1 "
                         f"{tuple(w1.shape)}, b1 {tuple(b1.shape)}, w2 {tuple(w2.shape)} do not fit; (rows, in), "
                         "(in,), (mid, in), (mid,), (num_tokens * hidden, mid) is needed")
    if w2.shape[0] == 0 or w2.shape[0] % num_tokens:
        raise ValueError(f"w2: got {w2.shape[0]} rows; a multiple of num_tokens = {num_tokens} is needed")
    if isinstance(token_norm, Tensor) and token_norm.numel() != 1:
        raise ValueError(f"token_norm: got shape {tuple(token_norm.shape)}; one element is needed")
    _check_backend(backend)
    if isinstance(token_norm, Tensor):
        token_norm = token_norm.reshape(())
    with torch.autocast(vectors.device.type, enabled=False):
        return soft_prompt_rows(vectors, norm_weight, w1, b1, w2, num_tokens, token_norm, eps)


def insert_soft_tokens(token_ids: Tensor, slots: Tensor, soft: Tensor, embedding_weight: Tensor, *,
                       backend: str = "auto") -> Tensor:
    """Writes soft tokens and token embeddings into one prompt.

    Args:
        token_ids: (B, T) integers, rows of ``embedding_weight``; not read where a soft token stands.
        slots: (B, T) integers: row of the soft token that stands there (``r * num_tokens + k`` for token k of vector
            r), or -1 for the token embedding. A soft token may stand in several places; its gradients add up.
        soft: (R, num_tokens, hidden) or (S, hidden).
        embedding_weight: (V, hidden), the token embeddings of the model. Gets a gradient only if it requires one.
        backend: "auto" or "reference".

    Returns:
        (B, T, hidden) in the dtype of ``embedding_weight``. Gradients are added in a fixed order: same inputs, same
        bits.

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
    for name, x in (("token_ids", token_ids), ("slots", slots)):
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name}: got dtype {x.dtype}; integers are needed")
    _check_floats(embedding_weight=embedding_weight, soft=soft)
    if token_ids.ndim != 2 or token_ids.shape != slots.shape:
        raise ValueError(f"token_ids {tuple(token_ids.shape)}, slots {tuple(slots.shape)}; both must be (batch, "
                         "length)")
    if soft.ndim not in (2, 3) or embedding_weight.ndim != 2 or soft.shape[-1] != embedding_weight.shape[1]:
        raise ValueError(f"soft {tuple(soft.shape)}, embedding_weight {tuple(embedding_weight.shape)}; "
                         "(rows, num_tokens, hidden) or (rows, hidden), and (vocabulary, hidden) is needed")
    if len({x.device for x in (token_ids, slots, soft, embedding_weight)}) > 1:
        raise ValueError(f"token_ids on {token_ids.device}, slots on {slots.device}, soft on {soft.device}, "
                         f"embedding_weight on {embedding_weight.device}; all must be on one device")
    _check_backend(backend)
    soft = soft.flatten(0, -2)
    token_ids, slots = token_ids.long(), slots.long()
    if slots.device.type == "cpu" and slots.numel():
        low, high = int(slots.min()), int(slots.max())
        if low < -1 or high >= soft.shape[0]:
            raise IndexError(f"slots: got {low} to {high}; with {soft.shape[0]} soft tokens -1 to "
                             f"{soft.shape[0] - 1} is needed")
        text = token_ids[slots < 0]
        if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < embedding_weight.shape[0]:
            raise IndexError(f"token_ids: got {int(text.min())} to {int(text.max())}; with {embedding_weight.shape[0]}"
                             f" token embeddings 0 to {embedding_weight.shape[0] - 1} is needed")
    return insert_rows(token_ids, slots, soft, embedding_weight)


def _check_floats(**tensors: Tensor) -> None:
    devices = {x.device for x in tensors.values()}
    if len(devices) > 1:
        raise ValueError("got " + ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
                         + "; all must be on one device")
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name}: got dtype {x.dtype}; a floating dtype is needed")


def _check_backend(backend: str) -> None:
    if backend not in AVAILABLE:
        raise ValueError(f"backend: got {backend!r}; this version has only 'reference' (and 'auto', which takes it)")
