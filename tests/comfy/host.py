"""A real ComfyUI in this process, and its nodes as plain functions.

It is looked for in COMFYUI_PATH, then in ~/comfy/ComfyUI, and runs on the CPU. Where it is not, or
where this Python lacks what it needs, `missing` says so and tests skip with that sentence.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Not Path.home(), which is an error for users that have none.
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or os.path.expanduser("~/comfy/ComfyUI")).resolve()
# Installed as users have it, or beside ComfyUI, where only the tests that want it see it.
_INSTALLED = COMFYUI / "custom_nodes" / "ComfyUI_IPAdapter_plus"
IP_ADAPTER_PLUS = _INSTALLED if _INSTALLED.exists() else COMFYUI.parent / _INSTALLED.name
# The package layout of the installable distribution, and the flat one of the original.
PACKAGED = (COMFYUI / "comfy" / "cmd" / "folder_paths.py").exists()


def _missing() -> str:
    if not (COMFYUI / "comfy" / "sd.py").exists():
        return f"no ComfyUI at {COMFYUI} (set COMFYUI_PATH)"
    try:
        for name in ("torchsde", "aiohttp", "einops", "torch", "vmix"):
            importlib.import_module(name)
    except ImportError as error:
        return f"this Python cannot run ComfyUI ({error}); `make test-comfy` has one that can"
    return ""


missing = _missing()

if not missing:
    sys.path[:0] = [str(ROOT), str(COMFYUI)]
    if PACKAGED:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.cmd.folder_paths
        import comfy.cmd.latent_preview
        import comfy.node_helpers
        import comfy.nodes.base_nodes

        # What that distribution does before it imports custom nodes.
        sys.modules["folder_paths"] = comfy.cmd.folder_paths
        sys.modules["latent_preview"] = comfy.cmd.latent_preview
        sys.modules["node_helpers"] = comfy.node_helpers
        sys.modules["nodes"] = comfy.nodes.base_nodes
    else:
        from comfy.cli_args import args

        args.cpu = True


def call(module: str, node: str, **inputs: Any) -> tuple[Any, ...]:
    """Runs a node of either schema and returns its outputs."""
    if PACKAGED:
        module = module.replace("comfy_extras.", "comfy_extras.nodes.")
    return run_node(getattr(importlib.import_module(module), node), **inputs)


def run_node(node: Any, **inputs: Any) -> tuple[Any, ...]:
    if hasattr(node, "GET_SCHEMA"):
        return tuple(node.EXECUTE_NORMALIZED(**inputs).args)
    return tuple(getattr(node(), node.FUNCTION)(**inputs))


def ip_adapter_plus() -> Any:
    """The module of cubiq/ComfyUI_IPAdapter_plus, or None where it is not."""
    if not (IP_ADAPTER_PLUS / "IPAdapterPlus.py").exists():
        return None
    if str(IP_ADAPTER_PLUS.parent) not in sys.path:
        sys.path.append(str(IP_ADAPTER_PLUS.parent))
    return importlib.import_module(f"{IP_ADAPTER_PLUS.name}.IPAdapterPlus")
