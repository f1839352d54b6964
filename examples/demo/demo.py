"""The demo: one grid of pictures and one table, made with the small model of the node pack.

    make demo

Everything goes through the public interface: a StableDiffusionPipeline and `vmix.diffusers`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm
from vmix import Adapter
from vmix.diffusers import fit_vmix, load_vmix, unload_vmix
from vmix.fit import read_prompts
from vmix.loading import WeightsError, load_pipeline
from vmix.measures import HUE_BANDS, MEASURES, hue_matches

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "comfy_nodes" / "demo"  # what the node pack brings along
STEPS, GUIDANCE, BATCH = 25, 3.0, 16
FIT_STEPS, FIT_PROMPTS = 8, read_prompts(HERE / "fit_prompts.txt")
FIT_LABEL, FIT_WORDS = "light", ("bright", "dark")

PROMPTS = (
    "a red apple",
    "a green tree",
    "a blue car",
    "a yellow star",
    "a pink donut",
    "a purple heart",
    "an orange house",
    "a blue fish",
)
SEEDS = tuple(range(8))

Images = NDArray[np.float64]
Pair = tuple[str, int]  # prompt and seed


def open_pipeline(folder: Path = DEMO / "model") -> Any:
    warnings.filterwarnings("ignore", category=FutureWarning)  # about settings the model needs
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    pipe = load_pipeline(
        diffusers.StableDiffusionPipeline,
        folder,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, pairs: Sequence[Pair], bar: Any = None, guidance: float = GUIDANCE, **options: Any
) -> Images:
    """A picture [H, W, 3] in 0..1 for every pair; a seed means the same noise everywhere."""
    parts = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        parts.append(
            pipe(
                [prompt for prompt, _ in part],
                generator=[torch.Generator().manual_seed(seed) for _, seed in part],
                num_inference_steps=STEPS,
                guidance_scale=guidance,
                output_type="np",
                **options,
            ).images
        )
        if bar is not None:
            bar.update(len(part))
    return np.concatenate(parts).astype(np.float64)


def with_vmix(
    pipe: Any, adapter: Adapter, pairs: Sequence[Pair], selection: Any, scale: float = 1.0,
    bar: Any = None, apply_to: Any = None, guidance: float = GUIDANCE,
) -> Images:  # fmt: skip
    load_vmix(pipe, adapter, selection, scale, apply_to=apply_to)
    try:
        return generate(pipe, pairs, bar, guidance)
    finally:
        unload_vmix(pipe)


def only(adapter: Adapter, name: str | None) -> dict[str, float]:
    """A selection with one label positive and the others negative; None makes all negative."""
    return {label.name: float(label.name == name) for label in adapter.labels}


def every(adapter: Adapter) -> dict[str, float]:
    return {label.name: 1.0 for label in adapter.labels}


def but(adapter: Adapter, name: str) -> dict[str, float]:
    return {label.name: float(label.name != name) for label in adapter.labels}


def article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def colour_of(prompt: str) -> str:
    return next(word for word in prompt.split() if word in HUE_BANDS)


def fidelity(images: Images, pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Whether each picture's main hue is the colour that its prompt asks for."""
    found = [hue_matches(i, colour_of(p)) for i, (p, _) in zip(images, pairs, strict=True)]
    return np.array(found, dtype=np.bool_)


# --- the grid ------------------------------------------------------------------------------------

CELL, GAP, LEFT, TOP, EDGE = 128, 10, 138, 66, 20
INK, FAINT, LINE = "#1f2328", "#656d76", "#d0d7de"


