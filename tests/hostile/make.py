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

# The layers of SD1.5, with their widths.
SD15 = {
    f"{block}.attentions.{attention}.transformer_blocks.0.attn2": width
    for block, attentions, width in [
        ("down_blocks.0", 2, 320),
        ("down_blocks.1", 2, 640),
        ("down_blocks.2", 2, 1280),
        ("mid_block", 1, 1280),
        ("up_blocks.1", 3, 1280),
        ("up_blocks.2", 3, 640),
        ("up_blocks.3", 3, 320),
    ]
    for attention in range(attentions)
}

NAN, INFINITY = float("nan"), float("inf")

Row = dict[str, Any]


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


def zeros(*shape: int, dtype: str = "F16") -> Tensor:
    made = tensor(*shape, dtype=dtype)
    made.values = [0.0] * len(made.values)
    return made


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


def label(name: str, /, **more: Any) -> dict[str, Any]:
    return {"name": name, "positive": [name], "negative": ["sks"], **more}


def row(side: str, name: str | None = None) -> Row:
    return {"side": side} if name is None else {"side": side, "label": name}


def shared(kind: str) -> Parts:
    """The metadata that every file has, with every key of a label."""
    parts = Parts()
    parts.set("vmix.format", "2").set("vmix.kind", kind).set("vmix.base", "other")
    second = label(LABELS[1], dimension="focus", default=0.5, neutral=0.25)
    second |= {"range": [-1, 2], "step": 0.1, "effect": {"sharpness": 0.25}}
    second |= {"negative": ["blurry", ""], "display_names": {"de": "Schärfe"}}
    parts.set("vmix.labels", [label(LABELS[0]), second])
    parts.set("vmix.context_tokens", str(C)).set("vmix.ldm_names", LDM)
    return parts.set("modelspec.license", "MIT")


def trained_rows(names: list[str]) -> list[Row]:
    rows = [row(side, name) for name in names for side in ("positive", "negative")]
    return [*rows, row("constant")]


ROWS = trained_rows(LABELS)
# How many there are, and how many of them are not constant.
R, K = len(ROWS), len(ROWS) - 1


def rows_of(layer: str) -> str:
    return f"{layer}.rows"


def adapter(names: list[str] = LABELS) -> Parts:
    """A valid adapter with the coefficients of one that was trained."""
    return layernorm(trained_rows(names))


def layernorm(rows: list[Row]) -> Parts:
    parts = shared("adapter").set("vmix.apply_to", "both").set("vmix.coefficients", "layernorm")
    parts.set("vmix.norm_eps", "1e-5").set("vmix.rows", rows)
    parts.set("vmix.made", {"method": "trained", "steps": 500})
    size, scaled = len(rows), sum(row["side"] != "constant" for row in rows)
    parts.put("aes_emb", tensor(N, 2, D)).put("profile", tensor(C, size))
    parts.put("gram_factor", factor(scaled)).put("context.rows", tensor(size, D))
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.rows", tensor(size, width))
    return parts


def factor(size: int, dtype: str = "F32") -> Tensor:
    values = [0.25 * (j >= k) for j in range(size) for k in range(D)]
    return Tensor([size, D], values, dtype)


def linear(dtype: str = "F32") -> Parts:
    """A valid adapter whose values are in proportion to the weights."""
    parts = bare(dtype).put("aes_emb", tensor(N, 2, D))
    return parts.put("attention", Tensor([C, C], [0.5, 0.25, 0.125, 0.125]))


# Two rows for one side of a label, and none for one side of the other.
LINEAR_ROWS = [row(side, LABELS[0]) for side in ("positive", "positive", "negative")]
LINEAR_ROWS += [row("positive", LABELS[1])]


def bare(dtype: str = "F32") -> Parts:
    """The same with what it must have alone."""
    parts = shared("adapter").set("vmix.apply_to", "cond").set("vmix.coefficients", "linear")
    parts.set("vmix.labels", [label(name, neutral=0, default=0) for name in LABELS])
    parts.set("vmix.rows", LINEAR_ROWS).set("vmix.made", {"method": "fitted"})
    parts.put("profile", tensor(C, len(LINEAR_ROWS)))
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.rows", tensor(len(LINEAR_ROWS), width, dtype=dtype))
    return parts


def sd15() -> Parts:
    """A valid adapter of a known base: one row of zeros."""
    parts = bare().set("vmix.base", "sd15").unset("vmix.ldm_names")
    parts.set("vmix.context_tokens", "77").set("vmix.rows", [row("positive", "a")])
    parts.set("vmix.labels", [label("a", neutral=0)])
    parts.tensors = {"profile": zeros(77, 1, dtype="F32")}
    for layer, width in SD15.items():
        parts.put(f"{layer}.rows", zeros(1, width))
    return parts


def preset(dtype: str = "F32") -> Parts:
    """A valid preset."""
    parts = shared("preset").set("vmix.apply_to", "both")
    parts.set("vmix.origin", "0123456789abcdef" * 4).set("vmix.made", {"method": "trained"})
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


def init() -> Parts:
    """A valid init file."""
    return shared("init").put("aes_emb", tensor(N, 2, D))


def sd15_init() -> Parts:
    """A valid init file of a known base."""
    parts = shared("init").set("vmix.base", "sd15").unset("vmix.ldm_names")
    parts.set("vmix.context_tokens", "77")
    return parts.put("aes_emb", zeros(N, 2, 768))


def matrices() -> Parts:
    """The paper's matrices, of which the trainer makes an adapter."""
    parts = shared("adapter").set("vmix.apply_to", "both").set("vmix.norm_eps", "1e-5")
    parts.set("vmix.made", {"method": "trained"})
    parts.put("aes_emb", tensor(N, 2, D)).put("projection.linear.weight", tensor(C, N))
    parts.put("projection.norm.weight", tensor(D)).put("projection.norm.bias", tensor(D))
    parts.put("projection.zero.weight", tensor(D, D)).put("projection.zero.bias", tensor(D))
    for layer, width in WIDTHS.items():
        parts.put(f"{layer}.to_v_aes.weight", tensor(width, D))
    return parts


