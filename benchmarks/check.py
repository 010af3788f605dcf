"""The kernels against what they must compute: ``python -m benchmarks.check``.

A quarter of the time is for counting ranks, whose scores must be equal to the last bit, see ``check_ranks.py``. The
rest is for the backends of info_nce against float64, with every combination of flags: a check compares the losses and
all gradients with the dense float64 computation; an error may be twice that of the same dense computation in the dtype
of the inputs, plus rounding. Then it runs twice more and expects the same bits.

Each check draws new inputs. Memory that is allocated but not yet written holds NaN during the first run, so that
whatever was left unwritten shows; the others run on ordinary memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import random
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check_ranks
from .implementations import dense_loss, probe_karma

FLAGS = ("labels", "ids", "log_q", "symmetric", "normalize")
SHAPES = ((1, 1, 16), (5, 3, 8), (33, 47, 64), (127, 300, 65), (64, 64, 128), (256, 256, 256), (257, 1000, 513),
          (40, 4099, 768), (1030, 1030, 96), (70, 133, 2048))
REDUCTIONS = ("none", "mean", "sum")
WORKSPACES = (1 << 16, 1 << 20, 64 << 20)  # bytes; the small ones make many pieces of these small shapes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS_SHARE = 0.25  # of the time


@dataclass
class Problem:
    """One draw; ``upstream`` is the gradient that reaches the loss, (B,) for reduction "none" and else one number."""

    tensors: dict[str, Tensor]  # query, key, scale and maybe log_q
    fixed: dict[str, Tensor | bool | None]
    reduction: str
    upstream: Tensor


def draw(shape: tuple[int, int, int], dtype: torch.dtype, flags: frozenset[str], seed: int, device: str) -> Problem:
    rows, keys, width = shape
    g = torch.Generator().manual_seed(seed)
    keys = max(keys, rows) if "labels" not in flags or "symmetric" in flags else keys
    length = 5.0 if "normalize" in flags else width**-0.5
    query, key = (torch.randn(n, width, generator=g) * length for n in (rows, keys))
    key += 0.5 * length * torch.randn(width, generator=g)  # all of them point somewhat the same way
    distinct = torch.randperm(keys, generator=g)[:rows]
    labels = None
    if "labels" in flags:
        labels = distinct if "symmetric" in flags else torch.randint(keys, (rows,), generator=g)
    query += key[torch.arange(rows) if labels is None else labels] * 0.7
    tensors = {"query": query.to(dtype), "key": key.to(dtype), "scale": 4 + 8 * torch.rand((), generator=g)}
    if "log_q" in flags:
        tensors["log_q"] = torch.rand(keys, generator=g) * 6 - 9
    ids = torch.randint(max(2, keys // 3), (keys,), generator=g)
    fixed = {"labels": labels, "key_ids": ids if "ids" in flags else None, "symmetric": "symmetric" in flags,
             "normalize": "normalize" in flags}
    reduction = random.Random(seed).choice(REDUCTIONS)
    return Problem({k: x.to(device) for k, x in tensors.items()},
                   {k: x.to(device) if isinstance(x, Tensor) else x for k, x in fixed.items()}, reduction,
                   torch.randn((rows,) if reduction == "none" else (), generator=g).to(device))


def run(problem: Problem, loss: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss and all gradients, with the inputs cast to ``dtype`` first if that is given."""
    tensors = {k: x.to(dtype or x.dtype, copy=True).requires_grad_() for k, x in problem.tensors.items()}
    out = loss(**tensors, **problem.fixed, reduction=problem.reduction)
    out.backward(problem.upstream.to(out.dtype))
    return {"loss": out.detach()} | {k: x.grad for k, x in tensors.items()}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what is allocated without a value with NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some operations have no deterministic form is not the point here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def allowed(problem: Problem, true: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, float]:
    """Largest |got - true| of each output: twice the error of plain torch, one rounding of the result to the dtype of
    the inputs, and a few float32 roundings of the terms that it is summed from."""
    query, key, scale = (problem.tensors[x].double() for x in ("query", "key", "scale"))
    if problem.fixed["normalize"]:
        shrink = {"query": query.norm(dim=1).min().item(), "key": key.norm(dim=1).min().item()}
        query, key = torch.nn.functional.normalize(query), torch.nn.functional.normalize(key)
    else:
        shrink = {"query": 1.0, "key": 1.0}
    score, s, rows = (query @ key.T).abs().max().item(), scale.item(), len(query)
    reduced = {"none": 1.0, "sum": rows**0.5, "mean": rows**-0.5}[problem.reduction]  # norm of the weights of the rows
    weight = problem.upstream.double().norm().item() * reduced
    longest = {"query": key.norm(dim=1).max().item(), "key": query.norm(dim=1).max().item()}
    terms = {"loss": s * score * reduced * rows**0.5, "scale": weight * score, "log_q": weight}
    terms |= {name: weight * s * longest[name] / shrink[name] for name in longest}
    eps, eps32 = torch.finfo(problem.tensors["query"].dtype).eps, torch.finfo(torch.float32).eps
    # one number that is the sum over all rows may be near zero by chance, for plain torch and for us
    size = {name: terms["scale"] if name == "scale" else x.norm().item() for name, x in true.items()}
    return {name: 2 * (plain[name].double() - x).norm().item() + eps * size[name] + 8 * eps32 * terms[name]
            for name, x in true.items()}


