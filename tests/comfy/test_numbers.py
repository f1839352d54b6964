"""VMixApply against the paper's literal two branches, on a real ComfyUI in fp32.

The tolerance of 2e-5, relative in the Euclidean norm of the latents after two steps, is some
twenty times what a different order of the same fp32 sums gives in one forward of these U-Nets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import host
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfyui")
TOLERANCE = 2e-5
EFFECT = 1e-3  # a patch that changes less than this would prove nothing

if not host.missing:
    import bases
    import comfy.controlnet
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    from bases import Base, difference


@pytest.fixture(scope="module")
def sd15(model_file: Any, tmp_path_factory: Any) -> Base:
    base = bases.load("sd15", model_file("sd15-mini"), width=320)
    return bases.give_adapter(base, tmp_path_factory.mktemp("vmix"))


@pytest.fixture(scope="module")
def sdxl(model_file: Any, tmp_path_factory: Any) -> Base:
    base = bases.load("sdxl", model_file("sdxl-mini"), width=320)
    return bases.give_adapter(base, tmp_path_factory.mktemp("vmix"))


def agree(base: Base, ours: Any, literal: Any, without: Any = None, **options: Any) -> None:
    found, expected = base.sample(ours, **options), base.sample(literal, **options)
    bare = base.sample(without or base.model, **options)
    assert difference(expected, bare) > EFFECT
    assert difference(found, expected) <= TOLERANCE
    assert torch.equal(base.sample(without or base.model, **options), bare)


PLAIN = [
    {},
    {"batch": 2},
    {"cfg": 1.0},
    {"tokens": (154, 77)},
    {"tokens": (154, 154)},
    {"tokens": (77, 154), "batch": 2},
    {"size": (12, 20)},
]


@pytest.mark.parametrize("options", PLAIN, ids=str)
@pytest.mark.parametrize("apply_to", ["cond", "both", "contrast"])
def test_sd15(sd15: Base, apply_to: str, options: dict[str, Any]) -> None:
    agree(
        sd15,
        sd15.ours(sd15.model, apply_to=apply_to),
        sd15.literal(sd15.model, apply_to=apply_to),
        **options,
    )


@pytest.mark.parametrize(
    "options", [{}, {"batch": 2}, {"cfg": 1.0}, {"tokens": (154, 77)}], ids=str
)
@pytest.mark.parametrize("apply_to", ["cond", "both", "contrast"])
def test_sdxl(sdxl: Base, apply_to: str, options: dict[str, Any]) -> None:
    agree(
        sdxl,
        sdxl.ours(sdxl.model, apply_to=apply_to),
        sdxl.literal(sdxl.model, apply_to=apply_to),
        **options,
    )


def test_uncond_alone(sd15: Base) -> None:
    """What the unconditional pass gets under contrast, seen by itself: cfg 0 shows no other."""
    for apply_to in ("both", "contrast"):
        agree(
            sd15,
            sd15.ours(sd15.model, apply_to=apply_to),
            sd15.literal(sd15.model, apply_to=apply_to),
            cfg=0.0,
        )
    untouched = sd15.ours(sd15.model, apply_to="cond")
    assert torch.equal(sd15.sample(untouched, cfg=0.0), sd15.sample(sd15.model, cfg=0.0))


def test_separate_passes(sd15: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, ComfyUI runs the two passes one after the other."""
    ours = sd15.ours(sd15.model, apply_to="contrast")
    together = sd15.sample(ours)
    calls: list[int] = []

    def much(shape: Any, *_: Any, **__: Any) -> float:
        calls.append(shape[0])
        return float("inf")

    monkeypatch.setattr(sd15.model.model, "memory_required", much)
    apart = sd15.sample(ours)
    assert calls
    literal = sd15.literal(sd15.model, apply_to="contrast")
    assert difference(apart, sd15.sample(literal)) <= TOLERANCE
    assert difference(apart, together) <= TOLERANCE


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_strength_and_stacking(request: Any, kind: str, tmp_path: Any) -> None:
    base: Base = request.getfixturevalue(kind)
    other = bases.give_adapter(copy.copy(base), tmp_path, seed=4)
    ours = other.ours(base.ours(base.model, strength=0.7), strength=-0.4, apply_to="both")
    literal = other.literal(base.literal(base.model, strength=0.7), strength=-0.4, apply_to="both")
    agree(base, ours, literal)
    # Three of one kind, as a stack of nodes is built in practice.
    ours = base.ours(base.ours(base.ours(base.model, strength=0.2), strength=0.3), strength=0.5)
    agree(base, ours, base.literal(base.model))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7)], ids=str)
