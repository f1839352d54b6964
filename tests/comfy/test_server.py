"""The nodes through a real ComfyUI's HTTP API, on its own executor."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import numpy as np
import pytest
from comfy_server import PromptError, Server
from safetensors import safe_open
from workflows import apply, changed, demo, node, pixels, sampled

pytestmark = pytest.mark.usefixtures("comfyui")
DEMO = host.ROOT / "comfy_nodes" / "demo"
NODES = {
    "VMixLoader": ["vmix_name"],
    "VMixAesthetics": ["vmix", "aesthetics"],
    "VMixApply": [
        "model", "vmix", "strength", "start_percent", "end_percent", "apply_to", "blocks",
        "aesthetics", "mask",
    ],
    "VMixSavePreset": ["vmix", "filename_prefix", "apply_to", "dtype", "aesthetics"],
    "VMixCompare": [
        "model", "vmix", "positive", "negative", "latent_image", "vae", "compare", "strengths",
        "strength", "apply_to", "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise",
        "aesthetics",
    ],
    "VMixDemoModel": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def server(comfyui: None, tmp_path_factory: Any) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    elsewhere = base / "elsewhere" / "vmix"
    elsewhere.mkdir(parents=True)
    paths = base / "extra_model_paths.yaml"
    paths.write_text(f"mine:\n  base_path: {base}/elsewhere\n  vmix: vmix\n")
    (elsewhere / "own.safetensors").symlink_to(DEMO / "adapter.safetensors")
    (elsewhere / "not-ours.txt").write_text("no model")
    started = Server(base, "--extra-model-paths-config", str(paths))
    started.put("vmix", DEMO / "adapter.safetensors", "sub/demo.safetensors")
    yield started
    started.stop()


def test_ids_and_order_of_widgets(server: Server) -> None:
    """Workflows store widgets by position: this list may be appended to and nothing else."""
    info = server.get("/object_info")
    for name, inputs in NODES.items():
        order = info[name]["input_order"]
        assert [*order.get("required", []), *order.get("optional", [])] == inputs
    assert info["VMixApply"]["output"] == ["MODEL"]
    assert info["VMixDemoModel"]["output"] == ["MODEL", "CLIP", "VAE", "VMIX"]


def test_folders(server: Server) -> None:
    """models/vmix with its sub-folders and extra_model_paths.yaml; .safetensors alone."""
    loader = server.get("/object_info/VMixLoader")["VMixLoader"]["input"]["required"]["vmix_name"]
    names = loader[1]["options"] if isinstance(loader[0], str) else loader[0]
    assert {"own.safetensors", "sub/demo.safetensors"} <= set(names)
    assert "not-ours.txt" not in names


def test_labels_for_the_sliders(server: Server) -> None:
    expected = server.get("/vmix/labels?demo=1")
    assert [label["name"] for label in expected["labels"]] == [
        "vibrant color", "natural lighting", "sharp focus", "balanced composition",
    ]  # fmt: skip
    with safe_open(DEMO / "adapter.safetensors", "np") as file:
        said = json.loads(file.metadata()["vmix.labels"])
    for found, label in zip(expected["labels"], said, strict=True):
        assert found["weight"] == label.get("default", 1)
        assert [found["low"], found["high"]] == label.get("range", [0, 1])
        assert (found["step"], found["neutral"]) == (label.get("step", 0.05), label.get("neutral"))
    found = server.get("/vmix/labels?vmix_name=sub/demo.safetensors")
    assert found["labels"] == expected["labels"]
    for name in ("../server.log", "/etc/passwd", "none.safetensors", ""):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.get(f"/vmix/labels?vmix_name={name}")


def test_the_demo(server: Server) -> None:
    with_vmix = pixels(server.image(server.run(demo(steps=25)), "image"))
    none = json.dumps(
        dict.fromkeys(
            ["vibrant color", "natural lighting", "sharp focus", "balanced composition"], 0
        )
    )
    negative = pixels(server.image(server.run(demo(steps=25, aesthetics=none)), "image"))
    # All labels negative is a darker picture than all positive.
    assert negative.mean() < with_vmix.mean() - 0.1
    red, green, blue = with_vmix.reshape(-1, 3)[with_vmix.reshape(-1, 3).min(1) < 0.5].mean(0)
    assert red > max(green, blue) + 0.2
    # λ = 0, and the model without the node, are the same picture to the last bit.
    zero = server.image(server.run(demo(strength=0.0, steps=25)), "image")
    without = changed(demo(steps=25), {"sample": {"model": ["demo", 0]}})
    assert np.array_equal(pixels(zero), pixels(server.image(server.run(without), "image")))


def test_selection(server: Server) -> None:
    """Left out is the file's default; the same selection in other words is the same picture."""
    assert_same = lambda a, b: np.testing.assert_array_equal(  # noqa: E731
        *(pixels(server.image(server.run(demo(aesthetics=text)), "image")) for text in (a, b))
    )
    assert_same("{}", '{"sharp focus": 1}')
    assert_same('{"sharp focus": 0.5}', '{ "vibrant color": 1.0, "sharp focus": 5e-1 }')
    with pytest.raises(PromptError) as error:
        server.run(demo(aesthetics='{"sharpness": 1}'))
    for known in ("'sharpness'", "'vibrant color'", "'sharp focus'", "'balanced composition'"):
        assert known in str(error.value)


