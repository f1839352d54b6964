"""The U-Net of a pipeline and its cross-attentions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vmix import VMixError

__all__ = ["FUSING", "check_fusing", "cross_attentions", "unet_of", "value_linear"]

FUSING = "VMix adds to the output of attn2.to_v, which fused QKV projections skip"


def unet_of(pipe: Any) -> Any:
    unet = getattr(pipe, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile wraps the module
    if not isinstance(unet, nn.Module):
        raise VMixError(f"expected a pipeline with a U-Net, found {type(pipe).__name__}")
    return unet


def cross_attentions(unet: nn.Module) -> dict[str, Any]:
    """The cross-attentions by diffusers path; motion modules have an `attn2` that is not one."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and getattr(module, "is_cross_attention", False)
    }


def value_linear(attn: Any) -> Any:
    """`to_v` without peft's wrappers, which come and go and leave this layer as it is."""
    linear = attn.to_v
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return linear


def check_fusing(unet: Any, attns: Mapping[str, Any], function: str) -> None:
    """Fused cross-attentions never call their `to_v`.

    The processors tell what is fused: `fused_projections` stays set when diffusers unfuses.
    """

    def fused(processor: Any) -> bool:
        return type(processor).__name__.startswith("Fused")

    if not any(fused(getattr(attn, "processor", None)) for attn in attns.values()):
        return
    # The pipeline's own method knows only what the pipeline fused, and the U-Net's puts back what
    # it last replaced: where that was fused already, the processors before are lost.
    replaced = getattr(unet, "original_attn_processors", None)
    lost = not replaced or any(map(fused, replaced.values()))
    undo = "set_attn_processor(AttnProcessor2_0())" if lost else "unfuse_qkv_projections()"
    raise VMixError(f"{FUSING}: call pipe.unet.{undo} before {function}")
