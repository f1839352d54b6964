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
from vmix.diffusers.mixing import finite_number
from vmix.diffusers.unet import check_fusing, cross_attentions, unet_of, value_linear
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
# Arguments of a pipeline's call that fit_vmix gives it, and those that go to the text encoders.
_OURS = (
    *("prompt", "prompt_2", "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"),
    *("negative_pooled_prompt_embeds", "num_inference_steps", "guidance_scale", "height", "width"),
    *("generator", "latents", "output_type", "return_dict", "num_images_per_prompt"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs", "ip_adapter_image"),
)
_ENCODED = ("negative_prompt", "negative_prompt_2", "clip_skip")
_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_ARCHITECTURES = {"sd15": "stable-diffusion-v1/vmix", "sdxl": "stable-diffusion-xl-v1-base/vmix"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXTS = 16
"""Encoded at once."""
_CHUNK = 8
"""Pictures whose contexts are held at once: text encoders that are offloaded should not come and go
for every picture."""


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
    call: Mapping[str, Any] | None = None,
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
        labels: name -> (positive words, negative words), or name -> words for a label of one side.
            In a pair, the effects of a list of phrasings are averaged. Or a TOML file
            (docs/fitting.md), or one of the built-in sets, "default" and "anime".
        prompts: a list, or a text file with one on each line; the forty built-in ones if None.
            `{words}` in a prompt is where words go; else they are appended.
        steps: of sampling, for each prompt.
        guidance_scale: of sampling; the pipeline's own default if None. For models that are used
            without guidance, give what you draw with.
        rank: value rows for each side of a label; "bias" is one row that is equal for all tokens.
        height, width: in pixels, both or neither; the model's own if None.
        batch_size: prompts that are drawn at once.
        dtype: of the rows in the file.
        call: further arguments of the pipeline's call that you draw with, such as `clip_skip`,
            `negative_prompt` or `guidance_rescale`.
        sums: a file to keep what was collected in. The same call resumes from it. Remove it when
            the adapter is saved.
        made: further entries of `adapter.made`, such as the base's name.

    `adapter.labels[i].effect` has the numbers of each label, and `adapter.made["warnings"]` what
    looks wrong, which is also logged.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise VMixError(f"{name}: expected a whole number from 1, found {value!r}")
    if dtype not in _DTYPES:
        raise VMixError(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype!r}")
    if guidance_scale is not None:
        guidance_scale = finite_number("guidance_scale", guidance_scale)
    file = None if sums is None else Path(sums)
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        raise VMixError(f"sums: expected a file in a folder that exists, found {file}")
    try:
        fit = _Fit(
            pipe, labels, prompts, steps, guidance_scale, rank, (height, width), seed, call, made
        )
        fit.collect(batch_size, file)
        fitted = fit.solve(_DTYPES[dtype])
    except FitError as error:
        raise VMixError(str(error)) from error
    for warning in fitted.warnings:
        _LOG.warning("VMix: %s", warning)
    return Adapter.from_tensors(dict(fitted.tensors), dict(fitted.metadata))


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
        size: tuple[int | None, int | None] = (None, None),
        seed: int = 0,
        call: Mapping[str, Any] | None = None,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe, self.unet = pipe, unet_of(pipe)
        kinds = [kind.__name__ for kind in type(pipe).__mro__]
        self.xl = _PIPELINES[1] in kinds
        if not self.xl and _PIPELINES[0] not in kinds:
            is_xl = hasattr(pipe, "text_encoder_2")
            raise VMixError(
                f"pipe: expected a {' or a '.join(_PIPELINES)}, found a {type(pipe).__name__}: "
                f"make one of its parts with {_PIPELINES[is_xl]}.from_pipe(pipe)"
            )
        if getattr(self.unet, "encoder_hid_proj", None) is not None:
            raise VMixError(
                "pipe: expected one without an IP-Adapter, found one: call "
                "pipe.unload_ip_adapter() before fit_vmix"
            )
        self.attns = cross_attentions(self.unet)
        if not self.attns:
            raise VMixError("pipe: expected a U-Net with cross-attention (attn2), found none")
        check_fusing(self.unet, self.attns, "fit_vmix")
        for path, attn in self.attns.items():
            if getattr(attn, "norm_cross", None) is not None:
                raise VMixError(f"{path}: expected attention without a norm of its context")
        for name in ("tokenizer", "text_encoder"):
            if getattr(pipe, name, None) is None:
                raise VMixError(f"pipe: expected one with a text encoder, found no {name}")
        if (size[0] is None) != (size[1] is None):
            raise VMixError(f"height and width: expected both or neither, found {size}")
        for name, pixels in zip(("height", "width"), size, strict=True):
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
        self.guidance, self.size = guidance_scale, size
        self.call = dict(call or {})
        known = inspect.signature(pipe.__call__).parameters
        if unknown := [name for name in self.call if name not in known or name in _OURS]:
            raise VMixError(
                f"call: expected arguments of {type(pipe).__name__}'s call that fit_vmix does not "
                f"give it, found {unknown[0]!r}"
            )
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
                "size": [*size],
                "seed": seed,
                "call": {name: repr(value) for name, value in self.call.items()},
                "scheduler": [
                    type(pipe.scheduler).__name__,
                    {name: repr(value) for name, value in sorted(pipe.scheduler.config.items())},
                ],
                "model": self._fingerprint(),
                "made": self.made,
            }
        )

    def _fingerprint(self) -> dict[str, Any]:
        """Of the models as they are loaded: other weights, LoRAs or precisions give other sums."""
        found: dict[str, Any] = {}
        for name in ("unet", "text_encoder", "text_encoder_2"):
            model = unet_of(self.pipe) if name == "unet" else getattr(self.pipe, name, None)
            if model is None:
                continue
            parameters = [p for p in model.parameters() if not p.is_meta and p.is_floating_point()]
            some = parameters[:: max(1, len(parameters) // 16)]
            values = [float(p.detach().flatten()[:4096].float().abs().sum()) for p in some]
            found[name] = [str(model.dtype), [f"{x:.6g}" for x in values]]
        if getattr(self.unet, "peft_config", None):
            strengths = [m.scaling for m in self.unet.modules() if hasattr(m, "scaling")]
            found["loras"] = [self.pipe.get_active_adapters(), strengths]
        return found

    @staticmethod
    def _shape(attn: Any) -> tuple[int, int]:
        """Heads, and the width of one."""
        return int(attn.heads), int(value_linear(attn).out_features) // int(attn.heads)

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
        chunk = batch_size * max(1, _CHUNK // batch_size)
        next_save = 0.0
        with bar, _paused(self.unet), quiet(self.pipe), collector.riding():
            for first in range(0, len(todo), batch_size):
                batch = todo[first : first + batch_size]
                if first % chunk == 0:
                    encoded = self._encode_prompts(todo[first : first + chunk])
                # The conditional part of a batch is its end.
                collector.start(
                    [
                        Picture(k - len(batch), prompt, encoded[prompt]["words"])
                        for k, prompt in enumerate(batch)
                    ]
                )

                def stepped(progress: float, begun: int = first, count: int = len(batch)) -> None:
                    collector.progress = progress
                    bar.update(round((begun + progress * count) * self.steps) - bar.n)

                self._draw(batch, encoded, stepped)
                collector.finish()
                # Writing may take a twentieth of the time.
                last = first + batch_size >= len(todo)
                if file is not None and (last or time.monotonic() >= next_save):
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
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if self.unet.device.type != "cuda":  # it will come while it computes
            free -= sum(p.numel() * p.element_size() for p in self.unet.parameters())
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
                clip_skip=self.call.get("clip_skip"),
            )[0].cpu()
            for first in range(0, len(texts), _TEXTS)
        ]
        return torch.cat(parts)

    def _encode_prompts(self, prompts: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        """Of every prompt what the pipeline is called with, and `words`, its contexts with words;
        on the CPU."""
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if self.xl else []
        given = {name: self.call[name] for name in _ENCODED if name in self.call}
        given = {name: [one] if isinstance(one, str) else one for name, one in given.items()}
        found = {}
        for prompt in prompts:
            encoded = self.pipe.encode_prompt(
                [bare(self.plan.prompts[prompt])],
                device=self.pipe._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                **given,
            )
            found[prompt] = {
                "words": self._encode([text for _, text in self.plan.words(prompt)]),
                **{name: tensor.cpu() for name, tensor in zip(names, encoded, strict=True)},
            }
        return found

    def _draw(
        self,
        prompts: Sequence[int],
        encoded: Mapping[int, Mapping[str, Tensor]],
        stepped: Callable[[float], None],
    ) -> None:
        def on_step(
            pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            stepped((index + 1) / pipe.num_timesteps)
            return {}

        device = self.pipe._execution_device
        embeds = {
            name: torch.cat([encoded[prompt][name] for prompt in prompts]).to(device)
            for name in encoded[prompts[0]]
            if name != "words"
        }
        guidance = {} if self.guidance is None else {"guidance_scale": self.guidance}
        more = {name: value for name, value in self.call.items() if name not in _ENCODED}
        self.pipe(
            **embeds,
            num_inference_steps=self.steps,
            height=self.size[0],
            width=self.size[1],
            generator=[torch.Generator("cpu").manual_seed(self.seed + i) for i in prompts],
            output_type="latent",
            callback_on_step_end=on_step,
            **guidance,
            **more,
        )

    @torch.no_grad()
    def solve(self, dtype: torch.dtype) -> Fitted:
        base, ldm_names = self._layout()
        name = getattr(self.pipe.config, "_name_or_path", "") or ""
        guidance = self.guidance
        if guidance is None:
            guidance = inspect.signature(self.pipe.__call__).parameters["guidance_scale"].default
        bar = tqdm(total=len(self.plan.sides), desc="solving", unit="side", leave=False)
        fitted = fitted_adapter(
            self.plan,
            self.sums,
            base=base,
            ldm_names=ldm_names,
            rank=self.rank,
            dtype=dtype,
            solved=bar.update,
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
        bar.close()
        return fitted

    def _layout(self) -> tuple[str, dict[str, str]]:
        """The base's name in files, and the LDM path of every layer."""
        ours = {path: value_linear(attn).out_features for path, attn in self.attns.items()}
        width = value_linear(next(iter(self.attns.values()))).in_features
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
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, of which there would be one for each picture."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
