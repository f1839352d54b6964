"""`vmix.TextEncoder` and what is made with it, against transformers, open_clip and diffusers.

Tolerances are relative to the largest value. Both sides compute in fp32 from the same weights, in
whatever type these are stored, and differ by the order of additions only: up to 1.2e-6 is measured
(9e-7 over the 32 layers of the real bigG; 3e-6 where features are subtracted), 1e-5 allowed. The
states one token off or of another layer differ by more than 0.2, with the other GELU by 8e-3.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_pipelines as tiny
import torch
import vmix
from open_clip.transformer import TextTransformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from vmix import Tokenizer, VMixError

# Here negatives are what a test needs, and some vocabularies have no rare tokens.
pytestmark = pytest.mark.filterwarnings("ignore:label .* is not a rare identifier")
TOLERANCE = 1e-5
SMALL = Path(__file__).resolve().parents[2] / "comfy_nodes" / "demo" / "model" / "tokenizer"
END = 49_407
LONGEST = {
    77: " ".join(["cat"] * 75),
    32: " ".join(["a"] * 30),
}  # all that fits, by tokens of a chunk
TEXTS = [
    "vibrant color",
    "",
    "sks",
    "a photo of a cat, sharp focus, Zürich",
    "cat<|endoftext|> dog",
]
LABELS = ["warm: warm light | sks", "focus: a photo in sharp focus | nmwx", "calm"]
NAMES = ["warm", "focus", "calm"]


class Output(NamedTuple):
    """What a text model says, as `vmix.ClipOutput`."""

    last: Tensor
    penultimate: Tensor
    pooled: Tensor
    projected: Tensor | None


Model = Callable[[Tensor], Output]


@dataclass
class Case:
    """A base model in files, and others' implementations of its text encoders."""

    path: Path
    models: list[Model]
    to_v: dict[str, Tensor]  # by diffusers path, as stored
    pipe: Any = None
    tokens: int = 77
    end: int = END


def randomize(module: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Weights that keep what they are given at order one, rounded to `dtype` and held in fp32."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        x = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            x *= parameter.shape[1] ** -0.5
        else:
            x = 0.1 * x + float("weight" in name)
        parameter.data = x.to(dtype).float()
    module.eval().requires_grad_(False)


def of_transformers(model: Any) -> Model:
    def run(ids: Tensor) -> Output:
        out = model(ids, output_hidden_states=True)
        embeds = out.get("text_embeds")
        pooled = out.get("pooler_output")
        if pooled is None:  # with projection: it is kept inside
            pooled = model.text_model(ids).pooler_output
        return Output(out.last_hidden_state, out.hidden_states[-2], pooled, embeds)

    return run


def of_open_clip(model: Any) -> Model:
    def run(ids: Tensor) -> Output:
        states = model.forward_intermediates(ids, output_fmt="NLC")["text_intermediates"]
        penultimate, last = states[-2], model.ln_final(states[-1])
        pooled = last[torch.arange(len(ids)), ids.argmax(-1)]
        return Output(last, penultimate, pooled, model(ids))

    return run


def ldm_file(kind: str, path: Path, dtype: torch.dtype, prefix: str = "text_model.") -> Case:
    """A single file with LDM's names; heads are 64 wide, as in every published one."""
    config = CLIPTextConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        eos_token_id=END,
    )
    clip_l = CLIPTextModel(config)
    randomize(clip_l, 0, dtype)
    place = {
        "sd15": "cond_stage_model.transformer.",
        "sdxl": "conditioner.embedders.0.transformer.",
    }
    tensors = {
        place[kind] + prefix + name.removeprefix("text_model."): tensor.to(dtype)
        for name, tensor in clip_l.state_dict().items()
    }
    # Of no use to anybody, and in most files.
    tensors[f"{place[kind]}{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    models = [of_transformers(clip_l)]
    if kind == "sdxl":
        open_clip = TextTransformer(77, 49_408, width=192, heads=3, layers=3, output_dim=96)
        randomize(open_clip, 1, dtype)
        for name, tensor in open_clip.state_dict().items():
            tensors[f"conditioner.embedders.1.model.{name}"] = tensor.to(dtype)
        models.append(of_open_clip(open_clip))
    draw = torch.Generator().manual_seed(2)
    to_v = {}
    for i, layer in enumerate(vmix.unet_layers(kind)):  # type: ignore[arg-type]
        x = torch.randn(16 + i % 3, {"sd15": 128, "sdxl": 320}[kind], generator=draw) / 18
        to_v[layer.name] = x.to(dtype)
        tensors[f"model.diffusion_model.{layer.ldm_name}.to_v.weight"] = x.to(dtype)
    save_file(tensors, path)
    return Case(path, models, to_v)


def folder(
    kind: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    shards: bool = False,
) -> Case:
    """A diffusers pipeline as it saves itself; its tokenizer knows 1457 tokens, 32 at a time."""
    sizes = {
        "vocab_size": 1457,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
        "bos_token_id": 1455,
        "eos_token_id": 1456,
        "projection_dim": tiny.CONTEXT,
        # As no single file has them: these are read.
        "num_attention_heads": 4,
        "layer_norm_eps": 1e-3,
    }
    tokenizer = CLIPTokenizer.from_pretrained(SMALL)
    pipe: Any = tiny.pipeline({"sd15": "sd", "sdxl": "xl"}[kind])
    if kind == "sd15":
        config = CLIPTextConfig(hidden_size=tiny.CONTEXT, intermediate_size=48, **sizes)
        modules: list[Any] = [CLIPTextModel(config)]
    else:
        configs = [
            CLIPTextConfig(hidden_size=12, intermediate_size=48, **sizes),
            CLIPTextConfig(hidden_size=20, intermediate_size=40, hidden_act="gelu", **sizes),
        ]
        modules = [CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])]
        second = CLIPTokenizer.from_pretrained(SMALL, pad_token="!")  # as SDXL's has it
        pipe.register_modules(text_encoder_2=modules[1], tokenizer_2=second)
    for i, module in enumerate(modules):
        randomize(module, i, dtype)
    pipe.register_modules(text_encoder=modules[0], tokenizer=tokenizer)
    size = "100KB" if shards else None
    pipe.to(dtype).save_pretrained(path, variant=variant, max_shard_size=size)
    pipe.to(torch.float32)
    to_v = {
        name.removesuffix(".to_v"): module.weight.data.to(dtype)
        for name, module in pipe.unet.named_modules()
        if name.endswith(".attn2.to_v")
    }
    models = [of_transformers(module) for module in modules]
    return Case(path, models, to_v, pipe, tokens=32, end=1456)


