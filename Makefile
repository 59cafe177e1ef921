# `make` lists the targets. Everything runs in a virtual environment that the first target to need it sets up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# faiss for an NVIDIA GPU where there is one, for the CPU elsewhere: both install the module faiss, so never both.
FAISS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
READY := $(VENV)/.ready-$(FAISS)
DEMO := .demo
IMAGES ?= $(DEMO)/digits

.DEFAULT_GOAL := help
EXPERIMENTS := theory cifar10 svhn metrics k balance transfer calibration dynamic imagenet choice
SIZE ?= small

.PHONY: help venv demo test test-all test-oldest lint docs bench encoder reproduce $(EXPERIMENTS:%=reproduce-%) clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

venv: $(READY) ## Set up the virtual environment (.venv).

# One pip call: pip must choose torch and torchvision together. Its cache makes the next environment quick.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(FAISS),dev]'
	@touch $@

demo: $(READY) ## Embed, select and make a report, offline; IMAGES=folder for your own images.
	@test '$(IMAGES)' != '$(DEMO)/digits' || $(BIN)/python scripts/write_digits.py $(DEMO)/digits
	@mkdir -p $(DEMO)
	$(BIN)/protoprune embed '$(IMAGES)' --encoder mini -o $(DEMO)/features.h5
	$(BIN)/protoprune select $(DEMO)/features.h5 --keep 0.7 --manifest $(DEMO)/manifest.csv > $(DEMO)/kept.txt
	$(BIN)/protoprune sheet $(DEMO)/features.h5 -o $(DEMO)/sheet.png
	$(BIN)/protoprune report $(DEMO)/features.h5 -o $(DEMO)/report.html
	@echo
	@echo "Made in $(DEMO)/:"
	@echo "  features.h5   one vector an image, by the bundled encoder"
	@echo "  kept.txt      $$(wc -l < $(DEMO)/kept.txt) images to keep, a path a line, relative to $(IMAGES)"
	@echo "  manifest.csv  cluster, distance, rank and keep of every image"
	@echo "  sheet.png     the easiest and the hardest images side by side"
	@echo "  report.html   one page to look at before you train: open it in a browser, it needs no network"

test: $(READY) ## Run the tests (fast, offline).
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-all: $(READY) ## Run every test, slow and GPU ones included.
	$(BIN)/python -m pytest -m 'slow or not slow' --timeout 1800 --hypothesis-profile thorough

test-oldest: ## Run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest.
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip compile --quiet --no-deps --no-annotate --resolution lowest-direct pyproject.toml \
	    --extra cpu --extra tables --extra remote --extra ray --extra labels --no-emit-package torchvision \
	    --output-file .venv-oldest/oldest.txt
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --constraints .venv-oldest/oldest.txt \
	    --editable '.[cpu,dev]'
	.venv-oldest/bin/python -m pytest --numprocesses auto --dist loadfile

lint: $(READY) ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## Build the documentation as a site, build/site/index.html; a dead link fails.
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

bench: $(READY) ## Measure against what you would use instead; DATA=folder for your own photos.
	$(BIN)/python benchmarks/embed_speed.py $(if $(DATA),--images '$(DATA)')
	$(BIN)/python benchmarks/cluster_speed.py
	$(BIN)/python benchmarks/select_speed.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/sampler_speed.py

encoder: $(READY) ## Train the bundled encoder again: TINY=Tiny ImageNet folder, CIFAR=CIFAR-10 train folder.
	$(BIN)/python scripts/train_encoder.py configs/encoder_mini.toml --out results/encoder \
	    --data 'tiny-imagenet=$(TINY)' --data 'cifar10=$(CIFAR)'

reproduce: ## Run the papers' experiments, or one (reproduce-k); DATA=folder of data sets, SIZE=full on a GPU.
	@failed=; for name in $(EXPERIMENTS); do \
	    $(MAKE) --no-print-directory reproduce-$$name || failed="$$failed $$name"; done; \
	    test -z "$$failed" || { echo "did not finish:$$failed"; exit 1; }

$(EXPERIMENTS:%=reproduce-%): reproduce-%: $(READY)
	$(BIN)/python scripts/reproduce $* --size $(SIZE) --data '$(or $(DATA),.data)' \
	    $(if $(DATASET),--dataset '$(DATASET)')

clean: ## Remove what the other targets made, the environment included.
	rm -rf $(VENV) .venv-oldest $(DEMO) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
