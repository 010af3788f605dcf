# make setup   a virtual environment with everything, in .venv
# make test    the tests
# make sanitize   the C++ code and its tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make demo    train on MovieLens-100K and report, 4 to 6 minutes on 2 cores
# Settings: PYTHON=python3.12 (which interpreter), TORCH_ARGS="--index-url URL" (where torch alone comes from)

PYTHON ?= python3
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the Triton that torch 2.13.0 for CUDA asks for; its CPU build asks for none
TORCH := torch==2.13.0 "triton==3.7.1; platform_system == 'Linux'"

.PHONY: setup test sanitize demo lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
	  { echo "setup: $(PYTHON) was not found; install Python 3.10 or later, or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "setup: $$("$(PYTHON)" --version) is too old; Python 3.10 or later is needed: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(VENV)" || \
	  { echo "setup: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "setup: downloading torch 2.13.0 (from the default index with its CUDA libraries, a few GB; a CPU build, about"
	@echo "setup: 0.2 GB, comes with make setup TORCH_ARGS=\"--index-url URL\"), then transformers, peft and the rest"
	"$(BIN)/python" -m pip install --disable-pip-version-check $(TORCH) $(TORCH_ARGS)
	"$(BIN)/python" -m pip install --disable-pip-version-check -e '.[train,cpu,dev]'
# only its loss is compared with ours, so what else it asks for is left out
	"$(BIN)/python" -m pip install --disable-pip-version-check --no-deps open_clip_torch
	@touch "$@"

test: $(STAMP)
	"$(BIN)/python" -m pytest

sanitize: $(STAMP)
	"$(BIN)/python" tests/sanitize.py

demo: $(STAMP)
	"$(BIN)/karma-fast" demo

lint: $(STAMP)
	"$(BIN)/ruff" check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -exec rm -rf {} +
