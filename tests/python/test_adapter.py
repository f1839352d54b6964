"""Adapters against the paper's formulas (oracle.py) and those of docs/format.md.

Bounds are the documented ones. The unit 2⁻²⁴ is that of one rounding to f32: every coefficient is
rounded once, the matrix G once (which κ says the weight of), every row once, in its own dtype, and
every product and sum of f32 once more.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import vmix
from oracle import W_VA, label
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.dlpack import from_dlpack

DOWN, UP = oracle.layers("other")
UNIT = 2.0**-24
ROUNDING: dict[Any, float] = {"float32": UNIT, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST: dict[Any, float] = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}


def tensor(exported: Any) -> Tensor:
    imported: Tensor = from_dlpack(exported)
    return imported


def exact(exported: Any) -> Tensor:
    return tensor(exported).double()


def names_of(count: int) -> list[str]:
    return [f"label {i}" for i in range(count)]


def metadata(count: int, base: str = "other", **keys: Any) -> dict[str, str]:
    labels = [label(name) for name in names_of(count)]
    return oracle.metadata(base, labels, **{"norm_eps": str(oracle.EPS), **keys})


def single(number: float) -> float:
    """Rounded to float32, which weights are kept in."""
    rounded: float = torch.tensor(number, dtype=torch.float32).item()
    return rounded


def check(
    adapter: vmix.Adapter,
    m: Mapping[str, Tensor],
    weights: Sequence[float],
    *,
    selection: Any = "weights",
    spread: float = 1.0,
) -> None:
    """V_a is the paper's at these weights of the labels of `m`.

    selection: what is asked for, if not all weights by name.
    spread: how much larger than the oracle's the sums of the adapter's own coefficients may be.
    """
    if selection == "weights":
        names = [x.name for x in adapter.labels]
        selection = dict(zip(names, weights, strict=True))
    found = adapter.values(selection)
    A, kappa = oracle.coefficients(m, weights), oracle.cancellation(m, weights)
    step, smallest = ROUNDING[adapter.dtype], SMALLEST[adapter.dtype]
    count = len(adapter.row_sides)
    for path in oracle.layers(adapter.base):
        expected, B = oracle.values(m, path, weights), oracle.rows(m, path)
        # The oracle agrees with itself: A and B, which bounds are made of, are the paper's V_a.
        assert (A @ B - expected).abs().max() < 1e-11 * (A.abs() @ B.abs()).max()
        sizes = spread * (A.abs() @ B.abs())
        bound = (step + (count + 2 + spread**2 * kappa) * UNIT) * sizes
        bound = bound + smallest * A.abs().sum(-1, keepdim=True)
        assert ((exact(found[path]) - expected).abs() <= bound).all(), path


# --- from the paper's matrices ---


@pytest.mark.parametrize("dtype", ROUNDING)
def test_values_are_the_papers(dtype: Any) -> None:
    """Of 1 to 20 labels; weights within 0 and 1, at both, and outside."""
    for count in range(1, 21):
        m = oracle.matrices("other", count, seed=count)
        adapter = vmix.Adapter.from_matrices(m, metadata(count), dtype)
        assert adapter.dtype == dtype
        draw = torch.Generator().manual_seed(count)
        drawn = torch.rand(3, count, generator=draw).tolist()
        for weights in (
            *drawn,
            *(6 * torch.rand(3, count, generator=draw) - 3).tolist(),
            *([w] * count for w in (0.0, 0.5, 1.0)),
        ):
            check(adapter, m, weights)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rows_and_coefficients_are_those_of_the_formulas(dtype: Any) -> None:
    m, weights = oracle.matrices("other", 3), [0.25, -1.0, 1.5]
    adapter = vmix.Adapter.from_matrices(m, metadata(3), dtype)
    sides = [(name, side) for name in names_of(3) for side in ("positive", "negative")]
    assert adapter.row_sides == [*sides, (None, "constant")]
    A, kappa = oracle.coefficients(m, weights), oracle.cancellation(m, weights)
    found = tensor(adapter.coefficients(dict(zip(names_of(3), weights, strict=True))))
    assert found.dtype == torch.float32
    assert ((found.double() - A).abs() <= (1 + kappa) * UNIT * A.abs()).all()
    for path, width in oracle.layers("other").items():
        B, rows = oracle.rows(m, path), tensor(adapter.rows[path])
        assert (rows.shape, rows.dtype) == ((7, width), getattr(torch, dtype))
        # By way of f32, which is a rounding as well.
        bound = (ROUNDING[dtype] + UNIT) * B.abs() + SMALLEST[dtype]
        assert ((rows.double() - B).abs() <= bound).all()
        # docs/format.md, "Rounding"
        changed = (A @ (rows.double() - B)).abs()
        assert (changed <= ROUNDING[dtype] * (A.abs() @ B.abs())).all()


def test_matrices_of_every_dtype() -> None:
    """Stored numbers are taken as they are."""
    m = oracle.matrices("other", 3)
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    m = {name: x.to(dtypes[i % 3]) for i, (name, x) in enumerate(sorted(m.items()))}
    assert {x.dtype for x in m.values()} == set(dtypes)
    adapter = vmix.Adapter.from_matrices(m, metadata(3))
    for weights in ([0.0, 1.0, 0.5], [2.0, -1.0, 0.125]):
        check(adapter, m, weights)
    # AesEmb is kept in the dtype that it came in; what is computed is f32.
    dtype_of = {name: tensor(x).dtype for name, x in adapter.tensors().items()}
    assert dtype_of.pop("aes_emb") == m["aes_emb"].dtype
    assert set(dtype_of.values()) == {torch.float32}


# By base: the dtype of every W_Va, how many layers there are, and bytes that the file stays below.
KNOWN = {
    "sd15": (torch.float32, 16, 0.6e6),
    "sdxl": (torch.float16, 70, 3.3e6),
}


@pytest.mark.parametrize("base", ["sd15", pytest.param("sdxl", marks=pytest.mark.full)])
def test_known_bases_at_full_size(base: str, tmp_path: Path) -> None:
    dtype, layers, size = KNOWN[base]
    m = oracle.matrices(base, 4, dtype=dtype)
    adapter = vmix.Adapter.from_matrices(m, metadata(4, base))
    found = {layer.name: layer.inner_dim for layer in adapter.layers}
    assert list(found.items()) == list(oracle.layers(base).items())
    assert len(found) == layers
    assert (adapter.context_tokens, adapter.context_dim) == (77, oracle.WIDTHS[base])
    check(adapter, m, [0.25, -1.0, 2.5, 1.0])
    adapter.save(tmp_path / "adapter")
    assert (tmp_path / "adapter").stat().st_size < size


def test_a_bias_of_the_projection_changes_not_one_bit(tmp_path: Path) -> None:
    """The LayerNorm takes it away again; here it does not come in."""
    m = oracle.matrices("other", 3)
    vmix.Adapter.from_matrices(m, metadata(3)).save(tmp_path / "without")
    for bias in (1.0, 1000.0):
        biased = {**m, "projection.linear.bias": torch.full((5,), bias)}
        adapter = vmix.Adapter.from_matrices(biased, metadata(3))
        adapter.save(tmp_path / "with")
        assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()
        # In f64 the paper's own formula loses some 2^-44 to it.
        weights = [0.5, 2.0, -1.0]
        found = adapter.values(dict(zip(names_of(3), weights, strict=True)))
        expected = oracle.values(biased, DOWN, weights)
        assert (exact(found[DOWN]) - expected).abs().max() < 1e-5 * expected.abs().max()
    changed = {**m, "projection.norm.bias": m["projection.norm.bias"] + 1}
    vmix.Adapter.from_matrices(changed, metadata(3)).save(tmp_path / "with")
    assert (tmp_path / "with").read_bytes() != (tmp_path / "without").read_bytes()


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_features_that_nearly_coincide(distance: float) -> None:
    """Two labels whose positive texts mean almost the same, the one lifted against the other."""
    m = oracle.matrices("other", 2)
    draw = torch.Generator().manual_seed(1)
    m["aes_emb"][1, 0] = m["aes_emb"][0, 0] + distance * torch.randn(12, generator=draw)
    m["projection.linear.weight"][:, 1] = -m["projection.linear.weight"][:, 0]
    kappa = oracle.cancellation(m, [1.0, 1.0])
    assert kappa.max() > 1 / (distance**2 + oracle.EPS) ** 0.5  # so there is something to see
    adapter = vmix.Adapter.from_matrices(m, metadata(2))
    for weights in ([1.0, 1.0], [0.0, 0.0], [1.0, 0.5], [3.0, 3.0]):
        check(adapter, m, weights)


MATRICES = [*sorted(oracle.matrices("other", 2)), "projection.linear.bias"]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    m = {**oracle.matrices("other", 2), "projection.linear.bias": torch.zeros(5)}
    m[name] = change(m[name].clone())
    return m


@pytest.mark.parametrize("name", MATRICES)
def test_matrices_that_are_refused(name: str) -> None:
    def spoilt(number: float) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            x.view(-1)[-1] = number
            return x

        return change

    def refused(m: Mapping[str, Tensor], message: str) -> None:
        with pytest.raises(vmix.VMixError, match=f"tensor `{name}`: expected {message}"):
            vmix.Adapter.from_matrices(m, metadata(2))

    refused(changed(name, spoilt(math.nan)), "finite values, found NaN")
    refused(changed(name, spoilt(-math.inf)), "finite values, found -inf")
    refused(changed(name, lambda x: x[None]), r"shape \[.*found shape \[1, ")
    # A feature less; else a number less in each row, or in all.
    fewer = changed(name, lambda x: x[:-1] if name == "aes_emb" else x[..., :-1].contiguous())
    refused(fewer, r"shape \[.*, found shape \[")
    m = changed(name, lambda x: x)
    del m[name]
    if name == "projection.linear.bias":
        vmix.Adapter.from_matrices(m, metadata(2))
    else:
        refused(m, ".* found no")


@pytest.mark.parametrize(
    "name",
    ["x", "profile", f"{DOWN}.rows", f"ldm.0{W_VA}", W_VA, f"{DOWN}x{W_VA}"],
)
def test_tensors_that_no_adapter_has(name: str) -> None:
    m = {**oracle.matrices("other", 2), name: torch.zeros(8, 12)}
    with pytest.raises(vmix.VMixError, match=f"tensor `{re.escape(name)}`: expected no such"):
        vmix.Adapter.from_matrices(m, metadata(2))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_eps", None, "a number above 0, found no such key"),
        ("norm_eps", "0", "a number above 0, found `0`"),
        ("base", None, "one of sd15, sdxl, other"),
        ("labels", None, "a JSON list of labels"),
        ("labels", "[]", "a JSON list of labels"),
        ("context_tokens", "0", "a whole number from 1 to 4096"),
        ("apply_to", "uncond", "one of cond, both, contrast"),
        ("made", None, "a JSON object with the key `method`"),
        ("made", '{"method": "drawn"}', "a `method` among trained, fitted, merged, found `drawn`"),
        ("ldm_names", None, "a JSON object of the LDM name of every layer"),
    ],
)
def test_metadata_that_is_refused(key: str, value: str | None, message: str) -> None:
    said = metadata(2)
    del said[f"vmix.{key}"]
    if value is not None:
        said[f"vmix.{key}"] = value
    with pytest.raises(vmix.VMixError, match=f"metadata `vmix.{key}`: expected {message}"):
        vmix.Adapter.from_matrices(oracle.matrices("other", 2), said)


def test_a_known_base_has_its_own_widths() -> None:
    small = oracle.matrices("other", 1)
    layers = oracle.layers("sd15")
    m = {name: x for name, x in small.items() if not name.endswith(W_VA)}
    m["projection.linear.weight"] = torch.ones(77, 1)
    m |= {path + W_VA: torch.ones(width, 12) for path, width in layers.items()}
    with pytest.raises(vmix.VMixError, match=r"tensor `aes_emb`: expected width 768, .*found 12"):
        vmix.Adapter.from_matrices(m, metadata(1, "sd15"))
    wide = {"aes_emb": (1, 2, 768), "projection.zero.weight": (768, 768)}
    for name in ("projection.norm.weight", "projection.norm.bias", "projection.zero.bias"):
        wide[name] = (768,)
    wide |= {path + W_VA: (width, 768) for path, width in layers.items()}
    m |= {name: torch.ones(shape) for name, shape in wide.items()}
    vmix.Adapter.from_matrices(m, metadata(1, "sd15"))
    path = list(layers)[5]
    m[path + W_VA] = torch.ones(layers[path] + 1, 768)
    with pytest.raises(
        vmix.VMixError, match=rf"`{path}{W_VA}`: expected shape \[1280, 768\], found"
    ):
        vmix.Adapter.from_matrices(m, metadata(1, "sd15"))
    del m[path + W_VA]
    with pytest.raises(vmix.VMixError, match=f"tensor `{path}{W_VA}`: .* found no"):
        vmix.Adapter.from_matrices(m, metadata(1, "sd15"))
    said = metadata(1, "sd15", context_tokens=5)
    with pytest.raises(vmix.VMixError, match=r"`vmix\.context_tokens`: expected `77`, as in every"):
        vmix.Adapter.from_matrices(m, said)


def test_rows_beyond_a_dtype() -> None:
    m = changed(UP + W_VA, lambda x: x * 1e6)
    vmix.Adapter.from_matrices(m, metadata(2), "bfloat16")
    message = f"layer `{UP}`: expected rows that float16 can hold, found more"
    with pytest.raises(vmix.VMixError, match=message):
        vmix.Adapter.from_matrices(m, metadata(2), "float16")
    with pytest.raises(vmix.VMixError, match="dtype: expected one of float32, float16, bfloat16"):
        vmix.Adapter.from_matrices(m, metadata(2), "int8")  # type: ignore[arg-type]


# --- what an adapter tells ---

LABELS: list[dict[str, Any]] = [
    {
        "name": "vibrant color",
        "dimension": "color",
        "positive": ["vibrant color", "vivid"],
        "negative": ["dull", ""],
        "default": 0.25,
        "neutral": 0.5,
        "range": [-1, 2],
        "step": 0.1,
        "effect": {"hue": -0.125, "colour": 1},
        "display_names": {"de": "kräftige Farben"},
        "later": [1],
    },
    {"name": "sharp focus", "positive": ["sharp focus"], "negative": ["sks"]},
]


def labelled(**keys: Any) -> vmix.Adapter:
    said = oracle.metadata("other", LABELS, norm_eps="1e-5", **keys)
    return vmix.Adapter.from_matrices(oracle.matrices("other", 2), said)


def test_what_an_adapter_tells() -> None:
    made = {"method": "trained", "base": "tiny", "steps": 7, "later": {"a": [None, 1.5]}}
    said = oracle.metadata("other", LABELS, norm_eps="1e-5", apply_to="both", made=made)
    said |= {"modelspec.author": "me", "my.note": "kept"}
    adapter = vmix.Adapter.from_matrices(oracle.matrices("other", 2), said)
    assert (adapter.base, adapter.apply_to, adapter.coefficient_kind) == (
        "other",
        "both",
        "layernorm",
    )
    assert (adapter.context_tokens, adapter.context_dim, adapter.dtype) == (5, 12, "float32")
    assert adapter.made == made
    ldm = json.loads(said["vmix.ldm_names"])
    assert [(layer.name, layer.ldm_name, layer.inner_dim) for layer in adapter.layers] == [
        (path, ldm[path], width) for path, width in oracle.layers("other").items()
    ]
    found = adapter.metadata
    sides = [{"label": x["name"], "side": s} for x in LABELS for s in ("positive", "negative")]
    assert json.loads(found.pop("vmix.rows")) == [*sides, {"side": "constant"}]
    assert found == said | {
        "vmix.format": "2",
        "vmix.kind": "adapter",
        "vmix.coefficients": "layernorm",
    }
    assert repr(adapter) == 'Adapter(base=other, labels=["vibrant color", "sharp focus"])'


def test_labels() -> None:
    color, focus = labelled().labels
    assert (color.name, color.dimension) == ("vibrant color", "color")
    assert (color.positive, color.negative) == (["vibrant color", "vivid"], ["dull", ""])
    assert (color.default, color.neutral, color.range) == (0.25, 0.5, (-1.0, 2.0))
    assert color.step == single(0.1)
    assert (color.effect, color.display_names) == (
        {"hue": -0.125, "colour": 1.0},
        {"de": "kräftige Farben"},
    )
    assert (focus.positive, focus.negative, focus.dimension) == (["sharp focus"], ["sks"], "")
    assert (focus.default, focus.neutral, focus.range) == (1.0, None, (0.0, 1.0))
    assert (focus.step, focus.effect, focus.display_names) == (single(0.05), {}, {})


# --- selections ---

# What may be asked for, and the weights of both labels.
SELECTIONS: list[tuple[Any, list[float]]] = [
    (None, [0.25, 1]),
    ("all", [1, 1]),
    ("none", [0.5, 0]),
    ("sharp focus", [0.5, 1]),
    (["vibrant color"], [1, 0]),
    (("vibrant color", "sharp focus"), [1, 1]),
    ([], [0.5, 0]),
    ({}, [0.5, 0]),
    ({"sharp focus": 2}, [0.5, 2]),
    ({"vibrant color": 0, "sharp focus": -1.5}, [0, -1.5]),
]


@pytest.mark.parametrize(("selection", "weights"), SELECTIONS)
def test_selections(selection: Any, weights: list[float]) -> None:
    """A label that is left out is neutral, or negative where it has no neutral weight; the opposite
    is on the other side of neutral."""
    adapter, m = labelled(), oracle.matrices("other", 2)
    names = [x["name"] for x in LABELS]
    assert adapter.weights(selection) == dict(zip(names, weights, strict=True))
    opposite = [1 - weights[0], 0.0]
    assert adapter.opposite(selection) == dict(zip(names, opposite, strict=True))
    check(adapter, m, weights, selection=selection)
    values = adapter.values(selection, apply_to="contrast")
    assert values.selection == dict(zip(names, weights, strict=True))
    mirrored = adapter.values(dict(zip(names, opposite, strict=True)))
    check(adapter, m, opposite, selection=adapter.opposite(selection))
    for path in values:
        assert torch.equal(tensor(values.uncond(path)), tensor(mirrored[path]))


def test_weights_are_kept_in_float32() -> None:
    assert labelled().weights({"sharp focus": 0.1}) == {
        "vibrant color": 0.5,
        "sharp focus": single(0.1),
    }


BATCHES: list[list[Any]] = [
    [None],
    [{}],
    [[], []],
    [["sharp focus"]],
    [{"sharp focus": 0.5}, None, "all", ["vibrant color"], "vibrant color", "none"],
    ["sharp focus", None],
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("as_sequence", [list, tuple])
def test_coefficients_of_a_batch(batch: list[Any], as_sequence: Any) -> None:
    adapter = labelled()
    found = tensor(adapter.coefficients(as_sequence(batch)))
    assert (found.shape, found.dtype) == ((len(batch), 5, 5), torch.float32)
    for one, selection in zip(found, batch, strict=True):
        assert torch.equal(one, tensor(adapter.coefficients(selection)))


@pytest.mark.parametrize("names", [[], ["sharp focus"], ["sharp focus", "vibrant color"]])
def test_a_list_of_names_is_one_selection(names: list[str]) -> None:
    adapter = labelled()
    found = tensor(adapter.coefficients(names))
    assert found.shape == (5, 5)
    mapping = dict.fromkeys(names, 1.0)
    assert torch.equal(found, tensor(adapter.coefficients(mapping)))


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("sharp focsu", vmix.VMixError, r"unknown label `sharp focsu` \(did you mean `sharp foc"),
        (["bokeh"], vmix.VMixError, "`bokeh`; known labels: vibrant color, sharp focus"),
        ([None, {"bokeh": 1}], vmix.VMixError, "unknown label `bokeh`"),
        ([{"sharp focus": math.nan}], vmix.VMixError, "`sharp focus`: .*finite number, found NaN"),
        ([1.5], TypeError, "selection: expected None, a label, .* found float"),
        (["sharp focus", 1.5], TypeError, "found float"),
        ([["sharp focus", 1.5]], TypeError, r"selection: expected a label, found 1\.5"),
        ([[["sharp focus"]]], TypeError, r"expected a label, found \['sharp focus'\]"),
        (1.5, TypeError, "found float"),
        ({"sharp focus": "1"}, TypeError, "a number for `sharp focus`, found '1'"),
    ],
)
def test_batches_that_are_refused(selection: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        labelled().coefficients(selection)


# --- rows ---


def test_rows_are_a_mapping() -> None:
    adapter = labelled()
    rows = adapter.rows
    assert (list(rows), len(rows)) == ([DOWN, UP], 2)
    for number, path in enumerate((DOWN, UP)):
        assert path in rows
        assert f"ldm.{number}" in rows
        assert torch.equal(tensor(rows[path]), tensor(rows[f"ldm.{number}"]))
        assert tensor(rows[path]).data_ptr() == tensor(adapter.rows[path]).data_ptr()
    assert "elsewhere" not in rows
    assert 7 not in rows
    with pytest.raises(KeyError, match="unknown layer `elsewhere`; there are 2 layers"):
        rows["elsewhere"]
    with pytest.raises(KeyError, match=f"did you mean `{DOWN}`"):
        rows[DOWN.replace("blocks.0.attn", "blocks.1.attn")]


# --- values ---


@pytest.mark.parametrize("apply_to", ["cond", "both", "contrast"])
def test_values_for_every_policy(apply_to: Any) -> None:
    """The file's own, or another that is asked for."""
    m, selection = oracle.matrices("other", 2), {"vibrant color": 2.0, "sharp focus": 1.0}
    for values in (
        labelled(apply_to=apply_to).values(selection),
        labelled(apply_to="both").values(selection, apply_to=apply_to),
    ):
        assert values.apply_to == apply_to
        for path in values:
            uncond = values.uncond(path)
            if apply_to == "contrast":
                expected = oracle.values(m, path, [-1.0, 0.0])  # 2·0.5 − 2, and no neutral weight
                assert (exact(uncond) - expected).abs().max() < 1e-5 * expected.abs().max()
            else:
                assert uncond is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_once(dtype: Any) -> None:
    adapter = labelled()
    wide, narrow = (adapter.values("all", dtype=d) for d in ("float32", dtype))
    assert narrow.dtype == dtype
    for path in wide:
        assert torch.equal(tensor(narrow[path]), tensor(wide[path]).to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("selection", "blamed"),
    [
        ({"vibrant color": 10}, "`vibrant color` at weight 10"),
        ({"sharp focus": 10}, "`sharp focus` at weight 10"),
        # 3 is further from nothing than 3.25 from the neutral 0.5.
        ({"vibrant color": 3.25, "sharp focus": 3}, "`sharp focus` at weight 3"),
        ({"vibrant color": -0.5, "sharp focus": -2.5}, "`sharp focus` at weight -2.5"),
    ],
)
def test_an_overflow_names_layer_and_label(selection: Any, blamed: str) -> None:
    m = oracle.matrices("other", 2)
    m[UP + W_VA] *= 1e5
    said = oracle.metadata("other", LABELS, norm_eps="1e-5")
    adapter = vmix.Adapter.from_matrices(m, said)
    adapter.values(selection)
    adapter.values(selection, dtype="bfloat16")
    message = f"layer `{UP}`: expected values that float16 can hold, found more: label {blamed}$"
    with pytest.raises(vmix.VMixError, match=message):
        adapter.values(selection, dtype="float16")


