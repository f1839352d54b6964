# `make test` and `make demo` do all of their own set-up, into .venv and target.
PYTHON ?= python3.11
PY := .venv/bin/python
UV := .venv/bin/uv pip install --quiet --python $(PY)
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

# With it set, every test process would compile the sources of torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup test test-rust test-python test-c test-full test-kernels test-asan test-tsan test-slow \
	test-wheel test-oldest test-extras test-comfy test-arm test-miri fuzz lint demo demo-report release-native \
	bench bench-c bench-attention bench-comfy bench-fit bench-train headers wheel install requirements clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# The demo's packages install while the module compiles.
setup: ## the native module, and the Python packages that the demo needs
	@(while sleep 50 >/dev/null 2>&1; do echo "setup: $$(du -sm .venv 2>/dev/null | cut -f1) MB of packages," \
		"$$(ls target/debug/deps/*.d 2>/dev/null | wc -l) of some 200 crates so far"; done) & \
		trap "kill $$!" EXIT; \
		$(MAKE) --no-print-directory -j2 .venv/ready python/vmix/_native.abi3.so

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check uv

# With the versions that tests use. `train` brings the figures' and pictures' packages along.
.venv/ready: requirements-dev.txt pyproject.toml | .venv/bin/uv
	@echo "setup: installing torch and diffusers into .venv, 6 GB"
	$(UV) -r pyproject.toml --extra train --constraints requirements-dev.txt
	echo "$(CURDIR)/python" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vmix.pth"
	@echo "setup: the Python packages are installed"
	@touch $@

python/vmix/_native.abi3.so: $(RUST_SOURCES)
	@echo "setup: compiling the native module"
	cargo build --locked -p vmix-python
	# Renamed into place: a module that a running process has mapped must not change.
	cp target/debug/lib_native.$(NATIVE) $@.new && mv $@.new $@
	@echo "setup: the native module is compiled"

# What tests and linters need beyond the demo.
.venv/dev: requirements-dev.txt pyproject.toml | setup
	@echo "setup: installing the packages of tests and linters into .venv"
	$(UV) -r requirements-dev.txt
	@touch $@

test: .venv/dev test-rust test-python test-c ## what tells that a change is right: Rust, Python, C (docs/testing.md)

# Unit, property and documentation tests, the headers' among them; and libvmix, for the C hosts.
CARGO_TESTS := --locked --workspace --features vmix-adapter/headers
test-rust: ## unit, property and documentation tests of the crate
	cargo build $(CARGO_TESTS) --all-targets
	cargo test $(CARGO_TESTS)

test-python: .venv/dev ## the Python suite
	$(PY) -m pytest -n 2 --dist loadfile

test-c: .venv/dev test-rust ## the C library's hosts, its headers, its installation
	$(PY) -m pytest -n 2 -rs tests/c

# What needs compilers of its own, and is in no tier: NEON in an emulator, the portable kernel under Miri.
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

# The tiers, and what each of these proves: docs/testing.md.
test-full: test test-kernels test-asan test-tsan test-slow test-wheel test-oldest ## all that this machine can prove

