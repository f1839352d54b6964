"""The files that training writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from vmix import Adapter
from vmix.train.base import Base
from vmix.train.errors import TrainingError
from vmix.train.model import ValueBranch, gathered

DTypeName = Literal["float32", "float16", "bfloat16"]
NAMES: Mapping[str, DTypeName] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def trained_adapter(
    branch: ValueBranch,
    dtype: DTypeName,
    apply_to: str,
    made: Mapping[str, Any],
    modelspec: Mapping[str, str | None],
    neutral: Mapping[str, float | None] | None = None,
    exact: Mapping[str, Tensor] = MappingProxyType({}),
) -> Adapter:
    """The rows of what training made so far, checked by the library that will read them.

    `neutral` are the weights at which labels change nothing, where the objective knows them;
    `exact` what parameters of the model are in f32, where it has them in half.
    """
    labels = json.loads(branch.metadata["vmix.labels"])
    for label in labels:
        label["neutral"] = (neutral or {}).get(label["name"], label.get("neutral"))
    metadata = {
        **branch.metadata,
        "vmix.labels": json.dumps(labels, ensure_ascii=False),
        "vmix.apply_to": apply_to,
        "vmix.norm_eps": str(branch.norm.eps),
        "vmix.made": json.dumps({"method": "trained", **made}),
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **{f"modelspec.{key}": value for key, value in modelspec.items() if value},
    }
    return Adapter.from_matrices(branch.tensors(exact), metadata, dtype)


def save_presets(adapter: Adapter, folder: Path, dtype: DTypeName) -> dict[str, str]:
    """All labels positive, and every label alone; names of files, and what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    selections = {"all": "all"}
    what = {"all": "all labels positive"}
    if len(adapter.labels) > 1:
        for label in adapter.labels:
            stem = re.sub(r"[^\w.-]+", "-", label.name).strip("-.") or "label"
            while stem in selections:
                stem += "-"
            selections[stem], what[stem] = label.name, f"{label.name} alone"
    paths = {}
    for stem, selection in selections.items():
        path = folder / f"{stem}.safetensors"
        adapter.values(selection, dtype=dtype).save(path)
        paths[path.name] = "preset of " + what[stem]
    return paths


def save_lora(
    base: Base,
    path: Path,
    dtype: torch.dtype,
    main: bool,
    exact: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Under kohya's names, which diffusers and ComfyUI both read in full: of diffusers' own, either
    leaves attention layers out where there are others beside them."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    trained = get_peft_model_state_dict(base.unet)
    state = {f"unet.{name}": gathered(tensor) for name, tensor in trained.items()}
    for name, tensor in exact.items():
        if (known := re.sub(r"(\.lora_[AB])\.default\.", r"\1.", name)) in state:
            state[known] = tensor
    layers = {
        name: tensor.to(dtype).cpu().contiguous()
        for name, tensor in convert_state_dict_to_kohya(state).items()
    }
    if main:
        part = path.with_suffix(".part")
        try:
            save_file(layers, part, {"format": "pt"})
            part.chmod(0o644)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def save_unet(
    base: Base,
    folder: Path,
    dtype: torch.dtype,
    main: bool,
    exact: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """A diffusers folder of the whole base, as it is after fine-tuning."""
    import copy

    tensors = base.unet.state_dict().items()
    whole = {name: exact.get(f"unet.{name}", gathered(tensor)) for name, tensor in tensors}
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in whole.items()}
    if main:
        with torch.device("meta"):
            unet = type(base.unet).from_config(base.unet.config)
        unet.load_state_dict(state, assign=True)
        pipe = copy.copy(base.pipe)
        pipe.register_modules(unet=unet)
        pipe.save_pretrained(folder)


CARD = """---
{license}
library_name: diffusers
tags: [vmix, stable-diffusion, aesthetics, text-to-image]
{base}---

# {title}

A [VMix](https://vmix-diffusion.github.io/VMix/) aesthetics adapter for Stable Diffusion
({architecture}), trained with vmix-adapter.
{description}
{picture}
| label | dimension | positive text | default weight |
|---|---|---|---|
{labels}

```python
from vmix.diffusers import load_vmix

# pipe: a diffusers pipeline of {architecture}
load_vmix(pipe, "{file}")  # every label at its default weight, λ = 1
```

In ComfyUI: *Load VMix* → *VMix Aesthetics* → *Apply VMix*.

{files}

## Training

| | |
|---|---|
{trained}
"""


def model_card(
    adapter: Adapter, name: str, base: str, files: Mapping[str, str], picture: Path | None
) -> str:
    """The README.md of what was written."""
    spec = {k.removeprefix("modelspec."): v for k, v in adapter.metadata.items()}
    rows = [
        f"| {cell(label.name)} | {cell(label.dimension)} | {cell(' / '.join(label.positive))} "
        f"| {label.default:g} |"
        for label in adapter.labels
    ]
    record = {**adapter.made, "apply_to": adapter.apply_to}
    listed = [f"- `{file}`: {what}" for file, what in files.items()]
    return CARD.format(
        license=_license(spec.get("license") or "other"),
        base="" if Path(base).exists() else f"base_model: {base}\n",  # the hub takes only its own
        title=spec.get("title") or name,
        architecture=spec.get("architecture", adapter.base),
        description=f"\n{spec['description']}\n" if spec.get("description") else "",
        picture=f"\n![Prompts without and with VMix]({picture.as_posix()})\n" if picture else "",
        labels="\n".join(rows),
        file=f"{name}.safetensors",
        files="\n".join(listed),
        trained="\n".join(f"| {cell(k)} | {cell(v)} |" for k, v in record.items()),
    )


def _license(name: str) -> str:
    """The hub takes its own identifiers; any other name goes beside `other`."""
    if re.fullmatch(r"[a-z0-9.+-]+", name.lower()):
        return f"license: {name.lower()}"
    return f"license: other\nlicense_name: {json.dumps(name)}"


def cell(value: object) -> str:
    if isinstance(value, dict):
        value = "; ".join(f"{key}: {cell(one)}" for key, one in value.items())
    if isinstance(value, list):
        value = ", ".join("none" if one is None else str(one) for one in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=made.repo_id,
            ignore_patterns=["checkpoint-*", "cache/*", "logs/*", "metrics.jsonl", "*.part"],
        )
    except Exception as error:
        raise TrainingError(
            f"--push_to_hub {repository}: {error}. Everything is in {folder}"
        ) from error