def check(problem: Problem, loss: Callable[..., Tensor]) -> tuple[float, str]:
    """(largest error over what is allowed, what failed or ""), on poisoned memory; then twice for equal bits."""
    true = run(problem, dense_loss, torch.float64)
    limits = allowed(problem, true, run(problem, dense_loss))
    with poisoned_memory():
        got = run(problem, loss)
    ratios = {name: (got[name].double() - x).norm().item() / limits[name] for name, x in true.items()}
    ratios = {name: ratio if math.isfinite(ratio) else math.inf for name, ratio in ratios.items()}
    name, worst = max(ratios.items(), key=lambda pair: pair[1])
    if worst > 1:
        return worst, f"{name} is off by {worst:.3g} times what is allowed"
    first, second = run(problem, loss), run(problem, loss)
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    return worst, f"two runs differ in {', '.join(differ)}" if differ else ""


def combinations(rounds: int) -> Iterator[tuple[tuple[int, int, int], torch.dtype, frozenset[str]]]:
    """Every dtype and set of flags once a round, each time with another shape."""
    kinds = [(dtype, frozenset(f for f, on in zip(FLAGS, bits, strict=True) if on))
             for bits in itertools.product((False, True), repeat=len(FLAGS)) for dtype in DTYPES]
    for at in range(rounds):
        for number, (dtype, flags) in enumerate(kinds):
            yield SHAPES[(number * 7 + at * 3) % len(SHAPES)], dtype, flags


def check_counts(problem: check_ranks.Problem, device: str, workspace: int) -> tuple[float, str]:
    """(0 or infinity, what failed or ""), on poisoned memory; then again on ordinary memory."""
    expected = check_ranks.truth(problem)
    with poisoned_memory():
        failure = check_ranks.check(problem, expected, device, workspace)
    failure = failure or check_ranks.check(problem, expected, device, workspace)
    return (math.inf if failure else 0.0), failure


@dataclass
class Tally:
    """What was checked, (backend, dtype) by (backend, dtype), and what failed."""

    found: dict[tuple[str, torch.dtype], list[float]]  # error over what is allowed
    failures: list[tuple[str, torch.dtype, str]]

    def add(self, backend: str, dtype: torch.dtype, what: str, call: Callable[[], tuple[float, str]]) -> None:
        try:
            worst, failure = call()
        except Exception as error:
            worst, failure = math.inf, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.found[backend, dtype].append(worst)
        if failure:
            self.failures.append((backend, dtype, f"{what}: {failure}"))

    def show(self) -> None:
        for backend, dtype, text in self.failures[:20]:
            print("FAIL", backend, dtype, text)
        print(f"{'backend':<10} {'dtype':<9} {'checks':>6} {'error / allowed':>16}")
        failed = {(backend, dtype) for backend, dtype, _ in self.failures}
        for (backend, dtype), worst in self.found.items():
            verdict = "FAIL" if (backend, dtype) in failed else "PASS"
            print(f"{backend:<10} {str(dtype)[6:]:<9} {len(worst):>6} {max(worst):>16.3g}  {verdict}")


def ranks_all(tally: Tally, device: str, rounds: int, seed: int, end: float) -> str:
    """Counting ranks, with any error at all too much; the row of a check is that of the items' dtype."""
    todo, done = list(check_ranks.combinations(rounds, check_ranks.shapes_for(device))), 0
    for number, (shape, dtypes, kind) in enumerate(todo):
        if done and time.monotonic() > end:
            break
        workspace = random.Random(seed + number).choice(check_ranks.WORKSPACES)

        problem = check_ranks.draw(shape, dtypes, kind, seed + number)
        names = " and ".join(str(dtype)[6:] for dtype in dtypes)
        tally.add("ranks", dtypes[1], f"{shape} {names}, {kind}, workspace {workspace} seed {seed + number}",
                  functools.partial(check_counts, problem, device, workspace))
        done += 1
    return f"ranks {done} of {len(todo)}"


def losses_all(tally: Tally, device: str, rounds: int, seed: int, end: float) -> str:
    """Every backend of info_nce that there is."""
    backends = []
    for backend in ("fused", "chunked", "auto"):
        try:
            probe_karma(device, backend)
            backends.append(backend)
        except (RuntimeError, ValueError) as error:
            print(f"{backend}: not on this machine ({error})")
    from karma_kernels import info_nce

    todo, done = list(combinations(rounds)), 0
    for number, (shape, dtype, flags) in enumerate(todo):
        if done and time.monotonic() > end:
            break
        problem = draw(shape, dtype, flags, seed + number, device)
        for backend in backends:
            workspace = random.Random(seed + number).choice(WORKSPACES)
            loss = functools.partial(info_nce, backend=backend, workspace_bytes=workspace)
            tally.add(backend, dtype, f"{shape} {sorted(flags)} {problem.reduction} workspace {workspace} "
                      f"seed {seed + number}", functools.partial(check, problem, loss))
        done += 1
    return f"info_nce {done} of {len(todo)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=600.0,
                        help="stop then, after one of each at least, and say what was not reached")
    parser.add_argument("--rounds", type=int, default=len(SHAPES),
                        help="shapes for each dtype and set of flags, or kind of ranks")
    parser.add_argument("--seed", type=int, help="of the first check; default random")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    tally = Tally(defaultdict(list), [])
    try:
        done = [ranks_all(tally, args.device, args.rounds, seed, start + RANKS_SHARE * args.seconds),
                losses_all(tally, args.device, args.rounds, seed, start + args.seconds)]
        print(f"{args.device}, seed {seed}: inputs of {', '.join(done)}; {len(tally.failures)} failures")
    finally:  # a lost GPU must not take with it what was found
        tally.show()
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
