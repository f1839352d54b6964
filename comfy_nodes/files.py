"""Adapter and preset files, with the Rust module where it is installed and without it.

Without it only presets give values: they are tensors to be read, nothing has to be computed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
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
    "needs the Rust module vmix, which is not installed here: install the vmix-adapter wheel with "
    "ComfyUI's own Python (step 2 of this node pack's README.md), then restart ComfyUI"
)
APPLY_TO = ("cond", "both", "contrast")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Selection: TypeAlias = Mapping[str, float]


class Pair(NamedTuple):
    """V_a of one layer, or f_a: for the conditional pass and, with contrast, the other one."""

    cond: Tensor
    uncond: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        return Pair(function(self.cond), None if self.uncond is None else function(self.uncond))


@dataclass(frozen=True)
class Label:
    name: str
    dimension: str
    default: float
    display_names: Mapping[str, str]


@dataclass(frozen=True)
class VMix:
    """An opened adapter or preset: what travels along VMIX links."""

    name: str
    kind: str  # "adapter" or "preset"
    base: str  # "sd15", "sdxl" or "other"
    labels: tuple[Label, ...]
    context_tokens: int
    context_dim: int | None  # presets do not say
    apply_to: str
    layers: Mapping[str, int]  # diffusers path → inner_dim
    selection: Selection  # of a preset; the defaults of an adapter
    value_weights: str  # "own" or "base"
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

    def values(
        self, chosen: Selection | None, apply_to: str, dtype: torch.dtype
    ) -> dict[str, Pair]:
        """V_a of every layer (eq. 7), [context_tokens, inner_dim] each, by diffusers path."""
        weights, policy = self.weights(chosen), self.policy(apply_to)
        values = self.opened
        if self.kind == "adapter":
            name = next((n for n, d in DTYPES.items() if d == dtype), "float32")
            values = self._adapter().values(weights, apply_to=policy, dtype=name)
        pairs = {}
        for layer in self.layers:
            uncond = values.uncond(layer) if policy == "contrast" else None
            pair = Pair(from_dlpack(values[layer]), None if uncond is None else from_dlpack(uncond))
            pairs[layer] = pair.map(lambda v: v.to(dtype))
        return pairs

    def features(self, chosen: Selection | None, apply_to: str) -> Pair:
        """f_a (eq. 6), [context_tokens, d], for files that use the base's own value weights."""
        adapter = self._adapter()
        weights = self.weights(chosen)
        f_a = from_dlpack(adapter.project(weights))
        if self.policy(apply_to) != "contrast":
            return Pair(f_a, None)
        if adapter.projection == "difference":
            return Pair(f_a, -f_a)
        return Pair(f_a, from_dlpack(adapter.project(dict.fromkeys(weights, 0.0))))

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapter."""
        self._adapter().save(path)

    def _adapter(self) -> Any:
        if self.opened is None:
            raise RuntimeError(f"{self.name} is an adapter; computing its values {INSTALL}")
        return self.opened


def open_file(path: str | os.PathLike[str], name: str = "") -> VMix:
    """Opens an adapter or a preset; the file's own metadata says which it is."""
    name = name or os.path.basename(path)
    if native is None:
        return _open_without_native(path, name)
    return _opened(native.open(path), name)


def read_labels(text: str) -> list[Any]:
    """The labels of a list, on lines or between semicolons: `vmix.Label`, with what is not said."""
    if native is None:
        raise RuntimeError(f"making an adapter {INSTALL}")
    labels: list[Any] = native.read_label_list(entries(text), training_free=True)
    return labels


def entries(text: str) -> list[str]:
    """The labels of a list, on lines or between semicolons; lines that begin with # are none."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = [part.strip() for line in lines for part in line.split(";")]
    return [part for part in parts if part]


def training_free(
    name: str,
    labels: str,
    features: Tensor,
    context_tokens: int,
    layers: Sequence[tuple[str, str, int]],
) -> VMix:
    """An adapter from the features [N, 2, d] of a list's labels; `layers` are needed where the
    U-Net is neither SD1.5's nor SDXL's."""
    if native is None:
        raise RuntimeError(f"making an adapter {INSTALL}")
    opened = native.training_free_adapter(
        entries(labels), features, context_tokens=context_tokens, layers=list(layers)
    )
    return _opened(opened, name)


def _opened(opened: Any, name: str) -> VMix:
    assert native is not None
    labels = tuple(
        Label(label.name, label.dimension, as_written(label.default), label.display_names)
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
        opened.value_weights if adapter else "own",
        opened,
    )


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
    if metadata["vmix.format"] != "1":
        raise ValueError(f"{name}: vmix.format: expected 1, found {metadata['vmix.format']!r}")
    kind = metadata.get("vmix.kind")
    if kind not in ("adapter", "preset"):
        raise ValueError(f"{name}: vmix.kind: expected adapter or preset, found {kind!r}")
    try:
        tokens = int(metadata["vmix.context_tokens"])
        labels = tuple(
            Label(
                label["name"],
                label.get("dimension", ""),
                float(label.get("default", 1.0)),
                label.get("display_names", {}),
            )
            for label in json.loads(metadata["vmix.labels"])
        )
        selection = {label.name: label.default for label in labels}
        if kind == "preset":
            selection = {k: float(w) for k, w in json.loads(metadata["vmix.selection"]).items()}
        suffix = ".v_aes" if kind == "preset" else ".to_v_aes.weight"
        widths = {
            key.removesuffix(suffix): shape[1 if kind == "preset" else 0]
            for key, shape in shapes.items()
            if key.endswith(suffix)
        }
        if metadata.get("vmix.value_weights") == "base" and "vmix.inner_dims" in metadata:
            widths = json.loads(metadata["vmix.inner_dims"])
        found = VMix(
            name,
            kind,
            metadata["vmix.base"],
            labels,
            tokens,
            int(metadata["vmix.context_dim"]) if kind == "adapter" else None,
            metadata["vmix.apply_to"],
            widths,
            selection,
            metadata.get("vmix.value_weights", "own"),
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
