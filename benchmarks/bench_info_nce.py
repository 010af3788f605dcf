"""Forward and backward of every implementation on every case: ``pytest --benchmark``, one table for each case.

pytest-benchmark times one implementation after the other; ``python -m benchmarks.run`` takes them in turn on a CPU and
uses events on a GPU, and is what reported figures come from.
"""

import functools

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")

import torch  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.cases import Case, cases_for, make_inputs  # noqa: E402
from benchmarks.exact import errors, exact, too_far  # noqa: E402
from benchmarks.implementations import IMPLEMENTATIONS, absent  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)  # the implementations of a case come one after the other
def prepared(case: Case):
    torch.compiler.reset()
    inputs = make_inputs(case, DEVICE)
    return inputs, exact(inputs)


@functools.cache
def peak(dtype: torch.dtype) -> float:
    return measure.matmul_peak(DEVICE, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)
@pytest.mark.parametrize("case", cases_for(DEVICE), ids=lambda c: c.name)
def test_info_nce(benchmark, case, implementation):
    if reason := absent(implementation, case, DEVICE):
        pytest.skip(reason)
    inputs, truth = prepared(case)
    try:
        loss, _ = measure.step(implementation.loss, inputs)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    found = errors(loss, inputs, truth)
    if too_far(found, inputs.query.dtype):
        pytest.fail(f"wrong result, relative errors {found}")

    def both() -> None:
        measure.step(implementation.loss, inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group, benchmark.name = case.name, implementation.name
    benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(errors=found, memory_mib=measure.peak_memory(implementation.loss, inputs) / 2**20,
                                peak_fraction=case.useful_flops / median / peak(inputs.query.dtype))
    inputs.query.grad = inputs.key.grad = None
