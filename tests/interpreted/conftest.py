"""Kernels decorated under TRITON_INTERPRET=1 run on a CPU, and in float64: tests/test_interpreter.py starts these."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
