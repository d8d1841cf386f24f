# Every target sets itself up in .venv. TORCH chooses the torch requirement, which is installed first and then kept;
# CONSTRAINTS may name a file of pip constraints for all else, without which the newest releases are taken.
PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4
DEMO_ARGS ?=
AOT_ARGS ?=
BENCH_ARGS ?= --results results/bench
FUZZ_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install lint docs test test-all test-oldest-peft test-kernels test-gpu demo bench bench-gpu aot-report fuzz mutants audit clean FORCE

install: $(INSTALLED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build --strict

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow or not slow"

# the other end of the range in pyproject.toml; the newest is what `make test` has installed
test-oldest-peft: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest-peft peft==0.18.1
	PYTHONPATH=$(VENV)/oldest-peft $(BIN)/python -m pytest $(PYTEST_ARGS) tests/hylorada/test_peft_*.py

test-kernels: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels

test-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_kit test

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_kit bench

demo: $(INSTALLED)
	$(BIN)/python benchmarks/run_benchmark.py --methods baseline lora dora hylorada \
		--steps 30 --batch_size 1 --max_length 256 --num_test 20 \
		--lr lora=4e-3 dora=4e-3 hylorada=2e-3 $(DEMO_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest -n 0 benchmarks/bench_column_norm.py benchmarks/bench_layer_steps.py \
		benchmarks/bench_shifted_attention.py --pace 0.4 $(BENCH_ARGS)

aot-report: $(INSTALLED)
	$(BIN)/python -m hylorada_kernels.testing.aot_report $(AOT_ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.properties.fuzz $(FUZZ_ARGS)

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants

# asks the package index for known vulnerabilities of what is installed; needs the network. Red, too, where the index does
# not know a package: it was not looked at. A local build such as 2.13.0+cpu counts as its release
audit: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install pip-audit
	$(BIN)/python -m pip list --format=freeze --exclude-editable > $(VENV)/audit/installed.txt
	sed 's/+.*//' $(VENV)/audit/installed.txt > $(VENV)/audit/releases.txt
	$(VENV)/audit/bin/pip-audit --requirement $(VENV)/audit/releases.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) $(VENV)/.torch-requirement
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/.torch-installed
	$(BIN)/python -m pip install --constraint $(VENV)/.torch-installed $(addprefix --constraint ,$(CONSTRAINTS)) --editable ".[data,demo,dev,docs,peft,quantized,tensorboard]"
	touch $@

# rewritten, and so newer than the installation, only when TORCH changes
$(VENV)/.torch-requirement: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
