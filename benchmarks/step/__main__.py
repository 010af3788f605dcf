"""Takes training steps with every side there is and writes one JSON file: ``python -m benchmarks.step --help``.

Every side gets the same windows, weights and settings, and runs under its own trainer: ours under KarmaTrainer, the
usual one under transformers' Trainer. First the loss's terms and gradients on a few windows are compared with the
usual side's, in bfloat16 where the machine has it, then the loss of the first step. On a CPU the sides then take their
steps in turn; on a GPU one after the other, as each is to have the memory for itself. A side that needs more memory
than it may is recorded as that, and "largest batch" looks for the most windows that fit: its step has fewer negatives.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer

from karma_fast.model.backbone import compute_dtype

from .. import RESULTS, measure
from ..implementations import why_not
from ..machine import describe, file_name
from ..session import Run, add_arguments, chosen, command_of, reason_of, run_to_the_end, tidy
from .build import Inputs, Window, make_inputs, make_side, pairs_of, trainer_of
from .cases import Case, Side, cases_for, sides_for
from .tables import is_ours, short_table
from .training import (
    collation_ms,
    errors_of,
    held_bytes,
    least_flops,
    loss_of,
    relative,
    run_steps,
    step_memory,
    timed_steps,
)
from .usual import Collator

LIBRARIES = ("transformers", "peft", "bitsandbytes", "accelerate")
FAR = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 0.25)}  # relative error of a term, of a gradient
REPEATS = {"cpu": (2, 3), "cuda": (5, 1)}  # timed steps of a run, and runs
DRIVER_GIB = 0.6  # of a card's memory, that torch's allocator does not get


@dataclass
class Ready:
    """A side after its first step."""

    trainer: Trainer
    record: dict


def probe(device: str, case: Case) -> None:
    """Raises where the side cannot run."""
    for module in ("transformers", "peft", *["bitsandbytes"] * (case.config.quantization == "4bit")):
        importlib.import_module(module)


def limit_memory(device: str, gib: int) -> None:
    """As on a card of ``gib`` GiB; 0: all there is. A CPU has no such limit."""
    if device == "cpu":
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - DRIVER_GIB) * 2**30 / total) if gib else 1.0)


def batches_to_try(count: int, shrink: bool) -> list[int]:
    """Windows of a step: all or, where fewer are allowed, the powers of two below and three quarters of them too.

    >>> batches_to_try(20, True)
    [20, 16, 12, 8, 6, 4, 3, 2, 1]
    """
    fewer = sorted({size for n in range(13) for size in (2**n, 3 * 2**n // 4) if 0 < size < count}, reverse=True)
    return [count, *fewer] if shrink else [count]


def first_step(inputs: Inputs, side: Side, model: nn.Module, collate: Callable, folder: str
               ) -> tuple[Trainer, list[Window], float]:
    """The trainer of the most windows that fit, these, and the loss of their first step."""
    counts = batches_to_try(len(inputs.windows), side.shrink)
    for count in counts:
        windows = inputs.windows[:count]
        trainer = trainer_of(inputs, side, model, collate, windows, folder)
        try:
            return trainer, windows, run_steps(trainer, 1)
        except torch.OutOfMemoryError as error:
            if count == counts[-1]:
                raise
            error.__traceback__ = None  # it holds what the failed step held
        del trainer
        model.zero_grad(set_to_none=True)
        tidy(next(model.parameters()).device.type)
    raise ValueError("no windows to take a step with")


def start(run: Run, inputs: Inputs, side: Side, folder: str) -> Ready | None:
    """Builds a side and takes its first step; None if that failed, which is then recorded."""
    case = inputs.case
    try:
        model, collate = make_side(inputs, side)
        errors = errors_of(loss_of(model, collate(inputs.checked)), inputs.expected)
        trainer, windows, loss = first_step(inputs, side, model, collate, folder)
    except Exception as error:
        run.record(case, side.name, "error", reason=reason_of(error))
        model = error.__traceback__ = None
        tidy(run.device)
        return None
    counted = collate if side.usual else Collator(collate)  # its batch is lists
    record = run.record(case, side.name, "ok", batch=len(windows), pairs=pairs_of(inputs.config, windows),
                        errors=errors, first_loss=loss, chunk=side.chunk, checkpointing=side.checkpointing,
                        collation_ms=collation_ms(trainer.data_collator, windows))
    record |= least_flops(model, counted(windows))
    check(run, case, record)
    return Ready(trainer, record)


def check(run: Run, case: Case, record: dict) -> None:
    """Says what is wrong: a term or a gradient too far from the usual side's, or the first loss of as many windows."""
    first = next((r["first_loss"] for r in run.results["records"] if r["case"] == case.name
                  and r.get("batch") == record["batch"] and not is_ours(r)), record["first_loss"])
    record["errors"] |= relative({"first loss": record["first_loss"]}, {"first loss": first})
    for_terms, for_gradients = FAR[dtype_of(run)]
    if any(not error <= (for_gradients if "gradient" in name else for_terms)
           for name, error in record["errors"].items()):
        record["status"] = "wrong"


