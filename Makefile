# `make demo`, `make demo-video` and `make test` set up $(VENV) the first time.
# For another build of torch: make setup TORCH="torch==2.11.0 --index-url <URL from PyTorch's own page>". An installed
# torch is never replaced; to change it, run `make clean` first.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
# -qq: print errors only.
PIP := $(PY) -m pip --disable-pip-version-check install -qq

.PHONY: setup demo demo-video test test-all lint bench gpu-check ablation clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

# torch is installed first and alone: with the project's own range, pip would choose the newest build, with gigabytes of
# CUDA.
$(VENV)/torch.txt:
	@echo "Setting up $(VENV): first torch, then seppo_fast with what it needs. This takes minutes and prints little."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@

# The constraint names the installed build of torch, so that a dependency that needs another one is an error.
$(VENV)/installed: $(VENV)/torch.txt setup.py seppo_fast/__init__.py
	@echo "Installing seppo_fast and what it needs into $(VENV) ..."
	$(PIP) --constraint $(VENV)/torch.txt --editable '.[test,dev]'
	@touch $@
	@echo "Installed. For the command seppo-fast in this shell: source $(VENV)/bin/activate"

demo: setup
	$(VENV)/bin/seppo-fast demo

demo-video: setup
	$(VENV)/bin/seppo-fast demo --clips

test: setup
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not sanitizer and not slow"

# Adds the tests that take a minute or more and seldom find what no other test finds; CI runs this target.
test-all: test
	$(PY) -m pytest -q -n 2 --dist loadfile -m "slow and not sanitizer"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Only checks that the benchmarks run. To measure for the documentation: run each without --quick, with
# --json benchmarks/results/DEVICE-DATE-COMMIT-SUITE.json (and --minutes 6 if a GPU is available only for minutes), then
# python -m benchmarks.tables.
bench: setup
	$(PY) -m benchmarks.full_size --quick
	$(PY) -m benchmarks.run --quick --suite sampling
	$(PY) -m benchmarks.run --quick --suite step
	$(PY) -m benchmarks.run --quick --suite endtoend
	$(PY) -m benchmarks.run --quick --suite kernels
	$(PY) -m benchmarks.run --quick --suite cache
	$(PY) -m benchmarks.run --quick --suite video
	$(PY) -m benchmarks.run --quick --suite score
	$(PY) -m benchmarks.full_size --quick --clips

# For a CUDA machine, after `make setup TORCH=...` with a CUDA build: checks values, then measures what matters most.
gpu-check: setup
	$(PY) -m benchmarks.gpu_check

ablation: setup
	$(PY) -m benchmarks.ablation

# Keeps runs/, which contains results.
clean:
	rm -rf $(VENV) build dist seppo_fast.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
