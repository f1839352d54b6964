"""The paper's cross-attention written out, to compare the library with.

Nothing here goes through the library: f_t, f_a and V_a are computed from an adapter's raw tensors
(eq. 4 to 7) and both branches of the attention are spelled out (eq. 3, 8 and 9). Which rows of a
batch are unconditional and which step a call belongs to are told, not found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 77  # C of every adapter in the tests


def value_features(tensors: Mapping[str, Tensor], weights: list[float]) -> Tensor:
    """f_a [C, d] of the labels' weights (eq. 6), or of projection "difference"."""
    positive, negative = tensors["aes_emb"].float().unbind(1)
    if "projection.gain" in tensors:
        return sum(
            gain * weight * (p - n)
            for gain, weight, p, n in zip(
                tensors["projection.gain"], weights, positive, negative, strict=True
            )
        ).expand(TOKENS, -1)
    f_t = negative + torch.tensor(weights)[:, None] * (positive - negative)  # [N, d]
    lifted = tensors["projection.linear.weight"].float() @ f_t  # [C, d]
    mean = lifted.mean(-1, keepdim=True)
    variance = ((lifted - mean) ** 2).mean(-1, keepdim=True)
    normed = (lifted - mean) / (variance + 1e-5).sqrt()
    normed = normed * tensors["projection.norm.weight"] + tensors["projection.norm.bias"]
    return normed @ tensors["projection.zero.weight"].T + tensors["projection.zero.bias"]


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
        return scores.softmax(-1) @ value

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
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

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
        return attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))


@contextmanager
def two_branches(
    unet: nn.Module,
    tensors: Mapping[str, Tensor],
    weights: list[float],
    *,
    apply_to: str = "cond",
    parts: int = 2,
    strength: float | Callable[[str, int], float] = 1.0,
    fused: bool = False,
) -> Iterator[None]:
    """Gives every attn2 of `unet` the paper's attention.

    parts: 1 for a conditional batch, 2 for [uncond; cond], 3 for [uncond; cond; perturbed].
    strength: λ, or a function of the layer's path and the number of the U-Net call.
    """
    f_a = value_features(tensors, weights)
    difference = "projection.gain" in tensors
    f_negative = -f_a if difference else value_features(tensors, [0.0] * len(weights))
    before = dict(unet.attn_processors)

    def processor(path: str, wrapped: Any) -> TwoBranches:
        w_va = tensors[f"{path}.to_v_aes.weight"].float()
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
