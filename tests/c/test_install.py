"""The C library as it is installed: files, symbols, pkg-config, CMake and the C++ header."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ADAPTER, ROOT, Files, tool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")

CMAKE = Path(sys.executable).parent / "cmake"
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
TYPES = (ROOT / "include" / "vmix_types.h").read_text("utf-8")
ABI = ".".join(re.findall(r"#define VMIX_ABI_(?:MAJOR|MINOR) (\d+)$", TYPES, re.MULTILINE))
KINDS = {
    "linux": (["libvmix.so", "libvmix.a"], {"libvmix.a", f"libvmix.so.{ABI}"}),
    "macos": (["libvmix.dylib", "libvmix.a"], {"libvmix.a", f"libvmix.{ABI}.dylib"}),
    "windows-msvc": (
        ["vmix.dll", "vmix.dll.lib", "vmix.lib"],
        {"vmix.dll", "vmix.dll.lib", "vmix.lib"},
    ),
    "windows-gnu": (
        ["vmix.dll", "libvmix.dll.a", "libvmix.a"],
        {"vmix.dll", "libvmix.dll.a", "libvmix.a"},
    ),
}

HOST = r"""
#include <stdio.h>
#include "vmix.h"

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, vmix_last_error());
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 2 || !VMIX_ABI_COMPATIBLE(vmix_abi_version())) return 2;
    VmixAdapter *adapter = NULL;
    VmixValues *values = NULL;
    if (vmix_adapter_open(argv[1], &adapter) != VMIX_STATUS_OK) return fail("open");
    if (vmix_adapter_values(adapter, NULL, &values) != VMIX_STATUS_OK) return fail("values");
    vmix_adapter_free(adapter);
    VmixValuesInfo info = {.struct_size = sizeof info};
    VmixView view = {.struct_size = sizeof view};
    if (vmix_values_info(values, &info) != VMIX_STATUS_OK) return fail("info");
    if (vmix_values_get(values, 0, VMIX_PASS_COND, &view) != VMIX_STATUS_OK) return fail("get");
    printf("%s %d %d\n", vmix_version(), (int)info.layer_count, (int)view.shape[3]);
    vmix_values_free(values);
    return 0;
}
"""

# Calls every function of vmix.hpp.
WRAPPER = r"""
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include "vmix.hpp"

