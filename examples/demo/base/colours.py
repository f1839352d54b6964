"""Colour words from pixels, and hue rotation, so that words and pictures always agree."""

from __future__ import annotations

import torch
from torch import Tensor

# Hue in degrees that a rotated picture's main hue is moved to.
TARGET_HUES: tuple[float, ...] = (0.0, 28.0, 52.0, 120.0, 215.0, 275.0, 322.0)
WORDS: tuple[str, ...] = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white",
)  # fmt: skip
_HUE_ENDS = torch.tensor([17.0, 40.0, 68.0, 165.0, 255.0, 300.0, 345.0])


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[3,H,W] in 0..1 to hue in degrees, saturation and value, each [H,W]."""
    value, which = rgb.max(0)
    chroma = value - rgb.min(0).values
    r, g, b = rgb
    safe = chroma.clamp(min=1e-6)
    sectors = torch.stack([((g - b) / safe) % 6, (b - r) / safe + 2, (r - g) / safe + 4])
    hue = sectors.gather(0, which[None])[0] * 60
    return hue, chroma / value.clamp(min=1e-6), value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    def channel(n: float) -> Tensor:
        k = (n + hue / 60) % 6
        return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)])


def colour_word(image_rgba: Tensor) -> str | None:
    """The word most opaque pixels vote for; None where no colour has a fair share."""
    hue, saturation, value = rgb_to_hsv(image_rgba[:3])
    word = torch.bucketize(hue.contiguous(), _HUE_ENDS) % 7
    reddish = (word == 0) | (word == 6)
    pale = reddish & (saturation < 0.55) & (value > 0.75)
    dull = ((word == 1) & (value < 0.72)) | ((word == 0) & (value < 0.62) & (saturation < 0.75))
    word = torch.where(pale, 6, torch.where(dull, 7, word))
    grey = saturation < 0.18
    word = torch.where(grey, torch.where(value > 0.82, 10, 9), word)
    word = torch.where((value < 0.3) | (grey & (value < 0.4)), 8, word)
    votes = torch.zeros(len(WORDS)).index_add_(0, word.flatten(), image_rgba[3].flatten())
    share, index = (votes / votes.sum()).max(0)
    return WORDS[int(index)] if float(share) >= 0.3 else None


def main_hue(image_rgba: Tensor) -> tuple[float, float]:
    """Centre of the strongest 30-degree band of hues, and the coloured share of the object."""
    hue, saturation, value = rgb_to_hsv(image_rgba[:3])
    alpha = image_rgba[3]
    weight = alpha * saturation * value
    bins = torch.zeros(36).index_add_(0, (hue / 10).long().flatten() % 36, weight.flatten())
    bands = bins + bins.roll(1) + bins.roll(-1)
    share = float((alpha * (saturation > 0.3)).sum() / alpha.sum())
    return int(bands.argmax()) * 10.0 + 5.0, share


def rotate_hue(image_rgba: Tensor, degrees: float) -> Tensor:
    hue, saturation, value = rgb_to_hsv(image_rgba[:3])
    return torch.cat([hsv_to_rgb((hue + degrees) % 360, saturation, value), image_rgba[3:]])
