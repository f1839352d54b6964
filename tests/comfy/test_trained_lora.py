"""The LoRA that the trainer writes beside an adapter, as ComfyUI's own loader reads it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_comfyui_takes_every_layer(
    base: str, comfyui: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every tensor ends as a patch of a weight that the base has; ComfyUI logs what it leaves."""
    pytest.importorskip("peft")
    import checkpoints
    import comfy.lora
    import comfy.utils
    from diffusers import UNet2DConditionModel
    from vmix.train import export
    from vmix.train.model import add_lora
    from vmix.train.single_file import CONFIGS

    config = json.loads((CONFIGS / base / "unet" / "config.json").read_text("utf-8"))
    config["block_out_channels"] = [32] * len(config["block_out_channels"])  # the names are meant
    config["attention_head_dim"] = 4
    unet = UNet2DConditionModel.from_config(config)
    add_lora(unet, 2)
    trained = SimpleNamespace(unet=unet)
    export.save_lora(trained, tmp_path / "lora.safetensors", torch.float16, main=True)  # type: ignore[arg-type]
    lora = comfy.utils.load_torch_file(str(tmp_path / "lora.safetensors"))
    shape = SimpleNamespace(unet_config={"in_channels": 4, **checkpoints.UNETS[base]})
    model = SimpleNamespace(model_config=shape, state_dict=dict)
    keys = comfy.lora.model_lora_keys_unet(model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(lora, keys)
    assert "not loaded" not in caplog.text
    assert 3 * len(patches) == len(lora), "down, up and alpha"
