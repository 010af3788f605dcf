"""HR@1, 10 and 200 over the whole catalogue, every implementation: ``pytest --benchmark``, one table for each case.

The catalogue is packed, or the index built, before the time runs. ``python -m benchmarks.ranking`` takes the
implementations in turn and is what reported figures come from.
"""

import functools

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install pytest-benchmark")

from benchmarks.ranking.cases import cpu_cases, make_inputs  # noqa: E402
from benchmarks.ranking.exact import compare, exact, is_wrong  # noqa: E402
from benchmarks.ranking.implementations import IMPLEMENTATIONS, absent  # noqa: E402


@functools.lru_cache(maxsize=1)  # the implementations of a case come one after the other
def prepared(case):
    inputs = make_inputs(case)
    return inputs, exact(inputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda i: i.name)
@pytest.mark.parametrize("case", cpu_cases(), ids=lambda c: c.name)
def test_ranking(benchmark, case, implementation):
    if reason := absent(implementation, case):
        pytest.skip(reason)
    inputs, truth = prepared(case)
    catalogue = implementation.prepare(inputs) if implementation.prepare else None
    found = implementation.find(inputs, catalogue)
    errors = compare(found, truth)
    if implementation.exact and is_wrong(errors):
        pytest.fail(f"wrong result: {errors}")
    benchmark.group, benchmark.name = case.name, implementation.name
    benchmark.pedantic(implementation.find, (inputs, catalogue), rounds=3)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(errors=errors, gflops=1e-9 * case.flops / median,
                                queries_per_second=case.queries / median)
