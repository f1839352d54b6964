"""VMixInit on a real ComfyUI: features, numbers, files, and what it refuses.

As in test_numbers.py, 2e-5 is some twenty times what another order of the same fp32 sums gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

pytestmark = pytest.mark.usefixtures("comfyui")
# SDXL's text encoders take their time; what is refused and saved is the same.
sd15_alone = pytest.mark.parametrize("loaded", ["sd15"], indirect=True)
TOLERANCE = 2e-5
EFFECT = 1e-3
GAIN = 0.25  # of every label of a training-free adapter
LORA = 0.8  # strength of every LoRA here

# The names are those of bases.WEIGHTS. Parentheses, which are weights in a prompt, are text here.
LIST = """
light: natural lighting (golden hour:1.3) | flat (dull) light
color: vibrant color; focus
"""
TEXTS = {
    "light": ("natural lighting (golden hour:1.3)", "flat (dull) light"),
    "color": ("vibrant color", ""),
    "focus": ("focus", ""),
}

if not host.missing:
    import bases
    import comfy.hooks
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import vmix
    from bases import Base, difference

    from comfy_nodes import demo_model, files, nodes, training_free
    from comfy_nodes.files import VMix, open_file


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def loaded(request: Any, model_file: Any) -> Iterator[tuple[Base, Any, Path]]:
    """A base with what VMixInit makes for it, its text encoder, and the file of both."""
    kind = request.param
    path = model_file(f"{kind}-mini-text")
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)
    layers = {layer.name: (layer.ldm_name, 320) for layer in vmix.unet_layers(kind)}
    base = Base(kind, model, layers)
    base.vmix = init(clip)
    base.tensors = {
        "aes_emb": from_conditioning(clip),
        "projection.gain": torch.full([len(TEXTS)], GAIN),
    }
    yield base, clip, path
    comfy.model_management.unload_all_models()


def init(clip: Any, labels: str = LIST, filename_prefix: str = "", **inputs: Any) -> VMix:
    made: VMix = nodes.VMixInit.execute(clip, labels, filename_prefix, **inputs).args[0]
    return made


# --- features ------------------------------------------------------------------------------------


def from_conditioning(clip: Any) -> Tensor:
    """[N, 2, d] from the node that users encode prompts with, at the first end of text."""
    rows = []
    for pair in TEXTS.values():
        for text in pair:
            typed = re.sub(r"[()]", r"\\\g<0>", text)
            (conditioning,) = host.call("nodes", "CLIPTextEncode", clip=clip, text=typed)
            rows.append(conditioning[0][0][0, len(vmix.Tokenizer().encode(text)) - 1])
    return torch.stack(rows).unflatten(0, (-1, 2))


def skipping(clip: Any) -> Any:
    return host.call("nodes", "CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-3)[0]


def with_lora(clip: Any) -> Any:
    """A random LoRA of all of the text encoder's query weights."""
    draw = torch.Generator().manual_seed(5)
    weights: dict[str, Tensor] = {}
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    state = clip.cond_stage_model.state_dict()
    for name, key in names.items():
        if re.fullmatch(r"lora_te\d?_text_model_encoder_layers_\d+_self_attn_q_proj", name):
            rows, columns = state[key].shape
            weights[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=draw) * 0.02
            weights[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=draw)
    assert weights
    return comfy.sd.load_lora_for_models(None, clip, weights, 0, LORA)[1]


def as_it_is(clip: Any) -> Any:
    return clip


@pytest.mark.parametrize("change", [as_it_is, skipping, with_lora])
def test_features(loaded: Any, change: Any) -> None:
    base, clip, _ = loaded
    # Once with every one of a text encoder's clones loaded anew: see Base.sample.
    comfy.model_management.unload_all_models()
    changed = change(clip)
    labels = files.read_labels(LIST)
    assert {label.name: (label.positive, label.negative) for label in labels} == TEXTS
    found, tokens = training_free.features(changed, labels)
    assert tokens == 77
    expected = base.tensors["aes_emb"] if changed is clip else from_conditioning(changed)
    assert torch.equal(found, expected)
    if changed is not clip:
        assert difference(found, base.tensors["aes_emb"]) > EFFECT


