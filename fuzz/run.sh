#!/usr/bin/env bash
# fuzz/run.sh SECONDS: runs each target for so long, from the committed seeds and whatever earlier
# runs have left in corpus/. Every input that has ever failed (regressions/) comes first. Fails on
# the first crash, leak, timeout or excess of memory, with the input in artifacts/.
set -euo pipefail
seconds=${1:?usage: fuzz/run.sh SECONDS}
cd "$(dirname "$0")"
targets=$(./build.sh)
shopt -s nullglob

# The target `calls` opens and saves files.
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
# What took two threads may take another way the next time.
export RAYON_NUM_THREADS=1

for target in file calls; do
    mkdir -p "corpus/$target" "artifacts/$target"
    run=(
        "$targets/$target" -timeout=10 -rss_limit_mb=1024 -max_len=65536
        -artifact_prefix="artifacts/$target/"
    )
    log=artifacts/$target.log
    regressions=(regressions/"$target"/*)
    if ((${#regressions[@]})) && ! "${run[@]}" "${regressions[@]}" >"$log" 2>&1; then
        tail -n 60 "$log"
        echo "$target: fails again: $(grep '^Running: ' "$log" | tail -n 1)"
        exit 1
    fi
    case $target in
        file) run+=(-dict=safetensors.dict) ;;
        # Short inputs make too few calls to begin with.
        calls) run+=(-len_control=0) ;;
    esac
    run+=(-max_total_time="$seconds" -print_final_stats=1 "corpus/$target" "seeds/$target")
    if ! "${run[@]}" >"$log" 2>&1; then
        tail -n 60 "$log"
        echo "$target: failed; the input is fuzz/$(sed -n 's/.*written to //p' "$log" | tail -n 1)"
        exit 1
    fi
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(grep -oE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -n 1)
    echo "$target: ${#regressions[@]} regressions pass, $executions executions, $coverage"
done
