"""Whether a fit worked: what it explains, how large it is, and what to be warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vmix.fit.prompts import Plan
from vmix.fit.solve import FittedSide
from vmix.fit.sums import LENGTHS, Sums

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
    by_label: dict[str, dict[str, tuple[int, FittedSide]]] = {}
    for i, (side, found) in enumerate(zip(plan.sides, fitted, strict=True)):
        by_label.setdefault(side.label, {})[side.side] = (i, found)
    directions = {name: _direction(sides) for name, sides in by_label.items()}
    products = {
        (one, other): norms.product(directions[one], directions[other])
        for one in directions
        for other in directions
    }
    effects = {}
    for name, sides in by_label.items():
        numbers: dict[str, float] = {}
        for which, (i, found) in sides.items():
            values = {layer: found.values(layer) for layer in found.rows}
            numbers[f"explained_{which}"] = found.explained
            numbers[f"size_{which}"] = norms.product(values, values) ** 0.5
            numbers[f"words_{which}"] = norms.words(i)
            numbers[f"ridge_{which}"] = found.ridge
            numbers[f"skipped_{which}"] = len(plan.prompts) - len(plan.sides[i].prompts)
            for length, size in norms.by_length(values).items():
                numbers[f"size_{which}_{length}_tokens"] = size
        if len(sides) == 2:
            positive, negative = ({p: s.values(p) for p in s.rows} for _, s in sides.values())
            numbers["cosine_sides"] = _cosine(
                norms.product(positive, negative),
                norms.product(positive, positive),
                norms.product(negative, negative),
            )
        others = {
            other: _cosine(products[name, other], products[name, name], products[other, other])
            for other in directions
            if other != name
        }
        nearest = max(others, key=lambda other: abs(others[other]), default=None)
        if nearest is not None:
            numbers[f"cosine_with {nearest}"] = others[nearest]
        effects[name] = Effect({key: _rounded(x) for key, x in numbers.items()}, nearest)
    return effects


class _Norms:
    """Scalar products of values, as the base's attention weighs them."""

    def __init__(self, sums: Sums, plan: Plan) -> None:
        self.sums, self.plan = sums, plan
        self.group = plan.largest_group
        self.moments = {
            path: layer.moment[:, self.group].sum(0).cpu().double()
            for path, layer in sums.layers.items()
        }
        self.energies = {
            path: max(float(layer.output[:, self.group].sum()), 1e-30)
            for path, layer in sums.layers.items()
        }

    def product(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        """Mean over layers of Σ (a·V)·(a·V′)/Σ‖output‖²."""
        total = 0.0
        for path, moment in self.moments.items():
            v, w = (_split(x[path], len(moment)) for x in (one, other))
            total += float((moment @ v).mul(w).sum()) / self.energies[path]
        return total / len(self.moments)

    def words(self, side: int) -> float:
        """Size of what the words themselves change, on the prompts that they fit into."""
        group = self.plan.group(self.plan.sides[side])
        shares = [
            float(layer.change[:, side].sum()) / max(float(layer.output[:, group].sum()), 1e-30)
            for layer in self.sums.layers.values()
        ]
        return float((sum(shares) / len(shares)) ** 0.5)

    def by_length(self, values: Mapping[str, Tensor]) -> dict[int, float]:
        """Sizes for prompts of about so many tokens, with the mean map of a layer's heads."""
        sizes = {}
        for i, length in enumerate(LENGTHS):
            total, seen = 0.0, False
            for path, layer in self.sums.layers.items():
                energy = float(layer.length_output[i])
                if energy > 0:
                    seen = True
                    mean = layer.lengths[i].cpu().double() / layer.heads
                    v = values[path]
                    total += float((mean @ v).mul(v).sum()) / energy
            if seen:
                sizes[length] = (total / len(values)) ** 0.5
        return sizes


def _direction(sides: Mapping[str, tuple[int, FittedSide]]) -> dict[str, Tensor]:
    """Where a label moves the values: positive less negative."""
    first = next(iter(sides.values()))[1]
    signs = {"positive": 1.0, "negative": -1.0}
    return {
        path: torch.stack([signs[which] * s.values(path) for which, (_, s) in sides.items()]).sum(0)
        for path in first.rows
    }


def _split(values: Tensor, heads: int) -> Tensor:
    """[C, inner_dim] as [H, C, E]"""
    return values.double().view(len(values), heads, -1).transpose(0, 1)


def _cosine(product: float, one: float, other: float) -> float:
    return product / (one * other) ** 0.5 if one > 0 and other > 0 else 0.0


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
