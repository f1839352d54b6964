"""Randomly initialised diffusers pipelines and adapters that are made for them."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

CONTEXT = 32  # d of the tiny models
IMAGE = 24  # width of the image embeddings that the IP-Adapter takes
LABELS = ("light", "color", "focus")


def unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            **{
                "sample_size": 8,
                "block_out_channels": (32, 64, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "norm_num_groups": 8,
                "cross_attention_dim": CONTEXT,
                **config,
            }
        )
        .eval()
        .requires_grad_(False)
    )


def sd15_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's own shape (860 M parameters), not its weights."""
    return full_size_unet(cross_attention_dim=768, attention_head_dim=8)


def full_size_unet(dtype: torch.dtype = torch.float32, **config: Any) -> UNet2DConditionModel:
    """A U-Net of any configuration, in seconds."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # One drawn row, shifted, instead of 860 M draws: quick, and no two rows are equal.
            width = parameter[0].numel()
            row = torch.randn(width + parameter.shape[0], generator=draw).to(dtype) / width**0.5
            parameter.copy_(row.unfold(0, width, 1)[: parameter.shape[0]].view_as(parameter))
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return model


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def pipeline(kind: str = "sd") -> Any:
    """sd, pag, controlnet, img2img or xl; prompts come embedded, so there is no text encoder."""
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": CONTEXT + 6 * 8,
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
    }
    model = unet(**(xl if kind == "xl" else {}))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    parts: dict[str, Any] = {"vae": _vae(), "text_encoder": None, "tokenizer": None}
    parts |= {"unet": model, "scheduler": scheduler, "feature_extractor": None}
    if kind == "xl":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        pipe: Any = StableDiffusionXLPipeline(**parts)
    elif kind == "controlnet":
        control = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(8, 16))
        for parameter in control.parameters():  # zero convolutions would do nothing
            nn.init.normal_(parameter, std=0.05)
        parts |= {"controlnet": control, "safety_checker": None}
        pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    else:
        classes = {
            "sd": StableDiffusionPipeline,
            "pag": StableDiffusionPAGPipeline,
            "img2img": StableDiffusionImg2ImgPipeline,
        }
        parts |= {"safety_checker": None}
        pipe = classes[kind](**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, *, batch: int = 1, tokens: int = 77, **options: Any) -> Tensor:
    """The latents after a few guided steps from a fixed noise."""
    draw = torch.Generator().manual_seed(1)
    dtype = pipe.unet.dtype

    def prompts() -> Tensor:
        return torch.randn(batch, tokens, pipe.unet.config.cross_attention_dim, generator=draw)

    options = {
        "prompt_embeds": prompts().to(dtype),
        "negative_prompt_embeds": prompts().to(dtype),
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "generator": torch.Generator().manual_seed(2),
        "output_type": "latent",
        **options,
    }
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        options |= {"image": torch.randn(1, 4, 8, 8, generator=draw).to(dtype)}
    else:
        options = {"height": 16, "width": 16, **options}
    if isinstance(pipe, StableDiffusionXLPipeline):
        pooled = torch.randn(2, batch, CONTEXT, generator=draw).to(dtype)
        options["pooled_prompt_embeds"], options["negative_pooled_prompt_embeds"] = pooled
    if isinstance(pipe, StableDiffusionControlNetPipeline):
        options["image"] = torch.rand(1, 3, 16, 16, generator=draw).to(dtype)
    result: Tensor = pipe(**options).images
    return result


def adapter(
    model: nn.Module,
    *,
    base: str = "other",
    apply_to: str = "cond",
    tokens: int = 77,
    seed: int = 3,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The paper's matrices for every cross-attention of `model`, and metadata for them."""
    draw = torch.Generator().manual_seed(seed)
    paths = {
        name.removesuffix(".to_v"): module
        for name, module in model.named_modules()
        if name.endswith("attn2.to_v")
    }
    d = next(iter(paths.values())).in_features

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    tensors = {
        "aes_emb": normal(len(LABELS), 2, d),
        "projection.linear.weight": normal(tokens, len(LABELS)),
        "projection.norm.weight": 1 + normal(d, std=0.1),
        "projection.norm.bias": normal(d, std=0.1),
        "projection.zero.weight": normal(d, d, std=d**-0.5),
        "projection.zero.bias": normal(d, std=0.1),
    }
    for name, module in paths.items():
        tensors[f"{name}.to_v_aes.weight"] = normal(module.out_features, d, std=d**-0.5)
    labels = [
        {
            "name": name,
            "dimension": name,
            "positive": [f"good {name}"],
            "negative": ["[V]"],
        }
        for name in LABELS
    ]
    metadata = {
        "vmix.base": base,
        "vmix.labels": json.dumps(labels),
        "vmix.context_tokens": str(tokens),
        "vmix.norm_eps": "1e-5",
        "vmix.apply_to": apply_to,
        "vmix.made": json.dumps({"method": "trained", "base": "tiny"}),
    }
    if base == "other":
        names = {name: f"block_{i}.transformer_blocks.0.attn2" for i, name in enumerate(paths)}
        metadata["vmix.ldm_names"] = json.dumps(names)
    return tensors, metadata


def lora(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """A LoRA on every projection, in the form that `pipe.load_lora_weights` takes."""
    torch.manual_seed(4)
    twin = UNet2DConditionModel.from_config(model.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    twin.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **options)
    )
    return {f"unet.{key}": value for key, value in get_peft_model_state_dict(twin).items()}


def load_ip_adapter(pipe: Any) -> dict[str, Any]:
    """Gives the pipeline an IP-Adapter of four tokens; returns what a call then needs."""
    draw = torch.Generator().manual_seed(5)
    width = pipe.unet.config.cross_attention_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * shape[-1] ** -0.5

    weights = {}
    for index, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            inner = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_kv_dim
            weights[f"{index}.to_k_ip.weight"] = normal(inner, width)
            weights[f"{index}.to_v_ip.weight"] = normal(inner, width)
    projection = {
        "proj.weight": normal(4 * width, IMAGE),
        "proj.bias": normal(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    image = torch.randn(2, 1, IMAGE, generator=draw)  # [uncond; cond]
    return {"ip_adapter_image_embeds": [image.to(pipe.unet.dtype)]}
