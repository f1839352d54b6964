"""What is trained: the value branch of the paper and, beside it, a LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from vmix import Untrained, unet_layers

T = TypeVar("T")
LORA_LAYERS = (
    # linear
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "time_emb_proj",
    # convolution
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)
"""Linear and convolution layers of the U-Net that a LoRA is added to (paper, section 3.4)."""


NORM_EPS = 1e-5


class ValueBranch(nn.Module):
    """Projection of AesEmb (eq. 6) and the value matrix of every layer (eq. 7).

    Each value matrix starts as a copy of the `to_v` of its layer in `unet`. Z starts at zero, so
    that all values are zero. `seed` is for F.
    """

    aes_emb: Tensor
    """[N, 2, d]: positive and negative feature of every label (eq. 4). Not trained."""

    def __init__(self, untrained: Untrained, unet: nn.Module, seed: int = 0) -> None:
        super().__init__()
        labels, dim = len(untrained.labels), untrained.context_dim
        self.metadata = untrained.metadata
        self.names = layer_names(untrained)
        self._aes_emb = from_dlpack(untrained.aes_emb).float()
        """For the file: DeepSpeed halves buffers."""
        self.register_buffer("aes_emb", torch.empty(labels, 2, dim))
        self.linear = nn.Linear(labels, untrained.context_tokens, bias=False)  # over the token axis
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.zero = nn.Linear(dim, dim)
        own = [_to_v_weight(unet, name) for name in self.names]
        self.to_v_aes = nn.ModuleList(nn.Linear(dim, len(w), bias=False) for w in own)
        # As torch draws it, but not from torch's global generator.
        drawn = torch.empty(self.linear.weight.shape, device="cpu")
        bound = labels**-0.5
        drawn.uniform_(-bound, bound, generator=torch.Generator("cpu").manual_seed(seed))
        with torch.no_grad():
            self.aes_emb.copy_(self._aes_emb)
            self.linear.weight.copy_(drawn)
            self.zero.weight.zero_()
            self.zero.bias.zero_()
            for to_v, weight in zip(self.to_v_aes, own, strict=True):
                to_v.get_parameter("weight").copy_(weight)

    def forward(self, labels: Tensor) -> list[Tensor]:
        """V_a [B, C, inner_dim] of every layer for label features f_t [B, N, d]."""
        labels = labels.to(self.linear.weight.dtype)  # FSDP and DeepSpeed halve parameters only
        spread = self.linear(labels.transpose(1, 2)).transpose(1, 2)
        f_a = self.zero(self.norm(spread))
        return [to_v(f_a) for to_v in self.to_v_aes]

    def tensors(self, exact: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """The paper's matrices as they are now, as `Adapter.from_matrices` takes them; of a
        parameter that is in `exact`, under the Denoiser's name for it, what it is there."""
        names = {id(p): f"branch.{name}" for name, p in self.named_parameters()}
        found = {"aes_emb": self._aes_emb}
        for name, parameter in self._named().items():
            better = exact.get(names[id(parameter)])
            found[name] = (gathered(parameter) if better is None else better).to("cpu")
        return found

    def _named(self) -> dict[str, Tensor]:
        named = {
            "projection.linear.weight": self.linear.weight,
            "projection.norm.weight": self.norm.weight,
            "projection.norm.bias": self.norm.bias,
            "projection.zero.weight": self.zero.weight,
            "projection.zero.bias": self.zero.bias,
        }
        for name, to_v in zip(self.names, self.to_v_aes, strict=True):
            named[f"{name}.to_v_aes.weight"] = to_v.get_parameter("weight")
        return named


def layer_names(untrained: Untrained) -> list[str]:
    """Diffusers paths of the layers that values are added to."""
    base: Any = untrained.base
    if base == "other":
        return list(untrained.ldm_names)
    return [layer.name for layer in unet_layers(base)]


def _to_v_weight(unet: nn.Module, layer: str) -> Tensor:
    to_v: Any = unet.get_submodule(f"{layer}.to_v")
    weight: Tensor = getattr(to_v, "base_layer", to_v).weight  # below a LoRA
    return weight


def label_features(aes_emb: Tensor, weights: Tensor) -> Tensor:
    """f_t [B, N, d] of weights [B, N]: each label's positive at 1, its negative at 0 (eq. 4)."""
    negative, positive = aes_emb[:, 1], aes_emb[:, 0]
    return negative + weights.to(aes_emb)[:, :, None] * (positive - negative)


class Denoiser(nn.Module):
    """The U-Net with values mixed in: one module and one forward for accelerate to wrap."""

    def __init__(self, unet: Any, branch: ValueBranch | None) -> None:
        super().__init__()
        self.unet, self.branch = unet, branch
        self._values: list[Tensor] | None = None
        for index, name in enumerate(branch.names if branch else []):
            hook = partial(self._mix, index)
            unet.get_submodule(f"{name}.to_v").register_forward_hook(hook)

    def _mix(self, index: int, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if self._values is None:
            return output
        return output + self._values[index].to(output.dtype)  # λ = 1 in training

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        context: Tensor,
        weights: Tensor | None = None,
        mixed: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The prediction for label weights [B, N]; without them, the U-Net's own.

        `mixed` [B] is 1 where values are mixed, 0 where the base stays alone.
        """
        self._values = None
        if self.branch is not None and weights is not None:
            values = self.branch(label_features(self.branch.aes_emb, weights))
            if mixed is not None:
                values = [value * mixed[:, None, None].to(value.dtype) for value in values]
            self._values = values
        return self.unet(sample, timesteps, context, added_cond_kwargs=conditions).sample  # type: ignore[no-any-return]

    def alone(self, work: Callable[[], T]) -> T:
        """What `work` returns, while the U-Net is its own; under FSDP a forward, as `forward`."""
        self._values = None
        return work()


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has shared out; all processes have to ask."""
    whole = getattr(tensor.detach(), "full_tensor", None)
    return whole() if whole is not None else tensor.detach()


def add_lora(unet: Any, rank: int) -> None:
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_LAYERS)
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
