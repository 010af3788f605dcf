"""One table, one command: ``python -m benchmarks.quality --data beauty --rows A,C --seeds 0,1,2 --size reduced``.

Every row and seed is a run of its own that keeps its checkpoints; --minutes stops cleanly in time and --resume goes
on. The test requests of a row and seed are ranked once. Settings are tried on validation requests: ``--on valid --set
model.decode_weight=0.1``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from karma_fast.commands.common import set_up_process
from karma_fast.config import ConfigError, RunConfig
from karma_fast.data import DataError, Dataset, load_dataset

from .. import RESULTS
from ..machine import describe, file_name
from .protocol import Requests, make_requests, variants
from .results import Results, compare, merge, save_ranks, usable_ranks
from .rivals import make_baseline, make_id_row, make_query_row, train_sasrec_row
from .rows import RECIPES, ROWS, Row, chosen, why_not
from .settings import DATA, DataSet, base_config, facts_of, sasrec_config
from .train import Ready, refuse_fixed, train_karma

RUNS = Path("runs") / "quality"
DIAGNOSIS_SEED = 0  # of the requests that diagnostics look at, whatever the row and its seed


@dataclass
class Table:
    """What the rows of one command share.

    changes: settings that differ from the table's usual ones; recorded: those of them by which records are told
    apart, on validation all, on the test none. end: of `time.monotonic`.
    """

    spec: DataSet
    base_of: Callable[[str], RunConfig]  # a recipe's name
    requests: Requests
    results: Results
    runs: Path
    changes: dict[str, str]
    recorded: dict[str, str]
    command: str
    end: float
    again: bool = False
    diagnose: bool = False

    def folder(self, row: Row, seed: int) -> Path:
        """Of the row's run; changed settings have folders of their own, whether they are tried or tested."""
        text = json.dumps(self.changes, sort_keys=True)
        tried = f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if self.changes else ""
        return self.runs / f"{row.name}-{seed}{tried}"

    def ranks_file(self, folder: Path) -> Path:
        return folder / f"ranks-{self.results.values['on']}.npz"


def prepare(table: Table, row: Row, seed: int) -> Ready | None:
    data, folder = table.requests.data, table.folder(row, seed)
    if row.kind == "baseline":
        return make_baseline(row, data)
    if row.kind == "query":
        return make_query_row(row, data)
    if row.kind == "ids":
        return make_id_row(table.base_of(row.recipe).model, data)
    if row.kind == "sasrec":
        return train_sasrec_row(data, sasrec_config(table.spec, table.changes), seed, folder, table.end)
    return train_karma(row, table.base_of(row.recipe), data, seed, folder, table.end)


def run_row(table: Table, row: Row, seed: int) -> str:
    """Trains, ranks and records one row and seed; says what came of it."""
    known = table.results.find(row.name, seed, table.recorded)
    wants_diagnosis = table.diagnose and row.kind in RECIPES
    to_rank = known is None or table.again
    if not to_rank and not (wants_diagnosis and "diagnostics" not in known):
        return "known"
    start = time.perf_counter()
    ready = prepare(table, row, seed)
    if ready is None:
        return "to be gone on with"
    if to_rank:
        known = rank(table, row, seed, ready, time.perf_counter() - start)
    if wants_diagnosis and ready.model is not None:
        from karma_fast.diagnostics import diagnose

        found = diagnose(ready.model, table.requests.data, split=table.results.values["on"], seed=DIAGNOSIS_SEED,
                         untuned=has_untuned(ready.model))
        known["diagnostics"] = {name: found[name] for name in ("states", "requests", "attention_requests", "split",
                                                               "seed", "compared", "decoder", "texts", "seconds")}
        known["attention"] = rounded(found["maps"])
        table.results.made_by(table.command)
        table.results.save()
    metrics = known["metrics"]["masked"]["all"]
    return f"HR@10 {metrics['HR@10']:.4f}, HR@200 {metrics['HR@200']:.4f}, NDCG@10 {metrics['NDCG@10']:.4f}"


