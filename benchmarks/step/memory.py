"""What fits which card, as `karma_fast.planning` predicts it: ``python -m benchmarks.step.memory [OUT.json]``.

For each size of a 4-bit model and each card, the settings that `karma-fast plan` proposes for 4096 competing pairs,
and their peak memory. No GPU is needed; `tests/test_plan.py` holds predictions against measured peaks where there is
one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from karma_fast.config import KarmaConfig
from karma_fast.planning import propose
from karma_fast.planning.shapes import hub_id

from .. import RESULTS

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b")
CARDS = (8, 12, 16, 24)  # GB, 10^9 bytes
PAIRS, HISTORY = 4096, 20


def predicted(model: str, gigabytes: int, positions: str) -> dict:
    config = KarmaConfig(backbone=model, positions=positions, max_history=HISTORY)
    windows = -(-PAIRS // (HISTORY if positions == "all" else 1))
    plan = propose(config, gigabytes * 10**9, windows, optimiser="paged_adamw_8bit")
    return {"model": model, "card_gb": gigabytes, "positions": positions, "fits": plan.fits(gigabytes * 10**9),
            **dataclasses.asdict(plan), "peak_bytes": plan.peak}


def table(results: list[dict]) -> str:
    """Markdown: a row a model, a column a card."""
    found = {(r["model"], r["card_gb"]): r for r in results if r["positions"] == "all"}
    lines = ["| 4-bit model, LoRA on all layers | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
             "| --- |" + " --- |" * len(CARDS)]
    for model in MODELS:
        cells = []
        for card in CARDS:
            r = found.get((model, card))
            if r is None or not r["fits"]:
                cells.append("does not fit" if r else "-")
                continue
            whole = r["chunk_size"] >= r["batch_size"]
            cells.append(("all" if whole else str(r["chunk_size"])) + " at once"
                         + (", checkpointing" if r["gradient_checkpointing"] else "")
                         + f": {r['peak_bytes'] / 1e9:.1f} GB")
        lines.append(f"| {hub_id(model)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=RESULTS / "step" / "memory.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--cards", nargs="+", type=int, default=CARDS, metavar="GB")
    args = parser.parse_args(arguments)
    results = []
    for model in args.models:
        for card in args.cards:
            results.append(predicted(model, card, "all"))
            print(f"{model}, {card} GB: {results[-1]['peak_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
