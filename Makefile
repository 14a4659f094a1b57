# Everything runs in an environment of its own, made from this project's files.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-long test-gpu lint clean

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[dev]"
	touch $@

## Label held-out mails with the bundled model and show the result.
demo: $(STAMP)
	$(BIN)/moe-prefill classify examples/data/mails.csv --task examples/demo_model/spam.toml \
	  --model examples/demo_model/checkpoint --label-column label -o demo_output.csv --overwrite
	@$(BIN)/python examples/show_rows.py demo_output.csv

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

## The whole suite, with a table of the slowest tests.
test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 -m "not gpu" --durations=15

test-long: $(STAMP)
	MOE_PREFILL_LONG=1 $(BIN)/python -m pytest -n 2 -m "not gpu" --durations=25

## On a machine with a CUDA GPU, with the Python that has its torch.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu tests/ops

clean:
	rm -rf $(VENV) build *.egg-info demo_output*
