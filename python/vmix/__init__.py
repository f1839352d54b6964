"""VMix aesthetics adapters for Stable Diffusion.

    import torch, vmix

    adapter = vmix.Adapter.open("adapter.safetensors")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    a = torch.from_dlpack(adapter.coefficients({"vibrant color": 1.0}))  # A [C, R]
    v_a = a @ torch.from_dlpack(adapter.rows[layer]).float()             # V_a [C, inner_dim]
    values = adapter.values("vibrant color")                             # V_a of every layer

Pipelines of diffusers: see `vmix.diffusers`. Files: docs/format.md.
"""

from vmix._native import (
    Adapter,
    ClipOutput,
    Label,
    Layer,
    Rows,
    Tensor,
    TextEncoder,
    Tokenizer,
    Untrained,
    Values,
    VMixError,
    __version__,
    attention,
    get_num_threads,
    init_adapter,
    ldm_name,
    merge_adapters,
    open,
    read_label_list,
    set_num_threads,
    unet_layers,
)

__all__ = [
    "Adapter",
    "ClipOutput",
    "Label",
    "Layer",
    "Rows",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "Untrained",
    "VMixError",
    "Values",
    "__version__",
    "attention",
    "get_num_threads",
    "init_adapter",
    "ldm_name",
    "merge_adapters",
    "open",
    "read_label_list",
    "set_num_threads",
    "unet_layers",
]
