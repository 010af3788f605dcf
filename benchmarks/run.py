"""Runs the cases with every implementation there is and writes one JSON file: ``python -m benchmarks.run --help``.

Each implementation is first compared with float64; one that is wrong is marked so and counts as no alternative. One
that raises, or runs out of memory, leaves its error in the file and the run goes on. On a CPU the implementations of a
case are timed in turn, on a GPU one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time

import torch

from . import RESULTS, measure
from .cases import Case, Inputs, cases_for, make_inputs
from .exact import Exact, errors, exact, too_far
from .implementations import IMPLEMENTATIONS, Implementation, absent
from .machine import describe, file_name
from .session import Run, add_arguments, chosen, command_of, reason_of, run_to_the_end, tidy
from .tables import short_table

SECONDS = {"cpu": 10.0, "cuda": 0.4}  # of timing: on a CPU a case, on a GPU an implementation


def variants(case: Case) -> list[tuple[str, Implementation, int]]:
    """(name, implementation, workspace in MiB); one for each workspace of the case where it makes a difference."""
    out = []
    for i in IMPLEMENTATIONS:
        for mib in case.workspaces if i.workspace else case.workspaces[:1]:
            out.append((i.name if mib == case.workspaces[0] else f"{i.name} {mib} MiB", i, mib))
    return out


def add_times(record: dict, case: Case, times: measure.Times, peak: float) -> None:
    for part in ("forward", "backward", "total"):
        record[f"{part}_ms"] = dataclasses.asdict(getattr(times, part))
    record["repeats"] = times.repeats
    record["peak_fraction"] = case.useful_flops / (1e-3 * times.total.median) / peak


def measure_one(run: Run, case: Case, name: str, i: Implementation, inputs: Inputs, truth: Exact) -> dict | None:
    """Errors and memory, and on a GPU the times; None if that failed, which is then recorded."""
    try:
        start = time.perf_counter()
        loss, _ = measure.step(i.loss, inputs)
        found = errors(loss, inputs, truth)
        first = time.perf_counter() - start
        memory = measure.peak_memory(i.loss, inputs)
        times = measure.time_gpu(i.loss, inputs, SECONDS["cuda"]) if run.device == "cuda" else None
    except Exception as error:  # whatever another library raises
        run.record(case, name, "error", reason=reason_of(error))
        error.__traceback__ = None  # it holds the tensors of the failed call
        tidy(run.device)
        return None
    finite = {x: e if math.isfinite(e) else None for x, e in found.items()}  # JSON has no NaN
    record = run.record(case, name, "wrong" if too_far(found, inputs.query.dtype) else "ok", errors=finite,
                        memory_mib=memory / 2**20, workspace_mib=inputs.workspace_bytes >> 20, first_call_s=first)
    if times is not None:
        add_times(record, case, times, run.results["peak_flops"][case.dtype])
    return record


def run_case(run: Run, case: Case) -> None:
    torch.compiler.reset()
    todo = [(name, i, mib) for name, i, mib in variants(case) if not run.known(case, name)]
    ready = []
    for name, i, mib in todo:
        if reason := absent(i, case, run.device):
            run.record(case, name, "absent", reason=reason)
        else:
            ready.append((name, i, mib))
    if not ready:
        return
    if case.dtype not in run.results["peak_flops"]:
        sizes = (512,) if run.quick else None
        run.results["peak_flops"][case.dtype] = measure.matmul_peak(run.device, getattr(torch, case.dtype), sizes)
    inputs = make_inputs(case, run.device)
    truth = exact(inputs)
    together: dict[str, tuple] = {}
    for name, i, mib in ready:
        if run.over():
            run.record(case, name, "skipped", reason="time budget")
            continue
        own = dataclasses.replace(inputs, workspace_bytes=mib << 20)
        record = measure_one(run, case, name, i, own, truth)
        own.query.grad = own.key.grad = None
        tidy(run.device)
        if record is not None:
            together[name] = (i.loss, own, record)
        run.save()
    if run.device == "cpu" and together:
        losses = {name: (loss, own) for name, (loss, own, _) in together.items()}
        for name, times in measure.time_cpu(losses, 0.3 if run.quick else SECONDS["cpu"], stop=run.over).items():
            add_times(together[name][2], case, times, run.results["peak_flops"][case.dtype])
    run.save()


def names_of(case: Case) -> list[str]:
    return [name for name, _, _ in variants(case)]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    add_arguments(parser, "queries x keys x width, dtype, flags: 8192x8192x768-bf16-ids-log_q", "<device>", 3600.0)
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, cases_for(args.device), Case.parse,
                   lambda case: not args.quick or case.rows * case.keys <= 1 << 20)
    out = args.out or RESULTS / file_name(describe(args.device)["name"])
    run = Run("info_nce", out, args.device, args.budget, command_of("benchmarks.run", args), args.quick)
    if args.resume and out.exists():
        run.resume()
    if run.results["copy_bytes_per_second"] is None:
        run.results["copy_bytes_per_second"] = measure.copy_bandwidth(run.device, 1 << 22 if run.quick else None)
    run_to_the_end(run, "benchmarks.run", arguments, cases, names_of, run_case)
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
