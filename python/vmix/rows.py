"""Adapter files read in torch alone (docs/format.md), and V_a = A(w)·B.

    file = open_rows("adapter.safetensors")
    A = file.coefficients({"vibrant color": 0.8})                            # [C, R]
    v_a = {layer: values(A, rows) for layer, rows in file.rows.items()}      # [C, inner_dim] each

Nothing else of vmix is imported: a host that has no Rust module can carry a copy of this file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NoReturn, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

__all__ = ["Label", "RowFile", "RowsError", "Selection", "coefficients", "open_rows", "values"]

Selection: TypeAlias = str | Mapping[str, float] | Sequence[str] | None
"""The weights of labels; or labels, of weight 1; "all" (trained files only), "none", or
None for the file's defaults."""


def coefficients(
    weights: Tensor,
    profile: Tensor,
    rows: Sequence[tuple[int | None, str]],
    gram_factor: Tensor | None = None,
    norm_eps: float = 0.0,
) -> Tensor:
    """A [..., C, R] in f64 for weights [..., N]; `rows` are the label's position and side of each.

    A file without a gram_factor is linear.
    """
    weights = weights.double()

    def scale(label: int | None, side: str) -> Tensor:
        if label is None:
            return torch.ones_like(weights[..., 0])
        w = weights[..., label]
        if gram_factor is None:
            return (w if side == "positive" else -w).clamp(min=0)
        return w if side == "positive" else 1 - w

    u = profile.double() * torch.stack([scale(*row) for row in rows], -1)[..., None, :]
    if gram_factor is None:
        return u
    normed = torch.tensor([label is not None for label, _ in rows], device=u.device)
    variance = (u[..., normed] @ gram_factor.double()).square().sum(-1, keepdim=True)
    return torch.where(normed, u * (variance + norm_eps).rsqrt(), u)


def values(A: Tensor, rows: Tensor) -> Tensor:
    """V_a [..., C, inner_dim] of a layer in f32, on the device of the rows.

    Not a product of matrices: those have 8 or 10 bits where autocast or TF32 is on.
    """
    A, rows = A.to(rows.device, torch.float32), rows.float()
    out = A.new_zeros(*A.shape[:-1], rows.shape[-1])
    for r in range(len(rows)):
        out = torch.addcmul(out, A[..., r, None], rows[r])
    return out


class RowsError(ValueError):
    """What was refused, what was expected and what was found."""


@dataclass(frozen=True)
class Label:
    """A label; its numbers are those of the file, before they are rounded to f32."""

    name: str
    dimension: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    default: float
    neutral: float | None
    range: tuple[float, float]
    step: float
    effect: Mapping[str, float]
    display_names: Mapping[str, str]

    @property
    def left_out(self) -> float:
        """Its weight in a selection that does not name it."""
        return 0.0 if self.neutral is None else _f32(self.neutral)