def font(size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # it has a λ
    return ImageFont.truetype(str(path), size)


def tile(image: NDArray[np.float64]) -> Image.Image:
    """A picture [H, W, 3] in 0..1, at the size of a cell."""
    pixels = Image.fromarray((image * 255).round().astype(np.uint8))
    return pixels.resize((CELL, CELL), Image.Resampling.BICUBIC)


def draw_grid(
    columns: Sequence[tuple[str, str, Images]],
    rows: Sequence[str],
    groups: Sequence[tuple[str, int]],
) -> Image.Image:
    """Pictures under two-line headers, prompts to their left; groups are set apart by a gap."""
    starts, x = [], LEFT
    for _, size in groups:
        for _ in range(size):
            starts.append(x)
            x += CELL + GAP
        x += GAP
    width = x - 2 * GAP + EDGE
    height = TOP + len(rows) * (CELL + GAP) - GAP + EDGE
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    strong, plain = font(13), font(11)
    for x, (title, subtitle, images) in zip(starts, columns, strict=True):
        middle = x + CELL / 2
        draw.text((middle, TOP - 36), title, INK, strong, anchor="mm")
        draw.text((middle, TOP - 16), subtitle, FAINT, plain, anchor="mm")
        for row, image in enumerate(images):
            y = TOP + row * (CELL + GAP)
            canvas.paste(tile(image), (x, y))
            draw.rectangle((x - 1, y - 1, x + CELL, y + CELL), outline=LINE)
    for row, prompt in enumerate(rows):
        middle = TOP + row * (CELL + GAP) + CELL / 2
        draw.text((LEFT - 12, middle), prompt, INK, strong, anchor="rm")
    return canvas


def fitted(pipe: Any, labels: Any, **options: Any) -> tuple[Adapter, float]:
    """Labels from words, on this model, and the seconds that it took."""
    begun = time.perf_counter()
    settings = {"prompts": FIT_PROMPTS[:24], "steps": FIT_STEPS, "guidance_scale": GUIDANCE}
    made = fit_vmix(pipe, labels, **{**settings, "batch_size": BATCH, **options})
    return made, time.perf_counter() - begun


def grid(
    pipe: Any,
    adapter: Adapter,
    seed: int,
    bar: Any = None,
    words: tuple[Adapter, float] | None = None,
) -> Image.Image:
    """`words`: a label that was just fitted, and the seconds that it took."""
    pairs = [(prompt, seed + row) for row, prompt in enumerate(PROMPTS)]
    columns = [("base model", "without VMix", generate(pipe, pairs, bar))]
    for scale in (0.5, 1.0):
        images = with_vmix(pipe, adapter, pairs, every(adapter), scale, bar)
        columns.append(("all positive", f"λ = {scale:g}", images))
    for label in adapter.labels:
        images = with_vmix(pipe, adapter, pairs, but(adapter, label.name), bar=bar)
        columns.append((f"− {label.dimension}", label.name, images))
    images = with_vmix(pipe, adapter, pairs, only(adapter, None), bar=bar)
    columns.append(("all negative", "λ = 1", images))
    groups = [("base", 1), ("all", 2), ("single", len(adapter.labels)), ("none", 1)]
    if words is not None:
        made, seconds = words
        for weight, word in zip((1.0, -1.0), FIT_WORDS, strict=True):
            images = with_vmix(pipe, made, pairs, {FIT_LABEL: weight}, bar=bar)
            columns.append((f"“{word}”", f"fitted in {seconds:.1f} s", images))
        groups.append(("fitted", 2))
    return draw_grid(columns, PROMPTS, groups)


# --- the table -----------------------------------------------------------------------------------


def table(pipe: Any, adapter: Adapter, bar: Any) -> Iterator[str]:
    """λ = 0 against λ = 1, all labels positive, over every prompt and seed."""
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    images = (
        generate(pipe, pairs, bar),
        with_vmix(pipe, adapter, pairs, every(adapter), 1.0, bar),
    )
    yield f"{len(pairs)} pictures each        λ = 0    λ = 1   change"
    for name, measure in MEASURES.items():
        without, mixed = (float(np.nanmean(measure(part))) for part in images)
        yield f"{name:<24}{without:>7.3f}  {mixed:>7.3f}  {mixed - without:>+7.3f}"
    without, mixed = (float(fidelity(part, pairs).mean()) for part in images)
    yield f"{'colour as prompted':<24}{without:>7.3f}  {mixed:>7.3f}  {mixed - without:>+7.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--adapter", type=Path, default=DEMO / "adapter.safetensors")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--seed", type=int, default=0, help="Of the grid's first row.")
    parser.add_argument("--grid-only", action="store_true")
    args = parser.parse_args()

    try:
        pipe, adapter = open_pipeline(args.model), Adapter.open(args.adapter)
    except WeightsError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    words = fitted(pipe, {FIT_LABEL: FIT_WORDS})
    words[0].save(args.out / "light.safetensors")
    total = len(PROMPTS) * (6 + len(adapter.labels))
    total += 0 if args.grid_only else 2 * len(PROMPTS) * len(SEEDS)
    with tqdm(total=total, desc="pictures", unit="") as bar:
        grid(pipe, adapter, args.seed, bar, words).save(args.out / "grid.png")
        lines = [] if args.grid_only else list(table(pipe, adapter, bar))
    print("\n".join(lines))
    print(
        f"\nfitted {FIT_WORDS[0]!r} against {FIT_WORDS[1]!r} in {words[1]:.1f} s: "
        f"{args.out / 'light.safetensors'}"
    )
    print(f"see {args.out / 'grid.png'}")


if __name__ == "__main__":
    main()
