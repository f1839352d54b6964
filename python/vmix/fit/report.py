"""Whether a fit worked: what it explains, how large it is, and what to be warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from vmix.fit.prompts import Plan
from vmix.fit.solve import FittedSide
from vmix.fit.sums import LENGTHS, LayerSums, Sums

__all__ = ["Effect", "measure", "table", "warnings"]

SMALL = 0.05
"""Of the attention output: words that change less than this are hardly seen in a picture."""
UNEXPLAINED = 0.3
ALIKE = 0.8


@dataclass(frozen=True)
class Effect:
    """Numbers of one label, by name, as its file has them."""

    numbers: Mapping[str, float]
    nearest: str | None = None
    """The label whose direction is nearest, where there are several."""


def measure(plan: Plan, sums: Sums, fitted: Sequence[FittedSide]) -> dict[str, Effect]:
    """By label. Sizes are root mean squares over layers of ‖a·V_a‖/‖attention output‖."""
    norms = _Norms(sums, plan)
    by_label: dict[str, dict[str, tuple[int, _Values]]] = {}
    for i, (side, found) in enumerate(zip(plan.sides, fitted, strict=True)):
        by_label.setdefault(side.label, {})[side.side] = (i, _Values.of(found))
    directions = {
        name: _Values.direction({side: values for side, (_, values) in sides.items()})
        for name, sides in by_label.items()
    }
    cosines = {
        frozenset(pair): norms.cosine(*(directions[name] for name in pair))
        for pair in combinations(directions, 2)
    }
    effects = {}
    for name, sides in by_label.items():
        numbers: dict[str, float] = {}
        for which, (i, values) in sides.items():
            numbers[f"explained_{which}"] = fitted[i].explained
            numbers[f"size_{which}"] = norms.product(values, values) ** 0.5
            numbers[f"words_{which}"] = norms.words(i)
            numbers[f"ridge_{which}"] = fitted[i].ridge
            numbers[f"skipped_{which}"] = len(plan.prompts) - len(plan.sides[i].prompts)
            for length, size in norms.by_length(values).items():
                numbers[f"size_{which}_{length}_tokens"] = size
        if len(sides) == 2:
            numbers["cosine_sides"] = norms.cosine(*(values for _, values in sides.values()))
        others = {other: cosines[frozenset((name, other))] for other in directions if other != name}
        nearest = max(others, key=lambda other: abs(others[other]), default=None)
        if nearest is not None:
            numbers[f"cosine_with {nearest}"] = others[nearest]
        effects[name] = Effect({key: _rounded(x) for key, x in numbers.items()}, nearest)
    return effects


@dataclass(frozen=True)
class _Values:
    """V_a = profile·rows in every layer, in f64. The tables themselves would take much memory."""

    profile: Tensor
    rows: Mapping[str, Tensor]

    @classmethod
    def of(cls, side: FittedSide) -> _Values:
        return cls(side.profile.double(), {path: b.double() for path, b in side.rows.items()})

    @classmethod
    def direction(cls, sides: Mapping[str, _Values]) -> _Values:
        """Where a label moves the values: positive less negative."""
        signs = {"positive": 1.0, "negative": -1.0}
        profile = torch.cat([signs[side] * values.profile for side, values in sides.items()], 1)
        paths = next(iter(sides.values())).rows
        return cls(profile, {p: torch.cat([v.rows[p] for v in sides.values()]) for p in paths})


class _Norms:
    """Scalar products of values, as the base's attention weighs them."""

    def __init__(self, sums: Sums, plan: Plan) -> None:
        self.sums, self.plan = sums, plan
        group = plan.largest_group
        self.moments = {
            path: layer.moment[:, group].sum(0).cpu().double()
            for path, layer in sums.layers.items()
        }
        self.energies = {path: _energy(layer, group) for path, layer in sums.layers.items()}

    def product(self, one: _Values, other: _Values) -> float:
        """Mean over layers of Σ (a·V)·(a·V′)/Σ‖output‖²."""
        total = 0.0
        for path, moment in self.moments.items():
            between = one.profile.T @ moment @ other.profile  # [H, r, r′]
            b, c = (_heads(x.rows[path], len(moment)) for x in (one, other))
            total += float((between @ c).mul(b).sum()) / self.energies[path]
        return total / len(self.moments)

    def cosine(self, one: _Values, other: _Values) -> float:
        sizes = self.product(one, one) * self.product(other, other)
        return self.product(one, other) / sizes**0.5 if sizes > 0 else 0.0

    def words(self, side: int) -> float:
        """Size of what the words themselves change, on the prompts that they fit into."""
        group = self.plan.group(self.plan.sides[side])
        layers = self.sums.layers.values()
        shares = [float(one.change[:, side].sum()) / _energy(one, group) for one in layers]
        return float((sum(shares) / len(shares)) ** 0.5)

    def by_length(self, values: _Values) -> dict[int, float]:
        """Sizes for prompts of about so many tokens, with the mean map of a layer's heads."""
        sizes = {}
        for i, length in enumerate(LENGTHS):
            shares = []
            for path, layer in self.sums.layers.items():
                if energy := float(layer.length_output[i]):
                    mean = layer.lengths[i].cpu().double() / layer.heads
                    b = values.rows[path]
                    told = (values.profile.T @ mean @ values.profile @ b).mul(b).sum()
                    shares.append(float(told) / energy)
            if shares:
                sizes[length] = (sum(shares) / len(values.rows)) ** 0.5
        return sizes


