"""Making the pictures of every row, each file once.

The noise of picture i depends on the seed and on i alone, so that all rows have the same. Batches
are made whole and hold the same pictures always: what a resumed run makes is what an uninterrupted
one would have made, to the bit. A file says in its text chunk what it was made with, and appears
under its name when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from vmix.eval.errors import PictureError, complain, one_line
from vmix.eval.pipelines import REFUSALS, Pipelines, applied
from vmix.eval.rows import Row
from vmix.train.order import generator

CHUNK = "vmix.eval"
Batch = tuple[int, int]  # the first picture, and the one after the last


@dataclass(frozen=True)
class Protocol:
    """The paper's, unless told otherwise."""

    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    size: int | None = None
    """Side in pixels; the base's own if None."""
    dtype: str = "f32"


@dataclass(frozen=True)
class Gallery:
    """The pictures of a folder: one for every row and prompt."""

    folder: Path
    prompts: Sequence[str]
    """Picture by picture."""
    protocol: Protocol
    batch_size: int

    def path(self, row: Row, index: int) -> Path:
        return self.folder / "images" / row.folder / f"{index:06d}.png"

    def paths(self, row: Row) -> list[Path]:
        return [self.path(row, index) for index in range(len(self.prompts))]

    def batches(self) -> list[Batch]:
        count = len(self.prompts)
        return [(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)]

    def origin(self, row: Mapping[str, Any], index: int, batch: Batch) -> dict[str, Any]:
        """What a picture's chunk says."""
        found = {**asdict(self.protocol), **row, "prompt": self.prompts[index], "batch": batch}
        return dict(json.loads(json.dumps(found)))  # as it is read back

    def missing(self, rows: Sequence[Row], remake: bool) -> dict[str, list[Batch]]:
        """Batches to be made, by row. Pictures that were made otherwise are refused, or remade."""
        found, problems = dict[str, list[Batch]](), []
        for row in rows:
            settings, todo, changes = row.settings(), list[Batch](), set[str]()
            for batch in self.batches():
                states = [
                    _compare(self.path(row, i), self.origin(settings, i, batch), changes)
                    for i in range(*batch)
                ]
                if not all(states):
                    todo.append(batch)
            if changes and not remake:
                problems.append(f"row {row.name!r}: {'; '.join(sorted(changes))}")
            found[row.name] = todo
        complain(
            f"{self.folder} has pictures that were made with other settings (--remake makes those "
            "anew, another --out keeps them)",
            problems,
        )
        return found


def origin_of(path: Path) -> dict[str, Any] | None:
    """What the file says it was made with: {} if nothing, None if it is no whole picture."""
    try:
        with Image.open(path) as image:
            found = json.loads(getattr(image, "text", {}).get(CHUNK, "{}"))
    except (OSError, ValueError, SyntaxError):
        return None
    return found if isinstance(found, dict) else {}


def _compare(path: Path, expected: Mapping[str, Any], changes: set[str]) -> bool:
    """Whether the picture is there as it should be; notes what else it was made with."""
    found = origin_of(path) if path.exists() else None
    if found is None or found == expected:
        return found == expected
    if not found:
        changes.add("pictures that this command did not make")
        return False
    for key in sorted({*found, *expected} - {"batch"}):
        before, now = found.get(key), expected.get(key)
        if before != now:
            hashed = key in ("base", "adapter", "lora", "embedding") and before and now
            changes.add(
                f"another {key}"
                if hashed or key == "prompt"
                else f"{key} {before} before, now {now}"
            )
    return False


def make_pictures(
    gallery: Gallery,
    rows: Sequence[Row],
    todo: Mapping[str, Sequence[Batch]],
    pipelines: Pipelines,
    made: Callable[[int], object],
) -> None:
    """`todo` by row; `made` is told how many pictures there are more."""
    wanted = [row for row in rows if todo[row.name]]
    for row in wanted:
        folder = gallery.path(row, 0).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PictureError(f"{folder} could not be made: {one_line(error)}") from error
    for row in _by_base(wanted):
        settings = row.settings()
        pipe = pipelines.of(row.base)
        with applied(pipe, row):
            for batch in todo[row.name]:
                for index, image in zip(
                    range(*batch), _draw(pipe, row, gallery, batch), strict=True
                ):
                    save(image, gallery.path(row, index), gallery.origin(settings, index, batch))
                made(batch[1] - batch[0])


def try_rows(rows: Sequence[Row], pipelines: Pipelines) -> None:
    """That every base can be opened and every row be put on it, before an hour is spent."""
    # The first base comes last, and is still there when it is needed.
    for row in reversed(_by_base(rows)):
        with applied(pipelines.of(row.base), row):
            pass


def _by_base(rows: Sequence[Row]) -> list[Row]:
    bases = list(dict.fromkeys(row.base for row in rows))
    return sorted(rows, key=lambda row: bases.index(row.base))


def _draw(pipe: Any, row: Row, gallery: Gallery, batch: Batch) -> Iterator[Image.Image]:
    protocol = gallery.protocol
    size = {} if protocol.size is None else {"height": protocol.size, "width": protocol.size}
    try:
        drawn = pipe(
            [row.text(prompt) for prompt in gallery.prompts[slice(*batch)]],
            # On the CPU everywhere, so that the noise is the same everywhere.
            generator=[generator(protocol.seed, index) for index in range(*batch)],
            num_inference_steps=protocol.steps,
            guidance_scale=protocol.guidance,
            output_type="pil",
            **size,
        ).images
    except torch.OutOfMemoryError as error:
        raise PictureError(
            f"row {row.name!r}: no memory for a batch of {batch[1] - batch[0]} pictures; give a "
            "smaller --batch-size"
        ) from error
    except REFUSALS as error:
        raise PictureError(f"row {row.name!r}: {one_line(error)}") from error
    return iter(drawn)


def save(image: Image.Image, path: Path, origin: Mapping[str, Any]) -> None:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(CHUNK, json.dumps(origin))
    part = path.with_name(f"{path.name}.part")
    try:
        image.save(part, format="PNG", pnginfo=chunk)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PictureError(
            f"{path} could not be written: {one_line(error)}; what is there is kept, and the same "
            "command goes on from it"
        ) from error
