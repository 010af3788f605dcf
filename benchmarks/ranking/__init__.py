"""The benchmark of exact ranking over the whole catalogue on a CPU: ``python -m benchmarks.ranking --help``."""
