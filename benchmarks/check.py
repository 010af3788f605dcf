"""The kernels against what they must compute: ``python -m benchmarks.check``.

A quarter of the time is for counting ranks, whose scores must be equal to the last bit, see ``check_ranks.py``; a
fifth for the backends of embed_prompt against float64, see ``check_soft_prompt.py``; the rest for those of info_nce,
see ``check_info_nce.py``. After a comparison with float64 a backend runs twice more, and the same bits are expected.

Each check draws new inputs. Memory that is allocated but not yet written holds NaN during the first run, so that
whatever was left unwritten shows; the others run on ordinary memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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

from . import check_info_nce, check_ranks, check_soft_prompt
from .implementations import probe_karma

RANKS_SHARE, PROMPTS_SHARE = 0.25, 0.2  # of the time


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


def check(problem: check_info_nce.Problem, loss: Callable[..., Tensor]) -> tuple[float, str]:
    """As `judge`, against the dense loss."""
    return judge(functools.partial(check_info_nce.run, problem, loss), *check_info_nce.expected(problem))


def judge(call: Callable[[], dict[str, Tensor]], true: dict[str, Tensor], limits: dict[str, float]
          ) -> tuple[float, str]:
    """(largest error over what is allowed, what failed or ""), on poisoned memory; then twice for equal bits."""
    with poisoned_memory():
        got = call()
    ratios = {name: (got[name].double() - x).norm().item() / limits[name] for name, x in true.items()}
    ratios = {name: ratio if math.isfinite(ratio) else math.inf for name, ratio in ratios.items()}
    name, worst = max(ratios.items(), key=lambda pair: pair[1])
    if worst > 1:
        return worst, f"{name} is off by {worst:.3g} times what is allowed"
    first, second = call(), call()
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    return worst, f"two runs differ in {', '.join(differ)}" if differ else ""


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
        print(f"{'backend':<15} {'dtype':<9} {'checks':>6} {'error / allowed':>16}")
        failed = {(backend, dtype) for backend, dtype, _ in self.failures}
        for (backend, dtype), worst in self.found.items():
            verdict = "FAIL" if (backend, dtype) in failed else "PASS"
            print(f"{backend:<15} {str(dtype)[6:]:<9} {len(worst):>6} {max(worst):>16.3g}  {verdict}")


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


def backends_on(device: str) -> list[str]:
    """Those of info_nce, and of embed_prompt too, that there are."""
    found = []
    for backend in ("fused", "chunked", "auto"):
        try:
            probe_karma(device, backend)
            found.append(backend)
        except (RuntimeError, ValueError) as error:
            print(f"{backend}: not on this machine ({error})")
    return found


def prompts_all(tally: Tally, device: str, backends: list[str], rounds: int, seed: int, end: float) -> str:
    """Every backend of embed_prompt; the row of a check is that of the token embeddings' dtype."""
    todo, done = list(check_soft_prompt.combinations(rounds)), 0
    for number, (shape, dtypes, kind) in enumerate(todo):
        if done and time.monotonic() > end:
            break
        problem = check_soft_prompt.draw(shape, dtypes, kind, seed + number, device)
        true, limits = check_soft_prompt.expected(problem)
        names = " and ".join(str(dtype)[6:] for dtype in dtypes)
        for backend in backends:
            call = functools.partial(check_soft_prompt.run, problem, backend)
            tally.add(f"prompt-{backend}", dtypes[0], f"{shape} {names}, {kind}, seed {seed + number}",
                      functools.partial(judge, call, true, limits))
        done += 1
    return f"soft prompts {done} of {len(todo)}"


def losses_all(tally: Tally, device: str, backends: list[str], rounds: int, seed: int, end: float) -> str:
    """Every backend of info_nce."""
    from karma_kernels import info_nce

    todo, done = list(check_info_nce.combinations(rounds)), 0
    for number, (shape, dtype, flags) in enumerate(todo):
        if done and time.monotonic() > end:
            break
        problem = check_info_nce.draw(shape, dtype, flags, seed + number, device)
        for backend in backends:
            workspace = random.Random(seed + number).choice(check_info_nce.WORKSPACES)
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
    parser.add_argument("--rounds", type=int, default=len(check_info_nce.SHAPES),
                        help="shapes for each dtype and set of flags, or kind of inputs")
    parser.add_argument("--seed", type=int, help="of the first check; default random")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    tally = Tally(defaultdict(list), [])
    try:
        done = [ranks_all(tally, args.device, args.rounds, seed, start + RANKS_SHARE * args.seconds)]
        backends = backends_on(args.device)
        done += [prompts_all(tally, args.device, backends, args.rounds, seed,
                             start + (RANKS_SHARE + PROMPTS_SHARE) * args.seconds),
                 losses_all(tally, args.device, backends, args.rounds, seed, start + args.seconds)]
        print(f"{args.device}, seed {seed}: inputs of {', '.join(done)}; {len(tally.failures)} failures")
    finally:  # a lost GPU must not take with it what was found
        tally.show()
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
