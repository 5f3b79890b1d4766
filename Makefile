# `make demo` and `make test` need nothing but Python 3.11 or newer: everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= digits
ARGS ?=

RUN := $(VENV)/bin/python
PIP := PIP_REQUIRE_VIRTUALENV=1 $(RUN) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo lint test test-fast docs bench

help:
	@echo 'make demo    quantize the embedded model to 8 bits, draw images, score them (runs/ndtc_w8a8/...)'
	@echo '             MODEL=name chooses conf/model/name.yaml, ARGS="seed=1 bits=w4a8" overrides settings'
	@echo 'make lint    check style, imports and types (ruff, pyright), and the layering'
	@echo 'make test    run the tests, two files at a time; ARGS="-k metrics" chooses'
	@echo 'make test-fast    only those that run no whole experiment and start no interpreter: a minute and a half'
	@echo 'make docs    make the documentation as a site, in site/'
	@echo 'make bench   run the benchmarks'
	@echo 'PYTHON=python3.12 chooses the interpreter that .venv is made with; the first call installs about 6 GB.'

demo: $(VENV)/.installed
	@if $(RUN) -c 'import openvino' 2> /dev/null; then beside=runtime.compare=openvino; else beside=; fi; set -x; \
	    $(RUN) -m ptq_exp +experiment=ndtc_w8a8 model=$(MODEL) $$beside $(ARGS)
	@$(RUN) -c 'import openvino' 2> /dev/null || \
	    echo "The same model as integers on this CPU: $(VENV)/bin/pip install -e '.[openvino]' and make demo again"

lint: $(VENV)/.installed-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright --pythonpath $(RUN)
	$(RUN) -m pytest -q tests/test_layering.py

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m 'not slow and not large' $(ARGS)

docs: $(VENV)/.installed-docs
	$(RUN) docs/generate.py
	$(VENV)/bin/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	@set -e; for benchmark in benchmarks/*.py; do \
	    echo "== $$benchmark"; OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) $$benchmark; \
	done

# Stamps: install again only when the dependencies changed. A virtual environment that was cut off while it
# was made has no pip and is completed.
define make-venv
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d: set PYTHON to 3.11 or newer" % v[:2])'
	@$(RUN) -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2> /dev/null || $(PYTHON) -m venv $(VENV)
endef

$(VENV)/.installed: setup.cfg pyproject.toml
	$(make-venv)
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml
	$(make-venv)
	$(PIP) install --editable '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-lint: setup.cfg pyproject.toml
	$(make-venv)
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-docs: setup.cfg pyproject.toml
	$(make-venv)
	$(PIP) install --editable '.[docs]'
	@touch $(VENV)/.installed $@
