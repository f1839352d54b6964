#!/usr/bin/env python3
"""Files that lie, one for each way to do so, and expected.tsv, which says what must be answered.

Written after docs/format.md with json and struct alone, so that they share no mistake with the
library. Run it after a change here; files and table are committed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
UP = "up_blocks.0.attentions.0.transformer_blocks.0.attn2"
LDM = {
    DOWN: "input_blocks.1.1.transformer_blocks.0.attn2",
    UP: "output_blocks.0.1.transformer_blocks.0.attn2",
}
WIDTHS = {DOWN: 4, UP: 2}
LABELS = ["vibrant color", "sharp focus"]
# N labels, C context tokens, width d.
N, C, D = len(LABELS), 2, 3

NAN, INFINITY = float("nan"), float("inf")


def numbers(count: int) -> list[float]:
    """Small numbers that all three dtypes hold exactly."""
    return [(i % 7 - 3) / 4 for i in range(count)]


@dataclass
class Tensor:
    shape: list[int]
    values: list[float]
    dtype: str = "F32"

    @property
    def data(self) -> bytes:
        if self.dtype == "BF16":
            # The upper half of an f32.
            return b"".join(struct.pack("<f", x)[2:] for x in self.values)
        return struct.pack(
            f"<{len(self.values)}{'e' if self.dtype == 'F16' else 'f'}", *self.values
        )


def tensor(*shape: int, dtype: str = "F32") -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return Tensor(list(shape), numbers(count), dtype)


def filled(value: float, *shape: int, dtype: str = "F32") -> Tensor:
    """Numbers, but for the last one."""
    made = tensor(*shape, dtype=dtype)
    made.values[-1] = value
    return made


def packed(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header; `length` is what it says of the header."""
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@dataclass
class Parts:
    """The parts of a file, to be changed before they become one."""

    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for name, made in self.tensors.items():
            start, end = end, end + len(made.data)
            entry = {"dtype": made.dtype, "shape": made.shape, "data_offsets": [start, end]}
            header[name] = entry
        return header

    def data(self) -> bytes:
        return b"".join(made.data for made in self.tensors.values())

    def file(self) -> bytes:
        return packed(json.dumps(self.header()), self.data())

    def set(self, key: str, value: Any) -> Parts:
        """Sets a metadata key, to JSON where the value is no string."""
        self.metadata[key] = value if isinstance(value, str) else json.dumps(value)
        return self

    def unset(self, key: str) -> Parts:
        del self.metadata[key]
        return self

    def put(self, name: str, made: Tensor) -> Parts:
        self.tensors[name] = made
        return self

    def remove(self, name: str) -> Parts:
        del self.tensors[name]
        return self

    def entry(self, name: str, **fields: Any) -> bytes:
        """The file with other fields in the header's entry of a tensor."""
        header = self.header()
        header[name] |= fields
        return packed(json.dumps(header), self.data())

    def text(self, old: str, new: str) -> bytes:
        """The file with a text in its header replaced once."""
        header = json.dumps(self.header())
        assert old in header, old
        return packed(header.replace(old, new, 1), self.data())


def label(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "positive": name, "negative": "sks", **more}


def shared(kind: str) -> Parts:
    parts = Parts()
    parts.set("vmix.format", "1").set("vmix.kind", kind).set("vmix.base", "other")
    every_field = {"dimension": "focus", "default": 0.5, "neutral": 0.25}
    names = {"display_names": {"de": "Schärfe"}}
    parts.set("vmix.labels", [label(LABELS[0]), label(LABELS[1], **every_field, **names)])
    parts.set("vmix.context_tokens", str(C))
    parts.set("vmix.apply_to", "both").set("vmix.ldm_names", LDM).set("modelspec.license", "MIT")
    return parts


def adapter() -> Parts:
    """A valid adapter that was trained."""
    parts = difference().remove("projection.gain")
    parts.set("vmix.projection", "learned").set("vmix.norm_eps", "1e-5")
    parts.put("projection.linear.weight", tensor(C, N))
    parts.put("projection.norm.weight", tensor(D)).put("projection.norm.bias", tensor(D))
    parts.put("projection.zero.weight", tensor(D, D)).put("projection.zero.bias", tensor(D))
    return parts


def difference() -> Parts:
    """A valid adapter that was not trained."""
    parts = shared("adapter").set("vmix.context_dim", str(D)).set("vmix.feature", "context_eot")
    parts.set("vmix.projection", "difference").set("vmix.value_weights", "own")
    parts.set("vmix.trained", "no")
    parts.put("aes_emb", tensor(N, 2, D)).put("projection.gain", tensor(N))
    for layer, width in WIDTHS.items():
        parts.put(weight(layer), tensor(width, D))
    return parts


def borrowing() -> Parts:
    """A valid adapter without value weights of its own."""
    parts = difference().set("vmix.value_weights", "base").set("vmix.inner_dims", WIDTHS)
    for layer in WIDTHS:
        parts.remove(weight(layer))
    return parts


def base() -> Parts:
    """The cross-attention values of a U-Net that `borrowing` fits."""
    parts = Parts()
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.to_v.weight", tensor(width, D))
    return parts


def sd15() -> Parts:
    """A valid adapter of a known base, without value weights of its own."""
    parts = difference().set("vmix.base", "sd15").unset("vmix.ldm_names")
    parts.set("vmix.context_tokens", "77").set("vmix.context_dim", "768")
    parts.set("vmix.value_weights", "base")
    parts.tensors = {"aes_emb": tensor(N, 2, 768, dtype="F16"), "projection.gain": tensor(N)}
    return parts


