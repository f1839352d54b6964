"""Draw the pictures that somebody names cold: 24 prompts, their words hidden.

    python examples/demo/cold_look.py

writes docs/demo/cold-look/sheet.png, with numbers only, and key.json, the prompts. `count` compares
them with what viewers of the sheet answered.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo import (
    CELL,
    DEMO,
    GUIDANCE,
    HERE,
    STEPS,
    article,
    font,
    generate,
    open_pipeline,
    tile,
)
from PIL import Image, ImageDraw
from vmix.measures import HUE_BANDS

OUT = HERE.parents[1] / "docs" / "demo" / "cold-look"
COUNT, SEED = 24, 0
COLUMNS, GAP, HEAD = 6, 12, 22
# Other names for the things, and for colours next to each other.
NAMES = {
    "airplane": ("plane", "aeroplane"),
    "ball": ("football", "soccer"),
    "boat": ("sailboat", "ship", "yacht"),
    "burger": ("hamburger", "cheeseburger"),
    "butterfly": ("moth",),
    "car": ("automobile",),
    "cat": ("kitten", "kitty"),
    "cherries": ("cherry",),
    "clock": ("alarm", "watch"),
    "cup": ("mug", "coffee", "tea"),
    "dog": ("puppy",),
    "donut": ("doughnut",),
    "drop": ("droplet", "water", "teardrop"),
    "duck": ("mallard",),
    "fire": ("flame",),
    "gem": ("diamond", "crystal", "jewel", "gemstone"),
    "gift": ("present", "gift box"),
    "hat": ("top hat",),
    "leaf": ("maple",),
    "light bulb": ("lightbulb", "bulb", "lamp"),
    "moon": ("crescent",),
    "mushroom": ("toadstool",),
    "rabbit": ("bunny", "hare"),
    "rocket": ("spaceship", "space shuttle"),
    "shirt": ("t-shirt", "tee", "top"),
    "shoe": ("sneaker", "trainer"),
    "turtle": ("tortoise",),
    "umbrella": ("parasol",),
}
NEAR = {
    "yellow": ("gold", "golden"), "blue": ("cyan", "teal", "turquoise"), "purple": ("violet",),
    "pink": ("magenta",),
}  # fmt: skip


def prompts() -> list[str]:
    """Drawn from all things and hues by a seed, so that nobody has chosen them."""
    concepts = json.loads((HERE / "base" / "concepts.json").read_text(encoding="utf-8"))
    draw = random.Random(SEED)
    names = draw.sample([concept["name"] for concept in concepts], COUNT)
    colours = [draw.choice(list(HUE_BANDS)) for _ in names]
    pairs = zip(colours, names, strict=True)
    return [article(f"{colour} {name}") for colour, name in pairs]


def sheet(pipe: Any) -> Image.Image:
    made = prompts()
    images = generate(pipe, [(prompt, 100 + index) for index, prompt in enumerate(made)])
    rows = -(-COUNT // COLUMNS)
    size = (COLUMNS * (CELL + GAP) + GAP, rows * (CELL + HEAD + GAP) + GAP)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for index, image in enumerate(images):
        x = GAP + index % COLUMNS * (CELL + GAP)
        y = GAP + index // COLUMNS * (CELL + HEAD + GAP)
        pen.text((x + CELL / 2, y + HEAD / 2), str(index + 1), "#1f2328", font(13), anchor="mm")
        canvas.paste(tile(image), (x, y + HEAD))
    return canvas


def right(prompt: str, answer: str) -> tuple[bool, bool]:
    """Whether an answer has the object, and the colour, in one of their names."""

    def said(words: Sequence[str]) -> bool:  # as words of their own: a carrot is no car
        return re.search(rf"\b({'|'.join(words)})(e?s)?\b", answer.lower()) is not None

    _, colour, name = prompt.split(" ", 2)
    objects = (name, name.rstrip("s"), *NAMES.get(name, ()))
    colours = (colour, *NEAR.get(colour, ()))
    return said(objects), said(colours)


def count(answers: Mapping[str, str], key: Sequence[str]) -> dict[str, int]:
    """Answers by number against the prompts: objects, colours, and both."""
    found = [right(prompt, answers.get(str(i + 1), "")) for i, prompt in enumerate(key)]
    return {
        "objects": sum(o for o, _ in found),
        "colours": sum(c for _, c in found),
        "both": sum(o and c for o, c in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sheet(open_pipeline(args.model)).save(args.out / "sheet.png")
    key = {"prompts": prompts(), "steps": STEPS, "guidance": GUIDANCE}
    (args.out / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    print(f"see {args.out / 'sheet.png'}")


if __name__ == "__main__":
    main()
