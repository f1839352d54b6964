"""The command `vmix` as people run it: in processes of its own, judged by what they leave behind.

What is expected comes from safetensors' own reader, torch, transformers' tokenizer and
`vmix.Adapter`, never from the command. Every run is looked at for tracebacks and panics
(`vmix_command`).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import vmix
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.dlpack import from_dlpack

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "comfy_nodes" / "demo"
MODEL, ADAPTER = DEMO / "model", DEMO / "adapter.safetensors"
MID = "mid_block.attentions.0.transformer_blocks.0.attn2"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


class Done(NamedTuple):
    status: int
    out: str
    err: str


COMMAND = [sys.executable, "-m", "vmix"]


def vmix_command(*arguments: object, **options: Any) -> Done:
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, **{**streams, "timeout": 600, **options})
    # None is what went elsewhere than into a pipe.
    out, err = (b"" if text is None else text for text in (done.stdout, done.stderr))
    said = Done(done.returncode, out.decode(), err.decode())
    assert not re.search("Traceback|panicked|RUST_BACKTRACE", said.out + said.err), said
    return said


def succeeds(*arguments: object, **options: Any) -> str:
    """What it prints, if nothing is said on standard error."""
    done = vmix_command(*arguments, **options)
    assert (done.status, done.err) == (0, "")
    return done.out


def refused(*arguments: object, **options: Any) -> str:
    """The one sentence on standard error."""
    done = vmix_command(*arguments, **options)
    assert (done.status, done.out) == (1, "")
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    return lines[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        metadata: dict[str, str] = file.metadata()
    return metadata


def identical(found: Tensor, expected: Tensor) -> bool:
    """Of one dtype and shape, and equal bit for bit: 0 is not -0."""
    same_kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return same_kind and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def tensor(exported: Any) -> Tensor:
    imported: Tensor = from_dlpack(exported)
    return imported


def exact(exported: Any) -> Tensor:
    return tensor(exported).double()


def single(number: float) -> float:
    """Rounded to float32, which weights are kept in."""
    rounded: float = torch.tensor(number, dtype=torch.float32).item()
    return rounded


# --- help and wrong command lines ---

OUT_OPTIONS = {"-o, --out <FILE>", "-f, --force", "-h, --help"}
OPTIONS = {
    "init": {
        *("-b, --base <CHECKPOINT>", "-L, --labels <FILE>", "-l, --label <LABEL>"),
        *OUT_OPTIONS,
    },
    "inspect": {"--json", "-h, --help"},
    "bake": {
        *("-s, --select <LABEL>", "--apply-to <APPLY_TO>", "--dtype <DTYPE>"),
        *OUT_OPTIONS,
    },
    "merge": {"-l, --label <NAME>", *OUT_OPTIONS},
    "convert": {"--dtype <DTYPE>", *OUT_OPTIONS},
    "validate": {"-h, --help"},
}
ARGUMENTS = {
    "inspect": "<FILE>",
    "bake": "<ADAPTER>",
    "merge": "<FILES>...",
    "convert": "<FILE>",
    "validate": "<FILES>...",
}


def entries(text: str, heading: str) -> dict[str, str]:
    """What a help lists under a heading, with its description."""
    found: dict[str, str] = {}
    last = ""
    for line in text.split(f"\n{heading}:\n")[1].splitlines():
        if line and not line.startswith(" "):
            break  # the next heading
        # An option is indented by 2 or, without a short form, by 6; a description by more.
        if match := re.fullmatch(r" {2,6}([-<a-z]\S*(?:,? [-<]\S+)*)(?: {2,}(.*))?", line):
            last, found[match[1]] = match[1], match[2] or ""
        elif last:
            found[last] += f" {line.strip()}"
    return found


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag: str) -> None:
    text = succeeds(flag)
    commands = entries(text, "Commands")
    assert set(commands) == set(OPTIONS)
    assert all(len(what.split()) > 3 for what in commands.values()), commands
    assert set(entries(text, "Options")) == {"-h, --help", "-V, --version"}
    assert "Usage: vmix <COMMAND>" in text  # and not python's name, nor __main__.py


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    assert succeeds(flag) == f"vmix {vmix.__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command(command: str, flag: str) -> None:
    text = succeeds(command, flag)
    options = entries(text, "Options")
    assert set(options) == OPTIONS[command]
    if command in ARGUMENTS:
        options |= entries(text, "Arguments")
        assert ARGUMENTS[command] in options
    for option, what in options.items():
        assert what.strip(), option
    # What the prose and the examples name is an option, too.
    named = set(re.findall(r"--[a-z-]+", text))
    assert named <= {name for option in OPTIONS[command] for name in option.split()}
    values = {
        "--dtype <DTYPE>": list(DTYPES),
        "--apply-to <APPLY_TO>": ["cond", "both", "contrast"],
    }
    for option in OPTIONS[command] & set(values):
        assert f"[possible values: {', '.join(values[option])}]" in options[option]


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "Usage: vmix <COMMAND>"),
    "no such command": (["inspekt", "a"], "unrecognized subcommand 'inspekt'"),
    "no such option": (["inspect", "--frob", "a"], "unexpected argument '--frob'"),
    "no file": (["inspect"], "<FILE>"),
    "no files": (["validate"], "<FILES>..."),
    "nothing to merge": (["merge", "-o", "out"], "<FILES>..."),
    "two files": (["inspect", "a", "b"], "unexpected argument 'b'"),
    "no out": (["convert", "a", "--dtype", "float16"], "--out <FILE>"),
    "no dtype": (["convert", "a", "-o", "out"], "--dtype <DTYPE>"),
    "no base": (["init", "-o", "out"], "--base <CHECKPOINT>"),
    "no such dtype": (
        ["convert", "a", "--dtype", "int8", "-o", "out"],
        "invalid value 'int8' for '--dtype <DTYPE>'\n"
        "  [possible values: float32, float16, bfloat16]",
    ),
    "no such passes": (
        ["bake", "a", "--apply-to", "uncond", "-o", "out"],
        "invalid value 'uncond' for '--apply-to <APPLY_TO>'\n"
        "  [possible values: cond, both, contrast]",
    ),
    "labels twice": (
        ["init", "-b", "a", "-o", "out", "-L", "a", "-l", "a"],
        "'--labels <FILE>' cannot be used with '--label <LABEL>'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_command_lines(name: str, tmp_path: Path) -> None:
    arguments, complaint = WRONG[name]
    done = vmix_command(*arguments, cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    assert complaint in done.err
    assert not snapshot(tmp_path)


# --- init ---

LABELS_TOML = """
[[label]]
name = "warm light"
dimension = "lighting"
positive = "a photo in warm evening light"
negative = "sks"
default = 0.75
neutral = 0.25
range = [-1, 2]
step = 0.1
display_names = { de = "warmes Licht" }

