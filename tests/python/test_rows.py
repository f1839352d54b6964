"""The reader in torch against docs/format.md, the paper's formulas and the native library."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import vmix
from torch import Tensor
from torch.nn.functional import layer_norm
from vmix.rows import RowsError, _Reader, coefficients, open_rows, values

HOSTILE = Path(__file__).parents[1] / "hostile"
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
UP = "up_blocks.0.attentions.0.transformer_blocks.0.attn2"
LDM = {
    DOWN: "input_blocks.1.1.transformer_blocks.0.attn2",
    UP: "output_blocks.0.1.transformer_blocks.0.attn2",
}
EPS = 1e-5
Rows = list[tuple[int | None, str]]


def label(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "positive": [name], "negative": [""], **more}


def metadata(labels: list[dict[str, Any]], tokens: int, **more: Any) -> dict[str, str]:
    """What every adapter says; `more` are vmix keys, as JSON where they are no strings."""
    keys = {
        "format": "2",
        "kind": "adapter",
        "base": "other",
        "labels": labels,
        "context_tokens": str(tokens),
        "apply_to": "cond",
        "ldm_names": LDM,
        "made": {"method": "trained"},
        **more,
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in keys.items()}
    return {f"vmix.{key}": text for key, text in texts.items()}


def row_list(labels: list[dict[str, Any]], constant: bool = True) -> list[dict[str, Any]]:
    """Both sides of every label, and the constant row."""
    pairs = [{"label": x["name"], "side": s} for x in labels for s in ("positive", "negative")]
    return [*pairs, {"side": "constant"}] if constant else pairs


def write(folder: Path, tensors: dict[str, Tensor], keys: dict[str, str]) -> Path:
    path = folder / "adapter.safetensors"
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors.torch.save(contiguous, keys))
    return path


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- the example of docs/format.md ---


def test_the_layernorm_example(tmp_path: Path) -> None:
    labels = [label("a")]
    keys = metadata(
        labels,
        2,
        coefficients="layernorm",
        norm_eps="0.5625",
        rows=row_list(labels),
        ldm_names={"layer": "of LDM"},
    )
    tensors = {
        "profile": torch.tensor([[1.0, 1, 1], [-1, -1, 1]]),
        "gram_factor": torch.tensor([[1.0], [-1]]),
        "layer.rows": torch.tensor([[5.0, 0], [0, 3], [1, 1]]),
        "aes_emb": torch.tensor([[[1.0, -1], [-1, 1]]]),
        "context.rows": torch.zeros(3, 2),
    }
    file = open_rows(write(tmp_path, tensors, keys))

    A = file.coefficients({"a": 1})
    assert A.dtype == torch.float32
    assert torch.equal(A, torch.tensor([[0.8, 0, 1], [-0.8, 0, 1]]))
    assert torch.equal(values(A, file.rows["layer"]), torch.tensor([[5.0, 1], [-3, 1]]))

    A = file.coefficients({"a": 0.5})
    third = torch.tensor([[2 / 3, 2 / 3, 1], [-2 / 3, -2 / 3, 1]])
    torch.testing.assert_close(A, third, rtol=2**-23, atol=0)
    expected = torch.tensor([[13 / 3, 3], [-7 / 3, -1]])
    torch.testing.assert_close(values(A, file.rows["layer"]), expected, rtol=2**-21, atol=0)


def test_the_linear_example(tmp_path: Path) -> None:
    labels = [label("a", neutral=0)]
    keys = metadata(
        labels,
        2,
        coefficients="linear",
        rows=row_list(labels, constant=False),
        ldm_names={"layer": "of LDM"},
    )
    tensors = {
        "profile": torch.tensor([[1, 0.5], [2, 1]]),
        "layer.rows": torch.tensor([[4.0, 0], [0, 8]]),
    }
    file = open_rows(write(tmp_path, tensors, keys))
    for w, a, v_a in [
        (0.5, [[0.5, 0], [1, 0]], [[2, 0], [4, 0]]),
        (-0.5, [[0, 0.25], [0, 0.5]], [[0, 2], [0, 4]]),
        (0, [[0, 0], [0, 0]], [[0, 0], [0, 0]]),
    ]:
        A = file.coefficients({"a": w})
        assert A.tolist() == a
        assert values(A, file.rows["layer"]).tolist() == v_a


# --- the paper's adapter ---


def matrices(labels: int, tokens: int, dim: int, width: int) -> dict[str, Tensor]:
    """The paper's matrices in f64, of numbers that f32 holds. F stays away from 0, so that no
    token's variance is small beside its bias."""
    lift = randn(tokens, labels).sign() * (1 + torch.rand(tokens, labels, dtype=torch.float64))
    made = {
        "aes_emb": randn(labels, 2, dim),
        "projection.linear.weight": lift,
        "projection.linear.bias": randn(tokens),
        "projection.norm.weight": 1 + randn(dim) / 4,
        "projection.norm.bias": randn(dim),
        "projection.zero.weight": randn(dim, dim) / dim**0.5,
        "projection.zero.bias": randn(dim),
        f"{DOWN}.to_v_aes.weight": randn(width, dim) / dim**0.5,
        f"{UP}.to_v_aes.weight": randn(4, dim) / dim**0.5,
    }
    return {name: tensor.float().double() for name, tensor in made.items()}


