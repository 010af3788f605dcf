"""The examples run as a user runs them, are short, and what they train gets better."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"plain_torch": "torch", "hf_trainer": "transformers", "lightning_module": "lightning"}


def test_every_example_is_listed():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(HOSTS)
    assert all(f"python examples/{name}.py" in text for name in HOSTS)


@pytest.mark.parametrize("name", HOSTS)
def test_example_is_short(name):
    assert importlib.util.find_spec(name) is None  # a script that shadows a package breaks imports beside it
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert any("clamp_()" in line for line in lines) and any("log_q=" in line for line in lines)


@pytest.mark.parametrize("name", HOSTS)
def test_example_improves(name, tmp_path):
    if importlib.util.find_spec(HOSTS[name]) is None:
        pytest.skip(f"{HOSTS[name]} is not installed")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1",
                                "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    (tmp_path / "here").mkdir()
    done = subprocess.run([sys.executable, str(ROOT / "examples" / f"{name}.py")], cwd=tmp_path / "here",
                          env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = re.search(r"hit rate@10 on 1000 held-out users: (\S+) before, (\S+) after", done.stdout)
    before, after = float(printed[1]), float(printed[2])
    # 10 of 2000 items by chance; without log_q it stays below 0.55
    assert before < 0.05 and after > max(0.6, 2 * before)
    assert not list((tmp_path / "here").iterdir())  # nothing is left where the user stood