@dataclass(frozen=True, eq=False)
class RowFile:
    """An adapter. Layers are named by their diffusers path."""

    name: str
    base: str
    labels: tuple[Label, ...]
    context_tokens: int
    context_dim: int | None
    apply_to: str
    coefficient_kind: str
    norm_eps: float
    row_sides: tuple[tuple[str | None, str], ...]  # label and side of every row
    profile: Tensor
    gram_factor: Tensor | None
    rows: Mapping[str, Tensor]
    ldm_names: Mapping[str, str]
    aes_emb: Tensor | None
    context_rows: Tensor | None
    attention: Tensor | None
    made: Mapping[str, Any]
    metadata: Mapping[str, str]
    sha256: str

    @property
    def dtype(self) -> torch.dtype:
        """That of the rows."""
        return next(iter(self.rows.values())).dtype

    def weights(self, selection: Selection = None) -> dict[str, float]:
        """The weight of every label, rounded to f32."""
        if selection is None:
            return {label.name: _f32(label.default) for label in self.labels}
        if isinstance(selection, str) and selection == "all":
            if self.coefficient_kind == "linear":
                names = _printable(", ".join(label.name for label in self.labels))
                expected = f"names of fitted labels ({names})"
                raise RowsError(f"selection: expected {expected}, found `all`")
            selection = [label.name for label in self.labels]
        elif isinstance(selection, str):
            selection = [] if selection == "none" else [selection]
        if isinstance(selection, Mapping):
            chosen = selection
        elif isinstance(selection, Sequence) and all(isinstance(name, str) for name in selection):
            chosen = dict.fromkeys(selection, 1.0)
        else:
            self._refuse("selection", "a label, labels or their weights", _shown(selection))
        weights = {label.name: label.left_out for label in self.labels}
        for name, weight in chosen.items():
            if name not in weights:
                known = ", ".join(weights)
                raise RowsError(f"unknown label {_shown(name)}; known labels: {_printable(known)}")
            weights[name] = _finite(name, weight)
        return weights

    def opposite(self, selection: Selection = None) -> dict[str, float]:
        """2·neutral − w of every label, or 0 where neutral is None."""
        weights = self.weights(selection)
        for label in self.labels:
            mirrored = 2 * label.left_out - weights[label.name]
            weights[label.name] = 0.0 if label.neutral is None else _finite(label.name, mirrored)
        return weights

    def coefficients(self, selection: Selection | Sequence[Selection] | Tensor = None) -> Tensor:
        """A [C, R] in f32; [B, C, R] of a list of selections or of weights [B, N]."""
        if isinstance(selection, Tensor):
            weights = selection.float()
            if not weights.isfinite().all():
                self._refuse("weights", "finite numbers", "NaN or infinity")
        elif isinstance(selection, Sequence) and not all(isinstance(s, str) for s in selection):
            weights = self._vector(*selection)
        else:
            weights = self._vector(selection)[0]  # type: ignore[arg-type]
        if weights.ndim == 0 or weights.shape[-1] != len(self.labels):
            self._refuse("weights", f"{len(self.labels)} per image", f"shape {[*weights.shape]}")
        position = {label.name: i for i, label in enumerate(self.labels)}
        rows = [(None if name is None else position[name], side) for name, side in self.row_sides]
        exact = coefficients(weights.cpu(), self.profile, rows, self.gram_factor, self.norm_eps)
        if not (A := exact.float()).isfinite().all():
            self._refuse("weights", "coefficients that float32 can hold", "more")
        return A

    def _vector(self, *selections: Selection) -> Tensor:
        """[B, N]"""
        weights = [[*self.weights(selection).values()] for selection in selections]
        return torch.tensor(weights, dtype=torch.float64)

    def _refuse(self, argument: str, expected: str, found: str) -> NoReturn:
        raise RowsError(f"{_printable(self.name)}: {argument}: expected {expected}, found {found}")


def _finite(label: str, weight: Any) -> float:
    try:
        number = math.nan if isinstance(weight, (bool, str)) else _f32(float(weight))
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        found = _shown(weight)
        raise RowsError(f"weight of label {_shown(label)}: expected a finite number, found {found}")
    return number


# The U-Nets of the bases: block, LDM's name and first number of it, spatial transformers, their
# depth and width. docs/format.md lists the layers that come of it.
_UNETS = {
    "sd15": (
        ("down_blocks.0", "input_blocks", 1, 2, 1, 320),
        ("down_blocks.1", "input_blocks", 4, 2, 1, 640),
        ("down_blocks.2", "input_blocks", 7, 2, 1, 1280),
        ("mid_block", "middle_block", 1, 1, 1, 1280),
        ("up_blocks.1", "output_blocks", 3, 3, 1, 1280),
        ("up_blocks.2", "output_blocks", 6, 3, 1, 640),
        ("up_blocks.3", "output_blocks", 9, 3, 1, 320),
    ),
    "sdxl": (
        ("down_blocks.1", "input_blocks", 4, 2, 2, 640),
        ("down_blocks.2", "input_blocks", 7, 2, 10, 1280),
        ("mid_block", "middle_block", 1, 1, 10, 1280),
        ("up_blocks.0", "output_blocks", 0, 3, 10, 1280),
        ("up_blocks.1", "output_blocks", 3, 3, 2, 640),
    ),
}
_CONTEXT_DIMS = {"sd15": 768, "sdxl": 2048}
_CONTEXT_TOKENS = 77
_LONGEST_HEADER = 100_000_000
_LARGEST = 2**32
_MOST_TOKENS = 4096
_MOST_RESULTS = 2**28
_DEEPEST_JSON = 127
_DTYPES = ("F32", "F16", "BF16")