def test_window_of_steps(request: Any, kind: str, window: tuple[float, float]) -> None:
    base: Base = request.getfixturevalue(kind)
    sampling = base.model.get_model_object("model_sampling")
    sigmas = tuple(sampling.percent_to_sigma(p) for p in window)
    ours = base.ours(base.model, start_percent=window[0], end_percent=window[1])
    agree(base, ours, base.literal(base.model, sigmas=sigmas), steps=5)
    always = base.sample(base.ours(base.model), steps=5)
    assert difference(base.sample(ours, steps=5), always) > EFFECT


def by_block(block: tuple[str, int], depth: int) -> float:
    """in4-8=0.5, mid=0, out3=-1"""
    if block[0] == "middle":
        return 0.0
    if block[0] == "input" and 4 <= block[1] <= 8:
        return 0.5
    return -1.0 if block == ("output", 3) else 1.0


def test_strength_per_block(sd15: Base, sdxl: Base) -> None:
    for base in (sd15, sdxl):
        ours = base.ours(base.model, blocks=by_block.__doc__)
        agree(base, ours, base.literal(base.model, strength=by_block))


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"tokens": (154, 77)}, {"size": (10, 14)}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("apply_to", ["cond", "contrast"])
def test_mask(sd15: Base, sdxl: Base, apply_to: str, options: dict[str, Any]) -> None:
    height, width = options.get("size", (8, 8))
    # A different weight everywhere, at the picture's resolution.
    mask = torch.linspace(0, 1, height * 8 * width * 8).view(1, height * 8, width * 8)

    def at(queries: int) -> torch.Tensor:
        h, w = height, width
        while h * w != queries:
            h, w = -(-h // 2), -(-w // 2)
        small = torch.nn.functional.interpolate(mask[None], (h, w), mode="bilinear")
        return small.flatten()[:, None]

    for base in (sd15, sdxl):
        ours = base.ours(base.model, mask=mask, apply_to=apply_to, strength=0.8)
        literal = base.literal(base.model, mask=at, apply_to=apply_to, strength=0.8)
        agree(base, ours, literal, **options)


def test_two_masks_make_regions(sd15: Base) -> None:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    whole = sd15.ours(sd15.model, strength=0.6)
    halves = sd15.ours(sd15.ours(sd15.model, strength=0.6, mask=left), strength=0.6, mask=1 - left)
    # Bilinear weights of the two masks add up to one everywhere.
    assert difference(sd15.sample(halves), sd15.sample(whole)) <= TOLERANCE


def test_mask_of_a_batch(sd15: Base) -> None:
    """Every picture of a batch has its own mask; they are repeated where there are too few."""
    masks = torch.zeros(2, 64, 64)
    masks[1] = 1
    both = sd15.sample(sd15.ours(sd15.model, mask=masks), batch=2)
    assert difference(both[:1], sd15.sample(sd15.model, batch=2)[:1]) <= TOLERANCE
    assert difference(both[1:], sd15.sample(sd15.ours(sd15.model), batch=2)[1:]) <= TOLERANCE


# --- beside other nodes --------------------------------------------------------------------------

Patch = Callable[[Any], Any]


def lora(base: Base, model_file: Any) -> Patch:
    weights = comfy.utils.load_torch_file(str(model_file(f"{base.kind}-mini-lora")))
    assert any("attn2_to_v" in key for key in weights)
    return lambda model: comfy.sd.load_lora_for_models(model, None, dict(weights), 0.8, 0)[0]


def ip_adapter(base: Base, model_file: Any) -> Patch:
    plus = host.ip_adapter_plus()
    if plus is None:
        pytest.skip(f"no ComfyUI_IPAdapter_plus at {host.IP_ADAPTER_PLUS}")
    from importlib import import_module

    import comfy.clip_vision

    utils = import_module(f"{plus.__package__}.utils")
    adapter = utils.ipadapter_model_loader(str(model_file(f"{base.kind}-mini-ip-adapter")))
    vision = comfy.clip_vision.load(str(model_file("clip-vision")))
    image = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(8))

    def patch(model: Any) -> Any:
        # As the node does, which clones the model first.
        return plus.ipadapter_execute(model.clone(), adapter, vision, image=image, weight=0.9)[0]

    return patch


