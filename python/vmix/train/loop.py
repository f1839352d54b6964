"""Train a VMix adapter: `accelerate launch -m vmix.train …` or `python -m vmix.train …`.

The base pipeline is frozen. Trained are the projection of AesEmb (paper, eq. 6), one value matrix
per cross-attention layer (eq. 7) and, with `--rank`, a LoRA that inference does not need. The
zero-initialised linear of the projection makes step 0 the base model, bit for bit.
docs/training.md describes data and options.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from vmix import Adapter, VMixError, init_adapter, read_label_list
from vmix.train.base import Base
from vmix.train.data import (
    Batches,
    Example,
    Pixels,
    TrainingError,
    complain,
    generator,
    read_examples,
)
from vmix.train.export import DTYPES, save_lora, trained_adapter
from vmix.train.model import Denoiser, ValueBranch, add_lora

UNCONDITIONAL = ("cond", "both", "contrast")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("vmix.train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    switch = partial(add, action="store_true")
    add("--pretrained_model_name_or_path", required=True, help="Pipeline in diffusers' layout.")
    add("--train_data_dir", type=Path, required=True, help="Images and metadata.jsonl.")
    add("--labels", type=Path, help="TOML file with one [[label]] table per label.")
    add("--output_dir", type=Path, required=True)
    add("--name", default="vmix", help="The adapter is written to <output_dir>/<name>.safetensors.")
    for key in ("title", "author", "license", "description"):
        add(f"--{key}", help=f"modelspec.{key} of the adapter.")
    add("--dtype", choices=DTYPES, default="f16", help="Of the files that are written.")
    add("--resolution", type=int, help="The U-Net's own unless given.")
    add("--train_batch_size", type=int, default=256, help="Images per process and step.")
    add("--gradient_accumulation_steps", type=int, default=1)
    switch("--gradient_checkpointing")
    add("--max_train_steps", type=int, default=50_000)
    add("--learning_rate", type=float, help="1e-4, for SDXL 1e-5, unless given.")
    add("--lora_learning_rate", type=float, help="The learning rate unless given.")
    add("--lr_scheduler", default="constant")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="accelerate's unless given.")
    add("--checkpointing_steps", type=int, default=500)
    add("--resume_from_checkpoint", help='A checkpoint folder, or "latest".')
    add("--report_to", help="accelerate tracker, such as tensorboard.")
    add("--dataloader_num_workers", type=int, default=0)
    switch("--cache_latents", help="Keep latents and text features of small sets in memory.")
    add("--rank", type=int, default=0, help="Of the LoRA beside the adapter; 0 for none.")
    switch("--train_vmix", default=True)
    add("--no_vmix", dest="train_vmix", action="store_false", help="Train the LoRA only.")
    add("--text_dropout", type=float, default=0.1, help="Share of captions dropped for guidance.")
    add(
        "--apply_to",
        choices=UNCONDITIONAL,
        default="cond",
        help="What the unconditional pass will see. With cond, a dropped caption drops the values; "
        "with both and contrast, its image keeps its labels.",
    )
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    problems = []
    if not args.train_vmix and not args.rank:
        problems.append("--no_vmix needs --rank: there would be nothing to train")
    if args.train_vmix and args.labels is None:
        problems.append("--labels is missing")
    if not 0 <= args.text_dropout < 1:
        problems.append(f"--text_dropout {args.text_dropout} is not a share below 1")
    for key in (
        *("train_batch_size", "gradient_accumulation_steps"),
        *("max_train_steps", "checkpointing_steps"),
    ):
        if getattr(args, key) < 1:
            problems.append(f"--{key} {getattr(args, key)} is not positive")
    if args.rank < 0:
        problems.append(f"--rank {args.rank} is negative")
    if args.resolution is not None and args.resolution < 1:
        problems.append(f"--resolution {args.resolution} is not positive")
    if Path(args.name).name != args.name:
        problems.append(f"--name {args.name} is not a file's name; --output_dir is for folders")
    complain("arguments", problems)


class Inputs:
    """What the U-Net is given for an example: computed as needed, or once and kept in memory."""

    def __init__(
        self, base: Base, examples: Sequence[Example], resolution: int, aes_emb: Tensor
    ) -> None:
        self.base, self.examples = base, examples
        self.resolution, self.aes_emb = resolution, aes_emb
        self.weights = torch.tensor([example.weights for example in examples])
        self.empty = base.text([""])
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: Tensor | None = None

    def keep(self, pixels: Pixels, bar: Any) -> None:
        captions = sorted({example.caption for example in self.examples})
        for start in bar(range(0, len(captions), 64), desc="Captions"):
            part = captions[start : start + 64]
            self.texts.update(zip(part, zip(*self.base.text(part), strict=True), strict=True))
        loader = bar(torch.utils.data.DataLoader(pixels, batch_size=64), desc="Latents")
        self.kept = torch.cat([self.base.moments(images).cpu() for _, images in loader])

    def moments(self, indices: Tensor, pixels: Tensor) -> Tensor:
        if self.kept is not None:
            return self.kept[indices].to(self.base.device)
        return self.base.moments(pixels)

    def text(self, indices: Sequence[int], dropped: Tensor) -> tuple[Tensor, Tensor]:
        captions = [self.examples[i].caption for i in indices]
        if self.texts:
            pairs = [self.texts[caption] for caption in captions]
            context, pooled = (torch.stack(part) for part in zip(*pairs, strict=True))
        else:
            context, pooled = self.base.text(captions)
        drop = dropped.to(context.device)
        return (
            torch.where(drop[:, None, None], self.empty[0], context),
            torch.where(drop[:, None], self.empty[1], pooled),
        )

    def labels(self, indices: Tensor) -> Tensor:
        """Label features f_t [B, N, d]: each label's positive or its negative (eq. 4)."""
        weights = self.weights[indices].to(self.aes_emb)[:, :, None]
        negative, positive = self.aes_emb[:, 1], self.aes_emb[:, 0]
        return negative + weights * (positive - negative)


