# The same few commands at the desk and in CI. `make demo` and `make test` need nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Remade when a dependency or pin changes.
STAMP := $(VENV)/.installed

.PHONY: setup demo test check format docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	PYTHON="$(PYTHON)" scripts/setup $(VENV)
	@touch $@

demo: setup
	$(BIN)/darseg demo

# A file of tests is one process's, since what its tests share is made once; a thread each, or they wait for one another.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ty check

format: setup
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

# The site, into site/: a link or a name that leads nowhere is an error. Open site/index.html from disk, or serve it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
