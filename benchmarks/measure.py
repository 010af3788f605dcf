"""Time, memory, and what the machine itself can do."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cases import Inputs

Loss = Callable[[Inputs], Tensor]
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU


@dataclass
class Spread:
    """Milliseconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
        return cls(statistics.median(times), fifths[0], fifths[3])


@dataclass
class Times:
    forward: Spread
    backward: Spread
    total: Spread
    repeats: int

    @classmethod
    def of(cls, pairs: list[tuple[float, float]]) -> Times:
        """From milliseconds of (forward, backward), one pair a repeat."""
        forward, backward = zip(*pairs, strict=True)
        return cls(Spread.of(list(forward)), Spread.of(list(backward)), Spread.of([sum(pair) for pair in pairs]),
                   len(pairs))


def step(loss: Loss, inputs: Inputs, mark: Callable[[], object] = lambda: None) -> tuple[Tensor, list]:
    """Forward and backward into fresh gradients; ``mark()`` before, between and after."""
    inputs.query.grad = inputs.key.grad = None
    marks = [mark()]
    out = loss(inputs)
    marks.append(mark())
    out.backward()
    marks.append(mark())
    return out.detach(), marks


def repeats_in(seconds: float, once: float, least: int, most: int) -> int:
    return max(least, min(most, int(seconds / max(once, 1e-9))))


def in_turn(calls: dict[str, Callable[[], object]], seconds: float, least: int = 5, most: int = 50,
            stop: Callable[[], bool] = lambda: False, each: float = float("inf")) -> dict[str, list]:
    """What the calls return: all of them in turn, then all again, so that whatever else the machine does hits every
    one alike.

    Expects each to have run before. ``seconds`` is for all together; ``stop()`` ends it after ``least`` repeats; a
    call that took ``each`` seconds in all is left out of further turns.
    """
    found: dict[str, list] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    start, done, repeats = time.perf_counter(), 0, most
    while done < repeats and not (done >= least and stop()):
        for name, call in calls.items():
            if spent[name] < each:
                before = time.perf_counter()
                found[name].append(call())
                spent[name] += time.perf_counter() - before
        done += 1
        repeats = repeats_in(seconds, (time.perf_counter() - start) / done, least, most)
    return found


def time_cpu(losses: dict[str, tuple[Loss, Inputs]], seconds: float, least: int = 5, most: int = 50,
             stop: Callable[[], bool] = lambda: False) -> dict[str, Times]:
    """Forward and backward of all of them, in turn."""
    def once(loss: Loss, inputs: Inputs) -> tuple[float, float]:
        _, (a, b, c) = step(loss, inputs, time.perf_counter)
        inputs.query.grad = inputs.key.grad = None
        return 1e3 * (b - a), 1e3 * (c - b)

    calls = {name: functools.partial(once, *pair) for name, pair in losses.items()}
    return {name: Times.of(pairs) for name, pairs in in_turn(calls, seconds, least, most, stop).items()}


def event() -> torch.cuda.Event:
    out = torch.cuda.Event(enable_timing=True)
    out.record()
    return out


def on_gpu(marked: Callable[[], list[torch.cuda.Event]], device: torch.device | str, seconds: float, least: int = 5,
           most: int = 100) -> list[list[float]]:
    """Milliseconds between the events that each call returns, with a flushed L2 cache, as triton.testing.do_bench
    does; one implementation at a time, so that the allocator has its blocks ready. Expects it to have run before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    marks = marked()
    torch.cuda.synchronize()
    once = 1e-3 * marks[0].elapsed_time(marks[-1])
    found = []
    for _ in range(repeats_in(seconds, once, least if once < 1 else 3, most)):
        flush.zero_()
        found.append(marked())
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) for a, b in itertools.pairwise(marks)] for marks in found]


def time_gpu(loss: Loss, inputs: Inputs, seconds: float) -> Times:
    """Forward and backward."""
    return Times.of([tuple(pair) for pair in on_gpu(lambda: step(loss, inputs, event)[1], inputs.query.device,
                                                    seconds)])


def time_call_gpu(call: Callable[[], object], device: torch.device | str, seconds: float) -> list[float]:
    """Milliseconds of each call, the work on the host that the device waits for included."""
    def marked() -> list[torch.cuda.Event]:
        before = event()
        call()
        return [before, event()]

    return [found[0] for found in on_gpu(marked, device, seconds)]


def peak_memory(loss: Loss, inputs: Inputs) -> int:
    """Most bytes held at once during forward and backward beyond the inputs, gradients included.

    On a GPU the allocator's own mark. On a CPU the running sum of every allocation and release that torch reports to
    its profiler, also inside operators. That is exact and repeats. The resident size of a fresh process does neither:
    its first call loads code and tables, and freed pages come back late, which together outweighs what an
    implementation with a small workspace needs.
    """
    inputs.query.grad = inputs.key.grad = None
    gc.collect()
    if inputs.query.is_cuda:
        before = torch.cuda.memory_allocated()
        return peak_of_gpu(lambda: step(loss, inputs))[1] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, inputs)
    return max(held_bytes(profile))


def held_bytes(profile: torch.profiler.profile) -> list[int]:
    """Beyond what was held before, at first and after each allocation and release that torch reported to its
    profiler."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [0, *itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))]


def peak_of_gpu(call: Callable[[], object]) -> tuple[object, int]:
    """What the call returns and the most bytes that torch's allocator held on the GPU meanwhile."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated()


def memory_of_process(field: str = "VmRSS") -> int | None:
    """Bytes that the process holds, or held at most (``VmHWM``); None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return int(found.group(1)) << 10 if found else None


def give_back() -> None:
    """Freed memory goes back to the system, so that it is not taken for memory in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def peak_of_process(call: Callable[[], object]) -> tuple[object, int | None]:
    """What the call returns and the most bytes the whole process held meanwhile: also those of libraries in C++, which
    do not ask torch. Coarser than peak_memory(), by a few MiB; None where Linux's own count cannot be set back."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return call(), memory_of_process("VmHWM")


def seconds_of(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median of a plain call."""
    times = []
    for _ in range(repeats + 2):
        if device == "cuda":
            a = event()
            function()
            b = event()
            torch.cuda.synchronize()
            times.append(1e-3 * a.elapsed_time(b))
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def matmul_peak(device: str, dtype: torch.dtype, sizes: tuple[int, ...] | None = None) -> float:
    """Operations per second of torch's own matrix product on random data, the best of some sizes."""
    sizes = sizes or ((8192, 16384) if device == "cuda" else (2048,))
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * n**3 / seconds_of(lambda a=a, b=b: a @ b.T, device, 10 if device == "cuda" else 5))
    return best


def copy_bandwidth(device: str, size: int | None = None) -> float:
    """Bytes per second of a copy, read and written ones counted."""
    a = torch.randn((size or (1 << 30 if device == "cuda" else 1 << 28)) // 4, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds_of(lambda: b.copy_(a), device, 10)
