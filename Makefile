# The same few commands for everyday work and for CI. `make demo` and `make test` need only Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Made again when a dependency or pin changes.
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-avx2 test-min check format docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup $(VENV)
	@touch $@

demo: setup
	$(BIN)/darseg demo

# Each file of tests runs in one process, which makes what its tests share once; tests/conftest.py orders the files. One
# thread each: otherwise they wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Numeric tests again with the kernels of a processor without AVX-512, for processors that have more.
NUMERIC := $(addprefix tests/test_,stage.py methods.py recompute.py networks.py convolutions.py protocol.py \
  convert.py::test_converted_checkpoints_answer_as_released)
test-avx2: setup
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	  -m "not slow" $(NUMERIC)

# Unit tests of the rooms with the lowest versions that pyproject.toml allows (constraints-min.txt).
UNITS := $(addprefix tests/test_,files_and_classes.py config.py formats.py manifest.py labeling.py weights.py foreign.py)
test-min: setup
	scripts/setup_min .venv-min $(VENV)
	PYTHONPATH=src OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 \
	  --dist loadfile $(UNITS)

check: setup
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ty check

format: setup
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

# Writes the site to site/. A link or a name that leads nowhere is an error. Open site/index.html from disk, or serve it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-min build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
