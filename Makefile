# Everything lives in .venv, which the first target that needs it builds. Needs python3.11+ and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

# Most tests wait for servers and commits, so more of them than there are cores run side by side.
PARALLEL := --numprocesses 4 --dist worksteal

.PHONY: demo test test-all test-heavy lint format bench clean

demo: $(VENV)/.demo  ## serve a real agent, send real requests, look at the table
	$(BIN)/python -m examples.demo

test: $(VENV)/.test  ## the core tests: a few minutes
	$(BIN)/pytest -m "not heavy" $(PARALLEL)

# In an environment of its own: full MLflow takes the place of the light SDK that the core is tested with.
test-all:  ## the tests that take long or need the heavy extras
	@$(MAKE) --no-print-directory VENV=.venv-all test-heavy

test-heavy: $(VENV)/.test-all
	$(BIN)/pytest -m heavy $(PARALLEL)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## rough figures for added latency on this machine
	$(BIN)/python -m benchmarks.added_latency

clean:
	rm -rf $(VENV) .venv-all build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tracelake needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, rebuilt when the project's files change.
$(VENV)/.demo: EXTRAS = demo
$(VENV)/.test: EXTRAS = test
$(VENV)/.test-all: EXTRAS = test,heavy
$(VENV)/.bench: EXTRAS = bench
$(VENV)/.lint: EXTRAS = test,lint
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing tracelake[$(EXTRAS)] into $(VENV) ..."
	$(PIP) install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@
