"""The project's own small model as ComfyUI objects; its weights come with the pack, in demo/.

It is a U-Net of SD1.5's kind with a CLIP text encoder and a KL autoencoder, all far smaller, so
ComfyUI's own classes run it; only the sizes below are ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.clip_model import CLIPTextModel
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer

from .files import VMix, open_file

FOLDER = Path(__file__).resolve().parent / "demo"
MODEL = FOLDER / "model"
ADAPTER = FOLDER / "adapter.safetensors"
NAME = "VMix demo adapter"


class LatentFormat(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
    latent_channels = 16

    def __init__(self) -> None:
        self.scale_factor = _config("vae")["scaling_factor"]


class DemoModel(comfy.supported_models_base.BASE):  # type: ignore[misc]
    unet_config: dict[str, Any] = {}  # noqa: RUF012  (as in ComfyUI's own subclasses)
    # "linear" is ComfyUI's name for diffusers' "scaled_linear".
    sampling_settings = {  # noqa: RUF012
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "zsnr": True,
    }
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012
    latent_format = LatentFormat

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION

    def inpaint_model(self) -> bool:
        return False  # ComfyUI takes more than four channels for the sign of one


UNET_CONFIG: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "model_channels": 64,
    "channel_mult": [1, 2],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 96,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}


class TextModel(CLIPTextModel):  # type: ignore[misc]
    """ComfyUI's CLIP text model has the vocabulary's size built in."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings.token_embedding = operations.Embedding(
            config["vocab_size"], config["hidden_size"], dtype=dtype, device=device
        )


class ClipModel(SDClipModel):  # type: ignore[misc]
    def __init__(
        self, device: Any = "cpu", dtype: Any = None, model_options: Any = None, **_: Any
    ) -> None:
        config = _config("text_encoder")
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=config["max_position_embeddings"],
            textmodel_json_config=config,
            model_class=TextModel,
            special_tokens={
                "start": config["bos_token_id"],
                "end": config["eos_token_id"],
                "pad": config["pad_token_id"],
            },
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DemoClip(SD1ClipModel):  # type: ignore[misc]
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, clip_model=ClipModel
        )


class ClipTokenizer(SDTokenizer):  # type: ignore[misc]
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        config = _config("text_encoder")
        super().__init__(
            str(MODEL / "tokenizer"),
            max_length=config["max_position_embeddings"],
            embedding_directory=embedding_directory,
            embedding_size=config["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


class DemoTokenizer(SD1Tokenizer):  # type: ignore[misc]
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=ClipTokenizer)


def load() -> tuple[Any, Any, Any, VMix]:
    """MODEL, CLIP, VAE and VMIX."""
    return load_model(), load_clip(), load_vae(), open_file(ADAPTER, NAME)


def load_model() -> Any:
    names = comfy.utils.unet_to_diffusers(UNET_CONFIG)
    weights = {names[key]: value for key, value in _weights("unet").items()}
    config = DemoModel(UNET_CONFIG)
    device = comfy.model_management.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights)
    dtype = comfy.model_management.unet_dtype(
        model_params=parameters, supported_dtypes=config.supported_inference_dtypes
    )
    config.set_inference_dtype(
        dtype,
        comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes),
    )
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(weights, device=offload)
    _check("unet", model.diffusion_model.state_dict().keys() - weights.keys())
    model.load_model_weights(weights)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


def load_clip() -> Any:
    weights = _weights("text_encoder")
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClip),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    named = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
    # ComfyUI has its own for a text model without a projection.
    _check("text_encoder", set(clip.load_sd(named)[0]) - {"text_projection.weight"})
    return clip


def load_vae() -> Any:
    config = _config("vae")
    channels = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [c // channels[0] for c in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    weights = comfy.diffusers_convert.convert_vae_state_dict(_weights("vae"))
    names = set(weights)
    vae = comfy.sd.VAE(sd=weights, config={"params": params})
    _check("vae", vae.first_stage_model.state_dict().keys() - names)
    vae.latent_channels = config["latent_channels"]
    return vae


def _check(part: str, missing: Iterable[str]) -> None:
    """ComfyUI only logs what it finds no weights for, and leaves it as memory happens to be."""
    names = sorted(missing)
    if names:
        raise ValueError(
            f"{MODEL / part}: {len(names)} weights are missing, such as {names[0]}; "
            "the node pack may be incomplete: install it anew"
        )


def _config(part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODEL / part / "config.json").read_text("utf-8"))
    return config


def _weights(part: str) -> dict[str, torch.Tensor]:
    name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    weights: dict[str, torch.Tensor] = comfy.utils.load_torch_file(
        str(MODEL / part / f"{name}.safetensors"), safe_load=True
    )
    return weights