def open_rows(path: str | os.PathLike[str]) -> RowFile:
    """Reads an adapter file whole and checks it. RowsError says why it is none.

    All but the numbers is checked before more than the header is read.
    """
    name = os.fspath(path)
    # Asked before opening: a pipe would wait for somebody to write.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise RowsError(f"{_printable(name)}: not a regular file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise RowsError(
                f"{_printable(name)}: not a safetensors file: the first 8 bytes ask for a header "
                f"of {length} bytes, the file has {size}"
            )
        header = file.read(length)
        reader = _Reader.of(name, header)
        parts = _read(reader)
        if 8 + length + reader.end != size:
            raise RowsError(
                f"{_printable(name)}: not a safetensors file: {8 + length + reader.end} bytes "
                f"expected, {size} found"
            )
        if size > _LARGEST:
            expected = f"at most {_LARGEST} bytes"
            raise RowsError(f"{_printable(name)}: expected {expected}, found {size}")
        content = start + header + file.read(reader.end)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise RowsError(f"{_printable(name)}: not a safetensors file: {error}") from None
    _check_numbers(reader, tensors)
    return RowFile(
        name=name,
        **parts,
        rows={layer: tensors[f"{layer}.rows"] for layer in parts["ldm_names"]},
        profile=tensors["profile"],
        gram_factor=tensors.get("gram_factor"),
        aes_emb=tensors.get("aes_emb"),
        context_rows=tensors.get("context.rows"),
        attention=tensors.get("attention"),
        metadata=reader.metadata,
        sha256=hashlib.sha256(content).hexdigest(),
    )


@dataclass
class _Reader:
    """The header of a file."""

    name: str
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # dtype and shape
    end: int = 0  # of the last tensor

    @classmethod
    def of(cls, name: str, header: bytes) -> _Reader:
        """What it says; that offsets, shapes and dtypes fit each other, `load` checks later."""
        reader = cls(name, {})
        try:
            entries = _parsed(header.decode())
            if not isinstance(entries, dict):
                raise ValueError("no object")
            for tensor, entry in entries.items():
                reader._add(tensor, entry)
        except ValueError as error:
            raise RowsError(
                f"{_printable(name)}: not a safetensors file: invalid header: {_printable(error)}"
            ) from None
        return reader

    def _add(self, tensor: str, entry: Any) -> None:
        if tensor == "__metadata__":
            self.metadata = {} if entry is None else entry
            if not isinstance(entry, dict | None) or not all(
                isinstance(value, str) for value in self.metadata.values()
            ):
                raise ValueError("metadata that are no strings")
            return
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(), int(end)]}:
                if all(type(size) is int for size in shape):
                    self.tensors[tensor] = dtype, shape
                    self.end = max(self.end, end)
                    return
        raise ValueError(f"no dtype, shape and offsets of tensor {_shown(tensor)}")

    def refuse_key(self, key: str, expected: str, found: str) -> NoReturn:
        raise RowsError(
            f"{_printable(self.name)}: metadata `{key}`: expected {expected}, "
            f"found {_printable(found)}"
        )

    def refuse_tensor(self, tensor: str, expected: str, found: Any) -> NoReturn:
        raise RowsError(
            f"{_printable(self.name)}: tensor {_shown(tensor)}: expected {expected}, "
            f"found {_printable(found)}"
        )

    def key(self, key: str, expected: str) -> str:
        if key not in self.metadata:
            self.refuse_key(key, expected, "no such key")
        return self.metadata[key]

    def one_of(self, key: str, *names: str) -> str:
        expected = f"one of {', '.join(names)}" if len(names) > 1 else f"`{names[0]}`"
        value = self.key(key, expected)
        if value not in names:
            self.refuse_key(key, expected, _shown(value))
        return value

    def json(self, key: str, kind: type, expected: str) -> Any:
        text = self.key(key, expected)
        try:
            value = _parsed(text)
        except ValueError as error:
            self.refuse_key(key, expected, f"no JSON: {error}")
        if type(value) is not kind:
            self.refuse_key(key, expected, _shown(text))
        return value

    def shape(self, tensor: str, expected: Sequence[int | str]) -> list[int]:
        """That of a tensor; `expected` names sizes that may be any but 0."""
        wanted = "shape [" + ", ".join(map(str, expected)) + "]"
        if tensor not in self.tensors:
            self.refuse_tensor(tensor, wanted, "no such tensor")
        dtype, shape = self.tensors[tensor]
        if dtype not in _DTYPES:
            self.refuse_tensor(tensor, "F32, F16 or BF16", dtype)
        if len(shape) != len(expected) or any(
            found < 1 if isinstance(size, str) else found != size
            for found, size in zip(shape, expected, strict=True)
        ):
            self.refuse_tensor(tensor, wanted, f"shape {shape}")
        return shape

    def f32(self, tensor: str, shape: Sequence[int | str]) -> None:
        self.shape(tensor, shape)
        if (dtype := self.tensors[tensor][0]) != "F32":
            self.refuse_tensor(tensor, "F32", dtype)


