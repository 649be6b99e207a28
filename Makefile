# All there is to learn: make setup | demo | serve | test | slow | pairs | chaos | chart | check | format |
# docs | release | bench
# Options for the command behind a target go into ARGS: make serve ARGS="--port 9000"

BIN := .venv/bin
ARGS ?=
SEEDS ?= 0-499
NODE_SEEDS ?= 0-47

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test slow pairs chaos chaos-nodes chart check format docs release bench

help:
	@echo "make setup    install Baton into .venv (the other targets do it first if need be)"
	@echo "make demo     watch requests go from a prefill process to a decode process"
	@echo "make serve    serve the demo model (ARGS=\"--model DIR\" for yours)"
	@echo "make test     run all tests"
	@echo "make slow     run the tests that make test leaves out, as root (pairs, chart and release too)"
	@echo "make pairs    run every sharding of prefill with every one of decode (about five minutes)"
	@echo "make chaos    run 500 seeded schedules of faults (SEEDS=137 replays one), then chaos-nodes"
	@echo "make chaos-nodes  48 more on a cluster of three nodes, as root (NODE_SEEDS=6 replays one)"
	@echo "make chart    bring the rendered Helm chart up on three nodes of this machine, as root"
	@echo "make check    lint, format, types, layers, generated code"
	@echo "make format   put the code into its standard format"
	@echo "make docs     build the site of docs/ into build/docs; strict: a broken link is an error"
	@echo "make release  build sdist and wheel into dist/, install them, and serve from them"
	@echo "make bench    measure ways to serve side by side (takes long; see bench/)"

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh

demo: setup
	@$(BIN)/baton demo $(ARGS)

serve: setup
	@$(BIN)/baton serve $(ARGS)

test: setup
	$(BIN)/pytest $(ARGS)

pairs: setup
	$(BIN)/pytest -m slow tests/integration tests/cluster/test_meshes.py $(ARGS)

slow: setup
	$(BIN)/pytest -m slow $(ARGS)

chaos: setup
	$(BIN)/python -m tests.chaos.run $(SEEDS)
	$(BIN)/python -m tests.cluster.chaos $(NODE_SEEDS)

chaos-nodes: setup
	$(BIN)/python -m tests.cluster.chaos $(NODE_SEEDS) $(ARGS)

chart: setup
	$(BIN)/pytest -m slow tests/deploy $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean $(ARGS)

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch .venv/.docs

release: setup
	$(BIN)/pytest -m slow tests/test_release.py $(ARGS)

bench: setup
	$(BIN)/python bench/run.py $(ARGS)
