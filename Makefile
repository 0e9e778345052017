# Everything there is to do with a checkout. "make help" lists it.
SHELL := /bin/bash
BIN := .venv/bin
PYTEST_WORKERS ?= 2
# Testbeds side by side: each takes a processor and 5 GB.
XEN_WORKERS ?= $(shell awk '/MemAvailable/ { print ($$2 > 11e6) ? 2 : 1 }' /proc/meminfo)
LOCKED := $(BIN)/uv pip compile --quiet --generate-hashes --no-emit-index-url --no-header pyproject.toml
DEMO_EXTRAS := agent build card dom0 gose
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-walk soak test-peers test-xen check fuzz format bench bench-xen lock clean deb release testbed testbed-up testbed-down testbed-clean

help: ## list these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what the other targets need (each of them does that first by itself; demo: only what it uses)
	@scripts/setup

demo: ## run the main job: a VM signs with a key that it never holds (KEEP=1 leaves it running; CARDS=pcsc: cards in readers of a pcscd)
	@scripts/setup $(if $(filter pcsc,$(CARDS)),pcsc,demo)
	@$(BIN)/python -m demo $(if $(KEEP),--keep) $(if $(CARDS),--cards $(CARDS))

test: setup ## run all tests (ARGS="..." goes to pytest)
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadscope $(ARGS)

test-walk: setup ## run the tests that go a person's way: the documents' commands as they stand, the same mistakes with each program, the demonstration
	@$(BIN)/python -m pytest -m walk -n $(PYTEST_WORKERS) --dist loadscope $(ARGS)

soak: setup ## 100,000 operations through the whole chain while cards die at random (ARGS="..." goes to pytest)
	@$(BIN)/python -m pytest -m long -v --log-cli-level INFO --timeout 7200 tests/e2e/test_deaths.py $(ARGS)

test-peers: ## run the tests with foreign TLS stacks and RADIUS programs that take long or need a toolchain (ARGS="..." goes to pytest)
	@scripts/setup peers
	@$(BIN)/python -m pytest -m peers $(ARGS)

test-xen: setup ## run the whole chain on real Xen hosts under QEMU (TESTS=tests/xen/FILE; XEN_WORKERS=1: one testbed at a time; ARGS="..." goes to pytest)
	@$(BIN)/python -m pytest -m xen -v -n $(XEN_WORKERS) --dist loadfile --timeout 3600 $(or $(TESTS),tests/xen) $(ARGS)

check: setup ## format, lint, types, import contract, protos, shell, playbooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/shellcheck scripts/setup scripts/debian-packages .ci/run
	cd ansible && PATH="$(abspath $(BIN)):$$PATH" ansible-lint --config-file ../.ansible-lint --offline --strict --nocolor

fuzz: setup ## look for inputs that a parser fails on (TIME=60 seconds for each target; TARGETS="apdu openid")
	@$(BIN)/python -m fuzz run --time $(or $(TIME),60) $(TARGETS)

format: setup ## format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

bench: setup ## measure; one table (JSON=file writes the rows too, QUICK=1 is a short run)
	@$(BIN)/python -m bench $(if $(JSON),--json $(JSON)) $(if $(QUICK),--quick)

bench-xen: setup ## measure a guest's ways to dom0 on a real Xen host under QEMU (QUICK=1 is a short run)
	@$(BIN)/python -m bench --only xen $(if $(JSON),--json $(JSON)) $(if $(QUICK),--quick)

deb: setup ## build the Debian package of the agent (dist/)
	@$(BIN)/python -m release deb

release: setup ## build what the playbooks deploy (dist/)
	@$(BIN)/python -m release wheel
	@$(BIN)/python -m release wheels
	@$(BIN)/python -m release archive

testbed: setup ## build the images of a real Xen host under QEMU (once; docs/testbed.md)
	@$(BIN)/python -m testbed build

testbed-up: setup ## start it in seconds (NAME=, HOSTS=1|2, GRID=1)
	@$(BIN)/python -m testbed up $(if $(NAME),--name $(NAME)) $(if $(HOSTS),--hosts $(HOSTS)) $(if $(GRID),--grid)

testbed-down: setup ## end it (NAME=)
	@$(BIN)/python -m testbed down $(if $(NAME),--name $(NAME))

testbed-clean: setup ## remove images that are out of date
	@$(BIN)/python -m testbed clean

lock: setup ## compile the locks anew from pyproject.toml (KEEP=1: add and remove, without upgrading the rest)
	$(LOCKED) --all-extras $(if $(KEEP),,--upgrade) --output-file requirements.lock
	$(LOCKED) $(DEMO_EXTRAS:%=--extra %) --constraint requirements.lock --output-file requirements-demo.lock

clean: ## remove what setup, tests and demo made
	rm -rf .venv .build .demo .demo.lock dist .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		secfunet/agent secfunet/gose secfunet/middleware
