"""`vmix.fit` against least squares written out, on layers that are small enough to store every map.

Sums are in f32 in the collector and in f64 here: where the two are compared, tolerances are some
roundings of f32 (6e-8), times what a solution magnifies them by.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vmix
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vmix import Adapter, Tokenizer, read_label_list
from vmix.fit import (
    LABEL_SETS,
    Collector,
    Effect,
    FitError,
    FitLabel,
    Fitted,
    Picture,
    Plan,
    Sums,
    bare,
    check_rank,
    collect,
    fitted_adapter,
    read_labels,
    read_prompts,
    solve,
    sums_size,
    table,
    with_words,
)
from vmix.fit.labels import RARE
from vmix.fit.report import warnings
from vmix.fit.solve import FLOOR, RIDGES, regularized, ridge_values, solve_side
from vmix.fit.sums import CHECK_PART, FIT_PART, LENGTHS, LayerSums
from vmix.rows import RowFile, open_rows

TOKENS, CONTEXT, CHANNELS, QUERIES, STEPS = 7, 12, 10, 20, 2
F64 = torch.float64

Encode = Callable[[Sequence[str]], Tensor]


def randn(*shape: int, seed: str = "") -> Tensor:
    """Of numbers that depend on the text alone."""
    draw = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.randn(*shape, generator=draw)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max() / expected.abs().max())


def refused(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one sentence that a FitError says."""
    with pytest.raises(FitError) as caught:
        function(*arguments, **named)
    said = str(caught.value)
    assert said == said.strip() != ""
    assert "\n" not in said
    return said


# --- a host that is small enough to write down ---


class Layer(nn.Module):
    """Cross-attention with the names that hosts give its parts."""

    def __init__(self, heads: int, width: int, seed: str) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(CHANNELS, heads * width, bias=False)
        self.to_k = nn.Linear(CONTEXT, heads * width, bias=False)
        self.to_v = nn.Linear(CONTEXT, heads * width)
        self.to_out = nn.ModuleList([nn.Linear(heads * width, CHANNELS), nn.Identity()])
        for name, parameter in self.named_parameters():
            # Maps are far from even: scores have a deviation of about 2.
            scale = 2**0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1.0
            parameter.data = randn(*parameter.shape, seed=f"{seed} {name}") * scale
        self.requires_grad_(False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        mixed = scaled_dot_product_attention(self.split(q), self.split(k), self.split(v))
        out: Tensor = self.to_out[1](self.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return out

    def map_of(self, x: Tensor, context: Tensor) -> Tensor:
        """softmax(Q·Kᵀ/√d) [H, n, C] of x [n, channels]"""
        q, k = self.split(self.to_q(x)), self.split(self.to_k(context))
        scores: Tensor = q @ k.mT / q.shape[-1] ** 0.5
        return scores.softmax(-1)


def make_layers() -> dict[str, Layer]:
    return {"down.attn2": Layer(2, 5, "down"), "up.attn2": Layer(3, 4, "up")}


def encode(texts: Sequence[str]) -> Tensor:
    """A context [C, d] for every text, that has nothing to do with those of others."""
    return torch.stack([randn(TOKENS, CONTEXT, seed=text) for text in texts])


def count(text: str) -> int:
    return len(text.split())


def noise(path: str, prompt: int, step: int) -> Tensor:
    return randn(QUERIES, CHANNELS, seed=f"{path} {prompt} {step}")


def make_plan(labels: Any, prompts: int | Sequence[str] = 8, tokens: int = TOKENS) -> Plan:
    texts = [f"thing{i}" for i in range(prompts)] if isinstance(prompts, int) else prompts
    return Plan(read_labels(labels), texts, count, tokens)


def collected(
    layers: Mapping[str, Any],
    plan: Plan,
    encode: Encode = encode,
    batches: Iterable[Sequence[int]] | None = None,
    tells: bool = True,
) -> Sums:
    """Draws the prompts as a host does: with guidance, its conditional half last, and telling how
    far it is, or not."""
    sums = Sums({})
    collector = Collector(layers, plan, sums)
    with collector.riding():
        for batch in batches or [[i] for i in range(len(plan.prompts))]:
            told = [encode([text for _, text in plan.words(i)]) for i in batch]
            collector.start([Picture(k - len(batch), i, told[k]) for k, i in enumerate(batch)])
            cond = encode([bare(plan.prompts[i]) for i in batch])
            context = torch.cat([encode([""] * len(batch)), cond])
            for step in range(STEPS):
                for path, layer in layers.items():
                    x = torch.stack([noise(path, i, step) for i in batch])
                    layer(torch.cat([x, x]), context)
                if tells:
                    collector.progress = (step + 1) / STEPS
            collector.finish()
    return sums


@dataclass
class Seen:
    """What one layer did for one prompt, in f64: all queries of all steps, each times the root of
    its weight."""

    weight: float  # of all queries
    a: Tensor  # [H, n, C]
    output: Tensor  # [H, n, E]
    changes: dict[int, Tensor]  # Δ [H, n, E], by side


def written_out(
    layers: Mapping[str, Layer], plan: Plan, encode: Encode = encode, tells: bool = True
) -> dict[str, list[Seen]]:
    """The same from the formulas, prompt by prompt."""
    seen: dict[str, list[Seen]] = {}
    steps = [(1 - step / STEPS) ** 2 if tells else 1.0 for step in range(STEPS)]
    weights = torch.tensor(steps, dtype=F64).repeat_interleave(QUERIES)
    root = weights.sqrt()[:, None]
    for path, layer in layers.items():
        exact = copy.deepcopy(layer).double()
        seen[path] = []
        for i, prompt in enumerate(plan.prompts):
            x = torch.cat([noise(path, i, step) for step in range(STEPS)]).double()
            context = encode([bare(prompt)])[0].double()
            a = exact.map_of(x, context)
            output = a @ exact.split(exact.to_v(context))
            told: dict[int, list[Tensor]] = {}
            for side, text in plan.words(i):
                other = encode([text])[0].double()
                mixed = exact.map_of(x, other) @ exact.split(exact.to_v(other))
                told.setdefault(side, []).append(mixed)
            changes = {
                side: root * (torch.stack(all_).mean(0) - output) for side, all_ in told.items()
            }
            seen[path].append(Seen(float(weights.sum()), root * a, root * output, changes))
    return seen


def summed(layers: Mapping[str, Layer], plan: Plan, seen: Mapping[str, list[Seen]]) -> Sums:
    """What sums.py says that they are, in f64."""
    sums = Sums({})
    for path, layer in layers.items():
        width = layer.to_q.out_features // layer.heads
        made = LayerSums(
            len(plan.sides), len(plan.groups), layer.heads, TOKENS, width, torch.device("cpu")
        )
        for name, tensor in made.tensors().items():
            setattr(made, name, tensor.double())
        for i, one in enumerate(seen[path]):
            part = CHECK_PART if plan.checks(i) else FIT_PART
            moment, energy = one.a.mT @ one.a, one.output.square().sum()
            for g, prompts in enumerate(plan.groups):
                if i in prompts:
                    made.moment[part, g] += moment
                    made.output[part, g] += energy
                    made.queries[part, g] += one.weight
            for side, change in one.changes.items():
                made.cross[part, side] += one.a.mT @ change
                made.change[part, side] += change.square().sum()
            # The nearest by ratio.
            length = min(range(3), key=lambda k: abs(np.log(plan.lengths[i] / LENGTHS[k])))
            made.lengths[length] += moment.sum(0)
            made.length_output[length] += energy
        sums.layers[path] = made
    return sums


# Phrasings that are averaged, a side that fits into some prompts alone, and a label of one side.
LABELS = {
    "light": (["bright", "lit"], "dark"),
    "calm": ("calm", "so very wild"),
    "sharp": "sharp",
}
# Of one to four tokens of five.
PROMPTS = [
    "house", "a {words} tree", "a red car by", "one two three", "sun", "cat", "a {words} dog",
    "bird, {words}", "the old blue boat", "fish", "a cup",
]  # fmt: skip


@dataclass
class Fit:
    layers: dict[str, Layer]
    plan: Plan
    seen: dict[str, list[Seen]]
    exact: Sums


@pytest.fixture(scope="module")
def fit() -> Fit:
    layers, plan = make_layers(), make_plan(LABELS, PROMPTS)
    assert len(plan.groups) == 2
    seen = written_out(layers, plan)
    return Fit(layers, plan, seen, summed(layers, plan, seen))


def solved(plan: Plan, sums: Sums, **options: Any) -> Fitted:
    names = {path: f"ldm.{path}" for path in sums.layers}
    options = {"base": "other", "ldm_names": names, "made": {}, "dtype": torch.float32, **options}
    return fitted_adapter(plan, sums, **options)


def saved(fitted: Fitted, folder: Path) -> RowFile:
    """As hosts read it."""
    path = folder / "fitted.safetensors"
    Adapter.from_tensors(dict(fitted.tensors), dict(fitted.metadata)).save(path)
    return open_rows(path)


def values_of(file: RowFile, label: str, side: str, layer: str, heads: int) -> Tensor:
    """V_a [H, C, E] that a file gives at weight 1 or -1, in f64."""
    A = file.coefficients({label: {"positive": 1, "negative": -1}[side]})
    whole = A.double() @ file.rows[layer].double()
    return whole.unflatten(1, (heads, -1)).transpose(0, 1)


# --- the solver ---


def maps(*shape: int, seed: str, sharpness: float = 2.0) -> Tensor:
    """Random attention."""
    return (sharpness * randn(*shape, seed=seed).double()).softmax(-1)


def penalties(a: Tensor, ridge: float) -> Tensor:
    """What the squares of every token's values are multiplied by [H, C]: ridge·Σa², and a floor."""
    own = a.square().sum(-2)
    return ridge * own + FLOOR * own.mean(-1, keepdim=True)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 1.0])
