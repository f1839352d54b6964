"""Bases from single files: what a published checkpoint holds, without a download.

Files are written here under the names that CompVis' and Stability's classes give their parameters,
with random weights; diffusers converts them, and the Rust library reads the same files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import shutil
import socket
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from vmix import TextEncoder, Tokenizer, ldm_name
from vmix.train import single_file
from vmix.train.errors import TrainingError
from vmix.train.single_file import CONFIGS, load_pipeline

State = dict[str, Tensor]
TEXTS = ["a photo of a cat", "Extremely sharp, natural lighting; sks"]

# The names and shapes of the U-Net and the autoencoder that the authors' own code makes of their
# own configurations: CompVis/stable-diffusion, v1-inference.yaml, and
# Stability-AI/generative-models, sd_xl_base.yaml. SHA-256 of sorted lines "name [shape]".
VAE = "5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501"
PUBLISHED = {
    "sd15": ("b0828585f6719ebf3393cd4f537c8b83e90dbddbb12e34b197798bc05c43a9ca", VAE),
    "sdxl": ("b968733410df414ef289a735d89e235ee69ca18ba9a61e6885067e2e34545600", VAE),
}

UNET_NAMES = [
    (r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * (int(m[1]) - 1)}"),
    (r"add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * (int(m[1]) - 1)}"),
    (r"conv_in", "input_blocks.0.0"),
    (r"conv_norm_out", "out.0"),
    (r"conv_out", "out.2"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"mid_block\.attentions\.0", "middle_block.1"),
    (
        r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"input_blocks.{3 * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}",
    ),
    (
        r"down_blocks\.(\d)\.downsamplers\.0\.conv",
        lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op",
    ),
    (
        r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
        lambda m: f"output_blocks.{3 * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}",
    ),
]
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = [
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"group_norm", "norm"),
    (r"to_(q|k|v)\b", r"\1"),
    (r"to_out\.0", "proj_out"),
]
OPEN_CLIP_NAMES = [
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
]


def renamed(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def ldm_unet(state: State) -> State:
    """The tensors of a diffusers U-Net under LDM's names."""
    named: State = {}
    attentions = {name.split(".attentions")[0] for name in state if ".attentions." in name}
    for name, tensor in state.items():
        new = name
        if match := re.match(r"(up_blocks\.(\d))\.upsamplers\.0(.*)", name):
            place = 1 + (match[1] in attentions)
            new = f"output_blocks.{3 * int(match[2]) + 2}.{place}{match[3]}"
        else:
            if ".resnets." in name:
                part = name.split(".")[-2]
                new = name.replace(f".{part}.", f".{RESNET_NAMES[part]}.")
            new = renamed(new, [(f"^{pattern}", by) for pattern, by in UNET_NAMES])
        named[new] = tensor
    return named


def ldm_vae(state: State) -> State:
    """The tensors of a diffusers autoencoder under LDM's names; its attention was a convolution."""
    named: State = {}
    for name, tensor in state.items():
        convolution = re.search(r"attentions.*(to_q|to_k|to_v|to_out\.0)\.weight", name)
        named[renamed(name, VAE_NAMES)] = tensor[:, :, None, None] if convolution else tensor
    return named


def open_clip(state: State) -> State:
    """The tensors of a CLIPTextModelWithProjection under OpenCLIP's names."""
    named: State = {}
    for name, tensor in state.items():
        if match := re.match(r"(.*layers\.\d+\.self_attn)\.q_proj\.(weight|bias)", name):
            parts = [state[f"{match[1]}.{part}_proj.{match[2]}"] for part in "qkv"]
            place = renamed(match[1].removesuffix("self_attn"), OPEN_CLIP_NAMES)
            named[f"{place}attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.(k|v)_proj", name):
            new = renamed(name, OPEN_CLIP_NAMES)
            named[new] = tensor.T.contiguous() if new == "text_projection" else tensor
    return named


