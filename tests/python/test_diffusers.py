"""`vmix.diffusers` against the paper's attention written out (oracle.py).

Tolerances are on the latents after a few steps, relative to their largest value. In fp32 the two
sides differ by the order of additions only: about 1e-6 is measured, 1e-5 allowed. Rounding to
half precision is a thousand times coarser and the oracle rounds in other places (it adds two
attentions, not two values): up to 3.5e-3 in fp16 and 3.3e-2 in bf16, by what the processor has for
products of these; 1e-2 and 8e-2 are allowed. The effect itself is 1.5e-1 there, and everywhere
above 1e-2.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from oracle import TwoBranches, two_branches, value_features
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from vmix import Adapter, VMixError
from vmix.diffusers import (
    get_vmix,
    list_vmix,
    load_vmix,
    set_vmix,
    set_vmix_scale,
    unload_vmix,
)

ALL = [1.0, 1.0, 1.0]
XL_CONFIG = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def difference(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert want.isfinite().all()
    return ((got - want).abs().max() / want.abs().max()).item()


def attributes(unet: Any) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in unet.named_modules()}


def make(unet: Any, **options: Any) -> tuple[dict[str, Tensor], Adapter]:
    tensors, metadata = tiny.adapter(unet, **options)
    return tensors, Adapter.from_matrices(tensors, metadata)


def by_block(scales: dict[str, float], default: float = 1.0) -> Callable[[str, int], float]:
    """λ by the start of a layer's path."""
    return lambda path, _: next((v for k, v in scales.items() if path.startswith(k)), default)


def in_calls(*calls: int) -> Callable[[str, int], float]:
    return lambda _, call: float(call in calls)


