# The commands of this project. Each sets up .venv first where that is needed; `make help` lists them.
#
#   PYTHON=python3.12   the Python that .venv is made with (3.10 or newer)
#   VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt   other versions, beside the usual ones
#   ARGS="..."          more arguments for the command: make test ARGS="-k fold"
#
# pip's own settings hold too: PIP_EXTRA_INDEX_URL, for example, where another build of torch is wanted.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin

# The pinned versions, also inside build environments. setup.py finds cmake and ninja on the path.
export PIP_CONSTRAINT := $(CURDIR)/$(CONSTRAINTS)
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Without bytecode each process that tests start would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

NATIVE_TESTS := $(wildcard tests/cpp/*.cpp tests/cuda_emulation/*.cpp tests/cuda_emulation/*.h)
NATIVE := $(filter %.cpp %.h %.cu %.cuh,$(wildcard csrc/*.* csrc/*/*.*))
# bench_gpu has a script of its own, benchmarks/gpu.sh.
BENCHMARKS ?= $(filter-out bench_gpu,$(sort $(basename $(notdir $(wildcard benchmarks/bench_*.py)))))

.PHONY: help setup demo test test-all test-oldest bench bench-tables bench-check triton-check cuda-check sanitize fuzz wirings nightly coverage mutation wheel examples sweep sweep-libraries torchao audit licences sbom lock browser screenshots docs lint format

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/obc.stamp ## create .venv, install everything into it and build the native kernels

# torch and the build's tools come before obc, whose build runs without isolation: one torch, not two. (pip refuses a
# constraint for build environments where there is none.) Bytecode is made of what is imported, not of everything.
$(VENV)/tools.stamp: $(CONSTRAINTS)
	@echo "Installing torch and the build's tools into $(VENV): minutes, the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile torch 'setuptools>=77' pybind11 cmake ninja
	@touch $@

$(VENV)/obc.stamp: $(VENV)/tools.stamp pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@echo "Building and installing obc with everything that its demo, tests and linters need"
	env -u PIP_BUILD_CONSTRAINT $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --check-build-dependencies --editable '.[dev,triton]'
	@touch $@

demo: setup ## train small networks on digits, prune them by four criteria, print what each kept
	$(BIN)/obc demo $(ARGS)

# One thread a process: as many processes as cores run, and the threads of several processes wait for each other. Each
# begins with a part of the folders of its own, so that few models and libraries are imported in more than one.
test: setup ## the test suite, without the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-all: setup ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

test-oldest: ## make test on the oldest versions that obc supports, in .venv-oldest: downloads gigabytes
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

bench: setup ## every benchmark; ARGS="--out" writes benchmarks/results, BENCHMARKS=bench_ops runs one
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(ARGS); done

bench-tables: setup ## fill the tables of README.md and docs/ from benchmarks/results
	$(BIN)/python -m benchmarks.tables $(ARGS)

bench-check: setup ## run committed benchmarks again and name ratios that got worse beyond noise
	$(BIN)/python -m benchmarks.check $(ARGS)

triton-check: setup ## compile every Triton kernel for sm_80 and sm_90, print registers, spills and load widths
	$(BIN)/python -m obc_kernels.aot --arch 80 90

cuda-check: setup ## compile every CUDA kernel for sm_80 and sm_90, print registers, spills and load widths
	$(BIN)/python csrc/cuda/check.py $(ARGS)

sanitize: setup ## the CPU operators under address, undefined-behaviour and thread sanitizers, and valgrind
	PYTHON=$(CURDIR)/$(BIN)/python csrc/sanitize.sh

# Each of the nine tests of operators draws this many examples.
FUZZ_EXAMPLES ?= 2500
FUZZ_MODELS ?= 600
FUZZ_SEED ?= 0
fuzz: setup ## over 20,000 examples of operators, 600 random models against the oracle; FUZZ_SEED=1 draws others
	OBC_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q --hypothesis-seed=$(FUZZ_SEED) tests/ops/test_fuzz_ops.py
	OBC_FUZZ_MODELS=$(FUZZ_MODELS) OBC_FUZZ_FIRST=$$(($(FUZZ_SEED) * $(FUZZ_MODELS))) \
	  $(BIN)/python -m pytest -q tests/scoring/test_fuzz_models.py

