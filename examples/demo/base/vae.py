"""The small autoencoder: 64x64 pixels to 8x8 latents of 16 channels, a standard AutoencoderKL.

All levels have 64 channels, because GroupNorm has 32 groups: with one channel a group the last
normalisation would erase each picture's absolute colour. One residual block a level in the
decoder and none in the encoder keep 64 channels affordable on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm
from training import train

LATENT_CHANNELS = 16
_KL_WEIGHT = 1e-4


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 64),
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=64,
        scaling_factor=1.0,
    )
    _start_from_colour(vae)
    return vae


def _start_from_colour(vae: AutoencoderKL) -> None:
    """Begin as "average 8x8 pixels, interpolate back", so that training only has to add detail.

    From a random start the first thousands of steps learn brightness alone: colour is a small
    part of the error. Here channels 0, 2 and 4 carry red, green and blue from end to end. Each
    shares its normalisation group with a large constant, which keeps absolute values alive.
    """
    constant = 4.0
    lift = 1.76  # SiLU(2): colours pass the activations in its nearly linear range
    smooth = torch.tensor([0.25, 0.5, 0.25])
    average = torch.zeros(3, 3)
    average[:2, :2] = 0.25
    middle = torch.zeros(3, 3)
    middle[1, 1] = 1.0
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder

    def carry(conv: nn.Conv2d, kernel: Tensor, kernel_of_constant: Tensor) -> None:
        for colour in range(3):
            conv.weight[2 * colour : 2 * colour + 2] = 0
            conv.bias[2 * colour : 2 * colour + 2] = 0
            conv.weight[2 * colour, 2 * colour] = kernel
            conv.weight[2 * colour + 1, 2 * colour + 1] = kernel_of_constant

    def enter(conv: nn.Conv2d) -> None:
        for colour in range(3):
            conv.weight[2 * colour : 2 * colour + 2] = 0
            conv.bias[2 * colour] = 0
            conv.weight[2 * colour, colour] = middle
            conv.bias[2 * colour + 1] = constant

    def leave(norm: nn.GroupNorm, conv: nn.Conv2d) -> None:
        for colour in range(3):
            norm.weight[2 * colour] = constant / 2
            norm.bias[2 * colour] = constant / 2 + 2
            conv.weight[colour] *= 0.1
            conv.weight[colour, :6] = 0
            conv.weight[colour, 2 * colour] = middle
            conv.bias[colour] = -lift

    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".conv2." in name or ".to_out.0." in name:  # residual branches start silent
                parameter.zero_()
        enter(encoder.conv_in)
        for block in encoder.down_blocks[:-1]:
            carry(block.downsamplers[0].conv, average, average)
        leave(encoder.conv_norm_out, encoder.conv_out)
        encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1
        encoder.conv_out.bias[LATENT_CHANNELS:] = -6.0  # log-variance
        for conv in (vae.quant_conv, vae.post_quant_conv):
            assert conv is not None
            assert conv.bias is not None
            conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None])
            conv.bias.zero_()
        enter(decoder.conv_in)
        for block in decoder.up_blocks[:-1]:
            carry(block.upsamplers[0].conv, smooth[:, None] * smooth, middle)
        leave(decoder.conv_norm_out, decoder.conv_out)


def _loss(error: Tensor) -> Tensor:
    """L1 and squared error of the pixels and of two colour differences, L1 of the edges."""
    red, green, blue = error.unbind(1)
    chroma = torch.stack([red - green, blue - (red + green) / 2])
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (
        error.abs().mean() + error.square().mean() + edges
        + chroma.abs().mean() + 2 * chroma.square().mean()
    )  # fmt: skip


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B,3,H,W] to floats in -1..1."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Mean over pictures, of the clamped reconstruction in 0..1."""
    with torch.inference_mode():
        x = to_input(pixels)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((x - y) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


def _train_loss(vae: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.encode(x).latent_dist  # type: ignore[operator]
    latents = posterior.mean + posterior.std * noise
    error = vae.decode(latents).sample - x  # type: ignore[operator]
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return _loss(error) + _KL_WEIGHT * kl


def train_vae(
    vae: AutoencoderKL, pixels: Tensor, steps: int, checkpoint: Path, *, batch: int = 16,
    seed: int = 0,
) -> AutoencoderKL:  # fmt: skip
    """Train on all pictures but the last 64, on which it is tested."""
    torch.manual_seed(seed)
    held_out = pixels[-64:]
    side = pixels.shape[-1] // 8

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels) - 64, (batch,))
        return to_input(pixels[rows]), torch.randn(batch, LATENT_CHANNELS, side, side)

    return train(
        vae.to(memory_format=torch.channels_last), _train_loss, draw, checkpoint,
        steps=steps, lr=1e-3, fall=0.6, decay=0.995, name="autoencoder",
        show=lambda average, _: f"{psnr(average, held_out):.2f} dB", show_steps=200,
    )  # fmt: skip


def encode(vae: AutoencoderKL, pixels: Tensor, batch: int = 64) -> Tensor:
    """Posterior means [N,16,8,8] of uint8 pictures."""
    with torch.inference_mode():
        parts = [
            vae.encode(to_input(chunk)).latent_dist.mean.contiguous()
            for chunk in tqdm(pixels.split(batch), desc="latents", unit="batch")
        ]
    return torch.cat(parts)


def centre(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Move each latent channel's mean to zero inside the 1x1 convolutions, set the scale.

    Returns the latents as the diffusion model sees them: zero mean, unit variance.
    """
    mean = latents.mean((0, 2, 3))
    assert vae.quant_conv is not None
    assert vae.post_quant_conv is not None
    with torch.no_grad():
        vae.quant_conv.bias[:LATENT_CHANNELS] -= mean
        weight = vae.post_quant_conv.weight[:, :, 0, 0]
        vae.post_quant_conv.bias += weight @ mean
    centred = latents - mean[:, None, None]
    scale = 1 / float(centred.std())
    vae.register_to_config(scaling_factor=scale)
    return centred * scale