def test_features_of_the_rust_text_encoder(loaded: Any) -> None:
    """The same, from the same file, up to the order of sums over some twenty layers."""
    base, _, path = loaded
    expected = torch.from_dlpack(
        vmix.TextEncoder.open(path).features([text for pair in TEXTS.values() for text in pair])
    )
    assert difference(base.tensors["aes_emb"], expected.unflatten(0, (-1, 2))) <= 1e-5


def test_what_is_made(loaded: Any) -> None:
    base, clip, _ = loaded
    made = base.vmix
    assert (made.kind, made.base, made.value_weights) == ("adapter", base.kind, "base")
    assert made.selection == dict.fromkeys(TEXTS, 0.33)
    assert made.opened.projection == "difference"
    assert made.opened.trained == "no"
    positives = torch.from_dlpack(made.opened.aes_embed(dict.fromkeys(TEXTS, 1.0)))
    assert torch.equal(positives, base.tensors["aes_emb"][:, 0])
    # The same with the model, whose own layers it then has: a mini is neither SD1.5 nor SDXL.
    own = init(clip, model=base.model)
    assert own.base == "other"
    assert own.layers == {name: width for name, (_, width) in base.layers.items()}
    assert {layer.name: layer.ldm_name for layer in own.opened.layers} == base.ldm_names


# --- numbers -------------------------------------------------------------------------------------


