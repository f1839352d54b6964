"""The adapter that a fit ends in: its tensors and metadata (docs/format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from vmix.fit.errors import FitError
from vmix.fit.labels import FitLabel
from vmix.fit.prompts import Plan
from vmix.fit.report import Effect, measure, warnings
from vmix.fit.solve import FittedSide, Rank, solve_side
from vmix.fit.sums import Sums

__all__ = ["Fitted", "check_rank", "fitted_adapter", "hash_of_texts"]

RANGE = 1.5
STEP = 0.05


@dataclass(frozen=True)
class Fitted:
    """A fit: what its file holds, and what there is to say of it."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    effects: Mapping[str, Effect]
    """By label."""
    sides: Mapping[tuple[str, str], FittedSide]
    """By label and side."""

    @property
    def warnings(self) -> list[str]:
        return warnings(self.effects)


def check_rank(rank: Any, context_tokens: int) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank != "bias" and not (whole and 1 <= rank <= context_tokens):
        raise FitError(f"rank: expected 1 to {context_tokens} or 'bias', found {rank!r}")


def fitted_adapter(
    plan: Plan,
    sums: Sums,
    *,
    base: str,
    ldm_names: Mapping[str, str],
    made: Mapping[str, Any],
    rank: Rank = 4,
    dtype: torch.dtype = torch.float16,
    ridge: float | None = None,
    aes_emb: Tensor | None = None,
    modelspec: Mapping[str, str] | None = None,
    solved: Callable[[], Any] = lambda: None,
) -> Fitted:
    """Solves for every side; `ldm_names` has the LDM path of every layer by its diffusers path.

    `ridge` is chosen on the prompts to check with unless given. `solved` is called after
    every side.
    """
    if not sums.layers:
        raise FitError("sums: expected those of at least one picture, found none")
    first = next(iter(sums.layers.values()))
    check_rank(rank, first.tokens)
    with torch.autocast("cpu", enabled=False):  # which a host may have on
        found = []
        for i in range(len(plan.sides)):
            found.append(solve_side(sums, plan, i, rank, dtype, ridge))
            solved()
        effects = measure(plan, sums, found)
        tensors = {
            "profile": torch.cat([one.profile for one in found], 1),
            "attention": _attention(plan, sums),
            **{f"{path}.rows": torch.cat([one.rows[path] for one in found]) for path in ldm_names},
        }
    rows = [
        {"label": side.label, "side": side.side}
        for side, one in zip(plan.sides, found, strict=True)
        for _ in range(one.profile.shape[1])
    ]
    if aes_emb is not None:
        tensors["aes_emb"] = aes_emb.float().cpu()
    metadata = {
        "vmix.format": "2",
        "vmix.kind": "adapter",
        "vmix.base": base,
        "vmix.context_tokens": str(first.tokens),
        "vmix.apply_to": "cond",
        "vmix.coefficients": "linear",
        "vmix.labels": _json([_label(one, effects[one.name]) for one in plan.labels]),
        "vmix.rows": _json(rows),
        "vmix.made": _json(
            {
                **made,
                "method": "fitted",
                "rank": rank,
                "prompts": len(plan.prompts),
                "prompts_sha256": hash_of_texts(plan.prompts),
                **({"prompts_too_long": len(plan.too_long)} if plan.too_long else {}),
                **({"warnings": said} if (said := warnings(effects)) else {}),
            }
        ),
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **{f"modelspec.{key}": value for key, value in (modelspec or {}).items()},
    }
    if base == "other":
        metadata["vmix.ldm_names"] = _json(dict(ldm_names))
    sides = {(s.label, s.side): one for s, one in zip(plan.sides, found, strict=True)}
    return Fitted(tensors, metadata, effects, sides)


def hash_of_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _label(label: FitLabel, effect: Effect) -> dict[str, Any]:
    limits = label.range or (-RANGE if label.negative else 0.0, RANGE)
    return {
        "name": label.name,
        "dimension": label.dimension,
        "positive": [*label.positive],
        "negative": [*label.negative] or [""],
        "default": 0,
        "neutral": 0,
        "range": [*limits],
        "step": label.step or STEP,
        "effect": dict(effect.numbers),
        "display_names": dict(label.display_names),
    }


def _attention(plan: Plan, sums: Sums) -> Tensor:
    """[C, C]: the mean of a·aᵀ over queries, heads and layers."""
    group = plan.largest_group
    means = [
        layer.moment[:, group].sum(0).cpu().double().mean(0) / float(layer.queries[:, group].sum())
        for layer in sums.layers.values()
    ]
    return torch.stack(means).mean(0).clamp(min=0).float()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