def paper(m: dict[str, Tensor], weights: Tensor, layer: str = DOWN, eps: float = EPS) -> Tensor:
    """V_a [..., C, inner_dim] of weights [..., N]: equations 4, 6 and 7."""
    positive, negative = m["aes_emb"].unbind(1)
    w = weights[..., None]
    f_t = (1 - w) * negative + w * positive
    lifted = m["projection.linear.weight"] @ f_t + m["projection.linear.bias"][:, None]
    norm = m["projection.norm.weight"], m["projection.norm.bias"]
    normed = layer_norm(lifted, lifted.shape[-1:], *norm, eps)
    f_a = normed @ m["projection.zero.weight"].T + m["projection.zero.bias"]
    return f_a @ m[f"{layer}.to_v_aes.weight"].T


def derived(m: dict[str, Tensor]) -> tuple[Tensor, Rows, Tensor, Tensor]:
    """profile, labels and sides, gram_factor and the rows of DOWN ("Why this is exact")."""
    labels, _, dim = m["aes_emb"].shape
    features = m["aes_emb"].flatten(0, 1)
    features = features - features.mean(-1, keepdim=True)
    lift = m["projection.linear.weight"].repeat_interleave(2, 1)
    z = m["projection.zero.weight"]
    varied = (m["projection.norm.weight"] * features) @ z.T
    constant = z @ m["projection.norm.bias"] + m["projection.zero.bias"]
    context_rows = torch.cat([varied, constant[None]])
    sides: Rows = [(i, side) for i in range(labels) for side in ("positive", "negative")]
    return (
        torch.cat([lift, torch.ones(len(lift), 1, dtype=torch.float64)], 1),
        [*sides, (None, "constant")],
        torch.linalg.qr(features.T / dim**0.5).R.T,
        context_rows @ m[f"{DOWN}.to_v_aes.weight"].T,
    )


