"""Which tests run: benchmarks with --benchmark alone, GPU tests where there is a GPU."""

import importlib.util
from pathlib import Path

import pytest

# importing it says what to install; its examples need its host
collect_ignore = ([] if importlib.util.find_spec("sentence_transformers")
                  else ["karma_fast/integrations/sentence_transformers.py"])
BENCHMARKS = Path(__file__).parent / "benchmarks"
# of pytest-benchmark's table, which by default is wider than most terminals; its own options still have their say
TABLE = {"columns": ["median", "min", "max", "rounds"], "sort": "median"}


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks instead of the tests")


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in the same hook
def pytest_configure(config):
    paths_given = config.args_source == pytest.Config.ArgsSource.ARGS
    if config.getoption("--benchmark") and not paths_given:
        if not BENCHMARKS.is_dir():
            raise pytest.UsageError(f"--benchmark: {BENCHMARKS} is missing")
        config.args[:] = [str(BENCHMARKS)]
    given = config.invocation_params.args
    for option, value in TABLE.items() if config.getoption("--benchmark") else ():
        if hasattr(config.option, f"benchmark_{option}") and not any(f"--benchmark-{option}" in str(a) for a in given):
            setattr(config.option, f"benchmark_{option}", value)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark"):
        skip = pytest.mark.skip(reason="a benchmark; run them with pytest --benchmark")
        for item in items:
            if BENCHMARKS in item.path.parents:
                item.add_marker(skip)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
