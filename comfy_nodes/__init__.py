"""VMix nodes for ComfyUI: aesthetic labels as sliders, mixed into the values of cross-attention."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    # Imported here: everything but nodes.py and demo_model.py works without ComfyUI.
    from .nodes import VMixExtension

    return VMixExtension()
