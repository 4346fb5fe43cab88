# Two commands: `make serve` (the embedded model on four expert-parallel ranks, its experts balanced online) and `make test` (all that needs
# no GPU). Each makes the virtual environment it needs once; a second run starts in seconds.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed before all that depends on torch, so that whatever build of it is there stays.
TORCH ?= torch==2.13.0
# Passed on: make serve ARGS="--port 9000", make test ARGS="-m 'not slow'"
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test lint clean

serve: $(VENV)/.serve
	$(BIN)/moeserve serve --tensor-parallel-size 4 --moe-expert-parallel-size 4 --enable-attention-dp \
	  --moe-config.load-balancer.num-slots 40 --moe-config.load-balancer.layer-updates-per-iter 2 $(ARGS)

test: $(VENV)/.dev
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moeserve

$(VENV)/.serve: pyproject.toml
	@echo "== installing into $(VENV): torch is large, the first time takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip  # the one of Python 3.10 searches for minutes
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[serve]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.serve
	@echo "== installing what the tests need into $(VENV)"
	$(BIN)/pip install -e ".[serve,dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
