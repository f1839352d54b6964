"""Pictures side by side under their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8
PAPER, INK = "white", "#1f2328"

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_row(captions: Sequence[str], columns: Sequence[Tensor]) -> Tensor:
    """One image [1, H, W, 3] of columns [B, h, w, 3] in 0..1; every batch entry is a row."""
    rows, height, width = columns[0].shape[:3]
    size = max(11, min(28, width // 12))
    font = ImageFont.load_default(size)
    lines = [_wrapped(caption, font, width) for caption in captions]
    top = GAP + max(map(len, lines)) * round(size * 1.3)
    page = Image.new(
        "RGB",
        (len(columns) * (width + GAP) + GAP, top + rows * (height + GAP) + GAP // 2),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    for i, (text, images) in enumerate(zip(lines, columns, strict=True)):
        left = GAP + i * (width + GAP)
        for k, line in enumerate(text):
            middle = left + width / 2
            draw.text((middle, GAP / 2 + k * size * 1.3), line, INK, font, anchor="ma")
        for row, image in enumerate(images):
            pixels = (image[..., :3].float().clamp(0, 1) * 255).round().to(torch.uint8)
            page.paste(
                Image.fromarray(pixels.cpu().numpy()), (left, top + row * (height + GAP) + GAP // 2)
            )
    return torch.from_numpy(np.asarray(page).astype(np.float32) / 255)[None]


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Whole words per line, as many as fit."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