def _read(reader: _Reader) -> dict[str, Any]:
    """What the header says of an adapter, as `RowFile` has it."""
    reader.one_of("vmix.format", "2")
    reader.one_of("vmix.kind", "adapter")
    base = reader.one_of("vmix.base", *_UNETS, "other")
    labels = _labels(reader)
    expected = f"a whole number from 1 to {_MOST_TOKENS}"
    written = reader.key("vmix.context_tokens", expected)
    match = re.fullmatch(r"\+?0*([1-9][0-9]{0,3})", written)
    if match is None or int(match[1]) > _MOST_TOKENS:
        reader.refuse_key("vmix.context_tokens", expected, _shown(written))
    tokens = int(match[1])
    if base != "other" and tokens != _CONTEXT_TOKENS:
        reader.refuse_key("vmix.context_tokens", f"{_CONTEXT_TOKENS} for {base}", f"{tokens}")
    apply_to = reader.one_of("vmix.apply_to", "cond", "both", "contrast")
    methods = ("trained", "fitted", "merged")
    expected = f"a JSON object with a `method` among {', '.join(methods)}"
    made = reader.json("vmix.made", dict, expected)
    if made.get("method") not in methods:
        reader.refuse_key("vmix.made", expected, _shown(reader.metadata["vmix.made"]))
    kind = reader.one_of("vmix.coefficients", "layernorm", "linear")
    layernorm = kind == "layernorm"
    sides = _sides(reader, labels, layernorm)
    ldm_names, widths = _layers(reader, base, len(sides))

    dim = _CONTEXT_DIMS.get(base)
    if "aes_emb" in reader.tensors or layernorm:
        dim = reader.shape("aes_emb", [len(labels), 2, dim or "d"])[2]
    if tokens * (len(sides) + (dim or 0) + sum(widths)) > _MOST_RESULTS:
        expected = f"at most {_MOST_RESULTS} numbers in the values of all layers"
        reader.refuse_key("vmix.context_tokens", expected, f"more, with {tokens} tokens")
    reader.f32("profile", [tokens, len(sides)])
    known = {"profile", "aes_emb", "attention"}
    norm_eps = 0.0
    if layernorm:
        norm_eps = _norm_eps(reader)
        varied = sum(side != "constant" for _, side in sides)
        reader.f32("gram_factor", [varied, "m"])
        reader.shape("context.rows", [len(sides), dim or "d"])
        known |= {"gram_factor", "context.rows"}
    if "attention" in reader.tensors:
        reader.f32("attention", [tokens, tokens])
    dtypes = set()
    for layer, width in zip(ldm_names, widths, strict=True):
        tensor = f"{layer}.rows"
        reader.shape(tensor, [len(sides), width])
        known.add(tensor)
        dtypes.add(reader.tensors[tensor][0])
        if len(dtypes) > 1:
            reader.refuse_tensor(tensor, "the dtype of all rows", reader.tensors[tensor][0])
    for tensor in reader.tensors:
        if tensor not in known:
            reader.refuse_tensor(tensor, "no such tensor", "one")
    return {
        "base": base,
        "labels": labels,
        "context_tokens": tokens,
        "context_dim": dim,
        "apply_to": apply_to,
        "coefficient_kind": kind,
        "norm_eps": norm_eps,
        "row_sides": sides,
        "ldm_names": ldm_names,
        "made": made,
    }


