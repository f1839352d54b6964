"""Pictures while training: prompts × (the base, every λ, every label), through what users call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vmix import Adapter
from vmix.diffusers import load_vmix, set_vmix_scale, unload_vmix
from vmix.train.base import Base

TILE, GAP = 256, 8


class Validation:
    """The base's pictures are made once; the others at every call, with the same noise."""

    def __init__(self, base: Base, prompts: Sequence[str], args: argparse.Namespace) -> None:
        self.base, self.prompts, self.args = base, list(prompts), args
        self.without: list[Image.Image] | None = None

    def begin(self) -> None:
        """The base's pictures, where the U-Net will not be the base later."""
        self.without = self.without or self._pictures(lora=False)

    def grid(self, adapter: Adapter | None) -> Image.Image:
        """One row a prompt. Without an adapter (a LoRA alone) the U-Net as it is."""
        base, args = self.base, self.args
        device = base.pipe.vae.device
        base.place_encoders(base.device)
        try:
            self.begin()
            columns = [("base", self.without or [])]
            if adapter is None:
                columns.append(("trained", self._pictures(lora=True)))
            else:
                load_vmix(base.pipe, adapter, "all")
                for scale in args.validation_scales:
                    set_vmix_scale(base.pipe, scale)
                    columns.append((f"all, strength {scale:g}", self._pictures(lora=False)))
                unload_vmix(base.pipe)
                for label in adapter.labels if len(adapter.labels) > 1 else ():
                    load_vmix(base.pipe, adapter, label.name)
                    columns.append((label.name, self._pictures(lora=False)))
                    unload_vmix(base.pipe)
        finally:
            base.place_encoders(device)
        return sheet(columns, self.prompts)

    @torch.no_grad()
    def _pictures(self, lora: bool) -> list[Image.Image]:
        base, args = self.base, self.args
        side = args.resolution or base.resolution
        with nullcontext() if lora else base.without_lora():
            pictures = []
            for number, prompt in enumerate(self.prompts):
                random = torch.Generator().manual_seed(args.seed + number)
                with torch.autocast(base.device.type, base.dtype, base.dtype != torch.float32):
                    latents = base.pipe(
                        prompt,
                        height=side,
                        width=side,
                        generator=random,
                        num_inference_steps=args.validation_inference_steps,
                        guidance_scale=args.validation_guidance,
                        output_type="latent",
                    ).images
                pictures += base.pictures(latents)
            return pictures


def sheet(columns: Sequence[tuple[str, Sequence[Image.Image]]], rows: Sequence[str]) -> Image.Image:
    """Pictures under their titles, the prompt above each row."""
    font = ImageFont.load_default(14)
    line = 24
    width = GAP + len(columns) * (TILE + GAP)
    height = line + GAP + len(rows) * (line + TILE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (title, pictures) in enumerate(columns):
        x = GAP + column * (TILE + GAP)
        draw.text((x, 6), title, "black", font)
        for row, picture in enumerate(pictures):
            y = line + GAP + row * (line + TILE + GAP)
            if column == 0:
                draw.text((x, y + 2), rows[row], "#656d76", font)
            tile = picture.copy()
            tile.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
            if max(picture.size) < TILE:
                factor = TILE / max(picture.size)
                size = (round(picture.width * factor), round(picture.height * factor))
                tile = picture.resize(size, Image.Resampling.BICUBIC)
            canvas.paste(tile, (x, y + line))
    return canvas


def save_grid(image: Image.Image, folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}.png"
    part = path.with_suffix(".part")
    try:
        image.save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def log_grid(trackers: Sequence[Any], image: Image.Image, step: int) -> None:
    for tracker in trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(image)
            tracker.writer.add_image("validation", pixels, step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(image)}, step=step)
