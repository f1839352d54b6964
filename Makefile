# `make test` and `make demo` do all of their own set-up, into .venv and target.
PYTHON ?= python3.11
PY := .venv/bin/python
# Where the shared library that cargo builds has another suffix, as on macOS.
NATIVE := $(if $(filter Darwin,$(shell uname)),dylib,so)
RUST_SOURCES := $(shell find src bindings benches tests/rust -name '*.rs') Cargo.toml \
	bindings/python/Cargo.toml Cargo.lock

.PHONY: help setup test test-full lint demo demo-report bench requirements clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready python/vmix/_native.abi3.so ## the environment and the native module

.venv/ready: requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python $(PY) -r requirements-dev.txt
	echo "$(CURDIR)/python" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vmix.pth"
	touch $@

# Tests and module are built in one go, so that every dependency is compiled once.
python/vmix/_native.abi3.so: $(RUST_SOURCES)
	cargo build --locked --workspace --all-targets
	# Renamed into place: a module that a running process has mapped must not change.
	cp target/debug/lib_native.$(NATIVE) $@.new && mv $@.new $@

test: setup ## the tests; under 15 minutes on two cores, set-up included
	cargo test --locked --workspace
	$(PY) -m pytest

test-full: setup ## also the slow tests, and the wheel in an empty environment
	cargo test --locked --workspace
	$(PY) -m pytest -m ''
	tests/wheel.sh

lint: setup ## formatters, clippy, ruff, mypy and the stubs of the native module
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m mypy.stubtest vmix._native

demo: setup ## out/demo/grid.png and a table: prompts with and without VMix
	$(PY) examples/demo/demo.py

demo-report: setup ## measures everything that docs/demo/README.md states, and writes it
	$(PY) examples/demo/report.py

bench: .venv/ready ## ratios to vanilla diffusers and to safetensors + torch
	cargo build --locked --release --workspace
	cp target/release/lib_native.$(NATIVE) python/vmix/_native.abi3.so.new
	mv python/vmix/_native.abi3.so.new python/vmix/_native.abi3.so
	$(PY) benches/bench_values.py
	$(PY) benches/bench_diffusers.py

requirements: .venv/ready ## pins the newest versions of everything in requirements-dev.txt
	.venv/bin/uv pip compile --quiet --universal --upgrade --extra dev --python-version 3.11 \
		--no-emit-package vmix-adapter pyproject.toml -o requirements-dev.txt

clean:
	rm -rf target .venv out python/vmix/_native.abi3.so
