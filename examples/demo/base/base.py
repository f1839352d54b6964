"""The base model: a Stable-Diffusion U-Net and its text encoder, trained together on latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from text import CONTEXT, WIDTH, new_text_encoder
from torch import Tensor, nn
from training import train
from transformers import CLIPTextModel, CLIPTokenizer
from vae import LATENT_CHANNELS
from vmix.loading import load_model

_CAPTION_DROP = 0.1
PROMPTS: tuple[str, ...] = (
    "a red apple", "a green apple", "a blue car", "a red car", "yellow banana", "a brown dog",
    "an orange cat", "a red heart", "a purple heart", "a yellow star", "a green tree",
    "a blue fish", "an orange house", "a pink butterfly", "a red umbrella", "a blue rocket",
)  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """SD1.5's topology with two levels; every setting not named here is SD1.5's own."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, as in SD1.5's own configuration
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,  # as in SD1.5; without effect on trailing spacing
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer(
        texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


class Base(nn.Module):
    """The two trained models as one module, so that one optimizer and one EMA cover both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    @classmethod
    def new(cls, tokenizer: CLIPTokenizer) -> Base:
        return cls(new_unet(), new_text_encoder(tokenizer))

    @classmethod
    def open(cls, model: Path) -> Base:
        """A model to go on from, in f32."""
        unet = load_model(UNet2DConditionModel, model / "unet")
        encoder = load_model(CLIPTextModel, model / "text_encoder")
        return cls(unet, encoder)

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        context = self.text_encoder(ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, steps, context, return_dict=False)[0]
        return prediction


def pipeline(base: Base, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=tokenizer,
        unet=base.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sheet(pipe: StableDiffusionPipeline, path: Path, *, scale: float = 3.0, seed: int = 0) -> None:
    """Sixteen prompts side by side, twice as large as drawn."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        list(PROMPTS),
        num_inference_steps=25,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(seed),
    ).images
    canvas = Image.new("RGB", (8 * 132, 2 * 132), "white")
    for index, image in enumerate(images):
        position = (index % 8 * 132 + 2, index // 8 * 132 + 2)
        canvas.paste(image.resize((128, 128), Image.Resampling.NEAREST), position)
    canvas.save(path)


def _noise_levels(scheduler: DDIMScheduler) -> tuple[Tensor, Tensor]:
    cumulative: Tensor = scheduler.alphas_cumprod
    return cumulative.sqrt(), (1 - cumulative).sqrt()


def train_base(
    base: Base,
    latents: Tensor,
    ids: Tensor,
    tokenizer: CLIPTokenizer,
    steps: int,
    checkpoint: Path,
    *,
    batch: int = 64,
    seed: int = 0,
    show: Callable[[Base, int], str | None] | None = None,
) -> Base:
    """Train on latents [N,16,8,8] and token ids [N,32] of their captions; v-prediction."""
    torch.manual_seed(seed)
    signal, noise_level = _noise_levels(new_scheduler())
    empty = tokenize(tokenizer, [""])

    def draw() -> tuple[Tensor, ...]:
        rows = torch.randint(len(latents), (batch,))
        clean, words = latents[rows], ids[rows]
        words = torch.where(torch.rand(batch, 1) < _CAPTION_DROP, empty, words)
        # One noise level from each 1/batch of the range (less variance than independent draws),
        # more often a high one: there the words decide what is drawn.
        times = (((torch.arange(batch) + torch.rand(batch)) / batch).sqrt() * len(signal)).long()
        # In any order, so that both threads get all levels.
        times = times.clamp(max=len(signal) - 1)[torch.randperm(batch)]
        a, b = signal[times, None, None, None], noise_level[times, None, None, None]
        noise = torch.randn_like(clean)
        return a * clean + b * noise, a * noise - b * clean, times, words

    def loss(base: nn.Module, noisy: Tensor, target: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return F.mse_loss(base(noisy, times, ids), target)

    return train(
        base.to(memory_format=torch.channels_last), loss, draw, checkpoint,
        steps=steps, lr=1e-3, fall=0.5, decay=0.999, name="base model", show=show,
    )  # fmt: skip
