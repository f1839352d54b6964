"""One image's numbers: its bytes read once, decoded once, measured at the scale that fits.

Colour, light and placement hardly depend on scale and are measured on the whole image, shrunk to
512 pixels. Sharpness does depend on it: a soft photograph of 24 megapixels is sharp when shrunk,
and an enlarged thumbnail is soft. What counts is what training sees, so it is measured at the
training resolution: scaled to cover it, up or down, as the trainer does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vmix import measures
from vmix.dataset import Example, on_white

SIDE = 512
WIDEST = 2.0
"""Aspect at which the trainer crops."""

WHOLE: Mapping[str, Callable[[Any], Any]] = {
    "colourfulness": measures.colourfulness,
    "brightness": measures.brightness,
    "off-centre": measures.off_centre,
    "coverage": measures.coverage,
}
DETAIL: Mapping[str, Callable[[Any], Any]] = {
    "sharpness": measures.sharpness,
    "laplacian-variance": measures.laplacian_variance,
}
"""At the training resolution, which their key names: `sharpness@512`."""


@dataclass(frozen=True)
class Wanted:
    """Keys of pixel measures, and whether learned ones want to see the image."""

    keys: tuple[str, ...] = ()
    seen: bool = False


@dataclass(frozen=True)
class Task:
    example: Example
    digest: str | None
    """Of the image that there are scores of."""
    missing: Wanted
    """What these lack."""
    all: Wanted
    """What another image needs."""


@dataclass(frozen=True)
class Look:
    """What one image gave."""

    scores: Mapping[str, float]
    image: Image.Image | None
    """Shrunk, where it is to be seen."""
    digest: str
    same: bool
    """Whether it is the image that there were scores of."""


def key_of(measure: str, resolution: int) -> str:
    return f"{measure}@{resolution}" if measure in DETAIL else measure


def look(task: Task) -> Look:
    """OSError and ValueError say why the image cannot be read."""
    data = task.example.read()
    digest = hashlib.sha256(data).hexdigest()[:16]
    same = digest == task.digest
    wanted = task.missing if same else task.all
    if not wanted.keys and not wanted.seen:
        return Look({}, None, digest, same)
    sides = [int(key.partition("@")[2] or SIDE) for key in wanted.keys]
    image = opened(data, max([SIDE, *sides]))
    seen = _shrunk(image, min(image.size)) if wanted.seen else None
    return Look(measured(image, wanted.keys), seen, digest, same)


def opened(data: bytes, least: int) -> Image.Image:
    """As viewers show it, on white: what the trainer sees. A JPEG may be decoded smaller, which is
    quicker, with both sides still twice as long as `least`. ValueError says why it is no image."""
    try:
        with Image.open(BytesIO(data)) as file:
            file.draft(None, (2 * least, 2 * least))
            image = ImageOps.exif_transpose(file)
            image.load()
        return on_white(image)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"not an image: {error}") from error


def measured(image: Image.Image, keys: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    arrays: dict[int, Any] = {}
    for key in keys:
        name, _, resolution = key.partition("@")
        side = int(resolution or 0)
        if side not in arrays:
            scaled = _covering(image, side) if side else np.asarray(_shrunk(image, max(image.size)))
            arrays[side] = scaled.astype(np.float64) / 255
        found[key] = float((DETAIL if side else WHOLE)[name](arrays[side]))
    return found


def _shrunk(image: Image.Image, length: int) -> Image.Image:
    """So that what is `length` pixels long becomes SIDE, if it is longer."""
    scale = SIDE / length
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _covering(image: Image.Image, side: int) -> NDArray[Any]:
    """[H, W, 3] in 0..255."""
    aspect = min(WIDEST, max(1 / WIDEST, image.width / image.height))
    size = (round(side * max(1.0, aspect)), round(side * max(1.0, 1 / aspect)))
    if min(image.size) >= side:
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
    # In floats: steps of 1/255 are all the detail that there is between enlarged pixels.
    bands = (band.convert("F") for band in image.split())
    enlarged = [np.asarray(ImageOps.fit(band, size, Image.Resampling.LANCZOS)) for band in bands]
    return np.stack(enlarged, axis=-1)
