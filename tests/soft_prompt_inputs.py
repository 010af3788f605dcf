"""Inputs of embed_prompt, and its output with all gradients: what the tests of its implementations share."""

import torch
from torch import Tensor

from karma_kernels import embed_prompt

LEAVES = ("vectors", "norm_weight", "w1", "b1", "w2", "embedding_weight", "learned")


def make(rows: int = 5, width: int = 7, mid: int = 9, hidden: int = 21, num_tokens: int = 1, vocabulary: int = 11,
         learned: int = 2, batch: int = 2, length: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64,
         weights: torch.dtype | None = None, device: str = "cpu") -> dict:
    """Arguments by name. dtype: of the token embeddings. Slots repeat, and some rows stand nowhere."""
    g = torch.Generator().manual_seed(seed)
    weights = dtype if weights is None else weights

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {"vectors": normal(rows, width), "norm_weight": 1 + 0.2 * normal(width),
               "w1": normal(mid, width) / width**0.5, "b1": 0.2 * normal(mid),
               "w2": normal(num_tokens * hidden, mid) / mid**0.5}
    if learned:
        tensors["learned"] = normal(learned, hidden)
    inputs: dict = {name: x.to(device, weights) for name, x in tensors.items()}
    inputs["embedding_weight"] = normal(vocabulary, hidden).to(device, dtype)
    inputs["token_ids"] = torch.randint(vocabulary, (batch, length), generator=g).to(device)
    inputs["slots"] = torch.randint(-1 - learned, rows * num_tokens, (batch, length), generator=g).to(device)
    return inputs | {"num_tokens": num_tokens, "token_norm": 3.0}


def upstream(inputs: dict, seed: int = 1) -> Tensor:
    """A gradient for the output, in its dtype."""
    table = inputs["embedding_weight"]
    g = torch.randn((*inputs["slots"].shape, table.shape[1]), dtype=torch.float64,
                    generator=torch.Generator().manual_seed(seed))
    return g.to(table.device, table.dtype)


def exact(inputs: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def gradients(inputs: dict, grad: Tensor, wanted: tuple[str, ...] = LEAVES, function=embed_prompt, **options) -> dict:
    """{"out": the output, name: its gradient, zeros where nothing came}."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wanted if name in inputs}
    out = function(**(inputs | leaves), **options)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach()} | {name: torch.zeros_like(x) if x.grad is None else x.grad
                                    for name, x in leaves.items()}
