"""The base model: a Stable-Diffusion U-Net and its text encoder, trained together on latents."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from tqdm import tqdm
from transformers import CLIPTokenizer
from vae import LATENT_CHANNELS

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

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = new_unet()
        self.text_encoder = new_text_encoder(tokenizer)

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


def _half_step(base: Base, noisy: Tensor, target: Tensor, steps: Tensor, words: Tensor) -> float:
    """Forward and backward on half a batch; gradients are left in the replica."""
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    loss = F.mse_loss(base(noisy, steps, words), target)
    (loss / 2).backward()
    return loss.item()


def load_average(checkpoint: Path, tokenizer: CLIPTokenizer) -> Base:
    """The averaged weights of a finished or running training."""
    base = Base(tokenizer)
    base.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    return base.eval().requires_grad_(False)


def train_base(
    latents: Tensor,
    ids: Tensor,
    tokenizer: CLIPTokenizer,
    minutes: float,
    checkpoint: Path,
    *,
    lr: float = 1e-3,
    batch: int = 48,
    decay: float = 0.998,
    seed: int = 0,
    preview: Callable[[Base, int], None] | None = None,
    preview_minutes: float = 10,
) -> Base:
    """Train for a fixed time; the learning rate follows the share of it that has passed.

    A checkpoint is written every two minutes and picked up again, random state included.
    """
    torch.manual_seed(seed)
    base = Base(tokenizer).to(memory_format=torch.channels_last)
    average = copy.deepcopy(base).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    spent, step = 0.0, 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        base.load_state_dict(state["base"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        spent, step = state["spent"], state["step"]
    base.train()
    # Two threads with half a batch each and weights in common: on shared cores this is faster
    # than two threads inside every operation, which wait for each other hundreds of times a step.
    replicas = [base, copy.deepcopy(base)]
    for parameter, other in zip(base.parameters(), replicas[1].parameters(), strict=True):
        other.data = parameter.data
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    own: list[Tensor] = list(base.parameters())
    mean: list[Tensor] = list(average.parameters())
    signal, noise_level = _noise_levels(new_scheduler())
    empty = tokenize(tokenizer, [""])
    total, saved, shown = minutes * 60, spent, spent
    smooth = 1.0
    bar = tqdm(total=round(total), initial=round(spent), desc="base model", unit="s")
    last = time.monotonic()
    while spent < total:
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * spent / total))
        rows = torch.randint(len(latents), (batch,))
        clean, words = latents[rows], ids[rows]
        words = torch.where(torch.rand(batch, 1) < _CAPTION_DROP, empty, words)
        # One noise level from each 1/batch of the range (less variance than independent draws),
        # more often a high one: there the words decide what is drawn.
        steps = (((torch.arange(batch) + torch.rand(batch)) / batch).sqrt() * len(signal)).long()
        steps = steps.clamp(max=len(signal) - 1)
        a, b = signal[steps, None, None, None], noise_level[steps, None, None, None]
        noise = torch.randn_like(clean)
        jobs = zip(
            replicas,
            (a * clean + b * noise).chunk(2),
            (a * noise - b * clean).chunk(2),
            steps.chunk(2),
            words.chunk(2),
            strict=True,
        )
        loss = sum(pool.map(lambda job: _half_step(*job), jobs)) / 2
        for parameter, other in zip(own, replicas[1].parameters(), strict=True):
            if parameter.grad is not None and other.grad is not None:
                parameter.grad.add_(other.grad)
            other.grad = None
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(mean, own, 1 - min(decay, (1 + step) / (10 + step)))
        step += 1
        smooth += (loss - smooth) * max(0.01, 1 / step)
        now = time.monotonic()
        spent, last = spent + now - last, now
        bar.update(round(spent) - bar.n)
        if step % 50 == 0:
            bar.set_postfix(step=step, loss=f"{smooth:.4f}", samples=step * batch)
        if spent - saved > 120 or spent >= total:
            saved = spent
            torch.save(
                {"base": base.state_dict(), "average": average.state_dict(),
                 "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                 "spent": spent, "step": step},
                checkpoint.with_suffix(".tmp"),
            )  # fmt: skip
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if preview is not None and spent - shown > preview_minutes * 60:
            shown = spent
            with torch.random.fork_rng():
                preview(average, step)
    bar.close()
    return average