def has_untuned(model: Any) -> bool:
    """Whether the language model before tuning can be had, so that what tuning changed can be measured."""
    from karma_fast.diagnostics.states import Untuned

    try:
        Untuned(model)
    except ValueError:
        return False
    return True


def rounded(maps: dict) -> dict:
    """Attention maps with three digits, which is what a picture shows of them."""
    return {which: found if which == "labels" else {layer: np.round(weights, 3).tolist()
                                                    for layer, weights in found.items()}
            for which, found in maps.items()}


def rank(table: Table, row: Row, seed: int, ready: Ready, seconds: float) -> dict:
    """The one reading of the requests; the record is written before anything is shown."""
    start, folder = time.perf_counter(), table.folder(row, seed)
    ranks = {name: ready.score(table.requests, masked, queries)
             for name, masked, queries in variants(table.spec.queries)}
    metrics = {name: table.requests.metrics(found) for name, found in ranks.items()}
    save_ranks(table.ranks_file(folder), table.requests, ranks)
    record = {"row": row.name, "label": row.label, "differs": row.differs, "parent": row.parent, "kind": row.kind,
              "seed": seed, "changes": table.recorded, "model": row.model, **ready.facts, "ready_seconds": seconds,
              "ranking_seconds": time.perf_counter() - start, "metrics": metrics}
    table.results.put(record, table.command)
    records = table.results.values["records"]
    if not table.recorded:
        known = table.results.values["comparisons"]
        if table.again:  # what was compared with the reading before
            known.pop(row.name, None)
            for entries in known.values():
                for name in [name for name in entries if name.split(", ")[0] == row.name]:
                    del entries[name]
        files = usable_ranks(records, lambda row, seed: table.ranks_file(table.folder(ROWS[row], seed)))
        merge(known, compare(records, files, list(metrics), table.requests.parts))
    table.results.save()
    return table.results.find(row.name, seed, table.recorded)


def run_table(table: Table, rows: list[Row], seeds: list[int], resume: bool) -> bool:
    """All rows of the first seed, then of the next; whether nothing is left to do."""
    for row in rows:
        refuse_fixed(row, table.changes)
    # what a change may not be is said before anything is trained
    bases = [table.base_of(name) for name in dict.fromkeys(row.recipe for row in rows) if name]
    sasrec_config(table.spec, table.changes)
    for name in table.changes:
        section, _, key = name.partition(".")
        if section == "sasrec" and all(row.kind != "sasrec" for row in rows):
            raise ConfigError(f"--set {name}: row sasrec is not among {', '.join(row.name for row in rows)}; leave it "
                              "out, or take --rows sasrec")
        if section == "sasrec" and table.results.values["on"] == "test":
            raise ConfigError(f"--set {name}: try it with --on valid; on the test SASRec has the settings of "
                              "benchmarks/quality/settings.py, which hold for all seeds of a table")
        if section == "model" and not any(hasattr(base.model, key) for base in bases):
            raise ConfigError(f"--set {name}: none of the rows {', '.join(row.name for row in rows)} has this "
                              "setting; leave it out, or take other rows")
    jobs = [(row, seed) for seed in seeds for row in rows if row.seeded or seed == seeds[0]]
    if not (resume or table.again or table.diagnose):
        for row, seed in jobs:
            seed = seed_of(row, seed)
            if table.results.find(row.name, seed, table.recorded) is not None:
                raise ConfigError(f"row {row.name}, seed {seed}: {table.results.path} has its result, and requests "
                                  "are read once; --resume keeps it and does the rest, --again reads and counts "
                                  "again, and --out FILE --runs FOLDER makes a table of its own")
            if (table.folder(row, seed) / "settings.json").exists():
                raise ConfigError(f"{table.folder(row, seed)}: holds a run already; --resume goes on with it")
    for at, (row, seed) in enumerate(jobs):
        if time.monotonic() > table.end:
            print(f"time is over with {len(jobs) - at} of {len(jobs)} left; the same command with --resume goes on")
            return False
        if reason := why_not(row, table.spec.queries):
            print(f"{row.name}: skipped, as {reason}")
            continue
        seed = seed_of(row, seed)
        print(f"{row.name}, seed {seed} ({at + 1} of {len(jobs)}): {row.label}", flush=True)
        found = run_row(table, row, seed)
        print(f"  {found}", flush=True)
        if found == "to be gone on with":
            print("the same command with --resume goes on")
            return False
    return True