def preset(dtype: str = "F32") -> Parts:
    """A valid preset."""
    parts = shared("preset").set("vmix.origin", "0123456789abcdef" * 4)
    parts.set("vmix.selection", dict.fromkeys(LABELS, 1.0))
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.v_aes", tensor(C, width, dtype=dtype))
    return parts


def contrast() -> Parts:
    """A valid preset with values for both passes."""
    parts = preset().set("vmix.apply_to", "contrast")
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.v_aes_uncond", tensor(C, width))
    return parts


def weight(layer: str) -> str:
    return f"{layer}.to_v_aes.weight"


# What opens is written as this.
OPENS = "(opens)"

Case = tuple[str, str, bytes, str]


def headers() -> Iterator[Case]:
    """What no reader of safetensors files may believe."""
    good = adapter().file()
    size = struct.unpack("<Q", good[:8])[0]

    def bad(name: str, content: bytes, expected: str) -> Case:
        return name, "adapter", content, f"not a safetensors file: {expected}"

    yield bad("empty", b"", "header too small")
    yield bad("truncated-length", good[:7], "header too small")
    yield bad("truncated-after-length", good[:8], "invalid header length")
    yield bad("truncated-header", good[: 8 + size // 2], "invalid header length")
    yield bad("truncated-after-header", good[: 8 + size], "incomplete metadata")
    yield bad("truncated-data", good[:-1], "incomplete metadata")
    # What people mistake for the file; the first eight bytes of each are a length beyond the file.
    page = "it is a web page: the address that it came from leads to a page, not to the file"
    pointer = "it is a Git LFS pointer: `git lfs pull` fetches the file that it stands for"
    pickled = "it is a pickle, which can run programs and is never loaded"
    zipped = "it is a zip archive, as `torch.save` writes: a pickle, which is never loaded"
    mistaken = {
        "web-page": (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", page),
        "web-page-bare": (b"<HTML><body>404</body></HTML>\n", page),
        "git-lfs-pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
            pointer,
        ),
        "pickle": (b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01K\x01s.", pickled),
        "zip": (b"PK\x03\x04\x00\x00\x08\x08\x00\x00archive/data.pkl", zipped),
    }
    for name, (content, what) in mistaken.items():
        yield bad(f"is-{name}", content, f"header too large ({what})")
    # A length of 640 begins like a pickle.
    yield bad(
        "length-like-pickle", struct.pack("<Q", 640) + b"{}", "invalid header length (the first"
    )
    yield bad("followed-by-more", good + b"\0", "incomplete metadata")
    length = {
        "0": (0, "invalid JSON in header: EOF while parsing"),
        "short": (size - 1, "invalid JSON in header: EOF while parsing"),
        "long": (size + 1, "invalid JSON in header: trailing characters"),
        "beyond-file": (len(good) - 7, "invalid header length"),
        "100mb": (100_000_000, "invalid header length"),
        "above-100mb": (100_000_001, "header too large"),
        "2-63": (2**63, "header too large"),
        "max": (2**64 - 1, "header too large"),
    }
    for name, (said, expected) in length.items():
        yield bad(f"header-length-{name}", struct.pack("<Q", said) + good[8:], expected)

    for name, text, expected in [
        ("json-broken", b"{{{{", "key must be a string"),
        ("json-list", b"[]", "invalid"),
        ("json-null", b"null", "invalid type: null"),
        ("json-bom", b"\xef\xbb\xbf{}", "expected value"),
        ("json-trailing", b"{} {}", "trailing characters"),
        ("json-comment", b"{} // none", "trailing characters"),
        ("json-surrogate", b'{"\\ud800": 1}', "unexpected end of hex escape"),
        ("json-deep", b'{"a":' + b"[" * 100_000, "recursion limit exceeded"),
        ("json-deep-objects", b'{"a":' * 20_000, "recursion limit exceeded"),
        ("json-number", b'{"a": 1' + b"0" * 2000 + b"}", "number out of range"),
    ]:
        yield bad(name, packed(text), f"invalid JSON in header: {expected}")
    yield bad("json-not-utf8", packed(b"\xff" * 4), "invalid UTF-8 in header")
    yield bad("json-utf16", packed("{}".encode("utf-16")), "invalid UTF-8 in header")
    # Nothing but what is not VMix: valid safetensors files.
    no_key = "metadata `vmix.format`: expected `1`, as in every VMix file, found no such key"
    yield "json-empty-object", "adapter", packed("{}"), no_key
    yield (
        "metadata-missing",
        "adapter",
        adapter().text('"__metadata__"', '"m"'),
        ("not a safetensors file: invalid JSON in header: missing field `dtype`"),
    )
    header = adapter().header()
    del header["__metadata__"]
    yield "metadata-absent", "adapter", packed(json.dumps(header), adapter().data()), no_key
    wrong = "not a safetensors file: invalid JSON in header: invalid type"
    for name, value, expected in [
        ("null", None, no_key),
        ("empty", {}, no_key),
        ("string", "vmix", wrong),
        ("list", ["vmix.format", "1"], wrong),
        ("number-value", {"vmix.format": 1}, wrong),
        ("null-value", {"vmix.format": None}, wrong),
        ("object-value", {"vmix.format": {"vmix.format": "1"}}, wrong),
    ]:
        header = adapter().header() | {"__metadata__": value}
        content = packed(json.dumps(header), adapter().data())
        yield f"metadata-{name}", "adapter", content, expected

    metadata = json.dumps(adapter().metadata)
    twice = adapter().text('"aes_emb"', f'"__metadata__": {metadata}, "aes_emb"')
    yield bad("metadata-twice", twice, "invalid JSON in header: duplicate field `__metadata__`")
    twice = adapter().text('"vmix.kind"', '"vmix.kind": "preset", "vmix.kind"')
    yield bad("metadata-key-twice", twice, "invalid JSON in header: `vmix.kind` comes twice")
    many = adapter()
    for i in range(10_000):
        many.metadata[f"{i:x}"] = ""
    yield "metadata-many-keys", "adapter", many.file(), OPENS
    long = adapter().set("vmix.base", "x" * 100_000)
    expected = "metadata `vmix.base`: expected one of sd15, sdxl, other, found `xxx"
    yield "metadata-long-value", "adapter", long.file(), expected


def entries() -> Iterator[Case]:
    """Entries of tensors that contradict each other, the file or themselves."""

    def bad(name: str, content: bytes, expected: str) -> Case:
        return name, "adapter", content, f"not a safetensors file: {expected}"

    size = len(adapter().data())
    end = N * 2 * D * 4
    # aes_emb is the first tensor, projection.zero.bias the last.
    first, last = "aes_emb", "projection.zero.bias"
    for name, tensor_name, offsets, expected in [
        ("overlap", first, [0, end + 4], "invalid shape, data type, or offset"),
        ("shared", "projection.norm.bias", [size - 12, size], "invalid offset for tensor"),
        ("gap", first, [4, end + 4], "invalid offset for tensor `aes_emb`"),
        ("beyond-file", last, [size - 12, size + 12], "invalid shape, data type, or offset"),
        ("reversed", first, [end, 0], "invalid offset for tensor"),
        ("reversed-last", last, [size - 12, size - 24], "invalid offset for tensor"),
        ("empty", first, [0, 0], "invalid shape, data type, or offset"),
        ("2-64", first, [0, 2**64], "invalid JSON in header: invalid type: floating point"),
        ("2-64-minus-1", first, [0, 2**64 - 1], "invalid shape, data type, or offset"),
        ("negative", first, [-4, end - 4], "invalid JSON in header: invalid value: integer `-4`"),
        ("float", first, [0.0, float(end)], "invalid JSON in header: invalid type: floating"),
        ("one", first, [0], "invalid JSON in header: invalid length 1"),
        ("three", first, [0, end, end], "invalid JSON in header: "),
        ("string", first, "0", "invalid JSON in header: invalid type: string"),
    ]:
        yield bad(f"offsets-{name}", adapter().entry(tensor_name, data_offsets=offsets), expected)
    for name, shape, expected in [
        ("2-63", [2**63], "overflow computing buffer size"),
        ("2-64", [2**64], "invalid JSON in header: invalid type: floating point"),
        ("overflow", [2**32, 2**32, 4], "overflow computing buffer size"),
        ("overflow-bits", [2**60, 1, 1], "overflow computing buffer size"),
        ("overflow-then-0", [2**63, 4, 0], "overflow computing buffer size"),
        ("overflow-to-size", [2**62 + 1, 4, 3], "overflow computing buffer size"),
        ("too-large", [N, 2, D + 1], "invalid shape, data type, or offset"),
        ("negative", [N, 2, -D], "invalid JSON in header: invalid value: integer `-3`"),
        ("float", [N, 2, D + 0.5], "invalid JSON in header: invalid type: floating point"),
        ("string", [N, 2, "3"], "invalid JSON in header: invalid type: string"),
        ("null", None, "invalid JSON in header: invalid type: null"),
        ("object", {"0": N}, "invalid JSON in header: invalid type: map"),
    ]:
        yield bad(f"shape-{name}", adapter().entry(first, shape=shape), expected)
    for name, value, expected in [
        ("unknown", "F33", "invalid JSON in header: unknown variant `F33`"),
        ("lower-case", "f32", "invalid JSON in header: unknown variant `f32`"),
        ("number", 32, "invalid JSON in header: invalid type: integer"),
        ("f16-of-f32-size", "F16", "invalid shape, data type, or offset"),
        ("f64-of-f32-size", "F64", "invalid shape, data type, or offset"),
    ]:
        yield bad(f"dtype-{name}", adapter().entry(first, dtype=value), expected)
    # As large as F32, F16 or 24 bits.
    for dtype, shape in [
        ("I32", [N, 2, D]),
        ("I64", [N, 1, D]),
        ("F64", [N, 1, D]),
        ("F8_E4M3", [N, 2, D * 4]),
        ("BOOL", [N, 2, D * 4]),
        ("F4", [N, 2, D * 8]),
    ]:
        content = adapter().entry(first, dtype=dtype, shape=shape)
        expected = f"tensor `aes_emb`: expected F32, F16 or BF16, found {dtype}"
        yield f"dtype-{dtype.lower().replace('_', '-')}", "adapter", content, expected
    i16 = adapter().entry(weight(UP), dtype="I16", shape=[2, 2 * D])
    expected = f"tensor `{weight(UP)}`: expected F32, F16 or BF16, found I16"
    yield "dtype-i16-value-weight", "adapter", i16, expected
    entry = '"aes_emb": {"dtype": "F32", "shape": [2, 2, 3], "data_offsets": [0, 48]}'
    twice = adapter().text(entry, f"{entry}, {entry}")
    yield bad("tensor-twice", twice, "invalid JSON in header: `aes_emb` comes twice")
    other = entry.replace("48", "44")
    twice = adapter().text(entry, f"{entry}, {other}")
    yield bad("tensor-twice-otherwise", twice, "invalid shape, data type, or offset")
    twice = adapter().text('"shape": [2, 2, 3]', '"shape": [2, 2, 3], "shape": [1]')
    yield bad("tensor-field-twice", twice, "invalid JSON in header: duplicate field `shape`")
    missing = adapter().text('"dtype": "F32", ', "")
    yield bad("tensor-without-dtype", missing, "invalid JSON in header: missing field `dtype`")
    more = adapter().entry(first, quantization="none")
    yield "tensor-field-unknown", "adapter", more, OPENS


def tensors() -> Iterator[Case]:
    """Tensors that are not those of an adapter."""
    shape = "tensor `aes_emb`: expected shape"
    for name, made, expected in [
        ("rank", tensor(N * 2 * D), f"{shape} [2, 2, d], found shape [12]"),
        ("labels", tensor(N + 1, 2, D), f"{shape} [2, 2, 3], found shape [3, 2, 3]"),
        ("one", tensor(N, 1, D), f"{shape} [2, 2, 3], found shape [2, 1, 3]"),
        ("width-0", tensor(N, 2, 0), "tensor `aes_emb`: expected a width above 0, found 0"),
        ("nan", filled(NAN, N, 2, D), "tensor `aes_emb`: expected finite values, found NaN"),
        (
            "infinite-f16",
            filled(-INFINITY, N, 2, D, dtype="F16"),
            "tensor `aes_emb`: expected finite values, found -inf",
        ),
        (
            "nan-bf16",
            filled(NAN, N, 2, D, dtype="BF16"),
            "tensor `aes_emb`: expected finite values, found NaN",
        ),
    ]:
        yield f"aes-emb-{name}", "adapter", adapter().put("aes_emb", made).file(), expected
    # A product of 0 elements, whatever the other sizes are.
    no_labels = adapter().put("aes_emb", Tensor([0, 2**63, 2**63], [])).file()
    expected = f"{shape} [2, 2, {2**63}], found shape [0, {2**63}, {2**63}]"
    yield "aes-emb-0-labels-of-2-63", "adapter", no_labels, expected
    for name in adapter().tensors:
        found = "found no such tensor"
        if name == weight(UP) or name == weight(DOWN):
            layer = name.removesuffix(".to_v_aes.weight")
            expected = (
                f"metadata `vmix.ldm_names`: expected the layers of this file, found `{layer}"
            )
        elif name == "aes_emb":
            expected = "tensor `aes_emb`: expected a tensor of that name, found none"
        else:
            shape = str(adapter().tensors[name].shape)
            expected = f"tensor `{name}`: expected shape {shape}, {found}"
        short = name.split(".attentions")[0].replace(".", "-").replace("_", "-")
        yield f"missing-{short}", "adapter", adapter().remove(name).file(), expected
    for name in adapter().tensors:
        if not name.startswith("projection"):
            continue
        wrong = adapter().put(name, filled(INFINITY, *adapter().tensors[name].shape))
        expected = f"tensor `{name}`: expected finite values, found inf"
        yield f"infinite-{name.replace('.', '-')}", "adapter", wrong.file(), expected
    gain = difference().put("projection.gain", filled(NAN, N)).file()
    expected = "tensor `projection.gain`: expected finite values, found NaN"
    yield "nan-projection-gain", "adapter", gain, expected
    turned = adapter().put("projection.linear.weight", tensor(1, 4)).file()
    expected = "tensor `projection.linear.weight`: expected shape [2, 2], found shape [1, 4]"
    yield "shape-projection-linear", "adapter", turned, expected
    bias = adapter().put("projection.linear.bias", tensor(C + 1)).file()
    expected = "tensor `projection.linear.bias`: expected shape [2], found shape [3]"
    yield "shape-projection-linear-bias", "adapter", bias, expected
    for name, parts, extra in [
        ("gain", adapter(), "projection.gain"),
        ("linear", difference(), "projection.linear.weight"),
        ("values", adapter(), f"{DOWN}.v_aes"),
        ("weight", borrowing(), weight(DOWN)),
        ("layer", sd15(), weight("down_blocks.9.attentions.0.transformer_blocks.0.attn2")),
        ("empty-name", adapter(), ""),
        ("nul-name", adapter(), "aes_emb\0"),
    ]:
        expected = f"tensor `{extra}`: expected no such tensor, found one"
        content = parts.put(extra, tensor(2)).file()
        yield f"extra-{name}", "adapter", content, expected.split("\0")[0]
    none = adapter()
    none.tensors = {}
    expected = "tensor `aes_emb`: expected a tensor of that name, found none"
    yield "zero-tensors", "adapter", none.file(), expected
    # Not read before they are used.
    for name, made in [
        ("nan", filled(NAN, 2, D)),
        ("infinite", filled(INFINITY, 2, D)),
        ("nan-f16", filled(NAN, 2, D, dtype="F16")),
        ("infinite-bf16", filled(-INFINITY, 2, D, dtype="BF16")),
    ]:
        content = adapter().put(weight(UP), made).file()
        expected = f"tensor `{weight(UP)}`: expected finite values, found NaN or infinity"
        yield f"value-weight-{name}", "values", content, expected
    # Every product overflows, so that the order in which they are added does not matter.
    huge = adapter().put(weight(UP), Tensor([2, D], [3e38] * 2 * D))
    huge.put("projection.zero.bias", Tensor([D], [9.0] * D))
    expected = f"tensor `{weight(UP)}`: expected finite values, found values that overflow float32"
    yield "value-weight-overflows", "values", huge.file(), expected


def layers() -> Iterator[Case]:
    """Layers that are missing, superfluous or the same."""
    key = "metadata `vmix.ldm_names`: expected"
    own = f"{key} a name of its own per layer, found"
    for name, ldm_names, expected in [
        ("empty", {}, f"{key} the LDM name of `{DOWN}`, found none"),
        ("missing", {DOWN: "a"}, f"{key} the LDM name of `{UP}`, found none"),
        ("extra", LDM | {"mid": "b"}, f"{key} the layers of this file, found `mid`"),
        ("same", {DOWN: "a", UP: "a"}, f"{own} `a` for two layers"),
        ("crossed", {DOWN: UP, UP: DOWN}, f"{own} `"),
        ("nul", LDM | {UP: "a\0b"}, f'{own} "a\\0b", with a NUL character'),
        ("number", LDM | {UP: 1}, f"{key} a JSON object of the LDM name of every layer"),
        ("null", LDM | {UP: None}, f"{key} a JSON object of the LDM name of every layer"),
        ("list", [DOWN, UP], f"{key} a JSON object of the LDM name of every layer"),
        ("string", "input_blocks", f"{key} a JSON object of the LDM name of every layer"),
        ("deep", '{"a":' * 500, f"{key} a JSON object of the LDM name of every layer"),
    ]:
        parts = adapter().set("vmix.ldm_names", ldm_names)
        yield f"ldm-names-{name}", "adapter", parts.file(), expected
    twice = f'{{"{DOWN}": "a", "{DOWN}": "b", "{UP}": "c"}}'
    expected = (
        f"{key} a JSON object of the LDM name of every layer, by diffusers name, found `{DOWN}`"
    )
    parts = adapter().set("vmix.ldm_names", twice)
    yield "ldm-names-key-twice", "adapter", parts.file(), f"{expected} comes twice"
    by_ldm_name = adapter().put(weight(LDM[UP]), tensor(2, D)).file()
    expected = f"{key} the LDM name of `{LDM[UP]}`, found none"
    yield "layer-twice-by-ldm-name", "adapter", by_ldm_name, expected
    names = LDM | {LDM[UP]: "c"}
    by_ldm_name = adapter().put(weight(LDM[UP]), tensor(2, D)).set("vmix.ldm_names", names).file()
    expected = f"{own} `{LDM[UP]}` for two layers"
    yield "layer-twice-with-ldm-name", "adapter", by_ldm_name, expected
    for name, made, expected in [
        ("rank", tensor(2 * D), "found shape [6]"),
        ("width", tensor(2, D + 1), "found shape [2, 4]"),
    ]:
        content = adapter().put(weight(UP), made).file()
        size = made.shape[0]
        expected = f"tensor `{weight(UP)}`: expected shape [{size}, 3], {expected}"
        yield f"value-weight-{name}", "adapter", content, expected
    empty = adapter().put(weight(UP), tensor(0, D)).file()
    expected = f"tensor `{UP}`: expected values of a width above 0, found 0"
    yield "value-weight-width-0", "adapter", empty, expected
    none = adapter().remove(weight(UP)).remove(weight(DOWN)).set("vmix.ldm_names", {}).file()
    yield "layers-none", "adapter", none, f"{key} at least one layer, found none"
    nameless = adapter().remove(weight(UP)).put(weight(""), tensor(2, D))
    nameless.set("vmix.ldm_names", {DOWN: "a", "": ""})
    expected = f"{key} a name of its own per layer, found a layer without a name"
    yield "layer-without-name", "adapter", nameless.file(), expected
    key = "metadata `vmix.inner_dims`: expected a JSON object of the value width of every layer"
    large = "metadata `vmix.context_tokens`: expected at most 268435456 numbers in the values"
    for name, dims, expected in [
        (
            "missing",
            {DOWN: 4},
            f"metadata `vmix.ldm_names`: expected the layers of this file, found `{UP}`",
        ),
        ("extra", WIDTHS | {"mid": 4}, "metadata `vmix.ldm_names`: expected the LDM name of `mid`"),
        ("0", WIDTHS | {UP: 0}, f"tensor `{UP}`: expected values of a width above 0, found 0"),
        ("negative", WIDTHS | {UP: -1}, key),
        ("float", WIDTHS | {UP: 2.5}, key),
        ("string", WIDTHS | {UP: "2"}, key),
        ("2-64", WIDTHS | {UP: 2**64}, key),
        ("list", [4, 2], key),
        ("2-63", dict.fromkeys(WIDTHS, 2**63), large),
        ("2-64-minus-1", dict.fromkeys(WIDTHS, 2**64 - 1), large),
        ("huge", WIDTHS | {UP: 2**27}, large),
    ]:
        parts = borrowing().set("vmix.inner_dims", dims)
        yield f"inner-dims-{name}", "adapter", parts.file(), expected
    # 4096 tokens of 2^16 numbers are the most: 3 of them are f_a.
    for name, width, expected in [("most", 2**16 - 3 - 4, OPENS), ("too-many", 2**16 - 6, large)]:
        parts = borrowing().set("vmix.inner_dims", WIDTHS | {UP: width})
        yield (
            f"results-{name}",
            "adapter",
            parts.set("vmix.context_tokens", "4096").file(),
            expected,
        )
    known = sd15().set("vmix.value_weights", "own").file()
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v_aes.weight"
    expected = f"tensor `{first}`: expected shape [320, 768], found no such tensor"
    yield "sd15-without-layers", "adapter", known, expected
    known = sd15().set("vmix.context_tokens", "76").file()
    expected = "metadata `vmix.context_tokens`: expected `77`, as in every sd15 U-Net, found `76`"
    yield "sd15-context-tokens", "adapter", known, expected
    known = sd15().set("vmix.base", "sdxl").file()
    expected = "metadata `vmix.context_dim`: expected `2048`, as in every sdxl U-Net, found `768`"
    yield "sdxl-context-dim", "adapter", known, expected


def metadata() -> Iterator[Case]:
    """Keys of wrong values."""
    names = {
        "format": "`1`, as in every VMix file",
        "kind": "one of adapter, preset",
        "base": "one of sd15, sdxl, other",
        "apply_to": "one of cond, both, contrast",
        "feature": "`context_eot`",
        "projection": "one of learned, difference",
        "value_weights": "one of own, base",
        "context_tokens": "a whole number from 1 to 4096",
        "context_dim": "`3`, as in aes_emb",
        "norm_eps": "a number above 0",
    }
    values = {
        "format": ["0", "2", "1.0", "01", " 1", ""],
        "kind": ["Adapter", "lora", ""],
        "base": ["SD15", "sd3", ""],
        "apply_to": ["uncond", ""],
        "feature": ["pooled", ""],
        "projection": ["mlp", ""],
        "value_weights": ["none", ""],
        "context_tokens": ["0", "4097", "1e99", "-1", "2.0", " 2", "2\0", "99999999999999999999"],
        "context_dim": ["4", "0", "-3", "3.0", "99999999999999999999"],
        "norm_eps": ["0", "-1e-5", "NaN", "inf", "1e-400", "1e400", "small"],
    }
    for key, expected in names.items():
        without = adapter().unset(f"vmix.{key}").file()
        missing = f"metadata `vmix.{key}`: expected {expected}, found no such key"
        yield f"missing-{key.replace('_', '-')}", "adapter", without, missing
        for i, value in enumerate(values[key]):
            parts = adapter().set(f"vmix.{key}", value).file()
            said = f"metadata `vmix.{key}`: expected {expected}, found `{value}`".split("\0")[0]
            yield f"{key.replace('_', '-')}-{i}", "adapter", parts, said
    for key, expected in [
        ("labels", "a JSON list of labels"),
        ("trained", "how it was trained, or `no`"),
        ("ldm_names", "a JSON object of the LDM name of every layer, by diffusers name"),
    ]:
        without = adapter().unset(f"vmix.{key}").file()
        missing = f"metadata `vmix.{key}`: expected {expected}, found no such key"
        yield f"missing-{key.replace('_', '-')}", "adapter", without, missing
    # As Rust reads numbers.
    for name, key, value in [
        ("context-tokens-plus", "vmix.context_tokens", "+2"),
        ("context-tokens-zeros", "vmix.context_tokens", "002"),
        ("norm-eps-plus", "vmix.norm_eps", "+1.E-5"),
    ]:
        yield name, "adapter", adapter().set(key, value).file(), OPENS
    swapped = adapter().set("vmix.kind", "preset").file()
    expected = "metadata `vmix.kind`: expected `adapter`, found `preset`"
    yield "adapter-as-preset", "adapter", swapped, expected
    later = adapter().set("vmix.later", "1").set("vm\0ix", "1").set("", "").file()
    yield "metadata-unknown-keys", "adapter", later, OPENS


def labels() -> Iterator[Case]:
    """Lists of labels that are none."""
    expected = "metadata `vmix.labels`: expected a JSON list of labels (docs/format.md), found "
    a = label("a")
    for name, value, found in [
        ("not-json", "a, b", "expected value"),
        ("empty-text", "", "EOF while parsing a value"),
        ("object", {"name": "a"}, "invalid type: map"),
        ("of-strings", ["a", "b"], "invalid type: string"),
        ("null", "null", "invalid type: null"),
        ("empty", [], "an empty list"),
        ("deep", "[" * 10_000, "invalid type: sequence"),
        ("deep-unknown", '[{"x":' + "[" * 10_000, "EOF while parsing a list"),
        ("trailing", json.dumps([a, label("b")]) + "]", "trailing characters"),
        ("all", [a, label("all")], "a label named `all`, which is reserved"),
        ("none", [a, label("none")], "a label named `none`, which is reserved"),
        ("twice", [a, a], "two labels named `a`"),
        ("nameless", [a, label("")], "a label without a name"),
        ("blank", [a, label(" \t")], "a label without a name"),
        ("nul", [a, label("b\0c")], 'label "b\\0c" with a NUL character'),
        ("nul-negative", [a, label("b") | {"negative": "\0"}], 'label "b" with a NUL character'),
        ("surrogate", '[{"name": "\\ud800"}]', "unexpected end of hex escape"),
        (
            "name-number",
            [a, label("b") | {"name": 1}],
            "invalid type: integer `1`, expected a string",
        ),
        ("name-null", [a, label("b") | {"name": None}], "invalid type: null, expected a string"),
        ("no-positive", [a, {"name": "b", "negative": "c"}], "missing field `positive`"),
        ("default-string", [a, label("b", default="1")], "invalid type: string"),
        ("default-null", [a, label("b", default=None)], "invalid type: null"),
        ("default-nan", [a, label("b", default=NAN)], "expected value"),
        ("default-1e39", [a, label("b", default=1e39)], "label `b` with an infinite weight"),
        ("default-1e400", '[{"default": 1e400}]', "number out of range"),
        ("neutral-1e39", [a, label("b", neutral=-1e39)], "label `b` with an infinite weight"),
        ("display-names-list", [a, label("b", display_names=["b"])], "invalid type: sequence"),
        ("display-names-null", [a, label("b", display_names={"de": None})], "invalid type: null"),
        ("field-twice", '[{"name": "a", "name": "b"}]', "duplicate field `name`"),
    ]:
        parts = adapter().set("vmix.labels", value)
        yield f"labels-{name}", "adapter", parts.file(), expected + found
    wrong = "tensor `aes_emb`: expected shape"
    one = adapter().set("vmix.labels", [a]).file()
    yield "labels-one-too-few", "adapter", one, f"{wrong} [1, 2, 3], found shape [2, 2, 3]"
    many = adapter().set("vmix.labels", [label(f"{i:x}") for i in range(1000)]).file()
    yield "labels-many", "adapter", many, f"{wrong} [1000, 2, 3], found shape [2, 2, 3]"
    display_names_twice = json.dumps([a, label("b", display_names={"de": "c"})])
    display_names_twice = display_names_twice.replace('"de": "c"', '"de": "c", "de": "d"')
    for name, value in [
        ("field-unknown", [a, label("b", later=[1, {"a": None}])]),
        ("name-long", [a, label("b" * 20_000)]),
        ("name-control", [a, label("\x1b[31mb\n\u202e")]),
        ("name-all-capital", [a, label("ALL")]),
        ("name-padded", [a, label(" a ")]),
        ("display-names-nul", [a, label("b", display_names={"de\0x": "c", "de": "d\0e"})]),
    ]:
        parts = adapter().set("vmix.labels", value)
        yield f"labels-{name}", "adapter", parts.file(), OPENS
    parts = adapter().set("vmix.labels", display_names_twice)
    expected = "metadata `vmix.labels`: expected a JSON list of labels (docs/format.md), found `de`"
    yield "labels-display-names-twice", "adapter", parts.file(), f"{expected} comes twice"


def presets() -> Iterator[Case]:
    """Presets that do not hold what they say."""

    def bad(name: str, parts: Parts, expected: str) -> Case:
        return f"preset-{name}", "preset", parts.file(), expected

    key = "metadata `vmix.selection`: expected a JSON object of the finite weight of every label"
    both = dict.fromkeys(LABELS, 1.0)
    first, second = LABELS
    for name, value, found in [
        ("missing", {first: 1.0}, "1 of 2 labels"),
        ("extra", both | {"c": 1.0}, "3 of 2 labels"),
        ("unknown", {first: 1.0, "c": 1.0}, "unknown label `c`"),
        ("empty", {}, "0 of 2 labels"),
        ("list", [1.0, 1.0], "invalid type: sequence"),
        ("string", both | {second: "1"}, "invalid type: string"),
        ("null", both | {second: None}, "invalid type: null"),
        ("nan", both | {second: NAN}, "expected value"),
        ("1e39", both | {second: 1e39}, f"weight of label `{second}`: expected a finite number"),
        ("1e400", f'{{"{first}": 1e400}}', "number out of range"),
        ("deep", '{"a":' * 500, "invalid type: map"),
    ]:
        parts = preset().set("vmix.selection", value)
        yield bad(f"selection-{name}", parts, f"{key}, found {found}")
    twice = f'{{"{first}": 1, "{first}": 2, "{second}": 0}}'
    parts = preset().set("vmix.selection", twice)
    yield bad("selection-key-twice", parts, f"{key}, found `{first}` comes twice")
    # What is spelt like a name must not be searched for among names of any length.
    long = preset().set("vmix.labels", [label("a" * 20_000), label("b" * 20_000)])
    long.set("vmix.selection", {"a" * 20_000: 1.0, "c" * 20_000: 1.0})
    yield bad("selection-long-names", long, f"{key}, found unknown label `ccc")
    origin = "metadata `vmix.origin`: expected a SHA-256 in hexadecimal, found"
    for name, value in [
        ("empty", ""),
        ("short", "0" * 63),
        ("long", "0" * 65),
        ("capital", "A" * 64),
        ("letters", "g" * 64),
        ("wide", "é" * 32),
    ]:
        parts = preset().set("vmix.origin", value)
        yield bad(f"origin-{name}", parts, f"{origin} `{value}`")
    for missing, expected in [
        ("vmix.selection", key),
        ("vmix.origin", "metadata `vmix.origin`: expected a SHA-256 in hexadecimal"),
        ("vmix.ldm_names", "metadata `vmix.ldm_names`: expected a JSON object"),
        ("vmix.labels", "metadata `vmix.labels`: expected a JSON list of labels"),
    ]:
        name = missing.removeprefix("vmix.").replace("_", "-")
        yield bad(f"missing-{name}", preset().unset(missing), expected)
    up = f"tensor `{UP}.v_aes`: expected"
    for name, made, expected in [
        ("nan", filled(NAN, C, 2), f"{up} finite values, found NaN or infinity"),
        ("infinite", filled(INFINITY, C, 2), f"{up} finite values, found NaN or infinity"),
        ("rank", tensor(C, 1, 2), f"{up} shape [context tokens, width], found shape [2, 1, 2]"),
        ("width-0", tensor(C, 0), f"{up} shape [context tokens, width], found shape [2, 0]"),
        ("tokens", tensor(C + 1, 2), f"{up} shape [2, 2], found shape [3, 2]"),
        ("dtypes", tensor(C, 2, dtype="F16"), f"{up} float32, as the other tensors"),
    ]:
        yield bad(name, preset().put(f"{UP}.v_aes", made), expected)
    integers = preset().entry(f"{UP}.v_aes", dtype="I32")
    yield "preset-integers", "preset", integers, f"{up} F32, F16 or BF16, found I32"
    without = preset().remove(f"{UP}.v_aes")
    yield bad("missing-layer", without, f"{up} a tensor of that name, found none")
    extra = preset().put("mid.v_aes", tensor(C, 2))
    yield bad("extra-layer", extra, "tensor `mid.v_aes`: expected no such tensor, found one")
    extra = preset().put("aes_emb", tensor(N, 2, D))
    yield bad("extra-tensor", extra, "tensor `aes_emb`: expected no such tensor, found one")
    extra = preset().put(f"{LDM[UP]}.v_aes", tensor(C, 2))
    expected = f"tensor `{LDM[UP]}.v_aes`: expected no such tensor, found one"
    yield bad("layer-twice-by-ldm-name", extra, expected)
    same = preset().set("vmix.ldm_names", {DOWN: "a", UP: "a"})
    expected = "metadata `vmix.ldm_names`: expected a name of its own per layer, found `a` for two"
    yield bad("ldm-names-same", same, expected)
    nothing = preset().set("vmix.ldm_names", {}).remove(f"{UP}.v_aes").remove(f"{DOWN}.v_aes")
    expected = "metadata `vmix.ldm_names`: expected at least one layer, found none"
    yield bad("layers-none", nothing, expected)
    none = preset()
    none.tensors = {}
    expected = f"tensor `{DOWN}.v_aes`: expected a tensor of that name, found none"
    yield bad("zero-tensors", none, expected)
    expected = f"tensor `{DOWN}.v_aes_uncond`: expected shape [2, 4], found no such tensor"
    yield bad("contrast-without-uncond", preset().set("vmix.apply_to", "contrast"), expected)
    half = contrast().remove(f"{UP}.v_aes_uncond")
    expected = f"tensor `{UP}.v_aes_uncond`: expected shape [2, 2], found no such tensor"
    yield bad("contrast-half", half, expected)
    nan = contrast().put(f"{UP}.v_aes_uncond", filled(NAN, C, 2))
    expected = f"tensor `{UP}.v_aes_uncond`: expected finite values, found NaN or infinity"
    yield bad("contrast-nan", nan, expected)
    mixed = contrast().put(f"{UP}.v_aes_uncond", tensor(C, 2, dtype="BF16"))
    expected = f"tensor `{UP}.v_aes_uncond`: expected float32, as the other tensors"
    yield bad("contrast-dtypes", mixed, expected)
    both_passes = contrast().set("vmix.apply_to", "both")
    expected = f"tensor `{DOWN}.v_aes_uncond`: expected no such tensor, found one"
    yield bad("both-with-uncond", both_passes, expected)
    nameless = preset().remove(f"{UP}.v_aes").put(".v_aes", tensor(C, 2)).put("x", tensor(1))
    nameless.set("vmix.ldm_names", {DOWN: "a", "": "b"})
    expected = (
        "metadata `vmix.ldm_names`: expected a name of its own per layer, found a layer without"
    )
    yield bad("layer-without-name", nameless, expected)
    stray = preset().put("x", tensor(1))
    yield bad("stray-tensor", stray, "tensor `x`: expected no such tensor, found one")
    expected = "metadata `vmix.kind`: expected `preset`, found `adapter`"
    yield bad("as-adapter", preset().set("vmix.kind", "adapter"), expected)
    large = preset().set("vmix.context_tokens", "4096")
    expected = f"tensor `{DOWN}.v_aes`: expected shape [4096, 4], found shape [2, 4]"
    yield bad("context-tokens", large, expected)


MAKERS: list[Callable[[], Iterator[Case]]] = [
    headers,
    entries,
    tensors,
    layers,
    metadata,
    labels,
    presets,
]


def main() -> None:
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    # A folder is no file.
    rows = [(".", "adapter", "is a directory"), (".", "preset", "is a directory")]
    for maker in MAKERS:
        for name, opened, content, expected in maker():
            path = FOLDER / f"{name}.safetensors"
            assert not path.exists(), name
            path.write_bytes(content)
            rows.append((path.name, opened, expected))
    table = "".join("\t".join(row) + "\n" for row in rows)
    (FOLDER / "expected.tsv").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
