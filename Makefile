# The steps of CI, each by its name. `make` alone lists them; `make ci` runs all of them, as .ci/run does.
VENV ?= .venv
SCRIPTS := $(wildcard *.sh) $(wildcard tools/*.sh) $(wildcard examples/*/*.sh) $(wildcard benchmarks/*/*.sh)
# Options of benchmarks/run.py, for example BENCH_ARGS="--parts limits train_step".
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install format format-check lint types shellcheck docs docs-check test bench bench-gpu bench-peers ci clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

install: ## make the environment, or bring it up to date
	@VENV=$(VENV) sh run_install_environment.sh

format: install ## format the code and repair what can be repaired
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

format-check: install ## fail where the code is not formatted
	$(VENV)/bin/ruff format --check .

lint: install ## ruff
	$(VENV)/bin/ruff check .

types: install ## mypy on the package and the tools
	$(VENV)/bin/mypy

shellcheck: install ## every script is POSIX sh (.ci/run is bash)
	$(VENV)/bin/shellcheck -s sh $(SCRIPTS)
	$(VENV)/bin/shellcheck -s bash .ci/run

docs: install ## write docs/config.md from the configuration schema
	$(VENV)/bin/python tools/make_config_docs.py

docs-check: install ## fail where docs/config.md is stale
	$(VENV)/bin/python tools/make_config_docs.py --check

test: install ## the tests
	@VENV=$(VENV) sh run_tests.sh

bench-peers: install ## make the environments of the peers that the benchmark compares with
	@PYTHON=$(VENV)/bin/python sh benchmarks/peers/install.sh

bench: install ## our figures beside the peers', into bench_results/
	$(VENV)/bin/python -m benchmarks.run $(BENCH_ARGS)

# Nothing is installed: a machine with a GPU has the torch that fits its driver, often in an interpreter of its own.
bench-gpu: ## on a machine with a GPU: training beside transformers there, within ten minutes, into bench_results/gpu/
	@python=$(VENV)/bin/python; [ -x $$python ] || python=python3; $$python -m benchmarks.gpu.bench $(BENCH_ARGS)

ci: install format-check lint types shellcheck docs-check test ## all that CI runs

clean: ## remove builds and caches; the environment and what runs wrote stay
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis megatron_llm/*.so $(VENV)/.installed