def denoising_loss(
    base: Base,
    model: nn.Module,
    inputs: Inputs,
    batch: tuple[Tensor, Tensor],
    random: torch.Generator,
    args: argparse.Namespace,
) -> Tensor:
    """The base's own training loss on one batch; `random` decides everything that is drawn."""
    indices, images = batch
    count, scheduler = len(indices), base.scheduler
    dropped = torch.rand(count, generator=random) < args.text_dropout
    moments = inputs.moments(indices, images)
    shape = (count, moments.shape[1] // 2, *moments.shape[2:])
    latents = base.latents(moments, torch.randn(shape, generator=random).to(moments))
    noise = torch.randn(shape, generator=random).to(latents)
    # One timestep from each 1/count of the range: uniform as ever, with less variance of the loss.
    places = (torch.arange(count) + torch.rand(count, generator=random)) / count
    last = scheduler.config.num_train_timesteps - 1
    timesteps = (places * (last + 1)).long().clamp(max=last).to(base.device)  # 1 - 2⁻²⁴ rounds up
    context, pooled = inputs.text(indices.tolist(), dropped)
    mixed = ~dropped if args.apply_to == "cond" else torch.ones_like(dropped)
    prediction: Tensor = model(
        scheduler.add_noise(latents, noise, timesteps).to(base.dtype),
        timesteps,
        context,
        inputs.labels(indices),
        mixed.to(base.device, torch.float32),
        base.conditions(pooled, inputs.resolution),
    )
    target: Tensor = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(prediction.float(), target.float())


class Indices(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """Stands in for `Pixels` when the latents are kept in memory."""

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.empty(0)


def train(args: argparse.Namespace) -> None:
    """Run the training that the arguments describe and write its files."""
    check_args(args)
    labels = read_label_list(args.labels) if args.train_vmix else []
    examples = read_examples(args.train_data_dir, [label.name for label in labels])
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise TrainingError(f"--output_dir {args.output_dir} is not a folder")
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / "logs")),
    )
    set_seed(args.seed)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    base = Base(
        args.pretrained_model_name_or_path,
        accelerator.device,
        half.get(accelerator.mixed_precision, torch.float32),
    )
    resolution = args.resolution or base.unet.config.sample_size * base.pipe.vae_scale_factor
    rate = args.learning_rate or (1e-5 if base.xl else 1e-4)
    bar = partial(tqdm, disable=not accelerator.is_local_main_process, leave=False)

    branch = None
    if args.train_vmix:
        untrained = init_adapter(base.folder, args.labels, dtype="float32", seed=args.seed)
        branch = ValueBranch(untrained).to(accelerator.device)
    if args.rank:
        add_lora(base.unet, args.rank)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()

    denoiser = Denoiser(base.unet, branch)
    groups = [
        {"params": list(branch.parameters()) if branch else [], "lr": rate},
        {
            "params": [p for p in base.unet.parameters() if p.requires_grad],
            "lr": args.lora_learning_rate or rate,
        },
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    from diffusers.optimization import get_scheduler

    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    model, optimizer, schedule = accelerator.prepare(denoiser, optimizer, schedule)
    keep_only_trained(accelerator, denoiser)
    done = resume(accelerator, args)

    inputs = Inputs(base, examples, resolution, branch.aes_emb if branch else torch.zeros(0, 2, 1))
    pixels = Pixels(examples, resolution)
    if args.cache_latents:
        inputs.keep(pixels, bar)
    accumulation = args.gradient_accumulation_steps
    world, rank = accelerator.num_processes, accelerator.process_index
    batch_size = args.train_batch_size * accumulation * world
    if branch is not None:  # what the file's writer refuses, it refuses now and not after days
        make_adapter(args, base, branch, inputs, rate, batch_size)
    loader = torch.utils.data.DataLoader(
        Indices() if args.cache_latents else pixels,
        batch_sampler=Batches(
            len(examples), args.train_batch_size, args.seed, done * accumulation, rank, world
        ),
        num_workers=0 if args.cache_latents else args.dataloader_num_workers,
    )
    if args.report_to:
        accelerator.init_trackers("vmix")

    progress = tqdm(
        total=args.max_train_steps,
        initial=done,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    average = math.nan
    for micro, batch in enumerate(loader, done * accumulation):
        if done >= args.max_train_steps:
            break
        with accelerator.accumulate(model):
            random = generator(args.seed, 1, micro, rank)
            loss = denoising_loss(base, model, inputs, batch, random, args)
            if not torch.isfinite(loss):
                raise TrainingError(f"step {done}: the loss is {loss.item()}")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(list(denoiser.trained().values()), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
            progress.update()
            progress.set_postfix(loss=f"{average:.4f}", lr=f"{schedule.get_last_lr()[0]:.1e}")
            accelerator.log({"train_loss": loss.item(), "lr": schedule.get_last_lr()[0]}, step=done)
            if done % args.checkpointing_steps == 0 and done < args.max_train_steps:
                save_checkpoint(accelerator, args.output_dir / f"checkpoint-{done}")
    progress.close()
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if branch is not None:
            adapter = make_adapter(args, base, branch, inputs, rate, batch_size)
            adapter.save(args.output_dir / f"{args.name}.safetensors")
        if args.rank:
            save_lora(base, args.output_dir, DTYPES[args.dtype])
    accelerator.end_training()


def make_adapter(
    args: argparse.Namespace,
    base: Base,
    branch: ValueBranch,
    inputs: Inputs,
    rate: float,
    batch_size: int,
) -> Adapter:
    """The adapter as it is now."""
    trained = {
        "objective": "denoising",
        "prediction_type": base.scheduler.config.prediction_type,
        "steps": args.max_train_steps,
        "batch_size": batch_size,
        "learning_rate": rate,
        "resolution": inputs.resolution,
        "images": len(inputs.examples),
        "text_dropout": args.text_dropout,
        "lora_rank": args.rank,
        "seed": args.seed,
    }
    spec = {key: getattr(args, key) for key in ("title", "author", "license", "description")}
    spec["title"] = spec["title"] or args.name
    return trained_adapter(branch, DTYPES[args.dtype], args.apply_to, trained, spec)


def keep_only_trained(accelerator: Accelerator, denoiser: Denoiser) -> None:
    """Make checkpoints hold what is trained, not the frozen base."""

    def save(_models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            tensors = {
                name: p.detach().cpu().contiguous() for name, p in denoiser.trained().items()
            }
            save_file(tensors, Path(folder) / "trained.safetensors")

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        tensors = load_file(Path(folder) / "trained.safetensors")
        trained = denoiser.trained()
        shapes = ({name: t.shape for name, t in part.items()} for part in (tensors, trained))
        if next(shapes) != next(shapes):
            raise TrainingError(f"{folder}: made with other settings (labels, rank or base model)")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Written under another name first, so that "latest" never finds half of one."""
    part = folder.with_suffix(".part")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        part.replace(folder)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Load the checkpoint that was asked for; the number of steps that are already done."""
    if not args.resume_from_checkpoint:
        return 0
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        found = sorted(filter(step_of, args.output_dir.glob("checkpoint-*")), key=step_of)
        if not found:
            accelerator.print(f"no checkpoint in {args.output_dir}, starting at step 0")
            return 0
        folder = found[-1]
    if not folder.is_dir() or not step_of(folder):
        raise TrainingError(f"no checkpoint, which is a folder checkpoint-<step>: {folder}")
    accelerator.load_state(str(folder))
    return step_of(folder)


def step_of(checkpoint: Path) -> int:
    """The N of `checkpoint-N`; 0 for other names."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else 0


def main(argv: Sequence[str] | None = None) -> None:
    try:
        train(parse_args(argv))
    except (TrainingError, VMixError) as error:
        raise SystemExit(f"vmix.train: {error}") from None


if __name__ == "__main__":
    main()
