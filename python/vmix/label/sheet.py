"""Contact sheets: the images of one label at both ends and around the cuts, to judge it by."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from vmix.label.errors import LabelError

COLUMNS, CELL, GAP, EDGE, TEXT = 12, 112, 10, 20, 34
INK, FAINT = "#1f2328", "#656d76"
COLOURS: Mapping[float | None, str] = {0.0: "#cf222e", 1.0: "#1a7f37", None: "#d0d7de"}
MARK = "vmix label"


@dataclass(frozen=True)
class Picture:
    name: str
    score: float
    """Raw."""
    value: float | None
    """The label as it stands; None is unknown, or left out."""
    by_hand: bool


def sections(
    pictures: Sequence[Picture], low: float, high: float, sign: int
) -> list[tuple[str, list[Picture]]]:
    """At most four rows, worst first, no image twice. Images without a score are in none."""
    row = sorted(
        (p for p in pictures if np.isfinite(p.score)), key=lambda p: (sign * p.score, p.name)
    )
    if len(row) <= COLUMNS:
        return [("all, worst first", row)] if row else []
    goodness = np.array([sign * p.score for p in row])
    free = np.ones(len(row), dtype=np.bool_)
    rows = {
        0: ("worst", _take(free, np.arange(len(row)))),
        3: ("best", _take(free, np.arange(len(row))[::-1])),
        1: (f"around the lower cut, {low:.4g}", _take(free, _near(goodness, sign * low))),
        2: (f"around the upper cut, {high:.4g}", _take(free, _near(goodness, sign * high))),
    }
    return [(rows[n][0], [row[i] for i in rows[n][1]]) for n in range(4) if rows[n][1]]


def _near(goodness: NDArray[np.float64], cut: float) -> NDArray[np.int64]:
    """By distance in rank from the cut."""
    ranks = np.arange(len(goodness)) + 0.5 - np.searchsorted(goodness, cut)
    return np.argsort(np.abs(ranks), kind="stable")


def _take(free: NDArray[np.bool_], order: NDArray[np.int64]) -> list[int]:
    taken = [int(index) for index in order if free[index]][:COLUMNS]
    free[taken] = False
    return sorted(taken)


def draw(
    title: str,
    subtitle: str,
    rows: Sequence[tuple[str, Sequence[Picture]]],
    thumbnail: Callable[[str], Image.Image | None],
) -> Image.Image:
    """Frames are red for negative, green for positive, grey for unknown; a pen marks what was
    labelled by hand."""
    head, block = 64, 24 + CELL + TEXT + GAP
    width = 2 * EDGE + COLUMNS * (CELL + GAP) - GAP
    canvas = Image.new("RGB", (width, head + block * len(rows) + EDGE), "white")
    pen = ImageDraw.Draw(canvas)
    large, strong, plain = (_font(size) for size in (17, 13, 11))
    pen.text((EDGE, 24), title, INK, large, anchor="lm")
    pen.text((EDGE, 46), subtitle, FAINT, plain, anchor="lm")
    for number, (name, pictures) in enumerate(rows):
        top = head + number * block
        pen.text((EDGE, top + 12), name, INK, strong, anchor="lm")
        for column, picture in enumerate(pictures):
            x, y = EDGE + column * (CELL + GAP), top + 24
            tile = thumbnail(picture.name)
            if tile is not None:
                tile = ImageOps.pad(tile, (CELL, CELL), color="#eaeef2")
                canvas.paste(tile, (x, y))
            value = picture.value
            colour = COLOURS.get(value, "#9a6700")  # a score between
            pen.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=colour, width=2)
            score = f"{picture.score:.4g}" + (" ✎" if picture.by_hand else "")
            pen.text((x + CELL / 2, y + CELL + 11), score, INK, plain, anchor="mm")
            short = _fitting(picture.name, plain)
            pen.text((x + CELL / 2, y + CELL + 25), short, FAINT, plain, anchor="mm")
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own has little beyond ASCII.
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(file), size)


def _fitting(name: str, font: ImageFont.FreeTypeFont) -> str:
    """Its end, which tells images apart."""
    short = name
    while font.getlength(short) > CELL:
        short = "…" + short.removeprefix("…")[1:]
    return short


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """A PNG's name for each label."""
    names: dict[str, str] = {}
    taken: set[str] = set()  # in lower case, which some file systems take for the same
    for label in labels:
        stem = re.sub(r"[^\w.-]+", "-", label).strip("-.") or "label"
        tries = (f"{stem}{'' if n == 1 else f'-{n}'}.png" for n in count(1))
        names[label] = next(name for name in tries if name.lower() not in taken)
        taken.add(names[label].lower())
    return names


def unwritable(files: Sequence[Path]) -> Iterator[Path]:
    """Those that are somebody else's."""
    for file in files:
        if file.exists():
            try:
                with Image.open(file) as image:
                    ours = image.info.get("Software") == MARK
            except OSError:
                ours = False
            if not ours:
                yield file


def save(image: Image.Image, file: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", MARK)
    new = file.with_name(file.name + ".part")
    image.save(new, format="PNG", pnginfo=info)
    os.replace(new, file)


def check_folder(out: Path, files: Sequence[str]) -> None:
    if out.exists() and not out.is_dir():
        raise LabelError(f"--out {out} is not a folder")
    for file in unwritable([out / name for name in files]):
        raise LabelError(f"{file} is not a contact sheet; --out says where else to write")
