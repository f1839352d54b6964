"""Adapters and presets in the pack, with the native module and without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vmix
from safetensors.torch import load_file, save_file

from comfy_nodes import files

ADAPTER = Path(files.__file__).parent / "demo" / "adapter.safetensors"
HOSTILE = Path(__file__).resolve().parents[1] / "hostile"
CHOSEN = {"vibrant color": 0.35, "sharp focus": 0.0}  # 0.35 is another number in 32 bits


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(files, "native", None)
    return


def preset(folder: Path, apply_to: str = "cond", dtype: str = "float32") -> Path:
    path = folder / "preset.safetensors"
    files.open_file(ADAPTER).save_preset(path, CHOSEN, apply_to, dtype)
    return path


def test_adapter() -> None:
    opened = files.open_file(ADAPTER, "demo")
    assert (opened.name, opened.kind, opened.base) == ("demo", "adapter", "other")
    assert opened.weights(None) == opened.weights({}) == dict.fromkeys(opened.selection, 1.0)
    assert opened.weights(CHOSEN) == {**opened.selection, **CHOSEN}
    with pytest.raises(ValueError, match="unknown label 'vibrant'; the file's labels are: 'vib"):
        opened.weights({"vibrant": 1.0})
    values = opened.values(CHOSEN, "contrast", torch.float32)
    expected = vmix.open(ADAPTER).values(opened.weights(CHOSEN), apply_to="contrast")
    for layer, width in opened.layers.items():
        pair = values[layer]
        assert pair.cond.shape == (opened.context_tokens, width)
        assert torch.equal(pair.cond, torch.from_dlpack(expected[layer]))
        assert pair.uncond is not None
        assert torch.equal(pair.uncond, torch.from_dlpack(expected.uncond(layer)))
    assert opened.values(CHOSEN, "file", torch.float16)[layer].cond.dtype == torch.float16
    assert opened.values(CHOSEN, "cond", torch.float32)[layer].uncond is None


@pytest.mark.parametrize("apply_to", ["cond", "contrast"])
@pytest.mark.parametrize("dtype", files.DTYPES)
def test_presets_are_the_same_without_the_native_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply_to: str, dtype: str
) -> None:
    path = preset(tmp_path, apply_to, dtype)
    ours = files.open_file(path)
    monkeypatch.setattr(files, "native", None)
    found = files.open_file(path)
    for name in ("name", "kind", "base", "labels", "context_tokens", "context_dim", "apply_to",
                 "layers", "selection", "value_weights"):  # fmt: skip
        assert getattr(found, name) == getattr(ours, name), name
    assert ours.selection == {**files.open_file(ADAPTER).selection, **CHOSEN}
    a = ours.values(None, "file", torch.float32)
    b = found.values(None, "file", torch.float32)
    assert list(a) == list(b)
    for layer in a:
        assert torch.equal(a[layer].cond, b[layer].cond)
        assert (a[layer].uncond is None) == (b[layer].uncond is None) == (apply_to == "cond")
        if a[layer].uncond is not None:
            assert torch.equal(a[layer].uncond, b[layer].uncond)


def test_a_preset_takes_no_other_selection(tmp_path: Path) -> None:
    opened = files.open_file(preset(tmp_path))
    assert opened.weights({"vibrant color": 0.35}) == opened.selection
    with pytest.raises(ValueError, match="is a preset: it holds the values of one selection"):
        opened.weights({"vibrant color": 1.0})
    with pytest.raises(ValueError, match="contrast needs values for the unconditional pass"):
        opened.values(None, "contrast", torch.float32)
    with pytest.raises(ValueError, match="is a preset already"):
        opened.save_preset(tmp_path / "again.safetensors", None, "file", "float16")
    with pytest.raises(ValueError, match="expected file, cond, both, contrast, found 'all'"):
        opened.policy("all")


def test_an_adapter_without_the_native_module(tmp_path: Path, without_native: None) -> None:
    opened = files.open_file(ADAPTER)
    # The labels are there, for the sliders ...
    assert [label.name for label in opened.labels] == list(opened.selection)
    assert opened.weights(CHOSEN)["vibrant color"] == 0.35
    # ... and what has to be computed says what to install.
    for attempt in (
        lambda: opened.values(None, "file", torch.float32),
        lambda: opened.features(None, "file"),
        lambda: opened.save_preset(tmp_path / "x.safetensors", None, "file", "float16"),
    ):
        with pytest.raises(RuntimeError, match="install the vmix-adapter wheel"):
            attempt()


def test_open_is_the_same_without_the_native_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = files.open_file(ADAPTER)
    monkeypatch.setattr(files, "native", None)
    found = files.open_file(ADAPTER)
    for name in ("kind", "base", "labels", "context_tokens", "context_dim", "apply_to", "layers",
                 "selection", "value_weights"):  # fmt: skip
        assert getattr(found, name) == getattr(ours, name), name


def break_preset(path: Path, change: Any) -> Path:
    with files.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    broken = path.with_name("broken.safetensors")
    save_file(tensors, broken, metadata)
    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("vmix.format"), "no VMix file"),
        (lambda t, m: m.update({"vmix.format": "2"}), "vmix.format: expected 1, found '2'"),
        (lambda t, m: m.update({"vmix.kind": "lora"}), "expected adapter or preset, found 'lora'"),
        (lambda t, m: m.update({"vmix.selection": "x"}), "broken metadata"),
        (lambda t, m: m.update({"vmix.labels": '{"a": 1}'}), "broken metadata"),
        (lambda t, m: m.update({"vmix.context_tokens": "77"}), r"expected shape \(77, "),
        (lambda t, m: t.update({"x": torch.zeros(1)}), "x: expected shape no such tensor"),
        (lambda t, m: m.update({"vmix.apply_to": "contrast"}), "v_aes_uncond: expected shape"),
    ],
)
def test_broken_presets_without_the_native_module(
    tmp_path: Path, without_native: None, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    with monkeypatch.context() as context:
        context.setattr(files, "native", vmix)
        path = preset(tmp_path)
    with pytest.raises(ValueError, match=message):
        files.open_file(break_preset(path, change))


@pytest.mark.parametrize("native", [True, False], ids=["native", "without"])
def test_hostile_files_are_errors(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that the library refuses for its structure gives a sentence here too."""
    if not native:
        monkeypatch.setattr(files, "native", None)
    refused = {}
    for path in sorted(HOSTILE.glob("*.safetensors")):
        try:
            files.open_file(path)
        except ValueError as error:  # anything else is a failure
            refused[path.name] = str(error)
    assert len(refused) > (10 if native else 5)
    assert all(refused.values())


def test_selection_metadata_is_json(tmp_path: Path) -> None:
    with files.safe_open(preset(tmp_path), "pt") as file:
        assert json.loads(file.metadata()["vmix.selection"])["vibrant color"] == 0.35
