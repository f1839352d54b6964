"""The plots: measures against λ (the paper's figure 7), and prompts by rows."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vmix.eval.errors import EvalError, one_line
from vmix.eval.metrics import BETTER
from vmix.eval.pictures import Gallery
from vmix.eval.rows import Row

COLOURS = ("#0969da", "#bf3989", "#1a7f37", "#bc4c00")
GREY, RULE = "#8c959f", "#eaeef2"
INK, LINE = "#1f2328", "#d0d7de"
CELL, GAP, LEFT, TOP = 128, 8, 168, 62
PROMPTS, ROWS, ACROSS = 8, 12, 5


def plot_sweeps(
    sweeps: Sequence[Sequence[Row]], levels: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Every column against λ; bands are 95 % intervals."""
    columns = list(levels[sweeps[0][0].name])
    down = -(-len(columns) // ACROSS)
    across = -(-len(columns) // down)
    canvas = Figure(figsize=(3.2 * across, 2.7 * down + 0.3), layout="constrained", dpi=110)
    axes = canvas.subplots(down, across, squeeze=False).flat
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, columns, strict=False):
        for number, sweep in enumerate(sweeps):
            colour = COLOURS[number % len(COLOURS)]
            found = [(row.scale, levels[row.name][name]) for row in sweep]
            found = [(scale, value) for scale, value in found if value["mean"] is not None]
            scales = [scale for scale, _ in found]
            low, high = ([value[key] for _, value in found] for key in ("low", "high"))
            if any(value["n"] > 1 for _, value in found):  # FID is one number
                axis.fill_between(scales, low, high, color=colour, alpha=0.18, lw=0)
            means = [value["mean"] for _, value in found]
            axis.plot(scales, means, "o-", color=colour, ms=4, label=_label(sweep))
        axis.set_title(f"{name} {BETTER.get(name, '')}".strip(), fontsize=11)
        axis.set_xlabel("λ")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=RULE)
        axis.set_axisbelow(True)
    if len(sweeps) > 1:
        handles = axes[0].get_legend_handles_labels()
        canvas.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    _save(lambda part: canvas.savefig(part, format="png"), path)


def _label(sweep: Sequence[Row]) -> str:
    row = sweep[-1]
    assert row.adapter is not None
    with_lora = f" + {row.lora.stem}" if row.lora else ""
    return f"{row.adapter.stem} ({row.selection}){with_lora}" if row.selection else row.adapter.stem


def plot_grid(gallery: Gallery, rows: Sequence[Row], path: Path) -> None:
    """Prompts downwards, rows of the comparison to the right; some of each if there are many."""
    rows = rows[:ROWS]
    step = max(1, len(gallery.prompts) // PROMPTS)
    indices = range(0, len(gallery.prompts), step)[:PROMPTS]
    cell = (CELL + GAP, CELL + GAP)
    size = (LEFT + len(rows) * cell[0] + GAP, TOP + len(indices) * cell[1] + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11
    )
    for column, row in enumerate(rows):
        x = LEFT + column * cell[0]
        title = "\n".join(textwrap.wrap(row.name, 19)[:3])
        draw.multiline_text((x + CELL / 2, TOP - 8), title, INK, font, anchor="md", align="center")
        for line, index in enumerate(indices):
            y = TOP + line * cell[1]
            with Image.open(gallery.path(row, index)) as image:
                tile = image.convert("RGB")
            tile = ImageOps.contain(tile, (CELL, CELL), Image.Resampling.LANCZOS)
            place = (x + (CELL - tile.width) // 2, y + (CELL - tile.height) // 2)
            canvas.paste(tile, place)
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=LINE)
    for line, index in enumerate(indices):
        prompt = textwrap.shorten(gallery.prompts[index], 110, placeholder=" …")
        wrapped = "\n".join(textwrap.wrap(prompt, 23))
        middle = TOP + line * cell[1] + CELL / 2
        draw.multiline_text((LEFT - 10, middle), wrapped, INK, font, anchor="rm", align="right")
    _save(lambda part: canvas.save(part, format="PNG"), path)


def _save(write: Any, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise EvalError(f"{path} could not be written: {one_line(error)}") from error
