"""Kernels decorated under TRITON_INTERPRET=1 run on a CPU, and in float64: tests/test_interpreter.py starts these."""

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parents[1]))  # for what is shared with the other tests
