"""Telling objects apart whatever their look, hue, size and place: on shapes instead of emoji."""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DEMO = Path(__file__).parents[2] / "examples" / "demo"
sys.path[:0] = [str(DEMO), str(DEMO / "base")]

colours: Any = import_module("colours")
data: Any = import_module("data")
objects: Any = import_module("objects")
transforms: Any = import_module("transforms")

NOWHERE = Path("nowhere")  # the cache that shapes do not need
SHAPES = ("cross", "disc", "square", "triangle")


def shape(name: str, thickness: float = 0.3) -> torch.Tensor:
    """Two-coloured [4,64,64], filling the square."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    inside = {
        "cross": torch.minimum(x.abs(), y.abs()) < thickness,
        "disc": x**2 + y**2 < 1,
        "square": torch.maximum(x.abs(), y.abs()) < 0.98,
        "triangle": 2 * x.abs() < y + 1,
    }[name]
    colour = torch.tensor([0.8, 0.2, 0.1])[:, None, None] * (1 - thickness * y)
    return torch.cat([colour.clamp(0, 1), inside[None].float()])


def shapes(_: Path) -> list[Any]:
    return [data.Source(name, "shape", shape(name, t)) for t in (0.2, 0.3, 0.4) for name in SHAPES]


def under_every_look(name: str, degrees: float = 0.0) -> np.ndarray[Any, Any]:
    image = colours.rotate_hue(shape(name), degrees)
    generator = torch.Generator().manual_seed(3)
    looks = [
        dict(zip(transforms.LABELS, coins, strict=True)) for coins in product((0, 1), repeat=4)
    ]
    pictures = [transforms.render(image, look, generator) for look in looks]
    return torch.stack(pictures).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def classifier() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_sources", shapes)
        patch.setattr(objects, "DRAWN", 400)  # every shape is told apart by a wide margin
        return objects.ObjectClassifier.fit(NOWHERE)


@pytest.mark.parametrize("degrees", [0.0, 80.0, 170.0])
def test_recognises_objects_under_every_look_and_hue(classifier: Any, degrees: float) -> None:
    for name in SHAPES:
        assert classifier.predict(under_every_look(name, degrees)) == [name] * 16


def test_matches_what_was_asked_for_and_nothing_else(classifier: Any) -> None:
    images = under_every_look("disc")
    assert classifier.matches(images, ["disc"] * 16).all()
    assert not classifier.matches(images, ["square"] * 16).any()
    found = classifier.matches(images[:3], ["disc", "cross", "disc"])
    assert found.dtype == np.bool_
    assert found.tolist() == [True, False, True]
    assert not classifier.matches(images[:1], ["unheard of"]).any()
    with pytest.raises(ValueError, match="zip"):
        classifier.matches(images, ["disc"])


def test_an_empty_picture_matches_nothing(classifier: Any) -> None:
    empty = np.full((1, 64, 64, 3), 0.97)
    assert classifier.predict(empty) == [""]
    assert not any(classifier.matches(empty, [name]).any() for name in SHAPES)


def test_ceiling(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_sources", shapes)
    monkeypatch.setattr(objects, "HELD_OUT", 160)
    found = classifier.ceiling(NOWHERE)
    assert list(found) == ["all looks", "all positive", "all negative"]
    assert min(found.values()) > 0.95
    with monkeypatch.context() as patch:  # a classifier that is always wrong
        patch.setattr(objects.ObjectClassifier, "predict", lambda _, images: [""] * len(images))
        assert set(classifier.ceiling(NOWHERE).values()) == {0.0}


def test_fit_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_sources", shapes)
    monkeypatch.setattr(objects, "DRAWN", 64)
    monkeypatch.setattr(objects, "EPOCHS", 2)

    def weights(seed: int) -> torch.Tensor:
        network = objects.ObjectClassifier.fit(NOWHERE, seed).network
        return torch.nn.utils.parameters_to_vector(network.parameters()).detach()

    first = weights(5)
    state = torch.random.get_rng_state()
    torch.rand(3)
    before = torch.random.get_rng_state()
    assert torch.equal(weights(5), first)
    assert torch.equal(torch.random.get_rng_state(), before), "leaves the global generator alone"
    assert not torch.equal(before, state)
    assert not torch.equal(weights(6), first)


def test_seeds_are_not_those_of_the_base_model_and_the_adapter() -> None:
    assert not {objects.SEED, objects.SEED + 1} & {0, 1}


def normalised(images: Any) -> torch.Tensor:
    found: torch.Tensor = objects.crop(*objects.find(images))
    return found


def test_size_place_exposure_and_saturation_are_normalised_away() -> None:
    def on_paper(edge: int, top: int, left: int) -> Any:
        stamp = torch.nn.functional.interpolate(shape("triangle")[None], (edge, edge))[0]
        canvas = torch.ones(3, 64, 64)
        window = canvas[:, top : top + edge, left : left + edge]
        window.copy_(stamp[:3] * stamp[3] + 1 - stamp[3])
        return canvas.permute(1, 2, 0).numpy()

    large = on_paper(60, 2, 2)
    small = on_paper(30, 30, 4)
    dull = transforms.saturate(torch.from_numpy(large).permute(2, 0, 1), 0.2).permute(1, 2, 0)
    reference, *others = normalised(np.stack([large, small, 0.4 * large, dull.numpy()]))
    for other in others:
        correlation = torch.corrcoef(torch.stack([reference.flatten(), other.flatten()]))[0, 1]
        assert correlation > 0.97


def test_hue_is_not_seen() -> None:
    pictures = []
    for colour in ((0.9, 0.1, 0.1), (0.1, 0.7, 0.2), (0.3, 0.3, 0.3)):
        image = shape("cross")
        image[:3] = torch.tensor(colour)[:, None, None]
        pictures.append(transforms.place(image, True, torch.Generator().manual_seed(0)))
    first, *others = normalised(torch.stack(pictures).permute(0, 2, 3, 1).numpy())
    for other in others:
        mask, other_mask = first[1], other[1]
        torch.testing.assert_close(other_mask, mask, atol=0.35, rtol=0)  # of the soft edge
        assert (other_mask - mask).abs().mean() < 0.02


def test_specks_do_not_move_the_crop() -> None:
    clean = np.ones((1, 64, 64, 3))
    clean[:, 20:44, 16:40] = 0.2
    specked = clean.copy()
    specked[:, 3, 60] = 0.2
    np.testing.assert_allclose(objects.find(specked)[1], objects.find(clean)[1], atol=0.02)


def test_varying_keeps_squares_on_average() -> None:
    squares = torch.tensor([[0.5, 0.0, 0.2], [0.0, 0.4, -0.3]])
    many = objects.vary(squares.expand(4000, 2, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.mean(0), squares, atol=2e-3, rtol=0)
    spread = many.std(0)[:, 2]  # in proportion to the object's size
    torch.testing.assert_close(spread, objects.SHIFT * torch.tensor([0.5, 0.4]), atol=1e-3, rtol=0)
