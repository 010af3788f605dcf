"""What every benchmark's runner shares: the results so far, the time that is left, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .machine import LIBRARIES, describe


class NamedCase(Protocol):
    """A frozen dataclass; its fields go into every record."""

    @property
    def name(self) -> str: ...


class DeviceLost(RuntimeError):
    """The GPU answers no more in this process, as after an access to memory that is not there."""


class Run:
    """The results so far, the file they go to and the time that is left."""

    def __init__(self, benchmark: str, out: Path, device: str, budget: float, command: str, quick: bool,
                 libraries: Sequence[str] = LIBRARIES) -> None:
        self.out, self.device, self.quick, self.end = out, device, quick, time.monotonic() + budget
        self.results: dict = {"benchmark": benchmark, "command": command, "machine": describe(device, libraries),
                              "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        self.results |= {"peak_flops": {}, "copy_bytes_per_second": None, "records": []}
        self.command = command

    def resume(self) -> None:
        """Takes over what the file has, except what was skipped or not yet timed; SystemExit if it is of another
        machine or of other versions."""
        before, here = json.loads(self.out.read_text()), self.results["machine"]
        other = {name: (before["machine"].get(name), here.get(name)) for name in {**before["machine"], **here}
                 if before["machine"].get(name) != here.get(name)}
        if other:
            words = "; ".join(f"{name} {was}, and now {now}" for name, (was, now) in other.items())
            raise SystemExit(f"--resume: {self.out} was measured with {words}; one file is of one machine and its "
                             "versions, so give --out for another file, or measure all anew without --resume")
        self.results = before
        self.results["records"] = [r for r in self.results["records"]
                                   if "total_ms" in r or r["status"] in ("absent", "error")]

    def known(self, case: NamedCase, name: str) -> bool:
        return any(r["case"] == case.name and r["implementation"] == name for r in self.results["records"])

    def over(self) -> bool:
        return time.monotonic() > self.end

    def record(self, case: NamedCase, name: str, status: str, **more: object) -> dict:
        """One more result. status: ok | wrong | inexact | absent | error | skipped."""
        found = dataclasses.asdict(case) | {"case": case.name, "implementation": name, "status": status} | more
        found.pop("workspaces", None)
        if without_budget(self.command) != without_budget(self.results["command"]):
            found["command"] = self.command  # of a later call, which the file's own does not measure again
        self.results["records"].append(found)
        return found

    def record_rest(self, case: NamedCase, names: Sequence[str], status: str, reason: str) -> None:
        """The same for every name that has no result yet."""
        for name in names:
            if not self.known(case, name):
                self.record(case, name, status, reason=reason)

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_name(self.out.name + ".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(self.out)


def without_budget(command: str) -> str:
    return command.rpartition(" --budget ")[0] or command


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


def run_all(run: Run, cases: Sequence[NamedCase], names: Callable[[NamedCase], Sequence[str]],
            run_case: Callable[[Run, NamedCase], object]) -> None:
    """Case after case until the time is over; what fails before its first result is recorded under all ``names``."""
    for case in cases:
        if run.over():
            run.record_rest(case, names(case), "skipped", "time budget")
            continue
        start = time.monotonic()
        try:
            run_case(run, case)
        except DeviceLost:
            raise
        except Exception as error:  # inputs or a reference that do not fit
            run.record_rest(case, names(case), "error", f"before it started: {reason_of(error)}")
            error.__traceback__ = None
            tidy(run.device)
        print(f"{case.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    run.save()


def run_to_the_end(run: Run, module: str, arguments: Sequence[str], cases: Sequence[NamedCase],
                   names: Callable[[NamedCase], Sequence[str]], run_case: Callable[[Run, NamedCase], object]) -> None:
    """All cases; if the GPU is lost, the rest in a new process of ``module``, which takes the place of this one."""
    try:
        run_all(run, cases, names, run_case)
    except DeviceLost:  # the culprit is recorded; only a new process can go on
        run.save()
        left = str(max(0.0, run.end - time.monotonic()))
        again = [sys.executable, "-m", module, *arguments, "--resume", "--budget", left]
        os.execv(sys.executable, again)


def chosen(names: list[str] | None, cases: Sequence[NamedCase], parse: Callable[[str], NamedCase],
           small: Callable[[NamedCase], bool]) -> list:
    """Those asked for, else all or, for a quick run, the ``small`` ones."""
    if not names:
        return [case for case in cases if small(case)]
    known = {case.name: case for case in cases}
    try:
        return [known.get(name) or parse(name) for name in names]
    except ValueError as error:
        raise SystemExit(f"--cases: {error}; those of a full run are {', '.join(known)}") from error


def add_arguments(parser: argparse.ArgumentParser, cases: str, out: str, budget: float) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help=f"results file; default benchmarks/results/{out}.json")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"{cases}; default all")
    parser.add_argument("--quick", action="store_true", help="small cases only, few repeats; to see that it runs")
    parser.add_argument("--budget", type=float, default=budget, metavar="SECONDS",
                        help="then the rest is skipped, which begins with the least important cases")
    parser.add_argument("--resume", action="store_true", help="keep what the results file has and do the rest")


def command_of(module: str, args: argparse.Namespace) -> str:
    """What to type to measure the same again; where the file lay is nobody's business."""
    words = ["python", "-m", module, "--device", args.device]
    words += (["--cases", *args.cases] if args.cases else []) + ["--quick"] * args.quick
    return shlex.join([*words, "--budget", f"{args.budget:g}"])
