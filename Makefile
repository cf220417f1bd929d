# Everything sets itself up in .venv; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
CHECK := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make demo PYTHON=python3.12")'

.PHONY: demo test lint clean

$(VENV)/.ready: pyproject.toml
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { $(CHECK) && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Trains a glimpse on the bundled model, then answers questions about fresh scenes under every plan: table, report, pictures.
# QUICK=1 takes the bundled glimpse. A second run reuses what is there.
demo: $(VENV)/.ready
ifeq ($(QUICK),)
	$(BIN)/python train.py --config configs/scenes_glimpse.py --out $(DEMO)/glimpse
	$(BIN)/python eval.py --config configs/demo.py --glimpse $(DEMO)/glimpse/export --out $(DEMO)/answers --report $(DEMO)/report.html
else
	$(BIN)/python eval.py --config configs/demo.py --limit 48 --pictures 24 --out $(DEMO)/answers_quick --report $(DEMO)/report.html
endif
	@echo "open $(DEMO)/report.html"

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
