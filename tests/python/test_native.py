"""The native module as Python sees it: tensors in and out, selections, errors, threads."""

from __future__ import annotations

import gc
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
import vmix
from safetensors import safe_open
from safetensors.torch import load_file, save_file

LABELS = ["vibrant color", "sharp focus"]
DOWN, UP = oracle.layers("other")


@pytest.fixture
def adapter() -> vmix.Adapter:
    labels = [oracle.label(name) for name in LABELS]
    said = oracle.metadata("other", labels, norm_eps="1e-5", apply_to="both")
    return vmix.Adapter.from_matrices(oracle.matrices("other", 2), said)


def test_files(adapter: vmix.Adapter, tmp_path: pathlib.Path) -> None:
    adapter.save(tmp_path / "adapter.safetensors")
    opened = vmix.open(tmp_path / "adapter.safetensors")
    assert isinstance(opened, vmix.Adapter)
    values = opened.values("sharp focus", apply_to="contrast", dtype="float16")
    values.save(str(tmp_path / "preset.safetensors"))
    for preset in (
        vmix.open(tmp_path / "preset.safetensors"),
        vmix.Values.from_bytes((tmp_path / "preset.safetensors").read_bytes()),
    ):
        assert isinstance(preset, vmix.Values)
        assert (preset.dtype, preset.apply_to, preset.origin) == (
            "float16",
            "contrast",
            values.origin,
        )
        assert preset.selection == {"vibrant color": 0.0, "sharp focus": 1.0}
        for layer in preset:
            for pair in (
                (preset[layer], values[layer]),
                (preset.uncond(layer), values.uncond(layer)),
            ):
                found, expected = map(torch.from_dlpack, pair)
                assert torch.equal(found, expected)
    assert adapter.values().uncond(DOWN) is None


def test_values_are_a_mapping(adapter: vmix.Adapter) -> None:
    values = adapter.values()
    assert list(values) == [DOWN, UP]
    assert len(values) == 2
    assert DOWN in values
    assert "ldm.0" in values
    assert "elsewhere" not in values
    assert 7 not in values
    with pytest.raises(KeyError, match="there are 2 layers"):
        values["elsewhere"]
    with pytest.raises(KeyError, match="did you mean `down_blocks"):
        values[DOWN.replace("0.attn2", "1.attn2")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("of", ["values", "rows"])
def test_tensors_leave_without_a_copy(of: str, dtype: Any) -> None:
    said = oracle.metadata("other", [oracle.label("a")], norm_eps="1e-5")
    adapter = vmix.Adapter.from_matrices(oracle.matrices("other", 1), said, dtype)
    exported: Any = adapter.rows if of == "rows" else adapter.values(dtype=dtype)
    tensor = exported[DOWN]
    assert (tensor.shape, tensor.dtype) == (({"rows": 3, "values": 5}[of], 8), dtype)
    first, second = torch.from_dlpack(tensor), torch.from_dlpack(exported[DOWN])
    assert first.data_ptr() == second.data_ptr()
    assert first.dtype == getattr(torch, dtype)
    if dtype != "bfloat16":  # numpy has none
        array = np.from_dlpack(tensor)
        assert array.__array_interface__["data"][0] == first.data_ptr()
        np.testing.assert_array_equal(array, first.numpy())
    # The memory lives as long as anybody looks at it.
    expected = first.clone()
    del exported, tensor, second, adapter
    gc.collect()
    assert torch.equal(first, expected)


def literal(q: Any, k: Any, v: Any, a: Any, strength: float, heads: int) -> torch.Tensor:
    """The paper's two branches (eq. 9) in f64."""
    a = a.repeat(k.shape[1] // a.shape[0], 1).expand_as(v)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.double().unflatten(-1, (heads, -1)).transpose(1, 2)

    map_ = (split(q) @ split(k).mT / split(q).shape[-1] ** 0.5).softmax(-1)
    return (map_ @ split(v) + strength * (map_ @ split(a))).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Computed in f32 and rounded once: one unit in the last place of outputs up to 4.
    [(torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)],
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_attention_is_the_two_branches(dtype: Any, tolerance: float, chunks: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k = randn(2, 9, 12), randn(2, 5 * chunks, 12)
    v, a = randn(2, 5 * chunks, 12), randn(5, 12)
    found = torch.from_dlpack(vmix.attention(q, k, v, a, 0.7, 3))
    assert found.dtype == dtype
    error = (found.double() - literal(q, k, v, a, 0.7, 3)).abs().max()
    assert error < tolerance
    off = torch.from_dlpack(vmix.attention(q, k, v, a, 0.0, 3))
    assert torch.equal(off, torch.from_dlpack(vmix.attention(q, k, v, torch.zeros_like(a), 1, 3)))


class Unversioned:
    """A tensor as torch before 2.9 and numpy before 2.1 offer it: without `max_version`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_tensors_of_older_libraries_come_in() -> None:
    q, a = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    found = vmix.attention(*map(Unversioned, (q, q, q, a)), 1.0, 2)
    expected = vmix.attention(q, q, q, a, 1.0, 2)
    assert torch.equal(torch.from_dlpack(found), torch.from_dlpack(expected))


def test_tensors_come_in_strided_and_from_numpy() -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(2))
    q = draw(4, 2, 12).transpose(0, 1)
    k = draw(2, 5, 24)[:, :, ::2]
    a = draw(12, 5).T
    expected = torch.from_dlpack(
        vmix.attention(*(t.contiguous() for t in (q, k, k, a)), strength=1.5, heads=2)
    )
    assert torch.equal(torch.from_dlpack(vmix.attention(q, k, k, a, 1.5, 2)), expected)
    arrays = [t.numpy() for t in (q, k, k, a)]
    arrays[0].flags.writeable = False
    assert torch.equal(torch.from_dlpack(vmix.attention(*arrays, 1.5, 2)), expected)


def two_branches(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, strength: torch.Tensor,
    mask: torch.Tensor | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Equation 9 in torch, two branches, for [B, H, L, D]."""
    branch = partial(F.scaled_dot_product_attention, q, k, attn_mask=mask, scale=scale)
    return branch(v) + strength * branch(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 80, 160, 7])
def test_attention_of_real_shapes(dim: int, dtype: torch.dtype) -> None:
    """In both layouts, as views and as copies, with all that it takes; 154 keys for 77 tokens."""
    random = torch.Generator().manual_seed(dim)
    draw = partial(torch.randn, generator=random)
    batch, heads, queries, keys = 2, 3, 131, 154
    q, k, v = (draw(batch, n, heads * dim).to(dtype) for n in (queries, keys, keys))
    a, mask = draw(batch, 77, heads * dim), draw(1, heads, queries, keys)
    mask[:, :, 5, 9:] = -math.inf
    region, strength = draw(batch, queries), [0.0, 0.7]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, dim)).transpose(1, 2)

    repeated = split(a.repeat(1, 2, 1))
    exact = two_branches(
        *(split(x).float() for x in (q, k, v)), repeated,
        torch.tensor(strength)[:, None, None, None] * region[:, None, :, None], mask, 0.1,
    )  # fmt: skip
    options: Any = {"strength": strength, "scale": 0.1, "mask": mask, "query_mask": region}
    flat = torch.from_dlpack(vmix.attention(q, k, v, a, heads=heads, **options))
    views = torch.from_dlpack(vmix.attention(split(q), split(k), split(v), a, **options))
    dense = (split(x).contiguous() for x in (q, k, v))
    copies = torch.from_dlpack(vmix.attention(*dense, a, **options))
    assert torch.equal(views, copies)
    assert torch.equal(flat, views.transpose(1, 2).flatten(2))
    assert views.dtype == dtype
    # Sums of 154 in f32 in another order, of values up to 10; rounded once to the dtype.
    rounding = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(views.float(), exact, rtol=rounding, atol=2e-5)
    off = vmix.attention(q, k, v, a, [0.0, 0.0], heads)
    assert torch.equal(
        torch.from_dlpack(off), torch.from_dlpack(vmix.attention(q, k, v, heads=heads))
    )


