"""CLIP out of a local folder: features of images and of texts, nothing downloaded.

The folder is one of transformers (`config.json`, as `openai/clip-vit-large-patch14` has it) or of
open_clip (`open_clip_config.json`, as the models of LAION have it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vmix.loading import WeightsError, load_model

__all__ = ["Clip", "WeightsError"]


class Clip:
    """Features [B, width] of unit length."""

    _model: Any
    _of_images: Callable[[list[Image.Image]], Any]
    _of_texts: Callable[[list[str]], Any]

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        if (self.folder / "config.json").is_file():
            self._open_transformers()
        elif (self.folder / "open_clip_config.json").is_file():
            self._open_open_clip()
        else:
            raise WeightsError(
                f"{folder} is not a folder of CLIP: it has neither a config.json (transformers) "
                "nor an open_clip_config.json (open_clip)"
            )
        self._model = self._model.requires_grad_(False).eval().to(self.device)

    def _open_transformers(self) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            self._model = load_model(CLIPModel, self.folder, local_files_only=True)
            prepare: Any = CLIPImageProcessor.from_pretrained(self.folder, local_files_only=True)
            tokenizer: Any = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{self.folder}: {' '.join(str(error).split())}") from error
        self.width = int(self._model.config.projection_dim)
        length = int(self._model.config.text_config.max_position_embeddings)

        def pixels(images: list[Image.Image]) -> Tensor:
            batch: Tensor = prepare(images=images, return_tensors="pt").pixel_values
            return batch

        def tokens(texts: list[str]) -> Any:
            # Cut before the end of text, which is where the text's feature is read.
            return tokenizer(
                texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt"
            )

        def of_texts(texts: list[str]) -> Any:
            batch = tokens(texts).to(self.device)
            return self._model.get_text_features(batch.input_ids, batch.attention_mask)

        self._of_images = lambda i: self._model.get_image_features(pixels(i).to(self.device))
        self._of_texts = of_texts

    def _open_open_clip(self) -> None:
        import open_clip

        weights = [*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")]
        weights += self.folder.glob("*.pt")
        if not weights:
            raise WeightsError(
                f"{self.folder}: expected open_clip_model.safetensors beside its config"
            )
        name = f"local-dir:{self.folder}"
        try:
            opened: Any = open_clip.create_model_from_pretrained(name, weights_only=True)
            tokenizer: Any = open_clip.get_tokenizer(name)
        except Exception as error:  # whatever a wrong configuration or another model's weights give
            raise WeightsError(f"{self.folder}: {' '.join(str(error).split())}") from error
        model, prepare = opened
        self._model = model
        with torch.no_grad():
            probe: Any = tokenizer(["a"])
            self.width = int(model.encode_text(probe).shape[-1])
        self._of_images = lambda images: model.encode_image(
            torch.stack([prepare(image) for image in images]).to(self.device)
        )
        self._of_texts = lambda texts: model.encode_text(tokenizer(texts).to(self.device))

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        return _unit(self._of_images([image.convert("RGB") for image in images]))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts that are longer than the model's context are cut."""
        return _unit(self._of_texts(list(texts)))


def _unit(features: Any) -> Tensor:
    features = getattr(features, "pooler_output", features)  # transformers from 5 on
    unit: Tensor = torch.nn.functional.normalize(features.float(), dim=-1)
    return unit
