# The entry points of a checkout. Each sets up .venv first where that is needed:
#   make demo    segment a photograph; CHECKPOINT=path for a checkpoint, ARGS="..." for more options
#   make test    run the tests on all cores; ARGS="..." goes to pytest
#   make sanitize   run the C++ kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make lint    ruff and mypy
#   make clean   remove what was built
#
# PYTHON=python3.12 chooses the interpreter, TORCH=torch==2.6.0 the PyTorch that is installed.

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test sanitize lint clean

demo: .venv/installed
	$(BIN)/evsam demo $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

sanitize: .venv/installed
	$(BIN)/python -m pytest tests/csrc $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist evsam_kernels/_cpu.*.so evsam_kernels/_simt.*.so evsam_kernels/build_info.json evsam_kernels/cuda/images *.egg-info

# PyTorch comes first, so that nothing else pulls in another; without build isolation the build
# needs nothing but what is installed here. What is needed includes nvcc, where the machine has none:
# it comes with the extra `test`, and so the build is a step behind that.
.venv/installed: .venv/pyvenv.cfg pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --upgrade setuptools wheel pybind11 ninja
	EVSAM_BUILD_CPU=0 EVSAM_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from evsam_kernels.backends import build_info; print(build_info.read())'
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	@touch $@

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "$(PYTHON) must be Python 3.10 to 3.13; name another one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 \
	    || { rm -rf .venv; virtualenv --quiet --python "$(PYTHON)" .venv 2>/dev/null; } \
	    || { rm -rf .venv; uv venv --quiet --seed --python "$(PYTHON)" .venv 2>/dev/null; } \
	    || { rm -rf .venv; echo "cannot make a virtual environment: install python3-venv" \
	        "(Debian, Ubuntu: apt-get install python3-venv), virtualenv or uv" >&2; exit 1; }
