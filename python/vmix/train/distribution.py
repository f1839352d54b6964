"""What accelerate's ways to share a training out need to be told, and what they keep for themselves.

FSDP's tensors know how to be gathered (model.gathered) and given back (checkpoint.like). DeepSpeed's
ZeRO keeps weights in full precision and the optimizer's state in flat parts, one a process; here they
are one tensor a parameter again, through its own functions, as without it.
"""  # noqa: E501

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from vmix.train.errors import TrainingError

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def fit_plugins(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Completes accelerate's configuration by the options, and refuses what cannot work."""
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    kind = accelerator.distributed_type
    if args.use_8bit_adam and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise TrainingError(
            f"--use_8bit_adam: its state cannot be shared out, as {kind.value} does"
        )
    if kind == DistributedType.FSDP:
        if args.objective != "denoising":
            raise TrainingError(
                f"--objective {args.objective}: teachers are asked more often on one process than "
                "on another, which FSDP does not allow; DDP and DeepSpeed do"
            )
        fsdp = accelerator.state.fsdp_plugin
        if fsdp.fsdp_version != 2:
            raise TrainingError(f"FSDP: expected fsdp_version 2, found {fsdp.fsdp_version}")
        for key, reason in (
            ("cpu_ram_efficient_loading", "every process needs its own text encoders"),
            ("activation_checkpointing", "--gradient_checkpointing is the one that works"),
        ):
            if getattr(fsdp, key):
                raise TrainingError(f"FSDP: expected fsdp_{key} false, found true: {reason}")
    if kind == DistributedType.DEEPSPEED:
        deepspeed = accelerator.state.deepspeed_plugin
        if deepspeed.zero_stage != 2:
            raise TrainingError(
                f"DeepSpeed: expected zero_stage 2, found {deepspeed.zero_stage}; FSDP shares out "
                "the weights too"
            )
        if args.use_ema and accelerator.mixed_precision != "no":
            raise TrainingError(
                "--use_ema: DeepSpeed's weights are in half precision, too coarse for an average; "
                "FSDP's are not"
            )
        deepspeed.deepspeed_config.update(
            train_micro_batch_size_per_gpu=args.train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=args.max_grad_norm,
        )


class Zero:
    """Weights and moments under ZeRO. All processes have to ask."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.zero, self.parameters = optimizer.optimizer, parameters

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).cpu() for name, p in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """As "<parameter>/<name>"; none before the first step."""
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_get_full_optimizer_state,
        )

        state = self.zero.optimizer.state
        found: dict[str, Tensor] = {}
        for flat, members in self._groups() if state else ():
            # It has looked for them when only the first group had any.
            lazy_init_hp_params_optimizer_state(list(members.values()), flat, state)
            step = torch.as_tensor(state[flat]["step"], dtype=torch.float32)
            for name, parameter in members.items():
                found[f"{name}/step"] = step.to("cpu", copy=True)  # files share no tensors
                for key in MOMENTS:
                    found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).cpu()
        return found

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(weights[name])
            safe_set_full_fp32_param(parameter, weights[name])
        inner = self.zero.optimizer
        for flat, members in self._groups() if moments else ():
            step = moments[f"{next(iter(members))}/step"].float()
            plain = isinstance(inner, torch.optim.AdamW)
            inner.state[flat] = {"step": step.clone() if plain else int(step)}
            inner.state[flat] |= {key: torch.zeros_like(flat) for key in MOMENTS}
            lazy_init_hp_params_optimizer_state(list(members.values()), flat, inner.state)
            for name, parameter in members.items():
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, moments[f"{name}/{key}"], key)

    def state_dict(self) -> dict[str, Any]:
        """Of what scales the loss in half precision."""
        return {key: value for key, value in self._scale().items() if key in SCALE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scale().update({key: value for key, value in state.items() if key in self._scale()})

    def _scale(self) -> dict[str, Any]:
        return vars(getattr(self.zero, "loss_scaler", None) or argparse.Namespace())

    def _groups(self) -> Iterator[tuple[Tensor, dict[str, nn.Parameter]]]:
        """This process's flat part of every group, and the parameters that the group is made of."""
        names = {id(p): name for name, p in self.parameters.items()}
        parts = zip(self.zero.optimizer.param_groups, self.zero.bit16_groups, strict=True)
        for group, members in parts:
            yield group["params"][0], {names[id(p)]: p for p in members}
