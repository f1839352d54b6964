"""The estimate of memory against what torch allocates, and against published sizes.

A step on the `meta` device is compared with the same step of the same model on the CPU, counted by
other means: torch's profiler, saved-tensor hooks, and autocast itself. What a GPU does differently
(which operations autocast changes) is compared with torch's own lists.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from vmix import unet_layers
from vmix.train import memory, model
from vmix.train.memory import CONFIGS, Kernels, estimate
from vmix.train.model import LORA_LAYERS, trained_parameters

SIDE, RANK = 128, 4
LABELS = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "transformer_layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
LAYERS = [
    f"{block}.attentions.{index}.transformer_blocks.0.attn2"
    for block, index in (
        ("down_blocks.0", 0),
        ("mid_block", 0),
        ("up_blocks.1", 0),
        ("up_blocks.1", 1),
    )
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Blocks of every kind that SD1.5 and SDXL have, but few and narrow."""
    folder = tmp_path_factory.mktemp("configs")
    for base in ("sd15", "sdxl"):
        shutil.copytree(CONFIGS / base, folder / base)
        path = folder / base / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | SMALL))
    layers = [SimpleNamespace(name=name) for name in LAYERS]
    functions = (memory._step, memory._denoiser, memory._encoders, memory._encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "CONFIGS", folder)
        patch.setattr(model, "unet_layers", lambda _: layers)
        for function in functions:
            function.cache_clear()
        yield
    for function in functions:
        function.cache_clear()


def on_cpu(precision: memory.Precision = "no", rank: int = RANK) -> Any:
    """The same model, with numbers."""
    model = memory._denoiser.__wrapped__("sd15", precision, rank).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
    return model


