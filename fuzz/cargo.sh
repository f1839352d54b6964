#!/usr/bin/env bash
# fuzz/cargo.sh COMMAND ...: cargo with AddressSanitizer and coverage, on stable Rust and without
# cargo-fuzz.
set -euo pipefail
cd "$(dirname "$0")"

host=$(rustc -vV | sed -n 's/^host: //p')
# Sanitizers are unstable; all else is what the stable compiler has. With --target the flags stay
# away from build scripts and procedural macros.
RUSTC_BOOTSTRAP=1 RUSTC_WRAPPER="$PWD/rustc.sh" RUSTFLAGS="--cfg fuzzing -Zsanitizer=address" \
    cargo "$1" --locked --release --target-dir target --target "$host" "${@:2}"
