# Two commands for a fresh machine: `make demo` and `make test`. Each installs what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-lowest test-versions lint format types contracts install install-test docs \
	release-check bench clean

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the demo needs, and no more.
install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

# What tests, linters and the extras need beside it.
install-test: $(VENV)/.installed-test

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@

demo: install
	$(BIN)/fedsieve fetch minilm-l6 20newsgroups
	$(BIN)/fedsieve run demo --out runs/demo --overwrite

# A process a core, of one thread each: more threads than cores crawl. Each takes some 1.5 GB.
JOBS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 8 ? 8 : n)))
test: lint types contracts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

# What is slow measures time as well, and has the machine for itself.
test-all: test
	$(BIN)/python -m pytest -m slow

# The site, into build/site: from what is here alone, and a warning is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/fedsieve schema > build/site/recipe.schema.json

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	touch $@

# Wheel and sdist as they would be released, and a run from the wheel in an environment of its own.
release-check: install-test
	$(BIN)/python -m pytest -m slow tests/test_release.py

# The lowest versions that pyproject.toml allows, but for torch, whose wheels of then bring CUDA along:
# it, and what only tests need, are those of the usual environment.
LOW := build/lowest
test-lowest: install-test
	$(PIP) uv
	mkdir -p build
	$(BIN)/uv pip compile -q pyproject.toml --resolution lowest-direct -o $(LOW).txt
	grep -vE '^( |#|torch=|triton=|nvidia-)' $(LOW).txt > $(LOW)-less.txt
	$(BIN)/uv venv -q --allow-existing --python $(BIN)/python $(LOW)
	$(BIN)/uv pip install -q --python $(LOW)/bin/python --no-deps -r $(LOW)-less.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(LOW)/lib/python*/site-packages)/rest.pth
	OMP_NUM_THREADS=1 PYTHONPATH=src $(LOW)/bin/python -m pytest -p no:xdist -m "not slow" \
		tests/algebra tests/wire tests/recipe tests/methods tests/engine

# Of Pythons that need not be here: whatever is installed has wheels for them, and the types hold.
test-versions: install-test
	$(PIP) uv
	mkdir -p build
	for version in 3.12 3.13 3.14; do \
		$(BIN)/uv pip compile -q pyproject.toml --python-version $$version -c constraints.txt \
			--only-binary :all: --extra flower --extra quant \
			-o build/versions-$$version.txt && \
		$(BIN)/mypy --python-version $$version --cache-dir build/mypy-$$version || exit 1; \
	done

lint: install-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install-test
	$(BIN)/mypy

# The floors of docs/design.md.
contracts: install-test
	$(BIN)/lint-imports --no-logo

format: install-test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install-test
	$(BIN)/fedsieve fetch minilm-l6 20newsgroups
	mkdir -p runs
	$(BIN)/python benchmarks/round.py --json runs/bench-round.json
	$(BIN)/python benchmarks/wire.py --json runs/bench-wire.json
	$(BIN)/python benchmarks/convergence.py --json runs/bench-convergence.json
	$(BIN)/python benchmarks/bound.py --json runs/bench-bound.json
	$(BIN)/python benchmarks/flexlora.py --json runs/bench-flexlora.json
	$(BIN)/python benchmarks/server.py --json runs/bench-server.json
	$(BIN)/python benchmarks/worker.py --json runs/bench-worker.json
	$(BIN)/python benchmarks/startup.py --json runs/bench-startup.json
	$(BIN)/python benchmarks/step.py --json runs/bench-step.json
	$(BIN)/python benchmarks/cohort.py --pairs 3 --json runs/bench-cohort.json
	$(BIN)/python benchmarks/pool.py --pairs 1 --rounds 3 --json runs/bench-pool.json

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
