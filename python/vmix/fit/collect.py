"""Rides on the cross-attention layers of a drawing host and adds up what words would change.

A layer computes as it always does, with its own kernels. Beside it, from what its projections
returned, the attention map of the bare prompt is computed in f32, and the output that each side's
words would give for the same queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vmix.fit.errors import FitError
from vmix.fit.prompts import Plan
from vmix.fit.sums import CHECK_PART, FIT_PART, LayerSums, Sums, length_class

__all__ = ["Collector", "Picture"]

BLOCK, GPU_BLOCK = 2**24, 2**25
"""Numbers that a block of queries may take: 64 and 128 MB."""
TOLERANCE = 0.05
"""How far a·V_c may be from what the layer computes: rounding of bf16 is a tenth of it."""


@dataclass(frozen=True)
class Picture:
    """One picture of a batch that is being drawn."""

    row: int
    """Of the batch that the U-Net is given; negative from its end."""
    prompt: int
    """Its position in the plan."""
    contexts: Tensor
    """[K, C, d]: contexts of the prompt with words, as `Plan.words` lists them."""


class Collector:
    """Adds to sums what the layers do between `start` and `finish`.

        collector = Collector(layers, plan, sums)
        with collector.riding():
            collector.start(pictures)
            …                               # the host draws them; after every step:
            collector.progress = steps_done / steps
            collector.finish()

    What a side changes differs from step to step, and one V_a serves all. Early steps decide most
    of a picture, so a query counts (1 − progress)².
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        plan: Plan,
        sums: Sums,
        device: torch.device | str | None = None,
    ) -> None:
        """`layers`: modules with `to_q`, `to_k`, `to_v`, `to_out` and `heads`, by diffusers path.
        `device` is where sums are kept, else that of each layer."""
        self.layers, self.plan, self.sums, self.device = layers, plan, sums, device
        self.pictures: Sequence[Picture] = ()
        self.progress = 0.0
        """How much of the sampling is done, from 0 to 1."""
        self.contexts: Tensor | None = None  # of all pictures, where the layers compute
        self.caught: dict[str, dict[str, Tensor]] = {}
        self.sides: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        self.projecting = False  # whether it is us who calls a projection

    @contextmanager
    def riding(self) -> Iterator[None]:
        """Hooks on the layers, for as long as it lasts. Compiled layers run uncompiled."""
        hooks = []
        try:
            for path, layer in self.layers.items():
                for name in ("to_q", "to_k", "to_v"):
                    module: nn.Module = getattr(layer, name)
                    hooks.append(module.register_forward_hook(self._catching(path, name)))
                out: nn.Module = layer.to_out[0]
                hooks.append(out.register_forward_pre_hook(self._adding(path)))
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.caught.clear()

    def start(self, pictures: Sequence[Picture]) -> None:
        self.pictures, self.progress, self.contexts = pictures, 0.0, None

    def finish(self) -> None:
        """Checks what was added, and counts the prompts as done."""
        prompts = [picture.prompt for picture in self.pictures]
        self.pictures, self.contexts = (), None
        missing = [path for path in self.layers if path not in self.sums.layers]
        if missing:
            raise FitError(
                f"layer {missing[0]}: expected that drawing runs its to_q, to_k, to_v and to_out; "
                "it ran none. Are its projections fused?"
            )
        for path, layer in self.sums.layers.items():
            wrong, whole = layer.mismatch.tolist()
            if not wrong <= TOLERANCE**2 * whole:  # NaN too
                error = (wrong / whole) ** 0.5 if whole else 0.0
                raise FitError(
                    f"layer {path}: expected softmax(Q·Kᵀ/√d)·V of its own projections, found "
                    f"another output (relative difference {error:.2g}). An IP-Adapter, another "
                    "attention processor, or values that float16 cannot hold?"
                )
        self.sums.done.update(prompts)

    def _catching(self, path: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self.pictures and not self.projecting:
                caught = self.caught.setdefault(path, {})
                caught[name] = output.detach()
                if name == "to_k":
                    caught["context"] = args[0]

        return hook

    def _adding(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught = self.caught.pop(path, {})
            if self.pictures and not self.projecting:
                if missing := {"to_q", "to_k", "to_v"} - caught.keys():
                    raise FitError(
                        f"layer {path}: expected that drawing runs its to_q, to_k, to_v and "
                        f"to_out; it did not run {', '.join(sorted(missing))}. Are its projections "
                        "fused?"
                    )
                self.projecting = True
                try:
                    with torch.no_grad():
                        self._add(path, caught, args[0])
                finally:
                    self.projecting = False

        return hook

    def _add(self, path: str, caught: Mapping[str, Tensor], output: Tensor) -> None:
        layer = self.layers[path]
        heads = int(layer.heads)
        context = caught["context"]
        if self.contexts is None or self.contexts.device != context.device:
            contexts = torch.cat([picture.contexts for picture in self.pictures])
            self.contexts = contexts.to(context.device)
        contexts = self.contexts
        if context.shape[1:] != contexts.shape[1:]:
            raise FitError(
                f"layer {path}: expected a context of {[*contexts.shape[1:]]}, tokens and width, "
                f"found {[*context.shape[1:]]}"
            )
        contexts = contexts.to(context.dtype)
        keys, values = layer.to_k(contexts), layer.to_v(contexts)
        counts = [len(picture.contexts) for picture in self.pictures]
        split = zip(self.pictures, keys.split(counts), values.split(counts), strict=True)
        with _exact(output.device):
            for picture, key, value in split:
                row = picture.row
                self._add_picture(
                    path,
                    picture.prompt,
                    _heads(caught["to_q"][row], heads),
                    _heads(caught["to_k"][row], heads),
                    _heads(caught["to_v"][row], heads),
                    _heads(output[row], heads),
                    _heads(key, heads),
                    _heads(value, heads),
                )

    def _add_picture(
        self, path: str, prompt: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        word_keys: Tensor, word_values: Tensor,
    ) -> None:  # fmt: skip
        """query, key, value, output [H, n, E]; word_keys, word_values [K, H, C, E]"""
        heads, queries, width = query.shape
        tokens = key.shape[1]
        plan = self.plan
        present, position, share = self._sides(prompt, query.device)
        key_t, word_keys_t = key.mT * width**-0.5, word_keys.mT * width**-0.5

        columns = tokens + len(present) * width
        product = query.new_zeros(heads, tokens, columns)
        change = query.new_zeros(len(present))
        energy, wrong = query.new_zeros(()), query.new_zeros(())
        of_a_query = len(word_keys) * heads * (tokens + 2 * width) + heads * columns
        block = BLOCK if query.device.type == "cpu" else GPU_BLOCK
        step = max(1, block // of_a_query)
        for first in range(0, queries, step):
            q, out = query[:, first : first + step], output[:, first : first + step]
            a = (q @ key_t).softmax(-1)
            bare = a @ value
            with_words = (q @ word_keys_t).softmax(-1) @ word_values  # [K, H, n, E]
            deltas = bare.new_zeros(len(present), *bare.shape)
            deltas.index_add_(0, position, with_words * share[:, None, None, None])
            deltas -= bare
            flat = deltas.permute(1, 2, 0, 3).flatten(2)  # [H, n, sides of E]
            product += a.mT @ torch.cat([a, flat], -1)
            change += deltas.square().sum((1, 2, 3))
            energy += out.square().sum()
            wrong += (bare - out).square().sum()

        sums = self._sums(path, heads, tokens, width, query.device)
        part = CHECK_PART if plan.checks(prompt) else FIT_PART
        to, weight = sums.moment.device, max(0.0, 1 - self.progress) ** 2
        parts = (product, change, energy, wrong)
        product, change, energy, wrong = (x.to(to) * weight for x in parts)
        moment = product[..., :tokens]
        cross = (
            product[..., tokens:].reshape(heads, tokens, len(present), width).permute(2, 0, 1, 3)
        )
        for group, prompts in enumerate(plan.groups):
            if prompt in prompts:
                sums.moment[part, group] += moment
                sums.output[part, group] += energy
                sums.queries[part, group] += queries * weight
        chosen = present.to(to)
        sums.cross[part].index_add_(0, chosen, cross)
        sums.change[part].index_add_(0, chosen, change)
        length = length_class(plan.lengths[prompt])
        sums.lengths[length] += moment.sum(0)
        sums.length_output[length] += energy
        sums.mismatch += torch.stack([wrong, energy])

    def _sides(self, prompt: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The sides that a prompt is compared with; of every context the position of its side among
        them, and its share in that side."""
        key = prompt, device
        if key not in self.sides:  # made once: each of these waits for a GPU
            sides = [side for side, _ in self.plan.words(prompt)]
            present = sorted(set(sides))
            position = [present.index(side) for side in sides]
            share = [1 / sides.count(side) for side in sides]
            self.sides[key] = (
                torch.tensor(present, device=device),
                torch.tensor(position, device=device),
                torch.tensor(share, device=device),
            )
        return self.sides[key]

    def _sums(self, path: str, heads: int, tokens: int, width: int, device: Any) -> LayerSums:
        if path not in self.sums.layers:
            sides, groups = len(self.plan.sides), len(self.plan.groups)
            self.sums.layers[path] = LayerSums(
                sides, groups, heads, tokens, width, self.device or device
            )
        return self.sums.layers[path]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[…, n, H·E] as [..., H, n, E] in f32."""
    return x.float().view(*x.shape[:-1], heads, -1).transpose(-3, -2)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Products in f32, where the host has autocast or TF32 on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if device.type == "cuda":
            matmul.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if device.type == "cuda":
            matmul.fp32_precision = before
