"""Fitting on pipelines and with the command: the demo's model, and a tiny SDXL of random weights.

That the sums are right is test_fit.py's to show; here they are compared with each other, between
ways to draw that must not matter. Kernels of other batch sizes add up in another order: sums then
differ by some 1e-6 of their largest entry, 1e-4 is allowed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor2_0
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.dlpack import from_dlpack
from vmix import Adapter, VMixError, unet_layers
from vmix.diffusers import (
    fit_vmix,
    fitting,
    list_vmix,
    load_vmix,
    preview,
    set_vmix,
    set_vmix_scale,
    unload_vmix,
)
from vmix.fit import Collector, FitLabel, Fitted, Picture, Plan, Sums, bare, fitted_adapter
from vmix.fit.__main__ import _interruptible, main, typed_label
from vmix.measures import brightness
from vmix.rows import open_rows
from vmix.train.single_file import CONFIGS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo"))
demo: Any = import_module("demo")
MODEL = ROOT / "comfy_nodes" / "demo" / "model"
LABELS = {"light": (["bright", "well lit"], "dark"), "color": "dull"}
TOO_LONG = "a red apple, " * 12
PROMPTS = [
    "a red apple", "a {words} green tree", TOO_LONG, "a blue car", "a yellow star",
    "a pink donut, {words}",
]  # fmt: skip
USED = [prompt for prompt in PROMPTS if prompt != TOO_LONG]
STEPS = 2
LAYERS = {
    f"{place}.attentions.0.transformer_blocks.0.attn2"
    for place in ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
} | {f"up_blocks.{i}.attentions.1.transformer_blocks.0.attn2" for i in range(2)}


load = demo.open_pipeline


@dataclass
class Run:
    adapter: Adapter
    plan: Plan
    sums: Sums
    fitted: Fitted


def run(
    pipe: Any,
    labels: Any = None,
    prompts: Any = None,
    steps: int = STEPS,
    dtype: Any = "float32",
    **options: Any,
) -> Run:
    """`fit_vmix`, and what it solved."""
    found: list[tuple[Plan, Sums, Fitted]] = []

    def solving(plan: Plan, sums: Sums, **more: Any) -> Fitted:
        found.append((plan, sums, fitted_adapter(plan, sums, **more)))
        return found[0][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "fitted_adapter", solving)
        adapter = fit_vmix(
            pipe, labels or LABELS, prompts or PROMPTS, steps, dtype=dtype, **options
        )
    return Run(adapter, *found[0])


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load()


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Run:
    return run(pipe)


def drawn(pipe: Any, prompts: Sequence[str] = ("a red apple", "a blue car"), **options: Any) -> Any:
    """Latents of a short guided sampling."""
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, **options}
    random = [torch.Generator().manual_seed(i) for i, _ in enumerate(prompts)]
    return pipe([*prompts], generator=random, **{"output_type": "latent", **options}).images


def refused(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one sentence that a VMixError says."""
    with pytest.raises(VMixError) as caught:
        function(*arguments, **named)
    said = str(caught.value)
    assert said == said.strip() != ""
    assert "\n" not in said
    return said


def sums_differ(one: Sums, other: Sums) -> float:
    """By how much at most, relative to the largest entry of each."""
    assert one.done == other.done
    assert set(one.layers) == set(other.layers)
    worst = 0.0
    for path, layer in one.layers.items():
        for name, expected in layer.tensors().items():
            found = getattr(other.layers[path], name)
            if name != "mismatch":  # rounding and nothing else
                worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def values_differ(one: Run, other: Run, ridge: float | None = None) -> float:
    """By how much at most a·V_a does, relative to a·V_a, over all layers of a side."""
    if ridge is not None:
        one, other = (again(found, ridge) for found in (one, other))
    assert set(one.fitted.sides) == set(other.fitted.sides)
    worst = 0.0
    for side, expected in one.fitted.sides.items():
        apart = whole = 0.0
        for path, layer in one.sums.layers.items():
            moment = layer.moment.sum((0, 1)).double()
            table, found = (
                x.values(path).unflatten(1, (layer.heads, -1)).transpose(0, 1)
                for x in (expected, other.fitted.sides[side])
            )
            change = found - table
            apart += float((moment @ change).mul(change).sum())
            whole += float((moment @ table).mul(table).sum())
        worst = max(worst, (apart / whole) ** 0.5)
    return worst


def again(found: Run, ridge: float) -> Run:
    """Solved with a ridge that no rounding chooses."""
    names = dict.fromkeys(found.sums.layers, "")
    fitted = fitted_adapter(
        found.plan, found.sums, base="other", ldm_names=names, made={}, ridge=ridge,
        dtype=torch.float32,
    )  # fmt: skip
    return Run(found.adapter, found.plan, found.sums, fitted)


