"""The mixing itself (paper, eq. 8 and 9): V_c + λ·V_a in every cross-attention layer.

For the duration of one call of the model, `attn2.to_v` of every layer has a `forward` that adds
λ·V_a to what it returns; afterwards the model is as it was. Attention itself is not replaced:
LoRA, ControlNet, IP-Adapter and whatever else patches it go on as before, in any order.

With a mask, λ depends on the query and cannot be folded into the values: then the layer's queries
and keys are kept as they pass, and m⊙λ·softmax(QKᵀ/√d)·V_a is added to what enters `attn2.to_out`.

No ComfyUI is imported here; `ValueMix` is a wrapper as `WrappersMP.APPLY_MODEL` wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .files import Pair

# queries, keys, values, heads → what the host's attention returns
Attention = Callable[..., Tensor]
# For each part of a model call's batch: 0 if it is the conditional one, 1 if not.
Chunks = tuple[int, ...]


class Layer:
    """λ·V_a of one layer."""

    def __init__(
        self, path: str, strength: float, values: Pair, dtype: torch.dtype, selection: str
    ) -> None:
        """`values` are V_a, `dtype` that of what they are added to; `selection` says for messages
        what they come from."""
        self.path = path  # of attn2 below the diffusion model, as LDM names it
        self.strength = strength
        self.selection = selection
        self.values = self.cast(values.map(lambda v: strength * v), dtype)
        self._patched: tuple[Any, ...] = (None,)

    def cast(self, values: Pair, dtype: torch.dtype) -> Pair:
        """λ·V_a in a dtype that must hold it: in silence, infinities would spread everywhere."""
        values = values.map(lambda v: v.to(dtype))
        if not all(v is None or v.isfinite().all() for v in values):
            raise ValueError(
                f"{self.path}: expected values times strength that "
                f"{str(dtype).removeprefix('torch.')} can hold, found more: {self.selection}, "
                f"strength {self.strength:g}"
            )
        return values

    def on(self, like: Tensor) -> Pair:
        """λ·V_a where the layer computes, and in its dtype."""
        pair = self.values
        if pair.cond.dtype != like.dtype:
            pair = self.values = self.cast(pair, like.dtype)
        if pair.cond.device != like.device:
            pair = self.values = pair.map(lambda v: v.to(like.device))
        return pair

    def value_forward(self, original: Any, chunks: Chunks, apply_to: str, tokens: int) -> Any:
        """`to_v.forward` with λ·V_a added. The same function for the same arguments, so that a
        model that was compiled once is not compiled again."""
        key = (original, chunks, apply_to)
        if self._patched[0] == key:
            return self._patched[1]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = original(*args, **kwargs)
            check_tokens(self.path, value.shape[1], tokens)
            pair = self.on(value)
            if apply_to == "both" or not any(chunks):
                return mixed(value, pair.cond, tokens)
            parts = split(self.path, value, chunks)
            return torch.cat(
                [mixed(v, pair[c], tokens) for v, c in zip(parts, chunks, strict=True)]
            )

        self._patched = (key, forward)
        return forward


class ValueMix:
    """One adapter, one selection, on one model: called around every call of the model."""

    def __init__(
        self,
        layers: Sequence[Layer],
        tokens: int,
        apply_to: str,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        mask: Tensor | None = None,
        attention: Attention | None = None,
    ) -> None:
        """`mask` [M, H, W] needs `attention`."""
        self.layers = [layer for layer in layers if layer.strength != 0.0]
        self.tokens = tokens
        self.apply_to = apply_to
        self.start_percent = start_percent
        self.end_percent = end_percent
        self.mask = mask
        self.attention = attention

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        # args: x, sigma, c_concat, c_crossattn, control, transformer_options
        options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
        if not self.acts_at(executor.class_obj.model_sampling, args[1]):
            return executor(*args, **kwargs)
        # Positions in the sampler's list of conditionings. The first is the positive one; guiders
        # with three have two others. (DualCFGGuider alone lists its negative first.)
        chunks = tuple(min(i, 1) for i in options.get("cond_or_uncond") or (0,))
        diffusion_model = executor.class_obj.diffusion_model
        with replaced(self._forwards(diffusion_model, chunks, args[0].shape[-2:])):
            return executor(*args, **kwargs)

    def acts_at(self, model_sampling: Any, sigma: Tensor) -> bool:
        """Whether λ is on at this step; percents are turned into sigmas as ControlNet does."""
        if self.start_percent <= 0.0 and self.end_percent >= 1.0:
            return True
        now = float(sigma.flatten()[0])
        return bool(
            model_sampling.percent_to_sigma(self.end_percent)
            <= now
            <= model_sampling.percent_to_sigma(self.start_percent)
        )

    def _forwards(
        self, diffusion_model: Any, chunks: Chunks, latent: Sequence[int]
    ) -> Iterator[tuple[Any, Any]]:
        """The modules to patch, found anew each time, and what to call instead of them."""
        for layer in self.layers:
            attn = find(diffusion_model, layer.path)
            if self.mask is None:
                original = attn.to_v.forward
                yield (
                    attn.to_v,
                    layer.value_forward(original, chunks, self.apply_to, self.tokens),
                )
            else:
                yield from self._masked(layer, attn, chunks, latent)

    def _masked(
        self, layer: Layer, attn: Any, chunks: Chunks, latent: Sequence[int]
    ) -> Iterator[tuple[Any, Any]]:
        seen: dict[str, Tensor] = {}

        def keeping(name: str, original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                seen[name] = original(*args, **kwargs)
                return seen[name]

            return forward

        def with_aesthetics(original: Any) -> Any:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                query, key = seen.pop("query"), seen.pop("key")
                return original(
                    x + self._region(layer, attn, query, key, chunks, latent), *args, **kwargs
                )

            return forward

        yield attn.to_q, keeping("query", attn.to_q.forward)
        yield attn.to_k, keeping("key", attn.to_k.forward)
        yield attn.to_out, with_aesthetics(attn.to_out.forward)

    def _region(
        self,
        layer: Layer,
        attn: Any,
        query: Tensor,
        key: Tensor,
        chunks: Chunks,
        latent: Sequence[int],
    ) -> Tensor:
        """m⊙λ·softmax(QKᵀ/√d)·V_a, [B, queries, inner_dim]."""
        assert self.mask is not None
        assert self.attention is not None
        check_tokens(layer.path, key.shape[1], self.tokens)
        pair = layer.on(query)
        if self.apply_to == "both":
            chunks = (0,)
        mask = resized(self.mask, query.shape[1], latent).to(query)
        parts = []
        for q, k, c in zip(
            split(layer.path, query, chunks), split(layer.path, key, chunks), chunks, strict=True
        ):
            aes = pair[c]
            if aes is None:
                parts.append(torch.zeros_like(q))
                continue
            v = aes.repeat(k.shape[1] // self.tokens, 1).expand(k.shape[0], -1, -1)
            out = self.attention(q, k, v, attn.heads, attn_precision=attn.attn_precision)
            rows = torch.arange(len(out), device=mask.device) % len(mask)
            parts.append(out * mask[rows])
        return torch.cat(parts)


def mixed(value: Tensor, aes: Tensor | None, tokens: int) -> Tensor:
    """V_c + λ·V_a (eq. 9) for V_c [B, k·tokens, inner_dim] and λ·V_a [tokens, inner_dim]."""
    if aes is None:
        return value
    batch, length, width = value.shape
    return (value.reshape(batch, length // tokens, tokens, width) + aes).view(value.shape)


@contextmanager
def replaced(forwards: Iterator[tuple[Any, Any]]) -> Iterator[None]:
    """Gives modules an instance `forward`, one after the other, and takes it back in reverse."""
    before: list[tuple[Any, Any]] = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def find(root: Any, path: str) -> Any:
    """A submodule by its path, through what torch.compile puts around modules."""
    for part in ["", *path.split(".")]:
        root = getattr(root, part) if part else root
        root = getattr(root, "_orig_mod", root)
    return root


def split(path: str, batch: Tensor, chunks: Chunks) -> Sequence[Tensor]:
    """The batch as one part per conditioning."""
    if batch.shape[0] % len(chunks):
        raise ValueError(
            f"{path}: expected a batch of {len(chunks)} equal parts (conditional and not), "
            f"found {batch.shape[0]} rows; apply_to=both works with any"
        )
    return batch.chunk(len(chunks))


def check_tokens(path: str, found: int, tokens: int) -> None:
    if found % tokens:
        raise ValueError(
            f"{path}: the prompt's context has {found} tokens, "
            f"the adapter needs a multiple of {tokens}"
        )


def resized(mask: Tensor, queries: int, latent: Sequence[int]) -> Tensor:
    """The mask [M, H, W] at the resolution of one layer: [M, queries, 1]."""
    height, width = latent
    while height * width > queries:  # every level of the U-Net halves, rounding up
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != queries:  # another pack scales in between: keep the proportions
        height = max(1, round((queries * latent[0] / latent[1]) ** 0.5))
        width = queries // height
    if height * width != queries:
        raise ValueError(f"mask: {queries} queries do not fit a latent of {tuple(latent)}")
    return interpolate(mask[:, None].float(), (height, width), mode="bilinear").flatten(1)[
        ..., None
    ]


def layer_paths(mapping: Mapping[str, str]) -> dict[str, str]:
    """Diffusers path → LDM path of the cross-attentions, from ComfyUI's map of parameter names."""
    suffix = ".attn2.to_v.weight"
    return {
        diffusers.removesuffix(".to_v.weight"): ldm.removesuffix(".to_v.weight")
        for diffusers, ldm in mapping.items()
        if diffusers.endswith(suffix)
    }
