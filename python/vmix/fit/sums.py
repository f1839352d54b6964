"""What a fit adds up while pictures are drawn: all that it has to remember of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vmix.fit.errors import FitError
from vmix.fit.prompts import Plan

__all__ = ["LENGTHS", "LayerSums", "Sums", "sums_size"]

FIT_PART, CHECK_PART = 0, 1
LENGTHS = (5, 20, 60)
"""Prompts are told apart by length: each belongs to the nearest of these numbers of tokens."""


def length_class(tokens: int) -> int:
    """By ratio: 10 tokens are as near to 5 as to 20."""
    return min(
        range(len(LENGTHS)), key=lambda i: max(tokens, 1) / LENGTHS[i] + LENGTHS[i] / max(tokens, 1)
    )


class LayerSums:
    """Weighted sums over the queries x of one layer, in f32, with H heads of width E.

    `a` is how a query attends to the C tokens of the bare prompt, `Δ` what a side's words change.
    The first axis, of size 2, tells the prompts of the fit from those to check with.

        moment  [2, G, H, C, C]   Σ a·aᵀ, for every group of sides with the same prompts
        cross   [2, S, H, C, E]   Σ a·Δ, for every side
        change  [2, S]            Σ ‖Δ‖²
        output  [2, G]            Σ ‖attention output‖²
        queries [2, G]            the sum of their weights
        lengths [3, C, C]         Σ a·aᵀ over heads, by length of the prompt
        length_output [3]         Σ ‖attention output‖²
        mismatch [2]              Σ ‖a·V_c − output‖² and Σ ‖output‖²
    """

    def __init__(
        self, sides: int, groups: int, heads: int, tokens: int, width: int, device: Any
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.heads, self.tokens, self.width = heads, tokens, width
        self.moment = zeros(2, groups, heads, tokens, tokens)
        self.cross = zeros(2, sides, heads, tokens, width)
        self.change = zeros(2, sides)
        self.output = zeros(2, groups)
        self.queries = zeros(2, groups)
        self.lengths = zeros(len(LENGTHS), tokens, tokens)
        self.length_output = zeros(len(LENGTHS))
        self.mismatch = zeros(2)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}


def sums_size(plan: Plan, layers: Mapping[str, tuple[int, int]], tokens: int) -> int:
    """Bytes of all sums; `layers` are heads and width of a head."""
    heads = sum(h for h, _ in layers.values())
    inner = sum(h * e for h, e in layers.values())
    moments = 2 * len(plan.groups) * heads * tokens * tokens
    lengths = len(LENGTHS) * len(layers) * tokens * tokens
    return 4 * (moments + lengths + 2 * len(plan.sides) * tokens * inner)


class Sums:
    """Those of all layers, and the prompts that are in them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings))
        """All that they depend on: sums of other settings cannot be added to."""
        self.layers: dict[str, LayerSums] = {}
        self.done: set[int] = set()

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        tensors = {
            f"{path}/{name}": tensor.cpu().contiguous()
            for path, layer in self.layers.items()
            for name, tensor in layer.tensors().items()
        }
        said = {"settings": json.dumps(self.settings), "done": json.dumps(sorted(self.done))}
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, said)
            part.replace(path)
        except SafetensorError as error:  # such as a full disk
            raise FitError(f"{path}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def load(self, path: Path, device: Any = None) -> None:
        """FitError where they belong to another fit."""
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                settings = json.loads(said.get("settings", "null"))
                self._check(path, settings)
                done = set(json.loads(said["done"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise FitError(f"{path}: not a file of sums: {error}") from None
        layers: dict[str, LayerSums] = {}
        for layer in dict.fromkeys(name.rpartition("/")[0] for name in tensors):
            cross, moment = tensors[f"{layer}/cross"], tensors[f"{layer}/moment"]
            _, sides, heads, tokens, width = cross.shape
            sums = LayerSums(sides, moment.shape[1], heads, tokens, width, device)
            for name, into in sums.tensors().items():
                into.copy_(tensors[f"{layer}/{name}"])
            layers[layer] = sums
        self.layers, self.done = layers, done

    def _check(self, path: Path, settings: Any) -> None:
        if not isinstance(settings, dict):
            raise FitError(f"{path}: not a file of sums")
        for key, ours in self.settings.items():
            if settings.get(key) != ours:
                raise FitError(
                    f"{path}: sums of another fit: {key}: expected {_short(ours)}, found "
                    f"{_short(settings.get(key))}. Remove the file to begin anew"
                )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
