"""Measures with weights: CLIP-IQA pairs and LAION's aesthetic predictor.

Nothing is downloaded: weights lie in a local folder, and where they do not, the message says which
files to put there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vmix.label.choice import CLIP_IQA, LAION, Pair
from vmix.label.errors import LabelError

if TYPE_CHECKING:  # torch takes seconds to import, and is not needed without weights
    from torch import Tensor

HEAD = "sac+logos+ava1-l14-linearMSE"
_HEADS = (f"{HEAD}.safetensors", f"{HEAD}.pth")
_CLIP = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json"),
)
_OPEN_CLIP = "open_clip_config.json"


class Learned:
    """All learned measures of a run. One CLIP serves both where both are in one folder."""

    def __init__(
        self, clip_iqa: Path | None, pairs: Mapping[str, Pair], laion: Path | None
    ) -> None:
        """Looks for the files; `load` reads them. `pairs` are texts by label."""
        self.clip_iqa, self.laion = clip_iqa, laion
        self.pairs = pairs if clip_iqa is not None else {}
        if clip_iqa is not None:
            _look_for(f"--{CLIP_IQA}", clip_iqa, *_clip_files(clip_iqa))
        if laion is not None:
            _look_for(f"--{LAION}", laion, *_clip_files(laion), _HEADS)
        name = clip_iqa.resolve().name if clip_iqa is not None else ""
        self.by_label = {
            label: f"{CLIP_IQA} {name}: {positive} | {negative}"
            for label, (positive, negative) in self.pairs.items()
        }
        """Keys of the pairs' scores."""
        self.keys = (*dict.fromkeys(self.by_label.values()), *((LAION,) if laion else ()))

    def load(self) -> None:
        import torch
        import transformers

        from vmix.aesthetic_predictor import AestheticPredictor
        from vmix.clip_model import Clip, WeightsError

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.clips = {
                folder: Clip(folder, device) for folder in {self.clip_iqa, self.laion} if folder
            }
            if self.clip_iqa is not None:
                clip = self.clips[self.clip_iqa]
                self.texts: Tensor = clip.texts([t for pair in self.pairs.values() for t in pair])
            if self.laion is not None:
                head = next(self.laion / name for name in _HEADS if (self.laion / name).is_file())
                self.predictor = AestheticPredictor(self.clips[self.laion], head)
        except WeightsError as error:
            raise LabelError(str(error)) from error

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, list[float]]:
        """Scores of every key."""
        features = {folder: clip.images(images) for folder, clip in self.clips.items()}
        found: dict[str, list[float]] = {}
        if self.clip_iqa is not None:
            shares = clip_iqa(features[self.clip_iqa], self.texts)
            found |= dict(zip(self.by_label.values(), shares.T.tolist(), strict=True))
        if self.laion is not None:
            found[LAION] = self.predictor.of_features(features[self.laion])
        return found


def clip_iqa(images: Tensor, texts: Tensor) -> Tensor:
    """[B, P]: the share of each pair's first text in the softmax over the two, at CLIP's usual
    scale of 100, from features [B, d] of images and [2P, d] of texts, all of unit length."""
    shares: Tensor = (100 * images @ texts.T).reshape(len(images), -1, 2).softmax(-1)
    return shares[..., 0]


def _clip_files(folder: Path) -> Sequence[tuple[str, ...]]:
    return ((_OPEN_CLIP,),) if (folder / _OPEN_CLIP).is_file() else _CLIP


def _look_for(option: str, folder: Path, *files: tuple[str, ...]) -> None:
    missing = [names for names in files if not any((folder / name).is_file() for name in names)]
    if missing:
        paths = ", ".join(" or ".join(str(folder / name) for name in names) for names in missing)
        more = ""
        if missing != [_HEADS]:
            more += "; openai/clip-vit-large-patch14 on huggingface.co has the files of a CLIP"
        if _HEADS in missing:
            more += (
                "; the predictor is in github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        raise LabelError(f"{option}: put the weights where they are looked for: {paths}{more}")
