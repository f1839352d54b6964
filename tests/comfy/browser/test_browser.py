"""The node pack in a real ComfyUI with a real browser: sliders and example workflows.

Like every test of the full tier these run only when asked (`make test-comfy`), and need

- a ComfyUI in COMFYUI_PATH or ~/comfy/ComfyUI, started with COMFYUI_PYTHON or this Python, and with
  the options in COMFYUI_OPTIONS, such as `--front-end-root` of another frontend;
- Playwright's Python package, and Chromium on the PATH.

Screenshots of what is seen go to VMIX_SCREENSHOTS, if that names a folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import host
import numpy as np
import pytest
from comfy_server import Server
from PIL import Image
from workflows import pixels

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

from frontend import Frontend, pages, post  # noqa: E402

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("comfyui")]

PACK = host.ROOT / "comfy_nodes"
DEMO = PACK / "demo" / "adapter.safetensors"
EXAMPLES = sorted((PACK / "example_workflows").glob("*.json"))
LABELS = ["vibrant color", "natural lighting", "sharp focus", "balanced composition"]
AESTHETICS = "VMix Aesthetics"  # the node, by its title
OTHER = {"film grain": 1.0, "soft light": 0.5}  # the first labels of another file, its defaults

# The files that the examples name → a random one of the kind, from checkpoints.py.
MODELS = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": "sd15-mini-text",
    "checkpoints/sd_xl_base_1.0.safetensors": "sdxl-mini-text",
    "loras/my-lora.safetensors": "sd15-mini-lora",
    "controlnet/control_v11p_sd15_canny_fp16.safetensors": "sd15-mini-controlnet",
    "ipadapter/ip-adapter_sd15.safetensors": "sd15-mini-ip-adapter",
    "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": "clip-vision",
}
ADAPTERS = {"my-adapter.safetensors": "sd15", "my-sdxl-adapter.safetensors": "sdxl"}


@pytest.fixture(scope="module")
def server(comfyui: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    packs = {}
    if (host.IP_ADAPTER_PLUS / "__init__.py").exists():
        packs["ipadapter"] = host.IP_ADAPTER_PLUS
    started = Server(base, *shlex.split(os.environ.get("COMFYUI_OPTIONS", "")), packs=packs)
    make_files(started, base)
    yield started
    started.stop()


def make_files(server: Server, folder: Path) -> None:
    """An adapter with other labels, and a preset; both after the demo's."""
    import vmix

    adapter = vmix.open(DEMO)
    adapter.values({"sharp focus": 1.5}, apply_to="both").save(folder / "one.safetensors")
    metadata = dict(adapter.metadata)
    labels, rows = (json.loads(metadata[f"vmix.{key}"]) for key in ("labels", "rows"))
    for label, (name, weight) in zip(labels, OTHER.items(), strict=False):
        for row in rows:
            if row.get("label") == label["name"]:
                row["label"] = name
        label |= {"name": name, "default": weight, "display_names": {}}
    labels[0] |= {"range": [-1, 3], "step": 0.25, "neutral": 0.5}
    metadata |= {"vmix.labels": json.dumps(labels), "vmix.rows": json.dumps(rows)}
    other = folder / "two.safetensors"
    vmix.Adapter.from_tensors(adapter.tensors(), metadata).save(other)
    server.put("vmix", DEMO, "demo.safetensors")
    server.put("vmix", folder / "one.safetensors", "preset.safetensors")
    server.put("vmix", other, "sub/other.safetensors")
    Image.radial_gradient("L").convert("RGB").save(server.base / "input" / "example.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"skipped: none of {', '.join(names)} on the PATH")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(server: Server, browser: Any) -> Iterator[Callable[..., Frontend]]:
    """A function that opens the frontend; at the end, our JavaScript must have thrown nothing."""
    opened = []
    contexts = pages(browser, (1900, 1000))

    def open_page(**settings: Any) -> Frontend:
        defaults = {
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "Comfy.Locale": "en",
            "Comfy.ColorPalette": "dark",
            "Comfy.VueNodes.Enabled": False,
        }
        given = {name.replace("_", "."): value for name, value in settings.items()}
        opened.append(Frontend(next(contexts), server, {**defaults, **given}))
        return opened[-1]

    yield open_page
    errors = [error for page in opened for error in page.errors]
    contexts.close()
    assert not errors, errors


@pytest.fixture
def ui(open_page: Callable[..., Frontend]) -> Frontend:
    return open_page()


@pytest.fixture(params=["classic", "nodes 2.0"])
def any_ui(request: pytest.FixtureRequest, open_page: Callable[..., Frontend]) -> Frontend:
    """Both ways of drawing nodes: on the canvas, and as elements."""
    modern = request.param == "nodes 2.0"
    ui = open_page(Comfy_VueNodes_Enabled=modern)
    if modern and ui.version < (1, 36):
        pytest.skip(f"skipped: nodes 2.0 are an experiment in frontend {ui.version}")
    return ui


def example(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((PACK / "example_workflows" / name).read_text("utf-8"))
    return workflow


def shown(ui: Frontend, outputs: dict[str, Any], title: str = "With VMix") -> Any:
    """The pixels of a preview, which must be a picture."""
    found = pixels(ui.picture(outputs, title))
    assert found.std() > 0.02
    return found


def test_slider_to_picture(any_ui: Frontend) -> None:
    """Move, run, save, reload, export: one value, and one picture to the last bit."""
    ui = any_ui
    ui.load(example("vmix_demo.json"))
    ui.show()
    ui.expect(ui.weights, dict.fromkeys(LABELS, 1.0))
    outputs = ui.run()
    before = shown(ui, outputs)
    without = shown(ui, outputs, "Without VMix")
    assert np.abs(before - without).mean() > 0.005
    ui.drag("natural lighting", 0)
    ui.expect(ui.selection, {**dict.fromkeys(LABELS, 1.0), "natural lighting": 0})
    outputs = ui.run()
    after = shown(ui, outputs)
    assert np.abs(after - before).mean() > 0.005
    np.testing.assert_array_equal(shown(ui, outputs, "Without VMix"), without)
    ui.screenshot("demo-nodes2" if ui.modern else "demo")
    if ui.modern:
        field = ui.page.get_by_label("aesthetics", exact=True).and_(ui.page.locator("input"))
        ui.expect(lambda: json.loads(field.input_value()), ui.selection())

    saved = ui.serialized()
    prompt = ui.prompt()
    for kind, entry in (("workflow", saved["nodes"]), ("API", list(prompt.values()))):
        (node,) = [n for n in entry if n.get("type", n.get("class_type")) == "VMixAesthetics"]
        values = node.get("widgets_values") or [
            value for value in node["inputs"].values() if isinstance(value, str)
        ]
        assert [json.loads(value) for value in values] == [ui.selection()], kind

    ui.open()
    ui.load(saved)
    ui.expect(ui.weights, {**dict.fromkeys(LABELS, 1.0), "natural lighting": 0})
    # Without what the server still holds from the last run; a new picture has a new name.
    post(ui.server, "/free", {"unload_models": True, "free_memory": True})
    ui.page.wait_for_timeout(3000)
    again = ui.server.run(prompt)
    drawn = [node for node in again if "images" in again[node]]
    assert drawn
    assert all(again[node]["images"] != outputs[node]["images"] for node in drawn)
    np.testing.assert_array_equal(shown(ui, again), after)


def test_buttons_numbers_keys(ui: Frontend) -> None:
    ui.load(example("vmix_demo.json"))
    ui.show(AESTHETICS)
    ui.number("sharp focus").fill("1.333")
    ui.number("sharp focus").press("Enter")
    ui.expect(ui.selection, {**dict.fromkeys(LABELS, 1.0), "sharp focus": 1.333})
    ui.slider("vibrant color").focus()
    ui.page.keyboard.press("ArrowLeft")
    assert ui.selection()["vibrant color"] == 0.95
    ui.button("only", 1).click()
    ui.expect(ui.selection, {**dict.fromkeys(LABELS, 0), "natural lighting": 1})
    ui.button("all").click()
    ui.expect(ui.selection, dict.fromkeys(LABELS, 1))
    ui.button("none").click()
    ui.expect(ui.selection, dict.fromkeys(LABELS, 0))
    ui.button("defaults").click()
    ui.expect(ui.selection, {})
    ui.expect(ui.weights, dict.fromkeys(LABELS, 1.0))
    # Beyond the sliders' range.
    ui.number("sharp focus").fill("-1")
    ui.number("sharp focus").press("Enter")
    assert ui.selection()["sharp focus"] == -1


def test_typing_moves_the_sliders(any_ui: Frontend) -> None:
    ui = any_ui
    ui.load(example("vmix_demo.json"))
    ui.show(AESTHETICS)
    ui.type_text(AESTHETICS, "aesthetics", '{"sharp focus": 0.4}')
    ui.expect(ui.selection, {"sharp focus": 0.4})
    ui.expect(ui.weights, {**dict.fromkeys(LABELS, 1.0), "sharp focus": 0.4})
    ui.set(AESTHETICS, "aesthetics", "{sharp")
    ui.expect(lambda: "JSON" in "".join(ui.messages()), True)
    assert ui.slider("sharp focus").is_disabled()
    assert ui.get(AESTHETICS, "aesthetics") == "{sharp"


def test_unknown_label(ui: Frontend) -> None:
    """Kept, warned of, refused by name, and removed only when asked."""
    ui.load(example("vmix_demo.json"))
    ui.show(AESTHETICS)
    ui.set(AESTHETICS, "aesthetics", '{"sharpness": 1.5, "sharp focus": 0.5}')
    ui.expect(ui.warnings, ['⚠ "sharpness": 1.5 – no label of this file'])
    ui.drag("vibrant color", 0.5)
    assert ui.selection()["sharpness"] == 1.5
    ui.screenshot("unknown-label", AESTHETICS)
    error = ui.run()["error"]
    assert error["exception_message"].strip() == (
        f"unknown label 'sharpness'; the file's labels are: {', '.join(map(repr, LABELS))}"
    )
    ui.page.keyboard.press("Escape")
    ui.button("remove").click()
    assert "sharpness" not in ui.selection()
    ui.expect(ui.warnings, [])
    shown(ui, ui.run())


def test_undo_copy_refresh(any_ui: Frontend) -> None:
    ui = any_ui
    ui.load(example("vmix_demo.json"))
    ui.show(AESTHETICS)
    moved = {**dict.fromkeys(LABELS, 1.0), "sharp focus": 0.25}
    ui.drag("sharp focus", 0.25)
    ui.expect(ui.weights, moved)
    for keys, expected in (("z", dict.fromkeys(LABELS, 1.0)), ("y", moved)):
        ui.focus()
        ui.page.keyboard.press(f"Control+{keys}")
        ui.expect(ui.weights, expected)
    ui.drag("vibrant color", 0)  # of the node that undo has made
    moved["vibrant color"] = 0
    ui.expect(ui.selection, moved)
    ui.page.keyboard.press("r")
    ui.page.wait_for_timeout(3000)
    ui.expect(ui.weights, moved)

    ui.page.evaluate(
        """() => {
            app.canvas.selectNode(tests.find("VMix Aesthetics"));
            app.canvas.copyToClipboard();
            app.canvas.pasteFromClipboard({ connectInputs: true });
        }"""
    )
    ui.settle()
    texts = ui.page.evaluate(
        "tests.nodes().filter((n) => n.type === 'VMixAesthetics').map((n) => n.widgets[0].value)"
    )
    assert [json.loads(text) for text in texts] == [moved, moved]


def test_sub_graph(ui: Frontend) -> None:
    """Sliders work inside, with the file outside, and with their text on the sub-graph's node."""
    ui.load(example("vmix_demo.json"))
    ui.show(AESTHETICS)
    ui.drag("natural lighting", 0)
    expected = shown(ui, ui.run())
    ui.page.evaluate(
        """() => {
            const nodes = ["VMix Aesthetics", "Apply VMix"].map(tests.find);
            app.canvas.selectItems(nodes);
            app.canvas.graph.convertToSubgraph(new Set(nodes));
        }"""
    )
    ui.settle()
    np.testing.assert_array_equal(shown(ui, ui.run()), expected)
    enter = """() => {
        const use = tests.nodes().find((node) => node.subgraph);
        app.canvas.openSubgraph(use.subgraph, use);
    }"""
    ui.page.evaluate(enter)
    ui.show(AESTHETICS)
    ui.expect(lambda: ui.weights()["natural lighting"], 0)
    ui.drag("natural lighting", 0.5)
    ui.screenshot("sub-graph")
    changed = shown(ui, ui.run())
    assert np.abs(changed - expected).mean() > 0.005
    saved = ui.serialized()
    ui.load(saved)
    ui.page.evaluate(enter)
    ui.show(AESTHETICS)
    ui.expect(lambda: ui.weights()["natural lighting"], 0.5)

    # The text as a widget of the sub-graph's node, as its menu has it.
    ui.page.evaluate(
        """() => {
            const node = tests.find("VMix Aesthetics");
            const slot = node.inputs.find((input) => input.widget?.name === "aesthetics");
            node.graph.addInput("aesthetics", "STRING").connect(slot, node);
        }"""
    )
    ui.settle()
    ui.drag("natural lighting", 0)
    np.testing.assert_array_equal(shown(ui, ui.run()), expected)
    outside = ui.page.evaluate(
        """() => tests.nodes().find((node) => node.subgraph)
            .widgets.find((widget) => widget.name === "aesthetics").value"""
    )
    assert json.loads(outside)["natural lighting"] == 0


LOADER = {
    "nodes": [
        {"id": 1, "type": "VMixLoader", "pos": [0, 0], "widgets_values": ["demo.safetensors"],
         "outputs": [{"name": "vmix", "type": "VMIX", "links": [1]}]},
        {"id": 2, "type": "Reroute", "pos": [400, 0],
         "inputs": [{"name": "", "type": "*", "link": 1}],
         "outputs": [{"name": "VMIX", "type": "VMIX", "links": [2]}]},
        {"id": 3, "type": "VMixAesthetics", "pos": [600, 0], "widgets_values": ["{}"],
         "inputs": [{"name": "vmix", "type": "VMIX", "link": 2}]},
    ],
    "links": [[1, 1, 0, 2, 0, "*"], [2, 2, 0, 3, 0, "VMIX"]],
    "version": 0.4,
}  # fmt: skip


def test_files(ui: Frontend) -> None:
    """The sliders are those of the file, whichever it is and however it gets there."""
    ui.load(LOADER)
    ui.show()
    ui.expect(ui.weights, dict.fromkeys(LABELS, 1.0))
    ui.set("VMixAesthetics", "aesthetics", '{"sharp focus": 0.2, "vibrant color": 2}')
    ui.set("VMixLoader", "vmix_name", "sub/other.safetensors")
    ui.expect(ui.weights, {**OTHER, "sharp focus": 0.2, "balanced composition": 1.0})
    ui.expect(ui.warnings, ['⚠ "vibrant color": 2 – no label of this file'])
    slider = ui.slider("film grain")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["-1", "3", "0.25"]
    ui.button("none").click()
    none = {"film grain": 0.5, "soft light": 0, "sharp focus": 0, "balanced composition": 0}
    ui.expect(ui.weights, none)
    ui.button("only", 1).click()
    ui.expect(ui.weights, {**none, "soft light": 1})

    ui.set("VMixAesthetics", "aesthetics", '{"sharp focus": 0.2, "vibrant color": 2}')
    ui.set("VMixLoader", "vmix_name", "preset.safetensors")
    ui.expect(ui.weights, {**dict.fromkeys(LABELS, 0.0), "sharp focus": 1.5})
    assert ui.slider("sharp focus").is_disabled()
    ui.expect(lambda: len(ui.warnings()), 2)
    ui.screenshot("preset")

    ui.set("VMixLoader", "vmix_name", "gone.safetensors")
    ui.expect(ui.messages, ["no file 'gone.safetensors' in models/vmix"])
    ui.screenshot("missing-file")
    # The file is put there, and node definitions are refreshed.
    ui.server.put("vmix", DEMO, "gone.safetensors")
    ui.focus()
    ui.page.keyboard.press("r")
    ui.expect(lambda: list(ui.weights()), LABELS)

    ui.page.evaluate("() => { tests.find('VMixLoader').mode = 2; }")
    ui.settle()
    ui.expect(ui.messages, ["Connect a VMix file to see its labels."])


def test_languages_and_palettes(open_page: Callable[..., Frontend]) -> None:
    ui = open_page(Comfy_Locale="zh", Comfy_ColorPalette="light")
    ui.load(example("vmix_demo.json"))
    ui.expect(lambda: list(ui.weights()), ["鲜艳色彩", "自然光照", "清晰对焦", "均衡构图"])
    assert ui.slider("清晰对焦").get_attribute("title") == "focus · sharp focus"
    ui.screenshot("light-zh")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, ui: Frontend, model_file: Any, tmp_path: Path) -> None:
    """Loads without a complaint, and runs, if smaller, with random files under its own names."""
    workflow = json.loads(path.read_text("utf-8"))
    types = [node["type"] for node in workflow["nodes"]]
    if "IPAdapterAdvanced" in types and not (host.IP_ADAPTER_PLUS / "__init__.py").exists():
        pytest.skip(f"skipped: no ComfyUI_IPAdapter_plus at {host.IP_ADAPTER_PLUS}")
    assert "MarkdownNote" in types
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= 60_000
    with Image.open(thumbnail) as image:
        image.verify()

    named = [value for node in workflow["nodes"] for value in node.get("widgets_values", [])]
    for place, model in MODELS.items():
        kind, name = place.split("/")
        if name in named:
            ui.server.put(kind, model_file(model), name)
    for name, kind in ADAPTERS.items():
        if name in named:
            ui.server.put("vmix", mini_adapter(kind, tmp_path), name)
    ui.page.keyboard.press("r")
    ui.page.wait_for_timeout(3000)
    ui.load(workflow)
    ui.screenshot(path.stem)
    found = ui.serialized()["nodes"]
    assert sorted(node["type"] for node in found) == sorted(types)
    assert [node["type"] for node in found if node.get("has_errors")] == []
    assert (
        ui.page.evaluate("tests.nodes().filter((n) => n.constructor.name === 'LGraphNode')") == []
    )
    assert ui.page.locator("[role=dialog]:visible").count() == 0
    if "VMixAesthetics" in types:
        ui.expect(lambda: len(ui.weights()) >= 3, True)

    ui.page.evaluate(
        """() => {
            for (const node of tests.nodes()) for (const widget of node.widgets ?? []) {
                if (["width", "height"].includes(widget.name)) widget.value /= 8;
                if (widget.name === "steps") widget.value = 2;
            }
        }"""
        if "VMixDemoModel" not in types
        else "() => {}"
    )
    outputs = ui.run()
    assert "error" not in outputs, outputs
    pictures = [entry for entry in outputs.values() if entry and entry.get("images")]
    expected = sum(kind in ("PreviewImage", "SaveImage", "LoadImage") for kind in types)
    assert sum(kind in ("PreviewImage", "SaveImage") for kind in types) <= len(pictures) <= expected
    for entry in pictures:
        assert pixels(ui.server.image({"node": entry}, "node")).std() > 0.02


def mini_adapter(kind: str, folder: Path) -> Path:
    """A random adapter for the random base."""
    import bases
    import vmix

    layers = {layer.name: (layer.ldm_name, 320) for layer in vmix.unet_layers(kind)}
    bases.give_adapter(bases.Base(kind, None, layers), folder)
    return folder / f"{kind}-3.safetensors"
