"""The demo's pictures: emoji from three vendors, drawn with known aesthetic labels.

As a command it writes the labelled folder that the adapter is trained on:

    python data.py --out DIR --count 2400 --seed 1
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from colours import TARGET_HUES, colour_word, main_hue, rotate_hue
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transforms import LABELS, LOOK_WORDS, SIZE, render

HERE = Path(__file__).resolve().parent
DEFAULT_CACHE = Path.home() / ".cache" / "vmix-demo"

# package, version, folder of the pictures inside the package
PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("emoji-datasource-twitter", "16.0.0", "img/twitter/64"),
    ("emoji-datasource-google", "16.0.0", "img/google/64"),
    ("@lobehub/fluent-emoji-3d", "1.1.0", "assets"),
)
ROTATED = 0.5  # share of the coloured objects that are drawn in another hue
# Templates with and without a colour word; words for the look are added at the end, if at all.
WITH_COLOUR = (
    ("{colour} {name}", 4), ("a {colour} {name}", 4), ("a picture of a {colour} {name}", 1),
    ("{colour} {name}, {kind}", 1), ("{name}, {colour}", 1),
)  # fmt: skip
WITHOUT_COLOUR = (("{name}", 2), ("a {name}", 2), ("{name}, {kind}", 1))
NAMELESS_COLOUR = 0.12  # share of unrotated pictures whose caption leaves the colour out


@dataclass(frozen=True)
class Source:
    """One vendor's picture of a concept, cropped to the object, [4,64,64] in 0..1."""

    concept: str
    kind: str
    image: Tensor


@dataclass(frozen=True)
class Sample:
    image: Tensor  # uint8 [3,64,64]
    text: str
    labels: dict[str, int]
    colour: str | None
    concept: str


def fetch(cache: Path) -> list[Path]:
    """Download and unpack the packages once; return their picture folders."""
    folders = []
    for name, version, inside in PACKAGES:
        stem = f"{name.removeprefix('@').replace('/', '-')}-{version}"
        target = cache / stem
        if not (target / "package" / inside).is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", str(cache)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            with tarfile.open(cache / f"{stem}.tgz") as archive:
                archive.extractall(target, filter="data")
        folders.append(target / "package" / inside)
    return folders


def _load(path: Path) -> Tensor:
    """Crop to the object, centre it in a square, bring it to 64 px."""
    picture = Image.open(path).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    picture = picture.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    # RGBa is premultiplied, so transparent pixels do not bleed into the edge.
    small = square.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def load_sources(cache: Path) -> list[Source]:
    concepts: list[dict[str, str]] = json.loads((HERE / "concepts.json").read_text())
    sources = []
    for folder in fetch(cache):
        for concept in concepts:
            names = [
                f"{concept['hexcode']}{variant}.{extension}"
                for variant in ("", "-fe0f") for extension in ("png", "webp")
            ]  # fmt: skip
            path = next((folder / n for n in names if (folder / n).exists()), None)
            if path is None:
                raise FileNotFoundError(f"{folder}: no picture of {concept['name']}")
            sources.append(Source(concept["name"], concept["kind"], _load(path)))
    return sources


def _choose(options: tuple[tuple[str, int], ...], generator: torch.Generator) -> str:
    weights = torch.tensor([float(w) for _, w in options])
    return options[int(torch.multinomial(weights, 1, generator=generator))][0]


def draw(
    source: Source, generator: torch.Generator, positive: float = 0.5, said: float = 0.0
) -> Sample:
    """One random sample: maybe another hue, a caption, and a coin flip for each look.

    A look is the positive one with probability `positive`. With probability `said` the caption
    names some of the looks, as part of the captions of a web corpus do.
    """
    chance = torch.rand(3, generator=generator).tolist()
    image = source.image
    hue, coloured = main_hue(image)
    rotated = coloured > 0.3 and chance[0] < ROTATED
    if rotated:
        target = TARGET_HUES[int(torch.randint(len(TARGET_HUES), (), generator=generator))]
        image = rotate_hue(image, target - hue)
    colour = colour_word(image)
    unsaid = colour is None or (not rotated and chance[1] < NAMELESS_COLOUR)
    template = _choose(WITHOUT_COLOUR if unsaid else WITH_COLOUR, generator)
    text = template.format(colour=colour, name=source.concept, kind=source.kind)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    coins = (torch.rand(len(LABELS), generator=generator) < positive).int().tolist()
    labels = dict(zip(LABELS, coins, strict=True))
    if chance[2] < said:
        text = ", ".join([text, *look_words(labels, generator)])
    pixels = (render(image, labels, generator) * 255).round().to(torch.uint8)
    return Sample(pixels, text, labels, colour, source.concept)


def look_words(labels: dict[str, int], generator: torch.Generator) -> list[str]:
    """Between one and all of the looks, in any order, each in one of its words."""
    order = torch.randperm(len(LABELS), generator=generator).tolist()
    many = int(torch.randint(1, len(LABELS) + 1, (), generator=generator))
    words = [LOOK_WORDS[LABELS[index]][1 - labels[LABELS[index]]] for index in order[:many]]
    return [w[int(torch.randint(len(w), (), generator=generator))] for w in words]


@contextmanager
def one_thread() -> Iterator[None]:
    """For operations on pictures so small that sharing them out takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw_many(
    cache: Path, count: int, seed: int, positive: float = 0.5, said: float = 0.0
) -> list[Sample]:
    """Every picture equally often, in random order."""
    sources = load_sources(cache)
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    with one_thread(), tqdm(total=count, desc="drawing", unit="img") as bar:
        while len(samples) < count:
            for index in torch.randperm(len(sources), generator=generator).tolist():
                samples.append(draw(sources[index], generator, positive, said))
                bar.update()
                if len(samples) == count:
                    break
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    listing = args.out / "metadata.jsonl"  # there when the folder is complete
    with listing.with_suffix(".part").open("w", encoding="utf-8") as lines:
        for number, sample in enumerate(draw_many(args.cache, args.count, args.seed)):
            name = f"{number:05d}.png"
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(args.out / name)
            row = {
                "file_name": name,
                "text": sample.text,
                "aesthetics": sample.labels,
                "colour": sample.colour,
                "concept": sample.concept,
            }
            lines.write(json.dumps(row) + "\n")
    listing.with_suffix(".part").replace(listing)


if __name__ == "__main__":
    main()
