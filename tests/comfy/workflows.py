"""API-format prompts for the tests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from comfy_server import Prompt
from PIL import Image


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sampled(prompt: Prompt, model: Any, clip: Any, vae: Any, **options: Any) -> Prompt:
    """The prompt with a sampler and a preview, nodes "sample" and "image"."""
    size = options.pop("size", 64)
    settings = {
        "seed": 1,
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "ddim",
        "scheduler": "sgm_uniform",
        "denoise": 1.0,
        "positive": ["positive", 0],
        "negative": ["negative", 0],
    }
    return {
        **prompt,
        "positive": node("CLIPTextEncode", text="a red apple", clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sample": node(
            "KSampler", model=model, latent_image=["latent", 0], **{**settings, **options}
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=vae),
        "image": node("PreviewImage", images=["decode", 0]),
    }


def apply(model: Any, vmix: Any, **options: Any) -> dict[str, Any]:
    defaults = {
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "apply_to": "file",
        "blocks": "",
    }
    return node("VMixApply", model=model, vmix=vmix, **{**defaults, **options})


def demo(strength: float = 1.0, aesthetics: str | None = None, **options: Any) -> Prompt:
    """The demo model with VMix applied."""
    prompt = {"demo": node("VMixDemoModel")}
    more = {}
    if aesthetics is not None:
        prompt["aesthetics"] = node("VMixAesthetics", vmix=["demo", 3], aesthetics=aesthetics)
        more["aesthetics"] = ["aesthetics", 0]
    prompt["apply"] = apply(["demo", 0], ["demo", 3], strength=strength, **more)
    return sampled(prompt, ["apply", 0], ["demo", 1], ["demo", 2], **options)


def changed(prompt: Prompt, changes: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """The prompt with other inputs for some nodes."""
    return {
        name: {**entry, "inputs": {**entry["inputs"], **changes.get(name, {})}}
        for name, entry in prompt.items()
    }


def pixels(png: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.float32) / 255
