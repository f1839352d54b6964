"""Types of the native module. The work is done in Rust; see docs/format.md for shapes and files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Final, Literal, TypeAlias, final

from typing_extensions import Self

__all__ = [
    "Adapter",
    "ClipOutput",
    "Label",
    "Layer",
    "Rows",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "Untrained",
    "VMixError",
    "Values",
    "__version__",
    "attention",
    "clip_merges",
    "get_num_threads",
    "init_adapter",
    "ldm_name",
    "merge_adapters",
    "open",
    "read_label_list",
    "run_command",
    "set_num_threads",
    "unet_layers",
]

_Selection: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
_Selections: TypeAlias = _Selection | Sequence[_Selection]
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
    def positive(self) -> list[str]: ...
    @property
    def negative(self) -> list[str]: ...
    @property
    def default(self) -> float: ...
    @property
    def neutral(self) -> float | None: ...
    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest weight of its slider."""

    @property
    def step(self) -> float: ...
    @property
    def effect(self) -> dict[str, float]:
        """What was measured when the file was made, by name."""

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
class Rows:
    """B [R, inner_dim] of every cross-attention layer, by its diffusers or LDM name."""

    def __getitem__(self, layer: str, /) -> Tensor: ...
    def __contains__(self, layer: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

@final
class Adapter:
    """A VMix adapter: V_a = A(w)·B for any label weights w (docs/format.md).

    A selection is a label, a list of labels (each at 1), a mapping from label to weight, "all"
    (each at 1; trained adapters only), "none", or None (each at its default). A label that is
    left out is at its neutral weight, or at 0 where it has none."""

    @staticmethod
    def open(path: _Path) -> Adapter: ...
    @staticmethod
    def from_bytes(data: bytes) -> Adapter: ...
    @staticmethod
    def from_tensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> Adapter:
        """From its parts, named and shaped as in a file (docs/format.md)."""

    @staticmethod
    def from_matrices(
        tensors: Mapping[str, Any], metadata: Mapping[str, str], dtype: _DType = "float32"
    ) -> Adapter:
        """From the matrices that the paper trains, computed in f64; `dtype` is that of the rows.

        `tensors`: `aes_emb` [N, 2, d], `projection.linear.weight` [C, N],
        `projection.norm.weight` and `.bias` [d], `projection.zero.weight` [d, d] and `.bias` [d],
        `<layer>.to_v_aes.weight` [inner_dim, d]; `projection.linear.bias` [C] is optional and has
        no effect.
        `metadata`: that of the file, but for `vmix.format`, `.kind`, `.rows` and `.coefficients`.
        """

    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: Any, /) -> Self: ...
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
    def context_dim(self) -> int | None: ...
    @property
    def coefficient_kind(self) -> Literal["layernorm", "linear"]: ...
    @property
    def row_sides(self) -> list[tuple[str | None, Literal["positive", "negative", "constant"]]]:
        """Label and side of every row."""

    @property
    def dtype(self) -> _DType: ...
    @property
    def apply_to(self) -> _ApplyTo: ...
    @property
    def made(self) -> dict[str, Any]:
        """How the file was made: `method`, and what else is known."""

    @property
    def metadata(self) -> dict[str, str]: ...
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the file, as `from_tensors` takes them."""

    def weights(self, selection: _Selection = None) -> dict[str, float]:
        """The weight of every label."""

    def opposite(self, selection: _Selection = None) -> dict[str, float]:
        """2·neutral − w of every label, or 0 without a neutral weight: what `apply_to="contrast"`
        mixes into the unconditional pass."""

    def coefficients(self, selection: _Selections = None) -> Tensor:
        """A [C, R] in f32; [B, C, R] of a list of selections. A list of names alone is one
        selection."""

    @property
    def rows(self) -> Rows:
        """B of every layer, in the file's dtype."""

    def aes_embed(self, selection: _Selection = None) -> Tensor | None:
        """f_t [N, d] (paper, section 3.3); None for a file without AesEmb."""

    def project(self, selection: _Selection = None) -> Tensor | None:
        """f_a [C, d] (paper, eq. 6); None for a linear adapter."""

    def values(
        self,
        selection: _Selection = None,
        *,
        apply_to: _ApplyTo | None = None,
        dtype: _DType = "float32",
    ) -> Values:
        """V_a [C, inner_dim] of every layer (paper, eq. 7)."""

@final
class Values:
    """V_a of every cross-attention layer for one selection (paper, eq. 7); what a preset holds."""

    @staticmethod
    def open(path: _Path) -> Values: ...
    @staticmethod
    def from_bytes(data: bytes) -> Values: ...
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, memo: Any, /) -> Self: ...
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
    def uncond(self, layer: str) -> Tensor | None:
        """V_a of the opposite selection; None unless `apply_to` is "contrast"."""

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

def open(path: _Path) -> Adapter | Values | Untrained:
    """Opens any VMix file; its own metadata says what it is."""

def merge_adapters(adapters: Sequence[Adapter], labels: Sequence[str] | None = None) -> Adapter:
    """One adapter with some labels of one or several, in the order of `labels`; with all if None.

    A label that is dropped stays at its neutral weight, or at 0 where it has none. Several adapters
    must have linear coefficients and be for the same U-Net and the same passes (`apply_to`)."""

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

@final
class Untrained:
    """Labels and AesEmb, the start of a training; what an init file holds."""

    @staticmethod
    def open(path: _Path) -> Untrained: ...
    @staticmethod
    def from_bytes(data: bytes) -> Untrained: ...
    def save(self, path: _Path) -> None: ...
    @property
    def base(self) -> str: ...
    @property
    def labels(self) -> list[Label]: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def context_dim(self) -> int: ...
    @property
    def aes_emb(self) -> Tensor:
        """[N, 2, d]: positive and negative feature of every label (paper, eq. 4)."""

    @property
    def ldm_names(self) -> dict[str, str]:
        """LDM name of every layer by diffusers name; empty for SD1.5 and SDXL."""

    @property
    def metadata(self) -> dict[str, str]: ...

def init_adapter(
    base: _Path,
    labels: _LabelList | None = None,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Untrained:
    """The start of a training for a checkpoint (a single file with LDM names, or a diffusers
    folder): AesEmb from its own text encoders (paper, eq. 4).

    `labels` is a path to a labels.toml, or a list of texts "name", "name: positive text" or
    "name: positive text | negative text" (docs/labels.md); without it, seven default labels.
    `progress` is called with how many of how many steps are done."""

def read_label_list(source: _LabelList | None = None) -> list[Label]:
    """The labels that `init_adapter` would make of a list."""

def run_command(arguments: Sequence[str]) -> int:
    """Runs the command `vmix`, whose name is the first argument; returns its exit status."""
