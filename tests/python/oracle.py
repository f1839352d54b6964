"""The paper's formulas written out in torch, to compare the library with.

Nothing here goes through the library: f_t, f_a and V_a are computed from the paper's matrices
(eq. 4 to 7), in f64 where nothing else is asked for, and both branches of the attention are spelled
out (eq. 3, 8 and 9). Which rows of a batch are unconditional and which step a call belongs to are
told, not found out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
W_VA = ".to_v_aes.weight"
# The cross-attentions of docs/format.md: block, attentions, transformer blocks in each, width.
TABLES = {
    "sd15": [
        *(
            ("down_blocks.0", 2, 1, 320),
            ("down_blocks.1", 2, 1, 640),
            ("down_blocks.2", 2, 1, 1280),
        ),
        ("mid_block", 1, 1, 1280),
        *(("up_blocks.1", 3, 1, 1280), ("up_blocks.2", 3, 1, 640), ("up_blocks.3", 3, 1, 320)),
    ],
    "sdxl": [
        *(("down_blocks.1", 2, 2, 640), ("down_blocks.2", 2, 10, 1280)),
        ("mid_block", 1, 10, 1280),
        *(("up_blocks.0", 3, 10, 1280), ("up_blocks.1", 3, 2, 640)),
    ],
    # A U-Net that no table has.
    "other": [("down_blocks.0", 1, 1, 8), ("up_blocks.0", 1, 1, 4)],
}
TOKENS = {"sd15": 77, "sdxl": 77, "other": 5}
WIDTHS = {"sd15": 768, "sdxl": 2048, "other": 12}


def layers(base: str) -> dict[str, int]:
    """The width of every cross-attention, by its diffusers path."""
    return {
        f"{block}.attentions.{attention}.transformer_blocks.{depth}.attn2": width
        for block, attentions, depths, width in TABLES[base]
        for attention in range(attentions)
        for depth in range(depths)
    }


def label(name: str, **more: Any) -> dict[str, Any]:
    """A label as files have it."""
    return {"name": name, "positive": [name], "negative": [f"no {name}"], **more}


def metadata(base: str, labels: Sequence[Mapping[str, Any]], **keys: Any) -> dict[str, str]:
    """What every adapter says. `keys` are vmix keys, as JSON where they are no strings."""
    said = {
        "base": base,
        "labels": labels,
        "context_tokens": TOKENS[base],
        "apply_to": "cond",
        "made": {"method": "trained"},
    }
    if base == "other":
        said["ldm_names"] = {path: f"ldm.{i}" for i, path in enumerate(layers(base))}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in {**said, **keys}.items()}
    return {f"vmix.{key}": text for key, text in texts.items()}


def matrices(
    base: str, labels: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random matrices of the paper in the sizes of a base. `dtype` is that of every W_Va.

    Those of a layer are one drawn matrix, turned by a column for each layer: drawn anew, the 170
    million of SDXL would take longer than all else.
    """
    draw = torch.Generator().manual_seed(seed)
    d, widths = WIDTHS[base], layers(base)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    tensors = {
        "aes_emb": normal(labels, 2, d),
        "projection.linear.weight": normal(TOKENS[base], labels),
        "projection.norm.weight": 1 + normal(d) / 8,
        "projection.norm.bias": normal(d) / 8,
        "projection.zero.weight": normal(d, d) / d**0.5,
        "projection.zero.bias": normal(d) / 8,
    }
    w_va = (normal(max(widths.values()), d) / d**0.5).to(dtype)
    for i, (path, width) in enumerate(widths.items()):
        tensors[path + W_VA] = w_va[:width].roll(i, 1)
    return tensors


