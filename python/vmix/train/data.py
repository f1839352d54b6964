"""Labels, examples and the order in which they are seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class TrainingError(Exception):
    """What the user has to put right before training can start; the message lists it."""


@dataclass(frozen=True)
class Example:
    """One image of the training set; `weights` holds 1 for every label that it has, else 0."""

    image: Path
    caption: str
    weights: tuple[float, ...]


def complain(title: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one error that lists the problems, or return when there are none."""
    if problems:
        more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
        raise TrainingError("\n  ".join([f"{title}:", *problems[:limit], *more]))


def read_examples(folder: Path, labels: Sequence[str]) -> list[Example]:
    """The entries of `metadata.jsonl`. A label that an entry leaves out counts as negative."""
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise TrainingError(f"{listing} does not exist; docs/training.md describes the format")
    examples, problems = [], []
    # Not splitlines(): JSON strings may hold other characters that it takes for line ends.
    for number, line in enumerate(listing.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, caption = folder / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"line {number}: {type(error).__name__}: {error}")
            continue
        if not isinstance(caption, str):
            problems.append(f"line {number}: text is not a string")
            continue
        aesthetics = entry.get("aesthetics", {})
        if not isinstance(aesthetics, dict):
            problems.append(f"line {number}: aesthetics is not an object")
            continue
        try:
            Image.open(image).close()  # reads no more than its header
        except FileNotFoundError:
            problems.append(f"line {number}: no such image: {entry['file_name']}")
        except OSError:
            problems.append(f"line {number}: not an image: {entry['file_name']}")
        if labels and not aesthetics:
            problems.append(f"line {number}: {entry['file_name']} has no aesthetics")
        unknown = sorted(set(aesthetics) - set(labels)) if labels else []
        problems += [f"line {number}: unknown label '{name}'" for name in unknown]
        weights = [aesthetics.get(name, 0) for name in labels]
        if not all(isinstance(w, (int, float)) and 0 <= w <= 1 for w in weights):
            problems.append(f"line {number}: a label is neither 0, 1 nor between them")
            continue
        examples.append(Example(image, caption, tuple(float(w) for w in weights)))
    for index, name in enumerate(labels):
        if examples and len({example.weights[index] for example in examples}) == 1:
            problems.append(f"label '{name}' is the same in every image, nothing to learn from")
    if not examples:
        problems.append("no usable entry")
    complain(str(listing), problems)
    return examples


class Pixels(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """Images as tensors in -1..1: on white, shorter side to the resolution, centre crop."""

    def __init__(self, examples: Sequence[Example], resolution: int) -> None:
        self.examples = examples
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        with Image.open(self.examples[index].image) as file:
            image = ImageOps.exif_transpose(file)  # as viewers show it
        if image.has_transparency_data:
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, "white"), image.convert("RGBA")
            )
        image = image.convert("RGB")
        side = self.resolution
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
        return index, pixels / 127.5 - 1


class Batches(torch.utils.data.Sampler[list[int]]):
    """An endless shuffle, cut into this process's batches; any position of it can be resumed."""

    def __init__(
        self, count: int, batch: int, seed: int, start: int, rank: int, world: int
    ) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        position = (self.start * self.world + self.rank) * self.batch
        while True:
            indices = []
            for place in range(position, position + self.batch):
                if place // self.count != epoch:
                    epoch = place // self.count
                    order = torch.randperm(self.count, generator=generator(self.seed, 0, epoch))
                indices.append(int(order[place % self.count]))
            yield indices
            position += self.world * self.batch


def generator(*key: int) -> torch.Generator:
    """A stream of its own for this key: what a step draws does not depend on the steps before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)
