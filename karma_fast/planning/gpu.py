"""What a simulated GPU needs of torch where there is none: answers for Python code, and a CPU for C++ code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ASSUMED_CAPABILITY = (8, 0)  # of a GPU that is not here


class DevicesForCpp(TorchFunctionMode):
    """C++ is told "cpu" where Python says "cuda"; tensors that go there become the simulation's."""

    def __init__(self, simulated: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.simulated = simulated

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            # what runs inside needs this mode too, and must not come back here first
            with mock.patch.object(torch.autograd, "has_torch_function", lambda _: False), \
                    mock.patch.object(torch._tensor, "has_torch_function_unary", lambda _: False), self:
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            return self.simulated(args[0])
        named = kwargs or {}
        if func is torch.device or not any(map(is_cuda, [*args, *named.values()])):
            return func(*args, **named)
        cpu = torch.device("cpu")
        out = func(*(cpu if is_cuda(x) else x for x in args),
                   **{name: cpu if is_cuda(x) else x for name, x in named.items()})
        return self.simulated(out) if type(out) is Tensor else out


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; where the device is none, that of the one which is assumed."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else ASSUMED_CAPABILITY


def has_bfloat16(capability: tuple[int, int]) -> bool:
    return capability >= (8, 0)


def is_cuda(x) -> bool:
    return x.type == "cuda" if isinstance(x, torch.device) else isinstance(x, str) and x.startswith("cuda")


@contextlib.contextmanager
def as_on_a_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Within it, Python code that asks torch about the GPU gets the answers of one of this compute capability, and
    autocast for "cuda" acts on CPU tensors, which is what simulated ones are to torch's C++. The two have nearly the
    same lists of operators: those of a decoder are on both."""
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    set_enabled, set_dtype = torch.set_autocast_enabled, torch.set_autocast_dtype

    def cpp(device: str) -> str:
        return "cpu" if device == "cuda" else device

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (torch, "is_autocast_enabled", lambda device="cuda": is_enabled(cpp(device))),
                (torch, "get_autocast_dtype", lambda device: get_dtype(cpp(device))),
                (torch, "set_autocast_enabled", lambda device, enabled: set_enabled(cpp(device), enabled)),
                (torch, "set_autocast_dtype", lambda device, dtype: set_dtype(cpp(device), dtype)),
                (torch.version, "cuda", torch.version.cuda or "12.6"),  # by NVIDIA
                (torch.cuda.tunable, "is_enabled", lambda: False),
                (torch.cuda, "get_rng_state", lambda *_: None),
                (torch.cuda, "set_rng_state", lambda *_: None),
                (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # what autocast asks
                (torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                    including_emulation or has_bfloat16(capability)),
                (torch.cuda, "get_device_capability", lambda *_: capability)):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