def _norm_eps(reader: _Reader) -> float:
    expected = "a number above 0"
    written = reader.key("vmix.norm_eps", expected)
    number = r"\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
    eps = float(written) if re.fullmatch(number, written) else 0.0
    if not 0 < eps < math.inf:
        reader.refuse_key("vmix.norm_eps", expected, _shown(written))
    return eps


def _layers(reader: _Reader, base: str, rows: int) -> tuple[dict[str, str], list[int]]:
    """Diffusers and LDM path of every layer, and the widths."""
    key = "vmix.ldm_names"
    if base in _UNETS:
        names, widths = {}, []
        for block, ldm_block, first, attentions, depth, width in _UNETS[base]:
            for attention in range(attentions):
                # The one middle block has its transformer as part 1.
                number = "" if block == "mid_block" else f".{first + attention}"
                for i in range(depth):
                    part = f"transformer_blocks.{i}.attn2"
                    name = f"{block}.attentions.{attention}.{part}"
                    names[name] = f"{ldm_block}{number}.1.{part}"
                    widths.append(width)
        return names, widths
    expected = "a JSON object of the LDM name of every layer, by diffusers name"
    names = reader.json(key, dict, expected)
    if not names or not all(isinstance(name, str) for name in names.values()):
        reader.refuse_key(key, expected, _shown(reader.metadata[key]))
    seen: set[str] = set()
    for layer, ldm_name in names.items():
        for name in {layer, ldm_name}:
            if not name or "\0" in name or name in seen or layer == "context":
                reader.refuse_key(key, "names of their own for all layers", _shown(name))
            seen.add(name)
    widths = [reader.shape(f"{layer}.rows", [rows, "inner_dim"])[1] for layer in names]
    return names, widths


def _sides(
    reader: _Reader, labels: Iterable[Label], layernorm: bool
) -> tuple[tuple[str | None, str], ...]:
    key, expected = "vmix.rows", "a JSON list with `side` and `label` of every row"
    known = {label.name for label in labels}
    sides = []
    for entry in reader.json(key, list, expected):
        row = entry if isinstance(entry, dict) else {}
        label, side = row.get("label"), str(row.get("side"))
        if side == "constant":
            fits = layernorm and label is None
        else:
            is_known = isinstance(label, str) and label in known
            fits = side in ("positive", "negative") and is_known
        if not fits:
            allowed = "positive, negative" + ", or constant without a label" * layernorm
            found = _shown(json.dumps(entry))
            reader.refuse_key(key, f"{expected}: {allowed}, labels of vmix.labels", found)
        sides.append((label, side))
    with_row = {name for name, _ in sides}
    for label in labels:
        if label.name not in with_row:
            reader.refuse_key(key, "a row for every label", f"none of {_shown(label.name)}")
        if not layernorm and (label.neutral is None or _f32(label.neutral) != 0):
            found = f"{label.neutral} for label {_shown(label.name)}"
            reader.refuse_key("vmix.labels", "`neutral` 0 in a linear file", found)
    return tuple(sides)


def _labels(reader: _Reader) -> tuple[Label, ...]:
    key, expected = "vmix.labels", "a JSON list of labels (docs/format.md)"
    labels: dict[str, Label] = {}
    for entry in reader.json(key, list, expected):
        try:
            label = _label(entry)
            if label.name in labels:
                raise ValueError("a name that comes twice")
        except ValueError as error:
            found = entry.get("name") if isinstance(entry, dict) else entry
            reader.refuse_key(key, expected, f"label {_shown(found)} with {error}")
        labels[label.name] = label
    if not labels:
        reader.refuse_key(key, expected, "an empty list")
    return tuple(labels.values())


