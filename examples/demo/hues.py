"""What colour words do to pictures: measures and plots of the first half of teachers.py.

Labels are colour words, because what they do to a picture can be counted: the share of the
object's coloured pixels that have the asked hue, against how like the unsteered picture the result
still is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from demo import Images, Pair, article, generate
from numpy.typing import NDArray
from vmix import Adapter
from vmix.diffusers import load_vmix, set_vmix_scale, unload_vmix
from vmix.measures import HUE_BANDS, foreground, hue_and_chroma, hue_matches, luma

COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
# Objects that come in every colour; as prompts they name none.
OBJECTS = (
    *("ball", "boat", "book", "bus", "butterfly", "car", "crown", "cup"),
    *("fish", "gem", "gift", "hat", "heart", "house", "shirt", "shoe"),
)
SEED = 7000  # and the following, one for every object
SHARE, FOUND, LIKE = MEASURED = ("share of the hue", "pictures of the hue", "like unsteered")
COLOURED, TOLERANCE, FEWEST = 0.15, 10.0, 20  # chroma, degrees, pixels

GRID = (
    *(("red", "car"), ("yellow", "butterfly"), ("green", "hat")),
    *(("blue", "house"), ("purple", "fish"), ("pink", "gift")),
)

Values = Mapping[str, NDArray[np.float64]]
Spread = dict[str, float]


# --- measures ------------------------------------------------------------------------------------


def hue_share(images: Images, word: str) -> NDArray[np.float64]:
    """Share of the object's coloured pixels whose hue the word stands for; 0 where few have any."""
    hue, chroma = hue_and_chroma(images)
    coloured = (foreground(images) > 0.5) & (chroma > COLOURED)
    start, end = HUE_BANDS[word]
    asked = (hue - start + TOLERANCE) % 360 <= (end - start) % 360 + 2 * TOLERANCE
    total, own = (part.sum((1, 2)) for part in (coloured, coloured & asked))
    return np.where(total < FEWEST, 0.0, own / np.maximum(total, 1))


def likeness(images: Images, others: Images) -> NDArray[np.float64]:
    """Correlation of luma, pair by pair."""
    x, y = (luma(part).reshape(len(part), -1) for part in (images, others))
    x, y = (part - part.mean(1, keepdims=True) for part in (x, y))
    norm = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return np.asarray((x * y).sum(1) / np.maximum(norm, 1e-9))


def measured(images: Mapping[str, Images], bare: Images) -> dict[str, Values]:
    """Every measure of the pictures of every word."""
    return {
        word: {
            SHARE: hue_share(part, word),
            FOUND: hue_matches(part, word).astype(np.float64),
            LIKE: likeness(part, bare),
        }
        for word, part in images.items()
    }


def over(values: Mapping[str, Values], name: str, words: Iterable[str]) -> NDArray[np.float64]:
    """Of every object, the mean over words."""
    return np.asarray(np.mean([values[word][name] for word in words], axis=0))


def interval(
    rows: Sequence[NDArray[np.float64]],
    statistic: Callable[[NDArray[np.float64]], float] = lambda means: means[0],
) -> Spread:
    """A statistic of the rows' means over objects, and its 95 % bootstrap interval over objects."""
    values, count = np.stack(rows), len(OBJECTS)
    picks = np.random.default_rng(0).integers(count, size=(4000, count))
    low, high = np.quantile([statistic(m) for m in values[:, picks].mean(-1).T], [0.025, 0.975])
    return {"mean": float(statistic(values.mean(1))), "low": float(low), "high": float(high)}


def summary(values: Mapping[str, Values]) -> dict[str, Any]:
    words = {
        word: {name: float(part[name].mean()) for name in MEASURED}
        for word, part in values.items()
    }  # fmt: skip
    return {**{name: interval([over(values, name, values)]) for name in MEASURED}, "words": words}


def against(values: Mapping[str, Values], curve: Sequence[Mapping[str, Values]]) -> Spread:
    """Share of the hue less that of the curve, of the same words, where it is as much alike."""

    def difference(means: NDArray[np.float64]) -> float:
        (like, *likes), (share, *shares) = means.reshape(2, -1)
        x, y = np.array(sorted(zip(likes, shares, strict=True))).T
        return float(share - np.interp(like, x, y))

    levels = (values, *curve)
    return interval(
        [over(part, name, values) for name in (LIKE, SHARE) for part in levels], difference
    )


# --- pictures ------------------------------------------------------------------------------------

Words = dict[str, Images]  # the pictures of every colour word


def steered(
    pipe: Any, source: Adapter, words: Iterable[str], pairs: Sequence[Pair],
    scales: Mapping[str, float], bar: Any,
) -> dict[str, Words]:  # fmt: skip
    made: dict[str, Words] = {name: {} for name in scales}
    for word in words:
        load_vmix(pipe, source, word)
        try:
            for name, scale in scales.items():
                set_vmix_scale(pipe, scale)
                made[name][word] = generate(pipe, pairs, bar)
        finally:
            unload_vmix(pipe)
    return made


def named(pipe: Any, pairs: Sequence[Pair], objects: Sequence[str], bar: Any) -> Words:
    """What the adapter is compared with: the same noise, and the word in the prompt."""
    seeds = [seed for _, seed in pairs]
    return {
        word: generate(
            pipe,
            [(article(f"{word} {o}"), s) for o, s in zip(objects, seeds, strict=True)],
            bar,
        )
        for word in COLOURS
    }


# --- the plot ------------------------------------------------------------------------------------

INK = "#1f2328"
INKS = {
    "red": "#d1242f", "yellow": "#bf8700", "green": "#1a7f37",
    "blue": "#0969da", "purple": "#8250df", "pink": "#e275ad",
}  # fmt: skip


def means(levels: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    points = [(level[LIKE]["mean"], level[SHARE]["mean"]) for level in levels]
    return [x for x, _ in points], [y for _, y in points]


def cross(axis: Any, level: Mapping[str, Any], colour: str) -> None:
    """95 % intervals over objects."""
    a, b = level[LIKE], level[SHARE]
    axis.plot([a["low"], a["high"]], [b["mean"]] * 2, color=colour, lw=1, alpha=0.5)
    axis.plot([a["mean"]] * 2, [b["low"], b["high"]], color=colour, lw=1, alpha=0.5)


def spread(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['mean']:{sign}.2f} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"
