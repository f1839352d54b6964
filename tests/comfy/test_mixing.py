"""The wrapper on a cross-attention written here, without ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comfy_nodes.files import Pair
from comfy_nodes.mixing import Layer, ValueMix, layer_paths, resized

TOKENS, WIDTH, CONTEXT, HEADS = 7, 12, 5, 3


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, **_: Any) -> Tensor:
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key = split(query), split(key)
    attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (attention @ split(value)).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.attn_precision = HEADS, None
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(CONTEXT, WIDTH, bias=False)
        self.to_v = nn.Linear(CONTEXT, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(out)


class Executor:
    """What ComfyUI hands to an APPLY_MODEL wrapper."""

    def __init__(self, attn: CrossAttention, context: Tensor) -> None:
        sampling = SimpleNamespace(percent_to_sigma=lambda percent: 10 * (1 - percent))
        self.class_obj = SimpleNamespace(diffusion_model=nn.ModuleDict({"block": attn}))
        self.class_obj.model_sampling = sampling
        self.attn, self.context = attn, context

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.attn(x.flatten(2).transpose(1, 2), self.context)


@pytest.fixture
def attn() -> CrossAttention:
    torch.manual_seed(0)
    return CrossAttention().requires_grad_(False)


def run(
    attn: CrossAttention,
    mix: ValueMix | None,
    chunks: list[int] | None = None,
    tokens: int = TOKENS,
    sigma: float = 5.0,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, WIDTH, 4, 6, generator=draw)
    context = torch.randn(batch, tokens, CONTEXT, generator=draw)
    options = {} if chunks is None else {"cond_or_uncond": chunks}
    executor = Executor(attn, context.to(dtype))
    args = (x.to(dtype), torch.full((batch,), sigma), None, None, None, options)
    return executor(*args) if mix is None else mix(executor, *args)


def literal(
    attn: CrossAttention, rows: list[Tensor | None], strength: float, tokens: int = TOKENS
) -> Tensor:
    """Eq. 9 with a V_a for every row of the batch."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(len(rows), WIDTH, 4, 6, generator=draw).flatten(2).transpose(1, 2)
    context = torch.randn(len(rows), tokens, CONTEXT, generator=draw)
    v_a = torch.stack(
        [
            torch.zeros(tokens, WIDTH) if v is None else torch.cat([v] * (tokens // TOKENS))
            for v in rows
        ]
    )
    query, key = attn.to_q(x), attn.to_k(context)
    out = attend(query, key, attn.to_v(context), HEADS)
    return attn.to_out(out + strength * attend(query, key, v_a, HEADS))


def pair(contrast: bool = False) -> Pair:
    draw = torch.Generator().manual_seed(2)
    cond, uncond = torch.randn(2, TOKENS, WIDTH, generator=draw)
    return Pair(cond, uncond if contrast else None)


def mix(
    values: Pair,
    apply_to: str = "cond",
    strength: float = 0.7,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ValueMix:
    layer = Layer("block", strength, values, dtype, "label 'light' at weight 10")
    return ValueMix([layer], TOKENS, apply_to, attention=attend, **options)


CASES = [
    # apply_to, cond_or_uncond, batch, which V_a every row gets: 0 cond, 1 uncond, None none
    ("cond", [1, 0], 2, [None, 0]),
    ("cond", [0, 1], 2, [0, None]),
    ("cond", [1, 0], 4, [None, None, 0, 0]),
    ("cond", [0], 2, [0, 0]),
    ("cond", None, 2, [0, 0]),
    ("cond", [1], 2, [None, None]),
    ("cond", [0, 1, 2], 3, [0, None, None]),
    ("both", [1, 0], 2, [0, 0]),
    ("both", [1, 0], 3, [0, 0, 0]),
    ("contrast", [1, 0], 2, [1, 0]),
    ("contrast", [0, 1, 2], 3, [0, 1, 1]),
    ("contrast", [1], 2, [1, 1]),
]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("tokens", [TOKENS, 3 * TOKENS])
@pytest.mark.parametrize(("apply_to", "chunks", "batch", "rows"), CASES)
def test_two_branches(
    attn: CrossAttention,
    apply_to: str,
    chunks: list[int] | None,
    batch: int,
    rows: list[int | None],
    tokens: int,
    masked: bool,
) -> None:
    values = pair(apply_to == "contrast")
    options = {"mask": torch.full((1, 8, 8), 0.5)} if masked else {}
    found = run(attn, mix(values, apply_to, **options), chunks, tokens, batch=batch)
    expected = literal(
        attn, [None if i is None else values[i] for i in rows], 0.35 if masked else 0.7, tokens
    )
    # Sums of a few dozen numbers of order one in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_stacking_and_restoring(attn: CrossAttention) -> None:
    bare = run(attn, None)
    before = dict(vars(attn.to_v))
    first, second = mix(pair(), strength=0.5), mix(pair(), strength=0.2)

    class Inner(Executor):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return second(self.outer, *args, **kwargs)

    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, WIDTH, 4, 6, generator=draw)
    executor = Inner(attn, torch.randn(2, TOKENS, CONTEXT, generator=draw))
    executor.outer = Executor(attn, executor.context)
    found = first(executor, x, torch.ones(2), None, None, None, {"cond_or_uncond": [1, 0]})
    expected = literal(attn, [None, pair().cond], 0.7)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    assert vars(attn.to_v) == before
    assert torch.equal(run(attn, None), bare)


def test_a_foreign_forward_stays(attn: CrossAttention) -> None:
    original = attn.to_v.forward
    attn.to_v.forward = foreign = lambda x: original(x) * 2
    found = run(attn, mix(pair()), [1, 0])
    assert attn.to_v.forward is foreign
    del attn.to_v.forward
    attn.to_v.weight.mul_(2)
    torch.testing.assert_close(found, run(attn, mix(pair()), [1, 0]), rtol=0, atol=5e-6)


def test_zero_is_bit_identical(attn: CrossAttention) -> None:
    bare = run(attn, None)
    assert torch.equal(run(attn, mix(pair(), strength=0.0), [1, 0]), bare)
    # Unconditional rows under "cond" are not touched either.
    assert torch.equal(run(attn, mix(pair()), [1, 0])[0], bare[0])
    assert torch.equal(run(attn, mix(pair()), [1]), bare)


@pytest.mark.parametrize(
    ("window", "sigma", "acts"),
    [
        ((0.0, 1.0), 10.0, True),
        ((0.0, 0.5), 5.0, True),
        ((0.0, 0.5), 4.9, False),
        ((0.5, 1.0), 5.0, True),
        ((0.5, 1.0), 5.1, False),
    ],
)
def test_window(
    attn: CrossAttention, window: tuple[float, float], sigma: float, acts: bool
) -> None:
    found = run(attn, mix(pair(), start_percent=window[0], end_percent=window[1]), sigma=sigma)
    assert torch.equal(found, run(attn, None)) != acts


def test_values_that_the_dtype_cannot_hold() -> None:
    """An error where they get the dtype that is mixed, in whichever pass, and in no other dtype."""
    half = torch.float16
    message = (
        "^block: expected values times strength that float16 can hold, found more: "
        "label 'light' at weight 10, strength 100000$"
    )
    for values in (pair(), Pair(torch.zeros(TOKENS, WIDTH), pair().cond)):
        with pytest.raises(ValueError, match=message):
            mix(values, strength=1e5, dtype=half)
    mix(pair(), strength=1e3, dtype=half)
    (layer,) = mix(pair(), strength=1e5).layers
    for dtype in (torch.float32, torch.bfloat16):
        layer.on(torch.empty(0, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        layer.on(torch.empty(0, dtype=half))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_strength_that_the_dtype_cannot_hold(attn: CrossAttention, masked: bool) -> None:
    """What counts is its product with the values."""
    values = pair().map(lambda v: v * 1e-5)
    expected = literal(attn, [None, values.cond], 1e5)
    options = {"mask": torch.ones(1, 8, 8)} if masked else {}
    half = torch.float16
    found = run(attn.half(), mix(values, strength=1e5, dtype=half, **options), [1, 0], dtype=half)
    # Eleven bits, and numbers of order one.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=5e-3)


def test_errors(attn: CrossAttention) -> None:
    before = dict(vars(attn.to_v))
    with pytest.raises(ValueError, match="block: the prompt's context has 8 tokens, the adapter"):
        run(attn, mix(pair()), [1, 0], tokens=8)
    with pytest.raises(ValueError, match=r"a batch of 2 equal parts .* found 3 rows"):
        run(attn, mix(pair()), [1, 0], batch=3)
    assert vars(attn.to_v) == before


@pytest.mark.parametrize("latent", [(16, 16), (12, 20), (9, 13), (1, 5)])
def test_masks_fit_every_level(latent: tuple[int, int]) -> None:
    mask = torch.rand(2, 40, 60, generator=torch.Generator().manual_seed(4))
    height, width = latent
    for _ in range(4):
        fitted = resized(mask, height * width, latent)
        assert fitted.shape == (2, height * width, 1)
        expected = nn.functional.interpolate(mask[None], (height, width), mode="bilinear")[0]
        assert torch.equal(fitted[..., 0], expected.flatten(1))
        height, width = -(-height // 2), -(-width // 2)
    # Packs that shrink the image in between: the proportions remain.
    assert resized(mask, 5 * 10, (16, 32)).shape == (2, 50, 1)
    with pytest.raises(ValueError, match="mask: 7 queries do not fit a latent of"):
        resized(mask, 7, (16, 16))


def test_layer_paths() -> None:
    mapping = {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight":
            "middle_block.1.transformer_blocks.0.attn2.to_v.weight",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight": "x",
    }  # fmt: skip
    assert layer_paths(mapping) == {
        "mid_block.attentions.0.transformer_blocks.0.attn2":
            "middle_block.1.transformer_blocks.0.attn2",
    }  # fmt: skip
