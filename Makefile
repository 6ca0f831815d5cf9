# Needs Python 3.10 or later and a C++ compiler; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
GPU_TORCH ?= torch==2.14.1
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
FRAMEWORKS := $(VENV)/frameworks
ON_HOST := $(VENV)/on_host
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)
CXX_SOURCES := $(NATIVE) $(wildcard tests/*.cpp tests/cuda_on_host/*)

.PHONY: install train test test-gpu-on-host lint format bench gpu-report clean

install: $(STAMP)

# torch comes first: a later look at its version range must find it satisfied. A torch built for GPUs
# brings its own triton, which stays.
$(STAMP): Makefile pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 10) or sys.exit(f"Python 3.10 or later is needed, {sys.executable} is {v}: make PYTHON=python3.11 install")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TRITON)'
	$(BIN)/python -m pip install --quiet -e '.[test,lint]'
	touch $(STAMP)

# What only the tests of frameworks need. timm would bring a torchvision built for GPUs, with which a
# torch for CPUs cannot import anything that looks for torchvision; the tests use it without.
$(FRAMEWORKS): $(STAMP)
	$(BIN)/python -m pip install --quiet 'lrs_ext[frameworks]'
	$(BIN)/python -m pip install --quiet --no-deps 'timm>=1.0.25'
	touch $(FRAMEWORKS)

train: install
	$(BIN)/python benchmarks/train_gpt.py $(ARGS)

test: $(FRAMEWORKS)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 $(ARGS)

# A torch built for GPUs, for which a machine without any passes itself off as one with two.
$(ON_HOST)/installed: Makefile pyproject.toml
	test -x $(ON_HOST)/bin/python || $(PYTHON) -m venv $(ON_HOST)
	$(ON_HOST)/bin/python -m pip install --quiet '$(GPU_TORCH)'
	LRS_CUDA=0 $(ON_HOST)/bin/python -m pip install --quiet '.[test]'
	touch $(ON_HOST)/installed

test-gpu-on-host: $(ON_HOST)/installed
	$(ON_HOST)/bin/python tests/gpu_on_host.py $(ON_HOST)/build -m pytest -p gpu_on_host -m 'gpu or two_gpus' --numprocesses auto --maxprocesses 8 $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: install
	$(BIN)/python benchmarks/bench_step.py $(ARGS)

# Needs no network: PYTHON must have torch 2.11 or later and the build tools.
gpu-report:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu_report.py $(ARGS)

clean:
	rm -rf build dist lrs_ext/_C.*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
