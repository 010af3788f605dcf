"""The peak of a model of many layers from the record of one with three.

Where all layers of a decoder are alike, what the first saves for the backward, and its gradients, can be counted as
often as there are layers that were left out. While the first itself is at work nothing is counted: the others need
the same workspace, with more of the saved memory in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from .simulated import Block, Simulation

REPEATED = 0  # the layer that stands for those left out


@dataclass
class Pass:
    """One forward of the decoder: numbers of events at the entry and exit of the decoder and of the repeated
    layer, and at the exit of the last."""

    start: int
    end: int | None = None
    repeated: tuple[int, int] | None = None
    last_end: int | None = None


class Recorder:
    """Marks a simulation's blocks with the pass and the layer that took them.

    decoder: the module around the layers. Layers that run outside its forward are recomputed in the backward: their
    memory counts as the backward's.
    """

    def __init__(self, simulation: Simulation, decoder: nn.Module, layers: nn.ModuleList) -> None:
        self.simulation, self.passes = simulation, []
        self._handles = [decoder.register_forward_pre_hook(self._enter), decoder.register_forward_hook(self._leave)]
        for place, layer in enumerate(layers):
            self._handles += [
                layer.register_forward_pre_hook(lambda *_, place=place: self._enter_layer(place)),
                layer.register_forward_hook(lambda *_, place=place: self._leave_layer(place, len(layers)))]

    def _enter(self, *_) -> None:
        self.passes.append(Pass(self.simulation.events))
        self.simulation.tag = (len(self.passes) - 1, None)

    def _leave(self, *_) -> None:
        self.passes[-1].end = self.simulation.events
        self.simulation.tag = None

    def _enter_layer(self, place: int) -> None:
        if self.simulation.tag is None:
            return
        self.simulation.tag = (len(self.passes) - 1, place)
        if place == REPEATED:
            self.passes[-1].repeated = (self.simulation.events, self.simulation.events)

    def _leave_layer(self, place: int, layers: int) -> None:
        if self.simulation.tag is None:
            return
        current = self.passes[-1]
        if place == REPEATED:
            current.repeated = (current.repeated[0], self.simulation.events)
        if place == layers - 1:
            current.last_end = self.simulation.events
        self.simulation.tag = (len(self.passes) - 1, None)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class Peak:
    """Bytes at the moment of the most memory: gradients of weights; what forwards saved; all else that was in use."""

    gradients: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.temporaries


def peak_of(simulation: Simulation, passes: list[Pass], extra_layers: int, gradients: set[Block],
            repeated_gradients: set[Block]) -> Peak:
    """The peak of what was recorded, with the repeated layer there ``1 + extra_layers`` times."""
    blocks, events = [b for b in simulation.blocks if b.bytes], simulation.events
    born = np.array([b.born for b in blocks], dtype=np.int64)
    died = np.array([events if b.died is None else b.died for b in blocks], dtype=np.int64)
    size = np.array([b.bytes for b in blocks], dtype=np.int64)
    of_pass = np.array([-1 if b.tag is None else b.tag[0] for b in blocks], dtype=np.int64)
    of_repeated = np.array([b.tag is not None and b.tag[1] == REPEATED for b in blocks], dtype=bool)
    extra = np.zeros(len(blocks), dtype=np.int64)
    counted = np.ones(events + 1, dtype=bool)
    forward = np.zeros(len(blocks), dtype=bool)
    ends = []  # of the repeated layer's backwards
    for number, one in enumerate(passes):
        mine = of_pass == number
        if one.end is not None:
            forward |= mine & (died > one.end)
        if one.repeated is None or one.last_end is None:
            continue
        saved = mine & of_repeated & (born <= one.last_end) & (died > one.last_end)
        extra[saved] = extra_layers
        ends += [died[saved].max()] if saved.any() else []
        if extra_layers:
            counted[one.repeated[0] + 1:one.repeated[1]] = False
    born_extra = born.copy()
    for n in np.flatnonzero([b in repeated_gradients for b in blocks]):
        # until then what the layers saved is counted, after it their gradients are
        end = min(ends, key=lambda end, n=n: abs(end - born[n]), default=0)
        extra[n], born_extra[n] = extra_layers, max(born[n], end)
    change = np.zeros(events + 1, dtype=np.int64)
    np.add.at(change, born, size)
    np.add.at(change, born_extra, size * extra)
    np.add.at(change, died, -size * (1 + extra))
    change[events] = 0  # after the end
    in_use = np.where(counted, np.cumsum(change), 0)
    at = int(in_use.argmax())
    alive = (born <= at) & (died > at)
    grads = np.array([b in gradients for b in blocks], dtype=bool)

    def total(of: np.ndarray) -> int:
        return int(size[alive & of].sum() + (size * extra)[alive & of & (born_extra <= at)].sum())

    return Peak(total(grads), total(~grads & forward), total(~grads & ~forward))
