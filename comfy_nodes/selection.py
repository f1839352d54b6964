"""What users type: a selection of labels as JSON, and strengths per block of the U-Net."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_SECTIONS = {
    "in": "input",
    "input": "input",
    "mid": "middle",
    "middle": "middle",
    "out": "output",
    "output": "output",
}
_ENTRY = re.compile(r"([a-z]+)(?:(\d+)(?:-(\d+))?)?=(\S+)")


class Block(NamedTuple):
    """A block of the U-Net as ComfyUI counts: ("input", 4) is `input_blocks.4`."""

    section: str
    number: int


def parse_selection(text: str) -> dict[str, float]:
    """The JSON object label → weight of a selection widget; nothing at all is an empty one."""
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'aesthetics: expected JSON such as {{"vibrant color": 1.0}}, found {text!r}: {error}'
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"aesthetics: expected a JSON object, label to weight, found {text!r}")
    return {label: _number(f"weight of {label!r}", weight) for label, weight in found.items()}


def complete(defaults: Mapping[str, float], chosen: Mapping[str, float]) -> dict[str, float]:
    """A weight for every label: the chosen one, or the file's default."""
    for label in chosen:
        if label not in defaults:
            known = ", ".join(map(repr, defaults))
            raise ValueError(f"unknown label {label!r}; the file's labels are: {known}")
    return {label: chosen.get(label, default) for label, default in defaults.items()}


def block_of(ldm_name: str) -> Block:
    """The block of a layer such as `input_blocks.4.1.transformer_blocks.0.attn2`."""
    section, number, *_ = ldm_name.split(".")
    section = section.removesuffix("_block").removesuffix("_blocks")
    # The one middle block is numbered inside: middle_block.1 is its transformer.
    return Block(section, 0 if section == "middle" else int(number))


def block_strengths(text: str, blocks: Iterable[Block]) -> dict[Block, float]:
    """The factor of every block; `in4-8=0.5, mid=0` leaves those not named at 1.

    Later entries win over earlier ones, so that `out=0, out5=1` means output block 5 alone.
    """
    factors = dict.fromkeys(blocks, 1.0)
    known = ", ".join(f"{b.section}{'' if b.section == 'middle' else b.number}" for b in factors)
    for entry in re.sub(r"\s*=\s*", "=", text).replace(",", " ").split():
        match = _ENTRY.fullmatch(entry.lower())
        section = _SECTIONS.get(match[1]) if match else None
        if match is None or section is None:
            raise ValueError(
                f"blocks: expected entries such as in4-8=0.5, mid=1 or output=0, found {entry!r}"
            )
        first = int(match[2]) if match[2] else 0
        last = int(match[3] or match[2]) if match[2] else math.inf
        factor = _number(f"blocks: strength of {entry!r}", match[4])
        named = [b for b in factors if b.section == section and first <= b.number <= last]
        if not named:
            raise ValueError(
                f"blocks: {entry!r} names no block with cross-attention; this model's are: {known}"
            )
        factors.update(dict.fromkeys(named, factor))
    return factors


def parse_strengths(text: str) -> list[float]:
    """Numbers between commas or spaces; at least one."""
    parts = text.replace(",", " ").split()
    if not parts:
        raise ValueError("strengths: expected numbers such as 0, 0.5, 1, found none")
    return [_number("strengths", part) for part in parts]


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, found {value!r}")
    return number
