"""The Triton kernels on a CPU: Triton decides when it decorates a kernel, so each run has a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
# shares of about the same length, side by side
SHARES = ["gradcheck and rows", "gradcheck and not rows", "not gradcheck and library",
          "not gradcheck and not library and not ranks", "ranks"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    waiting, running, failed = list(SHARES), [], []
    while waiting or running:
        while waiting and len(running) < min(4, os.cpu_count() or 1):
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER), "-k",
                       waiting.pop()]
            running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                                            stderr=subprocess.STDOUT, text=True, cwd=FOLDER.parent.parent))
        process = running.pop(0)
        output, _ = process.communicate()
        if process.returncode:
            failed.append(output)
        else:
            assert " passed" in output, output  # a share that chose no test is no check
    assert not failed, "\n".join(failed)