# Every test of attention with each kernel as the one that is chosen.
test-kernels: ## attention with each kernel that this processor has
	for kernel in plain portable $$(grep -ow -m1 avx2 /proc/cpuinfo) $$(grep -ow -m1 avx512f /proc/cpuinfo | sed s/f//); do \
		echo "kernel: $$kernel"; \
		VMIX_KERNEL=$$kernel cargo test $(CARGO_TESTS) --test integration attention -q || exit 1; \
	done

test-asan: fuzz/target/ready .venv/dev ## AddressSanitizer: C hosts, attention, V_a, 15 s of fuzzing
	$(PY) -m pytest -m full -k address_sanitizer -rs tests/c
	fuzz/cargo.sh test --test attention --test values
	fuzz/run.sh 15

test-tsan: target/tsan/ready .venv/dev ## ThreadSanitizer: eight threads on one adapter
	$(PY) -m pytest -m full -k thread_sanitizer -rs tests/c

# The trainer's killed and distributed runs, and shapes of full size.
test-slow: .venv/dev ## tests marked `full`: killed and distributed training, full-size shapes
	$(PY) -m pytest -m full -k 'not sanitizer' -n 2 --dist loadfile -rs tests/python tests/comfy tests/c

test-wheel: .venv/dev ## the wheel in an empty environment of each Python from 3.10 to 3.13 that is installed
	tests/wheel.sh

# The Python suite with the oldest versions that pyproject.toml allows.
test-oldest: .venv/dev ## the Python suite with the oldest packages that pyproject.toml allows
	.venv/bin/uv venv --quiet --allow-existing --python $(PYTHON) target/oldest
	.venv/bin/uv pip install --quiet --python target/oldest/bin/python -r pyproject.toml --extra dev \
		--constraints tests/oldest.txt
	PYTHONPATH="$(CURDIR)/python" target/oldest/bin/python -m pytest -n 2 --dist loadfile tests/python

test-extras: .venv/dev ## DeepSpeed and bitsandbytes, which are no requirements, in an environment of their own
	.venv/bin/uv venv --quiet --allow-existing --python $(PYTHON) target/extras
	.venv/bin/uv pip install --quiet --python target/extras/bin/python -r requirements-dev.txt deepspeed bitsandbytes ninja
	PATH="$(CURDIR)/target/extras/bin:$$PATH" PYTHONPATH="$(CURDIR)/python" python -m pytest tests/extras

wheel: ## dist/vmix_adapter-*.whl, for pip install
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# The newest wheel, as `pip install` would have it beside ComfyUI's own requirements.
$(COMFY_VENV)/ready: $(RUST_SOURCES) $(wildcard python/vmix/*.py) | .venv/dev
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

lint: .venv/dev ## formatters, clippy, ruff, mypy and the stubs of the native module
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m mypy.stubtest vmix._native

demo: setup ## fits a label; out/demo/grid.png and a table: prompts with and without VMix
	$(PY) examples/demo/demo.py

demo-report: .venv/dev ## measures anew what docs/demo/README.md tabulates, and writes it
	$(PY) examples/demo/report.py

# The native module as wheels have it, in the place of the one for tests.
release-native: .venv/dev
	cargo build --locked --release --workspace
	cp target/release/lib_native.$(NATIVE) python/vmix/_native.abi3.so.new
	mv python/vmix/_native.abi3.so.new python/vmix/_native.abi3.so

bench: release-native ## ratios to vanilla diffusers, to safetensors + torch, and to transformers
	$(PY) benches/bench_values.py
	$(PY) benches/bench_diffusers.py
	$(PY) benches/bench_encoder.py

bench-train: .venv/dev ## step time and memory of the trainer, as ratios to a LoRA's
	$(PY) benches/bench_train.py

bench-fit: .venv/dev ## a U-Net pass with a fit riding along, as ratios to the pass alone
	$(PY) benches/bench_fit.py --base sd15
	$(PY) benches/bench_fit.py --base sdxl --size 512

bench-attention: release-native ## value-mixed attention, as ratios to torch's
	$(PY) benches/bench_attention.py

bench-comfy: $(COMFY_VENV)/ready ## ratios to a vanilla ComfyUI, of COMFYUI_PATH
	COMFYUI_PATH="$(COMFYUI_PATH)" $(COMFY_PY) benches/bench_comfy.py

bench-c: $(CAPI)/libvmix.a ## nanoseconds per call of the C library, and mixing against memcpy
	gcc -O2 -std=c11 -Iinclude benches/bench_c.c $< -lpthread -ldl -lm -o $(CAPI)/bench_c
	$(CAPI)/bench_c comfy_nodes/demo/adapter.safetensors

headers: ## include/vmix.h and vmix_types.h from src/ffi
	VMIX_WRITE_HEADERS=1 cargo test $(CARGO_TESTS) --test headers

# By crate types of its own: with the rlib among them there is no link-time optimisation. In a folder
# of its own: a release build for Python leaves a library without it.
$(CAPI)/libvmix.a: $(RUST_SOURCES)
	cargo rustc --locked --release --lib --crate-type cdylib --crate-type staticlib \
		--target-dir target/capi
	touch $@

install: $(CAPI)/libvmix.a ## the C library, headers, vmix.pc and CMake package, into PREFIX
	PREFIX="$(PREFIX)" PROFILE="$(CAPI)" packaging/install.sh

requirements: .venv/bin/uv ## pins the newest versions of everything in requirements-dev.txt
	.venv/bin/uv pip compile --quiet --universal --upgrade --extra dev --python-version 3.11 \
		--no-emit-package vmix-adapter pyproject.toml -o requirements-dev.txt

clean:
	rm -rf target fuzz/target .venv out dist python/vmix/_native.abi3.so
