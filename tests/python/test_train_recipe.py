"""What the trainer's options promise: half precision, checkpointed gradients, averages, weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from tiny_training import (
    TOKENS,
    arguments,
    assert_values,
    losses,
    tiny_images,
    tiny_pipeline,
    together,
    trained_branch,
)
from vmix import Adapter, init_adapter
from vmix.train.base import Base
from vmix.train.model import Denoiser, ValueBranch, add_lora, trained_parameters
from vmix.train.objective import weighted_loss


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images", 12)


def run(pipeline: Path, data: Path, out: Path, *more: str) -> Path:
    argv = arguments(pipeline, data, out, "--train_batch_size=4", *more)
    (ended,) = together(out / "said", argv, 1)
    assert ended.status == 0, ended.err
    return out


def resumed_after(
    step: int, pipeline: Path, data: Path, whole: Path, out: Path, *more: str
) -> Path:
    out.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return run(pipeline, data, out, "--resume_from_checkpoint=latest", *more)


def same(first: Path, second: Path, files: tuple[str, ...]) -> None:
    for file in files:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a), file


FILES = ("vmix.safetensors", "vmix-lora.safetensors", "checkpoint-4/optimizer.safetensors")


def test_bf16_follows_f32(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """Frozen weights and arithmetic have 8 bits: a relative 2⁻⁸ of the loss, which is a mean of
    many. What is trained, and the optimizer's state, keep all of theirs."""
    more = ("--mixed_precision=bf16", "--checkpointing_steps=2")
    whole = run(pipeline, data, tmp_path / "f32")
    half = run(pipeline, data, tmp_path / "bf16", *more)
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=2**-8)
    for file in ("trained.safetensors", "optimizer.safetensors"):
        tensors = load_file(half / "checkpoint-4" / file)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    same(half, resumed_after(2, pipeline, data, half, tmp_path / "again", *more), FILES)


def test_checkpointed_gradients_are_the_same(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations a second time: the same bits."""
    calls = 0
    forward = ResnetBlock2D.forward

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*given, **options)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    base = Base(str(pipeline), torch.device("cpu"), torch.float32)
    branch = ValueBranch(init_adapter(pipeline, ["a: one", "b: two"]), base.unet)
    torch.nn.init.normal_(branch.zero.weight)
    add_lora(base.unet, 2)
    denoiser = Denoiser(base.unet, branch)
    draw = torch.Generator().manual_seed(0)
    given = (
        torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 700]),
        torch.randn(2, TOKENS, 32, generator=draw), torch.tensor([[1.0, 0.5], [0.0, 1.0]]),
    )  # fmt: skip
    seen = []
    for checkpointed in (False, True):
        if checkpointed:
            base.unet.enable_gradient_checkpointing()
        calls = 0
        loss = denoiser(*given).square().mean()
        loss.backward()
        gradients = [p.grad for p in trained_parameters(denoiser).values()]
        seen.append((calls, loss.detach(), gradients))
        denoiser.zero_grad()
    (once, loss, gradients), (twice, again, checkpointed_gradients) = seen
    assert twice > 1.5 * once, "blocks were not computed a second time"
    assert torch.equal(loss, again)
    for first, second in zip(gradients, checkpointed_gradients, strict=True):
        assert first is not None
        assert torch.equal(first, cast(torch.Tensor, second))


def test_the_average_is_the_one_of_the_weights_after_each_step(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    """As diffusers warms it up: the n-th after the first keeps (1 + n) / (10 + n) of the last,
    and at most the decay. A few sums of float32: 1e-6."""
    more = ("--use_ema", "--ema_decay=0.2", "--checkpointing_steps=1", "--max_train_steps=5")
    whole = run(pipeline, data, tmp_path / "whole", *more)
    steps = [load_file(whole / f"checkpoint-{n}" / "trained.safetensors") for n in range(1, 6)]
    averages = {name: tensor.double() for name, tensor in steps[0].items()}
    decays = [2 / 11, 0.2, 0.2, 0.2]  # 3/12, 4/13, … are more than the decay
    for decay, weights in zip(decays, steps[1:], strict=True):
        for name, tensor in weights.items():
            averages[name] = decay * averages[name] + (1 - decay) * tensor.double()
    kept = load_file(whole / "checkpoint-5" / "average.safetensors")
    assert kept.keys() == averages.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor.double(), averages[name], rtol=1e-6, atol=1e-8)
    written, weights = Adapter.open(whole / "vmix.safetensors"), torch.tensor([[1.0, 0.2]])
    averaged = trained_branch(pipeline, data, whole / "checkpoint-5", "average")
    assert_values(written, averaged, weights)
    with pytest.raises(AssertionError):
        assert_values(written, trained_branch(pipeline, data, whole / "checkpoint-5"), weights)

    files = (
        "vmix.safetensors",
        "checkpoint-5/average.safetensors",
        "checkpoint-5/trained.safetensors",
    )
    same(whole, resumed_after(3, pipeline, data, whole, tmp_path / "again", *more), files)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers(prediction: str) -> None:
    """compute_snr and the lines of examples/text_to_image/train_text_to_image.py."""
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0, 1, 50, 200, 500, 800, 999])
    predicted, target = torch.randn(2, len(timesteps), 4, 8, 8, generator=draw)
    base = cast(Any, SimpleNamespace(scheduler=scheduler))
    for gamma in (1.0, 5.0):
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        weights = weights / (snr if prediction == "epsilon" else snr + 1)
        loss = torch.nn.functional.mse_loss(predicted, target, reduction="none")
        expected = (loss.mean(dim=[1, 2, 3]) * weights).mean()
        got = weighted_loss(base, predicted, target, timesteps, gamma)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)  # SNR at 0 cancels digits
    plain = torch.nn.functional.mse_loss(predicted, target)
    torch.testing.assert_close(weighted_loss(base, predicted, target, timesteps, None), plain)
