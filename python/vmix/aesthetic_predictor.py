"""LAION's improved aesthetic predictor: a score, about 1 to 10, on top of CLIP ViT-L/14.

The weights are `sac+logos+ava1-l14-linearMSE.pth` of GitHub's christophschuhmann/
improved-aesthetic-predictor, or the same tensors as safetensors. It is the paper's Aes Score.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vmix.clip_model import Clip, WeightsError

__all__ = ["AestheticPredictor"]

SIZES = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers in `layers`; between them is dropout alone, which does nothing here."""


class AestheticPredictor:
    def __init__(
        self,
        clip: Clip | str | Path,
        weights: str | Path,
        device: torch.device | str = "cpu",
    ) -> None:
        """`clip` is CLIP ViT-L/14, opened or its folder."""
        tensors = _read(Path(weights))
        self.clip = clip if isinstance(clip, Clip) else Clip(clip, device)
        if self.clip.width != SIZES[0]:
            raise WeightsError(
                f"{self.clip.folder}: features of {self.clip.width} numbers; the aesthetic "
                f"predictor is for {SIZES[0]}, those of CLIP ViT-L/14"
            )
        linears = [nn.Linear(*sizes) for sizes in pairwise(SIZES)]
        for place, linear in zip(PLACES, linears, strict=True):
            linear.load_state_dict(
                {kind: tensors[f"layers.{place}.{kind}"] for kind in ("weight", "bias")}
            )
        self.layers = nn.Sequential(*linears).requires_grad_(False).eval().to(self.clip.device)

    def score(self, images: Sequence[Image.Image]) -> list[float]:
        return self.of_features(self.clip.images(images)) if images else []

    def of_features(self, features: Tensor) -> list[float]:
        """Of CLIP's image features [B, 768], of unit length."""
        return self.layers(features).flatten().tolist()  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds more than tensors, and is not loaded") from error
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise WeightsError(f"{path}: {str(error).splitlines()[0]}") from error
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (before, after) in zip(PLACES, pairwise(SIZES), strict=True):
        shapes[f"layers.{place}.weight"] = (after, before)
        shapes[f"layers.{place}.bias"] = (after,)
    for name, shape in shapes.items():
        found = tensors.get(name) if isinstance(tensors, dict) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            what = list(found.shape) if isinstance(found, Tensor) else "no such tensor"
            raise WeightsError(
                f"{path}: expected the aesthetic predictor's {name} of shape {list(shape)}, "
                f"found {what}"
            )
    return tensors
