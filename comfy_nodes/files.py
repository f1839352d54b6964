"""Adapter and preset files, with the Rust module where it is installed and without it.

Without it only presets give values: they are tensors to be read, nothing has to be computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .selection import complete

try:
    import vmix as _vmix
except Exception as error:  # a wheel for another system fails in its own ways
    _vmix_error: Exception | None = error
    native: ModuleType | None = None
else:
    _vmix_error = None
    native = _vmix

INSTALL = (
    f"needs the Rust module vmix, which cannot be imported here ({_vmix_error}): install the "
    "vmix-adapter wheel with ComfyUI's own Python (step 2 of this node pack's README.md), then "
    "restart ComfyUI"
)
APPLY_TO = ("cond", "both", "contrast")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Selection: TypeAlias = Mapping[str, float]


class Pair(NamedTuple):
    """V_a of one layer: for the conditional pass and, with contrast, the other one."""

    cond: Tensor
    uncond: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        return Pair(function(self.cond), None if self.uncond is None else function(self.uncond))


@dataclass(frozen=True)
class Label:
    name: str
    dimension: str
    default: float
    neutral: float | None  # the weight at which it changes nothing
    low: float  # the ends and the step of its slider
    high: float
    step: float
    display_names: Mapping[str, str]

    @property
    def left_out(self) -> float:
        """Its weight where a selection leaves it out."""
        return self.neutral or 0.0


@dataclass(frozen=True)
class VMix:
    """An opened adapter or preset: what travels along VMIX links."""

    name: str
    kind: str  # "adapter" or "preset"
    base: str  # "sd15", "sdxl" or "other"
    labels: tuple[Label, ...]
    context_tokens: int
    context_dim: int | None  # presets do not say, nor need every adapter
    apply_to: str
    layers: Mapping[str, int]  # diffusers path → inner_dim
    selection: Selection  # of a preset; the defaults of an adapter
    opened: Any = None  # vmix.Adapter, vmix.Values or _PresetFile

    def weights(self, chosen: Selection | None) -> dict[str, float]:
        """A weight for every label; those not chosen have the file's default."""
        weights = complete(self.selection, chosen or {})
        if self.kind == "preset" and weights != self.selection:
            raise ValueError(
                f"{self.name} is a preset: it holds the values of one selection, "
                f"{json.dumps(dict(self.selection))}, and cannot take another; load the adapter "
                "that it was made from"
            )
        return weights

    def alone(self, *names: str) -> dict[str, float]:
        """These labels at 1, and all others left out."""
        return {label.name: 1.0 if label.name in names else label.left_out for label in self.labels}

    def furthest(self, weights: Selection) -> str:
        """The label furthest from where it is left out: the one to name when values overflow."""
        label = max(self.labels, key=lambda label: abs(weights[label.name] - label.left_out))
        return f"label {label.name!r} at weight {weights[label.name]:g}"

    def policy(self, apply_to: str) -> str:
        """Which passes are mixed: the file's own choice for "file"."""
        policy = self.apply_to if apply_to == "file" else apply_to
        if policy not in APPLY_TO:
            raise ValueError(f"apply_to: expected file, {', '.join(APPLY_TO)}, found {apply_to!r}")
        if self.kind == "preset" and policy == "contrast" != self.apply_to:
            raise ValueError(
                f"apply_to: contrast needs values for the unconditional pass, and the preset "
                f"{self.name} was saved for {self.apply_to!r}"
            )
        return policy

    def values(self, chosen: Selection | None, apply_to: str) -> dict[str, Pair]:
        """V_a of every layer (eq. 7), [context_tokens, inner_dim] in float32, by diffusers path."""
        weights, policy = self.weights(chosen), self.policy(apply_to)
        values = self.opened
        if self.kind == "adapter":
            values = self._adapter().values(weights, apply_to=policy)
        pairs = {}
        for layer in self.layers:
            uncond = values.uncond(layer) if policy == "contrast" else None
            pair = Pair(from_dlpack(values[layer]), None if uncond is None else from_dlpack(uncond))
            pairs[layer] = pair.map(lambda v: v.float())
        return pairs

    def save_preset(
        self, path: str | os.PathLike[str], chosen: Selection | None, apply_to: str, dtype: str
    ) -> None:
        """Writes the values of one selection; `dtype` is a key of DTYPES."""
        if native is None:
            raise RuntimeError(f"saving a preset {INSTALL}")
        policy = self.policy(apply_to)
        weights = self.weights(chosen)
        if self.kind == "preset":
            raise ValueError(f"{self.name} is a preset already; there is nothing to save")
        self._adapter().values(weights, apply_to=policy, dtype=dtype).save(path)

    def _adapter(self) -> Any:
        if self.opened is None:
            raise RuntimeError(f"{self.name} is an adapter; computing its values {INSTALL}")
        return self.opened


