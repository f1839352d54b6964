"""The run: set up, steps, checkpoints, pictures, and the files at its end.

The base pipeline is frozen. Trained are the projection of AesEmb (paper, eq. 6), one value matrix
per cross-attention layer (eq. 7) and a LoRA beside them that inference does not need. The
zero-initialised linear of the projection makes step 0 the base model, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from safetensors import SafetensorError
from tqdm.auto import tqdm

from vmix import Adapter, VMixError
from vmix.train import export, validation
from vmix.train.base import Base
from vmix.train.checkpoint import Checkpoints, refuse_earlier
from vmix.train.data import usable_images
from vmix.train.denoising import Denoising
from vmix.train.distribution import Zero, fit_plugins
from vmix.train.errors import (
    CheckpointError,
    DivergedError,
    OtherError,
    OutOfMemoryError,
    StoppedError,
    TrainingError,
    no_memory,
    sentence,
)
from vmix.train.labels import read_labels, untrained_adapter
from vmix.train.model import Denoiser, ValueBranch, add_lora, trained_parameters
from vmix.train.objective import Objective, collate, end_workers, leave_signals, step_size
from vmix.train.options import check_args, check_paths, parse_args, read_lines, settings
from vmix.train.order import OwnBatches

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
METRICS = "metrics.jsonl"
T = TypeVar("T")


class Run:
    """Everything that one training is made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_args(args)
        if not args.resume_from_checkpoint:
            refuse_earlier(args.output_dir)
        self.args = args
        self.prompts = list(args.validation_prompt or ())
        if args.validation_prompts:
            self.prompts += read_lines(args.validation_prompts, "--validation_prompts")
        tracker = tracker_of(args.report_to)
        try:
            self.accelerator = accelerator = Accelerator(
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                mixed_precision=args.mixed_precision,
                log_with=tracker,
                project_config=ProjectConfiguration(
                    str(args.output_dir), str(args.output_dir / "logs")
                ),
                # The others wait while one draws pictures, which may take long.
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
            )
        except ValueError as error:  # a precision the device has not, a tracker nobody knows
            raise TrainingError(str(error)) from error
        if tracker and not accelerator.log_with:
            raise TrainingError(f"--report_to {tracker}: its package is not installed")
        fit_plugins(accelerator, args)
        set_seed(args.seed)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.trouble: Exception | None = None
        """What ends the training as soon as all processes can be told."""
        self.bar = partial(tqdm, disable=not accelerator.is_local_main_process, leave=False)
        labels = [label.name for label in read_labels(args.labels)] if args.train_vmix else []
        check_paths(args)
        say = accelerator.print
        images = None
        if args.objective == "denoising":
            images = usable_images(
                args.train_data_dir,
                labels,
                missing=args.missing_labels,
                skip=args.skip_unusable,
                verify=args.verify_images,
                say=say,
            )
        half = HALF.get(accelerator.mixed_precision, torch.float32)
        self.base = base = Base(
            args.pretrained_model_name_or_path, accelerator.device, half, args.prediction_type
        )
        args.learning_rate = args.learning_rate or (1e-5 if base.xl else 1e-4)
        args.lora_learning_rate = args.lora_learning_rate or args.learning_rate
        self.branch: ValueBranch | None = None
        if args.train_vmix:
            untrained = untrained_adapter(base, args.labels)
            self.branch = ValueBranch(untrained, base.unet, args.seed).to(accelerator.device)
        self.objective: Objective
        if images is not None:
            self.objective = Denoising(base, images, args, self.world)
        else:
            from vmix.train.teachers import distillation

            assert self.branch is not None  # check_args
            self.objective = distillation(base, self.branch, args, self.world)
        if args.rank:
            add_lora(base.unet, args.rank)
        if args.full_finetune:
            base.unet.float().requires_grad_(True)
        if args.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        if self.branch is not None:  # what the file's writer refuses, now and not after days
            self.adapter(0)

        self.denoiser = denoiser = Denoiser(base.unet, self.branch)
        self.model, self.optimizer, self.schedule = accelerator.prepare(
            denoiser, *self._optimizer(denoiser)
        )
        if isinstance(self.model, torch.nn.parallel.DistributedDataParallel):
            # They never change: one collective less, which could wait for a process in trouble.
            self.model.broadcast_buffers = False
        self.fsdp = accelerator.distributed_type == DistributedType.FSDP
        if self.fsdp:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.model, "alone")
        self.average: Any = None
        if args.use_ema:
            from diffusers.training_utils import EMAModel

            own = trained_parameters(accelerator.unwrap_model(self.model)).values()
            self.average = EMAModel(own, decay=args.ema_decay)
        self.checkpoints = Checkpoints(
            accelerator, self.model, self.optimizer, self.schedule, self.average,
            args.output_dir, self._settings(), args.checkpoints_total_limit,
        )  # fmt: skip
        self.validation = validation.Validation(base, self.prompts, args) if self.prompts else None
        if self.validation is not None and args.full_finetune and args.resume_from_checkpoint:
            self._alone(self.validation.begin)  # before the checkpoint makes another base of it
        self.done = self.checkpoints.resume(args.resume_from_checkpoint)
        try:
            self.objective.prepare(self.bar, self.rank, self.world, self._agree)
        except OtherError:
            raise
        except (TrainingError, OSError, SafetensorError) as error:
            self._agree(error)
        self.picture: Path | None = None
        if tracker:
            accelerator.init_trackers("vmix")
        self.describe()

    def _optimizer(self, denoiser: Denoiser) -> tuple[Any, Any]:
        from diffusers.optimization import get_scheduler

        args = self.args
        rates = {"branch": args.learning_rate, "unet": args.lora_learning_rate}
        trained = trained_parameters(denoiser)
        groups = [
            {"params": [p for name, p in trained.items() if name.startswith(part)], "lr": rate}
            for part, rate in rates.items()
        ]
        make: Any = torch.optim.AdamW
        if args.use_8bit_adam:
            if find_spec("bitsandbytes") is None:
                raise TrainingError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes")
            make = import_module("bitsandbytes.optim").AdamW8bit
        try:
            optimizer = make(
                [group for group in groups if group["params"]],
                betas=(args.adam_beta1, args.adam_beta2),
                weight_decay=args.adam_weight_decay,
                eps=args.adam_epsilon,
            )
        except ValueError as error:
            raise TrainingError(f"the optimizer takes no such option: {error}") from error
        try:
            schedule = get_scheduler(
                args.lr_scheduler,
                optimizer,
                num_warmup_steps=args.lr_warmup_steps * self.world,
                num_training_steps=args.max_train_steps * self.world,
            )
        except ValueError as error:
            raise TrainingError(f"--lr_scheduler {args.lr_scheduler}: {error}") from error
        return optimizer, schedule

    def _settings(self) -> dict[str, Any]:
        """What checkpoints are compared by."""
        labels = None
        if self.branch is not None:
            listed = json.loads(self.branch.metadata["vmix.labels"])
            labels = [[label[key] for key in ("name", "positive", "negative")] for label in listed]
        return {
            **settings(self.args),
            "base": self.base.fingerprint(unet=True),
            "labels": labels,
            "data": self.objective.contents(),
            "examples a step": step_size(self.args, self.world),
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def describe(self) -> None:
        args = self.args
        count = sum(p.numel() for p in trained_parameters(self.denoiser).values())
        if self.done >= args.max_train_steps:
            self.accelerator.print(f"all {self.done} steps are done; the files are written again")
            return
        self.accelerator.print(
            f"training {count:,} parameters, {step_size(args, self.world)} examples a step on "
            f"{self.world} process{'es' * (self.world > 1)}, "
            f"{self.accelerator.mixed_precision} mixed precision, "
            f"steps {self.done} to {args.max_train_steps}"
        )

    # --- the steps -------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps. Whatever ends them early leaves a checkpoint of the last one."""
        args, accelerator = self.args, self.accelerator
        try:
            self._trim_metrics()
        except OSError as error:
            self.trouble = error
        self._agree(self.trouble)
        with asked_to_stop() as asked:
            try:
                self._steps(asked)
                self.checkpoints.save(self.done)
            except CheckpointError:
                raise
            except (TrainingError, StoppedError, OSError, SafetensorError) as error:
                # With others in the middle of a step, which waits for this process, none can.
                alone = self.world == 1 or not isinstance(error, OutOfMemoryError)
                if self.checkpoints.saved < self.done and alone:
                    self.checkpoints.save(self.done, doubtful=isinstance(error, DivergedError))
                newest = self.checkpoints.newest()
                where = f"; {newest} is where to resume" if newest else ""
                if isinstance(error, StoppedError):
                    raise StoppedError(f"{error}{where}", error.number) from error
                raise TrainingError(f"{error}{where}") from error
        self.finish()
        accelerator.end_training()
        accelerator.print(f"wrote {args.output_dir}")

    def _steps(self, asked: Sequence[int]) -> None:
        args, accelerator, accumulation = (
            self.args, self.accelerator, self.args.gradient_accumulation_steps,
        )  # fmt: skip
        batches = OwnBatches(self.objective.order, self.done * accumulation, self.rank, self.world)
        loader = iter(
            torch.utils.data.DataLoader(
                self.objective.dataset(),
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=args.dataloader_num_workers,
                worker_init_fn=leave_signals,
                pin_memory=accelerator.device.type == "cuda",
            )
        )
        progress = tqdm(
            total=args.max_train_steps,
            initial=self.done,
            desc="Steps",
            disable=not accelerator.is_local_main_process,
        )
        average, started = math.nan, time.monotonic()
        try:
            if self.done == 0:
                self.validate()
            while self.done < args.max_train_steps:
                losses = []
                for _ in range(accumulation):
                    batch = self._next(loader, asked)
                    with accelerator.accumulate(self.model):
                        with self._enough_memory():
                            loss = self.objective.loss(self.model, batch)
                        losses.append(loss.detach())
                        if accelerator.sync_gradients:  # DeepSpeed's backward is the step too
                            mean = torch.stack(losses).mean()
                            value = float(accelerator.reduce(mean, "mean"))
                            if not math.isfinite(value):
                                raise DivergedError(f"step {self.done + 1}: the loss is {value}")
                        with self._enough_memory():
                            accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            self._clip()
                        self.optimizer.step()
                        self.schedule.step()
                        self.optimizer.zero_grad()
                if self.average is not None:
                    own = trained_parameters(accelerator.unwrap_model(self.model)).values()
                    self.average.step(own)
                self.done += 1
                average = value if math.isnan(average) else 0.98 * average + 0.02 * value
                rate = self.schedule.get_last_lr()[0]
                progress.update()
                progress.set_postfix(loss=f"{average:.4f}", lr=f"{rate:.1e}")
                accelerator.log({"train_loss": value, "lr": rate}, step=self.done)
                self._note(value, rate, time.monotonic() - started)
                if self.done < args.max_train_steps:
                    if self.done % args.checkpointing_steps == 0:
                        self.checkpoints.save(self.done)
                    if self.done % args.validation_steps == 0:
                        self.validate()
        finally:
            progress.close()
            end_workers(loader)
        self.validate()

    def _next(self, loader: Iterator[Any], asked: Sequence[int]) -> Any:
        """The next batch. One process in trouble, or asked to stop, stops all of them."""
        batch, error = None, self.trouble
        if error is None:
            try:
                batch = next(loader)
            except (TrainingError, OSError, SafetensorError, RuntimeError) as failure:
                error = TrainingError(f"step {self.done + 1}: {sentence(failure)}")
        self._agree(error, asked)
        return batch

    def _agree(self, error: Exception | None = None, asked: Sequence[int] = ()) -> None:
        """Waits for the others, and ends all where one has an error or was asked to stop."""
        flags = torch.tensor([error is not None, *asked[:1], 0][:2], device=self.accelerator.device)
        if self.world > 1:
            flags = self.accelerator.gather(flags[None]).amax(0)
        if error is not None:
            raise error
        if flags[0]:
            raise OtherError("another process could not go on")
        if flags[1]:
            raise StoppedError(f"stopped after step {self.done}", int(flags[1]))

    @contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"step {self.done + 1}: {no_memory(error)}") from error

    def _clip(self) -> None:
        parameters = list(trained_parameters(self.model).values())
        most = self.args.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, most)
        if norm is None or self.accelerator.scaler is not None:  # half precision skips such steps
            return
        if not math.isfinite(float(norm)):
            raise DivergedError(f"step {self.done + 1}: the gradient's norm is {float(norm)}")

    # --- notes, pictures, files ------------------------------------------------------------------

    def _trim_metrics(self) -> None:
        """What an earlier run noted beyond its checkpoint is about to be noted again."""
        if not self.accelerator.is_main_process:
            return
        self.args.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.args.output_dir / METRICS
        lines = path.read_text("utf-8").splitlines() if path.exists() and self.done else []
        kept = [line for line in lines if _step(line) <= self.done]
        part = path.with_suffix(".part")
        try:
            part.write_text("".join(f"{line}\n" for line in kept), "utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _note(self, loss: float, rate: float, seconds: float) -> None:
        if self.accelerator.is_main_process:
            row = {"step": self.done, "loss": loss, "lr": rate, "seconds": round(seconds, 3)}
            try:
                with (self.args.output_dir / METRICS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                self.trouble = TrainingError(f"step {self.done}: {error}")

    def validate(self) -> None:
        if self.validation is not None and self.trouble is None:
            self._draw(self.validation)
        self._agree(self.trouble)

    def _draw(self, pictures: validation.Validation) -> None:
        with self._averaged():
            adapter = self.adapter(self.done, self._exact()) if self.branch is not None else None
            image = self._alone(lambda: pictures.grid(adapter))
            if image is not None and self.accelerator.is_main_process:
                try:
                    folder = self.args.output_dir / "validation"
                    self.picture = validation.save_grid(image, folder, self.done)
                    validation.log_grid(self.accelerator.trackers, image, self.done)
                except OSError as error:
                    self.trouble = TrainingError(f"validation at step {self.done}: {error}")

    def _alone(self, work: Callable[[], T]) -> T | None:
        """What the U-Net makes without values, on the main process, or on all that share it out."""
        if not self.accelerator.is_main_process and not self.fsdp:
            return None
        made = self.denoiser.alone(work)
        if self.fsdp:
            self.model.reshard()  # which it does after a backward only
        return made

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the running average in place of the weights."""
        if self.average is None:
            yield
            return
        own = list(trained_parameters(self.accelerator.unwrap_model(self.model)).values())
        self.average.store(own)
        self.average.copy_to(own)
        try:
            yield
        finally:
            self.average.restore(own)

    def adapter(self, steps: int, exact: Mapping[str, torch.Tensor] | None = None) -> Adapter:
        """The adapter as it is now; `exact` is what is trained, where the model has it rounded."""
        args = self.args
        assert self.branch is not None
        record = {
            **self.objective.record(),
            "base": Path(args.pretrained_model_name_or_path).name,
            "prediction_type": self.base.scheduler.config.prediction_type,
            "steps": steps,
            "batch_size": step_size(args, self.world),
            "learning_rate": args.learning_rate,
            "lr_scheduler": args.lr_scheduler,
            "mixed_precision": self.accelerator.mixed_precision,
            "lora_rank": args.rank,
            "seed": args.seed,
        }
        for key in ("snr_gamma", "use_ema"):
            if getattr(args, key):
                record[key] = getattr(args, key)
        spec = {key: getattr(args, key) for key in ("title", "author", "license", "description")}
        spec["title"] = spec["title"] or args.name
        neutral = getattr(self.objective, "neutral", None)
        return export.trained_adapter(
            self.branch,
            export.NAMES[args.dtype],
            args.apply_to,
            record,
            spec,
            neutral,
            exact or {},
        )

    def _exact(self) -> Mapping[str, torch.Tensor]:
        """What is trained, in f32, where it is not so in the model. All processes have to ask."""
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED or not self.done:
            return {}
        return Zero(self.optimizer, self.checkpoints.parameters()).weights()

    def finish(self) -> None:
        args, main = self.args, self.accelerator.is_main_process
        dtype = export.DTYPES[args.weights_dtype]
        files = {}
        with self._averaged():
            try:
                exact = self._exact()
                adapter = self.adapter(self.done, exact) if self.branch is not None else None
                if args.rank:
                    name = f"{args.name}-lora.safetensors"
                    export.save_lora(self.base, args.output_dir / name, dtype, main, exact)
                    files[name] = "the LoRA trained beside it, which inference does not need"
                if args.full_finetune:
                    export.save_unet(self.base, args.output_dir / "model", dtype, main, exact)
                if adapter is not None and main:
                    adapter.save(args.output_dir / f"{args.name}.safetensors")
                    presets = export.save_presets(
                        adapter, args.output_dir / "presets", export.NAMES[args.weights_dtype]
                    )
                    files |= {f"presets/{name}": what for name, what in presets.items()}
                    picture = self.picture.relative_to(args.output_dir) if self.picture else None
                    base = args.pretrained_model_name_or_path
                    card = export.model_card(adapter, args.name, base, files, picture)
                    (args.output_dir / "README.md").write_text(card, "utf-8")
            except (OSError, SafetensorError, VMixError) as error:
                newest = self.checkpoints.newest()
                self.trouble = TrainingError(
                    f"{error}; all steps are done, {newest} resumes to write the files"
                )
        self._agree(self.trouble)
        if args.push_to_hub and main:
            export.push(args.output_dir, args.hub_model_id or args.output_dir.resolve().name)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def tracker_of(name: str | None) -> str | None:
    if name in (None, "none"):
        return None
    packages = {"tensorboard": "tensorboard", "wandb": "wandb"}
    if name in packages and find_spec(packages[name]) is None:
        raise TrainingError(
            f"--report_to {name}: pip install {packages[name]}, or --report_to none"
        )
    return name


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that gets an entry when somebody asks to stop; the second time is not asked."""
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step; once more stops at once", flush=True)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    import torch.distributed as dist

    try:
        Run(parse_args(argv)).train()
    except (TrainingError, VMixError, OSError, SafetensorError) as error:
        raise SystemExit(f"vmix.train: {error}") from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"vmix.train: {no_memory(error)}") from None
    except StoppedError as error:
        print(f"vmix.train: {error}", file=sys.stderr, flush=True)
        raise SystemExit(128 + error.number) from None
    except KeyboardInterrupt:
        print("vmix.train: stopped at once", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
