VENV ?= .venv
PY = $(VENV)/bin/python
PYTHON ?=
SETUP = dev/setup_env.py --venv "$(VENV)"

# The first Python that the modern stack fits: $(PYTHON), or one on the PATH.
IS_MODERN = import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) and print(sys.executable)
MODERN_PYTHON = $(firstword $(foreach name,$(PYTHON) python3.11 python3.12 python3.13 python3,\
	$(shell "$(name)" -c '$(IS_MODERN)' 2>/dev/null)))

# Which tests run where; `make test-all` widens all three.
FAST = not e2e and not gpu and not slow
# What test-modern runs, too; without it test-fast has to, which skips more on torch 2.1.
ONCE = and not once
E2E = e2e and not slow
# Numbers of skipped tests; any other number fails, as it means that a test was skipped by mistake.
# test-fast skips tests that torch 2.1 is too old for, and more where test-modern cannot run.
# test-modern has neither mmpose nor mmseg. The skips of test-e2e are whole files for Triton.
# `make test-all` has numbers of its own: it runs slow tests, too, and all of them on current torch.
SKIPS = --skips 75
ONLY_SKIPS = --skips 95
MODERN_SKIPS = --skips 110
E2E_SKIPS = --skips 9
ALL_SKIPS = --skips 105
ALL_MODERN_SKIPS = --skips 548
ALL_E2E_SKIPS = --skips 9
# The tests start about 150 interpreters, each of which would compile torch's sources anew.
unexport PYTHONDONTWRITEBYTECODE
# What depends on torch and is therefore run on current torch, too.
ON_TORCH = $(addprefix tests/,deploy engine models ops \
	$(addprefix checkpoints/test_,contents.py loading.py reading.py runs.py scheme.py) \
	benchmarks/test_roofline.py test_docstrings.py test_fuzz.py test_numerics.py test_parity.py)
PYTEST = -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help env demo dist docs test test-all test-e2e test-fast test-gpu test-modern lint format clean \
	distclean

help: ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | \
		while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

# A name on the PATH may be a stand-in that runs nothing: take the first Python that really is a
# 3.10 or 3.11. If there is none, the script says what to do.
env: ## make the environment .venv or bring it up to date (other targets do it too)
	@for python in $(or $(PYTHON),python3.11 python3.10 python3); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 10), (3, 11)])' \
			2>/dev/null && exec "$$python" $(SETUP); \
	done; exec $(or $(PYTHON),python3) $(SETUP)

demo: env ## train and test the three example tasks on the CPU
	$(PY) demo/run_demo.py

test: ## run the tests of every change: fast, those of torch on current torch, end to end
	@if [ -n "$(MODERN_PYTHON)" ]; then $(MAKE) test-fast test-modern; \
		else $(MAKE) test-fast ONCE= SKIPS="$(ONLY_SKIPS)" && \
		echo 'make test-modern is left out: it needs Python 3.11, 3.12 or 3.13'; fi
	@$(MAKE) test-e2e

test-all: ## run everything, before a release: the slow tests, too, and all fast ones on both stacks
	@$(MAKE) test FAST="not e2e and not gpu" ONCE= E2E=e2e SKIPS="$(ALL_SKIPS)" \
		ONLY_SKIPS="$(ALL_SKIPS)" MODERN_SKIPS="$(ALL_MODERN_SKIPS)" E2E_SKIPS="$(ALL_E2E_SKIPS)" \
		ON_TORCH="tests --ignore=tests/e2e"

test-fast: env ## run the tests that take seconds
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) --dist worksteal -m "$(FAST) $(ONCE)" $(SKIPS)

test-e2e: env ## run the tests that train with the stock tools
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) --dist loadfile -m "$(E2E)" $(E2E_SKIPS)

test-modern: ## run the fast tests of what depends on torch on current torch and NumPy
	$(or $(MODERN_PYTHON),$(PYTHON),python3) dev/setup_env.py --stack modern --venv "$(VENV)-modern"
	OMP_NUM_THREADS=1 $(VENV)-modern/bin/python $(PYTEST) --dist worksteal -m "$(FAST)" $(ON_TORCH) $(MODERN_SKIPS)

test-gpu: ## run the tests that need a GPU; PY=python for the current environment
	$(PY) -m pytest -m gpu tests/gpu

docs: env ## build the documentation, warnings are errors
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html

dist: ## build wheel and source archive in dist; TAG=v0.2.0 has to be the version
	@test -z "$(TAG)" || grep -qx "__version__ = '$(TAG:v%=%)'" mmhrformer/version.py || \
		{ echo "TAG=$(TAG) is not the version in mmhrformer/version.py"; exit 1; }
	$(PY) -m hatchling build -t sdist -t wheel

lint: env ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: env ## repair style and formatting where a program can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove what the demo, the tests and builds wrote
	rm -rf demo_output work_dirs build dist docs/_build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

distclean: clean ## also remove the environment (the compiled mmcv stays in the user's cache)
	rm -rf "$(VENV)" "$(VENV)-modern"
