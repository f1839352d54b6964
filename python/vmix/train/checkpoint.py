"""Checkpoints: what a run needs in order to go on as if it had never been stopped.

`checkpoint-N` holds what is trained, the optimizer's state and the running average as safetensors,
and the rest as JSON. What chance and order give is a function of the seed and the number of the
step (order.py), so it needs no place in them. They are the same however the training is shared out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vmix.train.distribution import Zero
from vmix.train.errors import CheckpointError, TrainingError
from vmix.train.model import gathered, trained_parameters

STATE = "state.json"


class Checkpoints:
    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Any,
        average: Any,
        folder: Path,
        settings: Mapping[str, Any],
        limit: int | None,
    ) -> None:
        self.accelerator, self.model = accelerator, model
        self.optimizer, self.schedule, self.average = optimizer, schedule, average
        self.folder, self.settings, self.limit = folder, dict(settings), limit
        self.saved = 0
        """The step of the newest one that this run has written or begun with."""

    @property
    def deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def parameters(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self.accelerator.unwrap_model(self.model))

    def save(self, step: int, doubtful: bool = False) -> None:
        """Written under another name first, so that "latest" never finds half of one.

        A doubtful state, after which the loss was no number, is written if it is finite, and the
        older ones are kept, which may be better.
        """
        folder = self.folder / f"checkpoint-{step}"
        part = folder.with_suffix(".part")
        main = self.accelerator.is_main_process
        error: Exception | None = None
        if main:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        parameters = self.parameters()
        if self.deepspeed:
            zero = Zero(self.optimizer, parameters)
            tensors, moments = zero.weights(), zero.moments()
        else:
            tensors = {name: gathered(p).cpu().contiguous() for name, p in parameters.items()}
            moments = self._optimizer_state()
        averages = self._average_state()
        state = (*tensors.values(), *moments.values())
        if doubtful and not all(bool(t.isfinite().all()) for t in state):
            return
        if main:
            try:
                part.mkdir(parents=True, exist_ok=True)
                save_file(tensors, part / "trained.safetensors")
                save_file(moments, part / "optimizer.safetensors")
                if averages:
                    save_file(averages, part / "average.safetensors")
                (part / STATE).write_text(json.dumps(self._state(step), indent=1), "utf-8")
                to_disk(*part.iterdir(), part)
                old = folder.with_suffix(".old")
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():  # of an earlier run
                    folder.rename(old)
                part.rename(folder)
                to_disk(self.folder)
                shutil.rmtree(old, ignore_errors=True)
                if not doubtful:
                    self._forget(folder)
            except (OSError, SafetensorError) as failure:
                error = failure
                shutil.rmtree(part, ignore_errors=True)
        failed = self.accelerator.gather(
            torch.tensor([error is not None], device=self.accelerator.device)
        )
        if failed.any():
            last = f"the last one is {self.newest()}" if self.newest() else "there is no other"
            why = error or "another process has the reason"
            raise CheckpointError(f"{folder} could not be written: {why}; {last}")
        self.saved = step

    def _state(self, step: int) -> dict[str, Any]:
        scaler: Any = self.accelerator.scaler
        if self.deepspeed:
            scaler = Zero(self.optimizer, {})
        return {
            "step": step,
            "settings": self.settings,
            "schedule": self.schedule.scheduler.last_epoch,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average_steps": self.average.optimization_step if self.average else None,
            "processes": self.accelerator.num_processes,
        }

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": gathered(torch.as_tensor(value)).to("cpu", copy=True).contiguous()
            for name, parameter in self.parameters().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _average_state(self) -> dict[str, Tensor]:
        if self.average is None:
            return {}
        shadows = zip(self.parameters(), self.average.shadow_params, strict=True)
        return {name: gathered(tensor).cpu().contiguous() for name, tensor in shadows}

    def _forget(self, newest: Path) -> None:
        if self.limit is not None:
            kept = [folder for folder in self.all() if folder != newest]
            for folder in kept[: max(0, len(kept) - self.limit + 1)]:
                shutil.rmtree(folder)

    def all(self) -> list[Path]:
        return checkpoints(self.folder)

    def newest(self) -> Path | None:
        return newest(self.folder)

    def resume(self, wanted: str | None) -> int:
        """Load the checkpoint that was asked for; the number of steps that are done."""
        if not wanted:
            return 0
        folder = Path(wanted)
        if wanted == "latest":
            newest = self.newest()
            if newest is None:
                self.accelerator.print(f"no checkpoint in {self.folder}, starting at step 0")
                return 0
            folder = newest
        if not folder.is_dir() or not step_of(folder):
            raise TrainingError(f"no checkpoint, which is a folder checkpoint-<step>: {folder}")
        try:
            state = json.loads((folder / STATE).read_text("utf-8"))
            self._compare(folder, state["settings"])
            self._load(folder, state)
            self._set_aside(int(state["step"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise TrainingError(f"{folder} cannot be read: {error}") from error
        self.saved = int(state["step"])
        return self.saved

    def _compare(self, folder: Path, before: Mapping[str, Any]) -> None:
        labels = (before.get("labels") or [], self.settings["labels"] or [])
        if labels[0] != labels[1]:
            names = (", ".join(label[0] for label in part) or "none" for part in labels)
            raise TrainingError(
                f"{folder} was made with other labels, or other texts or another order of them: "
                f"{next(names)}; --labels has {next(names)}"
            )
        if self.settings["use_ema"] and not before["use_ema"]:
            raise TrainingError(f"{folder} was made without --use_ema, it has no average")
        if self.settings["use_8bit_adam"] != before["use_8bit_adam"]:
            made = "with" if before["use_8bit_adam"] else "without"
            raise TrainingError(f"{folder} was made {made} --use_8bit_adam, go on {made} it")
        changed = [
            f"{key} {before[key]} -> {value}"
            for key, value in self.settings.items()
            if key in before and before[key] != value
        ]
        if changed:
            self.accelerator.print(f"{folder} was made with other settings: {'; '.join(changed)}")

    def _set_aside(self, step: int) -> None:
        """Later ones are of a course that this run leaves: "latest" is not to find them."""
        later = [folder for folder in self.all() if step_of(folder) > step]
        if later and self.accelerator.is_main_process:
            for folder in later:
                aside = folder.with_suffix(".abandoned")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            names = ", ".join(folder.name for folder in later)
            print(f"{names} in {self.folder}: renamed to .abandoned, this run goes another way")
        self.accelerator.wait_for_everyone()

    def _load(self, folder: Path, state: Mapping[str, Any]) -> None:
        parameters = self.parameters()
        tensors = load_file(folder / "trained.safetensors")
        shapes = ({name: t.shape for name, t in part.items()} for part in (tensors, parameters))
        if next(shapes) != next(shapes):
            raise TrainingError(f"{folder}: made with other settings (labels, rank or base model)")
        moments = load_file(folder / "optimizer.safetensors")
        if self.deepspeed:
            Zero(self.optimizer, parameters).load(tensors, moments)
        else:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(like(tensors[name], parameter))
            self._load_optimizer(moments)
        if self.average is not None:
            shadows = load_file(folder / "average.safetensors")
            for name, shadow in zip(parameters, self.average.shadow_params, strict=True):
                shadow.copy_(like(shadows[name], shadow))
            self.average.optimization_step = state["average_steps"]
        # Only the place in the schedule, in which accelerate counts every process's steps: rates
        # are what is asked for now.
        scheduler = self.schedule.scheduler
        place = int(state["schedule"]) * self.accelerator.num_processes // int(state["processes"])
        scheduler.last_epoch = place
        factors = [factor(place) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [r * f for r, f in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        scaler: Any = Zero(self.optimizer, {}) if self.deepspeed else self.accelerator.scaler
        kept = state["scaler"] or {}
        if self.deepspeed or (scaler is not None and "scale" in kept):  # each has its own
            scaler.load_state_dict(kept)

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        plain = isinstance(self.optimizer.optimizer, torch.optim.AdamW)
        parameters, states = self.parameters(), self.optimizer.state
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition("/")
            if key == "step":  # a number of bitsandbytes'
                states[parameters[owner]][key] = tensor if plain else int(tensor)
            else:
                states[parameters[owner]][key] = like(tensor, parameters[owner])


def checkpoints(folder: Path) -> list[Path]:
    return sorted(filter(step_of, folder.glob("checkpoint-*")), key=step_of)


def newest(folder: Path) -> Path | None:
    return max(checkpoints(folder), key=step_of, default=None)


def refuse_earlier(folder: Path) -> None:
    """A new run does not mix its checkpoints with those of another, nor write over its adapter."""
    if (found := newest(folder)) is not None:
        raise TrainingError(
            f"{found} is an earlier run's: --resume_from_checkpoint latest goes on from there, "
            "another --output_dir begins anew"
        )


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor where the parameter is, shared out as it is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return tensor.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]


def to_disk(*paths: Path) -> None:
    """Waits until they are there, so that a power cut leaves what the names promise."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    for path in paths:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def step_of(checkpoint: Path) -> int:
    """The N of `checkpoint-N`; 0 for other names."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else 0
