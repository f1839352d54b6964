"""The demo's base model: captions that say what is drawn, and a training that goes on as it was."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "demo" / "base"))

data: Any = import_module("data")
training: Any = import_module("training")
transforms: Any = import_module("transforms")


def test_captions_name_the_looks_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, int]] = []

    def render(image: Tensor, labels: dict[str, int], _: torch.Generator) -> Tensor:
        drawn.append(labels)
        return image[:3]

    monkeypatch.setattr(data, "render", render)  # it takes long, and captions do not depend on it
    image = torch.ones(4, 8, 8) * torch.tensor([0.9, 0.1, 0.1, 1.0])[:, None, None]
    source = data.Source("thing", "kind", image)
    random = torch.Generator().manual_seed(0)
    samples = [data.draw(source, random, positive=0.7, said=0.25) for _ in range(1200)]
    assert drawn == [sample.labels for sample in samples]
    sides = {
        word: (label, side)
        for label, words in transforms.LOOK_WORDS.items()
        for side, part in zip((1, 0), words, strict=True)
        for word in part
    }
    assert len(sides) == 24  # no word twice
    said, seen = 0, set()
    for sample in samples:
        words = [part for part in sample.text.split(", ") if part in sides]
        said += bool(words)
        seen |= set(words)
        assert len({sides[word][0] for word in words}) == len(words)
        assert all(sample.labels[sides[word][0]] == sides[word][1] for word in words)
    # Within four standard deviations of a coin thrown 1200 times.
    assert abs(said / 1200 - 0.25) < 0.05
    assert seen == set(sides)
    for label in transforms.LABELS:
        assert abs(sum(s.labels[label] for s in samples) / 1200 - 0.7) < 0.055
    # As the adapter's pictures are drawn: nothing about looks.
    plain = [data.draw(source, random) for _ in range(100)]
    assert not any(part in sides for s in plain for part in s.text.split(", "))


def test_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_SAVE_SECONDS", -1)  # after every step
    monkeypatch.setattr(training, "_WARM_STEPS", 5)
    weight = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (module(x) - y).square().mean()

    def run(name: str, stop: int | None) -> dict[str, Tensor]:
        calls = 0

        def batch() -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            if calls - 1 == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 3)
            return x, x @ weight.T

        torch.manual_seed(0)
        options = {"steps": 40, "lr": 0.05, "fall": 0.5, "decay": 0.9, "name": "test"}
        average = training.train(nn.Linear(3, 1), loss, batch, tmp_path / name, **options)
        state: dict[str, Tensor] = average.state_dict()
        return state

    whole = run("whole.pt", None)
    with pytest.raises(KeyboardInterrupt):
        run("broken.pt", 17)
    resumed = run("broken.pt", None)
    assert all(whole[name].equal(resumed[name]) for name in whole)
    step = torch.load(tmp_path / "broken.pt", weights_only=True)["step"]
    assert step == 40
    assert (whole["weight"] - weight).abs().max() < 0.5 * weight.abs().max()  # it learns
