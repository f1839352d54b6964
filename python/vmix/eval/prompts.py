"""What is drawn, and what it is compared with: prompts and reference images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vmix.dataset import DatasetError, Example, on_white, read_dataset
from vmix.eval.errors import EvalError, complain, one_line

MJHQ = "meta_data.json"


@dataclass(frozen=True)
class PromptSet:
    prompts: Sequence[str]
    references: Sequence[Example]
    """Images of the same kind, for FID; none beside a text file."""


def read_prompts(path: Path) -> PromptSet:
    """Of a text file, a folder like MJHQ-30K's, or a set of images with captions (vmix.dataset)."""
    if path.name == MJHQ:
        path = path.parent
    if (path / MJHQ).is_file():
        return _of_mjhq(path)
    if path.is_file() and path.suffix != ".tar":
        return PromptSet(_lines(path), ())
    if not path.exists() and path.suffix != ".tar":
        raise EvalError(f"--prompts {path}: no such file or folder")
    examples = read_references(path)
    without = [e.key for e in examples if not e.caption]
    complain(f"{path}: images without a caption, which would be the prompt", without)
    return PromptSet([e.caption for e in examples if e.caption], examples)


def read_references(path: Path) -> Sequence[Example]:
    """Images of a set; captions do not matter. An MJHQ-30K folder holds them as well."""
    if (path / MJHQ).is_file():
        return _of_mjhq(path).references
    try:
        found = read_dataset(path)
    except (DatasetError, OSError) as error:
        raise EvalError(one_line(error)) from error
    complain(f"{path}", [f"{place}: {what}" for place, what in found.problems])
    complain(f"{path}", [f"{e.key}: no such image" for e in found.examples if e.missing])
    return found.examples


def open_image(source: Example | Path) -> Image.Image:
    """As viewers show it, on white."""
    try:
        with Image.open(source) if isinstance(source, Path) else source.open() as file:
            return on_white(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError) as error:
        place = source if isinstance(source, Path) else source.key
        raise EvalError(f"{place} cannot be read as an image: {one_line(error)}") from error


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"--prompts {path}: {one_line(error)}") from error
    if not any(lines):
        raise EvalError(f"--prompts {path}: expected a prompt on each line, found none")
    return [line for line in lines if line]


def _of_mjhq(folder: Path) -> PromptSet:
    """`meta_data.json`, {id: {category, prompt}}, and images <category>/<id>.jpg below the folder.

    Categories take turns, so that the first N prompts are a fair share of each.
    """
    file = folder / MJHQ
    groups: dict[str, list[tuple[str, str]]] = {}
    try:
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
        for name, entry in entries.items():
            groups.setdefault(entry["category"], []).append((name, entry["prompt"].strip()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"{file}: expected {{id: {{category, prompt}}}} as MJHQ-30K has it: {one_line(error)}"
        ) from error
    parts = [[(c, name, prompt) for name, prompt in group] for c, group in groups.items()]
    turns = [entry for entry in chain(*zip_longest(*parts)) if entry is not None]
    if not turns:
        raise EvalError(f"{file} has no prompts")
    images = _images_of_mjhq(folder, turns[0])
    references = []
    if images is not None:
        for category, name, prompt in turns:
            key = f"{category}/{name}.jpg"
            references.append(Example(key, prompt, {}, images / key))
        missing = [e.key for e in references if not e.file.is_file()]
        complain(f"{images}: images of {MJHQ} that are not there", missing)
    return PromptSet([prompt for _, _, prompt in turns], references)


def _images_of_mjhq(folder: Path, first: tuple[str, str, str]) -> Path | None:
    """Where they were unpacked: the folder itself or one in it, usually mjhq30k_imgs."""
    category, name, _ = first
    inside = sorted(place for place in folder.iterdir() if place.is_dir())
    candidates = [folder, *inside]
    return next((c for c in candidates if (c / category / f"{name}.jpg").is_file()), None)
