"""Time and memory of making a prompt and of its backward."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import measure
from .cases import Inputs

Prompt = Callable[[Inputs], Tensor]


def step(prompt: Prompt, inputs: Inputs, mark: Callable[[], object] = lambda: None
         ) -> tuple[Tensor, list[Tensor], list]:
    """The prompt, the gradients of inputs.leaves, and ``mark()`` before, between and after."""
    marks = [mark()]
    out = prompt(inputs)
    marks.append(mark())
    gradients = torch.autograd.grad(out, inputs.leaves, inputs.upstream)
    marks.append(mark())
    return out.detach(), list(gradients), marks


def time_cpu(prompts: dict[str, Prompt], inputs: Inputs, seconds: float, stop: Callable[[], bool] = lambda: False
             ) -> dict[str, measure.Times]:
    """Of all of them, in turn."""
    def once(prompt: Prompt) -> tuple[float, float]:
        a, b, c = step(prompt, inputs, time.perf_counter)[2]
        return 1e3 * (b - a), 1e3 * (c - b)

    calls = {name: functools.partial(once, prompt) for name, prompt in prompts.items()}
    return {name: measure.Times.of(pairs) for name, pairs in measure.in_turn(calls, seconds, stop=stop).items()}


def time_gpu(prompt: Prompt, inputs: Inputs, seconds: float) -> measure.Times:
    return measure.Times.of([tuple(pair) for pair in measure.on_gpu(
        lambda: step(prompt, inputs, measure.event)[2], inputs.slots.device, seconds)])


def memory(prompt: Prompt, inputs: Inputs) -> tuple[int, int]:
    """(most bytes beyond the inputs held at once, prompt and gradients included; bytes beyond the prompt that the
    forward keeps for the backward). Expects it to have run before."""
    gc.collect()
    if not inputs.slots.is_cuda:
        forward = held_on_cpu(lambda: prompt(inputs))
        return max(held_on_cpu(lambda: step(prompt, inputs))), forward[-1] - inputs.upstream.nbytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = prompt(inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    del out
    return measure.peak_of_gpu(lambda: step(prompt, inputs))[1] - before, kept


def held_on_cpu(call: Callable[[], object]) -> list[int]:
    """Bytes held after each allocation and release that torch reports to its profiler; at last what the result of the
    call holds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result  # released only now, so that the last number counts it
    return measure.held_bytes(profile)
