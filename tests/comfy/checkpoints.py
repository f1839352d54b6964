"""Model files for ComfyUI with random weights, in the layouts in which its users have them.

`python checkpoints.py OUTDIR [NAME ...]` writes the named files, by default all the small ones.

ComfyUI's own modules, built without storage, give the keys and the shapes; the numbers of a
tensor depend on its key and the seed alone. A full model has the sizes of the published one and
is stored in fp16. A mini has the same blocks and keys with 320 channels at every level, which
ComfyUI still detects as the same family, and is stored in fp32.
"""

# ComfyUI can be imported only once its folder is on the path and the CPU is chosen.
# ruff: noqa: E402

import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, os.environ.get("COMFYUI_PATH") or os.path.expanduser("~/comfy/ComfyUI"))

import comfy.cli_args

comfy.cli_args.args.cpu = True  # comfy.model_management asks for a GPU otherwise.

import comfy.clip_model
import comfy.ops
import comfy.supported_models
import comfy.utils
from comfy.cldm.cldm import ControlNet
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD

Kind = Literal["sd15", "sdxl"]
# What a file holds: tensors on the meta device are to be filled, others are written as they are.
Spec = dict[str, torch.Tensor]

FAMILIES = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "context_dim": 768,
        "num_heads": 8,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "context_dim": 2048,
        "num_head_channels": 64,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
}
CLIP_PROJECTION = 768  # of CLIP ViT-L/14, the smallest image encoder that ComfyUI knows
IMAGE_TOKENS = 4  # of a plain IP-Adapter
RANK = 4
GAINS = {
    # A mean over 77 tokens is small: cross-attention is made to matter as much as the rest,
    # short of the sharpness at which rounding errors grow from layer to layer.
    r"\.attn2\.to_q\.": 1.5,
    r"\.attn2\.to_out\.": 2.0,
    r"\.ff\.net\.2\.": 0.5,
    # The text encoders' tokens stay of order one over 32 layers.
    r"(text_model|resblocks)\..*\.(out_proj|fc2|c_proj)\.": 0.3,
    # Each of the hint's eight convolutions follows a SiLU, which halves a small signal.
    r"(input_hint_block|controlnet_cond_embedding)\.": 2.0,
}
MEANS = {"taesd_decoder.19.bias": 0.5}  # The images of a mini vary about grey.
DTYPES = {torch.float32: "F32", torch.float16: "F16"}


