"""Measures on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from vmix.measures import (
    HUE_BANDS,
    MEASURES,
    brightness,
    colourfulness,
    coverage,
    hue_and_chroma,
    hue_matches,
    laplacian_variance,
    luma,
    main_hue,
    off_centre,
    sharpness,
)

RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def plain(colour: tuple[float, float, float], side: int = 32) -> NDArray[np.float64]:
    return np.broadcast_to(np.array(colour), (side, side, 3)).copy()


def square(
    left: int,
    top: int,
    edge: int = 8,
    colour: tuple[float, float, float] = RED,
    paper: float = 0.97,
) -> NDArray[np.float64]:
    image = plain((paper, paper, paper))
    image[top : top + edge, left : left + edge] = colour
    return image


def test_brightness_is_luma() -> None:
    colours = [RED, GREEN, BLUE, (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)]
    np.testing.assert_allclose(
        brightness(np.stack([plain(c) for c in colours])), [0.299, 0.587, 0.114, 1, 0.5]
    )


def test_colourfulness() -> None:
    assert colourfulness(plain((0.4, 0.4, 0.4))) == pytest.approx(0)
    # One colour has no spread: 0.3 · |(R − G, (R + G)/2 − B)|.
    assert colourfulness(plain(RED)) == pytest.approx(0.3 * np.hypot(1, 0.5))
    # Half red, half green: rg is ±1 (spread 1, mean 0), yb is 0.5 everywhere.
    half = plain(RED)
    half[:16] = GREEN
    assert colourfulness(half) == pytest.approx(1 + 0.3 * 0.5)


def test_sharpness_falls_with_blur_and_ignores_exposure() -> None:
    image = np.random.default_rng(0).random((32, 32, 3))
    smooth = image
    for axis in (0, 1):
        smooth = (np.roll(smooth, 1, axis) + 2 * smooth + np.roll(smooth, -1, axis)) / 4
    assert sharpness(smooth) < 0.7 * sharpness(image)
    assert sharpness(0.4 * image) == pytest.approx(sharpness(image))
    assert sharpness(plain(RED)) == 0
    ramp = np.broadcast_to(np.linspace(0, 1, 32)[:, None, None], (32, 32, 3))
    assert sharpness(ramp) == pytest.approx(0, abs=1e-9)


def test_sharpness_of_a_checkerboard() -> None:
    board = (np.indices((32, 32)).sum(0) % 2)[..., None] * np.ones(3)
    # The Laplacian is ±4 everywhere, luma 0 or 1: deviations 4 and 1/2.
    assert sharpness(board) == pytest.approx(8, rel=1e-2)
    assert laplacian_variance(board / 255) == pytest.approx(16, rel=1e-2)
    assert laplacian_variance(board / 510) == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize("exposure", [1.0, 0.4])
def test_off_centre(exposure: float) -> None:
    assert off_centre(exposure * square(12, 12)) == pytest.approx(0)
    # The centre of a square at columns 20..27 is 24, a half of the half-size right of 16.
    assert off_centre(exposure * square(20, 12)) == pytest.approx(0.5)
    assert off_centre(exposure * square(20, 20)) == pytest.approx(np.hypot(0.5, 0.5))
    assert off_centre(exposure * square(4, 20, colour=BLUE)) == pytest.approx(np.hypot(0.5, 0.5))
    assert coverage(exposure * square(20, 12)) == pytest.approx(64 / 1024)


def test_off_centre_survives_noise_and_needs_an_object() -> None:
    noise = np.random.default_rng(0).normal(0, 0.03, (32, 32, 3))
    assert off_centre(np.clip(square(20, 12) + noise, 0, 1)) == pytest.approx(0.5, abs=0.05)
    assert np.isnan(off_centre(plain(RED)))


def test_hue_and_chroma() -> None:
    hue, chroma = hue_and_chroma(np.array([[RED, GREEN, BLUE], [(1, 1, 0), (1, 0, 1), (0.5,) * 3]]))
    np.testing.assert_allclose(hue[0], [0, 120, 240])
    np.testing.assert_allclose(hue[1, :2], [60, 300])
    np.testing.assert_allclose(chroma, [[1, 1, 1], [1, 1, 0]])


# No hue lies where two of the histogram's bins of ten degrees meet, as those of (1, 0.5, 0) and
# (0.5, 0.1, 0.9) would: there the last bit of luma decides which bin has it.
@pytest.mark.parametrize(
    ("word", "colour"),
    [
        ("red", (0.9, 0.1, 0.1)),
        ("orange", (1.0, 0.55, 0.0)),
        ("yellow", (1.0, 0.9, 0.1)),
        ("green", (0.1, 0.7, 0.25)),
        ("blue", (0.1, 0.4, 0.9)),
        ("purple", (0.55, 0.1, 0.9)),
        ("pink", (1.0, 0.3, 0.7)),
    ],
)
def test_hue_matches_its_word_only(word: str, colour: tuple[float, float, float]) -> None:
    image = square(5, 9, 12, colour)
    pale = 0.75 * luma(image)[..., None] + 0.25 * image  # nearly grey, and dark
    for picture in (image, 0.4 * pale):
        matched = {w for w in HUE_BANDS if hue_matches(picture, w, tolerance=0)}
        assert matched == {word}


def test_hue_is_the_object_s_and_not_the_background_s() -> None:
    image = plain((0.8, 0.9, 1.0))
    image[8:20, 8:20] = (0.9, 0.1, 0.1)
    assert hue_matches(image, "red")
    assert not hue_matches(image, "blue")
    assert np.isnan(main_hue(plain((0.5, 0.5, 0.5))))
    assert not hue_matches(plain((0.5,) * 3), "red")


def test_bands_share_out_the_circle() -> None:
    ends = {end for _, end in HUE_BANDS.values()}
    assert ends == {start for start, _ in HUE_BANDS.values()}
    assert sum((end - start) % 360 for start, end in HUE_BANDS.values()) == 360


def test_batches_agree_with_single_images() -> None:
    batch = np.random.default_rng(1).random((2, 3, 16, 16, 3))
    for measure in (*MEASURES.values(), main_hue):
        values = measure(batch)
        assert values.shape == (2, 3)
        np.testing.assert_allclose(values[1, 2], measure(batch[1, 2]))
    assert measure(batch[0, 0].astype(np.float32)).dtype == np.float64


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 8, 8\]"):
        brightness(np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="uint8"):
        brightness(np.zeros((8, 8, 3), dtype=np.uint8))
