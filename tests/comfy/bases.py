"""Random base models with everything a numeric test needs: adapter, prompts, noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import host
import torch
import vmix
from torch import Tensor
from two_branches import two_branches

from comfy_nodes import nodes
from comfy_nodes.files import VMix, open_file

LABELS = ("light", "color", "focus")
WEIGHTS = {"light": 1.0, "color": 0.25, "focus": 1.75}  # of every test's selection
NEUTRAL = {"focus": 0.5}  # the other labels have no neutral weight
OPPOSITE = [0.0, 0.0, -0.75]  # of WEIGHTS: 2·neutral − w, or 0
D = {"sd15": 768, "sdxl": 2048}


@dataclass
class Base:
    kind: str
    model: Any
    layers: Mapping[str, tuple[str, int]]  # diffusers path → LDM path, inner_dim
    tensors: dict[str, Tensor] = field(default_factory=dict)  # the paper's matrices
    vmix: VMix | None = None
    size: int = 8  # of the latents

    @property
    def ldm_names(self) -> dict[str, str]:
        return {name: ldm for name, (ldm, _) in self.layers.items()}

    def prompt(self, seed: int, tokens: int = 77) -> Any:
        draw = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, D[self.kind], generator=draw)
        return [[context, {"pooled_output": torch.randn(1, 1280, generator=draw)}]]

    def sample(
        self,
        model: Any,
        *,
        cfg: float = 5.0,
        batch: int = 1,
        tokens: tuple[int, int] = (77, 77),
        steps: int = 2,
        control: Mapping[str, Any] | None = None,
        each: Sequence[Mapping[str, Any]] = ({}, {}),
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Latents after a few steps of the real sampler from a fixed noise. `control` is for both
        prompts, `each` for the positive and for the negative one."""
        if host.PACKAGED:
            # There, a clone of the model does not learn that another clone has been loaded,
            # so its own weight patches (LoRA) would not be applied, VMix or not.
            comfy.model_management.unload_all_models()
        prompts = self.prompt(1, tokens[0]), self.prompt(2, tokens[1])
        for prompt, options in zip(prompts, each, strict=True):
            prompt[0][1].update({**(control or {}), **options})
        latent = torch.zeros(batch, 4, *(size or (self.size, self.size)))
        noise = comfy.sample.prepare_noise(latent, 7)
        return comfy.sample.sample(
            model, noise, steps, cfg, "euler", "normal", *prompts, latent,
            disable_pbar=True, seed=7,
        )  # fmt: skip

    def ours(self, model: Any, **options: Any) -> Any:
        """The model after VMixApply."""
        inputs = {
            "vmix": self.vmix,
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "apply_to": "file",
            "blocks": "",
            "aesthetics": WEIGHTS,
        }
        return nodes.VMixApply.execute(model, **{**inputs, **options}).args[0]

    def literal(self, model: Any, **options: Any) -> Any:
        """The model after the literal two branches."""
        return two_branches(
            model,
            self.tensors,
            self.ldm_names,
            list(WEIGHTS.values()),
            OPPOSITE,
            per_depth=self.kind == "sdxl",
            **options,
        )


def load(kind: str, path: Path, width: int | None = None, **options: Any) -> Base:
    """A base from a checkpoint; `width` is that of every layer of a mini."""
    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False, model_options=options
    )
    layers = {
        layer.name: (layer.ldm_name, width or layer.inner_dim) for layer in vmix.unet_layers(kind)
    }
    return Base(kind, model, layers)


def adapter_tensors(base: Base, seed: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    d = D[base.kind]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    tensors = {
        "aes_emb": normal(len(LABELS), 2, d),
        "projection.linear.weight": normal(77, len(LABELS)),
        "projection.norm.weight": 1 + normal(d, std=0.1),
        "projection.norm.bias": normal(d, std=0.1),
        "projection.zero.weight": normal(d, d, std=d**-0.5),
        "projection.zero.bias": normal(d, std=0.1),
    }
    for name, (_, width) in base.layers.items():
        tensors[f"{name}.to_v_aes.weight"] = normal(width, d, std=d**-0.5)
    return tensors


def adapter_metadata(base: Base, known: bool = False, **more: str) -> dict[str, str]:
    """`known`: as an adapter for SD1.5 or SDXL; a mini is neither."""
    labels = [
        {"name": n, "positive": [f"good {n}"], "negative": ["[V]"], "neutral": NEUTRAL.get(n)}
        for n in LABELS
    ]
    metadata = {
        "vmix.base": base.kind if known else "other",
        "vmix.labels": json.dumps(labels),
        "vmix.context_tokens": "77",
        "vmix.norm_eps": "1e-5",
        "vmix.apply_to": "cond",
        "vmix.made": '{"method": "trained"}',
    }
    if not known:
        metadata["vmix.ldm_names"] = json.dumps(base.ldm_names)
    return {**metadata, **more}


def give_adapter(base: Base, folder: Path, known: bool = False, seed: int = 3) -> Base:
    base.tensors = adapter_tensors(base, seed)
    path = folder / f"{base.kind}-{seed}.safetensors"
    vmix.Adapter.from_matrices(base.tensors, adapter_metadata(base, known)).save(path)
    base.vmix = open_file(path)
    return base


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found - expected).norm() / expected.norm())


def equal(values: Sequence[Tensor]) -> bool:
    return all(torch.equal(values[0], other) for other in values[1:])
