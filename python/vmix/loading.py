"""Models with all of their weights: what the files lack is an error.

transformers and diffusers fill missing weights with random numbers and only log it, or leave them
on the meta device. This happens easily: transformers 5 renamed the tensors of CLIP text models, and
transformers 4 does not know the new names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

__all__ = ["WeightsError", "check_lora", "lack", "load_model", "load_pipeline"]

SHOWN = 3
LORA = re.compile(r"(lora_A(\.\w+)?|[._]down)\.weight$")
"""One tensor of every layer of a LoRA, as diffusers, peft or kohya name it."""


class WeightsError(Exception):
    """Weights that are absent, or not what they should be; the message says what was expected."""


def load_model(
    kind: Any,
    folder: str | Path,
    *,
    subfolder: str = "",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A model that transformers or diffusers saved, from safetensors alone.

    `kind` is its class, and `folder` may also be a repository of the hub.
    """
    place = str(Path(folder) / subfolder)
    if Path(folder).is_dir():
        folder, subfolder = place, ""
    if subfolder:
        options["subfolder"] = subfolder
    by_transformers = _is_of_transformers(kind)
    if by_transformers:
        options["ignore_mismatched_sizes"] = True  # reported, so that they can be named below
    loaded: tuple[Any, Mapping[str, Any]] = kind.from_pretrained(
        folder,
        output_loading_info=True,
        use_safetensors=True,
        low_cpu_mem_usage=True,
        **{_dtype_option(by_transformers): dtype},
        **options,
    )
    model, info = loaded
    state = model.state_dict()
    misshapen = sorted(info["mismatched_keys"])
    if misshapen:
        # transformers 4.57 lists names; other versions add the shapes, that of the file first.
        first = misshapen[0]
        if isinstance(first, str):
            first = (first, "another", state[first].shape)
        name, found, expected = first
        raise WeightsError(
            f"{place}: {len(misshapen)} weights of {kind.__name__} have another shape, "
            f"such as {name}: expected {list(expected)}, found {_shown(found)}"
        )
    # Some versions of transformers leave such weights without memory, and do not list them.
    missing = {*info["missing_keys"], *(name for name, tensor in state.items() if tensor.is_meta)}
    if missing:
        unknown = info["unexpected_keys"]
        lacking = lack(kind.__name__, missing, len(state), unknown)
        raise WeightsError(f"{place}: {lacking}{_hint(by_transformers) if unknown else ''}")
    return model


def load_pipeline(
    kind: Any,
    path: str | Path,
    *,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A pipeline of diffusers, from safetensors alone.

    `kind` is its class; files of `variant` are taken from the subfolders that have them. `options`
    are `from_pretrained`'s: models among them are not loaded.
    """
    # diffusers does not say what was missing in a pipeline's parts: they are loaded one by one.
    for name, entry in kind.load_config(path).items():
        if name in options or not isinstance(entry, (list, tuple)) or len(entry) != 2:
            continue
        library, part = entry
        if library not in ("diffusers", "transformers"):
            continue
        model = getattr(importlib.import_module(library), part, None)
        if isinstance(model, type) and issubclass(model, torch.nn.Module):
            has_variant = any((Path(path) / name).glob(f"*.{variant}.*"))
            more = {"variant": variant} if variant and has_variant else {}
            options[name] = load_model(model, path, subfolder=name, dtype=dtype, **more)
    return kind.from_pretrained(path, use_safetensors=True, **options)


def lack(what: str, missing: Iterable[str], total: int, unknown: Iterable[str] = ()) -> str:
    """What a model lacks; `unknown` are weights that its file has beside."""
    names, others = sorted(missing), sorted(unknown)
    said = f"{len(names)} of the {total} weights of {what} are missing: {_some(names)}"
    return f"{said}; {len(others)} in the file are unknown: {_some(others)}" if others else said


def _shown(shape: str | Iterable[int]) -> str:
    return shape if isinstance(shape, str) else str(list(shape))


def _hint(by_transformers: bool) -> str:
    import diffusers
    import transformers

    library = transformers if by_transformers else diffusers
    return (
        f". They may have been saved by another version of {library.__name__} "
        f"({library.__version__} is installed)"
    )


def check_lora(names: Iterable[str], adapter: str, *modules: Any) -> None:
    """WeightsError unless every layer of a LoRA with tensors of these names acts in a module.

    diffusers only warns of layers that it finds no place for.
    """
    expected = sum(LORA.search(name) is not None for name in names)
    parameters = chain.from_iterable(module.named_parameters() for module in modules)
    found = sum(name.endswith(f".lora_A.{adapter}.weight") for name, _ in parameters)
    if found != expected:
        raise WeightsError(
            f"{found} of the LoRA's {expected} layers are in this base: it may be for another one, "
            "or saved by another version of diffusers or peft"
        )


def _some(names: list[str]) -> str:
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def _is_of_transformers(kind: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(kind, type) and issubclass(kind, PreTrainedModel)


def _dtype_option(by_transformers: bool) -> str:
    """transformers renamed it in 4.56; diffusers has kept the old name."""
    import transformers

    version = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
    return "dtype" if by_transformers and version >= (4, 56) else "torch_dtype"