# Tokens, context width and width of a layer: a U-Net of another kind, SD1.5 and SDXL scaled down.
SIZES = {"other": (5, 12, 7), "sd15": (11, 48, 20), "sdxl": (11, 128, 40)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("labels", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("bias", [0.0, 1.0, 1000.0])
def test_an_adapter_computes_what_the_paper_does(size: str, labels: int, bias: float) -> None:
    torch.manual_seed(labels)
    tokens, dim, width = SIZES[size]
    m = matrices(labels, tokens, dim, width)
    m["projection.linear.bias"] *= bias
    profile, sides, factor, rows = derived(m)
    inside = torch.rand(16, labels, dtype=torch.float64)
    corners = torch.stack([torch.zeros(labels), torch.ones(labels), torch.full((labels,), 0.5)])
    weights = torch.cat([inside, inside * 6 - 3, corners.double()])
    A = coefficients(weights, profile, sides, factor, EPS)
    expected = paper(m, weights)
    # Both sides round some dozen times at 2^-53. What costs most is the paper's bias: the last
    # 2^-44 of x + 1000 is lost, while x itself may have a deviation of no more than a half. Both
    # make a few 1e-13; all other sizes of F and of features are near 1.
    error = (A @ rows - expected).abs().max() / expected.abs().max()
    assert error < 1e-12


def kappa(profile: Tensor, sides: Rows, factor: Tensor, weights: Tensor, eps: float) -> Tensor:
    """κ [C] of docs/format.md: how much the features cancel each other."""
    scales = [
        w if side == "positive" else 1 - w
        for w, (_, side) in zip(weights.repeat_interleave(2).tolist(), sides[:-1], strict=True)
    ]
    u = profile[:, :-1] * torch.tensor(scales, dtype=torch.float64)
    q = (u @ factor).square().sum(-1)
    return ((u.abs() @ factor.abs()).square().sum(-1) / (q + eps)).sqrt()


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_features_that_nearly_coincide(distance: float) -> None:
    """Two labels whose positive texts mean almost the same, the one lifted against the other."""
    torch.manual_seed(0)
    tokens, dim, width = SIZES["sd15"]
    m = matrices(2, tokens, dim, width)
    m["aes_emb"][1, 0] = m["aes_emb"][0, 0] + distance * randn(dim)
    m["projection.linear.weight"][:, 1] = -m["projection.linear.weight"][:, 0]
    weights = torch.ones(2, dtype=torch.float64)
    profile, sides, factor, rows = derived(m)
    cancelled = kappa(profile, sides, factor, weights, EPS)
    assert cancelled.max() > 1 / (distance**2 + EPS) ** 0.5

    A = coefficients(weights, profile, sides, factor, EPS)
    expected = paper(m, weights)
    # u·L and A·B are sums of K products with sums of d, each rounded at 2^-53; κ says by how much
    # the sums are smaller than their parts.
    steps = dim + 2 * len(factor)
    error = (A @ rows - expected).abs().amax(-1) / expected.abs().max()
    assert (error < steps * 2**-53 * cancelled).all()
    # docs/format.md's own bound of what L in f32 changes.
    rounded = coefficients(weights, profile, sides, factor.float(), EPS)[:, :-1]
    exact = A[:, :-1]
    assert ((rounded - exact).abs() <= 2**-24 * cancelled[:, None] * exact.abs()).all()
    assert not torch.equal(rounded, exact)


# --- linear files ---


def linear(tmp_path: Path, **more: Any) -> tuple[Path, dict[str, Tensor]]:
    """Two labels; the second has two rows on its positive side and none on the other."""
    torch.manual_seed(0)
    labels = [label("a", neutral=0, range=[-1, 1], default=0), label("b", neutral=0)]
    rows = [
        {"label": "b", "side": "positive"},
        {"label": "a", "side": "negative"},
        {"label": "a", "side": "positive", "later": [1]},
        {"label": "b", "side": "positive"},
    ]
    keys = metadata(labels, 3, coefficients="linear", rows=rows, **more)
    tensors = {
        "profile": torch.randn(3, 4),
        f"{DOWN}.rows": torch.randn(4, 6).half(),
        f"{UP}.rows": torch.randn(4, 2).half(),
    }
    return write(tmp_path, tensors, keys), tensors


@pytest.mark.parametrize("a", [-1.5, -0.25, 0, 0.5, 2])
@pytest.mark.parametrize("b", [-1, 0, 1.25])
def test_linear_files_add_up(tmp_path: Path, a: float, b: float) -> None:
    path, tensors = linear(tmp_path)
    file = open_rows(path)
    A = file.coefficients({"a": a, "b": b})
    P = tensors["profile"].double()
    for layer in (DOWN, UP):
        B = tensors[f"{layer}.rows"].double()
        side = (2, a) if a > 0 else (1, -a)
        expected = P[:, [side[0]]] * side[1] @ B[[side[0]]]
        if b > 0:
            expected = expected + P[:, [0, 3]] * b @ B[[0, 3]]
        found = values(A, file.rows[layer])
        assert found.dtype == torch.float32
        # A rounds once, and each of four products and sums once more.
        bound = 9 * 2**-24 * (A.abs().double() @ B.abs())
        assert ((found - expected).abs() <= bound).all()


def test_what_a_linear_file_says(tmp_path: Path) -> None:
    path, tensors = linear(tmp_path)
    file = open_rows(path)
    assert (file.base, file.context_tokens, file.context_dim) == ("other", 3, None)
    assert (file.apply_to, file.coefficient_kind, file.dtype) == ("cond", "linear", torch.half)
    assert file.row_sides[0] == ("b", "positive")
    assert file.row_sides[1] == ("a", "negative")
    assert (file.ldm_names, file.made) == (LDM, {"method": "trained"})
    assert file.gram_factor is file.aes_emb is file.context_rows is file.attention is None
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(file.rows) == list(LDM)
    for layer, rows in file.rows.items():
        assert rows.dtype == torch.half
        assert torch.equal(rows, tensors[f"{layer}.rows"])


# --- weights ---


def test_weights_of_selections(tmp_path: Path) -> None:
    labels = [
        label("vibrant color", dimension="color", effect={"hue": 1}, later=[1]),
        label("sharp focus", default=0.3, neutral=0.25, step=0.1, display_names={"de": "Schärfe"}),
    ]
    file = open_rows(write(tmp_path, *layernorm(labels)))
    first, second = file.labels
    assert (first.default, first.neutral, first.range, first.step) == (1, None, (0, 1), 0.05)
    assert (first.dimension, first.effect, first.positive) == (
        "color",
        {"hue": 1},
        ("vibrant color",),
    )
    assert (second.default, second.neutral, second.negative) == (0.3, 0.25, ("",))
    assert (second.dimension, second.display_names) == ("", {"de": "Schärfe"})
    third = torch.tensor(0.3).item()
    selections: list[tuple[Any, list[float], list[float]]] = [
        (None, [1, third], [0, 0.5 - third]),
        ("all", [1, 1], [0, -0.5]),
        ("none", [0, 0.25], [0, 0.25]),
        ("sharp focus", [0, 1], [0, -0.5]),
        (["vibrant color"], [1, 0.25], [0, 0.25]),
        ([], [0, 0.25], [0, 0.25]),
        ({"vibrant color": -2, "sharp focus": 0.3}, [-2, third], [0, 0.5 - third]),
        ({"vibrant color": 1.5}, [1.5, 0.25], [0, 0.25]),
    ]
    names = [first.name, second.name]
    for selection, expected, mirrored in selections:
        assert file.weights(selection) == dict(zip(names, expected, strict=True))
        assert file.opposite(selection) == dict(zip(names, mirrored, strict=True))
        alone = file.coefficients(selection)
        assert torch.equal(alone, file.coefficients(torch.tensor(expected, dtype=torch.float64)))
    batch = file.coefficients([selection for selection, *_ in selections])
    for A, (selection, *_) in zip(batch, selections, strict=True):
        assert torch.equal(A, file.coefficients(selection))
    assert values(batch, file.rows[DOWN]).shape == (8, 3, 4)


def test_weights_that_are_refused(tmp_path: Path) -> None:
    file = open_rows(linear(tmp_path)[0])
    with pytest.raises(RowsError, match="unknown label `c`; known labels: a, b"):
        file.weights("c")
    bad: list[Any] = [math.nan, -math.inf, 1e39, 10**400, "1", True, None]
    for weight in bad:
        with pytest.raises(RowsError, match="weight of label `a`: expected a finite number"):
            file.weights({"a": weight})
    with pytest.raises(RowsError, match="weights: expected 2 per image, found shape"):
        file.coefficients(torch.ones(3))
    with pytest.raises(RowsError, match="expected coefficients that float32 can hold"):
        file.coefficients({"a": 3e38, "b": 3e38})


# --- against the native library ---

SELECTIONS: list[Any] = [
    None,
    "all",
    "none",
    "a",
    ["a", "c"],
    {"a": 0.3, "b": -0.7, "c": 2.5},
    {"b": 1e-3},
]


def agree(file: Any, adapter: vmix.Adapter) -> None:
    """A and V_a of all selections, to f32 rounding."""
    for selection in SELECTIONS:
        assert file.weights(selection) == adapter.weights(selection)
        assert file.opposite(selection) == adapter.opposite(selection)
        A = file.coefficients(selection)
        theirs = torch.from_dlpack(adapter.coefficients(selection))
        # f64 on both sides, but for the last rounding.
        torch.testing.assert_close(A, theirs, rtol=2**-23, atol=0)
        found = adapter.values(selection)
        for layer, rows in file.rows.items():
            exact = A.double() @ rows.double()
            bound = (len(rows) + 2) * 2**-24 * (A.double().abs() @ rows.double().abs())
            for v_a in (values(A, rows), torch.from_dlpack(found[layer])):
                assert ((v_a - exact).abs() <= bound).all()
    batch = torch.from_dlpack(adapter.coefficients(SELECTIONS))
    torch.testing.assert_close(file.coefficients(SELECTIONS), batch, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_and_its_files(tmp_path: Path, dtype: str) -> None:
    torch.manual_seed(0)
    labels = [label("a"), label("b", default=0.3, neutral=0.6), label("c", range=[-2, 2])]
    keys = metadata(labels, 5, apply_to="contrast", norm_eps="1e-5")
    m = {name: tensor.float() for name, tensor in matrices(3, 5, 12, 7).items()}
    adapter = vmix.Adapter.from_matrices(m, keys, dtype)
    adapter.save(path := tmp_path / "adapter.safetensors")
    file = open_rows(path)
    agree(file, adapter)
    assert file.row_sides == tuple(adapter.row_sides)
    assert (file.coefficient_kind, file.dtype) == ("layernorm", getattr(torch, dtype))
    assert (file.base, file.apply_to) == (adapter.base, adapter.apply_to)
    assert (file.context_tokens, file.context_dim) == (5, 12)
    assert (file.metadata, file.made) == (adapter.metadata, adapter.made)
    assert file.ldm_names == {layer.name: layer.ldm_name for layer in adapter.layers}
    assert file.sha256 == adapter.values().origin
    for layer, rows in file.rows.items():
        assert torch.equal(rows, torch.from_dlpack(adapter.rows[layer]))
    for ours, theirs in zip(file.labels, adapter.labels, strict=True):
        assert (ours.name, list(ours.positive)) == (theirs.name, theirs.positive)
        assert (ours.neutral, ours.range) == (pytest.approx(theirs.neutral), theirs.range)
    f_a = torch.from_dlpack(adapter.project({"a": 0.3}))
    assert file.context_rows is not None
    ours = values(file.coefficients({"a": 0.3}), file.context_rows)
    torch.testing.assert_close(ours, f_a, rtol=1e-6, atol=1e-6)
    # The library's own matrices, by the paper's formulas: f32 rows bound what is lost.
    weights = torch.tensor([*file.weights({"a": 0.3}).values()], dtype=torch.float64)
    expected = paper({name: tensor.double() for name, tensor in m.items()}, weights)
    error = values(file.coefficients({"a": 0.3}), file.rows[DOWN]) - expected
    steps = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}
    assert error.abs().max() < 8 * steps[dtype] * expected.abs().max()


def test_the_library_and_linear_files(tmp_path: Path) -> None:
    path, tensors = linear(tmp_path)
    file, adapter = open_rows(path), vmix.Adapter.open(path)
    for a in (-1.5, 0, 0.3):
        selection = {"a": a, "b": -a}
        ours = file.coefficients(selection)
        assert torch.equal(ours, torch.from_dlpack(adapter.coefficients(selection)))
    again = vmix.Adapter.from_tensors(tensors, file.metadata)
    assert torch.equal(torch.from_dlpack(again.rows[UP]), file.rows[UP])


@pytest.mark.parametrize(("base", "dim", "count"), [("sd15", 768, 16), ("sdxl", 2048, 70)])
def test_layers_of_the_known_bases(tmp_path: Path, base: str, dim: int, count: int) -> None:
    layers = vmix.unet_layers(base)
    assert len(layers) == count
    labels = [label("a", neutral=0)]
    rows = row_list(labels, constant=False)
    keys = metadata(labels, 77, base=base, coefficients="linear", rows=rows)
    del keys["vmix.ldm_names"]
    tensors = {f"{layer.name}.rows": torch.ones(2, layer.inner_dim) for layer in layers}
    tensors["profile"] = torch.ones(77, 2)
    file = open_rows(write(tmp_path, tensors, keys))
    assert file.ldm_names == {layer.name: layer.ldm_name for layer in layers}
    assert list(file.rows) == [layer.name for layer in layers]
    assert (file.context_dim, vmix.Adapter.open(file.name).context_dim) == (dim, dim)


# --- files that lie ---


def opens(open_file: Callable[[Path], Any], path: Path, refusal: type[Exception]) -> bool:
    try:
        open_file(path)
    except refusal:
        return False
    return True


@pytest.mark.parametrize("path", sorted(HOSTILE.glob("*.safetensors")), ids=lambda path: path.stem)
def test_what_the_library_refuses_is_refused(path: Path) -> None:
    assert opens(open_rows, path, RowsError) == opens(vmix.Adapter.open, path, vmix.VMixError)


def layernorm(labels: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file of three tokens, width 2."""
    torch.manual_seed(0)
    keys = metadata(
        labels, 3, coefficients="layernorm", norm_eps="1e-5", rows=row_list(labels), later="1"
    )
    n = len(labels)
    features = torch.randn(2 * n, 2)
    tensors = {
        "profile": torch.randn(3, 2 * n + 1),
        "gram_factor": features.clone(),
        "aes_emb": features.view(n, 2, 2),
        "context.rows": torch.randn(2 * n + 1, 2),
        f"{DOWN}.rows": torch.randn(2 * n + 1, 4),
        f"{UP}.rows": torch.randn(2 * n + 1, 2),
    }
    return tensors, keys


def with_labels(text: str) -> dict[str, Any]:
    """A list of one label, with more in it."""
    return {"labels": '[{"name": "a", "positive": ["a"], "negative": [""], ' + text + "}]"}


OPENS = ""
# Keys of the metadata, and what the refusal says.
KEYS: list[tuple[dict[str, Any], str]] = [
    ({}, OPENS),
    ({"format": "1"}, "`vmix.format`: expected `2`, found `1`"),
    ({"format": None}, "`vmix.format`: expected `2`, found no such key"),
    ({"kind": "preset"}, "`vmix.kind`: expected `adapter`, found `preset`"),
    ({"base": "sd21"}, "`vmix.base`: expected one of sd15, sdxl, other, found `sd21`"),
    ({"apply_to": "uncond"}, "`vmix.apply_to`: expected one of cond, both, contrast"),
    ({"coefficients": "cubic"}, "`vmix.coefficients`: expected one of layernorm, linear"),
    ({"context_tokens": "003"}, OPENS),
    ({"context_tokens": "+3"}, OPENS),
    ({"context_tokens": "++3"}, "`vmix.context_tokens`: expected a whole number from 1 to 4096"),
    ({"context_tokens": "３"}, "`vmix.context_tokens`: expected a whole number"),
    ({"context_tokens": " 3"}, "`vmix.context_tokens`: expected a whole number"),
    ({"context_tokens": "3_0"}, "`vmix.context_tokens`: expected a whole number"),
    ({"context_tokens": "0"}, "`vmix.context_tokens`: expected a whole number"),
    ({"context_tokens": "4097"}, "`vmix.context_tokens`: expected a whole number"),
    ({"context_tokens": "4"}, "tensor `profile`: expected shape [4, 3], found shape [3, 3]"),
    ({"norm_eps": "+1.E-5"}, OPENS),
    ({"norm_eps": ".5"}, OPENS),
    ({"norm_eps": "1_0"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": " 1"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "0x1p-3"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "1e-400"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "1e400"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "-1"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "inf"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"norm_eps": "nan"}, "`vmix.norm_eps`: expected a number above 0"),
    ({"made": {"method": "fitted", "later": {"a": [None, True, 1e308]}}}, OPENS),
    ({"made": {"method": "painted"}}, "`vmix.made`: expected a JSON object with a `method`"),
    ({"made": {}}, "`vmix.made`: expected a JSON object with a `method`"),
    ({"made": ["trained"]}, "`vmix.made`: expected a JSON object with a `method`"),
    ({"made": '{"method": "trained", "n": NaN}'}, "`vmix.made`: expected a JSON object"),
    ({"made": '{"method": "trained", "n": 1e400}'}, "`vmix.made`: expected a JSON object"),
    ({"made": '{"method": "trained", "n": -1%s}' % ("0" * 400)}, "`vmix.made`: expected"),
    ({"made": '{"method": "trained", "x": [{"a": 1, "a": 1}]}'}, "found no JSON: `a` twice"),
    ({"made": '{"method": "trained", "x": "\\ud800"}'}, "`vmix.made`: expected a JSON object"),
    ({"made": '{"method": "trained", "x": "\\ud83d\\ude00"}'}, OPENS),
    ({"made": '{"method": "trained", "x": %s}' % ("[" * 126 + "]" * 126)}, OPENS),
    ({"made": '{"method": "trained", "x": %s}' % ("[" * 127 + "]" * 127)}, "`vmix.made`: exp"),
    ({"made": '{"method": "trained", "x": "[[%s\\""}' % ("[" * 200)}, OPENS),
    (with_labels('"default": 1e39'), "label `a` with a default that is no number or not finite"),
    (with_labels('"default": true'), "label `a` with a default that is no number"),
    (with_labels('"default": "1"'), "label `a` with a default that is no number"),
    (with_labels('"default": null'), "label `a` with a default that is no number"),
    (with_labels('"default": 1.00000001'), OPENS),
    (with_labels('"default": 1.0000001'), "label `a` with the default 1.0000001 outside"),
    (with_labels('"default": -1, "range": [-1, 3]'), OPENS),
    (with_labels('"range": [0, 1, 2]'), "label `a` with a range that is not [low, high]"),
    (with_labels('"range": [1, 1]'), "label `a` with the range 1.0 to 1.0"),
    (with_labels('"range": [1, 1.00000001]'), "label `a` with the range 1.0 to 1.00000001"),
    (with_labels('"range": [0.5, 0.75]'), "label `a` with the default 1.0 outside"),
    (with_labels('"step": 0'), "label `a` with the step 0"),
    (with_labels('"step": 1e-60'), "label `a` with the step 1e-60"),
    (with_labels('"neutral": null'), OPENS),
    (with_labels('"neutral": false'), "label `a` with a neutral weight that is no number"),
    (with_labels('"effect": {"hue": 1, "light": -0.5}'), OPENS),
    (with_labels('"effect": {"hue": "1"}'), "label `a` with effect of another kind"),
    (with_labels('"effect": {"hue": true}'), "label `a` with effect of another kind"),
    (with_labels('"effect": null'), "label `a` with effect of another kind"),
    (with_labels('"display_names": {"de": 1}'), "label `a` with display_names of another kind"),
    (with_labels('"display_names": {"de": "\\u0000"}'), OPENS),
    (with_labels('"dimension": null'), "label `a` with a dimension that is no text"),
    (with_labels('"dimension": "\\u0000"'), "label `a` with a dimension that is no text"),
    (with_labels('"name": "b"'), "`name` twice"),
    ({"labels": [label("a", positive=[])]}, "label `a` with no list of positive texts"),
    ({"labels": [label("a", positive=["", "b"])]}, OPENS),
    ({"labels": [label("a", negative="b")]}, "label `a` with no list of negative texts"),
    ({"labels": [label("a", negative=[1])]}, "label `a` with a negative text that is no text"),
    ({"labels": [label("a", negative=["\0"])]}, "label `a` with a negative text that is no text"),
    ({"labels": [label("all")]}, "label `all` with a name that is blank or reserved"),
    ({"labels": [label("\u2003\t")]}, "with a name that is blank or reserved"),
    ({"labels": [label("\x1f")], "rows": row_list([label("\x1f")])}, OPENS),
    ({"labels": [label("a"), label("a")]}, "label `a` with a name that comes twice"),
    ({"labels": [["a", ["a"], ["b"]]]}, "with no object around it"),
    ({"labels": []}, "`vmix.labels`: expected a JSON list of labels (docs/format.md), found an"),
    ({"labels": {}}, "`vmix.labels`: expected a JSON list of labels (docs/format.md), found `{}`"),
    ({"labels": "[]]"}, "`vmix.labels`: expected a JSON list of labels (docs/format.md), found no"),
    ({"labels": "\ufeff[]"}, "`vmix.labels`: expected a JSON list of labels"),
    ({"rows": []}, "`vmix.rows`: expected a row for every label, found none of `a`"),
    ({"rows": [{"side": "constant"}] * 3}, "`vmix.rows`: expected a row for every label"),
    (
        {"rows": [{"label": "a", "side": "positive"}] * 3},
        "tensor `gram_factor`: expected shape [3, m]",
    ),
    ({"rows": [{"label": "b", "side": "positive"}]}, "labels of vmix.labels, found"),
    ({"rows": [{"label": None, "side": "positive"}]}, "labels of vmix.labels, found"),
    ({"rows": [{"label": "a", "side": "neutral"}]}, "labels of vmix.labels, found"),
    ({"rows": [{"label": "a", "side": ["positive"]}]}, "labels of vmix.labels, found"),
    ({"rows": [{"label": "a"}]}, "labels of vmix.labels, found"),
    ({"rows": [{"label": "a", "side": "constant"}]}, "labels of vmix.labels, found"),
    ({"rows": [["a", "positive"], ["a", "negative"], [None, "constant"]]}, "`vmix.rows`: expected"),
    ({"ldm_names": None}, "`vmix.ldm_names`: expected a JSON object of the LDM name"),
    ({"ldm_names": {}}, "`vmix.ldm_names`: expected a JSON object of the LDM name"),
    ({"ldm_names": {**LDM, UP: None}}, "`vmix.ldm_names`: expected a JSON object of the LDM name"),
    ({"ldm_names": {**LDM, UP: LDM[DOWN]}}, "`vmix.ldm_names`: expected names of their own"),
    ({"ldm_names": {**LDM, UP: DOWN}}, "`vmix.ldm_names`: expected names of their own"),
    ({"ldm_names": {**LDM, UP: UP}}, OPENS),
    ({"ldm_names": {**LDM, UP: ""}}, "`vmix.ldm_names`: expected names of their own"),
    ({"ldm_names": {**LDM, UP: "a\0"}}, "`vmix.ldm_names`: expected names of their own"),
    ({"ldm_names": {**LDM, "context": "a"}}, "`vmix.ldm_names`: expected names of their own"),
    ({"ldm_names": {**LDM, "more": "a"}}, "tensor `more.rows`: expected shape [3, inner_dim]"),
    ({"ldm_names": {UP: LDM[UP]}}, f"tensor `{DOWN}.rows`: expected no such tensor, found one"),
    ({"coefficients": "linear"}, "`vmix.rows`: expected"),
    (
        {"coefficients": "linear", "rows": [{"label": "a", "side": "positive"}]},
        "`vmix.labels`: expected `neutral` 0 in a linear file, found None for label `a`",
    ),
    (
        {
            "coefficients": "linear",
            "rows": row_list([label("a")], constant=False),
            **with_labels('"neutral": 1'),
        },
        "`vmix.labels`: expected `neutral` 0 in a linear file, found 1.0 for label `a`",
    ),
    (
        {"base": "sdxl", "context_tokens": "3"},
        "`vmix.context_tokens`: expected 77 for sdxl, found 3",
    ),
]


@pytest.mark.parametrize(("changes", "message"), KEYS)
def test_keys_that_lie(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors, keys = layernorm([label("a")])
    for key, value in changes.items():
        keys.pop(f"vmix.{key}")
        if value is not None:
            keys[f"vmix.{key}"] = value if isinstance(value, str) else json.dumps(value)
    refused_or_not(write(tmp_path, tensors, keys), message)


def refused_or_not(path: Path, message: str) -> None:
    """By this reader in these words, and by the library."""
    found = ""
    try:
        open_rows(path)
    except RowsError as error:
        found = str(error)
        assert found.startswith(f"{path}: ")
    assert (message in found) if message else not found
    assert opens(vmix.Adapter.open, path, vmix.VMixError) == (not message)


def filled(number: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, number, dtype=dtype)


ROWS = f"{DOWN}.rows"
# Tensors in place of a file's own, and what the refusal says.
TENSORS: list[tuple[str, Tensor | None, str]] = [
    ("aes_emb", None, "tensor `aes_emb`: expected shape [1, 2, d], found no such tensor"),
    ("aes_emb", filled(1, 1, 2, 3), "tensor `context.rows`: expected shape [3, 3], found shape"),
    ("aes_emb", filled(1, 1, 2, 0), "tensor `aes_emb`: expected shape [1, 2, d], found shape"),
    ("aes_emb", filled(1, 2, 2, 2), "tensor `aes_emb`: expected shape [1, 2, d], found shape"),
    ("aes_emb", filled(1, 1, 2, 2, dtype=torch.bfloat16), OPENS),
    ("aes_emb", filled(1, 1, 2, 2, dtype=torch.float64), "expected F32, F16 or BF16, found F64"),
    ("context.rows", filled(1, 3, 2, dtype=torch.half), OPENS),
    ("context.rows", filled(math.nan, 3, 2), "tensor `context.rows`: expected finite values"),
    ("profile", filled(1, 3, 3, dtype=torch.half), "tensor `profile`: expected F32, found F16"),
    ("profile", filled(-math.inf, 3, 3), "tensor `profile`: expected finite values, found -inf"),
    ("profile", None, "tensor `profile`: expected shape [3, 3], found no such tensor"),
    (
        "gram_factor",
        torch.eye(2, dtype=torch.half),
        "tensor `gram_factor`: expected F32, found F16",
    ),
    (
        "gram_factor",
        torch.eye(3),
        "tensor `gram_factor`: expected shape [2, m], found shape [3, 3]",
    ),
    ("gram_factor", torch.ones(2, 0), "`gram_factor`: expected shape [2, m], found shape [2, 0]"),
    ("gram_factor", torch.ones(2, 1), OPENS),
    ("gram_factor", torch.ones(2, 9), OPENS),
    (ROWS, filled(1, 3, 4, dtype=torch.half), "expected the dtype of all rows"),
    (ROWS, filled(1, 2, 4), f"tensor `{ROWS}`: expected shape [3, inner_dim], found shape [2, 4]"),
    (ROWS, filled(1, 3, 0), f"tensor `{ROWS}`: expected shape [3, inner_dim], found shape [3, 0]"),
    (ROWS, filled(math.inf, 3, 4), f"tensor `{ROWS}`: expected finite values, found inf"),
    (f"{LDM[DOWN]}.rows", filled(1, 3, 4), "expected no such tensor, found one"),
    ("later", filled(1, 1), "tensor `later`: expected no such tensor, found one"),
    ("attention", filled(1 / 9, 3, 3), OPENS),
    ("attention", filled(1.0009 / 9, 3, 3), OPENS),
    ("attention", filled(1.0011 / 9, 3, 3), "tensor `attention`: expected entries that add up"),
    ("attention", filled(1 / 9, 3, 3, dtype=torch.half), "tensor `attention`: expected F32"),
    ("attention", torch.diag(torch.tensor([1.0, 1, -1])), "expected entries that are not negative"),
]


@pytest.mark.parametrize(("name", "tensor", "message"), TENSORS)
def test_tensors_that_lie(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    tensors, keys = layernorm([label("a")])
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    refused_or_not(write(tmp_path, tensors, keys), message)


def test_a_header_of_escaped_quotes_is_read_once() -> None:
    """And not from each of them anew, which would take an hour here."""
    text = '{"' + '\\"' * 1_000_000
    header = text.encode()
    with pytest.raises(RowsError, match="invalid header"):
        _Reader.of("file", header)


@pytest.mark.parametrize("selection", [3, [{"a": 1}, 3], [["a"], 3.5], {"a": "1"}, {3: 1}])
def test_selections_that_are_none(tmp_path: Path, selection: Any) -> None:
    file = open_rows(linear(tmp_path)[0])
    with pytest.raises(RowsError):
        file.coefficients(selection)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    file = open_rows(linear(tmp_path)[0])
    for number in (math.nan, -math.inf, 1e39):
        weights = torch.tensor([number, 0.0], dtype=torch.float64)
        with pytest.raises(RowsError, match="weights: expected finite numbers"):
            file.coefficients(weights)


def test_tensors_of_layernorm_in_a_linear_file(tmp_path: Path) -> None:
    path, tensors = linear(tmp_path)
    keys = open_rows(path).metadata
    for name, shape in [("gram_factor", (4, 4)), ("context.rows", (4, 2))]:
        path = write(tmp_path, {**tensors, name: torch.ones(shape)}, dict(keys))
        refused_or_not(path, f"tensor `{name}`: expected no such tensor, found one")
    path = write(tmp_path, {**tensors, "aes_emb": torch.ones(2, 2, 9)}, dict(keys))
    refused_or_not(path, OPENS)
    assert open_rows(path).context_dim == 9


def test_results_that_would_be_too_large(tmp_path: Path) -> None:
    """4096·(R + d + Σ inner_dim) above 2^28: R is 1, d is 1, and one layer has the rest."""
    labels = [label("a", neutral=0)]
    rows = [{"label": "a", "side": "positive"}]
    layers = {"layer": "LDM's"}
    keys = metadata(labels, 4096, coefficients="linear", rows=rows, ldm_names=layers)
    for width, message in [(65534, OPENS), (65535, "`vmix.context_tokens`: expected at most")]:
        tensors = {
            "profile": torch.ones(4096, 1),
            "aes_emb": torch.ones(1, 2, 1),
            "layer.rows": torch.ones(1, width),
        }
        refused_or_not(write(tmp_path, tensors, keys), message)


def test_huge_files_are_refused_by_their_headers(tmp_path: Path) -> None:
    """Eight gigabytes, none of which are on the disk."""
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2**31], "data_offsets": [0, 2**33]}
    for keys, tensor, message in [
        ({}, "weight", "metadata `vmix.format`: expected `2`, found no such key"),
        (layernorm([label("a")])[1], "weight", f"tensor `{DOWN}.rows`: expected shape"),
        (layernorm([label("a")])[1], ROWS, f"tensor `{ROWS}`: expected shape [3, inner_dim]"),
    ]:
        header = json.dumps({"__metadata__": keys, tensor: entry}).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 2**33)
        refused_small(path, message)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(2**33)
    refused_small(path, "not a safetensors file: the first 8 bytes ask for a header of 100000001")
    # An adapter with more behind it than it says.
    with write(tmp_path, *layernorm([label("a")])).open("r+b") as file:
        file.truncate(2**33)
    refused_small(tmp_path / "adapter.safetensors", "not a safetensors file")


def refused_small(path: Path, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RowsError) as refused:
            open_rows(path)
        assert message in str(refused.value)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="not a regular file"):
        open_rows(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_rows(tmp_path / "none")


def test_messages_do_not_speak_to_the_terminal(tmp_path: Path) -> None:
    tensors, keys = layernorm([label("a")])
    keys["vmix.base"] = "\x1b[2J\u202e" + "x" * 10_000
    with pytest.raises(RowsError) as refused:
        open_rows(write(tmp_path, tensors, keys))
    assert "found `\\x1b[2J\\u202exxx" in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_nothing_else_of_vmix_is_imported() -> None:
    program = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("rows", sys.argv[1])
sys.modules["rows"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.open_rows and module.coefficients
print([name for name in sys.modules if name.partition(".")[0] == "vmix"])
"""
    path = sys.modules["vmix.rows"].__file__
    assert path is not None
    ran = subprocess.run(
        [sys.executable, "-I", "-c", program, path], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[]\n"