def seed_of(row: Row, seed: int) -> int:
    return seed if row.seeded else 0


def parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--rows", default="all", help=f"with commas, some of {', '.join(ROWS)}; default all")
    parser.add_argument("--seeds", default="0", help="with commas; of weights and of the order of training")
    parser.add_argument("--size", choices=("reduced", "full"), default="reduced",
                        help="reduced: a small model and few steps, for two CPU cores; full: one GPU")
    parser.add_argument("--on", choices=("test", "valid"), default="test")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
                        help="model.NAME or training.NAME, for all rows with a language model that have it, or "
                             "sasrec.NAME; with --on valid to try it")
    parser.add_argument("--backbone", help="a hub id, a folder or smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="save and stop after so many; what is being ranked is ranked first")
    parser.add_argument("--resume", action="store_true", help="keep what there is and go on")
    parser.add_argument("--again", action="store_true", help="read the requests again; the file counts the readings")
    parser.add_argument("--diagnose", action="store_true", help="also measure collapse (karma_fast.diagnostics)")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the public files of Amazon Beauty")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="FOLDER", help="checkpoints and ranks")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="default benchmarks/results/quality/<data>-<size>-<device>.json")
    return parser, parser.parse_args(arguments)


def make_table(args: argparse.Namespace) -> Table:
    started, spec = time.monotonic(), DATA[args.data]
    changes = dict(text.partition("=")[::2] for text in args.changes)
    if args.backbone:
        changes["model.backbone"] = args.backbone
    source = spec.config(args.source)
    tried = dict(changes)

    @functools.cache
    def base_of(kind: str) -> RunConfig:
        return base_config(spec, args.size, source, tried, kind)

    base = base_of("karma")
    if Path(base.model.backbone).is_dir():
        changes |= {"model.backbone": Path(base.model.backbone).name} if "model.backbone" in changes else {}
    data = load_dataset(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    requests = make_requests(data, spec, args.on)
    # a table of the test has one setting for all rows; on validation, records of several settings stand side by side
    settings = base if args.on == "test" else base_config(spec, args.size, source)
    about = {"data": spec.name, "size": args.size, "on": args.on, "settings": facts_of(settings),
             "protocol": protocol_line(data, requests, settings),
             "requests": requests.sizes(), "queries": spec.queries}
    valid = "" if args.on == "test" else "-valid"
    name = file_name(describe(device)["name"])
    out = args.out or RESULTS / "quality" / f"{spec.name}-{args.size}-{name.removesuffix('.json')}{valid}.json"
    results = Results(out, device, about)
    return Table(spec, base_of, requests, results, args.runs / f"{spec.name}-{args.size}", changes,
                 changes if args.on == "valid" else {}, command_of(args, changes), started + 60 * args.minutes,
                 args.again, args.diagnose)


def protocol_line(data: Dataset, requests: Requests, config: RunConfig) -> str:
    """What holds for every row, whether seen items are left out or not."""
    return (f"{data.name}: {len(requests.positions):,} requests ranked against all {len(data.items):,} items, ties "
            f"count half, the language model reads the last {config.model.max_history} items; "
            f"{data.split.description}")


def command_of(args: argparse.Namespace, changes: dict[str, str]) -> str:
    """What to type to get the same again; where files lie is nobody's business."""
    words = ["python", "-m", "benchmarks.quality", "--data", args.data, "--rows", args.rows, "--seeds", args.seeds,
             "--size", args.size]
    words += ["--on", args.on] * (args.on != "test")
    words += [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    words += ["--diagnose"] * args.diagnose
    return shlex.join(words)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, args = parse(arguments)
    set_up_process()
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        rows = chosen(args.rows, DATA[args.data].queries)
        table = make_table(args)
        done = run_table(table, rows, seeds, args.resume)
    except (ConfigError, DataError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on")
        return 130
    print(f"results: {table.results.path}" + ("" if done else " (not complete)"))
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
