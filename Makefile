# Every target sets up .venv by itself.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BUILD := pyproject.toml setup.py $(wildcard convsim_init/backends/*.c)
LOWEST := build/lowest
TRITON := build/triton
LOWEST_TESTS := release or metadata or state_dict or floats or give_the_same_bytes or odd_keys or bad_input or globs or \
	what_cannot_be_read or json

.PHONY: demo test test-lowest test-kernels check docs bench clean

demo: $(VENV)/.installed  ## write init.safetensors: a ResNet-18 to train from
	$(BIN)/convsim-init resnet18 --out init.safetensors --force

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

# What reads and writes files and parses options, with the oldest packages that pyproject.toml allows.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -p no:cacheprovider tests/system/test_versions.py tests/checkpoint/test_save.py \
		tests/checkpoint/test_read.py tests/cli/test_init.py tests/cli/test_inspect.py -k '$(LOWEST_TESTS)'

# The kernels for GPUs, without one: by Triton's interpreter, and compiled ahead of time. In a folder of its own, for
# PyTorch's builds for CUDA bring the Triton that they need.
test-kernels: $(VENV)/.installed-dev $(TRITON)/.installed
	PYTHONPATH=$(CURDIR)/$(TRITON) $(BIN)/python -m pytest -n auto --dist worksteal -p no:cacheprovider tests/backends/test_fused.py

check: $(VENV)/.installed-dev  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the documentation site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-dev  ## time and memory of the command and of the descent, against peers
	$(BIN)/python -m benchmarks.speed

clean:
	rm -rf $(VENV) build *.egg-info init.safetensors

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BUILD) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(BUILD) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check,docs]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-docs

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@ $(VENV)/.installed

$(TRITON)/.installed: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton==3.9.0
	touch $@

# All that is not named in constraints-lowest.txt is seen through to the first environment.
$(LOWEST)/.installed: constraints-lowest.txt $(VENV)/.installed-dev
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --requirement constraints-lowest.txt
	$(BIN)/python -c "import site; print('import site;', *(f'site.addsitedir({p!r});' for p in site.getsitepackages()))" \
		> $$($(LOWEST)/bin/python -c "import site; print(site.getsitepackages()[0])")/rest.pth
	touch $@