def version_1() -> Parts:
    """An adapter as version 1 had it."""
    parts = matrices().set("vmix.format", "1").unset("vmix.made").set("vmix.trained", "no")
    old = {"positive": "a", "negative": "sks"}
    parts.set("vmix.labels", [{"name": name} | old for name in LABELS])
    parts.set("vmix.context_dim", str(D)).set("vmix.feature", "context_eot")
    return parts.set("vmix.projection", "learned").set("vmix.value_weights", "own")


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
    no_key = "metadata `vmix.format`: expected `2`, as in every VMix file, found no such key"
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
        ("list", ["vmix.format", "2"], wrong),
        ("number-value", {"vmix.format": 2}, wrong),
        ("null-value", {"vmix.format": None}, wrong),
        ("object-value", {"vmix.format": {"vmix.format": "2"}}, wrong),
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
    # The profile is as large as the last tensor.
    first, last, length = "aes_emb", rows_of(UP), R * 2 * 4
    for name, tensor_name, offsets, expected in [
        ("overlap", first, [0, end + 4], "invalid shape, data type, or offset"),
        ("shared", "profile", [size - length, size], "invalid offset for tensor"),
        ("gap", first, [4, end + 4], "invalid offset for tensor `aes_emb`"),
        ("beyond-file", last, [size - length, size + length], "invalid shape, data type, or"),
        ("reversed", first, [end, 0], "invalid offset for tensor"),
        ("reversed-last", last, [size - length, size - 2 * length], "invalid offset for tensor"),
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
    i16 = adapter().entry(rows_of(UP), dtype="I16", shape=[R, 4])
    expected = f"tensor `{rows_of(UP)}`: expected F32, F16 or BF16, found I16"
    yield "dtype-i16-rows", "adapter", i16, expected
    entry = '"aes_emb": {"dtype": "F32", "shape": [2, 2, 3], "data_offsets": [0, 48]}'
    twice = adapter().text(entry, f"{entry}, {entry}")
    yield bad("tensor-twice", twice, "invalid JSON in header: `aes_emb` comes twice")
    other = entry.replace("48", "44")
    twice = adapter().text(entry, f"{entry}, {other}")
    yield bad("tensor-twice-otherwise", twice, "invalid shape, data type, or offset")
    twice = adapter().text('"shape": [2, 2, 3]', '"shape": [2, 2, 3], "shape": [1]')
    yield bad("tensor-field-twice", twice, "invalid JSON in header: duplicate field `shape`")
    deep = '"shape": [2, 2, 3], "later": {"of": {"a": 1, "a": 2}}'
    twice = adapter().text('"shape": [2, 2, 3]', deep)
    yield bad("tensor-field-twice-deep", twice, "invalid JSON in header: `a` comes twice")
    missing = adapter().text('"dtype": "F32", ', "")
    yield bad("tensor-without-dtype", missing, "invalid JSON in header: missing field `dtype`")
    more = adapter().entry(first, quantization="none")
    yield "tensor-field-unknown", "adapter", more, OPENS


def valid() -> Iterator[Case]:
    """Files that hold nothing but what they may."""
    constant_first = [row("constant"), *ROWS[:3], row("constant"), ROWS[3]]
    attention = linear().tensors["attention"]
    # As a mean in f32 may be.
    rounded = Tensor([C, C], [0.5, 0.25, 0.125, 0.125 + 2**-22])
    mixed = adapter().put("aes_emb", tensor(N, 2, D, dtype="BF16"))
    mixed.put("context.rows", tensor(R, D, dtype="F16"))
    for name, parts in [
        ("layernorm", adapter()),
        ("layernorm-constant-first", layernorm(constant_first)),
        ("layernorm-no-constant", layernorm(ROWS[:4])),
        ("layernorm-one-row-each", layernorm(ROWS[1:3])),
        ("layernorm-attention", adapter().put("attention", attention)),
        ("layernorm-dtypes", mixed),
        ("linear", linear()),
        ("linear-f16", linear("F16")),
        ("linear-bf16", linear("BF16")),
        ("linear-bare", bare()),
        ("linear-attention-rounded", linear().put("attention", rounded)),
        ("sd15", sd15()),
    ]:
        yield f"valid-{name}", "adapter", parts.file(), OPENS
    for name, parts in [
        ("f32", preset()),
        ("f16", preset("F16")),
        ("contrast", contrast()),
    ]:
        yield f"valid-preset-{name}", "preset", parts.file(), OPENS
    yield "valid-init", "init", init().file(), OPENS
    yield "valid-init-sd15", "init", sd15_init().file(), OPENS


def tensors() -> Iterator[Case]:
    """Tensors that are not those of an adapter."""

    def bad(name: str, tensor_name: str, made: Tensor, expected: str) -> Case:
        content = adapter().put(tensor_name, made).file()
        return name, "adapter", content, f"tensor `{tensor_name}`: expected {expected}"

    for name, made, expected in [
        ("rank", tensor(N * 2 * D), "shape [2, 2, d], found shape [12]"),
        ("labels", tensor(N + 1, 2, D), "shape [2, 2, 3], found shape [3, 2, 3]"),
        ("one", tensor(N, 1, D), "shape [2, 2, 3], found shape [2, 1, 3]"),
        ("width-0", tensor(N, 2, 0), "shape [2, 2, d], found shape [2, 2, 0]"),
    ]:
        yield bad(f"aes-emb-{name}", "aes_emb", made, expected)
    # A product of 0 elements, whatever the other sizes are.
    no_labels = adapter().put("aes_emb", Tensor([0, 2**63, 2**63], [])).file()
    expected = "metadata `vmix.context_tokens`: expected at most 268435456 numbers in the values"
    yield "aes-emb-0-labels-of-2-63", "adapter", no_labels, expected
    for name, made, expected in [
        ("turned", tensor(R, C), "shape [2, 5], found shape [5, 2]"),
        ("rank", tensor(C * R), "shape [2, 5], found shape [10]"),
        ("tokens", tensor(C + 1, R), "shape [2, 5], found shape [3, 5]"),
        ("rows", tensor(C, K), "shape [2, 5], found shape [2, 4]"),
        ("f16", tensor(C, R, dtype="F16"), "F32, found F16"),
        ("bf16", tensor(C, R, dtype="BF16"), "F32, found BF16"),
    ]:
        yield bad(f"profile-{name}", "profile", made, expected)
    for name, made, expected in [
        ("of-all-rows", factor(R), "shape [4, 3], found shape [5, 3]"),
        ("too-small", factor(K - 1), "shape [4, 3], found shape [3, 3]"),
        ("rank", tensor(K * K), "shape [4, m], found shape [16]"),
        ("turned", tensor(2, K * 2), "shape [4, 8], found shape [2, 8]"),
        ("empty", tensor(K, 0), "shape [4, m], found shape [4, 0]"),
        ("f16", factor(K, dtype="F16"), "F32, found F16"),
        ("bf16", factor(K, dtype="BF16"), "F32, found BF16"),
    ]:
        yield bad(f"gram-factor-{name}", "gram_factor", made, expected)
    for m in (1, 9):
        yield (
            f"valid-gram-factor-{m}",
            "adapter",
            adapter().put("gram_factor", tensor(K, m)).file(),
            OPENS,
        )
    for name, made, expected in [
        ("rank", tensor(R * D), "shape [5, 3], found shape [15]"),
        ("rows", tensor(K, D), "shape [5, 3], found shape [4, 3]"),
        ("width", tensor(R, D + 1), "shape [5, 3], found shape [5, 4]"),
        ("turned", tensor(D, R), "shape [5, 3], found shape [3, 5]"),
    ]:
        yield bad(f"context-rows-{name}", "context.rows", made, expected)
    for name, made, expected in [
        ("rank", tensor(R * 2), "shape [5, inner_dim], found shape [10]"),
        ("rank-3", tensor(R, 1, 2), "shape [5, inner_dim], found shape [5, 1, 2]"),
        ("count", tensor(R - 1, 2), "shape [5, 2], found shape [4, 2]"),
        ("turned", tensor(2, R), "shape [5, 5], found shape [2, 5]"),
        ("width-0", tensor(R, 0), "shape [5, inner_dim], found shape [5, 0]"),
        ("f16", tensor(R, 2, dtype="F16"), "float32, as the other tensors, found float16"),
        ("bf16", tensor(R, 2, dtype="BF16"), "float32, as the other tensors, found bfloat16"),
    ]:
        yield bad(f"rows-tensor-{name}", rows_of(UP), made, expected)
    for name, made, expected in [
        ("turned", tensor(C, R), "shape [2, 2], found shape [2, 5]"),
        ("rank", Tensor([C * C], [0.25] * C * C), "shape [2, 2], found shape [4]"),
        ("f16", Tensor([C, C], [0.25] * C * C, "F16"), "F32, found F16"),
        ("negative", Tensor([C, C], [0.75, 0.5, -0.5, 0.25]), "entries that are not negative"),
        ("sum-2", Tensor([C, C], [0.5] * C * C), "entries that add up to 1"),
        ("sum-0", zeros(C, C, dtype="F32"), "entries that add up to 1"),
        ("sum-1.01", Tensor([C, C], [0.26, 0.25, 0.25, 0.25]), "entries that add up to 1"),
        ("of-each-row-1", Tensor([C, C], [1.0, 0.0, 0.0, 1.0]), "entries that add up to 1"),
        ("huge", Tensor([C, C], [3e38] * C * C), "entries that add up to 1"),
        ("nan", Tensor([C, C], [1.0, 0.0, 0.0, NAN]), "finite values, found NaN"),
        ("infinite", Tensor([C, C], [1.0, 0.0, 0.0, INFINITY]), "finite values, found inf"),
    ]:
        yield bad(f"attention-{name}", "attention", made, expected)

    for name in adapter().tensors:
        shape = adapter().tensors[name].shape
        for what, value, dtype in [
            ("nan", NAN, "F32"),
            ("infinite", INFINITY, "F32"),
            ("nan-bf16", NAN, "BF16"),
            ("infinite-f16", -INFINITY, "F16"),
        ]:
            if name in ("profile", "gram_factor") and dtype != "F32":
                continue
            made = filled(value, *shape, dtype=dtype)
            parts = adapter()
            for layer, width in WIDTHS.items():
                parts.put(rows_of(layer), tensor(R, width, dtype=dtype))
            parts.put(name, made)
            found = "NaN" if value != value else str(value)
            if name.startswith(("up", "down")):
                found = "NaN or infinity"
            expected = f"tensor `{name}`: expected finite values, found {found}"
            yield f"{short(name)}-{what}", "adapter", parts.file(), expected
        expected = f"shape {shape}, found no such tensor"
        if name == "aes_emb":
            expected = "shape [2, 2,"
        elif name == "gram_factor" or name.startswith(("up", "down")):
            expected = "a tensor, found no such tensor"
        content = adapter().remove(name).file()
        yield f"missing-{short(name)}", "adapter", content, f"tensor `{name}`: expected {expected}"

    features = bare().put("aes_emb", filled(NAN, N, 2, D))
    expected = "tensor `aes_emb`: expected finite values, found NaN"
    yield "linear-aes-emb-nan", "adapter", features.file(), expected
    features = bare().put("aes_emb", tensor(N + 1, 2, D))
    expected = "tensor `aes_emb`: expected shape [2, 2, 3], found shape [3, 2, 3]"
    yield "linear-aes-emb-labels", "adapter", features.file(), expected

    known = next(iter(SD15))
    for name, parts, extra in [
        ("gram-factor", linear(), "gram_factor"),
        ("context-rows", linear(), "context.rows"),
        ("values", adapter(), f"{DOWN}.v_aes"),
        ("matrix", adapter(), f"{DOWN}.to_v_aes.weight"),
        ("projection", adapter(), "projection.linear.weight"),
        ("gain", adapter(), "projection.gain"),
        ("layer", adapter(), "mid.rows"),
        ("layer-sd15", sd15(), rows_of(known.replace("down_blocks.0", "down_blocks.9"))),
        ("layer-by-ldm-name", adapter(), rows_of(LDM[UP])),
        ("layer-sd15-by-ldm-name", sd15(), rows_of("input_blocks.1.1.transformer_blocks.0.attn2")),
        ("layer-without-name", adapter(), ".rows"),
        ("rows", adapter(), "rows"),
        ("profile-rows", adapter(), "profile.rows"),
        ("capital", linear(), "Attention"),
        ("empty-name", adapter(), ""),
        ("nul-name", adapter(), "aes_emb\0"),
    ]:
        expected = f"tensor `{extra}`: expected no such tensor, found one"
        content = parts.put(extra, tensor(2)).file()
        yield f"extra-{name}", "adapter", content, expected.split("\0")[0]
    none = adapter()
    none.tensors = {}
    expected = f"tensor `{rows_of(DOWN)}`: expected a tensor, found no such tensor"
    yield "zero-tensors", "adapter", none.file(), expected

    # Finite numbers whose products are not: they open, and give no values.
    huge = adapter().put(rows_of(UP), Tensor([R, 2], [3e38] * R * 2))
    huge.put("profile", Tensor([C, R], [2.0] * C * R)).put("gram_factor", zeros(K, 1, dtype="F32"))
    overflow = "expected values that float32 can hold, found more: label `"
    yield "values-overflow", "values", huge.file(), f"layer `{UP}`: {overflow}"
    huge = linear().put(rows_of(DOWN), Tensor([4, 4], [-3e38] * 16))
    huge.put("profile", Tensor([C, 4], [3.0] * C * 4))
    yield "linear-values-overflow", "values", huge.file(), f"layer `{DOWN}`: {overflow}"
    huge = adapter().put("profile", Tensor([C, R], [3e38] * C * R))
    huge.put("gram_factor", zeros(K, 1, dtype="F32"))
    expected = "weights: expected coefficients that float32 can hold, found more: label `"
    yield "coefficients-overflow", "values", huge.file(), expected


def short(name: str) -> str:
    """A tensor's name as a part of a file's."""
    return name.replace(".attentions.0.transformer_blocks.0.attn2", "").translate(
        str.maketrans("._", "--")
    )


def layers() -> Iterator[Case]:
    """Layers that are missing, superfluous or the same."""
    key = "metadata `vmix.ldm_names`: expected"
    own = f"{key} a name of its own per layer, found"
    an_object = f"{key} a JSON object of the LDM name of every layer, by diffusers name, found"
    no_such = f"tensor `{rows_of(UP)}`: expected no such tensor, found one"
    for name, ldm_names, expected in [
        ("empty", {}, f"{key} at least one layer, found none"),
        ("missing", {DOWN: "a"}, no_such),
        ("extra", LDM | {"mid": "b"}, "tensor `mid.rows`: expected a tensor, found"),
        (
            "other-path",
            {DOWN: "a", UP + "2": "b"},
            f"tensor `{UP}2.rows`: expected a tensor, found",
        ),
        ("turned", {ldm: name for name, ldm in LDM.items()}, f"tensor `{rows_of(LDM[DOWN])}`: "),
        ("same", {DOWN: "a", UP: "a"}, f"{own} `a` for two layers"),
        ("crossed", {DOWN: UP, UP: DOWN}, f"{own} `"),
        ("nul", LDM | {UP: "a\0b"}, f'{own} "a\\0b", with a NUL character'),
        ("without-name", LDM | {UP: ""}, f"{own} a layer without a name"),
        ("number", LDM | {UP: 1}, f"{an_object} invalid type: integer `1`"),
        ("null", LDM | {UP: None}, f"{an_object} invalid type: null"),
        ("list", [DOWN, UP], f"{an_object} invalid type: sequence"),
        ("string", "input_blocks", f"{an_object} expected value"),
        ("deep", '{"a":' * 500, f"{an_object} recursion limit exceeded"),
        ("key-twice", f'{{"{DOWN}": "a", "{DOWN}": "b", "{UP}": "c"}}', f"{an_object} `{DOWN}`"),
    ]:
        parts = adapter().set("vmix.ldm_names", ldm_names)
        yield f"ldm-names-{name}", "adapter", parts.file(), expected
    # `context.rows` would be the rows of that layer.
    context = "metadata `vmix.ldm_names`: expected the path of a layer, found `context`"
    for kind, parts in [("adapter", adapter()), ("linear", bare()), ("init", init())]:
        parts.set("vmix.ldm_names", LDM | {"context": "a"})
        if kind == "linear":
            parts.put("context.rows", tensor(len(LINEAR_ROWS), D))
        opened = "init" if kind == "init" else "adapter"
        yield f"layer-context-{kind}", opened, parts.file(), context
    names = LDM | {LDM[UP]: "c"}
    by_ldm_name = adapter().put(rows_of(LDM[UP]), tensor(R, 2)).set("vmix.ldm_names", names)
    expected = f"{own} `{LDM[UP]}` for two layers"
    yield "layer-twice-with-ldm-name", "adapter", by_ldm_name.file(), expected
    nul = adapter().put(rows_of("a\0b"), tensor(R, 2)).set("vmix.ldm_names", LDM | {"a\0b": "c"})
    yield "layer-nul", "adapter", nul.file(), f'{own} "a\\0b", with a NUL character'
    nameless = adapter().remove(rows_of(UP)).put(rows_of(""), tensor(R, 2))
    nameless.set("vmix.ldm_names", {DOWN: "a", "": "b"})
    expected = f"{own} a layer without a name"
    yield "layer-without-name", "adapter", nameless.file(), expected

    # One row of 4096 tokens: the profile and 65535 numbers of the layers are 2^28 together.
    for name, width, expected in [
        ("most", 2**16 - 1 - 4, OPENS),
        ("too-many", 2**16 - 4, "metadata `vmix.context_tokens`: expected at most 268435456"),
    ]:
        parts = bare("F16").set("vmix.context_tokens", "4096")
        parts.set("vmix.labels", [label("a", neutral=0)]).set("vmix.rows", [row("positive", "a")])
        parts.put("profile", zeros(4096, 1, dtype="F32"))
        parts.put(rows_of(DOWN), zeros(1, 4)).put(rows_of(UP), zeros(1, width))
        yield f"results-{name}", "adapter", parts.file(), expected

    first, *_, last = SD15
    wrong = f"tensor `{rows_of(last)}`: expected shape [1, 320], found"
    without = sd15().remove(rows_of(last)).file()
    yield "sd15-without-layer", "adapter", without, f"{wrong} no such tensor"
    wide = sd15().put(rows_of(last), zeros(1, 640)).file()
    yield "sd15-width", "adapter", wide, f"{wrong} shape [1, 640]"
    ldm_name = "input_blocks.1.1.transformer_blocks.0.attn2"
    renamed = sd15().remove(rows_of(first)).put(rows_of(ldm_name), zeros(1, 320)).file()
    expected = f"tensor `{rows_of(first)}`: expected shape [1, 320], found no such tensor"
    yield "sd15-layer-by-ldm-name", "adapter", renamed, expected
    tokens = sd15().set("vmix.context_tokens", "76").file()
    expected = "metadata `vmix.context_tokens`: expected `77`, as in every sd15 U-Net, found `76`"
    yield "sd15-context-tokens", "adapter", tokens, expected
    features = sd15().put("aes_emb", zeros(1, 2, 767)).file()
    yield (
        "sd15-context-dim",
        "adapter",
        features,
        "tensor `aes_emb`: expected width 768, as in every sd15",
    )
    other = sd15().set("vmix.base", "sdxl").file()
    missing = "down_blocks.1.attentions.0.transformer_blocks.1.attn2"
    expected = f"tensor `{rows_of(missing)}`: expected shape [1, 640], found no such tensor"
    yield "sdxl-layers", "adapter", other, expected


def metadata() -> Iterator[Case]:
    """Keys of wrong values."""
    names = {
        "format": "`2`, as in every VMix file",
        "kind": "one of adapter, preset, init",
        "base": "one of sd15, sdxl, other",
        "apply_to": "one of cond, both, contrast",
        "coefficients": "one of layernorm, linear",
        "context_tokens": "a whole number from 1 to 4096",
        "norm_eps": "a number above 0",
    }
    values = {
        "format": ["0", "1", "3", "2.0", "02", " 2", ""],
        "kind": ["Adapter", "lora", ""],
        "base": ["SD15", "sd3", ""],
        "apply_to": ["uncond", ""],
        "coefficients": ["LayerNorm", "softmax", ""],
        "context_tokens": ["0", "4097", "1e99", "-1", "2.0", " 2", "2\0", "99999999999999999999"],
        "norm_eps": ["0", "-0", "-1e-5", "nan", "inf", "1e-400", "1e400", "small", ""],
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
        ("rows", "a JSON list with `side` and `label` of every row"),
        ("made", "a JSON object with the key `method`"),
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
    # What one kind of coefficients has and the other has not.
    as_linear = adapter().set("vmix.coefficients", "linear").file()
    expected = f"{ROWS_KEY}a constant row in a linear file"
    yield "layernorm-as-linear", "adapter", as_linear, expected
    as_layernorm = linear().set("vmix.coefficients", "layernorm").file()
    expected = "metadata `vmix.norm_eps`: expected a number above 0, found no such key"
    yield "linear-as-layernorm", "adapter", as_layernorm, expected
    for kind, opened in [("preset", "preset"), ("init", "init")]:
        swapped = adapter().set("vmix.kind", kind).file()
        expected = f"metadata `vmix.kind`: expected `adapter`, found `{kind}`"
        yield f"adapter-as-{kind}", "adapter", swapped, expected
        swapped = adapter().file()
        expected = f"metadata `vmix.kind`: expected `{kind}`, found `adapter`"
        yield f"{kind}-is-adapter", opened, swapped, expected
    later = adapter().set("vmix.later", "1").set("vm\0ix", "1").set("", "").file()
    yield "metadata-unknown-keys", "adapter", later, OPENS
    # As version 1 had it, with that number and without.
    expected = "metadata `vmix.format`: expected `2`, as in every VMix file, found `1`"
    yield "version-1", "adapter", version_1().file(), expected
    yield "version-1-preset", "preset", preset().set("vmix.format", "1").file(), expected
    yield "version-1-init", "init", init().set("vmix.format", "1").file(), expected
    renumbered = version_1().set("vmix.format", "2").file()
    expected = "metadata `vmix.labels`: expected a JSON list of labels (docs/format.md), found "
    yield "version-1-as-2", "adapter", renumbered, f"{expected}invalid type: string"
    expected = "metadata `vmix.coefficients`: expected one of layernorm, linear, found no such key"
    yield "matrices", "adapter", matrices().file(), expected


ROWS_KEY = "metadata `vmix.rows`: expected a JSON list with `side` and `label` of every row, found "


def rows() -> Iterator[Case]:
    """Lists of rows that are none."""
    sides = "metadata `vmix.rows`: expected sides among positive, negative, constant, found "
    unknown = "which is not in vmix.labels"
    first = ROWS[0]
    later = first | {"later": [{"a": 1}]}
    for name, value, found in [
        ("not-json", "positive", "expected value"),
        ("empty-text", "", "EOF while parsing a value"),
        ("null", "null", "invalid type: null"),
        ("object", first, "invalid type: map"),
        ("of-strings", ["positive"] * R, 'invalid type: string "positive"'),
        ("of-lists", [[row["side"], row.get("label")] for row in ROWS], "invalid type: sequence"),
        ("of-lists-2", [[row.get("label"), row["side"]] for row in ROWS], "invalid type: sequence"),
        ("trailing", json.dumps(ROWS) + "]", "trailing characters"),
        ("deep", "[" * 10_000, "recursion limit exceeded"),
        ("empty", [], "an empty list"),
        ("side-null", [first | {"side": None}, *ROWS[1:]], "invalid type: null"),
        ("side-number", [first | {"side": 1}, *ROWS[1:]], "invalid type: integer `1`"),
        ("side-missing", [{"label": LABELS[0]}, *ROWS[1:]], "missing field `side`"),
        ("label-unknown", [*ROWS[:3], row("negative", "x"), ROWS[4]], f"the label `x`, {unknown}"),
        (
            "label-capital",
            [row("positive", "Vibrant color"), *ROWS[1:]],
            f"the label `Vibrant color`, {unknown}",
        ),
        ("label-empty", [row("positive", ""), *ROWS[1:]], f"the label ``, {unknown}"),
        ("label-all", [row("positive", "all"), *ROWS[1:]], f"the label `all`, {unknown}"),
        ("label-number", [first | {"label": 0}, *ROWS[1:]], "invalid type: integer `0`"),
        ("label-list", [first | {"label": LABELS}, *ROWS[1:]], "invalid type: sequence"),
        ("label-null", [first | {"label": None}, *ROWS[1:]], "a positive row without a label"),
        ("label-missing", [first, row("negative"), *ROWS[2:]], "a negative row without a label"),
        (
            "constant-with-label",
            [*ROWS[:-1], row("constant", LABELS[0])],
            f"a constant row with the label `{LABELS[0]}`",
        ),
        (
            "constant-with-unknown-label",
            [*ROWS[:-1], row("constant", "x")],
            "a constant row with the label `x`",
        ),
        (
            "constant-with-empty-label",
            [*ROWS[:-1], row("constant", "")],
            "a constant row with the label ``",
        ),
        ("not-of-every-label", [*ROWS[:2], *ROWS[:2], ROWS[4]], f"no row of label `{LABELS[1]}`"),
        ("of-no-label", [ROWS[-1]] * R, f"no row of label `{LABELS[0]}`"),
        ("field-twice", twice(ROWS, '"side": "positive"'), "`side` comes twice"),
        ("field-twice-deep", twice([later, *ROWS[1:]], '"a": 1'), "`a` comes twice"),
    ]:
        yield f"rows-{name}", "adapter", adapter().set("vmix.rows", value).file(), ROWS_KEY + found
    for name, side in [("unknown", "both"), ("capital", "Positive"), ("empty", "")]:
        parts = adapter().set("vmix.rows", [row(side, LABELS[0]), *ROWS[1:]])
        yield f"rows-side-{name}", "adapter", parts.file(), f"{sides}`{side}`"
    with_constant = [*LINEAR_ROWS[:2], row("constant"), LINEAR_ROWS[3]]
    parts = linear().set("vmix.rows", with_constant)
    expected = f"{ROWS_KEY}a constant row in a linear file"
    yield "rows-constant-in-linear", "adapter", parts.file(), expected
    shape = "tensor `profile`: expected shape"
    for name, value, expected in [
        ("too-few", ROWS[:-1], f"{shape} [2, 4], found shape [2, 5]"),
        ("too-many", [*ROWS, first], f"{shape} [2, 6], found shape [2, 5]"),
        ("many", ROWS + ROWS[-1:] * 1000, f"{shape} [2, 1005], found shape [2, 5]"),
        ("label-null-of-constant", [*ROWS[:-1], row("constant") | {"label": None}], OPENS),
        ("field-unknown", [later, *ROWS[1:]], OPENS),
        ("same-side", [first, first, *ROWS[2:]], OPENS),
    ]:
        yield f"rows-{name}", "adapter", adapter().set("vmix.rows", value).file(), expected


def twice(value: Any, field: str) -> str:
    """JSON in which a field of an object comes twice."""
    text = json.dumps(value)
    assert field in text, field
    return text.replace(field, f"{field}, {field}", 1)


def made() -> Iterator[Case]:
    """How the file was made, in other words."""
    key = "metadata `vmix.made`: expected a JSON object with the key `method`, found "
    method = "metadata `vmix.made`: expected a `method` among trained, fitted, merged, found "
    later = {"method": "fitted", "steps": 5, "later": [1, {"a": None}]}
    for name, value, expected in [
        ("not-json", "trained", f"{key}expected ident"),
        ("empty-text", "", f"{key}EOF while parsing a value"),
        ("null", "null", f"{key}invalid type: null"),
        ("list", ["trained"], f"{key}invalid type: sequence"),
        ("string", '"trained"', f'{key}invalid type: string "trained"'),
        ("empty", {}, f"{method}none"),
        ("method-unknown", {"method": "guessed"}, f"{method}`guessed`"),
        ("method-capital", {"method": "Trained"}, f"{method}`Trained`"),
        ("method-empty", {"method": ""}, f"{method}``"),
        ("method-null", {"method": None}, f"{method}none"),
        ("method-list", {"method": ["trained"]}, f"{method}none"),
        ("method-twice", twice({"method": "a"}, '"method": "a"'), f"{key}`method` comes twice"),
        ("key-twice", twice(later, '"steps": 5'), f"{key}`steps` comes twice"),
        ("key-twice-deep", twice(later, '"a": null'), f"{key}`a` comes twice"),
        ("1e400", '{"method": "trained", "steps": 1e400}', f"{key}number out of range"),
        ("nan", {"method": "trained", "steps": NAN}, f"{key}expected value"),
        ("trailing", '{"method": "trained"}}', f"{key}trailing characters"),
        ("deep", '{"a":' * 500, f"{key}recursion limit exceeded"),
        ("surrogate", '{"method": "trained", "base": "\\ud800"}', f"{key}unexpected end of hex"),
        ("key-unknown", later, OPENS),
        ("merged", {"method": "merged"}, OPENS),
    ]:
        yield f"made-{name}", "adapter", adapter().set("vmix.made", value).file(), expected
        if name in ("not-json", "empty", "method-unknown", "key-twice-deep", "key-unknown"):
            parts = preset().set("vmix.made", value)
            yield f"preset-made-{name}", "preset", parts.file(), expected


def labels() -> Iterator[Case]:
    """Lists of labels that are none."""
    expected = "metadata `vmix.labels`: expected a JSON list of labels (docs/format.md), found "
    a = label("a")
    outside = "label `b` with the default {} outside of its range {} to {}"
    later = label("b", later=[1, {"x": 2}])
    for name, value, found in [
        ("not-json", "a, b", "expected value"),
        ("empty-text", "", "EOF while parsing a value"),
        ("object", {"name": "a"}, "invalid type: map"),
        ("of-strings", ["a", "b"], "invalid type: string"),
        ("null", "null", "invalid type: null"),
        ("empty", [], "an empty list"),
        ("deep", "[" * 10_000, "recursion limit exceeded"),
        ("deep-unknown", '[{"x":' + "[" * 10_000, "recursion limit exceeded"),
        ("trailing", json.dumps([a, label("b")]) + "]", "trailing characters"),
        ("all", [a, label("all")], "a label named `all`, which is reserved"),
        ("none", [a, label("none")], "a label named `none`, which is reserved"),
        ("twice", [a, a], "two labels named `a`"),
        ("nameless", [a, label("")], "a label without a name"),
        ("blank", [a, label(" \t")], "a label without a name"),
        ("nul", [a, label("b\0c")], 'label "b\\0c" with a NUL character'),
        ("nul-positive", [a, label("b", positive=["c", "\0"])], 'label "b" with a NUL character'),
        ("nul-negative", [a, label("b", negative=["\0"])], 'label "b" with a NUL character'),
        ("nul-dimension", [a, label("b", dimension="\0")], 'label "b" with a NUL character'),
        ("surrogate", '[{"name": "\\ud800"}]', "unexpected end of hex escape"),
        ("name-number", [a, label("b", name=1)], "invalid type: integer `1`, expected a string"),
        ("name-null", [a, label("b", name=None)], "invalid type: null, expected a string"),
        ("name-missing", [a, {"positive": ["b"], "negative": ["c"]}], "missing field `name`"),
        ("no-positive", [a, {"name": "b", "negative": ["c"]}], "missing field `positive`"),
        ("no-negative", [a, {"name": "b", "positive": ["c"]}], "missing field `negative`"),
        ("positive-string", [a, label("b", positive="b")], 'invalid type: string "b"'),
        ("negative-string", [a, label("b", negative="b")], 'invalid type: string "b"'),
        ("positive-null", [a, label("b", positive=None)], "invalid type: null"),
        ("positive-object", [a, label("b", positive={"en": "b"})], "invalid type: map"),
        ("positive-of-null", [a, label("b", positive=[None])], "invalid type: null"),
        ("positive-of-numbers", [a, label("b", positive=[1])], "invalid type: integer `1`"),
        ("positive-of-lists", [a, label("b", positive=[["b"]])], "invalid type: sequence"),
        ("positive-empty", [a, label("b", positive=[])], "label `b` without a positive text"),
        ("negative-empty", [a, label("b", negative=[])], "label `b` without a negative text"),
        ("default-string", [a, label("b", default="1")], "invalid type: string"),
        ("default-null", [a, label("b", default=None)], "invalid type: null"),
        ("default-nan", [a, label("b", default=NAN)], "expected value"),
        ("default-1e39", [a, label("b", default=1e39)], NOT_FINITE),
        ("default-1e400", '[{"default": 1e400}]', "number out of range"),
        ("default-above", [a, label("b", default=1.5)], outside.format(1.5, 0, 1)),
        (
            "default-below",
            [a, label("b", default=-1, range=[-0.5, 2])],
            outside.format(-1, -0.5, 2),
        ),
        ("default-missing-outside", [a, label("b", range=[-1, 0])], outside.format(1, -1, 0)),
        ("neutral-1e39", [a, label("b", neutral=-1e39)], NOT_FINITE),
        ("neutral-string", [a, label("b", neutral="0")], "invalid type: string"),
        ("neutral-list", [a, label("b", neutral=[0])], "invalid type: sequence"),
        ("range-reversed", [a, label("b", range=[1, 0])], "label `b` with the range 1 to 0"),
        ("range-nothing", [a, label("b", range=[1, 1])], "label `b` with the range 1 to 1"),
        ("range-of-one", [a, label("b", range=[1])], "invalid length 1"),
        ("range-of-three", [a, label("b", range=[0, 1, 2])], "invalid length 3"),
        ("range-empty", [a, label("b", range=[])], "invalid length 0"),
        ("range-null", [a, label("b", range=None)], "invalid type: null"),
        ("range-of-null", [a, label("b", range=[None, 1])], "invalid type: null"),
        ("range-of-strings", [a, label("b", range=["0", "1"])], "invalid type: string"),
        ("range-object", [a, label("b", range={"low": 0, "high": 1})], "invalid type: map"),
        ("range-1e39", [a, label("b", range=[0, 1e39])], NOT_FINITE),
        ("range-minus-1e39", [a, label("b", range=[-1e39, 1])], NOT_FINITE),
        ("range-infinite", [a, label("b", range=[0, INFINITY])], "expected value"),
        ("range-nan", [a, label("b", range=[NAN, 1])], "expected value"),
        ("step-0", [a, label("b", step=0)], "label `b` with the step 0"),
        ("step-negative", [a, label("b", step=-0.05)], "label `b` with the step -0.05"),
        ("step-1e39", [a, label("b", step=1e39)], NOT_FINITE),
        ("step-null", [a, label("b", step=None)], "invalid type: null"),
        ("step-string", [a, label("b", step="0.05")], "invalid type: string"),
        ("effect-string", [a, label("b", effect={"x": "1"})], "invalid type: string"),
        ("effect-null", [a, label("b", effect={"x": None})], "invalid type: null"),
        ("effect-is-null", [a, label("b", effect=None)], "invalid type: null"),
        ("effect-of-lists", [a, label("b", effect={"x": [1]})], "invalid type: sequence"),
        ("effect-list", [a, label("b", effect=[1])], "invalid type: sequence"),
        ("effect-number", [a, label("b", effect=1)], "invalid type: integer"),
        ("effect-nan", [a, label("b", effect={"x": NAN})], "expected value"),
        ("effect-1e400", '[{"effect": {"x": 1e400}}]', "number out of range"),
        (
            "effect-twice",
            twice([a, label("b", effect={"x": 1})], '"x": 1'),
            "`x` comes twice",
        ),
        ("dimension-null", [a, label("b", dimension=None)], "invalid type: null"),
        ("display-names-list", [a, label("b", display_names=["b"])], "invalid type: sequence"),
        ("display-names-null", [a, label("b", display_names={"de": None})], "invalid type: null"),
        (
            "display-names-twice",
            twice([a, label("b", display_names={"de": "c"})], '"de": "c"'),
            "`de` comes twice",
        ),
        ("field-twice", twice([a, label("b")], '"name": "b"'), "`name` comes twice"),
        ("field-unknown-twice", twice([a, later], '"later": [1, {"x": 2}]'), "`later` comes twice"),
        ("field-twice-deep", twice([a, later], '"x": 2'), "`x` comes twice"),
    ]:
        parts = adapter(["a", "b"]).set("vmix.labels", value)
        yield f"labels-{name}", "adapter", parts.file(), expected + found
    one = adapter().set("vmix.labels", [label(LABELS[0])]).file()
    yield "labels-one-too-few", "adapter", one, f"{ROWS_KEY}the label `{LABELS[1]}`, which is"
    many = [label(name) for name in LABELS] + [label(f"{i:x}") for i in range(1000)]
    without_rows = adapter().set("vmix.labels", many).file()
    yield "labels-many", "adapter", without_rows, f"{ROWS_KEY}no row of label `0`"
    for name, value in [
        ("field-unknown", later),
        ("name-long", label("b" * 20_000)),
        ("name-control", label("\x1b[31mb\n\u202e")),
        ("name-all-capital", label("ALL")),
        ("name-padded", label(" a ")),
        ("display-names-nul", label("b", display_names={"de\0x": "c", "de": "d\0e"})),
        ("texts", label("b", positive=["b", "c"], negative=["", "d", "e"])),
        ("neutral-outside", label("b", neutral=-3)),
        ("range-wide", label("b", range=[-3e38, 3e38], step=3e38)),
        ("neutral-null", label("b", neutral=None, effect={}, dimension="")),
        ("effect", label("b", effect={"": -1.5, "x": 3e38})),
    ]:
        parts = adapter(["a", value["name"]]).set("vmix.labels", [a, value])
        yield f"labels-{name}", "adapter", parts.file(), OPENS
    # Weights are what the labels of a linear file are in proportion to.
    first, second = (label(name, neutral=0, default=0) for name in LABELS)
    key = "metadata `vmix.labels`: expected `neutral` 0 in a linear file, found"
    for name, value, found in [
        ("null", second | {"neutral": None}, "null"),
        ("1", second | {"neutral": 1}, "1"),
        ("small", second | {"neutral": 0.5**10}, "0.0009765625"),
        ("missing", label(LABELS[1]), "null"),
    ]:
        parts = linear().set("vmix.labels", [first, value])
        expected = f"{key} {found} for label `{LABELS[1]}`"
        yield f"linear-neutral-{name}", "adapter", parts.file(), expected


NOT_FINITE = "label `b` with a number that is not finite"


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
        ("deep", '{"a":' * 500, "recursion limit exceeded"),
        ("key-twice", twice(both, f'"{first}": 1.0'), f"`{first}` comes twice"),
    ]:
        parts = preset().set("vmix.selection", value)
        yield bad(f"selection-{name}", parts, f"{key}, found {found}")
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
        ("vmix.made", "metadata `vmix.made`: expected a JSON object"),
        ("vmix.apply_to", "metadata `vmix.apply_to`: expected one of cond, both, contrast"),
        ("vmix.ldm_names", "metadata `vmix.ldm_names`: expected a JSON object"),
        ("vmix.labels", "metadata `vmix.labels`: expected a JSON list of labels"),
        ("vmix.context_tokens", "metadata `vmix.context_tokens`: expected a whole number"),
    ]:
        name = missing.removeprefix("vmix.").replace("_", "-")
        yield bad(f"missing-{name}", preset().unset(missing), expected)
    up = f"tensor `{UP}.v_aes`: expected"
    for name, made, expected in [
        ("nan", filled(NAN, C, 2), f"{up} finite values, found NaN"),
        ("infinite", filled(INFINITY, C, 2), f"{up} finite values, found"),
        ("rank", tensor(C, 1, 2), f"{up} shape [context tokens, inner_dim], found shape [2, 1, 2]"),
        ("width-0", tensor(C, 0), f"{up} shape [context tokens, inner_dim], found shape [2, 0]"),
        ("tokens", tensor(C + 1, 2), f"{up} shape [2, 2], found shape [3, 2]"),
        ("dtypes", tensor(C, 2, dtype="F16"), f"{up} float32, as the other tensors"),
    ]:
        yield bad(name, preset().put(f"{UP}.v_aes", made), expected)
    integers = preset().entry(f"{UP}.v_aes", dtype="I32")
    yield "preset-integers", "preset", integers, f"{up} F32, F16 or BF16, found I32"
    without = preset().remove(f"{UP}.v_aes")
    yield bad("missing-layer", without, f"{up} a tensor, found no such tensor")
    for name, extra in [
        ("layer", "mid.v_aes"),
        ("aes-emb", "aes_emb"),
        ("rows", rows_of(UP)),
        ("profile", "profile"),
        ("attention", "attention"),
        ("stray", "x"),
        ("layer-by-ldm-name", f"{LDM[UP]}.v_aes"),
    ]:
        expected = f"tensor `{extra}`: expected no such tensor, found one"
        yield bad(f"extra-{name}", preset().put(extra, tensor(C, 2)), expected)
    same = preset().set("vmix.ldm_names", {DOWN: "a", UP: "a"})
    expected = "metadata `vmix.ldm_names`: expected a name of its own per layer, found `a` for two"
    yield bad("ldm-names-same", same, expected)
    context = preset().set("vmix.ldm_names", LDM | {"context": "a"})
    context.put("context.v_aes", tensor(C, 2))
    expected = "metadata `vmix.ldm_names`: expected the path of a layer, found `context`"
    yield bad("layer-context", context, expected)
    nothing = preset().set("vmix.ldm_names", {}).remove(f"{UP}.v_aes").remove(f"{DOWN}.v_aes")
    expected = "metadata `vmix.ldm_names`: expected at least one layer, found none"
    yield bad("layers-none", nothing, expected)
    none = preset()
    none.tensors = {}
    expected = f"tensor `{DOWN}.v_aes`: expected a tensor, found no such tensor"
    yield bad("zero-tensors", none, expected)
    expected = f"tensor `{DOWN}.v_aes_uncond`: expected shape [2, 4], found no such tensor"
    yield bad("contrast-without-uncond", preset().set("vmix.apply_to", "contrast"), expected)
    half = contrast().remove(f"{UP}.v_aes_uncond")
    expected = f"tensor `{UP}.v_aes_uncond`: expected shape [2, 2], found no such tensor"
    yield bad("contrast-half", half, expected)
    nan = contrast().put(f"{UP}.v_aes_uncond", filled(NAN, C, 2))
    expected = f"tensor `{UP}.v_aes_uncond`: expected finite values, found NaN"
    yield bad("contrast-nan", nan, expected)
    mixed = contrast().put(f"{UP}.v_aes_uncond", tensor(C, 2, dtype="BF16"))
    expected = f"tensor `{UP}.v_aes_uncond`: expected float32, as the other tensors"
    yield bad("contrast-dtypes", mixed, expected)
    both_passes = contrast().set("vmix.apply_to", "both")
    expected = f"tensor `{DOWN}.v_aes_uncond`: expected no such tensor, found one"
    yield bad("both-with-uncond", both_passes, expected)
    nameless = preset().remove(f"{UP}.v_aes").put(".v_aes", tensor(C, 2))
    nameless.set("vmix.ldm_names", {DOWN: "a", "": "b"})
    expected = (
        "metadata `vmix.ldm_names`: expected a name of its own per layer, found a layer without"
    )
    yield bad("layer-without-name", nameless, expected)
    expected = "metadata `vmix.kind`: expected `preset`, found `init`"
    yield bad("as-init", preset().set("vmix.kind", "init"), expected)
    large = preset().set("vmix.context_tokens", "4096")
    expected = f"tensor `{DOWN}.v_aes`: expected shape [4096, 4], found shape [2, 4]"
    yield bad("context-tokens", large, expected)
    cut = preset().file()[:-1]
    yield "preset-truncated", "preset", cut, "not a safetensors file: incomplete metadata"