def test_preset(server: Server) -> None:
    """Saved, listed, loaded: the same picture as the selection that it was saved from."""
    chosen = '{"sharp focus": 0.25}'
    prompt = demo(aesthetics=chosen)
    expected = pixels(server.image(server.run(prompt), "image"))
    saving = {name: prompt[name] for name in ("demo", "aesthetics")}
    saving["save"] = node(
        "VMixSavePreset", vmix=["demo", 3], aesthetics=["aesthetics", 0],
        filename_prefix="vmix/mine", apply_to="file", dtype="float32",
    )  # fmt: skip
    server.run(saving)
    loading = {
        "demo": prompt["demo"],
        "load": node("VMixLoader", vmix_name="mine_00001_.safetensors"),
        "apply": apply(["demo", 0], ["load", 0]),
    }
    loading = sampled(loading, ["apply", 0], ["demo", 1], ["demo", 2])
    found = pixels(server.image(server.run(loading), "image"))
    np.testing.assert_array_equal(found, expected)
    # A preset has one selection.
    loading["aesthetics"] = node("VMixAesthetics", vmix=["load", 0], aesthetics='{"sharp focus":1}')
    loading["apply"] = apply(["demo", 0], ["load", 0], aesthetics=["aesthetics", 0])
    with pytest.raises(PromptError, match="is a preset: it holds the values of one selection"):
        server.run(loading)


def test_compare(server: Server) -> None:
    prompt = demo()
    prompt["compare"] = node(
        "VMixCompare", model=["demo", 0], vmix=["demo", 3], positive=["positive", 0],
        negative=["negative", 0], latent_image=["latent", 0], vae=["demo", 2], compare="labels",
        strengths="0, 1", strength=1.0, apply_to="file", seed=1, steps=2, cfg=3.0,
        sampler_name="ddim", scheduler="sgm_uniform", denoise=1.0,
    )  # fmt: skip
    prompt["grid"] = node("PreviewImage", images=["compare", 0])
    outputs = server.run(prompt)
    labels = pixels(server.image(outputs, "grid"))
    single = pixels(server.image(outputs, "image"))
    assert labels.shape[1] == 7 * (64 + 8) + 8
    columns = [labels[-72:-8, 8 + i * 72 : 72 + i * 72] for i in range(7)]
    # The column of all labels is the very picture that KSampler makes, by a level at most: pixels
    # are rounded to 1/255, which float32 does not hold exactly.
    np.testing.assert_allclose(columns[1], single, rtol=0, atol=1.5 / 255)
    prompt["compare"]["inputs"] |= {"compare": "strengths", "strengths": "0, 1"}
    strengths = pixels(server.image(server.run(prompt), "grid"))
    assert strengths.shape[1] == 2 * 72 + 8
    np.testing.assert_array_equal(strengths[-72:-8, 8:72], columns[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"blocks": "in9=1"}, "names no block with cross-attention; this model's are: input1, "),
        ({"start_percent": 0.6, "end_percent": 0.4}, "expected start before end, found 0.6 and"),
    ],
)
def test_bad_inputs(server: Server, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        server.run(changed(demo(), {"apply": inputs}))


def test_wrong_base(server: Server, model_file: Any) -> None:
    """One sentence that names both, before anything is sampled."""
    name = server.put("checkpoints", model_file("sd15-mini-text"))
    prompt = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=name),
        "demo": node("VMixDemoModel"),
        "apply": apply(["checkpoint", 0], ["demo", 3]),
    }
    prompt = sampled(prompt, ["apply", 0], ["checkpoint", 1], ["checkpoint", 2])
    with pytest.raises(PromptError) as error:
        server.run(prompt)
    assert (
        "VMix demo adapter is for a U-Net of its own layout (7 cross-attention layers, context 96)"
        ", but the model is SD15 (16 layers, context 768)"
    ) in str(error.value)


def test_without_the_wheel(server: Server, tmp_path: Path) -> None:
    """A wheel that cannot be imported: everything loads, presets work, adapters say why not."""
    import vmix

    chosen = {"sharp focus": 0.25}
    expected = pixels(server.image(server.run(demo(aesthetics=json.dumps(chosen))), "image"))
    preset = tmp_path / "preset.safetensors"
    opened = vmix.open(DEMO / "adapter.safetensors")
    opened.values({**opened.weights(), **chosen}).save(preset)
    broken = tmp_path / "broken" / "vmix"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('wrong architecture')")
    bare = Server(tmp_path / "comfyui", environment={"PYTHONPATH": str(broken.parent)})
    try:
        assert set(NODES) <= set(bare.get("/object_info"))
        name = bare.put("vmix", preset)
        assert bare.get(f"/vmix/labels?vmix_name={name}")["kind"] == "preset"
        assert len(bare.get("/vmix/labels?demo=1")["labels"]) == 4
        prompt = {
            "demo": node("VMixDemoModel"),
            "load": node("VMixLoader", vmix_name=name),
            "apply": apply(["demo", 0], ["load", 0]),
        }
        prompt = sampled(prompt, ["apply", 0], ["demo", 1], ["demo", 2])
        found = pixels(bare.image(bare.run(prompt), "image"))
        np.testing.assert_array_equal(found, expected)
        with pytest.raises(PromptError, match="install the vmix-adapter wheel"):
            bare.run(demo())
    finally:
        bare.stop()