def open_file(path: str | os.PathLike[str], name: str = "") -> VMix:
    """Opens an adapter or a preset; the file's own metadata says which it is."""
    name = name or os.path.basename(path)
    if native is None:
        return _open_without_native(path, name)
    opened = native.open(path)
    if isinstance(opened, native.Untrained):
        raise _no_values(name, "init")
    labels = tuple(
        Label(
            label.name,
            label.dimension,
            as_written(label.default),
            None if label.neutral is None else as_written(label.neutral),
            as_written(label.range[0]),
            as_written(label.range[1]),
            as_written(label.step),
            label.display_names,
        )
        for label in opened.labels
    )
    adapter = isinstance(opened, native.Adapter)
    selection = opened.weights() if adapter else opened.selection
    return VMix(
        name,
        "adapter" if adapter else "preset",
        opened.base,
        labels,
        opened.context_tokens,
        opened.context_dim if adapter else None,
        opened.apply_to,
        {layer.name: layer.inner_dim for layer in opened.layers},
        {name: as_written(w) for name, w in selection.items()},
        opened,
    )


def _no_values(name: str, kind: str | None) -> ValueError:
    start = "; it is the start of a training" if kind == "init" else ""
    return ValueError(f"{name}: vmix.kind: expected adapter or preset, found {kind!r}{start}")


def as_written(weight: float) -> float:
    """The library's weights have 32 bits: 0.35 again, not 0.3499999940395355."""
    return float(str(np.float32(weight)))


class _PresetFile:
    """The tensors of a preset, read through the safetensors package."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __getitem__(self, layer: str) -> Tensor:
        return self._read(f"{layer}.v_aes")

    def uncond(self, layer: str) -> Tensor:
        return self._read(f"{layer}.v_aes_uncond")

    def _read(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _label(found: Mapping[str, Any]) -> Label:
    neutral = found.get("neutral")
    low, high = found.get("range", (0.0, 1.0))
    return Label(
        found["name"],
        found.get("dimension", ""),
        float(found.get("default", 1.0)),
        None if neutral is None else float(neutral),
        float(low),
        float(high),
        float(found.get("step", 0.05)),
        found.get("display_names", {}),
    )


def _open_without_native(path: str | os.PathLike[str], name: str) -> VMix:
    """The part of docs/format.md that a preset needs; the tensors are checked before they serve."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{name}: no safetensors file: {error}") from None
    if "vmix.format" not in metadata:
        raise ValueError(f"{name}: no VMix file: its metadata has no vmix.format")
    if metadata["vmix.format"] != "2":
        raise ValueError(f"{name}: vmix.format: expected 2, found {metadata['vmix.format']!r}")
    kind = metadata.get("vmix.kind")
    if kind not in ("adapter", "preset"):
        raise _no_values(name, kind)
    try:
        tokens = int(metadata["vmix.context_tokens"])
        labels = tuple(map(_label, json.loads(metadata["vmix.labels"])))
        selection = {label.name: label.default for label in labels}
        if kind == "preset":
            selection = {k: float(w) for k, w in json.loads(metadata["vmix.selection"]).items()}
        suffix = ".v_aes" if kind == "preset" else ".rows"
        widths = {
            key.removesuffix(suffix): shape[1]
            for key, shape in shapes.items()
            if key.endswith(suffix) and key != "context.rows"
        }
        features = shapes.get("aes_emb") if kind == "adapter" else None
        found = VMix(
            name,
            kind,
            metadata["vmix.base"],
            labels,
            tokens,
            features[2] if features else None,
            metadata["vmix.apply_to"],
            widths,
            selection,
            _PresetFile(path) if kind == "preset" else None,
        )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"{name}: broken metadata: {type(error).__name__}: {error}") from None
    if kind == "preset":
        suffixes = (".v_aes", ".v_aes_uncond") if found.apply_to == "contrast" else (".v_aes",)
        expected = {f"{p}{s}": (tokens, w) for p, w in widths.items() for s in suffixes}
        for key in sorted({*expected, *shapes}):
            if expected.get(key) != shapes.get(key):
                raise ValueError(
                    f"{name}: {key}: expected shape {expected.get(key, 'no such tensor')}, "
                    f"found {shapes.get(key, 'no such tensor')}"
                )
    return found
