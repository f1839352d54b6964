"""examples/train/deepspeed_zero2.yaml on two processes of the CPU, next to one process without it.

Tolerances are those of tests/python/test_train_distributed.py, and for its reasons.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_training import (
    arguments,
    as_on_gpus,
    assert_values,
    launched,
    losses,
    tiny_images,
    tiny_pipeline,
    together,
    trained_branch,
)
from vmix import Adapter

ROOT = Path(__file__).parent.parent.parent
tiny_training._server.set_forkserver_preload([*tiny_training.PRELOADED, "deepspeed"])
FILES = ("vmix.safetensors", "vmix-lora.safetensors")
STATE = ("checkpoint-4/trained.safetensors", "checkpoint-4/optimizer.safetensors")
SCHEDULE = (
    "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--checkpointing_steps=2",
    "--adam_epsilon=3e-5",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images", 12)


def alone(pipeline: Path, data: Path, out: Path, *more: str) -> Path:
    argv = arguments(pipeline, data, out, "--train_batch_size=4", *SCHEDULE, *more)
    (ended,) = together(out / "said", argv, 1)
    assert ended.status == 0, ended.err
    return out


def zero(pipeline: Path, data: Path, out: Path, *more: str, precision: str = "no") -> Path:
    env = launched(
        ROOT / "examples" / "train" / "deepspeed_zero2.yaml", f"--mixed_precision={precision}"
    )
    argv = arguments(pipeline, data, out, "--train_batch_size=2", *SCHEDULE, *more)
    for ended in together(out / "said", argv, 2, env, as_on_gpus, timeout=1200):  # it compiles
        assert ended.status == 0, ended.err
    return out


def stopped_at_two(run: Path, out: Path) -> Path:
    out.mkdir()
    shutil.copytree(run / "checkpoint-2", out / "checkpoint-2")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]))
    return out


def same(first: Path, second: Path, files: tuple[str, ...], exact: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 2e-6}
    for file in files:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance)


def test_zero_is_one_process(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """From the checkpoint of one, and to one that a single process goes on from."""
    one = alone(pipeline, data, tmp_path / "one")
    two = zero(pipeline, data, tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same(one, two, (*FILES, *STATE))
    suffixes = {path.suffix for path in (two / "checkpoint-4").rglob("*")}
    assert suffixes == {".safetensors", ".json"}, "no pickles"

    resume = "--resume_from_checkpoint=latest"
    to_two = zero(pipeline, data, stopped_at_two(one, tmp_path / "to-two"), resume)
    to_one = alone(pipeline, data, stopped_at_two(two, tmp_path / "to-one"), resume)
    for out in (to_two, to_one):
        assert losses(out) == pytest.approx(losses(one), rel=1e-5)
        same(one, out, (*FILES, *STATE))


def test_accumulated_gradients(pipeline: Path, data: Path, tmp_path: Path) -> None:
    parts = ("--train_batch_size=1", "--gradient_accumulation_steps=2")
    one, two = tmp_path / "one", tmp_path / "two"
    same(alone(pipeline, data, one), zero(pipeline, data, two, *parts), FILES)


def test_bf16_resumes_exactly(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """Checkpoints have the weights that DeepSpeed keeps in f32, not those that it computes with."""
    whole = zero(pipeline, data, tmp_path / "whole", precision="bf16")
    trained = load_file(whole / "checkpoint-4" / "trained.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert any(not torch.equal(t, t.bfloat16().float()) for t in trained.values())
    # And so have the files: nothing in them was rounded to 8 bits on the way.
    for file in FILES:
        written = load_file(whole / file)
        assert any(not torch.equal(t, t.bfloat16().float()) for t in written.values()), file
    branch = trained_branch(pipeline, data, whole / "checkpoint-4")
    assert_values(Adapter.open(whole / "vmix.safetensors"), branch, torch.tensor([[1.0, 0.3]]))
    written = load_file(whole / "vmix.safetensors")
    one = alone(pipeline, data, tmp_path / "one")
    texts = load_file(one / "vmix.safetensors")["aes_emb"]
    assert torch.equal(written["aes_emb"], texts)
    again = stopped_at_two(whole, tmp_path / "again")
    zero(pipeline, data, again, "--resume_from_checkpoint=latest", precision="bf16")
    assert losses(again) == losses(whole)
    same(whole, again, (*FILES, *STATE), exact=True)


def test_words_are_teachers_too(pipeline: Path, data: Path, tmp_path: Path) -> None:
    """Two processes ask their teachers a different number of times."""
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    more = (
        "--objective=text-pairs", f"--prompts={tmp_path / 'prompts.txt'}", "--sample_steps=1",
        "--rank=2",
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    alone(pipeline, data, one, *more)
    zero(pipeline, data, two, *more)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
