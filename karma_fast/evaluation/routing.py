"""Which path of the C++ extension a query takes. All give the same result, so this is about time alone."""

from __future__ import annotations

import itertools
import math

import numpy as np

from .catalogue import Catalogue, pack, paths
from .counting import Targets
from .rows import Rows

SAMPLE = 128  # items and queries looked at
SMALL = 2 * 10**9  # products below which a look at the sample does not pay
# products an item and query in the time that the exact path of the same machine needs for one
SPEED = {"int8": 3.6, "bfloat16": 1.9, "float32": 1.0, "exact": 1.0}
AMX_SPEED = 6.0
# of deciding a pair that a filter leaves open, and of packing a number, in products of the exact path
OPEN, OPEN_A_NUMBER = 1500.0, 4.0
PACKING = {"int8": 100.0, "bfloat16": 110.0, "float32": 150.0, "exact": 150.0}


def count_routes(catalogue: Catalogue, queries: np.ndarray, score: np.ndarray, targets: Targets, path: str,
                 threads: int) -> list[tuple[str, np.ndarray]]:
    """(path, indices of its queries), every query once.

    A filter pays where few items score about as high as the target. How many do follows from the mean and spread of
    the query's scores in a sample, so high targets go to int8 and those in the bulk to the exact path, if the time
    saved is worth a second packed copy.
    """
    everything = np.arange(len(queries))
    if path != "auto":
        return [(path, everything)]
    known = paths()
    exact = next((name for name, meaning in known.items() if meaning == "exact"), next(iter(known)))
    if known[exact] != "exact" or len(queries) * len(catalogue) * queries.shape[1] < SMALL:
        return [(exact, everything)]
    costs = costs_of(catalogue, queries, score, targets, threads, exact)
    once = {name: 0.0 if catalogue.holds(name) else PACKING[known[name]] * catalogue.rows.width * len(catalogue)
            for name in costs}
    best, chosen = math.inf, (exact,)
    for size in range(1, len(costs) + 1):
        for some in itertools.combinations(costs, size):
            cost = sum(once[name] for name in some) + np.minimum.reduce([costs[name] for name in some]).sum()
            if cost < best:
                best, chosen = cost, some
    taken = np.argmin([costs[name] for name in chosen], axis=0)
    routes = [(name, everything[taken == at]) for at, name in enumerate(chosen)]
    return [(name, which) for name, which in routes if len(which)]


def costs_of(catalogue: Catalogue, queries: np.ndarray, score: np.ndarray, targets: Targets, threads: int,
             exact: str) -> dict[str, np.ndarray]:
    """name -> (Q,) time of each query on that path, in products of the exact path."""
    width, items = catalogue.rows.width, len(catalogue)
    some = catalogue.rows.array[::max(1, items // SAMPLE)][:SAMPLE]
    sample = Rows(np.ascontiguousarray(some), catalogue.rows.storage)
    scores = queries @ sample.float32().T
    spread = np.maximum(scores.std(axis=1), 1e-12)
    place = (score - scores.mean(axis=1)[targets.query]) / spread[targets.query]
    density = np.exp(-np.minimum(place * place, 100) / 2) / math.sqrt(2 * math.pi) / spread[targets.query]
    density = np.bincount(targets.query, weights=density, minlength=len(queries))  # items a unit of score, all targets
    costs = {exact: np.full(len(queries), float(items * width))}
    few = Rows(np.ascontiguousarray(queries[::max(1, len(queries) // SAMPLE)][:SAMPLE]), "float32")
    for name, meaning in paths().items():
        if meaning not in ("int8", "bfloat16") or meaning in (paths()[other] for other in costs):
            continue
        x, q = (pack(rows, name, 0, len(rows), threads) for rows in (sample, few))
        margin = q.longest * x.error + q.error * x.longest
        speed = AMX_SPEED if name.startswith("amx") else SPEED[meaning]
        open_pairs = np.minimum(2 * margin * density, 1.0 * np.diff(targets.starts))
        costs[name] = items * (width / speed + open_pairs * (OPEN + OPEN_A_NUMBER * width))
    return costs


def top_k_path(catalogue: Catalogue, k: int, path: str) -> str:
    """A filter pays once the catalogue is large against k: until then most of the time goes into the candidates."""
    if path != "auto":
        return path
    known = paths()
    wanted = "int8" if len(catalogue) > 2000 * k else "exact"
    return next((name for name, meaning in known.items() if meaning == wanted), next(iter(known)))

