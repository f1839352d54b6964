#!/usr/bin/env bash
# What cargo calls as the compiler. Coverage is counted, and comparisons are traced, in the crates
# that read what a fuzzer makes: in the loops of candle and gemm both would take nearly all the time.
set -euo pipefail
flags=()
case ${CARGO_PKG_NAME:-} in
    vmix-adapter | vmix-fuzz | safetensors | serde_json)
        # Not build scripts, which are built without the sanitizer.
        if [[ " $* " == *" -Zsanitizer=address "* ]]; then
            flags=(
                # As cargo-fuzz.
                -Cpasses=sancov-module
                -Cllvm-args=-sanitizer-coverage-level=4
                -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
                -Cllvm-args=-sanitizer-coverage-pc-table
                -Cllvm-args=-sanitizer-coverage-trace-compares
            )
        fi
        ;;
esac
exec "$@" "${flags[@]}"
