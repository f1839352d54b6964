"""Value-mixed attention next to torch's scaled_dot_product_attention: make bench-attention.

    python benches/bench_attention.py [--turns 21] [--threads 1,2]

Shapes of SD1.5's and SDXL's cross-attention, batch 2, f32, 77 keys, tensors [B, L, H·D] as a U-Net
has them. `one branch` is torch's attention without VMix, `two` the paper's literal formula in torch
(eq. 9), `vmix` the same result with λ mixed in. All three take turns in one process; ratios are
medians over the turns of times in the same turn. Before each comes a pause, until the other's
threads, which spin, have gone to sleep, and as long a run that is not timed, until its own are
awake and have a core each. The peak is what a core does of fused multiply-adds in registers
(benches/peak.c), of which vmix reaches the share in the column "of peak": its two products, with
nothing counted for the softmax.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import vmix

SHAPES = ((4096, 40, 8), (1024, 80, 8), (256, 160, 8), (4096, 64, 10), (1024, 64, 20))
"""Queries, head dim, heads."""
BATCH, KEYS, STRENGTH = 2, 77, 0.7
PAUSE = 0.04  # libgomp's threads spin for some 10 ms


def peak() -> float:
    """Operations a second."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        source = Path(__file__).parent / "peak.c"
        flags = ("-O3", "-march=native", "-ffp-contract=fast")
        subprocess.run(["gcc", *flags, str(source), "-o", str(program)], check=True)
        return float(subprocess.run([program], check=True, capture_output=True).stdout)


def timed(work: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    awake = time.perf_counter() + PAUSE
    while time.perf_counter() < awake:
        work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    queries: int, dim: int, heads: int, turns: int
) -> tuple[list[float], list[float], list[float], float]:
    """Seconds of one branch, two and vmix, and the largest difference of the latter two."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, n, heads * dim, generator=random) for n in (queries, KEYS, KEYS))
    v_a = torch.randn(KEYS, heads * dim, generator=random)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, dim)).transpose(1, 2)

    def one() -> torch.Tensor:
        return F.scaled_dot_product_attention(split(q), split(k), split(v))

    def two() -> torch.Tensor:
        aesthetic = split(v_a.expand(BATCH, -1, -1))
        return one() + STRENGTH * F.scaled_dot_product_attention(split(q), split(k), aesthetic)

    def ours() -> vmix.Tensor:
        return vmix.attention(q, k, v, v_a, STRENGTH, heads)

    expected = two().transpose(1, 2).flatten(2)
    error = float((torch.from_dlpack(ours()) - expected).abs().max())
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(turns):
        for row, work in zip(times, (one, two, ours), strict=True):
            row.append(timed(work))
    return (*times, error)  # type: ignore[return-value]


def megabytes(field: str) -> float:
    """Of this process's memory, as Linux tells it."""
    line = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) / 1024


def growth(turns: int) -> None:
    """Time and memory of ever more queries, which double from row to row."""
    print("\n| queries × head dim, heads | ms | ns a query | MB beside the tensors |")
    print("|---|---|---|---|")
    heads, dim = 10, 64
    k, v = (torch.randn(BATCH, KEYS, heads * dim) for _ in range(2))
    for queries in (4096, 8192, 16384, 32768, 65536):
        q = torch.randn(BATCH, queries, heads * dim)

        def work(q: torch.Tensor = q) -> object:
            return vmix.attention(q, k, v, v[0], STRENGTH, heads)

        seconds = statistics.median(timed(work) for _ in range(turns))
        there = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        result = work()
        beside = megabytes("VmHWM") - max(there, megabytes("VmRSS"))
        del result
        each = seconds / queries / BATCH
        print(
            f"| {queries}×{dim}, {heads} | {seconds * 1e3:.1f} | {each * 1e9:.0f} | {beside:.1f} |"
        )


def ratio(times: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, to, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--threads", default="1,2")
    arguments = parser.parse_args()
    most = peak()
    kernel = os.environ.get("VMIX_KERNEL") or "the fastest"
    print(f"torch {torch.__version__}, kernel: {kernel}, peak {most / 1e9:.0f} GFLOP/s a core\n")
    print("| threads | queries × head dim, heads | one branch, ms | two | vmix | of peak | error |")
    print("|---|---|---|---|---|---|---|")
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        vmix.set_num_threads(threads)
        ratios = []
        for queries, dim, heads in SHAPES:
            one, two, ours, error = measure(queries, dim, heads, arguments.turns)
            ratios.append(ratio(ours, one))
            work = 4 * BATCH * heads * queries * KEYS * dim
            share = work / statistics.median(ours) / most / threads
            print(
                f"| {threads} | {queries}×{dim}, {heads} | {statistics.median(one) * 1e3:.2f} "
                f"| {ratio(two, one):.2f} | {ratios[-1]:.2f} | {share:.0%} | {error:.0e} |"
            )
        print(f"| {threads} | mean | | | {statistics.mean(ratios):.2f} | | |")
    if Path("/proc/self/clear_refs").exists():
        growth(arguments.turns)


if __name__ == "__main__":
    main()
