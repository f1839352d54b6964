"""The paper's literal two branches as a ComfyUI model patch, to compare the nodes with.

Nothing of the pack or the library is used: V_a comes from the paper's matrices (eq. 4 to 7), and
every cross-attention is replaced by eq. 9 in plain operations. An IP-Adapter that was there
before, or is added afterwards, is given the protocol of ComfyUI_IPAdapter_plus.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from oracle import value_features

# block ("input", 4) and depth in it → λ
Strength = Callable[[tuple[str, int], int], float]


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(QKᵀ/√d)·V over [B, tokens, heads·d]."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key = split(query), split(key)
    attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (attention @ split(value)).transpose(1, 2).flatten(2)


class TwoBranches:
    """Eq. 9 in one layer, as an attn2 replacement."""

    def __init__(
        self,
        before: Any,
        cond: Tensor,
        uncond: Tensor | None,
        strength: float,
        sigmas: tuple[float, float] = (float("inf"), 0.0),
        mask: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.before = before  # the replacement that was there
        self.values = (cond, uncond)
        self.strength = strength
        self.sigmas = sigmas  # first and last at which λ counts
        self.mask = mask  # number of queries → [queries, 1]
        self.added: list[tuple[Any, dict[str, Any]]] = []

    def add(self, callback: Any, **kwargs: Any) -> None:
        self.added.append((callback, kwargs))

    def __deepcopy__(self, memo: Any) -> TwoBranches:
        twin = TwoBranches.__new__(TwoBranches)
        vars(twin).update(vars(self))
        twin.added = list(self.added)
        return twin

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
        heads = options["n_heads"]
        if self.before is None:
            out = attend(query, key, value, heads)
        else:
            out = self.before(query, key, value, options)
        sigma = float(options["sigmas"][0])
        if self.sigmas[1] <= sigma <= self.sigmas[0]:
            rows = []
            chunks = options["cond_or_uncond"]
            for which in chunks:
                v_a = self.values[which]
                if v_a is None:
                    v_a = torch.zeros_like(self.values[0])
                whole = torch.cat([v_a] * (key.shape[1] // len(v_a)))
                rows += [whole] * (len(query) // len(chunks))
            branch = self.strength * attend(query, key, torch.stack(rows), heads)
            out = out + (branch if self.mask is None else branch * self.mask(query.shape[1]))
        for callback, kwargs in self.added:
            if kwargs["sigma_end"] <= sigma <= kwargs["sigma_start"]:
                out = out + callback(out, query, key, value, options, **kwargs)
        return out


def two_branches(
    model: Any,
    tensors: Mapping[str, Tensor],
    ldm_names: Mapping[str, str],
    weights: list[float],
    opposite: list[float],
    strength: float | Strength = 1.0,
    apply_to: str = "cond",
    per_depth: bool = False,
    **options: Any,
) -> Any:
    """A clone of the model with eq. 9 in every cross-attention. `opposite` are the weights for the
    unconditional pass of "contrast".

    per_depth: whether replacements are keyed by (block, number, depth), as IP-Adapters of SDXL are;
    a key without depth is hidden by one with it.
    """
    f_a, f_opposite = (value_features(tensors, w) for w in (weights, opposite))
    clone = model.clone()
    options_of_model = clone.model_options["transformer_options"]
    existing = options_of_model.get("patches_replace", {}).get("attn2", {})
    for diffusers, ldm in ldm_names.items():
        section, number, *rest = ldm.split(".")
        depth = int(rest[rest.index("transformer_blocks") + 1])
        # ComfyUI counts from 0 in the middle, where LDM's number is a position within the block.
        block = (section.split("_")[0], 0 if section == "middle_block" else int(number))
        key = (*block, depth) if per_depth else block
        w_va = tensors[f"{diffusers}.to_v_aes.weight"]
        cond = f_a @ w_va.T  # V_a, eq. 7
        uncond = {"cond": None, "both": cond, "contrast": f_opposite @ w_va.T}[apply_to]
        scale = strength(block, depth) if callable(strength) else strength
        clone.set_model_attn2_replace(
            TwoBranches(existing.get(key), cond, uncond, scale, **options),
            *block,
            *([depth] if per_depth else []),
        )
    return clone
