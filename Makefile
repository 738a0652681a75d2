VENV ?= .venv
PYTHON ?=
PY = $(VENV)/bin/python

# The first Python 3.10 or 3.11 that runs. Asked by running it: a name on the PATH may be a
# stand-in that only says which versions it knows.
FITS = import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))
FOUND = $(shell for python in $(PYTHON) python3.11 python3.10 python3; do \
	"$$python" -c '$(FITS)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)
NONE = Found no Python 3.10 or 3.11. Install one (Debian 12: apt-get install python3 python3-venv \
	python3-dev build-essential) or name it: make PYTHON=/path/to/python3.11

.DEFAULT_GOAL := help
.PHONY: help env demo test test-fast lint format clean distclean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

env: ## make or complete the environment .venv (the other targets do it too)
	@"$(or $(FOUND),$(error $(NONE)))" tools/setup_env.py --venv "$(VENV)"

demo: env ## train and test the three example tasks on the CPU
	$(PY) tools/run_demo.py

test: test-fast ## run all tests: the fast ones, then the end-to-end ones
	$(PY) -m pytest -m e2e

test-fast: env ## run the tests that take seconds
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not e2e"

lint: env ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: env ## repair style and formatting where a program can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove what the demo, the tests and builds wrote
	rm -rf demo_output work_dirs build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## also remove the environment (the compiled mmcv stays in the user's cache)
	rm -rf "$(VENV)"
