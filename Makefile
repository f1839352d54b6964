# `make test` and `make demo` do all of their own set-up, into .venv and target.
PYTHON ?= python3.11
PY := .venv/bin/python
# Where the shared library that cargo builds has another suffix, as on macOS.
NATIVE := $(if $(filter Darwin,$(shell uname)),dylib,so)
RUST_SOURCES := $(shell find src bindings benches tests/rust examples/rust -name '*.rs') build.rs \
	Cargo.toml bindings/python/Cargo.toml Cargo.lock
TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
PREFIX ?= /usr/local
# Where the C library is built as it is installed.
CAPI := target/capi/release
# How long each fuzz target runs.
FUZZ_SECONDS ?= 120

# A ComfyUI to test the nodes in, and an environment of its own for it.
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
COMFY_VENV ?= target/comfy-venv/$(notdir $(COMFYUI_PATH))
COMFY_PY := $(COMFY_VENV)/bin/python

.PHONY: help setup test test-kernels test-c test-full test-extras test-comfy fuzz lint demo demo-report \
	release-native bench bench-c bench-attention bench-comfy bench-train headers wheel install requirements clean \
	test-arm test-miri

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

test: setup ## all tests but the slow ones
	cargo test --locked --workspace
	$(MAKE) test-kernels
	$(PY) -m pytest -n 2 --dist loadfile
	$(MAKE) test-c

