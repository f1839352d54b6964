"""The C library as `make test-rust` built it, and compilers for its hosts."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import layer_norm

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "comfy_nodes/demo/adapter.safetensors"
# What it was made from.
MATRICES = ROOT / "tests/data/demo_matrices.safetensors"
FITTED = ROOT / "tests/data/fitted.safetensors"
SUFFIX = "dylib" if sys.platform == "darwin" else "so"

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"]
C = ["-x", "c", "-std=c11", *STRICT]
CPP = ["-x", "c++", "-std=c++17", *STRICT]


def tool(name: str) -> str:
    """A program that a test needs. Where CI is set its absence fails: skipped is not proved."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        words = f"`{name}` is not installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(words)
    return found


def run(*command: str | Path, **options: object) -> str:
    """Runs a command, and shows what it printed if it fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
    return str(done.stdout)


def paper_values(weights: list[float]) -> dict[str, torch.Tensor]:
    """V_a of every layer of ADAPTER by the paper's equations 4 to 7, in f64, from its matrices."""
    tensors = {name: tensor.double() for name, tensor in load_file(MATRICES).items()}
    t, t_hat = tensors["aes_emb"].unbind(1)
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    lifted = tensors["projection.linear.weight"] @ ((1 - w) * t_hat + w * t)
    scale, shift = tensors["projection.norm.weight"], tensors["projection.norm.bias"]
    normed = layer_norm(lifted, lifted.shape[-1:], scale, shift, eps=1e-5)
    f_a = normed @ tensors["projection.zero.weight"].T + tensors["projection.zero.bias"]
    suffix = ".to_v_aes.weight"
    layers = {name: w_va for name, w_va in tensors.items() if name.endswith(suffix)}
    return {name.removesuffix(suffix): f_a @ w_va.T for name, w_va in layers.items()}


class Files(NamedTuple):
    """Both examples of docs/format.md, which says what values they have, and an init file."""

    layernorm: Path
    linear: Path
    init: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Written without the library."""
    folder = tmp_path_factory.mktemp("files")
    sides: list[object] = [{"label": "warm", "side": side} for side in ("positive", "negative")]
    aes_emb = torch.tensor([[[1.0, -1], [-1, 1]]])

    def write(kind: str, label: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
        texts = {"positive": ["warm light", "warm colors"], "negative": ["cold light", ""]}
        metadata = {
            "format": "2",
            "kind": "init" if kind == "init" else "adapter",
            "base": "other",
            "labels": json.dumps([{"name": "warm", **texts, **label}]),
            "context_tokens": "2",
            "ldm_names": json.dumps({"layer": "of LDM"}),
        }
        if kind != "init":
            constant = [{"side": "constant"}] if kind == "layernorm" else []
            metadata |= {
                "apply_to": "cond",
                "coefficients": kind,
                "rows": json.dumps([*sides, *constant]),
                "made": json.dumps({"method": "fitted"}),
            }
        if kind == "layernorm":
            metadata["norm_eps"] = "0.5625"
        path = folder / f"{kind}.safetensors"
        save_file(tensors, path, {f"vmix.{key}": text for key, text in metadata.items()})
        return path

    return Files(
        write(
            "layernorm",
            {"neutral": 0.5},
            {
                "profile": torch.tensor([[1.0, 1, 1], [-1, -1, 1]]),
                "gram_factor": torch.tensor([[1.0], [-1]]),
                "layer.rows": torch.tensor([[5.0, 0], [0, 3], [1, 1]]),
                "context.rows": torch.tensor([[5.0, 0], [0, 3], [1, 1]]),
                "aes_emb": aes_emb,
            },
        ),
        write(
            "linear",
            {"neutral": 0, "range": [-1, 1.5], "step": 0.125, "default": 0.5},
            {
                "profile": torch.tensor([[1, 0.5], [2, 1]]),
                "layer.rows": torch.tensor([[4.0, 0], [0, 8]]),
            },
        ),
        write("init", {}, {"aes_emb": aes_emb}),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of libvmix, under the name that programs ask for at run time."""
    built = ROOT / f"target/debug/libvmix.{SUFFIX}"
    assert built.exists(), "run `make test-rust` first"
    folder = tmp_path_factory.mktemp("library")
    for name in (f"libvmix.{SUFFIX}", "libvmix.so.1", "libvmix.1.dylib"):
        (folder / name).symlink_to(built)
    return folder


@pytest.fixture(scope="session")
def build(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a source file against include/ and libvmix, and returns the program."""

    @functools.cache
    def build(source: str, *flags: str, compiler: str = "gcc") -> Path:
        program = tmp_path_factory.mktemp("program") / Path(source).stem
        language = CPP if source.endswith(".cpp") else C
        run(
            tool(compiler),
            *language,
            *(["-D_GNU_SOURCE"] if language is C else []),
            f"-I{ROOT / 'include'}",
            ROOT / source,
            *("-x", "none", f"-L{library}", "-lvmix", f"-Wl,-rpath,{library}"),
            *flags,
            *("-lpthread", "-lm"),
            *("-o", program),
        )
        return program

    return build
