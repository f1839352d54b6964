"""What pictures are measured by: pixels, FID, CLIP score, Aes score."""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vmix import measures
from vmix.aesthetic_predictor import AestheticPredictor
from vmix.clip_model import Clip, WeightsError
from vmix.dataset import Example
from vmix.eval.errors import EvalError, one_line
from vmix.eval.prompts import open_image
from vmix.eval.rows import base_digest, digest
from vmix.eval.weights import Weights

HUE, CLIP, AES, FID = "hue match", "CLIP score", "Aes score", "FID"
BATCH = 32
Values = dict[str, NDArray[np.float64]]
Made = Callable[[int], object]


class Metric(Protocol):
    name: str

    def key(self) -> str:
        """What its values depend on, pictures apart."""

    def measure(self, pictures: Sequence[Path], prompts: Sequence[str], made: Made) -> Values:
        """A number per picture and column, NaN where there is none; FID's column has one in all."""


class Pixels:
    name = "pixels"

    def key(self) -> str:
        return hashlib.sha256(inspect.getsource(measures).encode()).hexdigest()[:16]

    def measure(self, pictures: Sequence[Path], prompts: Sequence[str], made: Made) -> Values:
        columns: dict[str, list[float]] = {name: [] for name in (*measures.MEASURES, HUE)}
        for path, prompt in zip(pictures, prompts, strict=True):
            pixels = np.asarray(open_image(path), dtype=np.float64) / 255
            for name, measure in measures.MEASURES.items():
                columns[name].append(float(measure(pixels)))
            colour = colour_of(prompt)
            matches = float(measures.hue_matches(pixels, colour)) if colour else float("nan")
            columns[HUE].append(matches)
            made(1)
        return {name: np.array(values) for name, values in columns.items()}


def colour_of(prompt: str) -> str | None:
    """The prompt's colour, if it names one and no other."""
    words = {word.strip(".,;:!?()\"'").lower() for word in prompt.replace("-", " ").split()}
    named = words & measures.HUE_BANDS.keys()
    return named.pop() if len(named) == 1 else None


class ClipScore:
    """100 times the cosine of a picture's and its prompt's features, as torchmetrics has it.

    Not torchmetrics itself: its CLIPScore cuts a long prompt after its 77th token and loses the end
    of text, which CLIP reads, and it does not know what transformers returns from version 5 on.
    """

    name = "clip"

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def key(self) -> str:
        return base_digest(str(self.clip.folder))

    def measure(self, pictures: Sequence[Path], prompts: Sequence[str], made: Made) -> Values:
        values: list[float] = []
        for part, texts in zip(_batches(pictures), _batches(prompts), strict=True):
            images = self.clip.images([open_image(path) for path in part])
            values += (100 * (images * self.clip.texts(texts)).sum(-1)).tolist()
            made(len(part))
        return {CLIP: np.array(values)}


class AesScore:
    name = "aes"

    def __init__(self, predictor: AestheticPredictor, weights: Path) -> None:
        self.predictor, self.weights = predictor, weights

    def key(self) -> str:
        return f"{base_digest(str(self.predictor.clip.folder))} {digest(self.weights)}"

    def measure(self, pictures: Sequence[Path], prompts: Sequence[str], made: Made) -> Values:
        values: list[float] = []
        for part in _batches(pictures):
            values += self.predictor.score([open_image(path) for path in part])
            made(len(part))
        return {AES: np.array(values)}


class Fid:
    """torchmetrics' FrechetInceptionDistance (2,048 features), on torch-fidelity's Inception."""

    name = "fid"

    def __init__(self, weights: Path, references: Sequence[Example], device: torch.device) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.weights, self.references, self.device = weights, references, device
        try:
            # torch-fidelity unpickles whatever a file holds: give it one that holds tensors alone.
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
            checked = io.BytesIO()
            torch.save(tensors, checked)
            checked.seek(0)
            options: Any = {"feature_extractor_weights_path": checked}
            metric: Any = FrechetInceptionDistance(reset_real_features=False, **options)
        except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            what = one_line(error)[:200]
            raise WeightsError(f"{weights} does not hold Inception's weights: {what}") from error
        self.metric = metric.to(device)

    def key(self) -> str:
        names = [f"{e.key} {e.size or e.file.stat().st_size}" for e in self.references]
        found = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return f"{digest(self.weights)} {found}"

    def measure(self, pictures: Sequence[Path], prompts: Sequence[str], made: Made) -> Values:
        if not self.metric.real_features_num_samples:
            self._update(self.references, real=True, made=lambda _: None)
        self.metric.reset()
        self._update(pictures, real=False, made=made)
        return {FID: np.array([float(self.metric.compute())])}

    @torch.no_grad()
    def _update(self, sources: Sequence[Example] | Sequence[Path], real: bool, made: Made) -> None:
        for part in _batches(sources):
            groups: dict[tuple[int, int], list[Image.Image]] = {}
            for source in part:
                image = open_image(source)
                groups.setdefault(image.size, []).append(image)
            for images in groups.values():
                pixels = np.stack([np.asarray(image) for image in images])
                batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
                self.metric.update(batch, real=real)
            made(len(part))


def open_metrics(
    wanted: Sequence[str] | None,
    weights: Weights,
    references: Sequence[Example],
    device: torch.device,
) -> list[Metric]:
    """In the paper's order, then pixels; EvalError for weights that are not what they should be."""
    found: list[Metric] = []
    try:
        if weights.inception is not None:
            found.append(Fid(weights.inception, references, device))
        clip = None
        if weights.clip is not None and (weights.aesthetic or wanted is None or "clip" in wanted):
            clip = Clip(weights.clip, device)
        if clip is not None and (wanted is None or "clip" in wanted):
            found.append(ClipScore(clip))
        if clip is not None and clip.width != 768 and not (wanted and "aes" in wanted):
            weights.absent["aes"] = f"the Aes score needs CLIP ViT-L/14; {clip.folder} is another"
        elif clip is not None and weights.aesthetic is not None:
            found.append(AesScore(AestheticPredictor(clip, weights.aesthetic), weights.aesthetic))
    except WeightsError as error:
        raise EvalError(str(error)) from error
    if wanted is None or "pixels" in wanted:
        found.append(Pixels())
    return found


BETTER: Mapping[str, str] = {FID: "↓", CLIP: "↑", AES: "↑", HUE: "↑"}
"""Which way is better; the other measures know no better."""


def _batches(sources: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(sources), BATCH):
        yield sources[start : start + BATCH]
