"""Builds the C++ code with sanitizers and runs it: `make sanitize`, about 4 minutes on 2 cores.

    address   AddressSanitizer and UndefinedBehaviorSanitizer in one build, which neither disturbs
    thread    ThreadSanitizer

Both run tests/native/sanitize.cpp, a program of its own: no interpreter takes part, so all code that runs is
instrumented, leaks are this code's alone, and ThreadSanitizer does not see the threads of torch, which it would not
understand. The ranking tests then run in Python with an extension of the first kind. Everything is built in build/;
the extension that is installed stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC, NATIVE, BUILD = ROOT / "csrc", ROOT / "tests/native", ROOT / "build"
FLAGS = ["-std=c++17", "-g", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-pthread", f"-I{CSRC}"]
SANITIZERS = {
    "address": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow",
                "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
TESTS = ["test_ranks_fuzz_extension.py", "test_ranks_fuzz.py", "test_ranks_paths.py", "test_ranks.py"]
# loads the sanitized extension in place of the installed one, then runs pytest on the arguments
IN_PYTHON = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("karma_fast._C", sys.argv[1])
sys.modules["karma_fast._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
from karma_fast.evaluation import catalogue
assert catalogue.native is module
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def missing(flags: list[str], folder: Path) -> str:
    """Why nothing can be built with these flags here; empty if it can."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "needs g++ on Linux"
    trial = folder / "trial"
    trial.with_suffix(".cpp").write_text("int main() {}\n")
    built = subprocess.run(["g++", *flags, f"{trial}.cpp", "-o", str(trial)], capture_output=True, text=True)
    ran = built.returncode == 0 and subprocess.run([trial], capture_output=True, text=True)
    if ran and ran.returncode == 0:
        return ""
    said = (ran or built).stderr.strip().splitlines()
    return f"g++ {' '.join(flags)} cannot be used here: {said[-1] if said else 'no message'}"


def program(main: Path, folder: Path, flags: list[str]) -> Path:
    """Compiles a program of ``main`` and csrc without the Python module."""
    return linked([main, *sorted(set(CSRC.glob("*.cpp")) - {CSRC / "module.cpp"})], folder / main.stem, flags)


def extension(folder: Path, flags: list[str]) -> Path:
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden"]
    return linked(sorted(CSRC.glob("*.cpp")), folder / "_C.so", [*flags, *include], ["-shared"])


def linked(sources: list[Path], target: Path, flags: list[str], link: list[str] = ()) -> Path:
    objects = target.parent / f"{target.stem}-objects"
    objects.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in (*CSRC.glob("*.h"), *NATIVE.glob("*.h"), Path(__file__)))

    def compiled(source: Path) -> str:
        out = objects / f"{source.stem}.o"
        if not out.exists() or out.stat().st_mtime < max(headers, source.stat().st_mtime):
            run(["g++", *FLAGS, *flags, "-c", str(source), "-o", f"{out}.new"])
            os.replace(f"{out}.new", out)
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(compiled, sources))
    run(["g++", *flags, *link, "-pthread", *found, "-o", str(target)])
    return target


def run(command: list[str], **environment: str) -> str:
    """What the command prints; RuntimeError with all of it if the command fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def library(name: str) -> str:
    return run(["g++", f"-print-file-name={name}"]).strip()


def main() -> None:
    for name, flags in SANITIZERS.items():
        folder = BUILD / f"sanitize-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        reason = missing(flags, folder)
        if reason:
            sys.exit(f"sanitize: {reason}")
        print(f"sanitize: {name}, tests/native/sanitize.cpp", flush=True)
        print(run([str(program(NATIVE / "sanitize.cpp", folder, flags))]), flush=True)
    folder, flags = BUILD / "sanitize-address", SANITIZERS["address"]
    built = extension(folder, flags)
    print("sanitize: address, in Python:", *TESTS, flush=True)
    # the interpreter and torch keep memory until the end, which are no leaks; without libstdc++ beside it the
    # sanitizer does not find the exceptions of an extension that is loaded later
    environment = {"LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}", "OMP_NUM_THREADS": "1",
                   "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
                   "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", IN_PYTHON, str(built), *(str(ROOT / "tests" / test) for test in TESTS)]
    sys.exit(subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
