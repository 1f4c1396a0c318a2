# WISP for Triton. `make demo` and `make test` need Python 3.11 or 3.12, and install the rest
# (as root; others are told which packages of the system are missing).
#
# torch is installed as the plain version: the index or folder of wheels that pip is set up with decides which
# build that is (the default index has the CUDA build for Linux). For a CPU build:
#   make setup PIP_EXTRA_ARGS="--extra-index-url=URL_OF_A_CPU_WHEEL_INDEX"     or set PIP_FIND_LINKS / PIP_INDEX_URL
# Another Python: make setup PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PIP_EXTRA_ARGS ?=
TORCH := torch==2.13.0
EXTRAS := edge,gateway,server,export,bench,dev
PYTEST_ARGS ?=
TEST_JOBS ?= 2
PERF_ARGS ?=
BENCH_ARGS ?= --quick
# Debian keeps venv and the shared library of Python (tritonserver's Python backend is linked to it) in own packages.
define NEEDED_PACKAGES
import ctypes, importlib.util, shutil, sys
version = "python%d.%d" % sys.version_info[:2]
if not importlib.util.find_spec("ensurepip"): print(version + "-venv")
try: ctypes.CDLL("lib" + version + ".so.1.0")
except OSError:
    if sys.prefix == "/usr": print("lib" + version)
if not shutil.which("openssl"): print("openssl")  # the tests make a certificate
if not shutil.which("g++"): print("g++")  # for the batching strategy
endef
export NEEDED_PACKAGES
say = @printf '\n== %s\n' "$(1)" >&2

.PHONY: help setup demo test lint devices plugin compiled interpreted perf bench results clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## virtual environment, default models, tritonserver
	$(call say,models: checked by hash; built at the first run)
	$(BIN)/wisp-server models
	$(BIN)/wisp-server triton

demo: setup ## one prompt end to end on this machine: edge drafts, tritonserver verifies
	$(call say,demo)
	$(BIN)/wisp-bench demo

lint: $(VENV)/.installed ## ruff, mypy (all but tests; strict on wisp_plugin)
	$(call say,lint and types)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/.installed ## everything that must hold: lint, types, unit and integration tests
	+$(MAKE) --no-print-directory --jobs 3 setup lint $(VENV)/.browser
	$(call say,unit tests)
	$(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist worksteal \
	  --ignore tests/integration --ignore tests/test_device_wheels.py $(PYTEST_ARGS)
	$(call say,integration tests: a server for each process)
	$(BIN)/python -m pytest tests/integration -m "not alone" --numprocesses $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)
	$(call say,integration tests that depend on time: one after the other)
	$(BIN)/python -m pytest tests/integration -m alone $(PYTEST_ARGS)

BATCHED := model_repository/wisp_verifier_batched
plugin: ## batchstrategy.so, built with g++ alone and put into wisp_verifier_batched; TRITON_INCLUDE_DIR= to use Triton's
	$(MAKE) -C wisp_plugin/batch_strategy BUILD=$(CURDIR)/build/plugin
	cp build/plugin/batchstrategy.so $(BATCHED)/1/batchstrategy.so
	test -e $(BATCHED)/wisp_profile.json || cp $(BATCHED)/first_profile.json $(BATCHED)/wisp_profile.json

compiled: $(VENV)/.installed ## engine and sessions as C extensions, in place (a minute or two; needs a C compiler)
	WISP_COMPILED=1 $(BIN)/python setup.py -q build_ext --inplace

