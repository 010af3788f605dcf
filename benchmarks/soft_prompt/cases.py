"""Which soft prompts are made, most important first, and inputs made from a seed."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import SHORT, unit_vectors

FORM = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)-(fp32|bf16|fp16)(?:-(\d+)tokens)?")
VOCABULARY = 32_768  # rows of the token embeddings
TOKEN_NORM = 2.0  # about the length of a token embedding
EPS = 1e-6
# A row of a history: instruction, items, the learned [EMB], some text. Of the decoder: soft tokens, text.
HEAD, ITEMS, TAIL = 7, 21, 3
DECODED = 12


@dataclass(frozen=True)
class Case:
    """``vectors`` of ``width`` through ``mid`` numbers to tokens of width ``hidden``, one or several a vector.

    One token: items of histories in rows of 32 positions, twice as many positions as vectors; a third is text, and
    popular items stand in many places. The items' vectors are frozen. Several: each vector's tokens begin a row, as
    the decoder of a user's embedding reads them, and the vectors get a gradient. Token embeddings are frozen and have
    the ``dtype``; the weights are float32.
    """

    vectors: int
    width: int
    mid: int
    hidden: int
    dtype: str = "bfloat16"
    num_tokens: int = 1

    @property
    def name(self) -> str:
        more = [f"{self.num_tokens}tokens"] * (self.num_tokens > 1)
        return "-".join([f"{self.vectors}x{self.width}x{self.mid}x{self.hidden}", SHORT[self.dtype], *more])

    @classmethod
    def parse(cls, name: str) -> Case:
        """The reverse of ``name``.

        >>> Case.parse("512x256x256x2048-bf16-4tokens")
        Case(vectors=512, width=256, mid=256, hidden=2048, dtype='bfloat16', num_tokens=4)
        """
        found = FORM.fullmatch(name)
        sizes = [int(size or 1) for size in (*found.groups()[:4], found[6])] if found else [0]
        if not found or min(sizes) < 1 or sizes[4] == 1 and sizes[0] % 16:
            raise ValueError(f"case {name!r}: 2048x256x256x2048-bf16 is the form, vectors x width x mid x hidden, "
                             "with fp32, bf16 or fp16; then maybe -4tokens, else vectors are a multiple of 16")
        dtypes = {short: dtype for dtype, short in SHORT.items()}
        return cls(*sizes[:4], dtypes[found[5]], sizes[4])

    @property
    def decoder(self) -> bool:
        return self.num_tokens > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions of each."""
        return (self.vectors, self.num_tokens + DECODED) if self.decoder else \
            (self.vectors // 16, HEAD + ITEMS + 1 + TAIL)

    @property
    def useful_flops(self) -> int:
        """Of forward and backward: three products a layer, two of the first if the vectors want no gradient."""
        first = (3 if self.decoder else 2) * self.width * self.mid
        return 2 * self.vectors * (first + 3 * self.mid * self.num_tokens * self.hidden)

    @property
    def least_bytes(self) -> int:
        """Read or written at least once: the prompt and its gradient, embeddings of text, vectors (in both directions,
        and their gradient), weights (in both directions, and their gradients)."""
        rows, length = self.shape
        text = rows * (DECODED if self.decoder else HEAD + TAIL)
        embeddings = getattr(torch, self.dtype).itemsize * self.hidden * (2 * rows * length + text)
        weights = self.width + self.mid * (self.width + 1 + self.num_tokens * self.hidden)
        return embeddings + 4 * (self.vectors * self.width * (3 if self.decoder else 2) + 3 * weights)


@dataclass
class Inputs:
    token_ids: Tensor  # (B, T)
    slots: Tensor  # (B, T): soft token, -1 for text, -2 for the learned row
    tensors: dict[str, Tensor]  # vectors, norm_weight, w1, b1, w2, maybe learned, all float32
    embedding_weight: Tensor  # (V, hidden)
    num_tokens: int
    upstream: Tensor  # (B, T, hidden), the gradient that reaches the prompt
    # what a collator knows too, for those who put the prompt together otherwise:
    places: Tensor  # (P,) positions that are not text, in order of the flattened prompt
    sources: Tensor  # (P,) row of each among soft tokens and, behind them, learned ones
    rows: list[tuple[Tensor, Tensor, Tensor]]  # each row's ids before, its soft tokens, its ids behind

    @property
    def leaves(self) -> list[Tensor]:
        """Those that want a gradient."""
        return [x for x in self.tensors.values() if x.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_weight.dtype


def make_inputs(case: Case, device: str | torch.device, seed: int = 0) -> Inputs:
    g = torch.Generator(device).manual_seed(seed)
    dtype, (rows, length) = getattr(torch, case.dtype), case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    hidden, count = case.hidden, case.vectors * case.num_tokens
    table = (normal(VOCABULARY, hidden) * (TOKEN_NORM / hidden**0.5)).to(dtype)
    tensors = {"vectors": unit_vectors(case.vectors, case.width, g), "norm_weight": 1 + 0.1 * normal(case.width),
               "w1": normal(case.mid, case.width) / case.width**0.5, "b1": 0.1 * normal(case.mid),
               "w2": normal(case.num_tokens * hidden, case.mid) / case.mid**0.5}
    slots = torch.full((rows, length), -1, device=device)
    if case.decoder:
        first, soft = 0, torch.arange(count, device=device)
    else:
        tensors["learned"] = normal(1, hidden) * (TOKEN_NORM / hidden**0.5)
        again = torch.rand(rows * ITEMS - count, generator=g, device=device)
        soft = torch.cat([torch.arange(count, device=device), (count * again.pow(3)).long()])  # each, some often
        first, soft = HEAD, soft[torch.randperm(len(soft), generator=g, device=device)]
        slots[:, HEAD + ITEMS] = -2
    soft = soft.view(rows, -1)
    last = first + soft.shape[1]
    slots[:, first:last] = soft
    ids = torch.randint(VOCABULARY, (rows, length), generator=g, device=device)
    for name, x in tensors.items():
        x.requires_grad_(case.decoder or name != "vectors")
    flat = slots.flatten()
    places = (flat != -1).nonzero().squeeze(1)
    sources = torch.where(flat == -2, count, flat)[places]
    behind = last if case.decoder else last + 1
    parts = list(zip(ids[:, :first], soft, ids[:, behind:], strict=True))
    return Inputs(ids, slots, tensors, table, case.num_tokens, normal(rows, length, hidden).to(dtype), places, sources,
                  parts)


def gpu_cases() -> list[Case]:
    """Histories at mid = in = 256, text and ID vectors side by side as wide as they are, and the decoder's prompts."""
    sizes = (2048, 8192, 16384, 512)
    return [Case(2048, 256, 256, 2048), Case(8192, 256, 256, 2048), Case(512, 256, 256, 2048, num_tokens=4),
            Case(4096, 1664, 1664, 1536), *(Case(size, 256, 256, 4096) for size in sizes),
            Case(16384, 256, 256, 2048), Case(512, 256, 256, 2048), Case(4096, 704, 704, 576),
            Case(4096, 2176, 2176, 2048), Case(2048, 256, 256, 2048, num_tokens=4)]


def cpu_cases() -> list[Case]:
    """The same kinds, small enough for two cores."""
    return [Case(512, 256, 256, 2048), Case(512, 256, 256, 2048, "float32"), Case(640, 704, 704, 576),
            Case(640, 704, 704, 576, "float32"), Case(128, 256, 256, 576, num_tokens=4),
            Case(64, 256, 256, 576, "float32")]


def cases_for(device: str) -> list[Case]:
    return gpu_cases() if device == "cuda" else cpu_cases()
