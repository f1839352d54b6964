"""Going through a set: what has scores already, what is looked at, saved at intervals."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vmix.dataset import Example
from vmix.label.errors import LabelError
from vmix.label.learned import Learned
from vmix.label.overlay import Entry, add_scores, new_entry, read_overlay, write_overlay
from vmix.label.pixels import Look, Task, Wanted, look

INTERVAL = 30.0
"""Seconds between saves."""
BATCH = 32


class Scoring:
    """Scores of a set's images, kept in its overlay."""

    def __init__(
        self,
        examples: Sequence[Example],
        overlay: Path,
        keys: Sequence[str],
        learned: Learned,
        again: bool = False,
    ) -> None:
        """`keys` are those of pixel measures; with `again`, there are new scores for all images."""
        self.examples = examples
        self.overlay = overlay
        self.learned = learned
        self.all = Wanted(tuple(keys), bool(learned.keys))
        self.again = again
        self.scored = 0
        self.problems: dict[str, str] = {}
        """Why images have no scores, by key."""
        self._images: dict[str, dict[str, Any]] = {}
        self._scores: dict[str, tuple[dict[str, float], bool]] = {}
        """Not saved yet, and whether the image is the one of the scores that there are."""

    def run(self, workers: int) -> None:
        """Stopped half way, it saves what it has."""
        tasks = list(self._todo(read_overlay(self.overlay)))
        if tasks and self.all.seen:
            self.learned.load()
        try:
            self._score(tasks, workers)
        finally:
            self._save()

    def _todo(self, entries: dict[str, Entry]) -> Iterator[Task]:
        for example in self.examples:
            try:
                example.key.encode()
                stamp = _stamp(example)
            except UnicodeEncodeError:
                self.problems[example.key] = "its name is not UTF-8"
                continue
            except OSError as error:
                missing = isinstance(error, FileNotFoundError)
                self.problems[example.key] = "no such image" if missing else str(error)
                continue
            self._images[example.key] = stamp
            entry = entries.get(example.key)
            if entry is None or self.again:
                yield Task(example, None, self.all, self.all)
                continue
            known, image = entry["scores"], entry["image"]
            lacking = Wanted(
                tuple(key for key in self.all.keys if key not in known),
                any(key not in known for key in self.learned.keys),
            )
            if lacking != Wanted() or any(image.get(k) != v for k, v in stamp.items()):
                yield Task(example, image.get("sha256"), lacking, self.all)

    def _score(self, tasks: Sequence[Task], workers: int) -> None:
        waiting: list[tuple[str, Image.Image]] = []
        saved = time.monotonic()
        with tqdm(total=len(tasks), desc="scoring", unit="img", disable=None) as bar:
            for task, future in _ahead(tasks, workers):
                key = task.example.key
                try:
                    found = future.result()
                except (OSError, ValueError) as error:
                    self.problems[key] = str(error)
                else:
                    self._images[key]["sha256"] = found.digest
                    self._scores[key] = (dict(found.scores), found.same)
                    self.scored += bool(found.scores) or found.image is not None
                    if found.image is not None:
                        waiting.append((key, found.image))
                if len(waiting) == BATCH:
                    self._see(waiting)
                bar.update()
                if time.monotonic() - saved > INTERVAL:
                    with suppress(LabelError):  # someone may be at it; the last save insists
                        self._save()
                    saved = time.monotonic()
            self._see(waiting)

    def _see(self, waiting: list[tuple[str, Image.Image]]) -> None:
        if not waiting:
            return
        columns = self.learned([image for _, image in waiting])
        for index, (name, _) in enumerate(waiting):
            # After a save the image's line holds the rest.
            scores, _ = self._scores.setdefault(name, ({}, True))
            scores.update({key: column[index] for key, column in columns.items()})
        waiting.clear()

    def _save(self) -> None:
        """Into the file as it is now: people may have edited it meanwhile."""
        if not self._scores:
            return
        entries = read_overlay(self.overlay)
        for key, (scores, same) in self._scores.items():
            entry = entries.setdefault(key, new_entry(key))
            add_scores(entry, scores, self._images[key], same)
        write_overlay(self.overlay, entries, (example.key for example in self.examples))
        self._scores = {}


def _stamp(example: Example) -> dict[str, Any]:
    """By which an unchanged image is known without reading it."""
    stat = example.file.stat()
    size = stat.st_size if example.size is None else example.size
    return {"bytes": size, "modified": stat.st_mtime_ns // 1000}  # μs: ns do not fit JSON's doubles


def _ahead(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Future[Look]]]:
    """In order, some of them under way: decoders and numpy let go of Python's lock."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Task, Future[Look]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(look, task)))
            if len(pending) > 2 * workers:
                yield pending.popleft()
        yield from pending
    finally:
        pool.shutdown(cancel_futures=True)
