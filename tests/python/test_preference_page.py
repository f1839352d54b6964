"""The page on which people choose between two rows, clicked through in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vmix.eval.pictures import save
from vmix.eval.preference import tally, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="skipped: no playwright")
COUNT = 6
COLOURS = {"base": "#ff0000", "VMix, λ = 1": "#0000ff"}
FOLDERS = {"base": "base", "VMix, λ = 1": "VMix-λ=1"}
SHOWN = """async (id) => {
    const image = document.getElementById(id);
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(1, 1, 1, 1).data].slice(0, 3);
}"""
TALLY = """() => [...document.querySelectorAll("#tally tr")].map(
    (row) => [...row.cells].map((cell) => cell.textContent),
)"""


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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red pictures in one row and blue ones in the other; prompts that try to be HTML."""
    folder = tmp_path_factory.mktemp("out")
    for row, colour in COLOURS.items():
        place = folder / "images" / FOLDERS[row]
        place.mkdir(parents=True)
        for index in range(COUNT):
            origin = {"prompt": f"<b>№{index}</b></script><img src=x>", "seed": 0, "size": None}
            image = Image.new("RGB", (64, 64), colour)
            image.putpixel((0, 0), (index, 0, 0))
            save(image, place / f"{index:06d}.png", origin)
    return write_page(folder, list(COLOURS), limit=300, seed=0)


class Visit:
    """A page in a profile of its own, or the same page again in that profile."""

    def __init__(self, context: Any, file: Path) -> None:
        self.page = context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.goto(file.as_uri())

    def sides(self) -> tuple[str, str]:
        """The rows of the left and the right picture, by their colour."""
        names = {(255, 0, 0): "base", (0, 0, 255): "VMix, λ = 1"}
        left, right = (tuple(self.page.evaluate(SHOWN, f"{s}-image")) for s in ("left", "right"))
        return names[left], names[right]

    def tally(self) -> dict[str, int]:
        return {name: int(count) for name, count in self.page.evaluate(TALLY)}

    def progress(self) -> str:
        text: str = self.page.locator("#progress").inner_text()
        return text

    def export(self, folder: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Export choices").click()
        path = folder / "choices.json"
        download.value.save_as(path)
        return path


def test_choosing(browser: Any, file: Path, tmp_path: Path) -> None:
    with browser.new_context(viewport={"width": 1200, "height": 850}) as context:
        visit = Visit(context, file)
        page = visit.page
        assert visit.progress() == f"1 of {COUNT}"
        wanted = dict.fromkeys((*COLOURS, "no difference"), 0)
        prompts, lefts = [], []

        def note(choice: str) -> None:
            wanted[choice] += 1

        # With the mouse, then with keys: left, right, neither.
        for act in ("left", "right", "tie", "ArrowLeft", "ArrowRight"):
            prompts.append(page.locator("#prompt").inner_text())
            left, right = visit.sides()
            lefts.append(left)
            assert {left, right} == set(COLOURS)
            note(
                {"l": left, "r": right, "t": "no difference"}[act.removeprefix("Arrow")[0].lower()]
            )
            if act.startswith("Arrow"):
                page.keyboard.press(act)
            else:
                page.click(f"#{act}")
            assert visit.tally() == wanted
        assert not page.locator("#tally").is_visible(), "who chooses must not see whose is whose"
        assert all(p.startswith("<b>№") and p.endswith("<img src=x>") for p in prompts)
        assert len(set(prompts)) == 5

        # One step back and the other choice.
        page.keyboard.press("Backspace")
        left, right = visit.sides()
        wanted[right] -= 1
        note(left)
        page.keyboard.press("ArrowLeft")
        assert visit.tally() == wanted

        # A reload, and another tab, lose nothing.
        again = visit.sides()
        page.reload()
        assert visit.progress() == f"6 of {COUNT}"
        assert visit.tally() == wanted
        assert visit.sides() == again
        assert Visit(context, file).tally() == wanted

        page.keyboard.press("ArrowDown")
        note("no difference")
        assert visit.progress() == f"{COUNT} of {COUNT} chosen: done, thank you"
        assert page.locator("#tally").is_visible()
        assert visit.tally() == wanted
        page.keyboard.press("ArrowLeft")  # nothing is left to choose
        assert visit.tally() == wanted

        exported = json.loads(visit.export(tmp_path).read_text(encoding="utf-8"))
        choices = exported["choices"]
        assert exported["rows"] == list(COLOURS)
        assert sorted(c["index"] for c in choices) == list(range(COUNT))
        counts = dict.fromkeys(wanted, 0)
        for choice in choices:
            counts["no difference" if choice["choice"] == "tie" else choice["choice"]] += 1
        assert counts == wanted
        by_prompt = {c["prompt"]: c["left"] for c in choices}
        assert [by_prompt[prompt] for prompt in prompts] == lefts
        assert f"| base | {wanted['base']} |" in tally([tmp_path / "choices.json"])

        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Start over").click()
        assert visit.progress() == f"1 of {COUNT}"
        assert sum(visit.tally().values()) == 0
        assert not visit.errors
        assert {url.partition(":")[0] for url in visit.requests} <= {"file", "data", "blob"}


def test_sides_and_order_are_each_visitors_own(browser: Any, file: Path) -> None:
    seen, orders = [], []
    for _ in range(4):
        with browser.new_context() as context:
            visit = Visit(context, file)
            order = []
            for _ in range(COUNT):
                order.append(visit.page.locator("#prompt").inner_text())
                seen.append(visit.sides()[0])
                visit.page.keyboard.press("ArrowDown")
            orders.append(tuple(order))
            assert len(set(order)) == COUNT
    assert len(set(orders)) > 1  # equal by chance in one of 720³ cases
    assert set(seen) == set(COLOURS)  # one side only by chance in one of 2²³ cases


def test_it_can_be_used_without_storage(browser: Any, file: Path, tmp_path: Path) -> None:
    with browser.new_context() as context:
        context.add_init_script(
            "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } })"
        )
        visit = Visit(context, file)
        assert visit.page.locator("#unsaved").is_visible()
        visit.page.keyboard.press("ArrowRight")
        assert sum(visit.tally().values()) == 1
        assert len(json.loads(visit.export(tmp_path).read_text())["choices"]) == 1
        assert not visit.errors


def test_both_pictures_fit_a_small_screen(browser: Any, file: Path) -> None:
    with browser.new_context(viewport={"width": 390, "height": 780}) as context:
        page = Visit(context, file).page
        boxes = [page.locator(f"#{side}-image").bounding_box() for side in ("left", "right")]
        assert boxes[0]["width"] == boxes[1]["width"] > 150
        assert boxes[1]["x"] + boxes[1]["width"] <= 390
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
