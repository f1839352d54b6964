"""The demo and its report: the parts that are not pictures, and a short run of the whole."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vmix import read_label_list

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
sys.path[:0] = [str(DEMO), str(DEMO / "base")]

demo: Any = import_module("demo")
report: Any = import_module("report")
cold_look: Any = import_module("cold_look")


def test_labels_are_the_ones_that_are_drawn() -> None:
    from transforms import LABELS

    labels = read_label_list(DEMO / "labels.toml")
    assert [label.name for label in labels] == list(LABELS)
    assert len({label.dimension for label in labels}) == len(labels)


def test_report_uses_prompts_and_seeds_that_the_demo_does_not() -> None:
    assert not set(report.PROMPTS) & set(demo.PROMPTS)
    seeds = [seed for _, seed in report.PAIRS]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & set(demo.SEEDS)
    for prompt in (*report.PROMPTS, *demo.PROMPTS):
        assert demo.colour_of(prompt)


def test_selections() -> None:
    adapter = SimpleNamespace(labels=[SimpleNamespace(name="a"), SimpleNamespace(name="b")])
    assert demo.only(adapter, "b") == {"a": 0, "b": 1}
    assert demo.only(adapter, None) == {"a": 0, "b": 0}
    assert demo.but(adapter, "b") == {"a": 1, "b": 0}
    assert demo.every(adapter) == {"a": 1, "b": 1}


def test_sides_of_a_label_by_way() -> None:
    ways = report.ways
    labels = [SimpleNamespace(name="a", neutral=0.5), SimpleNamespace(name="b", neutral=None)]
    adapter = SimpleNamespace(labels=labels)
    assert ways.sides(ways.TRAINED, adapter, "b") == ({"a": 1, "b": 1}, {"a": 1, "b": 0})
    assert ways.sides(ways.PAIRS, adapter, "b") == ({"a": 0.5, "b": 1}, {"a": 0.5, "b": 0})
    assert ways.sides(ways.PAIRS, adapter, "a") == ({"a": 1, "b": 0}, {"a": 0, "b": 0})


def test_words_are_those_of_captions() -> None:
    from transforms import LOOK_WORDS

    words = report.ways.WORDS
    assert list(words) == list(LOOK_WORDS)
    for name, pair in words.items():
        assert all(pair[end] in part for end, part in zip(pair, LOOK_WORDS[name], strict=True))


def test_fidelity() -> None:
    images = np.ones((2, 16, 16, 3))
    images[:, 4:10, 4:10] = (0.8, 0.1, 0.1)
    pairs = [("a red car", 0), ("a blue car", 0)]
    assert demo.fidelity(images, pairs).tolist() == [True, False]


def test_grid_puts_every_picture_under_its_header() -> None:
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    columns = [
        (name, "", np.broadcast_to(np.array(c), (2, 8, 8, 3)))
        for name, c in zip("abc", colours, strict=False)
    ]
    image = demo.draw_grid(columns, ["first", "second"], [("x", 1), ("y", 2)])
    step, half = demo.CELL + demo.GAP, demo.CELL // 2
    for column, left in enumerate((0, step + demo.GAP, 2 * step + demo.GAP)):
        for row in range(2):
            place = (demo.LEFT + left + half, demo.TOP + row * step + half)
            assert image.getpixel(place) == tuple(int(255 * c) for c in colours[column])
    assert image.getpixel((image.width - 2, image.height - 2)) == (255, 255, 255)


def test_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    found = report.interval(values)
    assert found["mean"] == pytest.approx(values.mean())
    error = 1.96 * values.std() / 20
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.02)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.02)
    assert report.interval(np.array([1.0, np.nan, 3.0]))["mean"] == 2
    assert report.interval(np.array([np.nan]))["n"] == 0


def test_effects_are_paired() -> None:
    noise = np.random.default_rng(2).normal(0, 10, 50)
    before = dict.fromkeys(report.COLUMNS, noise)
    after = dict.fromkeys(report.COLUMNS, noise + 0.5)
    found = report.effects(after, before)["brightness"]
    assert found["low"] == pytest.approx(0.5)
    assert found["high"] == pytest.approx(0.5)


def test_comparing_maps() -> None:
    random = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, n, 5, generator=random).softmax(-1) for n in (4, 16)]
    correlation, variation = report.compare_maps(maps, maps)
    np.testing.assert_allclose(correlation, 1, rtol=1e-5)  # sums in float32
    assert not variation.any()
    first, second = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    first[..., 0], second[..., 1] = 1, 1  # all attention on another token
    correlation, variation = report.compare_maps([first], [second])
    assert variation == pytest.approx(1)
    assert correlation < 0


def test_recording_does_not_change_attention() -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    layer = Attention(32, cross_attention_dim=16, heads=4, dim_head=8)
    x, context = torch.randn(4, 9, 32), torch.randn(4, 5, 16)
    layer.set_processor(AttnProcessor2_0())
    expected = layer(x, context)
    maps: list[torch.Tensor] = []
    layer.set_processor(report.Recorder(maps))
    torch.testing.assert_close(layer(x, context), expected)
    assert maps[0].shape == (2, 9, 5)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 9))


def test_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(demo, "SEEDS", (0,))
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--out={tmp_path}"])
    demo.main()
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > image.height


@pytest.mark.full  # and it downloads the emoji packages
def test_report_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (demo, report):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(report, "SCALES", (0.0, 1.0))
    monkeypatch.setattr(report.ways, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(import_module("objects"), "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["report.py", "--pairs=2", f"--out={tmp_path}"])
    report.main()
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["identical"] == {"scale 0": True, "after unloading": True}
    labels = read_label_list(DEMO / "labels.toml")
    assert list(found["labels"]) == [label.name for label in labels]
    assert "bit for bit: yes" in (tmp_path / "README.md").read_text(encoding="utf-8")
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "grid.png", "labels.png", "strength.png", "attention.png", "ways.png",
    }  # fmt: skip


def test_docs_are_what_the_report_says() -> None:
    docs = ROOT / "docs" / "demo"
    result = json.loads((docs / "report.json").read_text(encoding="utf-8"))
    written = report.text(result)
    assert (docs / "README.md").read_text(encoding="utf-8") == written
    for name in ("grid", "labels", "ways", "strength", "attention", "cold-look/sheet"):
        assert (docs / f"{name}.png").is_file()
        assert f"({name}.png)" in written


def test_cold_look_passes_its_floor() -> None:
    made = cold_look.prompts()
    key = json.loads((cold_look.OUT / "key.json").read_text(encoding="utf-8"))
    assert key["prompts"] == made
    looks = json.loads((cold_look.OUT / "looks.json").read_text(encoding="utf-8"))
    assert looks
    for look in looks:  # the floor that the model was made for
        assert cold_look.count(look["answers"], made)["both"] >= 16


def test_names_of_the_cold_look() -> None:
    assert cold_look.right("an orange bell", "An orange, rounded bell") == (True, True)
    assert cold_look.right("a blue cup", "a green mug") == (True, False)
    assert cold_look.right("a green cherries", "two green cherries") == (True, True)
    assert cold_look.right("a purple fish", "purple blob") == (False, True)
    # Within other words nothing counts.
    assert cold_look.right("a red car", "a reddish carrot") == (False, False)
    assert cold_look.right("a yellow star", "yellow stars") == (True, True)
    answers = {"1": "red car", "2": "red boat"}
    made = ["a red car", "a blue boat", "a green hat"]
    assert cold_look.count(answers, made) == {"objects": 2, "colours": 1, "both": 1}
    prompts = cold_look.prompts()
    assert len(set(prompts)) == len(prompts) == cold_look.COUNT


def test_prompts_name_what_the_base_model_has_seen() -> None:
    concepts = json.loads((DEMO / "base" / "concepts.json").read_text(encoding="utf-8"))
    names = {concept["name"] for concept in concepts}
    for prompt in (*report.PROMPTS, *demo.PROMPTS):
        assert report.concept_of(prompt) in names
