"""From scores to labels: the lowest and the highest share of a set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cuts(scores: Array, quantiles: tuple[float, float], sign: int = 1) -> tuple[float, float]:
    """The scores at the two quantiles, worse one first; NaN where there is no score."""
    good = sign * scores[np.isfinite(scores)]
    if not good.size:
        return float("nan"), float("nan")
    low, high = np.quantile(good, quantiles)
    return float(sign * low), float(sign * high)


def labelled(scores: Array, low: float, high: float, sign: int = 1) -> list[int | None]:
    """0 up to the lower cut, 1 from the upper one, None between them and without a score.

    Equal scores get equal labels; where the cuts coincide, those that lie on them are unknown."""
    worst, best = scores * sign <= low * sign, scores * sign >= high * sign
    return [
        None if low_end == high_end else int(high_end)
        for low_end, high_end in zip(worst, best, strict=True)
    ]


def alike(columns: Sequence[tuple[str, Array]], limit: float = 0.9) -> list[tuple[str, str, float]]:
    """Pairs of labels whose rank correlation is so high that training could not tell them apart."""
    found = []
    for index, (first, a) in enumerate(columns):
        for second, b in columns[:index]:
            both = np.isfinite(a) & np.isfinite(b)
            if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
                continue
            r = float(np.corrcoef(_ranks(a[both]), _ranks(b[both]))[0, 1])
            if abs(r) >= limit:
                found.append((second, first, r))
    return found


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
