"""The benchmark of a whole training step against the usual libraries: ``python -m benchmarks.step --help``."""
