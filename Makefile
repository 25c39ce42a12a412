# `make` says what there is to make. On Windows, or without make, see the README for the pip commands.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# Twice quiet: errors only.
PIP_INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt

.PHONY: help demo test check clean

help:
	@echo 'make demo    describe the pictures in examples/images with the model that comes along'
	@echo 'make test    format, lint, types and tests, as CI runs them (scripts/check)'
	@echo 'make check   the same'
	@echo 'make clean   remove .venv and all that tools have left behind'
	@echo
	@echo 'demo and test first set up .venv with what constraints.txt names. Two settings:'
	@echo '  make test PYTHON=python3.12'
	@echo '  make test PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   (Linux: no CUDA)'

demo: $(STAMP)
	@$(BIN)/minigpt4 describe examples/images

test check: $(STAMP)
	@scripts/check

# torch goes first, at the one version of constraints.txt, so that nothing can draw in another.
# The build tools are pinned too; hence no isolation, in which pip would take the newest.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>&1) || found='not found'; \
	  echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is $$found." \
	    "Name another: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo 'Setting up .venv (a few minutes the first time) ...'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) hatchling editables
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

clean:
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -prune -exec rm -rf {} +