def _label(entry: Any) -> Label:
    """A label; ValueError says what is wrong with it."""

    def number(value: Any, what: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(_f32(value)):
            raise ValueError(f"{what} that is no number or not finite in f32")
        return float(value)

    def text(value: Any, what: str) -> str:
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"{what} that is no text, or has a NUL character")
        return value

    def many(what: str) -> tuple[str, ...]:
        texts = entry.get(what)
        if not isinstance(texts, list) or not texts:
            raise ValueError(f"no list of {what} texts")
        return tuple(text(value, f"a {what} text") for value in texts)

    def by_name(what: str, kinds: tuple[type, ...]) -> dict[str, Any]:
        found = entry.get(what, {})
        if not isinstance(found, dict) or any(type(v) not in kinds for v in found.values()):
            raise ValueError(f"{what} of another kind")
        return found

    if not isinstance(entry, dict):
        raise ValueError("no object around it")
    name = text(entry.get("name"), "a name")
    # As Unicode has it; Python also counts the separators 1C to 1F as white.
    if all(c.isspace() and not "\x1c" <= c <= "\x1f" for c in name) or name in ("all", "none"):
        raise ValueError("a name that is blank or reserved")
    limits = entry.get("range", [0, 1])
    if not isinstance(limits, list) or len(limits) != 2:
        raise ValueError("a range that is not [low, high]")
    low, high = (number(limit, "a range") for limit in limits)
    default, step = number(entry.get("default", 1), "a default"), entry.get("step", 0.05)
    neutral = entry.get("neutral")
    if _f32(low) >= _f32(high):
        raise ValueError(f"the range {low} to {high}")
    if _f32(number(step, "a step")) <= 0:
        raise ValueError(f"the step {step}")
    if not _f32(low) <= _f32(default) <= _f32(high):
        raise ValueError(f"the default {default} outside of its range {low} to {high}")
    return Label(
        name=name,
        dimension=text(entry.get("dimension", ""), "a dimension"),
        positive=many("positive"),
        negative=many("negative"),
        default=default,
        neutral=None if neutral is None else number(neutral, "a neutral weight"),
        range=(low, high),
        step=float(step),
        effect=by_name("effect", (int, float)),
        display_names=by_name("display_names", (str,)),
    )


def _check_numbers(reader: _Reader, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not (finite := tensor.isfinite()).all():
            reader.refuse_tensor(name, "finite values", tensor[~finite][0].item())
    if (attention := tensors.get("attention")) is not None:
        if (lowest := attention.min()) < 0:
            reader.refuse_tensor("attention", "entries that are not negative", lowest.item())
        # What a mean of many f32 maps may lack.
        if abs((total := attention.double().sum().item()) - 1) > 1e-3:
            reader.refuse_tensor("attention", "entries that add up to 1", f"the sum {total}")


def _parsed(text: str) -> Any:
    """JSON as strict as serde_json's; ValueError says what is wrong with it."""
    # Counted beforehand: Python's parser overflows the stack at a depth that depends on the caller.
    brackets = re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[][{}]', text, re.DOTALL)
    steps = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket[0], 0) for bracket in brackets)
    if any(depth > _DEEPEST_JSON for depth in accumulate(steps)):
        raise ValueError("too many brackets inside of each other")

    def number(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError("a number that is not finite")
        return value

    def whole(text: str) -> int:
        number(text)
        return int(text)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"the number {name}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{_shown(key)} twice")
            found[key] = value
        return found

    value = json.loads(
        text,
        parse_float=number,
        parse_int=whole,
        parse_constant=constant,
        object_pairs_hook=unique,
    )
    # Half a surrogate pair is no text.
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _f32(value: float) -> float:
    """Rounded to f32, which may be too narrow for it."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def _printable(value: Any, longest: int = 400) -> str:
    """A file's own words in a message: short, and nothing that speaks to the terminal."""
    text = str(value)
    cut = text[:longest] + "…" * (len(text) > longest)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _shown(value: Any) -> str:
    return f"`{_printable(value)}`"
