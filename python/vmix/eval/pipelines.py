"""The pipeline of a base, and what a row adds to it for a while."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vmix import VMixError
from vmix.diffusers import load_vmix, unload_vmix
from vmix.eval.errors import EvalError, one_line
from vmix.eval.rows import FREEU, Row
from vmix.loading import WeightsError, check_lora
from vmix.train.errors import TrainingError
from vmix.train.single_file import load_pipeline

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
REFUSALS = (
    VMixError, WeightsError, SafetensorError,
    OSError, ValueError, RuntimeError, KeyError, TypeError,
)  # fmt: skip
"""What diffusers, peft and this library raise for a file that does not belong to a base."""


class Pipelines:
    """One pipeline at a time: bases are large."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.base: str | None = None
        self.pipe: Any = None

    def of(self, base: str) -> Any:
        """With the paper's sampler, DDIM, on what else the base's schedule is."""
        if base != self.base:
            self.pipe = self.base = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.pipe = self._load(base)
            self.base = base
        return self.pipe

    def _load(self, base: str) -> Any:
        import diffusers
        import transformers

        # Settings that a base needs are warned of as old, long prompts as cut.
        warnings.filterwarnings("ignore", category=FutureWarning)
        diffusers.logging.set_verbosity_error()
        transformers.logging.set_verbosity_error()
        for library in (diffusers, transformers):
            library.logging.disable_progress_bar()
        try:
            pipe = load_pipeline(base)
        except (TrainingError, VMixError, SafetensorError, OSError, RuntimeError) as error:
            raise EvalError(f"the base {base}: {one_line(error)}") from error
        config = pipe.scheduler.config
        # What SD's DDIM has and the schedulers of some bases do not say.
        more = {key: False for key in ("clip_sample", "set_alpha_to_one") if key not in config}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device, self.dtype)


@contextmanager
def applied(pipe: Any, row: Row) -> Iterator[None]:
    """The base as the row has it; what it was again afterwards."""
    with ExitStack() as stack:
        if row.embedding:
            with _told(row, row.embedding):
                _load_embedding(pipe, row.embedding, str(row.token), stack)
        if row.lora:
            with _told(row, row.lora):
                _load_lora(pipe, row.lora, row.lora_scale, stack)
        if row.freeu:
            base = "sdxl" if type(pipe).__name__ == "StableDiffusionXLPipeline" else "sd15"
            pipe.enable_freeu(**(FREEU[base] if row.freeu is True else row.freeu))
            stack.callback(pipe.disable_freeu)
        if row.adapter:
            with _told(row, row.adapter):
                options: Any = {"apply_to": row.apply_to}
                load_vmix(pipe, row.adapter, row.selection, row.scale, **options)
                stack.callback(unload_vmix, pipe)
        yield


@contextmanager
def _told(row: Row, file: Path) -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        what = one_line(error)
        place = "" if str(file) in what else f"{file}: "
        raise EvalError(f"row {row.name!r}: {place}{what}") from error


def _load_lora(pipe: Any, file: Path, scale: float, stack: ExitStack) -> None:
    stack.callback(pipe.unload_lora_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers that the LoRA leaves alone
        pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name="row", use_safetensors=True,
            local_files_only=True,
        )  # fmt: skip
    if not any(pipe.get_list_adapters().values()):  # diffusers takes it for a LoRA of nothing
        raise ValueError("no LoRA of a U-Net or a text encoder")
    with safe_open(file, framework="pt") as opened:
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        check_lora(opened.keys(), "row", *models)
    pipe.set_adapters("row", scale)


def _load_embedding(pipe: Any, file: Path, token: str, stack: ExitStack) -> None:
    """One tensor [n, d] under any name; for SDXL two, clip_l and clip_g."""
    tensors = load_file(file)
    places = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
    if hasattr(pipe, "text_encoder_2"):
        if set(tensors) != set(places):
            raise ValueError(f"expected clip_l and clip_g, for SDXL; found {', '.join(tensors)}")
    elif len(tensors) == 1:
        tensors = {"clip_l": next(iter(tensors.values()))}
    else:
        raise ValueError(f"expected one tensor, an embedding; found {', '.join(tensors)}")
    for name, tensor in tensors.items():
        encoder, tokenizer = (getattr(pipe, part) for part in places[name])
        width = encoder.config.hidden_size
        if tensor.ndim not in (1, 2) or tensor.shape[-1] != width:
            raise ValueError(
                f"expected an embedding of width {width}, as the base's text encoder has, "
                f"found {list(tensor.shape)}"
            )
        vectors = tensor if tensor.ndim == 2 else tensor[None]
        tokens = [token, *(f"{token}_{n}" for n in range(1, len(vectors)))]
        pipe.load_textual_inversion(
            vectors if len(vectors) > 1 else vectors[0],
            token=token, text_encoder=encoder, tokenizer=tokenizer,
        )  # fmt: skip
        stack.callback(
            pipe.unload_textual_inversion, tokens, text_encoder=encoder, tokenizer=tokenizer
        )