@pytest.mark.full
def test_full_size_sd15(model_file: Any, tmp_path: Path) -> None:
    """LoRA, ControlNet, IPAdapter_plus and VMix in one workflow, at the real size."""
    if not (host.IP_ADAPTER_PLUS / "__init__.py").exists():
        pytest.skip(f"no ComfyUI_IPAdapter_plus at {host.IP_ADAPTER_PLUS}")
    import bases
    import vmix
    from PIL import Image

    layers = {x.name: (x.ldm_name, x.inner_dim) for x in vmix.unet_layers("sd15")}
    bases.give_adapter(bases.Base("sd15", None, layers), tmp_path, known=True)
    server = Server(tmp_path / "comfyui", packs={"ipadapter": host.IP_ADAPTER_PLUS})
    try:
        Image.radial_gradient("L").convert("RGB").save(server.base / "input" / "hint.png")
        names = {
            kind: server.put(kind, model_file(file))
            for kind, file in (
                ("checkpoints", "sd15"),
                ("loras", "sd15-lora"),
                ("controlnet", "sd15-controlnet"),
                ("ipadapter", "sd15-ip-adapter"),
                ("clip_vision", "clip-vision"),
            )
        }
        names["vmix"] = server.put("vmix", tmp_path / "sd15-3.safetensors")
        prompt = {
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=names["checkpoints"]),
            "lora": node(
                "LoraLoader", model=["checkpoint", 0], clip=["checkpoint", 1],
                lora_name=names["loras"], strength_model=0.7, strength_clip=0.7,
            ),
            "vmix": node("VMixLoader", vmix_name=names["vmix"]),
            "aesthetics": node("VMixAesthetics", vmix=["vmix", 0], aesthetics='{"light": 1.5}'),
            "apply": apply(["lora", 0], ["vmix", 0], aesthetics=["aesthetics", 0]),
            "picture": node("LoadImage", image="hint.png"),
            "adapter": node("IPAdapterModelLoader", ipadapter_file=names["ipadapter"]),
            "vision": node("CLIPVisionLoader", clip_name=names["clip_vision"]),
            "ipadapter": node(
                "IPAdapterAdvanced", model=["apply", 0], ipadapter=["adapter", 0],
                image=["picture", 0], clip_vision=["vision", 0], weight=0.8,
                weight_type="linear", combine_embeds="concat", start_at=0.0, end_at=1.0,
                embeds_scaling="V only",
            ),
            "net": node("ControlNetLoader", control_net_name=names["controlnet"]),
            "control": node(
                "ControlNetApplyAdvanced", positive=["positive", 0], negative=["negative", 0],
                control_net=["net", 0], image=["picture", 0], strength=0.8, start_percent=0.0,
                end_percent=1.0, vae=["checkpoint", 2],
            ),
        }  # fmt: skip
        prompt = sampled(
            prompt, ["ipadapter", 0], ["lora", 1], ["checkpoint", 2], size=256, cfg=7.0,
            positive=["control", 0], negative=["control", 1],
        )  # fmt: skip
        compare_with_and_without(server, prompt)
    finally:
        server.stop()


@pytest.mark.full
def test_full_size_sdxl(model_file: Any, tmp_path: Path) -> None:
    import bases
    import vmix

    layers = {x.name: (x.ldm_name, x.inner_dim) for x in vmix.unet_layers("sdxl")}
    bases.give_adapter(bases.Base("sdxl", None, layers), tmp_path, known=True)
    server = Server(tmp_path / "comfyui")
    try:
        checkpoint = server.put("checkpoints", model_file("sdxl"))
        adapter = server.put("vmix", tmp_path / "sdxl-3.safetensors")
        prompt = {
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
            "vmix": node("VMixLoader", vmix_name=adapter),
            "apply": apply(["checkpoint", 0], ["vmix", 0]),
        }
        prompt = sampled(
            prompt, ["apply", 0], ["checkpoint", 1], ["checkpoint", 2], size=256, cfg=7.0
        )
        compare_with_and_without(server, prompt)
    finally:
        server.stop()


def compare_with_and_without(server: Server, prompt: Any) -> None:
    mixed = pixels(server.image(server.run(prompt), "image"))
    assert mixed.std() > 0.02
    zero = pixels(server.image(server.run(changed(prompt, {"apply": {"strength": 0.0}})), "image"))
    assert np.abs(mixed - zero).mean() > 0.01
    # Coming back gives the first picture again.
    np.testing.assert_array_equal(pixels(server.image(server.run(prompt), "image")), mixed)
