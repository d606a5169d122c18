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
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
# Of the images that hold torch.
TAG = $(VERSION)$(if $(filter cuda,$(TORCH)),-cuda)
DOCKER ?= docker
# The plugin, or the program that came before it.
COMPOSE = PORT=$(PORT) TAG=$(VERSION) $(shell $(DOCKER) compose version >/dev/null 2>&1 && echo $(DOCKER) compose || echo docker-compose) -p kennel
# The images' common ground; a digest may follow: debian:bookworm-slim@sha256:...
BASE ?= debian:bookworm-slim
# Without byte code for all of it: what is imported is compiled then, which is a tenth.
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --no-compile
RUN_PARTS := gateway model-server export local
export PYTHONPATH := $(CURDIR)
# Byte code is kept beside what it is made of, whatever the shell says: without it each start of a process compiles all
# that it imports, for the gateway a second.
unexport PYTHONDONTWRITEBYTECODE
STARTED := $(shell date +%s)

.PHONY: help
help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

.PHONY: run
run: $(VENV)/run ## both processes here; MODEL=name,path/to/bundle,gs://bucket/bundle PORT=8080
	@$(PY) -m local.run --models $(MODEL) --port $(PORT) --grpc-port $(GRPC_PORT) --since $(STARTED)

.PHONY: predict
predict: $(VENV)/run ## PHOTO=x.jpg as a table, or DIR=folder to a CSV; MODEL=name URL=http://...
	@$(PY) -m local.predict $(if $(PHOTO),--photo "$(PHOTO)") $(if $(DIR),--dir "$(DIR)") --url $(URL) $(if $(filter command line,$(origin MODEL)),--model $(MODEL))

.PHONY: train
train: $(VENV)/train ## DATA=folder or gs://... to OUT=build/bundles/mine; QUICK=1 INT8=1 CSV=file REQUIRE='accuracy>=0.9' ARGS=...
	@$(PY) -m training.train "$(or $(DATA),$(error DATA is not set: a folder with a folder of pictures a class))" --out "$(or $(OUT),build/bundles/mine)" $(if $(QUICK),--quick) $(if $(INT8),--int8) $(if $(CSV),--csv "$(CSV)") $(if $(REQUIRE),--require $(foreach r,$(REQUIRE),'$(r)')) $(ARGS)

.PHONY: evaluate
evaluate: $(VENV)/train ## MODEL=bundle on DATA=folder; writes a report beside the bundle; CSV=file ARGS=...
	@$(PY) -m training.evaluate $(BUNDLE) "$(or $(DATA),$(error DATA is not set: a folder with a folder of pictures a class))" $(if $(CSV),--csv "$(CSV)") $(ARGS)

.PHONY: quantize
quantize: $(VENV)/train ## MODEL=bundle in int8, with pictures from DATA=folder, to OUT=MODEL-int8; CSV=file ARGS=...
	@$(PY) -m training.quantize $(BUNDLE) "$(or $(DATA),$(error DATA is not set: a folder with a folder of pictures a class))" $(if $(OUT),--out "$(OUT)") $(if $(CSV),--csv "$(CSV)") $(ARGS)

.PHONY: bundle
bundle: $(VENV)/run ## the default bundle anew; LITE=0, 1 or 2
	@$(PY) -m training.dog_breeds build/bundles/dog-breeds --lite $(or $(LITE),0)

.PHONY: test
test: $(VENV)/dev $(VENV)/checkov/done $(VENV)/vertex/done ## all tests; UNIT=1 only those without servers
	@$(PY) -m pytest $(if $(UNIT),--ignore tests/serving --ignore tests/images)
	@$(VENV)/vertex/bin/python -m pytest tests/vertex $(if $(UNIT),-m 'not slow')

.PHONY: measure
measure: $(VENV)/dev ## the tests that bound a time, on a machine with nothing else to do
	@$(PY) -m pytest -m measurement -s

.PHONY: lint
lint: $(VENV)/dev ## ruff, mypy and the C compiler's warnings
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	@! command -v cc >/dev/null || CFLAGS='-Wall -Wextra -Werror -fsyntax-only' bundle/compile.sh

.PHONY: screenshot
screenshot: $(VENV)/dev ## docs/page.png and docs/report.png, the README's pictures, by the browser tests
	@SCREENSHOT=docs/page.png $(PY) -m pytest -q tests/serving/test_page.py
	@SCREENSHOT_REPORT=docs/report.png $(PY) -m pytest -q tests/training/test_report.py

.PHONY: wheels
wheels: build/wheels/gateway.done build/wheels/$(TORCH).done ## the images' packages, checked against their hashes, into build/wheels

.PHONY: images
images: wheels build/bundles/dog-breeds/manifest.json ## build the three images, print their sizes; TORCH=cuda for GPUs
	@$(call image,gateway,$(VERSION)) && $(call image,model-server,$(TAG)) && $(call image,training,$(TAG))

.PHONY: endpoint-image
endpoint-image: images ## gateway and model server as one image, for an endpoint of Vertex AI
	@$(call image,endpoint,$(TAG),vertex/endpoint)

