"""Four aesthetic labels as image transforms: one picture, sixteen looks.

Each label has a positive and a negative look, and the four are nearly independent of one another
(saturation, exposure, sharpness, placement), so what an adapter learns for one label can be told
apart from the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS: tuple[str, ...] = (
    "vibrant color",
    "natural lighting",
    "sharp focus",
    "balanced composition",
)
# What captions call each label's positive and its negative look.
LOOK_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vibrant color": (("vivid", "vibrant color", "colorful"), ("dull", "muted", "faded")),
    "natural lighting": (
        ("bright", "natural lighting", "well lit"),
        ("dark", "dim", "underexposed"),
    ),
    "sharp focus": (("sharp", "sharp focus", "crisp"), ("blurry", "blurred", "out of focus")),
    "balanced composition": (
        ("centered", "balanced composition", "close-up"),
        ("off-center", "small", "in a corner"),
    ),
}
SIZE = 64
BACKGROUND = 0.97  # near-white paper; darkened and blurred along with the object
_LUMA = (0.299, 0.587, 0.114)


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def place(
    image_rgba: Tensor, balanced: bool, generator: torch.Generator | None, size: int = SIZE
) -> Tensor:
    """Composite [4,H,W] on paper: large and centred, or small and off to a corner."""
    edge = round(
        size * (_uniform(0.86, 0.94, generator) if balanced else _uniform(0.48, 0.58, generator))
    )
    free = size - edge
    if balanced:
        left, top = (round(free / 2 + _uniform(-1.0, 1.0, generator)) for _ in range(2))
    else:
        # 0..18 % of the free room from either side: clearly off centre, never cut off.
        left, top = (
            round(free * (near if _uniform(0, 1, generator) < 0.5 else 1 - near))
            for near in (_uniform(0.0, 0.18, generator), _uniform(0.0, 0.18, generator))
        )
    colour, alpha = image_rgba[:3], image_rgba[3:]
    stack = torch.cat([colour * alpha, alpha])[None]  # premultiplied: no dark fringes
    small = F.interpolate(
        stack, (edge, edge), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
    canvas = torch.full((3, size, size), BACKGROUND)
    window = canvas[:, top : top + edge, left : left + edge]
    window.mul_(1 - small[3:]).add_(small[:3])
    return canvas


def saturate(image: Tensor, factor: float) -> Tensor:
    """Scale the distance from grey at constant luma."""
    luma = (image * image.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True)
    return (luma + (image - luma) * factor).clamp(0, 1)


def expose(image: Tensor, factor: float) -> Tensor:
    return (image * factor).clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian with the border repeated."""
    radius = int(3 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=image.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(image[None], (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=3)
    return F.conv2d(rows, kernel[:, :, :, None], groups=3)[0]


def render(
    image_rgba: Tensor,
    labels: Mapping[str, bool | int],
    generator: torch.Generator | None = None,
    size: int = SIZE,
) -> Tensor:
    """Draw one [4,H,W] picture in 0..1 with the given look as [3,size,size] in 0..1."""
    image = place(image_rgba, bool(labels["balanced composition"]), generator, size)
    vibrant = bool(labels["vibrant color"])
    image = saturate(
        image, _uniform(1.15, 1.4, generator) if vibrant else _uniform(0.15, 0.3, generator)
    )
    if not labels["natural lighting"]:
        image = expose(image, _uniform(0.35, 0.45, generator))
    if not labels["sharp focus"]:
        image = blur(image, _uniform(1.5, 2.0, generator))
    return image
