"""Data: readers of the usual files, one schema, users' sequences, splits, training windows, and a checker.

`load_dataset` goes from a `DataConfig` to a `Dataset`; `check` reports on the data and names what is wrong.
"""

from .assets import AssetError, cache_dir, fetch
from .check import Report, check
from .schema import DataError, Dataset, Items, Sequences, Split
from .sequences import build_sequences, split_by_time, split_leave_one_out
from .windows import training_windows

__all__ = ["AssetError", "DataError", "Dataset", "Items", "Report", "Sequences", "Split", "build_sequences",
           "cache_dir", "check", "fetch", "load_dataset", "split_by_time", "split_leave_one_out", "training_windows"]


def __getattr__(name: str):
    if name == "load_dataset":  # reading files needs polars; all else here does not
        from .loading import load_dataset

        return load_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
