"""What VMixApply costs in ComfyUI, as ratios to the same model without it.

    make bench-comfy

Full-size SD1.5 with random weights, fp32 on the CPU, 512 px, batch 2 (conditional and not):
vanilla, VMixApply, the paper's literal two branches, and ComfyUI_IPAdapter_plus. All four are
interleaved in every round. Printed are the ratio of the fastest runs, which other work on the
machine disturbs least, and the median of the rounds' ratios with their middle half.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "comfy"), str(ROOT)]

import host

if host.missing:
    sys.exit(host.missing)

import bases
import checkpoints
import comfy.clip_vision
import comfy.model_management
import torch
import vmix
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy_nodes import files, nodes

MODELS = Path(os.environ.get("VMIX_TEST_MODELS") or ROOT / "target" / "comfy-models")
LATENT, ROUNDS, LAYER_ROUNDS = 64, 5, 40


def file(name: str) -> Path:
    path = MODELS / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.files()[name](path)
    return path


def print_ratios(title: str, times: Mapping[str, list[float]]) -> None:
    vanilla = times["vanilla"]
    print(f"\n{title}: vanilla {min(vanilla):.4g} s at best, {len(vanilla)} rounds")
    for name, ours in times.items():
        ratios = [a / b for a, b in zip(ours, vanilla, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"  {name:<16} fastest {min(ours) / min(vanilla):.3f}"
            f"   median {median:.3f} ({low:.3f} – {high:.3f})"
        )


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for round_ in range(rounds):
        names = list(runs)
        # Every round begins with another one.
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def options_of(patcher: Any) -> dict[str, Any]:
    """The transformer options with which the sampler calls the model."""
    transformer = patcher.model_options["transformer_options"].copy()
    transformer["wrappers"] = {k: dict(v) for k, v in patcher.wrappers.items()}
    transformer |= {
        "cond_or_uncond": [1, 0],
        "sigmas": torch.full((2,), 5.0),
        "sample_sigmas": torch.tensor([14.0, 5.0, 0.0]),
    }
    return transformer


def ip_adapter(model: Any, vision: Any) -> Any:
    from importlib import import_module

    plus = host.ip_adapter_plus()
    if plus is None:
        sys.exit(f"no ComfyUI_IPAdapter_plus at {host.IP_ADAPTER_PLUS}")
    utils = import_module(f"{plus.__package__}.utils")
    adapter = utils.ipadapter_model_loader(str(file("sd15-ip-adapter")))
    image = torch.rand(1, 224, 224, 3)
    return plus.ipadapter_execute(model.clone(), adapter, vision, image=image, weight=0.9)[0]


def attn2_layers(base: bases.Base) -> list[tuple[tuple[str, int], Any, torch.Tensor]]:
    """Block, module and queries of every cross-attention at 512 px."""
    unet = base.model.model.diffusion_model
    layers = []
    for ldm, width in base.layers.values():
        section, number, *_ = ldm.split(".")
        side = LATENT // {320: 1, 640: 2, 1280: 4}[width]
        if section == "middle_block":
            side = LATENT // 8
        block = (section.split("_")[0], 0 if section == "middle_block" else int(number))
        layers.append((block, unet.get_submodule(ldm), torch.randn(2, side * side, width)))
    return layers


def run_layers(patcher: Any, layers: Any, context: torch.Tensor) -> Callable[[], None]:
    """The attn2 of all blocks as BasicTransformerBlock runs them, inside the model's wrappers."""
    options = options_of(patcher)
    replace = options.get("patches_replace", {}).get("attn2", {})

    def layers_alone(*_: Any) -> None:
        for index, (block, attn, x) in enumerate(layers):
            extra = options | {
                "n_heads": attn.heads,
                "dim_head": attn.dim_head,
                "block": block,
                "transformer_index": index,
                "original_shape": [2, 4, LATENT, LATENT],
            }
            if block in replace:
                query, key, value = attn.to_q(x), attn.to_k(context), attn.to_v(context)
                attn.to_out(replace[block](query, key, value, extra))
            else:
                attn(x, context=context)

    executor = WrapperExecutor.new_class_executor(
        layers_alone, patcher.model, get_all_wrappers(WrappersMP.APPLY_MODEL, options)
    )
    x = torch.empty(2, 4, LATENT, LATENT)
    return lambda: executor.execute(x, options["sigmas"], None, context, None, options)


def megabytes(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def kept(patcher: Any) -> float:
    """MB of V_a that the patched model holds."""
    pairs = [x.values for x in patcher.wrappers["apply_model"]["vmix"][0].layers]
    return megabytes(t for pair in pairs for t in pair if t is not None)


def main() -> None:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    base = bases.load("sd15", file("sd15"))
    bases.give_adapter(base, folder, known=True)
    model = base.model
    comfy.model_management.load_models_gpu([model])
    print(f"dtype {model.model.get_dtype()}, {torch.get_num_threads()} threads")

    start = time.perf_counter()
    opened = files.open_file(folder / "sd15-3.safetensors")
    ours = nodes.applied(model, opened, None, 1.0)
    setup = time.perf_counter() - start
    literal = base.literal(model)
    vision = comfy.clip_vision.load(str(file("clip-vision")))
    start = time.perf_counter()
    ip = ip_adapter(model, vision)
    setup_ip = time.perf_counter() - start
    variants = {"vanilla": model, "VMixApply": ours, "two branches": literal, "IPAdapter_plus": ip}

    context = torch.randn(2, 77, 768)
    layers = attn2_layers(base)
    runs = {name: run_layers(p, layers, context) for name, p in variants.items()}
    # The layers are short: by the CPU time of one thread, so that what else runs counts little.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = interleaved(runs, LAYER_ROUNDS, time.process_time)
    print_ratios("the 16 attn2 layers, CPU time of one thread", times)
    torch.set_num_threads(threads)

    x = torch.randn(2, 4, LATENT, LATENT)

    def forward(patcher: Any) -> Callable[[], Any]:
        options = options_of(patcher)
        return lambda: patcher.model.apply_model(
            x, options["sigmas"], c_crossattn=context, transformer_options=options
        )

    runs = {name: forward(p) for name, p in variants.items()}
    print_ratios("U-Net forward", interleaved(runs, ROUNDS))

    print("\nfrom opening the file to the first step:")
    print(f"  VMixApply {setup:.3f} s (V_a of all layers); IPAdapter_plus {setup_ip:.3f} s")
    ip_weights = file("sd15-ip-adapter").stat().st_size / 1e6
    print(f"kept in memory, SD1.5: VMixApply {kept(ours):.1f} MB in fp32; IPAdapter_plus "
          f"{ip_weights:.1f} MB of weights as stored")  # fmt: skip

    del base, model, ours, literal, ip, variants, layers, runs
    comfy.model_management.unload_all_models()
    layers_xl = {x.name: (x.ldm_name, x.inner_dim) for x in vmix.unet_layers("sdxl")}
    xl = bases.load("sdxl", file("sdxl"), dtype=torch.float16)
    xl.model.model.manual_cast_dtype = None  # it computes in fp16, as on a GPU
    xl.layers = layers_xl
    bases.give_adapter(xl, folder, known=True)
    start = time.perf_counter()
    opened = files.open_file(folder / "sdxl-3.safetensors")
    ours = nodes.applied(xl.model, opened, None, 1.0)
    setup = time.perf_counter() - start
    print(f"SDXL, fp16 model: VMixApply keeps {kept(ours):.1f} MB, {setup:.3f} s to the first step")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
