"""Adds V_a to the values of a pipeline's cross-attention layers.

Both branches of the paper share one attention map (eq. 8 and 9), so that

    softmax(Q·K_cᵀ/√d)·V_c + λ·softmax(Q·K_cᵀ/√d)·V_a = softmax(Q·K_cᵀ/√d)·(V_c + λ·V_a),

and all there is to do is to add λ·V_a to what `attn2.to_v` returns. Attention processors are left
alone: that is where IP-Adapter, PAG and xformers live.

The patch is an instance `forward` on the linear layer below any LoRA wrapper, and not a forward
hook: compiled code is guarded by the former and never notices the latter. The value rows of an
adapter are copied to the U-Net's device once, in f32: rounding them would cost up to 1e-3 of V_a.
λ·V_a = λ·A(w)·B is held as a tensor in the U-Net's dtype, which compiled code reads anew at every
call. New weights or a new scale compute it anew, in a few milliseconds, and recompile nothing.

Everything hangs on the pipeline's U-Net and goes away with `unload_vmix`. Which half of a batch is
conditional is known to the pipeline alone: the U-Net remembers the pipeline it was last given
with, so call a function of this module on a pipeline made by `from_pipe` before it runs.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

import vmix
from vmix import Adapter, Untrained, Values, VMixError, rows
from vmix.diffusers.unet import (
    FUSING,
    check_fusing,
    cross_attentions,
    unet_of,
    value_linear,
)

__all__ = ["get_vmix", "list_vmix", "load_vmix", "set_vmix", "set_vmix_scale", "unload_vmix"]

_LOG = logging.getLogger(__name__)

ApplyTo: TypeAlias = Literal["cond", "both", "contrast"]
Selection: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
Selections: TypeAlias = Selection | Sequence[Selection]
"""One selection, or a list with one for every image. A list of names alone is one selection."""
Scale: TypeAlias = float | Mapping[str, Any]
_Pair: TypeAlias = tuple[Tensor, Tensor | None]
"""What goes to the conditional and to the unconditional part of a batch."""

_CONTEXT_DIMS = {"sd15": 768, "sdxl": 2048}
_BASES = {(768, 16): "sd15", (2048, 70): "sdxl"}
# Arguments of pipelines whose batch is not [uncond; cond], or whose U-Net also runs one half alone.
_OTHER_BATCHES = ("image_guidance_scale", "sag_scale", "token_indices")


def load_vmix(
    pipe: Any,
    adapter_or_preset: str | os.PathLike[str] | Adapter | Values,
    selection: Selections = None,
    scale: Scale = 1.0,
    apply_to: ApplyTo | None = None,
    adapter_name: str = "default",
    start: float = 0.0,
    end: float = 1.0,
) -> None:
    """Adds a VMix adapter or preset to the pipeline's U-Net.

    Args:
        pipe: a pipeline with a `UNet2DConditionModel`; compiled, offloaded or with LoRAs is fine.
        adapter_or_preset: a file, an `Adapter` or the `Values` of one selection.
        selection: the labels, for an adapter: a name, a list of names, a dictionary of weights,
            "all" (trained adapters only) or "none"; the file's default weights if None. A label
            that is left out is at its neutral weight, or at 0 where it has none: that is its
            negative text, which changes the picture too. A list of selections has one for every
            image of a batch, see `set_vmix`.
        scale: λ of eq. 9; a number or a dictionary per block, see `set_vmix_scale`.
        apply_to: the passes of classifier-free guidance that are mixed: "cond", "both", or
            "contrast" (the selection on cond, its opposite on uncond); the file's own if None.
        adapter_name: several names add up; put labels of one file into one selection. A name that
            is already loaded is replaced.
        start, end: the part of `scheduler.timesteps` in which the adapter acts, as fractions;
            step i of n is inside if start ≤ i/n and (i+1)/n ≤ end, as ControlNet counts. It is
            the whole schedule also where img2img begins in its middle; of equal timesteps, which
            PNDM has, the first counts.

    Pipelines that share the U-Net (`from_pipe`) share its adapters, but only one of them is asked
    whether guidance is on: the one last given to a function of this module. Call one before another
    pipeline runs, or load with apply_to="both".
    """
    unet = unet_of(pipe)
    source = _open(adapter_or_preset, selection)
    policy = apply_to or source.apply_to
    if policy not in ("cond", "both", "contrast"):
        raise VMixError(f"apply_to: expected cond, both or contrast, found {policy!r}")
    if not 0.0 <= start < end <= 1.0:
        raise VMixError(f"start and end: expected 0 <= start < end <= 1, found {start} and {end}")
    _check_pipeline(pipe, policy, selection)
    attns = cross_attentions(unet)
    check_fusing(unet, attns, "load_vmix")
    _check_layout(source, attns)
    for path, attn in attns.items():
        _check_rescaling(path, attn)
    state: _State = getattr(unet, "_vmix", None) or _State()
    adapter = _Adapter(source, policy, start, end)
    mixes = {
        path: _Mix(path, adapter, value_linear(attn).weight, _fixed(source, path, policy))
        for path, attn in attns.items()
    }
    adapter.set(mixes, selection, scale)

    # Nothing has been changed up to here, nothing can fail from here on.
    state.bind(pipe, unet)
    state.adapters[adapter_name] = adapter
    for path, mix in mixes.items():
        if path not in state.layers:
            state.layers[path] = _Layer(path, attns[path], state)
            state.layers[path].install()
        state.layers[path].mixes[adapter_name] = mix
    state.watch_steps(unet)
    unet._vmix = state
    unet.fuse_qkv_projections = state.refuse_fusing
    if isinstance(source, Adapter) and source.made["method"] != "trained":
        base = _made_for(source)
        ours = getattr(getattr(pipe, "config", None), "_name_or_path", None)
        if base and ours and base != Path(ours).name:
            # On another checkpoint, fitted labels do roughly the same, and not exactly.
            _LOG.warning("VMix: this adapter was fitted on %s", base)
    labels = source.labels if selection is None and isinstance(source, Adapter) else []
    if labels and all(label.default == label.neutral for label in labels):
        _LOG.warning(
            "VMix: every label is at weight %g, which changes nothing: move one, as in "
            "set_vmix(pipe, {%r: 1})",
            labels[0].default,
            labels[0].name,
        )


def set_vmix(pipe: Any, selection: Selections, adapter_name: str = "default") -> None:
    """Sets other label weights: in milliseconds, also in a callback between two steps. Call it in
    the thread that runs the pipeline.

    A list of selections gives every image its own: as many as there are images, or as there are
    prompts where `num_images_per_prompt` repeats each.

        set_vmix(pipe, {"vibrant color": 1.3})
        set_vmix(pipe, [{"vibrant color": w / 4} for w in range(5)])   # pipe([prompt] * 5)
    """
    unet = unet_of(pipe)
    state = _loaded(unet, adapter_name)
    adapter = state.adapters[adapter_name]
    if isinstance(adapter.source, Values):
        raise VMixError(f"a preset holds one selection and cannot take another: {selection!r}")
    _check_pipeline(pipe, adapter.apply_to, selection)
    adapter.set(state.mixes(adapter_name), selection, adapter.scale)
    state.bind(pipe, unet)


def set_vmix_scale(pipe: Any, scale: Scale, adapter_name: str = "default") -> None:
    """Sets λ of eq. 9, from 0 (bit-identical to the bare pipeline) upwards, or below 0.

    `scale` is a number, or a dictionary as LoRA scales are given: `{"down": 0.5, "mid": 1.0,
    "up": {"block_1": 0.7, "block_2": [0.2, 0.4, 0.6]}}`, the list holding one scale per attention
    of the block. What is left out is 1.0.
    """
    unet = unet_of(pipe)
    state = _loaded(unet, adapter_name)
    adapter = state.adapters[adapter_name]
    _check_pipeline(pipe, adapter.apply_to, adapter.selection)
    adapter.set(state.mixes(adapter_name), adapter.selection, scale)
    state.bind(pipe, unet)


def get_vmix(pipe: Any, adapter_name: str = "default") -> dict[str, Any]:
    """What is loaded under a name: `weights` (a dictionary, or a list with one for every image),
    `scale`, `apply_to`, `start` and `end`."""
    adapter = _loaded(unet_of(pipe), adapter_name).adapters[adapter_name]
    return {
        "weights": copy.deepcopy(adapter.weights),
        "scale": copy.deepcopy(adapter.scale),
        "apply_to": adapter.apply_to,
        "start": adapter.start,
        "end": adapter.end,
    }


def list_vmix(pipe: Any) -> list[str]:
    """The names of all adapters that are loaded, in the order in which they were."""
    state: _State | None = getattr(unet_of(pipe), "_vmix", None)
    return list(state.adapters) if state else []


def unload_vmix(pipe: Any, adapter_name: str = "default") -> None:
    """Removes an adapter; with the last one, everything this module put on the U-Net."""
    unet = unet_of(pipe)
    state = _loaded(unet, adapter_name)
    del state.adapters[adapter_name]
    for layer in state.layers.values():
        del layer.mixes[adapter_name]
    state.watch_steps(unet)
    if not state.adapters:
        for layer in state.layers.values():
            layer.remove()
        del unet._vmix
        del unet.fuse_qkv_projections


class _Adapter:
    """What one loaded adapter shares between its layers."""

    def __init__(self, source: Adapter | Values, apply_to: str, start: float, end: float) -> None:
        self.source = source
        self.tokens = source.context_tokens
        self.apply_to = apply_to
        self.start = start
        self.end = end
        self.gate: Tensor | None = None  # 1 within the window of steps and 0 outside; None: always
        self.selection: Selections = None
        self.scale: Scale = 1.0
        self.weights: dict[str, float] | list[dict[str, float]] = {}
        self.coefficients: _Pair | None = None
        """A [C, R] or, of a batch, [B, C, R]; None for a preset."""

    @property
    def windowed(self) -> bool:
        return self.start > 0.0 or self.end < 1.0

    def set(self, mixes: Mapping[str, _Mix], selection: Selections, scale: Scale) -> None:
        """Computes λ·V_a of all layers for other weights or another λ. An error changes nothing."""
        scales = _scales(scale, mixes)
        source, coefficients = self.source, None
        if isinstance(source, Adapter):
            weights = _each(selection, source.weights)
            coefficients = _coefficients(source, selection, self.apply_to)
        else:
            weights = source.selection
        mixed = {
            path: mix.product(coefficients, scales[path], mix.device, mix.dtype)
            for path, mix in mixes.items()
        }
        self.check(mixed, weights, scales)
        self.coefficients, self.weights = coefficients, weights
        self.selection, self.scale = copy.deepcopy(selection), copy.deepcopy(scale)
        for path, mix in mixes.items():
            mix.scale, (mix.cond, mix.uncond) = scales[path], mixed[path]

    def check(self, mixed: Mapping[str, _Pair], weights: Any, scales: Mapping[str, float]) -> None:
        """Refuses what is not finite in the U-Net's dtype: it would make every picture black."""
        parts = [(path, part) for path, pair in mixed.items() for part in pair if part is not None]
        device = parts[0][1].device
        finite = torch.stack([part.isfinite().all().to(device) for _, part in parts])
        if finite.all():  # waits for the device once
            return
        path, part = parts[int(finite.int().argmin())]
        left_out = {label.name: label.neutral or 0.0 for label in self.source.labels}
        _, label, weight = max(
            (abs(weight - left_out[label]), label, weight)
            for one in (weights if isinstance(weights, list) else [weights])
            for label, weight in one.items()
        )
        raise VMixError(
            f"layer {path}: expected values that {part.dtype} can hold, found more: label "
            f"{label!r} at weight {weight:g}, scale {scales[path]:g}"
        )


