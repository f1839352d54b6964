"""What a training needs of a GPU's memory, without a GPU: `python -m vmix.train.memory`.

A step of the trainer's own model runs on torch's `meta` device, which computes shapes alone, and
every storage is counted from where it is made to where it is freed: what the forward pass keeps
for the backward pass, and the most that lives at any time. Two things differ from a GPU there and
are put in their place: autocast, which `meta` has not, and the attention kernel, of which the one
that never holds the whole map is taken, as torch does on GPUs.

Not counted, but allowed for by `ALLOWANCE` and `FRAGMENTS`: the CUDA context, workspaces of cuDNN
and cuBLAS, and what the allocator cannot hand out. Not counted at all: pictures of
`--validation_prompts`, which the autoencoder decodes between steps.
"""

from __future__ import annotations

import json
import signal
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from vmix import read_label_list
from vmix.train.model import Denoiser, ValueBranch, add_lora, trained_parameters
from vmix.train.single_file import CONFIGS

Counts = NDArray[np.int64]
BaseName = Literal["sd15", "sdxl"]
Precision = Literal["no", "fp16", "bf16"]
Optimizer = Literal["adamw", "adamw8bit"]
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTEXT = {"sd15": 768, "sdxl": 2048}
RESOLUTION = {"sd15": 512, "sdxl": 1024}
TOKENS = 77
GIB = 2**30
ALLOWANCE = GIB
"""The CUDA context (about half of it) and workspaces."""
FRAGMENTS = 0.05
"""Share of the rest that the allocator holds and cannot hand out."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a step at its fullest, by what they are for."""

    unet: int
    """Frozen weights."""
    encoders: int
    """Autoencoder and text encoders; none with `--cache_latents`."""
    trained: int
    """Weights of the value branch and the LoRA, in f32."""
    gradients: int
    optimizer: int
    average: int
    """Of `--use_ema`."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    transient: int
    """What the fullest moment adds: of the backward pass, or instead of the activations that of
    encoding the images or of the optimizer."""
    allowance: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(
    base: BaseName,
    resolution: int | None = None,
    batch: int = 1,
    precision: Precision = "bf16",
    rank: int = 64,
    checkpointing: bool = False,
    optimizer: Optimizer = "adamw",
    cached: bool = False,
    ema: bool = False,
    attention: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """Memory of the trainer on one GPU, with the paper's objective."""
    side = resolution or RESOLUTION[base]
    dtype = DTYPES[precision]
    denoiser = _denoiser(base, precision, rank)
    own = list(trained_parameters(denoiser).values())
    trained = sum(p.numel() * p.element_size() for p in own)
    frozen = nbytes(denoiser) - trained
    encoders = encoding = 0
    if not cached:
        vae, texts = _encoders(base)
        encoders = nbytes(vae) + sum(nbytes(text) // 4 * dtype.itemsize for text in texts)
        encoding = _encoding(base, side) + (batch - 1) * 3 * side * side * 4
    states = {"adamw": _adamw, "adamw8bit": _adamw_8bit}[optimizer](own)
    step = partial(_step, base, precision, rank, checkpointing, side, attention)
    counts = _continued(step, batch)
    kept, peak = int(counts[0]), int(counts[1:].max())
    # torch's AdamW computes all denominators at once.
    stepping = trained if optimizer == "adamw" else 0
    transient = max(peak, encoding, stepping) - kept
    counted = frozen + encoders + 2 * trained + states + trained * ema + kept + transient
    return Memory(
        frozen,
        encoders,
        trained,
        trained,
        states,
        trained * ema,
        kept,
        transient,
        ALLOWANCE + int(FRAGMENTS * counted),
    )


def nbytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _adamw(parameters: Sequence[Tensor]) -> int:
    return sum(8 * p.numel() for p in parameters)


def _adamw_8bit(parameters: Sequence[Tensor]) -> int:
    """bitsandbytes': two states of a byte, a scale for every 256 of them, f32 for small tensors."""
    small, block = 4096, 256
    return sum(
        8 * p.numel() if p.numel() < small else 2 * (p.numel() + 4 * -(-p.numel() // block))
        for p in parameters
    )


def _continued(measure: Callable[[int], Counts], batch: int) -> Counts:
    """Counts at batches of 2 and 3 continued: at any moment of a step, all that lives is a
    constant, or per image. The fullest moment need not be the same for all batches."""
    two, three = measure(2), measure(3)
    return two + (batch - 2) * (three - two)


# --- a step on the meta device ------------------------------------------------------------------


@cache
def _step(
    base: BaseName, precision: Precision, rank: int, checkpointing: bool, side: int,
    attention: str, batch: int,
) -> Counts:  # fmt: skip
    """Bytes kept by the forward pass, then those alive at every moment of the step."""
    denoiser = _denoiser(base, precision, rank)
    unet, dtype = denoiser.unet, DTYPES[precision]
    kernels = partial(Kernels, attention, None if precision == "no" else dtype)
    if checkpointing:
        again = partial(
            checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels())
        )
        unet.enable_gradient_checkpointing(again)
    else:
        unet.disable_gradient_checkpointing()
    labels = denoiser.branch.aes_emb.shape[0]
    with torch.device("meta"):
        conditions = {
            "text_embeds": torch.empty(batch, 1280, dtype=dtype),
            "time_ids": torch.empty(batch, 6, dtype=dtype),
        }
        inputs = (
            torch.empty(batch, 4, side // 8, side // 8, dtype=dtype),
            torch.empty(batch, dtype=torch.int64),
            torch.empty(batch, TOKENS, CONTEXT[base], dtype=dtype),
            torch.empty(batch, labels),
            torch.empty(batch, dtype=torch.bool),
            conditions if base == "sdxl" else None,
        )
    return measure(denoiser, inputs, kernels())


def measure(
    denoiser: nn.Module, inputs: Sequence[Any], around: AbstractContextManager[Any] | None = None
) -> Counts:
    """Bytes that a forward pass leaves alive, then those alive whenever something is made in it
    and in the backward pass.

    Weights, gradients and inputs are not counted: they were there before. So it is in every step
    of the trainer but the first of those that are accumulated. `around` is for the forward pass.
    """
    own = list(trained_parameters(denoiser).values())
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    before = [*denoiser.parameters(), *denoiser.buffers(), *(p.grad for p in own), *inputs]
    with Alive(before) as alive:
        with around or nullcontext():
            prediction = denoiser(*inputs)
        loss = prediction.float().square().mean()
        kept = alive.now
        loss.backward()
    return np.array([kept, *alive.moments])


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages made under it, each once, for as long as they live."""

    def __init__(self, before: Iterable[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.moments = [0]
        self._sizes: dict[int, int] = {}
        for tensor in tree_leaves(list(before)):
            if isinstance(tensor, Tensor):
                self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.moments.append(self.now)
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


LOWER = {"linear", "conv2d", "matmul", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention"}
FLOAT = {"group_norm", "layer_norm", "interpolate", "exp", "pow", "mse_loss"}
"""What autocast runs in half precision and in f32 on GPUs, of what U-Nets are made of."""


class Kernels(TorchFunctionMode):
    """What a GPU would run instead: autocast to `half`, and attention that keeps no map."""

    def __init__(
        self, attention: str, half: torch.dtype | None = None, full: Set[str] = FLOAT
    ) -> None:
        super().__init__()
        self.attention, self.half, self.full = attention, half, full
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.half is not None and name in LOWER | self.full:
            dtype = self.half if name in LOWER else torch.float32
            args, kwargs = tree_map(lambda x: self._cast(x, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: None = None,
        dropout_p: float = 0.0, is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        assert attn_mask is None
        assert not is_causal
        ops = torch.ops.aten
        if self.attention == "cpu":
            out = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        elif query.dtype == torch.float32:
            out = ops._scaled_dot_product_efficient_attention(query, key, value, None, True)
        else:
            out = ops._scaled_dot_product_flash_attention(query, key, value)
        return out[0]  # type: ignore[no-any-return]

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._weights.clear()  # as autocast does


# --- models without numbers ---------------------------------------------------------------------


def _config(base: str, part: str) -> dict[str, Any]:
    return json.loads((CONFIGS / base / part / "config.json").read_text("utf-8"))  # type: ignore[no-any-return]


@cache
def _denoiser(base: BaseName, precision: Precision, rank: int) -> Any:
    """The trainer's model: a frozen U-Net with a LoRA, and the value branch, of default labels."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(_config(base, "unet"))
        nn.Module.to(unet.requires_grad_(False).eval(), DTYPES[precision])
        branch = ValueBranch(_untrained(base), unet)
        if rank:
            add_lora(unet, rank)
        return Denoiser(unet, branch)


def _untrained(base: BaseName) -> Any:
    """As much of an untrained adapter as a value branch is made from."""
    labels = read_label_list()
    return SimpleNamespace(
        base=base,
        labels=labels,
        context_dim=CONTEXT[base],
        context_tokens=TOKENS,
        aes_emb=torch.zeros(len(labels), 2, CONTEXT[base], device="cpu"),
        metadata={},
    )


@cache
def _encoders(base: BaseName) -> tuple[Any, tuple[Any, ...]]:
    import diffusers
    import transformers

    classes = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(_config(base, "vae")).eval()
        texts = tuple(
            getattr(transformers, name)(transformers.CLIPTextConfig(**_config(base, part)))
            for part, name in classes.items()
            if (CONFIGS / base / part).is_dir()
        )
    return vae, texts


@cache
def _encoding(base: BaseName, side: int) -> int:
    """The most bytes alive while an image becomes latents, which the trainer does in f32 and one by
    one."""
    vae, _ = _encoders(base)
    with torch.no_grad(), Kernels("cuda"), Alive([*vae.parameters()]) as alive:
        vae.encode(torch.empty(1, 3, side, side, device="meta"))
    return int(max(alive.moments))


# --- the table ----------------------------------------------------------------------------------

SIZES = (8, 12, 16, 24, 80)
STEP = 256
"""Images in the paper's step, and the most that the table asks for."""
SMALL = {"cached": True, "checkpointing": True, "optimizer": "adamw8bit"}
SETTINGS: dict[str, dict[str, Any]] = {
    "`--mixed_precision bf16`": {},
    "and `--gradient_checkpointing`": {"checkpointing": True},
    "and `--cache_latents`": {"checkpointing": True, "cached": True},
    "and `--use_8bit_adam`": SMALL,
    "and `--rank 0`": SMALL | {"rank": 0},
    "`--gradient_checkpointing --cache_latents` in f32": {
        "precision": "no",
        "checkpointing": True,
        "cached": True,
    },
}


def largest_batch(gib: float, base: BaseName, **settings: Any) -> int:
    """Images that fit at once, of at most STEP; 0 where one does not."""
    return bisect_right(
        range(1, STEP + 1), gib * GIB, key=lambda b: estimate(base, batch=b, **settings).total
    )


def main() -> None:
    def print_row(*cells: str) -> None:
        print("|", " | ".join(cells), "|", flush=True)

    header = ("Base", "Settings", "one image", "each more", *(f"{size} GB" for size in SIZES))
    print_row(*header)
    print_row(*("---" for _ in header))
    names: dict[BaseName, str] = {"sd15": "SD1.5, 512", "sdxl": "SDXL, 1024"}
    for base, name in names.items():
        for title, settings in SETTINGS.items():
            one, few, many = (estimate(base, batch=b, **settings).total / GIB for b in (1, 32, 64))
            batches = (largest_batch(size, base, **settings) for size in SIZES)
            fits = (str(batch or "-") for batch in batches)
            print_row(name, title, f"{one:.1f}", f"{(many - few) / 32:.2f}", *fits)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