def node(module: str, name: str, **inputs: Any) -> Callable[[Base, Any], Patch]:
    return lambda base, model_file: lambda model: host.call(module, name, model=model, **inputs)[0]


def attention_multiply(base: Base, model_file: Any) -> Patch:
    return node(
        "comfy_extras.nodes_attention_multiply",
        "UNetCrossAttentionMultiply",
        q=1.1, k=0.9, v=1.2, out=0.95,
    )(base, model_file)  # fmt: skip


OTHERS: dict[str, Callable[[Base, Any], Patch]] = {
    "LoRA": lora,
    "IPAdapter_plus": ip_adapter,
    "CrossAttentionMultiply": attention_multiply,
    "PAG": node("comfy_extras.nodes_pag", "PerturbedAttentionGuidance", scale=3.0),
    "SAG": node("comfy_extras.nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    "HyperTile": node(
        "comfy_extras.nodes_hypertile", "HyperTile",
        tile_size=64, swap_size=2, max_depth=2, scale_depth=False,
    ),
    "ToMe": node("comfy_extras.nodes_tomesd", "TomePatchModel", ratio=0.3),
}  # fmt: skip


ATTN1_ALONE = ("PAG", "SAG", "HyperTile", "ToMe")
BESIDE = [
    (kind, other, order, masked)
    for kind in ("sd15", "sdxl")
    for other in OTHERS
    for order in ("before", "after")
    for masked in (False, True)
    # A mask concerns attn2; what concerns attn1 alone need not be seen with it twice.
    if not (masked and kind == "sdxl" and other in ATTN1_ALONE)
    # ToMe merges at the latent's own resolution, where SDXL has no attention.
    if (kind, other) != ("sdxl", "ToMe")
]


@pytest.mark.parametrize(("kind", "other", "order", "masked"), BESIDE)
def test_beside(
    request: Any, model_file: Any, kind: str, other: str, order: str, masked: bool
) -> None:
    base: Base = request.getfixturevalue(kind)
    patch = OTHERS[other](base, model_file)
    # PAG and SAG act in the middle block, an eighth as wide.
    size = {"PAG": (16, 16), "SAG": (16, 16), "HyperTile": (32, 32), "ToMe": (32, 32)}.get(
        other, (8, 8)
    )
    ours: dict[str, Any] = {}
    literal: dict[str, Any] = {}
    if masked:
        ours["mask"] = torch.full((1, 8 * size[0], 8 * size[1]), 0.5)
        literal["strength"] = 0.5
    torch.manual_seed(0)  # HyperTile draws its tiles
    if order == "before":
        pair = base.ours(patch(base.model), **ours), base.literal(patch(base.model), **literal)
    else:
        pair = patch(base.ours(base.model, **ours)), patch(base.literal(base.model, **literal))
    agree(base, *pair, without=patch(base.model), size=size)
    alone = base.sample(base.ours(base.model, **ours), size=size)
    assert difference(base.sample(pair[0], size=size), alone) > 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_beside_controlnet(request: Any, model_file: Any, kind: str) -> None:
    base: Base = request.getfixturevalue(kind)
    net = comfy.controlnet.load_controlnet(str(model_file(f"{kind}-mini-controlnet")))
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    control = {
        "control": net.copy().set_cond_hint(hint, 0.8, (0.0, 1.0)),
        "control_apply_to_uncond": False,
    }
    ours, literal = base.ours(base.model), base.literal(base.model)
    agree(base, ours, literal, control=control)
    assert difference(base.sample(ours, control=control), base.sample(ours)) > EFFECT


