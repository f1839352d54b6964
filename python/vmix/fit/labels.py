"""The labels that a fit is given: words for both sides of each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from vmix.fit.errors import FitError

__all__ = ["LABEL_SETS", "FitLabel", "Labels", "Words", "read_labels"]

Words: TypeAlias = str | Sequence[str]
"""Words of one side, or several phrasings of them, whose effects are averaged."""
Labels: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Sequence[FitLabel]"

LABEL_SETS: Mapping[str, Path] = {
    "default": Path(__file__).with_name("fit_labels.toml"),
    "anime": Path(__file__).with_name("fit_labels_anime.toml"),
}
"""The built-in sets."""

# What `vmix init` gives to labels without a negative: rare tokens, which say nothing.
RARE = {
    *("sks", "nmwx", "nlwx", "kprs", "bdg", "scd", "hns", "kts", "pgs", "bsf", "bgs", "tls"),
    *("pkk", "spp", "brs", "cbp", "hcs", "ttm", "smx", "csn", "slv", "tmw", "cws", "lhp"),
    *("ntv", "bsp", "bln", "fbs", "mgt", "rcn"),
}
_KEYS = ("name", "dimension", "positive", "negative", "range", "step", "display_names")


@dataclass(frozen=True)
class FitLabel:
    """Words that mean having a label, and words that mean the opposite, or none."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()
    dimension: str = ""
    range: tuple[float, float] | None = None
    step: float | None = None
    display_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        what = f"label {self.name!r}"
        if not self.name.strip() or "\0" in self.name or self.name in ("all", "none"):
            raise FitError(f"{what}: expected a name; `all` and `none` are reserved")
        for side in ("positive", "negative"):
            object.__setattr__(self, side, _words(self.name, getattr(self, side)))
        if not self.positive:
            raise FitError(f"{what}: expected words for its positive side, found none")
        for words in (*self.positive, *self.negative):
            self._check(words)
        if self.range is not None:
            low, high = self.range
            if not -math.inf < low <= 0 <= high < math.inf or low == high:
                raise FitError(
                    f"{what}: expected a range from 0 or below to 0 or above, found {low} to {high}"
                )
        if self.step is not None and not 0 < self.step < math.inf:
            raise FitError(f"{what}: expected a step above 0, found {self.step}")

    def _check(self, words: str) -> None:
        if not words.strip() or "\0" in words:
            raise FitError(
                f"label {self.name!r}: empty words change nothing. Leave `negative` out for a "
                "label that has one side"
            )
        if re.fullmatch(r"\[[^\]]*\]", words.strip()) or words.strip().lower() in RARE:
            raise FitError(
                f"label {self.name!r}: {words!r} is a rare identifier, which means nothing to the "
                "base before training. A fit needs words such as 'dark' or 'muted colors', or no "
                "negative at all"
            )

    @property
    def sides(self) -> dict[str, tuple[str, ...]]:
        sides = {"positive": self.positive, "negative": self.negative}
        return {side: words for side, words in sides.items() if words}


def read_labels(labels: Labels) -> tuple[FitLabel, ...]:
    """Labels of a TOML file, of a built-in set (`default`, `anime`), or of a mapping:
    name -> words, or name -> (positive words, negative words). In a pair, a list of phrasings may
    stand in place of words, and None where there are no negative ones."""
    if isinstance(labels, str) and labels in LABEL_SETS:
        labels = LABEL_SETS[labels]
    if isinstance(labels, (str, os.PathLike)):
        found = _of_file(Path(labels))
    elif isinstance(labels, Mapping):
        found = tuple(_of_entry(name, entry) for name, entry in labels.items())
    elif isinstance(labels, Sequence) and all(isinstance(one, FitLabel) for one in labels):
        found = tuple(cast("Sequence[FitLabel]", labels))
    else:
        raise FitError(
            "labels: expected a file, or a mapping such as {'light': ('bright', 'dark')}, found "
            f"{type(labels).__name__}"
        )
    if not found:
        raise FitError("labels: expected at least one, found none")
    seen: set[str] = set()
    for label in found:
        if label.name.casefold() in seen:
            raise FitError(f"label {label.name!r}: defined twice")
        seen.add(label.name.casefold())
    return found


def _of_file(path: Path) -> tuple[FitLabel, ...]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef, import-not-found]
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FitError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise FitError(f"{path}: {error.strerror}") from None
    tables = entries.get("label")
    if [*entries] != ["label"] or not isinstance(tables, list):
        found = ", ".join(entries) or "nothing"
        raise FitError(f"{path}: expected only [[label]] tables, found {found}")
    return tuple(_of_table(path, table) for table in tables)


def _of_table(path: Path, table: Any) -> FitLabel:
    name = table.get("name") if isinstance(table, dict) else None
    if not isinstance(name, str):
        raise FitError(f"{path}: a label without a name")
    if unknown := [key for key in table if key not in _KEYS]:
        raise FitError(
            f"{path}: label {name!r}: expected the keys {', '.join(_KEYS)}; found {unknown[0]!r}"
        )
    limits, step, names = table.get("range"), table.get("step"), table.get("display_names", {})
    pair = isinstance(limits, list) and len(limits) == 2 and all(map(_is_number, limits))
    for key, fits, expected in (
        ("range", limits is None or pair, "[low, high]"),
        ("step", step is None or _is_number(step), "a number"),
        (
            "display_names",
            isinstance(names, dict) and all(isinstance(one, str) for one in names.values()),
            "a table of texts",
        ),
    ):
        if not fits:
            raise FitError(
                f"{path}: label {name!r}: expected {key} to be {expected}, found {table[key]!r}"
            )
    return FitLabel(
        name,
        table.get("positive", name),
        table.get("negative", ()),
        str(table.get("dimension", "")),
        None if limits is None else (float(limits[0]), float(limits[1])),
        step,
        names,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _of_entry(name: Any, entry: Any) -> FitLabel:
    if isinstance(entry, str):
        entry = (entry, None)
    # A list of two could be two phrasings or two sides.
    if not isinstance(name, str) or not isinstance(entry, tuple) or len(entry) != 2:
        raise FitError(
            f"label {name!r}: expected words, or (positive words, negative words) with None where "
            f"there are no negative ones, found {entry!r}"
        )
    return FitLabel(name, *entry)


def _words(name: str, words: Any) -> tuple[str, ...]:
    if words is None:
        return ()
    if isinstance(words, str):
        return (words,)
    if not isinstance(words, Iterable) or not all(isinstance(one, str) for one in words):
        raise FitError(f"label {name!r}: expected words or a list of phrasings, found {words!r}")
    return tuple(words)