def traces(unet: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of all modules."""
    return {
        name: ({*vars(m)}, len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("forward"))
        for name, m in unet.named_modules()
    }


def stop(scheduler: Any, patch: pytest.MonkeyPatch, call: int, error: BaseException) -> list[int]:
    """Lets a call of its `step` fail; returns a list with their number, kept up to date."""
    original, calls = scheduler.step, [0]

    @functools.wraps(original)  # pipelines ask for its arguments
    def step(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*arguments, **named)

    patch.setattr(scheduler, "step", step)
    return calls


# --- what a fit makes ---


def test_what_a_fit_makes(plain: Run, tmp_path: Path) -> None:
    adapter = plain.adapter
    adapter.save(tmp_path / "fitted.safetensors")
    file = open_rows(tmp_path / "fitted.safetensors")
    assert (file.base, file.context_tokens, file.context_dim) == ("other", 32, 96)
    assert (file.apply_to, file.coefficient_kind) == ("cond", "linear")
    assert set(file.rows) == {layer.name for layer in adapter.layers} == LAYERS
    assert file.ldm_names["mid_block.attentions.0.transformer_blocks.0.attn2"] == (
        "middle_block.1.transformer_blocks.0.attn2"
    )
    assert len(set(file.ldm_names.values())) == 7
    light, color = file.labels
    assert (light.name, light.positive, light.negative) == (
        "light", ("bright", "well lit"), ("dark",),
    )  # fmt: skip
    assert (light.range, color.range) == ((-1.5, 1.5), (0, 1.5))
    made = {
        "method": "fitted", "base": "model", "steps": STEPS, "rank": 4, "guidance": 7.5,
        "prompts": len(USED), "scheduler": "DDIMScheduler", "seed": 0,
    }  # fmt: skip
    assert {key: file.made[key] for key in made} == made
    assert file.metadata["modelspec.title"] == "light, color"
    assert file.dtype == torch.float32


def test_too_long_prompts_are_left_out(plain: Run) -> None:
    assert plain.plan.prompts == tuple(USED)
    assert plain.plan.too_long == (TOO_LONG.strip(),)
    assert plain.sums.done == set(range(len(USED)))


def test_rows_are_in_f16_unless_asked(pipe: Any) -> None:
    adapter = fit_vmix(pipe, {"light": "dark"}, USED[:2], 1)
    assert adapter.dtype == "float16"


def test_aesthetic_features_are_those_at_the_end_of_the_words(pipe: Any, plain: Run) -> None:
    def feature(text: str) -> Tensor:
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        end = int((ids[0] == pipe.tokenizer.eos_token_id).int().argmax())
        with torch.no_grad():
            return pipe.text_encoder(ids)[0][0, end]  # type: ignore[no-any-return]

    expected = [
        [(feature("bright") + feature("well lit")) / 2, feature("dark")],
        [feature("dull"), feature("")],
    ]
    found = plain.fitted.tensors["aes_emb"]
    # f32, in batches of another size.
    torch.testing.assert_close(found, torch.stack([torch.stack(x) for x in expected]))


def test_warnings_are_logged_and_written(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = run(pipe, {"light": ("dark", "dark")}, USED[:2], 1)
    said = [record.message for record in caplog.records if record.name.startswith("vmix")]
    assert any("both sides do nearly the same" in one for one in said)
    assert [f"VMix: {warning}" for warning in found.adapter.made["warnings"]] == said


def test_other_labels_and_prompts_of_files(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.toml").write_text('[[label]]\nname = "light"\npositive = "bright"\n')
    (tmp_path / "prompts.txt").write_text("# two\na red apple\na blue car\n")
    adapter = fit_vmix(
        pipe, tmp_path / "labels.toml", tmp_path / "prompts.txt", 1, made={"base": "mine", "x": [1]}
    )
    assert [label.name for label in adapter.labels] == ["light"]
    assert (adapter.made["prompts"], adapter.made["base"], adapter.made["x"]) == (2, "mine", [1])


# --- pictures stay as they are ---


def test_collecting_changes_no_picture(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = diffusers.StableDiffusionPipeline.__call__
    calls: list[tuple[dict[str, Any], Tensor]] = []

    @functools.wraps(original)
    def recorded(self: Any, **options: Any) -> Any:
        found = original(self, **options)
        calls.append((options, found.images))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.StableDiffusionPipeline, "__call__", recorded)
        run(pipe, batch_size=2)
    assert len(calls) == 3
    for options, latents in calls:
        del options["callback_on_step_end"]
        seeds = [generator.initial_seed() for generator in options["generator"]]
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        assert torch.equal(pipe(**options).images, latents)
    # They are those of the bare prompts.
    plainly = pipe(
        [bare(prompt) for prompt in USED],
        generator=[torch.Generator().manual_seed(i) for i in range(len(USED))],
        num_inference_steps=STEPS,
        output_type="latent",
    ).images
    # f32, in batches of another size.
    torch.testing.assert_close(
        torch.cat([latents for _, latents in calls]), plainly, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_is_left_on_the_pipeline(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    before, bar = traces(pipe.unet), dict(pipe._progress_bar_config)
    drawn(pipe)
    with monkeypatch.context() as patch:
        stop(pipe.scheduler, patch, 3 if error else -1, error)
        if error:
            with pytest.raises(type(error)):
                run(pipe, prompts=USED[:2])
        else:
            run(pipe, prompts=USED[:2])
    assert traces(pipe.unet) == before
    assert pipe._progress_bar_config == bar
    del pipe._progress_bar_config
    run(pipe, {"light": "dark"}, USED[:2], 1)
    assert "_progress_bar_config" not in vars(pipe)
    assert list_vmix(pipe) == []


# --- ways to draw that do not matter ---


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batches(pipe: Any, plain: Run, batch_size: int) -> None:
    found = run(pipe, batch_size=batch_size)
    assert sums_differ(plain.sums, found.sums) < 1e-4
    # What f32 rounds off the sums, over a ridge of a thousandth.
    assert values_differ(plain, found) < 1e-3


def test_a_host_of_ones_own_in_another_order(pipe: Any, plain: Run) -> None:
    """With the collector alone, and prompts in an order that no fit would take."""
    sums = Sums({})
    layers = {name: m for name, m in pipe.unet.named_modules() if name in LAYERS}
    collector = Collector(layers, plain.plan, sums)

    def context(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            found: Tensor = pipe.encode_prompt([*texts], "cpu", 1, False)[0]
        return found

    def tells(_: Any, step: int, *__: Any) -> dict[str, Any]:
        collector.progress = (step + 1) / STEPS
        return {}

    with collector.riding():
        for batch in ([4, 1], [0], [3, 2]):
            told = [context([text for _, text in plain.plan.words(i)]) for i in batch]
            collector.start([Picture(k - len(batch), i, told[k]) for k, i in enumerate(batch)])
            pipe(
                [bare(plain.plan.prompts[i]) for i in batch],
                generator=[torch.Generator().manual_seed(i) for i in batch],
                num_inference_steps=STEPS,
                output_type="latent",
                callback_on_step_end=tells,
            )
            collector.finish()
    assert sums_differ(plain.sums, sums) < 1e-4
    names = dict.fromkeys(layers, "")
    fitted = fitted_adapter(
        plain.plan, sums, base="other", ldm_names=names, made={}, dtype=torch.float32
    )
    # What f32 rounds off the sums, over a ridge of a thousandth.
    assert values_differ(plain, Run(plain.adapter, plain.plan, sums, fitted)) < 1e-3


def test_sliced_attention(plain: Run) -> None:
    pipe = load()
    pipe.enable_attention_slicing()
    found = run(pipe)
    assert sums_differ(plain.sums, found.sums) < 1e-4
    assert values_differ(plain, found) < 1e-3


def test_under_autocast(pipe: Any) -> None:
    labels, prompts = {"light": ("bright", "dark")}, USED[:4]
    expected = run(pipe, labels, prompts, steps=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(pipe, labels, prompts, steps=1, dtype="float16")
    # As bf16 below.
    assert values_differ(expected, found, ridge=0.1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe: Any, dtype: torch.dtype) -> None:
    labels, prompts = {"light": ("bright", "dark")}, USED[:4]
    expected = run(pipe, labels, prompts, steps=1)
    half = load()
    half.to(dtype=dtype)
    found = run(half, labels, prompts, steps=1)
    assert found.sums.layers.keys() == LAYERS
    tensors = [t for layer in found.sums.layers.values() for t in layer.tensors().values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    # Half precision rounds pictures and projections, by 5e-4 and 4e-3; what the check prompts say
    # of one ridge and the next is closer together than that.
    assert values_differ(expected, found, ridge=0.1) < 0.05


def test_with_a_lora(plain: Run) -> None:
    """It is part of the model: the same as if its weights had been merged."""
    pipe = load()
    pipe.load_lora_weights(tiny.lora(pipe.unet))
    found = run(pipe)
    pipe.fuse_lora()
    merged = run(pipe)
    assert sums_differ(merged.sums, found.sums) < 1e-4
    # At one ridge: which is chosen may hang on what merging rounds.
    assert values_differ(merged, found, ridge=0.1) < 1e-3
    assert values_differ(plain, found) > 0.1


@pytest.mark.parametrize("error", [None, RuntimeError("no")])
def test_loaded_adapters_are_paused(
    plain: Run, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load()
    without = drawn(pipe)
    load_vmix(pipe, plain.adapter, {"light": -1}, adapter_name="one")
    load_vmix(pipe, plain.adapter, {"color": 1}, adapter_name="two", end=0.5)
    mixed = drawn(pipe)
    assert not torch.equal(mixed, without)
    with monkeypatch.context() as patch:
        if error:
            stop(pipe.scheduler, patch, 3, error)
            with pytest.raises(type(error)):
                run(pipe)
        else:
            assert sums_differ(plain.sums, run(pipe).sums) == 0
    assert list_vmix(pipe) == ["one", "two"]
    assert torch.equal(drawn(pipe), mixed)
    unload_vmix(pipe, "one")
    unload_vmix(pipe, "two")
    assert torch.equal(drawn(pipe), without)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_unet(plain: Run, in_place: bool) -> None:
    """It runs uncompiled while a fit lasts, so that nothing is compiled here."""
    pipe = load()
    unet = pipe.unet

    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    if in_place:
        unet.compile(backend=never)
    else:
        pipe.unet = torch.compile(unet, backend=never)
    before = traces(unet)
    found = run(pipe)
    assert sums_differ(plain.sums, found.sums) == 0
    assert traces(unet) == before


# --- other models ---


def sdxl() -> Any:
    """With two text encoders of random weights and the demo's tokenizer."""
    pipe = tiny.pipeline("xl")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=1457, hidden_size=tiny.CONTEXT // 2, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, bos_token_id=1455, eos_token_id=1456,
        projection_dim=tiny.CONTEXT,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    pipe.register_modules(
        text_encoder=transformers.CLIPTextModel(config).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
    )
    return pipe


def test_sdxl() -> None:
    pipe = sdxl()
    paths = {name for name, _ in pipe.unet.named_modules() if name.endswith(".attn2")}
    before = traces(pipe.unet)
    found = run(pipe, batch_size=2)
    assert traces(pipe.unet) == before
    adapter = found.adapter
    assert {layer.name for layer in adapter.layers} == set(found.sums.layers) == paths
    assert len(paths) == 11
    assert (adapter.base, adapter.context_tokens, adapter.context_dim) == ("other", 32, 32)
    assert adapter.made["guidance"] == 5.0  # SDXL's own
    assert sums_differ(found.sums, run(pipe).sums) < 1e-4

    without = drawn(pipe)
    load_vmix(pipe, adapter)
    assert torch.equal(drawn(pipe), without)
    set_vmix(pipe, {"light": 1})
    assert (drawn(pipe) - without).abs().max() > 1e-3 * without.abs().max()


SCHEDULERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "v-prediction": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}, {}),
    "epsilon": (
        diffusers.DDIMScheduler,
        {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        {},
    ),
    "Euler": (diffusers.EulerDiscreteScheduler, {"rescale_betas_zero_snr": False}, {}),
    "DPM-Solver": (
        diffusers.DPMSolverMultistepScheduler,
        {"rescale_betas_zero_snr": False},
        {"guidance_scale": 4.5},
    ),
    "second order": (diffusers.HeunDiscreteScheduler, {}, {}),
    "LCM without guidance": (
        diffusers.LCMScheduler,
        {"original_inference_steps": 50},
        {"guidance_scale": 0},
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    kind, changes, options = SCHEDULERS[name]
    pipe = load()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    found = run(pipe, prompts=USED[:2], **options)
    assert all(rows.isfinite().all() for rows in found.fitted.tensors.values())
    assert all(np.isfinite(side.explained) for side in found.fitted.sides.values())
    assert found.adapter.made["scheduler"] == kind.__name__
    assert found.adapter.made["guidance"] == options.get("guidance_scale", 7.5)
    # 64 queries of the first layer at each pass; a scheduler of second order makes one more. Early
    # passes count more.
    passes = 3 if name == "second order" else STEPS
    expected = 64 * sum((1 - i / passes) ** 2 for i in range(passes))
    layer = found.sums.layers["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert layer.queries.flatten().tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("base", ["sd15", "sdxl"])
def test_known_bases_are_recognized(base: Any) -> None:
    """By their layers' widths, as their files have them; without weights."""
    config = json.loads((CONFIGS / base / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    attns = {name: m for name, m in unet.named_modules() if name.endswith(".attn2")}
    fit = SimpleNamespace(attns=attns, unet=unet, tokens=77)
    found, names = fitting._Fit._layout(fit)  # type: ignore[arg-type]
    assert found == base
    assert names == {layer.name: layer.ldm_name for layer in unet_layers(base)}
    fit.tokens = 32
    found, names = fitting._Fit._layout(fit)  # type: ignore[arg-type]
    assert found == "other"
    assert names == {layer.name: layer.ldm_name for layer in unet_layers(base)}


# --- what it does to pictures ---

ASKED = ["a blue apple", "a red tree", "a green donut", "a yellow house", "a purple car"]


@pytest.fixture(scope="module")
def told(pipe: Any) -> Adapter:
    """As short as a fit may be: twelve prompts, four steps."""
    prompts = [
        "a red apple", "a {words} green tree", "a blue car", "a yellow star", "a pink donut",
        "a {words} purple fish", "a red house", "a green heart", "a blue hat",
        "a {words} yellow cup", "a pink leaf", "a purple ball",
    ]  # fmt: skip
    return fit_vmix(
        pipe, {"light": ("bright", "dark")}, prompts, 4, guidance_scale=3.0, batch_size=4
    )


def light_of(pipe: Any, prompts: Sequence[str] = ASKED) -> NDArray[np.float64]:
    images = drawn(pipe, prompts, num_inference_steps=8, output_type="np")
    return brightness(images.astype(np.float64))


def test_rows_act_as_words_do(pipe: Any, told: Adapter) -> None:
    """On prompts that no fit has seen. In most of them, no picture gets much brighter."""
    without = light_of(pipe)
    words = {
        word: light_of(pipe, [f"{prompt}, {word}" for prompt in ASKED]) - without
        for word in ("dark", "bright")
    }
    load_vmix(pipe, told)
    try:
        set_vmix(pipe, {"light": -1})
        dark = light_of(pipe) - without
        set_vmix(pipe, {"light": 1})
        bright = light_of(pipe) - without
    finally:
        unload_vmix(pipe)
    assert words["dark"].mean() < -0.1
    assert words["bright"].mean() > 0.05
    assert dark.max() < 0
    assert dark.mean() < words["dark"].mean() / 2
    assert bright.mean() > words["bright"].mean() / 2


def test_nothing_chosen_changes_nothing(pipe: Any, told: Adapter) -> None:
    """Weights are 0 unless chosen."""
    without = drawn(pipe)
    load_vmix(pipe, told)
    try:
        assert torch.equal(drawn(pipe), without)
        set_vmix(pipe, {"light": 0})
        assert torch.equal(drawn(pipe), without)
        set_vmix(pipe, {"light": 1})
        mixed = drawn(pipe)
        assert not torch.equal(mixed, without)
        set_vmix_scale(pipe, 0)
        assert torch.equal(drawn(pipe), without)
    finally:
        unload_vmix(pipe)


def test_all_labels_at_once_are_refused(pipe: Any, plain: Run) -> None:
    said = refused(load_vmix, pipe, plain.adapter, "all")
    assert "light, color" in said
    assert list_vmix(pipe) == []
    load_vmix(pipe, plain.adapter, "light")
    try:
        assert "light, color" in refused(set_vmix, pipe, "all")
    finally:
        unload_vmix(pipe)


# --- interrupted ---


def always_saves(patch: pytest.MonkeyPatch) -> None:
    """After every batch, and not only now and then."""
    patch.setattr(fitting, "time", SimpleNamespace(monotonic=lambda: 0.0))


def test_a_fit_goes_on_where_it_was(
    pipe: Any, plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sums"
    always_saves(monkeypatch)
    with monkeypatch.context() as patch:
        stop(pipe.scheduler, patch, 2 * STEPS + 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(pipe, sums=path)
    assert [one.name for one in tmp_path.iterdir()] == ["sums"]
    with monkeypatch.context() as patch:
        calls = stop(pipe.scheduler, patch, -1, KeyboardInterrupt())
        found = run(pipe, sums=path, batch_size=3)
    assert calls == [STEPS]  # two prompts of five were done, the others are one batch
    assert sums_differ(plain.sums, found.sums) < 1e-4
    assert values_differ(plain, found, ridge=0.1) < 1e-3
    # The sums stay until the adapter is saved.
    assert [one.name for one in tmp_path.iterdir()] == ["sums"]


def test_a_fit_goes_on_when_all_is_drawn(
    plain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it solves, and then a process of its own."""
    path = tmp_path / "sums"
    always_saves(monkeypatch)

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fitted_adapter", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_vmix(load(), LABELS, PROMPTS, STEPS, sums=path)
    assert path.exists()
    found = run(load(), sums=path)
    assert sums_differ(plain.sums, found.sums) == 0
    assert found.adapter.made["guidance"] == 7.5


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 3},
    "seed": {"seed": 1},
    "guidance_scale": {"guidance_scale": 2.0},
    "prompts": {"prompts": [*USED[:4], "a purple heart"]},
    "sides": {"labels": {"light": ("bright", "dark")}},
    "size": {"height": 32, "width": 32},
    "made": {"made": {"base": "another"}},
}


def test_sums_of_another_fit_are_refused(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sums"
    with monkeypatch.context() as patch:
        stop(pipe.scheduler, patch, STEPS + 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(pipe, sums=path)
    before = path.read_bytes()
    for key, options in OTHER_SETTINGS.items():
        said = refused(run, pipe, sums=path, **options)
        assert f"{path}: sums of another fit: {key}: expected " in said
        assert path.read_bytes() == before
    path.write_bytes(b"text")
    assert f"{path}: not a file of sums" in refused(run, pipe, sums=path)
    assert path.read_bytes() == b"text"


# --- errors ---


class Even:
    """Attends to all tokens alike."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Any:
        if encoder_hidden_states is None:
            return AttnProcessor2_0()(attn, hidden_states)
        q, k, v = (
            part(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        mixed = scaled_dot_product_attention(q, k, v, scale=0.0)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


class Beside:
    """That never calls the projections."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Any:
        if encoder_hidden_states is None:
            return AttnProcessor2_0()(attn, hidden_states)
        return attn.to_out[0](linear(hidden_states, attn.to_q.weight))


class HalfBeside:
    """That does not call all of them."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> Any:
        if encoder_hidden_states is not None:
            attn.to_k(encoder_hidden_states)
            attn.to_v(encoder_hidden_states)
        return Beside()(attn, hidden_states, encoder_hidden_states)


@pytest.mark.parametrize(
    ("processor", "word"),
    [(Even, "another output"), (Beside, "projections fused"), (HalfBeside, "to_q")],
)
def test_attention_of_another_kind(processor: Any, word: str) -> None:
    pipe = load()
    before = traces(pipe.unet)
    name = "up_blocks.0.attentions.1.transformer_blocks.0.attn2"
    others = pipe.unet.attn_processors
    pipe.unet.set_attn_processor({**others, f"{name}.processor": processor()})
    said = refused(run, pipe)
    assert name in said
    assert word in said
    assert traces(pipe.unet) == before


def without_cross_attention() -> Any:
    pipe = load()
    blocks = {
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None, "block_out_channels": (32, 64),
    }  # fmt: skip
    pipe.unet = tiny.unet(**blocks)
    return pipe


def changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def made() -> Any:
        pipe = load()
        change(pipe)
        return pipe

    return made


WRONG_PIPELINES: dict[str, tuple[Callable[[], Any], str]] = {
    "PAG": (lambda: tiny.pipeline("pag"), "StableDiffusionPAGPipeline.*from_pipe"),
    "img2img": (lambda: tiny.pipeline("img2img"), "StableDiffusionImg2ImgPipeline.*from_pipe"),
    "ControlNet": (lambda: tiny.pipeline("controlnet"), "ControlNetPipeline.*from_pipe"),
    "no pipeline": (lambda: nn.Linear(1, 1), "found Linear"),
    "IP-Adapter": (changed(lambda pipe: tiny.load_ip_adapter(pipe)), "unload_ip_adapter"),
    "fused": (changed(lambda pipe: pipe.fuse_qkv_projections()), "unfuse_qkv_projections"),
    "no cross-attention": (without_cross_attention, "cross-attention.*found none"),
    "no text encoder": (lambda: tiny.pipeline("sd"), "tokenizer"),
}


@pytest.mark.parametrize("name", WRONG_PIPELINES)
def test_pipelines_that_are_refused(name: str) -> None:
    made, complaint = WRONG_PIPELINES[name]
    assert re.search(complaint, refused(fit_vmix, made(), LABELS, USED, STEPS))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"rank {r!r}": ({"rank": r}, f"rank: .*1 to 32.*{r!r}")
        for r in (0, 33, 100, True, "x", 1.5)
    },
    **{f"steps {s!r}": ({"steps": s}, f"steps: .*{s!r}") for s in (0, -1, 2.5, "8")},
    "dtype": ({"dtype": "float64"}, "dtype: .*float16.*'float64'"),
    "batch size": ({"batch_size": 0}, "batch_size: .*0"),
    "height": ({"height": 60}, "height.*60"),
    "no labels": ({"labels": {}}, "labels: .*none"),
    "no file of labels": ({"labels": "nothing.toml"}, r"nothing\.toml: "),
    "identifier": ({"labels": {"light": ("bright", "[V]")}}, "'light'.*rare identifier"),
    "no file of prompts": ({"prompts": "nothing.txt"}, r"nothing\.txt: "),
    "one prompt": ({"prompts": ["a red apple"]}, "prompts: .*found 1"),
    "one prompt that fits": ({"prompts": ["a red apple", TOO_LONG]}, "30 tokens"),
    "words that fit nowhere": ({"labels": {"light": TOO_LONG}}, "'light'.*30 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_checked_before_anything_is_drawn(
    name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, complaint = WRONG[name]

    def draws(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn")

    monkeypatch.setattr(pipe.unet, "forward", draws)
    arguments = {"labels": LABELS, "prompts": USED, "steps": STEPS, **options}
    assert re.search(complaint, refused(fit_vmix, pipe, **arguments))


# --- the preview ---


def cell(page: Image.Image, row: int, column: int) -> Image.Image:
    x = preview._EDGE + column * (preview._CELL + preview._GAP)
    y = preview._EDGE + preview._LINE + row * (preview._LINE + preview._CELL + preview._GAP)
    y += preview._LINE
    return page.crop((x, y, x + preview._CELL, y + preview._CELL))


def is_blank(picture: Image.Image) -> bool:
    return picture.getextrema() == ((255, 255),) * 3


def cells(page: Image.Image) -> list[list[bool]]:
    """Whether there is a picture in each."""
    columns = round(
        (page.width - 2 * preview._EDGE + preview._GAP) / (preview._CELL + preview._GAP)
    )
    height = page.height - 2 * preview._EDGE - preview._LINE
    rows = round(height / (preview._LINE + preview._CELL + preview._GAP))
    return [[not is_blank(cell(page, row, i)) for i in range(columns)] for row in range(rows)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_preview_has_every_label_at_several_weights(
    pipe: Any, plain: Run, batch_size: int
) -> None:
    prompts = ["a red apple", "a blue car"] if batch_size == 2 else ["a red apple"]
    page = preview.draw_preview(
        pipe, plain.adapter, prompts, guidance_scale=3.0, steps=2, batch_size=batch_size, seed=5
    )
    two, one = [True] * 5, [False] * 2 + [True] * 3
    assert cells(page) == [two] * len(prompts) + [one] * len(prompts)
    assert list_vmix(pipe) == []

    def expected(selection: Mapping[str, float]) -> NDArray[np.float64]:
        load_vmix(pipe, plain.adapter, selection)
        random = torch.Generator().manual_seed(5)
        image = pipe(
            "a red apple", generator=random, num_inference_steps=2, guidance_scale=3.0
        ).images[0]
        unload_vmix(pipe)
        size = (preview._CELL,) * 2
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), float)

    places = [(0, -1.0, "light"), (2, 0.0, "light"), (4, 1.0, "light"), (3, 0.5, "color")]
    for column, weight, label in places:
        row = 0 if label == "light" else len(prompts)
        found = np.asarray(cell(page, row, column), float)
        # Batches of another size may round a pixel up or down.
        assert np.abs(found - expected({label: weight})).max() <= 2


def test_a_preview_of_labels_with_one_side(pipe: Any, plain: Run, monkeypatch: Any) -> None:
    adapter = fit_vmix(pipe, {"color": "dull"}, USED[:2], 1)
    page = preview.draw_preview(pipe, adapter, ["a red apple"], steps=1)
    assert cells(page) == [[True] * 3]
    stop(pipe.scheduler, monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        preview.draw_preview(pipe, adapter, ["a red apple"], steps=1)
    assert list_vmix(pipe) == []


# --- the command ---


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `vmix fit` in a folder with a list of prompts; returns what it prints."""
    (tmp_path / "prompts.txt").write_text("\n".join(USED[:4]))

    def ran(*arguments: object, base: object = MODEL, out: str = "out.safetensors") -> str:
        options = ["--base", base, "--out", tmp_path / out, "--prompts", tmp_path / "prompts.txt"]
        options += ["--steps", 1, "--device", "cpu"]
        main([*map(str, options), *map(str, arguments)])
        return capsys.readouterr().out

    return ran


def fails(command: Callable[..., str], *arguments: object, **options: Any) -> str:
    """The one sentence that the command ends with, and exit status 1."""
    with pytest.raises(SystemExit) as caught:
        command(*arguments, **options)
    said = caught.value.code
    assert isinstance(said, str)
    said = said.removeprefix("\n")
    assert said.startswith("vmix fit: ")
    assert "\n" not in said
    return said


TWO = ("--label", "light: bright | dark", "--label", "dull")


def test_the_command_writes_an_adapter(command: Any, tmp_path: Path) -> None:
    said = command(*TWO, "--preview", tmp_path / "grid.png", "--rank", 2)
    out = tmp_path / "out.safetensors"
    adapter, file = Adapter.open(out), open_rows(out)
    assert [(label.name, label.positive, label.negative) for label in file.labels] == [
        ("light", ("bright",), ("dark",)),
        ("dull", ("dull",), ("",)),
    ]
    assert len(adapter.row_sides) == 6
    unet = MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    made = {
        "base": "model", "base_sha256": hashlib.sha256(unet.read_bytes()).hexdigest(),
        "steps": 1, "rank": 2, "prompts": 4, "guidance": 7.5,
    }  # fmt: skip
    assert {key: file.made[key] for key in made} == made
    with Image.open(tmp_path / "grid.png") as page:
        # The fourth prompt is the one to check with.
        assert cells(page) == [[True] * 5, [False] * 2 + [True] * 3]
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.txt", "out.safetensors", "grid.png",
    }  # fmt: skip
    lines = said.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["light", "positive"], ["light", "negative"], ["dull", "positive"],
    ]  # fmt: skip
    explained = file.labels[0].effect["explained_positive"]
    assert f"{explained:.0%}" in lines[1]
    assert [line for line in lines if line.startswith("see ")] == [
        f"see {out}", f"see {tmp_path / 'grid.png'}",
    ]  # fmt: skip
    warned = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    assert warned == file.made.get("warnings", [])


def test_the_command_overwrites_when_told(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    with monkeypatch.context() as patch:
        patch.setattr("vmix.train.single_file.load_pipeline", None)  # nothing is loaded
        assert f"{out}: exists; --force" in fails(command, *TWO)
    assert out.read_bytes() == b"precious"
    command("--label", "dull", "--force")
    Adapter.open(out)


def test_bias_gives_all_tokens_the_same_values(command: Any, tmp_path: Path) -> None:
    command(*TWO, "--rank", "bias")
    adapter = Adapter.open(tmp_path / "out.safetensors")
    assert len(adapter.row_sides) == 3
    for selection in ({"light": 0.7}, {"light": -1, "dull": 0.5}):
        A = from_dlpack(adapter.coefficients(selection))
        assert torch.equal(A, A[:1].expand_as(A))
        assert A.any()


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("dull", FitLabel("dull", ("dull",))),
        ("calm: calm mood", FitLabel("calm", ("calm mood",))),
        ("light: bright | dark", FitLabel("light", ("bright",), ("dark",))),
        (" light :bright, lit|dark: black ", FitLabel("light", ("bright, lit",), ("dark: black",))),
    ],
)
def test_typed_labels(text: str, label: FitLabel) -> None:
    assert typed_label(text) == label


def test_an_interrupted_command_goes_on(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    always_saves(monkeypatch)
    out, sums = tmp_path / "out.safetensors", tmp_path / "out.safetensors.sums"
    with monkeypatch.context() as patch:
        stop(diffusers.DDIMScheduler, patch, 3, KeyboardInterrupt())
        with pytest.raises(SystemExit, match=r"^130$"):
            command(*TWO)
    assert "stopped. Run the same command again to resume" in capsys.readouterr().err
    assert sums.exists()
    assert not out.exists()

    other = fails(command, *TWO, "--seed", 1)
    assert f"{sums}: sums of another fit: seed" in other
    assert sums.exists()

    with monkeypatch.context() as patch:
        calls = stop(diffusers.DDIMScheduler, patch, -1, KeyboardInterrupt())
        said = command(*TWO)
    assert calls == [2]  # of four prompts, two were done
    assert f"resuming from {sums}" in said
    assert not sums.exists()
    interrupted = open_rows(out)
    command(*TWO, out="whole.safetensors")
    whole = open_rows(tmp_path / "whole.safetensors")
    for path, rows in whole.rows.items():
        assert torch.equal(interrupted.rows[path], rows)


def test_a_stopped_preview_leaves_the_adapter(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The same command would not go on: it would refuse to overwrite."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(preview, "draw_preview", stopped)
    with pytest.raises(SystemExit, match=r"^130$"):
        command("--label", "dull", "--preview", tmp_path / "grid.png")
    Adapter.open(tmp_path / "out.safetensors")
    assert "grid.png was drawn" in capsys.readouterr().err


def test_an_interrupt_in_a_finalizer_stops_too() -> None:
    """Python drops what is raised there."""
    finalized = []

    class Group:
        def __del__(self) -> None:
            finalized.append(True)
            signal.raise_signal(signal.SIGINT)

    def waits() -> None:
        with _interruptible():
            Group()
            assert finalized
            time.sleep(30)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        waits()
    assert signal.getsignal(signal.SIGINT) is before


ERRORS: dict[str, tuple[Sequence[object], dict[str, Any], str]] = {
    "no base": (TWO, {"base": "nothing.safetensors"}, r"--base: nothing\.safetensors: no such"),
    "no base of a folder": (TWO, {"base": Path(__file__).parent}, "--base.*python"),
    "pickle as base": (TWO, {"base": Path(__file__)}, r"--base: .*\.py"),
    "no prompts": ([*TWO, "--prompts", "nothing.txt"], {}, r"nothing\.txt: No such file"),
    "no folder": (TWO, {"out": "nothing/out.safetensors"}, "no folder .*nothing"),
    "no folder of a preview": ([*TWO, "--preview", "nothing/a.png"], {}, "no folder nothing"),
    "preview of another kind": ([*TWO, "--preview", "grid.xyz"], {}, r"grid\.xyz"),
    "no steps": ([*TWO, "--steps", 0], {}, "--steps: .*found 0"),
    "no batch": ([*TWO, "--batch-size", 0], {}, "--batch-size: .*found 0"),
    "no size": ([*TWO, "--size", 0], {}, "--size: .*found 0"),
    "size": ([*TWO, "--size", 60], {}, "60"),
    "rank": ([*TWO, "--rank", 99], {}, "rank: .*1 to 77.*99"),
    "device": ([*TWO, "--device", "nothing"], {}, "nothing"),
    "no words": (["--label", "light:"], {}, "'light': empty words"),
    "no opposite": (["--label", "light: bright |"], {}, "'light': empty words"),
    "reserved": (["--label", "all"], {}, "'all'.*reserved"),
    "twice": (["--label", "light: a", "--label", "light: b"], {}, "'light'.*twice"),
    "no labels": (["--labels", "nothing.toml"], {}, r"nothing\.toml: No such file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_command(
    name: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, options, complaint = ERRORS[name]
    monkeypatch.chdir(tmp_path)

    def draws(*_: Any, **__: Any) -> Any:
        raise AssertionError("drawn")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", draws)
    assert re.search(complaint, fails(command, *arguments, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rank", "x"],
        ["--rank", "-1"],
        [*TWO, "--labels", "default"],
        ["--dtype", "f8"],
        ["--more"],
    ],
)
def test_mistyped_options(arguments: list[str], command: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code == 2
    assert "usage: vmix fit" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vmix", "fit", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--base", "nothing", "--label", "dull"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["vmix fit: --base: nothing: no such file or folder"]


# --- what a pipeline is called with ---


def test_what_else_a_pipeline_is_called_with(pipe: Any, plain: Run) -> None:
    """It reaches the pipeline, whose pictures are others then."""
    for call in ({"negative_prompt": "dark"}, {"guidance_rescale": 0.7}):
        assert sums_differ(plain.sums, run(pipe, call=call).sums) > 1e-3, call
    for call in ({"prompt": "a cat"}, {"steps": 3}):
        with pytest.raises(VMixError, match=rf"^call: .*found '{next(iter(call))}'$"):
            run(pipe, call=call)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.scheduler.register_to_config(prediction_type="sample"),
        lambda pipe: pipe.unet.conv_in.weight.data.mul_(1.5),
        lambda pipe: pipe.text_encoder.to(torch.bfloat16),
        lambda pipe: pipe.load_lora_weights(tiny.lora(pipe.unet)),
    ],
    ids=["scheduler", "weights", "dtype", "lora"],
)
def test_sums_belong_to_one_model(change: Any, tmp_path: Path) -> None:
    pipe = load()
    path = tmp_path / "sums"
    fit_vmix(pipe, {"light": "bright"}, PROMPTS[:2], 1, sums=path)
    change(pipe)
    with pytest.raises(VMixError, match=r"sums of another fit: (scheduler|model): "):
        fit_vmix(pipe, {"light": "bright"}, PROMPTS[:2], 1, sums=path)
