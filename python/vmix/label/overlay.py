"""`aesthetics.jsonl`: what the command writes, and what people made of it.

One line per image: `file_name`; `aesthetics`, the labels that training reads; `auto`, those of them
that the command wrote; `scores`, raw numbers by measure, null where there is nothing to measure;
`image`, by which a changed image is noticed. Where `aesthetics` and `auto` differ, a person has
been at work: such a label stays as it is and leaves `auto`, so that it stays so for good.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from vmix.dataset import json_lines, parse_json, parse_labels
from vmix.label.errors import LabelError

Entry = dict[str, Any]


def read_overlay(path: Path) -> dict[str, Entry]:
    """Lines by file name. One that cannot be read ends the command: it may be a person's work, and
    would be lost in the next write."""
    entries: dict[str, Entry] = {}
    if not path.is_file():
        return entries
    for number, line in json_lines(path):
        try:
            entry = parse_json(line)
            _check(entry)
        except ValueError as error:
            raise LabelError(f"{path}, line {number}: {error}") from error
        if entry["file_name"] in entries:
            raise LabelError(f"{path}, line {number}: {entry['file_name']} has a line already")
        entries[entry["file_name"]] = entry
    return entries


def _check(entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError("expected an object with a file_name")
    for part in ("aesthetics", "auto"):
        try:
            parse_labels(entry.setdefault(part, {}))
        except ValueError as error:
            raise ValueError(f"{part}: {str(error).removeprefix('aesthetics: ')}") from error
    scores = entry.setdefault("scores", {})
    if not isinstance(scores, dict) or not all(
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        for value in scores.values()
    ):
        raise ValueError("scores: expected an object of numbers")
    image = entry.setdefault("image", {})
    if not isinstance(image, dict):
        raise ValueError("image: expected an object")


def new_entry(name: str) -> Entry:
    return {"file_name": name, "aesthetics": {}, "auto": {}, "scores": {}, "image": {}}


def write_overlay(path: Path, entries: Mapping[str, Entry], order: Iterable[str]) -> None:
    """The set's images in its order, then lines of others, which are kept: a set can be labelled in
    parts. Written beside it and renamed."""
    path = path.resolve()  # a link stays one
    names = dict.fromkeys([*(name for name in order if name in entries), *entries])
    new = path.with_name(path.name + ".part")
    with new.open("w", encoding="utf-8", newline="\n") as file:
        for name in names:
            file.write(json.dumps(entries[name], ensure_ascii=False) + "\n")
    os.replace(new, path)


def add_scores(
    entry: Entry, scores: Mapping[str, float], image: Mapping[str, Any], same: bool
) -> None:
    """Scores of another image are dropped."""
    kept = entry["scores"] if same else {}
    entry["scores"] = {**kept, **{k: _number(v) for k, v in scores.items()}}
    entry["image"] = dict(image)


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def relabel(
    entry: Entry, new: Mapping[str, int | None], listed: Sequence[str]
) -> tuple[Set[str], Set[str]]:
    """Writes labels where no person did. Returns the names that were kept by hand, and those that
    went because they are not `listed` any more."""
    now, auto = entry["aesthetics"], entry["auto"]
    values, written = parse_labels(now), parse_labels(auto)
    labels: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    kept, gone = set(), set()
    for name in dict.fromkeys([*listed, *now, *auto]):
        if name in now and (name not in auto or values[name] != written[name]):
            labels[name] = now[name]
            kept.add(name)
        elif name in auto and name not in now:
            ours[name] = new.get(name, auto[name])
            kept.add(name)
        elif name in new:
            labels[name] = ours[name] = new[name]
        elif name in auto and name in listed:
            labels[name] = ours[name] = now[name]
        elif name in auto:
            gone.add(name)
    entry["aesthetics"], entry["auto"] = labels, ours
    return kept, gone


def tally(entries: Iterable[Entry], label: str) -> Counter[str]:
    """How many images have it as negative, unknown, positive or a score between."""
    kinds = {0.0: "negative", 1.0: "positive", None: "unknown"}
    counts: Counter[str] = Counter()
    for entry in entries:
        values = parse_labels({k: v for k, v in entry["aesthetics"].items() if k == label})
        if label in values:
            counts[kinds.get(values[label], "between")] += 1
    return counts
