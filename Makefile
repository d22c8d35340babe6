# Every target installs what it needs. Settings: BE_ACCEL=cpu|cuda, PYTHON=..., MODEL=... (see scripts/install).
.DEFAULT_GOAL := help
BIN := .venv/bin

# `make demo QUICK=1` uses the token in examples/ and trains none.
QUICK ?=
QUICK_FLAG = $(if $(filter-out 0 no false,$(QUICK)),--quick)
MODEL ?=
MODEL_FLAG = $(if $(MODEL),--model $(MODEL))
# The Python scripts; they have no ending by which mypy would find them.
SCRIPTS = $(shell grep -ls '^\#!.*python' scripts/*)
# Tests marked gpu run only if nvidia-smi lists a GPU.
NOT_GPU = $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || echo 'and not gpu')

.PHONY: help install demo test test-more check format bench lock clean

help:
	@echo "make install        .venv with all pinned packages; downloads about 1.0 GB (CUDA: 4.1 GB)"
	@echo "make demo           train, evaluate, serve, register, chat, measure: at most 25 minutes on 2 cores"
	@echo "make demo QUICK=1   the same with the token in examples/: at most 5 minutes"
	@echo "make test           checks and tests: at most 25 minutes on 2 cores"
	@echo "make test-more      the longer tests (MORE_ARGS='--minutes 20': those that fit into 20 minutes)"
	@echo "make check          ruff, mypy, import contracts"
	@echo "make format         ruff format and ruff's automatic fixes"
	@echo "make bench          the full TTFT benchmark (BENCH_ARGS=...)"
	@echo "make lock           resolve requirements/*.lock again (LOCK_ARGS=...)"
	@echo "make clean          remove caches and outputs; keep .venv and prepared models"

install:
	@scripts/install

demo: install
	$(BIN)/python scripts/demo $(QUICK_FLAG) $(MODEL_FLAG)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy $(SCRIPTS)
	$(BIN)/lint-imports

# To run some tests only: make test TEST_ARGS="tests/unit -x".
test: check
	$(BIN)/python -m pytest -m "not more $(NOT_GPU)" $(TEST_ARGS)

test-more: install
	$(BIN)/python scripts/test_more $(MORE_ARGS)

format: install
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: install
	$(BIN)/be-serve bench ttft $(MODEL_FLAG) $(BENCH_ARGS)

lock: install
	$(BIN)/python scripts/lock $(LOCK_ARGS)

clean:
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
