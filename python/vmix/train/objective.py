"""What all objectives have in common: what chance gives an example, noise, and the loss."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vmix.train.base import Base
from vmix.train.order import Order, generator

Batch = dict[str, Any]


class Objective(Protocol):
    """What the loop asks: examples in an order, and the loss of a batch of them."""

    order: Order

    def prepare(self, bar: Any, rank: int, world: int, together: Any) -> None:
        """Whatever has to be computed before the first step. `together()` waits for the others."""

    def dataset(self) -> torch.utils.data.Dataset[Batch]: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...
    def record(self) -> dict[str, Any]:
        """What the file's `vmix.made` says of it."""

    def contents(self) -> str:
        """Of the data, in a few words that differ where these do."""


@dataclass(frozen=True)
class Chances:
    """What is drawn for a batch, a function of the seed and each example's number alone."""

    drop: Tensor
    """[B] in 0..1, against the share of captions to drop."""
    label_drop: Tensor
    """[B, N] in 0..1."""
    timesteps: Tensor
    latent_noise: Tensor
    noise: Tensor

    @classmethod
    def of(
        cls,
        numbers: Sequence[int],
        seed: int,
        shape: Sequence[int],
        labels: int,
        step: int,
        last: int,
    ) -> Chances:
        """`step` examples make one step of the optimizer; timesteps are at most `last`."""
        rows = []
        for number in numbers:
            random = generator(seed, 1, number)
            single = torch.rand(2 + labels, generator=random)
            rows.append((single, *torch.randn(2, *shape, generator=random)))
        single, latent_noise, noise = (torch.stack(part) for part in zip(*rows, strict=True))
        # One timestep from each 1/step of the range: uniform as ever, with less variance.
        places = (torch.tensor([n % step for n in numbers]) + single[:, 1]) / step
        timesteps = (places * (last + 1)).long().clamp(max=last)  # 1 - 2⁻²⁴ may round up to 1
        return cls(single[:, 0], single[:, 2:], timesteps, latent_noise, noise)


def step_size(args: argparse.Namespace, world: int) -> int:
    """Examples in one step of the optimizer."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * world)


def weighted_loss(
    base: Base, prediction: Tensor, target: Tensor, timesteps: Tensor, gamma: float | None
) -> Tensor:
    """Mean squared error, by Min-SNR (Hang et al. 2023) where γ is given."""
    losses = (prediction.float() - target.float()).square().flatten(1).mean(1)
    if gamma is not None:
        signal = base.scheduler.alphas_cumprod.to(losses)[timesteps]
        snr = signal / (1 - signal)
        divisor = snr + 1 if base.scheduler.config.prediction_type == "v_prediction" else snr
        losses = losses * snr.clamp(max=gamma) / divisor.clamp(min=1e-8)
    return losses.mean()


def target_of(base: Base, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    if base.scheduler.config.prediction_type == "v_prediction":
        return base.scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]
    return noise


def collate(items: Iterable[Batch]) -> Batch:
    rows = list(items)
    return {
        key: torch.stack([row[key] for row in rows])
        if isinstance(rows[0][key], Tensor)
        else [row[key] for row in rows]
        for key in rows[0]
    }


def leave_signals(_worker: int = 0) -> None:
    """For workers: Ctrl-C reaches them too, but whether to stop is the process's own to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers(loader: Any) -> None:
    """Of a loader's iterator, however its use ends: they leave SIGTERM, which else ends them."""
    shutdown = getattr(loader, "_shutdown_workers", None)  # there is no public name for it
    if shutdown is not None:
        shutdown()
