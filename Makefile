# Every door of Kennel: `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash

MODEL ?= dog-breeds
PORT ?= 8080
GRPC_PORT ?= 7070
URL ?= http://127.0.0.1:$(PORT)
PYTHON ?= python3.11
# MODEL as a path: a name stands for a bundle made here.
BUNDLE = $(if $(findstring /,$(MODEL)),$(MODEL),build/bundles/$(MODEL))
# Where torch's CPU build is looked for if pip's own sources do not have it; empty: nowhere else.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# cuda: torch's CUDA build, for a machine with a GPU.
TORCH ?= cpu

VENV := .venv
PY := $(VENV)/bin/python
# Without byte code for all of it: what is imported is compiled then, which is a tenth.
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --no-compile
RUN_PARTS := gateway model-server export local
export PYTHONPATH := $(CURDIR)
STARTED := $(shell date +%s)

.PHONY: help
help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

.PHONY: run
run: $(VENV)/run ## both processes here; MODEL=name,path/to/bundle PORT=8080
	@$(PY) -m local.run --models $(MODEL) --port $(PORT) --grpc-port $(GRPC_PORT) --since $(STARTED)

.PHONY: predict
predict: $(VENV)/run ## PHOTO=x.jpg as a table, or DIR=folder to a CSV; MODEL=name URL=http://...
	@$(PY) -m local.predict $(if $(PHOTO),--photo "$(PHOTO)") $(if $(DIR),--dir "$(DIR)") --url $(URL) $(if $(filter command line,$(origin MODEL)),--model $(MODEL))

.PHONY: train
train: $(VENV)/train ## DATA=folder or gs://... to OUT=build/bundles/mine; QUICK=1 CSV=file REQUIRE='accuracy>=0.9' ARGS=...
	@$(PY) -m training.train "$(or $(DATA),$(error DATA is not set: a folder with a folder of pictures a class))" --out "$(or $(OUT),build/bundles/mine)" $(if $(QUICK),--quick) $(if $(CSV),--csv "$(CSV)") $(if $(REQUIRE),--require $(foreach r,$(REQUIRE),'$(r)')) $(ARGS)

.PHONY: evaluate
evaluate: $(VENV)/train ## MODEL=bundle on DATA=folder; writes a report beside the bundle; CSV=file ARGS=...
	@$(PY) -m training.evaluate $(BUNDLE) "$(or $(DATA),$(error DATA is not set: a folder with a folder of pictures a class))" $(if $(CSV),--csv "$(CSV)") $(ARGS)

.PHONY: bundle
bundle: $(VENV)/run ## the default bundle anew; LITE=0, 1 or 2
	@$(PY) -m training.dog_breeds build/bundles/dog-breeds --lite $(or $(LITE),0)

.PHONY: test
test: $(VENV)/dev ## all tests; UNIT=1 only those without servers
	@$(PY) -m pytest $(if $(UNIT),--ignore tests/serving)

.PHONY: measure
measure: $(VENV)/dev ## the tests that bound a time, on a machine with nothing else to do
	@$(PY) -m pytest -m measurement -s

.PHONY: lint
lint: $(VENV)/dev ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

.PHONY: screenshot
screenshot: $(VENV)/dev ## docs/page.png and docs/report.png, the README's pictures, by the browser tests
	@SCREENSHOT=docs/page.png $(PY) -m pytest -q tests/serving/test_page.py
	@SCREENSHOT_REPORT=docs/report.png $(PY) -m pytest -q tests/training/test_report.py

.PHONY: lock
lock: ## pin every dependency with hashes (needs uv)
	@python3 requirements/lock.py

.PHONY: clean
clean: ## remove the environment and everything built
	@rm -rf $(VENV) build

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Kennel needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# The CPU build of torch first, from pip's own sources or its index; where neither has it, the lock's
# other build is taken, and what only that one needs.
$(VENV)/run: $(VENV)/bin/python $(RUN_PARTS:%=requirements/%.txt)
	@echo "Installing what the parts need into $(VENV) (once, about two minutes): torch"
ifeq ($(TORCH),cpu)
	@$(PIP) -r requirements/torch-cpu.txt 2>/dev/null \
	|| $(PIP) -r requirements/torch-cpu.txt --index-url $(TORCH_INDEX) --retries 0 --timeout 5 2>/dev/null \
	|| echo "torch's CPU build was not found: taking the build with CUDA, which is larger"
endif
	@for part in $(RUN_PARTS); do echo "  $$part" && $(PIP) -r requirements/$$part.txt || exit; done
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) -r requirements/cuda.txt
	@touch $@

$(VENV)/train: $(VENV)/run requirements/training.txt
	@$(PIP) -r requirements/training.txt
	@touch $@

$(VENV)/dev: $(VENV)/train requirements/dev.txt
	@$(PIP) -r requirements/dev.txt
	@touch $@
