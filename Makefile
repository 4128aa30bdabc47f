# The steps of CI, each by its name. `make` alone lists them; `make ci` runs all of them, as .ci/run does.
VENV ?= .venv
SCRIPTS := $(wildcard *.sh) $(wildcard examples/*/*.sh)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install format format-check lint types shellcheck docs docs-check test ci clean

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

ci: install format-check lint types shellcheck docs-check test ## all that CI runs

clean: ## remove builds and caches; the environment and what runs wrote stay
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis megatron_llm/*.so $(VENV)/.installed
