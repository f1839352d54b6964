"""SDXL with four labels, file → V_a of all 70 layers in f16, as in docs/performance.md.

    python benches/bench_values.py

- rows: this library on its own file, on one thread. "file to V_a" is from opening the file to the
  last V_a, "slider move" the values of other weights while the file is open, the median of five.
- matrices: safetensors and torch with the paper's matrices, as a host would write it: load the file
  (f16, 349 MB), project, one product per layer. A slider move is all but the loading.

Each run is a process of its own, the ways interleaved. Files are in the page cache. Memory is how
far resident memory rises meanwhile above what it is after the imports. Linux only, for the memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUNS = 7
LABELS = ["vibrant color", "natural lighting", "sharp focus", "balanced composition"]
BETWEEN = [0.3, 0.9, 0.6, 1.2]


def make_files(folder: Path) -> None:
    """The same adapter as rows and as matrices, filled with numbers."""
    import torch
    import vmix
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    labels = [{"name": n, "positive": [n], "negative": [f"rare{i}"]} for i, n in enumerate(LABELS)]
    metadata = {
        "vmix.base": "sdxl",
        "vmix.labels": json.dumps(labels),
        "vmix.context_tokens": "77",
        "vmix.norm_eps": "1e-5",
        "vmix.apply_to": "cond",
        "vmix.made": json.dumps({"method": "trained"}),
    }
    tensors = {
        "aes_emb": randn(len(LABELS), 2, 2048),
        "projection.linear.weight": randn(77, len(LABELS)),
        "projection.norm.weight": randn(2048) + 1,
        "projection.norm.bias": randn(2048),
        "projection.zero.weight": randn(2048, 2048),
        "projection.zero.bias": randn(2048),
    }
    for layer in vmix.unet_layers("sdxl"):
        tensors[f"{layer.name}.to_v_aes.weight"] = randn(layer.inner_dim, 2048)
    save_file(tensors, folder / "matrices.safetensors")
    vmix.Adapter.from_matrices(tensors, metadata).save(folder / "rows.safetensors")


def with_rows(folder: Path, weights: list[float]) -> tuple[float, float]:
    import vmix

    vmix.set_num_threads(1)
    selection = dict(zip(LABELS, weights, strict=True))
    start = time.perf_counter()
    adapter = vmix.Adapter.open(folder / "rows.safetensors")
    values: Any = adapter.values(selection, dtype="float16")
    opened = time.perf_counter() - start
    assert len(values) == 70
    moves = []
    for _ in range(5):
        start = time.perf_counter()
        values = adapter.values(selection, dtype="float16")
        moves.append(time.perf_counter() - start)
    return opened, statistics.median(moves)


def with_matrices(folder: Path, weights: list[float]) -> tuple[float, float]:
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)

    def values() -> dict[str, torch.Tensor]:
        w = torch.tensor(weights)[:, None]
        positive, negative = tensors["aes_emb"].float().unbind(1)
        mixed = tensors["projection.linear.weight"].float() @ ((1 - w) * negative + w * positive)
        norm = tensors["projection.norm.weight"].float(), tensors["projection.norm.bias"].float()
        normed = torch.nn.functional.layer_norm(mixed, (2048,), *norm, 1e-5)
        zero = tensors["projection.zero.weight"].float()
        f_a = normed @ zero.T + tensors["projection.zero.bias"].float()
        suffix = ".to_v_aes.weight"
        return {
            name.removesuffix(suffix): (f_a @ tensors[name].float().T).half()
            for name in tensors
            if name.endswith(suffix)
        }

    start = time.perf_counter()
    tensors = load_file(folder / "matrices.safetensors")
    made = values()
    opened = time.perf_counter() - start
    assert len(made) == 70
    moves = []
    for _ in range(5):
        start = time.perf_counter()
        made = values()
        moves.append(time.perf_counter() - start)
    return opened, statistics.median(moves)


WAYS = {"matrices": with_matrices, "rows": with_rows}
WEIGHTS = {"all at 1": [1.0] * 4, "between": BETWEEN}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (its highest) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1.024e-3


def child(way: str, weights: str, folder: Path) -> None:
    import numpy
    import torch
    import vmix

    del numpy, vmix
    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: imports peaked higher
    before = resident("VmRSS")
    opened, moved = WAYS[way](folder, WEIGHTS[weights])
    print(json.dumps([opened, moved, resident("VmHWM") - before]))


def main() -> None:
    if len(sys.argv) == 4:
        child(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
        return
    ways = [(way, weights) for weights in WEIGHTS for way in WAYS]
    found: dict[tuple[str, str], list[list[float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        sizes = {way: (folder / f"{way}.safetensors").stat().st_size / 1e6 for way in WAYS}
        for _ in range(RUNS):
            for (way, weights), results in found.items():
                command = [sys.executable, __file__, way, weights, str(folder)]
                results.append(json.loads(subprocess.check_output(command)))
    print(f"SDXL, 4 labels -> 70 V_a in f16, one thread; medians of {RUNS} interleaved runs")
    print(f"{'':<22}{'file':>9}{'file to V_a':>18}{'slider move':>18}{'memory':>9}")
    for weights in WEIGHTS:
        base = [statistics.median(c) for c in zip(*found["matrices", weights], strict=True)]
        for way in WAYS:
            opened, moved, memory = (
                statistics.median(c) for c in zip(*found[way, weights], strict=True)
            )
            print(
                f"{f'{way}, {weights}':<22}{sizes[way]:>6.1f} MB"
                f"{opened * 1e3:>7.1f} ms ({opened / base[0]:.3f})"
                f"{moved * 1e3:>7.1f} ms ({moved / base[1]:.3f})"
                f"{memory:>6.0f} MB"
            )


if __name__ == "__main__":
    main()