class _Mix:
    """λ·V_a of one adapter in one layer, as the layer's output is: [C, inner_dim], or
    [B, C, inner_dim] where every image has its own."""

    cond: Tensor
    uncond: Tensor | None

    def __init__(self, path: str, adapter: _Adapter, like: Tensor, fixed: _Pair | None) -> None:
        self.path = path
        self.adapter = adapter
        self.scale = 1.0
        # An offloaded weight is on "meta" and a quantised one holds integers; the first call
        # then finds out what is wanted.
        self.device = torch.device("cpu") if like.is_meta else like.device
        self.dtype = like.dtype if like.is_floating_point() else torch.float32
        source = adapter.source
        self.fixed = fixed  # V_a of a preset
        self.rows: Tensor | None = None  # B [R, inner_dim] of an adapter
        if isinstance(source, Adapter):
            self.rows = from_dlpack(source.rows[path]).to(self.device, torch.float32)

    def product(
        self, coefficients: _Pair | None, scale: float, device: torch.device, dtype: torch.dtype
    ) -> _Pair:
        """λ·V_a, computed in f32."""
        if self.rows is not None:
            assert coefficients is not None
            self.rows = self.rows.to(device)
            values = [None if a is None else rows.values(a, self.rows) for a in coefficients]
        else:
            assert self.fixed is not None
            values = [None if v is None else v.to(device, torch.float32) for v in self.fixed]
        cond, uncond = (None if v is None else (v * scale).to(dtype) for v in values)
        assert cond is not None
        return cond, uncond

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """To where the layer computes, at its first call there."""
        pair = self.product(self.adapter.coefficients, self.scale, device, dtype)
        if not torch.compiler.is_compiling():  # a graph cannot ask for a number
            self.adapter.check({self.path: pair}, self.adapter.weights, {self.path: self.scale})
        self.device, self.dtype, (self.cond, self.uncond) = device, dtype, pair

    def __call__(self, value: Tensor, state: _State) -> Tensor:
        """V_c + λ·V_a (eq. 9) for `value` [B, T, inner_dim] of a context, T a multiple of C."""
        tokens = self.adapter.tokens
        if value.shape[1] % tokens:
            raise VMixError(
                f"{self.path}: the prompt's context has {value.shape[1]} tokens, "
                f"the adapter needs a multiple of {tokens}"
            )
        if self.device != value.device or self.dtype != value.dtype:
            self.move(value.device, value.dtype)
        if self.adapter.apply_to == "both":
            images = state.split(value.shape[0])[0] if self.cond.ndim == 3 else 0
            return value + self._tiled(self.cond, value, images)
        images, rows = state.split(value.shape[0])
        cond = value[rows:] + self._tiled(self.cond, value[rows:], images)
        if not rows:
            return cond
        uncond = value[:rows]
        if self.uncond is not None:
            uncond = uncond + self._tiled(self.uncond, uncond, images)
        return torch.cat([uncond, cond])

    def _tiled(self, aes: Tensor, value: Tensor, images: int) -> Tensor:
        """`aes` for every token of `value` and, of a batch, for every image of its parts."""
        if self.adapter.gate is not None:
            aes = aes * self.adapter.gate.to(aes)
        chunks = value.shape[1] // self.adapter.tokens
        if aes.ndim == 2:
            return aes.repeat(chunks, 1)
        if images % aes.shape[0]:
            raise VMixError(
                f"{aes.shape[0]} selections were set for a batch of {images} images: expected one "
                "for every image, or one for every prompt"
            )
        # Pipelines repeat each prompt; every part of a batch holds the same images.
        aes = aes.repeat_interleave(images // aes.shape[0], 0)
        return aes.repeat(value.shape[0] // images, chunks, 1)


class _Patch:
    """Replaces the `forward` of one module; a bound method, so that deep copies own their patch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # accelerate's hooks keep the forward that they wrapped in `_old_forward` and put it back
        # when they go, so that is the one to wrap.
        self.slot = "_old_forward" if hasattr(module, "_old_forward") else "forward"
        self.original = getattr(module, self.slot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        setattr(self.module, self.slot, self.forward)

    def remove(self) -> None:
        # Hooks that came or went in the meantime have moved the patch to the other place.
        for slot in ("forward", "_old_forward"):
            if vars(self.module).get(slot) == self.forward:
                plain = getattr(self.original, "__func__", None) is type(self.module).forward
                if slot == "forward" and plain:
                    delattr(self.module, slot)
                else:
                    setattr(self.module, slot, self.original)


class _Layer(_Patch):
    """The value projection W_V of one cross-attention, V_a added to what it returns."""

    def __init__(self, path: str, attn: nn.Module, state: _State) -> None:
        super().__init__(value_linear(attn))
        self.path = path
        self.attn = attn
        self.state = state
        self.mixes: dict[str, _Mix] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = self.original(*args, **kwargs)
        if self.mixes:
            _check_rescaling(self.path, self.attn)
            for mix in self.mixes.values():
                value = mix(value, self.state)
        return value


class _Steps(_Patch):
    """The U-Net of adapters with a window of steps: the timestep passes here and nowhere else."""

    def __init__(self, unet: nn.Module, state: _State) -> None:
        super().__init__(unet)
        self.state = state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        timestep = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        scheduler = getattr(self.state.pipe(), "scheduler", None)
        for adapter in self.state.adapters.values():
            if adapter.windowed:
                if scheduler is None:
                    raise VMixError("start and end need the pipeline's scheduler; it is gone")
                # Tensors throughout: no synchronisation, and no break in a compiled graph.
                steps = scheduler.timesteps.to(timestep.device)
                step = (steps - timestep.flatten()[0]).abs().argmin()
                inside = step / len(steps) >= adapter.start
                adapter.gate = inside & ((step + 1) / len(steps) <= adapter.end)
        return self.original(*args, **kwargs)


class _State:
    """All that is loaded on one U-Net."""

    def __init__(self) -> None:
        self.adapters: dict[str, _Adapter] = {}
        self.layers: dict[str, _Layer] = {}
        self.steps: _Steps | None = None
        self.pipe: Any = lambda: None  # weak: a U-Net must not keep text encoders alive
        self.perturbs = False  # whether the pipeline knows perturbed-attention guidance
        self.embeds_guidance = False  # such a U-Net is told the guidance and runs one half only

    def mixes(self, adapter_name: str) -> dict[str, _Mix]:
        return {path: layer.mixes[adapter_name] for path, layer in self.layers.items()}

    def bind(self, pipe: Any, unet: Any) -> None:
        self.pipe = weakref.ref(pipe)
        self.perturbs = hasattr(type(pipe), "do_perturbed_attention_guidance")
        self.embeds_guidance = unet.config.time_cond_proj_dim is not None

    def watch_steps(self, unet: nn.Module) -> None:
        """Patches the U-Net if, and only if, an adapter has a window of steps."""
        wanted = any(adapter.windowed for adapter in self.adapters.values())
        if wanted and self.steps is None:
            self.steps = _Steps(unet, self)
            self.steps.install()
        elif not wanted and self.steps is not None:
            self.steps.remove()
            self.steps = None

    def split(self, batch: int) -> tuple[int, int]:
        """How many images a batch holds in each of its parts, and how many of its rows, from its
        start, are unconditional."""
        # Not `do_classifier_free_guidance`: it looks at `pipe.unet`, which a compiler that is
        # tracing that very module refuses to follow.
        pipe = self.pipe()
        guidance = getattr(pipe, "_guidance_scale", None)
        if guidance is None:
            raise VMixError(
                "the U-Net does not know which part of its batch is unconditional: run it through "
                "the pipeline that was given to load_vmix, or load one selection for all images "
                "with apply_to='both'"
            )
        guided = not self.embeds_guidance and guidance > 1
        # Perturbed-attention guidance appends another part, conditional too.
        perturbed = self.perturbs and pipe.do_perturbed_attention_guidance
        parts = 1 + int(guided) + int(perturbed)
        if batch % parts:
            raise VMixError(
                f"the U-Net's batch is expected to hold {parts} equal parts, unconditional first "
                f"where guidance is on; found a batch of {batch}"
            )
        images = batch // parts
        return images, images if guided else 0

    def refuse_fusing(self) -> None:
        """Stands in for the U-Net's `fuse_qkv_projections`."""
        calls = [
            "unload_vmix(pipe)" if name == "default" else f"unload_vmix(pipe, {name!r})"
            for name in self.adapters
        ]
        raise VMixError(f"{FUSING}: call {' and '.join(calls)} before fuse_qkv_projections")

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        twin = _State()
        memo[id(self)] = twin
        vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items()})
        pipe = self.pipe()
        twin.pipe = self.pipe if pipe is None else weakref.ref(memo.get(id(pipe), pipe))
        return twin


