# `make help` lists what can be done. Everything is installed into .venv and nowhere else.
#   PYTHON            the Python that .venv is made of:          PYTHON=python3.12 make quickstart
#   PIP_ARGS          more arguments for every pip install:      make quickstart PIP_ARGS="--proxy ..."
#   DEMO_ARGS         arguments of the demo:                     make quickstart DEMO_ARGS=--text
#   TEST_ARGS         arguments for pytest:                      make test TEST_ARGS="-x tests/test_project.py"
#   NOTEBOOK_WORKERS  processes that test at once (2):           make test NOTEBOOK_WORKERS=1
#   FAMILY_WORKERS    processes that check families (2):         make families FAMILY_WORKERS=4
#   GPU_ARGS          arguments of the run on an accelerator:    make gpu GPU_ARGS="--budget 200"
#   NBS               notebooks or folders to execute:           make notebooks NBS=nbs/00_lm.ipynb
#   SCALE             of the studies, laptop or real (hours):    make studies SCALE=real
PYTHON ?= python3
NBS ?= nbs
SCALE ?= laptop
NOTEBOOK_WORKERS ?= 2
export NOTEBOOK_WORKERS

BIN := .venv/bin
# Python compiles a module when it is first imported; pip would compile all of them, and most are never imported.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# An installation is done again when one of these changes; otherwise its stamp says that it is there.
SOURCES := settings.ini setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test coverage lint export notebooks tidy shape families docs readme studies bench gpu wheel constraints

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/installed: $(SOURCES)
	@test -x $(BIN)/pip || { $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")' \
		&& $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv (the first time takes a minute or more: PyTorch is large) ..."
	$(INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing what tests and notebooks need into .venv ..."
	$(INSTALL) --editable '.[dev,widgets,eval]'
	@touch $@

.venv/installed-docs: .venv/installed-dev
	@echo "Installing what the site is built with into .venv ..."
	$(INSTALL) --editable '.[docs]'
	@touch $@

.venv/installed-bench: .venv/installed-dev
	@echo "Installing the libraries that the benchmarks compare with into .venv ..."
	$(INSTALL) --no-deps steerex==0.1.0
	@touch $@

quickstart: .venv/installed ## Install, fetch the embedded model and run the demo
	$(BIN)/oneshot-steering demo $(DEMO_ARGS)

test: .venv/installed-docs ## Run every check: exports, notebooks, README, style, tests, the wheel
	@$(BIN)/python -m pytest $(TEST_ARGS)

coverage: .venv/installed-docs ## Run every check, and show which lines of the package none of them ran
	@$(BIN)/python -m pytest --cov --cov-report=term-missing $(TEST_ARGS)

lint: .venv/installed-dev ## Check style
	$(BIN)/ruff check .

export: .venv/installed-dev ## Make the package from the notebooks
	$(BIN)/nbdev_export

notebooks: ## Execute notebooks in place, slow cells too (all, or NBS=...), and clean them
studies: ## Execute the studies at laptop scale (or real: SCALE=real), then print what each claims, the paper reports and we measure
studies: NBS = $(if $(filter real,$(SCALE)),nbs/studies/real,nbs/studies)
bench: ## Execute the benchmarks
bench: NBS = nbs/benchmarks
bench: .venv/installed-bench
notebooks studies bench: .venv/installed-dev
	$(BIN)/python tools/notebooks.py execute $(NBS)
	$(if $(filter studies,$@),$(BIN)/python tools/notebooks.py claims $(SCALE))

tidy: .venv/installed-dev ## Save the outputs that notebooks have in the form in which they are kept: tables once, small pictures
	$(BIN)/python tools/notebooks.py tidy $(NBS)

shape: .venv/installed-dev ## Measure the notebooks and modules: lengths of cells, first results, imports
	$(BIN)/python tools/shape.py

families: .venv/installed-dev ## Check every family of models that transformers knows, and write nbs/supported_models.md (minutes; goes on where it was)
	$(BIN)/python tools/families.py

gpu: .venv/installed-dev ## Check the library on an accelerator and measure it there, and write nbs/benchmarks/gpu_<card>.md (under 8 minutes)
	@$(BIN)/python tools/gpu.py $(GPU_ARGS)

docs: .venv/installed-docs ## Build the site into _docs/ (look at it: python -m http.server -d _docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: .venv/installed-dev ## Make README.md from nbs/index.ipynb
	$(BIN)/python tools/notebooks.py readme

wheel: .venv/installed-dev ## Build wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation

constraints: .venv/installed ## Resolve constraints.txt anew for Python 3.10 and later (UPGRADE="-P torch" moves a pin)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile setup.py --extra dev --extra widgets --extra docs --extra eval --universal --python-version 3.10 --no-annotate \
		--refresh-package oneshot-steering --custom-compile-command "make constraints" --quiet --output-file constraints.txt $(UPGRADE)
