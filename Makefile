# `make test` and `make demo` start from Python and a C++ compiler: they make .venv and install what they need there.
# TORCH= chooses another torch, e.g. TORCH=torch==2.11.0; PYTHON= another interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

venv := .venv
bin := $(venv)/bin
sources := pyproject.toml CMakeLists.txt $(shell find cmake csrc python -type f -not -name '*.pyc')

.PHONY: demo test lint clean

demo: $(venv)/installed
	$(bin)/flash-xlstm demo

test: lint
	$(bin)/python -m pytest $(PYTEST_ARGS)

lint: $(venv)/installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

$(venv)/build-tools: Makefile
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet $(TORCH) 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja 'cmake>=3.24' numpy
	touch $@

# Not isolated: the build uses the torch that it runs on, and only what changed is compiled again.
$(venv)/installed: $(venv)/build-tools $(sources)
	$(bin)/python -m pip install --quiet --no-build-isolation '.[test]'
	touch $@

clean:
	rm -rf $(venv) build demo
