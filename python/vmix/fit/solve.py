"""From sums to value rows: ridge regression for every head, one profile for every side.

    V_a = argmin Σ‖a·V_a − Δ‖² + ridge·Σ_c m_c·‖V_a[c]‖²,   m_c = Σ a_c²

a [C] is how a query attends to the tokens of the bare prompt, Δ what the words change. The ridge is
relative to each token's own second moment m_c: the start token takes most of the attention of CLIP's
models, and a ridge that is equal for all tokens would erase the others. Everything is in f64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vmix.fit.errors import FitError
from vmix.fit.prompts import Plan
from vmix.fit.sums import CHECK, FIT, LayerSums, Sums

__all__ = ["RIDGES", "FittedSide", "Rank", "profile_of", "ridge_values", "solve_side"]

Rank: TypeAlias = int | Literal["bias"]

RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The one with which a side explains most of the prompts to check with is taken."""
FLOOR = 1e-6
"""What is added to m_c, relative to their mean, for tokens that nothing attends to."""
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class FittedSide:
    """One side of a label: V_a = profile·rows in every layer."""

    profile: Tensor
    """[C, r] in f32"""
    rows: Mapping[str, Tensor]
    """[r, inner_dim] of every layer, in the dtype of the file"""
    ridge: float
    explained: float
    """1 − Σ‖a·V_a − Δ‖²/Σ‖Δ‖² on the prompts to check with."""
    by_rank: Mapping[str, float]
    """The same for other ranks."""

    def values(self, layer: str) -> Tensor:
        """V_a [C, inner_dim] in f64."""
        return self.profile.double() @ self.rows[layer].double()


@dataclass(frozen=True)
class _Layer:
    """The sums of one side in one layer, in f64."""

    moment: Tensor  # [H, C, C], of the fit
    cross: Tensor  # [H, C, E]
    check_moment: Tensor
    check_cross: Tensor
    check_change: float
    weight: float  # 1/Σ‖output‖² of the prompts to check with: layers count alike
    queries: float

    @classmethod
    def of(cls, sums: LayerSums, side: int, group: int) -> _Layer:
        def take(tensor: Tensor, part: int, index: int) -> Tensor:
            return tensor[part, index].double().cpu()

        energy = float(take(sums.output, CHECK, group))
        return cls(
            take(sums.moment, FIT, group),
            take(sums.cross, FIT, side),
            take(sums.moment, CHECK, group),
            take(sums.cross, CHECK, side),
            float(take(sums.change, CHECK, side)),
            1 / energy if energy else 0.0,
            float(take(sums.queries, FIT, group)),
        )

    def residual(self, values: Tensor) -> float:
        """Σ‖a·V_a − Δ‖² of the prompts to check with, for values [H, C, E]."""
        told = (self.check_moment @ values - 2 * self.check_cross).mul(values).sum()
        return self.check_change + float(told)


