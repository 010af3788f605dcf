"""Tensors without values: real model code runs on them, and every block of memory it would take is recorded.

Each tensor of a simulation wraps a tensor on torch's meta device, which has a shape and no values. Whole numbers
(tokens, places, labels) keep their values up to a size, as shapes follow from them. To torch's C++ all of them are CPU
tensors, so that a simulated GPU needs none, while Python code that asks sees the simulated device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .gpu import ASSUMED_CAPABILITY, DevicesForCpp, as_on_a_gpu
from .opaque import EMBEDDING_BACKWARD, body_of, workspace_of

aten = torch.ops.aten
KEPT_WHOLE_NUMBERS = 1 << 23  # elements of a tensor of whole numbers whose values are kept
KEPT_NUMBERS = 64  # the same for other tensors
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default}


class SimulatedTensor(Tensor):
    """``inner``: the meta tensor, or a small CPU tensor where values are kept."""

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device):
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                             storage_offset=inner.storage_offset(), device=torch.device("cpu"))

    def __init__(self, inner: Tensor, place: torch.device) -> None:
        self.inner, self.place = inner, place

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_cpu = property(lambda self: self.place.type == "cpu")
    is_meta = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value: SimulatedTensor) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **options) -> Any:
        return self.inner.numpy(**options)

    def get_device(self) -> int:
        return -1 if self.place.type == "cpu" else 0

    def __repr__(self, **options) -> str:
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called on a simulated tensor outside its simulation")


@dataclass(eq=False)
class Block:
    """Memory of one storage: bytes as the device's allocator gives them; born and died count the events."""

    bytes: int
    tag: Any
    born: int
    died: int | None = None


