"""What VMix costs in a diffusers pipeline, next to vanilla, two literal branches and IP-Adapter.

A U-Net of Stable Diffusion 1.5's shape with random weights, 512 px, batch 2 (one guided image),
fp32. The candidates take turns within one run, so that a busy machine slows all of them; medians
are printed as multiples of vanilla's.

    python benches/bench_diffusers.py [--unet-repeats 2] [--layer-repeats 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))
import tiny_pipelines as tiny
from oracle import two_branches
from vmix import Adapter
from vmix.diffusers import load_vmix, unload_vmix

Candidate = Callable[[], AbstractContextManager[Any]]
LATENTS = 64  # of 512 px


class Pipe(SimpleNamespace):
    """What load_vmix asks of a pipeline, without text encoders and VAE."""


@contextmanager
def vmix(pipe: Any, adapter: Adapter) -> Iterator[None]:
    load_vmix(pipe, adapter)
    try:
        yield
    finally:
        unload_vmix(pipe)


@contextmanager
def ip_adapter(pipe: Any) -> Iterator[None]:
    """diffusers' own processors and projection of an image embedding to four tokens."""
    unet, before = pipe.unet, dict(pipe.unet.attn_processors)
    unet.image = tiny.load_ip_adapter(pipe)["ip_adapter_image_embeds"]
    try:
        yield
    finally:
        unet.set_attn_processor(before)
        unet.encoder_hid_proj = unet.config.encoder_hid_dim_type = None
        del unet.image


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def layers_at(unet: Any) -> list[tuple[nn.Module, int]]:
    """Every attn2 and the number of image tokens that it sees at 512 px."""
    tokens = {
        "down_blocks": (4096, 1024, 256),
        "mid_block": (64,),
        "up_blocks": (0, 256, 1024, 4096),
    }
    return [
        (module, tokens[path.split(".")[0]][int(path.split(".")[1]) if "mid" not in path else 0])
        for path, module in unet.named_modules()
        if path.endswith(".attn2")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unet-repeats", type=int, default=2, help="0 skips the whole U-Net")
    parser.add_argument("--layer-repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)

    pipe = Pipe(_guidance_scale=7.5, unet=tiny.sd15_unet())
    unet = pipe.unet
    tensors, metadata = tiny.adapter(unet, base="sd15")
    adapter = Adapter.from_matrices(tensors, metadata)
    candidates: dict[str, Candidate] = {
        "vanilla": nullcontext,
        "VMix (load_vmix)": lambda: vmix(pipe, adapter),
        "two branches": lambda: two_branches(unet, tensors, [1.0] * 3, fused=True),
        "IP-Adapter, 4 tokens": lambda: ip_adapter(pipe),
    }
    sample, context = torch.randn(2, 4, LATENTS, LATENTS), torch.randn(2, 77, 768)
    image = torch.randn(2, 4, 768)
    attn2 = layers_at(unet)
    inputs = {module: torch.randn(2, n, module.query_dim) for module, n in attn2}

    def layers() -> None:
        states = (context, [image]) if hasattr(unet, "image") else context
        for module, _ in attn2:
            module(inputs[module], encoder_hidden_states=states)

    def forward() -> None:
        images = {"image_embeds": unet.image} if hasattr(unet, "image") else None
        unet(sample, 500, context, added_cond_kwargs=images)

    def interleaved(work: Callable[[], None], repeats: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for repeat in range(repeats + 1):  # the first one warms up
            for name, candidate in candidates.items():
                with candidate():
                    start = time.perf_counter()
                    work()
                    if repeat:
                        times[name].append(time.perf_counter() - start)
        return times

    in_layers = interleaved(layers, arguments.layer_repeats)
    in_unet = interleaved(forward, arguments.unet_repeats) if arguments.unet_repeats else {}

    extra = dict.fromkeys(candidates, 0)
    with vmix(pipe, adapter):
        mixes = [mix for layer in unet._vmix.layers.values() for mix in layer.mixes.values()]
        extra["VMix (load_vmix)"] = tensor_bytes(t for m in mixes for t in (m.cond, m.rows))
    extra["two branches"] = tensor_bytes(v for k, v in tensors.items() if "to_v_aes" in k)
    with ip_adapter(pipe):
        processors = (p for name, p in unet.attn_processors.items() if "attn2" in name)
        extra["IP-Adapter, 4 tokens"] = tensor_bytes(p for q in processors for p in q.parameters())

    def column(times: dict[str, list[float]], name: str) -> str:
        if not times:
            return f"{'-':>18}"
        each = [a / b for a, b in zip(times[name], times["vanilla"], strict=True)]
        return f"{statistics.median(each):8.3f} ({min(each):.2f}-{max(each):.2f})"

    print(
        f"SD1.5 shape, 512 px, batch 2, fp32, {arguments.threads} threads, "
        f"torch {torch.__version__}"
    )
    print("time as a multiple of vanilla in the same turn: median (range)\n")
    print(f"{'':22}{'16 attn2 layers':>18}{'whole U-Net':>19}{'kept, MB':>10}")
    for name in candidates:
        row = f"{column(in_layers, name):>18} {column(in_unet, name):>18}"
        print(f"{name:22}{row}{extra[name] / 1e6:10.1f}")
    vanilla = [f"{statistics.median(t['vanilla']):.2f} s" for t in (in_layers, in_unet) if t]
    print(
        f"\nvanilla: {', '.join(vanilla)}; repeats: {arguments.layer_repeats} and "
        f"{arguments.unet_repeats}. "
        "VMix keeps the rows and λ·V_a of one selection; two branches keep W_Va."
    )


if __name__ == "__main__":
    main()
