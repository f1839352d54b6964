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
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)
"""What Pillow and its decoders raise for what is no image, or is damaged."""
WORDS: Mapping[str, float | None] = {"positive": 1.0, "negative": 0.0, "unknown": None}
OVERLAY = "aesthetics.jsonl"
AES = ".aes.json"
FLOATS = "pixels are floating-point numbers; expected 8 or 16 bits"
TEXT_LIMIT = 2**24
"""Bytes of a caption or of labels; what is longer is neither."""
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

    def read(self, limit: int | None = None) -> bytes:
        sizes = [size for size in (self.size, limit) if size is not None]
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(min(sizes, default=-1))

    def open(self, limit: int | None = None) -> Image.Image:
        """The image, its header read and its pixels not yet: UNREADABLE where it is none.

        Of a shard's image `limit` bytes are read, which are often enough for the header.
        """
        if self.size is None:
            return Image.open(self.file)
        return Image.open(BytesIO(self.read(limit)))


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


def on_white(image: Image.Image) -> Image.Image:
    """RGB in 8 bits; what is transparent is white."""
    if image.mode == "F":
        raise ValueError(FLOATS)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion cuts off at 255
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


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


def parse_json(data: bytes) -> Any:
    """A JSON text; ValueError says what is wrong. A byte order mark is no part of it."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    return value


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, and their numbers."""
    # Not splitlines(): only "\n" ends a line of JSON lines.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield number, line


def _of_listing(folder: Path, problems: list[tuple[str, str]]) -> Iterator[Example]:
    seen: set[str] = set()
    for number, line in json_lines(folder / "metadata.jsonl"):
        place = f"metadata.jsonl, line {number}"
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict):
                raise ValueError("expected an object")
            name, caption = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(caption, str):
                raise ValueError("file_name and text: expected strings")
            labels = parse_labels(entry.get("aesthetics") or {})
            file = folder / name
            missing = not file.is_file()
        except (ValueError, KeyError, OSError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append((place, what))
            continue
        if name in seen:
            problems.append((place, f"{name} is listed twice"))
            continue
        seen.add(name)
        yield Example(name, caption, labels, file, missing=missing)


def _of_sidecars(folder: Path, problems: list[tuple[str, str]]) -> Iterator[Example]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    # Hidden ones are thumbnails and notes of other programs.
    named = [(f.relative_to(folder).as_posix(), f) for f in files]
    named = [(key, file) for key, file in named if not re.search(r"(^|/)\.", key)]
    images = [(key, file) for key, file in named if file.suffix.lower() in IMAGES]
    stems = {file.with_suffix("") for _, file in images}
    for key, file in named:
        if key.endswith(AES) and file.with_name(file.name.removesuffix(AES)) not in stems:
            problems.append((key, "no image beside it"))
    for key, file in images:
        caption, labels = None, Labels()
        try:
            if file.with_suffix(".txt").is_file():
                caption = file.with_suffix(".txt").read_bytes().decode("utf-8-sig").strip()
            if file.with_suffix(AES).is_file():
                labels = parse_labels(parse_json(file.with_suffix(AES).read_bytes()))
        except (ValueError, OSError) as error:
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
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            end = shard.stat().st_size
            for member in _members(archive, name, problems):
                # Names as webdataset's own reader splits them.
                split = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name, re.DOTALL)
                if split is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                parts = members.setdefault(split[1], {})
                if split[2].lower() in parts:
                    problems.append((f"{name}/{member.name}", "is in it twice"))
                elif member.offset_data + member.size > end:
                    problems.append((f"{name}/{member.name}", "cut off"))
                else:
                    parts[split[2].lower()] = member
            for key, parts in members.items():
                place = f"{name}/{key}"
                image = next((parts[i[1:]] for i in IMAGES if i[1:] in parts), None)
                if image is None:
                    if parts:
                        problems.append((place, f"no image among {', '.join(sorted(parts))}"))
                    continue
                try:
                    caption, labels = _of_members(file, parts)
                except ValueError as error:
                    problems.append((place, str(error)))
                    continue
                yield Example(
                    f"{name}/{image.name}", caption, labels, shard, image.offset_data, image.size
                )
    except (tarfile.TarError, OSError) as error:
        problems.append((name, f"not a readable tar file: {error}"))


def _members(
    archive: tarfile.TarFile, name: str, problems: list[tuple[str, str]]
) -> Iterator[tarfile.TarInfo]:
    """Plain files up to the archive's end, or to where it is damaged, which is a problem."""
    damage = ""
    try:
        for member in archive:
            if member.isreg() and not member.issparse():
                yield member
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        damage = f": {error}"
    file: Any = archive.fileobj
    file.seek(archive.offset)  # tarfile takes a damaged header for the end, which is zeros
    if damage or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        problems.append((name, f"cut off or damaged at byte {archive.offset}{damage}"))


def _of_members(file: BinaryIO, parts: Mapping[str, tarfile.TarInfo]) -> tuple[str | None, Labels]:
    def data(kind: str) -> bytes:
        if parts[kind].size > TEXT_LIMIT:
            raise ValueError(f"{kind}: {parts[kind].size} bytes are no text")
        file.seek(parts[kind].offset_data)
        return file.read(parts[kind].size)

    caption, labels = None, Labels()
    if "json" in parts:
        entry = parse_json(data("json"))
        if not isinstance(entry, dict):
            raise ValueError("json: expected an object")
        caption = entry.get("text", entry.get("caption"))
        if caption is not None and not isinstance(caption, str):
            raise ValueError("json: expected a string as text")
        labels = parse_labels(entry.get("aesthetics") or {})
    if "txt" in parts:
        caption = data("txt").decode("utf-8-sig").strip()
    if AES[1:] in parts:
        labels = parse_labels(parse_json(data(AES[1:])))
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
            entry = parse_json(line)
            if not isinstance(entry, dict) or not isinstance(entry["file_name"], str):
                raise ValueError("expected an object with a file_name")
            more[entry["file_name"]] = parse_labels(entry["aesthetics"])
        except (ValueError, KeyError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append((f"{path.name}, line {number}", what))
    return [
        Example(
            e.key, e.caption, {**more.get(e.key, {}), **e.aesthetics},
            e.file, e.offset, e.size, e.missing,
        )
        for e in examples
    ]  # fmt: skip
