"""`karma-fast baselines`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import ConfigError, DataConfig, unknown_key
from .common import COLUMNS, device_name, load_config, requests_to_rank, table

if TYPE_CHECKING:
    from ..baselines import SASRecConfig
    from ..baselines.scorers import RequestScorer
    from ..data import Dataset

FIXED = ("popularity", "item-kNN", "title TF-IDF", "transitions")  # nothing is chosen for the data at hand
SPREAD = ("HR@10", "NDCG@10")


def main(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    config, sasrec_settings = settings(args)
    seeds = whole_numbers(args.seeds) if args.seeds else [args.seed]
    from ..baselines import SASRecConfig
    from ..data import DataError, load_dataset

    sasrec = SASRecConfig.from_dict(sasrec_settings)
    data = load_dataset(config)
    positions = requests_to_rank(data.split.test, args.test_users, lambda text: print(text, file=sys.stderr))
    if not len(positions):
        raise DataError("the data has no test target, so nothing can be ranked; see `karma-fast check-data`")
    bars = sys.stderr.isatty()
    found = training_free(data, positions, args.masked, args.seed, bars)
    if not args.no_sasrec:
        found |= trained(data, positions, args, sasrec, seeds, found["rows"], bars)
    line = protocol(data, positions, args.masked)
    print(f"{table(found['rows'], (*COLUMNS, 'tie_share'))}\n\n{line}\n{remarks(found)}")
    if args.output:
        from ..model.storage import versions, write_atomically

        found |= {"protocol": line, "split": "test", "requests": len(positions), "drawn_from": len(data.split.test),
                  "masked": args.masked, "seed": args.seed, "command": shlex.join(["karma-fast", *sys.argv[1:]]),
                  "device": device_name(), "versions": versions(), "seconds": round(time.perf_counter() - started, 1)}
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.output), json.dumps(found, indent=1) + "\n")
        print(f"written  {args.output}")
    return 0


def settings(args: argparse.Namespace) -> tuple[DataConfig, dict[str, str]]:
    """The data section, and the settings of SASRec; ConfigError for others."""
    names = {field.name for field in dataclasses.fields(DataConfig)}
    for_sasrec = {key.removeprefix("sasrec."): value for key, value in args.overrides.items()
                  if key.startswith("sasrec.")}
    for_data = {key.removeprefix("data."): value for key, value in args.overrides.items()
                if not key.startswith("sasrec.")}
    for key in for_data:
        if key not in names:
            raise unknown_key("data", key, names)
    config = load_config(args.config, {f"data.{key}": value for key, value in for_data.items()}).data
    if not (config.interactions or config.name):
        raise ConfigError("baselines: no data named; give CONFIG.yaml, --interactions FILE --items FILE, or "
                          "--name ml-100k")
    return config, for_sasrec


def whole_numbers(text: str) -> list[int]:
    """
    >>> whole_numbers("0,1,2")
    [0, 1, 2]
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"--seeds: got {text!r}; different whole numbers with commas between them are needed, such "
                          "as 0,1,2")
    return [int(part) for part in parts]


def training_free(data: Dataset, positions: np.ndarray, masked: bool, seed: int, bars: bool) -> dict[str, Any]:
    """``rows`` of the scorers that count, and ``mix``: the weights that were chosen and how.

    ``query``, where requests have some: the weights of query TF-IDF beside the tuned mix and of query kNN beside both,
    {} if they were not chosen.
    """
    from ..baselines import MixWeights, baseline_rows, mix_scorer, score_row, tune_mix, tune_query
    from ..baselines.rows import QUERIES, QUERIES_MIX, QUERY_MIX, request_scorer

    def add_row(name: str, scorer: RequestScorer) -> None:
        rows[name] = score_row(data, positions, scorer, mask_seen=masked, progress=name if bars else "")

    rows = baseline_rows(data, positions, mask_seen=masked, names=FIXED, progress=bars)
    if len(data.split.valid):
        tuned = tune_mix(data, mask_seen=masked, seed=seed, progress=bars)
        name, weights = "tuned mix", tuned.weights
        mix = {"tuned": True, "weights": dataclasses.asdict(weights), "validation": tuned.metrics,
               "validation_requests": tuned.requests, "tried": tuned.tried}
    else:
        name, weights = "mix, untuned", MixWeights()
        mix = {"tuned": False, "weights": dataclasses.asdict(weights)}
    history = mix_scorer(data, weights)
    add_row(name, history)
    if not data.sequences.has_queries(positions):
        return {"rows": rows, "mix": mix}
    asked = {name: request_scorer(data, name) for name in QUERIES}
    for name, scorer in asked.items():
        add_row(name, scorer)
    query = {}
    if data.sequences.has_queries(data.split.valid):
        for name, (row, scorer) in zip((QUERY_MIX, QUERIES_MIX), asked.items(), strict=True):
            found = tune_query(data, history, scorer, mask_seen=masked, seed=seed)
            query[row] = {"weight": found.weight, "validation": found.metrics,
                          "validation_requests": found.requests, "tried": found.tried}
            history = found.scorer
            add_row(name, history)
    return {"rows": rows, "mix": mix, "query": query}


