# Commands for a fresh clone: make demo, make test, make lab. Each makes .venv if need be.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.11
LOCK := requirements.lock
# One stamp per lock file: a changed lock installs again, an unchanged one starts at once and offline.
STAMP = $(VENV)/.installed-$(shell cksum < $(LOCK) | cut -d' ' -f1)

# Every command compiles its modules once, as on anybody's machine.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lab lab-runs lab-rest lint types layers unit docs install with-uv with-pip lock wheel clean

demo: install
	@$(BIN)/kdpipe demo

test: lint types layers unit

# The runner runs on whatever Python from 3.9 on a device has.
lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/vermin --quiet --no-tips --target=3.9- --violations runtime

# The link gives the package its name, whatever this folder is called.
types: install
	@mkdir -p .types && ln -sfn .. .types/kdpipe
	$(BIN)/mypy
	cd benchmarks && ../$(BIN)/mypy --config-file ../pyproject.toml --explicit-package-bases .

layers: install
	$(BIN)/lint-imports --no-cache

# What trains runs in processes of its own, as far as it can from the converters' and runtimes' native libraries; what
# both of them train is made once. Two files side by side, since much of it waits, for processes and devices, and
# threads that wait leave their core to the other file. The longest of those that train go first.
MADE_ONCE = made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && \
  export KDPIPE_TEST_ARTIFACTS="$${KDPIPE_TEST_ARTIFACTS:-$$made/artifacts}"
TWO := --numprocesses=2 --dist=loadfile
SHARING := OMP_WAIT_POLICY=PASSIVE
TRAIN := $(patsubst %,tests/test_%.py,training together methods ranks resume segmenters losses families pixels cache data unlabeled pruning cifar_networks trackers)
unit: install
ifdef TESTS
	$(BIN)/pytest -m "not lab" $(TESTS)
else
	@$(MADE_ONCE) && \
	  $(SHARING) $(BIN)/pytest -m "not lab" $(TWO) --no-loadscope-reorder $(TRAIN) && \
	  $(SHARING) $(BIN)/pytest -m "not lab" $(TWO) $(addprefix --ignore=,$(TRAIN))
endif

# What needs packages of the system, and what takes minutes: fuzzing, devices, the demo. The demo trains on every core,
# so it goes alone; then two lanes side by side, since much of them waits: whole runs of small recipes, and the rest. What
# both of them want made is made once.
DEMO := tests/test_lab_demo.py
RUNS := $(patsubst %,tests/test_lab_%.py,ci masks methods page pick pipeline scale start study)
lab: install
ifdef TESTS
	$(BIN)/pytest -m lab $(TESTS)
else
	$(BIN)/pytest -m lab $(DEMO)
	@$(MADE_ONCE) && \
	  $(MAKE) --no-print-directory --jobs=2 --output-sync=line lab-runs lab-rest
endif

lab-runs:
	$(SHARING) $(BIN)/pytest -m lab $(RUNS)

lab-rest:
	$(SHARING) $(BIN)/pytest -m lab $(addprefix --ignore=,$(DEMO) $(RUNS))

install: $(STAMP)

$(STAMP): $(LOCK)
	@command -v uv >/dev/null && $(MAKE) --no-print-directory with-uv || \
	  { command -v uv >/dev/null && exit 1 || $(MAKE) --no-print-directory with-pip; }
	@rm -f $(VENV)/.installed-* && touch $@

# No configuration: what bounds the choice of versions is in the lock already, and uv takes no bounds beside hashes.
with-uv:
	uv venv --quiet --allow-existing --python 3.11 $(VENV)
	VIRTUAL_ENV=$(VENV) uv pip install --no-config --quiet --require-hashes -r $(LOCK)
	VIRTUAL_ENV=$(VENV) uv pip install --no-config --quiet --no-deps --no-build-isolation --editable .

with-pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .

# sigstore asks for pydantic[email]. pip looks at that before it meets the pin of pydantic, and then wants one with the extra.
define PIN_WITH_EXTRA
import re, sys
text = open(sys.argv[1]).read()
pin = re.search(r'^pydantic==(?:.*\\\n)*.*\n', text, re.M)[0]
open(sys.argv[1], 'w').write(text.replace(pin, pin + pin.replace('pydantic==', 'pydantic[email]==', 1)))
endef
export PIN_WITH_EXTRA

# Needs uv. Names versions and hashes, no index.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --all-extras --group dev pyproject.toml --output-file $(LOCK) --custom-compile-command "make lock"
	$(PYTHON) -c "$$PIN_WITH_EXTRA" $(LOCK)

docs: install
	$(BIN)/python docs/generate.py

wheel: install
	$(BIN)/python -m build --wheel --no-isolation --outdir $(VENV)/wheels .

clean:
	rm -rf .types .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
