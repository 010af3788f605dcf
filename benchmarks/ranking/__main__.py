"""Ranks with every implementation there is on a CPU and writes one JSON file: ``python -m benchmarks.ranking --help``.

Each implementation prepares the catalogue (packing, an index) and is then called: first on a small catalogue, so that
code is loaded and compiled, then once for its hits and memory. Hits are compared with float64, and one that is wrong
counts as no alternative. Then all of a case are timed in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from .. import RESULTS, measure
from ..machine import describe, file_name
from ..session import Run, add_arguments, chosen, command_of, reason_of, run_all, tidy
from .cases import Case, Inputs, cpu_cases, make_inputs
from .exact import Exact, Found, by_k, compare, exact, is_wrong
from .implementations import IMPLEMENTATIONS, Implementation, absent
from .tables import short_table

LIBRARIES = ("numpy", "faiss-cpu", "implicit", "ranx")
SECONDS = 12.0  # of timing a case
EACH = 5.0  # of timing one implementation: one that takes longer is called once or twice only
LEAST = 3  # calls of the others
BUDGET = 480.0


@dataclasses.dataclass
class Prepared:
    catalogue: object
    pack_ms: float
    mib: float | None
    paths: list[str]  # ours that "auto" chose


Shared = dict[Callable[[Inputs], object], Prepared]


def groups(ready: list[Implementation], item_bytes: int, memory: int) -> list[list[Implementation]]:
    """In order, those whose prepared catalogues fit the memory together; they are timed in turn."""
    out: list[list[Implementation]] = [[]]
    held, known = 0.0, set()
    for i in ready:
        need = 0.0 if i.prepare in known else i.holds * item_bytes
        if out[-1] and held + need > memory:
            out.append([])
            held, known, need = 0.0, set(), i.holds * item_bytes
        out[-1].append(i)
        held += need
        known |= {i.prepare} if i.prepare else set()
    return out


def memory_to_hold(case: Case) -> int:
    """Bytes for prepared catalogues: three quarters of the machine's memory, without the inputs."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, 3 * total // 4 - case.least_bytes)


def mebibytes(after: int | None, before: int | None) -> float | None:
    return None if after is None or before is None else max(0, after - before) / 2**20


def prepare(i: Implementation, inputs: Inputs, shared: Shared) -> Prepared | None:
    if i.prepare is None:
        return None
    make = i.plan(inputs) if i.plan else i.prepare
    if make not in shared:
        measure.give_back()
        before = measure.memory_of_process()
        start = time.perf_counter()
        catalogue = make(inputs)
        pack = 1e3 * (time.perf_counter() - start)
        measure.give_back()
        names = list(getattr(make, "keywords", {}).get("also", ()))
        shared[make] = Prepared(catalogue, pack, mebibytes(measure.memory_of_process(), before), names)
    return shared[make]


def measure_one(run: Run, case: Case, i: Implementation, inputs: Inputs, truth: Exact, shared: Shared,
                hits: dict[str, np.ndarray]) -> tuple[object, dict] | None:
    """The prepared catalogue and the record so far; None if it failed, which is then recorded."""
    try:
        small = make_inputs(Case(32, 512, case.width))
        i.find(small, i.prepare(small) if i.prepare else None)
        prepared = prepare(i, inputs, shared)
        catalogue = prepared.catalogue if prepared else None
        measure.give_back()
        before = measure.memory_of_process()
        found, most = measure.peak_of_process(functools.partial(i.find, inputs, catalogue))
        errors = compare(found, truth)
    except Exception as error:  # whatever another library raises
        run.record(case, i.name, "error", reason=reason_of(error))
        error.__traceback__ = None  # it holds what the failed call held
        tidy(run.device)
        return None
    status = "wrong" if i.exact and is_wrong(errors) else "ok" if i.exact else "inexact"
    if status == "ok":
        hits.setdefault("all", found.hits)  # of the first one, which is ours where it runs
    differ = {"all_hits_differ": by_k((found.hits != hits["all"]).sum(0))} if "all" in hits else {}
    call = mebibytes(most, before)
    packed = prepared.mib if prepared else 0.0
    record = run.record(case, i.name, status, errors=errors | differ, hit_rate=by_k(found.hits.mean(0)),
                        batch=i.batch(case.items) or case.queries, pack_ms=prepared.pack_ms if prepared else None,
                        packed_mib=packed, memory_mib=None if call is None or packed is None else packed + call,
                        paths=prepared.paths if prepared else [])
    return catalogue, record


