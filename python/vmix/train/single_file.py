"""Pipelines from what bases come in: diffusers folders, and single files as ComfyUI loads them.

diffusers reads single files too, with configurations that it would fetch from the hub. Those of
SD1.5 and SDXL come along here (`configs`, as they are published), so that nothing is downloaded.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vmix import loading
from vmix._native import VMixError, clip_merges
from vmix._native import open as open_vmix
from vmix.loading import WeightsError
from vmix.train.errors import TrainingError

CONFIGS = Path(__file__).parent / "configs"
PREDICTIONS = ("epsilon", "v_prediction")
SAFE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
UNET = "model.diffusion_model."
TOKENS = "embeddings.token_embedding.weight"
OTHERS = {
    8: "for editing pictures",
    9: "for inpainting",
    1024: "of Stable Diffusion 2",
    1280: "of SDXL's refiner",
}
"""What a U-Net's channels, or the width of its context, say of models that are not trained for."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Kind:
    """A family of models."""

    pipeline: str
    layers: int
    """Cross-attention layers, which a pruned or grown U-Net has more or fewer of."""
    context: int
    """Width of what those are given."""
    tensors: int
    """Of its U-Net in a single file."""
    parts: Mapping[str, str]
    """A tensor of every other part of a single file."""


VAE = "first_stage_model."
VAE_TENSORS = 248
AUTOENCODER = {"autoencoder": f"{VAE}encoder.conv_in.weight"}
KINDS = {
    "sd15": Kind(
        "StableDiffusionPipeline",
        *(16, 768, 686),
        {"text encoder": f"cond_stage_model.transformer.text_model.{TOKENS}", **AUTOENCODER},
    ),
    "sdxl": Kind(
        "StableDiffusionXLPipeline",
        *(70, 2048, 1680),
        {
            "first text encoder": f"conditioner.embedders.0.transformer.text_model.{TOKENS}",
            "second text encoder": "conditioner.embedders.1.model.token_embedding.weight",
            **AUTOENCODER,
        },
    ),
}


def is_of_hub(path: str) -> bool:
    """Whether it is the name of a repository, and of nothing that is there."""
    place = Path(path)
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and place.suffix not in (SAFE, *PICKLES)
    return bool(named) and not place.exists()


