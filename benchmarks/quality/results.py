"""The results file of a table, and what each request of a row got, kept beside the row's run.

A test request is read once for each row and seed. The file says when; a second reading needs --again and is counted.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from karma_fast.config import ConfigError
from karma_fast.evaluation import Ranks
from karma_fast.model.storage import write_atomically

from ..machine import describe
from .protocol import Requests, gains
from .rows import ROWS

LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate", "scipy")
COMPARED = ("HR@10", "HR@50", "HR@200", "NDCG@10", "MRR")
REFERENCES = ("mix", "A")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Results:
    """One JSON file: ``records``, one a row and seed (on validation also a change of settings), and comparisons."""

    def __init__(self, path: Path, device: str, about: dict[str, Any]) -> None:
        self.path, about = path, about | {"machine": describe(device, LIBRARIES)}
        self.values: dict[str, Any] = {"benchmark": "quality", **about, "date": now(), "commands": [], "records": [],
                                       "comparisons": {}}
        if path.exists():
            self.values = json.loads(path.read_text(encoding="utf-8"))
            for name, value in json.loads(json.dumps(about)).items():
                if self.values.get(name) != value:
                    raise ConfigError(f"{path}: its {name} is {str(self.values.get(name))[:300]}, and this run's "
                                      f"{str(value)[:300]}; rows of one table share it, so set it back or give --out")

    def find(self, row: str, seed: int, changes: dict[str, str]) -> dict[str, Any] | None:
        for record in self.values["records"]:
            if (record["row"], record["seed"], record["changes"]) == (row, seed, changes):
                return record
        return None

    def put(self, record: dict[str, Any], command: str) -> None:
        """Adds the record, in place of an earlier one of the same row and seed, which its ``readings`` then count."""
        before = self.find(record["row"], record["seed"], record["changes"])
        if before is not None:
            self.values["records"].remove(before)
        self.values["records"].append(record | {"readings": (before or {}).get("readings", 0) + 1, "date": now(),
                                                "command": command})
        self.made_by(command)

    def made_by(self, command: str) -> None:
        """Notes that the command added something, now."""
        self.values["date"] = now()
        if command not in self.values["commands"]:
            self.values["commands"].append(command)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, to_json(self.values))


def to_json(values: Any) -> str:
    """Indented, but with every list of numbers in one line."""
    lists = re.compile(r"\[\s+([-+.\deE]+(?:,\s+[-+.\deE]+)*)\s+\]")
    return lists.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(values, indent=1)) + "\n"


def save_ranks(path: Path, requests: Requests, ranks: dict[str, Ranks]) -> None:
    """Expected ranks of every request by variant, with the positions they belong to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name("part-" + path.name)
    np.savez_compressed(part, positions=requests.positions, **{name: r.expected for name, r in ranks.items()})
    part.replace(path)


def usable_ranks(records: list[dict[str, Any]], path_of: Callable[[str, int], Path]
                 ) -> dict[tuple[str, int], Path]:
    """(row, seed) -> the file of its ranks, where there is one that gives what its record says.

    So a row can be compared with one recorded elsewhere, once that was trained again and came out the same.
    """
    return {(r["row"], r["seed"]): path for r in records
            if (path := path_of(r["row"], r["seed"])).exists() and gives(path, r["metrics"])}


def gives(path: Path, metrics: dict[str, dict[str, dict[str, float]]]) -> bool:
    """Whether ranks that `save_ranks` wrote have these metrics; a rank of one request that differs is seen."""
    with np.load(path) as ranks:
        return all(variant in ranks and abs(gains(ranks[variant], metric).mean() - parts["all"][metric]) < 1e-9
                   for variant, parts in metrics.items() for metric in COMPARED)


def merge(known: dict[str, dict], found: dict[str, dict]) -> None:
    """Puts comparisons ``found`` among the ``known``; one over more seeds, made where other ranks lie, stays."""
    for row, entries in found.items():
        kept = known.setdefault(row, {})
        kept.update({name: entry for name, entry in entries.items()
                     if entry["seeds"] >= kept.get(name, entry)["seeds"]})


def compare(records: list[dict[str, Any]], ranks_at: dict[tuple[str, int], Path], variants: list[str],
            parts: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, Any]]]:
    """row -> "row2, variant" -> metric -> difference to row2, with its standard error over requests.

    Every row is compared with the tuned mix, with A and with the row it is derived from, request by request; with the
    mix and A also in each of the ``parts`` that are not all, seen items left out, under "row2, masked, part". With
    several seeds a request counts by its mean over those that both rows have; a row without seeds meets each of the
    other's.
    """
    seeds: dict[str, list[int]] = {}
    for record in records:
        if (record["row"], record["seed"]) in ranks_at:
            seeds.setdefault(record["row"], []).append(record["seed"])
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for row in seeds:
        for other in dict.fromkeys((*REFERENCES, ROWS[row].parent)):
            pairs = seed_pairs(row, other, seeds)
            if other == row or not pairs:
                continue
            files = [(ranks_at[row, a], ranks_at[other, b]) for a, b in pairs]
            entries = out.setdefault(row, {})
            for variant in variants:
                entries[f"{other}, {variant}"] = compared(files, variant) | {"seeds": len(pairs)}
            if other in REFERENCES:
                for part, keep in parts.items():
                    if keep.any() and not keep.all():
                        entries[f"{other}, masked, {part}"] = compared(files, "masked", keep) | {"seeds": len(pairs)}
    return out


def seed_pairs(row: str, other: str, seeds: dict[str, list[int]]) -> list[tuple[int, int]]:
    """Seeds of both rows to be set side by side."""
    if other not in seeds:
        return []
    if not ROWS[row].seeded:
        return [(seeds[row][0], seed) for seed in sorted(seeds[other])]
    if not ROWS[other].seeded:
        return [(seed, seeds[other][0]) for seed in sorted(seeds[row])]
    return [(seed, seed) for seed in sorted(set(seeds[row]) & set(seeds[other]))]


def compared(paths: list[tuple[Path, Path]], variant: str, keep: np.ndarray | None = None) -> dict[str, Any]:
    """metric -> difference, its standard error over requests, and the difference of each seed. keep: (T,) bool."""
    differences: dict[str, list[np.ndarray]] = {metric: [] for metric in COMPARED}
    for a, b in paths:
        with np.load(a) as ours, np.load(b) as theirs:
            if not np.array_equal(ours["positions"], theirs["positions"]):
                raise ConfigError(f"{a} and {b} are of different requests; evaluate both under the same settings")
            for metric, found in differences.items():
                difference = gains(ours[variant], metric) - gains(theirs[variant], metric)
                found.append(difference if keep is None else difference[keep])
    out = {}
    for metric, found in differences.items():
        mean = np.mean(found, axis=0)
        error = float(mean.std(ddof=1) / np.sqrt(len(mean))) if len(mean) > 1 else None
        out[metric] = {"difference": float(mean.mean()), "standard_error": error,
                       "by_seed": [float(x.mean()) for x in found]}
    return out