def test_everything_at_once(sd15: Base, model_file: Any) -> None:
    patches = [OTHERS[name](sd15, model_file) for name in ("LoRA", "IPAdapter_plus", "PAG")]
    net = comfy.controlnet.load_controlnet(str(model_file("sd15-mini-controlnet")))
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    control = {
        "control": net.copy().set_cond_hint(hint, 0.8, (0.0, 1.0)),
        "control_apply_to_uncond": False,
    }

    def with_all(mix: Callable[[Any], Any]) -> Any:
        model = patches[2](patches[1](sd15.model))
        return patches[0](mix(model))

    agree(
        sd15,
        with_all(lambda m: sd15.ours(m, apply_to="contrast")),
        with_all(lambda m: sd15.literal(m, apply_to="contrast")),
        without=with_all(lambda m: m),
        control=control,
        batch=2,
        tokens=(154, 77),
        size=(16, 16),
    )


@pytest.mark.full
def test_freeu(model_file: Any, tmp_path: Any) -> None:
    """FreeU acts on 640 and 1280 channels, so on the real widths alone."""
    base = bases.load("sd15", model_file("sd15"), dtype=torch.float32)
    bases.give_adapter(base, tmp_path, known=True)
    base.size = 16  # below two by two, FreeU divides by zero
    patch = node("comfy_extras.nodes_freelunch", "FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)(
        base, model_file
    )
    without = patch(base.model)
    assert difference(base.sample(without), base.sample(base.model)) > EFFECT
    agree(base, patch(base.ours(base.model)), patch(base.literal(base.model)), without)
    agree(base, base.ours(patch(base.model)), base.literal(patch(base.model)), without)