[[label]]  # with what suits the start
name = "café"
default = 1.5
"""
LINES = ["warm: a warm light | kprs", "focus", "calm: a calm mood, Zürich"]
# By the label list's rules: rare tokens in order, without the one that was given.
OF_LINES = [
    ("warm", "a warm light", "kprs"),
    ("focus", "focus", "sks"),
    ("calm", "a calm mood, Zürich", "nmwx"),
]


# Of the text model. Heads are 64 wide in single files, so that this is one.
WIDTH, INNER, LAYERS, VOCABULARY, CONTEXT = 64, 96, 2, 49_408, 77
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": VOCABULARY - 1,
}


class Base(NamedTuple):
    """One model as a single file and as a diffusers folder."""

    file: Path
    folder: Path
    weights: dict[str, Tensor]  # of the text model
    tokenizer: Any  # transformers'
    to_v: dict[str, Tensor]

    def features(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), d], at the first end of text of contexts padded as pipelines do."""
        out = self.tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt")
        first = (out.input_ids == VOCABULARY - 1).int().argmax(-1)
        return self.states(out.input_ids)[torch.arange(len(texts)), first]

    def states(self, ids: Tensor) -> Tensor:
        """CLIP's text model. transformers' own says the same to the bit, and takes ten seconds to
        import; test_text_encoder.py compares with that one."""

        def linear(name: str, x: Tensor) -> Tensor:
            return F.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            return F.layer_norm(x, [WIDTH], weight, bias)

        x = self.weight("embeddings.token_embedding.weight")[ids]
        x = x + self.weight("embeddings.position_embedding.weight")
        for i in range(LAYERS):
            block = f"encoder.layers.{i}."
            y = norm(f"{block}layer_norm1", x)
            q, k, v = (linear(f"{block}self_attn.{part}_proj", y) for part in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(f"{block}self_attn.out_proj", y)
            y = linear(f"{block}mlp.fc1", norm(f"{block}layer_norm2", x))
            x = x + linear(f"{block}mlp.fc2", y * torch.sigmoid(1.702 * y))  # quick GELU
        return norm("final_layer_norm", x)

    def weight(self, name: str) -> Tensor:
        return self.weights[f"text_model.{name}"].float()


def text_model_shapes() -> dict[str, list[int]]:
    """By name, as files have them."""
    shapes = {"embeddings.token_embedding": [VOCABULARY, WIDTH], "final_layer_norm": [WIDTH]}
    shapes["embeddings.position_embedding"] = [CONTEXT, WIDTH]
    for block in (f"encoder.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{block}.layer_norm{i}": [WIDTH] for i in (1, 2)}
        shapes |= {f"{block}.self_attn.{x}_proj": [WIDTH, WIDTH] for x in ("q", "k", "v", "out")}
        shapes |= {f"{block}.mlp.fc1": [INNER, WIDTH], f"{block}.mlp.fc2": [WIDTH, INNER]}
    weights = {f"text_model.{name}.weight": shape for name, shape in shapes.items()}
    biases = {
        f"text_model.{name}.bias": shape[:1]
        for name, shape in shapes.items()
        if "embedding" not in name
    }
    return weights | biases


def write_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary, from the file of merges that lies in open_clip (which is not imported)."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    packed = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    letters = [*map(chr, visible), *map(chr, range(256, 256 + 256 - len(visible)))]
    words = [f"{letter}</w>" for letter in letters]
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *words, *(line.replace(" ", "") for line in merges), *ends]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
    folder.mkdir()
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    from transformers import CLIPTokenizer  # slow, and needed here only

    path = tmp_path_factory.mktemp("base")
    file, folder = path / "model.safetensors", path / "model"
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / math.sqrt(shape[-1])

    texts, to_v = {}, {}
    for name, shape in text_model_shapes().items():
        x = normal(*shape) + float("norm" in name and name.endswith("weight"))
        texts[name] = x.half()
    in_file = {f"cond_stage_model.transformer.{name}": x for name, x in texts.items()}
    for i, layer in enumerate(vmix.unet_layers("sd15")):
        to_v[layer.name] = normal(16 + i % 3, 64).half()
        in_file[f"model.diffusion_model.{layer.ldm_name}.to_v.weight"] = to_v[layer.name]
    save_file(in_file, file)

    for part in ("unet", "text_encoder"):
        (folder / part).mkdir(parents=True)
    (folder / "unet" / "config.json").write_text('{"layers_per_block": 2}')
    unet = {f"{name}.to_v.weight": x for name, x in to_v.items()}
    save_file(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(CONFIG))
    save_file(texts, folder / "text_encoder" / "model.safetensors")
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return Base(file, folder, texts, tokenizer, to_v)


def texts_of(init: vmix.Untrained) -> list[str]:
    """Of labels with one text for each side."""
    sides = [side for label in init.labels for side in (label.positive, label.negative)]
    return [text for (text,) in sides]


def labels_of(init: vmix.Untrained) -> list[tuple[str, str, str]]:
    names = [label.name for label in init.labels]
    texts = texts_of(init)
    return list(zip(names, texts[::2], texts[1::2], strict=True))


