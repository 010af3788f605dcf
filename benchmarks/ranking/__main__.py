"""Ranks with every implementation there is and writes one JSON file: ``python -m benchmarks.ranking --help``.

Each implementation prepares the catalogue (packing, an index) and is then called: first on a small catalogue, so that
code is loaded and compiled, then once for its hits and memory. Hits are compared with float64, and one that is wrong
counts as no alternative. Then, on a CPU, all of a case are timed in turn; on a GPU one after the other.
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
from ..session import Run, add_arguments, chosen, command_of, reason_of, run_to_the_end, tidy
from .cases import Case, Inputs, cases_for, make_inputs
from .exact import Exact, Found, by_k, compare, exact, is_wrong
from .gpu import GPU_IMPLEMENTATIONS
from .implementations import IMPLEMENTATIONS, Implementation, absent
from .tables import short_table

LIBRARIES = ("numpy", "faiss-cpu", "implicit", "ranx")
SECONDS = {"cpu": 12.0, "cuda": 1.0}  # of timing: on a CPU a case, on a GPU an implementation
QUICK = {"cpu": 4e9, "cuda": 2e11}  # operations of the cases of a quick run, at most
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


def implementations(device: str) -> tuple[Implementation, ...]:
    return GPU_IMPLEMENTATIONS if device == "cuda" else IMPLEMENTATIONS


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


def held(device: str) -> int | None:
    """Bytes that are held now: on a GPU by torch, else by the process."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    measure.give_back()
    return measure.memory_of_process()


def prepare(i: Implementation, inputs: Inputs, shared: Shared) -> Prepared | None:
    if i.prepare is None:
        return None
    make = i.plan(inputs) if i.plan else i.prepare
    if make not in shared:
        device = inputs.items.device.type
        before = held(device)
        start = time.perf_counter()
        catalogue = make(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        pack = 1e3 * (time.perf_counter() - start)
        names = list(getattr(make, "keywords", {}).get("also", ()))
        shared[make] = Prepared(catalogue, pack, mebibytes(held(device), before), names)
    return shared[make]


def measure_one(run: Run, case: Case, i: Implementation, inputs: Inputs, truth: Exact, shared: Shared,
                hits: dict[str, np.ndarray]) -> tuple[object, dict] | None:
    """The prepared catalogue and the record so far, on a GPU with times; None if it failed, which is then recorded."""
    on_gpu, times = run.device == "cuda", None
    try:
        small = make_inputs(dataclasses.replace(case, queries=32, items=512), run.device)
        i.find(small, i.prepare(small) if i.prepare else None)
        prepared = prepare(i, inputs, shared)
        catalogue = prepared.catalogue if prepared else None
        call = functools.partial(i.find, inputs, catalogue)
        before = held(run.device)
        found, most = measure.peak_of_gpu(call) if on_gpu else measure.peak_of_process(call)
        errors = compare(found, truth)
        if on_gpu:
            times = measure.time_call_gpu(call, inputs.items.device, 0.1 if run.quick else SECONDS["cuda"])
    except Exception as error:  # whatever another library raises
        run.record(case, i.name, "error", reason=reason_of(error))
        error.__traceback__ = None  # it holds what the failed call held
        tidy(run.device)
        return None
    status = "wrong" if i.exact and is_wrong(errors) else "ok" if i.exact else "inexact"
    if status == "ok":
        hits.setdefault("all", found.hits)  # of the first one, which is ours where it runs
    differ = {"all_hits_differ": by_k((found.hits != hits["all"]).sum(0))} if "all" in hits else {}
    more = mebibytes(most, before)
    packed = prepared.mib if prepared else 0.0
    record = run.record(case, i.name, status, errors=errors | differ, hit_rate=by_k(found.hits.mean(0)),
                        batch=i.batch(case.items) or case.queries, pack_ms=prepared.pack_ms if prepared else None,
                        packed_mib=packed, memory_mib=None if more is None or packed is None else packed + more,
                        paths=prepared.paths if prepared else [])
    if times is not None:
        add_times(record, case, times, run.results["peak_flops"])
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
            if run.device == "cpu":
                calls[i.name] = functools.partial(timed, functools.partial(i.find, inputs, catalogue))
        run.save()
    seconds = 0.3 if run.quick else SECONDS["cpu"]
    for name, found in measure.in_turn(calls, seconds, LEAST, 20, run.over, EACH).items():
        add_times(records[name], case, found, run.results["peak_flops"])
    run.save()


def run_case(run: Run, case: Case) -> None:
    ready = []
    for i in implementations(run.device):
        if run.known(case, i.name):
            continue
        if reason := absent(i, case, run.device):
            run.record(case, i.name, "absent", reason=reason)
        else:
            ready.append(i)
    if not ready:
        return
    inputs = make_inputs(case, run.device)
    truth = exact(inputs)
    hits: dict[str, np.ndarray] = {}
    for group in [[i] for i in ready] if run.device == "cuda" else \
            groups(ready, inputs.items.nbytes, memory_to_hold(case)):
        run_group(run, case, group, inputs, truth, hits)
        tidy(run.device)


def measure_machine(run: Run) -> None:
    """What torch's matrix product and a copy reach, in the same run."""
    for dtype in ("float32", "bfloat16"):
        if dtype not in run.results["peak_flops"]:
            sizes = (512,) if run.quick else None
            run.results["peak_flops"][dtype] = measure.matmul_peak(run.device, getattr(torch, dtype), sizes)
    if run.results["copy_bytes_per_second"] is None:
        run.results["copy_bytes_per_second"] = measure.copy_bandwidth(run.device, 1 << 22 if run.quick else None)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__.split("\n\n")[0])
    add_arguments(parser, "queries x items x width and kind: 512x100000x256-trained, or -untrained; "
                  "then maybe -bf16, and -all to leave out no seen items", "ranking-<device>", BUDGET)
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, cases_for(args.device), Case.parse,
                   lambda case: not args.quick or case.flops <= QUICK[args.device])
    out = args.out or RESULTS / f"ranking-{file_name(describe(args.device)['name'])}"
    run = Run("ranking", out, args.device, args.budget, command_of("benchmarks.ranking", args), args.quick, LIBRARIES)
    if args.resume and out.exists():
        run.resume()
    measure_machine(run)
    names = [i.name for i in implementations(args.device)]
    run_to_the_end(run, "benchmarks.ranking", arguments, cases, lambda case: names, run_case)
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