# --- how the model is held -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16"])
def test_small_weights(model_file: Any, tmp_path: Any, dtype: str) -> None:
    """Stored small, cast to fp32 at every call, as ComfyUI does on a CPU."""
    weights = getattr(torch, dtype)
    base = bases.load("sd15", model_file("sd15-mini"), width=320, dtype=weights)
    assert base.model.model.get_dtype() == weights
    bases.give_adapter(base, tmp_path)
    agree(base, base.ours(base.model), base.literal(base.model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computing_in_half_precision(
    sd15: Base, model_file: Any, tmp_path: Any, dtype: str
) -> None:
    """As on a GPU. Both ways of computing round at other places: what is asked is that ours is
    no farther from the fp32 result than the model without VMix is from its own."""
    half = bases.load("sd15", model_file("sd15-mini"), width=320, dtype=getattr(torch, dtype))
    half.model.model.manual_cast_dtype = None
    bases.give_adapter(half, tmp_path)
    ours = half.ours(half.model)
    layers = ours.wrappers["apply_model"]["vmix"][0].layers
    assert {layer.values.cond.dtype for layer in layers} == {getattr(torch, dtype)}
    rounding = difference(half.sample(half.model), sd15.sample(sd15.model))
    assert 0 < rounding < 0.1
    found = difference(half.sample(ours), sd15.sample(sd15.literal(sd15.model)))
    assert found <= 1.5 * rounding


def test_overflow(sd15: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before anything is sampled, where fp16 cannot hold what fp32 can."""
    options = {"strength": 10.0, "blocks": "in1=1e4", "aesthetics": {"light": 10.0}}
    sd15.ours(sd15.model, **options)
    monkeypatch.setattr(sd15.model.model, "manual_cast_dtype", torch.float16)
    message = (
        r"^input_blocks\.1\.1\.transformer_blocks\.0\.attn2: expected values times strength that "
        r"float16 can hold, found more: label 'light' at weight 10, strength 100000$"
    )
    with pytest.raises(ValueError, match=message):
        sd15.ours(sd15.model, **options)


@pytest.mark.parametrize("with_lora", [False, True], ids=["", "LoRA"])
def test_forced_offload(sd15: Base, model_file: Any, with_lora: bool) -> None:
    """Half of the weights stay outside and are patched and cast at every call."""
    patch = lora(sd15, model_file) if with_lora else (lambda model: model)

    def offloaded(model: Any) -> Any:
        model = model.clone()

        def partially_load(device: Any, extra_memory: int = 0, **options: Any) -> Any:
            return type(model).partially_load(model, device, 100e6, **options)

        model.partially_load = partially_load
        return model

    comfy.model_management.unload_all_models()
    found = sd15.sample(offloaded(sd15.ours(patch(sd15.model))))
    assert sd15.model.model.model_lowvram
    comfy.model_management.unload_all_models()
    expected = sd15.sample(sd15.literal(patch(sd15.model)))
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled(sd15: Base, order: str) -> None:
    """Through dynamo, with the backend that runs the graph as it is traced."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(model: Any) -> Any:
        model = model.clone()
        torch._dynamo.reset()
        set_torch_compile_wrapper(model, backend="eager")
        return model

    ours = sd15.ours(compiled(sd15.model)) if order == "before" else compiled(sd15.ours(sd15.model))
    found = sd15.sample(ours, steps=4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(sd15.sample(ours, steps=4), found)
    # Neither a further step nor a further run compiles anything again.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    expected = sd15.sample(sd15.literal(sd15.model), steps=4)
    assert difference(found, expected) <= TOLERANCE


# --- leaving no trace ----------------------------------------------------------------------------


def test_nothing_is_bit_identical(sd15: Base, sdxl: Base) -> None:
    for base in (sd15, sdxl):
        bare = base.sample(base.model)
        ours = base.ours(base.model)
        results = [
            base.sample(base.ours(base.model, strength=0.0)),
            base.sample(base.ours(base.model, blocks="in=0, mid=0, out=0")),
            base.sample(base.ours(base.model, start_percent=0.4, end_percent=0.6)),
            base.sample(base.model),
        ]
        base.sample(ours)
        results += [base.sample(base.model), base.sample(base.model.clone())]
        assert bases.equal([bare, *results])
        assert torch.equal(base.sample(ours), base.sample(ours.clone()))


@pytest.mark.parametrize("what", ["forward", "module"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_foreign_patch_of_to_v(sd15: Base, order: str, what: str) -> None:
    """Another pack's object patch on the very layer: neither spoils the other."""
    path = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v"

    def foreign(model: Any) -> Any:
        model = model.clone()
        layer = model.get_model_object(path)
        if what == "forward":
            original = layer.forward
            model.add_object_patch(f"{path}.forward", lambda x: original(x) * 1.5)
        else:
            twin = copy.copy(layer)
            twin.forward = lambda x: layer(x) * 1.5
            model.add_object_patch(path, twin)
        return model

    bare = sd15.sample(sd15.model)
    alone = sd15.sample(foreign(sd15.model))
    assert difference(alone, bare) > 1e-4
    if order == "before":
        ours, literal = sd15.ours(foreign(sd15.model)), sd15.literal(foreign(sd15.model))
    else:
        ours, literal = foreign(sd15.ours(sd15.model)), foreign(sd15.literal(sd15.model))
    for _ in range(2):
        assert difference(sd15.sample(ours), sd15.sample(literal)) <= TOLERANCE
        assert torch.equal(sd15.sample(sd15.model), bare)
        assert torch.equal(sd15.sample(foreign(sd15.model)), alone)


def test_an_error_in_the_model_leaves_no_trace(sd15: Base) -> None:
    bare = sd15.sample(sd15.model)
    attn = sd15.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    before = [dict(vars(module)) for module in attn.modules()]
    for mask in (None, torch.ones(1, 64, 64)):
        with pytest.raises(ValueError, match="has 80 tokens, the adapter needs a multiple of 77"):
            sd15.sample(sd15.ours(sd15.model, mask=mask), tokens=(80, 80))
        assert [vars(module) for module in attn.modules()] == before
    assert torch.equal(sd15.sample(sd15.model), bare)
