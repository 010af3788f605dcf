"""`karma-fast evaluate`."""

from __future__ import annotations

import argparse
import json
import sys

from .common import COLUMNS, fit_to, load_data, load_model, requests_to_rank, table


def main(args: argparse.Namespace) -> int:
    model, folder = load_model(args.model)
    data = fit_to(model, load_data(args.data, folder))
    from ..baselines import baseline_rows
    from ..baselines.rows import KEYS
    from ..data import DataError
    from ..evaluation.evaluate import evaluate_model, protocol
    from ..evaluation.verdict import verdict

    there = getattr(data.split, args.split)
    positions = requests_to_rank(there, args.test_users, lambda text: print(text, file=sys.stderr))
    if not len(positions):
        raise DataError(f"the data has no {args.split} target, so nothing can be ranked; see `karma-fast check-data`")
    rows, bars = {}, sys.stderr.isatty()
    if args.baselines:
        found = baseline_rows(data, positions, mask_seen=args.masked, progress=bars)
        rows = {KEYS.get(name, name): row for name, row in found.items()}
    own = model.config.recipe
    rows[own] = evaluate_model(model, data, positions, mask_seen=args.masked, progress=bars)
    line = protocol(data, positions, model.config.max_history, args.masked, len(there), args.baselines)
    if args.json:
        print(json.dumps({"rows": rows, "protocol": line, "split": args.split, "requests": len(positions),
                          "drawn_from": len(there)}, indent=1))
        return 0
    print(f"{table(rows, (*COLUMNS, 'AUC', 'tie_share'))}\n\n{args.split}: {line}")
    if args.baselines:
        print("\n" + "\n".join(verdict(rows, len(positions), own)))
    return 0