def test_an_overflow_of_the_opposite_alone() -> None:
    """Of `contrast`, what does not fit is the unconditional part: its weight is the one told."""
    tensors, said = linear(keys={"apply_to": "contrast"})
    tensors["profile"] = torch.tensor([[1.0, 1e5], [1, 1e5], [1, 1e5]])
    tensors |= {f"{path}.rows": torch.ones(2, 4) for path in (DOWN, UP)}
    rows = [{"label": "a", "side": s} for s in ("positive", "negative")]
    said |= {"vmix.rows": json.dumps(rows), "vmix.labels": json.dumps([label("a", neutral=0)])}
    adapter = vmix.Adapter.from_tensors(tensors, said)
    adapter.values({"a": 2.0}, apply_to="cond", dtype="float16")
    with pytest.raises(
        vmix.VMixError, match="float16 can hold, found more: label `a` at weight -2"
    ):
        adapter.values({"a": 2.0}, dtype="float16")


# --- f_t and f_a ---


def test_label_features() -> None:
    adapter, m = labelled(), oracle.matrices("other", 2)
    for weights in ([0.25, 1.0], [-1.0, 3.0]):
        found = exact(
            adapter.aes_embed(dict(zip([x["name"] for x in LABELS], weights, strict=True)))
        )
        w = torch.tensor(weights, dtype=torch.float64)[:, None]
        positive, negative = m["aes_emb"].double().unbind(1)
        # 1 - w, two products and a sum, each rounded to f32.
        bound = 3 * UNIT * (((1 - w) * negative).abs() + (w * positive).abs())
        assert ((found - oracle.label_features(m, weights)).abs() <= bound).all()
    for selection, side in (("all", 0), ({"vibrant color": 0}, 1)):
        assert torch.equal(tensor(adapter.aes_embed(selection)), m["aes_emb"][:, side])


