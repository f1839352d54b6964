#!/usr/bin/env bash
# Builds fuzz targets and tests, and prints the folder where they are. In its folder `deps` the same
# build leaves libvmix.so.1 and libvmix.a with the sanitizer, for C programs that are built with
# -fsanitize=address.
set -euo pipefail
cd "$(dirname "$0")"

./cargo.sh build --all-targets >&2
folder=$PWD/target/$(rustc -vV | sed -n 's/^host: //p')/release
# The name that programs look for.
ln -sf libvmix.so "$folder/deps/libvmix.so.1"
echo "$folder"
