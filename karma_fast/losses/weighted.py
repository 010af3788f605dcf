"""A loss made of named terms with weights, as every recipe's is."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Terms:
    """Mixed into dataclasses with one field a term, () float32 each; None where it is switched off or has no data."""

    def present(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def add(self, name: str, value: Tensor) -> None:
        """Another part of a term."""
        before = getattr(self, name)
        setattr(self, name, value if before is None else before + value)


class WeightedLoss(nn.Module):
    """The sum of weighted terms. Children name the dataclass of their terms as ``parts``.

    Args:
        weights: of the terms by name; 0 switches one off.
    """

    parts: type[Terms]

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name}: its weight is {weight}; 0 or more is needed")
        self.weights = weights

    def wants(self, term: str) -> bool:
        return self.weights.get(term, 0) > 0

    def weighted(self, parts: Terms) -> dict[str, Tensor]:
        return {name: self.weights[name] * value for name, value in parts.present().items()}

    def forward(self, parts: Terms) -> Tensor:
        """The total, () float32."""
        terms = list(self.weighted(parts).values())
        if not terms:
            raise ValueError("no term of the loss is present; give at least one with a weight above 0")
        return torch.stack([t.float() for t in terms]).sum()