def check_aes_emb(path: Path, base: Base, texts: Sequence[str]) -> None:
    """It is all that the file has. Tolerance as in test_text_encoder.py, for the same reasons."""
    ((name, found),) = load(path).items()
    assert name == "aes_emb"
    expected = base.features(texts)
    assert found.dtype == torch.float32
    assert found.shape == (len(texts) // 2, 2, WIDTH)
    error = (found.flatten(0, 1) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    own = tensor(vmix.TextEncoder.open(base.file).features(texts))
    assert identical(found.flatten(0, 1), own)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_init(kind: str, base: Base, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    lines = [part for line in LINES for part in ("-l", line)]
    said = succeeds("init", "--base", getattr(base, kind), *lines, "-o", out)
    assert list(snapshot(tmp_path)) == [out.name]
    size = out.stat().st_size
    assert said == f"{out}: init file for other, 3 labels, {size / 1000:.1f} kB\n"
    assert size < 10_000  # whatever the size of the base

    init = vmix.Untrained.open(out)
    assert labels_of(init) == OF_LINES
    assert [(x.default, x.neutral) for x in init.labels] == [(1.0, None)] * 3
    assert [(x.range, x.step) for x in init.labels] == [((0.0, 1.0), single(0.05))] * 3
    assert (init.base, init.context_tokens, init.context_dim) == ("other", 77, 64)
    assert init.ldm_names == {x.name: x.ldm_name for x in vmix.unet_layers("sd15")}
    check_aes_emb(out, base, texts_of(init))


def test_init_from_a_list(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    (tmp_path / "labels.toml").write_text(LABELS_TOML, encoding="utf-8")
    succeeds("init", "-b", base.file, "-L", tmp_path / "labels.toml", "-o", out)
    init = vmix.Untrained.open(out)
    warm, cafe = init.labels
    assert (warm.name, warm.dimension) == ("warm light", "lighting")
    assert (warm.positive, warm.negative) == (["a photo in warm evening light"], ["sks"])
    assert (warm.default, warm.neutral, warm.range) == (0.75, 0.25, (-1.0, 2.0))
    assert warm.step == single(0.1)
    assert warm.display_names == {"de": "warmes Licht"}
    assert (cafe.name, cafe.positive, cafe.negative) == ("café", ["café"], ["nmwx"])
    assert (cafe.default, cafe.neutral, cafe.range) == (1.5, None, (0.0, 1.5))
    check_aes_emb(out, base, texts_of(init))


def test_init_with_several_phrasings(base: Base, tmp_path: Path) -> None:
    """A side's feature is the mean of its texts'."""
    out, positive = tmp_path / "out.safetensors", ["warm light", "a photo in warm light"]
    toml = f'[[label]]\nname = "warm"\npositive = {json.dumps(positive)}\nnegative = ["sks"]\n'
    (tmp_path / "labels.toml").write_text(toml, encoding="utf-8")
    succeeds("init", "-b", base.folder, "-L", tmp_path / "labels.toml", "-o", out)
    (label,) = vmix.Untrained.open(out).labels
    assert (label.positive, label.negative) == (positive, ["sks"])
    found = load(out)["aes_emb"][0]
    expected = torch.stack([base.features(texts).mean(0) for texts in (positive, ["sks"])])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_init_with_the_default_labels(base: Base, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    succeeds("init", "-b", base.file, "-o", out)
    init = vmix.Untrained.open(out)
    standard = (ROOT / "src" / "labels.toml").read_text(encoding="utf-8")
    names = re.findall(r'^name = "(.+)"$', standard, re.MULTILINE)
    assert len(names) == 7
    assert [label.name for label in init.labels] == names
    assert len({text for label in init.labels for text in label.negative}) == 7
    check_aes_emb(out, base, texts_of(init))


def test_a_file_and_a_folder_of_one_model_give_one_init_file(base: Base, tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        succeeds("init", "-b", getattr(base, kind), "-l", "calm", "-o", tmp_path / kind)
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder").read_bytes()


def test_init_warns_of_negatives_that_are_no_rare_identifiers(base: Base, tmp_path: Path) -> None:
    arguments = ["init", "-b", base.file, "-l", "calm: a calm mood | two words"]
    done = vmix_command(*arguments, "-o", tmp_path / "out")
    assert done.status == 0
    (line,) = done.err.splitlines()
    assert re.match(r"warning: label `calm`: the negative `two words` .* 2 tokens", line)
    assert labels_of(vmix.Untrained.open(tmp_path / "out"))[0][2] == "two words"


# --- files to work on, made by the library and not by the command ---

LDM = {layer.name: layer.ldm_name for layer in vmix.Adapter.open(ADAPTER).layers}
ROWS = ".rows"
# Names, texts and numbers of all kinds; a name that looks like a weight.
FITTED = [
    {
        "name": "warm",
        "dimension": "lighting",
        "positive": ["warm light", "evening sun"],
        "negative": ["cold light", ""],
        "default": 0.5,
        "neutral": 0,
        "range": [-1.5, 1.5],
        "step": 0.1,
        "effect": {"hue": 0.25, "colourfulness": -0.0635},
    },
    {"name": "a=1", "positive": ["a letter"], "negative": [""], "default": 0, "neutral": 0},
]


def write_linear(path: Path, labels: Sequence[Mapping[str, Any]], seed: int, base: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    sides = [{"label": x["name"], "side": s} for x in labels for s in ("positive", "negative")]
    made = {"method": "fitted", "base": base, "prompts": 12, "ridge": 0.01}
    metadata = {
        "vmix.format": "2",
        "vmix.kind": "adapter",
        "vmix.base": "other",
        "vmix.labels": json.dumps(labels),
        "vmix.context_tokens": "32",
        "vmix.apply_to": "both",
        "vmix.coefficients": "linear",
        "vmix.rows": json.dumps(sides),
        "vmix.made": json.dumps(made),
        "vmix.ldm_names": json.dumps(LDM),
        "modelspec.author": "me",
    }
    tensors = {"profile": torch.randn(32, len(sides), generator=draw)}
    for layer in vmix.Adapter.open(ADAPTER).layers:
        rows = torch.randn(len(sides), layer.inner_dim, generator=draw)
        tensors[layer.name + ROWS] = rows.bfloat16()
    save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad files, where commands run."""
    path = tmp_path_factory.mktemp("files")
    shutil.copy(ADAPTER, path / "adapter")
    (path / "model").symlink_to(MODEL)
    write_linear(path / "linear", FITTED, 0, "model")
    label = {"name": "calm", "positive": ["calm"], "negative": ["wild"], "neutral": 0}
    write_linear(path / "linear-2", [label], 1, "another")
    vmix.init_adapter(MODEL, ["warm: warm light | island", "a=1: a letter | sun"]).save(
        path / "init"
    )
    adapter, linear = vmix.Adapter.open(ADAPTER), vmix.Adapter.open(path / "linear")
    selection = {"sharp focus": 0.1, "vibrant color": -1.5}
    adapter.values(selection, apply_to="contrast", dtype="float16").save(path / "preset")
    linear.values({"warm": -0.75}).save(path / "linear-preset")

    tensors, metadata = load(ADAPTER), metadata_of(ADAPTER)

    def write(name: str, changes: Mapping[str, Tensor], **keys: str) -> None:
        save_file({**tensors, **changes}, path / name, {**metadata, **keys})

    nan = torch.tensor(math.nan)
    labels = json.loads(metadata["vmix.labels"])
    labels[0] |= {"default": -0.3, "neutral": 0.25, "range": [-1, 1]}
    half = {name: x.half() for name, x in tensors.items() if name.removesuffix(ROWS) in LDM}
    keys = {"modelspec.hash_sha256": "0x" + "0" * 64, "my.note": "kept"}
    write("half", half, **{"vmix.labels": json.dumps(labels), **keys})
    write("large", {MID + ROWS: tensors[MID + ROWS] * 1e7})
    write("nan", {"aes_emb": tensors["aes_emb"].where(tensors["aes_emb"] < 1, nan.half())})
    spoilt = tensors[MID + ROWS].clone()
    spoilt[3, 5] = nan
    write("nan-rows", {MID + ROWS: spoilt})
    values = load(path / "preset")
    values[f"{MID}.v_aes_uncond"][0, 0] = torch.inf
    save_file(values, path / "nan-preset", metadata_of(path / "preset"))
    aes_emb = load(path / "init")["aes_emb"] * nan
    save_file({"aes_emb": aes_emb}, path / "nan-init", metadata_of(path / "init"))

    whole = ADAPTER.read_bytes()
    (path / "truncated").write_bytes(whole[:-1])
    (path / "header").write_bytes(whole[:1000])
    (path / "empty").write_bytes(b"")
    (path / "text").write_text("These are words, and no tensors.\n")
    (path / "pickle.ckpt").write_bytes(b"\x80\x04K\x01.")
    (path / "folder").mkdir()
    for name, text in {
        "twice": '[[label]]\nname = "a"\n[[label]]\nname = "a"\n',
        "reserved": '[[label]]\nname = "all"\n',
        "key": '[[label]]\nname = "a"\npositve = "b"\n',
        "type": '[[label]]\nname = "a"\ndefault = "much"\n',
        "nothing": "",
    }.items():
        (path / f"{name}.toml").write_text(text)
    (path / "latin.toml").write_bytes('[[label]]\nname = "café"\n'.encode("latin-1"))
    return path


# --- inspect ---

INSPECTED = ["adapter", "half", "linear", "init", "preset", "linear-preset"]


def dtype_of(tensors: Mapping[str, Tensor], ending: str) -> str:
    (dtype,) = {x.dtype for name, x in tensors.items() if name.endswith(ending)}
    return {x: name for name, x in DTYPES.items()}[dtype]


def summary(path: Path) -> dict[str, Any]:
    """What a file says, read with safetensors' own reader."""
    metadata, tensors = metadata_of(path), load(path)
    kind = metadata["vmix.kind"]
    defaults: dict[str, Any] = {
        **{"dimension": "", "default": 1.0, "neutral": None, "range": [0, 1], "step": 0.05},
        **{"effect": {}, "display_names": {}},
    }
    expected: dict[str, Any] = {
        "kind": kind,
        "base": metadata["vmix.base"],
        "labels": [defaults | label for label in json.loads(metadata["vmix.labels"])],
        "made": json.loads(metadata.get("vmix.made", "null")),
        "metadata": metadata,
        "context_tokens": int(metadata["vmix.context_tokens"]),
        "bytes": len(path.read_bytes()),
    }
    if kind == "init":
        return expected | {"context_dim": tensors["aes_emb"].shape[-1]}
    ending = {"adapter": ROWS, "preset": ".v_aes"}[kind]
    expected |= {
        "layers": [
            {"name": name, "ldm_name": ldm, "inner_dim": tensors[name + ending].shape[-1]}
            for name, ldm in LDM.items()
        ],
        "dtype": dtype_of({x: tensors[x + ending] for x in LDM}, ""),
        "apply_to": metadata["vmix.apply_to"],
    }
    if kind == "preset":
        return expected | {
            "selection": json.loads(metadata["vmix.selection"]),
            "origin": metadata["vmix.origin"],
        }
    aes_emb = tensors.get("aes_emb")
    return expected | {
        "coefficients": metadata["vmix.coefficients"],
        "rows": len(json.loads(metadata["vmix.rows"])),
        "context_dim": None if aes_emb is None else aes_emb.shape[-1],
    }


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_json(name: str, files: Path) -> None:
    assert json.loads(succeeds("inspect", "--json", name, cwd=files)) == summary(files / name)


KINDS = {
    "adapter": "trained adapter",
    "half": "trained adapter",
    "linear": "fitted adapter",
    "init": "init file",
    "preset": "preset of trained labels",
    "linear-preset": "preset of fitted labels",
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_table(name: str, files: Path) -> None:
    above, below, *more = succeeds("inspect", name, cwd=files).split("\n\n")
    found = dict(line.split(None, 1) for line in above.splitlines())
    expected = summary(files / name)
    context = f"{expected['context_tokens']} tokens"
    if expected.get("context_dim"):
        context += f" of width {expected['context_dim']}"
    rows = {
        "kind": KINDS[name],
        "base": expected["base"],
        "size": f"{expected['bytes'] / 1000:.1f} kB",
        "context": context,
    }
    if made := expected["made"]:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in made.items()}
        rows["made"] = ", ".join(f"{key}: {text}" for key, text in sorted(texts.items()))
    if "coefficients" in expected:
        rows["rows"] = f"{expected['rows']}, {expected['coefficients']}"
    if "layers" in expected:
        rows["layers"] = str(len(expected["layers"]))
    rows |= {key: expected[key] for key in ("dtype", "apply_to", "origin") if key in expected}
    for key, value in expected["metadata"].items():
        if key.startswith("modelspec."):
            rows[key.removeprefix("modelspec.")] = value
    assert found == rows

    named = name in ("adapter", "half", "preset")
    effects = [
        f"effect of {label['name']}: "
        + ", ".join(f"{key} {round(value, 3):g}" for key, value in sorted(label["effect"].items()))
        for label in expected["labels"]
        if label["effect"]
    ]
    assert [part.strip() for part in more] == [
        *(["\n".join(effects)] if effects else []),
        *(["names in de, zh"] if named else []),
    ]
    header, *lines = below.splitlines()
    weight = "weight" if "preset" in name else "default"
    columns = [
        *("label", "dimension", weight, "neutral", "range"),
        *("positive", "negative"),
    ]
    assert header.split() == columns
    starts = [header.index(column) for column in columns]
    weights = expected.get("selection") or {x["name"]: x["default"] for x in expected["labels"]}
    for line, label in zip(lines, expected["labels"], strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        neutral = label["neutral"]
        assert cells[:2] == [label["name"], label["dimension"]]
        assert float(cells[2]) == weights[label["name"]]
        assert cells[3] == "none" if neutral is None else float(cells[3]) == neutral
        assert list(map(float, cells[4].split(" to "))) == label["range"]
        sides = [[text or "(no text)" for text in label[x]] for x in ("positive", "negative")]
        assert [cell.split(" / ") for cell in cells[5:7]] == sides


# --- bake ---


def check_preset(path: Path, values: vmix.Values, origin: Path) -> None:
    expected = {f"{layer}.v_aes": tensor(values[layer]) for layer in values}
    for layer in values:
        if (uncond := values.uncond(layer)) is not None:
            expected[f"{layer}.v_aes_uncond"] = tensor(uncond)
    found, metadata = load(path), metadata_of(path)
    assert set(found) == set(expected)
    assert all(identical(found[name], expected[name]) for name in expected)
    assert (metadata["vmix.kind"], metadata["vmix.apply_to"]) == ("preset", values.apply_to)
    selection = json.loads(metadata["vmix.selection"])
    assert {name: single(weight) for name, weight in selection.items()} == values.selection
    assert metadata["vmix.origin"] == hashlib.sha256(origin.read_bytes()).hexdigest()
    # What hosts show travels along.
    for key, value in metadata_of(origin).items():
        if key.startswith("modelspec.") or key == "vmix.made":
            assert metadata[key] == value


BAKED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "defaults": ([], {}),
    "one": (["--select", "sharp focus"], {"selection": {"sharp focus": 1.0}}),
    "a weight": (["-s", "sharp focus=0.3"], {"selection": {"sharp focus": 0.3}}),
    "spaces": (["-s", "sharp focus = -2e-1"], {"selection": {"sharp focus": -0.2}}),
    "several": (
        ["-s", "sharp focus", "-s", "vibrant color=-1.25", "-s", "natural lighting=2"],
        {"selection": {"sharp focus": 1, "vibrant color": -1.25, "natural lighting": 2}},
    ),
    "all": (["-s", "all"], {"selection": "all"}),
    "none": (["-s", "none"], {"selection": "none"}),
    "both": (["--apply-to", "both"], {"apply_to": "both"}),
    "contrast": (
        ["-s", "sharp focus=0.5", "--apply-to", "contrast", "--dtype", "bf16"],
        {"selection": {"sharp focus": 0.5}, "apply_to": "contrast", "dtype": "bfloat16"},
    ),
    "float16": (["--dtype", "float16"], {"dtype": "float16"}),
    "fp32": (["--dtype", "fp32"], {"dtype": "float32"}),
}


@pytest.mark.parametrize("name", BAKED)
def test_bake(name: str, files: Path, tmp_path: Path) -> None:
    arguments, options = BAKED[name]
    out = tmp_path / "out.safetensors"
    said = succeeds("bake", "adapter", *arguments, "-o", out, cwd=files)
    size = f"{out.stat().st_size / 1000:.1f} kB"
    assert said == f"{out}: preset of trained labels for other, 4 labels, 7 layers, {size}\n"
    check_preset(out, vmix.Adapter.open(ADAPTER).values(**options), ADAPTER)


# "half" has a label that is neutral at 0.25 and starts from -0.3, "linear" some that are so at 0.
WEIGHTS: dict[str, tuple[str, list[str], list[float]]] = {
    "defaults": ("half", [], [-0.3, 1, 1, 1]),
    "left out": ("half", ["-s", "sharp focus"], [0.25, 0, 1, 0]),
    "none": ("half", ["-s", "none"], [0.25, 0, 0, 0]),
    "all": ("half", ["-s", "all"], [1, 1, 1, 1]),
    "linear defaults": ("linear", [], [0.5, 0]),
    "linear": ("linear", ["-s", "warm=-1.5"], [-1.5, 0]),
    "a name that looks like a weight": ("linear", ["-s", "a=1"], [0, 1]),
    "its weight": ("linear", ["-s", "a=1=0.25", "-s", "warm"], [1, 0.25]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_baked(name: str, files: Path, tmp_path: Path) -> None:
    file, arguments, weights = WEIGHTS[name]
    succeeds("bake", file, *arguments, "-o", tmp_path / "out", cwd=files)
    adapter = vmix.Adapter.open(files / file)
    names = [label.name for label in adapter.labels]
    selection = dict(zip(names, weights, strict=True))
    assert json.loads(metadata_of(tmp_path / "out")["vmix.selection"]) == selection
    check_preset(tmp_path / "out", adapter.values(selection), files / file)


# --- merge ---


def test_merge_some_labels(files: Path, tmp_path: Path) -> None:
    """In the order in which they are named; those left out are where a selection leaves them."""
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    kept = ["sharp focus", "vibrant color"]
    said = succeeds("merge", "half", "-l", kept[0], "--label", kept[1], "-o", out, cwd=files)
    size = f"{out.stat().st_size / 1000:.1f} kB"
    assert said == f"{out}: trained adapter for other, 2 labels, 7 layers, {size}\n"
    whole, part = vmix.Adapter.open(files / "half"), vmix.Adapter.open(out)
    assert [label.name for label in part.labels] == kept
    assert part.dtype == "float16"
    for selection in ({kept[0]: 0.5, kept[1]: -1}, {kept[0]: 2}, "none"):
        found, expected = part.values(selection), whole.values(selection)
        for layer in expected:
            a, b = tensor(found[layer]), tensor(expected[layer])
            # Both sides of f32 roundings, which weights outside of 0 to 1 magnify a little.
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    vmix.merge_adapters([whole], kept).save(other)
    assert out.read_bytes() == other.read_bytes()


def test_merge_several(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = vmix_command("merge", "linear", "linear-2", "-o", out, cwd=files)
    assert done.status == 0
    assert done.err == "warning: made for different checkpoints: another, model\n"
    size = f"{out.stat().st_size / 1000:.1f} kB"
    assert done.out == f"{out}: merged adapter for other, 3 labels, 7 layers, {size}\n"
    whole = vmix.Adapter.open(out)
    assert [label.name for label in whole.labels] == ["warm", "a=1", "calm"]
    parts = [vmix.Adapter.open(files / name) for name in ("linear", "linear-2")]
    made = [part.made for part in parts]
    same = {key: value for key, value in made[0].items() if made[1].get(key) == value}
    assert whole.made == {**same, "method": "merged", "parts": made}
    found = whole.values({"warm": -0.5, "calm": 2})
    terms = [parts[0].values({"warm": -0.5}), parts[1].values({"calm": 2})]
    for layer in found:
        expected = torch.stack([exact(term[layer]) for term in terms]).sum(0)
        assert (exact(found[layer]) - expected).abs().max() < 1e-6 * expected.abs().max()
    some = tmp_path / "some.safetensors"
    vmix_command("merge", "linear", "linear-2", "-l", "calm", "-l", "a=1", "-o", some, cwd=files)
    assert [label.name for label in vmix.Adapter.open(some).labels] == ["calm", "a=1"]


def test_merge_of_one_checkpoint_warns_of_nothing(files: Path, tmp_path: Path) -> None:
    label = {"name": "more", "positive": ["more"], "negative": [""], "neutral": 0}
    write_linear(tmp_path / "more", [label], 2, "model")
    succeeds("merge", "linear", tmp_path / "more", "-o", tmp_path / "out", cwd=files)


# --- convert ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["adapter", "half", "linear"])
def test_convert(name: str, dtype: str, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    said = succeeds("convert", name, "--dtype", dtype, "-o", out, cwd=files)
    size = f"{out.stat().st_size / 1000:.1f} kB"
    labels = 2 if name == "linear" else 4
    assert said == f"{out}: {KINDS[name]} for other, {labels} labels, 7 layers, {size}\n"
    before, after = load(files / name), load(out)
    assert set(before) == set(after)
    for key, x in before.items():
        is_rows = key.removesuffix(ROWS) in LDM
        assert identical(after[key], x.to(DTYPES[dtype]) if is_rows else x), key
    metadata = metadata_of(files / name)
    metadata.pop("modelspec.hash_sha256", None)  # it was that of other bytes
    assert metadata_of(out) == metadata
    assert vmix.Adapter.open(out).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_convert_a_preset(dtype: str, files: Path, tmp_path: Path) -> None:
    succeeds("convert", "preset", "--dtype", dtype, "-o", tmp_path / "out", cwd=files)
    before, after = load(files / "preset"), load(tmp_path / "out")
    assert set(before) == set(after)
    assert all(identical(after[key], x.to(DTYPES[dtype])) for key, x in before.items())
    assert metadata_of(tmp_path / "out") == metadata_of(files / "preset")


@pytest.mark.parametrize(
    ("name", "dtype"), [("half", "float16"), ("linear", "bfloat16"), ("preset", "float16")]
)
def test_there_and_back(name: str, dtype: str, files: Path, tmp_path: Path) -> None:
    same, wide, back = (tmp_path / step for step in ("same", "wide", "back"))
    succeeds("convert", files / name, "--dtype", dtype, "-o", same)
    succeeds("convert", files / name, "--dtype", "float32", "-o", wide)
    succeeds("convert", wide, "--dtype", dtype, "-o", back)
    assert wide.stat().st_size > back.stat().st_size
    assert back.read_bytes() == same.read_bytes()
    first, last = load(files / name), load(back)
    assert all(identical(first[key], last[key]) for key in first)


def test_convert_in_place(tmp_path: Path) -> None:
    """Of a file that is read while it is replaced."""
    path = tmp_path / "adapter"
    shutil.copy(ADAPTER, path)
    succeeds("convert", path, "--dtype", "float16", "-o", path, "--force")
    assert identical(load(path)[MID + ROWS], load(ADAPTER)[MID + ROWS].half())
    assert list(snapshot(tmp_path)) == ["adapter"]


# --- validate ---


@pytest.mark.parametrize("name", INSPECTED)
def test_validate(name: str, files: Path) -> None:
    kind = "preset" if "preset" in name else "init file" if name == "init" else "adapter"
    assert succeeds("validate", name, cwd=files) == f"{name}: a valid {kind}\n"


INVALID = {
    "truncated": "not a safetensors file",
    "header": "not a safetensors file",
    "empty": "not a safetensors file",
    "text": "not a safetensors file",
    "missing": "No such file",
    "folder": "directory",
    "nan": "`aes_emb`: expected finite values, found NaN",
    "nan-rows": f"`{MID}{ROWS}`: expected finite values, found NaN",
    "nan-preset": f"`{MID}.v_aes_uncond`: expected finite values, found .*inf",
    "nan-init": "`aes_emb`: expected finite values, found NaN",
}


@pytest.mark.parametrize("name", INVALID)
def test_files_that_are_refused(name: str, files: Path, tmp_path: Path) -> None:
    """By every command that reads one."""
    for command in (["validate"], ["inspect"], ["inspect", "--json"]):
        assert re.match(rf"error: {name}: .*{INVALID[name]}", refused(*command, name, cwd=files))
    for command in (["bake"], ["merge"], ["convert", "--dtype", "float16"]):
        said = refused(*command, name, "-o", tmp_path / "out", cwd=files)
        other_kind = "preset" in name or "init" in name
        assert said.startswith(f"error: {name}: ")
        assert other_kind or re.search(INVALID[name], said)
    assert not snapshot(tmp_path)


def test_validate_several(files: Path) -> None:
    done = vmix_command("validate", "adapter", "text", "preset", "missing", "init", cwd=files)
    assert done.status == 1
    good = "adapter: a valid adapter\npreset: a valid preset\n"
    assert done.out == f"{good}init: a valid init file\n"
    first, second, last = done.err.splitlines()
    assert first.startswith("error: text: not a safetensors file")
    assert second.startswith("error: missing: No such file")
    assert last == "error: 2 of 5 files refused"
    assert succeeds("validate", "adapter", "preset", cwd=files) == good


# --- what is written, and what is not ---

INIT = ["init", "-b", "model"]
WRITING: dict[str, list[str]] = {
    "init": [*INIT, "-l", "calm: a calm mood | island"],
    "bake": ["bake", "adapter"],
    "merge": ["merge", "adapter", "-l", "sharp focus"],
    "convert": ["convert", "adapter", "--dtype", "float32"],
}


@pytest.mark.parametrize("command", WRITING)
def test_nothing_is_overwritten(command: str, files: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.write_bytes(b"precious")
    said = refused(*WRITING[command], "-o", out, cwd=files)
    assert str(out) in said
    assert "--force" in said
    assert snapshot(tmp_path) == {"out": b"precious"}
    succeeds(*WRITING[command], "-o", other, cwd=files)
    for force in ("--force", "-f"):
        out.write_bytes(b"precious")
        succeeds(*WRITING[command], "-o", out, force, cwd=files)
        assert snapshot(tmp_path) == {"out": other.read_bytes(), "other": other.read_bytes()}
    vmix.open(out)


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("existing", [True, False], ids=["existing", "new"])
def test_a_failed_write_leaves_nothing(
    command: str, existing: bool, files: Path, tmp_path: Path
) -> None:
    """Files may only become 1000 bytes long: a disk that is full in the middle of it."""
    out = tmp_path / "out"
    if existing:
        out.write_bytes(b"precious")
    before = snapshot(tmp_path)
    said = refused(*WRITING[command], "-o", out, "--force", cwd=files, preexec_fn=limit_files)
    assert said.startswith(f"error: {out}: ")
    assert "too large" in said
    assert snapshot(tmp_path) == before


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_a_failed_write_names_no_temporary_file(files: Path, tmp_path: Path) -> None:
    """Nobody knows it, and it is gone."""
    said = refused(*WRITING["bake"], "-o", tmp_path / "out", cwd=files, preexec_fn=limit_files)
    assert ".vmix-" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["bake", "adapter", "-s", "bokeh"],
        ["bake", "nan-rows"],
        ["merge", "adapter", "-l", "bokeh"],
        ["merge", "adapter", "linear"],
        ["convert", "truncated", "--dtype", "float32"],
        ["convert", "large", "--dtype", "float16"],
        ["init", "-b", "folder"],
        ["init", "-b", "model", "-L", "twice.toml"],
    ],
)
def test_a_failure_keeps_what_was_there(arguments: list[str], files: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    refused(*arguments, "-o", tmp_path / "out", "--force", cwd=files)
    assert snapshot(tmp_path) == {"out": b"precious"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_writes_nothing_that_validate_refuses(
    dtype: str, files: Path, tmp_path: Path
) -> None:
    """NaN among float16 weights, rounded or as they are."""
    said = refused("convert", "nan-rows", "--dtype", dtype, "-o", tmp_path / "out", cwd=files)
    assert MID in said
    assert not snapshot(tmp_path)


def test_a_link_stays_one(files: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"precious")
    link.symlink_to(target)
    refused("bake", "adapter", "-o", link, cwd=files)
    assert target.read_bytes() == b"precious"
    succeeds("bake", "adapter", "-o", link, "--force", cwd=files)
    assert link.is_symlink()
    assert isinstance(vmix.open(target), vmix.Values)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_read_is_not_overwritten(force: list[str], files: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    shutil.copy(files / "adapter", tmp_path)
    shutil.copy(files / "linear", tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "linear")
    (tmp_path / "list").write_text('[[label]]\nname = "red"', "utf-8")
    unet = "model/unet/diffusion_pytorch_model.safetensors"
    for arguments in (
        ["init", "-b", "model", "-L", "list", "-o", "list"],
        ["init", "-b", "model", "-o", unet],
        ["bake", "adapter", "-o", "adapter"],
        ["bake", "linear", "-o", "link"],
        ["merge", "adapter", "-o", "adapter"],
        ["merge", "linear", "linear", "-o", "link"],
    ):
        before = {name: (tmp_path / name).read_bytes() for name in ("adapter", "linear", unet)}
        assert "what is read" in refused(*arguments, *force, cwd=tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_link_that_leads_nowhere_stays_one(force: list[str], files: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    assert str(link) in refused("bake", "adapter", "-o", link, *force, cwd=files)
    assert link.is_symlink()
    assert not link.exists()


def test_permissions_are_as_the_umask_says(files: Path, tmp_path: Path) -> None:
    """Not those of a temporary file, which are its owner's alone."""
    succeeds("bake", "adapter", "-o", tmp_path / "out", cwd=files, umask=0o027)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_names_that_are_no_text(files: Path, tmp_path: Path) -> None:
    """Of any bytes but / and NUL, as Linux allows."""
    if sys.platform == "darwin":
        pytest.skip("macOS has names of Unicode only")
    name = os.fsdecode(b"\xff\xfe")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system has names of Unicode only")
    (tmp_path / name).unlink()
    succeeds("bake", "adapter", "-o", tmp_path / name, cwd=files)
    assert os.listdir(tmp_path) == [name]
    assert succeeds("validate", tmp_path / name).endswith(": a valid preset\n")


# --- errors ---

KNOWN = "known labels: vibrant color, natural lighting, sharp focus, balanced composition"
ERRORS: dict[str, tuple[list[str], str]] = {
    "unknown label": (
        ["bake", "adapter", "-s", "sharp focsu"],
        rf"unknown label `sharp focsu` \(did you mean `sharp focus`\?\); {KNOWN}",
    ),
    "unknown label with a weight": (
        ["bake", "adapter", "-s", "x=1"],
        f"unknown label `x`; {KNOWN}",
    ),
    "no weight": (["bake", "adapter", "-s", "sharp focus=much"], '"much" as weight'),
    "empty weight": (["bake", "adapter", "-s", "sharp focus="], '"" as weight'),
    "NaN": (["bake", "adapter", "-s", "sharp focus=nan"], 'finite number, found "nan" as weight'),
    "infinity": (
        ["bake", "adapter", "-s", "sharp focus=1e39"],
        'finite number, found "1e39" as weight',
    ),
    "all of a weight": (["bake", "adapter", "-s", "all=2"], "`all` takes no weight"),
    "values beyond a dtype": (
        ["bake", "large", "--dtype", "float16"],
        f"layer `{MID}`: expected values that float16 can hold, found more: label `",
    ),
    "rows beyond a dtype": (
        ["convert", "large", "--dtype", "float16"],
        f"layer `{MID}`: expected values that float16 can hold",
    ),
    "label chosen twice": (
        ["bake", "adapter", "-s", "sharp focus", "-s", "sharp focus=0.5"],
        '"sharp focus=0.5": that label is selected twice',
    ),
    "nothing to convert": (
        ["convert", "init", "--dtype", "float16"],
        "init: an init file has neither rows nor values to convert",
    ),
    "label without a text": ([*INIT, "-l", "a: | b"], "label `a` without a positive text"),
    "a preset is baked": (["bake", "preset"], "preset: metadata `vmix.kind`: .*`adapter`"),
    "an init file is baked": (["bake", "init"], "init: metadata `vmix.kind`: .*`adapter`"),
    "a preset is merged": (["merge", "preset"], "preset: metadata `vmix.kind`: .*`adapter`"),
    "unknown label to merge": (
        ["merge", "adapter", "-l", "sharp focsu"],
        rf"unknown label `sharp focsu` \(did you mean `sharp focus`\?\); {KNOWN}",
    ),
    "label merged twice": (
        ["merge", "adapter", "-l", "sharp focus", "-l", "sharp focus"],
        "two labels named `sharp focus`",
    ),
    "one adapter twice": (["merge", "linear", "linear"], "found `warm` in two adapters"),
    "trained ones are joined": (
        ["merge", "adapter", "linear"],
        "expected `linear`, to join several, found `layernorm`",
    ),
    "missing adapter to merge": (["merge", "linear", "missing"], "missing: No such file"),
    "missing adapter": (["bake", "missing"], "missing: No such file"),
    "missing file": (["convert", "missing", "--dtype", "float16"], "missing: No such file"),
    "all and more": (["bake", "adapter", "-s", "all", "-s", "sharp focus"], "stands alone"),
    "missing base": (["init", "-b", "missing"], "missing: no such file or folder; expected"),
    "adapter as base": (["init", "-b", "adapter"], "adapter: .*cross-attention"),
    "preset as base": (["init", "-b", "preset"], "preset: .*cross-attention"),
    "text as base": (["init", "-b", "text"], "text: not a safetensors file"),
    "pickle as base": (["init", "-b", "pickle.ckpt"], r"pickle\.ckpt: .*never loaded"),
    "folder without a pipeline": (["init", "-b", "folder"], "folder: .*without `unet`"),
    "reserved label": ([*INIT, "-l", "all"], "a label named `all`, which is reserved"),
    "label twice": ([*INIT, "-l", "a", "-l", "a"], "two labels named `a`"),
    "no label": ([*INIT, "-l", ""], "a label without a name"),
    "a negative without a text": ([*INIT, "-l", "a | b"], "`NAME: TEXT . NEGATIVE`"),
    "long label": (
        [*INIT, "-l", "cat: " + "cat " * 31 + "| island"],
        "cat.*at most 30 tokens, found 31",
    ),
    "missing list": ([*INIT, "-L", "missing"], "missing: No such file"),
    "folder as list": ([*INIT, "-L", "folder"], "folder: .*directory"),
    "label twice in a list": ([*INIT, "-L", "twice.toml"], r"twice\.toml: .*two labels named `a`"),
    "reserved in a list": ([*INIT, "-L", "reserved.toml"], r"reserved\.toml: .*named `all`"),
    "list in Latin-1": ([*INIT, "-L", "latin.toml"], r"latin\.toml: .*UTF-8"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, files: Path, tmp_path: Path) -> None:
    arguments, complaint = ERRORS[name]
    assert re.search(complaint, refused(*arguments, "-o", tmp_path / "out", cwd=files))
    assert not snapshot(tmp_path)


@pytest.mark.parametrize(
    ("name", "line", "word"),
    [("key", 3, "positve"), ("type", 3, 'default = "much"'), ("nothing", 1, "field `label`")],
)
def test_mistakes_in_a_list_are_shown(
    name: str, line: int, word: str, files: Path, tmp_path: Path
) -> None:
    """With the line and a mark under it, so that this is more than a sentence."""
    arguments = [*INIT, "-L", f"{name}.toml", "-o", tmp_path / "out"]
    done = vmix_command(*arguments, cwd=files)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"error: {name}.toml: ")
    assert f"at line {line}, column" in done.err
    assert word in done.err
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("command", WRITING)
def test_places_that_cannot_be_written(command: str, files: Path, tmp_path: Path) -> None:
    before = snapshot(files / "folder")
    for place, complaint in {
        "missing/out": "missing: there is no such folder",
        "text/out": "text: there is no such folder",
        "new/": "new/: ",
    }.items():
        assert complaint in refused(*WRITING[command], "-o", place, cwd=files)
    for force in ([], ["--force"]):
        said = refused(*WRITING[command], "-o", "folder", *force, cwd=files)
        assert said.startswith("error: folder: ")
    assert not (files / "missing").exists()
    assert not (files / "new").exists()
    assert snapshot(files / "folder") == before


# Control characters but line feeds, and what turns the direction of writing.
SPEAKS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def raw_file(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + bytes(4)


def test_files_do_not_speak_to_the_terminal(tmp_path: Path) -> None:
    evil = "a\x1b[2J\u202eb"
    name = json.dumps(evil)  # escaped, as the header is JSON
    info = '"shape": [3], "data_offsets": [0, 4]'
    (tmp_path / "name").write_bytes(raw_file(f'{{{name}: {{"dtype": "F32", {info}}}}}'))
    (tmp_path / "dtype").write_bytes(raw_file(f'{{"a": {{"dtype": {name}, {info}}}}}'))
    metadata = metadata_of(ADAPTER)
    metadata["vmix.labels"] = metadata["vmix.labels"].replace('"sharp focus"', name)
    save_file(load(ADAPTER), tmp_path / "label", metadata)
    loud = {}
    for arguments in (
        ["validate", "name"],
        ["validate", "dtype"],
        ["inspect", "label"],
        ["bake", "label", "-s", "bokeh", "-o", "out"],
    ):
        done = vmix_command(*arguments, cwd=tmp_path)
        if found := SPEAKS.findall(done.out + done.err):
            loud[" ".join(arguments)] = found
    assert not loud


# --- nobody reads, or nothing can be written there ---

SAYING = {
    "help": ["--help"],
    "version": ["--version"],
    "inspect": ["inspect", "adapter"],
    "inspect, JSON": ["inspect", "--json", "adapter"],
    "validate": ["validate", "adapter", "preset"],
}


@contextlib.contextmanager
def pipe_without_reader() -> Any:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.mark.parametrize("name", [*SAYING, *WRITING])
def test_nobody_reads(name: str, files: Path, tmp_path: Path) -> None:
    """As `vmix inspect FILE | head -c0`: who closed it has read enough."""
    out = ["-o", tmp_path / "out"] if name in WRITING else []
    with pipe_without_reader() as writer:
        arguments = [*(SAYING | WRITING)[name], *out]
        assert succeeds(*arguments, cwd=files, stdout=writer) == ""
    if out:
        vmix.open(tmp_path / "out")


@pytest.mark.parametrize("names", [("text", "adapter"), ("adapter", "text")])
def test_what_is_refused_is_so_if_nobody_reads(names: tuple[str, str], files: Path) -> None:
    """`vmix validate * | head -c0` under `set -o pipefail` must not pass."""
    with pipe_without_reader() as writer:
        done = vmix_command("validate", *names, cwd=files, stdout=writer)
    assert "error: text: not a safetensors file" in done.err
    assert done.status == 1


@needs_full
@pytest.mark.parametrize("name", [*SAYING, *WRITING])
def test_nothing_can_be_said(name: str, files: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"] if name in WRITING else []
    with FULL.open("w") as full:
        said = refused(*(SAYING | WRITING)[name], *out, cwd=files, stdout=full)
    assert "No space left on device" in said
    assert set(snapshot(tmp_path)) <= {"out"}
    if out:  # whole or not at all
        vmix.open(tmp_path / "out")


def test_without_standard_streams(files: Path, tmp_path: Path) -> None:
    """Files that are opened then get the numbers 0 to 2: no message may get into them."""
    succeeds("bake", "adapter", "-o", tmp_path / "expected", cwd=files)
    command = [*COMMAND, *WRITING["bake"], "-o", str(tmp_path / "out")]
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command], cwd=files, timeout=600)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "expected").read_bytes()


# --- interrupted ---


def large_adapter(path: Path, size: int) -> None:
    """With so many bytes of rows, which are a hole in the file and cost nothing."""
    d = 8
    metadata = metadata_of(ADAPTER) | {
        "vmix.labels": '[{"name": "a", "positive": ["a"], "negative": ["b"]}]',
        "vmix.rows": '[{"label": "a", "side": "positive"}]',
        "vmix.context_tokens": "1",
        "vmix.ldm_names": json.dumps({MID: LDM[MID]}),
    }
    shapes = {
        "gram_factor": [1, 1],
        "profile": [1, 1],
        "aes_emb": [1, 2, d],
        "context.rows": [1, d],
        MID + ROWS: [1, size // 4],
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def is_writing(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Whether it has a file open there, of whatever name or none."""
    handles = Path(f"/proc/{process.pid}/fd")
    with contextlib.suppress(OSError):
        for handle in os.listdir(handles):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(handles / handle).startswith(str(folder.resolve())):
                    return True
    return False


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see when it writes")
@pytest.mark.parametrize(
    ("hangup", "signals", "status"),
    [
        (signal.SIG_DFL, [signal.SIGINT], 130),
        (signal.SIG_IGN, [signal.SIGHUP, signal.SIGINT], 130),
        (signal.SIG_IGN, [signal.SIGHUP], 0),  # goes on
    ],
    ids=["plain", "nohup", "nohup alone"],
)
def test_interrupted(
    hangup: signal.Handlers, signals: list[signal.Signals], status: int, tmp_path: Path
) -> None:
    """Ctrl-C while the file is written: all of it or nothing, and no temporary file either."""
    folder, adapter = tmp_path / "out", tmp_path / "adapter"
    folder.mkdir()
    large_adapter(adapter, 100_000_000)
    (folder / "out").write_bytes(b"precious")
    command = [*COMMAND, "convert", str(adapter), "--dtype", "float32"]
    command += ["-o", str(folder / "out"), "--force"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    ) as process:
        while process.poll() is None and not is_writing(process, folder):
            time.sleep(0.001)  # writing takes some tenths of a second
        for number in signals:
            process.send_signal(number)
        _, err = process.communicate(timeout=600)
    assert b"Traceback" not in err
    assert b"panicked" not in err
    assert [path.name for path in folder.iterdir()] == ["out"]
    if (folder / "out").stat().st_size == 8:
        assert process.returncode == status == 130
        assert (folder / "out").read_bytes() == b"precious"
    else:  # it came too late, on a machine with much else to do
        assert process.returncode in (0, status)
        vmix.open(folder / "out")
