"""The part of the packaging that pyproject.toml cannot say: where the packages lie."""

from setuptools import find_packages, setup

# kernels/ is a folder, not a package: one that imported as `kernels` would shadow the package of that name
setup(packages=find_packages(include=["karma_fast", "karma_fast.*"]) + find_packages("kernels"),
      package_dir={"karma_kernels": "kernels/karma_kernels"})
