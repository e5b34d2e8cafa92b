# Everything is installed into .venv, pinned by constraints.txt.  `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export OMP_WAIT_POLICY := passive
export PYTHONUTF8 := 1

.PHONY: setup setup-studio demo study test lint house measure torture gpu bench compare docs clean

setup: $(STAMP)

# torch first and by itself: its version decides which of the large packages the rest pulls in.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# A browser for the studio's tests: Playwright, and Debian's chromium where there is none.
setup-studio: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	command -v chromium || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)

demo: setup
	$(BIN)/python -m demo

# Every method on four families of models; with DATA, training's parts and multi-task models beside merges, too.
# DATA=FOLDER names a folder of .npz files with images and labels, and of GSM8K.
study: setup
	$(BIN)/python -m study $(if $(DATA),--data "$(DATA)")
	$(BIN)/python -m study.learned
	$(if $(DATA),$(BIN)/python -m study.train --data "$(DATA)")
	$(if $(DATA),$(BIN)/python -m study.multitask --data "$(DATA)")

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three processes on two cores: a third of the time they wait for disks and for programs that they have started.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# How the code is built, in figures beside their aims; tests/test_house.py keeps what is reached.
house: setup
	@PYTHONPATH=tests $(BIN)/python -m house

# Memory and time of every stage against src/weightsmith/plan/costs.json; WRITE=1 replaces the rows that do not agree.
measure: setup
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m bench.costs $(if $(WRITE),--write)

# The slow proof: kills and failing calls by the thousand, coverage-guided fuzzing (WEIGHTSMITH_FUZZ_SECONDS each).
torture: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torture]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -o python_files='torture_*.py fuzz_*.py' tests/torture

# CUDA against the CPU, then rates; one line where there is no GPU.
gpu: setup
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU: torch sees no CUDA device, nothing was compared")'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o python_files='gpu_*.py' tests/gpu
	$(BIN)/python -m bench.device

bench: setup
	$(BIN)/python -m bench

# mergekit's configs through both programs, tensor by tensor; sets mergekit up in .bench, once.
compare: setup
	$(BIN)/python -m bench.compare

docs: setup
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .demo .bench .study docs/_build
