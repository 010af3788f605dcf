"""`karma-fast select`."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import numpy as np

from ..config import ConfigError
from .common import load_config


def main(args: argparse.Namespace) -> int:
    if not 0 < args.share <= 1:
        raise ConfigError(f"--share: got {args.share}; above 0 and at most 1 is needed")
    config = load_config(args.config, args.overrides)
    if not (config.data.interactions or config.data.name):
        raise ConfigError("select: no data named; give CONFIG.yaml or --interactions FILE --items FILE")
    from ..data import load_dataset, training_windows
    from ..recipes.ra_rec.select import select_requests

    data = load_dataset(config.data)
    starts, ends = training_windows(data.sequences, data.split, config.model.max_history, "last")
    found = select_requests(data.sequences, data.split, data.items, starts, ends, share=args.share,
                            overlap=args.overlap, seed=args.draw_seed)
    print(f"{len(found.chosen):,} of {len(ends):,} training requests"
          + (f"; {found.without_overlap:,} share no word with their history" if args.overlap else "") + "\n")
    print(table(found.drawn, found.buckets))
    if args.output:
        write(Path(args.output), data, ends[found.chosen] - 1)
    return 0


def table(drawn: np.ndarray, buckets: np.ndarray) -> str:
    """Drawn of how many, by history length (rows, short first) and popularity of the target (columns, rare first).

    >>> print(table(np.array([[1, 0]]), np.array([[3, 0]])))
    drawn / there, history short to long by target rare to popular
                 1/3             0/0
    """
    lines = ["drawn / there, history short to long by target rare to popular"]
    lines += ["".join(f"{f'{d:,}/{n:,}':>16}" for d, n in zip(*row, strict=True)).rstrip()
              for row in zip(drawn.tolist(), buckets.tolist(), strict=True)]
    return "\n".join(lines)


def write(path: Path, data, positions: np.ndarray) -> None:
    """A line a request: user, target, and the target's place among the user's events, from 0."""
    from ..model.storage import write_atomically

    sequences, out = data.sequences, io.StringIO()
    users = sequences.user_of(positions)
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("user_id", "item_id", "event"))
    rows.writerows(zip(sequences.user_ids[users], data.items.ids[sequences.items[positions]],
                       positions - sequences.indptr[users], strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, out.getvalue())
    print(f"\n{path}: {len(positions):,} requests")
