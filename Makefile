# make demo    the paper's tables and a short bottleneck sweep on the data set Digits
# make test    all tests
# make soak    long tests of kills, full disks and damaged files: DFA_SOAK x 25 kills and more
# make lint    style and type checks
# Each target first creates the virtual environment .venv, if it is missing.

PYTHON = python3
VENV = .venv
DFA_SOAK ?= 15

.PHONY: demo test soak lint
demo: $(VENV)/installed
	$(VENV)/bin/python best_practices.py --dataset Digits --seeds 0 --epochs 7 --batch-size 32 \
		--results-dir results/demo
	$(VENV)/bin/python bottleneck.py --dataset Digits --sizes 1 18 118 800 --epochs 6 \
		--batch-size 32 --results-dir results/demo

test: $(VENV)/installed-tests
	$(VENV)/bin/python -m pytest -q tests

soak: $(VENV)/installed-tests
	DFA_SOAK=$(DFA_SOAK) $(VENV)/bin/python -m pytest -q -rP tests/test_kills.py \
		tests/test_sharing.py tests/test_full_disk.py tests/test_damaged_files.py

lint: $(VENV)/installed-tests
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

$(VENV)/installed: requirements.txt
	$(if $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2> /dev/null),,\
		$(error $(PYTHON) is not Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=<newer Python>))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@