# Every test of attention with each kernel as the one that is chosen.
test-kernels:
	for kernel in plain portable $$(grep -ow -m1 avx2 /proc/cpuinfo) $$(grep -ow -m1 avx512f /proc/cpuinfo | sed s/f//); do \
		echo "kernel: $$kernel"; \
		VMIX_KERNEL=$$kernel cargo test --locked --workspace --test integration attention -q || exit 1; \
	done

test-c: setup fuzz/target/ready target/tsan/ready ## the C library: headers, hosts, sanitizers, fuzzing
	cargo test --locked --workspace --features vmix-adapter/headers --test headers
	$(PY) -m pytest -rs tests/c
	fuzz/cargo.sh test --test attention --test values
	fuzz/run.sh 15

# What CI has no time for: NEON in an emulator, and the portable kernel under Miri.
ARM := aarch64-unknown-linux-gnu
test-arm: ## attention on AArch64; needs qemu-user, g++-aarch64-linux-gnu and libc6-dev-arm64-cross
	rustup target add $(ARM)
	cd fuzz && CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		cargo test --locked --release --target $(ARM) --target-dir ../target/arm --test attention

# Stacked Borrows, Miri's other rules, do not hold in crossbeam, which rayon uses. The other tests would
# take hours.
test-miri: ## some of attention and mixing under Miri; needs a nightly Rust
	rustup +nightly component add miri rust-src
	cd fuzz && PROPTEST_CASES=2 MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows" \
		cargo +nightly miri test --locked --target-dir ../target/miri --test attention -- \
		forward_is_the_papers masks_that_hide mixed_values

test-full: test-c ## also the slow tests, and the wheel in an empty environment
	cargo test --locked --workspace
	$(PY) -m pytest -m '' tests/python tests/c tests/comfy
	tests/wheel.sh

test-extras: setup ## DeepSpeed and bitsandbytes, which are no requirements, in an environment of their own
	.venv/bin/uv venv --quiet --allow-existing --python $(PYTHON) target/extras
	.venv/bin/uv pip install --quiet --python target/extras/bin/python -r requirements-dev.txt deepspeed bitsandbytes ninja
	PATH="$(CURDIR)/target/extras/bin:$$PATH" PYTHONPATH=python python -m pytest tests/extras

wheel: ## dist/vmix_adapter-*.whl, for pip install
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# The newest wheel, as `pip install` would have it beside ComfyUI's own requirements.
$(COMFY_VENV)/ready: $(RUST_SOURCES) $(wildcard python/vmix/*.py) .venv/ready
	@test -e "$(COMFYUI_PATH)/comfy/sd.py" || \
		{ echo "no ComfyUI at $(COMFYUI_PATH): set COMFYUI_PATH"; exit 1; }
	$(MAKE) wheel
	.venv/bin/uv venv --quiet --allow-existing --python $(PYTHON) $(COMFY_VENV)
	if [ -e "$(COMFYUI_PATH)/requirements.txt" ]; \
	then .venv/bin/uv pip install --quiet --python $(COMFY_PY) -r "$(COMFYUI_PATH)/requirements.txt"; \
	else .venv/bin/uv pip install --quiet --python $(COMFY_PY) "$(COMFYUI_PATH)"; fi
	# torchaudio's newest wheel does not fit torch's; ComfyUI does without it.
	.venv/bin/uv pip uninstall --quiet --python $(COMFY_PY) torchaudio
	.venv/bin/uv pip install --quiet --python $(COMFY_PY) accelerate diffusers peft playwright pytest requests
	.venv/bin/uv pip install --quiet --python $(COMFY_PY) --reinstall --no-deps dist/*.whl
	touch $@

test-comfy: $(COMFY_VENV)/ready ## the nodes in the real ComfyUI of COMFYUI_PATH: numbers, server, browser
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFY_PY) -m pytest -rs -m '' tests/comfy

# The library with AddressSanitizer and coverage, and the fuzz targets.
fuzz/target/ready: $(RUST_SOURCES) $(wildcard fuzz/*/*.rs) $(wildcard tests/rust/*.rs) fuzz/Cargo.toml fuzz/Cargo.lock
	fuzz/build.sh
	touch $@

# The library with ThreadSanitizer. The standard library comes without: see tests/c/tsan.supp.
target/tsan/ready: $(RUST_SOURCES)
	RUSTC_BOOTSTRAP=1 CARGO_PROFILE_DEV_OPT_LEVEL=1 \
		RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer" \
		cargo build --locked --lib --target $(TARGET) --target-dir target/tsan
	touch $@

fuzz: fuzz/target/ready ## FUZZ_SECONDS of arbitrary files, and of arbitrary sequences of C calls
	fuzz/run.sh $(FUZZ_SECONDS)

lint: setup ## formatters, clippy, ruff, mypy and the stubs of the native module
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m mypy.stubtest vmix._native

demo: setup ## out/demo/grid.png and a table: prompts with and without VMix
	$(PY) examples/demo/demo.py

demo-report: setup ## measures anew what docs/demo/README.md tabulates, and writes it
	$(PY) examples/demo/report.py

# The native module as wheels have it, in the place of the one for tests.
release-native: .venv/ready
	cargo build --locked --release --workspace
	cp target/release/lib_native.$(NATIVE) python/vmix/_native.abi3.so.new
	mv python/vmix/_native.abi3.so.new python/vmix/_native.abi3.so

bench: release-native ## ratios to vanilla diffusers, to safetensors + torch, and to transformers
	$(PY) benches/bench_values.py
	$(PY) benches/bench_diffusers.py
	$(PY) benches/bench_encoder.py

bench-train: setup ## step time and memory of the trainer, as ratios to a LoRA's
	$(PY) benches/bench_train.py

bench-attention: release-native ## value-mixed attention, as ratios to torch's
	$(PY) benches/bench_attention.py

bench-comfy: $(COMFY_VENV)/ready ## ratios to a vanilla ComfyUI, of COMFYUI_PATH
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFY_PY) benches/bench_comfy.py

bench-c: $(CAPI)/libvmix.a ## nanoseconds per call of the C library, and mixing against memcpy
	gcc -O2 -std=c11 -Iinclude benches/bench_c.c $< -lpthread -ldl -lm -o $(CAPI)/bench_c
	$(CAPI)/bench_c comfy_nodes/demo/adapter.safetensors

headers: setup ## include/vmix.h and vmix_types.h from src/ffi
	VMIX_WRITE_HEADERS=1 cargo test --locked --workspace --features vmix-adapter/headers --test headers

# By crate types of its own: with the rlib among them there is no link-time optimisation. In a folder
# of its own: a release build for Python leaves a library without it.
$(CAPI)/libvmix.a: $(RUST_SOURCES)
	cargo rustc --locked --release --lib --crate-type cdylib --crate-type staticlib \
		--target-dir target/capi
	touch $@

install: $(CAPI)/libvmix.a ## the C library, headers, vmix.pc and CMake package, into PREFIX
	PREFIX="$(PREFIX)" PROFILE="$(CAPI)" packaging/install.sh

requirements: .venv/ready ## pins the newest versions of everything in requirements-dev.txt
	.venv/bin/uv pip compile --quiet --universal --upgrade --extra dev --python-version 3.11 \
		--no-emit-package vmix-adapter pyproject.toml -o requirements-dev.txt

clean:
	rm -rf target fuzz/target .venv out dist python/vmix/_native.abi3.so
