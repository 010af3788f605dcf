"""Which tests run: benchmarks with --benchmark alone, GPU tests where there is a GPU."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks instead of the tests")


def pytest_configure(config):
    paths_given = config.args_source == pytest.Config.ArgsSource.ARGS
    if config.getoption("--benchmark") and not paths_given:
        if not BENCHMARKS.is_dir():
            raise pytest.UsageError(f"--benchmark: {BENCHMARKS} is missing")
        config.args[:] = [str(BENCHMARKS)]


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
