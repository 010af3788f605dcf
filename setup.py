"""The parts of the packaging that pyproject.toml cannot say: where the packages lie, and the C++ extension."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

WITHOUT = """
karma_fast: the C++ extension was NOT built ({reason}).
karma_fast: everything works without it, but ranking over large catalogues takes many times longer. To have it, install
karma_fast: a C++17 compiler (on Debian and Ubuntu: apt install g++ python3-dev) and install karma-fast again.
"""
# The kernels that an assembler older than the compiler does not know, then all that are of one kind of CPU.
SWITCHES = {"KARMA_NO_AMX": "without AMX", "KARMA_PORTABLE": "for any CPU alone, many times slower than for this one"}

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError:  # a build without isolation
    extensions = []
    print(WITHOUT.format(reason="pybind11 is not installed"))
else:
    ParallelCompile().install()
    # no fast math, whatever CXXFLAGS say (linked, it would set the process's subnormal numbers to zero), and no
    # contraction: what is one rounding and what are two is written in the code
    flags = ["-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
    extensions = [Pybind11Extension("karma_fast._C", sorted(str(path) for path in Path("csrc").glob("*.cpp")),
                                    depends=sorted(str(path) for path in Path("csrc").glob("*.h")), cxx_std=17,
                                    extra_compile_args=flags, extra_link_args=["-fno-fast-math"])]


class BuildIfPossible(build_ext):
    """Leaves kernels, or the whole extension, out, with a warning, where the compiler cannot do them."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever the compiler's driver raises
            self.leave_out(first_error("", error))

    def build_extension(self, extension) -> None:
        folder, reason = self.build_temp, ""
        for switch in ("", *SWITCHES):
            extension.define_macros = [(switch, None)] if switch else []
            self.build_temp = os.path.join(folder, switch)  # to that of a failed attempt a compiler may still write
            error, said = heard(lambda: super(BuildIfPossible, self).build_extension(extension))
            if error is None:
                if not switch and not self.knows_this_cpu(extension):
                    switch, reason = "KARMA_PORTABLE", "its other kernels need g++"
                if switch:
                    print(f"karma_fast: the C++ extension was built {SWITCHES[switch]} ({reason})", flush=True)
                return
            reason = first_error(said, error)
            if "Python.h" in reason:  # needs something else than fewer kernels
                break
        self.leave_out(reason)

    def knows_this_cpu(self, extension) -> bool:
        """Whether kernels for one kind of CPU are in it; those that there are are of x86, and named."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return True
        return b"\0avx2\0" in Path(self.get_ext_fullpath(extension.name)).read_bytes()

    def leave_out(self, reason: str) -> None:
        self.extensions = []
        print(WITHOUT.format(reason=reason), flush=True)


def heard(call: Callable[[], None]) -> tuple[Exception | None, str]:
    """The exception that a call ends with, or None, and what it and its processes say as errors."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        found = None
        try:
            call()
        except Exception as error:
            found = error
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        said = file.read().decode(errors="replace")
    print(said, end="", file=sys.stderr, flush=True)
    return found, said


def first_error(said: str, error: Exception) -> str:
    """The compiler's own line; setuptools knows its exit status alone."""
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    return (lines + str(error).splitlines() + [type(error).__name__])[0]


# kernels/ is a folder, not a package: one that imported as `kernels` would shadow the package of that name
setup(packages=find_packages(include=["karma_fast", "karma_fast.*"]) + find_packages("kernels"),
      package_dir={"karma_kernels": "kernels/karma_kernels"}, ext_modules=extensions,
      cmdclass={"build_ext": BuildIfPossible})