def _loaded(unet: Any, adapter_name: str) -> _State:
    state: _State = getattr(unet, "_vmix", None) or _State()
    if adapter_name not in state.adapters:
        loaded = ", ".join(map(repr, state.adapters)) or "none"
        raise VMixError(f"no VMix adapter {adapter_name!r} is loaded; loaded are: {loaded}")
    return state


def _open(source: Any, selection: Selections) -> Adapter | Values:
    if isinstance(source, (str, os.PathLike)):
        path, source = source, vmix.open(source)
        if isinstance(source, Untrained):
            raise VMixError(f"{path}: expected an adapter or a preset, found an init file to train")
    if not isinstance(source, (Adapter, Values)):
        raise VMixError(f"expected a path, an Adapter or Values, found {type(source).__name__}")
    if isinstance(source, Values) and selection is not None:
        raise VMixError(
            f"a preset holds one selection and cannot take another, found {selection!r}; "
            "load the adapter that it was made from"
        )
    return source


def _check_pipeline(pipe: Any, apply_to: str, selection: Selections) -> None:
    arguments = inspect.signature(type(pipe).__call__).parameters
    unknown = [name for name in _OTHER_BATCHES if name in arguments]
    if not unknown:
        return
    batches = f"{type(pipe).__name__} (with {unknown[0]}) batches its passes in a way that"
    if apply_to != "both":
        raise VMixError(f"{batches} apply_to={apply_to!r} does not know; load with apply_to='both'")
    if _is_batch(selection):
        raise VMixError(f"{batches} a list of selections does not know; give one for all images")