# name: pipeline, what the call takes, what load_vmix takes, what the oracle is told, tolerance
SITUATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], float]] = {
    "cond": ("sd", {}, {}, {}, 1e-5),
    "both": ("sd", {}, {"apply_to": "both"}, {"apply_to": "both"}, 1e-5),
    "contrast": ("sd", {}, {"apply_to": "contrast"}, {"apply_to": "contrast"}, 1e-5),
    "scale": ("sd", {}, {"scale": 0.6}, {"strength": 0.6}, 1e-5),
    "negative scale": ("sd", {}, {"scale": -1}, {"strength": -1.0}, 1e-5),
    "selection": ("sd", {}, {"selection": {"light": 0.5, "focus": 1.5}}, {}, 1e-5),
    "unguided": ("sd", {"guidance_scale": 1.0}, {}, {"parts": 1}, 1e-5),
    "unguided contrast": (
        "sd",
        {"guidance_scale": 1.0, "batch": 2},
        {"apply_to": "contrast"},
        {"parts": 1},
        1e-5,
    ),
    "batch": ("sd", {"batch": 2}, {}, {}, 1e-5),
    "batch contrast": (
        "sd",
        {"batch": 2, "num_images_per_prompt": 2},
        {"apply_to": "contrast"},
        {"apply_to": "contrast"},
        1e-5,
    ),
    "images per prompt": ("sd", {"num_images_per_prompt": 3}, {}, {}, 1e-5),
    "154 tokens": ("sd", {"tokens": 154}, {}, {}, 1e-5),
    "steps": (
        "sd",
        {"num_inference_steps": 5},
        {"start": 0.2, "end": 0.8},
        {"strength": in_calls(1, 2, 3)},
        1e-5,
    ),
    "steps of a part": (  # strength 0.8 runs the last four of five steps
        "img2img",
        {"num_inference_steps": 5},
        {"start": 0.4},
        {"strength": in_calls(1, 2, 3)},
        1e-5,
    ),
    "blocks": (
        "sd",
        {},
        {"scale": {"down": 0.5, "mid": 0.0, "up": {"block_0": 1.5, "block_2": [0.2, 2.0]}}},
        {
            "strength": by_block(
                {
                    "down_blocks": 0.5,
                    "mid_block": 0.0,
                    "up_blocks.0": 1.5,
                    "up_blocks.2.attentions.0": 0.2,
                    "up_blocks.2.attentions.1": 2.0,
                }
            )
        },
        1e-5,
    ),
    "one block": (
        "sd",
        {},
        {"scale": {"down": {"block_2": [0.0]}}},
        {"strength": by_block({"down_blocks.2": 0.0})},
        1e-5,
    ),
    "pag": ("pag", {"pag_scale": 3.0}, {}, {"parts": 3}, 1e-5),
    "pag contrast": (
        "pag",
        {"pag_scale": 3.0, "batch": 2},
        {"apply_to": "contrast"},
        {"parts": 3, "apply_to": "contrast"},
        1e-5,
    ),
    "pag unguided": ("pag", {"pag_scale": 3.0, "guidance_scale": 0.0}, {}, {"parts": 1}, 1e-5),
    "pag off": ("pag", {"pag_scale": 0.0}, {}, {}, 1e-5),
    "controlnet": ("controlnet", {}, {}, {}, 1e-5),
    "img2img": ("img2img", {}, {}, {}, 1e-5),
    "xl": ("xl", {"batch": 2}, {"apply_to": "contrast"}, {"apply_to": "contrast"}, 1e-5),
    "fp16": ("sd", {}, {"dtype": torch.float16}, {}, 1e-2),
    "bf16": ("sd", {}, {"dtype": torch.bfloat16}, {}, 8e-2),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_matches_the_paper(situation: str) -> None:
    """Equal to two branches; scale 0 and unloading leave nothing, to the last bit."""
    kind, call, options, told, tolerance = SITUATIONS[situation]
    options, pipe = dict(options), tiny.pipeline(kind)
    pipe.to(options.pop("dtype", torch.float32))
    tensors, adapter = make(pipe.unet)
    weights = (
        [options["selection"].get(name, 0.0) for name in tiny.LABELS]
        if ("selection" in options)
        else ALL
    )
    before = attributes(pipe.unet)
    bare = tiny.run(pipe, **call)
    with two_branches(pipe.unet, tensors, weights, **told):
        want = tiny.run(pipe, **call)
    load_vmix(pipe, adapter, **options)
    got = tiny.run(pipe, **call)
    assert difference(got, want) < tolerance
    assert difference(bare, want) > 1e-2
    set_vmix_scale(pipe, 0)
    assert torch.equal(tiny.run(pipe, **call), bare)
    set_vmix_scale(pipe, options.get("scale", 1.0))
    assert torch.equal(tiny.run(pipe, **call), got)
    unload_vmix(pipe)
    assert torch.equal(tiny.run(pipe, **call), bare)
    assert attributes(pipe.unet) == before


@pytest.mark.parametrize("apply_to", ["cond", "contrast"])
def test_files(apply_to: str, tmp_path: Any) -> None:
    """An adapter file, a preset and a preset file; the policy is the file's own."""
    pipe = tiny.pipeline()
    tensors, adapter = make(pipe.unet, apply_to=apply_to)
    with two_branches(pipe.unet, tensors, [0.0, 1.0, 0.0], apply_to=apply_to):
        want = tiny.run(pipe)
    values = adapter.values("color")
    adapter.save(tmp_path / "adapter.safetensors")
    values.save(tmp_path / "preset.safetensors")
    for source, selection in [
        (str(tmp_path / "adapter.safetensors"), "color"),
        (values, None),
        (tmp_path / "preset.safetensors", None),
    ]:
        load_vmix(pipe, source, selection)  # replaces the one before
        assert difference(tiny.run(pipe), want) < 1e-5, source


OTHERS = ["lora", "ip-adapter", "accelerate", "slices"]
WINDOW = {"strength": in_calls(1, 2)}  # which patches the U-Net's own forward as well


def load_other(pipe: Any, other: str) -> dict[str, Any]:
    """Returns what calls of the pipeline then need."""
    if other == "lora":
        pipe.load_lora_weights(tiny.lora(pipe.unet), adapter_name="style")
    if other == "ip-adapter":
        return tiny.load_ip_adapter(pipe)
    if other == "slices":
        pipe.unet.set_attention_slice(1)
    if other == "accelerate":  # what model and sequential offloading put on modules
        for module in [pipe.unet, *pipe.unet.modules()]:
            if module is pipe.unet or not list(module.children()):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return {}


def unload_other(pipe: Any, other: str) -> None:
    if other == "lora":
        pipe.unload_lora_weights()
    if other == "ip-adapter":
        pipe.unload_ip_adapter()
    if other == "slices":
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    if other == "accelerate":
        remove_hook_from_module(pipe.unet, recurse=True)


@pytest.fixture(scope="module", params=OTHERS)
def beside(request: Any) -> SimpleNamespace:
    """What is expected of VMix with something else, of either alone, and of neither."""
    other, pipe = request.param, tiny.pipeline()
    tensors, _ = make(pipe.unet)
    neither = tiny.run(pipe)
    with two_branches(pipe.unet, tensors, ALL, **WINDOW):
        vmix_alone = tiny.run(pipe)
    call = load_other(pipe, other)
    other_alone = tiny.run(pipe, **call)
    with two_branches(pipe.unet, tensors, ALL, **WINDOW):
        both = tiny.run(pipe, **call)
    return SimpleNamespace(
        other=other, neither=neither, vmix_alone=vmix_alone, other_alone=other_alone, both=both
    )


@pytest.mark.parametrize("first", ["vmix", "other"])
@pytest.mark.parametrize("gone_first", ["vmix", "other"])
def test_composes(beside: SimpleNamespace, first: str, gone_first: str) -> None:
    """With what else changes the attentions: loaded in either order, unloaded in either order."""
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    if first == "vmix":
        load_vmix(pipe, adapter, start=0.3)
    call = load_other(pipe, beside.other)
    if first == "other":
        load_vmix(pipe, adapter, start=0.3)
    assert difference(tiny.run(pipe, **call), beside.both) < 1e-5
    if gone_first == "vmix":
        unload_vmix(pipe)
        assert torch.equal(tiny.run(pipe, **call), beside.other_alone)
        unload_other(pipe, beside.other)
    else:
        unload_other(pipe, beside.other)
        assert difference(tiny.run(pipe), beside.vmix_alone) < 1e-5
        unload_vmix(pipe)
    assert torch.equal(tiny.run(pipe), beside.neither)
    for module in pipe.unet.modules():
        assert "vmix" not in str(vars(module).values()).lower()


def test_dora() -> None:
    """Refused while it rescales the layer's output, whenever it was loaded; fine once fused."""
    reference, pipe = tiny.pipeline(), tiny.pipeline()
    tensors, adapter = make(pipe.unet)
    weights = tiny.lora(pipe.unet, use_dora=True)
    pipe.load_lora_weights(weights)
    before = attributes(pipe.unet)
    with pytest.raises(VMixError, match=r"attn2\.to_v: .*(?i:dora).*fuse_lora"):
        load_vmix(pipe, adapter)
    assert attributes(pipe.unet) == before
    pipe.unload_lora_weights()
    load_vmix(pipe, adapter)
    pipe.load_lora_weights(weights)
    with pytest.raises(VMixError, match=r"(?i)dora"):
        tiny.run(pipe)
    for p in (reference, pipe):
        if p is reference:
            p.load_lora_weights(weights)
        p.fuse_lora()
    with two_branches(reference.unet, tensors, ALL):
        want = tiny.run(reference)
    assert difference(tiny.run(pipe), want) < 1e-5


def test_stacks() -> None:
    """Names add up. Both share f_a here, so the sum is one adapter with the sum of W_Va."""
    pipe = tiny.pipeline()
    tensors, adapter = make(pipe.unet)
    other, metadata = tiny.adapter(pipe.unet)
    for name in other:
        if "to_v_aes" in name:
            other[name] = other[name].flip(0).contiguous()
    total = {k: 0.5 * v - 0.3 * other[k] if "to_v_aes" in k else v for k, v in tensors.items()}
    with two_branches(pipe.unet, total, ALL):
        want = tiny.run(pipe)
    with two_branches(pipe.unet, other, ALL, strength=-0.3):
        second = tiny.run(pipe)
    bare = tiny.run(pipe)
    load_vmix(pipe, adapter)
    load_vmix(pipe, Adapter.from_matrices(other, metadata), adapter_name="b", scale=-0.3)
    set_vmix_scale(pipe, 0.5)
    assert difference(tiny.run(pipe), want) < 1e-5
    unload_vmix(pipe)
    assert difference(tiny.run(pipe), second) < 1e-5
    with pytest.raises(VMixError, match=r"no VMix adapter 'default'.*loaded are: 'b'"):
        unload_vmix(pipe)
    unload_vmix(pipe, "b")
    assert torch.equal(tiny.run(pipe), bare)
    with pytest.raises(VMixError, match="loaded are: none"):
        set_vmix_scale(pipe, 1.0)


# One cross-attention and what a U-Net cannot do without: tracing takes a while for every operation.
TRACED = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}


