# Everything sets itself up in .venv; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
LOCK := requirements-dev.lock
# A lock as constraints: of what pyproject.toml asks for, exactly these versions, and nothing else that the lock names (packages for CUDA
# that torch from PyPI requires and torch for the CPU does not, packages for other systems). Those that build gp_jax are constrained too.
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(LOCK)
CHECK := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make demo PYTHON=python3.12")'

.PHONY: demo test quick lint docs lock clean

$(VENV)/.ready: pyproject.toml $(LOCK)
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { $(CHECK) && $(PYTHON) -m venv --clear $(VENV); }
	$(INSTALL) pip
	$(INSTALL) --build-constraint $(LOCK) --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --build-constraint $(LOCK) --editable ".[dev]"
	touch $@

# Measures what pruning saves on pictures of real size (a minute or two on two quiet cores), trains a glimpse on the bundled model, and
# answers questions about fresh scenes under every plan: table, report, pictures.
# QUICK=1 takes the bundled glimpse. A second run reuses what is there.
demo: $(VENV)/.ready
ifeq ($(QUICK),)
	$(BIN)/python -m benchmarks.cost --out $(DEMO)/cost.json
	$(BIN)/python train.py --config configs/scenes_glimpse.py --out $(DEMO)/glimpse
	$(BIN)/python eval.py --config configs/demo.py --glimpse $(DEMO)/glimpse/export --out $(DEMO)/answers --cost $(DEMO)/cost.json --report $(DEMO)/report.html
else
	$(BIN)/python -m benchmarks.cost --tokens 1024 --out $(DEMO)/cost.json
	$(BIN)/python eval.py --config configs/demo.py --limit 48 --pictures 24 --out $(DEMO)/answers_quick --cost $(DEMO)/cost.json --report $(DEMO)/report.html
endif
	@echo "open $(DEMO)/report.html"

# Files in the order that tests/conftest.py gives them, the longest first, so that both workers end together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not documentation"

# The tests with the marker `quick`: every room, without training runs, processes of their own and compilation of many programs.
quick: $(VENV)/.ready-dev
	$(PYTEST) -m quick

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, in site/; broken links are errors, and so is Python in README, docs and notebook that does not run.
docs: $(VENV)/.ready-dev
	$(BIN)/mkdocs build --strict --quiet
	$(PYTEST) -m documentation tests/test_documentation.py tests/test_notebook.py

# Writes the lock again after a change of pyproject.toml; versions that still fit stay. `make lock UPGRADE=--upgrade` takes the newest.
# One version of a package for every system and every Python, so that what was tested is what everybody gets.
lock:
	@$(CHECK)
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip install --quiet uv
	printf 'pip\nhatchling\neditables\n' | $(VENV)/lock/bin/uv pip compile --quiet pyproject.toml - --extra dev --universal --python-version 3.11 \
		--fork-strategy fewest --no-annotate --custom-compile-command "make lock" $(UPGRADE) --output-file $(LOCK)

clean:
	rm -rf $(VENV) $(DEMO) site
