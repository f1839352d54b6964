"""Three ways to a label: its words in the prompt, text pairs, training on pictures.

For the report. One label at a time is positive in one picture and negative in another of
the same prompt and noise; the effect is the difference in the label's own measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from demo import GUIDANCE, HERE, Images, Pair, every, generate, with_vmix
from matplotlib.figure import Figure
from numpy.typing import NDArray
from vmix import Adapter

Values = Mapping[str, NDArray[np.float64]]
Interval = Callable[[NDArray[np.float64]], dict[str, float]]
Side = tuple[Images, Images]  # a label positive, negative

WORDS: dict[str, dict[str, str]] = yaml.safe_load((HERE / "words.yaml").read_text("utf-8"))
GUIDANCES = (GUIDANCE, 7.5)
SCALES = (0.5, 1.0, 1.5, 2.0)
PROMPT, PAIRS, TRAINED = "words in the prompt", "text pairs", "trained on pictures"
INKS = {PROMPT: "#1f2328", PAIRS: "#8250df", TRAINED: "#0969da"}


def sides(way: str, adapter: Adapter, label: str) -> tuple[dict[str, float], dict[str, float]]:
    """Selections with the label positive and negative.

    The others are where they change nothing; a trained adapter has no such place, there they are
    positive, as in most of its uses.
    """
    rest = every(adapter) if way == TRAINED else {x.name: x.neutral or 0.0 for x in adapter.labels}
    return {**rest, label: 1.0}, {**rest, label: 0.0}


def pictures(
    pipe: Any, sources: Mapping[str, Adapter], pairs: Sequence[Pair], guidance: float, bar: Any
) -> Iterator[tuple[str, float, str, Side]]:
    """Way, strength λ, label, and the two sides."""
    for label, words in WORDS.items():
        told = [
            generate(pipe, [(f"{p}, {words[end]}", s) for p, s in pairs], bar, guidance)
            for end in ("positive", "negative")
        ]
        yield PROMPT, 1.0, label, (told[0], told[1])
        for way, source in sources.items():
            both = sides(way, source, label)
            for scale in SCALES:
                made = [
                    with_vmix(pipe, source, pairs, side, scale, bar, guidance=guidance)
                    for side in both
                ]
                yield way, scale, label, (made[0], made[1])


def count(pairs: Sequence[Pair]) -> int:
    """How many pictures `measure` makes."""
    each = 1 + 2 * len(WORDS) * (1 + (len(INKS) - 1) * len(SCALES))
    return each * len(GUIDANCES) * len(pairs)


def measure(
    pipe: Any, sources: Mapping[str, Adapter], pairs: Sequence[Pair],
    judged: Callable[[Images], Values], own: Mapping[str, str], fidelity: Sequence[str],
    interval: Interval, bar: Any,
) -> dict[str, Any]:  # fmt: skip
    """By guidance, way and λ: each label's effect on its own measure, and the prompt's fidelity.

    Fidelity is that of both sides against the base with the same noise and guidance.
    """
    result: dict[str, Any] = {}
    for guidance in GUIDANCES:
        base = judged(generate(pipe, pairs, bar, guidance))
        levels = {name: interval(base[name]) for name in (*own.values(), *fidelity)}
        ways: dict[str, Any] = {}
        kept: dict[tuple[str, str], dict[str, list[NDArray[np.float64]]]] = {}
        for way, scale, label, images in pictures(pipe, sources, pairs, guidance, bar):
            positive, negative = (judged(part) for part in images)
            row = ways.setdefault(way, {}).setdefault(f"{scale:g}", {})
            row[label] = interval(positive[own[label]] - negative[own[label]])
            lost = kept.setdefault((way, f"{scale:g}"), {name: [] for name in fidelity})
            for name in fidelity:
                lost[name].append((positive[name] + negative[name]) / 2 - base[name])
        for (way, scale), lost in kept.items():
            ways[way][scale] |= {n: interval(np.mean(parts, axis=0)) for n, parts in lost.items()}
        result[f"{guidance:g}"] = {"base": levels, "ways": ways}
    return result


def plot(result: Mapping[str, Any], drawn: Mapping[str, float], path: Path) -> None:
    """A panel for each label: its effect against λ, of every way and guidance."""
    canvas = Figure(figsize=(15, 3.6), layout="constrained", dpi=110)
    axes = canvas.subplots(1, len(WORDS))
    for axis, label in zip(axes, WORDS, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eaeef2")
        axis.set_axisbelow(True)
        for guidance, dashes in zip(result, ("-", "--"), strict=True):
            for way, by_scale in result[guidance]["ways"].items():
                rows = {float(scale): row[label] for scale, row in by_scale.items()}
                if way == PROMPT:
                    rows = {SCALES[0]: rows[1.0], SCALES[-1]: rows[1.0]}  # it has no λ
                means = [row["mean"] for row in rows.values()]
                name = f"{way}, guidance {guidance}"
                axis.plot(list(rows), means, dashes, color=INKS[way], lw=1.6, label=name)
                if dashes == "-" and way != PROMPT:
                    ends = ([row[end] for row in rows.values()] for end in ("low", "high"))
                    axis.fill_between(list(rows), *ends, color=INKS[way], alpha=0.15, lw=0)
        axis.axhline(drawn[label], color="#8c959f", ls=":", lw=1.5, label="drawn look")
        axis.axhline(0, color="#8c959f", lw=0.8)
        axis.set_title(label, fontsize=11)
        axis.set_xlabel("λ")
        axis.set_xticks(SCALES)
    canvas.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    canvas.savefig(path)
