"""Sequences of different lengths side by side in one stream, without padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from torch import Tensor

TEXT, EMB = -1, -2  # slots of a token of text and of the learned [EMB] token


class OfTensors:
    """Mixed into dataclasses of tensors, lists of such and plain values: moves all of them at once."""

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        # torch would send each tensor to another process as an open file, and a large batch has more than are allowed
        ForkingPickler.register(cls, _as_arrays)

    def mapped(self, function: Callable[[Tensor], Tensor]):
        return type(self)(*(_mapped(getattr(self, f.name), function) for f in dataclasses.fields(self)))

    def to(self, device, **options):
        # transformers asks for copies that the host waits for, which from pinned memory there is no need of
        return self.mapped(lambda x: x.to(device, non_blocking=x.is_pinned()))

    def pin_memory(self):
        return self.mapped(Tensor.pin_memory)


def _as_arrays(batch: OfTensors) -> tuple:
    values = (getattr(batch, f.name) for f in dataclasses.fields(batch))
    return _of_arrays, (type(batch), *(x.numpy() if isinstance(x, Tensor) else x for x in values))


def _of_arrays(kind: type, *values):
    return kind(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in values))


def _mapped(value, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [_mapped(part, function) for part in value]
    return value.mapped(function) if isinstance(value, OfTensors) else value


@dataclass
class Packed(OfTensors):
    """S sequences of N tokens together. Index tensors are int64."""

    token_ids: Tensor  # (N,); 0 where no token of text stands
    slots: Tensor  # (N,) row of the soft token that stands there, TEXT or EMB
    positions: Tensor  # (N,) place within its sequence
    places: Tensor  # (N,) place in a padded (S, longest) block, counted along its rows
    offsets: Tensor  # (S + 1,) int32, where each sequence starts; the last is N
    longest: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, lengths: np.ndarray, token_ids: np.ndarray, slots: np.ndarray) -> Packed:
        """From (S,) lengths and the tokens one sequence after the other."""
        longest = int(lengths.max(initial=0))
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        places = positions + np.repeat(np.arange(len(lengths)) * longest, lengths)
        offsets = np.append(starts, lengths.sum()).astype(np.int32)
        return cls(*map(torch.from_numpy, (token_ids, slots, positions, places, offsets)), longest)

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) -> (S, longest, ...), zeros after the end of a sequence."""
        block = x.new_zeros(len(self) * self.longest, *x.shape[1:])
        return block.index_copy(0, self.places, x).unflatten(0, (len(self), self.longest))

    def unpadded(self, x: Tensor) -> Tensor:
        """(S, longest, ...) -> (N, ...)."""
        return _Unpad.apply(x, self)


class _Unpad(torch.autograd.Function):
    """The backward of index_select adds row by row, as it does not know that no row is taken twice."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.flatten(0, 1).index_select(0, packed.places)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.packed.padded(grad), None


@dataclass
class TextTargets(OfTensors):
    """The tokens that positions of a stream are to predict."""

    index: Tensor  # (G,) positions of the stream
    labels: Tensor  # (G,) the token that follows each
    rows: Tensor  # (G,) the text that each belongs to, 0..S-1
    weights: Tensor  # (G,) float32; 1 / length of its text: the weighted sum is a sum of means over texts

    def __len__(self) -> int:
        return len(self.labels)