.PHONY: compose-up
compose-up: ## both images here as containers; MODEL_URI=file:///bundles/mine MODELS=mine for a bundle made here
	@$(COMPOSE) up --detach && echo "Waiting for the first answer at $(URL)" \
	&& timeout 120 bash -c 'until curl -sf -o /dev/null $(URL)/readyz; do sleep 1; done' \
	&& echo "Ready: $(URL)" || { $(COMPOSE) logs --tail 30; exit 1; }

.PHONY: compose-test
compose-test: $(VENV)/run ## a drawing to the running containers and its answer
	@$(PY) -c 'from local.run import first_answer; print(first_answer("$(URL)"))'

.PHONY: compose-down
compose-down: ## end them
	@$(COMPOSE) down

include bench/bench.mk capacity/capacity.mk k8s/deploy.mk k8s/kind.mk k8s/gke.mk vertex/vertex.mk

.PHONY: lock
lock: ## pin every dependency with hashes (needs uv)
	@python3 requirements/lock.py

.PHONY: clean
clean: ## remove the environment and everything built
	@rm -rf $(VENV) build

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "Kennel needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

build/pixels.so: bundle/resample.c bundle/jpeg.c bundle/compile.sh
	@bundle/compile.sh || echo "Not compiled: pictures are decoded and resized by Pillow, which gives the same pixels 1 ms later"

# The CPU build of torch first, from pip's own sources or its index; where neither has it, the lock's
# other build is taken, and what only that one needs.
$(VENV)/run: $(VENV)/bin/python $(RUN_PARTS:%=requirements/%.txt) | build/pixels.so
	@echo "Installing what the parts need into $(VENV) (once, about two minutes): torch"
ifeq ($(TORCH),cpu)
	@$(PIP) -r requirements/torch-cpu.txt 2>/dev/null \
	|| $(PIP) -r requirements/torch-cpu.txt --index-url $(TORCH_INDEX) --retries 0 --timeout 5 2>/dev/null \
	|| echo "torch's CPU build was not found: taking the build with CUDA, which is larger"
endif
	@for part in $(RUN_PARTS); do echo "  $$part" && $(PIP) -r requirements/$$part.txt || exit; done
	@$(PY) -c 'import torch' 2>/dev/null || $(PIP) -r requirements/torch-cuda.txt
	@touch $@

$(VENV)/train: $(VENV)/run requirements/training.txt
	@$(PIP) -r requirements/training.txt
	@touch $@

$(VENV)/dev: $(VENV)/train requirements/dev.txt
	@$(PIP) -r requirements/dev.txt
	@touch $@

# Apart: their dependencies would rule ours.
$(VENV)/checkov/done $(VENV)/vertex/done: $(VENV)/%/done: requirements/%.txt | $(VENV)/bin/python
	@$(PYTHON) -m venv $(VENV)/$*
	@$(VENV)/$*/bin/pip install -qq --disable-pip-version-check --no-deps --require-hashes --no-compile -r $<
	@touch $@

build/bundles/dog-breeds/manifest.json: | $(VENV)/run
	@$(PY) -m training.dog_breeds build/bundles/dog-breeds

DOWNLOAD = $(PY) -m pip download -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: --dest $(@:.done=)
# A lock without torch, which comes from requirements/torch-cpu.txt.
WITHOUT_TORCH = awk '/^[^ ]/ { keep = !/^torch==/ } keep'

build/wheels/gateway.done: requirements/gateway.txt | $(VENV)/bin/python
	@echo "Downloading the gateway's packages" && $(DOWNLOAD) -r $< && touch $@

build/wheels/cpu.done: requirements/model-server.txt requirements/training.txt requirements/torch-cpu.txt | $(VENV)/bin/python
	@echo "Downloading the packages of the model server and of training"
	@$(DOWNLOAD) -r requirements/torch-cpu.txt 2>/dev/null || $(DOWNLOAD) -r requirements/torch-cpu.txt --index-url $(TORCH_INDEX)
	@$(WITHOUT_TORCH) requirements/training.txt >build/wheels/training.txt
	@for lock in requirements/model-server.txt build/wheels/training.txt; do $(DOWNLOAD) -r $$lock || exit; done
	@touch $@

build/wheels/cuda.done: $(patsubst %,requirements/%.txt,model-server gpu training torch-cuda) | $(VENV)/bin/python
	@echo "Downloading the packages of the model server and of training, with CUDA"
	@for lock in $(filter %.txt,$^); do $(DOWNLOAD) -r $$lock || exit; done
	@touch $@

# $(call image,part,tag,folder of its Dockerfile where that is not the part's name)
define image
DOCKER_BUILDKIT=1 $(DOCKER) build --quiet --file $(or $(3),$(1))/Dockerfile --tag kennel/$(1):$(2) --build-arg BASE=$(BASE) \
  --build-arg TORCH=$(TORCH) --build-arg VERSION=$(VERSION) --build-arg TAG=$(2) --build-arg REVISION=$$(git describe --always --dirty --abbrev=40) . >/dev/null \
&& $(DOCKER) image inspect --format '{{.Size}}' kennel/$(1):$(2) | awk '{printf "  %-32s %5.0f MB\n", "kennel/$(1):$(2)", $$1/1e6}'
endef
