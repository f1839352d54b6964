"""Whether a picture shows the object that its prompt names: the other half of text fidelity.

A small network learns the drawn objects under every look, and is asked for the likeliest of them.
It sees where the object is and how light its parts are, but neither colour, size nor place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from vmix.measures import foreground, luma

sys.path.insert(0, str(Path(__file__).resolve().parent / "base"))

from data import Sample, draw_many

SEED = 20  # of the fit; the ceiling takes the next. The base model has 0, the adapter 1.
DRAWN, HELD_OUT = 4000, 1980
EPOCHS, BATCH = 8, 64
SIDE = 24  # pixels of the normalised object
SLANT, SHIFT, NOISE = 0.06, 0.06, 0.1  # how much objects are varied, anew in every epoch


def find(images: ArrayLike) -> tuple[Tensor, Tensor]:
    """Luma and soft mask [n,2,H,W] of pictures, and the objects' squares as affine maps [n,2,3]."""
    pixels = np.asarray(images)
    mask = torch.from_numpy(np.stack([foreground(image) for image in pixels])).float()
    (left, right), (top, bottom) = _extent(mask.sum(1)), _extent(mask.sum(2))
    half = 0.55 * torch.maximum(right - left, bottom - top)  # with a margin
    middle = torch.stack([left + right, top + bottom], 1) / 2
    size = torch.tensor([mask.shape[2], mask.shape[1]]) / 2
    squares = torch.cat([torch.diag_embed(half[:, None] / size), (middle / size - 1)[..., None]], 2)
    return torch.stack([torch.from_numpy(luma(pixels)).float(), mask], 1), squares


def _extent(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end without the outermost 1 % on either side, so that specks do not count."""
    share = profile.cumsum(1) / profile.sum(1, keepdim=True).clamp(min=1e-6)
    return (share < 0.01).sum(1), (share < 0.99).sum(1) + 1


def crop(planes: Tensor, squares: Tensor) -> Tensor:
    """The objects [n,2,SIDE,SIDE], their luma with no mean and unit deviation inside the mask."""
    grid = F.affine_grid(squares, [len(planes), 2, 2 * SIDE, 2 * SIDE], align_corners=False)
    objects = F.avg_pool2d(F.grid_sample(planes, grid, align_corners=False), 2)
    light, mask = objects.unbind(1)
    weight = mask / mask.sum((1, 2), keepdim=True).clamp(min=1e-6)
    light = light - (light * weight).sum((1, 2), keepdim=True)
    deviation = (light**2 * weight).sum((1, 2), keepdim=True).sqrt()
    return torch.stack([light / deviation.clamp(min=0.02) * mask, 2 * mask - 1], 1)


def vary(squares: Tensor, random: torch.Generator) -> Tensor:
    """A little turned, sheared, stretched and shifted, relative to the object's own size."""
    spread = torch.tensor([SLANT, SLANT, SHIFT])
    change = torch.eye(2, 3) + spread * torch.randn(len(squares), 2, 3, generator=random)
    moved = squares[..., :2] @ change
    return torch.cat([moved[..., :2], moved[..., 2:] + squares[..., 2:]], 2)


def _network(classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3)),
        nn.Linear(64 * (SIDE // 4) ** 2, classes),
    )


def _pictures(samples: Sequence[Sample]) -> NDArray[np.float32]:
    stack = torch.stack([sample.image for sample in samples])
    return np.asarray(stack.permute(0, 2, 3, 1).float() / 255)


@dataclass(frozen=True)
class ObjectClassifier:
    concepts: tuple[str, ...]
    network: nn.Sequential

    @classmethod
    def fit(cls, cache: Path, seed: int = SEED) -> ObjectClassifier:
        samples = draw_many(cache, DRAWN, seed)
        concepts = tuple(sorted({sample.concept for sample in samples}))
        truth = torch.tensor([concepts.index(sample.concept) for sample in samples])
        planes, squares = find(_pictures(samples))
        random = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # for the initial weights and dropout
            network = _network(len(concepts))
            optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
            steps = EPOCHS * (len(samples) // BATCH)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
            for _ in range(EPOCHS):
                order = torch.randperm(len(samples), generator=random)
                for batch in order[: steps // EPOCHS * BATCH].view(-1, BATCH):
                    objects = crop(planes[batch], vary(squares[batch], random))
                    objects += NOISE * torch.randn(objects.shape, generator=random)
                    loss = F.cross_entropy(network(objects), truth[batch], label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
        return cls(concepts, network.eval())

    @torch.no_grad()
    def predict(self, images: ArrayLike) -> list[str]:
        """The likeliest concept of every picture [n,H,W,3] in 0..1; "" where nothing is seen."""
        planes, squares = find(images)
        best = self.network(crop(planes, squares)).argmax(1).tolist()
        seen = planes[:, 1].sum((1, 2)) > 0
        return [self.concepts[i] if s else "" for i, s in zip(best, seen, strict=True)]

    def matches(self, images: ArrayLike, concepts: Sequence[str]) -> NDArray[np.bool_]:
        found = zip(self.predict(images), concepts, strict=True)
        return np.array([prediction == concept for prediction, concept in found], dtype=np.bool_)

    def ceiling(self, cache: Path, seed: int = SEED + 1) -> dict[str, float]:
        """Share recognised of the same objects, drawn anew in other looks, hues and places."""
        samples = draw_many(cache, HELD_OUT, seed)
        right = self.matches(_pictures(samples), [sample.concept for sample in samples])
        positive = np.array([sum(sample.labels.values()) for sample in samples])
        best = len(samples[0].labels)
        looks = {"all looks": positive >= 0, "all positive": positive == best}
        looks["all negative"] = positive == 0
        return {look: float(right[chosen].mean()) for look, chosen in looks.items()}