def test_values_are_those_of_least_squares(ridge: float) -> None:
    a, change = maps(3, 200, TOKENS, seed="a"), randn(3, 200, 5, seed="change").double()
    found = ridge_values(a.mT @ a, a.mT @ change, ridge)
    for h in range(3):
        system = np.concatenate([a[h], np.diag(penalties(a, ridge)[h].sqrt())])
        right = np.concatenate([change[h], np.zeros((TOKENS, 5))])
        expected = torch.from_numpy(np.linalg.lstsq(system, right)[0])
        # Rounding of f64, and squares of a condition of about ten.
        assert difference(found[h], expected) < 1e-8


def test_values_minimize_what_the_solver_says() -> None:
    a, change = maps(2, 60, 5, seed="b"), randn(2, 60, 3, seed="other").double()
    ridge = 0.03
    values = torch.zeros(2, 5, 3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        left = (a @ values - change).square().sum()
        whole = left + (penalties(a, ridge)[..., None] * values.square()).sum()
        whole.backward()
        return whole

    optimizer.step(loss)
    found = ridge_values(a.mT @ a, a.mT @ change, ridge)
    assert difference(found, values.detach()) < 1e-4  # where L-BFGS stops


def test_a_token_that_nothing_attends_to() -> None:
    """It has no moment and no values, and does not keep the others from theirs."""
    a = torch.cat([maps(1, 200, 4, seed="a"), torch.zeros(1, 200, 1, dtype=F64)], -1)
    true = randn(1, 5, 3, seed="true").double()
    found = ridge_values(a.mT @ a, a.mT @ a @ true, 1e-6)
    assert not found[:, 4].any()
    assert difference(found[:, :4], true[:, :4]) < 1e-4  # the ridge, times a condition of ten


def test_every_token_is_ridged_by_its_own_moment() -> None:
    """One head leaves the first token a hundredth of what it attends to at most, and to one of the
    others; another attends evenly."""
    heads, queries = 2, 400
    others = maps(queries, TOKENS - 1, seed="who", sharpness=9)
    share = 0.02 * torch.rand(queries, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    sink = torch.cat([1 - share, share * others], -1)
    a = torch.stack([sink, maps(queries, TOKENS, seed="even")])
    true = randn(heads, TOKENS, 4, seed="true").double()
    true[:, 0] = 0  # CLIP's start token never sees the words
    moment, cross = a.mT @ a, a.mT @ a @ true

    def lost(values: Tensor) -> Tensor:
        """Of every other token's values, by head [H, C - 1]"""
        return ((values - true).norm(dim=-1) / true.norm(dim=-1))[:, 1:]

    ridge = 1e-3
    assert lost(ridge_values(moment, cross, ridge)).max() < 0.05
    mean = moment.diagonal(dim1=1, dim2=2).mean(-1)
    even = moment + ridge * mean[:, None, None] * torch.eye(TOKENS, dtype=F64)
    by_mean = lost(torch.linalg.solve(even, cross))
    assert by_mean[1].max() < 0.05
    assert by_mean[0].min() > 0.5


def test_a_matrix_that_is_no_moment() -> None:
    wrong = torch.tensor([[[1.0, 2], [2, 1]]], dtype=F64)
    assert "moments" in refused(ridge_values, wrong, torch.ones(1, 2, 1, dtype=F64), 1e-3)


# --- layers of which the answer is known ---


def with_blind_keys(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """Whose maps do not depend on the context's last half."""
    for layer in layers.values():
        layer.to_k.weight.data[:, CONTEXT // 2 :] = 0
    return layers


def shifted(shifts: Mapping[str, Tensor]) -> Encode:
    """An encoder that adds to the context of the bare prompt what a label's words say."""

    def encoded(texts: Sequence[str]) -> Tensor:
        parts = [text.partition(", ") for text in texts]
        return torch.stack([encode([prompt])[0] + shifts.get(w, 0) for prompt, _, w in parts])

    return encoded


@pytest.mark.parametrize("rank", [TOKENS, 1])
def test_known_values_come_back(rank: int, tmp_path: Path) -> None:
    """Words that move no key and every token's values: Δ is a·V_true to the last digit."""
    layers = with_blind_keys(make_layers())
    plan = make_plan({"light": ("bright", "dark")}, 12)
    shifts = {}
    for words in ("bright", "dark"):
        half = randn(TOKENS, CONTEXT // 2, seed=words)
        if rank == 1:
            half = randn(TOKENS, 1, seed=words) * randn(1, CONTEXT // 2, seed=f"{words} to")
        shifts[words] = torch.cat([torch.zeros_like(half), half], 1)
    sums = collected(layers, plan, shifted(shifts))
    file = saved(solved(plan, sums, rank=rank, ridge=1e-7), tmp_path)
    for path, layer in layers.items():
        for side, words in (("positive", "bright"), ("negative", "dark")):
            true = layer.split(shifts[words] @ layer.to_v.weight.T)
            found = values_of(file, "light", side, path, layer.heads)
            # Sums in f32 and the floor of 1e-6, times a condition of some ten.
            assert difference(found, true) < 1e-4


# --- the collector ---

SUMS = tuple(LayerSums(1, 1, 1, 1, 1, "cpu").tensors())


@pytest.mark.parametrize("block", [None, 1, 700])
@pytest.mark.parametrize(
    "batches", [None, [[10, 0, 3], [1], [7, 2], [5, 4, 9, 8, 6]]], ids=["one by one", "batches"]
)
def test_sums_are_what_the_formulas_say(
    fit: Fit, block: int | None, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in blocks of a few queries, and whoever is in a batch."""
    if block is not None:
        monkeypatch.setattr(collect, "BLOCK", block)
    sums = collected(fit.layers, fit.plan, batches=batches)
    assert sums.done == set(range(len(PROMPTS)))
    assert [*sums.layers] == [*fit.layers]
    assert_equal(sums, fit.exact)
    for layer in sums.layers.values():
        wrong, whole = layer.mismatch
        assert wrong < 1e-10 * whole  # f32, squared


def assert_equal(found: Sums, expected: Sums) -> None:
    for path, layer in found.layers.items():
        for name in SUMS:
            if name != "mismatch":
                one, other = getattr(layer, name), getattr(expected.layers[path], name)
                assert one.dtype == torch.float32
                # f32, over some hundred queries.
                assert difference(one, other) < 3e-6, name


def test_all_steps_count_alike_where_no_one_tells_them_apart(fit: Fit) -> None:
    seen = written_out(fit.layers, fit.plan, tells=False)
    sums = collected(fit.layers, fit.plan, tells=False)
    assert_equal(sums, summed(fit.layers, fit.plan, seen))


def test_sums_are_as_large_as_is_said(fit: Fit) -> None:
    sums = collected(fit.layers, fit.plan)
    shapes = {
        p: (layer.heads, layer.to_q.out_features // layer.heads) for p, layer in fit.layers.items()
    }
    tensors = [
        t for layer in sums.layers.values() for t in (layer.moment, layer.cross, layer.lengths)
    ]
    assert sums_size(fit.plan, shapes, TOKENS) == sum(t.nbytes for t in tensors)


def test_hooks_are_for_as_long_as_it_rides(fit: Fit) -> None:
    layers = make_layers()
    before = {name: set(vars(m)) for layer in layers.values() for name, m in layer.named_modules()}
    collector = Collector(layers, fit.plan, Sums({}))

    def hooks() -> int:
        modules = [m for layer in layers.values() for m in layer.modules()]
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    with collector.riding():
        assert hooks() == 8
    assert not hooks()
    with pytest.raises(ZeroDivisionError), collector.riding():
        raise ZeroDivisionError
    assert not hooks()
    after = {name: set(vars(m)) for layer in layers.values() for name, m in layer.named_modules()}
    assert after == before


def test_products_are_exact_under_autocast(fit: Fit) -> None:
    """Of what the projections returned, which may be rounded to bf16."""
    path, layer = "down.attn2", fit.layers["down.attn2"]
    x, context = noise(path, 0, 0)[None], encode(["house"])
    told = encode([text for _, text in fit.plan.words(0)])
    sums = Sums({})
    collector = Collector({path: layer}, fit.plan, sums)
    with torch.autocast("cpu", torch.bfloat16), collector.riding():
        collector.start([Picture(0, 0, told)])
        layer(x, context)
        q, k = layer.to_q(x)[0], layer.to_k(context)[0]
    assert q.dtype == torch.bfloat16
    q, k = layer.split(q.double()), layer.split(k.double())
    a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    assert difference(sums.layers[path].moment[FIT_PART, 0], a.mT @ a) < 1e-6  # f32


def test_what_runs_outside_of_a_picture_is_not_added(fit: Fit) -> None:
    sums = Sums({})
    layer = fit.layers["up.attn2"]
    x, context = noise("up.attn2", 0, 0)[None], encode(["house"])
    with Collector({"up.attn2": layer}, fit.plan, sums).riding():
        layer(x, context)
    assert not sums.layers


def test_collecting_changes_nothing(fit: Fit) -> None:
    layer = fit.layers["down.attn2"]
    x, context = noise("down.attn2", 0, 0)[None], encode(["house"])
    expected = layer(x, context)
    collector = Collector({"down.attn2": layer}, fit.plan, Sums({}))
    with collector.riding():
        collector.start([Picture(0, 0, encode([text for _, text in fit.plan.words(0)]))])
        assert torch.equal(layer(x, context), expected)


class Squared(Layer):
    """Not softmax(Q·Kᵀ/√d)·V."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        a = self.map_of(x, context).square() @ self.split(self.to_v(context))
        self.to_q(x), self.to_k(context)
        out: Tensor = self.to_out[0](a.transpose(1, 2).flatten(2))
        return out


class Fused(Layer):
    """That never calls its projections."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](x @ self.to_q.weight.T)
        return out


@pytest.mark.parametrize(("kind", "word"), [(Squared, "another output"), (Fused, "fused")])
def test_layers_that_compute_something_else(kind: type[Layer], word: str) -> None:
    said = refused(collected, {"mid.attn2": kind(2, 5, "mid")}, make_plan({"light": "bright"}))
    assert "mid.attn2" in said
    assert word in said


def test_values_that_are_not_finite() -> None:
    layer = Layer(2, 5, "mid")
    layer.to_v.weight.data[0] = torch.inf
    said = refused(collected, {"mid.attn2": layer}, make_plan({"light": "bright"}))
    assert "mid.attn2" in said


def test_contexts_of_another_size() -> None:
    def longer(texts: Sequence[str]) -> Tensor:
        made = encode(texts)
        return torch.cat([made, made], 1) if "," in texts[0] else made

    said = refused(collected, make_layers(), make_plan({"light": "bright"}), longer)
    assert f"[{2 * TOKENS}, {CONTEXT}]" in said
    assert f"[{TOKENS}, {CONTEXT}]" in said


# --- files of sums ---


def test_sums_come_back_from_their_file(fit: Fit, tmp_path: Path) -> None:
    sums, path = collected(fit.layers, fit.plan, batches=[[0, 3], [1]]), tmp_path / "sums"
    sums.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["sums"]
    read = Sums({})
    read.load(path)
    assert read.done == {0, 1, 3}
    assert [*read.layers] == [*sums.layers]
    for name, layer in sums.layers.items():
        for key in SUMS:
            assert torch.equal(getattr(read.layers[name], key), getattr(layer, key))


def test_sums_of_another_fit_are_refused(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "sums"
    sums = collected(fit.layers, fit.plan, batches=[[0]])
    sums.settings = {"steps": 8, "seed": 0}
    sums.save(path)
    other = Sums({"steps": 9, "seed": 0})
    said = refused(other.load, path)
    assert re.search(r"sums: .*steps: expected 9, found 8", said)
    assert not other.layers
    assert not other.done


@pytest.mark.parametrize("content", [b"", b"text", (2).to_bytes(8, "little") + b"{}"])
def test_other_files_are_no_sums(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sums"
    path.write_bytes(content)
    said = refused(Sums({"steps": 8}).load, path)
    assert "sums: not a file of sums" in said


def test_sums_are_written_whole_or_not_at_all(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sums"
    sums = collected(fit.layers, fit.plan, batches=[[0]])
    sums.save(path)
    before = path.read_bytes()

    def fails(tensors: Any, to: Path, *_: Any) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("vmix.fit.sums.save_file", fails)
    with pytest.raises(KeyboardInterrupt):
        sums.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["sums"]
    assert path.read_bytes() == before


# --- the profile ---


def left_over(sums: Sums, plan: Plan, side: int, found: solve.FittedSide) -> float:
    """What the fit minimizes, of the rows in its file: Σ over layers, which count alike."""
    group = plan.group(plan.sides[side])
    total = 0.0
    for path, layer in sums.layers.items():
        moment = regularized(layer.moment[FIT_PART, group], found.ridge)
        cross = layer.cross[FIT_PART, side]
        values = found.values(path).unflatten(1, (layer.heads, -1)).transpose(0, 1)
        told = (moment @ values - 2 * cross).mul(values).sum()
        total += float(told + layer.change[FIT_PART, side]) / float(layer.output[CHECK_PART, group])
    return total


def side_of(fit: Fit, side: int, rank: Any, ridge: float | None = 1e-2) -> solve.FittedSide:
    return solve_side(fit.exact, fit.plan, side, rank, F64, ridge)


def test_more_rows_leave_less_over(fit: Fit) -> None:
    for side in range(len(fit.plan.sides)):
        left = [
            left_over(fit.exact, fit.plan, side, side_of(fit, side, r))
            for r in ("bias", *range(1, TOKENS + 1))
        ]
        assert all(more < less for less, more in pairwise(left))


def test_every_turn_leaves_less_over(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in range(len(fit.plan.sides)):
        for rank in (1, 2, 4):
            left = []
            for turns in (0, 1, 2, solve.TURNS, 20):
                with monkeypatch.context() as patch:
                    patch.setattr(solve, "TURNS", turns)
                    left.append(left_over(fit.exact, fit.plan, side, side_of(fit, side, rank)))
            # The profile is rounded to f32 at the end.
            assert all(more <= less + 1e-6 for less, more in pairwise(left))
            assert left[-1] < left[0] * (1 - 1e-4)


def test_as_many_rows_as_tokens_are_the_whole_table(fit: Fit) -> None:
    for side, one in enumerate(fit.plan.sides):
        found = side_of(fit, side, TOKENS)
        assert found.profile.shape == (TOKENS, TOKENS)
        for path, layer in fit.exact.layers.items():
            moment = layer.moment[FIT_PART, fit.plan.group(one)]
            table = ridge_values(moment, layer.cross[FIT_PART, side], 1e-2)
            values = found.values(path).unflatten(1, (layer.heads, -1)).transpose(0, 1)
            # Any profile of full rank does, so that its rounding to f32 costs nothing.
            assert difference(values, table) < 1e-8


def test_rows_are_the_best_for_their_profile(fit: Fit) -> None:
    """By numpy's solver on the stored maps, head by head."""
    ridge = 1e-2
    for side, one in enumerate(fit.plan.sides):
        found = side_of(fit, side, 3)
        P = found.profile.double()
        for path, layer in fit.layers.items():
            fitted = [i for i in one.prompts if not fit.plan.checks(i)]
            a = torch.cat([fit.seen[path][i].a for i in fitted], 1)
            change = torch.cat([fit.seen[path][i].changes[side] for i in fitted], 1)
            rows = found.rows[path].unflatten(1, (layer.heads, -1)).transpose(0, 1)
            for h in range(layer.heads):
                weights = penalties(a, ridge)[h].sqrt()
                system = np.concatenate([a[h] @ P, weights[:, None] * P])
                right = np.concatenate([change[h], np.zeros((TOKENS, change.shape[-1]))])
                expected = torch.from_numpy(np.linalg.lstsq(system, right)[0])
                assert difference(rows[h], expected) < 1e-8  # f64, and a condition of some ten


def test_bias_is_one_row_for_all_tokens(fit: Fit) -> None:
    """A map's shares add up to 1, so that it is ΣΔ over the number of queries and the ridge."""
    ridge = 1e-2
    for side, one in enumerate(fit.plan.sides):
        found = side_of(fit, side, "bias")
        assert torch.equal(found.profile, torch.ones(TOKENS, 1))
        fitted = [i for i in one.prompts if not fit.plan.checks(i)]
        for path in fit.layers:
            a = torch.cat([fit.seen[path][i].a for i in fitted], 1)
            change = torch.cat([fit.seen[path][i].changes[side] for i in fitted], 1)
            whole = sum(fit.seen[path][i].weight for i in fitted) + penalties(a, ridge).sum(-1)
            # Both are times the root of the weight, which is what a map then adds up to.
            weighted = (a.sum(-1, keepdim=True) * change).sum(1)
            expected = (weighted / whole[:, None]).flatten()
            assert difference(found.rows[path][0], expected) < 1e-10  # the order of sums in f64


def test_a_profile_has_one_size_and_sign(fit: Fit) -> None:
    for rank in (1, 3):
        profile = side_of(fit, 0, rank).profile
        assert profile.dtype == torch.float32
        assert (profile.abs().amax(0) == 1).all()
        assert (profile.amax(0) == 1).all()


def test_the_ridge_is_the_one_that_explains_most(fit: Fit) -> None:
    for side in range(len(fit.plan.sides)):
        found = side_of(fit, side, 2, None)
        tried = {ridge: side_of(fit, side, 2, ridge).explained for ridge in RIDGES}
        # Alone, a ridge begins elsewhere, and a few turns are not the limit.
        assert found.explained == pytest.approx(tried[found.ridge], abs=0.02)
        assert found.explained >= max(tried.values()) - 0.02


@pytest.mark.parametrize("exact", [True, False])
def test_words_that_change_nothing(fit: Fit, exact: bool, tmp_path: Path) -> None:
    """Not at all, or by what f32 rounds off."""
    plan, nothing = make_plan({"light": ("bright", "dark")}), shifted({})
    sums = collected(fit.layers, plan, nothing)
    if exact:
        sums = summed(fit.layers, plan, written_out(fit.layers, plan, nothing))
    fitted = solved(plan, sums, rank=3)
    for side in fitted.sides.values():
        largest = max(float(rows.abs().max()) for rows in side.rows.values())
        assert largest == 0 if exact else largest < 1e-5
    assert all("hardly change" in said for said in fitted.warnings[:2])
    file = saved(fitted, tmp_path)
    assert {(label, side) for label, side in file.row_sides} == set(fitted.sides)


@pytest.mark.parametrize("rank", [0, -1, TOKENS + 1, True, 2.0, "4", None])
def test_ranks_that_are_refused(rank: Any) -> None:
    said = refused(check_rank, rank, TOKENS)
    assert f"1 to {TOKENS}" in said
    assert "bias" in said
    assert repr(rank) in said


def test_rows_that_a_dtype_cannot_hold() -> None:
    layers = make_layers()
    for layer in layers.values():
        layer.to_v.weight.data *= 1e6
    plan = make_plan({"light": "bright"})
    sums = collected(layers, plan)
    assert "float16" in refused(solved, plan, sums, dtype=torch.float16)
    solved(plan, sums, dtype=torch.bfloat16)


# --- the report ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, "bias"])
def test_the_explained_share_is_that_of_the_file(
    fit: Fit, rank: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """On the prompts to check with, of the rows as the file has them."""
    fitted = solved(fit.plan, collected(fit.layers, fit.plan), rank=rank, dtype=dtype)
    file = saved(fitted, tmp_path)
    for i, side in enumerate(fit.plan.sides):
        checks = [prompt for prompt in side.prompts if fit.plan.checks(prompt)]
        left = whole = 0.0
        for path, layer in fit.layers.items():
            seen = [fit.seen[path][prompt] for prompt in checks]
            energy = sum(float(one.output.square().sum()) for one in seen)
            values = values_of(file, side.label, side.side, path, layer.heads)
            for one in seen:
                left += float((one.a @ values - one.changes[i]).square().sum()) / energy
                whole += float(one.changes[i].square().sum()) / energy
        explained = fitted.sides[side.label, side.side].explained
        assert explained == pytest.approx(1 - left / whole, abs=1e-6)  # sums in f32
        said = next(one for one in file.labels if one.name == side.label)
        # Four digits are written.
        assert said.effect[f"explained_{side.side}"] == pytest.approx(explained, rel=1e-3)


class Measured:
    """The report's numbers from stored maps: root mean squares over layers, of all prompts."""

    def __init__(self, fit: Fit, fitted: Fitted) -> None:
        self.fit, self.fitted = fit, fitted
        self.prompts = max(fit.plan.groups, key=len)

    def values(self, label: str, sides: Sequence[str]) -> dict[str, Tensor]:
        signs = {"positive": 1, "negative": -1} if len(sides) > 1 else {sides[0]: 1}
        found = {side: self.fitted.sides[label, side] for side in signs}
        return {
            path: torch.stack([signs[side] * one.values(path) for side, one in found.items()]).sum(
                0
            )
            for path in self.fit.layers
        }

    def product(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        shares = []
        for path, layer in self.fit.layers.items():
            v, w = (x[path].unflatten(1, (layer.heads, -1)).transpose(0, 1) for x in (one, other))
            seen = [self.fit.seen[path][i] for i in self.prompts]
            energy = sum(float(s.output.square().sum()) for s in seen)
            shares.append(sum(float((s.a @ v).mul(s.a @ w).sum()) for s in seen) / energy)
        return sum(shares) / len(shares)

    def cosine(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
        sizes = self.product(one, one) * self.product(other, other)
        return self.product(one, other) / sizes**0.5


@pytest.fixture(scope="module")
def reported(fit: Fit) -> Fitted:
    return solved(fit.plan, fit.exact, rank=3)


def test_sizes_are_relative_to_the_attention_output(fit: Fit, reported: Fitted) -> None:
    measured = Measured(fit, reported)
    for label, side in reported.sides:
        values = measured.values(label, [side])
        found = reported.effects[label].numbers
        # Four digits are written.
        expected = measured.product(values, values) ** 0.5
        assert found[f"size_{side}"] == pytest.approx(expected, rel=1e-3)
        assert found[f"ridge_{side}"] == reported.sides[label, side].ridge


def test_the_size_of_words_is_that_on_the_prompts_they_fit_into(fit: Fit, reported: Fitted) -> None:
    for i, side in enumerate(fit.plan.sides):
        shares = []
        for seen in fit.seen.values():
            change = sum(float(seen[p].changes[i].square().sum()) for p in side.prompts)
            shares.append(change / sum(float(seen[p].output.square().sum()) for p in side.prompts))
        expected = (sum(shares) / len(shares)) ** 0.5
        found = reported.effects[side.label].numbers[f"words_{side.side}"]
        assert found == pytest.approx(expected, rel=1e-3), side  # four digits are written


def test_directions_are_compared_by_what_they_do(fit: Fit, reported: Fitted) -> None:
    measured = Measured(fit, reported)
    sides = {label.name: [*label.sides] for label in fit.plan.labels}
    for label, names in sides.items():
        effect = reported.effects[label]
        if len(names) == 2:
            both = [measured.values(label, [name]) for name in names]
            expected = measured.cosine(*both)
            assert effect.numbers["cosine_sides"] == pytest.approx(expected, rel=1e-3)
        own = measured.values(label, names)
        others = {
            other: measured.cosine(own, measured.values(other, sides[other]))
            for other in sides
            if other != label
        }
        nearest = max(others, key=lambda name: abs(others[name]))
        assert effect.nearest == nearest
        assert effect.numbers[f"cosine_with {nearest}"] == pytest.approx(others[nearest], rel=1e-3)


def test_effects_by_length_of_prompt(tmp_path: Path) -> None:
    """With the mean map of a layer's heads: where there is one head, it is the map itself."""
    prompts = ["one", "a b", " ".join("abcdefghijkl"), *(f"p{i}" for i in range(4))]
    layers = {"down.attn2": Layer(1, 5, "down")}
    plan = make_plan({"light": "bright"}, prompts, tokens=40)
    assert plan.lengths[2] == 12  # nearer to 20 than to 5
    seen = written_out(layers, plan)
    fitted = solved(plan, summed(layers, plan, seen), rank=2)
    numbers = fitted.effects["light"].numbers
    assert "size_positive_60_tokens" not in numbers
    for length, chosen in ((5, [0, 1, 3, 4, 5, 6]), (20, [2])):
        values = fitted.sides["light", "positive"].values("down.attn2")
        told = sum(float((seen["down.attn2"][i].a[0] @ values).square().sum()) for i in chosen)
        whole = sum(float(seen["down.attn2"][i].output.square().sum()) for i in chosen)
        expected = (told / whole) ** 0.5
        found = numbers[f"size_positive_{length}_tokens"]
        assert found == pytest.approx(expected, rel=1e-3)  # four digits are written


def test_pairs_that_were_skipped_are_counted(fit: Fit, reported: Fitted) -> None:
    negative = next(side for side in fit.plan.sides if side.phrasings == ("so very wild",))
    assert len(negative.prompts) == 8
    for label, effect in reported.effects.items():
        skipped = {k: v for k, v in effect.numbers.items() if k.startswith("skipped_")}
        assert skipped.pop("skipped_positive") == 0
        assert skipped.get("skipped_negative", 0) == (len(PROMPTS) - 8 if label == "calm" else 0)


def test_attention_is_the_mean_of_all_maps(fit: Fit, tmp_path: Path) -> None:
    file = saved(solved(fit.plan, collected(fit.layers, fit.plan)), tmp_path)
    means = [
        torch.cat([(one.a.mT @ one.a) / one.weight for one in seen]).mean(0)
        for seen in fit.seen.values()
    ]
    assert file.attention is not None
    assert difference(file.attention, torch.stack(means).mean(0)) < 1e-6  # f32
    assert float(file.attention.sum()) == pytest.approx(1, abs=1e-5)


GOOD = {
    f"{key}_{side}": number
    for side in ("positive", "negative")
    for key, number in {"explained": 0.8, "size": 0.2, "words": 0.25}.items()
} | {"cosine_sides": -0.4}


@pytest.mark.parametrize(
    ("numbers", "nearest", "said"),
    [
        ({}, None, []),
        ({"words_positive": 0.02}, None, [r"light.*positive words hardly change.*2\.0%"]),
        ({"words_negative": 0.02}, None, ["light.*negative words hardly change"]),
        ({"explained_negative": 0.1}, None, ["light.*only 10% of what its negative words"]),
        # That nothing is explained of nothing goes without saying.
        ({"words_positive": 0.02, "explained_positive": 0.1}, None, ["hardly change"]),
        ({"cosine_sides": 0.9}, None, [r"light.*both sides do nearly the same.*0\.90"]),
        ({"cosine_with tone": 0.9}, "tone", ["light.*nearly the same as 'tone'"]),
        ({"cosine_with tone": -0.9}, "tone", ["light.*nearly the opposite of 'tone'"]),
        ({"cosine_with tone": 0.5}, "tone", []),
        # Which way they go is chance.
        ({"words_positive": 0.0, "cosine_sides": 0.9}, None, ["hardly"]),
    ],
)
def test_warnings(numbers: dict[str, float], nearest: str | None, said: list[str]) -> None:
    found = warnings({"light": Effect({**GOOD, **numbers}, nearest)})
    assert len(found) == len(said)
    for sentence, pattern in zip(found, said, strict=True):
        assert re.search(pattern, sentence)
        assert "\n" not in sentence


def test_warnings_of_what_a_fit_finds(tmp_path: Path) -> None:
    """Words that say the same, words that say nothing and words that move the maps alone."""
    layers = with_blind_keys(make_layers())
    value = torch.cat([torch.zeros(TOKENS, CONTEXT // 2), randn(TOKENS, CONTEXT // 2)], 1)
    key = torch.cat([6 * randn(TOKENS, CONTEXT // 2, seed="k"), torch.zeros(TOKENS, 6)], 1)
    shifts = {"bright": value, "lit": value, "dark": -value, "rude": key}
    plan = make_plan(
        {"light": ("bright", "dark"), "glow": ("lit", "bright"), "odd": "rude", "nil": "nothing"},
        12,
    )
    fitted = solved(plan, collected(layers, plan, shifted(shifts)), rank=2)
    expected = [
        "glow.*both sides do nearly the same",
        "nil.*hardly change",
        "odd.*only .* of what its positive words change",
    ]
    for pattern in expected:
        assert [said for said in fitted.warnings if re.search(pattern, said)], pattern
    assert not [said for said in fitted.warnings if said.startswith("label 'light': both")]
    assert saved(fitted, tmp_path).made["warnings"] == fitted.warnings


def test_labels_that_coincide() -> None:
    layers = with_blind_keys(make_layers())
    value = torch.cat([torch.zeros(TOKENS, CONTEXT // 2), randn(TOKENS, CONTEXT // 2)], 1)
    plan = make_plan({"light": ("bright", "dark"), "gloom": ("dark", "bright")}, 12)
    sums = collected(layers, plan, shifted({"bright": value, "dark": -value}))
    said = solved(plan, sums, rank=2).warnings
    assert re.search("'light': does nearly the opposite of 'gloom'", " ".join(said))


def test_the_table_has_a_line_for_every_side(fit: Fit, reported: Fitted) -> None:
    head, *lines = table(reported.effects).splitlines()
    assert len(lines) == len(fit.plan.sides)
    for side, line in zip(fit.plan.sides, lines, strict=True):
        explained = reported.effects[side.label].numbers[f"explained_{side.side}"]
        assert line.split()[:3] == [side.label, side.side, f"{explained:.0%}"]
    assert "explained" in head


# --- the file ---


def test_what_a_fitted_file_says(fit: Fit, tmp_path: Path) -> None:
    labels = tmp_path / "labels.toml"
    labels.write_text(
        '[[label]]\nname = "light"\ndimension = "lighting"\npositive = "bright"\n'
        'negative = ["dark", "dim"]\nstep = 0.1\nrange = [-1, 2]\ndisplay_names = {de = "Licht"}\n'
        '[[label]]\nname = "calm"\n'
    )
    plan = make_plan(labels)
    emb = randn(2, 2, 9)
    fitted = solved(
        plan,
        collected(fit.layers, plan),
        rank=2,
        dtype=torch.float16,
        aes_emb=emb,
        made={"base": "tiny", "steps": STEPS},
        modelspec={"title": "light, calm"},
    )
    file = saved(fitted, tmp_path)
    assert (file.base, file.context_tokens, file.context_dim) == ("other", TOKENS, 9)
    assert (file.apply_to, file.coefficient_kind, file.dtype) == ("cond", "linear", torch.float16)
    assert file.row_sides == (
        *[("light", "positive")] * 2,
        *[("light", "negative")] * 2,
        *[("calm", "positive")] * 2,
    )
    assert file.ldm_names == {path: f"ldm.{path}" for path in fit.layers}
    light, calm = file.labels
    assert (light.default, light.neutral, light.range, light.step) == (0, 0, (-1, 2), 0.1)
    assert (light.dimension, light.display_names) == ("lighting", {"de": "Licht"})
    assert (light.positive, light.negative) == (("bright",), ("dark", "dim"))
    assert (calm.default, calm.neutral, calm.range, calm.step) == (0, 0, (0, 1.5), 0.05)
    assert (calm.positive, calm.negative) == (("calm",), ("",))
    assert {key: file.made[key] for key in ("method", "rank", "prompts", "base", "steps")} == {
        "method": "fitted", "rank": 2, "prompts": 8, "base": "tiny", "steps": STEPS,
    }  # fmt: skip
    assert torch.equal(file.aes_emb, emb)  # type: ignore[arg-type]
    assert file.metadata["modelspec.title"] == "light, calm"
    # Weights are 0 where nothing is chosen: then nothing is mixed.
    assert not file.coefficients(None).any()
    assert not file.coefficients({"calm": -1}).any()


def test_all_labels_at_once_are_refused(fit: Fit, tmp_path: Path) -> None:
    file = saved(solved(fit.plan, fit.exact), tmp_path)
    for other in (file, Adapter.open(tmp_path / "fitted.safetensors")):
        with pytest.raises(ValueError, match="light, calm, sharp"):
            other.weights("all")


# --- the plan ---


@pytest.mark.parametrize(
    ("prompt", "plain", "told"),
    [
        ("a {words} car", "a car", "a deep red car"),
        ("a car, {words}", "a car", "a car, deep red"),
        ("{words}, a car", "a car", "deep red, a car"),
        ("a car, {words}, a road", "a car, a road", "a car, deep red, a road"),
        ("a car,{words},a road", "a car,a road", "a car,deep red,a road"),
        ("a car", "a car", "a car, deep red"),
        ("a car.", "a car.", "a car, deep red"),
        ("a car, ", "a car, ", "a car, deep red"),
        ("a {words} car, {words}", "a car", "a deep red car, deep red"),
    ],
)
def test_where_words_go(prompt: str, plain: str, told: str) -> None:
    assert bare(prompt) == plain
    assert with_words(prompt, "deep red") == told


def test_every_fourth_prompt_is_to_check_with() -> None:
    plan = make_plan({"light": "bright"}, 13)
    assert [i for i in range(13) if plan.checks(i)] == [3, 7, 11]
    for few in (2, 3):
        plan = make_plan({"light": "bright"}, few)
        assert [i for i in range(few) if plan.checks(i)] == [few - 1]


def test_pairs_that_are_too_long_are_left_out() -> None:
    plan = make_plan({"light": (["bright", "very bright"], "dark"), "calm": "calm"}, [
        "a b c d e f", "a b c d e", "a b c d", "a b c", "a b", "a", "{words} b c d", "e", "f", "g",
    ])  # fmt: skip
    assert plan.too_long == ("a b c d e f",)
    assert plan.prompts[0] == "a b c d e"
    positive, negative, calm = plan.sides
    # All phrasings of a side fit, or none is compared.
    assert positive.prompts == (2, 3, 4, 5, 6, 7, 8)
    assert negative.prompts == calm.prompts == (1, 2, 3, 4, 5, 6, 7, 8)
    assert plan.groups == (positive.prompts, negative.prompts)
    assert [plan.group(side) for side in plan.sides] == [0, 1, 1]
    assert plan.words(0) == []
    assert plan.words(1) == [(1, "a b c d, dark"), (2, "a b c d, calm")]
    assert plan.words(5) == [
        (0, "bright b c d"),
        (0, "very bright b c d"),
        (1, "dark b c d"),
        (2, "calm b c d"),
    ]
    assert plan.lengths[:3] == (5, 4, 3)


@pytest.mark.parametrize("prompts", [["a"], ["a", "a b c d e f"], ["a b c d e f"] * 3])
def test_fewer_than_two_prompts(prompts: list[str]) -> None:
    said = refused(make_plan, {"light": "bright"}, prompts)
    assert "at least 2" in said
    assert "5 tokens" in said


def test_words_that_fit_nowhere() -> None:
    said = refused(
        make_plan, {"ok": "bright", "light": ("bright", "as dark as night")}, ["a b"] * 2
    )
    assert "at least 2" not in said
    assert "'light'" in said
    assert "negative" in said


def test_words_that_fit_into_no_prompt_to_check_with() -> None:
    said = refused(make_plan, {"light": "bright as day"}, ["a", "b", "c", "d e f", "g"])
    assert "'light'" in said


# --- prompts ---


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# about\n a car \n\na {words} cup, ü\na car\n", "utf-8")
    assert read_prompts(path) == read_prompts(str(path)) == ("a car", "a {words} cup, ü")
    assert read_prompts(["# a", "b", "b ", ""]) == ("# a", "b")


def test_prompts_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    assert str(path) in refused(read_prompts, path)
    assert str(tmp_path) in refused(read_prompts, tmp_path)
    path.write_bytes(b"caf\xe9\nb")
    assert "UTF-8" in refused(read_prompts, path)
    path.write_text("# one\na car\n\na car\n")
    assert "at least 2" in refused(read_prompts, path)
    assert "at least 2" in refused(read_prompts, [])
    assert "texts" in refused(read_prompts, ["a", 2])


# Words of the labels' phrases that say nothing about looks, or about a thing's look alone.
PLAIN = {"and", "at", "in", "of", "the", "few", "blue", "field"}


def test_the_prompts_that_come_along() -> None:
    prompts = read_prompts()
    tokenizer = Tokenizer()
    assert len(set(prompts)) == len(prompts) == 40
    lengths = [len(tokenizer.encode(bare(prompt))) - 2 for prompt in prompts]
    assert max(lengths) <= 60
    assert min(lengths) < 4
    assert sum(length >= 50 for length in lengths) >= 4  # all positions see words and padding
    assert 6 <= sum("{words}" in prompt for prompt in prompts) <= 10
    phrases = [w for label in read_labels("default") for ws in label.sides.values() for w in ws]
    words = {word for phrase in phrases for word in re.findall("[a-z]+", phrase.lower())} - PLAIN
    for prompt in prompts:
        assert not words & set(re.findall("[a-z]+", bare(prompt).lower())), prompt
    # All sides fit everywhere.
    plan = Plan(read_labels("default"), prompts, lambda text: len(tokenizer.encode(text)) - 2, 77)
    assert len(plan.groups) == 1
    assert len(plan.prompts) == 40


# --- labels ---


def test_labels_of_a_mapping() -> None:
    light, calm, sharp, soft = read_labels(
        {
            "light": ("bright", "dark"),
            "calm": "calm mood",
            "sharp": (["sharp", "in focus"], ["blurry"]),
            "soft": ("soft light", None),
        }
    )
    assert light == FitLabel("light", ("bright",), ("dark",))
    assert light.sides == {"positive": ("bright",), "negative": ("dark",)}
    assert calm.sides == {"positive": ("calm mood",)}
    assert sharp.sides == {"positive": ("sharp", "in focus"), "negative": ("blurry",)}
    assert soft.sides == {"positive": ("soft light",)}
    assert read_labels([light, calm]) == (light, calm)


def test_labels_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.toml"
    path.write_text(
        '[[label]]\nname = "warm light"\n'
        '[[label]]\nname = "light"\npositive = ["bright", "lit"]\nnegative = "dark"\n'
        'dimension = "x"\nrange = [-1, 2]\nstep = 0.25\ndisplay_names = {de = "Licht"}\n',
        "utf-8",
    )
    warm, light = read_labels(path)
    assert warm == FitLabel("warm light", ("warm light",))
    assert light == FitLabel(
        "light", ("bright", "lit"), ("dark",), "x", (-1.0, 2.0), 0.25, {"de": "Licht"}
    )
    assert read_labels(str(path)) == (warm, light)


@pytest.mark.parametrize("name", LABEL_SETS)
def test_sets_that_come_along(name: str) -> None:
    tokenizer = Tokenizer()
    labels = read_labels(name)
    assert len(labels) > 6
    for label in labels:
        assert label.dimension
        assert set(label.display_names) == {"de", "es", "fr", "ja", "zh"}
        for words in (w for ws in label.sides.values() for w in ws):
            assert 1 <= len(tokenizer.encode(words)) - 2 <= 12, words


def test_rare_identifiers_are_those_that_init_gives() -> None:
    labels = read_label_list([f"a{i}" for i in range(1, 31)])
    assert {identifier for label in labels for identifier in label.negative} == RARE
    assert len(RARE) == 30


@pytest.mark.parametrize("words", ["[V]", "[v]", " [anything] ", *sorted(RARE)])
def test_words_that_mean_nothing(words: str) -> None:
    for entry in (words, ("bright", words), ("bright", ["dark", words])):
        said = refused(read_labels, {"ok": "fine", "light": entry})
        assert "'light'" in said
        assert "rare identifier" in said
    read_labels({"light": f"{words} light"})  # among others they are words


WRONG_LABELS: dict[str, tuple[Any, str]] = {
    "empty words": ({"light": ""}, "'light': empty words"),
    "blank words": ({"light": ("bright", " ")}, "'light': empty words"),
    "blank phrasing": ({"light": (["bright", " "], "dark")}, "'light': empty words"),
    "no positive words": ({"light": ([], "dark")}, "'light'.*positive side"),
    "one word alone": ({"light": ("bright",)}, "'light'.*found"),
    "three sides": ({"light": ("bright", "dark", "dim")}, "'light'.*found"),
    "number": ({"light": 3}, "'light'.*found 3"),
    "number as words": ({"light": ("bright", 3)}, "'light'.*found 3"),
    "no name": ({" ": "bright"}, "expected a name"),
    "name that is no text": ({3: "bright"}, "label 3"),
    "reserved: all": ({"all": "bright"}, "'all'.*reserved"),
    "reserved: none": ({"none": ("bright", "dark")}, "'none'.*reserved"),
    "nothing": ({}, "at least one"),
    "list of nothing": ([], "at least one"),
    "list of texts": (["light"], "found list"),
    "None": (None, "found NoneType"),
    "twice": ([FitLabel("light", ("a",)), FitLabel("light", ("b",))], "'light'.*twice"),
    "twice but for case": ({"light": "a", "Light": "b"}, "'Light'.*twice"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_labels_that_are_refused(name: str) -> None:
    labels, complaint = WRONG_LABELS[name]
    assert re.search(complaint, refused(read_labels, labels))


LIGHT = '[[label]]\nname = "light"\npositive = "bright"\n'
WRONG_FILES = {
    "not TOML": ("[[label]\nname", r"labels\.toml: not a TOML file"),
    "nothing": ("", r"labels\.toml: .*\[\[label\]\]"),
    "other tables": (f"{LIGHT}[other]\na = 1", r"labels\.toml: .*other"),
    "label is no table": ("label = 3", r"labels\.toml: "),
    "label of texts": ('label = ["light"]', r"labels\.toml: .*without a name"),
    "no labels": ("label = []", "at least one"),
    "no name": ('[[label]]\npositive = "bright"', r"labels\.toml: .*without a name"),
    "unknown key": (LIGHT + 'negatve = "dark"', r"labels\.toml: label 'light'.*'negatve'"),
    "identifier": (LIGHT + 'negative = "[V]"', "'light'.*rare identifier"),
    "number as words": (LIGHT + "negative = 3", "'light'.*found 3"),
    "twice": (LIGHT + LIGHT, "'light'.*twice"),
    "reserved": ('[[label]]\nname = "all"', "'all'.*reserved"),
    "range of one": (LIGHT + "range = [1]", "'light'.*range"),
    "range of texts": (LIGHT + 'range = ["a", "b"]', "'light'.*'a'"),
    "step as text": (LIGHT + 'step = "a"', "'light'.*'a'"),
    # What docs/format.md refuses, before anything is drawn.
    "range as number": (LIGHT + "range = 5", "'light'.*range"),
    "range backwards": (LIGHT + "range = [1, -1]", "'light'.*range"),
    "range without 0": (LIGHT + "range = [0.5, 1]", "'light'.*range"),
    "step below 0": (LIGHT + "step = -0.1", "'light'.*step"),
    "display names as text": (LIGHT + 'display_names = "Licht"', "'light'.*display_names"),
    "display name as number": (LIGHT + "display_names = {de = 3}", "'light'.*display_names"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_of_labels_that_are_refused(name: str, tmp_path: Path) -> None:
    content, complaint = WRONG_FILES[name]
    path = tmp_path / "labels.toml"
    path.write_text(content, "utf-8")
    assert re.search(complaint, refused(read_labels, path))


def test_files_of_labels_that_cannot_be_read(tmp_path: Path) -> None:
    assert "labels.toml" in refused(read_labels, tmp_path / "labels.toml")
    assert "labels.toml" in refused(read_labels, "labels.toml")
    assert str(tmp_path) in refused(read_labels, tmp_path)
    (tmp_path / "latin.toml").write_bytes('[[label]]\nname = "é"'.encode("latin-1"))
    assert "latin.toml" in refused(read_labels, tmp_path / "latin.toml")


# --- hosts without the native module ---

ALONE = """
import sys, types
for name in ("diffusers", "transformers", "accelerate", "vmix._native"):
    sys.modules[name] = None
vmix = sys.modules["vmix"] = types.ModuleType("vmix")
vmix.__path__ = [sys.argv[1]]
import torch
from vmix.fit import Collector, Picture, Plan, Sums, fitted_adapter, read_labels

class Layer(torch.nn.Module):
    heads = 2
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(6, 8) for _ in range(3))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(8, 6)])
    def forward(self, x, context):
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))

torch.manual_seed(0)
layer, plan = Layer(), Plan(read_labels({"light": ("a", "b")}), ["x", "y"], len, 9)
sums = Sums({})
collector = Collector({"mid.attn2": layer}, plan, sums)
with collector.riding():
    for prompt in range(2):
        collector.start([Picture(0, prompt, torch.randn(2, 9, 6))])
        layer(torch.randn(1, 5, 6), torch.randn(1, 9, 6))
        collector.finish()
fitted = fitted_adapter(plan, sums, base="other", ldm_names={"mid.attn2": "m"}, made={}, rank=2)
print(*fitted.tensors["mid.attn2.rows"].shape)
"""


def test_the_core_needs_torch_alone() -> None:
    """Nothing of the native module, diffusers or transformers."""
    folder = str(Path(vmix.__file__).parent)
    command = [sys.executable, "-c", ALONE, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.returncode) == ("4 8\n", 0), done.stderr
