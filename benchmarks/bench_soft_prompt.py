"""Making a prompt, forward and backward, every implementation on every case: ``pytest --benchmark``.

pytest-benchmark times one implementation after the other; ``python -m benchmarks.soft_prompt`` takes them in turn on a
CPU and uses events on a GPU, and is what reported figures come from.
"""

import functools

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")

import torch  # noqa: E402

from benchmarks.soft_prompt.cases import cases_for, make_inputs  # noqa: E402
from benchmarks.soft_prompt.exact import errors, exact, too_far  # noqa: E402
from benchmarks.soft_prompt.implementations import IMPLEMENTATIONS, absent  # noqa: E402
from benchmarks.soft_prompt.measuring import memory, step  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)  # the implementations of a case come one after the other
def prepared(case):
    torch.compiler.reset()
    inputs = make_inputs(case, DEVICE)
    return inputs, exact(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)
@pytest.mark.parametrize("case", cases_for(DEVICE), ids=lambda c: c.name)
def test_soft_prompt(benchmark, case, implementation):
    if reason := absent(implementation, DEVICE):
        pytest.skip(reason)
    inputs, truth = prepared(case)
    try:
        prompt, gradients, _ = step(implementation.prompt, inputs)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    found = errors(prompt, gradients, inputs, truth)
    if too_far(found, inputs.dtype):
        pytest.fail(f"wrong result, relative errors {found}")
    del prompt, gradients

    def both() -> None:
        step(implementation.prompt, inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.name = case.name, implementation.name
    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    most, kept = memory(implementation.prompt, inputs)
    benchmark.extra_info.update(errors=found, memory_mib=most / 2**20, kept_mib=kept / 2**20)
