# make demo   `gradindex demo`: train a small model, index its training text, ask it three questions
# make demo-classifier   the same with a classifier, of whose labels some were made wrong
# make wheel  dist/*.whl, to install elsewhere
# make test   lint, types, tests, some faults
# make slow   tests that take long: more moments to be killed at, more of Ray
# make faults every fault: kills, full disks, damage (about an hour); its table is benchmarks/results/faults.md
# make screenshots  the documents' pictures, from the demo's index (needs Chromium)
# make transcript   the README's transcript, from the demo's index
# All make .venv themselves. PYTHON, VENV, EXTRA (cpu or gpu) and pip's own variables are honoured.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
DEMO := .demo
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-classifier wheel test slow faults screenshots transcript lint clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradindex needs Python 3.11 or later; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: on Debian, apt-get install python3-venv"; exit 1; }

# torch first: a range would let pip choose a newer build with several GB of CUDA libraries.
$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch, then the rest ($(EXTRA)); this takes some minutes"
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable '.[$(EXTRA),test]'
	@touch $@

demo: $(BIN)/.installed
	@$(BIN)/gradindex demo -o $(DEMO)

demo-classifier: $(BIN)/.installed
	@$(BIN)/gradindex demo classifier -o $(DEMO)-classifier

# pip builds it in an environment of its own, with the backend that pyproject.toml names
wheel: $(BIN)/python
	rm -rf dist
	$(PIP) wheel . --no-deps --wheel-dir dist
	@echo "in another environment, torch first: pip install '$$(echo dist/*.whl)[$(EXTRA)]'"

test: $(BIN)/.installed lint
	$(TESTS)

slow: $(BIN)/.installed
	$(TESTS) -m slow

faults: $(BIN)/.installed
	FAULTS=all FAULTS_REPORT=1 $(BIN)/python -m pytest -s -o faulthandler_timeout=0 tests/faults

screenshots: $(BIN)/.installed
	@test -f $(DEMO)/index/manifest.json || $(MAKE) demo
	$(BIN)/python docs/make_screenshots.py $(DEMO) docs

transcript: $(BIN)/.installed
	@test -f $(DEMO)/index/manifest.json || $(MAKE) demo
	$(BIN)/python docs/make_transcript.py $(DEMO)

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO)-classifier dist
