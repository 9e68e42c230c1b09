# make demo   train a small Llama with Adam and with Adam-mini on this machine's CPU, and compare
# make why    docs/why.md and its pictures: the talk's quadratic problems, run again; half a minute of one core
# make test   lint, types and all tests
# make check  lint, types and the tests that need one process: for the inner loop
# make lint   lint and types only
# make evidence  train small models with AdamW and Adam-mini and compare: hours, resumable; see evidence/README.md
# make docs   the documents as a site, in build/site
# make package  an sdist and a manylinux wheel in dist/, tried in clean environments; see tools/package.sh
#
# Each makes .venv first if it is missing; see tools/bootstrap.sh. ARGS go to the demo, the evidence or pytest;
# WORKERS=0 runs the tests one by one, more than 2 need more cores.

SHELL := /bin/sh
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo evidence why test check lint format docs package bootstrap clean
WORKERS := 2

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

bootstrap:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/bootstrap.sh

demo: bootstrap
	@$(BIN)/python examples/demo.py $(ARGS)

evidence: bootstrap
	@OMP_NUM_THREADS=1 $(BIN)/python -m evidence $(ARGS)

why: bootstrap
	@OMP_NUM_THREADS=1 $(BIN)/python -m evidence.why

test: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

check: lint
	$(BIN)/python -m pytest -m 'not processes' $(ARGS)

lint: bootstrap
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: bootstrap
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors: a link that leads nowhere, a document that no table of contents has.
docs: bootstrap
	@$(BIN)/python -m venv build/docs
	@build/docs/bin/pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	@build/docs/bin/sphinx-build --fail-on-warning --keep-going --quiet --conf-dir docs/site . build/site
	@echo "build/site/index.html"

package: bootstrap
	@tools/package.sh

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
