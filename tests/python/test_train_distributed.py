"""The trainer on several processes, next to one: the same curves, files, checkpoints and ends.

Processes are on the CPU and speak gloo. Two of them add up the same numbers as one, in another
order, so that losses and weights differ by the rounding of float32 sums (relative 6e-8 each). Adam
divides small gradients by their own size, and with them their rounding, which would be most of what
some processors make of them: it is given an epsilon as large as the usual gradient (3e-5), with
which a few steps of 1e-3 move a weight by less than 1e-6 of rounding. A process that sees wrong
examples, or does not share gradients, is off by 1e-4 and more.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file
from tiny_training import (
    CPU,
    LOOPBACK,
    Ended,
    arguments,
    as_on_gpus,
    launched,
    losses,
    tiny_images,
    tiny_pipeline,
    together,
)
from vmix import Adapter
from vmix.train.cache import Store
from vmix.train.distribution import fit_plugins
from vmix.train.errors import TrainingError
from vmix.train.order import Order, OwnBatches

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "train"
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}
FILES = ("vmix.safetensors", "vmix-lora.safetensors")
COUNT = 12
SMOOTH = "--adam_epsilon=3e-5"
SCHEDULE = (
    "--lr_scheduler=cosine", "--lr_warmup_steps=1", "--checkpointing_steps=2", SMOOTH,
)  # fmt: skip
"""Rates that a wrong place in the schedule would change."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_images(tmp_path_factory.mktemp("data") / "images", COUNT)


