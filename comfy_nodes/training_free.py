"""Labels from words and a loaded text encoder, without training. Experimental: not the trained
adapter of the paper.

AesEmb is read off the conditioning that ComfyUI's CLIPTextEncode gives for a label's texts, so a
fine-tuned text encoder, its LoRAs and clip-skip count as they are loaded. No ComfyUI is imported
here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .files import VMix, read_labels, training_free

NAME = "VMix Training-Free Start"
# The parts of a text encoder, as its tokens are keyed, that are CLIP throughout.
CLIP_PARTS = ({"l"}, {"g", "l"}, {"g"}, {"h"})
KNOWN_WIDTHS = {768: "SD1.5", 2048: "SDXL"}

# Diffusers path, LDM path and inner_dim of a layer.
UNetLayer = tuple[str, str, int]


def make(
    clip: Any, labels: str, layers: Sequence[UNetLayer] = (), context_dim: int | None = None
) -> VMix:
    """A VMix for a U-Net with these layers and this width of context; by default SD1.5's or SDXL's,
    whichever the text encoder is for."""
    # First: it needs no text encoder to say that there are none, or what is wrong with them.
    read = read_labels(labels)
    if clip is None:
        raise ValueError(
            "clip: found none; the checkpoint has no text encoder, so load one beside it"
        )
    found, tokens = features(clip, read)
    width = found.shape[-1]
    if context_dim is None and width not in KNOWN_WIDTHS:
        known = " or ".join(f"{d} ({base})" for d, base in KNOWN_WIDTHS.items())
        raise ValueError(
            f"clip: expected a text encoder whose context is {known} wide, found {width}; "
            "if your model is a U-Net that takes it, connect model"
        )
    if context_dim not in (None, width):
        raise ValueError(
            f"clip: expected a text encoder for the connected model, whose context is "
            f"{context_dim} wide, found {width}"
        )
    return training_free(NAME, labels, found, tokens, layers)


def features(clip: Any, labels: Sequence[Any]) -> tuple[Tensor, int]:
    """[N, 2, d] of every label's positive and negative, and C, the tokens of a context."""
    parts = clip.tokenize("")
    if set(parts) not in CLIP_PARTS:
        kind = type(clip.cond_stage_model).__name__
        raise ValueError(
            f"clip: expected the text encoder of SD1.5 or SDXL, found {kind} ({', '.join(parts)})"
        )
    part = "l" if "l" in parts else next(iter(parts))
    # Nothing stands between start and end, whichever tokenizer it is.
    end = parts[part][0][1][0]
    rows: dict[str, Tensor] = {}
    for label in labels:
        for text in (label.positive, label.negative):
            if text not in rows:
                tokens = tokenize(clip, label.name, text)
                context = encode(clip, tokens)
                rows[text] = context[[token for token, *_ in tokens[part][0]].index(end)]
    pairs = [torch.stack([rows[label.positive], rows[label.negative]]) for label in labels]
    return torch.stack(pairs), len(context)


def tokenize(clip: Any, label: str, text: str) -> dict[str, Any]:
    """The tokens of a label's text, which is taken literally; one chunk."""
    if re.search(r"(^|\s)embedding:", text):
        raise ValueError(
            f"label {label!r}: expected text, found {text!r}: embedding: stands for vectors"
        )
    # Unescaped, parentheses are weights to ComfyUI.
    tokens: dict[str, Any] = clip.tokenize(re.sub(r"([()])", r"\\\1", text))
    chunks = max(tokens.values(), key=len)
    if len(chunks) > 1:
        raise ValueError(
            f"label {label!r}: expected a text of at most {len(chunks[0]) - 2} tokens, "
            f"found a longer one: {text!r}"
        )
    return tokens


def encode(clip: Any, tokens: dict[str, Any]) -> Tensor:
    """The context of a text, [C, d], as CLIPTextEncode gives it."""
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if len(conditioning) > 1:
        raise ValueError(
            "clip: expected a text encoder that stays the same, found one with hooks that are "
            "scheduled over the sampling"
        )
    context: Tensor = conditioning[0][0]
    return context[0].float().cpu()
