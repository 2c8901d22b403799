# make demo    every row of the paper's tables on the embedded digits, in about two minutes
# make test    the tests
# Both set up a virtual environment of their own first.

PYTHON = python3
VENV = .venv

.PHONY: demo test
demo: $(VENV)/installed
	$(VENV)/bin/python best_practices.py --dataset Digits --seeds 0 --epochs 15 --batch-size 32 \
		--results-dir results/demo

test: $(VENV)/installed-tests
	$(VENV)/bin/python -m pytest -q tests

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --requirement tests/requirements.txt
	touch $@
