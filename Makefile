# Everything lives in .venv, which the first target that needs it builds. Needs python3.11+ and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
CONSTRAINTS := constraints.txt
TRACE_EXTRAS := test,agents

# Most tests wait for servers and commits, so more of them than there are cores run side by side.
PARALLEL := --numprocesses 4 --dist worksteal

# The lowest and the newest version of MLflow's light SDK that pyproject.toml claims.
MLFLOW_VERSIONS := 3.15.0 3.17.2
# Of these, the one that `make test-traces` takes unless it is told.
MLFLOW := $(lastword $(MLFLOW_VERSIONS))
MLFLOW_TESTS := $(MLFLOW_VERSIONS:%=test-mlflow-%)

.PHONY: demo test test-all test-heavy setup-browser test-mlflow-matrix $(MLFLOW_TESTS) test-traces lint format \
	bench bench-quick bench-soak bench-peers bench-ui bench-ui-heavy clean

demo: $(VENV)/.demo  ## serve a real agent, send real requests, look at the table
	$(BIN)/python -m examples.demo

test: $(VENV)/.test  ## the core tests: a few minutes
	$(BIN)/pytest -m "not heavy" $(PARALLEL)

# In an environment of its own: full MLflow takes the place of the light SDK that the core is tested with.
test-all:  ## the tests that take long or need the heavy extras
	@$(MAKE) --no-print-directory VENV=.venv-all test-heavy

test-heavy: $(VENV)/.test-all setup-browser
	$(BIN)/pytest -m heavy $(PARALLEL)

# Tests that need it are skipped where it is not.
setup-browser:  ## Debian's Chromium, which the tests of pages drive
	@command -v chromium >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } || \
		echo "the tests in a browser are skipped: install Debian's package chromium"

test-mlflow-matrix: $(MLFLOW_TESTS)  ## the tests of traces, with the lowest and the newest MLflow

$(MLFLOW_TESTS): test-mlflow-%:
	@$(MAKE) --no-print-directory VENV=.venv-mlflow-$* MLFLOW=$* test-traces

test-traces: $(VENV)/.test-traces
	$(BIN)/pytest -m "not heavy or agents" $(PARALLEL) tests/serving tests/agents

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each is a module of its own too: `.venv/bin/python -m benchmarks.agent_call`.
BENCHMARKS := agent_call added_latency durability neighbour requests_per_second throughput freshness memory growth \
	query deployment

bench: $(VENV)/.bench  ## all benchmarks but soak, peers and ui: about 20 minutes on a quiet machine
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done
	$(BIN)/python -m benchmarks.summary

bench-quick: $(VENV)/.bench  ## a tenth of it, in a folder of its own: that they run, not what they say
	@set -e; export BENCH_QUICK=1 BENCH_RESULTS=$(VENV)/bench-quick; \
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name; done; $(BIN)/python -m benchmarks.summary

bench-soak: $(VENV)/.bench  ## ten minutes of mixed load
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.summary

bench-peers: $(VENV)/.bench  ## beside what else there is; installs each into an environment of its own
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.summary

bench-ui:  ## MLflow's UI and API on a table of 100,000 rows; needs the heavy extras
	@$(MAKE) --no-print-directory VENV=.venv-all bench-ui-heavy

bench-ui-heavy: $(VENV)/.test-all
	$(BIN)/python -m benchmarks.ui
	$(BIN)/python -m benchmarks.summary

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tracelake needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras, rebuilt when the project's files change.
$(VENV)/.demo: EXTRAS = demo
$(VENV)/.test: EXTRAS = test
$(VENV)/.test-all: EXTRAS = test,heavy
$(VENV)/.test-traces: EXTRAS = $(TRACE_EXTRAS)
$(VENV)/.bench: EXTRAS = bench
$(VENV)/.lint: EXTRAS = test,lint
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing tracelake[$(EXTRAS)] into $(VENV) ..."
	$(PIP) install --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	@touch $@

# The same versions of everything but MLflow.
$(VENV)/.test-traces: CONSTRAINTS = $(VENV)/constraints.txt
$(VENV)/.test-traces: $(VENV)/constraints.txt
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	sed 's/^\(mlflow[a-z-]*\)==.*/\1==$(MLFLOW)/' $< > $@
