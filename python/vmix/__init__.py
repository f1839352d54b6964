"""VMix aesthetics adapters for Stable Diffusion.

    import torch, vmix

    adapter = vmix.Adapter.open("adapter.safetensors")
    values = adapter.values("vibrant color")                 # V_a of every layer
    v_a = torch.from_dlpack(values["mid_block.attentions.0.transformer_blocks.0.attn2"])

New adapters for a checkpoint: `vmix.init_adapter`. Pipelines of diffusers: see `vmix.diffusers`.
Files: docs/format.md.
"""

from vmix._native import (
    Adapter,
    ClipOutput,
    Label,
    Layer,
    Tensor,
    TextEncoder,
    Tokenizer,
    Values,
    VMixError,
    __version__,
    attention,
    get_num_threads,
    init_adapter,
    ldm_name,
    open,
    read_label_list,
    set_num_threads,
    training_free_adapter,
    unet_layers,
)

__all__ = [
    "Adapter",
    "ClipOutput",
    "Label",
    "Layer",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "VMixError",
    "Values",
    "__version__",
    "attention",
    "get_num_threads",
    "init_adapter",
    "ldm_name",
    "open",
    "read_label_list",
    "set_num_threads",
    "training_free_adapter",
    "unet_layers",
]
