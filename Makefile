# A machine with Python 3.11 or newer needs nothing before these commands: each sets up what it
# uses in .venv and .cache, and finds it there the second time.
#
#   PYTHON=python3.12     the Python that .venv is made with
#   ARGS="--quick"        passed on to `sculpt demo` or to pytest
#   JOBS=4                how many processes run tests

VENV := .venv
RUN  := $(VENV)/bin
ARGS ?=
JOBS ?= 2

# Models and data of the demo.
SCULPT_CACHE ?= $(CURDIR)/.cache
export SCULPT_CACHE

.DEFAULT_GOAL := help
.PHONY: help setup demo native eight-bit docs test lint format clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile | \
	  while IFS=@ read -r command what; do printf '%-16s %s\n' "$$command" "$$what"; done

setup: ## only the set-up: .venv with pinned versions
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    exec "$$python" tools/bootstrap.py; \
	  fi; \
	done; \
	echo "set-up failed: $(or $(PYTHON),python3) is not Python 3.11 or newer." >&2; \
	echo "  what to do: install one, or name one, make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1

demo: setup ## three tasks in a row, plain fine-tuning beside sculpt
	@$(RUN)/sculpt demo $(ARGS)

native: setup ## build and test the native CPU kernels, where there is a compiler
	@$(RUN)/python tools/native.py

# Beside .venv: whatever imports PEFT would import them, and they complain where there is no GPU.
EIGHT_BIT := .cache/8-bit-0.18.0-0.50.2

$(EIGHT_BIT): | setup
	@rm -rf $@.part
	@$(RUN)/python -m pip install --quiet --no-deps --target $@.part torchao==0.18.0 bitsandbytes==0.50.2
	@mv $@.part $@

eight-bit: $(EIGHT_BIT) ## tests with torchao and bitsandbytes: 8-bit optimizers, quantised layers
	@PYTHONPATH=$(EIGHT_BIT) $(RUN)/python -m pytest tests/sculpt/task/test_eight_bit.py

# The site is made of text: its tools need neither torch nor the tests.
DOCS_TOOLS := .cache/docs-tools

$(DOCS_TOOLS): docs/requirements.txt | setup
	@rm -rf $@ $@.part
	@$(RUN)/python -m pip install --quiet --no-deps --target $@.part -r $<
	@mv $@.part $@
	@touch $@

docs: $(DOCS_TOOLS) ## the documentation site in build/site; links that lead nowhere are errors
	@NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR)/$(DOCS_TOOLS) $(RUN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

test: lint native $(if $(ARGS),,$(if $(filter Linux,$(shell uname -s)),eight-bit)) ## lint, types and the whole test suite
	@$(RUN)/python -m sculpt.demo.assets --quick
	@OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: setup ## ruff and mypy
	@$(RUN)/ruff check
	@$(RUN)/ruff format --check
	@$(RUN)/mypy

format: setup ## lay out the code and mend what ruff can mend
	@$(RUN)/ruff check --fix
	@$(RUN)/ruff format

clean: ## remove .venv and everything that was built; keep downloads and runs
	rm -rf $(VENV) .cache/set-up* build dist .benchmarks .hypothesis .mypy_cache .pytest_cache \
	  .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the downloads too
	rm -rf .cache
