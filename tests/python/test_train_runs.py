"""The trainer as its users run it: killed, interrupted, on a full disk, with corrupt images; what
it reads from a configuration, what it keeps in its cache, and what it leaves behind."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_training as tiny
import torch
import vmix
import webdataset
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny_training import arguments, losses
from vmix import Adapter, Values
from vmix.diffusers import load_vmix
from vmix.train import cache, checkpoint, denoising, loop, validation
from vmix.train.base import Base
from vmix.train.checkpoint import Checkpoints
from vmix.train.denoising import Denoising
from vmix.train.errors import TrainingError
from vmix.train.export import save_lora, save_presets
from vmix.train.loop import Run, main
from vmix.train.model import add_lora
from vmix.train.options import parse_args
from vmix.train.order import Order
from vmix.train.single_file import CONFIGS

COUNT, SIDE = 10, tiny.SIDE
HANGS = 600.0
"""Seconds after which a process is said to hang, however slow the machine is."""
LATEST = "--resume_from_checkpoint=latest"
EMA = (
    "--use_ema", "--gradient_accumulation_steps=2", "--lr_scheduler=cosine", "--lr_warmup_steps=3",
)  # fmt: skip
BUCKETS = ("--aspect_ratio_buckets", "--bucket_step=4")
CACHED, WORKERS = "--cache_latents", "--dataloader_num_workers=2"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes that are compared with this one: sums of several threads are others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_images(tmp_path_factory.mktemp("images") / "images", COUNT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of images in several shapes."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "labels.toml").write_text(tiny.LABELS)
    draw = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "%d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(COUNT):
            size = ((16, 16), (20, 13), (13, 20))[number % 3]
            buffer = io.BytesIO()
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            labels = {"vibrant color": number % 2, "sharp focus": int(number % 3 == 0)}
            text = {"text": f"a dog {number % 4}", "aesthetics": labels}
            writer.write({"__key__": str(number), "png": buffer.getvalue(), "json": text})
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without further options leaves that nothing has stopped."""
    return train(base, images, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def averaged(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And one with an average."""
    return train(base, images, tmp_path_factory.mktemp("averaged") / "out", "--use_ema")


@pytest.fixture
def copied(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def train(base: Path, data: Path, out: Path, *more: str) -> Path:
    main(argv(base, data, out, *more))
    return out


def argv(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return arguments(
        base, data, out, "--train_batch_size=2", "--max_train_steps=12", "--checkpointing_steps=3",
        *more,
    )  # fmt: skip


def steps(out: Path) -> int:
    """Those that are noted as done."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def newest(out: Path) -> int:
    return max((int(p.name[11:]) for p in out.glob("checkpoint-*[0-9]")), default=0)


def halves(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*.part*"))


def assert_same(one: Path, other: Path) -> None:
    """Every bit of what two runs wrote, and every loss on the way."""
    files = sorted(p.relative_to(one) for p in one.glob("*.safetensors"))
    files += sorted(p.relative_to(one) for p in (one / "presets").iterdir())
    assert Path("vmix.safetensors") in files
    assert Path("vmix-lora.safetensors") in files
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{file}: {name}"
    assert losses(one) == losses(other)
    final = f"checkpoint-{newest(one)}"
    for name in ("trained", "optimizer", "average"):
        path = Path(final) / f"{name}.safetensors"
        assert (one / path).exists() == (other / path).exists()
        if (one / path).exists():
            first, second = load_file(one / path), load_file(other / path)
            assert first.keys() == second.keys()
            assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), path


class Started:
    """A training in a process group of its own. `before` is called in it first."""

    def __init__(self, folder: Path, argv: Sequence[str], before: Callable[[], object]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.said = folder / "said"
        self.process: Any = tiny._server.Process(
            target=_start, args=(list(argv), tiny.CPU, self.said, before)
        )
        self.process.start()

    def wait_for(self, condition: Callable[[], bool], seconds: float = HANGS) -> None:
        wait_for(condition, self.process.is_alive, seconds)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = HANGS) -> tuple[int, str]:
        """Exit status, and what was said."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.text()

    def text(self) -> str:
        return "".join(self.texts())

    def texts(self) -> tuple[str, str]:
        """As output, and as errors."""
        out, errors = (self.said.with_suffix(f".{s}").read_text("utf-8") for s in ("out", "err"))
        return out, errors


def wait_for(condition: Callable[[], bool], alive: Callable[[], object], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert alive(), "it ended too early"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


def _start(argv: list[str], env: dict[str, str], said: Path, before: Callable[[], object]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of workers: not from the server
    os.setsid()
    tiny._train(argv, env, said, lambda _: before())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def start(argv: Sequence[str], before: Callable[[], object] = int) -> Started:
        running.append(Started(tmp_path / f"process{len(running)}", argv, before))
        return running[-1]

    yield start
    for one in running:
        if one.process.is_alive():
            one.process.kill()


# --- killed --------------------------------------------------------------------------------------


def kill_myself(when: Callable[[], bool], delay: float) -> None:
    """SIGKILL, `delay` seconds after the condition holds, whatever is being done."""

    def watch() -> None:
        while not when():
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def kill_between_checkpoints(out: Path, delay: float) -> None:
    """It waits before the last one, however late the signal comes."""
    save = Checkpoints.save

    def waits(self: Checkpoints, step: int, **more: Any) -> None:
        if step == 12:
            time.sleep(1000)
        save(self, step, **more)

    Checkpoints.save = waits  # type: ignore[method-assign]
    kill_myself(lambda: steps(out) >= 7, delay)


def kill_while_writing(out: Path) -> None:
    """On a disk so slow that half of a checkpoint is seen."""
    save = checkpoint.save_file

    def slow(tensors: Any, file: Path) -> None:
        save(tensors, file)
        if file.parent.name == "checkpoint-6.part":
            time.sleep(1000)

    checkpoint.save_file = slow
    kill_myself(lambda: any(out.glob("checkpoint-6.part/*.safetensors")), 0)


@pytest.mark.parametrize(
    ("data", "writing", "more"),
    [
        ("images", True, [*EMA, CACHED, WORKERS]),
        ("shards", False, [*BUCKETS, WORKERS]),
        pytest.param("images", False, [*EMA], marks=pytest.mark.full),
        pytest.param("shards", True, [*BUCKETS, CACHED, "--use_ema"], marks=pytest.mark.full),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    base: Path, data: str, writing: bool, more: list[str], tmp_path: Path,
    request: pytest.FixtureRequest, started: Callable[..., Started],
) -> None:  # fmt: skip
    source = request.getfixturevalue(data)
    whole, out = tmp_path / "whole", tmp_path / "out"
    delay = random.uniform(0, 0.03)
    kill = partial(kill_while_writing, out)
    if not writing:
        kill = partial(kill_between_checkpoints, out, delay)
    process = started(argv(base, source, out, *more), kill)
    train(base, source, whole, *more)
    status, said = process.end()
    assert status == -signal.SIGKILL, said
    assert not (out / "vmix.safetensors").exists()
    if writing:
        assert (out / "checkpoint-6.part").exists()
        assert newest(out) == 3
    else:
        assert newest(out) in (6, 9), f"killed after {steps(out)} steps, {delay} s"
    train(base, source, out, LATEST, *more)
    assert_same(whole, out)
    assert not halves(out)
    if WORKERS in more:  # whoever was killed has left nobody behind
        # torch's workers look for their parent every five seconds
        wait_for(lambda: not _children_of(process.process.pid), lambda: True, HANGS)


def _children_of(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# --- asked to stop -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [False, pytest.param(True, marks=pytest.mark.full)])
def test_ctrl_c(
    base: Path, images: Path, tmp_path: Path, command: bool, started: Callable[..., Started]
) -> None:
    """A terminal's reaches the whole group of processes, workers too."""
    out = tmp_path / "out"
    given = argv(base, images, out, WORKERS, "--max_train_steps=100000", "--report_to=tensorboard")
    if command:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmix.train", *given], start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, **tiny.CPU, "PYTHONUTF8": "1"},
        )  # fmt: skip
        try:
            wait_for(lambda: steps(out) >= 4, lambda: process.poll() is None, HANGS)
            os.killpg(process.pid, signal.SIGINT)
            said, errors = process.communicate(timeout=HANGS)
        finally:
            process.kill()
        status = process.returncode
    else:
        forked = started(given)
        forked.wait_for(lambda: steps(out) >= 4)
        forked.signal(signal.SIGINT)
        status, _ = forked.end()
        said, errors = forked.texts()
    done = steps(out)
    assert status == 130, errors
    assert "Traceback" not in said + errors
    assert (said + errors).count("stopping after this step") == 1
    expected = f"vmix.train: stopped after step {done}; {out}/checkpoint-{done} is where to resume"
    assert errors.strip().splitlines()[-1] == expected
    assert newest(out) == done
    # The bar, while it ran: loss, rate, time left.
    assert re.search(
        r"Steps:.*\d+/100000 \[\d+:\d+<.*(it/s|s/it), loss=\d\.\d+, lr=1\.0e-03\]", errors
    )

    last = f"--max_train_steps={done + 2}"
    whole = train(base, images, tmp_path / "whole", last)
    assert_same(whole, train(base, images, out, last, LATEST, WORKERS))


def test_a_polite_request_to_end(
    base: Path, images: Path, tmp_path: Path, started: Callable[..., Started]
) -> None:
    """SIGTERM, as schedulers of clusters send before they kill; status 128 + 15, as a shell has."""
    out = tmp_path / "out"
    process = started(argv(base, images, out, WORKERS, *EMA, "--max_train_steps=100000"))
    process.wait_for(lambda: steps(out) >= 4)
    process.signal(signal.SIGTERM)
    status, said = process.end()
    done = steps(out)
    assert status == 143, said
    assert f"vmix.train: stopped after step {done}; {out}/checkpoint-{done} is where" in said
    assert "Traceback" not in said
    assert newest(out) == done
    assert not halves(out)


def sleep_in(target: Any, name: str, mark: Path) -> None:
    """Puts a function that takes forever in the place of one; it says when it is there."""

    def sleep(*_args: Any, **_more: Any) -> None:
        mark.touch()
        time.sleep(1000)

    setattr(target, name, sleep)


def test_ctrl_c_twice_stops_at_once(
    base: Path, images: Path, tmp_path: Path, started: Callable[..., Started]
) -> None:
    out, mark = tmp_path / "out", tmp_path / "mark"
    process = started(argv(base, images, out, WORKERS), partial(sleep_in, Denoising, "loss", mark))
    process.wait_for(mark.exists)
    process.signal(signal.SIGINT)
    process.wait_for(lambda: "once more stops at once" in process.text())
    process.signal(signal.SIGINT)
    status, said = process.end()
    assert status == 130, said
    assert "Traceback" not in said
    assert "vmix.train: stopped at once" in said


def test_ctrl_c_before_the_first_step(
    base: Path, images: Path, tmp_path: Path, started: Callable[..., Started]
) -> None:
    mark = tmp_path / "mark"
    process = started(
        argv(base, images, tmp_path / "out", CACHED, WORKERS),
        partial(sleep_in, Base, "moments", mark),
    )
    process.wait_for(mark.exists)
    process.signal(signal.SIGINT)
    status, said = process.end()
    assert status == 130, said
    assert "Traceback" not in said
    assert not halves(tmp_path / "out")


# --- full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own for the output."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"A FULL DISK IS NOT TESTED: it takes a mount, which is not allowed: {error}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                pass


def before_call(patch: pytest.MonkeyPatch, target: Any, name: str, act: Callable[..., Any]) -> None:
    original = getattr(target, name)

    def called(*args: Any, **more: Any) -> Any:
        act(*args, **more)
        return original(*args, **more)

    patch.setattr(target, name, called)


def failed(base: Path, data: Path, out: Path, *more: str) -> str:
    """The sentence that a run ends with."""
    with pytest.raises(SystemExit) as error:
        train(base, data, out, *more)
    assert isinstance(error.value.code, str), "a message is status 1"
    assert error.value.code.startswith("vmix.train: ")
    return error.value.code


@pytest.mark.parametrize("tracker", ["none", "tensorboard"])
def test_a_disk_that_is_full_at_a_checkpoint(
    base: Path, images: Path, averaged: Path, small_disk: Path, tracker: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, more = small_disk / "out", ["--use_ema", f"--report_to={tracker}"]
    with monkeypatch.context() as patch:
        before_call(
            patch, Checkpoints, "save",
            lambda _, step, **__: fill(small_disk) if step == 6 else None,
        )  # fmt: skip
        said = failed(base, images, out, *more)
    assert "checkpoint-6 could not be written" in said
    assert "No space left" in said
    assert f"the last one is {out / 'checkpoint-3'}" in said
    assert newest(out) == 3
    assert not halves(out)
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "filler").unlink()
    train(base, images, out, LATEST, *more)
    assert_same(averaged, out)


def test_a_disk_that_is_full_at_the_end(
    base: Path, images: Path, whole: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "out"
    with monkeypatch.context() as patch:
        before_call(patch, Run, "finish", lambda _: fill(small_disk))
        said = failed(base, images, out)
    assert f"all steps are done, {out / 'checkpoint-12'} resumes to write the files" in said
    assert "No space left" in said or "StorageFull" in said
    assert not halves(out)
    assert not list(out.rglob("vmix*.safetensors"))
    (small_disk / "filler").unlink()
    train(base, images, out, LATEST)
    assert_same(whole, out)


@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("cache", [CACHED]),
        ("validation", ["--validation_prompt=a dog", "--validation_inference_steps=1"]),
        ("metrics.jsonl", []),
    ],
)
def test_a_disk_that_is_full_from_the_start(
    base: Path, images: Path, whole: Path, small_disk: Path, tmp_path: Path, where: str,
    more: list[str],
) -> None:  # fmt: skip
    out = small_disk / "out"
    out.mkdir()
    fill(small_disk)
    said = failed(base, images, out, *more)
    assert "No space left" in said or "StorageFull" in said
    assert not halves(out)
    (small_disk / "filler").unlink()
    train(base, images, out, *more)
    if where == "cache":  # captions are encoded in other batches
        whole = train(base, images, tmp_path / "whole", *more)
    assert_same(whole, out)


