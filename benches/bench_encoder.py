"""AesEmb of 20 labels on SD1.5's text encoder: this library against transformers.

    python benches/bench_encoder.py [--checkpoint sd15.safetensors] [--runs 5]

40 texts, two per label, through a CLIP-L of the full size, from an fp16 single-file checkpoint in
the page cache; random weights without the bulk of a U-Net unless one is given. transformers reads
the same tensors and runs in fp32, as this library does, and in their own fp16. It is given the
texts padded to the longest of them, which is all that is needed, and to 77 tokens, as pipelines do.

Each run is a process of its own that imports no more than it needs, the candidates take turns, and
what is printed is the median ratio (quartiles) to transformers in fp32 of the same turn. "first" is
from opening the file to the features, without the imports; "again" is the same once more. "peak" is
the highest resident size of the whole process (ru_maxrss), "rise" that above what the imports left;
pages of the mapped file count in both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFIX = "cond_stage_model.transformer.text_model."
PAIRS = 20
PADDED = {"transformers fp32": 0, "transformers fp16": 0, "transformers fp32, 77 tokens": 77}
BASE = "transformers fp32"
ASPECTS = ("color", "light", "focus", "composition", "texture")
KINDS = ("vibrant, rich and saturated", "soft", "sharp and dramatic", "well balanced")
RARE = ("sks", "nmwx", "nlwx", "kprs")


def texts() -> list[str]:
    """A positive and a negative of every label: 3 to 8 tokens, with start and end of text."""
    positives = [f"{kind} {aspect}" for aspect in ASPECTS for kind in KINDS]
    assert len(positives) == PAIRS
    return [text for i, text in enumerate(positives) for text in (text, RARE[i % len(RARE)])]


def make_checkpoint(path: Path) -> None:
    """A file with SD1.5's text encoder and, as small as can be, the layers of its U-Net."""
    import torch
    import vmix
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    state = CLIPTextModel(config).half().state_dict()
    tensors = {PREFIX + name.removeprefix("text_model."): x for name, x in state.items()}
    for layer in vmix.unet_layers("sd15"):
        name = f"model.diffusion_model.{layer.ldm_name}.to_v.weight"
        tensors[name] = torch.zeros(layer.inner_dim, 768).half()
    save_file(tensors, path)


Run = Callable[[], Any]


def with_vmix(path: Path, way: str) -> Run:
    import vmix

    encoder = vmix.TextEncoder.open(path)
    return lambda: encoder.features(texts())


def with_transformers(path: Path, way: str) -> Run:
    """What a host would write, but for the tokenizer, which is ours here too."""
    import torch
    import vmix
    from safetensors import safe_open
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=49_407
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    dtype = torch.float16 if "fp16" in way else torch.float32
    state = {}
    with safe_open(path, "pt") as file:
        for name in model.state_dict():
            key = PREFIX + name.removeprefix("text_model.")
            state[name] = file.get_tensor(key).to(dtype)
    model.load_state_dict(state, assign=True)
    # The only buffer: what is on "meta" has no values.
    model.get_submodule("embeddings").position_ids = torch.arange(77)[None]
    model.eval()

    def run() -> Any:
        ids = [vmix.Tokenizer().encode(text) for text in texts()]
        length = PADDED[way] or max(map(len, ids))
        rows = [row + [row[-1]] * (length - len(row)) for row in ids]
        with torch.no_grad():
            return model(torch.tensor(rows)).pooler_output

    return run


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3


def child(way: str, path: Path, threads: int) -> None:
    import numpy as np
    import vmix

    del vmix
    if way != "vmix":
        import torch
        from transformers import CLIPTextModel  # noqa: F401

        torch.set_num_threads(threads)
        torch.ones(8, 8) @ torch.ones(8, 8)
    before = peak()
    start = time.perf_counter()
    run = (with_vmix if way == "vmix" else with_transformers)(path, way)
    features = run()
    first = time.perf_counter() - start
    start = time.perf_counter()
    run()
    again = time.perf_counter() - start
    result = {"first": first, "again": again, "peak": peak(), "rise": peak() - before}
    print(json.dumps({**result, "features": np.from_dlpack(features).flatten().tolist()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="an SD1.5 of one's own, in fp16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, threads = arguments.child
        if way == "make":
            make_checkpoint(arguments.checkpoint)
        else:
            child(way, arguments.checkpoint, int(threads))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.checkpoint or Path(folder) / "sd15.safetensors"
        if not arguments.checkpoint:
            # In a process of its own: a child's ru_maxrss starts from its parent's size.
            run("make", path, 1)
        for threads in arguments.threads:
            report(path, threads, arguments.runs)


def run(way: str, path: Path, threads: int) -> bytes:
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    command = [sys.executable, __file__, "--checkpoint", str(path), "--child", way, str(threads)]
    return subprocess.check_output(command, env={**os.environ, **limits})


def report(path: Path, threads: int, runs: int) -> None:
    ways = ["vmix", *PADDED]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, results in found.items():
            results.append(json.loads(run(way, path, threads)))
    print(f"\n{2 * PAIRS} texts, {threads} thread(s); medians of {runs} interleaved runs")
    heads = f"{'first':>8}{'ratio':>20}{'again':>8}{'ratio':>20}{'peak, MB':>10}{'rise':>6}"
    print(f"{'':30}{heads}{'differs':>9}")
    for way in ways:
        cells = ""
        for measure in ("first", "again"):
            seconds = statistics.median(result[measure] for result in found[way])
            pairs = zip(found[way], found[BASE], strict=True)
            ratios = [ours[measure] / base[measure] for ours, base in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells += f"{seconds:>7.2f}s{f'{middle:.2f} ({low:.2f}-{high:.2f})':>20}"
        memory, rise = (statistics.median(x[m] for x in found[way]) for m in ("peak", "rise"))
        ours, theirs = found[way][0]["features"], found[BASE][0]["features"]
        most = max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) / max(map(abs, theirs))
        print(f"{way:30}{cells}{memory:>10.0f}{rise:>6.0f}{most:>9.0e}")


if __name__ == "__main__":
    main()
