# Every target creates or updates .venv by itself. Needs only Python 3.11+, pip and make; nothing outside this folder is changed,
# but for drawings kept in $DIPTYCH_CACHE (~/.cache/diptych).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
EXTRAS := curate,dev,demo,docs,hf,log,ocr,openclip,plot,pretrained,probe,ray,search
# Threads of torch spin only briefly for one another, as under the command line: a busy machine slows tests in proportion, not many times over.
export GOMP_SPINCOUNT ?= 1000
ANCHORS := $(patsubst benchmarks/anchors/%.txt,.bench/%/.done,$(wildcard benchmarks/anchors/*.txt))

.PHONY: demo test test-slow check docs bench mini clean

demo: $(VENV)/.demo
	$(RUN)/diptych demo --out runs/demo

test: $(VENV)/.dev
	$(RUN)/python -m pytest -q

test-slow: $(VENV)/.dev
	$(RUN)/python -m pytest -q -m slow

check: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/python -m pytest -q tests/test_layers.py tests/test_exports.py

# Pages in site/, and every example in them.
docs: $(VENV)/.dev
	$(RUN)/mkdocs build --strict --quiet
	$(RUN)/python -m pytest -q tests/test_docs.py -m "slow or not slow"

# About half an hour on two idle cores, after five for the environments of the other libraries.
bench: $(VENV)/.dev $(ANCHORS)
	$(RUN)/diptych bench
	@set -e; for program in $(wildcard benchmarks/*.py); do $(RUN)/python $$program; done

.bench/%/.done: benchmarks/anchors/%.txt benchmarks/anchors/environment.py $(VENV)/.dev
	@echo "Installing $* for comparison into .bench/$*"
	$(RUN)/python benchmarks/anchors/environment.py $*

# Remake the two models that are shipped inside the package.
mini: $(VENV)/.dev
	$(RUN)/python -m diptych.shipped

clean:
	rm -rf $(VENV) .bench runs site build dist .mypy_cache .ruff_cache src/*.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diptych needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing diptych for the demo into $(VENV) (about two minutes, PyTorch is large)"
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing diptych for development into $(VENV) (about three minutes, PyTorch is large)"
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@
