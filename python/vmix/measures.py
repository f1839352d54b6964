"""What a picture looks like, in numbers: measures of images `[..., H, W, 3]` in 0..1.

Every function takes one image or a batch and returns an array of the leading shape. They serve to
check what labels do; they are not judges of beauty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])

HUE_BANDS: Mapping[str, tuple[float, float]] = {
    "red": (345.0, 17.0),
    "orange": (17.0, 40.0),
    "yellow": (40.0, 68.0),
    "green": (68.0, 165.0),
    "blue": (165.0, 255.0),
    "purple": (255.0, 300.0),
    "pink": (300.0, 345.0),
}
"""Hues, in degrees, that a colour word stands for; the bands share out the circle."""


def colourfulness(images: ArrayLike) -> Array:
    """Hasler and Süsstrunk's M3 (2003): spread and mean of the opponent colours, 0..1 scale."""
    red, green, blue = np.moveaxis(_images(images), -1, 0)
    axes = (-2, -1)
    first, second = red - green, 0.5 * (red + green) - blue
    spread = np.sqrt(first.var(axes) + second.var(axes))
    return _array(spread + 0.3 * np.hypot(first.mean(axes), second.mean(axes)))


def brightness(images: ArrayLike) -> Array:
    """Mean luma (Rec. 601) of the picture, background included."""
    return _array(luma(images).mean((-2, -1)))


def laplacian_variance(images: ArrayLike) -> Array:
    """Variance of the Laplacian of luma in 0..255, the usual measure of focus.

    It grows with exposure and contrast too; `sharpness` does not.
    """
    y = 255 * luma(images)
    laplacian = (
        y[..., :-2, 1:-1]
        + y[..., 2:, 1:-1]
        + y[..., 1:-1, :-2]
        + y[..., 1:-1, 2:]
        - 4 * y[..., 1:-1, 1:-1]
    )
    return _array(laplacian.var((-2, -1)))


def sharpness(images: ArrayLike) -> Array:
    """Standard deviation of the Laplacian relative to that of luma: free of exposure and contrast.

    A flat picture has none: 0.
    """
    contrast = 255 * luma(images).std((-2, -1))
    flat = contrast < 1e-4
    detail = np.sqrt(laplacian_variance(images))
    return _array(np.where(flat, 0.0, detail / np.where(flat, 1.0, contrast)))


def off_centre(images: ArrayLike) -> Array:
    """Distance of the object's centroid from the centre, as a fraction of the half-size.

    0 is centred, 1 the middle of a border. NaN where there is no object to be seen.
    """
    weight = foreground(images)
    height, width = weight.shape[-2:]
    total = weight.sum((-2, -1))
    safe = np.where(total > 0, total, np.nan)
    rows = (np.arange(height) + 0.5) / height * 2 - 1
    columns = (np.arange(width) + 0.5) / width * 2 - 1
    y = (weight.sum(-1) * rows).sum(-1) / safe
    x = (weight.sum(-2) * columns).sum(-1) / safe
    return _array(np.hypot(x, y))


def coverage(images: ArrayLike) -> Array:
    """Share of the picture that the object takes: the size of its soft mask."""
    return _array(foreground(images).mean((-2, -1)))


def foreground(images: ArrayLike) -> Array:
    """Soft mask `[..., H, W]` of what differs from the background, the median of the border.

    Relative to the strongest difference in the picture, so that a darkened picture keeps its
    object; below a quarter of it is background (noise, gradients, blur), above half is object.
    """
    pixels = _images(images)
    border = np.concatenate(
        [
            pixels[..., 0, :, :],
            pixels[..., -1, :, :],
            pixels[..., 1:-1, 0, :],
            pixels[..., 1:-1, -1, :],
        ],
        axis=-2,
    )
    background = np.median(border, axis=-2)[..., None, None, :]
    distance = np.linalg.norm(pixels - background, axis=-1)
    strongest = np.quantile(distance, 0.98, axis=(-2, -1))[..., None, None]
    visible = strongest > 0.02
    ratio = distance / np.where(visible, strongest, 1.0)
    return _array(np.where(visible, np.clip(4 * ratio - 1, 0, 1), 0.0))


def main_hue(images: ArrayLike) -> Array:
    """Centre, in degrees, of the 30-degree band of hues that has most of the object's chroma."""
    pixels = _images(images)
    hue, chroma = hue_and_chroma(pixels)
    weight = (foreground(pixels) * chroma).reshape(-1, pixels.shape[-3] * pixels.shape[-2])
    index = (hue.reshape(weight.shape) // 10).astype(int) % 36
    histogram = np.stack(
        [np.bincount(i, w, minlength=36) for i, w in zip(index, weight, strict=True)]
    )
    band = histogram + np.roll(histogram, 1, axis=1) + np.roll(histogram, -1, axis=1)
    centre = np.where(band.max(1) > 0, band.argmax(1) * 10.0 + 5.0, np.nan)
    return _array(centre.reshape(pixels.shape[:-3]))


def hue_matches(images: ArrayLike, word: str, tolerance: float = 10.0) -> NDArray[np.bool_]:
    """Whether the object's main hue is one that the colour word stands for.

    The measure of text fidelity. The band of the word is widened by the tolerance on either side.
    """
    start, end = HUE_BANDS[word]
    start, width = start - tolerance, (end - start) % 360 + 2 * tolerance
    with np.errstate(invalid="ignore"):
        return np.asarray((main_hue(images) - start) % 360 <= width, dtype=np.bool_)


def luma(images: ArrayLike) -> Array:
    return _array(_images(images) @ LUMA)


def hue_and_chroma(images: ArrayLike) -> tuple[Array, Array]:
    """Hue in degrees and chroma (largest minus smallest channel) of every pixel."""
    pixels = _images(images)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    largest = pixels.max(-1)
    chroma = largest - pixels.min(-1)
    safe = np.where(chroma > 0, chroma, 1.0)
    sector = np.select(
        [largest == red, largest == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    return _array(sector * 60), _array(chroma)


def _images(images: ArrayLike) -> Array:
    pixels = np.asarray(images)
    if pixels.ndim < 3 or pixels.shape[-1] != 3:
        raise ValueError(f"expected images of shape [..., H, W, 3], got {list(pixels.shape)}")
    if pixels.dtype.kind != "f":
        raise ValueError(f"expected floats in 0..1, got {pixels.dtype}")
    return pixels.astype(np.float64)


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


MEASURES: Mapping[str, Callable[[ArrayLike], Array]] = {
    "colourfulness": colourfulness,
    "brightness": brightness,
    "sharpness": sharpness,
    "off-centre": off_centre,
}
"""The measures that the demo's four labels are expected to move, in the order of the labels."""
