"""Makes prompts with every implementation and writes one JSON file: ``python -m benchmarks.soft_prompt --help``.

Each is first compared with float64; one that is wrong is marked so and counts as no alternative. One that raises, or
runs out of memory, leaves its error in the file and the run goes on. On a CPU the implementations of a case are timed
in turn, on a GPU one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time

import torch

from .. import RESULTS, measure
from ..machine import describe, file_name
from ..session import Run, add_arguments, chosen, command_of, reason_of, run_to_the_end, tidy
from .cases import Case, Inputs, cases_for, make_inputs
from .exact import Exact, errors, exact, too_far
from .implementations import IMPLEMENTATIONS, Implementation, absent
from .measuring import memory, step, time_cpu, time_gpu
from .tables import short_table

SECONDS = {"cpu": 6.0, "cuda": 0.3}  # of timing: on a CPU a case, on a GPU an implementation
QUICK = {"cpu": 6e8, "cuda": 1e10}  # operations of the cases of a quick run, at most


def limits_of(run: Run, case: Case) -> dict[str, float]:
    """Milliseconds of the operations and of the bytes that nothing can save; no step is faster than the larger."""
    operations = 1e3 * case.useful_flops / run.results["peak_flops"][case.dtype]
    moved = 1e3 * case.least_bytes / run.results["copy_bytes_per_second"]
    return {"flops_ms": operations, "bytes_ms": moved, "limit_ms": max(operations, moved)}


def add_times(run: Run, record: dict, times: measure.Times) -> None:
    for part in ("forward", "backward", "total"):
        record[f"{part}_ms"] = dataclasses.asdict(getattr(times, part))
    record |= {"repeats": times.repeats, "limit_fraction": record["limit_ms"] / times.total.median,
               "peak_fraction": record["flops_ms"] / times.total.median}


def measure_one(run: Run, case: Case, i: Implementation, inputs: Inputs, truth: Exact) -> dict | None:
    """Errors and memory, and on a GPU the times; None if that failed, which is then recorded."""
    try:
        start = time.perf_counter()
        found = errors(*step(i.prompt, inputs)[:2], inputs, truth)
        first = time.perf_counter() - start
        most, kept = memory(i.prompt, inputs)
        times = time_gpu(i.prompt, inputs, 0.05 if run.quick else SECONDS["cuda"]) if run.device == "cuda" else None
    except Exception as error:  # whatever a compiler raises
        run.record(case, i.name, "error", reason=reason_of(error))
        error.__traceback__ = None  # it holds the tensors of the failed call
        tidy(run.device)
        return None
    finite = {x: e if math.isfinite(e) else None for x, e in found.items()}  # JSON has no NaN
    record = run.record(case, i.name, "wrong" if too_far(found, inputs.dtype) else "ok", errors=finite,
                        positions=inputs.slots.numel(), memory_mib=most / 2**20, kept_mib=kept / 2**20,
                        first_call_s=first, **limits_of(run, case))
    if times is not None:
        add_times(run, record, times)
    return record


def run_case(run: Run, case: Case) -> None:
    torch.compiler.reset()
    ready = []
    for i in IMPLEMENTATIONS:
        if run.known(case, i.name):
            continue
        if reason := absent(i, run.device):
            run.record(case, i.name, "absent", reason=reason)
        else:
            ready.append(i)
    if not ready:
        return
    if case.dtype not in run.results["peak_flops"]:
        sizes = (512,) if run.quick else None
        run.results["peak_flops"][case.dtype] = measure.matmul_peak(run.device, getattr(torch, case.dtype), sizes)
    inputs = make_inputs(case, run.device)
    truth = exact(inputs)
    tidy(run.device)
    prompts, records = {}, {}
    for i in ready:
        if run.over():
            run.record(case, i.name, "skipped", reason="time budget")
            continue
        record = measure_one(run, case, i, inputs, truth)
        tidy(run.device)
        if record is not None:
            prompts[i.name], records[i.name] = i.prompt, record
        run.save()
    if run.device == "cpu" and prompts:
        for name, times in time_cpu(prompts, inputs, 0.3 if run.quick else SECONDS["cpu"], run.over).items():
            add_times(run, records[name], times)
    run.save()


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soft_prompt", description=__doc__.split("\n\n")[0])
    add_arguments(parser, "vectors x width x mid x hidden, dtype of the token embeddings, maybe tokens a vector: "
                  "2048x256x256x2048-bf16, or 512x256x256x2048-bf16-4tokens", "soft-prompt-<device>", 600.0)
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, cases_for(args.device), Case.parse,
                   lambda case: not args.quick or case.useful_flops <= QUICK[args.device])
    out = args.out or RESULTS / f"soft-prompt-{file_name(describe(args.device)['name'])}"
    run = Run("soft_prompt", out, args.device, args.budget, command_of("benchmarks.soft_prompt", args), args.quick, ())
    if args.resume and out.exists():
        run.resume()
    if run.results["copy_bytes_per_second"] is None:
        run.results["copy_bytes_per_second"] = measure.copy_bandwidth(run.device, 1 << 22 if run.quick else None)
    names = [i.name for i in IMPLEMENTATIONS]
    run_to_the_end(run, "benchmarks.soft_prompt", arguments, cases, lambda case: names, run_case)
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