def inits() -> Iterator[Case]:
    """Init files that do not hold what they say."""

    def bad(name: str, parts: Parts, expected: str) -> Case:
        return f"init-{name}", "init", parts.file(), expected

    features = "tensor `aes_emb`: expected"
    for name, made, expected in [
        ("rank", tensor(N * 2 * D), f"{features} shape [2, 2, d], found shape [12]"),
        ("labels", tensor(N - 1, 2, D), f"{features} shape [2, 2, 3], found shape [1, 2, 3]"),
        ("one", tensor(N, 1, D), f"{features} shape [2, 2, 3], found shape [2, 1, 3]"),
        ("width-0", tensor(N, 2, 0), f"{features} shape [2, 2, d], found shape [2, 2, 0]"),
        ("nan", filled(NAN, N, 2, D), f"{features} finite values, found NaN"),
        ("infinite", filled(INFINITY, N, 2, D, dtype="F16"), f"{features} finite values, found"),
    ]:
        yield bad(f"aes-emb-{name}", init().put("aes_emb", made), expected)
    yield bad(
        "missing-aes-emb", init().remove("aes_emb"), f"{features} a tensor, found no such tensor"
    )
    for extra in ["x", "profile", "attention", rows_of(UP), f"{UP}.v_aes"]:
        expected = f"tensor `{extra}`: expected no such tensor, found one"
        yield bad(f"extra-{short(extra)}", init().put(extra, tensor(C, 2)), expected)
    for missing, expected in [
        ("vmix.base", "metadata `vmix.base`: expected one of sd15, sdxl, other"),
        ("vmix.labels", "metadata `vmix.labels`: expected a JSON list of labels"),
        ("vmix.context_tokens", "metadata `vmix.context_tokens`: expected a whole number"),
        ("vmix.ldm_names", "metadata `vmix.ldm_names`: expected a JSON object"),
    ]:
        name = missing.removeprefix("vmix.").replace("_", "-")
        yield bad(f"missing-{name}", init().unset(missing), expected)
    own = "metadata `vmix.ldm_names`: expected a name of its own per layer, found"
    for name, value, expected in [
        ("empty", {}, "metadata `vmix.ldm_names`: expected at least one layer, found none"),
        ("same", {DOWN: "a", UP: "a"}, f"{own} `a` for two layers"),
        ("nul", LDM | {UP: "a\0b"}, f'{own} "a\\0b", with a NUL character'),
        ("layer-nul", LDM | {"a\0b": "c"}, f'{own} "a\\0b", with a NUL character'),
        ("list", [DOWN, UP], "metadata `vmix.ldm_names`: expected a JSON object"),
    ]:
        yield bad(f"ldm-names-{name}", init().set("vmix.ldm_names", value), expected)
    expected = "metadata `vmix.kind`: expected `init`, found `preset`"
    yield bad("as-preset", init().set("vmix.kind", "preset"), expected)
    tokens = sd15_init().set("vmix.context_tokens", "76")
    expected = "metadata `vmix.context_tokens`: expected `77`, as in every sd15 U-Net, found `76`"
    yield bad("sd15-context-tokens", tokens, expected)
    narrow = sd15_init().put("aes_emb", zeros(N, 2, 767))
    wide = f"{features} width 768, as in every sd15 U-Net, found 767"
    yield bad("sd15-context-dim", narrow, wide)
    other = sd15_init().set("vmix.base", "sdxl")
    wide = f"{features} width 2048, as in every sdxl U-Net, found 768"
    yield bad("sdxl-context-dim", other, wide)
    cut = init().file()[:-1]
    yield "init-truncated", "init", cut, "not a safetensors file: incomplete metadata"


MAKERS: list[Callable[[], Iterator[Case]]] = [
    headers,
    entries,
    valid,
    tensors,
    layers,
    metadata,
    rows,
    made,
    labels,
    presets,
    inits,
]


def main() -> None:
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    # A folder is no file.
    table = [(".", opened, "is a directory") for opened in ("adapter", "preset", "init")]
    for maker in MAKERS:
        for name, opened, content, expected in maker():
            path = FOLDER / f"{name}.safetensors"
            assert not path.exists(), name
            path.write_bytes(content)
            table.append((path.name, opened, expected))
    lines = "".join("\t".join(line) + "\n" for line in table)
    (FOLDER / "expected.tsv").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
