"""What the command says when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vmix.label.choice import Choice

MOST = 20
"""Lines of one kind of trouble."""


@dataclass(frozen=True)
class Row:
    """One label's outcome."""

    choice: Choice
    cuts: tuple[float, float]
    counts: Mapping[str, int]
    """Of labels as they stand, by negative, unknown, positive."""
    by_hand: int
    no_score: int


def table(rows: Sequence[Row]) -> Iterator[str]:
    head = ("label", "measure", "negative", "unknown", "positive", "by hand", "no score")
    cells: list[tuple[str, ...]] = [(*head, "  cuts")]
    for row in rows:
        if row.choice.measure:
            comparison = ("<=", ">=") if row.choice.sign > 0 else (">=", "<=")
            cut = ", ".join(f"{c} {v:.4g}" for c, v in zip(comparison, row.cuts, strict=True))
        else:
            cut = row.choice.why
        counts = [row.counts.get(kind, 0) for kind in ("negative", "unknown", "positive")]
        numbers = [str(number) for number in (*counts, row.by_hand, row.no_score)]
        cells.append((row.choice.label, row.choice.measure or "none", *numbers, f"  {cut}"))
    widths = [max(len(line[n]) for line in cells) for n in range(len(head))]
    for line in cells:
        words = [line[n].ljust(widths[n]) if n < 2 else line[n].rjust(widths[n]) for n in range(7)]
        yield f"  {'  '.join(words)}{line[7]}"


def troubles(problems: Mapping[str, str]) -> Iterator[str]:
    listed = list(problems.items())
    yield from (f"  skipped: {place}: {what}" for place, what in listed[:MOST])
    if len(listed) > MOST:
        yield f"  … and {len(listed) - MOST} more"


def gone(counts: Counter[str]) -> Iterator[str]:
    for label, count in counts.items():
        yield f"  '{label}' is not in the list: its automatic labels went from {count} images"


def likeness(pairs: Sequence[tuple[str, str, float]]) -> Iterator[str]:
    for first, second, r in pairs:
        yield (
            f"  '{first}' and '{second}' order the images alike (rank correlation {r:.2f}): "
            "training cannot tell them apart"
        )