# Networks with random wirings between layers.
WIRINGS ?= 400
wirings: setup ## random permutations, splits, stacks, views, shuffles between layers: pruned exactly, or left out
	OBC_WIRINGS=$(WIRINGS) OBC_WIRINGS_FIRST=$$(($(FUZZ_SEED) * $(WIRINGS))) \
	  $(BIN)/python -m pytest -q tests/structures/test_random_wirings.py

# Where torchao is installed, transformers imports it with every model: in its own folder it slows down nothing else.
torchao: setup ## the tests of quantised models with torchao too, installed into build/torchao
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/torchao torchao
	PYTHONPATH=build/torchao $(BIN)/python -m pytest -q tests/model/test_quantized.py $(ARGS)

NIGHTLY := browser examples docs wheel licences sbom sanitize fuzz wirings sweep sweep-libraries torchao test-all mutation
nightly: setup ## all of it, each with its time: hours
	@for target in $(NIGHTLY); do began=$$(date +%s); $(MAKE) $$target || exit 1; \
	  echo "make $$target: $$(($$(date +%s) - began)) s"; done
	@$(MAKE) audit || echo "make audit: an advisory, see above; or the index's advisories can't be reached from here"

coverage: setup ## the test suite with its coverage of lines and branches
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n auto -m "not slow" $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

mutation: setup ## a sample of mutants of reference.py, scoring/ and recovery/: which of them no test notices
	$(BIN)/python tests/mutation.py $(ARGS)

sweep: setup ## every model type of the transformers library, tiny: groups, sliced against masked, saving; half an hour
	$(BIN)/python tests/sweep --write docs/transformers_models.md $(ARGS)

# One list of architectures a library, in tests/sweep/library_*.py. Without what the libraries depend on: torch is here.
sweep-libraries: setup ## networks of other libraries, small: half of all units against masks, pruned to half; hours
	mkdir -p build
	$(BIN)/python tests/sweep/sweep_libraries.py --packages > build/libraries.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/libraries --requirement build/libraries.txt
	PYTHONPATH=build/libraries $(BIN)/python tests/sweep/sweep_libraries.py --write docs/library_models.md $(ARGS)
	PYTHONPATH=build/libraries $(BIN)/python tests/sweep/run_detectors_page.py

examples: setup ## run every script of examples/, in small
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/examples $(ARGS)

audit: setup ## ask the index's advisories about what is installed
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

licences: setup ## the licence of every installed package
	$(BIN)/python -m pip install --quiet pip-licenses
	$(BIN)/pip-licenses --order license

sbom: setup ## every installed package with version and licence, as CycloneDX JSON in build/sbom.json
	$(BIN)/python -m pip install --quiet cyclonedx-bom
	mkdir -p build
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-file build/sbom.json $(BIN)/python
	@echo "written: build/sbom.json"

# Without torch's local version, so that the lock holds for CPU and CUDA builds alike.
lock: setup ## write the versions of everything installed to constraints-lock.txt; make setup CONSTRAINTS=... takes them
	{ sed -n '/^#/p;/^[^#]/q' constraints-lock.txt; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+]*\).*/\1/p'; } > build/lock.txt
	mv build/lock.txt constraints-lock.txt

# The tests of pages run in it. Debian's; elsewhere any chromium or google-chrome on the path serves.
browser: ## install Chromium with apt-get where there is none
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; }

screenshots: setup browser ## take the pictures of the page of a pruning that the docs show
	$(BIN)/python docs/screenshots.py

# torch's own libraries stay outside: the importing process has its torch.
wheel: setup ## build the source distribution and the wheel, each in isolation, into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	@ls -l dist

# Python alone makes it: nothing is fetched. -W: a warning is an error; all of them are shown first.
docs: setup ## the pages of docs/ as a site in build/docs, with the API reference from the docstrings
	$(BIN)/python docs/drawings.py
	$(BIN)/python docs/criteria_table.py
	$(BIN)/python docs/operators_table.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs $(ARGS)
	@echo "built: build/docs/index.html"

lint: setup ## ruff, clang-format, mypy and the schema of workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE) $(NATIVE_TESTS)
	$(BIN)/mypy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: setup ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(NATIVE_TESTS)
