"""Hosts of the C library: they compile without a warning, and do what they say."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vmix
from conftest import ADAPTER, ROOT, SUFFIX, paper_values, run, tool

Build = Callable[..., Path]
COMPILERS = {"c": ["gcc", "clang"], "cpp": ["g++", "clang++"]}


def compilers(*sources: str) -> list[tuple[str, str]]:
    return [(s, c) for s in sources for c in COMPILERS[s.rsplit(".", 1)[1]]]


@pytest.mark.parametrize(
    ("source", "compiler"),
    compilers("examples/c/host.c", "tests/c/calls.c", "tests/c/threads.c", "tests/c/memory.c")
    + compilers("examples/cpp/attention.cpp"),
)
def test_hosts_compile_without_a_warning(build: Build, source: str, compiler: str) -> None:
    build(source, compiler=compiler)


def test_the_c_header_compiles_as_cpp(tmp_path: Path) -> None:
    source = tmp_path / "header.cpp"
    source.write_text(
        '#include "vmix.h"\n#include "vmix.h"\nint main() { return VMIX_STATUS_OK; }\n'
    )
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    for compiler in COMPILERS["cpp"]:
        run(tool(compiler), "-std=c++17", *strict, f"-I{ROOT / 'include'}", source)


def test_c_host_prints_the_norms_of_the_papers_values(build: Build) -> None:
    printed = run(build("examples/c/host.c"), ADAPTER)
    norms = dict(re.findall(r"layer (\S+), \d+ wide, \|V_a\| (\S+)", printed))
    expected = paper_values([1, 1, 1, 1])
    assert norms.keys() == expected.keys()
    for layer, norm in norms.items():
        # Four decimals are printed; rows of f32 are off by 2⁻²⁴ of themselves.
        assert float(norm) == pytest.approx(expected[layer].norm().item(), rel=1e-6, abs=5.1e-5)
    labels = ["vibrant color", "natural lighting", "sharp focus", "balanced composition"]
    assert re.findall(r"label (.+) \(", printed) == labels


def test_c_host_opens_a_preset(build: Build, tmp_path: Path) -> None:
    preset = tmp_path / "preset.safetensors"
    vmix.Adapter.open(ADAPTER).values("sharp focus", dtype="bfloat16").save(preset)
    assert "label sharp focus (focus), weight 1\n" in run(build("examples/c/host.c"), preset)


def test_a_host_without_the_library_reads_a_preset(tmp_path: Path) -> None:
    program, preset = tmp_path / "preset", tmp_path / "preset.safetensors"
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    run(tool("gcc"), *strict, ROOT / "examples/c/preset.c", "-lm", "-o", program)
    for dtype in ("float32", "float16", "bfloat16"):
        values = vmix.Adapter.open(ADAPTER).values(dtype=dtype)
        values.save(preset)
        for layer in values:
            v_a = torch.from_dlpack(values[layer])
            tokens, width = v_a.shape
            printed = run(program, preset, layer)
            assert printed.startswith(f"{layer} [{tokens}, {width}] ")
            norm = v_a.double().norm().item()
            assert float(printed.split()[-1]) == pytest.approx(norm, abs=5.1e-5)


def test_cpp_host_equals_the_two_branches(build: Build) -> None:
    run(build("examples/cpp/attention.cpp", compiler="g++"), ADAPTER)


def test_ggml_host_equals_the_two_branches(build: Build) -> None:
    package = importlib.util.find_spec("libggml")
    assert package is not None, "libggml-python is not installed"
    (folder,) = package.submodule_search_locations or []
    (libraries,) = Path(folder).glob("lib*")
    program = build(
        "examples/ggml/host.cpp",
        *("-isystem", f"{folder}/include"),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lggml-cpu", "-lggml-base"),
        compiler="g++",
    )
    layers = list(vmix.Adapter.open(ADAPTER).values())
    for layer in layers[:1] + layers[-1:]:
        assert "ok: tolerance" in run(program, ADAPTER, layer)


def test_rust_host_loads_the_library(library: Path) -> None:
    host = ROOT / "target/debug/examples/host"
    assert "to the last bit" in run(host, library / f"libvmix.{SUFFIX}", ADAPTER)


def test_the_readmes_cpp_mixes_into_the_conditional_half(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    source = tmp_path / "mix.cpp"
    source.write_text(program)
    v_a = paper_values([1.5, 0, 0, 0])["mid_block.attentions.0.transformer_blocks.0.attn2"]
    monkeypatch.chdir(ROOT)
    untouched, mixed = run(build(str(source), compiler="g++")).split(" and ")
    assert untouched == "1"
    # Six digits are printed, of a sum of numbers of about 1 in float32.
    assert float(mixed) == pytest.approx(1 + 0.8 * v_a[0, 0].item(), rel=1e-5, abs=1e-6)