def test_an_offloaded_base() -> None:
    from accelerate import cpu_offload

    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter)
    want = tiny.run(pipe)
    unload_vmix(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))
    assert next(pipe.unet.parameters()).is_meta
    load_vmix(pipe, adapter)
    remove_hook_from_module(pipe.unet, recurse=True)  # the pipeline itself was not offloaded
    assert torch.equal(tiny.run(pipe), want)


def test_a_base_in_8_bits() -> None:
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    bare = tiny.run(pipe)
    load_vmix(pipe, adapter)
    mixed = tiny.run(pipe)
    assert difference(mixed, bare) > 1e-3
    # The same weights, rounded to 8 bits, in a plain f32 U-Net.
    plain = tiny.pipeline()
    plain.unet.load_state_dict({k: v.float() for k, v in pipe.unet.state_dict().items()})
    load_vmix(plain, adapter)
    assert difference(tiny.run(plain), mixed) < 1e-5


@contextmanager
def paper_with(unet: Any, rows: Callable[[str, int], list[Tensor | None]]) -> Iterator[None]:
    """The paper's attention with V_a of every row of a batch, by a layer's path and the call."""
    before = dict(unet.attn_processors)

    def processor(path: str, wrapped: Any) -> TwoBranches:
        made = TwoBranches(lambda _: rows(path, made.calls - 1), lambda _: 1.0, wrapped)
        return made

    unet.set_attn_processor(
        {
            name: processor(name.removesuffix(".processor"), old) if "attn2" in name else old
            for name, old in before.items()
        }
    )
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@pytest.mark.parametrize("apply_to", ["cond", "both", "contrast"])
@pytest.mark.parametrize(
    ("kind", "call", "parts"),
    [
        ("sd", {"batch": 2}, 2),
        ("sd", {"batch": 2, "num_images_per_prompt": 2}, 2),
        ("sd", {"batch": 2, "tokens": 154}, 2),
        ("sd", {"batch": 2, "guidance_scale": 1.0}, 1),
        ("pag", {"batch": 2, "pag_scale": 3.0}, 3),
        ("pag", {"batch": 2, "pag_scale": 3.0, "guidance_scale": 0.0}, 2),
        ("xl", {"batch": 2}, 2),
    ],
    ids=["guided", "images per prompt", "154 tokens", "unguided", "pag", "pag unguided", "xl"],
)
def test_every_image_has_its_own_weights(
    kind: str, call: dict[str, Any], parts: int, apply_to: Any
) -> None:
    pipe = tiny.pipeline(kind)
    tensors, adapter = make(pipe.unet)
    repeats = call.get("num_images_per_prompt", 1)
    weights = [w for w in ([1.5, 0.0, 0.0], [0.0, -0.5, 1.0]) for _ in range(repeats)]

    def rows(path: str, _: int) -> list[Tensor | None]:
        w_va = tensors[f"{path}.to_v_aes.weight"]
        cond: list[Tensor | None] = [value_features(tensors, one) @ w_va.T for one in weights]
        opposite = value_features(tensors, [0.0] * 3) @ w_va.T  # of labels without a neutral weight
        of_policy = {"cond": [None], "both": cond, "contrast": [opposite]}[apply_to]
        guided = call.get("guidance_scale", 5.0) > 1
        uncond = (of_policy * len(weights))[: len(weights)] if guided else []
        return uncond + cond * (parts - guided)

    with paper_with(pipe.unet, rows):
        want = tiny.run(pipe, **call)
    load_vmix(pipe, adapter, [{"light": 1.5}, {"color": -0.5, "focus": 1.0}], apply_to=apply_to)
    got = tiny.run(pipe, **call)
    assert difference(got, want) < 1e-5
    # The same, set on an adapter that was loaded with one selection; and back again.
    load_vmix(pipe, adapter, "light", apply_to=apply_to)
    one = tiny.run(pipe, **call)
    set_vmix(pipe, [{"light": 1.5}, {"color": -0.5, "focus": 1.0}])
    assert torch.equal(tiny.run(pipe, **call), got)
    set_vmix(pipe, ["light"])
    assert torch.equal(tiny.run(pipe, **call), one)
    assert difference(got, one) > 1e-3
    set_vmix(pipe, ["light", {"color": 1.0}, None])
    with pytest.raises(VMixError, match=rf"3 selections were set for a batch of {2 * repeats} im"):
        tiny.run(pipe, **call)


