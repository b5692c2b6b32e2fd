# The commands of the project; each does all the set-up it needs.  `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPP    := $(wildcard csrc/*.h csrc/*.cpp csrc/*.inl csrc/*.cu csrc/*.cuh tests/csrc/*.h tests/csrc/*.cpp)
STAMP  := $(VENV)/.installed
# The CUDA release that torch is for, as the names of DALI's wheels have it; any where torch has none.
CUDA   := import torch; print((torch.version.cuda or '13').split('.')[0])

# Of the step benchmark; a name, since commas separate what `if` is given.
WITH_PHOTOS := engine,streams,compiled,plain,tuned

.PHONY: help setup quickstart test check bench gpu format clean

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(STAMP)  ## .venv with every dependency, and the native core

# torch first: the native core is built against the one that is there.
$(STAMP): setup.py pyproject.toml $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'torch>=2.11' 'setuptools>=77' ninja
	DOGO_STRICT=1 $(PIP) --no-build-isolation -e ".[dev,dali-cuda$$($(BIN)/python -c "$(CUDA)")]"
	$(BIN)/python -c 'from kernels import native; print(native.describe())'
	touch $@

quickstart: setup  ## pre-trains two peers on real CIFAR-10, about 5 minutes on two CPU cores
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_accelerators 1 engine/train.py --config configs/quickstart.yaml

# Two at once: most of the time goes into starting processes (7:50 against 10:46 minutes on two cores).  In the order of
# their names, since files of few and long tests would come last and leave one core idle.  Threads that wait must not
# spin: both processes have one for each core.
test: setup  ## every test that this machine can run
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: setup  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: setup  ## the microbenchmarks that this machine can run; PHOTOS=FOLDER for the loaders too
	$(BIN)/python -m bench loss
	$(BIN)/python -m bench terms
	$(BIN)/python -m bench optimizer
	$(BIN)/python -m bench augment
	$(BIN)/python -m bench budgets
	$(if $(PHOTOS),$(BIN)/python -m bench data --root $(PHOTOS))
	$(BIN)/python -m bench probe
	$(BIN)/python -m bench step

# GPU tests first: what they find comes before any number.
gpu: setup  ## GPU tests, then the benchmarks; rows under bench/results; PHOTOS=FOLDER for photos too
	$(BIN)/python -m pytest tests/kernels tests/engine tests/bench -m gpu
	$(BIN)/python -m pytest tests/kernels -m 'not gpu and not slow'
	$(BIN)/python -m bench loss --quick
	$(BIN)/python -m bench terms --quick
	$(BIN)/python -m bench optimizer --quick
	$(BIN)/python -m bench augment --quick
	$(BIN)/python -m bench probe --rounds 1
	$(if $(PHOTOS),$(BIN)/python -m bench data --root $(PHOTOS) --quick)
	$(BIN)/python -m bench step --quick --providers captured,captured+compiled,streams,engine,plain
	$(if $(PHOTOS),$(BIN)/python -m bench step --quick --preset photos --root $(PHOTOS) --providers $(WITH_PHOTOS))

format: setup  ## rewrites the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## removes .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info kernels/*.so