def _is_batch(selection: Selections) -> bool:
    if isinstance(selection, (str, Mapping)) or not isinstance(selection, Sequence):
        return False
    return not all(isinstance(one, str) for one in selection)


def _each(
    selection: Selections, weights: Callable[[Any], dict[str, float]]
) -> dict[str, float] | list[dict[str, float]]:
    if _is_batch(selection):
        return [weights(one) for one in selection]  # type: ignore[union-attr]
    return weights(selection)


def _coefficients(adapter: Adapter, selection: Selections, apply_to: str) -> _Pair:
    """A of the two passes, [C, R] or [B, C, R]; uncond only for contrast."""
    cond = from_dlpack(adapter.coefficients(selection))
    if apply_to != "contrast":
        return cond, None
    return cond, from_dlpack(adapter.coefficients(_each(selection, adapter.opposite)))


def _fixed(source: Adapter | Values, path: str, apply_to: str) -> _Pair | None:
    """V_a of a preset for the two passes; uncond only for contrast."""
    if isinstance(source, Adapter):
        return None
    if apply_to != "contrast":
        return from_dlpack(source[path]), None
    uncond = source.uncond(path)
    if uncond is None:
        raise VMixError(
            f"apply_to='contrast' needs values for the unconditional pass, and this preset "
            f"was saved for {source.apply_to!r}"
        )
    return from_dlpack(source[path]), from_dlpack(uncond)


