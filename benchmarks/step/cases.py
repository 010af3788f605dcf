"""Which steps are measured, most important first, and what is compared on each."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from karma_fast.config import KarmaConfig, RunConfig

from .. import ROOT

DEMO = "demo"
FORM = re.compile(r"(?P<shape>.+)-(?P<windows>[1-9]\d*)-(?P<positions>all|last)-(?P<share>\d(\.\d+)?)"
                  r"(-(?P<gib>\d+)gib)?")


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model with random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = True  # head and token embeddings are one matrix
    quantization: str = "4bit"
    max_history: int = 20
    items: int = 20_000
    feature_width: int = 1024


# Qwen2.5: config.json of its models on the Hugging Face hub; built as Llama, without its biases of queries, keys and
# values, as transformers would ask for its tokenizer too. The tiny ones show that everything runs.
SHAPES = {"qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151_936), "qwen2.5-3b": Shape(2048, 11_008, 36, 16, 2, 151_936),
          "qwen2.5-7b": Shape(3584, 18_944, 28, 28, 4, 152_064, tied=False),
          "tiny": Shape(64, 128, 2, 2, 2, 512, True, "none", 5, 50, 16),
          "tiny-4bit": Shape(64, 128, 2, 2, 1, 512, False, "4bit", 5, 50, 16)}


@dataclass(frozen=True)
class Case:
    """One step of ``windows`` windows. shape: "demo" (MovieLens-100K and the demo's model) or a name in `SHAPES`."""

    shape: str
    windows: int
    positions: str
    decode_share: float
    gib: int = 0  # of GPU memory; 0: all there is

    @property
    def name(self) -> str:
        limit = f"-{self.gib}gib" if self.gib else ""
        return f"{self.shape}-{self.windows}-{self.positions}-{self.decode_share:g}{limit}"

    @classmethod
    def parse(cls, name: str) -> Case:
        """The reverse of ``name``.

        >>> Case.parse("qwen2.5-7b-205-all-0.25-24gib")
        Case(shape='qwen2.5-7b', windows=205, positions='all', decode_share=0.25, gib=24)
        """
        found = FORM.fullmatch(name)
        if not found or found["shape"] not in (DEMO, *SHAPES) or not 0 < float(found["share"]) <= 1:
            raise ValueError(f"case {name!r}: demo-32-all-0.25 is the form, shape-windows-positions-share: a shape of "
                             f"{', '.join((DEMO, *SHAPES))}; positions all or last; the share of windows whose texts "
                             "are read, above 0 and at most 1. Behind that maybe -8gib, the GPU memory to use")
        return cls(found["shape"], int(found["windows"]), found["positions"], float(found["share"]),
                   int(found["gib"] or 0))

    @property
    def config(self) -> KarmaConfig:
        """Settings of the model; the folder of a random one is still to be named."""
        common = {"positions": self.positions, "decode_share": self.decode_share}
        if self.shape == DEMO:  # warm-ups come before the first step and are no part of it
            demo = RunConfig.load(ROOT / "karma_fast" / "demo.yaml").model
            return dataclasses.replace(demo, decoder_warmup_steps=0, shortcut_warmup_epochs=0.0, **common)
        shape = SHAPES[self.shape]
        return KarmaConfig(quantization=shape.quantization, max_history=shape.max_history, id_dim=0,
                           instruction=" ".join(f"t{n}" for n in range(1, 8)), **common)


@dataclass(frozen=True)
class Side:
    """One way to take the step.

    chunk: windows in memory at once, None for all. checkpointing: layers' activations are computed again in the
    backward. shrink: where the windows do not fit the memory, the most that do. attention: of the usual side, as
    transformers names it; ours chooses its own.
    """

    name: str
    usual: bool = False
    chunk: int | None = None
    checkpointing: bool = False
    shrink: bool = False
    attention: str = "sdpa"


OURS = "karma"


def ours(chunk: int | None = None, checkpointing: bool = False) -> Side:
    words = [OURS] + [f"{chunk} windows at once"] * (chunk is not None) + ["checkpointing"] * checkpointing
    return Side(", ".join(words), chunk=chunk, checkpointing=checkpointing)


def usual(checkpointing: bool = False, shrink: bool = False, attention: str = "sdpa") -> Side:
    words = ["usual"] + ["checkpointing"] * checkpointing + ["largest batch"] * shrink
    words += [f"{attention} attention"] * (attention != "sdpa")
    return Side(", ".join(words), True, None, checkpointing, shrink, attention)


# the usual ones first: the first loss of ours is compared with theirs. On a CPU, torch's fused attention has a slower
# backward than the plain products for sequences as short as these, so the usual side is given both
CPU_SIDES = (usual(), usual(attention="eager"), ours(), ours(8))
GPU_SIDES = (usual(), usual(True), usual(shrink=True), usual(True, True), ours(), ours(64), ours(16), ours(4),
             ours(16, True))


def sides_for(device: str) -> tuple[Side, ...]:
    return GPU_SIDES if device == "cuda" else CPU_SIDES


def cpu_cases() -> list[Case]:
    """The demo's step, and the same with the texts of all windows."""
    return [Case(DEMO, 32, "all", 0.25), Case(DEMO, 32, "all", 1.0)]


def gpu_cases() -> list[Case]:
    """4096 negatives each: 205 windows of 20 pairs, then 4096 windows of one pair, in the memory of three cards."""
    cards = (("qwen2.5-1.5b", 8), ("qwen2.5-3b", 12), ("qwen2.5-7b", 24))
    return [Case(shape, 205, "all", 1.0, gib) for shape, gib in cards] \
        + [Case(shape, 4096, "last", 0.05, gib) for shape, gib in cards] \
        + [Case(shape, 205, "all", 1.0) for shape, _ in cards]


def cases_for(device: str) -> list[Case]:
    return gpu_cases() if device == "cuda" else cpu_cases()