@pytest.fixture(scope="module")
def one(pipeline: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of four images on one process."""
    out = tmp_path_factory.mktemp("one")
    run(pipeline, data, out, 1, "--train_batch_size=4", *SCHEDULE)
    return out


def run(
    pipeline: Path, data: Path, out: Path, processes: int, *more: str, **options: Any
) -> list[Ended]:
    """All of it, which has to end well."""
    argv = arguments(pipeline, data, out, *more)
    ended = together(out / "said", argv, processes, **options)
    assert [process.status for process in ended] == [0] * processes, ended
    return ended


def fsdp(pipeline: Path, data: Path, out: Path, *more: str, precision: str = "no") -> None:
    env = launched(EXAMPLES / "fsdp.yaml", f"--mixed_precision={precision}")
    run(pipeline, data, out, 2, *more, env=env, before=as_on_gpus)


def same(first: Path, second: Path, files: Sequence[str] = FILES, exact: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else ROUNDING
    for file in files:
        a, b = load_file(first / file), load_file(second / file)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: n + m)


def stopped_at_two(run: Path, out: Path) -> Path:
    """A run as it was after two steps, to be resumed."""
    out.mkdir()
    shutil.copytree(run / "checkpoint-2", out / "checkpoint-2")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]))
    return out


# --- one curve -----------------------------------------------------------------------------------


@pytest.mark.full
def test_two_launched_processes_are_one_with_their_batches(
    pipeline: Path, data: Path, one: Path, tmp_path: Path
) -> None:
    """And one process goes on from their checkpoint, at the same rates."""
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    # Without the settings that accelerate may find in the user's own folder.
    env = {**os.environ, **CPU, "HF_HOME": str(tmp_path / "home"), "GLOO_SOCKET_IFNAME": LOOPBACK}
    argv = arguments(pipeline, data, two, "--train_batch_size=2", *SCHEDULE)
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
            "--num_machines=1", "--main_process_port=0", "--mixed_precision=no",
            "--dynamo_backend=no", "-m", "vmix.train", *argv,
        ],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 examples a step on 2 processes" in done.stdout
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same(one, two)
    again = stopped_at_two(two, resumed)
    more = ("--train_batch_size=4", *SCHEDULE, "--resume_from_checkpoint=latest")
    run(pipeline, data, again, 1, *more)
    assert losses(again) == pytest.approx(losses(one), rel=1e-5)
    same(one, again)


def test_two_processes_go_on_from_the_checkpoint_of_one(
    pipeline: Path, data: Path, one: Path, tmp_path: Path
) -> None:
    """With gradients accumulated, so that the images of a step come in four parts."""
    again = stopped_at_two(one, tmp_path / "again")
    more = ("--train_batch_size=1", "--gradient_accumulation_steps=2", *SCHEDULE)
    run(pipeline, data, again, 2, *more, "--resume_from_checkpoint=latest")
    assert losses(again) == pytest.approx(losses(one), rel=1e-5)
    same(one, again)
    rates = [
        [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (one, again)
    ]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2, "a schedule that nothing would show in"


def test_accumulated_gradients_are_those_of_the_whole_batch(
    pipeline: Path, data: Path, one: Path, tmp_path: Path
) -> None:
    parts = ("--train_batch_size=2", "--gradient_accumulation_steps=2")
    run(pipeline, data, tmp_path, 1, *parts, *SCHEDULE)
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-5)
    same(one, tmp_path)


# --- FSDP ----------------------------------------------------------------------------------------


@pytest.mark.full
def test_fsdp_is_one_process(pipeline: Path, data: Path, one: Path, tmp_path: Path) -> None:
    """From the checkpoint of one process, to one that a single process goes on from."""
    shared, alone = stopped_at_two(one, tmp_path / "fsdp"), tmp_path / "alone"
    more = (*SCHEDULE, "--checkpointing_steps=1", "--resume_from_checkpoint=latest")
    fsdp(pipeline, data, shared, "--train_batch_size=2", *more)
    assert losses(shared) == pytest.approx(losses(one), rel=1e-5)
    same(one, shared)
    Adapter.open(shared / "vmix.safetensors")
    alone.mkdir()
    shutil.copytree(shared / "checkpoint-3", alone / "checkpoint-3")
    run(pipeline, data, alone, 1, "--train_batch_size=4", *more)
    same(one, alone)
    same(shared, alone, ["checkpoint-4/optimizer.safetensors", "checkpoint-4/trained.safetensors"])


@pytest.mark.full
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp_draws_and_averages(
    pipeline: Path, data: Path, tmp_path: Path, precision: str
) -> None:
    """Pictures, with the average in place of the weights, between the steps and before the first.

    bf16 rounds in other places there, where nothing is f32 but the weights: 2⁻⁸ of a loss."""
    more = (
        "--validation_prompt=a dog", "--validation_steps=2", "--validation_inference_steps=2",
        "--use_ema", "--gradient_checkpointing", SMOOTH,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    precise = f"--mixed_precision={precision}"
    run(pipeline, data, one, 1, "--train_batch_size=4", precise, *more)
    fsdp(pipeline, data, two, "--train_batch_size=2", *more, precision=precision)
    if precision == "bf16":
        assert losses(two) == pytest.approx(losses(one), rel=2**-8)
        return
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same(one, two)
    for step in (0, 2, 4):
        pictures = [Image.open(out / f"validation/step-{step:06d}.png") for out in (one, two)]
        first, second = (np.asarray(picture).astype(int) for picture in pictures)
        # Rounding is magnified in two steps of guidance: here and there a colour is one or two off.
        off = abs(first - second)
        assert off.max() <= 4
        assert off.mean() < 0.01


@pytest.mark.full
def test_a_fine_tuned_base_is_gathered(pipeline: Path, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # With this epsilon a step is in proportion to the gradient. Otherwise a gradient of nearly
    # nothing moves its weight as far as any other, and its rounding is most of it.
    rates = ("--adam_epsilon=0.01", "--learning_rate=0.1")
    more = ("--full_finetune", "--rank=0", "--max_train_steps=1", *rates)
    run(pipeline, data, one, 1, "--train_batch_size=4", *more)
    fsdp(pipeline, data, two, "--train_batch_size=2", *more)
    same(one, two, ["model/unet/diffusion_pytorch_model.safetensors"])


# --- trouble -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtStep:
    """Has one process do something before it computes the loss of a step."""

    step: int
    process: int
    action: Callable[[], object]

    def __call__(self, rank: int) -> None:
        from vmix.train.denoising import Denoising

        loss, calls = Denoising.loss, itertools.count(1)

        def watched(*given: Any) -> Any:
            if next(calls) == self.step:
                self.action()
            return loss(*given)

        if rank == self.process:
            Denoising.loss = watched


def ended_with(ended: Sequence[Ended], status: int, sentence: str, speaker: int) -> None:
    """All with the status, one with the sentence, none with a traceback."""
    assert [process.status for process in ended] == [status] * len(ended), ended
    for process in ended:
        assert "Traceback" not in process.err
        assert process.err.splitlines()[-1].startswith("vmix.train: "), process.err
    assert sentence in ended[speaker].err.splitlines()[-1]


def cut_short(image: Path) -> bytes:
    """Its header stays whole; what it was."""
    whole = image.read_bytes()
    image.write_bytes(whole[:-40])
    return whole


def test_a_corrupt_image_on_one_process_ends_both(
    pipeline: Path, one: Path, tmp_path: Path
) -> None:
    """With a checkpoint of the last good step, from which the repaired set goes on."""
    data, out = tiny_images(tmp_path / "data", COUNT), tmp_path / "out"
    batches = iter(OwnBatches(Order([0] * COUNT, 4, 0), 0, rank=1, world=2))
    (_, index), _ = [next(batches) for _ in range(3)][2]  # first seen in the third step
    whole = cut_short(data / f"{index}.jpg")
    more = ("--train_batch_size=2", *SCHEDULE, "--checkpointing_steps=100")
    ended = together(tmp_path / "said", arguments(pipeline, data, out, *more))
    ended_with(ended, 1, f"step 3: {index}.jpg cannot be read", speaker=1)
    ended_with(ended, 1, f"{out / 'checkpoint-2'} is where to resume", speaker=1)
    ended_with(ended, 1, "another process could not go on", speaker=0)
    assert len(losses(out)) == 2
    (data / f"{index}.jpg").write_bytes(whole)
    run(pipeline, data, out, 1, *more, "--train_batch_size=4", "--resume_from_checkpoint=latest")
    assert losses(out) == pytest.approx(losses(one), rel=1e-5)
    same(one, out)


def test_a_corrupt_image_ends_both_while_latents_are_cached(pipeline: Path, tmp_path: Path) -> None:
    data, out = tiny_images(tmp_path / "data", COUNT), tmp_path / "out"
    cut_short(data / "1.jpg")
    more = ("--train_batch_size=2", "--cache_latents")
    ended = together(tmp_path / "said", arguments(pipeline, data, out, *more))
    ended_with(ended, 1, "1.jpg cannot be read", speaker=1)


def block(path: Path) -> None:
    """Nothing can be written there from now on."""
    path.unlink()
    path.mkdir()


@pytest.mark.full
def test_a_disk_that_fails_the_main_process_ends_both(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = arguments(pipeline, data, out, "--train_batch_size=2")
    failing = AtStep(3, 0, partial(block, out / "metrics.jsonl"))
    ended = together(tmp_path / "said", argv, before=failing)
    ended_with(ended, 1, "step 3: ", speaker=0)
    ended_with(ended, 1, f"{out / 'checkpoint-3'} is where to resume", speaker=0)
    shutil.rmtree(out / "checkpoint-3")
    ended = together(tmp_path / "said", argv)  # as it is from the start
    ended_with(ended, 1, "metrics.jsonl", speaker=0)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_process_stops_both_after_the_step(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    argv = arguments(pipeline, data, tmp_path, "--train_batch_size=2")
    ended = together(tmp_path / "said", argv, before=AtStep(2, 1, stop))
    ended_with(ended, 128 + signal.SIGTERM, "stopped after step 2", speaker=0)
    assert (tmp_path / "checkpoint-2").is_dir()


@dataclass(frozen=True)
class Late:
    """The second process looks at the cache when the first has done its part."""

    cache: Path

    def __call__(self, rank: int) -> None:
        from vmix.train.denoising import Denoising

        prepare = Denoising.prepare

        def late(*given: Any) -> None:
            while not list(self.cache.glob("*/latents/*.safetensors")):
                time.sleep(0.05)
            prepare(*given)

        if rank == 1:
            Denoising.prepare = late


@pytest.mark.full
def test_processes_fill_a_cache_together(
    pipeline: Path, data: Path, one: Path, tmp_path: Path
) -> None:
    more = ("--train_batch_size=2", "--cache_latents", *SCHEDULE)
    run(pipeline, data, tmp_path, 2, *more, before=Late(tmp_path / "cache"))
    # The autoencoder sees one image at a time, and rounds otherwise.
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-4)
    (folder,) = (tmp_path / "cache").glob("*/latents")
    assert len(list(folder.iterdir())) == 2
    assert len(Store(folder).where) == COUNT


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plugin", "options", "message"),
    [
        ("FSDP", {"fsdp_version": 1}, {}, "expected fsdp_version 2, found 1"),
        ("FSDP", {"cpu_ram_efficient_loading": True}, {}, "needs its own text encoders"),
        ("FSDP", {"activation_checkpointing": True}, {}, "--gradient_checkpointing is the one"),
        ("FSDP", {}, {"objective": "lora"}, "--objective lora"),
        ("FSDP", {}, {"use_8bit_adam": True}, "--use_8bit_adam"),
        ("DEEPSPEED", {"zero_stage": 3}, {}, "expected zero_stage 2, found 3"),
        ("DEEPSPEED", {}, {"use_ema": True}, "--use_ema"),
        ("DEEPSPEED", {}, {"use_8bit_adam": True}, "--use_8bit_adam"),
    ],
)
def test_what_cannot_work_is_refused(
    kind: str, plugin: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    usual = {
        "fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False,
        "zero_stage": 2, "deepspeed_config": {},
    }  # fmt: skip
    settings = SimpleNamespace(**{**usual, **plugin})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind],
        mixed_precision="bf16",
        state=SimpleNamespace(fsdp_plugin=settings, deepspeed_plugin=settings),
    )
    args = SimpleNamespace(
        objective="denoising", use_8bit_adam=False, use_ema=False, train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=1.0,
    )  # fmt: skip
    fit_plugins(cast(Any, accelerator_with(accelerator, usual)), cast(Any, args))
    for key, value in options.items():
        setattr(args, key, value)
    with pytest.raises(TrainingError, match=message):
        fit_plugins(cast(Any, accelerator), cast(Any, args))


def accelerator_with(accelerator: SimpleNamespace, usual: dict[str, Any]) -> SimpleNamespace:
    plugin = SimpleNamespace(**{**usual, "deepspeed_config": {}})
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=plugin)
    return SimpleNamespace(**{**vars(accelerator), "state": state})
