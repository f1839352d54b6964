"""Proof that the C library cannot be crashed: every function called rightly and wrongly, as it is,
under valgrind, with AddressSanitizer and, by eight threads, with ThreadSanitizer; and what it costs
in memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vmix
from conftest import ADAPTER, FITTED, ROOT, Files, run, tool
from safetensors import safe_open
from safetensors.torch import save_file

Build = Callable[..., Path]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="measures through /proc")


def test_every_function_rightly_and_wrongly(build: Build, files: Files, tmp_path: Path) -> None:
    run(build("tests/c/calls.c"), ADAPTER, files.linear, files.init, tmp_path, FITTED)


@pytest.mark.parametrize("source", ["tests/c/calls.c", "examples/c/host.c"])
def test_valgrind_finds_nothing(build: Build, files: Files, tmp_path: Path, source: str) -> None:
    # What is only "possibly lost" are the threads of rayon's pool, which live to the end.
    leaks = ["--leak-check=full", "--errors-for-leak-kinds=definite,indirect"]
    leaks += ["--show-leak-kinds=definite,indirect"]
    more = [files.linear, files.init, tmp_path, FITTED] if source.startswith("tests") else []
    run(tool("valgrind"), "-q", "--error-exitcode=9", *leaks, build(source), ADAPTER, *more)


def host() -> str:
    """The triple that libraries with a sanitizer are built for."""
    return re.findall(r"host: (\S+)", run(tool("rustc"), "-vV"))[0]


def instrumented(path: str) -> Path:
    library = ROOT / path.format(host())
    assert library.exists(), (
        f"{library.relative_to(ROOT)} is not built; `make test-asan` and `make test-tsan` do it"
    )
    return library


def build_with_asan(folder: Path, source: str) -> Path:
    """A program that is linked to the library with AddressSanitizer."""
    library = instrumented("fuzz/target/{}/release/deps/libvmix.so")
    (folder / "libvmix.so.1").symlink_to(library)
    program = folder / "program"
    command = [tool("gcc"), "-std=c11", "-D_GNU_SOURCE", "-g", "-fsanitize=address,undefined"]
    command += [f"-I{ROOT / 'include'}", ROOT / source, library, f"-Wl,-rpath,{folder}"]
    run(*command, "-lpthread", "-lm", "-o", program)
    return program


def build_with_tsan(folder: Path, source: str) -> Path:
    """A program that is linked to the library with ThreadSanitizer, and to the runtime that the
    Rust compiler brings: gcc's is too old for what the library calls."""
    library = instrumented("target/tsan/{}/debug/libvmix.so")
    (folder / "libvmix.so.1").symlink_to(library)
    own = Path(run("rustc", "--print", "sysroot").strip()) / "lib" / "rustlib" / host() / "lib"
    (runtime,) = own.glob("librustc*_rt.tsan.a")
    objects, program = folder / "program.o", folder / "program"
    command = [tool("gcc"), "-std=c11", "-D_GNU_SOURCE", "-g", "-fsanitize=thread"]
    run(*command, f"-I{ROOT / 'include'}", "-c", ROOT / source, "-o", objects)
    whole = ["-Wl,--whole-archive", runtime, "-Wl,--no-whole-archive", "-rdynamic"]
    libraries = [library, f"-Wl,-rpath,{folder}", "-lpthread", "-ldl", "-lm", "-lrt"]
    run(tool("g++"), objects, *whole, *libraries, "-o", program)
    return program


@pytest.mark.full
@pytest.mark.parametrize("source", ["tests/c/calls.c", "tests/c/threads.c", "examples/c/host.c"])
def test_address_sanitizer_finds_nothing(files: Files, tmp_path: Path, source: str) -> None:
    program = build_with_asan(tmp_path, source)
    of_calls = [files.linear, files.init, tmp_path, FITTED]
    arguments = {"calls": of_calls, "threads": ["200"], "host": []}[Path(source).stem]
    # An allocation that is refused is one of the calls.
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=1"}
    run(program, ADAPTER, *arguments, env=environment)


