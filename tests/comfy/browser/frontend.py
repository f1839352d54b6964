"""ComfyUI's frontend in a real browser, with what the tests do in it."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from comfy_server import Server, open_url
from playwright.sync_api import Locator, Page, Route

PACK = "vmix-aesthetics"
# Written as `object` where the frontend needs no more than its JSON.
Workflow = dict[str, Any]

HELPERS = """
  const root = () => app.rootGraph ?? app.graph;
  window.tests = {
    nodes: () => [root(), ...root().subgraphs.values()].flatMap((graph) => [...graph.nodes]),
    find: (name) => tests.nodes().find((node) => [node.title, node.type].includes(name)),
    widget: (name, widget) => tests.find(name).widgets.find((w) => w.name === widget),
    // What ComfyUI does of itself after each click and key: a step of undo, if anything changed.
    changed: () => { app.canvas.emitBeforeChange(); app.canvas.emitAfterChange(); },
  };
"""


class Frontend:
    """One page, and the errors that came up in it from the pack's own JavaScript."""

    def __init__(self, page: Page, server: Server, settings: dict[str, Any]) -> None:
        self.page, self.server = page, server
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self._note(f"{error.stack}"))
        page.on(
            "console",
            lambda said: said.type == "error" and self._note(f"{said.text} {said.location}"),
        )
        page.route("**/*", self._only_what_is_tested)
        for name, value in settings.items():
            post(server, f"/settings/{name}", value)
        self.open()

    def open(self) -> None:
        """Loads the page; nothing of an earlier visit is opened again."""
        self.page.goto(self.server.url)
        self.page.wait_for_function(
            "() => Boolean(window.app?.extensionManager && (app.rootGraph ?? app.graph)"
            " && app.canvas?.graph && LiteGraph.registered_node_types.VMixAesthetics)",
            timeout=120_000,
        )
        self.page.evaluate(HELPERS)
        # Past what it starts with: the workflow of last time, or the default one.
        self.page.wait_for_timeout(1500)
        self.page.keyboard.press("Escape")

    def _note(self, text: str) -> None:
        if PACK in text:
            self.errors.append(text)

    def _only_what_is_tested(self, route: Route) -> None:
        """Neither the internet nor other extensions, which may wait for it."""
        url = route.request.url
        if not url.startswith(self.server.url):
            route.abort()
        elif "/extensions/" in url and not any(f"/{ours}/" in url for ours in ("core", PACK)):
            route.fulfill(body="", content_type="text/javascript")
        else:
            route.continue_()

    @property
    def version(self) -> tuple[int, ...]:
        text = self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
        return tuple(int(part) for part in text.split("-")[0].split("."))

    @property
    def modern(self) -> bool:
        """Nodes are elements, not drawn on the canvas: ComfyUI's "Nodes 2.0"."""
        return bool(
            self.page.evaluate("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')")
        )

    # Workflows

    def load(self, workflow: Workflow) -> None:
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.settle()

    def settle(self) -> None:
        """After what changes the graph without mouse or keyboard."""
        self.page.evaluate("tests.changed()")
        self.drawn()

    def serialized(self) -> Workflow:
        text: str = self.page.evaluate("JSON.stringify((app.rootGraph ?? app.graph).serialize())")
        workflow: Workflow = json.loads(text)
        return workflow

    def prompt(self) -> dict[str, Any]:
        """The API format."""
        text = self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)")
        prompt: dict[str, Any] = json.loads(text)
        return prompt

    def get(self, node: str, widget: str) -> Any:
        return self.page.evaluate("(names) => tests.widget(...names).value", [node, widget])

    def set(self, node: str, widget: str, value: Any) -> None:
        self.page.evaluate(
            """([node, name, value]) => {
                const widget = tests.widget(node, name);
                widget.value = value;
                widget.callback?.(value);
            }""",
            [node, widget, value],
        )
        self.settle()

    def run(self, timeout: float = 600) -> dict[str, Any]:
        """Ctrl+Enter; returns what the frontend got to show, by node, or the error as {"error"}."""
        self.page.evaluate(
            """() => {
                tests.done = undefined;
                const events = ["execution_success", "execution_error", "execution_interrupted"];
                const api = app.api ?? window.comfyAPI.api.api;
                for (const name of events) {
                    api.addEventListener(name, (event) => (tests.done ??= [name, event.detail]));
                }
            }"""
        )
        self.focus()
        self.page.keyboard.press("Control+Enter")
        self.page.wait_for_function("() => tests.done", timeout=timeout * 1000)
        name, detail = self.page.evaluate("tests.done")
        if name != "execution_success":
            return {"error": detail}
        self.page.wait_for_timeout(1000)  # The last picture is announced just before.
        outputs: dict[str, Any] = self.page.evaluate("JSON.parse(JSON.stringify(app.nodeOutputs))")
        return outputs

    def picture(self, outputs: dict[str, Any], title: str) -> bytes:
        assert "error" not in outputs, outputs
        node = self.page.evaluate("(title) => String(tests.find(title).id)", title)
        return self.server.image(outputs, node)

    def type_text(self, node: str, widget: str, text: str) -> None:
        """Into a text widget, as users do."""
        if self.modern:
            field = self.page.get_by_label(widget, exact=True).and_(self.page.locator("input"))
        else:
            self.page.mouse.click(
                *self.page.evaluate(
                    """([name, widget]) => {
                        const node = tests.find(name);
                        const { scale, offset } = app.canvas.ds;
                        const canvas = app.canvas.canvas.getBoundingClientRect();
                        const [x, y] = [200, tests.widget(name, widget).last_y + 10];
                        return [canvas.x + (node.pos[0] + x + offset[0]) * scale,
                                canvas.y + (node.pos[1] + y + offset[1]) * scale];
                    }""",
                    [node, widget],
                )
            )
            field = self.page.locator(".graphdialog .value")
        field.fill(text)
        field.press("Enter")

    def focus(self) -> None:
        """The keyboard goes to the canvas, as after a click on its background."""
        self.page.evaluate("document.activeElement?.blur()")

    # Sliders

    def panel(self, index: int = 0) -> Locator:
        return self.page.locator(".vmix-sliders").nth(index)

    def slider(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True).and_(self.page.locator("[type=range]"))

    def number(self, label: str) -> Locator:
        return self.page.get_by_label(label, exact=True).and_(self.page.locator("[type=number]"))

    def button(self, text: str, index: int = 0) -> Locator:
        return self.page.get_by_role("button", name=text, exact=True).nth(index)

    def weights(self) -> dict[str, float]:
        """What the numbers beside the sliders say."""
        pairs = self.page.locator(".vmix-number").evaluate_all(
            "(inputs) => inputs.map((input) => [input.ariaLabel, input.valueAsNumber])"
        )
        return dict(pairs)

    def warnings(self) -> list[str]:
        return self.page.locator(".vmix-warning .vmix-name").all_inner_texts()

    def messages(self) -> list[str]:
        return self.page.locator(".vmix-message").all_inner_texts()

    def selection(self) -> dict[str, float]:
        chosen: dict[str, float] = json.loads(self.get("VMix Aesthetics", "aesthetics"))
        return chosen

    def drag(self, label: str, weight: float) -> None:
        """With the mouse, from where the thumb is."""
        slider = self.slider(label)
        box = slider.bounding_box()
        assert box is not None, label
        thumb = box["height"]
        low, high = (float(slider.get_attribute(name) or 0) for name in ("min", "max"))
        at = [
            box["x"] + thumb / 2 + (value - low) / (high - low) * (box["width"] - thumb)
            for value in (float(slider.input_value()), weight)
        ]
        middle = box["y"] + box["height"] / 2
        self.page.mouse.move(at[0], middle)
        self.page.mouse.down()
        self.page.mouse.move(at[1], middle, steps=8)
        self.page.mouse.up()
        self.page.wait_for_timeout(300)

    def expect(self, look: Callable[[], Any], expected: Any, seconds: float = 60) -> None:
        """Looks until it is so: a busy machine takes its time."""
        end = time.monotonic() + seconds
        while (found := look()) != expected and time.monotonic() < end:
            self.page.wait_for_timeout(100)
        assert found == expected

    # Pictures

    def show(self, *names: str, margin: int = 30) -> dict[str, float]:
        """Moves the canvas so that these nodes, by default all, fit; returns where they are."""
        clip: dict[str, float] = self.page.evaluate(
            """([names, margin]) => {
                const boxes = [...app.canvas.graph.nodes]
                    .filter(({ title, type }) =>
                        !names.length || names.includes(title) || names.includes(type))
                    .map(({ pos: [x, y], size: [width, height] }) =>
                        [x, y - 32, x + width, y + height]);
                const left = Math.min(...boxes.map((box) => box[0])) - margin;
                const top = Math.min(...boxes.map((box) => box[1])) - margin;
                const width = Math.max(...boxes.map((box) => box[2])) + margin - left;
                const height = Math.max(...boxes.map((box) => box[3])) + margin - top;
                const canvas = app.canvas.canvas.getBoundingClientRect();
                const [x, y] = [Math.max(canvas.x, 70), Math.max(canvas.y, 100)]; // past the bars
                const [free, high] = [canvas.right - x - 10, canvas.bottom - y - 10];
                const scale = Math.min(1, free / width, high / height);
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset[0] = (x - canvas.x) / scale - left;
                app.canvas.ds.offset[1] = (y - canvas.y) / scale - top;
                app.canvas.setDirty(true, true);
                return { x, y, width: width * scale, height: height * scale };
            }""",
            [names, margin],
        )
        self.drawn()
        return clip

    def drawn(self) -> None:
        """The frames in which elements follow the canvas are over."""
        self.page.evaluate(
            """async () => {
                for (let i = 0; i < 10; i++) await new Promise(requestAnimationFrame);
            }"""
        )
        self.page.wait_for_timeout(500)

    def screenshot(self, name: str, *nodes: str) -> None:
        """Into the folder VMIX_SCREENSHOTS, if it is given."""
        folder = os.environ.get("VMIX_SCREENSHOTS")
        clip = self.show(*nodes)
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png", clip=clip)  # type: ignore[arg-type]


def post(server: Server, path: str, value: Any) -> None:
    request = urllib.request.Request(
        server.url + path, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )
    open_url(request, timeout=60).close()


def pages(browser: Any, size: tuple[int, int]) -> Iterator[Page]:
    """A fresh profile each."""
    with browser.new_context(viewport={"width": size[0], "height": size[1]}) as context:
        yield context.new_page()