def own_weights(base: Base, path: Path, model_file: Any, lora: bool) -> dict[str, Tensor]:
    """W_V of every layer from the checkpoint's file, with the LoRA's from its own."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name, ldm in base.ldm_names.items():
            weight = file.get_tensor(f"model.diffusion_model.{ldm}.to_v.weight").float()
            tensors[f"{name}.to_v_aes.weight"] = weight
    if lora:
        weights = comfy.utils.load_torch_file(str(model_file(f"{base.kind}-mini-lora")))
        for name, ldm in base.ldm_names.items():
            # kohya's scripts name SD1.5's layers as diffusers does.
            key = f"lora_unet_{name if base.kind == 'sd15' else ldm}.to_v".replace(".", "_")
            down, up = weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"]
            scale = LORA * weights[f"{key}.alpha"] / len(down)
            tensors[f"{name}.to_v_aes.weight"] += scale * up @ down
    return tensors


def prepared(loaded: Any, model_file: Any, lora: bool = False) -> Base:
    """The base with all tensors of the literal two branches."""
    base, _, path = loaded
    base = copy.copy(base)
    base.tensors = base.tensors | own_weights(base, path, model_file, lora)
    return base


def patched(base: Base, model_file: Any, model: Any) -> Any:
    weights = comfy.utils.load_torch_file(str(model_file(f"{base.kind}-mini-lora")))
    return comfy.sd.load_lora_for_models(model, None, weights, LORA, 0)[0]


@pytest.mark.parametrize("lora", ["", "LoRA before", "LoRA after"])
@pytest.mark.parametrize("apply_to", ["cond", "both", "contrast"])
def test_two_branches(loaded: Any, model_file: Any, apply_to: str, lora: str) -> None:
    base = prepared(loaded, model_file, bool(lora))
    without = patched(base, model_file, base.model) if lora else base.model
    ours, literal = (
        patched(base, model_file, mix(base.model, apply_to=apply_to))
        if lora == "LoRA after"
        else mix(without, apply_to=apply_to)
        for mix in (base.ours, base.literal)
    )
    bare = base.sample(without)
    expected = base.sample(literal)
    assert difference(expected, bare) > EFFECT
    assert difference(base.sample(ours), expected) <= TOLERANCE
    # λ = 0 is the model as it is, and nothing stays behind.
    assert torch.equal(base.sample(base.ours(without, strength=0.0, apply_to=apply_to)), bare)
    assert torch.equal(base.sample(without), bare)


@sd15_alone
def test_masks_and_long_prompts(loaded: Any, model_file: Any) -> None:
    base = prepared(loaded, model_file)
    mask = torch.full((1, 64, 64), 0.5)
    for options in ({}, {"tokens": (154, 77), "batch": 2}):
        found = base.sample(base.ours(base.model, mask=mask), **options)
        expected = base.sample(base.literal(base.model, strength=0.5), **options)
        assert difference(found, expected) <= TOLERANCE


def test_a_lora_that_comes_and_goes(loaded: Any, model_file: Any) -> None:
    """One VMixApply, whose layers keep what they computed, before two branches of the graph."""
    base = prepared(loaded, model_file)
    ours = base.ours(base.model)
    alone = base.sample(ours)
    with_lora = prepared(loaded, model_file, lora=True)
    expected = with_lora.sample(patched(base, model_file, with_lora.literal(base.model)))
    assert difference(base.sample(patched(base, model_file, ours)), expected) <= TOLERANCE
    assert torch.equal(base.sample(ours), alone)


@sd15_alone
@pytest.mark.parametrize("which", ["positive", "negative"])
def test_a_lora_of_one_conditioning(loaded: Any, model_file: Any, which: str) -> None:
    """Hooks change the weights between the passes of one sampling; either pass has its own V_a."""
    if host.PACKAGED:
        pytest.skip("there, what hooks do to the weights adds up from run to run, VMix or not")
    base = prepared(loaded, model_file, lora=True)
    weights = comfy.utils.load_torch_file(str(model_file(f"{base.kind}-mini-lora")))
    hooks = {"hooks": comfy.hooks.create_hook_lora(weights, LORA, 0)}
    if which == "positive":
        options = {"each": (hooks, {})}
        ours, literal = base.ours(base.model), base.literal(base.model)
    else:  # cfg 0 shows the negative's pass alone
        options = {"each": ({}, hooks), "cfg": 0.0}
        ours, literal = (mix(base.model, apply_to="both") for mix in (base.ours, base.literal))
    expected = base.sample(literal, **options)
    assert difference(expected, base.sample(base.model, **options)) > EFFECT
    assert difference(expected, base.sample(literal, cfg=options.get("cfg", 5.0))) > EFFECT
    assert difference(base.sample(ours, **options), expected) <= TOLERANCE


@sd15_alone
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bfloat16"])
def test_small_weights(model_file: Any, loaded: Any, dtype: str) -> None:
    """Stored small, cast to fp32 at every call: V_a too is computed in fp32."""
    base = prepared(loaded, model_file)
    weights = getattr(torch, dtype)
    base.model = bases.load("sd15", model_file("sd15-mini-text"), dtype=weights).model
    assert base.model.model.get_dtype() == weights
    for key, tensor in base.tensors.items():
        if key.endswith(".to_v_aes.weight"):
            base.tensors[key] = tensor.to(weights).float()
    expected = base.sample(base.literal(base.model))
    assert difference(base.sample(base.ours(base.model)), expected) <= TOLERANCE


# --- the demo model ------------------------------------------------------------------------------


def test_demo_model(comfyui: None) -> None:
    """A U-Net and a tokenizer of its own."""
    model, clip, *_ = demo_model.load()
    made = init(clip, "green: green; fish", model=model)
    trained = open_file(demo_model.ADAPTER)
    assert (made.base, made.context_tokens, made.context_dim) == ("other", 32, 96)
    assert made.layers == trained.layers
    (conditioning,) = host.call("nodes", "CLIPTextEncode", clip=clip, text="green")
    end = [token for token, _ in clip.tokenize("green")["l"][0]].index(
        demo_model._config("text_encoder")["eos_token_id"]
    )
    f = torch.from_dlpack(made.opened.aes_embed({"green": 1.0, "fish": 0.0}))
    assert torch.equal(f[0], conditioning[0][0][0, end])
    assert nodes.VMixApply.execute(model, made, 1.0, 0.0, 1.0, "file", "").args[0] is not model


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(loaded: Any) -> Any:
    return loaded[1]


@sd15_alone
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "labels: expected a list of labels.* found an empty list"),
        ("# nothing", "an empty list"),
        ("a; a", "twice|two labels"),
        ("all", "reserved"),
        ("x: embedding:easynegative", "label 'x': expected text, found 'embedding:easynegative'"),
        ("x: a | bad, embedding:y", "label 'x': expected text, found 'bad, embedding:y'"),
        ("x: " + "word " * 76, "label 'x': expected a text of at most 75 tokens, found a longer"),
    ],
)
def test_bad_lists(clip: Any, labels: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init(clip, labels)


@sd15_alone
def test_a_whole_chunk_is_not_too_long(clip: Any) -> None:
    assert init(clip, "x: " + "word " * 75).context_tokens == 77


@sd15_alone
def test_other_text_encoders(loaded: Any) -> None:
    base, clip, _ = loaded
    with pytest.raises(ValueError, match="clip: found none; the checkpoint has no text encoder"):
        init(None)
    tokens = {"l": [[(0, 1.0), (1, 1.0)]], "t5xxl": [[(1, 1.0)]]}
    flux = SimpleNamespace(tokenize=lambda text: tokens, cond_stage_model=SimpleNamespace())
    for inputs in ({}, {"model": base.model}):
        with pytest.raises(
            ValueError,
            match=r"clip: expected the text encoder of SD1.5 or SDXL, found .* \(l, t5xxl\)",
        ):
            init(flux, **inputs)
    demo, demo_clip, *_ = demo_model.load()
    with pytest.raises(
        ValueError, match=r"context is 768 \(SD1.5\) or 2048 \(SDXL\) wide, found 96"
    ):
        init(demo_clip)
    with pytest.raises(ValueError, match=r"whose context is 96 wide, found (768|2048)"):
        init(clip, model=demo)
    flux = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config={})))
    with pytest.raises(ValueError, match="model: expected a U-Net with cross-attention"):
        init(clip, model=flux)


@sd15_alone
def test_scheduled_hooks(loaded: Any) -> None:
    """A text encoder that is another one later in the sampling."""
    clip = loaded[1]
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    name = next(n for n in names if n.endswith("layers_0_self_attn_q_proj") and "lora_te" in n)
    rows, columns = clip.cond_stage_model.state_dict()[names[name]].shape
    lora = {
        f"{name}.lora_down.weight": torch.ones(1, columns),
        f"{name}.lora_up.weight": torch.ones(rows, 1),
    }
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0, strength_clip=1)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.5, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    changing = host.call(
        "comfy_extras.nodes_hooks", "SetClipHooks",
        clip=clip, schedule_clip=True, apply_to_conds=True, hooks=hooks,
    )[0]  # fmt: skip
    with pytest.raises(ValueError, match="found one with hooks that are scheduled"):
        init(changing)


@sd15_alone
def test_the_other_base(loaded: Any) -> None:
    """What was made for one base is refused by the other, and by nothing but its layers."""
    base, made = loaded[0], loaded[0].vmix
    with pytest.raises(ValueError, match=r"VMix Training-Free Start is for (SD1.5|SDXL)"):
        nodes.checked_layers(demo_model.load_model(), made)
    assert set(nodes.checked_layers(base.model, made)) == set(base.layers)
    with pytest.raises(ValueError, match="expected an adapter with value weights of its own"):
        made.save_preset("never.safetensors", None, "file", "float16")


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "native", None)
    with pytest.raises(RuntimeError, match="install the vmix-adapter wheel"):
        init(None)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nodes.folder_paths, "models_dir", str(tmp_path / "models"))
    return tmp_path / "models" / "vmix"


@sd15_alone
def test_saving(clip: Any, models: Path) -> None:
    made = init(clip)
    assert not models.exists()
    output = nodes.VMixInit.execute(clip, LIST, " mine/labels ")
    path = models / "mine" / "labels_00001_.safetensors"
    assert output.ui == {"text": [f"saved {path}"]}
    found = open_file(path)
    for name in ("kind", "base", "labels", "context_tokens", "context_dim", "apply_to", "layers",
                 "selection", "value_weights"):  # fmt: skip
        assert getattr(found, name) == getattr(made, name), name
    assert torch.equal(found.features(None, "cond").cond, made.features(None, "cond").cond)
    # The next one has the next number, and nothing is written over: not even where ComfyUI
    # miscounts, as with a slash at the end.
    before = path.read_bytes()
    for number, prefix in ((2, "mine/labels"), (3, "mine/labels/"), (4, "./mine//labels")):
        init(clip, "other", prefix)
        assert (models / "mine" / f"labels_{number:05}_.safetensors").is_file()
    assert path.read_bytes() == before
    assert len(list(models.rglob("*.*"))) == 4


@sd15_alone
@pytest.mark.parametrize("prefix", ["..", ".", "../x", "a/../../x", "/tmp/x", "a/..", "a/../.."])
def test_nothing_is_saved_outside(clip: Any, models: Path, prefix: str) -> None:
    with pytest.raises(ValueError, match="filename_prefix: expected a name below"):
        init(clip, "x", prefix)
    assert not list(models.parent.parent.rglob("*.safetensors"))