def models(configs: Path) -> dict[str, Any]:
    """The models of a folder of configurations, without storage."""
    import diffusers
    import transformers

    made = {}
    index = json.loads((configs / "model_index.json").read_text("utf-8"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if part in index:
            library, name = index[part]
            config = json.loads((configs / part / "config.json").read_text("utf-8"))
            with torch.device("meta"):
                if library == "diffusers":
                    made[part] = getattr(diffusers, name).from_config(config)
                else:
                    config = transformers.CLIPTextConfig.from_dict(config)
                    made[part] = getattr(transformers, name)(config)
    return made


def filled(part: str, state: State) -> State:
    """Random numbers that keep the scale of what the layers are given."""
    made = {}
    for name, like in state.items():
        generator = np.random.default_rng(zlib.crc32(f"{part}.{name}".encode()))
        if name.endswith("token_embedding.weight"):
            # One row, shifted, instead of tens of millions of draws: no two rows are equal.
            rows, width = like.shape
            row = generator.standard_normal(rows + width, dtype=np.float32)
            noise = torch.from_numpy(row).unfold(0, width, 1)[:rows].clone()
        else:
            noise = torch.from_numpy(generator.standard_normal(like.shape, dtype=np.float32))
        if like.ndim == 1:
            noise = 0.02 * noise + float(name.endswith("weight"))
        elif "embeddings." not in name:
            noise /= math.sqrt(math.prod(like.shape[1:]))
        made[name] = noise.half()
    return made


def single(states: dict[str, State]) -> State:
    """The tensors of a single file."""
    xl = "text_encoder_2" in states
    clip = "conditioner.embedders.0" if xl else "cond_stage_model"
    text = {
        f"text_model.{n.removeprefix('text_model.')}": t for n, t in states["text_encoder"].items()
    }
    parts = {
        "model.diffusion_model.": ldm_unet(states["unet"]),
        "first_stage_model.": ldm_vae(states["vae"]),
        f"{clip}.transformer.": text,
        "conditioner.embedders.1.model.": open_clip(states["text_encoder_2"]) if xl else {},
    }
    return {
        prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()
    }


def shrink(configs: Path) -> None:
    """Makes the models narrow and short, with the same blocks and the same names."""
    blocks = json.loads((configs / "unet" / "config.json").read_text("utf-8"))["block_out_channels"]
    heads = {"attention_head_dim": 2 if len(blocks) == 4 else [2] * len(blocks)}
    for part, changes in {
        "unet": {"block_out_channels": [32, 64, 128, 128][: len(blocks)], **heads},
        "vae": {"block_out_channels": [32, 64, 128, 128]},
        "text_encoder": {"num_hidden_layers": 2, "intermediate_size": 64},
        "text_encoder_2": {"num_hidden_layers": 2, "intermediate_size": 64},
    }.items():
        path = configs / part / "config.json"
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    for kind in ("sd15", "sdxl"):
        shutil.copytree(CONFIGS / kind, folder / kind)
        shrink(folder / kind)
    return folder


@pytest.fixture
def narrow(configs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The loader takes the shrunken models for SD1.5 and SDXL."""
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    return configs


@pytest.fixture(scope="module")
def files(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        kind: write(folder / f"{kind}.safetensors", configs / kind) for kind in ("sd15", "sdxl")
    }


@pytest.fixture(scope="module")
def pipes(configs: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Both pipelines as the loader makes them, to look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_file, "CONFIGS", configs)
        return {kind: load_pipeline(str(path)) for kind, path in files.items()}


def write(path: Path, configs: Path) -> Path:
    states = {name: filled(name, m.state_dict()) for name, m in models(configs).items()}
    save_file({name: t.contiguous() for name, t in single(states).items()}, path)
    return path


def compare(pipe: Any, path: Path, kind: str) -> None:
    """The pipeline's tensors are the file's, and its contexts what the Rust library makes of it."""
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    if kind == "sdxl":
        parts["text_encoder_2"] = pipe.text_encoder_2
    loaded = single({name: part.state_dict() for name, part in parts.items()})
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(loaded)
        for name, tensor in loaded.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, file.get_tensor(name).float()), name
    context = pipe.encode_prompt(
        TEXTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    ends = pipe.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids.argmax(1)
    found = context[torch.arange(len(TEXTS)), ends].detach()
    expected = from_dlpack(TextEncoder.open(path).features(TEXTS))
    scale = expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 0.1 * scale  # else equality says nothing
    # Both compute in f32, in sums of another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-4 * scale))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_published_names_and_shapes(kind: str) -> None:
    made = models(CONFIGS / kind)
    for part, named, expected in zip(
        ("unet", "vae"), (ldm_unet, ldm_vae), PUBLISHED[kind], strict=True
    ):
        state = named(made[part].state_dict())
        lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == expected, part


def test_open_clips_names_and_shapes() -> None:
    """Of SDXL's second text encoder, in OpenCLIP's own class."""
    import open_clip as library

    with torch.device("meta"):
        published = library.model.CLIP(**library.get_model_config("ViT-bigG-14")).state_dict()
    expected = {
        name: tensor.shape
        for name, tensor in published.items()
        if not name.startswith(("visual.", "logit_scale", "attn_mask"))
    }
    state = open_clip(models(CONFIGS / "sdxl")["text_encoder_2"].state_dict())
    assert {name: tensor.shape for name, tensor in state.items()} == expected


def test_value_matrices_have_the_librarys_names() -> None:
    for kind in ("sd15", "sdxl"):
        state = models(CONFIGS / kind)["unet"].state_dict()
        for name in state:
            if name.endswith(".attn2.to_v.weight"):
                path = name.removesuffix(".to_v.weight")
                assert set(ldm_unet({name: state[name]})) == {f"{ldm_name(path)}.to_v.weight"}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_tensors_and_contexts(kind: str, pipes: dict[str, Any], files: dict[str, Path]) -> None:
    compare(pipes[kind], files[kind], kind)


def test_pipelines(pipes: dict[str, Any]) -> None:
    sd15, sdxl = pipes["sd15"], pipes["sdxl"]
    assert type(sd15).__name__ == "StableDiffusionPipeline"
    assert sd15.safety_checker is None
    assert type(sdxl).__name__ == "StableDiffusionXLPipeline"
    assert sdxl.config.force_zeros_for_empty_prompt
    for pipe, resolution, scaling in ((sd15, 512, 0.18215), (sdxl, 1024, 0.13025)):
        assert pipe.unet.config.sample_size * pipe.vae_scale_factor == resolution
        assert pipe.vae.config.scaling_factor == scaling
        assert pipe.scheduler.config.prediction_type == "epsilon"
        # The schedule of LDM's `linear_start` and `linear_end`, as in either published .yaml.
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        torch.testing.assert_close(pipe.scheduler.betas.double(), betas, rtol=1e-6, atol=0)


def test_tokenizers(pipes: dict[str, Any]) -> None:
    """Ids of OpenAI's own tokenizer, and those of the library; SDXL's second pads with 0."""
    pipe = pipes["sdxl"]
    for tokenizer, padding in ((pipe.tokenizer, 49407), (pipe.tokenizer_2, 0)):
        ids = tokenizer(["a photo of a cat"], padding="max_length", truncation=True).input_ids[0]
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70
    for text in ("", "A  Photo\nOF a CAT", "naïve café, 日本語 'll 12 … <|endoftext|>", "sks"):
        assert pipe.tokenizer(text).input_ids == Tokenizer().encode(text)
    assert len(pipe.tokenizer.get_vocab()) == Tokenizer().vocab_size


@pytest.mark.parametrize(
    ("marks", "asked", "prediction", "zero"),
    [
        (["v_pred"], None, "v_prediction", False),
        (["v_pred", "ztsnr"], None, "v_prediction", True),
        (["v_pred", "ztsnr"], "epsilon", "epsilon", False),
        (["ztsnr"], None, "epsilon", False),
        ([], "v_prediction", "v_prediction", False),
    ],
)
def test_prediction(
    marks: list[str], asked: str | None, prediction: str, zero: bool,
    narrow: Path, files: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    import diffusers

    path = tmp_path / "marked.safetensors"
    save_file(load_file(files["sd15"]) | dict.fromkeys(marks, torch.empty(0)), path)
    pipe = load_pipeline(str(path), prediction_type=asked)
    assert pipe.scheduler.config.prediction_type == prediction
    # As the trainer takes it over.
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    assert scheduler.config.prediction_type == prediction
    assert (float(scheduler.alphas_cumprod[-1]) == 0.0) == zero
    assert scheduler.config.timestep_spacing == ("trailing" if zero else "leading")


def test_folders(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = copy.deepcopy(pipes["sd15"])
    pipe.save_pretrained(tmp_path / "whole")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    expected = {name: tensor.float() for name, tensor in pipe.unet.state_dict().items()}
    for folder, asked in (("whole", None), ("half", "v_prediction")):
        found = load_pipeline(str(tmp_path / folder), prediction_type=asked)
        assert found.scheduler.config.prediction_type == (asked or "epsilon")
        for name, tensor in found.unet.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected[name]), name
    index = tmp_path / "whole" / "model_index.json"
    text = index.read_text("utf-8").replace("StableDiffusionPipeline", "FluxPipeline")
    index.write_text(text, "utf-8")
    with pytest.raises(
        TrainingError, match=r"whole is a FluxPipeline; expected StableDiffusionPip"
    ):
        load_pipeline(str(tmp_path / "whole"))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_loaded(pipes: dict[str, Any], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for name, expected in (
        ("model.ckpt", "model.ckpt: a pickle, which can run programs and is never loaded"),
        ("model.safetensors", "(it is a zip archive, as `torch.save` writes: a pickle,"),
    ):
        torch.save({"state_dict": Payload(ran)}, tmp_path / name)
        with pytest.raises(TrainingError, match=re.escape(expected)):
            load_pipeline(str(tmp_path / name))
    folder = tmp_path / "folder"
    pipes["sd15"].save_pretrained(folder)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        whole = next((folder / part).glob("*.safetensors"))
        whole.rename(tmp_path / "aside")
        torch.save(Payload(ran), folder / part / f"{stem}.bin")
        with pytest.raises(TrainingError, match=re.escape(str(folder))):
            load_pipeline(str(folder))
        (tmp_path / "aside").rename(whole)
    assert not ran.exists()


def like(kind: str, **changes: Any) -> State:
    """A file with the names of a checkpoint that tell what it is, and next to no numbers."""
    count, width = {"sd15": (16, 768), "sdxl": (70, 2048)}[kind]
    count, width = changes.get("layers", count), changes.get("context", width)
    unet = "model.diffusion_model."
    state = {f"{unet}input_blocks.0.0.weight": torch.empty(1, changes.get("channels", 4), 1, 1)}
    layers = (
        f"{unet}middle_block.1.transformer_blocks.{i}.attn2.to_k.weight" for i in range(count)
    )
    state |= {name: torch.empty(1, width) for name in layers}
    state |= {name: torch.empty(1) for name in single_file.KINDS[kind].parts.values()}
    return state


def without(state: State, *parts: str) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(parts)}


UNET = "model.diffusion_model."
INT8 = {f"{UNET}out.2.weight": torch.zeros(1, dtype=torch.int8)}
CLIP = "cond_stage_model.transformer.text_model"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (like("sd15", channels=9), "a model for inpainting, with 9 channels"),
        (like("sdxl", channels=9), "a model for inpainting, with 9 channels"),
        (like("sd15", channels=8), "a model for editing pictures, with 8 channels"),
        (like("sd15", context=1024), "a model of Stable Diffusion 2"),
        (like("sdxl", context=1280), "a model of SDXL's refiner"),
        (like("sdxl", layers=42), "a U-Net of 42 cross-attention layers with a context of 2048"),
        (like("sdxl") | {"edm_mean": torch.empty(4)}, "EDM's noise levels"),
        (like("sd15") | INT8, f"quantised weights ({UNET}out.2.weight, I8)"),
        (like("sd15") | {"scaled_fp8": torch.empty(0)}, "quantised weights (scaled_fp8"),
        (without(like("sd15"), "first_stage_model"), "no autoencoder (no first_stage_model."),
        (without(like("sd15"), "cond_stage_model"), f"no text encoder (no {CLIP}"),
        (
            without(like("sdxl"), "conditioner", "first_stage_model"),
            "no first text encoder and no second text encoder and no autoencoder",
        ),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.empty(1)}, "a U-Net with diffusers' names"),
        ({"input_blocks.0.0.weight": torch.empty(1)}, "a U-Net alone"),
        ({"lora_unet_mid_block.lora_up.weight": torch.empty(1)}, "a LoRA"),
        (
            {"double_blocks.0.img_attn.qkv.weight": torch.empty(1)},
            "no Stable Diffusion U-Net, but d",
        ),
        ({}, "no Stable Diffusion U-Net, but nothing"),
    ],
)
def test_refused(state: State, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    with pytest.raises(TrainingError, match=re.escape(f"{path}: ")) as refused:
        load_pipeline(str(path))
    assert expected in str(refused.value)
    assert "expected" in str(refused.value)


def test_files_that_are_not_whole(narrow: Path, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(files["sd15"].read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"cut\.safetensors: not a safetensors file: .* found"):
        load_pipeline(str(path))
    path.write_text("<!DOCTYPE html>\n<html></html>\n")
    with pytest.raises(TrainingError, match=r"cut\.safetensors: .*it is a web page"):
        load_pipeline(str(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(TrainingError, match=r"cut\.safetensors: .*`git lfs pull`"):
        load_pipeline(str(path))
    state = load_file(files["sd15"])
    attention = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    for name, changed, expected in (
        (attention, None, f"685 of the 686 tensors {UNET}*"),
        ("first_stage_model.quant_conv.bias", None, "247 of the 248 tensors first_stage_model.*"),
        (f"{CLIP}.final_layer_norm.bias", None, "final_layer_norm.bias"),
        (f"{UNET}out.2.bias", torch.zeros(5), "conv_out.bias"),
    ):
        kept = {key: tensor for key, tensor in state.items() if key != name}
        save_file(kept if changed is None else kept | {name: changed}, path)
        with pytest.raises(TrainingError, match=re.escape(f"{path}: ")) as refused:
            load_pipeline(str(path))
        assert expected in str(refused.value)
        assert changed is None or "shape" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.safetensors", "gone.safetensors: no such file or folder"),
        ("gone/gone.ckpt", "gone/gone.ckpt: no such file or folder"),
        ("model.gguf", "model.gguf: a file .gguf; expected .safetensors"),
    ],
)
def test_other_paths(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TrainingError, match=f"^{re.escape(expected)}"):
        load_pipeline(name)


def test_prediction_type_is_checked() -> None:
    with pytest.raises(TrainingError, match="expected epsilon or v_prediction, found 'sample'"):
        load_pipeline("anything", prediction_type="sample")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15"])
def test_full_size(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "full.safetensors", CONFIGS / kind)
    compare(load_pipeline(str(path)), path, kind)
