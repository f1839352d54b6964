"""From sums to value rows: ridge regression for every head, one profile for every side.

    V_a = argmin Σ‖a·V_a − Δ‖² + ridge·Σ_c m_c·‖V_a[c]‖²,   m_c = Σ a_c²

a [C] is how a query attends to the tokens of the bare prompt, Δ what the words change. The ridge is
relative to each token's own second moment m_c: with CLIP the start token takes most of the
attention, and a ridge that is equal for all tokens would erase the others. All is in f64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from vmix.fit.errors import FitError
from vmix.fit.prompts import Plan
from vmix.fit.sums import CHECK_PART, FIT_PART, LayerSums, Sums

__all__ = ["RIDGES", "FittedSide", "Rank", "profile_of", "ridge_values", "solve_side"]

Rank: TypeAlias = int | Literal["bias"]

RIDGES = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 10.0)
"""The one with which a side explains most of the prompts to check with is taken."""
FLOOR = 1e-6
"""Added to every m_c, relative to their mean: nothing may attend to some tokens."""
TURNS = 4
"""Of `profile_of`: further ones gain nothing."""


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
            return tensor[part, index].cpu().double()

        energy = float(take(sums.output, CHECK_PART, group))
        return cls(
            take(sums.moment, FIT_PART, group),
            take(sums.cross, FIT_PART, side),
            take(sums.moment, CHECK_PART, group),
            take(sums.cross, CHECK_PART, side),
            float(take(sums.change, CHECK_PART, side)),
            1 / energy if energy else 0.0,
            float(take(sums.queries, FIT_PART, group)),
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
        raise FitError(
            "sums: expected moments that a ridge makes solvable, found others: is attention NaN?"
        )
    return scale * torch.cholesky_solve(right * scale, factor)


def profile_of(
    layers: Sequence[_Layer], rank: int, ridge: float, start: Tensor | None = None
) -> Tensor:
    """P [C, r]: the r columns with which V_a = P·B fits best, of all layers and heads together.

    Solves in turns for B, head by head, and for P: the residual falls with every turn. Begins with
    `start`, such as the profile of another ridge, or else with the decomposition of the full tables
    as if all heads attended alike.
    """
    moments = [regularized(one.moment, ridge) for one in layers]
    if start is None:
        mean = torch.stack([one.moment.mean(0) / one.queries for one in layers]).mean(0)
        gram = torch.zeros_like(mean)
        for one in layers:
            table = ridge_values(one.moment, one.cross, ridge)
            gram += one.weight * one.queries * torch.einsum("hce,hde->cd", table, table)
        profile = _principal(gram, mean, rank)
    else:
        profile = start
    turns = TURNS if start is None else TURNS // 2
    for _ in range(turns if 0 < profile.shape[1] < len(profile) else 0):
        profile = _turn(layers, moments, profile)
    return profile


def _principal(gram: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The best r columns for values with V·Vᵀ = gram, where all heads have this moment."""
    eigenvalues, vectors = torch.linalg.eigh(moment)
    root = vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.T
    strengths, directions = torch.linalg.eigh(root @ gram @ root)
    strengths, directions = strengths.flip(0)[:rank], directions.flip(1)[:, :rank]
    # Columns of V, combined: no inverse of a moment that is nearly singular.
    kept = strengths > max(float(strengths[0]) * 1e-12, 0.0)
    return _scaled(gram @ root @ directions[:, kept])


def _turn(layers: Sequence[_Layer], moments: Sequence[Tensor], profile: Tensor) -> Tensor:
    """P that is best for the B of the present one: Σ X·P·(B·Bᵀ) = Σ Y·Bᵀ over layers and heads."""
    tokens, rank = profile.shape
    matrix = profile.new_zeros(rank * rank, tokens * tokens)
    right = profile.new_zeros(tokens, rank)
    for one, moment in zip(layers, moments, strict=True):
        rows = _solve(profile.T @ moment @ profile, profile.T @ one.cross)  # B [H, r, E]
        matrix += one.weight * (rows @ rows.mT).flatten(1).T @ moment.flatten(1)
        right += one.weight * torch.einsum("hce,hre->cr", one.cross, rows)
    matrix = matrix.view(rank, rank, tokens, tokens).transpose(1, 2).flatten(2).flatten(0, 1)
    found = _solve(matrix, right.T.reshape(-1, 1))
    return _scaled(found.view(rank, tokens).T)


def _scaled(profile: Tensor) -> Tensor:
    """Size and sign of a column are free: the largest entry becomes 1."""
    return profile / profile.gather(0, profile.abs().argmax(0, keepdim=True))


def solve_side(
    sums: Sums, plan: Plan, side: int, rank: Rank, dtype: torch.dtype, ridge: float | None = None
) -> FittedSide:
    """The rows of a side, with the ridge that explains most unless one is given."""
    group = plan.group(plan.sides[side])
    layers = {path: _Layer.of(one, side, group) for path, one in sums.layers.items()}
    whole = sum(one.weight * one.check_change for one in layers.values())
    tokens = next(iter(layers.values())).moment.shape[-1]

    # Words that change nothing have no direction.
    as_bias = rank == "bias" or not any(one.cross.any() for one in layers.values())

    def fitted(ridge: float, start: Tensor | None) -> tuple[FittedSide, Tensor]:
        if as_bias:
            best = torch.ones(tokens, 1, dtype=torch.float64)
        else:
            assert rank != "bias"
            best = profile_of([*layers.values()], rank, ridge, start)
        profile = best.float().double()  # as the file has it
        rows, left = {}, 0.0
        for path, one in layers.items():
            moment = regularized(one.moment, ridge)
            # Rows of their own for every head: those of the turns were for another profile.
            found = _solve(profile.T @ moment @ profile, profile.T @ one.cross).to(dtype)
            if not found.isfinite().all():
                raise FitError(f"layer {path}: expected rows that {dtype} can hold, found more")
            left += one.weight * one.residual(profile @ found.double())
            rows[path] = found.transpose(0, 1).flatten(1)
        share = 1 - left / whole if whole else 0.0
        return FittedSide(profile.float(), rows, ridge, share), best

    tried: list[FittedSide] = []
    start, failed = None, None
    for one in RIDGES if ridge is None else (ridge,):
        try:
            side_found, start = fitted(one, start)
            tried.append(side_found)
        except FitError as error:  # a small ridge may be too small
            failed = error
    if not tried:
        assert failed is not None
        raise failed
    return max(tried, key=lambda found: found.explained)
