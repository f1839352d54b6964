"""A grid of pictures: every label of an adapter at several weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from vmix import Adapter
from vmix.diffusers.fitting import quiet
from vmix.diffusers.mixing import load_vmix, set_vmix, unload_vmix

__all__ = ["draw_preview"]

_CELL, _GAP, _EDGE, _LINE = 192, 6, 16, 18
_WEIGHTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_INK, _FAINT = "#1f2328", "#656d76"


def draw_preview(
    pipe: Any,
    adapter: Adapter,
    prompts: Sequence[str],
    *,
    guidance_scale: float | None = None,
    steps: int = 20,
    size: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
) -> Image.Image:
    """A row for each label and prompt, a column for each weight; the noise of a prompt is the same
    everywhere. `call` has further arguments of the pipeline's call."""
    options = dict(call or {})
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    negative = options.pop("negative_prompt", None)
    weights = {
        label.name: [w for w in _WEIGHTS if w and label.range[0] <= w <= label.range[1]]
        for label in adapter.labels
    }
    # Weight 0 is the same picture for all labels.
    selections: list[dict[str, float]] = [{}]
    selections += [{name: weight} for name, some in weights.items() for weight in some]
    cells: dict[tuple[str, str, float], Image.Image] = {}
    load_vmix(pipe, adapter, "none", adapter_name="preview")
    total = len(prompts) * len(selections)
    try:
        with quiet(pipe), tqdm(total=total, desc="preview", unit="picture") as bar:
            for prompt in prompts:
                for first in range(0, len(selections), batch_size):
                    part = selections[first : first + batch_size]
                    set_vmix(pipe, part, "preview")
                    images = pipe(
                        [prompt] * len(part),
                        negative_prompt=None if negative is None else [negative] * len(part),
                        generator=[torch.Generator("cpu").manual_seed(seed) for _ in part],
                        num_inference_steps=steps,
                        height=size,
                        width=size,
                        **options,
                    ).images
                    for selection, image in zip(part, images, strict=True):
                        for name, weight in selection.items() or ((n, 0.0) for n in weights):
                            cells[name, prompt, weight] = image
                    bar.update(len(part))
    finally:
        unload_vmix(pipe, "preview")
    rows = [
        (name, prompt, [(w, cells[name, prompt, w]) for w in sorted((*some, 0.0))])
        for name, some in weights.items()
        for prompt in prompts
    ]
    return _grid(rows)


def _grid(rows: Sequence[tuple[str, str, Sequence[tuple[float, Image.Image]]]]) -> Image.Image:
    drawn = {weight for _, _, images in rows for weight, _ in images}
    columns = [weight for weight in _WEIGHTS if weight in drawn]
    font = ImageFont.load_default(12)
    height = _LINE + _CELL + _GAP
    page = Image.new(
        "RGB",
        (2 * _EDGE + len(columns) * (_CELL + _GAP) - _GAP, 2 * _EDGE + _LINE + len(rows) * height),
        "white",
    )
    draw = ImageDraw.Draw(page)
    for column, weight in enumerate(columns):
        x = _EDGE + column * (_CELL + _GAP) + _CELL / 2
        draw.text((x, _EDGE), f"{weight:+g}" if weight else "0", _FAINT, font, anchor="mt")
    for row, (label, prompt, images) in enumerate(rows):
        y = _EDGE + _LINE + row * height
        line = f"{label}: {prompt}"
        while len(line) > 1 and draw.textlength(line, font) > page.width - 2 * _EDGE:
            line = line.removesuffix("…")[:-1] + "…"
        draw.text((_EDGE, y), line, _INK, font)
        for weight, image in images:
            cell = image.convert("RGB").resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            page.paste(cell, (_EDGE + columns.index(weight) * (_CELL + _GAP), y + _LINE))
    return page
