"""What `--labels` names: a list of labels, or an init file that `vmix init` made of one."""

from __future__ import annotations

from pathlib import Path

from vmix import Adapter, Label, Untrained, init_adapter, read_label_list
from vmix import open as open_vmix
from vmix.train.base import Base
from vmix.train.errors import TrainingError
from vmix.train.model import layer_names


def read_labels(source: Path) -> list[Label]:
    return _open(source).labels if _is_init_file(source) else read_label_list(source)


def untrained_adapter(base: Base, source: Path) -> Untrained:
    """AesEmb of the labels, by the base's own text encoders."""
    if not _is_init_file(source):
        return init_adapter(base.path, source)
    made = _open(source)
    layers = {name for name, _ in base.unet.named_modules() if name.endswith(".attn2")}
    own = (base.pipe.tokenizer.model_max_length, base.unet.config.cross_attention_dim, layers)
    found = (made.context_tokens, made.context_dim, set(layer_names(made)))
    if found != own:
        expected, was = (f"{c} tokens of width {d}, {len(n)} layers" for c, d, n in (own, found))
        raise TrainingError(
            f"--labels {source}: made for another base: expected {expected}; found {was}"
        )
    return made


def _is_init_file(source: Path) -> bool:
    return source.suffix == ".safetensors"


def _open(source: Path) -> Untrained:
    made = open_vmix(source)
    if not isinstance(made, Untrained):
        kind = "an adapter" if isinstance(made, Adapter) else "a preset"
        raise TrainingError(f"--labels {source}: expected an init file, found {kind}")
    return made
