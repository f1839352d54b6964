"""`vmix label`, from the arguments to the report."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import vmix
from vmix import VMixError
from vmix.dataset import OVERLAY, DatasetError, Example, parse_labels, read_dataset
from vmix.label import report, sheet
from vmix.label.choice import Choice, choose, pairs_of
from vmix.label.cut import alike, cuts, labelled
from vmix.label.errors import LabelError
from vmix.label.learned import Learned
from vmix.label.options import parse_args
from vmix.label.overlay import Entry, read_overlay, relabel, tally, write_overlay
from vmix.label.pixels import opened
from vmix.label.scoring import Scoring

T = TypeVar("T")
Array = NDArray[np.float64]


def main(argv: Sequence[str] | None = None) -> None:
    for stream in (sys.stdout, sys.stderr):  # file names may be no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # about sizes and palettes
    args = parse_args(argv)
    try:
        status = label(args)
    except BrokenPipeError:  # whoever was reading the report has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (LabelError, DatasetError, VMixError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except ModuleNotFoundError as error:
        print(f"error: vmix label needs {error.name}: pip install {error.name}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("stopped; scores so far are kept for the next run", file=sys.stderr)
        status = 130
    raise SystemExit(status)


def label(args: argparse.Namespace) -> int:
    """Returns the exit status."""
    labels = vmix.read_label_list(args.labels)
    names = [each.name for each in labels]
    quantiles = _by_label("quantiles", args.quantiles, ["", *names])
    pairs = pairs_of(labels, _by_label("pair", args.pair, names))
    learned = Learned(args.clip_iqa, pairs, args.laion)
    choices = choose(
        labels,
        _by_label("measure", args.measure, names),
        quantiles,
        quantiles.get("", (0.3, 0.7)),
        args.resolution,
        learned.by_label,
        args.laion is not None,
    )
    measured = [choice for choice in choices if choice.measure]
    data = read_dataset(args.data)
    folder = args.data if args.data.is_dir() else args.data.parent
    sheets = _sheets(args, folder, data.examples, [choice.label for choice in measured])

    keys = dict.fromkeys(choice.key for choice in measured if choice.key not in learned.keys)
    overlay = folder / OVERLAY
    scoring = Scoring(data.examples, overlay, list(keys), learned, args.rescore)
    scoring.run(args.workers)

    entries = read_overlay(overlay)
    usable = [e for e in data.examples if e.key in entries and e.key not in scoring.problems]
    lines = [entries[example.key] for example in usable]
    columns = {c.label: _column(lines, c.key) for c in measured}
    ends = {c.label: cuts(columns[c.label], c.quantiles, c.sign) for c in measured}
    hands, gone = _relabelled(lines, measured, columns, ends, names)
    if usable:
        write_overlay(overlay, entries, (example.key for example in data.examples))
        for choice in measured:
            scores, file = columns[choice.label], sheets[choice.label]
            _draw(choice, scores, ends[choice.label], usable, lines, hands, file)

    before = f" ({len(usable) - scoring.scored} from before)"
    news = before if 0 < scoring.scored < len(usable) else ""
    print(f"{args.data}: {len(data.examples)} images, {len(usable)} with scores{news}")
    kept = Counter(name for by_hand in hands for name in by_hand)
    rows = [
        report.Row(
            choice,
            ends.get(choice.label, (np.nan, np.nan)),
            tally(lines, choice.label),
            kept[choice.label],
            int((~np.isfinite(columns.get(choice.label, np.empty(0)))).sum()),
        )
        for choice in choices
    ]
    for part in (
        report.table(rows),
        report.likeness(alike(list(columns.items()))),
        report.gone(gone),
        report.troubles({**dict(data.problems), **scoring.problems}),
    ):
        print("".join(f"{line}\n" for line in part), end="")
    if not usable:
        print(f"error: {args.data}: no image could be scored", file=sys.stderr)
        return 1
    print(
        "Automatic labels, cut at quantiles of measures; the paper's images were chosen and "
        "labelled partly by people.\n"
        f"Correct `aesthetics` in {overlay}: corrections survive the next run."
    )
    if sheets:
        print(f"Contact sheets: {', '.join(map(str, sheets.values()))}")
    return 0


def _relabelled(
    lines: Sequence[Entry],
    choices: Sequence[Choice],
    columns: Mapping[str, Array],
    ends: Mapping[str, tuple[float, float]],
    names: Sequence[str],
) -> tuple[list[Set[str]], Counter[str]]:
    """Changes the lines. Returns what was kept by hand in each, and how many images labels that
    are not in the list went from."""
    new = {c.label: labelled(columns[c.label], *ends[c.label], c.sign) for c in choices}
    hands: list[Set[str]] = []
    gone: Counter[str] = Counter()
    for index, line in enumerate(lines):
        values = {name: column[index] for name, column in new.items()}
        by_hand, lost = relabel(line, values, names)
        hands.append(by_hand)
        gone.update(lost)
    return hands, gone


def _by_label(option: str, given: Iterable[tuple[str, T]], names: Sequence[str]) -> dict[str, T]:
    found = dict(given)
    for name in found:
        if name not in names:
            known = ", ".join(f"'{known}'" for known in names if known)
            raise LabelError(f"--{option}: there is no label '{name}' among {known}")
    return found


def _sheets(
    args: argparse.Namespace, folder: Path, examples: Sequence[Example], labels: Sequence[str]
) -> dict[str, Path]:
    """Where each label's sheet goes; never among images that have no list."""
    out: Path = args.out or folder.resolve().with_name(f"{folder.resolve().name}-aesthetics")
    listed = (folder / "metadata.jsonl").is_file() or any(e.size is not None for e in examples)
    if not listed and out.resolve().is_relative_to(folder.resolve()):
        raise LabelError(f"--out {out} is in the set, where its sheets would be images of it")
    names = sheet.file_names(labels)
    sheet.check_folder(out, list(names.values()))
    return {label: out / name for label, name in names.items()}


def _column(entries: Sequence[Entry], key: str) -> Array:
    scores = [entry["scores"].get(key) for entry in entries]
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def _draw(
    choice: Choice,
    scores: Array,
    ends: tuple[float, float],
    examples: Sequence[Example],
    lines: Sequence[Entry],
    hands: Sequence[Set[str]],
    file: Path,
) -> None:
    pictures = []
    for example, line, score, by_hand in zip(examples, lines, scores, hands, strict=True):
        value = parse_labels(line["aesthetics"]).get(choice.label)
        mine = choice.label in by_hand
        pictures.append(sheet.Picture(example.key, float(score), value, mine))
    found = {example.key: example for example in examples}

    def thumbnail(name: str) -> Image.Image | None:
        try:
            return opened(found[name].read(), sheet.CELL)
        except (OSError, ValueError):
            return None

    low, high = choice.quantiles
    better = "higher" if choice.sign > 0 else "lower"
    subtitle = (
        f"by {choice.key}, {better} is better; cut at {low:g} and {high:g} of {len(examples)} "
        "images; red: negative, grey: unknown, green: positive, ✎: by hand"
    )
    rows = sheet.sections(pictures, *ends, choice.sign)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(sheet.draw(choice.label, subtitle, rows, thumbnail), file)