def _energy(layer: LayerSums, group: int) -> float:
    """Σ‖output‖²; not 0, to divide by it."""
    return max(float(layer.output[:, group].sum()), 1e-30)


def _heads(rows: Tensor, heads: int) -> Tensor:
    """[r, inner_dim] as [H, r, E]"""
    return rows.view(len(rows), heads, -1).transpose(0, 1)


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def warnings(effects: Mapping[str, Effect]) -> list[str]:
    """A sentence for each thing that looks wrong."""
    said = []
    pairs: set[frozenset[str | None]] = set()  # that are said to be alike
    for name, effect in effects.items():
        numbers = effect.numbers
        for side in ("positive", "negative"):
            if f"size_{side}" not in numbers:
                continue
            size, share = numbers[f"words_{side}"], numbers[f"explained_{side}"]
            if size < SMALL:
                said.append(
                    f"label {name!r}: its {side} words hardly change what this base draws "
                    f"({size:.1%} of the attention output): try other words"
                )
            elif share < UNEXPLAINED:
                said.append(
                    f"label {name!r}: only {max(share, 0.0):.0%} of what its {side} words change "
                    "can be reproduced by value rows: the slider may do less than the words"
                )
        words = [numbers[key] for key in ("words_positive", "words_negative") if key in numbers]
        if min(words) < SMALL:
            continue  # which way they go is chance
        if numbers.get("cosine_sides", -1.0) > ALIKE:
            said.append(
                f"label {name!r}: both sides do nearly the same "
                f"(cosine {numbers['cosine_sides']:.2f}): choose words that differ"
            )
        cosine = numbers.get(f"cosine_with {effect.nearest}", 0.0)
        if abs(cosine) > ALIKE and (pair := frozenset((name, effect.nearest))) not in pairs:
            pairs.add(pair)
            sign = "the same as" if cosine > 0 else "the opposite of"
            said.append(
                f"label {name!r}: does nearly {sign} {effect.nearest!r} (cosine {cosine:.2f})"
            )
    return said


def table(effects: Mapping[str, Effect]) -> str:
    """For people: a line for every side."""
    width = max(12, *(len(name) for name in effects))
    lines = [
        f"{'label':<{width}}  side      explained   size  words   at 5 / 20 / 60 tokens  skipped"
    ]
    for name, effect in effects.items():
        numbers = effect.numbers
        for side in ("positive", "negative"):
            if f"size_{side}" not in numbers:
                continue
            sizes = [numbers.get(f"size_{side}_{length}_tokens") for length in LENGTHS]
            by_length = " / ".join("  –  " if s is None else f"{s:5.1%}" for s in sizes)
            lines.append(
                f"{name:<{width}}  {side:<8}  {numbers[f'explained_{side}']:>9.0%}  "
                f"{numbers[f'size_{side}']:>5.1%}  {numbers[f'words_{side}']:>5.1%}   {by_length}  "
                f"{numbers[f'skipped_{side}']:>7.0f}"
            )
    return "\n".join(lines)