@pytest.mark.full
def test_address_sanitizer_sees_into_the_library(tmp_path: Path) -> None:
    """The test above could not fail if the library were not instrumented."""
    source = tmp_path / "overrun.c"
    source.write_text("""
        #include "vmix.h"
        int main(void) {
            float v[3], a[4] = {0}, strength = 1;
            VmixViewMut value = vmix_view_mut(v, VMIX_DTYPE_F32, 1, 1, 1, 4);
            VmixView aes = vmix_view(a, VMIX_DTYPE_F32, 1, 1, 1, 4);
            VmixMixParams mix = {sizeof mix, &value, &aes, &strength, 1};
            return (int)vmix_mix_values(&mix);
        }""")
    program = build_with_asan(tmp_path, str(source))
    done = subprocess.run([program], capture_output=True, text=True)
    assert "stack-buffer-overflow" in done.stderr
    assert "vmix" in done.stderr.split("stack-buffer-overflow")[1]


def test_eight_threads_share_handles(build: Build) -> None:
    run(build("tests/c/threads.c"), ADAPTER, "2000")


@pytest.mark.full
def test_thread_sanitizer_finds_nothing(tmp_path: Path) -> None:
    program = build_with_tsan(tmp_path, "tests/c/threads.c")
    suppressions = ROOT / "tests/c/tsan.supp"
    environment = {**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 suppressions={suppressions}"}
    run(program, ADAPTER, "1000", env=environment)


@pytest.mark.full
def test_thread_sanitizer_sees_into_the_library(tmp_path: Path) -> None:
    """Two threads mix into one buffer, which the header forbids."""
    source = tmp_path / "race.c"
    source.write_text("""
        #include <pthread.h>
        #include "vmix.h"
        static float v[1 << 16], a[1 << 16];
        static void *mix(void *unused) {
            float strength = 1;
            VmixViewMut value = vmix_view_mut(v, VMIX_DTYPE_F32, 1, 1, 1, 1 << 16);
            VmixView aes = vmix_view(a, VMIX_DTYPE_F32, 1, 1, 1, 1 << 16);
            VmixMixParams params = {sizeof params, &value, &aes, &strength, 1};
            for (int i = 0; i < 100; ++i)
                vmix_mix_values(&params);
            return unused;
        }
        int main(void) {
            pthread_t threads[2];
            for (int i = 0; i < 2; ++i)
                pthread_create(&threads[i], 0, mix, 0);
            for (int i = 0; i < 2; ++i)
                pthread_join(threads[i], 0);
            return 0;
        }""")
    program = build_with_tsan(tmp_path, str(source))
    done = subprocess.run([program], capture_output=True, text=True)
    assert "data race" in done.stderr, done.stderr


@linux_only
def test_opening_and_closing_ten_thousand_times_leaks_nothing(build: Build, tmp_path: Path) -> None:
    preset = tmp_path / "preset.safetensors"
    vmix.Adapter.open(ADAPTER).values().save(preset)
    print(run(build("tests/c/memory.c"), "leaks", ADAPTER, preset))


@linux_only
def test_files_of_sdxls_size_take_little_memory(build: Build, tmp_path: Path) -> None:
    adapter = tmp_path / "sdxl.safetensors"
    write_sdxl_adapter(adapter)
    print(run(build("tests/c/memory.c"), "sdxl", adapter))


def write_sdxl_adapter(path: Path) -> None:
    """An adapter of SDXL's shapes with four labels, in f32: as large as one that is trained."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with safe_open(ADAPTER, "pt") as demo:
        metadata = demo.metadata()
    del metadata["vmix.ldm_names"]
    metadata |= {"vmix.base": "sdxl", "vmix.context_tokens": "77"}
    rows = len(json.loads(metadata["vmix.rows"]))
    tensors = {
        "aes_emb": randn(4, 2, 2048),
        "profile": randn(77, rows),
        "gram_factor": torch.eye(rows - 1),
        "context.rows": randn(rows, 2048),
    }
    for layer in vmix.unet_layers("sdxl"):
        tensors[f"{layer.name}.rows"] = randn(rows, layer.inner_dim)
    save_file(tensors, path, metadata)