class Simulation(TorchDispatchMode):
    """Within it, tensors are simulated on ``device`` and their memory is recorded.

    capability: that a simulated GPU says it has. blocks: all memory taken since the start, in order. events counts the
    takings and releases so far. tag: what a new block is marked with; set it from outside.

    Example:
        >>> with Simulation("cuda").entered() as simulation:
        ...     x = torch.zeros(1000, device="cuda")
        ...     y = (x * 2).sum()
        >>> [block.bytes for block in simulation.blocks]
        [4096, 4096, 512]
    """

    def __init__(self, device: torch.device | str, capability: tuple[int, int] = ASSUMED_CAPABILITY) -> None:
        super().__init__()
        self.place, self.capability = torch.device(device), capability
        self.granularity = 512 if self.place.type == "cuda" else 1  # of torch's CUDA allocator
        self.blocks: list[Block] = []
        self.events = 0
        self.tag: Any = None
        self._live: dict[int, tuple[Block, weakref.ref]] = {}
        self._results: dict[tuple, tuple] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[Simulation]:
        """Sets the simulation up; the state of random numbers is put back at its end."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.place.type == "cuda":
                stack.enter_context(as_on_a_gpu(self.capability))
            stack.enter_context(self.on())
            yield self

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The modes, which are off while one of them handles a call."""
        with DevicesForCpp(self.simulated) if self.place.type == "cuda" else contextlib.nullcontext(), self:
            yield

    # ---- memory --------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drops what was recorded; memory that is in use now is not part of what follows."""
        self.blocks, self.events = [], 0

    def take(self, size: int) -> Block:
        block = Block(-(-size // self.granularity) * self.granularity, self.tag, self.events)
        self.blocks.append(block)
        self.events += 1
        return block

    def release(self, block: Block) -> None:
        block.died = self.events
        self.events += 1

    def block_of(self, tensor: SimulatedTensor) -> Block:
        return self._live[tensor.inner.untyped_storage()._cdata][0]

    def _record(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            def gone(_, key=key):
                self.release(self._live.pop(key)[0])

            self._live[key] = (self.take(storage.nbytes()), weakref.ref(storage, gone))

    def wrap(self, inner: Tensor) -> SimulatedTensor:
        self._record(inner)
        return SimulatedTensor(inner, self.place)

    def simulated(self, x: Tensor) -> SimulatedTensor:
        """A plain tensor as one of the simulation's."""
        if isinstance(x, SimulatedTensor):
            return x
        x = x.detach()
        if isinstance(x, SimulatedTensor):  # done by the operator, as its mode is on
            return x
        kept = x.device.type != "meta" and keeps_values(x)
        inner = x.clone() if kept else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return self.wrap(inner)

    # ---- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INDEXED:
            args = (args[0], [places for x in args[1] for places in self._places(x)], *args[2:])
        flat, spec = tree_flatten((args, kwargs or {}))
        outer: dict[int, SimulatedTensor] = {}
        for n, x in enumerate(flat):
            if isinstance(x, Tensor):
                x = flat[n] = self.simulated(x)
                outer[id(x.inner)] = x
        if func is aten._local_scalar_dense.default and flat[0].inner.is_meta:
            return True if flat[0].dtype == torch.bool else 1.0 if flat[0].is_floating_point() else 1
        body = None if func.namespace == "aten" else body_of(func, self.place)
        if body is not None:
            args, kwargs = tree_unflatten(flat, spec)
            with self.on(), torch.no_grad():
                return body(*args, **kwargs)
        inner = [x.inner if isinstance(x, SimulatedTensor) else x for x in flat]
        temporary = None
        if func.namespace != "aten" or func is EMBEDDING_BACKWARD and self.place.type == "cuda":
            args, kwargs = tree_unflatten(inner, spec)
            temporary = self.take(workspace_of(func, args, kwargs))
        out = self._run(func, inner, flat, spec)

        def wrapped(x):  # an operator that works in place returns its argument
            return x if not isinstance(x, Tensor) else outer.get(id(x)) if id(x) in outer else self.wrap(x)

        out = wrapped(out) if isinstance(out, Tensor) else tree_map(wrapped, out)
        if temporary is not None:  # in use until the outputs are there
            self.release(temporary)
        return out

    def _places(self, index: SimulatedTensor | None) -> list:
        """A mask of known values as what it means: the places where it is true."""
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        index = self.simulated(index)
        return [index] if index.inner.is_meta else [self.wrap(x) for x in index.inner.nonzero().unbind(1)]

    def _run(self, func, inner: list, flat: list, spec) -> Any:
        tensors = [x for x in inner if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors):
            args, kwargs = tree_unflatten(inner, spec)
            if tensors or keeps_values_of(func, args, kwargs):
                out = func(*args, **kwargs)
                shared = storages(tensors)

                def small(x):  # what is large and new loses its values
                    new = isinstance(x, Tensor) and x.untyped_storage()._cdata not in shared
                    return without_values(x) if new and not keeps_values(x) else x

                return tree_map(small, out)
        for n, x in enumerate(inner):
            if isinstance(x, Tensor) and not x.is_meta:
                inner[n] = without_values(x)
                if func._schema.is_mutable and isinstance(flat[n], SimulatedTensor):
                    self._record(inner[n])
                    flat[n].inner = inner[n]  # its values are not known any more
        return self._shaped(func, inner, spec, tensors)

    def _shaped(self, func, inner: list, spec, tensors: list[Tensor]) -> Any:
        """The operator on meta tensors; what it gives for the same shapes is remembered."""
        key = (func, spec, *(("tensor", x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else (type(x), x)
                             for x in inner))
        known = self._results.get(key)
        if known is not None:
            return torch.empty_strided(*known[:2], dtype=known[2], device="meta")
        args, kwargs = tree_unflatten(inner, spec)
        if not tensors or kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not storages([out]) & storages(tensors):
            self._results[key] = (out.shape, out.stride(), out.dtype)
        return out


def keeps_values(x: Tensor) -> bool:
    return x.numel() <= (KEPT_NUMBERS if x.is_floating_point() else KEPT_WHOLE_NUMBERS)


def keeps_values_of(func, args, kwargs) -> bool:
    """Whether what an operator without tensor arguments makes is to keep its values."""
    return keeps_values(func(*args, **(kwargs | {"device": torch.device("meta")})))


def storages(tensors: list[Tensor]) -> set[int]:
    return {x.untyped_storage()._cdata for x in tensors}


def without_values(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
