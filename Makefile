# `make` says what there is to make. On Windows, or without make, see the README for the pip commands.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# Twice quiet: errors only.
PIP_INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt

# The CPU kernels are built where a C++ compiler is; without them quantised weights are slow.
COMPILER := $(shell command -v c++ || command -v g++ || command -v clang++)
KERNELS := .venv/.kernels
KERNEL_SOURCES := $(wildcard kernels/source/* kernels/minigpt4_kernels/*.py) kernels/CMakeLists.txt \
  kernels/pyproject.toml

.PHONY: help demo test check test-ray test-vllm sanitize clean

help:
	@echo 'make demo    describe the pictures in examples/images with the model that comes along'
	@echo 'make test    format, lint, types and tests, as CI runs them (scripts/check)'
	@echo 'make check   the same'
	@echo 'make test-ray   the tests that need Ray, in .venv-ray (Linux)'
	@echo 'make test-vllm  the tests of the vLLM plugin, with vLLM on the CPU in .venv-vllm (Linux)'
	@echo 'make sanitize   run the CPU kernels under the address and undefined-behaviour sanitizers'
	@echo 'make clean   remove .venv and all that tools have left behind'
	@echo
	@echo 'demo and test first set up .venv with what constraints.txt names. Two settings:'
	@echo '  make test PYTHON=python3.12'
	@echo '  make test PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   (Linux: no CUDA)'

demo: $(STAMP) $(KERNELS)
	@$(BIN)/minigpt4 describe examples/images

test check: $(STAMP) $(KERNELS)
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

# An environment of its own, as few need Ray: what constraints.txt has, and what Ray needs beside it.
.venv-ray/.installed: pyproject.toml constraints.txt constraints-ray.txt
	@echo 'Setting up .venv-ray (a few minutes the first time) ...'
	@$(PYTHON) -m venv --clear .venv-ray
	@.venv-ray/bin/python -m pip install -qq "$$(grep '^torch==' constraints.txt)"
	@.venv-ray/bin/python -m pip install -qq -c constraints.txt -c constraints-ray.txt hatchling editables
	@.venv-ray/bin/python -m pip install -qq -c constraints.txt -c constraints-ray.txt \
	  --no-build-isolation -e '.[ray,server]' pytest filelock openai kubernetes-validate \
	  s3fs moto flask flask-cors
	@touch $@

# Ray and what it loads warn of things that are not ours.
test-ray: .venv-ray/.installed
	@.venv-ray/bin/python -m pytest -m ray -W ignore tests/cluster tests/scripts/test_containers.py

# An environment of its own: vLLM pins its packages. Without their dependencies, for which see there.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	@echo 'Setting up .venv-vllm (a few minutes the first time) ...'
	@$(PYTHON) -m venv --clear .venv-vllm
	@.venv-vllm/bin/python -m pip install -qq --no-deps -r constraints-vllm.txt
	@.venv-vllm/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

# vLLM and what it loads warn of things that are not ours.
test-vllm: .venv-vllm/.installed
	@.venv-vllm/bin/python -m pytest -m vllm -W ignore tests/vllm_plugin

# A failed build is told and stops nothing: the runtime works without the kernels.
$(KERNELS): $(STAMP) $(KERNEL_SOURCES)
ifeq ($(COMPILER),)
	@echo 'No C++ compiler: the CPU kernels are not built, and quantised weights will be slow.'
else
	@echo 'Building the CPU kernels (about a minute) ...'
	@$(PIP_INSTALL) scikit-build-core cmake ninja
	@PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m pip install -qq --no-deps --no-build-isolation ./kernels \
	  || echo 'The CPU kernels could not be built; quantised weights will be slow.' >&2
endif
	@touch $@

# The levels that this processor has, without torch: memory ends where the tensors end.
sanitize:
	@cmake -S kernels/checks -B build/sanitize -DSANITIZE=address,undefined >/dev/null
	@cmake --build build/sanitize --parallel
	@build/sanitize/check_levels

clean:
	@rm -rf .venv .venv-ray .venv-vllm .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	@find . -name __pycache__ -prune -exec rm -rf {} +
