# Every target sets up .venv by itself.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench clean

demo: $(VENV)/.installed  ## write init.safetensors: a ResNet-18 to train from
	$(BIN)/convsim-init resnet18 --out init.safetensors --force

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## time and memory of the command and of a descent step, against peers
	$(BIN)/python benchmarks/speed.py

clean:
	rm -rf $(VENV) build *.egg-info init.safetensors

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@ $(VENV)/.installed
