"""Runs the cases with every implementation there is and writes one JSON file: ``python -m benchmarks.run --help``.

Each implementation is first compared with float64; one that is wrong is marked so and counts as no alternative. One
that raises, or runs out of memory, leaves its error in the file and the run goes on. On a CPU the implementations of a
case are timed in turn, on a GPU one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch

from . import RESULTS, measure
from .cases import Case, Inputs, cases_for, make_inputs
from .exact import Exact, errors, exact, too_far
from .implementations import IMPLEMENTATIONS, Implementation, absent
from .machine import describe, file_name
from .tables import short_table

SECONDS = {"cpu": 10.0, "cuda": 0.4}  # of timing: on a CPU a case, on a GPU an implementation


class DeviceLost(RuntimeError):
    """The GPU answers no more in this process, as after an access to memory that is not there."""


class Run:
    """The results so far, the file they go to and the time that is left."""

    def __init__(self, out: Path, device: str, budget: float, command: str, quick: bool) -> None:
        self.out, self.device, self.quick, self.end = out, device, quick, time.monotonic() + budget
        self.results: dict = {"benchmark": "info_nce", "command": command, "machine": describe(device),
                              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        self.results |= {"peak_flops": {}, "copy_bytes_per_second": None, "records": []}

    def resume(self) -> None:
        """Takes over what the file has, except what was skipped or not yet timed."""
        self.results = json.loads(self.out.read_text())
        self.results["records"] = [r for r in self.results["records"]
                                   if "total_ms" in r or r["status"] in ("absent", "error")]

    def known(self, case: Case, name: str) -> bool:
        return any(r["case"] == case.name and r["implementation"] == name for r in self.results["records"])

    def over(self) -> bool:
        return time.monotonic() > self.end

    def record(self, case: Case, name: str, status: str, **more: object) -> dict:
        """One more result. status: ok | wrong | absent | error | skipped."""
        found = dataclasses.asdict(case) | {"case": case.name, "implementation": name, "status": status} | more
        del found["workspaces"]
        self.results["records"].append(found)
        return found

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.out)


def variants(case: Case) -> list[tuple[str, Implementation, int]]:
    """(name, implementation, workspace in MiB); one for each workspace of the case where it makes a difference."""
    out = []
    for i in IMPLEMENTATIONS:
        for mib in case.workspaces if i.workspace else case.workspaces[:1]:
            out.append((i.name if mib == case.workspaces[0] else f"{i.name} {mib} MiB", i, mib))
    return out


def reason_of(error: BaseException) -> str:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"[:300]


def tidy(device: str) -> None:
    """Frees what a failed implementation left; raises DeviceLost if the GPU went with it."""
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(reason_of(error)) from error


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


def run_all(run: Run, cases: list[Case]) -> None:
    if run.results["copy_bytes_per_second"] is None:
        run.results["copy_bytes_per_second"] = measure.copy_bandwidth(run.device, 1 << 22 if run.quick else None)
    for case in cases:
        if run.over():
            for name, _, _ in variants(case):
                if not run.known(case, name):
                    run.record(case, name, "skipped", reason="time budget")
            continue
        start = time.monotonic()
        try:
            run_case(run, case)
        except DeviceLost:
            raise
        except Exception as error:  # inputs or float64 gradients that do not fit
            for name, _, _ in variants(case):
                if not run.known(case, name):
                    run.record(case, name, "error", reason=f"before it started: {reason_of(error)}")
            error.__traceback__ = None
            tidy(run.device)
        print(f"{case.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    run.save()


def chosen(names: list[str] | None, device: str, quick: bool) -> list[Case]:
    cases = {case.name: case for case in cases_for(device)}
    if names:
        try:
            return [cases.get(name) or Case.parse(name) for name in names]
        except ValueError as error:
            raise SystemExit(f"--cases: {error}; those of a full run are {', '.join(cases)}") from error
    return [case for case in cases.values() if not quick or case.rows * case.keys <= 1 << 20]


def command_of(args: argparse.Namespace) -> str:
    """What to type to measure the same again; where the file lay is nobody's business."""
    words = ["python", "-m", "benchmarks.run", "--device", args.device]
    words += (["--cases", *args.cases] if args.cases else []) + ["--quick"] * args.quick
    return shlex.join([*words, "--budget", f"{args.budget:g}"])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="results file; default benchmarks/results/<device>.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE",
                        help="queries x keys x width, dtype, flags: 8192x8192x768-bf16-ids-log_q; default all")
    parser.add_argument("--quick", action="store_true", help="small cases only, few repeats; to see that it runs")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS",
                        help="then the rest is skipped, which begins with the least important cases")
    parser.add_argument("--resume", action="store_true", help="keep what the results file has and do the rest")
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, args.device, args.quick)
    out = args.out or RESULTS / file_name(describe(args.device)["name"])
    run = Run(out, args.device, args.budget, command_of(args), args.quick)
    if args.resume and out.exists():
        run.resume()
    try:
        run_all(run, cases)
    except DeviceLost:  # the culprit is recorded; only a new process can go on
        run.save()
        left = str(max(0.0, run.end - time.monotonic()))
        again = [sys.executable, "-m", "benchmarks.run", *arguments, "--resume", "--budget", left]
        os.execv(sys.executable, again)
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
