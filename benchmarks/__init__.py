"""Benchmarks of the fused losses, soft prompts, exact ranking and training steps: ``pytest --benchmark``, or, for one
file of results each, ``python -m benchmarks.run``, ``.soft_prompt``, ``.ranking`` and ``.step``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

for folder in (ROOT, ROOT / "kernels"):  # so that nothing has to be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# torch's profiler, used to count memory on a CPU, otherwise writes a line each time it stops
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
