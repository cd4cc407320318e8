# `make demo` and `make test` do all the set-up of a fresh machine; nothing of it is done twice.

PYTHON ?= python3
VENV ?= .venv
DATA ?=
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-cluster test-gpu-build check bench clean

# Every command below is found in the environment first, ninja included.
ENVIRONMENT := $(abspath $(VENV))
export PATH := $(ENVIRONMENT)/bin:$(PATH)

# Without a GPU: two ranks on the CPU, one thread each. With GPUs: a rank on each (not run on a GPU so far).
GPUS := $(words $(wildcard /dev/nvidia[0-9] /dev/nvidia[0-9][0-9]))
ifeq ($(GPUS),0)
RANKS ?= 2
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
else
RANKS ?= $(GPUS)
endif

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "VENV=$(VENV)  the environment to use or create, such as VENV=\$$VIRTUAL_ENV or VENV=\$$CONDA_PREFIX"
	@echo "PYTHON=$(PYTHON)  what a new environment is created with, 3.11 or newer"

# --- set-up: each stamp is named by the content it was made from, so a change makes it anew, and only a change ---

digest = $(shell { echo "$(CURDIR) $(2)"; cat $(1); } | sha256sum | cut -c -16)
STAMPS := $(ENVIRONMENT)/.setup
PACKAGES := $(STAMPS)/packages-$(call digest,setup.cfg setup.py pyproject.toml)
KERNEL := $(STAMPS)/kernel-$(call digest,setup.py $(sort $(wildcard trainer/data/csrc/*)))
EXTENSION := $(STAMPS)/extension-$(call digest,setup.cfg,$(TORCH_EXTENSIONS_DIR))

setup: $(PACKAGES) $(KERNEL) $(EXTENSION) ## system packages, environment, compiled parts; `make demo` and `make test` do it

$(PACKAGES):
	@scripts/system_packages.sh "$(PYTHON)"
	@scripts/environment.sh "$(ENVIRONMENT)" "$(PYTHON)"
	@mkdir -p $(STAMPS); rm -f $(STAMPS)/packages-* $(STAMPS)/kernel-*; touch $@ $(KERNEL)

# Installing the packages has compiled the kernel too; this is for a change of the C sources alone, and needs no network.
$(KERNEL): | $(PACKAGES)
	@test -e $@ || { echo "view kernel: compiling"; python setup.py --quiet build_ext --inplace --force; rm -f $(STAMPS)/kernel-*; touch $@; }

$(EXTENSION): $(PACKAGES) | $(KERNEL)
	@python -m trainer.doctor --build
	@rm -f $(STAMPS)/extension-*; touch $@

# --- what to do with it ---

NAME := $(if $(DATA),$(notdir $(DATA:/=)),synthetic)
FOLDER := demo/$(NAME)
IMAGES := $(or $(DATA:/=),$(FOLDER)/images)
RUN ?= $(FOLDER)/run
PORT = $$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
LAUNCH = python -m trainer.launch --num_gpus $(RANKS) --master_port $(PORT) --module trainer

demo: setup ## pre-train and evaluate on generated images, or DATA=folder with train/ and val/; RUN=where to
	@test -z "$(DATA)" || test -d "$(IMAGES)/train" -a -d "$(IMAGES)/val" || \
		{ echo "DATA=$(DATA): wanted a folder with train/ and val/, each with a folder a class" >&2; exit 2; }
	@echo "== Data: $(IMAGES)"
	$(if $(DATA),,python -m data_prep synth $(IMAGES))
	python -m data_prep convert $(IMAGES) $(FOLDER)/train.beton --split train
	python -m data_prep convert $(IMAGES) $(FOLDER)/val.beton --split val
	@echo "== Pre-training without labels: $(RUN)"
	$(LAUNCH) pretrain recipes/smoke/moco_demo.yaml \
		data.train=$(FOLDER)/train.beton data.val=$(FOLDER)/val.beton run.dir=$(RUN)
	@echo "== What the network has learnt"
	$(LAUNCH) evaluate $(RUN) --protocol knn

# So many files of tests at a time; a file's tests stay together, since they share what they trained.
WORKERS ?= 2

test: setup check ## the checks, then every test; ARGS='-k word' for some, WORKERS=0 for one after the other
	@echo "== Tests"
	python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-cluster: setup ## two hosts on this machine, over ssh and without; as root, it installs openssh-server and pdsh
	@scripts/cluster_packages.sh
	python -m pytest tests/cluster $(ARGS)

test-gpu-build: setup ## compile DeepSpeed's FusedAdam kernel for the GPU, with the nvcc on PATH; needs no GPU
	python -m pytest -m gpu_build tests/test_gpu_build.py $(ARGS)

check: setup ## lint, format, types, import contracts
	@echo "== Checks"
	ruff check .
	ruff format --check .
	mypy
	lint-imports

bench: setup ## the benchmarks, the loader's on DATA=folder of JPEGs (or generated ones); each prints one JSON line a case
	$(if $(DATA),,python -m data_prep synth $(IMAGES))
	python -m benchmarks.loader $(IMAGES)
	python -m benchmarks.converter $(IMAGES)
	python -m benchmarks.step

clean: ## remove caches and build leftovers; the environment, demo/ and runs/ stay
	rm -rf build *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