def test_weights_may_change_at_every_step() -> None:
    """In a callback, against the paper's attention with other weights in every call."""
    pipe = tiny.pipeline()
    tensors, adapter = make(pipe.unet)
    at_step = [[1.0, 0.0, 0.0], [0.0, 1.3, 0.0], [0.5, 0.5, -0.2]]
    load_vmix(pipe, adapter, "light")

    def next_weights(_: Any, step: int, __: Any, kept: dict[str, Any]) -> dict[str, Any]:
        set_vmix(pipe, dict(zip(tiny.LABELS, at_step[(step + 1) % 3], strict=True)))
        return kept

    got = tiny.run(pipe, callback_on_step_end=next_weights)
    unload_vmix(pipe)

    def rows(path: str, call: int) -> list[Tensor | None]:
        w_va = tensors[f"{path}.to_v_aes.weight"]
        return [None, value_features(tensors, at_step[call]) @ w_va.T]

    with paper_with(pipe.unet, rows):
        assert difference(got, tiny.run(pipe)) < 1e-5


def test_get_and_list() -> None:
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    assert list_vmix(pipe) == []
    load_vmix(pipe, adapter, {"light": 0.5}, scale={"mid": 0.3}, apply_to="both", end=0.8)
    load_vmix(pipe, adapter.values("color"), adapter_name="preset")
    load_vmix(pipe, adapter, [{"light": 1.0}, None], adapter_name="two")
    assert list_vmix(pipe) == ["default", "preset", "two"]
    assert get_vmix(pipe) == {
        "weights": {"light": 0.5, "color": 0.0, "focus": 0.0},
        "scale": {"mid": 0.3},
        "apply_to": "both",
        "start": 0.0,
        "end": 0.8,
    }
    assert get_vmix(pipe, "preset")["weights"] == {"light": 0.0, "color": 1.0, "focus": 0.0}
    assert get_vmix(pipe, "two")["weights"] == [
        {"light": 1.0, "color": 0.0, "focus": 0.0},
        {"light": 1.0, "color": 1.0, "focus": 1.0},
    ]
    set_vmix(pipe, "none")
    set_vmix_scale(pipe, 2)
    assert get_vmix(pipe)["weights"] == dict.fromkeys(tiny.LABELS, 0.0)
    assert get_vmix(pipe)["scale"] == 2
    with pytest.raises(VMixError, match=r"preset holds one selection and cannot take another"):
        set_vmix(pipe, "light", "preset")
    with pytest.raises(VMixError, match=r"no VMix adapter 'other'"):
        get_vmix(pipe, "other")


