"""Train, kill, resume and evaluate on the demo's model, by the commands, as a user would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tiny_training import CPU
from vmix.__main__ import main
from vmix.train.denoising import Denoising

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "comfy_nodes" / "demo" / "model"
LABELS = ROOT / "examples" / "demo" / "labels.toml"
STEPS = 4


def drawings(folder: Path) -> Path:
    """Discs, bright or dark, in the middle or in a corner."""
    folder.mkdir()
    lines = []
    for number, colour in enumerate(("red", "green", "blue", "orange", "purple", "pink") * 2):
        light, centred = number % 2, number // 2 % 2
        image = Image.new("RGB", (64, 64), "white" if light else "gray")
        box = (8, 8, 56, 56) if centred else (2, 2, 26, 26)
        ImageDraw.Draw(image).ellipse(box, colour)
        image.save(folder / f"{number}.png")
        labels = {
            "natural lighting": light,
            "balanced composition": centred,
            "vibrant color": number // 6,
            "sharp focus": number // 3 % 2,
        }
        row = {"file_name": f"{number}.png", "text": f"a {colour} ball", "aesthetics": labels}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def train(images: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", f"--pretrained_model_name_or_path={MODEL}",
        f"--train_data_dir={images}", f"--labels={LABELS}", f"--output_dir={out}",
        "--train_batch_size=2", "--resolution=32", f"--max_train_steps={STEPS}",
        "--checkpointing_steps=2", "--learning_rate=1e-2", "--rank=2", "--report_to=none",
        "--weights_dtype=f32", *more,
    ]  # fmt: skip


def resume(run: Callable[[list[str]], str], images: Path, whole: Path, cut: Path) -> None:
    """To the bits of the run that nothing stopped."""
    said = run(train(images, cut, "--resume_from_checkpoint=latest"))
    assert f"to {STEPS}" in said
    assert "steps 0 to" not in said
    for name in ("vmix.safetensors", "vmix-lora.safetensors"):
        first, second = load_file(whole / name), load_file(cut / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.equal(second[key]), f"{name}: {key} differs from the uninterrupted run"


def evaluate(run: Callable[[list[str]], str], trained: Path, folder: Path) -> None:
    prompts, out = folder / "prompts.txt", folder / "eval"
    prompts.write_text("a red ball\na blue car\n")
    run(
        [
            "eval", f"--base={MODEL}", "--steps=3", "--guidance=3",
            f"--adapter={trained / 'vmix.safetensors'}", "--scales=0.5,1", f"--prompts={prompts}",
            f"--lora={trained / 'vmix-lora.safetensors'}", f"--out={out}", "--metrics=pixels",
        ]
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert len(rows) >= 4
    drawn = {folder.name: sorted(folder.glob("*.png")) for folder in (out / "images").iterdir()}
    assert all(len(pictures) == 2 for pictures in drawn.values())
    pixels = {name: Image.open(pictures[0]).tobytes() for name, pictures in drawn.items()}
    base = pixels.pop("base")
    assert pixels.keys() == {"VMix-λ=0.5", "VMix-λ=1", "VMix-+-LoRA", "LoRA-only"}
    assert base not in pixels.values()


def test_train_stop_resume_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process: Ctrl-C, twice, in the third step."""

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["vmix", *arguments])
        main()
        return capfd.readouterr().out

    images = drawings(tmp_path / "images")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train(images, whole))
    loss, calls = Denoising.loss, count(1)

    def interrupted(*given: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Denoising, "loss", interrupted)
        with pytest.raises(SystemExit, match="130"):
            run(train(images, cut))
    capfd.readouterr()
    assert not (cut / "vmix.safetensors").exists()
    resume(run, images, whole, cut)
    evaluate(run, cut, tmp_path)


@pytest.mark.full
def test_train_kill_resume_evaluate(tmp_path: Path) -> None:
    """The commands themselves."""
    command, env = [sys.executable, "-m", "vmix"], {**os.environ, **CPU, "PYTHONUTF8": "1"}

    def run(arguments: list[str]) -> str:
        done = subprocess.run(
            [*command, *arguments], env=env, check=True, capture_output=True, encoding="utf-8"
        )
        return done.stdout

    images = drawings(tmp_path / "images")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train(images, whole))
    # Of so many steps that it is not done when the signal comes, however late that is.
    endless = [*command, *train(images, cut, "--max_train_steps=1000000")]
    with subprocess.Popen(
        endless, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        end = time.monotonic() + 600
        while not (cut / "checkpoint-2").is_dir() and time.monotonic() < end:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
    assert not (cut / "vmix.safetensors").exists()
    for checkpoint in cut.glob("checkpoint-*[0-9]"):
        if int(checkpoint.name.removeprefix("checkpoint-")) >= STEPS:
            shutil.rmtree(checkpoint)
    resume(run, images, whole, cut)
    evaluate(run, cut, tmp_path)