def regularized(moment: Tensor, ridge: float) -> Tensor:
    """X + ridge·diag X, and a floor."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    floor = FLOOR * diagonal.mean(-1, keepdim=True)
    return moment + torch.diag_embed(ridge * diagonal + floor)


def ridge_values(moment: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """V_a [H, C, E] that minimizes the above, from moment [H, C, C] and cross [H, C, E]."""
    return _solve(regularized(moment, ridge), cross)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    # Divided by its diagonal first: entries of a moment differ by many orders of magnitude.
    scale = matrix.diagonal(dim1=-2, dim2=-1).rsqrt()[..., None]
    factor, failed = torch.linalg.cholesky_ex(matrix * scale * scale.mT)
    if failed.any():
        raise FitError("sums: expected moments of attention, found a matrix that is none")
    return scale * torch.cholesky_solve(right * scale, factor)


def profile_of(values: Sequence[tuple[Tensor, float]], moment: Tensor, rank: int) -> Tensor:
    """P [C, r]: the best r columns for V_a = P·B of all layers and heads.

    `values` are V_a [H, C, E] of layers, each with its weight; `moment` [C, C] the mean of a·aᵀ.
    What is minimized is Σ weight·tr (V − P·B)ᵀ·moment·(V − P·B).
    """
    gram = sum(weight * torch.einsum("hce,hde->cd", v, v) for v, weight in values)
    assert isinstance(gram, Tensor)
    eigenvalues, vectors = torch.linalg.eigh(moment)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    strengths, directions = torch.linalg.eigh(root @ gram @ root)
    strengths, directions = strengths.flip(0)[:rank], directions.flip(1)[:, :rank]
    # Columns of V, combined: no inverse of a moment that is nearly singular.
    columns = gram @ root @ directions[:, strengths > strengths[0] * 1e-12]
    # A column's size and sign are free. The largest entry is 1.
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    return columns / largest


def solve_side(
    sums: Sums, plan: Plan, side: int, rank: Rank, dtype: torch.dtype, ridge: float | None = None
) -> FittedSide:
    """The rows of a side, the sums of which are complete."""
    group = plan.group(plan.sides[side])
    layers = {path: _Layer.of(one, side, group) for path, one in sums.layers.items()}
    whole = sum(one.weight * one.check_change for one in layers.values())

    def explained(values: Mapping[str, Tensor]) -> float:
        left = sum(one.weight * one.residual(values[path]) for path, one in layers.items())
        return 1 - left / whole if whole else 0.0

    def table(ridge: float) -> dict[str, Tensor]:
        return {p: ridge_values(one.moment, one.cross, ridge) for p, one in layers.items()}

    ridges = RIDGES if ridge is None else (ridge,)
    tables = {ridge: table(ridge) for ridge in ridges}
    shares = {ridge: explained(values) for ridge, values in tables.items()}
    ridge = max(shares, key=lambda one: shares[one])
    first = next(iter(layers.values()))
    tokens = first.moment.shape[-1]
    moments = [one.moment.mean(0) / one.queries for one in layers.values()]
    mean = torch.stack(moments).mean(0)
    weighted = [(tables[ridge][path], one.weight * one.queries) for path, one in layers.items()]

    def rows(profile: Tensor) -> dict[str, Tensor]:
        """B [H, r, E], solved again per head: those of the decomposition are for one moment."""
        return {
            path: _solve(profile.T @ regularized(one.moment, ridge) @ profile, profile.T @ one.cross)
            for path, one in layers.items()
        }

    def reduced(profile: Tensor) -> tuple[Tensor, dict[str, Tensor], float]:
        profile = profile.float().double()
        found = {path: _flat(b).to(dtype) for path, b in rows(profile).items()}
        heads = {path: one.moment.shape[0] for path, one in layers.items()}
        rounded = {p: profile @ _heads(b.double(), heads[p]) for p, b in found.items()}
        return profile, found, explained(rounded)

    bias = torch.ones(tokens, 1, dtype=torch.float64)
    if not whole or not any(values.any() for values, _ in weighted):
        profiles = {"bias": bias}  # words that change nothing have no direction
    else:
        most = min(tokens, max((rank if rank != "bias" else 1), *RANKS))
        best = profile_of(weighted, mean, most)
        wanted = {*RANKS} | ({rank} if rank != "bias" else set())
        profiles = {"bias": bias} | {str(r): best[:, :r] for r in sorted(wanted)}
    by_rank = {name: reduced(profile)[2] for name, profile in profiles.items()}
    profile, found, share = reduced(profiles.get(str(rank), bias))
    for path, b in found.items():
        if not b.isfinite().all():
            raise FitError(f"layer {path}: expected rows that {dtype} can hold, found more")
    by_rank["all"] = shares[ridge]
    return FittedSide(profile.float(), found, ridge, share, by_rank)


def _flat(rows: Tensor) -> Tensor:
    """[H, r, E] as [r, inner_dim]"""
    return rows.transpose(0, 1).flatten(1)


def _heads(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(1, (heads, -1)).transpose(0, 1)