interpreted: ## plain Python again, which `make compiled` stands in front of
	rm -rf wisp_plugin/*.cpython-*.so bench/*.cpython-*.so build/lib.* build/temp.* build/ops.txt build/*native*

perf: setup ## perf_analyzer, closed and open loop, against both verifiers; its CSVs go to perf-results
	$(BIN)/wisp-bench perf $(PERF_ARGS)

bench: setup ## engine, e2e, lossless and the reduced matrix; BENCH_ARGS= runs the first three at full length
	$(call say,wisp-bench engine)
	$(BIN)/wisp-bench engine $(BENCH_ARGS)
	$(call say,wisp-bench e2e)
	$(BIN)/wisp-bench e2e $(BENCH_ARGS)
	$(call say,wisp-bench lossless)
	$(BIN)/wisp-bench lossless $(BENCH_ARGS)
	$(call say,wisp-bench matrix: 12 cells in short runs; those of the results take --runs medium. Stopped, it goes on)
	$(BIN)/wisp-bench matrix --report build/matrix

# Each benchmark prints its document as the last line. Nothing else should run on the machine meanwhile.
# A missed target ends a benchmark with an error and is a result all the same: its document is kept.
# The matrix takes its parts from their file; without that it takes some fifteen hours more.
RESULTS := estimator scheduler classes prefix controller link plugin goodput other_seeds ablations capacity sensitivity matrix simulator validate full_speed gateway generate
classes_ARGS := --quick
link_ARGS := --quick
plugin_ARGS := --rounds 1 --seconds 15
goodput_ARGS := --systems slo-central centralized sled published colocated fixed-edf wisp-edge-only wisp-no-devices
matrix_ARGS := --full --few --runs medium --cells 108 --recheck 5 --state bench/results/matrix-parts.jsonl
gateway_ARGS := --rounds 1 --first-bytes 80
generate_ARGS := --prompts 2 --rounds 1
full_speed_COMMAND := validate
full_speed_ARGS := --dilation 1
other_seeds_COMMAND := goodput
other_seeds_ARGS := --few --seed 20 --together 2 --systems centralized sled colocated
ablations_COMMAND := goodput
ablations_ARGS := --few --seeds 3 --together 2 --systems slo-central wisp-no-controller wisp-no-scheduler wisp-no-holding wisp-edge-only wisp-no-devices
capacity_ARGS := --few --seeds 1 --together 2 --systems centralized colocated
sensitivity_COMMAND := goodput
sensitivity_ARGS := --few --seeds 1 --sensitivity --systems centralized sled
called = $(strip $(or $($(name)_COMMAND),$(name)) $($(name)_ARGS))
results: setup compiled ## the benchmarks behind the tables of results, compiled (five hours on two cores); writes those
	@rm -f $(VENV)/not_kept; $(foreach name,$(RESULTS),printf '\n== wisp-bench $(called) ($(name))\n' >&2; \
	  $(BIN)/wisp-bench $(called) > $(VENV)/result || \
	    { code=$$?; echo "wisp-bench $(called): exit code $$code" >&2; test $$code != 130 || exit 130; }; \
	  cat $(VENV)/result; $(BIN)/wisp-bench results --keep $(name) $(VENV)/result || touch $(VENV)/not_kept;)
	$(BIN)/wisp-bench results
	@! rm $(VENV)/not_kept 2> /dev/null || { echo 'make results: not all documents were kept, see above' >&2; exit 1; }

clean: interpreted ## remove the virtual environment and caches; models in $WISP_HOME stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python that runs is looked for by running it: a shim on PATH may stand for nothing.
$(VENV)/.created:
	$(call say,virtual environment in $(VENV))
	@python=; for candidate in $(PYTHON) python3.11 python3.12 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	    then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then echo "make: no Python 3.11 or 3.12 found; name one with PYTHON=" >&2; exit 1; fi; \
	needed=$$("$$python" -c "$$NEEDED_PACKAGES"); \
	if [ -n "$$needed" ]; then \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "make: $$python lacks parts of Python; on Debian and Ubuntu: sudo apt-get install $$needed" >&2; exit 1; fi; \
	  echo "installing $$needed" >&2; apt-get update -qq; apt-get install -y -qq --no-install-recommends $$needed >&2; fi; \
	"$$python" -m venv $(VENV)
	@touch $@

# A call of its own in just this spelling, first: a build from a local folder of wheels (--find-links) is taken then.
$(VENV)/.torch: $(VENV)/.created
	$(call say,$(TORCH): the largest download)
	$(PIP) install $(PIP_EXTRA_ARGS) $(TORCH)
	@touch $@

# A Chromium for the tests of the page, nginx for those of a proxy. Where they cannot be installed (not root; Ubuntu has
# Chromium as a snap only) these tests are skipped and say so.
$(VENV)/.browser: $(VENV)/.created
	@updated=; for pair in chromium-headless-shell:chromium-headless-shell nginx:nginx-light; do \
	  if PATH="$$PATH:/usr/sbin" command -v "$${pair%%:*}" >/dev/null; then continue; fi; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    test -n "$$updated" || apt-get update -qq && updated=1; \
	    if apt-cache show "$${pair##*:}" >/dev/null 2>&1; then \
	      apt-get install -y -qq --no-install-recommends "$${pair##*:}" >&2 && continue; fi; fi; \
	  echo "no $${pair##*:} here: the tests that need it are skipped" >&2; done
	@touch $@

devices: $(VENV)/.installed ## every edge dependency has a wheel for arm64 Linux
	$(BIN)/python -m pytest tests/test_device_wheels.py $(PYTEST_ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(call say,all other packages)
	$(PIP) install $(PIP_EXTRA_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