def load_pipeline(
    path: str, *, prediction_type: str | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A StableDiffusionPipeline or StableDiffusionXLPipeline, without a safety checker.

    `path` is a folder or a repository of the hub as diffusers has them, or a `.safetensors` file
    with LDM names, for which nothing is downloaded. What the U-Net predicts is what the folder
    says; a file's predicts noise, unless it has ComfyUI's marks: an empty tensor `v_pred`, and
    `ztsnr` beside it where the last step is pure noise. `prediction_type` goes before either.
    """
    import diffusers

    if prediction_type not in (None, *PREDICTIONS):
        expected = " or ".join(PREDICTIONS)
        raise TrainingError(f"prediction_type: expected {expected}, found {prediction_type!r}")
    changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type else {}
    place = Path(path)
    if place.is_file():
        shapes = _header(place)
        pipe = _of_file(place, shapes, dtype)
        changes.setdefault("prediction_type", PREDICTIONS["v_pred" in shapes])
        if {"v_pred", "ztsnr"} <= shapes.keys() and changes["prediction_type"] == PREDICTIONS[1]:
            # The class of SD1.5's scheduler has no such schedule.
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif place.is_dir() or is_of_hub(path):
        pipe = _of_folder(path, dtype)
    else:
        raise TrainingError(f"{path}: no such file or folder")
    for _, module in _modules(pipe):
        if module.dtype != dtype:
            module.to(dtype)
    if changes:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def _of_folder(path: str, dtype: torch.dtype) -> Any:
    import diffusers

    known = [kind.pipeline for kind in KINDS.values()]
    unet = Path(path) / "unet"
    halves = any(unet.glob("*.fp16*")) and not any(unet.glob("*model.safetensors*"))
    try:
        name = diffusers.DiffusionPipeline.load_config(path).get("_class_name")
        if name not in known:
            raise TrainingError(f"{path} is a {name}; expected {' or '.join(known)}")
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        pipe = loading.load_pipeline(
            getattr(diffusers, name),
            path,
            variant="fp16" if halves else None,
            dtype=dtype,
            **(unchecked if name == known[0] else {}),
        )
    except WeightsError as error:
        raise TrainingError(str(error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{path}: {' '.join(str(error).split())}") from error
    _check_channels(path, pipe.unet.config.in_channels, pipe.vae.config.latent_channels)
    return pipe


def _of_file(path: Path, shapes: Shapes, dtype: torch.dtype) -> Any:
    import diffusers

    name = _kind(path, shapes)
    with TemporaryDirectory() as folder:
        config = Path(folder) / name
        shutil.copytree(CONFIGS / name, config)
        for tokenizer in config.glob("tokenizer*"):
            _write_vocabulary(tokenizer)
        try:
            pipe = getattr(diffusers, KINDS[name].pipeline).from_single_file(
                str(path), config=str(config), local_files_only=True, torch_dtype=dtype
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            what = " ".join(str(error).split()).partition(" If you want")[0]
            raise TrainingError(f"{path}: not a whole checkpoint of {name}: {what}") from error
    for part, module in _modules(pipe):
        tensors = module.state_dict()
        missing = [tensor for tensor, values in tensors.items() if values.is_meta]
        if missing:
            what = loading.lack(f"{part} ({type(module).__name__})", missing, len(tensors))
            raise TrainingError(f"{path}: not a whole checkpoint of {name}: {what}")
    return pipe


def _modules(pipe: Any) -> list[tuple[str, Any]]:
    parts = pipe.components.items()
    return [(name, part) for name, part in parts if isinstance(part, torch.nn.Module)]


def _write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary as transformers reads it: bytes, bytes that end a word, merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = clip_merges().splitlines()[1:]
    bytes_ = sorted(ByteLevel.alphabet())
    words = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


def _header(path: Path) -> Shapes:
    """The shapes of all tensors. Nothing else is read; that the file is whole is checked."""
    if path.suffix in PICKLES:
        raise TrainingError(
            f"{path}: a pickle, which can run programs and is never loaded; expected {SAFE}"
        )
    if path.suffix != SAFE:
        raise TrainingError(f"{path}: a file {path.suffix}; expected {SAFE}, or a folder")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, tensor in tensors.items():
                kind = tensor.get_dtype()
                weights = name.startswith(UNET) and not kind.startswith(("F", "BF"))
                if weights or name.endswith((".scale_weight", ".weight_scale", "scaled_fp8")):
                    raise TrainingError(
                        f"{path}: quantised weights ({name}, {kind}); expected plain ones"
                    )
            return {name: tensor.get_shape() for name, tensor in tensors.items()}
    except SafetensorError as error:
        # Our own reader names web pages, LFS pointers and pickles, and counts missing bytes.
        try:
            open_vmix(path)
        except VMixError as named:
            raise TrainingError(str(named)) from error
        raise TrainingError(f"{path}: not a safetensors file: {error}") from error
    except OSError as error:
        raise TrainingError(f"{path}: {error}") from error


def _kind(path: Path, shapes: Shapes) -> str:
    """Which of KINDS a file is; TrainingError says what it is instead."""

    def refused(found: str) -> TrainingError:
        return TrainingError(
            f"{path}: {found}; expected a whole checkpoint of SD1.5 or SDXL with LDM names, "
            "as ComfyUI loads it"
        )

    layers = [name for name in shapes if re.match(rf"{UNET}.*\.attn2\.to_k\.weight$", name)]
    first = f"{UNET}input_blocks.0.0.weight"
    if first not in shapes or not layers:
        for pattern, found in (
            (r"(unet\.)?(down_blocks|mid_block|up_blocks)\.", "a U-Net with diffusers' names"),
            (r"(diffusion_model\.)?input_blocks\.", "a U-Net alone"),
            (r"lora_|.*[._]lora[._]|.*\.hada_", "a LoRA"),
        ):
            if any(re.match(pattern, name) for name in shapes):
                raise refused(found)
        raise refused(f"no Stable Diffusion U-Net, but {next(iter(shapes), 'nothing')}")
    _check_channels(str(path), shapes[first][1], 4)
    if any(name.startswith(("edm_mean", "edm_vpred.")) for name in shapes):
        raise refused("a model of EDM's noise levels, as Playground v2.5 and CosXL are")
    context = shapes[layers[0]][1]
    if context in OTHERS:
        raise refused(f"a model {OTHERS[context]}")
    for name, kind in KINDS.items():
        if (len(layers), context) == (kind.layers, kind.context):
            missing = [part for part, tensor in kind.parts.items() if tensor not in shapes]
            if missing:
                raise refused(f"no {' and no '.join(missing)} (no {kind.parts[missing[0]]})")
            for prefix, whole in ((UNET, kind.tensors), (VAE, VAE_TENSORS)):
                count = sum(tensor.startswith(prefix) for tensor in shapes)
                if count < whole:
                    raise refused(f"{count} of the {whole} tensors {prefix}*")
            return name
    raise refused(f"a U-Net of {len(layers)} cross-attention layers with a context of {context}")


def _check_channels(path: str, channels: int, latents: int) -> None:
    """Inpainting models and the like take more than latents."""
    if channels != latents:
        what = OTHERS.get(channels, "of another kind")
        raise TrainingError(f"{path}: a model {what}, with {channels} channels; expected {latents}")