def _check_layout(source: Adapter | Values, attns: Mapping[str, Any]) -> None:
    """Says in one sentence that an adapter and a U-Net do not belong together."""
    kind = "adapter" if isinstance(source, Adapter) else "preset"
    context = getattr(source, "context_dim", _CONTEXT_DIMS.get(source.base))
    ours = {layer.name: layer.inner_dim for layer in source.layers}
    theirs = {path: value_linear(attn).out_features for path, attn in attns.items()}
    found = next((value_linear(attn).in_features for attn in attns.values()), 0)
    if ours == theirs and context in (None, found):
        return
    base = _BASES.get((found, len(theirs)), "of another layout")
    known = "" if context is None else f"context {context}, "
    path = next((p for p in sorted({*ours, *theirs}) if ours.get(p) != theirs.get(p)), None)
    first = ""
    if path is not None:
        first = (
            f"; {path}.to_v: expected inner_dim {ours.get(path, '(no such layer)')}, "
            f"found {theirs.get(path, '(no such layer)')}"
        )
    made_for = _made_for(source)
    made_for = f", made for {made_for}" if made_for else ""
    raise VMixError(
        f"this {kind} is for {source.base} ({known}{len(ours)} layers){made_for}, the pipeline's "
        f"U-Net is {base} (context {found}, {len(theirs)} layers){first}"
    )


