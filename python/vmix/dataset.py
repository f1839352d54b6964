"""Images with captions and aesthetic labels: folders, side-car files, webdataset shards.

A set is a folder (or, for shards, one file or a pattern such as `data/train-*.tar`) in one of three
layouts, told apart by what is there:

- `metadata.jsonl`, one line per image: `{"file_name", "text", "aesthetics"}`;
- images with side-cars of the same stem: `.txt` (caption) and `.aes.json` (labels);
- webdataset shards, `.tar`: members `key.jpg`, `key.txt` or `key.json` (`text`, `aesthetics`), and
  `key.aes.json`. They are read in place, by offset.

An `aesthetics.jsonl` beside them, as `vmix label` writes, adds labels where the image's own say
nothing. docs/training.md describes all of it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
WORDS: Mapping[str, float | None] = {"positive": 1.0, "negative": 0.0, "unknown": None}
OVERLAY = "aesthetics.jsonl"
Labels = dict[str, float | None]


class DatasetError(Exception):
    """A set that cannot be read at all; the message says what was expected where."""


@dataclass(frozen=True)
class Example:
    """One image. `aesthetics` maps labels to 1 (positive), 0 (negative), a score between them, or
    None (unknown); a label that is not in it was not spoken of."""

    key: str
    """File name relative to the set; of a shard's image, `shard.tar/member`."""
    caption: str | None
    aesthetics: Mapping[str, float | None]
    file: Path
    offset: int = 0
    size: int | None = None
    """Of the image in its file; None for the whole file."""
    missing: bool = field(default=False, compare=False)
    """Whether no such image exists."""

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)

    def open(self) -> Image.Image:
        """The image, its header read and its pixels not yet: OSError where it is none."""
        if self.size is None:
            return Image.open(self.file)
        return Image.open(BytesIO(self.read()))


@dataclass(frozen=True)
class Dataset:
    """What a set holds, and what is wrong with it, a sentence each, with what it is about."""

    path: Path
    examples: Sequence[Example]
    problems: Sequence[tuple[str, str]]
    """(place, sentence): the place is an example's key, or a file and line."""


def read_dataset(path: str | Path) -> Dataset:
    """Reads names, captions and labels; no pixels."""
    path = Path(path)
    problems: list[tuple[str, str]] = []
    shards = _shards(path)
    if shards:
        folder = path if path.is_dir() else path.parent
        examples = [e for shard in shards for e in _of_shard(shard, folder, problems)]
    elif not path.is_dir():
        raise DatasetError(f"{path}: expected a folder of images, or .tar shards; nothing is there")
    elif (path / "metadata.jsonl").is_file():
        folder, examples = path, list(_of_listing(path, problems))
    else:
        folder, examples = path, list(_of_sidecars(path, problems))
    if not examples and not problems:
        raise DatasetError(f"{path} has neither a metadata.jsonl, nor images, nor .tar shards")
    return Dataset(path, _overlaid(examples, folder / OVERLAY, problems), problems)


def parse_labels(value: Any) -> Labels:
    """Labels as a file states them; ValueError says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError("aesthetics: expected an object of labels")
    return {str(name): parse_label(str(name), v) for name, v in value.items()}


def parse_label(name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and value in WORDS):
        return None if value is None else WORDS[value]
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(
        f"label '{name}': expected 1 or positive, 0 or negative, null or unknown, "
        f"or a score between 0 and 1; found {json.dumps(value)}"
    )


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, and their numbers."""
    # Not splitlines(): JSON strings may hold other characters that it takes for line ends.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            yield number, line


def _of_listing(folder: Path, problems: list[tuple[str, str]]) -> Iterator[Example]:
    seen: set[str] = set()
    for number, line in json_lines(folder / "metadata.jsonl"):
        place = f"metadata.jsonl, line {number}"
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise ValueError("file_name and text: expected strings")
            labels = parse_labels(entry.get("aesthetics") or {})
        except (ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append((place, what))
            continue
        if name in seen:
            problems.append((place, f"{name} is listed twice"))
            continue
        seen.add(name)
        file = folder / name
        yield Example(name, caption, labels, file, missing=not file.is_file())


def _of_sidecars(folder: Path, problems: list[tuple[str, str]]) -> Iterator[Example]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in IMAGES or not file.is_file():
            continue
        key = file.relative_to(folder).as_posix()
        caption, labels = None, Labels()
        try:
            if file.with_suffix(".txt").is_file():
                caption = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
            if file.with_suffix(".aes.json").is_file():
                text = file.with_suffix(".aes.json").read_text(encoding="utf-8")
                labels = parse_labels(json.loads(text))
        except ValueError as error:
            problems.append((key, f"side-car: {error}"))
            continue
        yield Example(key, caption, labels, file)


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.suffix == ".tar":
        return [path] if path.is_file() else sorted(path.parent.glob(path.name))
    return []


def _of_shard(shard: Path, folder: Path, problems: list[tuple[str, str]]) -> Iterator[Example]:
    name = shard.relative_to(folder).as_posix()
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile():
                    path, _, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    key = f"{path}/{stem}" if path else stem
                    members.setdefault(key, {})[kind.lower()] = member
            for key, parts in members.items():
                place = f"{name}/{key}"
                image = next((parts[i[1:]] for i in IMAGES if i[1:] in parts), None)
                if image is None:
                    problems.append((place, f"no image among {', '.join(sorted(parts))}"))
                    continue
                try:
                    caption, labels = _of_members(archive, parts)
                except ValueError as error:
                    problems.append((place, str(error)))
                    continue
                yield Example(
                    f"{name}/{image.name}", caption, labels, shard, image.offset_data, image.size
                )
    except (tarfile.TarError, OSError) as error:
        problems.append((name, f"not a readable tar file: {error}"))


def _of_members(
    archive: tarfile.TarFile, parts: Mapping[str, tarfile.TarInfo]
) -> tuple[str | None, Labels]:
    def text(kind: str) -> str:
        file = archive.extractfile(parts[kind])
        assert file is not None  # only files are members
        return file.read().decode("utf-8")

    caption, labels = None, Labels()
    if "json" in parts:
        entry = json.loads(text("json"))
        if not isinstance(entry, dict):
            raise ValueError("json: expected an object")
        caption = entry.get("text", entry.get("caption"))
        if caption is not None and not isinstance(caption, str):
            raise ValueError("json: expected a string as text")
        labels = parse_labels(entry.get("aesthetics") or {})
    if "txt" in parts:
        caption = text("txt").strip()
    if "aes.json" in parts:
        labels = parse_labels(json.loads(text("aes.json")))
    return caption, labels


def _overlaid(
    examples: Sequence[Example], path: Path, problems: list[tuple[str, str]]
) -> list[Example]:
    """The examples, with labels of `aesthetics.jsonl` where their own say nothing."""
    if not path.is_file():
        return list(examples)
    more: dict[str, Labels] = {}
    for number, line in json_lines(path):
        try:
            entry = json.loads(line)
            more[entry["file_name"]] = parse_labels(entry["aesthetics"])
        except (ValueError, KeyError, TypeError) as error:
            problems.append((f"{path.name}, line {number}", str(error)))
    return [
        Example(
            e.key, e.caption, {**more.get(e.key, {}), **e.aesthetics},
            e.file, e.offset, e.size, e.missing,
        )
        for e in examples
    ]  # fmt: skip
