"""Compiles what a launch would compile, for a GPU that is not there, and reads from the result whether it would run.

    with compiling_for(90) as launches:
        launch_code(torch.empty(65536, 768, dtype=torch.bfloat16, device="meta"))
    print(table(launches), [launch.problems() for launch in launches])

The launch code runs unchanged on meta tensors, which have a shape, a type and an alignment but no memory, so the
specialisation (types, divisibility by 16, arguments equal to 1) is that of a real launch. Nothing is launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch

SHARED_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a block, by compute capability
MULTIPROCESSORS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of one card each
TENSOR_MEMORY_COLUMNS = 512  # of a block, on 10.0
REGISTERS = 65536  # of 32 bits, of a block

FLOAT32 = r"\b(?:add|sub|mul|fma|mad|div)\.[\w.]*f32(?:x2)?\b"
# a matrix instruction of each generation, as PTX spells it
TENSOR_CORES = {"tcgen05": r"\btcgen05\.mma\.", "wgmma": r"\bwgmma\.mma_async\.", "mma.sync": r"\bmma\.sync\."}


@dataclass(frozen=True)
class Launch:
    """A kernel as compiled for one launch; sizes in bytes, of a block unless said otherwise."""

    kernel: str
    capability: int
    num_warps: int
    num_stages: int
    shared: int
    tensor_memory: int  # columns
    registers: int  # of a thread
    stack: int  # of a thread: spilled registers, or arrays indexed at run time
    dots: int  # tl.dot in the source whose types a tensor core can multiply
    slow_dots: int  # those of them that became multiply-adds of single numbers
    tensor_core: str | None
    fused: bool  # every float32 sum or product is a multiply-add that rounds once, to nearest, and keeps small numbers
    rounded: bool  # no product is added to before it is rounded on its way to exp2, see `rounded_before_exp2`
    seconds: float = field(compare=False)  # to compile, or to read from Triton's cache
    arguments: str  # types, "?" where divisibility by 16 is not known, and constants

    def problems(self) -> list[str]:
        """Why this would not launch, or would be slow; empty if all is well."""
        limit, found = SHARED_LIMITS[self.capability] * 1024, []
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {self.shared - limit} more than a block may have")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory, more than {TENSOR_MEMORY_COLUMNS}")
        if (self.registers + 7) // 8 * 8 * 32 * self.num_warps > REGISTERS:
            found.append(f"{self.registers} registers for each of {32 * self.num_warps} threads")
        if self.stack:
            found.append(f"{self.stack} bytes of stack for each thread: registers spill")
        if self.dots and self.tensor_core is None:
            found.append("no tensor core instruction")
        elif self.slow_dots:
            found.append("a dot without tensor cores")
        return found


class CompileOnlyDriver:
    """What Triton asks of a driver before it compiles; each capability is a device of its own."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}, compile only"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Launch]]:
    """Inside, ``kernel[grid](...)`` compiles for the compute capability (80, 86, ...) and is added to the list, once.

    Launch code that asks torch for the capability or the number of multiprocessors is told those of such a card.
    Kernels must have been decorated without the interpreter.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run, seen, before = JITFunction.run, set(), driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        started = time.perf_counter()
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            launches.append(measure(compiled, time.perf_counter() - started))
        return compiled

    card = SimpleNamespace(multi_processor_count=MULTIPROCESSORS[capability])
    with (mock.patch.object(JITFunction, "run", compile_only),
          mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
          mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: card)):
        driver.set_active(CompileOnlyDriver(capability))
        try:
            yield launches
        finally:
            driver._active = before


def measure(compiled, seconds: float) -> Launch:
    """Of a ``triton.compiler.CompiledKernel``."""
    metadata, asm, source = compiled.metadata, compiled.asm, compiled.src
    registers, stack = resource_usage(asm["cubin"])
    dots, exact = count_dots(asm["ttir"])
    slow = len(re.findall(r" = tt\.dot .*-> tensor<[^>]*#blocked", asm["ttgir"]))
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = {names[path[0]] for path, marks in source.attrs.items() if marks}
    arguments = [spelt(name, constants[name]) if name in constants else
                 f"{name}:{kind}{'' if name in divisible or kind.startswith('f') else '?'}"
                 for name, kind in source.signature.items()]
    return Launch(
        kernel=metadata.name, capability=metadata.target.arch, num_warps=metadata.num_warps,
        num_stages=metadata.num_stages, shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0, registers=registers, stack=stack, dots=dots,
        slow_dots=0 if exact else slow, seconds=seconds, arguments=" ".join(filter(None, arguments)),
        fused=all(re.match(r"fma\.rn\.f32", op) for op in re.findall(FLOAT32, asm["ptx"]) or ["none"]),
        rounded=rounded_before_exp2(asm["ptx"]),
        tensor_core=next((name for name, pattern in TENSOR_CORES.items() if re.search(pattern, asm["ptx"])), None))


def rounded_before_exp2(ptx: str) -> bool:
    """Whether each multiply-add on the way to an exp2 adds to what a select passed on: a score, rounded and masked.

    Else it may be a score that is formed and set off against the largest one in one step, with other bits than where
    the two are steps of their own. Where numbers travel in pairs, as on 10.0, no more than their last step is seen.
    """
    made = {name: (op, re.split(r",\s*", rest)) for op, name, rest in
            re.findall(r"^\s*(?:@!?%\w+\s+)?([\w.]+)\s+(%\w+),\s*(.*?);", ptx, re.MULTILINE)}
    seen, todo = set(), re.findall(r"\bex2\.approx[\w.]*\s+%\w+,\s*(%\w+)", ptx)
    while todo:
        name = todo.pop()
        if name in seen or name not in made:
            continue
        seen.add(name)
        op, sources = made[name]
        if op.startswith("fma.") and not made.get(sources[2], ("",))[0].startswith("selp."):
            return False
        if re.match(r"(?:add|sub|min)\.", op):
            todo += sources
    return True


def spelt(name: str, value: object) -> str:
    """A constant; what is False or None is left out."""
    if isinstance(value, bool) or value is None:
        return name if value else ""
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"


def count_dots(ttir: str) -> tuple[int, int]:
    """(with types that a tensor core multiplies, others: fp32 asked for exactly, fp64)."""
    lines = re.findall(r"\btt\.dot(?:_scaled)? .*", ttir)
    fast = sum(bool(re.search(r"inputPrecision|x(?:b?f16|f8\w*|i8)>", line.replace("f32", ""))) for line in lines)
    return fast, len(lines) - fast


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread, by the cuobjdump that Triton brings along."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if not usage:
        raise RuntimeError(f"cuobjdump says nothing about registers and stack: {said!r}")
    return max(int(r) for r, _, _ in usage), sum(int(s) + int(loc) for _, s, loc in usage)


def constants(launch: Launch) -> str:
    return " ".join(word for word in launch.arguments.split() if ":" not in word)


COLUMNS: tuple[tuple[str, Callable[[Launch], str]], ...] = (
    ("sm", lambda x: str(x.capability)), ("kernel", lambda x: x.kernel), ("warps", lambda x: str(x.num_warps)),
    ("stages", lambda x: str(x.num_stages)), ("KiB shared", lambda x: f"{x.shared / 1024:.1f}"),
    ("limit", lambda x: str(SHARED_LIMITS[x.capability])), ("registers", lambda x: str(x.registers)),
    ("stack", lambda x: str(x.stack)), ("tensor core", lambda x: x.tensor_core or "-"),
    ("s", lambda x: f"{x.seconds:.1f}"), ("constants", constants))


def table(launches: Sequence[Launch]) -> str:
    """One line a launch."""
    rows = [[title for title, _ in COLUMNS], *([text(launch) for _, text in COLUMNS] for launch in launches)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
