# Everything sets itself up in .venv; `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo_out

.PHONY: demo test lint clean

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# A tiny random model answers a question about a drawn picture: the whole way through the house, on CPU.
demo: $(VENV)/.ready
	mkdir -p $(DEMO)
	$(BIN)/python -m gp_jax.tiny $(DEMO)/model --picture $(DEMO)/scene.png
	$(BIN)/gp-jax ask $(DEMO)/scene.png "What color is the roof?" --model $(DEMO)/model --no-prune --max-new-tokens 16
	$(BIN)/gp-jax ask $(DEMO)/scene.png "What color is the roof?" --model $(DEMO)/model --fixed-remain-ratio 0.25 \
		--max-new-tokens 16 --overlay $(DEMO)/overlay.png
	@echo "pictures: $(DEMO)/scene.png, $(DEMO)/overlay.png (the model is random: its answers and regions mean nothing)"

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