def dtype_of(run: Run) -> str:
    """What both sides compute in."""
    return str(compute_dtype(torch.device(run.device))).removeprefix("torch.")


def add_times(run: Run, record: dict, milliseconds: list[float]) -> None:
    times = measure.Spread.of(milliseconds)
    seconds, dtype = 1e-3 * times.median, dtype_of(run)
    record |= {"total_ms": dataclasses.asdict(times), "repeats": len(milliseconds),
               "windows_per_second": record["batch"] / seconds, "dtype": dtype}
    limit = record["flops"] / run.results["peak_flops"][dtype]
    record |= {"limit_ms": 1e3 * limit, "peak_fraction": limit / seconds}


def take_steps(run: Run, ready: list[Ready]) -> None:
    """Times and memory of sides that have started."""
    steps, rounds = (2, 1) if run.quick else REPEATS[run.device]
    calls = {r.record["implementation"]: functools.partial(timed_steps, r.trainer, steps, run.device) for r in ready}
    clocks = measure.in_turn(calls, 0.0, rounds, rounds)
    for r in ready:
        found = clocks[r.record["implementation"]]
        held = held_bytes(r.trainer)
        peak = max(max(c.peaks) for c in found) if run.device == "cuda" else held + step_memory(r.trainer)
        r.record |= {"held_mib": held / 2**20, "memory_mib": peak / 2**20}
        add_times(run, r.record, [ms for c in found for ms in c.milliseconds])


def needless(run: Run, case: Case, side: Side) -> str | None:
    """Why a side would only do again what another one does."""
    if side.chunk is not None and side.chunk >= case.windows:
        return "there are no more windows than that"
    whole = side.name.replace(", largest batch", "")
    done = any(r["case"] == case.name and r["implementation"] == whole and r["status"] == "ok"
               for r in run.results["records"])
    return "all windows fit" if side.shrink and done else None


def run_group(run: Run, inputs: Inputs, sides: list[Side], folder: str) -> None:
    ready: list[Ready] = []
    for side in sides:
        if reason := needless(run, inputs.case, side):
            run.record(inputs.case, side.name, "absent", reason=reason)
        elif run.over():
            run.record(inputs.case, side.name, "skipped", reason="time budget")
        elif started := start(run, inputs, side, folder):
            ready.append(started)
        run.save()
    try:
        take_steps(run, ready)
    except (torch.OutOfMemoryError, MemoryError) as error:  # a later step needed more than the first
        for r in ready:
            r.record |= {"status": "error", "reason": reason_of(error)}
        error.__traceback__ = None
    run.save()


def run_case(run: Run, case: Case, folder: Path) -> None:
    sides = []
    for side in sides_for(run.device):
        if run.known(case, side.name):
            continue
        if reason := why_not(functools.partial(probe, case=case), run.device):
            run.record(case, side.name, "absent", reason=reason)
        else:
            sides.append(side)
    if not sides:
        return
    limit_memory(run.device, 0)
    inputs = make_inputs(case, run.device, folder)
    _ = inputs.expected  # while there is memory
    tidy(run.device)
    limit_memory(run.device, case.gib)
    with tempfile.TemporaryDirectory() as output:
        for group in [[side] for side in sides] if run.device == "cuda" else [sides]:
            run_group(run, inputs, group, output)
            tidy(run.device)


def measure_machine(run: Run) -> None:
    """What torch's matrix product reaches, in the same run."""
    for dtype in ("float32", "bfloat16"):
        if dtype not in run.results["peak_flops"]:
            sizes = (512,) if run.quick else None
            run.results["peak_flops"][dtype] = measure.matmul_peak(run.device, getattr(torch, dtype), sizes)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n\n")[0])
    add_arguments(parser, "shape-windows-positions-share of texts, maybe with the memory: demo-32-all-0.25, or "
                  "qwen2.5-1.5b-205-all-1-8gib", "step-<device>", 1500.0)
    args = parser.parse_args(arguments)
    cases = chosen(args.cases, cases_for(args.device), Case.parse,
                   lambda case: not args.quick or case == cases_for(args.device)[0])
    out = args.out or RESULTS / f"step-{file_name(describe(args.device)['name'])}"
    run = Run("step", out, args.device, args.budget, command_of("benchmarks.step", args), args.quick, LIBRARIES)
    if args.resume and out.exists():
        run.resume()
    measure_machine(run)
    with tempfile.TemporaryDirectory() as folder:
        run_to_the_end(run, "benchmarks.step", arguments, cases,
                       lambda case: [side.name for side in sides_for(args.device)],
                       functools.partial(run_case, folder=Path(folder)))
    print(short_table(run.results))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