def add_times(record: dict, case: Case, milliseconds: list[float], peaks: dict[str, float]) -> None:
    times = measure.Spread.of(milliseconds)
    seconds = 1e-3 * times.median
    record |= {"total_ms": dataclasses.asdict(times), "repeats": len(milliseconds),
               "queries_per_second": case.queries / seconds, "gflops": 1e-9 * case.flops / seconds,
               "peak_fraction": case.flops / seconds / peaks["float32"],
               "bf16_peak_fraction": case.flops / seconds / peaks["bfloat16"]}


def timed(find: functools.partial[Found]) -> float:
    start = time.perf_counter()
    find()
    return 1e3 * (time.perf_counter() - start)


def run_group(run: Run, case: Case, group: list[Implementation], inputs: Inputs, truth: Exact,
              hits: dict[str, np.ndarray]) -> None:
    calls, records, shared = {}, {}, {}
    for i in group:
        if run.over():
            run.record(case, i.name, "skipped", reason="time budget")
            continue
        measured = measure_one(run, case, i, inputs, truth, shared, hits)
        if measured is not None:
            catalogue, records[i.name] = measured
            calls[i.name] = functools.partial(timed, functools.partial(i.find, inputs, catalogue))
        run.save()
    seconds = 0.3 if run.quick else SECONDS
    for name, found in measure.in_turn(calls, seconds, LEAST, 20, run.over, EACH).items():
        add_times(records[name], case, found, run.results["peak_flops"])
    run.save()


def run_case(run: Run, case: Case) -> None:
    ready = []
    for i in IMPLEMENTATIONS:
        if run.known(case, i.name):
            continue
        if reason := absent(i, case):
            run.record(case, i.name, "absent", reason=reason)
        else:
            ready.append(i)
    if not ready:
        return
    inputs = make_inputs(case)
    truth = exact(inputs)
    hits: dict[str, np.ndarray] = {}
    for group in groups(ready, inputs.items.nbytes, memory_to_hold(case)):
        run_group(run, case, group, inputs, truth, hits)
        tidy(run.device)


def measure_machine(run: Run) -> None:
    """What torch's matrix product and a copy reach, in the same run."""
    for dtype in ("float32", "bfloat16"):
        if dtype not in run.results["peak_flops"]:
            sizes = (512,) if run.quick else None
            run.results["peak_flops"][dtype] = measure.matmul_peak("cpu", getattr(torch, dtype), sizes)
    if run.results["copy_bytes_per_second"] is None:
        run.results["copy_bytes_per_second"] = measure.copy_bandwidth("cpu", 1 << 22 if run.quick else None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__.split("\n\n")[0])
    add_arguments(parser, "queries x items x width and kind: 512x100000x256-trained, or -untrained",
                  "ranking-<device>", BUDGET)
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, cpu_cases(), Case.parse, lambda case: not args.quick or case.flops <= 4e9)
    out = args.out or RESULTS / f"ranking-{file_name(describe('cpu')['name'])}"
    run = Run("ranking", out, "cpu", args.budget, command_of("benchmarks.ranking", args), args.quick, LIBRARIES)
    if args.resume and out.exists():
        run.resume()
    measure_machine(run)
    run_all(run, cases, lambda case: [i.name for i in IMPLEMENTATIONS], run_case)
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
