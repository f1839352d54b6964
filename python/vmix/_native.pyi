"""Types of the native module. The work is done in Rust; see docs/format.md for shapes and files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Final, Literal, TypeAlias, final

__all__ = [
    "Adapter",
    "ClipOutput",
    "Label",
    "Layer",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "VMixError",
    "Values",
    "__version__",
    "attention",
    "clip_merges",
    "get_num_threads",
    "init_adapter",
    "ldm_name",
    "open",
    "read_label_list",
    "run_command",
    "set_num_threads",
    "training_free_adapter",
    "unet_layers",
]

_Selection: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
_Path: TypeAlias = str | PathLike[str]
_ApplyTo: TypeAlias = Literal["cond", "both", "contrast"]
_LabelList: TypeAlias = _Path | Sequence[str]
_DType: TypeAlias = Literal["float32", "float16", "bfloat16"]

__version__: Final[str]

class VMixError(ValueError):
    """What the library refuses; the message names the thing, what was expected and what came."""

@final
class Label:
    """One aesthetic label of an adapter (paper, section 3.2)."""

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> str: ...
    @property
    def positive(self) -> str: ...
    @property
    def negative(self) -> str: ...
    @property
    def default(self) -> float: ...
    @property
    def neutral(self) -> float | None: ...
    @property
    def display_names(self) -> dict[str, str]: ...

@final
class Layer:
    """One cross-attention layer, named as diffusers and as LDM name it."""

    @property
    def name(self) -> str: ...
    @property
    def ldm_name(self) -> str | None: ...
    @property
    def inner_dim(self) -> int: ...

@final
class Tensor:
    """A read-only tensor that torch and numpy take without a copy (`from_dlpack`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

@final
class Adapter:
    """A VMix adapter: AesEmb, the projection and the value weights (paper, eq. 4 to 7)."""

    @staticmethod
    def open(path: _Path) -> Adapter: ...
    @staticmethod
    def from_bytes(data: bytes) -> Adapter: ...
    @staticmethod
    def from_tensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Adapter: ...
    def save(self, path: _Path) -> None: ...
    @property
    def base(self) -> str: ...
    @property
    def labels(self) -> list[Label]: ...
    @property
    def layers(self) -> list[Layer]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def context_dim(self) -> int: ...
    @property
    def projection(self) -> str: ...
    @property
    def value_weights(self) -> str: ...
    @property
    def apply_to(self) -> _ApplyTo: ...
    @property
    def trained(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the file, as `from_tensors` takes them."""

    def weights(self, selection: _Selection = None) -> dict[str, float]: ...
    def aes_embed(self, selection: _Selection = None) -> Tensor: ...
    def project(self, selection: _Selection = None) -> Tensor: ...
    def values(
        self,
        selection: _Selection = None,
        *,
        apply_to: _ApplyTo | None = None,
        dtype: _DType = "float32",
        base: _Path | None = None,
    ) -> Values:
        """V_a of every layer. `base` is the checkpoint whose W_V serve where `value_weights` is
        "base", a file or a diffusers folder."""

    def validate(self) -> None: ...

@final
class Values:
    """V_a of every cross-attention layer for one selection (paper, eq. 7); what a preset holds."""

    @staticmethod
    def open(path: _Path) -> Values: ...
    @staticmethod
    def from_bytes(data: bytes) -> Values: ...
    def save(self, path: _Path) -> None: ...
    @property
    def base(self) -> str: ...
    @property
    def labels(self) -> list[Label]: ...
    @property
    def layers(self) -> list[Layer]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def apply_to(self) -> _ApplyTo: ...
    @property
    def selection(self) -> dict[str, float]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def origin(self) -> str: ...
    def uncond(self, layer: str) -> Tensor | None: ...
    def __getitem__(self, layer: str, /) -> Tensor: ...
    def __contains__(self, layer: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

def attention(
    query: Any,
    key: Any,
    value: Any,
    aes_value: Any = None,
    strength: float | Sequence[float] = 1.0,
    heads: int | None = None,
    *,
    scale: float | None = None,
    mask: Any = None,
    query_mask: Any = None,
) -> Tensor:
    """softmax(Q·Kᵀ·scale + mask)·(V_c + λ·V_a) (paper, eq. 9) on the CPU, in f32.

    Tensors are read where they lie, with any strides: query, key and value [B, L, H·D] with
    `heads`, or [B, H, L, D] without, as the result. `aes_value`, V_a, is [C, H·D] or [B, C, H·D]
    and repeats where there are k·C keys. `strength`, λ, is one number or one per batch entry; at 0
    the result is bit-identical to that without V_a. `mask` [B, H, L_q, L_k] is added to the scaled
    scores, and may have size 1, or lack leading dimensions, where it does not vary; −inf hides a
    key. `query_mask` [B, L_q] is what λ is multiplied with for each query.
    """

def get_num_threads() -> int:
    """Threads that a call may use."""

def set_num_threads(count: int) -> None:
    """Of attention and of V_a, from now on; 0 for all cores. With 1 a call computes in the thread
    that makes it. Text encoders use all cores."""

def open(path: _Path) -> Adapter | Values:
    """Opens an adapter or a preset; the file's own metadata says which it is."""

def unet_layers(base: Literal["sd15", "sdxl"]) -> list[Layer]:
    """The cross-attention layers of a known base, down to up."""

def ldm_name(name: str, layers_per_block: int = 2) -> str | None:
    """The LDM path of a diffusers path; None if it is not one of a spatial transformer's parts."""

@final
class Tokenizer:
    """CLIP's byte-pair encoding, as transformers' `CLIPTokenizer`; OpenAI's unless opened."""

    def __new__(cls) -> Tokenizer: ...
    @staticmethod
    def open(folder: _Path) -> Tokenizer:
        """The tokenizer of a model folder: vocab.json and merges.txt, or tokenizer.json."""

    def encode(self, text: str) -> list[int]:
        """Ids between those of start and end of text, neither padded nor cut."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def why_not_rare(self, text: str) -> str | None:
        """What speaks against a text as a rare identifier (paper, section 3.2), if anything."""

def clip_merges() -> str:
    """The merges of CLIP's vocabulary, a pair on each line after a line of comment."""

@final
class TextEncoder:
    """The text encoders of a checkpoint: CLIP-L (SD1.5), or CLIP-L and OpenCLIP bigG (SDXL)."""

    @staticmethod
    def open(base: _Path) -> TextEncoder:
        """Those of a single-file checkpoint (LDM names) or a diffusers folder."""

    @property
    def context_tokens(self) -> int: ...
    @property
    def context_dim(self) -> int: ...
    @property
    def tokenizers(self) -> list[Tokenizer]: ...
    def features(self, texts: Sequence[str]) -> Tensor:
        """[B, d]: the context's feature at the first end of text, which is what AesEmb holds."""

    def encode(self, ids: Sequence[Sequence[int]], model: int = 0) -> ClipOutput:
        """All that one of the models says of token ids that end with the end of text."""

@final
class ClipOutput:
    """What a text model says of B texts of at most T tokens."""

    @property
    def last(self) -> Tensor:
        """Hidden states after the final LayerNorm, [B, T, d]."""

    @property
    def penultimate(self) -> Tensor:
        """Hidden states before the last block, [B, T, d]."""

    @property
    def pooled(self) -> Tensor:
        """`last` at the first end of text, [B, d]."""

    @property
    def projected(self) -> Tensor | None:
        """`pooled` times the text projection, [B, p], where the file has one."""

def init_adapter(
    base: _Path,
    labels: _LabelList | None = None,
    *,
    training_free: bool = False,
    dtype: _DType | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Adapter:
    """A new adapter for a checkpoint (a single file with LDM names, or a diffusers folder): AesEmb
    from its own text encoders (paper, eq. 4), F drawn by `seed`, Z zero, every W_Va the base's W_V
    (in `dtype`, else as they are). It changes nothing before it is trained.

    `training_free` makes a file that works at once instead: **experimental**, and not the trained
    adapter of the paper (docs/training-free).

    `labels` is a path to a labels.toml, or a list of texts "name", "name: positive text" or
    "name: positive text | negative text" (docs/labels.md); without it, seven default labels.
    `progress` is called with how many of how many steps are done."""

def read_label_list(
    source: _LabelList | None = None, *, training_free: bool = False
) -> list[Label]:
    """The labels that `init_adapter` would make of a list."""

def training_free_adapter(
    labels: _LabelList,
    features: Any,
    *,
    context_tokens: int = 77,
    layers: Sequence[tuple[str, str, int]] | None = None,
) -> Adapter:
    """What `init_adapter` makes with `training_free`, from features [N, 2, d] of every label's
    positive and negative text that a host computed itself: those of its context at the first end of
    text. `layers` are (diffusers name, LDM name, inner_dim) of its U-Net; SD1.5 and SDXL, which d
    tells apart, need none. **Experimental.**"""

def run_command(arguments: Sequence[str]) -> int:
    """Runs the command `vmix`, whose name is the first argument; returns its exit status."""
