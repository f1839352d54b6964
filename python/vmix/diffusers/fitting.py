"""Fits labels on a pipeline, by drawing a few pictures with it (vmix.fit)."""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vmix import Adapter, VMixError, ldm_name, unet_layers
from vmix.diffusers.mixing import _check_fusing, _cross_attentions, _linear, _number, _unet
from vmix.fit import (
    Collector,
    FitError,
    Fitted,
    Picture,
    Plan,
    Sums,
    check_rank,
    fitted_adapter,
    read_labels,
    read_prompts,
    sums_size,
)
from vmix.fit.labels import Labels
from vmix.fit.prompts import Prompts, bare
from vmix.fit.result import hash_of_texts
from vmix.fit.solve import Rank

__all__ = ["fit_vmix"]

_LOG = logging.getLogger(__name__)
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_ARCHITECTURES = {"sd15": "stable-diffusion-v1/vmix", "sdxl": "stable-diffusion-xl-v1-base/vmix"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXTS = 16
"""Encoded at once."""


def fit_vmix(
    pipe: Any,
    labels: Labels,
    prompts: Prompts = None,
    steps: int = 8,
    guidance_scale: float | None = None,
    rank: int | Literal["bias"] = 4,
    *,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    dtype: Literal["float32", "float16", "bfloat16"] = "float16",
    sums: str | os.PathLike[str] | None = None,
    made: Mapping[str, Any] | None = None,
) -> Adapter:
    """An adapter for this pipeline's model, from words alone.

        adapter = fit_vmix(pipe, {"light": ("bright", "dark"), "calm": "calm mood"})
        load_vmix(pipe, adapter, {"light": 0.8})
        adapter.save("mine.safetensors")

    Draws `prompts` and finds the values that change the attention's output as the words do when
    they are in the prompt. Forward passes only; no more memory than drawing needs, but for the sums
    (docs/fitting.md). The pipeline is used as it is, with its LoRAs, scheduler, quantised weights
    and offloading; adapters loaded with `load_vmix` are off for the duration.

    Args:
        pipe: a StableDiffusionPipeline or a StableDiffusionXLPipeline.
        labels: name -> (positive words, negative words), or words alone for a label of one side; a
            list of phrasings in place of words is averaged. Or a TOML file (docs/fitting.md), or
            "default" or "anime", which come with the package.
        prompts: a list, or a text file with one on each line; some forty of all kinds if None.
            `{words}` in a prompt is where words go; else they are appended.
        steps: of sampling, for each prompt.
        guidance_scale: of sampling; the pipeline's own default if None. For models that are drawn
            without guidance, give what you draw with.
        rank: value rows for each side of a label; "bias" is one row that is equal for all tokens.
        height, width: in pixels; the model's own if None.
        batch_size: prompts that are drawn at once.
        dtype: of the rows in the file.
        sums: a file that keeps what was collected, now and then: the same call goes on from there.
            It is removed at the end.
        made: further entries of `adapter.made`, such as the base's name.

    `adapter.labels[i].effect` has numbers for each label and `adapter.made["warnings"]` what looks
    wrong; the log says both.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise VMixError(f"{name}: expected a whole number from 1, found {value!r}")
    if dtype not in _DTYPES:
        raise VMixError(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}")
    if guidance_scale is not None:
        guidance_scale = _number("guidance_scale", guidance_scale)
    file = None if sums is None else Path(sums)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise VMixError(f"sums: expected a file in a folder that exists, found {file}")
    try:
        fit = _Fit(pipe, labels, prompts, steps, guidance_scale, rank, height, width, seed, made)
        fit.collect(batch_size, file)
        fitted = fit.solve(_DTYPES[dtype])
    except FitError as error:
        raise VMixError(str(error)) from error
    adapter = Adapter.from_tensors(dict(fitted.tensors), dict(fitted.metadata))
    for warning in fitted.warnings:
        _LOG.warning("VMix: %s", warning)
    if file is not None:
        file.unlink(missing_ok=True)
    return adapter


class _Fit:
    """One call of `fit_vmix`."""

    def __init__(
        self,
        pipe: Any,
        labels: Labels,
        prompts: Prompts,
        steps: int,
        guidance_scale: float | None,
        rank: Rank,
        height: int | None,
        width: int | None,
        seed: int,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.unet = pipe, _unet(pipe)
        kinds = [kind.__name__ for kind in type(pipe).__mro__]
        self.xl = _PIPELINES[1] in kinds
        if not self.xl and _PIPELINES[0] not in kinds:
            raise VMixError(
                f"pipe: expected a {' or a '.join(_PIPELINES)}, found a {type(pipe).__name__}: "
                f"make one of its parts with {_PIPELINES[0]}.from_pipe(pipe)"
            )
        if getattr(self.unet, "encoder_hid_proj", None) is not None:
            raise VMixError(
                "pipe: expected one without an IP-Adapter, found one: call "
                "pipe.unload_ip_adapter() before fit_vmix"
            )
        self.attns = _cross_attentions(self.unet)
        if not self.attns:
            raise VMixError("pipe: expected a U-Net with cross-attention (attn2), found none")
        _check_fusing(self.unet, self.attns)
        for path, attn in self.attns.items():
            if getattr(attn, "norm_cross", None) is not None:
                raise VMixError(f"{path}: expected attention without a norm of its context")
        for name in ("tokenizer", "text_encoder"):
            if getattr(pipe, name, None) is None:
                raise VMixError(f"pipe: expected one with a text encoder, found no {name}")
        for name, pixels in (("height", height), ("width", width)):
            unit = pipe.vae_scale_factor
            if pixels is not None and (type(pixels) is not int or pixels < 1 or pixels % unit):
                raise VMixError(f"{name}: expected a multiple of {unit}, found {pixels!r}")
        self.tokens = int(pipe.tokenizer.model_max_length)
        check_rank(rank, self.tokens)
        self.steps, self.rank, self.seed = steps, rank, seed
        try:
            self.made = json.loads(json.dumps(dict(made or {})))
        except (TypeError, ValueError) as error:
            raise VMixError(f"made: expected what JSON can hold: {error}") from None
        self.guidance, self.size = guidance_scale, (height, width)
        self.plan = Plan(read_labels(labels), read_prompts(prompts), self._count, self.tokens)
        for prompt in self.plan.too_long:
            _LOG.info("VMix: left out, too long for the text encoder: %s", prompt)
        self.sums = Sums(
            {
                "layers": {path: self._shape(attn) for path, attn in self.attns.items()},
                "sides": [[s.label, s.side, *s.phrasings] for s in self.plan.sides],
                "prompts": hash_of_texts(self.plan.prompts),
                "steps": steps,
                "guidance_scale": guidance_scale,
                "size": [height, width],
                "seed": seed,
                "scheduler": type(pipe.scheduler).__name__,
                "made": self.made,
            }
        )

    @staticmethod
    def _shape(attn: Any) -> tuple[int, int]:
        """Heads, and the width of one."""
        return int(attn.heads), int(_linear(attn).out_features) // int(attn.heads)

    def _count(self, text: str) -> int:
        """Tokens between start and end."""
        counts = []
        for name in ("tokenizer", "tokenizer_2"):
            if (tokenizer := getattr(self.pipe, name, None)) is not None:
                converted = self.pipe.maybe_convert_prompt(text, tokenizer)
                # With a length that none reaches, so that nothing is said of long ones.
                ids = tokenizer(converted, truncation=True, max_length=2**16).input_ids
                counts.append(len(ids) - 2)
        return max(counts)

    @torch.no_grad()
    def collect(self, batch_size: int, file: Path | None) -> None:
        """Draws all prompts that are not yet in the sums."""
        device = self._sums_device()
        if file is not None and file.exists():
            self.sums.load(file, device or self.pipe._execution_device)
        todo = [i for i in range(len(self.plan.prompts)) if i not in self.sums.done]
        todo = [i for i in todo if self.plan.words(i)]
        if not todo:
            return
        collector = Collector(self.attns, self.plan, self.sums, device)
        bar = tqdm(total=len(todo) * self.steps, desc="fitting", unit="step")
        with bar, _paused(self.unet), _quiet(self.pipe), collector.riding():
            contexts = self._encode([text for i in todo for _, text in self.plan.words(i)])
            drawn = self._encode_drawn([bare(self.plan.prompts[i]) for i in todo])
            counts = [len(self.plan.words(i)) for i in todo]
            told = torch.split(contexts, counts)
            next_save = 0.0
            for first in range(0, len(todo), batch_size):
                batch = range(first, min(first + batch_size, len(todo)))
                # The conditional part of a batch is its end.
                collector.start([Picture(k - batch.stop, todo[k], told[k]) for k in batch])

                def stepped(progress: float, count: int = len(batch)) -> None:
                    collector.progress = progress
                    bar.update(count)

                embeds = {key: x[batch.start : batch.stop] for key, x in drawn.items()}
                self._draw([todo[k] for k in batch], embeds, stepped)
                collector.finish()
                # Writing may take a twentieth of the time.
                if file is not None and time.monotonic() >= next_save:
                    begun = time.monotonic()
                    self.sums.save(file)
                    next_save = time.monotonic() + 20 * (time.monotonic() - begun)

    def _sums_device(self) -> torch.device | None:
        """The CPU where sums would take more than half of the memory that is free on the GPU."""
        device = torch.device(self.pipe._execution_device)
        if device.type != "cuda":
            return None
        shapes = {path: self._shape(attn) for path, attn in self.attns.items()}
        free, _ = torch.cuda.mem_get_info(device)
        needed = sums_size(self.plan, shapes, self.tokens)
        return torch.device("cpu") if needed > free // 2 else None

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Contexts [B, C, d], on the CPU."""
        parts = [
            self.pipe.encode_prompt(
                [*texts[first : first + _TEXTS]],
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )[0].cpu()
            for first in range(0, len(texts), _TEXTS)
        ]
        return torch.cat(parts)

    def _encode_drawn(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the pipeline is called with for bare prompts, on the CPU."""
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if self.xl else []
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for first in range(0, len(texts), _TEXTS):
            encoded = self.pipe.encode_prompt(
                [*texts[first : first + _TEXTS]],
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            for name, tensor in zip(names, encoded, strict=True):
                parts[name].append(tensor.cpu())
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _draw(
        self, prompts: Sequence[int], embeds: Mapping[str, Tensor], stepped: Callable[[float], None]
    ) -> None:
        def told(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            stepped((index + 1) / pipe.num_timesteps)
            return {}

        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        device = self.pipe._execution_device
        self.pipe(
            **{name: tensor.to(device) for name, tensor in embeds.items()},
            num_inference_steps=self.steps,
            height=self.size[0],
            width=self.size[1],
            generator=[torch.Generator("cpu").manual_seed(self.seed + i) for i in prompts],
            output_type="latent",
            callback_on_step_end=told,
            **guidance,
        )

    @torch.no_grad()
    def solve(self, dtype: torch.dtype) -> Fitted:
        base, ldm_names = self._layout()
        name = getattr(self.pipe.config, "_name_or_path", "") or ""
        guidance = self.guidance
        if guidance is None:
            guidance = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        return fitted_adapter(
            self.plan,
            self.sums,
            base=base,
            ldm_names=ldm_names,
            rank=self.rank,
            dtype=dtype,
            aes_emb=self._aes_emb(),
            made={
                **({"base": Path(name).name} if name else {}),
                "steps": self.steps,
                "guidance": guidance,
                "seed": self.seed,
                "scheduler": type(self.pipe.scheduler).__name__,
                **self.made,
            },
            modelspec={
                "sai_model_spec": "1.0.0",
                "architecture": _ARCHITECTURES.get(base, "unet/vmix"),
                "implementation": "diffusers",
                "title": ", ".join(label.name for label in self.plan.labels),
            },
        )

    def _layout(self) -> tuple[str, dict[str, str]]:
        """The base's name in files, and the LDM path of every layer."""
        ours = {path: _linear(attn).out_features for path, attn in self.attns.items()}
        width = _linear(next(iter(self.attns.values()))).in_features
        bases: tuple[Literal["sd15", "sdxl"], ...] = ("sd15", "sdxl")
        for base, context in zip(bases, (768, 2048), strict=True):
            known = {layer.name: layer for layer in unet_layers(base)}
            same = ours == {name: layer.inner_dim for name, layer in known.items()}
            if same and (width, self.tokens) == (context, 77):
                return base, {name: str(layer.ldm_name) for name, layer in known.items()}
        blocks = self.unet.config.layers_per_block
        count = blocks if isinstance(blocks, int) else blocks[0]
        return "other", {path: ldm_name(path, count) or f"{path}.ldm" for path in ours}

    def _aes_emb(self) -> Tensor:
        """[N, 2, d]: the feature at the end of text of each side's words; the mean of phrasings."""
        sides = [
            words
            for label in self.plan.labels
            for words in (label.positive, label.negative or ("",))
        ]
        means = []
        for words in sides:
            pairs = zip(self._encode(words), words, strict=True)
            features = [context[self._count(text) + 1] for context, text in pairs]
            means.append(torch.stack(features).float().mean(0))
        return torch.stack(means).view(len(self.plan.labels), 2, -1)


@contextmanager
def _paused(unet: nn.Module) -> Iterator[None]:
    """Adapters that are loaded add nothing."""
    state = getattr(unet, "_vmix", None)
    layers = [] if state is None else [*state.layers.values()]
    for layer in layers:
        layer.remove()
    try:
        yield
    finally:
        for layer in layers:
            layer.install()


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, of which there would be one for each prompt."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
