"""Settings that fit a GPU: the largest chunk, whether layers are recomputed, and what to change if nothing fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..config import KarmaConfig
from ..data.schema import Dataset
from .gpu import ASSUMED_CAPABILITY
from .plan import MemoryPlan, Planner, known_alone
from .workload import Numbers

LARGE = 0.1  # share of the peak from which narrower items' features are worth a word
FEW = 4  # windows at once; with fewer the hardware idles, and recomputing layers is the better choice
SIZES = sorted({round(base * 2**power) for power in range(17) for base in (1, 1.25, 1.5, 1.75)})


@known_alone()
def propose(config: KarmaConfig, budget_bytes: int, batch_size: int, *, device_type: str = "cuda",
            data: Dataset | None = None, tokenizer=None, optimiser: str = "adamw_torch_fused",
            capability: tuple[int, int] = ASSUMED_CAPABILITY) -> MemoryPlan:
    """The plan with the largest chunk that fits ``budget_bytes``; gradient checkpointing only where it must be.

    If nothing fits, the smallest plan, which then does not fit either; its ``changes`` say what else would help. The
    other arguments are those of `plan_memory`.

    Raises what `plan_memory` raises.

    Example:
        >>> plan = propose(KarmaConfig(backbone="qwen2.5-1.5b"), 8 * 10**9, 64)  # doctest: +SKIP
        >>> plan.chunk_size, plan.gradient_checkpointing  # doctest: +SKIP
        (10, False)
    """
    known = {"device_type": device_type, "data": None if data is None else Numbers(data), "tokenizer": tokenizer,
             "optimiser": optimiser, "capability": capability}
    best = None
    for checkpointing in [True] if config.gradient_checkpointing else [False, True]:
        planner = Planner(dataclasses.replace(config, gradient_checkpointing=checkpointing), batch_size=batch_size,
                          **known)
        found = largest_chunk(planner, budget_bytes)
        if best is None or (found.fits(budget_bytes), found.chunk_size) > (best.fits(budget_bytes), best.chunk_size):
            best = found
        if best.fits(budget_bytes) and best.chunk_size >= min(FEW, batch_size):
            return best
    if not best.fits(budget_bytes):
        best = found  # with checkpointing, which is the smaller
        best.changes = sorted(changes(planner, found, known), key=lambda change: change["peak_bytes"])
    return best


def largest_chunk(planner: Planner, budget_bytes: int) -> MemoryPlan:
    """The plan with the largest chunk of `SIZES` that fits, or with one window."""
    windows = planner.batch_size
    # a batch is cut into chunks of nearly the same size, so many limits come to the same
    sizes = sorted({-(-windows // -(-windows // min(size, windows))) for size in [*SIZES, windows]})
    best = planner.plan(sizes[0])
    low, high = 0, len(sizes)
    if not best.fits(budget_bytes):
        return best
    while high - low > 1:
        middle = (low + high) // 2
        found = planner.plan(sizes[middle])
        if found.fits(budget_bytes):
            low, best = middle, found
        else:
            high = middle
    return best


def changes(planner: Planner, smallest: MemoryPlan, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that take less memory, each alone, with what a step of one window at a time would then need."""
    config, size = planner.config, planner.batch_size
    model: list[tuple[str, Any]] = []
    if config.tuning == "full":
        model.append(("tuning", "lora"))
    if config.quantization != "4bit" and config.tuning != "full":
        model.append(("quantization", "4bit"))
    if config.tuning == "lora" and config.lora_rank > 8:
        model.append(("lora_rank", 8))
    for name, least in (("max_history", 10), ("max_text_tokens", 12)):
        if getattr(config, name) > least:
            model.append((name, max(least, getattr(config, name) // 2)))
    if config.decode_weight > 0:
        model.append(("decode_weight", 0.0))
    wider_than = config.word_dim if config.text_vectors == "states" else 0  # "both" has the words' vectors already
    if (planner.workload.widths.get("text", 0) > wider_than
            and smallest.parts["item features"] > LARGE * smallest.peak):
        model.append(("text_vectors", "words"))
    for name, value in model:
        peak = Planner(dataclasses.replace(config, **{name: value}), batch_size=size, **known).plan(1).peak
        yield {"setting": f"model.{name}", "value": value, "peak_bytes": peak}
    if size > 1:
        peak = Planner(config, batch_size=size // 2, **known).plan(1).peak
        yield {"setting": "training.per_device_train_batch_size", "value": size // 2, "peak_bytes": peak}
    if "8bit" not in planner.optimiser:
        planner.optimiser = "adamw_8bit"
        yield {"setting": "training.optim", "value": "adamw_8bit", "peak_bytes": planner.plan(1).peak}
    if config.backbone.lower() not in ("smollm2-135m", "smollm2-135m-instruct"):
        smaller = dataclasses.replace(config, backbone="smollm2-135m-instruct")
        yield {"setting": "model.backbone", "value": smaller.backbone,
               "peak_bytes": Planner(smaller, batch_size=size, **known).plan(1).peak}
