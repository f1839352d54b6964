"""The paper's objective: denoise images, knowing their captions and labels (eq. 1)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vmix.dataset import Example
from vmix.train.base import Base
from vmix.train.cache import PART, Store, in_parts, key_of, store_texts
from vmix.train.data import UNKNOWN, Size, Usable, buckets, nearest_bucket, to_pixels
from vmix.train.errors import TrainingError, sentence
from vmix.train.objective import (
    Batch,
    Chances,
    end_workers,
    leave_signals,
    step_size,
    target_of,
    weighted_loss,
)
from vmix.train.order import Order


class Denoising:
    """Latents and captions of images, encoded as they come or kept on disk."""

    def __init__(
        self, base: Base, images: Sequence[Usable], args: argparse.Namespace, world: int
    ) -> None:
        self.base, self.images, self.args = base, images, args
        side = args.resolution or base.resolution
        if side % base.vae_scale:
            raise TrainingError(f"--resolution {side} is not a multiple of {base.vae_scale}")
        self.shapes: list[Size] = [(side, side)] * len(images)
        if args.aspect_ratio_buckets:
            if args.bucket_step % base.vae_scale:
                raise TrainingError(
                    f"--bucket_step {args.bucket_step} is not a multiple of {base.vae_scale}"
                )
            shapes = buckets(side, args.bucket_step)
            self.shapes = [nearest_bucket(image.size, shapes) for image in images]
        self.weights = torch.tensor([image.weights for image in images])
        sharded = any(image.example.size is not None for image in images)
        self.order = Order(
            self.shapes,
            args.train_batch_size * world,
            args.seed,
            [image.example.file for image in images] if sharded else None,
            args.shuffle_window,
        )
        self.step = step_size(args, world)
        self.latents: Store | None = None
        self.texts: Store | None = None
        self.keys: list[str] = []
        """Of the images in `latents`."""
        if not args.cache_latents:
            self.empty = base.text([""])

    def prepare(self, bar: Any, rank: int, world: int, together: Any) -> None:
        if not self.args.cache_latents:
            return
        folder = self.args.cache_dir / self.base.fingerprint()
        self.texts, self.latents = Store(folder / "texts"), Store(folder / "latents")
        captions = ["", *(image.caption for image in self.images)]
        store_texts(self.base, self.texts, captions, bar, rank, world)
        self.keys = [self._key(index) for index in range(len(self.images))]
        own = range(rank, len(self.keys), world)  # whatever the others have written by now
        todo = [index for index in own if self.keys[index] not in self.latents]
        for part in bar(in_parts(todo, PART), desc="Latents"):
            entries: dict[str, dict[str, Tensor]] = {}
            images = torch.utils.data.DataLoader(
                _Pixels([(i, self.images[i].example, self.shapes[i]) for i in part]),
                None,
                num_workers=self.args.dataloader_num_workers,
                worker_init_fn=leave_signals,
            )
            loader = iter(images)
            try:
                for index, pixels, sizes in loader:
                    moments = self.base.moments(pixels[None])[0]
                    entries[self.keys[index]] = {"moments": moments, "sizes": sizes}
            except (TrainingError, RuntimeError) as error:
                raise TrainingError(f"--cache_latents: {sentence(error)}") from error
            finally:
                end_workers(loader)
            self.latents.put(entries)
        together()
        self.texts.refresh()
        self.latents.refresh()
        empty = self.texts[key_of("")]
        self.empty = empty["context"][None], empty["pooled"][None]
        self.base.place_encoders("cpu")

    def _key(self, index: int) -> str:
        example = self.images[index].example
        stat = example.file.stat()
        return key_of(
            example.key, example.offset, stat.st_size, stat.st_mtime_ns, self.shapes[index]
        )

    def dataset(self) -> torch.utils.data.Dataset[Batch]:
        return _Images(self.images, self.shapes, self.keys, self.latents, self.texts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The base's own training loss on one batch."""
        base, args = self.base, self.args
        if "moments" in batch:
            moments = batch["moments"].to(base.device)
            context, pooled = (batch[k].to(base.device) for k in ("context", "pooled"))
        else:
            moments = base.moments(batch["pixels"])
            context, pooled = base.text(batch["caption"])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        last = base.scheduler.config.num_train_timesteps - 1
        weights = self.weights[batch["index"]]
        chances = Chances.of(batch["number"], args.seed, shape, weights.shape[1], self.step, last)
        latents = base.latents(moments, chances.latent_noise.to(moments))
        noise, timesteps = chances.noise.to(latents), chances.timesteps.to(base.device)
        dropped = (chances.drop < args.text_dropout).to(base.device)
        context = torch.where(dropped[:, None, None], self.empty[0].to(context), context)
        pooled = torch.where(dropped[:, None], self.empty[1].to(pooled), pooled)
        weights = torch.where(chances.label_drop < args.label_dropout, UNKNOWN, weights)
        mixed = ~dropped if args.apply_to == "cond" else torch.ones_like(dropped)
        prediction: Tensor = model(
            base.scheduler.add_noise(latents, noise, timesteps).to(base.dtype),
            timesteps,
            context,
            weights.to(base.device),
            mixed,
            base.conditions(pooled, batch["sizes"]),
        )
        target = target_of(base, latents, noise, timesteps)
        return weighted_loss(base, prediction, target, timesteps, args.snr_gamma)

    def contents(self) -> str:
        named = (f"{i.example.key} {i.caption} {i.weights}" for i in self.images)
        return f"{len(self.images)} images ({key_of(*named)[:8]})"

    def record(self) -> dict[str, Any]:
        return {
            "objective": "denoising",
            "images": len(self.images),
            "resolution": self.args.resolution or self.base.resolution,
            "aspect_ratio_buckets": self.args.aspect_ratio_buckets,
            "text_dropout": self.args.text_dropout,
            "label_dropout": self.args.label_dropout,
            "missing_labels": self.args.missing_labels,
        }


@dataclass(frozen=True)
class _Images(torch.utils.data.Dataset[Batch]):
    """What workers make of images. It knows no models, since it may be sent to them."""

    images: Sequence[Usable]
    shapes: Sequence[Size]
    keys: Sequence[str]
    latents: Store | None
    texts: Store | None

    def __getitem__(self, place: Any) -> Batch:
        number, index = place
        image = self.images[index]
        item: Batch = {"number": number, "index": index, "caption": image.caption}
        if self.latents is not None and self.texts is not None:
            return item | self.latents[self.keys[index]] | self.texts[key_of(image.caption)]
        pixels, sizes = to_pixels(image.example, self.shapes[index])
        return item | {"pixels": pixels, "sizes": sizes}


@dataclass(frozen=True)
class _Pixels(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
    """Images by index, for the cache."""

    images: Sequence[tuple[int, Example, Size]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[int, Tensor, Tensor]:
        index, example, shape = self.images[place]
        return (index, *to_pixels(example, shape))
