"""The studies of objectives and baselines: what they draw and teach, and that docs say the same."""

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
import yaml

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
sys.path[:0] = [str(DEMO), str(DEMO / "base")]

baselines: Any = import_module("baselines")
teachers: Any = import_module("teachers")
demo: Any = import_module("demo")
fits: Any = import_module("fits")


@pytest.mark.parametrize(
    ("prompt", "bare", "told"),
    [
        ("a {words} car", "a car", "a red car"),
        ("a car, {words}", "a car", "a car, red"),
        ("{words}, a car", "a car", "red, a car"),
        ("a car", "a car", "a car in red"),
        ("", "", "red"),
    ],
)
def test_where_words_go(prompt: str, bare: str, told: str) -> None:
    from vmix.fit import bare as without
    from vmix.train import teachers as objective

    assert without(prompt) == bare
    assert objective.told(prompt, "red", "{prompt} in {words}") == told


def test_pictures_and_weights_of_text_pairs() -> None:
    from vmix.train.teachers import TextPairs

    made: Any = TextPairs.__new__(TextPairs)
    made.prompts, made.labels, made.args = ["a", "b", "c"], ["one", "two"], SimpleNamespace(seed=0)
    made.rest = torch.tensor([0.0, 0.5])  # the second has two sides
    drawn = [made._drawn(index) for index in range(48)]
    assert [d is None for d in drawn] == [index // 3 % 2 == 0 for index in range(48)]
    assert set(drawn) == {None, (0, 1.0), (1, 1.0), (1, 0.0)}
    count = 1500  # of each: shares are known to 0.01
    for picture in (None, (0, 1.0), (1, 1.0), (1, 0.0)):
        weights = made._weights(range(count), [picture] * count)
        active = weights != made.rest
        assert weights.min() >= 0
        assert weights.max() == 1
        nothing = float((~active.any(1)).float().mean())
        assert 0.08 < nothing < 0.2  # a tenth has no label, and few are drawn at their rest
        if picture is not None:
            label, end = picture
            other = active[:, 1 - label] & ~active[:, label]
            assert other.float().mean() < 0.02  # that of the picture comes first
            if label == 1:  # and on the side that the picture is on
                assert ((weights[:, 1] > 0.5) == bool(end))[active[:, 1]].all()
    assert made._weights([7], [None]).equal(made._weights([7, 8], [None, None])[:1])


def test_training_prompts_leave_the_held_out_objects_out(tmp_path: Path) -> None:
    lines = teachers.prompts_file(tmp_path).read_text(encoding="utf-8").splitlines()
    named = {line.removeprefix("a {words} ") for line in lines}
    assert len(named) == len(lines) > 50
    assert not named & set(teachers.HELD_OUT)
    assert named >= set(teachers.SEEN)


def test_teacher_at_one_is_the_word_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 8)
    pipe = demo.open_pipeline()
    pairs = [("a car", 0), ("a hat", 1)]
    with teachers.taught(pipe, ["a red car", "a red hat"], 1.0):
        steered = demo.generate(pipe, pairs)
    with teachers.taught(pipe, ["a red car", "a red hat"], 0.0):
        unsteered = demo.generate(pipe, pairs)
    words = demo.generate(pipe, [("a red car", 0), ("a red hat", 1)])
    bare = demo.generate(pipe, pairs)
    # Other sizes of batches and another order of sums, through all steps.
    np.testing.assert_allclose(steered, words, atol=2e-3)
    np.testing.assert_allclose(unsteered, bare, atol=2e-3)
    assert np.abs(words - bare).mean() > 0.02  # so that either could fail


def test_drawings_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import Source

    image = torch.ones(4, 64, 64) * torch.tensor([0.9, 0.1, 0.1, 1.0])[:, None, None]
    sources = [Source(f"thing{n}", "kind", image) for n in range(6)]  # two of each vendor
    monkeypatch.setattr(baselines, "load_sources", lambda _: sources)
    folder = baselines.pictures(
        tmp_path / "bright", 0, lambda s: bool(s.labels["natural lighting"]), baselines.VENDOR, 12
    )
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
    assert len(lines) == 12 == len(list(folder.glob("*.png")))
    assert {word for line in lines for word in ("thing4", "thing5") if word in line["text"]} == {
        "thing4",
        "thing5",
    }
    assert not any(f"thing{n}" in line["text"] for n in range(4) for line in lines)
    # White paper stays white where the light is natural; in the dark half it is grey.
    corners = [np.asarray(baselines.Image.open(f))[0, 0].mean() for f in folder.glob("*.png")]
    assert min(corners) > 220


def test_curated_has_every_look() -> None:
    looks = dict.fromkeys("abcd", 1)
    assert baselines.curated(SimpleNamespace(labels=looks))
    assert not baselines.curated(SimpleNamespace(labels={**looks, "c": 0}))


def test_prompts_of_fits_are_not_measured() -> None:
    known = {c["name"] for c in json.loads((DEMO / "base" / "concepts.json").read_text("utf-8"))}
    measured = {prompt.split(maxsplit=2)[-1] for prompt, _ in fits.PAIRS} & known
    assert len(fits.PROMPTS) == 60
    assert len(measured) > 25
    for prompt in fits.PROMPTS:
        assert not measured & {*prompt.replace(",", "").split()}, prompt


def test_rows_and_tables() -> None:
    listing = yaml.safe_load((DEMO / "rows.yaml").read_text(encoding="utf-8"))
    names = [row["name"] for row in listing["rows"]]
    assert len(set(names)) == len(names)
    assert {name for table in listing["tables"].values() for name in table} == set(names)
    for row in listing["rows"]:
        for key in ("adapter", "lora", "embedding"):
            if not row.get(key, "~").startswith("~"):
                assert (DEMO / row[key]).is_file()


@pytest.mark.parametrize(
    ("module", "folder"),
    [(teachers, "objectives"), (baselines, "comparison"), (fits, "fitted")],
)
def test_docs_are_what_the_report_says(module: Any, folder: str) -> None:
    docs = ROOT / "docs" / "demo" / folder
    result = json.loads((docs / "report.json").read_text(encoding="utf-8"))
    assert (docs / "README.md").read_text(encoding="utf-8") == module.text(result)
    for name in ("grid.png", "words.png", "curve.png", "loras.png", "strength.png"):
        assert (docs / name).is_file() == (name in module.text(result))
