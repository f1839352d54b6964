"""The files that training writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmix import ldm_name, unet_layers
from vmix.train.base import Base
from vmix.train.data import LabelSpec
from vmix.train.model import ValueBranch

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1/vmix",
    "sdxl": "stable-diffusion-xl-v1-base/vmix",
    "other": "unet/vmix",
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def base_kind(layers: Mapping[str, int], dim: int) -> str:
    """What the file calls its base; layers are `attn2` paths and their value widths."""
    known = {
        "sd15": (768, unet_layers("sd15")),
        "sdxl": (2048, unet_layers("sdxl")),
    }
    for kind, (context_dim, own) in known.items():
        if dim == context_dim and dict(layers) == {layer.name: layer.inner_dim for layer in own}:
            return kind
    return "other"


def adapter_file(
    branch: ValueBranch,
    aes_emb: Tensor,
    labels: Sequence[LabelSpec],
    layers_per_block: int,
    apply_to: str,
    trained: Mapping[str, Any],
    modelspec: Mapping[str, str],
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the adapter file, as docs/format.md lays it out."""
    tensors = {"aes_emb": aes_emb.float().cpu(), **branch.tensors()}
    tokens, dim = branch.linear.out_features, aes_emb.shape[2]
    own = zip(branch.names, branch.to_v_aes, strict=True)
    layers = {name: len(to_v.get_parameter("weight")) for name, to_v in own}
    kind = base_kind(layers, dim)
    metadata = {
        "vmix.format": "1",
        "vmix.kind": "adapter",
        "vmix.base": kind,
        "vmix.labels": json.dumps([label.as_metadata() for label in labels], ensure_ascii=False),
        "vmix.context_tokens": str(tokens),
        "vmix.context_dim": str(dim),
        "vmix.feature": "context_eot",
        "vmix.norm_eps": str(branch.norm.eps),
        "vmix.projection": "learned",
        "vmix.value_weights": "own",
        "vmix.apply_to": apply_to,
        "vmix.trained": json.dumps(trained),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[kind],
        "modelspec.implementation": "diffusers",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **{f"modelspec.{key}": value for key, value in modelspec.items() if value},
    }
    if kind == "other":
        names = {name: ldm_name(name, layers_per_block) for name in branch.names}
        metadata["vmix.ldm_names"] = json.dumps(names)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, metadata


def save_lora(base: Base, folder: Path, dtype: torch.dtype) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(base.unet))
    layers = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in state.items()}
    type(base.pipe).save_lora_weights(folder, unet_lora_layers=layers)
