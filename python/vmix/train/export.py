"""The files that training writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vmix import Adapter
from vmix.train.base import Base
from vmix.train.model import ValueBranch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def trained_adapter(
    branch: ValueBranch,
    dtype: torch.dtype,
    apply_to: str,
    trained: Mapping[str, Any],
    modelspec: Mapping[str, str | None],
) -> Adapter:
    """What training made of an adapter so far, checked by the library that will read it."""
    metadata = {
        **branch.metadata,
        "vmix.apply_to": apply_to,
        "vmix.trained": json.dumps(trained),
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **{f"modelspec.{key}": value for key, value in modelspec.items() if value},
    }
    return Adapter.from_tensors(branch.tensors(dtype), metadata)


def save_lora(base: Base, folder: Path, dtype: torch.dtype) -> None:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(base.unet))
    layers = {name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in state.items()}
    type(base.pipe).save_lora_weights(folder, unet_lora_layers=layers)