Make = Callable[[Path], Case]


def a_file(kind: str, dtype: torch.dtype, **options: Any) -> Make:
    return lambda path: ldm_file(kind, path.with_suffix(".safetensors"), dtype, **options)


def a_folder(kind: str, **options: Any) -> Make:
    return lambda path: folder(kind, path, **options)


MAKE = {
    "sd15 file, f32": a_file("sd15", torch.float32),
    "sd15 file, f16": a_file("sd15", torch.float16),
    "sd15 file, bf16": a_file("sd15", torch.bfloat16),
    "sd15 file, merged": a_file("sd15", torch.float16, prefix=""),  # as some tools leave it
    "sdxl file, f32": a_file("sdxl", torch.float32),
    "sdxl file, f16": a_file("sdxl", torch.float16),
    "sdxl file, bf16": a_file("sdxl", torch.bfloat16),
    "sd15 folder": a_folder("sd15"),
    "sd15 folder, fp16 variant": a_folder("sd15", dtype=torch.float16, variant="fp16"),
    "sd15 folder, bf16 shards": a_folder("sd15", dtype=torch.bfloat16, shards=True),
    "sdxl folder": a_folder("sdxl"),
    "sdxl folder, fp16 shards": a_folder("sdxl", dtype=torch.float16, variant="fp16", shards=True),
}


