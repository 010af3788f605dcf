"""Bytes of an optimiser's states."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK = 256  # weights that share a scale in bitsandbytes' 8-bit states
SMALLEST = 4096  # elements; smaller tensors keep float32 states


def state_bytes(sizes: Sequence[int], name: str, granularity: int = 1) -> int:
    """Of trained tensors of so many elements; ``name`` as in transformers' setting ``optim``.

    AdamW keeps two float32 numbers a weight, in 8 bits two bytes and two scales a block; AdEMAMix keeps three of them;
    Lion, RMSprop and Adagrad one. Paged states are counted too: they may leave the GPU when memory runs short.

    Example:
        >>> state_bytes([10_000], "adamw_torch_fused"), state_bytes([10_240, 100], "paged_adamw_8bit")
        (80004, 21600)
    """
    few = any(kind in name for kind in ("lion", "rmsprop", "adagrad"))
    numbers = 0 if name == "sgd" else 1 if few else 3 if "ademamix" in name else 2
    in_8_bits = "8bit" in name
    steps = numbers == 2 and "torch" in name  # AdamW of torch counts the steps of each tensor

    def rounded(size: int) -> int:
        return -(-size // granularity) * granularity

    total = 0
    for size in sizes:
        if in_8_bits and size >= SMALLEST:
            total += numbers * (rounded(size) + rounded(4 * -(-size // BLOCK)))
        else:
            total += numbers * rounded(4 * size) + (rounded(4) if steps else 0)
    return total