#define CHECK(what) \
    if (!(what)) return std::fprintf(stderr, "line %d: %s\n", __LINE__, #what), 1

template <class Body>
int status_of(Body body) {
    try {
        body();
    } catch (const vmix::Error &error) {
        return std::strlen(error.what()) > 10 ? int(error.status()) : -2;
    }
    return -1;
}

static_assert(std::is_nothrow_move_constructible_v<vmix::Adapter>);
static_assert(std::is_nothrow_move_assignable_v<vmix::Values>);
static_assert(!std::is_copy_constructible_v<vmix::Adapter>);
static_assert(!std::is_copy_assignable_v<vmix::Values>);

static std::size_t count(vmix::Span<float> span) { return span.size(); }

int main(int argc, char **argv) {
    CHECK(argc == 5);
    const std::string path = argv[1], preset = argv[2];
    vmix::require_compatible();

    const float numbers[] = {1, 2, 3};
    CHECK(count({}) == 0 && count({1, 2}) == 2 && count(numbers) == 3 && count({numbers, 2}) == 2);
    CHECK(count(std::array<float, 4>{}) == 4 && count(std::vector<float>(5)) == 5);
    const vmix::Span<float> span = numbers;
    CHECK(span.end() - span.begin() == 3 && span[2] == 3 && span.data() == numbers);

    auto opened = vmix::Adapter::open(path);
    auto name = opened.layers().front().name;
    auto adapter = std::move(opened);
    CHECK(adapter.layers().front().name.data() == name.data());
    CHECK(status_of([&] { opened.info(); }) == VMIX_STATUS_NULL_ARGUMENT);
    CHECK(adapter.handle() && !opened.handle());

    const auto info = adapter.info();
    CHECK(info.base == VMIX_BASE_OTHER && info.apply_to == VMIX_APPLY_TO_COND);
    CHECK(adapter.labels().size() == info.label_count);
    CHECK(adapter.layers().size() == info.layer_count && info.context_dim == 96);
    const auto label = adapter.labels().front();
    CHECK(label.name == "vibrant color" && label.dimension == "color" && label.negative == "[V]");
    CHECK(label.positive == label.name && label.weight == 1 && !label.neutral);
    CHECK(label.low == 0 && label.high == 2 && label.step == 0.05f);
    CHECK(adapter.label_index(label.name) == 0 && adapter.label_index("sharp focus") != 0);
    CHECK(adapter.label_display_name(0, "de") == "kräftige Farben");
    CHECK(!adapter.label_display_name(0, "xx"));
    CHECK(adapter.metadata("modelspec.license") == "CC-BY-4.0" && !adapter.metadata("absent"));
    const auto layer = adapter.layers()[2];
    CHECK(adapter.layer_index(layer.name) == 2);
    CHECK(adapter.layer_index(layer.ldm_name.value()) == 2);

    const std::vector<float> off(info.label_count);
    CHECK(adapter.aes_embed().size() == info.label_count * info.context_dim);
    CHECK(adapter.aes_embed(off) != adapter.aes_embed());
    CHECK(adapter.project().size() == info.context_tokens * info.context_dim);
    CHECK(adapter.project({1, 1, 1, 1}) == adapter.project());
    CHECK(status_of([&] { adapter.project({1}); }) == VMIX_STATUS_INVALID_ARGUMENT);

    std::ifstream file(path, std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(file), {});
    CHECK(vmix::Adapter::from_memory(bytes.data(), bytes.size()).project() == adapter.project());

    const auto values = adapter.values();
    CHECK(values.info().dtype == VMIX_DTYPE_F32 && values.labels().size() == info.label_count);
    values.save(preset);
    const auto reopened = vmix::Values::open(preset);
    CHECK(reopened.metadata("vmix.origin")->size() == 64);
    std::ifstream preset_file(preset, std::ios::binary);
    const std::string held(std::istreambuf_iterator<char>(preset_file), {});
    const auto from_memory = vmix::Values::from_memory(held.data(), held.size());
    CHECK(from_memory.layers().size() == info.layer_count);
    CHECK(std::holds_alternative<vmix::Adapter>(vmix::open(path)));
    CHECK(std::holds_alternative<vmix::Values>(vmix::open(preset)));

    const auto view = values.get(2, vmix::Pass::cond).value();
    CHECK(view.data == values.get(*layer.ldm_name, vmix::Pass::cond)->data);
    CHECK(!values.get(2, vmix::Pass::uncond));
    const auto tokens = std::int64_t(info.context_tokens), width = std::int64_t(layer.inner_dim);
    CHECK(view.shape[1] == tokens && view.shape[3] == width);
    std::vector<float> copy(info.context_tokens * layer.inner_dim);
    values.copy(2, vmix::Pass::cond, vmix::view_mut(copy.data(), 1, tokens, 4, width / 4));
    CHECK(std::memcmp(copy.data(), view.data, copy.size() * sizeof(float)) == 0);

    vmix::ValuesOptions options;
    options.weights = off;
    options.apply_to = vmix::ApplyTo::contrast;
    options.dtype = vmix::DType::bf16;
    const auto halves = adapter.values(options);
    CHECK(halves.info().apply_to == VMIX_APPLY_TO_CONTRAST && halves.labels()[1].weight == 0);
    std::vector<std::uint16_t> half(copy.size());
    const auto bf16 = vmix::DType::bf16;
    halves.copy(2, vmix::Pass::uncond, vmix::view_mut(half.data(), bf16, 1, tokens, 1, width));
    const auto from = vmix::view(half.data(), bf16, 1, tokens, 1, width);
    CHECK(std::memcmp(half.data(), halves.get(2, vmix::Pass::uncond)->data, 2 * half.size()) == 0);

    auto sum = copy;
    vmix::mix_values(vmix::view_mut(sum.data(), 1, tokens, 4, width / 4), from, {0});
    CHECK(sum == copy);
    vmix::mix_values(vmix::view_mut(sum.data(), 1, tokens, 1, width), view, {-1.0f});
    CHECK(sum == std::vector<float>(copy.size()));

    vmix::AttentionParams params;
    CHECK(status_of([&] { vmix::attention(params); }) == VMIX_STATUS_INVALID_ARGUMENT);
    std::vector<float> map(info.context_tokens * info.context_tokens), out(copy.size());
    const std::vector<float> zeros(info.context_tokens * info.context_tokens);
    params.query = params.key = params.value = vmix::view(copy.data(), 1, tokens, 1, width);
    params.output = vmix::view_mut(out.data(), 1, tokens, 1, width);
    params.aes_value = from;
    params.strength = {0.5f};
    params.scale = 0.1f;
    params.mask = vmix::view(zeros.data(), 1, tokens, 1, tokens);
    params.query_mask = vmix::view(zeros.data(), 1, tokens, 1, 1);
    params.attention_map = vmix::view_mut(map.data(), 1, tokens, 1, tokens);
    params.attention_map_head = 0;
    vmix::attention(params);
    float total = 0;
    for (float weight : map) total += weight;
    CHECK(std::abs(total - float(tokens)) < 1e-3f);
    params.query_mask.reset();
    const auto masked = out;
    vmix::attention(params);
    CHECK(out != masked);

    const auto chosen = adapter.weights({{"sharp focus", 0.5f}, {"vibrant color", 2.0f}});
    CHECK(chosen == std::vector<float>({2, 0, 0.5f, 0})); // no neutral weight
    CHECK(status_of([&] { adapter.weights({{"absent", 1.0f}}); }) == VMIX_STATUS_NOT_FOUND);

    // The examples of docs/format.md.
    const auto neutral = vmix::Adapter::open(argv[3]), linear = vmix::Adapter::open(argv[4]);
    CHECK(neutral.weights({}) == std::vector<float>{0.5f});
    CHECK(neutral.weights({{"warm", 1.0f}}) == std::vector<float>{1});
    CHECK(neutral.project({1.0f}) == std::vector<float>({5, 1, -3, 1}));
    vmix::ValuesOptions left_out;
    left_out.weights = neutral.weights({});
    const auto middle = neutral.values(left_out);
    const float expected[] = {13 / 3.0f, 3, -7 / 3.0f, -1};
    const auto *found = static_cast<const float *>(middle.get("layer", vmix::Pass::cond)->data);
    for (int i = 0; i < 4; ++i) CHECK(std::abs(found[i] - expected[i]) < 1e-6f);
    const auto warm = linear.labels().front();
    CHECK(warm.positive == "warm light\nwarm colors" && warm.negative == "cold light\n");
    CHECK(warm.low == -1 && warm.high == 1.5f && warm.step == 0.125f && warm.neutral == 0.0f);
    CHECK(linear.info().context_dim == 0);
    CHECK(status_of([&] { linear.aes_embed(); }) == VMIX_STATUS_NOT_FOUND);
    CHECK(status_of([&] { linear.project(); }) == VMIX_STATUS_NOT_FOUND);

    CHECK(status_of([] { vmix::open("absent.safetensors"); }) == VMIX_STATUS_IO);
    CHECK(status_of([&] { vmix::Values::open(path); }) == VMIX_STATUS_INVALID_FILE);
    CHECK(status_of([&] { adapter.label_index("absent"); }) == VMIX_STATUS_NOT_FOUND);
    CHECK(status_of([&] { adapter.layer_index("absent"); }) == VMIX_STATUS_NOT_FOUND);
    CHECK(status_of([&] { values.get(99, vmix::Pass::cond); }) == VMIX_STATUS_OUT_OF_RANGE);
    const std::string cut("sharp focus\0!", 13);
    CHECK(status_of([&] { adapter.label_index(cut); }) == VMIX_STATUS_INVALID_ARGUMENT);
    return 0;
}
"""


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; with all that it said where it fails."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # pkg-config puts a backslash before each byte of an umlaut
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(**variables: str | Path) -> None:
    run(ROOT / "packaging" / "install.sh", **{key: str(v) for key, v in variables.items()})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A prefix with a space, as some have."""
    prefix = tmp_path_factory.mktemp("installed") / "a prefix"
    install(PREFIX=prefix, PROFILE=ROOT / "target" / "debug")
    yield prefix
    shutil.rmtree(prefix)  # hundreds of megabytes, which pytest would keep


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made for a place where it never was, with libraries one folder deeper, and moved twice."""
    folder = tmp_path_factory.mktemp("moved")
    prefix = Path("/opt/vmix of nobody")
    install(
        DESTDIR=folder,
        PREFIX=prefix,
        LIBDIR=prefix / "lib" / "some-arch",
        PROFILE=ROOT / "target" / "debug",
    )
    yield (folder / prefix.relative_to("/")).rename(folder / "another place")
    shutil.rmtree(folder)


def version() -> str:
    found = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def abi(part: str) -> str:
    types = (ROOT / "include" / "vmix_types.h").read_text("utf-8")
    found = re.search(rf"^#define VMIX_ABI_{part} (\d+)", types, re.MULTILINE)
    assert found is not None
    return found[1]


def declared() -> set[str]:
    """The functions of vmix.h."""
    text = (ROOT / "include" / "vmix.h").read_text("utf-8")
    return set(re.findall(r"\b(vmix_\w+)\s*\(", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))


def pkg_config(prefix: Path, *arguments: str) -> list[str]:
    folder = str(prefix / "lib" / "pkgconfig")
    return shlex.split(run(tool("pkg-config"), *arguments, "vmix", PKG_CONFIG_PATH=folder))


def cmake(source: Path, build: Path, *arguments: str) -> str:
    return run(CMAKE, "-S", source, "-B", build, *arguments)


def test_files_are_in_place(installed: Path) -> None:
    major, minor = abi("MAJOR"), abi("MINOR")
    files = {str(p.relative_to(installed)) for p in installed.rglob("*") if not p.is_dir()}
    assert files == {
        "include/vmix.h",
        "include/vmix.hpp",
        "include/vmix_types.h",
        "lib/cmake/vmix/vmixConfig.cmake",
        "lib/cmake/vmix/vmixConfigVersion.cmake",
        "lib/libvmix.a",
        "lib/libvmix.so",
        f"lib/libvmix.so.{major}",
        f"lib/libvmix.so.{major}.{minor}",
        "lib/pkgconfig/vmix.pc",
    }
    library = installed / "lib" / f"libvmix.so.{major}.{minor}"
    for link in (installed / "lib" / "libvmix.so", installed / "lib" / f"libvmix.so.{major}"):
        assert link.is_symlink()
        assert link.resolve() == library
        assert not link.readlink().is_absolute()
    for text in (*installed.rglob("*.cmake"), *installed.rglob("*.pc")):
        assert not re.search(r"@[A-Z_]+@", text.read_text("utf-8")), text


def test_library_exports_the_header_and_nothing_else(installed: Path) -> None:
    lines = run("nm", "-D", "--defined-only", installed / "lib" / "libvmix.so").splitlines()
    exported = {line.split()[-1].split("@")[0] for line in lines}
    assert {name for name in exported if not name.startswith("vmix_")} == set()
    assert exported == declared()


def test_soname_has_the_major_version_of_the_abi(installed: Path) -> None:
    dynamic = run("readelf", "-d", installed / "lib" / "libvmix.so")
    assert re.findall(r"soname: \[(.*)\]", dynamic) == [f"libvmix.so.{abi('MAJOR')}"]


@pytest.mark.parametrize("linking", ["shared", "static", "all static"])
def test_pkg_config(installed: Path, tmp_path: Path, linking: str) -> None:
    (tmp_path / "host.c").write_text(HOST, "utf-8")
    host = tmp_path / "host"
    libraries = {
        "shared": pkg_config(installed, "--libs"),
        "static": shlex.split(
            # A variable is plain text, in which spaces are not quoted.
            run(
                tool("pkg-config"),
                "--variable=static_libs",
                "vmix",
                PKG_CONFIG_PATH=str(installed / "lib" / "pkgconfig"),
            ).replace(str(installed), shlex.quote(str(installed)))
        ),
        "all static": ["-static", *pkg_config(installed, "--static", "--libs")],
    }[linking]
    cflags = pkg_config(installed, "--cflags")
    run("cc", "-std=c11", *STRICT, tmp_path / "host.c", *cflags, *libraries, "-o", host)
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", host))
    assert (f"libvmix.so.{abi('MAJOR')}" in needed) == (linking == "shared")
    assert bool(needed) == (linking != "all static")
    environment = {"LD_LIBRARY_PATH": str(installed / "lib")} if linking == "shared" else {}
    assert run(host, ADAPTER, **environment) == f"{version()} 7 64\n"


def test_pkg_config_names_what_rust_needs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.rs").touch()
    asked = ["--print", "native-static-libs", "--crate-type", "staticlib"]
    out = tmp_path / "empty.a"
    done = subprocess.run(
        [tool("rustc"), *asked, "-o", out, tmp_path / "empty.rs"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"native-static-libs: (.*)", done.stderr)
    assert found is not None
    # Compilers add these two, and there is no static libgcc_s.
    needed = set(found[1].split()) - {"-lgcc_s", "-lc"}
    assert needed <= set(pkg_config(installed, "--static", "--libs"))
    assert not needed & set(pkg_config(installed, "--libs"))
    assert pkg_config(installed, "--modversion") == [version()]


def test_cmake_builds_the_examples_with_what_was_moved(moved: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    cmake(ROOT / "examples" / "cpp", build, f"-Dvmix_DIR={moved}/lib/some-arch/cmake/vmix")
    run(CMAKE, "--build", build)
    for target in ("attention", "attention-static"):
        printed = run(build / target, ADAPTER)
        assert "lambda = 0 is attention without V_a" in printed
        (build / target).unlink()  # tens of megabytes
    for text in moved.rglob("*.cmake"):
        assert "/opt/vmix" not in text.read_text("utf-8"), text


def test_cmake_takes_compatible_versions_only(installed: Path, tmp_path: Path) -> None:
    major, minor, patch = map(int, version().split("."))
    wanted = {
        "": True,
        f"{major}.{minor}": True,
        f"{major}.{minor}.{patch}": True,
        f"{major}.{minor}.{patch} EXACT": True,
        f"{major}.{minor}.{patch + 1}": False,
        f"{major}.{minor}.{patch + 1} EXACT": False,
        f"{major}.{minor + 1}": False,
        f"{major + 1}.0": False,
        f"{major}.{minor}...{major + 1}": True,
        f"{major}.{minor}...<{major}.{minor}.{patch + 1}": True,
        f"{major + 1}...{major + 2}": False,
    }
    lines = ["cmake_minimum_required(VERSION 3.19)", "project(wanted LANGUAGES C)"]
    for asked in wanted:
        # Twice in one project must do no harm.
        lines.append(f"find_package(vmix {asked} CONFIG QUIET)")
        lines.append(f'message(STATUS "found: {asked}=${{vmix_FOUND}}")')
        lines.append("unset(vmix_DIR CACHE)")
    source = tmp_path / "source"
    source.mkdir()
    (source / "CMakeLists.txt").write_text("\n".join(lines), "utf-8")
    printed = cmake(source, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    found = re.findall(r"found: (.*)=(\w+)", printed)
    assert {asked: answer in ("1", "TRUE") for asked, answer in found} == wanted

    lines[2:] = [f"find_package(vmix {major + 1}.0 CONFIG REQUIRED)"]
    (source / "CMakeLists.txt").write_text("\n".join(lines), "utf-8")
    with pytest.raises(AssertionError, match=rf"vmixConfig.cmake, version: {version()}"):
        cmake(source, tmp_path / "again", f"-DCMAKE_PREFIX_PATH={installed}")


@pytest.mark.parametrize(
    ("installed_version", "wanted", "compatible"),
    [
        ("0.3.2", "0.3", True),
        ("0.3.2", "0.2", False),
        ("0.30.2", "0.3", False),
        ("1.3.2", "1.0", True),
        ("1.3.2", "1.4", False),
        ("1.3.2", "0.3", False),
        ("2.0.0", "1.9", False),
        ("10.0.0", "1.0", False),
    ],
)
def test_versions_to_come(
    tmp_path: Path, installed_version: str, wanted: str, compatible: bool
) -> None:
    template = (ROOT / "packaging" / "vmixConfigVersion.cmake.in").read_text("utf-8")
    major, minor = wanted.split(".")
    script = tmp_path / "script.cmake"
    script.write_text(
        f"""cmake_minimum_required(VERSION 3.15)
        set(PACKAGE_FIND_VERSION {wanted})
        set(PACKAGE_FIND_VERSION_MAJOR {major})
        set(PACKAGE_FIND_VERSION_MINOR {minor})
        {template.replace("@VERSION@", installed_version)}
        file(WRITE "{tmp_path}/answer" "${{PACKAGE_VERSION_COMPATIBLE}}")""",
        "utf-8",
    )
    run(CMAKE, "-P", script)
    assert (tmp_path / "answer").read_text("utf-8") == str(compatible).upper()


@pytest.mark.parametrize("kind", KINDS)
def test_names_on_other_systems(tmp_path: Path, kind: str) -> None:
    built, libraries = KINDS[kind]
    profile, prefix = tmp_path / "built", tmp_path / "prefix"
    profile.mkdir()
    for name in built:
        (profile / name).touch()
    install(PREFIX=prefix, PROFILE=profile)
    assert libraries <= {p.name for p in prefix.rglob("*") if not p.is_symlink()}
    (tmp_path / "CMakeLists.txt").write_text(
        """cmake_minimum_required(VERSION 3.15)
        project(places LANGUAGES C)
        find_package(vmix CONFIG REQUIRED)
        foreach(target vmix::vmix vmix::static)
          foreach(property IMPORTED_LOCATION IMPORTED_IMPLIB)
            get_target_property(place ${target} ${property})
            message(STATUS "place: ${place}")
          endforeach()
        endforeach()""",
        "utf-8",
    )
    printed = cmake(tmp_path, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    places = [Path(p) for p in re.findall(r"place: (.*)", printed) if p != "place-NOTFOUND"]
    assert {place.name for place in places} == libraries
    assert all(place.is_file() for place in places)


def test_installing_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"no library in .*make install"):
        install(PREFIX=tmp_path / "prefix", PROFILE=tmp_path)
    (tmp_path / "libvmix.so").touch()
    with pytest.raises(AssertionError, match=r"no libvmix\.a in .*make install"):
        install(PREFIX=tmp_path / "prefix", PROFILE=tmp_path)
    with pytest.raises(AssertionError, match="absolute"):
        install(PREFIX="prefix", PROFILE=tmp_path)
    with pytest.raises(AssertionError, match="found --help"):
        run(ROOT / "packaging" / "install.sh", "--help")
    assert [p.name for p in tmp_path.iterdir()] == ["libvmix.so"]


@pytest.mark.parametrize("standard", ["c99", "c11", "c17", "c2x", "c++17", "c++20"])
def test_headers_compile_without_a_warning(installed: Path, tmp_path: Path, standard: str) -> None:
    suffix, compiler = ("cpp", "c++") if "+" in standard else ("c", "cc")
    source = tmp_path / f"header.{suffix}"
    headers = ["vmix_types.h", "vmix.h", "vmix.h", *(["vmix.hpp"] if suffix == "cpp" else [])]
    source.write_text("".join(f'#include "{header}"\n' for header in headers), "utf-8")
    flags = [f"-std={standard}", *STRICT, f"-I{installed / 'include'}", "-fsyntax-only"]
    run(compiler, *flags, source)


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_wrapper(installed: Path, files: Files, tmp_path: Path, standard: str) -> None:
    source, program = tmp_path / "wrapper.cpp", tmp_path / "wrapper"
    source.write_text(WRAPPER, "utf-8")
    flags = pkg_config(installed, "--cflags", "--libs")
    run("c++", f"-std={standard}", *STRICT, source, *flags, "-o", program)
    arguments = [ADAPTER, tmp_path / "preset", files.layernorm, files.linear]
    run(program, *arguments, LD_LIBRARY_PATH=str(installed / "lib"))


def test_wrapper_has_every_function() -> None:
    wrapper = (ROOT / "include" / "vmix.hpp").read_text("utf-8")
    missing = {name for name in declared() if not re.search(rf"\b{name}\b", wrapper)}
    # Of use as they are.
    assert missing == {"vmix_build_info", "vmix_status_name", "vmix_version"}


@pytest.mark.full
def test_the_release_library_is_small() -> None:
    subprocess.run(["make", "target/capi/release/libvmix.a"], cwd=ROOT, check=True)
    # What hosts are promised. The profile strips it, and leaves out what nothing uses.
    assert (ROOT / "target/capi/release/libvmix.so").stat().st_size < 2_500_000