def test_a_folder_that_cannot_be_written_to(base: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in failed(base, images, tmp_path / "file" / "out")


# --- corrupt images, and losses that are none ----------------------------------------------------


def tiny_image(folder: Path, number: int) -> Path:
    (path,) = folder.glob(f"{number}.*")
    return path


def jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def with_x(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images, of which the fifth step is the first to see x.jpg."""
    folder = Path(shutil.copytree(images, tmp_path_factory.mktemp("with-x") / "images"))
    ((_, index), _) = next(Order([0] * COUNT, 2, 0).from_batch(4))
    name, listing = tiny_image(folder, index).name, folder / "metadata.jsonl"
    listing.write_text(listing.read_text().replace(f'"{name}"', '"x.jpg"'))
    (folder / "x.jpg").write_bytes(jpeg())
    return folder


@pytest.fixture(scope="module")
def whole_with_x(base: Path, with_x: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, with_x, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("more", [[], [WORKERS]])
def test_an_image_that_is_cut_off(
    base: Path, with_x: Path, whole_with_x: Path, tmp_path: Path, more: list[str]
) -> None:
    """Its header is fine, so that only the step that needs it finds out."""
    copied = Path(shutil.copytree(with_x, tmp_path / "images"))
    content = (copied / "x.jpg").read_bytes()
    (copied / "x.jpg").write_bytes(content[:-700])
    out = tmp_path / "out"
    said = failed(base, copied, out, *more)
    assert re.match(r"vmix.train: step 5: x\.jpg cannot be read: \w.*; ", said)
    assert said.endswith(f"{out}/checkpoint-4 is where to resume")
    assert "\n" not in said
    assert newest(out) == 4
    (copied / "x.jpg").write_bytes(content)
    train(base, copied, out, LATEST, *more)
    assert_same(whole_with_x, out)


@pytest.mark.parametrize("more", [[], [WORKERS]])
def test_an_image_that_is_cut_off_and_cached(
    base: Path, copied: Path, tmp_path: Path, more: list[str]
) -> None:
    tiny_image(copied, 3).write_bytes(jpeg()[:-700])
    out = tmp_path / "out"
    said = failed(base, copied, out, CACHED, *more)
    assert re.match(r"vmix.train: --cache_latents: 3\.\w+ cannot be read: \w.*", said)
    assert "\n" not in said
    assert steps(out) == 0


@pytest.mark.parametrize("more", [[], [CACHED]])
def test_workers_can_be_sent_what_they_do(
    base: Path, images: Path, tmp_path: Path, more: list[str]
) -> None:
    """Where processes are not forked (macOS, Windows, Python 3.14): without any model."""
    dataset = Run(parse_args(argv(base, images, tmp_path, *more))).objective.dataset()
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    one, other = dataset[(3, 1)], pickle.loads(sent)[(3, 1)]
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]


def finite(folder: Path) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    return bool(files) and all(
        bool(t.isfinite().all()) for f in files for t in load_file(f).values()
    )


def test_a_rate_that_blows_the_weights_up(base: Path, images: Path, tmp_path: Path) -> None:
    """The good checkpoint stays, and goes on at a rate of its own."""
    out = tmp_path / "out"
    limit = "--checkpoints_total_limit=1"
    train(base, images, out, "--max_train_steps=3", limit)
    said = failed(base, images, out, LATEST, limit, "--learning_rate=1e30")
    assert re.match(r"vmix.train: step [5-7]: the (loss|gradient's norm) is (nan|inf)", said)
    assert finite(out / "checkpoint-3")
    assert all(map(finite, out.glob("checkpoint-*")))
    assert not (out / "validation").exists()
    train(base, images, out, f"--resume_from_checkpoint={out}/checkpoint-3", "--max_train_steps=6")
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rates == [1e-3] * 6


def test_numbers_in_the_cache_that_are_none(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image's latents: the step that meets them ends the run; the state before it is kept."""
    poisoned, calls = Base.moments, []

    def moments(self: Base, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return poisoned(self, pixels) * (float("nan") if len(calls) == COUNT else 1)

    monkeypatch.setattr(Base, "moments", moments)
    out = tmp_path / "out"
    said = failed(base, images, out, CACHED, "--train_batch_size=1", "--checkpointing_steps=100")
    step = int(re.findall(r"step (\d+): the loss is nan", said)[0])
    assert steps(out) == newest(out) == step - 1
    assert step > 1, "the seed should let the first steps pass"
    assert finite(out / f"checkpoint-{step - 1}")


# --- a full GPU, a folder in use -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "backward"])
def test_memory_that_is_not_enough_for_a_step(
    base: Path, images: Path, whole: Path, tmp_path: Path, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The state before it is written, and ends in the same bits with what is enough."""
    calls: list[int] = []

    def full(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 5:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
                "7.99 GiB of which 5.12 MiB is free. See documentation for Memory Management"
            )

    out = tmp_path / "out"
    target: Any = Denoising if where == "loss" else Accelerator
    with monkeypatch.context() as patch:
        before_call(patch, target, where, full)
        said = failed(base, images, out)
    assert "step 5: CUDA out of memory. Tried to allocate 20.00 MiB. Less is needed with" in said
    assert said.endswith(f"{out / 'checkpoint-4'} is where to resume")
    train(base, images, out, LATEST)
    assert_same(whole, out)


def test_memory_that_is_not_enough_to_begin(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    before_call(monkeypatch, Base, "text", full)
    assert "vmix.train: CUDA out of memory. Tried" in failed(base, images, tmp_path / "out")


def test_a_folder_with_the_checkpoints_of_another_run(
    base: Path, images: Path, tmp_path: Path
) -> None:
    out = train(base, images, tmp_path / "out", "--max_train_steps=3")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    said = failed(base, images, out)
    assert f"{out / 'checkpoint-3'} is an earlier run's: --resume_from_checkpoint latest" in said
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


# --- going back, going on otherwise --------------------------------------------------------------


def test_going_back_to_an_older_checkpoint(
    base: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What came after it is set aside: neither "latest" nor the limit may take it for newer."""
    out = train(base, images, tmp_path / "out")
    back, limit = f"--resume_from_checkpoint={out}/checkpoint-6", "--checkpoints_total_limit=2"
    train(base, images, out, back, limit, "--learning_rate=2e-3", "--max_train_steps=9")
    assert "checkpoint-9, checkpoint-12" in capfd.readouterr().out
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [
        "checkpoint-12.abandoned", "checkpoint-6", "checkpoint-9", "checkpoint-9.abandoned",
    ]  # fmt: skip
    train(base, images, out, LATEST, limit)
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rates == [*[1e-3] * 6, *[2e-3] * 3, *[1e-3] * 3]


def test_what_a_checkpoint_cannot_go_on_with(
    base: Path, images: Path, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = train(base, images, tmp_path / "out", "--max_train_steps=3")
    first, second = (f"[[label]]{part}" for part in tiny.LABELS.split("[[label]]")[1:])
    (copied / "labels.toml").write_text(f"{second}\n{first}")
    said = failed(base, copied, out, LATEST)
    assert "made with other labels, or other texts or another order of them" in said
    assert "vibrant color, sharp focus; --labels has sharp focus, vibrant color" in said
    said = failed(base, images, out, LATEST, "--use_ema")
    assert "made without --use_ema, it has no average" in said
    (copied / "labels.toml").write_text(tiny.LABELS)
    listing = copied / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("a dog 2", "a fox"))
    capfd.readouterr()
    train(base, copied, out, LATEST, "--max_train_steps=4", "--gradient_accumulation_steps=2")
    told = capfd.readouterr().out
    assert re.search(r"data 10 images \(\w{8}\) -> 10 images \(\w{8}\)", told)
    assert "examples a step 2 -> 4" in told


def test_the_base_beside_a_fine_tuned_one_is_the_base(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume, when there is no base any more."""
    shown = []
    before_call(monkeypatch, validation, "sheet", lambda columns, _: shown.append(dict(columns)))
    more = (
        *("--full_finetune", "--rank=0", "--validation_prompt=a dog"),
        *("--validation_inference_steps=1", "--learning_rate=0.01"),
    )
    out = train(base, images, tmp_path / "out", *more, "--max_train_steps=3")
    train(base, images, out, *more, LATEST, "--max_train_steps=4")
    bases = [np.asarray(columns["base"][0]) for columns in shown]
    assert len(bases) == 3
    assert all((bases[0] == picture).all() for picture in bases)
    assert (np.asarray(shown[-1]["trained"][0]) != bases[0]).any()


def test_pictures_are_decoded_in_full_precision(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's autoencoder overflows in half: its pictures would be black."""
    seen = set()

    def watch(run: Run) -> None:
        layer = run.base.pipe.vae.decoder.conv_in
        layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))

    before_call(monkeypatch, Run, "train", watch)
    picture = ("--validation_prompt=a dog", "--validation_inference_steps=1")
    more = ("--mixed_precision=bf16", "--max_train_steps=1", *picture)
    AcceleratorState._reset_state(True)  # it keeps the first precision of a process
    try:
        train(base, images, tmp_path / "out", *more)
    finally:
        AcceleratorState._reset_state(True)
    assert seen == {torch.float32}


def test_gradients_that_are_not_clipped(base: Path, images: Path, tmp_path: Path) -> None:
    few = "--max_train_steps=3"
    zero, huge = (
        train(base, images, tmp_path / name, few, f"--max_grad_norm={norm}")
        for name, norm in (("zero", "0"), ("huge", "1e9"))
    )
    assert load_file(zero / "vmix.safetensors")["context.rows"].any()
    assert_same(zero, huge)


def test_a_base_that_is_not_there(images: Path, tmp_path: Path) -> None:
    """It is not looked for in the hub, unless it has a repository's name."""
    for name in ("no/such/folder", "absent.safetensors", str(tmp_path / "absent")):
        said = failed(Path(name), images, tmp_path / "out")
        assert said.endswith(f"--pretrained_model_name_or_path {name}: no such file or folder")


# --- options -------------------------------------------------------------------------------------


def configured(path: Path, settings: Any, *flags: str) -> Any:
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return parse_args([f"--config={path}", "--output_dir=o", *flags])


def test_help_and_errors_of_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Images per process and step. Default: 256.",
        "Share of captions dropped for guidance. Default: 0.1.",
        "λ of them, as 0.5,1,1.5. Default: 1.0.",
        "1e-4, for SDXL 1e-5, unless given. --lora",
    ):
        assert part in text, part
    with pytest.raises(SystemExit) as ended:
        parse_args(["--rank=many"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "vmix.train: argument --rank: invalid int value: 'many'; --help lists all options\n"
    )
    with pytest.raises(TrainingError, match=r"lerning_rate; did you mean learning_rate\?"):
        configured(tmp_path / "config.yaml", {"lerning_rate": 1})


def test_a_run_that_is_done(
    base: Path, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = train(base, images, tmp_path / "out", "--max_train_steps=3")
    written = (out / "vmix.safetensors").read_bytes()
    (out / "vmix.safetensors").unlink()
    train(base, images, out, "--max_train_steps=3", LATEST)
    assert "all 3 steps are done; the files are written again" in capfd.readouterr().out
    assert (out / "vmix.safetensors").read_bytes() == written


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = """
pretrained_model_name_or_path: base
learning_rate: 1e-4
train_batch_size: 8
mixed_precision: no
use_ema: true
cache_latents: false
no_vmix: true
validation_prompt: [a dog, "a cat: grey"]
validation_scales: [0.5, 1]
title: 2024-01-01
report_to: none
"""
    args = configured(path, text)
    assert args.learning_rate == 1e-4
    assert (args.train_batch_size, args.mixed_precision, args.title) == (8, "no", "2024-01-01")
    assert (args.use_ema, args.cache_latents, args.train_vmix) == (True, False, False)
    assert args.validation_prompt == ["a dog", "a cat: grey"]
    assert args.validation_scales == [0.5, 1]
    args = configured(
        path, text, "--learning_rate", "2e-4", "--train_batch_size=3", "--validation_prompt=a bird",
        "--report_to=wandb", "--cache_latents",
    )  # fmt: skip
    assert (args.learning_rate, args.train_batch_size, args.report_to) == (2e-4, 3, "wandb")
    assert args.validation_prompt == ["a bird"]
    assert args.cache_latents
    assert args.use_ema


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning-rate": 1}, "there is no option learning-rate"),
        ({"learnin_rate": 1}, "there is no option learnin_rate"),
        ({"config": "x"}, "there is no option config"),
        ({"help": True}, "there is no option help"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, found 'fast'"),
        ({"learning_rate": [1, 2]}, "learning_rate: expected a number"),
        ({"learning_rate": None}, "learning_rate: expected a number, found None"),
        ({"rank": 1.5}, "rank: expected a whole number, found 1.5"),
        ({"rank": True}, "rank: expected a whole number, found True"),
        ({"title": {"a": 1}}, "title: expected a text, found {'a': 1}"),
        ({"use_ema": "yes please"}, "use_ema: expected true or false, found 'yes please'"),
        ({"mixed_precision": "fp32"}, "mixed_precision: expected no or fp16 or bf16, found 'fp32'"),
        ({"validation_scales": ["a"]}, "validation_scales: expected numbers, found ['a']"),
        ({"validation_prompt": ["x", None]}, "validation_prompt: expected a text"),
        ("- a", "expected `option: value` lines"),
        ("", "expected `option: value` lines"),
        ("a: [", "line 1: expected the node content"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, settings: Any, message: str) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(TrainingError) as error:
        configured(path, settings)
    assert str(error.value).startswith(f"--config {path}:")
    assert message in str(error.value)
    with pytest.raises(SystemExit, match=r"^vmix.train: --config"):
        main([f"--config={path}"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--config .*nowhere\.yaml: .*No such file"):
        main(["--config", str(tmp_path / "nowhere.yaml")])


def test_training_from_a_file(base: Path, images: Path, tmp_path: Path) -> None:
    more = ["--max_train_steps=3", "--use_ema"]
    whole = train(base, images, tmp_path / "whole", *more)
    flags = argv(base, images, tmp_path / "out", *more)
    pairs = (flag.removeprefix("--").partition("=") for flag in flags)
    given = {key: yaml.safe_load(value) if equals else True for key, equals, value in pairs}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    main([f"--config={tmp_path / 'config.yaml'}"])
    assert_same(whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--report_to=wandb"], "--report_to wandb: pip install wandb"),
        (["--report_to=nobody"], "nobody"),
        (["--mixed_precision=fp16"], "fp16"),
        (["--adam_beta1=2"], "beta"),
        (["--learning_rate=-1"], "--learning_rate -1.0 is not positive"),
        (["--lr_scheduler=sine"], "--lr_scheduler sine"),
        (["--seed=-1"], "--seed -1 is negative"),
        (["--dataloader_num_workers=-1"], "--dataloader_num_workers -1 is negative"),
        (["--resolution=15"], "--resolution 15 is not a multiple of 2"),
        (["--aspect_ratio_buckets", "--bucket_step=3"], "--bucket_step 3 is not a multiple of 2"),
        (["--train_data_dir=nowhere"], "nothing is there"),
        (["--labels=nowhere"], "nowhere"),
        (["--pretrained_model_name_or_path=nowhere"], "nowhere"),
        (["--resume_from_checkpoint=nowhere"], "no checkpoint"),
    ],
)
def test_mistakes_are_sentences(
    base: Path, images: Path, tmp_path: Path, more: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    find = loop.find_spec
    monkeypatch.setattr(loop, "find_spec", lambda name: None if name == "wandb" else find(name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = failed(base, images, tmp_path / "out", *more)
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_report_comes_before_the_first_step(
    base: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, none = tiny_image(copied, 3), tiny_image(copied, 4)
    gone.unlink()
    none.write_bytes(b"x")
    out = tmp_path / "out"
    said = failed(base, copied, out)
    assert f"{gone.name}: no such image" in said
    assert f"{none.name}: not an image" in said
    assert not out.exists()
    train(base, copied, out, "--skip_unusable", "--max_train_steps=1")
    assert f"{copied}: {COUNT} images, {COUNT - 2} usable" in capsys.readouterr().out
    assert Adapter.open(out / "vmix.safetensors").made["images"] == COUNT - 2


def test_older_checkpoints_are_forgotten(base: Path, images: Path, tmp_path: Path) -> None:
    def left(limit: int) -> list[int]:
        out = tmp_path / str(limit)
        more = ["--checkpointing_steps=1", "--max_train_steps=4", "--rank=0"]
        train(base, images, out, f"--checkpoints_total_limit={limit}", *more)
        return sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))

    assert left(1) == [4]
    assert left(3) == [2, 3, 4]
    assert left(4) == [1, 2, 3, 4]


# --- the cache -----------------------------------------------------------------------------------


class Counted:
    """How many images and captions were encoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.images = self.captions = 0
        before_call(patch, Base, "moments", self._image)
        before_call(patch, Base, "text", self._captions)

    def _image(self, _base: Base, pixels: torch.Tensor) -> None:
        self.images += len(pixels)

    def _captions(self, _base: Base, captions: list[str]) -> None:
        self.captions += len(captions)

    def since(self) -> tuple[int, int]:
        found = self.images, self.captions
        self.images = self.captions = 0
        return found


def test_a_filled_cache_needs_no_encoders(
    base: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"--cache_dir={tmp_path / 'cache'}"
    counted = Counted(monkeypatch)
    few = ("--max_train_steps=1", "--rank=0")
    first = train(base, copied, tmp_path / "first", cache, "--max_train_steps=5")
    assert counted.since() == (COUNT, 4 + 1), "ten images, four captions, and the empty one"

    with monkeypatch.context() as patch:
        patch.delattr(Base, "moments")
        patch.delattr(Base, "text")
        second = train(base, copied, tmp_path / "second", cache, "--max_train_steps=5")
    assert_same(first, second)

    numbers = count()

    def encoded(where: Path = copied, start: Path = base) -> tuple[int, int]:
        train(start, where, tmp_path / f"again-{next(numbers)}", cache, *few)
        return counted.since()

    path = tiny_image(copied, 3)
    size, buffer = path.stat().st_size, io.BytesIO()
    with Image.open(path) as image:
        image.rotate(90).save(buffer, "JPEG", quality=10)
    path.write_bytes(buffer.getvalue().ljust(size, b"\0"))
    assert path.stat().st_size == size
    assert encoded() == (1, 0), "an image that changed"
    listing = copied / "metadata.jsonl"
    listing.write_text(listing.read_text().replace("a dog 2", "a fox"))
    assert encoded() == (0, 1), "a caption that changed"
    train(base, copied, tmp_path / "shape", cache, *few, "--resolution=8")
    assert counted.since() == (COUNT, 0), "another shape"

    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    assert encoded(start=moved) == (0, 0), "the base may lie anywhere"
    touch(moved / "unet" / "diffusion_pytorch_model.safetensors")
    assert encoded(start=moved) == (0, 0), "the U-Net makes no latents"
    touch(moved / "vae" / "diffusion_pytorch_model.safetensors")
    assert encoded(start=moved)[0] == COUNT, "the autoencoder does"
    touch(moved / "text_encoder" / "model.safetensors")
    assert encoded(start=moved)[1] == 5, "and the text encoder makes the captions' features"
    assert encoded() == (0, 0), "what belongs to the first base is still there"


def touch(file: Path) -> None:
    """Changes a few weights."""
    content = bytearray(file.read_bytes())
    content[-40:] = bytes(40)
    file.write_bytes(content)


def test_a_damaged_cache_is_computed_anew(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PART", 2)
    monkeypatch.setattr(denoising, "PART", 4)
    folder = tmp_path / "cache"
    few = "--max_train_steps=5"
    first = train(base, images, tmp_path / "first", f"--cache_dir={folder}", few)
    latents, texts = sorted(folder.rglob("latents/*")), sorted(folder.rglob("texts/*"))
    assert (len(latents), len(texts)) == (3, 3)
    latents[0].write_bytes(latents[0].read_bytes()[:-100])
    latents[1].write_bytes(b"")
    texts[0].write_bytes(b"\xff" * 1000)
    (folder / "note.txt").write_text("not of the cache")
    counted = Counted(monkeypatch)
    second = train(base, images, tmp_path / "second", f"--cache_dir={folder}", few)
    assert_same(first, second)
    found = counted.since()
    assert found[0] in (4 + 4, 4 + 2), "two of the three files"
    assert found[1] in (1, 2), "one of the three"
    train(base, images, tmp_path / "third", f"--cache_dir={folder}", "--max_train_steps=1")
    assert counted.since() == (0, 0)
    assert not halves(folder)


# --- what is left behind -------------------------------------------------------------------------


def test_curves(base: Path, images: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    more = ["--lr_scheduler=linear", "--validation_steps=2", "--validation_inference_steps=1"]
    more += ["--report_to=tensorboard", "--validation_prompt=a dog", "--max_train_steps=5"]
    more += ["--rank=0"]
    flags = [flag for flag in argv(base, images, out, *more) if flag != "--report_to=none"]
    main([flag for flag in flags if flag != "--report_to=tensorboard"])  # it is the default
    (events,) = (path.parent for path in (out / "logs").rglob("events.*"))
    curves = EventAccumulator(str(events), {"images": 0}).Reload()
    noted = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in noted] == list(range(1, 6))
    for tag, key in (("train_loss", "loss"), ("lr", "lr")):
        scalars = curves.Scalars(tag)
        assert [point.step for point in scalars] == list(range(1, 6))
        expected = np.float32([row[key] for row in noted])  # as event files have them
        assert np.array_equal(np.float32([point.value for point in scalars]), expected)
    assert [image.step for image in curves.Images("validation")] == [0, 2, 4, 5]
    with Image.open(io.BytesIO(curves.Images("validation")[-1].encoded_image_string)) as image:
        assert np.array_equal(image, Image.open(out / "validation" / "step-000005.png"))
    train(base, images, tmp_path / "none", "--max_train_steps=1", "--rank=0")
    assert not (tmp_path / "none" / "logs").exists()


@pytest.fixture(scope="module")
def run(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is done, with all that it can leave behind."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = Run(
        parse_args(
            argv(
                base, images, out, "--learning_rate=1e-2", "--validation_prompt=a dog",
                "--validation_prompt=a cat", "--validation_scales=0.5,1", "--name=demo",
                "--validation_inference_steps=2", "--title=A | title", "--author=Somebody",
                "--license=CreativeML Open RAIL++-M", "--description=For tests.", "--seed=7",
            )
        )
    )  # fmt: skip
    done.train()
    return done


def pictures(pipe: Any, prompts: Sequence[str], seed: int, **more: Any) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    found = []
    for number, prompt in enumerate(prompts):
        random = torch.Generator().manual_seed(seed + number)
        with torch.no_grad():
            found += pipe(
                prompt, height=SIDE, width=SIDE, generator=random, num_inference_steps=2,
                guidance_scale=7.5, **more,
            ).images  # fmt: skip
    return found


def plain(base: Path) -> Any:
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)


def test_the_grid_is_what_users_would_draw(run: Run, base: Path) -> None:
    """Every column, drawn with diffusers alone and the file that was written."""
    grid = np.asarray(Image.open(run.args.output_dir / "validation" / "step-000012.png"))
    adapter = Adapter.open(run.args.output_dir / "demo.safetensors")
    prompts = ["a dog", "a cat"]
    columns = [pictures(plain(base), prompts, 7)]
    chosen: list[tuple[Any, float]] = [("all", 0.5), ("all", 1.0)]
    chosen += [({"vibrant color": 1.0}, 1.0), ({"sharp focus": 1.0}, 1.0)]
    for selection, scale in chosen:
        pipe = plain(base)
        load_vmix(pipe, adapter, selection, scale=scale)
        columns.append(pictures(pipe, prompts, 7))
    tile, gap = validation.TILE, validation.GAP
    assert grid.shape[1] == gap + len(columns) * (tile + gap)
    rows = (grid.shape[0] - 24 - gap) // 2
    tiles = [
        [
            grid[24 + gap + row * rows + 24 :][:tile, gap + column * (tile + gap) :][:, :tile]
            for row in range(2)
        ]
        for column in range(len(columns))
    ]
    for column, (drawn, expected) in enumerate(zip(tiles, columns, strict=True)):
        for got, picture in zip(drawn, expected, strict=True):
            large = picture.resize((tile, tile), Image.Resampling.BICUBIC)
            if column == 0:
                assert np.array_equal(got, large)
            # f32 sums in another order: one level, and bicubic's overshoot of it
            difference = np.abs(got.astype(int) - np.asarray(large).astype(int))
            assert difference.max() <= 2, f"column {column}"
    assert not np.array_equal(tiles[0][0], tiles[2][0])
    assert not np.array_equal(tiles[2][0], tiles[3][0])
    first = np.asarray(Image.open(run.args.output_dir / "validation" / "step-000000.png"))
    top = first[24 + gap + 24 :][:tile, gap:]
    assert np.array_equal(top[:, :tile], top[:, tile + gap :][:, :tile]), "step 0 is the base"


def test_adapter_and_presets(run: Run) -> None:
    out = run.args.output_dir
    adapter = Adapter.open(out / "demo.safetensors")
    assert adapter.metadata["modelspec.title"] == "A | title"
    assert adapter.metadata["modelspec.author"] == "Somebody"
    trained = adapter.made
    assert trained["method"] == "trained"
    assert adapter.dtype == "float32"
    assert trained["steps"] == 12
    assert trained["batch_size"] == 2
    assert trained["seed"] == 7
    assert trained["prediction_type"] == "epsilon"
    expected = {
        "all": "all", "vibrant-color": {"vibrant color": 1.0}, "sharp-focus": {"sharp focus": 1.0},
    }  # fmt: skip
    assert {path.stem for path in (out / "presets").iterdir()} == expected.keys()
    for stem, selection in expected.items():
        path = out / "presets" / f"{stem}.safetensors"
        found, values = Values.open(path), adapter.values(selection)
        assert isinstance(vmix.open(path), Values)
        assert found.selection == adapter.weights(selection)
        assert list(found) == list(values)
        for layer in values:
            assert torch.equal(torch.from_dlpack(found[layer]), torch.from_dlpack(values[layer]))


def test_presets_whose_names_would_be_the_same(run: Run, tmp_path: Path) -> None:
    adapter = Adapter.open(run.args.output_dir / "demo.safetensors")
    metadata = dict(adapter.metadata)
    for key in ("vmix.labels", "vmix.rows"):
        for label, name in zip(adapter.labels, ("a/b", "a b"), strict=True):
            metadata[key] = metadata[key].replace(f'"{label.name}"', f'"{name}"')
    renamed = Adapter.from_tensors(adapter.tensors(), metadata)
    files = save_presets(renamed, tmp_path, "float16")
    assert {name: what.removeprefix("preset of ") for name, what in files.items()} == {
        "all.safetensors": "all labels positive", "a-b.safetensors": "a/b alone",
        "a-b-.safetensors": "a b alone",
    }  # fmt: skip
    assert Values.open(tmp_path / "a-b-.safetensors").selection == {"a/b": 0.0, "a b": 1.0}
    assert Values.open(tmp_path / "a-b.safetensors").dtype == "float16"


def test_the_lora_in_diffusers(run: Run, base: Path) -> None:
    """The U-Net with the LoRA that was loaded predicts what the one that was trained does."""
    pipe = plain(base)
    draw = torch.Generator().manual_seed(0)
    sample, timestep = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 700])
    context = torch.randn(2, tiny.TOKENS, 32, generator=draw)
    with torch.no_grad():
        before = pipe.unet(sample, timestep, context).sample
        pipe.load_lora_weights(run.args.output_dir, weight_name="demo-lora.safetensors")
        after = pipe.unet(sample, timestep, context).sample
        trained = run.denoiser.alone(lambda: run.base.unet(sample, timestep, context).sample)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.full)])
def test_diffusers_takes_every_layer_of_the_lora(kind: str, tmp_path: Path) -> None:
    """With the names of the real bases, narrow ones; ComfyUI's side is in tests/comfy."""
    import diffusers

    config = json.loads((CONFIGS / kind / "unet" / "config.json").read_text())
    config["block_out_channels"] = [32] * len(config["block_out_channels"])
    config["attention_head_dim"] = 4
    made = diffusers.UNet2DConditionModel.from_config(config)
    add_lora(made, 2)
    trained = {name: tensor for name, tensor in made.named_parameters() if "lora" in name}
    for tensor in trained.values():
        torch.nn.init.normal_(tensor)
    path = tmp_path / "lora.safetensors"
    save_lora(SimpleNamespace(unet=made), path, torch.float32, main=True)  # type: ignore[arg-type]
    pipeline: Any = {
        "sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline
    }[kind]  # fmt: skip
    fresh = diffusers.UNet2DConditionModel.from_config(config)
    state, alphas, *_ = pipeline.lora_state_dict(str(path), unet_config=fresh.config)
    pipeline.load_lora_into_unet(state, alphas, fresh, adapter_name="default")
    loaded = {name: tensor for name, tensor in fresh.named_parameters() if "lora" in name}
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.items())
    assert fresh.peft_config["default"].lora_alpha == made.peft_config["default"].lora_alpha == 2
    assert not fresh.peft_config["default"].alpha_pattern


def test_the_model_card(run: Run) -> None:
    card = (run.args.output_dir / "README.md").read_text("utf-8")
    _, front, text = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "other", "no identifier of the hub's"
    assert head["license_name"] == "CreativeML Open RAIL++-M"
    assert "base_model" not in head, "the hub takes none that is not there"
    assert text.startswith("\n# A | title\n")
    assert "For tests." in text
    assert "](validation/step-000012.png)" in text
    assert (run.args.output_dir / "validation" / "step-000012.png").exists()
    assert "| vibrant color |" in text
    assert "| sharp focus |" in text
    for file in (
        "demo-lora.safetensors",
        *(f"presets/{n}.safetensors" for n in ("all", "sharp-focus")),
    ):
        assert f"`{file}`" in text
        assert (run.args.output_dir / file).exists()
    assert '"demo.safetensors"' in text
    assert "| images | 10 |" in text


def test_pushing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub is asked for, and which of the files its own filter lets through."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, **more: Any) -> Any:
            asked["repository"] = name
            assert more["exist_ok"]
            return SimpleNamespace(repo_id=f"somebody/{name}")

        def upload_folder(self, **more: Any) -> None:
            asked.update(more)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(run.args, "push_to_hub", True)
    (run.args.output_dir / "logs").mkdir(exist_ok=True)
    (run.args.output_dir / "logs" / "events").touch()
    run.finish()
    assert asked["repository"] == "out"
    assert asked["repo_id"] == "somebody/out"
    folder = Path(asked["folder_path"])
    assert folder == run.args.output_dir
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = sorted(filter_repo_objects(files, ignore_patterns=asked["ignore_patterns"]))
    presets = [f"presets/{stem}.safetensors" for stem in ("all", "sharp-focus", "vibrant-color")]
    grids = ["validation/step-000000.png", "validation/step-000012.png"]
    alone = ["README.md", "demo-lora.safetensors", "demo.safetensors"]
    assert sent == sorted([*alone, *presets, *grids])

    def refuse(*_given: Any, **_more: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Hub, "upload_folder", refuse)
    with pytest.raises(TrainingError) as error:
        run.finish()
    assert str(error.value) == (
        f"--push_to_hub out: no route to host. Everything is in {run.args.output_dir}"
    )
