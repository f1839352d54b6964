"""`--use_8bit_adam`, with bitsandbytes' own kernels for the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import arguments, losses, tiny_images, tiny_pipeline, together


def run(pipeline: Path, data: Path, out: Path, *more: str, processes: int = 1) -> Path:
    # A LoRA whose tensors are large enough: those of less than 4096 numbers keep 32 bits.
    batch = f"--train_batch_size={4 // processes}"
    argv = arguments(pipeline, data, out, "--rank=64", "--checkpointing_steps=2", batch, *more)
    for ended in together(out / "said", argv, processes):
        assert ended.status == 0, ended.err
    return out


def test_eight_bits_follow_32_and_resume_exactly(tmp_path: Path) -> None:
    """Blocks of 256 moments share a scale: 8 bits move single weights by shares of a step of the
    learning rate (1e-3 here), and the loss by less than 1e-4 of it in four of them."""
    pipeline, data = tiny_pipeline(tmp_path / "base"), tiny_images(tmp_path / "data", 12)
    usual = run(pipeline, data, tmp_path / "usual")
    small = run(pipeline, data, tmp_path / "small", "--use_8bit_adam")
    state = load_file(small / "checkpoint-2" / "optimizer.safetensors")
    eight = {name for name, tensor in state.items() if tensor.dtype == torch.uint8}
    assert any(name.endswith("lora_A.default.weight/state1") for name in eight)
    assert losses(small) != losses(usual)
    assert losses(small) == pytest.approx(losses(usual), rel=1e-4)

    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(small / "checkpoint-2", again / "checkpoint-2")
    run(pipeline, data, again, "--use_8bit_adam", "--resume_from_checkpoint=latest")
    for file in ("vmix.safetensors", "vmix-lora.safetensors", "checkpoint-4/optimizer.safetensors"):
        first, second = load_file(small / file), load_file(again / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file

    two = run(pipeline, data, tmp_path / "two", "--use_8bit_adam", processes=2)
    assert losses(two) == pytest.approx(losses(small), rel=1e-4)
