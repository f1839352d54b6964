"""What a fit costs: a U-Net pass with the collector riding along, next to the pass alone.

U-Nets of full size with random weights, one guided picture (batch 2). Passes take turns within one
run; medians are printed as multiples of the plain pass. What the fit explains of random words says
that the sums are right, and nothing about real weights.

    python benches/bench_fit.py [--base sdxl] [--size 512] [--labels 4] [--device cuda --dtype bf16]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))
import tiny_pipelines as tiny
from vmix.fit import Collector, FitLabel, Picture, Plan, Sums, sums_size
from vmix.fit.solve import solve_side
from vmix.train.single_file import CONFIGS

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TOKENS = 77


def contexts(plan: Plan, width: int, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Of every prompt: the bare context, and those with words, which move every token a little."""
    words = torch.randn(len(plan.sides), TOKENS, width, generator=draw)
    found = []
    for _ in plan.prompts:
        bare = torch.randn(1, TOKENS, width, generator=draw)
        noise = torch.randn(len(plan.sides), TOKENS, width, generator=draw)
        found.append((bare, bare + 0.5 * words + 0.1 * noise))
    return found


def peak(device: str) -> float:
    """Of memory, in GB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, help="in pixels; the base's own unless given")
    parser.add_argument("--labels", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="f32")
    args = parser.parse_args()

    config = json.loads((CONFIGS / args.base / "unet" / "config.json").read_text())
    unet: Any = tiny.full_size_unet(DTYPES[args.dtype], **config).to(args.device)
    size = (args.size or {"sd15": 512, "sdxl": 1024}[args.base]) // 8
    labels = [FitLabel(f"label {i}", ("words",), ("others",)) for i in range(args.labels)]
    prompts = [f"prompt {i}" for i in range(args.prompts)]
    plan = Plan(labels, prompts, lambda text: len(text.split()), TOKENS)
    layers = {n: m for n, m in unet.named_modules() if n.endswith(".attn2")}
    shapes = {n: (m.heads, m.to_q.out_features // m.heads) for n, m in layers.items()}
    sums = Sums({})
    collector = Collector(layers, plan, sums)
    draw = torch.Generator().manual_seed(0)
    width = int(config["cross_attention_dim"])

    def run(context: Tensor) -> float:
        latents = torch.randn(1, 4, size, size, generator=draw).repeat(2, 1, 1, 1)
        more = {}
        if args.base == "sdxl":
            pooled, ids = torch.zeros(2, 1280), torch.full((2, 6), 8.0 * size)
            more["added_cond_kwargs"] = {
                "text_embeds": pooled.to(latents_like), "time_ids": ids.to(latents_like)
            }  # fmt: skip
        begun = time.perf_counter()
        unet(latents.to(latents_like), 500, context.repeat(2, 1, 1).to(latents_like), **more)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    latents_like = torch.empty(0, device=args.device, dtype=DTYPES[args.dtype])
    told = contexts(plan, width, draw)
    plain, riding = [], []
    run(told[0][0])  # warms up
    without = peak(args.device)
    for prompt, (bare, words) in enumerate(told):
        plain.append(run(bare))
        with collector.riding():
            collector.start([Picture(-1, prompt, words)])
            riding.append(run(bare))
            collector.finish()
    ratio = statistics.median(riding) / statistics.median(plain)
    print(
        f"{args.base}, {8 * size} px, {args.dtype}, {len(plan.sides)} sides: a pass "
        f"{statistics.median(plain):.2f} s, with the collector {ratio:.2f} times that"
    )
    print(
        f"sums {sums_size(plan, shapes, TOKENS) / 1e6:.0f} MB; peak memory {without:.2f} GB "
        f"without, {peak(args.device):.2f} GB with them"
    )
    begun = time.perf_counter()
    for rank in (1, args.rank, TOKENS):
        found = solve_side(sums, plan, 0, rank, torch.float16)
        took = time.perf_counter() - begun
        print(f"rank {rank}: explains {found.explained:.1%} of one side, solved in {took:.1f} s")
        begun = time.perf_counter()


if __name__ == "__main__":
    main()