def test_a_linear_adapter() -> None:
    """Against rows and coefficients added up by hand, as the values of a preset would be."""
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    draw = torch.Generator().manual_seed(7)
    sides = [("light", "positive"), ("light", "negative"), ("color", "positive")]
    sides += [("color", "negative"), ("focus", "positive"), ("focus", "negative")]
    labels = [
        {"name": n, "positive": [n], "negative": [""], "default": 0, "neutral": 0, "range": [-1, 1]}
        for n in tiny.LABELS
    ]
    profile = torch.randn(77, 6, generator=draw)
    rows = {
        f"{layer.name}.rows": torch.randn(6, layer.inner_dim, generator=draw)
        for layer in adapter.layers
    }
    made = {"method": "fitted", "base": "tiny model"}
    metadata = adapter.metadata | {
        "vmix.coefficients": "linear",
        "vmix.labels": json.dumps(labels),
        "vmix.rows": json.dumps([{"label": label, "side": side} for label, side in sides]),
        "vmix.made": json.dumps(made),
    }
    linear = Adapter.from_tensors({"profile": profile, **rows}, metadata)
    bare = tiny.run(pipe)
    load_vmix(pipe, linear, {"light": 0.7, "focus": -0.4}, apply_to="contrast")
    got = tiny.run(pipe)

    def v_a(path: str, light: float, focus: float) -> Tensor:
        b = rows[f"{path}.rows"]
        first = profile[:, 0:1] @ b[0:1] if light > 0 else profile[:, 1:2] @ b[1:2]
        last = profile[:, 4:5] @ b[4:5] if focus > 0 else profile[:, 5:6] @ b[5:6]
        return abs(light) * first + abs(focus) * last

    unload_vmix(pipe)
    with paper_with(pipe.unet, lambda path, _: [v_a(path, -0.7, 0.4), v_a(path, 0.7, -0.4)]):
        assert difference(got, tiny.run(pipe)) < 1e-5
    load_vmix(pipe, linear)  # all labels at 0
    assert torch.equal(tiny.run(pipe), bare)


def test_says_what_a_fitted_adapter_was_made_for(caplog: Any) -> None:
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter)
    assert not caplog.messages
    made = adapter.metadata | {"vmix.made": '{"method": "fitted", "base": "dream shaper"}'}
    fitted = Adapter.from_tensors(adapter.tensors(), made)
    load_vmix(pipe, fitted)  # a pipeline without a name may be that very one
    pipe.register_to_config(_name_or_path="models/dream shaper/")
    load_vmix(pipe, fitted)
    assert not caplog.messages
    pipe.register_to_config(_name_or_path="models/other")
    load_vmix(pipe, fitted)
    assert caplog.messages == ["VMix: this adapter was fitted on dream shaper"]


def test_says_when_every_label_is_where_it_changes_nothing(caplog: Any) -> None:
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    labels = [
        {**label, "default": 0, "neutral": 0}
        for label in json.loads(adapter.metadata["vmix.labels"])
    ]
    still = Adapter.from_tensors(
        adapter.tensors(), adapter.metadata | {"vmix.labels": json.dumps(labels)}
    )
    load_vmix(pipe, still)
    assert caplog.messages == [
        "VMix: every label is at weight 0, which changes nothing: move one, as in "
        "set_vmix(pipe, {'light': 1})"
    ]
    caplog.clear()
    load_vmix(pipe, still, "light")
    load_vmix(pipe, still, "none")
    assert not caplog.messages


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_overflows_name_label_layer_and_scale(dtype: torch.dtype) -> None:
    """Before a picture is drawn, and what was set before stays."""
    pipe = tiny.pipeline()
    pipe.to(dtype)
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter, {"light": 1.0})
    want = tiny.run(pipe)
    scale = 1e5 if dtype == torch.float16 else 1e38
    message = (
        r"layer (down|mid|up)_block\S+attn2: expected values that torch\.float\d+ can hold, found "
        r"more: label 'color' at weight 10, scale "
    )
    with pytest.raises(VMixError, match=message + re.escape(f"{scale:g}")):
        load_vmix(pipe, adapter, {"color": 10.0}, scale=scale)
    set_vmix(pipe, {"color": 10.0})
    with pytest.raises(VMixError, match=message + re.escape(f"{scale:g}")):
        set_vmix_scale(pipe, scale)
    set_vmix(pipe, {"light": 1.0})
    assert torch.equal(tiny.run(pipe), want)


