"""Adapters and presets in the pack, with the native module and without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
    values = opened.values(CHOSEN, "contrast")
    expected = vmix.open(ADAPTER).values(opened.weights(CHOSEN), apply_to="contrast")
    for layer, width in opened.layers.items():
        pair = values[layer]
        assert pair.cond.shape == (opened.context_tokens, width)
        assert torch.equal(pair.cond, torch.from_dlpack(expected[layer]))
        assert pair.uncond is not None
        assert torch.equal(pair.uncond, torch.from_dlpack(expected.uncond(layer)))
    assert opened.values(CHOSEN, "cond")[layer].uncond is None


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
                 "layers", "selection"):  # fmt: skip
        assert getattr(found, name) == getattr(ours, name), name
    assert ours.selection == {**files.open_file(ADAPTER).selection, **CHOSEN}
    a = ours.values(None, "file")
    b = found.values(None, "file")
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
        opened.values(None, "contrast")
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
        lambda: opened.values(None, "file"),
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
                 "selection"):  # fmt: skip
        assert getattr(found, name) == getattr(ours, name), name


def changed(path: Path, folder: Path, change: Callable[..., Any]) -> Path:
    """A copy of a file with other tensors and metadata."""
    with files.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    copy = folder / "changed.safetensors"
    save_file(tensors, copy, metadata)
    return copy


@pytest.fixture(params=[True, False], ids=["native", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(files, "native", None)


def test_labels_of_a_file(tmp_path: Path, either: None) -> None:
    """Sliders, and what stands in for a label that is left out, are the file's."""

    def change(tensors: Any, metadata: dict[str, str]) -> None:
        labels = json.loads(metadata["vmix.labels"])
        labels[0] |= {"range": [-2, 1.1], "step": 0.1, "default": 0.35, "neutral": -0.25}
        for key in ("range", "step", "default", "neutral"):
            labels[1].pop(key, None)
        metadata["vmix.labels"] = json.dumps(labels)

    opened = files.open_file(changed(ADAPTER, tmp_path, change))
    first, second, *others = opened.labels
    found = (first.low, first.high, first.step, first.default, first.neutral)
    assert found == (-2.0, 1.1, 0.1, 0.35, -0.25)
    # docs/format.md: what is not said.
    found = (second.low, second.high, second.step, second.default, second.neutral)
    assert found == (0.0, 1.0, 0.05, 1.0, None)
    zeros = dict.fromkeys((label.name for label in others), 0.0)
    assert opened.weights({})[first.name] == 0.35
    assert opened.alone() == {first.name: -0.25, second.name: 0.0, **zeros}
    assert opened.alone(second.name) == {first.name: -0.25, second.name: 1.0, **zeros}
    weights = {**zeros, first.name: 9.0, second.name: -9.1}
    assert opened.furthest(weights) == f"label {first.name!r} at weight 9"


def test_a_linear_adapter(tmp_path: Path, either: None) -> None:
    """Without constant row, Gram matrix or AesEmb; the example of docs/format.md."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    label = {"name": "light", "positive": ["bright"], "negative": [""], "neutral": 0, "default": 0,
             "range": [-1, 1]}  # fmt: skip
    rows = [{"label": "light", "side": side} for side in ("positive", "negative")]
    metadata = {
        "vmix.format": "2",
        "vmix.kind": "adapter",
        "vmix.base": "other",
        "vmix.labels": json.dumps([label]),
        "vmix.context_tokens": "2",
        "vmix.ldm_names": json.dumps({layer: "middle_block.1.transformer_blocks.0.attn2"}),
        "vmix.apply_to": "cond",
        "vmix.coefficients": "linear",
        "vmix.rows": json.dumps(rows),
        "vmix.made": '{"method": "fitted"}',
    }
    tensors = {
        "profile": torch.tensor([[1, 0.5], [2, 1]]),
        f"{layer}.rows": torch.tensor([[4.0, 0], [0, 8]]),
    }
    save_file(tensors, tmp_path / "linear.safetensors", metadata)
    opened = files.open_file(tmp_path / "linear.safetensors")
    assert opened.context_dim is None
    assert opened.layers == {layer: 2}
    assert opened.alone() == opened.selection == {"light": 0.0}
    if files.native:
        pair = opened.values({"light": 0.5}, "contrast")[layer]
        assert pair.cond.tolist() == [[2, 0], [4, 0]]
        assert pair.uncond is not None
        assert pair.uncond.tolist() == [[0, 2], [0, 4]]


def test_an_init_file_has_no_values(tmp_path: Path, either: None) -> None:
    def change(tensors: Any, metadata: dict[str, str]) -> None:
        metadata["vmix.kind"] = "init"
        for key in ("apply_to", "coefficients", "norm_eps", "rows", "made"):
            del metadata[f"vmix.{key}"]
        for key in set(tensors) - {"aes_emb"}:
            del tensors[key]

    with pytest.raises(
        ValueError, match="expected adapter or preset, found 'init'; it is the start"
    ):
        files.open_file(changed(ADAPTER, tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("vmix.format"), "no VMix file"),
        (lambda t, m: m.update({"vmix.format": "1"}), "vmix.format: expected 2, found '1'"),
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
        files.open_file(changed(path, tmp_path, change))


def test_hostile_files_are_errors(either: None) -> None:
    """Every file that the library refuses for its structure gives a sentence here too."""
    refused = {}
    for path in sorted(HOSTILE.glob("*.safetensors")):
        try:
            files.open_file(path)
        except ValueError as error:  # anything else is a failure
            refused[path.name] = str(error)
    assert len(refused) > (10 if files.native else 5)
    assert all(refused.values())


def test_selection_metadata_is_json(tmp_path: Path) -> None:
    with files.safe_open(preset(tmp_path), "pt") as file:
        assert json.loads(file.metadata()["vmix.selection"])["vibrant color"] == 0.35
