"""What is measured: shapes, dtypes and flags, most important first, and inputs made from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A power of two: libraries without a scale multiply the half-precision queries by it first, which then rounds nothing.
SCALE = 16.0
FLAGS = ("symmetric", "ids", "log_q")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Case:
    """``rows`` queries against ``keys`` keys of ``width``; query i belongs to key i, later keys are nobody's."""

    rows: int
    keys: int
    width: int
    dtype: str = "bfloat16"
    symmetric: bool = False
    ids: bool = False
    log_q: bool = False
    workspaces: tuple[int, ...] = (64,)  # MiB that implementations with such a limit may use, one run each

    @property
    def name(self) -> str:
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        return "-".join([f"{self.rows}x{self.keys}x{self.width}", SHORT[self.dtype], *flags])

    @classmethod
    def parse(cls, name: str) -> Case:
        """The reverse of ``name``.

        >>> Case.parse("48x80x32-fp32-ids")
        Case(rows=48, keys=80, width=32, dtype='float32', symmetric=False, ids=True, log_q=False, workspaces=(64,))
        """
        shape, short, *flags = name.split("-") if "-" in name else (name, "")
        sizes = shape.split("x")
        dtypes = {s: dtype for dtype, s in SHORT.items()}
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes) or short not in dtypes or \
                not set(flags) <= set(FLAGS):
            raise ValueError(f"case {name!r}: 48x80x32-fp32 is the form, with fp32, bf16 or fp16 and any of "
                             f"-{', -'.join(FLAGS)} behind")
        return cls(*map(int, sizes), dtypes[short], **dict.fromkeys(flags, True))

    @property
    def useful_flops(self) -> int:
        """Of forward and backward: three matrix products, and a fourth where both directions share the first."""
        return (8 if self.symmetric else 6) * self.rows * self.keys * self.width

    def needs(self, device: str) -> frozenset[str]:
        """What an implementation must offer to be measured on this case."""
        wanted = {"one direction": not self.symmetric, "both directions": self.symmetric, "id mask": self.ids,
                  "logQ": self.log_q, "more keys than queries": self.keys > self.rows,
                  "float32": self.dtype == "float32", "CPU": device == "cpu"}
        return frozenset(name for name, needed in wanted.items() if needed)


@dataclass
class Inputs:
    query: Tensor  # (B, D)
    key: Tensor  # (N, D)
    labels: Tensor  # (B,) arange
    key_ids: Tensor | None  # (N,)
    log_q: Tensor | None  # (N,) float32
    scale: float
    symmetric: bool
    workspace_bytes: int = 64 << 20


def unit_vectors(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """(rows, width) with a common direction and a decaying spectrum, as embeddings of a language model have.

    Two of them have a cosine of about 0.37 on average.
    """
    device = generator.device
    strength = torch.arange(1, width + 1, device=device).float().rsqrt()
    noise = torch.randn(rows, width, generator=generator, device=device) * strength
    common = strength.flip(0) * (0.65 * strength.square().sum().sqrt() / strength.norm())
    return torch.nn.functional.normalize(noise + common)


def make_inputs(case: Case, device: str | torch.device, seed: int = 0) -> Inputs:
    """Leaves that want gradients. Query i is a noisy copy of key i, so the loss is that of a model in training."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    key = unit_vectors(case.keys, case.width, generator)
    noise = unit_vectors(case.rows, case.width, generator)
    query = torch.nn.functional.normalize(0.6 * key[:case.rows] + 0.4 * noise)
    key_ids = log_q = None
    if case.ids:  # some items are drawn often, most hardly ever
        uniform = torch.rand(case.keys, generator=generator, device=device)
        key_ids = (case.keys * uniform.pow(3)).long()
    if case.log_q:
        log_q = torch.rand(case.keys, generator=generator, device=device).mul(6).sub(14)
    return Inputs(query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(),
                  torch.arange(case.rows, device=device), key_ids, log_q, SCALE, case.symmetric)


def gpu_cases() -> list[Case]:
    """Square from 8192 to 65536 and 8192 against a catalogue of a million, widths 64 to 2048."""
    million = 10**6
    both = (64, 512)
    cases = [Case(65536, 65536, 768, workspaces=both), Case(65536, 65536, 768, symmetric=True, workspaces=both),
             Case(8192, million, 128)]
    cases += [Case(size, size, 768) for size in (8192, 16384, 32768)]
    cases += [Case(16384, 16384, 768, symmetric=True), Case(16384, 16384, 768, ids=True, log_q=True),
              Case(16384, 16384, 768, log_q=True), Case(8192, million, 128, ids=True, log_q=True)]
    cases += [Case(16384, 16384, width) for width in (64, 256, 2048, 128, 512, 1024)]
    cases += [Case(8192, 8192, width) for width in (64, 256, 2048, 128, 512, 1024)]
    cases += [Case(8192, million, width) for width in (64, 256, 768)]
    cases += [Case(65536, 65536, width) for width in (64, 256, 2048)]
    cases += [Case(8192, 8192, 768, symmetric=True), Case(32768, 32768, 128), Case(32768, 32768, 2048),
              Case(65536, 65536, 768, ids=True, log_q=True), Case(16384, 16384, 768, "float32")]
    return cases


def cpu_cases() -> list[Case]:
    """The same kinds, small enough for two cores."""
    return [Case(8192, 8192, 256, "float32"), Case(256, 65536, 128, "float32"), Case(4096, 4096, 256, "float32"),
            Case(1024, 1024, 256, "float32"), Case(4096, 4096, 256, "float32", symmetric=True),
            Case(4096, 4096, 256, "float32", ids=True, log_q=True), Case(256, 256, 128, "float32"),
            Case(2048, 2048, 256, "bfloat16")]


def cases_for(device: str) -> list[Case]:
    return gpu_cases() if device == "cuda" else cpu_cases()


def tiny_cases() -> list[Case]:
    """One of each kind at the size of a test."""
    return [Case(48, 48, 32, "float32"), Case(48, 80, 32, "float32"), Case(48, 48, 32, "float32", symmetric=True),
            Case(48, 80, 32, "float32", ids=True, log_q=True), Case(48, 48, 32, "float32", symmetric=True, ids=True),
            Case(48, 80, 32, "float32", log_q=True), Case(48, 48, 32, "bfloat16")]