def inputs(batch: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return (
        torch.randn(batch, 4, SIDE // 8, SIDE // 8, dtype=dtype),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, 77, 768, dtype=dtype),
        torch.rand(batch, LABELS),
        torch.ones(batch, dtype=torch.bool),
        None,
    )


def step(checkpointing: bool = False, batch: int = 2) -> memory.Counts:
    return memory._step("sd15", "no", RANK, checkpointing, SIDE, "cpu", batch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_meta_is_the_cpu(checkpointing: bool, small: None) -> None:
    """No kernel of the CPU makes what `meta` does not know of: not a byte differs."""
    model = on_cpu()
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    assert np.array_equal(memory.measure(model, inputs(2)), step(checkpointing))


def test_kept_is_what_autograd_saves(small: None) -> None:
    model, given = on_cpu(), inputs(2)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    known |= {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*given).float().square().mean()
    assert loss.requires_grad
    kept, *_ = step()
    # Values and the prediction live too, whether they are saved or not.
    extra = sum(value.untyped_storage().nbytes() for value in model._values)
    assert sum(saved.values()) <= kept <= sum(saved.values()) + extra + 64 * SIDE**2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_most_is_what_the_allocator_gave(checkpointing: bool, small: None) -> None:
    """torch's profiler sees the allocator itself, and so buffers within kernels, too."""
    model, given = on_cpu(), inputs(2)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*given).float().square().mean().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    estimated = max(step(checkpointing))
    # What convolutions and sums need beside their results: more of it in so narrow a model.
    assert estimated <= most <= 1.15 * estimated


def test_counts_continue(small: None) -> None:
    """Other batches are what those of 2 and 3 say, at every moment."""
    for checkpointing in (False, True):
        counts = partial(step, checkpointing)
        assert np.array_equal(memory._continued(counts, 5), counts(5))
        # For one image some copies are views, and moments fewer.
        found, exact = memory._continued(counts, 1), counts(1)
        assert found[0] == pytest.approx(exact[0], rel=0.01)
        assert max(found) == pytest.approx(max(exact), rel=0.02)


def test_no_map_of_attention_is_kept(small: None) -> None:
    """Four times the pixels keep four times the bytes; a map would be sixteen times as large."""
    few, large = (
        memory._step("sd15", "bf16", 0, False, side, "cuda", 1)[0] for side in (512, 1024)
    )
    assert 3.5 < large / few <= 4.0


# --- autocast -----------------------------------------------------------------------------------


def test_autocast_is_followed(small: None) -> None:
    """torch's own autocast on the CPU, which casts fewer operations than the GPU's."""
    denoiser = memory._denoiser("sd15", "bf16", RANK)
    real, given = on_cpu("bf16"), inputs(2, torch.bfloat16)
    expected = memory.measure(real, given, torch.autocast("cpu", torch.bfloat16))
    meta = tuple(t.to("meta") if isinstance(t, Tensor) else t for t in given)
    found = memory.measure(denoiser, meta, Kernels("cpu", torch.bfloat16, full={"interpolate"}))
    for count, exact in ((found[0], expected[0]), (max(found), max(expected))):
        # The CPU's LayerNorm keeps two numbers a token in bfloat16, where GPUs and meta have f32.
        assert exact <= count <= 1.003 * exact
    gpu = memory.measure(denoiser, meta, Kernels("cpu", torch.bfloat16))
    assert gpu[0] > 1.1 * expected[0]  # so the lists matter


def test_lists_of_autocast(small: None) -> None:
    """Of all functions that the models call, those of torch's lists for GPUs and no others."""
    header = Path(torch.__path__[0]) / "include" / "ATen" / "autocast_mode.h"
    lists = {}
    for name in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        text = header.read_text().split(f"#define AT_FORALL_{name}(_)")[1]
        text = re.split(r"[^\\]\n", text)[0]
        lists[name] = set(re.findall(r"_\((\w+)", text))
        assert lists[name], name
    called: set[str] = set()

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    model, given = on_cpu(), inputs(1)
    with Names():
        model(*given)
    assert {"linear", "conv2d", "group_norm", "interpolate"} <= called
    wider = {"interpolate"} if "upsample_nearest2d" in lists["FP32"] else set()
    assert called & memory.LOWER == called & lists["LOWER_PRECISION_FP"]
    assert called & memory.FLOAT == called & lists["FP32"] | wider
    assert not called & (lists["FP32_SET_OPT_DTYPE"] | lists["PROMOTE"])


# --- weights and their company ------------------------------------------------------------------


def lora_size(unet: nn.Module, rank: int) -> int:
    """Of two matrices beside every weight, from the weights' shapes."""
    total = 0
    for name, weight in unet.named_parameters():
        if any(name.endswith(f"{layer}.weight") for layer in LORA_LAYERS):
            total += rank * (weight.shape[0] + weight[0].numel())
    return total


def test_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of SD1.5 and SDXL as they are published, in the precision asked for."""
    monkeypatch.setattr(memory, "CONFIGS", CONFIGS)
    monkeypatch.setattr(model, "unet_layers", unet_layers)
    for name in ("_denoiser", "_encoders"):
        monkeypatch.setattr(memory, name, cache(getattr(memory, name).__wrapped__))
    monkeypatch.setattr(memory, "_step", lambda *_: np.zeros(2))
    monkeypatch.setattr(memory, "_encoding", lambda *_: 0)
    vae = 83_653_863
    for base, unet, texts in (
        ("sd15", 859_520_964, 123_060_480),
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840),
    ):
        found = estimate(base, precision="bf16", rank=0)  # type: ignore[arg-type]
        # AesEmb is with the U-Net, and buffers of positions with the text encoders.
        assert found.unet == pytest.approx(2 * unet, rel=1e-4)
        assert found.encoders == pytest.approx(4 * vae + 2 * texts, rel=1e-4)
        assert estimate(base, precision="no", rank=0, cached=True).encoders == 0  # type: ignore[arg-type]
        d = memory.CONTEXT[base]
        projection = 77 * LABELS + 2 * d + d * d + d
        values = 4 * sum(layer.inner_dim * d for layer in unet_layers(base))  # type: ignore[arg-type]
        assert found.trained == found.gradients == 4 * projection + values
        assert found.optimizer == 2 * found.trained
        assert found.average == 0
        assert estimate(base, rank=0, ema=True).average == found.trained  # type: ignore[arg-type]


def test_size_of_a_lora(small: None) -> None:
    bare, with_lora = (memory._denoiser("sd15", "bf16", rank) for rank in (0, 16))
    count = [sum(p.numel() for p in trained_parameters(m).values()) for m in (bare, with_lora)]
    assert count[1] - count[0] == lora_size(bare.unet, 16)
    assert all(p.dtype == torch.float32 for p in trained_parameters(with_lora).values())


def test_optimizers() -> None:
    """AdamW's states as torch has them; bitsandbytes' by its format."""
    weights = [nn.Parameter(torch.randn(100, 64)), nn.Parameter(torch.randn(64))]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    states = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    assert memory._adamw(weights) == sum(t.numel() * t.element_size() for t in states)
    assert memory._adamw_8bit(weights) == 2 * (6400 + 25 * 4) + 8 * 64


def test_estimates_are_ordered(small: None) -> None:
    """What is said to need less does; and what fits is what the total says."""
    sums = partial(estimate, "sd15", 512, 4, cached=True)
    plain = sums()
    assert plain.total == sum(vars(plain).values())
    assert sums(checkpointing=True).total < plain.total < estimate("sd15", 512, 4).total
    assert sums(rank=4).total < plain.total < sums(precision="no").total
    assert sums(optimizer="adamw8bit").total < plain.total < sums(ema=True).total
    count = memory.largest_batch(3, "sd15")
    assert 1 <= count < memory.STEP
    assert estimate("sd15", batch=count).total <= 3 * memory.GIB
    assert estimate("sd15", batch=count + 1).total > 3 * memory.GIB
    assert memory.largest_batch(0.5, "sd15") == 0


def test_table(
    small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SETTINGS", dict(list(memory.SETTINGS.items())[1:3]))
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(memory.SETTINGS)
    assert lines[0].startswith("| Base | Settings | one image | each more | 8 GB |")
    for line in lines[2:]:
        batches = [0 if cell == "-" else int(cell) for cell in line.strip("| ").split(" | ")[4:]]
        assert batches == sorted(batches)
        assert batches[-1] > 0


MEASURE = """
import sys
import torch
from vmix import unet_layers
from vmix.train import memory, model
from vmix.train.model import trained_parameters

torch.set_num_threads(1)
batch, checkpointing = int(sys.argv[1]), sys.argv[2] == "True"
model = memory._denoiser("sd15", "no", 64).to_empty(device="cpu")
with torch.no_grad():
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(0, 0.02)
if checkpointing:
    model.unet.enable_gradient_checkpointing()
for parameter in trained_parameters(model).values():
    parameter.grad = torch.zeros_like(parameter)

def run(side, batch):
    given = (
        torch.randn(batch, 4, side // 8, side // 8), torch.zeros(batch, dtype=torch.int64),
        torch.randn(batch, 77, 768), torch.rand(batch, 7), torch.ones(batch, dtype=torch.bool),
        None,
    )
    model(*given).square().mean().backward()

def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

run(64, 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
run(256, batch)
print(resident("VmHWM") - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("batch", "checkpointing"), [(2, False), (2, True)])
def test_resident_memory(batch: int, checkpointing: bool) -> None:
    """A step of SD1.5's own size at 256 pixels, as the system counts it."""
    # Freed memory goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(batch), str(checkpointing)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    most = max(memory._step("sd15", "no", 64, checkpointing, 256, "cpu", batch))
    # Convolutions reorder weights and need workspace: some 40 MB, whatever the batch.
    assert 0.95 * most <= int(done.stdout) <= 1.05 * most + 60e6
