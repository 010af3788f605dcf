"""The parts of the packaging that pyproject.toml cannot say: where the packages lie, and the C++ extension."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

WITHOUT = """
karma_fast: the C++ extension was NOT built ({reason}).
karma_fast: everything works without it, but ranking over large catalogues takes many times longer. To have it, install
karma_fast: a C++17 compiler (on Debian and Ubuntu: apt install g++ python3-dev) and install karma-fast again.
"""

try:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
except ImportError:  # a build without isolation
    extensions = []
    print(WITHOUT.format(reason="pybind11 is not installed"))
else:
    ParallelCompile().install()
    # no contraction: what is one rounding and what are two is written in the code
    extensions = [Pybind11Extension("karma_fast._C", sorted(str(path) for path in Path("csrc").glob("*.cpp")),
                                    depends=sorted(str(path) for path in Path("csrc").glob("*.h")), cxx_std=17,
                                    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-pthread"])]


class BuildIfPossible(build_ext):
    """Leaves the extension out, with a warning, where there is no compiler for it."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever the compiler's driver raises
            self.leave_out(error)

    def build_extension(self, extension) -> None:
        try:
            super().build_extension(extension)
        except Exception as error:
            self.leave_out(error)

    def leave_out(self, error: Exception) -> None:
        self.extensions = []
        print(WITHOUT.format(reason=str(error).splitlines()[0] if str(error) else type(error).__name__), flush=True)


# kernels/ is a folder, not a package: one that imported as `kernels` would shadow the package of that name
setup(packages=find_packages(include=["karma_fast", "karma_fast.*"]) + find_packages("kernels"),
      package_dir={"karma_kernels": "kernels/karma_kernels"}, ext_modules=extensions,
      cmdclass={"build_ext": BuildIfPossible})
