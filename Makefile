# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# `make demo DEMO_ARGS="--size standard --seeds 5"`
DEMO_DIR ?= demo
DEMO_ARGS ?=

.PHONY: demo test test-long lint wheel clean

# Each environment is made once, and again when a file that decides its contents changes; then no network is needed.
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $(VENV)/.core $@

demo: $(VENV)/.core
	$(BIN)/sensmerge demo $(DEMO_DIR) $(DEMO_ARGS)

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

# As `test`, and a merge is killed at 200 random instants, not at 20.
test-long: $(VENV)/.dev lint
	SENSMERGE_KILLS=200 $(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests attacks benchmarks
	$(BIN)/ruff format --check src tests attacks benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
