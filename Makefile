# make demo   trains on XLA with tensorly_tt and ends with a table of results
# make test   lint, types and every test: the quick ones in WORKERS processes, then the slow ones one by one
# Both set up .venv at the root first; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
# Where Python may not write bytecode when it imports, each process would compile torch's again: 18 s instead of 8.
COMPILED := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
EXTRAS := xla,tensorly,distributed,tpu-compiler,studies,dev

.PHONY: demo test setup lint results clean

demo: .venv/.installed
	$(BIN)/python launch/run.py --device xla --plugin tensorly_tt

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"
	$(BIN)/python -m pytest -m slow

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/results.md, docs/paper.md and the README's table, from docs/results.csv
results: .venv/.installed
	$(BIN)/python launch/results.py

setup: .venv/.installed

# Editable installs read entry points at install time, so a change of setup.cfg installs again.
.venv/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dlrm_xla needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install $(COMPILED) -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
