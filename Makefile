# make demo | test | check | bench | sanitize | gpu-code | soak: each sets up what it needs in .venv first. TORCH,
# PYTHON and JOBS may be overridden.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
# Waiting threads sleep instead of spinning: on a machine that does other things too, spinning ones take its cores.
export OMP_WAIT_POLICY ?= passive
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.h csrc/cuda/*.cu)

.PHONY: setup data demo test check bench sanitize gpu-code soak clean FORCE
.DELETE_ON_ERROR:

setup: .venv/.ready

# Changes when another torch is asked for.
.venv/.torch: FORCE
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	echo "$(TORCH)" | cmp --silent - $@ || echo "$(TORCH)" > $@

# torch goes first and by itself: a range would let pip choose another release. The editable install compiles csrc/.
.venv/.ready: pyproject.toml setup.py $(SOURCES) .venv/.torch
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# A real language model for the parity tests (SmolLM2-135M, Apache-2.0), and the demo's drawings and texts.
data: setup
	$(BIN)/python tests/fetch_smollm2.py
	$(BIN)/python -m vlcore.demo --fetch-only

demo: setup
	$(BIN)/python -m vlcore.demo

# On JOBS cores.
test: setup data
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu
	$(BIN)/clang-format --dry-run --Werror tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/cuda/*.h
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_house.py

# Every operator beside its peers, by pytest-benchmark; `vlcore bench` is what the README's numbers are measured by.
bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

# The tests of the C++ kernels and of launches on a build, apart from the usual one, that stops at any access past a
# tensor and at undefined behaviour. Python and torch know nothing of the sanitizer, so its library goes first, and
# leaks are not looked for.
sanitize: setup
	VLCORE_SANITIZE=1 VLCORE_CUDA=0 $(BIN)/python -m build --wheel --outdir build/sanitize .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH="$(CURDIR)/build/sanitize/lib" $(BIN)/python tests/sanitize.py

# The GPU kernels' machine code, for which no GPU is needed: after every change of a kernel or a launch table, of that
# operator alone (OPS=rms_norm). The oldest Triton that pyproject.toml allows is used too, from a folder of its own.
gpu-code: setup build/triton-3.6.0
	$(BIN)/python -m vlcore.bench.gpu_code $(OPS)

build/triton-3.6.0:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

# The long tests: the whole demo against its targets, real sizes.
soak: setup data
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv build dist *.egg-info vlcore/*.so
