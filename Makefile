# Everything a newcomer runs. PYTHON is any Python 3.11 or 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Threads that wait sleep instead of spinning: beside another busy process a training step took 0.9 s instead of 7.1 s
# (2 cores, 1 M parameters, 4096 tokens), alone 0.48 s instead of 0.45 s.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: run test test-all parity gpu lint venv clean

run: venv
	$(BIN)/warpline line configs/line/laptop.toml

# Twice: once as a user's process runs, and the kernels' tests once more with Triton interpreting on the CPU.
PYTEST := $(BIN)/python -m pytest --timeout=600 $(PYTEST_ARGS)

test: venv
	$(PYTEST) -m "not slow and not gpu"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow and not gpu" tests/kernels

test-all: test
	$(PYTEST) -m "slow and not gpu"
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and not gpu" tests/kernels

# Every stage × layout against one process; writes docs/parity.md.
parity: venv
	$(BIN)/python tests/parallel/parity.py

# One call on a machine with a GPU, from the checkout alone; results and logs under OUT, else bench/results. Called again it goes
# on where it was cut off; NAMES="tests attention" runs those parts.
gpu:
	PYTHONPATH=src $(PYTHON) -m warpline.bench.gpu $(NAMES) $(if $(OUT),--out $(OUT))

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(READY)

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warpline needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info