def trained(data: Dataset, positions: np.ndarray, args: argparse.Namespace, config: SASRecConfig, seeds: list[int],
            rows: dict[str, dict[str, float]], bars: bool) -> dict[str, Any]:
    """Adds SASRec's row, the mean over the seeds, to ``rows``; ``sasrec``: settings, each seed's run, the spread."""
    from ..baselines import train_sasrec
    from ..evaluation import held_out_ranks, ranking_metrics

    runs = []
    for seed in seeds:
        folder = Path(args.folder) / f"seed-{seed}" if args.folder else None
        model = train_sasrec(data, config, seed=seed, progress=bars, folder=folder)
        users = model.user_vectors([data.sequences.history(p, config.max_history) for p in positions])
        ranks = held_out_ranks(data.sequences, positions, users, model.item_vectors(), mask_seen=args.masked,
                               progress=bars)
        runs.append({**model.facts, "row": ranking_metrics(ranks, num_items=len(data.items))})
    rows["SASRec"] = {name: float(np.mean([run["row"][name] for run in runs])) for name in runs[0]["row"]}
    spread = {name: float(np.std([run["row"][name] for run in runs], ddof=1)) for name in runs[0]["row"]
              } if len(runs) > 1 else None
    return {"sasrec": {"config": config.to_dict(), "runs": runs, "standard_deviation": spread}}


def protocol(data: Dataset, positions: np.ndarray, masked: bool) -> str:
    """One line to print beside the table."""
    from ..evaluation.held_out import ranking_rule

    rule = ranking_rule(data, positions, masked, len(data.split.test))
    reading = "; queries are read by the rows of query TF-IDF and query kNN alone"
    queries = reading if data.sequences.has_queries(positions) else ""
    return (f"{rule}; statistics and weights from the training part alone, all events before the target are history"
            f"{queries}; {data.split.description}")


def remarks(found: dict[str, Any]) -> str:
    """What was chosen on validation, and how SASRec's training went."""
    mix = found["mix"]
    weights = ", ".join(f"{name} {value:g}" for name, value in mix["weights"].items())
    how = (f"NDCG@10 {mix['validation']['NDCG@10']:.4f} on {mix['validation_requests']:,} validation requests, "
           f"{mix['tried']} tried" if mix["tuned"] else "not tuned: the data has no validation target")
    lines = [f"mix: knn 1, {weights} ({how})"]
    for name, chosen in found.get("query", {}).items():
        beside = "mix" if name == "query TF-IDF" else "mix and query TF-IDF"
        lines.append(f"{name} beside the tuned {beside}: {chosen['weight']:g} (NDCG@10 "
                     f"{chosen['validation']['NDCG@10']:.4f} on {chosen['validation_requests']:,} validation "
                     f"requests, {chosen['tried']} tried)")
    if found.get("query") == {}:
        lines.append("queries are not added to the mix: no validation request has a query to choose their weight on")
    if "sasrec" in found:
        lines += [f"SASRec, seed {run['seed']}: best epoch {run['best_epoch']} of {run['epochs']}"
                  + "".join(f", validation {k} {v:.4f}" for k, v in run["validation"].items())
                  + "".join(f", test {k} {run['row'][k]:.4f}" for k in SPREAD) + f", {run['seconds']:.0f} s"
                  for run in found["sasrec"]["runs"]]
        spread = found["sasrec"]["standard_deviation"]
        if spread:
            lines.append("SASRec's row is the mean over the seeds; standard deviation between them: "
                         + ", ".join(f"{name} {spread[name]:.4f}" for name in SPREAD))
    return "\n".join(lines)
