"""SDXL-sized adapter file → V_a of all 70 layers: this library against safetensors + torch.

    python benches/bench_values.py

Each run is a process of its own, the two interleaved. Time is from opening the file (in the page
cache) to the last V_a; memory is how far resident memory rises meanwhile above what it is after the
imports, pages of the mapped file included. Both use as many threads as there are cores, read f16
weights and give f16 values. Linux only, for the memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 7
LABELS = ["vibrant color", "natural lighting", "sharp focus", "balanced composition"]


def make_adapter(path: Path) -> None:
    """A file of SDXL's shapes, filled with numbers."""
    import torch
    import vmix

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    labels = [{"name": n, "positive": n, "negative": f"rare{i}"} for i, n in enumerate(LABELS)]
    metadata = {
        "vmix.format": "1",
        "vmix.kind": "adapter",
        "vmix.base": "sdxl",
        "vmix.labels": json.dumps(labels),
        "vmix.context_tokens": "77",
        "vmix.context_dim": "2048",
        "vmix.feature": "context_eot",
        "vmix.norm_eps": "1e-5",
        "vmix.projection": "learned",
        "vmix.value_weights": "own",
        "vmix.apply_to": "both",
        "vmix.trained": "no",
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
    vmix.Adapter.from_tensors(tensors, metadata).save(path)


def with_vmix(path: Path) -> float:
    import vmix

    start = time.perf_counter()
    values = vmix.Adapter.open(path).values(dtype="float16")
    assert len(values) == 70
    return time.perf_counter() - start


def with_torch(path: Path) -> float:
    """What a host would write: load the file, run the projection, one matmul per layer."""
    import torch
    from safetensors.torch import load_file

    start = time.perf_counter()
    tensors = load_file(path)
    f_t = tensors["aes_emb"][:, 0].float()
    mixed = tensors["projection.linear.weight"].float() @ f_t
    norm = tensors["projection.norm.weight"].float(), tensors["projection.norm.bias"].float()
    normed = torch.nn.functional.layer_norm(mixed, (2048,), *norm, 1e-5)
    zero = tensors["projection.zero.weight"].float()
    f_a = normed @ zero.T + tensors["projection.zero.bias"].float()
    suffix = ".to_v_aes.weight"
    values = {
        name.removesuffix(suffix): (f_a @ tensors[name].float().T).half()
        for name in tensors
        if name.endswith(suffix)
    }
    assert len(values) == 70
    return time.perf_counter() - start


WAYS = {"vmix": with_vmix, "safetensors + torch": with_torch}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (its highest) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1.024e-3


def child(way: str, path: Path) -> None:
    import numpy
    import torch
    import vmix

    del numpy, vmix
    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: imports peaked higher
    before = resident("VmRSS")
    seconds = WAYS[way](path)
    print(json.dumps([seconds, resident("VmHWM") - before]))


def main() -> None:
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
        return
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl.safetensors"
        make_adapter(path)
        size = path.stat().st_size / 1e6
        for _ in range(RUNS):
            for way, results in found.items():
                command = [sys.executable, __file__, way, str(path)]
                results.append(json.loads(subprocess.check_output(command)))
    print(f"{size:.0f} MB f16 adapter file -> 70 V_a in f16; median of {RUNS} interleaved runs")
    print(f"{'':<22}{'time':>10}{'ratio':>8}{'memory':>12}{'ratio':>8}")
    time_base, memory_base = (
        statistics.median(c) for c in zip(*found["safetensors + torch"], strict=True)
    )
    for way, results in found.items():
        seconds, memory = (statistics.median(c) for c in zip(*results, strict=True))
        print(
            f"{way:<22}{seconds * 1e3:>7.0f} ms{seconds / time_base:>8.2f}"
            f"{memory:>9.0f} MB{memory / memory_base:>8.2f}"
        )


if __name__ == "__main__":
    main()
