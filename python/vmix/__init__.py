"""VMix aesthetics adapters for Stable Diffusion.

    import torch, vmix

    adapter = vmix.Adapter.open("adapter.safetensors")
    values = adapter.values("vibrant color")                 # V_a of every layer
    v_a = torch.from_dlpack(values["mid_block.attentions.0.transformer_blocks.0.attn2"])

Pipelines of diffusers: see `vmix.diffusers`. Files: docs/format.md.
"""

from vmix._native import (
    Adapter,
    Label,
    Layer,
    Tensor,
    Values,
    VMixError,
    __version__,
    attention,
    ldm_name,
    open,
    unet_layers,
)

__all__ = [
    "Adapter",
    "Label",
    "Layer",
    "Tensor",
    "VMixError",
    "Values",
    "__version__",
    "attention",
    "ldm_name",
    "open",
    "unet_layers",
]
