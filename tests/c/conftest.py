"""The C library as `make test-rust` built it, and compilers for its hosts."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "comfy_nodes/demo/adapter.safetensors"
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
