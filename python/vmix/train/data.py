"""The images that are trained on: which of a set are usable, and how they become tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vmix.dataset import FLOATS, UNREADABLE, DatasetError, Example, on_white, read_dataset
from vmix.train.errors import TrainingError, complain

UNKNOWN = 0.5
"""The weight of a label that is unknown: half way between its positive and its negative."""
MAX_ASPECT = 2.0
_HEADER = 2**16  # bytes

REMEDIES = {
    "no caption": "expected a .txt beside each, or metadata.jsonl with `text`",
    "no aesthetics": "`vmix label` proposes some",
}
"""For what whole sets lack."""

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Usable:
    """An image with all that training asks: caption, a weight for every label, the size it has."""

    example: Example
    caption: str
    weights: tuple[float, ...]
    size: Size


def usable_images(
    path: Path,
    labels: Sequence[str],
    *,
    missing: str = "negative",
    skip: bool = False,
    verify: bool = False,
    say: Callable[[str], object] = print,
) -> list[Usable]:
    """The set's images, and a report of what it holds. What is missing, unreadable or unlabelled
    is listed and ends the training, or with `skip` is left out."""
    try:
        data = read_dataset(path)
    except (DatasetError, OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"--train_data_dir {error}") from error
    problems = [f"{place}: {what}" for place, what in data.problems]
    found: list[Usable] = []
    known = set(labels)
    fallback = 0.0 if missing == "negative" else None
    counts = {name: Counter[str]() for name in labels}
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(lambda example: _size(example, verify), data.examples)
        for example, size in zip(data.examples, sizes, strict=True):
            trouble = []
            if isinstance(size, str):
                trouble.append(size)
            elif example.caption is None:
                trouble.append("no caption")
            if labels and not example.aesthetics and not isinstance(size, str):
                trouble.append("no aesthetics")
            elif labels:
                unknown = sorted(set(example.aesthetics) - known)
                trouble += [f"unknown label '{name}'" for name in unknown]
            if trouble or isinstance(size, str) or example.caption is None:
                problems += [f"{example.key}: {what}" for what in trouble]
                continue
            weights = []
            for name in labels:
                value = example.aesthetics.get(name, fallback)
                weights.append(UNKNOWN if value is None else value)
                counts[name][_kind(value)] += 1
            found.append(Usable(example, example.caption, tuple(weights), size))
    for what, remedy in REMEDIES.items():  # one cause for all is one sentence
        alike = [problem for problem in problems if problem.endswith(f": {what}")]
        if len(alike) > 3 and len(alike) >= 0.9 * len(data.examples):
            problems = [f"{len(alike)} images: {what}; {remedy}"] + [
                problem for problem in problems if problem not in set(alike)
            ]
    say(_report(path, len(data.examples), found, counts, problems if skip else []))
    same = [
        f"label '{name}' is the same in every image, nothing to learn from"
        for index, name in enumerate(labels)
        if found and len({image.weights[index] for image in found}) == 1
    ]
    if not found:
        problems.append("no usable image")
    if not skip or not found or same:
        if not skip and problems and found:
            problems.append("(--skip_unusable trains on the rest)")
        complain(str(path), [*same, *problems])
    return found


def _kind(value: float | None) -> str:
    if value is None:
        return "unknown"
    return {1.0: "positive", 0.0: "negative"}.get(value, "score")


def _report(
    path: Path,
    count: int,
    found: Sequence[Usable],
    counts: dict[str, Counter[str]],
    problems: Sequence[str],
) -> str:
    lines = [f"{path}: {count} images, {len(found)} usable"]
    lines += [f"  not used: {problem}" for problem in problems[:10]]
    lines += [f"  … and {len(problems) - 10} more"] if len(problems) > 10 else []
    if counts and found:
        width = max(map(len, counts))
        kinds = ("positive", "negative", "score", "unknown")
        lines.append(f"  {'label':<{width}}" + "".join(f"{kind:>10}" for kind in kinds))
        for name, tally in counts.items():
            lines.append(f"  {name:<{width}}" + "".join(f"{tally[kind]:>10}" for kind in kinds))
    return "\n".join(lines)


def _size(example: Example, verify: bool) -> Size | str:
    """Height and width as viewers show it, or what is wrong."""
    if example.missing:
        return f"no such image: {example.file}"
    error: BaseException | None = None
    for limit in (None,) if verify or example.size is None else (_HEADER, None):
        try:
            with example.open(limit) as image:
                if verify:
                    image.load()
                if image.mode == "F":
                    return FLOATS
                return image.size if _turned(image) else (image.height, image.width)
        except UNREADABLE as failure:
            error = failure
    return f"not an image: {error}"


def _turned(image: Image.Image) -> bool:
    """Whether viewers show it with height and width exchanged."""
    if image.format == "TIFF":  # which Pillow turns by itself, its size at once or not
        return ImageOps.exif_transpose(image).size != image.size
    if image.format == "PNG":  # of which getexif() decodes all pixels
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
    else:
        exif = image.getexif()
    return exif.get(0x0112, 1) in (5, 6, 7, 8)


def buckets(resolution: int, step: int, max_aspect: float = MAX_ASPECT) -> list[Size]:
    """Shapes whose sides are multiples of `step` and whose area is at most the resolution's."""
    found = set()
    for width in range(step, int(resolution * math.sqrt(max_aspect)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width / height, height / width) <= max_aspect:
            found |= {(height, width), (width, height)}
    return sorted(found) or [(resolution, resolution)]


def nearest_bucket(size: Size, shapes: Sequence[Size]) -> Size:
    """The one that loses least of the image; of equals the largest."""
    ratio = math.log(size[0] / size[1])
    return min(shapes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - ratio), 9), -s[0] * s[1]))


def to_pixels(example: Example, shape: Size) -> tuple[Tensor, Tensor]:
    """The image in -1..1 on white, scaled to cover the shape and cropped at the centre; and SDXL's
    sizes: height and width as it was, top and left of the crop, height and width as it is."""
    try:
        with example.open() as file:
            image = ImageOps.exif_transpose(file)  # as viewers show it
            image = on_white(image)
    except UNREADABLE as error:
        raise TrainingError(f"{example.key} cannot be read: {error}") from error
    original = (image.height, image.width)
    height, width = shape
    scale = max(height / image.height, width / image.width)
    large = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if large != image.size:
        image = image.resize(large, Image.Resampling.LANCZOS)
    left, top = (large[0] - width) // 2, (large[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels / 127.5 - 1, torch.tensor([*original, top, left, *shape], dtype=torch.float32)
