# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
REAL_MODEL ?= .cache/real-135m
QWEN_MODEL ?= .cache/qwen2.5-0.5b
FUZZ_SECONDS ?= 3600
# Small matrices: with more threads they only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-real test-qwen test-browser fuzz lint clean

demo: .venv/installed
	mkdir -p demo
	$(BIN)/vindex demo -o demo/atlas.vindex

test: .venv/installed lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-real: .venv/installed $(REAL_MODEL)/config.json
	VINDEX_REAL_MODEL=$(REAL_MODEL) $(BIN)/python -m pytest -m real

test-qwen: .venv/installed $(QWEN_MODEL)/config.json
	VINDEX_QWEN_MODEL=$(QWEN_MODEL) $(BIN)/python -m pytest -m qwen

test-browser: .venv/installed .venv/browser
	mkdir -p .cache/screenshots
	VINDEX_SCREENSHOTS=.cache/screenshots $(BIN)/python -m pytest -m browser

fuzz: .venv/installed
	$(BIN)/python -m tests.campaign --from -1 --seconds $(FUZZ_SECONDS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(REAL_MODEL)/config.json: .venv/installed
	$(BIN)/python tests/real_model.py $(REAL_MODEL)

$(QWEN_MODEL)/config.json: .venv/installed
	$(BIN)/python tests/real_model.py $(QWEN_MODEL) qwen2.5-0.5b

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("vindex needs Python 3.11 or newer; call make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Debian's Chromium where there is none, and what drives it.
.venv/browser: .venv/installed
	[ -n "$(VINDEX_CHROMIUM)" ] || command -v chromium chromium-browser || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; } || \
	  { echo 'install Chromium, or set VINDEX_CHROMIUM to one' >&2; exit 1; }
	$(BIN)/pip install --quiet -c constraints.txt -e '.[browser]'
	touch $@

clean:
	rm -rf demo .venv .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
