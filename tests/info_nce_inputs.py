"""Inputs of info_nce, and its loss with all gradients: what the tests of its implementations share."""

import torch
from torch import Tensor

from karma_kernels import info_nce


def make(rows: int = 7, keys: int = 11, width: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64,
         labels: bool = True, ids: bool | int = True, log_q: bool = True) -> dict[str, Tensor]:
    """Arguments by name; what is switched off is left out. ids 2: of two kinds."""
    g = torch.Generator().manual_seed(seed)
    inputs = {
        "query": torch.randn(rows, width, generator=g, dtype=dtype),
        "key": torch.randn(keys, width, generator=g, dtype=dtype),
        "labels": torch.randperm(keys, generator=g)[:rows] if labels else None,
        "key_ids": make_ids(keys, ids, g) if ids else None,
        "log_q": torch.rand(keys, generator=g, dtype=dtype).clamp_min(0.01).log() if log_q else None,  # 0 can be drawn
        "scale": torch.tensor(3.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    }
    return {name: x for name, x in inputs.items() if x is not None}


def make_ids(keys: int, kinds: int, generator: torch.Generator) -> Tensor:
    """(keys,), or (keys, 2) with negative and large ones too."""
    if kinds == 1:
        return torch.randint(0, 4, (keys,), generator=generator)
    low, high = torch.randint(0, 8, (2, keys), generator=generator)
    return torch.stack([low - 3, high << 40], dim=1)


def gradients(inputs: dict[str, Tensor], weights: float | Tensor = 1.0, **options) -> list[Tensor]:
    """[loss, the gradient of each floating input in the order given], of the sum of ``weights`` times the loss."""
    leaves = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    loss = info_nce(**leaves, **options)
    (loss * weights).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves.values() if x.is_floating_point())]