def test_a_lora_in_the_place_of_an_adapter(tmp_path: pathlib.Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(vmix.VMixError, match="this looks like a LoRA, which hosts load as such"):
        vmix.open(tmp_path / "lora.safetensors")


def test_threads(adapter: vmix.Adapter) -> None:
    everything = vmix.get_num_threads()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(4))
    q, k = draw(1, 600, 80), draw(1, 77, 80)
    results, values = [], []
    try:
        for count in (1, 2, 0):
            vmix.set_num_threads(count)
            results.append(torch.from_dlpack(vmix.attention(q, k, k, k[0], 1.0, 2)))
            values.append(torch.from_dlpack(adapter.values("all")[DOWN]))
    finally:
        vmix.set_num_threads(0)
    assert vmix.get_num_threads() == everything
    for found in (results, values):
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_kernels() -> None:
    program = (
        "import sys, numpy, vmix\n"
        "x = numpy.arange(60, dtype='float32').reshape(1, 6, 10) / 60\n"
        "try: print(*numpy.from_dlpack(vmix.attention(x, x, x, x[0], 1.0, 2)).ravel().tolist())\n"
        "except vmix.VMixError as error: print(error)\n"
    )

    def said(kernel: str) -> str:
        run = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "VMIX_KERNEL": kernel},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return run.stdout.strip()

    expected = (
        r"VMIX_KERNEL: expected one of plain, portable.*, which this processor has, found `fast`"
    )
    assert re.fullmatch(expected, said("fast"))
    plain = list(map(float, said("plain").split()))
    assert len(plain) == 60
    for other in ("portable", ""):
        # Positive numbers, of which each result is a mean over 6 keys: some roundings of 6e-8.
        assert list(map(float, said(other).split())) == pytest.approx(plain, rel=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": None}, "heads: expected a number, since query has three dimensions"),
        ({"heads": 3}, "heads: expected a divisor of the width 4 of query, found 3"),
        ({"aes_value": torch.ones(4)}, "aes_value: expected shape .*context tokens"),
        ({"mask": torch.ones(4)}, "mask: expected shape .*queries, keys"),
        ({"mask": torch.ones(3, 2)}, "mask: expected shape"),
        ({"query_mask": torch.ones(2)}, r"query_mask: expected shape \[batch, queries\]"),
        ({"key": torch.ones(1, 2, 2, 2)}, "key: expected as many dimensions as query has"),
        ({"strength": [1.0, 1.0]}, "strength: expected 1 number, found 2"),
    ],
)
def test_attention_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    good = torch.ones(1, 2, 4)
    given = {"query": good, "key": good, "value": good, "aes_value": good[0], "heads": 2}
    with pytest.raises(vmix.VMixError, match=message):
        vmix.attention(**{**given, **change})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(1, 2, 4, requires_grad=True), vmix.VMixError, "one that requires grad"),
        (torch.ones(1, 2, 4, dtype=torch.int32), vmix.VMixError, "found torch.int32"),
        (np.ones((1, 2, 4)), vmix.VMixError, "float32, float16, bfloat16, found float64"),
        (torch.ones(1, 2, 4, device="meta"), vmix.VMixError, "on the CPU.*found.*meta"),
        (torch.ones(1, 2, 4).to_sparse(), vmix.VMixError, "query: expected"),
        (torch.ones(1, 0, 4), vmix.VMixError, "query: expected at least one row and one query"),
        (torch.ones(2, 4), vmix.VMixError, r"query: expected shape .*found shape \[2, 4\]"),
        ([[1.0]], TypeError, "query: expected a tensor .* found list"),
        (None, TypeError, "found NoneType"),
    ],
)
def test_tensors_that_cannot_come_in(bad: Any, error: type[Exception], message: str) -> None:
    good = torch.ones(1, 2, 4)
    with pytest.raises(error, match=message):
        vmix.attention(bad, good, good, torch.ones(2, 4), 1.0, 2)


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ("vibrant colour", vmix.VMixError, "did you mean `vibrant color`"),
        ({"bokeh": 1.0}, vmix.VMixError, "known labels: vibrant color, sharp focus"),
        ({"sharp focus": float("nan")}, vmix.VMixError, "sharp focus.*finite number, found NaN"),
        ({"sharp focus": "much"}, TypeError, "a number for `sharp focus`, found 'much'"),
        ({"sharp focus": 10**400}, TypeError, "a number for `sharp focus`, found 1000"),
        ({1: 1.0}, TypeError, "selection: expected a label, found 1"),
        (("sharp focus", 1.0), TypeError, r"selection: expected a label, found 1\.0"),
        (3.5, TypeError, "found float"),
    ],
)
def test_selections_that_are_refused(
    adapter: vmix.Adapter, selection: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adapter.values(selection)


def test_presets_keep_metadata_that_is_not_ours(
    adapter: vmix.Adapter, tmp_path: pathlib.Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    adapter.values().save(first)
    tensors = load_file(first)
    with safe_open(first, framework="pt") as file:
        metadata = {**file.metadata(), "my.note": "kept"}
    save_file(tensors, first, metadata)
    vmix.Values.open(first).save(second)
    with safe_open(second, framework="pt") as file:
        assert file.metadata() == metadata


def test_other_refusals(adapter: vmix.Adapter, tmp_path: pathlib.Path) -> None:
    with pytest.raises(vmix.VMixError, match=r"directory"):
        vmix.open(tmp_path)
    with pytest.raises(vmix.VMixError, match=r"absent.*No such file"):
        vmix.open(tmp_path / "absent")
    with pytest.raises(vmix.VMixError, match="not a safetensors file"):
        vmix.Adapter.from_bytes(b"\x80\x04pickle")
    with pytest.raises(vmix.VMixError, match="apply_to: expected one of cond, both, contrast"):
        adapter.values(apply_to="uncond")  # type: ignore[arg-type]
    with pytest.raises(vmix.VMixError, match="dtype: expected one of float32"):
        adapter.values(dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        vmix.Adapter.open(3)  # type: ignore[arg-type]
    tensors = oracle.matrices("other", 2)
    tensors["aes_emb"].requires_grad_()
    with pytest.raises(vmix.VMixError, match=r"`aes_emb`.*requires grad"):
        vmix.Adapter.from_matrices(tensors, adapter.metadata)
    assert issubclass(vmix.VMixError, ValueError)


def test_other_threads_run_meanwhile(adapter: vmix.Adapter) -> None:
    """The GIL is released while values are computed."""
    turns = 0
    started, done = threading.Event(), threading.Event()

    def count() -> None:
        nonlocal turns
        started.set()
        while not done.is_set():
            turns += 1
            time.sleep(0)  # gives the GIL away

    def some_turns() -> bool:
        before = turns
        adapter.values()
        return turns > before

    # Nobody is asked for the GIL from now on: another thread has a turn where it is released.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=count)
    try:
        thread.start()
        assert started.wait(600)
        # A call may be over before the operating system wakes the other thread: one of many is not.
        assert any(some_turns() for _ in range(100_000))
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()