def test_an_overflow_that_the_first_call_finds() -> None:
    """In a dtype that comes after loading; the same sentence every time."""
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter, scale=1e5)
    pipe.to(torch.float16)
    for _ in range(2):
        with pytest.raises(VMixError, match=r"expected values that torch\.float16 can hold"):
            tiny.run(pipe)
    set_vmix_scale(pipe, 1.0)
    assert tiny.run(pipe).isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_values_are_computed_in_f32(autocast: bool) -> None:
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter, "light")
    want = tiny.run(pipe)
    set_vmix(pipe, "none")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        set_vmix(pipe, "light")
    assert torch.equal(tiny.run(pipe), want)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("first", ["vmix", "compile"])
def test_compiled(first: str, in_place: bool) -> None:
    """One graph without breaks; what is changed after compilation takes effect."""
    torch._dynamo.reset()
    pipe, backend = tiny.pipeline(), CompileCounter()
    pipe.unet = unet = tiny.unet(**TRACED)
    tensors, adapter = make(unet)
    want = {"bare": tiny.run(pipe)}
    for name, call, told in [
        ("full", {}, {}),
        ("half", {}, {"strength": 0.5}),
        ("unguided", {"guidance_scale": 1.0}, {"parts": 1}),
        ("unguided half", {"guidance_scale": 1.0}, {"parts": 1, "strength": 0.5}),
        ("window", {}, {"strength": in_calls(1, 2)}),
    ]:
        with two_branches(unet, tensors, ALL, **told):
            want[name] = tiny.run(pipe, **call)
    with two_branches(unet, tensors, [0.5, 0.0, 0.0]):
        want["weights"] = tiny.run(pipe)

    def compiled() -> None:
        if in_place:
            unet.compile(backend=backend, fullgraph=True)
        else:
            pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)

    def same(name: str) -> bool:
        call = {"guidance_scale": 1.0} if "unguided" in name else {}
        return difference(tiny.run(pipe, **call), want[name]) < 1e-5

    if first == "compile":
        compiled()
        assert same("bare")
    load_vmix(pipe, adapter)
    if first == "vmix":
        compiled()
    assert same("full")
    assert same("unguided")
    compilations = backend.frame_count
    set_vmix_scale(pipe, 0.5)
    assert same("half")
    assert same("unguided half")
    set_vmix_scale(pipe, 0.0)
    assert same("bare")
    set_vmix_scale(pipe, 1.0)
    set_vmix(pipe, {"light": 0.5})
    assert same("weights")
    assert backend.frame_count == compilations > 0, "a new scale or new weights compiled anew"
    unload_vmix(pipe)
    assert same("bare")
    load_vmix(pipe, adapter, start=0.3)
    assert same("window")


def test_compiled_in_another_dtype() -> None:
    """Which the first call finds, inside of the graph."""
    torch._dynamo.reset()
    pipe, backend = tiny.pipeline(), CompileCounter()
    pipe.unet = tiny.unet(**TRACED)
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter)
    pipe.to(torch.bfloat16)
    want = tiny.run(pipe)
    unload_vmix(pipe)
    bare = tiny.run(pipe)
    pipe.to(torch.float32)
    load_vmix(pipe, adapter)
    pipe.to(torch.bfloat16)
    pipe.unet.compile(backend=backend, fullgraph=True)
    assert difference(tiny.run(pipe), want) < 3e-2 < difference(bare, want)
    assert backend.frame_count > 0


def test_deep_copies_are_independent() -> None:
    pipe = tiny.pipeline()
    bare = tiny.run(pipe)
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter, start=0.3)
    got = tiny.run(pipe)
    twin = copy.deepcopy(pipe)
    for module in pipe.unet.modules():
        if hasattr(module, "to_v"):
            module.to_v.weight.data.zero_()
    pipe._guidance_scale = 1.0
    assert torch.equal(tiny.run(twin), got)
    unload_vmix(pipe)
    assert torch.equal(tiny.run(twin), got)
    unload_vmix(twin)
    assert torch.equal(tiny.run(twin), bare)