def fill(key: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor of a key: layers that keep the scale of what they are given."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode(), seed))
    noise = torch.randn(like.shape, generator=generator)
    if re.search(r"\b(token|position|positional|class)_embedding\b", key):
        pass  # as large as what the layers make of it
    elif like.ndim == 1:
        mean = 1.0 if key.endswith("weight") else MEANS.get(key.split(".", 1)[1], 0.0)
        noise.mul_(0.02).add_(mean)
    else:
        # The mean that an activation leaves would grow from layer to layer.
        noise -= noise.mean(dim=tuple(range(1, like.ndim)), keepdim=True)
        gain = next((gain for part, gain in GAINS.items() if re.search(part, key)), 1.0)
        noise *= gain / math.sqrt(math.prod(like.shape[1:]))
    return noise.to(like.dtype)


def write(path: Path, spec: Spec, seed: int) -> None:
    """Write a safetensors file one tensor at a time, for files larger than half the memory."""
    keys = sorted(spec, key=lambda key: (-spec[key].element_size(), key))  # keeps them aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + spec[key].numel() * spec[key].element_size()
        header[key] = {
            "dtype": DTYPES[spec[key].dtype],
            "shape": list(spec[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # An interrupted run leaves no file to be trusted.
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            tensor = fill(key, spec[key], seed) if spec[key].is_meta else spec[key]
            file.write(tensor.numpy().data)
    part.replace(path)


def build(module: Callable[..., torch.nn.Module], *args: Any, **kwargs: Any) -> Spec:
    """The state dict of a module, without its numbers."""
    with torch.device("meta"):
        return module(*args, **kwargs).state_dict()


def stored(spec: Spec, dtype: torch.dtype, prefix: str = "") -> Spec:
    """The same tensors as a file has them."""
    return {prefix + key: tensor.to(dtype) for key, tensor in spec.items()}


def unet_config(kind: Kind, full: bool) -> dict[str, Any]:
    """What ComfyUI's U-Net and ControlNet classes are built with."""
    config = {
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 320,
        "legacy": False,
        "use_spatial_transformer": True,
        "operations": comfy.ops.disable_weight_init,
        **UNETS[kind],
    }
    if not full:
        config["channel_mult"] = [1] * len(config["channel_mult"])
    return config


def unet(kind: Kind, full: bool) -> Spec:
    """The U-Net's keys, without a prefix."""
    return build(UNetModel, out_channels=4, **unet_config(kind, full))


def vae(kind: Kind, full: bool) -> Spec:
    """The VAE's keys, without a prefix: TAESD's for a mini, since the usual one has one size."""
    if full:
        return build(AutoencoderKL, ddconfig=VAE, embed_dim=4)
    scale = FAMILIES[kind].latent_format().scale_factor
    return build(TAESD) | {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(0.0)}


def clip(module: Callable[..., torch.nn.Module], config: str) -> Spec:
    """A text or image encoder with a configuration that comes with ComfyUI."""
    folder = Path(comfy.clip_model.__file__).parent
    settings = json.loads((folder / config).read_text(encoding="utf-8"))
    return build(module, settings, torch.float32, "meta", comfy.ops.disable_weight_init)


def text_encoders(kind: Kind) -> Spec:
    """The text encoders' keys as ComfyUI saves them in a checkpoint."""
    model = comfy.clip_model.CLIPTextModel
    spec = stored(clip(model, "sd1_clip_config.json"), torch.float16, "clip_l.transformer.")
    if kind == "sdxl":
        large = clip(model, "clip_config_bigg.json")
        spec |= stored(large, torch.float16, "clip_g.transformer.")
    spec = FAMILIES[kind]({}).process_clip_state_dict_for_saving(spec)
    return {key: tensor for key, tensor in spec.items() if not key.endswith("position_ids")}


def checkpoint(path: Path, kind: Kind, full: bool, text: bool, seed: int) -> None:
    """A checkpoint in the layout of the original repositories."""
    dtype = torch.float16 if full else torch.float32
    spec = stored(unet(kind, full), dtype, "model.diffusion_model.")
    spec |= stored(vae(kind, full), dtype, "first_stage_model.")
    if text:
        spec |= text_encoders(kind)  # fp16 even in a mini: ComfyUI runs them so.
    write(path, spec, seed)


def sd15(path: Path, full: bool = False, text: bool = True, seed: int = 0) -> None:
    """A checkpoint that ComfyUI detects as SD 1.5, with or without the text encoder."""
    checkpoint(path, "sd15", full, text, seed)


def sdxl(path: Path, full: bool = False, text: bool = True, seed: int = 0) -> None:
    """A checkpoint that ComfyUI detects as SDXL, with or without the text encoders."""
    checkpoint(path, "sdxl", full, text, seed)


def lora(path: Path, kind: Kind, full: bool = False, seed: int = 0) -> None:
    """A kohya LoRA of all attention and feed-forward layers, half as strong as the weights."""
    spec = unet(kind, full)
    names = {key: key for key in spec}
    if kind == "sd15":  # kohya's scripts name SD 1.5's blocks as diffusers does, SDXL's do not.
        names = diffusers_names(unet_config(kind, full))
    dtype = torch.float16 if full else torch.float32
    out: Spec = {}
    for key, tensor in spec.items():
        layer = re.search(r"(.*\.(attn\d\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))\.weight$", key)
        if not layer:
            continue
        name = "lora_unet_" + names[key].removesuffix(".weight").replace(".", "_")
        rows, columns = tensor.shape
        out[f"{name}.lora_down.weight"] = torch.empty(RANK, columns, dtype=dtype, device="meta")
        out[f"{name}.lora_up.weight"] = torch.empty(rows, RANK, dtype=dtype, device="meta")
        out[f"{name}.alpha"] = torch.tensor(RANK / 2, dtype=dtype)
    write(path, out, seed)


def diffusers_names(config: dict[str, Any]) -> dict[str, str]:
    """The diffusers names of the keys of a U-Net or a ControlNet."""
    names = {
        key: name
        for name, key in comfy.utils.unet_to_diffusers(config).items()
        if not name.startswith("class_embedding.")  # SD 2's name for SDXL's add_embedding
    }
    for part in ("weight", "bias"):
        hints = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
        for i, hint in enumerate(hints):
            names[f"input_hint_block.{2 * i}.{part}"] = f"controlnet_cond_embedding.{hint}.{part}"
        for i in range(sum(config["num_res_blocks"]) + len(config["num_res_blocks"])):
            names[f"zero_convs.{i}.0.{part}"] = f"controlnet_down_blocks.{i}.{part}"
        names[f"middle_block_out.0.{part}"] = f"controlnet_mid_block.{part}"
    return names


def controlnet(path: Path, kind: Kind, full: bool = False, seed: int = 0) -> None:
    """A ControlNet whose zero convolutions are not zero.

    SDXL's full one has the diffusers layout, as the published ones do. The others have the
    original one, because ComfyUI takes the sizes of the diffusers layout from a table.
    """
    config = unet_config(kind, full)
    spec = build(ControlNet, hint_channels=3, **config)
    dtype = torch.float16 if full else torch.float32
    if kind == "sdxl" and full:
        names = diffusers_names(config)
        write(path, stored({names[key]: spec[key] for key in spec}, dtype), seed)
    else:
        write(path, stored(spec, dtype, "control_model."), seed)


def ip_adapter(path: Path, kind: Kind, full: bool = False, seed: int = 0) -> None:
    """A plain IP-Adapter for the embeddings of `clip_vision`, with diffusers' layer numbers."""

    def place(key: str) -> tuple[int, list[int]]:
        block = ("input", "output", "middle").index(key.split("_")[0])
        return block, [int(number) for number in re.findall(r"\d+", key)]

    layers = unet(kind, full)
    keys = sorted((key for key in layers if key.endswith(".attn2.to_k.weight")), key=place)
    width = layers[keys[0]].shape[1]
    shapes = {
        "image_proj.proj.weight": (IMAGE_TOKENS * width, CLIP_PROJECTION),
        "image_proj.proj.bias": (IMAGE_TOKENS * width,),
        "image_proj.norm.weight": (width,),
        "image_proj.norm.bias": (width,),
    }
    for i, key in enumerate(keys):  # Even numbers are self-attention, which has no weights here.
        shapes[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] = layers[key].shape
        shapes[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"] = layers[key].shape
    dtype = torch.float16 if full else torch.float32
    spec = {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
    write(path, spec, seed)


def clip_vision(path: Path, seed: int = 0) -> None:
    """A CLIP ViT-L/14 image encoder in the layout of transformers."""
    spec = clip(comfy.clip_model.CLIPVisionModelProjection, "clip_vision_config_vitl.json")
    write(path, stored(spec, torch.float16), seed)


def files() -> dict[str, Callable[[Path], None]]:
    """The files that can be asked for by name."""
    out: dict[str, Callable[[Path], None]] = {"clip-vision": clip_vision}
    for kind, base in (("sd15", sd15), ("sdxl", sdxl)):
        out[kind] = partial(base, full=True)
        out[f"{kind}-mini"] = partial(base, text=False)
        out[f"{kind}-mini-text"] = base
        for full, name in ((True, kind), (False, f"{kind}-mini")):
            out[f"{name}-lora"] = partial(lora, kind=kind, full=full)
            out[f"{name}-controlnet"] = partial(controlnet, kind=kind, full=full)
            out[f"{name}-ip-adapter"] = partial(ip_adapter, kind=kind, full=full)
    return out


def main(argv: list[str]) -> None:
    """Write the files named on the command line."""
    known = files()
    if not argv or set(argv[1:]) - set(known):
        sys.exit(f"usage: checkpoints.py OUTDIR [NAME ...]\nnames: {' '.join(known)}")
    for name in argv[1:] or [name for name in known if "-mini" in name or name == "clip-vision"]:
        path = Path(argv[0]) / f"{name}.safetensors"
        known[name](path)
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