@pytest.fixture(scope="module", params=MAKE)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return MAKE[request.param](tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return folder(request.param, tmp_path_factory.mktemp("pipeline") / "model")


def tensor(exported: Any) -> Tensor:
    imported: Tensor = from_dlpack(exported)
    return imported


def difference(found: Any, expected: Tensor) -> float:
    found = tensor(found)
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    return float((found - expected).abs().max() / expected.abs().max())


def padded(ids: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor([[*row, *[row[-1]] * (length - len(row))] for row in ids])


def expected_features(case: Case, ids: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Of the whole context, padded as pipelines do, the feature at the first end of text."""
    parts = []
    for model, rows in zip(case.models, ids, strict=True):
        out = model(padded(rows, case.tokens))
        states = out.penultimate if len(case.models) == 2 else out.last
        parts.append(
            torch.stack([x[row.index(case.end)] for x, row in zip(states, rows, strict=True)])
        )
    return torch.cat(parts, -1)


def encoded(encoder: vmix.TextEncoder, texts: Sequence[str]) -> list[list[list[int]]]:
    return [[tokenizer.encode(text) for text in texts] for tokenizer in encoder.tokenizers]


def test_outputs(case: Case) -> None:
    encoder = vmix.TextEncoder.open(case.path)
    texts = [*TEXTS, LONGEST[case.tokens]]
    assert len({len(row) for row in encoded(encoder, texts)[0]}) > 3
    for number, (model, ids) in enumerate(zip(case.models, encoded(encoder, texts), strict=True)):
        for rows in (ids, ids[:2], ids[3:4]):  # of other lengths together
            found = encoder.encode(rows, number)
            longest = max(map(len, rows))
            # Attention is causal: what is filled up after the longest changes nothing before.
            out = model(padded(rows, case.tokens))
            assert difference(found.last, out.last[:, :longest]) < TOLERANCE
            assert difference(found.penultimate, out.penultimate[:, :longest]) < TOLERANCE
            assert difference(found.pooled, out.pooled) < TOLERANCE
            assert (found.projected is None) == (out.projected is None)
            if out.projected is not None:
                assert difference(found.projected, out.projected) < TOLERANCE


def test_features(case: Case) -> None:
    encoder = vmix.TextEncoder.open(case.path)
    texts = [*TEXTS, LONGEST[case.tokens]]
    features = tensor(encoder.features(texts))
    assert features.shape == (len(texts), encoder.context_dim)
    assert encoder.context_tokens == case.tokens
    assert difference(features, expected_features(case, encoded(encoder, texts))) < TOLERANCE
    # What else is in a batch, and so how long it is, is no matter of a text.
    for text, row in zip(texts, features, strict=True):
        assert difference(encoder.features([text]), row[None]) < TOLERANCE


def test_features_are_what_the_unet_gets(pipeline: Case) -> None:
    encoder = vmix.TextEncoder.open(pipeline.path)
    texts = [*TEXTS, "wow! a cat!!", LONGEST[32]]
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    context = pipeline.pipe.encode_prompt(texts, device="cpu", **options)[0]
    assert context.shape == (len(texts), 32, encoder.context_dim)
    eot = [pipeline.pipe.tokenizer(text).input_ids.index(pipeline.end) for text in texts]
    rows = torch.arange(len(texts))
    assert difference(encoder.features(texts), context[rows, eot]) < TOLERANCE


def test_init_adapter(case: Case, tmp_path: Path) -> None:
    """Features of every label's texts, and nothing else, in memory and in a file."""
    steps: list[tuple[int, int]] = []
    made = vmix.init_adapter(case.path, LABELS, progress=lambda *step: steps.append(step))
    blocks = {1: 3, 2: 2 + 2}[len(case.models)]  # SDXL's last ones are not needed
    assert steps == [(i + 1, blocks) for i in range(blocks)]
    made.save(path := tmp_path / "init.safetensors")
    opened = vmix.open(path)
    assert isinstance(opened, vmix.Untrained)
    encoder = vmix.TextEncoder.open(case.path)
    for init in (
        made,
        opened,
        vmix.Untrained.open(str(path)),
        vmix.Untrained.from_bytes(path.read_bytes()),
    ):
        assert (init.base, init.context_tokens) == ("other", case.tokens)
        assert init.context_dim == encoder.context_dim
        assert set(init.ldm_names) == set(case.to_v)
        assert len(set(init.ldm_names.values())) == len(case.to_v)
        assert [label.name for label in init.labels] == NAMES
        texts = [text for x in init.labels for side in (x.positive, x.negative) for text in side]
        assert texts == ["warm light", "sks", "a photo in sharp focus", "nmwx", "calm", "nlwx"]
        assert [(x.default, x.neutral, x.range) for x in init.labels] == [(1, None, (0, 1))] * 3
        assert init.metadata["vmix.kind"] == "init"
        aes_emb = tensor(init.aes_emb)
        assert aes_emb.shape == (3, 2, encoder.context_dim)
        assert torch.equal(aes_emb.flatten(0, 1), tensor(encoder.features(texts)))
        features = expected_features(case, encoded(encoder, texts))
        assert difference(aes_emb.flatten(0, 1), features) < TOLERANCE
    if case.pipe is None:
        in_file = load(case.path)
        for name, ldm in made.ldm_names.items():
            found = in_file[f"model.diffusion_model.{ldm}.to_v.weight"]
            assert torch.equal(found, case.to_v[name])
    stored = load(path)
    assert set(stored) == {"aes_emb"}
    assert torch.equal(stored["aes_emb"], tensor(made.aes_emb))
    with safe_open(path, "pt") as file:
        assert file.metadata() == made.metadata
    assert path.stat().st_size < 20_000
    written = path.read_bytes()
    for again in (opened, vmix.init_adapter(case.path, LABELS)):
        again.save(path)
        assert path.read_bytes() == written


def test_an_init_file_may_change_while_it_is_open(pipeline: Case, tmp_path: Path) -> None:
    path, copied = tmp_path / "init", tmp_path / "copy"
    vmix.init_adapter(pipeline.path, LABELS).save(path)
    written = path.read_bytes()
    init = vmix.Untrained.open(path)
    path.write_bytes(b"")
    assert tensor(init.aes_emb).shape == (3, 2, tiny.CONTEXT)
    init.save(copied)
    assert copied.read_bytes() == written


def test_several_phrasings(pipeline: Case, tmp_path: Path) -> None:
    """A side's feature is the mean of its texts'."""
    (tmp_path / "labels.toml").write_text(
        """
        [[label]]
        name = "warm"
        positive = ["warm light", "a photo in warm light", "cat"]
        negative = ["cold light", ""]
        [[label]]
        name = "calm"
        positive = ["a calm mood", "a calm mood"]
        negative = "storm"
        """
    )
    init = vmix.init_adapter(pipeline.path, tmp_path / "labels.toml")
    warm, calm = init.labels
    assert (warm.positive, warm.negative) == (
        ["warm light", "a photo in warm light", "cat"],
        ["cold light", ""],
    )
    assert (calm.positive, calm.negative) == (["a calm mood", "a calm mood"], ["storm"])
    encoder = vmix.TextEncoder.open(pipeline.path)
    sides = [warm.positive, warm.negative, calm.positive, calm.negative]
    features = [expected_features(pipeline, encoded(encoder, texts)) for texts in sides]
    found = tensor(init.aes_emb).flatten(0, 1)
    assert difference(found, torch.stack([x.mean(0) for x in features])) < TOLERANCE
    # Of one text, or one that comes twice, it is that text's own, to the last bit.
    assert torch.equal(found[2:], tensor(encoder.features(["a calm mood", "storm"])))


def load(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def test_negatives_that_are_no_rare_identifiers(pipeline: Case) -> None:
    with pytest.warns(UserWarning, match="label `warm`: the negative `sks` .*2 tokens, not one"):
        vmix.init_adapter(pipeline.path, ["warm: warm light | sks"])


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Those of an SD1.5 file, to be spoilt."""
    path = tmp_path_factory.mktemp("file") / "sd15.safetensors"
    return load(ldm_file("sd15", path, torch.float16).path)


PREFIX = "cond_stage_model.transformer.text_model."
EMBEDDING = f"{PREFIX}embeddings.token_embedding.weight"
POSITIONS = f"{PREFIX}embeddings.position_embedding.weight"
BLOCK = f"{PREFIX}encoder.layers.1."
Change = Callable[[dict[str, Tensor]], object]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name].clone())})


def without(part: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def with_nan(x: Tensor) -> Tensor:
    x.view(-1)[5] = torch.nan
    return x


def context_of(width: int) -> Change:
    return lambda tensors: tensors.update(
        {name: x[:, :1].repeat(1, width) for name, x in tensors.items() if "attn2" in name}
    )


BAD_FILES: dict[str, tuple[Change, str]] = {
    "no text encoder": (
        without(PREFIX),
        f"`{EMBEDDING}`: expected the CLIP text model of an SD1.5",
    ),
    "no U-Net": (without("attn2"), "`model.diffusion_model.<block>.attn2.to_v.weight`"),
    "half a U-Net": (without("output_blocks"), r"the layers of SD1.5 \(16.*found 7 layers"),
    "another width": (context_of(320), "a context of width 320, .* found 1 of together 128"),
    "no such width": (put(EMBEDDING, lambda x: x[:, :100]), "multiples of 64.*found 100"),
    "no block": (without(f"{PREFIX}encoder"), "encoder.layers.0.mlp.fc1.weight`.*no such"),
    "no weight": (
        without(f"{BLOCK}mlp.fc2.w"),
        rf"`{BLOCK}mlp.fc2.weight`: .*\[128, 192\].*no such",
    ),
    "no bias": (without(f"{BLOCK}mlp.fc2.b"), rf"`{BLOCK}mlp.fc2.bias`: .*\[128\].*no such"),
    "no positions": (without(POSITIONS), f"`{POSITIONS}`: expected a tensor, found"),
    "another shape": (
        put(f"{BLOCK}self_attn.k_proj.weight", lambda x: x[:, :64]),
        rf"`{BLOCK}self_attn.k_proj.weight`: expected shape \[128, 128\], found shape \[128, 64\]",
    ),
    "no rows": (
        lambda tensors: [
            put(name, lambda x: x[:0])(tensors) for name in tensors if ".fc1." in name
        ],
        r"encoder.layers.2.mlp.fc1.weight`: expected at least one row, found none",
    ),
    "one dimension": (put(EMBEDDING, torch.flatten), f"`{EMBEDDING}`: expected two dimensions"),
    "a small vocabulary": (put(EMBEDDING, lambda x: x[:9]), "token id: expected below 9, .* 49406"),
    "one position": (put(POSITIONS, lambda x: x[:1]), '"cat": expected at most 0 tokens, found 1'),
    "f64": (put(f"{BLOCK}mlp.fc1.weight", Tensor.double), f"`{BLOCK}mlp.fc1.weight`: .*found F64"),
    "f8": (
        put(f"{BLOCK}mlp.fc1.weight", lambda x: x.to(torch.float8_e4m3fn)),
        f"`{BLOCK}mlp.fc1.weight`: expected F32, F16 or BF16, found F8_E4M3",
    ),
    "NaN": (put(f"{BLOCK}mlp.fc1.weight", with_nan), f"`{BLOCK}mlp.fc1.weight`: expected finite"),
    "NaN in a norm": (
        put(f"{BLOCK}layer_norm1.bias", with_nan),
        f"`{BLOCK}layer_norm1.bias`: expected finite values, found NaN",
    ),
    "NaN in a token": (
        put(EMBEDDING, lambda x: x * torch.nan),
        f"`{EMBEDDING}`: expected finite values, found NaN",
    ),
    "infinite positions": (
        put(POSITIONS, lambda x: x * torch.inf),
        f"`{POSITIONS}`: expected finite values, found -?inf",
    ),
    "overflow": (
        put(f"{BLOCK}mlp.fc1.weight", lambda x: torch.full(x.shape, 3e38)),
        f"`{BLOCK}mlp.fc1.weight`: .*found values with which float32 overflows",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = BAD_FILES[name]
    changed = dict(tensors)
    change(changed)
    path = tmp_path / "bad.safetensors"
    save_file({key: x.contiguous() for key, x in changed.items()}, path)
    where = r"bad\.safetensors: .*" if "`" in message else ""
    with pytest.raises(VMixError, match=where + message):
        vmix.init_adapter(path, ["cat: cat | sks"])


def test_sdxl_without_its_second_encoder(tmp_path: Path) -> None:
    case = ldm_file("sdxl", tmp_path / "sdxl.safetensors", torch.float16)
    changed = load(case.path)
    without("embedders.1")(changed)
    save_file(changed, case.path)
    with pytest.raises(VMixError, match=r"`conditioner\.embedders\.1\.model\.token_embedding"):
        vmix.TextEncoder.open(case.path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "header too small"),
        (100, "invalid header length .* the file has 100"),
        (-1, r"incomplete metadata.*\d+ bytes expected, \d+ found"),
    ],
)
def test_truncated_files(
    size: int, message: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "truncated.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(VMixError, match=rf"truncated\.safetensors: .*{message}"):
        vmix.TextEncoder.open(path)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(VMixError, match=rf"model\.{suffix}: .*pickle, which can run programs"):
        vmix.TextEncoder.open(path)


def test_texts_and_ids_that_are_refused(pipeline: Case) -> None:
    encoder = vmix.TextEncoder.open(pipeline.path)
    assert tensor(encoder.features([LONGEST[32]])).isfinite().all()
    long = LONGEST[32] + " a"
    with pytest.raises(VMixError, match=f'"{long[:60]}…": expected at most 30 tokens, found 31'):
        encoder.features(["a", long])
    with pytest.raises(VMixError, match=f'"{long[:60]}…": expected at most 30 tokens'):
        vmix.init_adapter(pipeline.path, [f"long: {long} | cat"])
    with pytest.raises(VMixError, match="texts: expected at least one"):
        encoder.features([])
    for ids, message in (
        ([[1457]], "token id: expected below 1457, the size of the vocabulary, found 1457"),
        ([[1] * 33], "texts: expected at least one, of 1 to 32 tokens each, .* up to 33"),
        ([[1], []], "texts: expected at least one, of 1 to 32 tokens each"),
        ([], "texts: expected at least one"),
    ):
        with pytest.raises(VMixError, match=message):
            encoder.encode(ids)
    count = len(pipeline.models)
    with pytest.raises(VMixError, match=f"model: expected below {count}, found {count}"):
        encoder.encode([[1]], count)


def remove(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.rmtree(path / name)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


def configure(**values: Any) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        file = path / "text_encoder" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return run


def point_to(name: str) -> Callable[[Path], None]:
    """Replaces the text encoder's file by an index that names another one."""

    def run(path: Path) -> None:
        shutil.move(path / "text_encoder" / "model.safetensors", path / "outside.safetensors")
        index = json.dumps({"weight_map": {"a": name.format(path)}})
        (path / "text_encoder" / "model.safetensors.index.json").write_text(index)

    return run


def only_a_pickle(path: Path) -> None:
    folder = path / "text_encoder"
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_tokenizer(path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):  # which version 4 of transformers writes too
        (path / "tokenizer" / name).unlink(missing_ok=True)
    (path / "tokenizer" / "tokenizer.json").write_text("]")


INDEX = "text_encoder/model.safetensors.index.json"
CONFIG = "text_encoder/config.json: expected the configuration of a CLIP text model, found"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no U-Net": (remove("unet"), "pipeline, found a folder without `unet` in it"),
    "no text encoder": (remove("text_encoder"), "text_encoder: expected a file model.safetensors"),
    "no tokenizer": (
        remove("tokenizer"),
        "/tokenizer: expected a tokenizer of 1457 tokens, found no",
    ),
    "a pickle": (only_a_pickle, r"text_encoder: .*found pytorch_model\.bin, a pickle"),
    "a path up": (point_to("../outside.safetensors"), f"{INDEX}: .*path `../outside.safetensors`"),
    "an absolute path": (point_to("{}/outside.safetensors"), f"{INDEX}: .*found the path `/"),
    "a path of Windows": (point_to(r"..\outside.safetensors"), f"{INDEX}: .*found the path `"),
    "a folder": (point_to(".."), "is a directory"),
    "an absent file": (point_to("absent"), "text_encoder/absent: No such file"),
    "no configuration": (write("text_encoder/config.json", "{"), f"{CONFIG} EOF"),
    "a bad tokenizer": (bad_tokenizer, "tokenizer/tokenizer.json: expected"),
    "an activation": (configure(hidden_act="relu"), f"{CONFIG} unknown variant `relu`"),
    "no heads": (configure(num_attention_heads=0), f"{CONFIG} 0 heads for a width of 32"),
    "odd heads": (configure(num_attention_heads=5), f"{CONFIG} 5 heads for a width of 32"),
    "no layers": (configure(num_hidden_layers=0), f"{CONFIG} no layers"),
    "half a layer": (configure(num_hidden_layers=1.5), f"{CONFIG} invalid type: floating point"),
    "a negative": (
        configure(layer_norm_eps=-1e-5),
        f"{CONFIG} layer_norm_eps -0.00001, not above 0",
    ),
}


@pytest.fixture(scope="module")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder("sd15", tmp_path_factory.mktemp("folder") / "model").path


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name: str, sd15_folder: Path, tmp_path: Path) -> None:
    change, message = BAD_FOLDERS[name]
    path = tmp_path / "model"
    shutil.copytree(sd15_folder, path)
    change(path)
    with pytest.raises(VMixError, match=message):
        vmix.TextEncoder.open(path).features(["a"])


IN_LITTLE_MEMORY = """
import resource, sys, vmix
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for path in sys.argv[1:]:
    try:
        vmix.TextEncoder.open(path).features(["a"])
    except vmix.VMixError as error:
        print(error)
"""


def test_absurd_sizes_cost_nothing(sd15_folder: Path, tmp_path: Path) -> None:
    """2 GB of addresses are enough to be refused: what could not be allocated would abort.

    By one thread: each has a stack and an arena of addresses, on machines of many cores too many.
    """
    paths = []
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings"),
    ):
        for size in (2**31, 2**40, 2**63, 2**64 - 1, 2**64):
            path = tmp_path / f"{key}-{size}"
            path.mkdir()
            for part in ("unet", "tokenizer"):
                (path / part).symlink_to(sd15_folder / part)
            shutil.copytree(sd15_folder / "text_encoder", path / "text_encoder")
            configure(**{key: size})(path)
            paths.append(path)
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, *map(str, paths)]
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    lines = subprocess.check_output(command, encoding="utf-8", env=env).splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith(f"{path}/text_encoder/")
        assert "expected" in line


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def full_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where sd15.safetensors and sdxl.safetensors are: in VMIX_FULL_MODELS, else written now."""

    def path(kind: str) -> Path:
        if folder := os.environ.get("VMIX_FULL_MODELS"):
            return Path(folder) / f"{kind}.safetensors"
        out = tmp_path_factory.mktemp("full")
        command = [sys.executable, str(ROOT / "tests/comfy/checkpoints.py"), str(out), kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            pytest.skip(
                "full-size models: neither VMIX_FULL_MODELS nor a ComfyUI (COMFYUI_PATH) that "
                f"tests/comfy/checkpoints.py writes them with: {reason}"
            )
        return out / f"{kind}.safetensors"

    return path


INIT = """
import pathlib, sys, time, vmix
start = time.perf_counter()
vmix.init_adapter(sys.argv[1], sys.argv[3:]).save(sys.argv[2])
print(time.perf_counter() - start)
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1.024e-3)
"""


def clip_l_of(path: Path, prefix: str) -> Model:
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=END,
    )
    model = CLIPTextModel(config)
    read_into(model, path, lambda name: f"{prefix}text_model.{name.removeprefix('text_model.')}")
    return of_transformers(model)


def big_g_of(path: Path, prefix: str) -> Model:
    with torch.device("meta"):  # 695 M parameters: drawn, they would only be thrown away
        model = TextTransformer(77, 49_408, width=1280, heads=20, layers=32, output_dim=1280)
    model.to_empty(device="cpu")
    model.attn_mask = model.build_causal_mask()
    read_into(model, path, lambda name: prefix + name)
    return of_open_clip(model)


def read_into(model: Any, path: Path, key: Callable[[str], str]) -> None:
    """The file's fp16 as fp32."""
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(key(name)))
    model.eval().requires_grad_(False)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_full_size(kind: str, full_models: Callable[[str], Path], tmp_path: Path) -> None:
    """AesEmb at the real sizes, in numbers that `pytest -rP` shows."""
    path = full_models(kind)
    labels = {"sd15": LABELS, "sdxl": LABELS[:1]}[kind]
    out = tmp_path / "init.safetensors"
    command = [sys.executable, "-c", INIT, str(path), str(out), *labels]
    seconds, peak = map(float, subprocess.check_output(command, text=True).split())
    init = vmix.Untrained.open(out)
    assert init.base == kind
    texts = [text for x in init.labels for side in (x.positive, x.negative) for text in side]
    ids = [Tokenizer().encode(text) for text in texts]
    found = load(out)["aes_emb"].flatten(0, 1)
    size = out.stat().st_size / 1e3
    print(f"\n{kind}: {seconds:.1f} s, peak {peak:.0f} MB, {size:.0f} kB written")

    if kind == "sd15":
        models = [clip_l_of(path, "cond_stage_model.transformer.")]
    else:
        models = [
            clip_l_of(path, "conditioner.embedders.0.transformer."),
            big_g_of(path, "conditioner.embedders.1.model."),
        ]
    expected = expected_features(Case(path, models, {}), [ids] * len(models))
    for name, part in {"CLIP-L": slice(0, 768), "bigG": slice(768, None)}.items():
        if expected[:, part].numel():
            relative = difference(found[:, part], expected[:, part])
            absolute = (found[:, part] - expected[:, part]).abs().max()
            print(f"{name}: differs by {absolute:.1e}, {relative:.1e} of the largest value")
            assert relative < TOLERANCE