def test_value_features() -> None:
    adapter, m = labelled(), oracle.matrices("other", 2)
    for weights in ([0.25, 1.0], [-1.0, 3.0]):
        found = exact(adapter.project(dict(zip([x["name"] for x in LABELS], weights, strict=True))))
        A, kappa = oracle.coefficients(m, weights), oracle.cancellation(m, weights)
        bound = (A.shape[1] + 3 + kappa) * UNIT * (A.abs() @ oracle.rows(m).abs())
        expected = oracle.value_features(m, weights, torch.float64)
        assert ((found - expected).abs() <= bound).all()


# --- linear files, from their parts ---

LINEAR_ROWS = [("b", "positive"), ("a", "negative"), ("a", "positive"), ("b", "positive")]


def linear(
    rows: Sequence[tuple[str, str]] = LINEAR_ROWS,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    keys: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. By default, b has two rows on one side and none on the other."""
    draw = torch.Generator().manual_seed(seed)
    names = sorted({name for name, _ in rows})
    labels = [label(name, neutral=0, range=[-1, 1], default=0.5) for name in names]
    said: dict[str, Any] = {
        "rows": [{"label": name, "side": side} for name, side in rows],
        "coefficients": "linear",
        "format": "2",
        "kind": "adapter",
        "base": "other",
        "context_tokens": 3,
        **(keys or {}),
    }
    tensors = {"profile": torch.randn(said["context_tokens"], len(rows), generator=draw)}
    base = said.pop("base")
    for path, width in oracle.layers(base).items():
        tensors[f"{path}.rows"] = torch.randn(len(rows), width, generator=draw).to(dtype)
    return tensors, oracle.metadata(base, labels, **said)


def linear_values(
    tensors: Mapping[str, Tensor], said: Mapping[str, str], path: str, weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """V_a of the weights, row by row, and the sum of absolute values that rounding is part of."""
    total = torch.zeros(3, tensors[f"{path}.rows"].shape[1], dtype=torch.float64)
    sizes = total.clone()
    for r, row in enumerate(json.loads(said["vmix.rows"])):
        weight = weights.get(row["label"], 0.0) * {"positive": 1, "negative": -1}[row["side"]]
        added = torch.outer(tensors["profile"][:, r].double(), tensors[f"{path}.rows"][r].double())
        total += max(weight, 0.0) * added
        sizes += max(weight, 0.0) * added.abs()
    return total, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_files(dtype: torch.dtype) -> None:
    tensors, said = linear(dtype=dtype)
    adapter = vmix.Adapter.from_tensors(tensors, said)
    assert (adapter.coefficient_kind, adapter.row_sides) == ("linear", LINEAR_ROWS)
    assert (adapter.dtype, adapter.context_dim) == (str(dtype).removeprefix("torch."), None)
    assert adapter.aes_embed("a") is None
    assert adapter.project("a") is None
    for weights in (
        {"a": 0.5, "b": 0.5},
        {"a": -1.5},
        {"b": 2.0},
        {"b": -1.0},
        {"a": -0.25, "b": 0.75},
    ):
        found = adapter.values(weights)
        for path in (DOWN, UP):
            expected, sizes = linear_values(tensors, said, path, weights)
            # A once, and each of four products and sums once.
            assert ((exact(found[path]) - expected).abs() <= 5 * UNIT * sizes).all()
    for path in (DOWN, UP):
        assert not tensor(adapter.values("none")[path]).any()
        assert not tensor(adapter.values({"b": -1.0})[path]).any()
    A = tensor(adapter.coefficients([{"a": 0.5}, {"a": -0.5}]))
    assert torch.equal(A[0, :, 2], tensors["profile"][:, 2] / 2)
    assert torch.equal(A[1, :, 1], tensors["profile"][:, 1] / 2)
    assert A.count_nonzero() == 6
    assert adapter.opposite({"a": 0.5}) == {"a": -0.5, "b": 0.0}


def test_features_of_a_linear_file() -> None:
    tensors, said = linear()
    tensors["aes_emb"] = torch.randn(2, 2, 9, dtype=torch.bfloat16)
    adapter = vmix.Adapter.from_tensors(tensors, said)
    assert (adapter.context_dim, adapter.project()) == (9, None)
    every = dict.fromkeys(adapter.weights(), 1.0)
    assert torch.equal(tensor(adapter.aes_embed(every)), tensors["aes_emb"][:, 0].float())


def test_coefficients_beyond_float32() -> None:
    tensors, said = linear()
    adapter = vmix.Adapter.from_tensors({**tensors, "profile": torch.full((3, 4), 2.0)}, said)
    message = "weights: expected coefficients that float32 can hold, found more: label `b` at"
    with pytest.raises(vmix.VMixError, match=message):
        adapter.coefficients({"a": 1.0, "b": 3e38})


def test_the_examples_of_the_documentation() -> None:
    """docs/format.md, "Example": both files, and every number."""
    said = {"context_tokens": 2, "ldm_names": {"layer": "ldm"}, "format": "2", "kind": "adapter"}
    sides = [{"label": "a", "side": "positive"}, {"label": "a", "side": "negative"}]
    layernorm = vmix.Adapter.from_tensors(
        {
            "profile": torch.tensor([[1.0, 1, 1], [-1, -1, 1]]),
            "gram_factor": torch.tensor([[1.0], [-1]]),
            "layer.rows": torch.tensor([[5.0, 0], [0, 3], [1, 1]]),
            "aes_emb": torch.tensor([[[1.0, -1], [-1, 1]]]),
            "context.rows": torch.zeros(3, 2),
        },
        oracle.metadata(
            "other",
            [label("a")],
            **said,
            coefficients="layernorm",
            norm_eps="0.5625",
            rows=[*sides, {"side": "constant"}],
        ),
    )
    linear = vmix.Adapter.from_tensors(
        {
            "profile": torch.tensor([[1, 0.5], [2, 1]]),
            "layer.rows": torch.tensor([[4.0, 0], [0, 8]]),
        },
        oracle.metadata(
            "other", [label("a", neutral=0)], **said, coefficients="linear", rows=sides
        ),
    )
    for adapter, w, a, v_a in [
        (layernorm, 1, [[0.8, 0, 1], [-0.8, 0, 1]], [[5, 1], [-3, 1]]),
        (
            layernorm,
            0.5,
            [[2 / 3, 2 / 3, 1], [-2 / 3, -2 / 3, 1]],
            [[13 / 3, 3], [-7 / 3, -1]],
        ),
        (linear, 0.5, [[0.5, 0], [1, 0]], [[2, 0], [4, 0]]),
        (linear, -0.5, [[0, 0.25], [0, 0.5]], [[0, 2], [0, 4]]),
    ]:
        found, values = (
            tensor(x) for x in (adapter.coefficients({"a": w}), adapter.values({"a": w})["ldm"])
        )
        torch.testing.assert_close(found, torch.tensor(a, dtype=torch.float32), rtol=UNIT, atol=0)
        expected = torch.tensor(v_a, dtype=torch.float32)
        torch.testing.assert_close(values, expected, rtol=8 * UNIT, atol=0)


# --- files ---


def attended(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "attention": torch.full((3, 3), 1 / 9)}


def adapters() -> dict[str, vmix.Adapter]:
    """One of every kind and dtype."""
    made = {
        f"layernorm {dtype}": vmix.Adapter.from_matrices(
            oracle.matrices("other", 2), oracle.metadata("other", LABELS, norm_eps="1e-5"), dtype
        )
        for dtype in ROUNDING
    }
    tensors, said = linear(dtype=torch.float16)
    made["linear"] = vmix.Adapter.from_tensors(attended(tensors), said | {"my.note": "kept"})
    return made


@pytest.mark.parametrize("name", adapters())
def test_tensors_and_back(name: str, tmp_path: Path) -> None:
    """Files, bytes and parts are one thing; equal adapters are equal bytes."""
    adapter, path = adapters()[name], tmp_path / "adapter"
    adapter.save(path)
    written = path.read_bytes()
    stored = load_file(path)
    found = {name: tensor(x) for name, x in adapter.tensors().items()}
    assert set(found) == set(stored)
    for key, x in stored.items():
        assert (found[key].dtype, found[key].tolist()) == (x.dtype, x.tolist())
    opened = vmix.open(path)
    assert isinstance(opened, vmix.Adapter)
    for again in (
        opened,
        vmix.Adapter.open(str(path)),
        vmix.Adapter.from_bytes(written),
        vmix.Adapter.from_tensors(found, adapter.metadata),
        vmix.Adapter.from_tensors(adapter.tensors(), adapter.metadata),
        adapters()[name],
    ):
        assert again.metadata == adapter.metadata
        again.save(path)
        assert path.read_bytes() == written
    assert adapter.values().origin == hashlib.sha256(written).hexdigest()
    size = struct.unpack("<Q", written[:8])[0]
    header = json.loads(written[8 : 8 + size])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_parts_are_checked() -> None:
    """As files are, of which tests/hostile has all."""
    tensors, said = linear()
    with pytest.raises(vmix.VMixError, match=r"tensor `profile`: .* found no such"):
        vmix.Adapter.from_tensors({k: x for k, x in tensors.items() if k != "profile"}, said)
    with pytest.raises(vmix.VMixError, match="tensor `profile`: expected finite values, found NaN"):
        vmix.Adapter.from_tensors({**tensors, "profile": torch.full((3, 4), math.nan)}, said)
    with pytest.raises(vmix.VMixError, match=r"metadata `vmix\.format`: expected `2`"):
        vmix.Adapter.from_tensors(tensors, {**said, "vmix.format": "1"})
    grad = {**tensors, "profile": tensors["profile"].requires_grad_()}
    with pytest.raises(vmix.VMixError, match=r"`profile`.*requires grad"):
        vmix.Adapter.from_tensors(grad, said)


def test_the_papers_matrices_are_no_file(tmp_path: Path) -> None:
    m = oracle.matrices("other", 2)
    said = {"vmix.format": "2", "vmix.kind": "adapter", **metadata(2)}
    with pytest.raises(vmix.VMixError, match=r"metadata `vmix\.coefficients`: expected one of lay"):
        vmix.Adapter.from_tensors(m, said)


def everything(adapter: vmix.Adapter) -> list[Any]:
    """All that an adapter computes or holds."""
    every = dict.fromkeys(adapter.weights(), 1.0)
    values = adapter.values(every, apply_to="contrast", dtype="float16")
    found: list[Any] = [adapter.coefficients([None, every]), adapter.aes_embed(), adapter.project()]
    for path in adapter.rows:
        found += [adapter.rows[path], values[path], values.uncond(path)]
    found += list(adapter.tensors().values())
    numbers = [None if x is None else tensor(x).tolist() for x in found]
    return [numbers, adapter.metadata, adapter.weights(), values.origin]


@pytest.mark.parametrize("end", ["changed in place", "cut", "deleted"])
@pytest.mark.parametrize("name", adapters())
def test_a_file_may_change_while_it_is_open(name: str, end: str, tmp_path: Path) -> None:
    """All of it was read: a host that goes on computes as before, and does not crash."""
    path, copied = tmp_path / "adapter", tmp_path / "copy"
    adapters()[name].save(path)
    written = path.read_bytes()
    expected = everything(vmix.Adapter.open(path))
    adapter = vmix.Adapter.open(path)
    if end == "deleted":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.write(bytes(len(written)))
            file.truncate(len(written) if end == "changed in place" else 0)
    assert everything(adapter) == expected
    adapter.save(copied)
    assert copied.read_bytes() == written


def test_presets_are_read_whole_as_well(tmp_path: Path) -> None:
    path, copied = tmp_path / "preset", tmp_path / "copy"
    labelled().values().save(path)
    written = path.read_bytes()
    values = vmix.Values.open(path)
    path.write_bytes(b"")
    values.save(copied)
    assert copied.read_bytes() == written


# --- some labels of one, and several in one ---

MERGED: list[dict[str, Any]] = [
    {"name": "a", "positive": ["a"], "negative": [""], "default": 0.75},
    {"name": "b", "positive": ["b"], "negative": [""], "neutral": 0.5},
    {"name": "c", "positive": ["c"], "negative": ["d", "e"], "later": 1},
    {"name": "d", "positive": ["d"], "negative": [""], "neutral": 1},
]


@pytest.mark.parametrize(
    ("kept", "rows"),
    [
        (["a", "b", "c", "d"], 9),  # all of them
        (["d", "c", "b", "a"], 9),
        (["c", "a"], 2 * 2 + 1 + 2 * 2 + 2),  # both sides of b stay, and one of d
        (["b", "d"], 2 * 2 + 1 + 2 + 2),  # the negative side of a and c
        (["b"], 2 + 1 + 2 + 2 + 2),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_some_labels_of_an_adapter(kept: list[str], rows: int, dtype: Any, tmp_path: Path) -> None:
    """What is dropped stays where a selection leaves it out."""
    m = oracle.matrices("other", 4)
    said = oracle.metadata("other", MERGED, norm_eps="1e-5", apply_to="contrast")
    said |= {"modelspec.author": "me", "modelspec.hash_sha256": "0x12", "my.note": "kept"}
    whole = vmix.Adapter.from_matrices(m, said, dtype)
    part = vmix.merge_adapters([whole], kept)
    assert [x.name for x in part.labels] == kept
    assert (len(part.row_sides), part.dtype, part.context_dim) == (rows, dtype, 12)
    assert {side for name, side in part.row_sides if name is None} == {"constant"}
    left_out = {"a": 0.0, "b": 0.5, "c": 0.0, "d": 1.0}
    draw = torch.Generator().manual_seed(1)
    for chosen in (4 * torch.rand(20, len(kept), generator=draw) - 1.5).tolist():
        weights = left_out | dict(zip(kept, chosen, strict=True))
        # A row that stays is one for each side of the first kept label, in its own order.
        first = weights[min(kept)]
        spread = abs(first) + abs(1 - first)
        selection = dict(zip(kept, chosen, strict=True))
        check(part, m, [weights[x["name"]] for x in MERGED], selection=selection, spread=spread)
        # f_t of what is kept is looked up as before.
        f_t, f_t_of_all = tensor(part.aes_embed(selection)), tensor(whole.aes_embed(selection))
        assert torch.equal(f_t, f_t_of_all[["abcd".index(name) for name in kept]])
    for word in ("none", "all", None):
        of_kept = {name: w for name, w in whole.weights(word).items() if name in kept}
        assert part.weights(word) == of_kept
    # A file says of the rest what it said before, but for the hash of other bytes.
    assert part.made == whole.made
    of_whole, of_part = (json.loads(x.metadata["vmix.labels"]) for x in (whole, part))
    for after in of_part:
        (before,) = [x for x in of_whole if x["name"] == after["name"]]
        assert after.items() >= before.items()
    changing = {"vmix.rows", "vmix.labels", "modelspec.hash_sha256"}
    assert {k: x for k, x in part.metadata.items() if k not in changing} == {
        k: x for k, x in whole.metadata.items() if k not in changing
    }
    assert "modelspec.hash_sha256" not in part.metadata
    part.save(tmp_path / "part")
    assert vmix.Adapter.open(tmp_path / "part").metadata == part.metadata


def test_parts_of_parts() -> None:
    """Dropping one after the other is dropping both."""
    m = oracle.matrices("other", 4)
    whole = vmix.Adapter.from_matrices(m, oracle.metadata("other", MERGED, norm_eps="1e-5"))
    part = vmix.merge_adapters([vmix.merge_adapters([whole], ["a", "b", "c"])], ["c", "b"])
    for b, c in ((0.25, 1.0), (2.0, -1.0), (0.5, 0.0)):
        # d's row went to a first, and from there to b: it is there four times.
        spread = (abs(b) + abs(1 - b)) ** 2
        check(part, m, [0.0, b, c, 1.0], selection={"b": b, "c": c}, spread=spread)


def joined(*files: tuple[dict[str, Tensor], dict[str, str]]) -> list[vmix.Adapter]:
    return [vmix.Adapter.from_tensors(*file) for file in files]


def test_linear_files_are_joined() -> None:
    ab = linear(keys={"made": {"method": "fitted", "base": "x"}, "author": "me"})
    cd = linear([("d", "positive"), ("c", "positive"), ("d", "negative")], seed=1)
    ab[1]["modelspec.license"] = cd[1]["modelspec.license"] = "MIT"
    ab[1]["modelspec.title"], cd[1]["modelspec.title"] = "one", "other"
    for order in (None, ["d", "a", "b", "c"], ["c", "a"]):
        whole = vmix.merge_adapters(joined(ab, cd), order)
        names = order or ["a", "b", "c", "d"]
        assert [x.name for x in whole.labels] == names
        assert whole.coefficient_kind == "linear"
        draw = torch.Generator().manual_seed(2)
        for chosen in (4 * torch.rand(10, len(names), generator=draw) - 2).tolist():
            weights = dict(zip(names, chosen, strict=True))
            found = whole.values(weights)
            for path in (DOWN, UP):
                parts = [linear_values(*file, path, weights) for file in (ab, cd)]
                expected, sizes = (sum(x) for x in zip(*parts, strict=True))
                error = (exact(found[path]) - expected).abs()
                assert (error <= (len(whole.row_sides) + 1) * UNIT * sizes).all()
        assert whole.made == {
            "method": "merged",
            "parts": [{"method": "fitted", "base": "x"}, {"method": "trained"}],
        }
        assert whole.metadata["modelspec.license"] == "MIT"
        assert not {"modelspec.title", "vmix.author"} & set(whole.metadata)
    # Only of one of them anything is kept, which is then no merged file.
    assert vmix.merge_adapters(joined(ab, cd), ["b"]).made == {"method": "fitted", "base": "x"}


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), "float16"),
        ((torch.bfloat16, torch.bfloat16), "bfloat16"),
        ((torch.float16, torch.bfloat16), "float32"),
        ((torch.float16, torch.float32), "float32"),
    ],
)
def test_rows_stay_as_they_are(dtypes: tuple[torch.dtype, torch.dtype], expected: str) -> None:
    files = [
        linear([(name, "positive")], dtype=dtype, seed=i)
        for i, (name, dtype) in enumerate(zip("ab", dtypes, strict=True))
    ]
    whole = vmix.merge_adapters(joined(*files))
    assert whole.dtype == expected
    for path in (DOWN, UP):
        rows = torch.cat([tensors[f"{path}.rows"].float() for tensors, _ in files])
        assert torch.equal(tensor(whole.rows[path]).float(), rows)


def test_what_joined_files_may_have_beside_rows() -> None:
    """AesEmb and attention are kept where all have them."""
    files = [linear([(name, "positive")], seed=i) for i, name in enumerate("abc")]
    draw = torch.Generator().manual_seed(3)
    for tensors, _ in files:
        tensors["aes_emb"] = torch.randn(1, 2, 6, generator=draw)
        tensors["attention"] = torch.rand(3, 3, generator=draw).softmax(-1) / 3
    whole = {
        k: tensor(x) for k, x in vmix.merge_adapters(joined(*files), list("cab")).tensors().items()
    }
    (a, _), (b, _), (c, _) = files
    assert torch.equal(whole["aes_emb"], torch.cat([x["aes_emb"] for x in (c, a, b)]))
    mean = sum(x["attention"].double() for x in (a, b, c)) / 3
    torch.testing.assert_close(whole["attention"].double(), mean, rtol=2 * UNIT, atol=0)
    for name in ("aes_emb", "attention"):
        without = [(dict(tensors), said) for tensors, said in files]
        if name == "aes_emb":
            for tensors, _ in without:
                del tensors[name]
        else:
            del without[1][0][name]
        assert name not in vmix.merge_adapters(joined(*without)).tensors()


def test_merges_that_are_refused() -> None:
    def other(changes: Mapping[str, Tensor] | None = None, **keys: Any) -> vmix.Adapter:
        tensors, said = linear([("c", "positive")], keys=keys)
        return vmix.Adapter.from_tensors({**tensors, **(changes or {})}, said)

    ab, layernorm = vmix.Adapter.from_tensors(*linear()), labelled()
    ldm_names = {DOWN: "ldm.0", UP: "elsewhere"}
    second = r"adapters\[1\] \(tensors\): "
    cases: list[tuple[list[vmix.Adapter], list[str] | None, str]] = [
        ([], None, "adapters: expected at least one, found none"),
        ([ab], [], "labels: expected at least one label, found none"),
        ([ab], ["A"], r"unknown label `A` \(did you mean `a`\?\); known labels: a, b"),
        ([ab, other()], ["a", "x"], "unknown label `x`; known labels: a, b, c"),
        ([ab], ["a", "a"], "two labels named `a`"),
        ([ab, ab], None, "labels: expected labels of different names, found `a` in two adapters"),
        ([ab, ab], ["b"], "labels: expected labels of different names, found `b` in two adapters"),
        (
            [ab, layernorm],
            None,
            r"adapters\[\d\] \(tensors\): coefficients: expected `linear`, .*`layernorm`",
        ),
        (
            [layernorm, ab],
            ["a"],
            r"adapters\[\d\] \(tensors\): coefficients: expected `linear`, .*`layernorm`",
        ),
        (
            [ab, other(base="sd15", context_tokens=77)],
            None,
            second + r"base: expected `other`, as in adapters\[0\], found `sd15`",
        ),
        (
            [ab, other(apply_to="both")],
            None,
            second + r"apply_to: expected `cond`, as in adapters\[0\], found `both`",
        ),
        (
            [ab, other(context_tokens=4)],
            None,
            second + r"context tokens: expected `3`, as in adapters\[0\], found `4`",
        ),
        (
            [other({"aes_emb": torch.ones(1, 2, 8)}), other({"aes_emb": torch.ones(1, 2, 9)})],
            None,
            second + r"context width: expected `8`, as in adapters\[0\], found `9`",
        ),
        (
            [ab, other({f"{UP}.rows": torch.ones(1, 5)})],
            None,
            second + r"layers: expected those of adapters\[0\], found others",
        ),
        (
            [ab, other(ldm_names=ldm_names)],
            None,
            second + r"layers: expected those of adapters\[0\], found others",
        ),
    ]
    for adapters, labels, message in cases:
        with pytest.raises(vmix.VMixError, match=message):
            vmix.merge_adapters(adapters, labels)
    for wrong in ("ab", [ab, None], ab):
        with pytest.raises(TypeError):
            vmix.merge_adapters(wrong)  # type: ignore[arg-type]
