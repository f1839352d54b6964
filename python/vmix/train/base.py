"""The frozen pipeline that an adapter is trained for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmix.train.data import TrainingError


class Base:
    """The frozen pipeline, and what the trainer asks of it, with one text encoder or SDXL's two."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        diffusers: Any = import_module("diffusers")
        try:
            name = diffusers.DiffusionPipeline.load_config(path)["_class_name"]
            if not Path(path).is_dir():  # a repository of the hub
                path = diffusers.DiffusionPipeline.download(path)
        except OSError as error:
            raise TrainingError(f"{path}: {error}") from error
        self.folder = path
        if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            raise TrainingError(
                f"{path} is a {name}; expected StableDiffusionPipeline or StableDiffusionXLPipeline"
            )
        self.xl = name == "StableDiffusionXLPipeline"
        optional = {} if self.xl else {"safety_checker": None, "requires_safety_checker": False}
        self.pipe: Any = getattr(diffusers, name).from_pretrained(path, **optional)
        self.unet: Any = self.pipe.unet
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise TrainingError(
                f"prediction_type {self.scheduler.config.prediction_type} is unknown"
            )
        self.device, self.dtype = device, dtype
        for module in (
            self.pipe.text_encoder,
            getattr(self.pipe, "text_encoder_2", None),
            self.unet,
        ):
            if module is not None:  # its own config may ask for half precision
                module.requires_grad_(False).eval().to(device, dtype)
        # float32 in any case: SDXL's overflows in half
        self.pipe.vae.requires_grad_(False).eval().to(device, torch.float32)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Context [B, C, d] and SDXL's pooled feature [B, p] (else [B, 0]) of every caption.

        The empty caption gives what the pipeline's unconditional pass uses by default.
        """
        encoded = self.pipe.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        context = encoded[0]
        pooled = encoded[2] if self.xl else context.new_zeros(len(captions), 0)
        if self.xl and self.pipe.config.force_zeros_for_empty_prompt:
            keep = torch.tensor([caption != "" for caption in captions], device=self.device)
            context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        return context, pooled

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the latents, stacked over channels."""
        return self.pipe.vae.encode(pixels.to(self.device)).latent_dist.parameters  # type: ignore[no-any-return]

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return (mean + deviation * noise) * self.pipe.vae.config.scaling_factor  # type: ignore[no-any-return]

    def conditions(self, pooled: Tensor, resolution: int) -> dict[str, Tensor] | None:
        """SDXL's extra conditions: pooled text, and sizes as those of an uncropped image."""
        if not self.xl:
            return None
        sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
        return {"text_embeds": pooled, "time_ids": sizes.to(pooled).repeat(len(pooled), 1)}
