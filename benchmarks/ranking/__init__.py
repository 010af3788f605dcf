"""The benchmark of exact ranking over the whole catalogue: ``python -m benchmarks.ranking --help``."""