def _made_for(source: Adapter | Values) -> str | None:
    """The name of the checkpoint that an adapter was made for, where the file says it."""
    base = source.made.get("base") if isinstance(source, Adapter) else None
    return base if isinstance(base, str) else None


def _check_rescaling(path: str, attn: Any) -> None:
    """DoRA multiplies what the layer below it returns, so it would rescale V_a as well."""
    wrapper = attn.to_v
    variants = getattr(wrapper, "lora_variant", None)
    if not variants or wrapper.merged or wrapper.disable_adapters:
        return
    for name in wrapper.active_adapters:
        if name in variants:
            raise VMixError(
                f"{path}.to_v: the LoRA {name!r} is a {type(variants[name]).__name__}, which "
                "rescales the layer's output and VMix with it; call pipe.fuse_lora() first"
            )


def _scales(scale: Scale, paths: Mapping[str, Any]) -> dict[str, float]:
    """λ of every layer from a number or from a dictionary per block (`set_vmix_scale`)."""
    if not isinstance(scale, Mapping):
        return dict.fromkeys(paths, finite_number("scale", scale))
    # down_blocks.1.attentions.0.… is ("down", "block_1", 0), mid_block.… is ("mid", "", 0)
    places: dict[str, tuple[str, str, int]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for path in paths:
        root, *level, _, number = path.split(".transformer_blocks")[0].split(".")
        place = (root.split("_")[0], f"block_{level[0]}" if level else "", int(number))
        places[path] = place
        blocks = sizes.setdefault(place[0], {})
        blocks[place[1]] = max(blocks.get(place[1], 0), place[2] + 1)
    _check_keys("scale", scale, sizes)
    for section, blocks in sizes.items():
        if section != "mid" and isinstance(scale.get(section), Mapping):
            _check_keys(f"scale of {section}", scale[section], blocks)
    scales: dict[str, float] = {}
    for path, (section, block, index) in places.items():
        name, value = section, scale.get(section, 1.0)
        if section != "mid" and isinstance(value, Mapping):
            name, value = f"{section}.{block}", value.get(block, 1.0)
        if isinstance(value, (list, tuple)):
            size = sizes[section][block]
            if len(value) not in (1, size):
                raise VMixError(f"scale of {name}: expected 1 or {size} numbers, found {value!r}")
            value = value[index % len(value)]
        scales[path] = finite_number(f"scale of {name}", value)
    return scales


def _check_keys(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            raise VMixError(f"{name}: expected the keys {', '.join(known)}, found {key!r}")


def finite_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise VMixError(f"{name}: expected a finite number, found {value!r}")
    return float(value)