def test_other_pipelines_on_the_same_unet() -> None:
    """Which half is conditional is asked of the pipeline that was last given."""
    pipe = tiny.pipeline()
    tensors, adapter = make(pipe.unet)
    load_vmix(pipe, adapter)
    tiny.run(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    reference = tiny.pipeline("img2img")
    with two_branches(reference.unet, tensors, ALL, parts=1):
        want = tiny.run(reference, batch=2, guidance_scale=1.0)
    set_vmix_scale(other, 1.0)
    assert difference(tiny.run(other, batch=2, guidance_scale=1.0), want) < 1e-5


def test_dtype_and_scheduler_may_change_later() -> None:
    pipe = tiny.pipeline()
    tensors, adapter = make(pipe.unet)
    load_vmix(pipe, adapter, start=0.2)
    tiny.run(pipe)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.to(torch.bfloat16).to(torch.float32)
    got = tiny.run(pipe)
    unload_vmix(pipe)
    # Two calls a step but for the last: the timesteps are 0, 1, 1, 2, 2.
    with two_branches(pipe.unet, tensors, ALL, strength=in_calls(1, 2, 3, 4)):
        assert difference(got, tiny.run(pipe)) < 1e-5


def pix2pix(pipe: Any) -> Any:
    class Pix2Pix(type(pipe)):  # type: ignore[misc]
        def __call__(self, image_guidance_scale: float = 1.5) -> None: ...

    pipe.__class__ = Pix2Pix
    return pipe


# name: what is given to load_vmix, what the message says
REFUSALS: dict[str, tuple[Callable[[Any, Adapter], Any], str]] = {
    "selection for a preset": (
        lambda pipe, a: load_vmix(pipe, a.values(), "light"),
        "a preset holds one selection.*'light'",
    ),
    "contrast of a cond preset": (
        lambda pipe, a: load_vmix(pipe, a.values(), apply_to="contrast"),
        "unconditional pass.*'cond'",
    ),
    "unknown policy": (
        lambda pipe, a: load_vmix(pipe, a, apply_to="uncond"),  # type: ignore[arg-type]
        "expected cond, both or contrast, found 'uncond'",
    ),
    "unknown label": (lambda pipe, a: load_vmix(pipe, a, "lihgt"), "lihgt"),
    "no file": (lambda pipe, a: load_vmix(pipe, 3), "expected a path.*int"),  # type: ignore[arg-type]
    "no U-Net": (
        lambda pipe, a: load_vmix(SimpleNamespace(), a),
        "expected a pipeline with a U-Net, found SimpleNamespace",
    ),
    "empty window": (lambda pipe, a: load_vmix(pipe, a, start=0.5, end=0.5), "found 0.5 and 0.5"),
    "scale": (lambda pipe, a: load_vmix(pipe, a, scale=float("nan")), "finite number, found nan"),
    "section": (
        lambda pipe, a: load_vmix(pipe, a, scale={"middle": 1}),
        "expected the keys down, up, mid, found 'middle'",
    ),
    "block": (
        lambda pipe, a: load_vmix(pipe, a, scale={"down": {"block_1": 1}}),
        "scale of down: expected the keys block_0, block_2, found 'block_1'",
    ),
    "attentions": (
        lambda pipe, a: load_vmix(pipe, a, scale={"up": [1, 2, 3]}),
        r"scale of up: expected 1 or 2 numbers, found \[1, 2, 3\]",
    ),
    "other batches": (
        lambda pipe, a: load_vmix(pix2pix(pipe), a),
        r"Pix2Pix \(with image_guidance_scale\).*apply_to='both'",
    ),
    "fused": (
        lambda pipe, a: (pipe.unet.fuse_qkv_projections(), load_vmix(pipe, a)),
        r"call pipe\.unet\.unfuse_qkv_projections\(\) before load_vmix",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refusals(refusal: str) -> None:
    """Before anything is changed, with the thing, the expected and the found."""
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load, message = REFUSALS[refusal]
    with pytest.raises(VMixError, match=message):
        load(pipe, adapter)
    assert not hasattr(pipe.unet, "_vmix")
    assert all("forward" not in vars(module) for module in pipe.unet.modules())


def test_refuses_what_it_cannot_place() -> None:
    """Contexts and batches that come after loading."""
    pipe = tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(pipe, adapter)
    with pytest.raises(VMixError, match=r"prompt's context has 100 tokens.*multiple of 77"):
        tiny.run(pipe, tokens=100)
    tiny.run(pipe)
    one = (torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, tiny.CONTEXT))
    with pytest.raises(
        VMixError, match=r"2 equal parts, unconditional first .*; found a batch of 1"
    ):
        pipe.unet(*one)
    fresh = tiny.pipeline()
    load_vmix(fresh, adapter)
    with pytest.raises(VMixError, match=r"does not know which part.*apply_to='both'"):
        fresh.unet(*one)
    load_vmix(fresh, adapter, apply_to="both")
    fresh.unet(*one)


def advice(refused: Callable[[], Any]) -> list[str]:
    """The calls that the message of a refusal asks for."""
    with pytest.raises(VMixError, match="fused QKV projections skip: call ") as error:
        refused()
    calls = re.findall(r"[\w.]+\((?:[^()]|\(\))*\)", str(error.value).split(": call ")[1])
    assert calls, error.value
    return calls


FUSINGS: dict[str, Callable[[Any], Any]] = {
    "U-Net": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "pipeline": lambda pipe: pipe.fuse_qkv_projections(),
    "pipeline without VAE": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "U-Net twice": lambda pipe: [pipe.unet.fuse_qkv_projections() for _ in range(2)],
    "U-Net and pipeline": lambda pipe: (
        pipe.unet.fuse_qkv_projections(),
        pipe.fuse_qkv_projections(),
    ),
    "by hand": lambda pipe: (
        [attn.fuse_projections() for attn in pipe.unet.modules() if hasattr(attn, "to_v")],
        pipe.unet.set_attn_processor(FusedAttnProcessor2_0()),
    ),
}


@pytest.mark.parametrize("fusing", FUSINGS)
def test_fused_before(fusing: str) -> None:
    """Refused; whoever does what the message says has VMix as if nothing had been fused."""
    reference, pipe = tiny.pipeline(), tiny.pipeline()
    _, adapter = make(pipe.unet)
    load_vmix(reference, adapter)
    want = tiny.run(reference)
    FUSINGS[fusing](pipe)
    fused = tiny.run(pipe)
    names = {"pipe": pipe, "AttnProcessor2_0": AttnProcessor2_0}
    for call in advice(lambda: load_vmix(pipe, adapter)):
        eval(call, names)
    load_vmix(pipe, adapter)
    assert torch.equal(tiny.run(pipe), want)
    assert difference(fused, want) > 1e-2
    unload_vmix(pipe)
    # One product in the place of two.
    assert difference(tiny.run(pipe), fused) < 1e-5


@pytest.mark.parametrize("names", [["default"], ["default", "b"], ["b", "it's c"]], ids=str)
@pytest.mark.parametrize("fusing", ["U-Net", "pipeline", "pipeline without VAE"])
def test_fused_after(fusing: str, names: list[str]) -> None:
    """Refused with nothing fused; whoever does what the message says may fuse, and unfuse."""
    pipe = tiny.pipeline()
    bare = tiny.run(pipe)
    _, adapter = make(pipe.unet)
    for name in names:
        load_vmix(pipe, adapter, adapter_name=name)
    mixed = tiny.run(pipe)
    before = attributes(pipe.unet)
    twin = copy.deepcopy(pipe)
    calls = advice(lambda: FUSINGS[fusing](pipe))
    assert attributes(pipe.unet) == before
    assert torch.equal(tiny.run(pipe), mixed)
    for call in calls:
        eval(call, {"pipe": pipe, "unload_vmix": unload_vmix})
    FUSINGS[fusing](pipe)
    assert difference(tiny.run(pipe), bare) < 1e-5
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(tiny.run(pipe), bare)
    # A copy has its own adapters, and is asked for its own.
    unload_vmix(twin, names[0])
    if names[1:]:
        assert advice(lambda: FUSINGS[fusing](twin)) == calls[1:]
    else:
        FUSINGS[fusing](twin)


def test_refuses_another_base() -> None:
    with torch.device("meta"):
        sd15 = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        sdxl = UNet2DConditionModel(**XL_CONFIG)
    _, for_sd15 = make(sd15, base="sd15")
    _, for_tiny = make(tiny.unet())
    pipe = tiny.pipeline()
    for unet, source, message in [
        (
            sdxl,
            for_sd15,
            r"^this adapter is for sd15 \(context 768, 16 layers\), made for tiny, the pipeline's "
            r"U-Net is sdxl \(context 2048, 70 layers\)",
        ),
        (
            sd15,
            for_tiny,
            r"^this adapter is for other \(context 32, 7 layers\), made for tiny, the pipeline's "
            r"U-Net is sd15 \(context 768, 16 layers\)",
        ),
        (
            tiny.unet(),
            for_sd15.values(),
            r"^this preset is for sd15 \(context 768, 16 layers\), the pipeline's U-Net is of "
            r"another layout \(context 32, 7 layers\)",
        ),
        (
            tiny.unet(block_out_channels=(32, 64, 96)),
            for_tiny,
            r"down_blocks.2.attentions.0.*expected inner_dim 64, found 96",
        ),
    ]:
        pipe.unet = unet
        with pytest.raises(VMixError, match=message):
            load_vmix(pipe, source)
        assert not hasattr(unet, "_vmix")


@pytest.mark.full
def test_full_size_sd15() -> None:
    """The real thing's sixteen layers, random weights, 16×16 latents."""
    torch.set_num_threads(2)
    pipe = tiny.pipeline()
    pipe.unet = tiny.sd15_unet()
    tensors, adapter = make(pipe.unet, base="sd15")
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "timesteps": None}
    bare = tiny.run(pipe, **call)
    with two_branches(pipe.unet, tensors, ALL, apply_to="contrast"):
        want = tiny.run(pipe, **call)
    load_vmix(pipe, adapter, apply_to="contrast")
    assert difference(tiny.run(pipe, **call), want) < 1e-5
    assert difference(bare, want) > 1e-3
    unload_vmix(pipe)
    assert torch.equal(tiny.run(pipe, **call), bare)
