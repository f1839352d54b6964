"""Labels, examples and the order in which they are seen."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class TrainingError(Exception):
    """What the user has to put right before training can start; the message lists it."""


@dataclass(frozen=True)
class LabelSpec:
    """One aesthetic label, as `labels.toml` gives it."""

    name: str
    dimension: str
    positive: str
    negative: str
    default: float = 1.0
    display_names: Mapping[str, str] = field(default_factory=dict)

    def problems(self) -> Iterator[str]:
        for key in ("name", "dimension", "positive", "negative"):
            value = getattr(self, key)
            if not isinstance(value, str) or (key != "dimension" and not value):
                yield f"{key}: expected a text, found {value!r}"
        if self.name in ("all", "none"):
            yield f"name: '{self.name}' is how all or no labels are selected"
        number = isinstance(self.default, (int, float)) and not isinstance(self.default, bool)
        if not number or not math.isfinite(self.default):
            yield f"default: expected a finite number, found {self.default!r}"
        if not isinstance(self.display_names, Mapping):
            yield f"display_names: expected a table of texts, found {self.display_names!r}"

    def as_metadata(self) -> dict[str, Any]:
        # Nothing is neutral under a learned projection: weight 0 is the paper's negative.
        return {**self.__dict__, "display_names": dict(self.display_names), "neutral": None}


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


def read_labels(path: Path) -> list[LabelSpec]:
    """The `[[label]]` tables of a labels file, in order."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("label", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path}: {error}") from error
    if not isinstance(tables, list):
        raise TrainingError(f"{path}: [label] must be [[label]], once for every label")
    labels: list[LabelSpec] = []
    problems: list[str] = []
    for number, table in enumerate(tables, 1):
        try:
            labels.append(LabelSpec(**table))
        except TypeError as error:  # names the missing or unknown key
            problems.append(f"label {number}: {str(error).replace('LabelSpec.__init__() ', '')}")
            continue
        problems += [f"label {number}: {problem}" for problem in labels[-1].problems()]
    for key in ("name", "positive", "negative"):
        seen = [str(getattr(label, key)) for label in labels]
        problems += [
            f"{key} '{v}' is used twice" for v in sorted({v for v in seen if seen.count(v) > 1})
        ]
    if not tables:
        problems.append("no [[label]] table")
    complain(str(path), problems)
    return labels


def read_examples(folder: Path, labels: Sequence[LabelSpec]) -> list[Example]:
    """The entries of `metadata.jsonl`. A label that an entry leaves out counts as negative."""
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        raise TrainingError(f"{listing} does not exist; docs/training.md describes the format")
    names = [label.name for label in labels]
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
        unknown = sorted(set(aesthetics) - set(names)) if labels else []
        problems += [f"line {number}: unknown label '{name}'" for name in unknown]
        weights = [aesthetics.get(name, 0) for name in names]
        if not all(isinstance(w, (int, float)) and 0 <= w <= 1 for w in weights):
            problems.append(f"line {number}: a label is neither 0, 1 nor between them")
            continue
        examples.append(Example(image, caption, tuple(float(w) for w in weights)))
    for index, name in enumerate(names):
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
