#!/usr/bin/env bash
# Builds the fuzz targets with AddressSanitizer and coverage on stable Rust, without cargo-fuzz, and
# prints the folder where they are. In its folder `deps` the same build leaves libvmix.so.1 and
# libvmix.a with the sanitizer, for C programs that are built with -fsanitize=address.
set -euo pipefail
cd "$(dirname "$0")"

host=$(rustc -vV | sed -n 's/^host: //p')
# Sanitizers are unstable; all else is what the stable compiler has. With --target the flags stay
# away from build scripts and procedural macros.
RUSTC_BOOTSTRAP=1 RUSTC_WRAPPER="$PWD/rustc.sh" RUSTFLAGS="--cfg fuzzing -Zsanitizer=address" \
    cargo build --locked --release --target-dir target --target "$host" "$@" >&2
folder=$PWD/target/$host/release
# The name that programs look for.
ln -sf libvmix.so "$folder/deps/libvmix.so.1"
echo "$folder"
