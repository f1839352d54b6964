"""Which measure serves a label: one per dimension, unless the user names another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmix import Label
from vmix.label.errors import LabelError
from vmix.label.pixels import DETAIL, WHOLE, key_of

CLIP_IQA, LAION = "clip-iqa", "laion"

BY_DIMENSION: Mapping[str, str] = {
    "color": "colourfulness",
    "lighting": "brightness",
    "focus": "sharpness",
    "composition": "-off-centre",
    "texture": "laplacian-variance",
    "aesthetics": LAION,
}
"""A minus means that lower is better."""

CONTRARIES: Mapping[str, str] = {
    "color": "dull, discordant colors",
    "lighting": "harsh, unnatural lighting",
    "composition": "unbalanced, cluttered composition",
    "focus": "blurry, out of focus",
    "texture": "smeared, coarse texture",
    "emotion": "blank, expressionless",
}
"""Second texts of CLIP-IQA pairs. A label's own negative is a rare token, which says nothing."""

Pair = tuple[str, str]
Quantiles = tuple[float, float]


@dataclass(frozen=True)
class Choice:
    """What one label is cut by."""

    label: str
    measure: str
    """As the user says it; a minus where lower is better. Empty where nothing measures it."""
    key: str
    """What the scores are kept under."""
    quantiles: Quantiles
    why: str = ""
    """Why nothing does."""

    @property
    def sign(self) -> int:
        return -1 if self.measure.startswith("-") else 1


def pairs_of(labels: Sequence[Label], given: Mapping[str, Pair]) -> dict[str, Pair]:
    """A pair of texts for every label that has one."""
    pairs = {
        label.name: (label.positive[0], CONTRARIES[label.dimension])
        for label in labels
        if label.dimension in CONTRARIES
    }
    return {**pairs, **given}


def choose(
    labels: Sequence[Label],
    given: Mapping[str, str],
    quantiles: Mapping[str, Quantiles],
    default: Quantiles,
    resolution: int,
    clip_iqa: Mapping[str, str],
    laion: bool,
) -> list[Choice]:
    """A choice for every label. `clip_iqa` maps the labels that have a pair to the keys of their
    scores; it is empty without weights.

    Two labels cut by one measure would be one label, so a dimension's measure serves the first."""
    taken: set[str] = set()
    choices = []
    for label in labels:
        measure, why = given.get(label.name, ""), ""
        if not measure:
            measure, why = _default(label, taken, label.name in clip_iqa, laion)
        bare = measure.removeprefix("-")
        taken.add(bare)
        if bare == CLIP_IQA and label.name not in clip_iqa:
            raise LabelError(f"'{label.name}' by {CLIP_IQA}: {_needs(label, bool(clip_iqa))}")
        if bare == LAION and not laion:
            raise LabelError(f"'{label.name}' by {LAION}: --laion DIR with its weights is missing")
        if bare and bare not in (CLIP_IQA, LAION, *WHOLE, *DETAIL):
            known = ", ".join((*WHOLE, *DETAIL, CLIP_IQA, LAION))
            raise LabelError(f"--measure '{label.name}': expected one of {known}; found '{bare}'")
        key = clip_iqa[label.name] if bare == CLIP_IQA else key_of(bare, resolution)
        choices.append(Choice(label.name, measure, key, quantiles.get(label.name, default), why))
    return choices


def _default(label: Label, taken: set[str], paired: bool, laion: bool) -> tuple[str, str]:
    """The measure, or none and why."""
    first = BY_DIMENSION.get(label.dimension, "")
    bare = first.removeprefix("-")
    if first and bare not in taken and (first != LAION or laion):
        return first, ""
    if paired:
        return CLIP_IQA, ""
    if first and bare in taken:
        why = f"{bare} serves another label already"
    else:
        why = f"no measure for dimension '{label.dimension}'" if label.dimension else "no dimension"
    return "", f"{why}; label it by hand or take it out of the list: it is the same in every image"


def _needs(label: Label, weights: bool) -> str:
    if not weights:
        return "--clip-iqa DIR with its weights is missing"
    return f"give its two texts, --pair '{label.name}={label.positive[0]}|…'"
