"""The loop that trains the autoencoder and the base model: seeded, and resumed after a break."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

_SAVE_SECONDS = 120
_WARM_STEPS = 200

Batch = tuple[Tensor, ...]
Module = TypeVar("Module", bound=nn.Module)
Loss = Callable[..., Tensor]  # of the module and the tensors of a batch


class _Halves:
    """A module run by two threads with half a batch each and weights in common.

    On shared cores this is faster than two threads inside every operation, which wait for each
    other hundreds of times a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = [module, copy.deepcopy(module)]
        self.parameters = [list(m.parameters()) for m in self.modules]
        for own, other in zip(*self.parameters, strict=True):
            other.data = own.data
        self.pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, loss: Loss, batch: Batch) -> float:
        """Leave the gradients of the whole batch's mean loss in the module; return the loss."""

        def half(module: nn.Module, *tensors: Tensor) -> float:
            value = loss(module, *tensors) / 2
            value.backward()  # type: ignore[no-untyped-call]
            return value.item()

        chunks = zip(*(tensor.chunk(2) for tensor in batch), strict=True)
        jobs = zip(self.modules, chunks, strict=True)
        total = sum(self.pool.map(lambda job: half(job[0], *job[1]), jobs))
        for own, other in zip(*self.parameters, strict=True):
            if own.grad is not None and other.grad is not None:
                own.grad.add_(other.grad)
            other.grad = None
        return float(total)


def train(
    module: Module,
    loss: Loss,
    batch: Callable[[], Batch],
    checkpoint: Path,
    *,
    steps: int,
    lr: float,
    fall: float,
    decay: float,
    name: str,
    show: Callable[[Module, int], str | None] | None = None,
    show_steps: int = 500,
) -> Module:
    """Train for so many steps and return the running average of the weights.

    The learning rate is constant and falls to zero over the last `fall` of the steps. `batch` draws
    from torch's own random state, which the checkpoint holds; all randomness belongs there, since
    the two threads that compute `loss` run in no fixed order.
    """
    average = copy.deepcopy(module).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, seconds = state["step"], state["seconds"]
    module.train()
    halves = _Halves(module)
    own, mean = list(module.parameters()), list(average.parameters())
    smooth, last, saved = 1.0, time.monotonic(), time.monotonic()
    bar = tqdm(total=steps, initial=step, desc=name, unit="step", mininterval=5)
    while step < steps:
        rate = lr * min(1.0, (step + 1) / _WARM_STEPS, (steps - step) / (fall * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = halves.backward(loss, batch())
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(mean, own, 1 - min(decay, (1 + step) / (10 + step)))
        step += 1
        smooth += (value - smooth) * max(0.01, 1 / step)
        bar.update()
        now = time.monotonic()
        seconds, last = seconds + now - last, now
        if now - saved > _SAVE_SECONDS or step == steps:
            saved = now
            state = {"module": module.state_dict(), "average": average.state_dict(),
                     "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                     "step": step, "seconds": seconds}  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
        if step % show_steps == 0 or step == steps:
            with torch.random.fork_rng(devices=[]):
                note = show(average, step) if show is not None else None
            bar.write(f"{name} {step}: loss {smooth:.4f}, {seconds / 60:.1f} min {note or ''}")
    bar.close()
    return average


def averaged(module: Module, checkpoint: Path) -> Module:
    """The averaged weights of a finished or running training, in `module`."""
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    return module.eval().requires_grad_(False)
