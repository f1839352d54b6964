"""The frozen pipeline that an adapter is trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vmix.train.errors import TrainingError
from vmix.train.single_file import is_of_hub, load_pipeline

WINDOWS, WINDOW = 512, 2**14
"""Of a file, that tell it from others: models differ in all of their layers, if they do."""


class Base:
    """The frozen pipeline, and what the trainer asks of it, with one text encoder or SDXL's two."""

    def __init__(
        self,
        path: str,
        device: torch.device,
        dtype: torch.dtype,
        prediction_type: str | None = None,
    ) -> None:
        import diffusers

        if is_of_hub(path):
            try:
                path = diffusers.DiffusionPipeline.download(path)
            except (OSError, ValueError) as error:
                raise TrainingError(f"{path}: {error}") from error
        self.pipe: Any = load_pipeline(path, prediction_type=prediction_type)
        self.pipe.set_progress_bar_config(disable=True)
        self.path = path
        self.xl = type(self.pipe).__name__ == "StableDiffusionXLPipeline"
        self.unet: Any = self.pipe.unet
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise TrainingError(
                f"prediction_type {self.scheduler.config.prediction_type} is unknown"
            )
        self.device, self.dtype = device, dtype
        for module in (*self.encoders(), self.unet):  # its own config may ask for half precision
            # diffusers' own to() warns of modules that are none
            nn.Module.to(module.requires_grad_(False).eval(), device, dtype)
        # float32 in any case: SDXL's overflows in half
        nn.Module.to(self.pipe.vae.requires_grad_(False).eval(), device, torch.float32)
        self.pipe.vae.enable_slicing()  # an image at a time is enough for a GPU, and less memory
        self.vae_scale = int(self.pipe.vae_scale_factor)
        self.resolution = int(self.unet.config.sample_size * self.vae_scale)

    def encoders(self) -> list[Any]:
        models = (self.pipe.text_encoder, getattr(self.pipe, "text_encoder_2", None))
        return [model for model in models if model is not None]

    def restore_lora(self) -> None:
        """The LoRA that is being trained acts, if there is one, and no other."""
        adapters = getattr(self.unet, "peft_config", {})
        if "default" in adapters:
            self.unet.set_adapters(["default"])
            self.unet.enable_adapters()
        elif adapters:
            self.unet.disable_adapters()

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        if getattr(self.unet, "peft_config", {}):
            self.unet.disable_adapters()
        try:
            yield
        finally:
            self.restore_lora()

    def place_encoders(self, device: torch.device | str) -> None:
        """Autoencoder and text encoders: on the CPU while what they make is cached."""
        for module in (*self.encoders(), self.pipe.vae):
            module.to(device)

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Context [B, C, d] and SDXL's pooled feature [B, p] (else [B, 0]) of every caption.

        The empty caption gives what the pipeline's unconditional pass uses by default.
        """
        encoded = self.pipe.encode_prompt(
            captions,
            device=self.encoders()[0].device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        context = encoded[0]
        pooled = encoded[2] if self.xl else context.new_zeros(len(captions), 0)
        if self.xl and self.pipe.config.force_zeros_for_empty_prompt:
            keep = torch.tensor([caption != "" for caption in captions], device=context.device)
            context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        return context, pooled

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the latents, stacked over channels."""
        pixels = pixels.to(self.pipe.vae.device)
        return self.pipe.vae.encode(pixels).latent_dist.parameters  # type: ignore[no-any-return]

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return (mean + deviation * noise) * self.pipe.vae.config.scaling_factor  # type: ignore[no-any-return]

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """In f32, as the autoencoder is: not to be called under autocast."""
        scaled = latents.float() / self.pipe.vae.config.scaling_factor
        pixels = self.pipe.vae.decode(scaled.to(self.pipe.vae.device)).sample
        return self.pipe.image_processor.postprocess(pixels)  # type: ignore[no-any-return]

    def conditions(self, pooled: Tensor, sizes: Tensor) -> dict[str, Tensor] | None:
        """SDXL's extra conditions: pooled text, and sizes [B, 6] (original, crop, target)."""
        return {"text_embeds": pooled, "time_ids": sizes.to(pooled)} if self.xl else None

    def fingerprint(self, unet: bool = False) -> str:
        """Of the files that make latents and text features (and pictures, with `unet`), wherever
        they lie: what a cache of those belongs to."""
        digest = hashlib.sha256(str(self.dtype).encode())
        path = Path(self.path)
        parts: tuple[str, ...] = (
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
        )
        parts += ("unet", "scheduler") if unet else ()
        files = [path] if path.is_file() else sorted(f for p in parts for f in (path / p).glob("*"))
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as opened:
                for place in range(WINDOWS):
                    opened.seek(max(0, size - WINDOW) * place // (WINDOWS - 1))
                    digest.update(opened.read(WINDOW))
        return digest.hexdigest()[:16]
