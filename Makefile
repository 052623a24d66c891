# `make demo`, `make demo-video` and `make test` do the whole set-up in $(VENV) the first time.
# Another build of torch: make setup TORCH="torch==2.11.0 --index-url <as PyTorch's own page says>". Once it is there it is never
# replaced; to change it, `make clean` first.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
# Twice quiet: errors only.
PIP := $(PY) -m pip --disable-pip-version-check install -qq

.PHONY: setup demo demo-video test test-all lint bench gpu-check ablation clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

# Alone and first: the project's own range would be met by the newest build, with gigabytes of CUDA.
$(VENV)/torch.txt:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@

# The constraint holds the very build that is installed, so that a dependency asking for another one is an error.
$(VENV)/installed: $(VENV)/torch.txt setup.py seppo_fast/__init__.py
	$(PIP) --constraint $(VENV)/torch.txt --editable '.[test,dev]'
	@touch $@

demo: setup
	$(VENV)/bin/seppo-fast demo

demo-video: setup
	$(VENV)/bin/seppo-fast demo --clips

test: setup
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not sanitizer and not slow"

# Those that take a minute or more and seldom find what no other does as well; what CI runs.
test-all: test
	$(PY) -m pytest -q -n 2 --dist loadfile -m "slow and not sanitizer"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# To see that they run. Measured for the README: each without --quick, with --json benchmarks/results/DEVICE-DATE-COMMIT-SUITE.json
# (and --minutes 6 where a GPU is there for minutes only), then python -m benchmarks.tables.
bench: setup
	$(PY) -m benchmarks.full_size --quick
	$(PY) -m benchmarks.run --quick --suite sampling
	$(PY) -m benchmarks.run --quick --suite step
	$(PY) -m benchmarks.run --quick --suite endtoend
	$(PY) -m benchmarks.run --quick --suite kernels
	$(PY) -m benchmarks.run --quick --suite cache
	$(PY) -m benchmarks.run --quick --suite video
	$(PY) -m benchmarks.full_size --quick --clips

# On a CUDA machine (with `make setup TORCH=...` of its build first): values, then the figures that are asked for first.
gpu-check: setup
	$(PY) -m benchmarks.gpu_check

ablation: setup
	$(PY) -m benchmarks.ablation

# runs/ stays: it holds results.
clean:
	rm -rf $(VENV) build dist seppo_fast.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