def label_features(tensors: Mapping[str, Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """f_t [N, d] of the labels' weights, looked up in AesEmb (eq. 4), in f64."""
    positive, negative = tensors["aes_emb"].double().unbind(1)
    w = torch.as_tensor(weights, dtype=torch.float64)[:, None]
    return (1 - w) * negative + w * positive


def lifted(tensors: Mapping[str, Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """F·f_t + b_F [C, d]."""
    x = tensors["projection.linear.weight"].double() @ label_features(tensors, weights)
    bias = tensors.get("projection.linear.bias")
    return x if bias is None else x + bias.double()[:, None]


def value_features(
    tensors: Mapping[str, Tensor],
    weights: Sequence[float] | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """f_a [C, d] of the labels' weights (eq. 6), computed in f64 and rounded to `dtype`."""
    x = lifted(tensors, weights)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / (variance + EPS).sqrt()
    normed = normed * tensors["projection.norm.weight"] + tensors["projection.norm.bias"]
    f_a = normed @ tensors["projection.zero.weight"].double().T + tensors["projection.zero.bias"]
    return f_a.to(dtype)


def values(tensors: Mapping[str, Tensor], path: str, weights: Sequence[float] | Tensor) -> Tensor:
    """V_a [C, inner_dim] of a layer (eq. 7), in f64."""
    f_a = value_features(tensors, weights, torch.float64)
    return f_a @ tensors[path + W_VA].double().T


# --- what docs/format.md derives from them ---


def coefficients(tensors: Mapping[str, Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """A [C, 2N + 1] in f64, with ρ from the LayerNorm's own variance."""
    variance = lifted(tensors, weights).var(-1, correction=0, keepdim=True)
    varied = mixture(tensors, weights) / (variance + EPS).sqrt()
    return torch.cat([varied, torch.ones(len(varied), 1, dtype=torch.float64)], 1)


def mixture(tensors: Mapping[str, Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """u [C, 2N]: what of every feature is in a token."""
    w = torch.as_tensor(weights, dtype=torch.float64)
    lift = tensors["projection.linear.weight"].double()
    return torch.stack([lift * w, lift * (1 - w)], -1).flatten(1)


def rows(tensors: Mapping[str, Tensor], path: str | None = None) -> Tensor:
    """B [2N + 1, inner_dim] of a layer in f64; [2N + 1, d], before any W_Va, without a path."""
    zero = tensors["projection.zero.weight"].double()
    varied = (tensors["projection.norm.weight"] * centred(tensors)) @ zero.T
    constant = zero @ tensors["projection.norm.bias"].double() + tensors["projection.zero.bias"]
    context_rows = torch.cat([varied, constant[None]])
    return context_rows if path is None else context_rows @ tensors[path + W_VA].double().T


def centred(tensors: Mapping[str, Tensor]) -> Tensor:
    """t̄ [2N, d]: every feature less its own mean."""
    features = tensors["aes_emb"].double().flatten(0, 1)
    return features - features.mean(-1, keepdim=True)


def cancellation(tensors: Mapping[str, Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """κ [C, 1]: how much the features of a token cancel each other."""
    features, u = centred(tensors), mixture(tensors, weights)
    factor = torch.linalg.qr(features.T / features.shape[1] ** 0.5).R.T
    variance = lifted(tensors, weights).var(-1, correction=0, keepdim=True)
    whole = (u.abs() @ factor.abs()).square().sum(-1, keepdim=True)
    return (whole / (variance + EPS)).sqrt()


# --- attention ---


class TwoBranches:
    """A diffusers attention processor: eq. 9 in plain operations, with an IP-Adapter's branch."""

    def __init__(
        self,
        rows: Callable[[int], list[Tensor | None]],
        strength: Callable[[int], float],
        wrapped: Any,
        fused: bool = False,
    ) -> None:
        self.rows = rows  # batch -> V_a [C, inner_dim] of every row, None where there is none
        self.strength = strength  # number of the call -> λ
        self.wrapped = wrapped  # the processor that was there; holds the IP-Adapter's weights
        self.fused = fused
        self.calls = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert attention_mask is None
        assert hidden_states.ndim == 3
        context, images = encoder_hidden_states, []
        if isinstance(context, tuple):
            context, images = context

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], attn.heads, -1).transpose(1, 2)

        query, key = heads(attn.to_q(hidden_states)), heads(attn.to_k(context))
        x = self.attend(query, key, heads(attn.to_v(context)))
        strength = self.strength(self.calls)
        self.calls += 1
        aes = [
            torch.zeros(context.shape[1], x.shape[1] * x.shape[3]).to(x)
            if v is None
            # Longer prompts are several contexts of C tokens, one after the other.
            else torch.cat([v] * (context.shape[1] // v.shape[0])).to(x)
            for v in self.rows(x.shape[0])
        ]
        x = x + strength * self.attend(query, key, heads(torch.stack(aes)))
        for image, to_k, to_v, scale in zip(
            images,
            getattr(self.wrapped, "to_k_ip", ()),
            getattr(self.wrapped, "to_v_ip", ()),
            getattr(self.wrapped, "scale", ()),
            strict=True,
        ):
            image = image.flatten(1, -2)  # [B, images, tokens, d], or without the images
            x = x + scale * self.attend(query, heads(to_k(image)), heads(to_v(image)))
        out: Tensor = attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))
        return out


@contextmanager
def two_branches(
    unet: Any,
    tensors: Mapping[str, Tensor],
    weights: list[float],
    *,
    apply_to: str = "cond",
    parts: int = 2,
    strength: float | Callable[[str, int], float] = 1.0,
    fused: bool = False,
) -> Iterator[None]:
    """Gives every attn2 of `unet` the paper's attention.

    The opposite of any selection is negative in all labels: they have no neutral weight here.

    parts: 1 for a conditional batch, 2 for [uncond; cond], 3 for [uncond; cond; perturbed].
    strength: λ, or a function of the layer's path and the number of the U-Net call.
    """
    f_a = value_features(tensors, weights)
    f_negative = value_features(tensors, [0.0] * len(weights))
    before = dict(unet.attn_processors)

    def processor(path: str, wrapped: Any) -> TwoBranches:
        w_va = tensors[path + W_VA].float()
        cond = f_a @ w_va.T  # V_a, eq. 7
        uncond = {"cond": None, "both": cond, "contrast": f_negative @ w_va.T}[apply_to]

        def rows(batch: int) -> list[Tensor | None]:
            first = 0 if parts == 1 else batch // parts
            return [uncond] * first + [cond] * (batch - first)

        def at(call: int) -> float:
            return strength(path, call) if callable(strength) else strength

        return TwoBranches(rows, at, wrapped, fused)

    ours = {
        name: processor(name.removesuffix(".processor"), old) if "attn2" in name else old
        for name, old in before.items()
    }
    unet.set_attn_processor(dict(ours))
    try:
        yield
    finally:
        unet.set_attn_processor(before)
