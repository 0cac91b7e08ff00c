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

# The kernels' tests twice: as a user's process runs, and once more with Triton interpreting on the CPU. They use one thread and
# share nothing, so every core takes some of them; the others start processes of their own.
PYTEST := $(BIN)/python -m pytest --timeout=600 $(PYTEST_ARGS)
KERNELS := -n auto -p no:benchmark tests/kernels

test: venv
	$(PYTEST) -m "not slow and not gpu" --ignore=tests/kernels
	$(PYTEST) -m "not slow and not gpu" $(KERNELS)
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow and not gpu" $(KERNELS)

test-all: test
	$(PYTEST) -m "slow and not gpu" --ignore=tests/kernels
	$(PYTEST) -m "slow and not gpu" $(KERNELS)
	TRITON_INTERPRET=1 $(PYTEST) -m "slow and not gpu" $(KERNELS)

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
