# Everything a fresh machine needs: `make demo`, `make test`, `make study-quick`. Override the torch to install with
#   make test TORCH="torch==2.8.0"         (or a CUDA build from the index of your choice)
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check coverage gpu study study-quick docs clean

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" -e ".[dev]"
	$(BIN)/pip install -q --no-deps timm  # it asks for torchvision, which the tests do not need
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install -q --no-deps triton || true  # torch's own, or for its interpreter
	touch $@

demo: $(READY)  ## train on two ranks, publish averages, evaluate each, look at them and at the export
	rm -rf runs/demo
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 launch/train.py --wrapper fsdp2 --epochs 6 --publish 50 --out runs/demo
	OMP_NUM_THREADS=1 $(BIN)/dist-ema watch runs/demo/published --metric loss --exec '$(BIN)/python launch/evaluate.py {path}'
	$(BIN)/dist-ema board runs/demo/published
	$(BIN)/dist-ema inspect runs/demo/export

check: $(READY)  ## format, lint, the contracts between packages, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

test: check  ## the check and the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

coverage: $(READY)  ## the suite with line coverage of all ranks, in htmlcov/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov=dist_ema --cov-report=term:skip-covered --cov-report=html

gpu: $(READY)  ## with a GPU: its tests, the bench, the kernels, into docs/benchmarks-gpu.md
	$(BIN)/python launch/gpu.py

study: $(READY)  ## the experiments of docs/results.md, 40 minutes on two cores, into runs/study; resumes
	$(BIN)/python launch/study.py

study-quick: $(READY)  ## the same in three minutes, too small to prove anything
	$(BIN)/python launch/study.py --quick --out runs/study-quick

docs: $(READY)  ## the site, in site/; strict: a link that leads nowhere fails
	$(BIN)/pip install -q -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build runs site dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache
