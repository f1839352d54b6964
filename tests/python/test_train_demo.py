"""Train, kill, resume and evaluate on the demo's model, by the commands, as a user would."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "comfy_nodes" / "demo" / "model"
LABELS = ROOT / "examples" / "demo" / "labels.toml"
STEPS = 8


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
        sys.executable, "-m", "vmix", "train", f"--pretrained_model_name_or_path={MODEL}",
        f"--train_data_dir={images}", f"--labels={LABELS}", f"--output_dir={out}",
        "--train_batch_size=4", f"--max_train_steps={STEPS}", "--checkpointing_steps=2",
        "--learning_rate=1e-2", "--rank=2", "--report_to=none", "--dtype=f32", *more,
    ]  # fmt: skip


def test_train_kill_resume_evaluate(tmp_path: Path) -> None:
    images = drawings(tmp_path / "images")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(train(images, whole), check=True, capture_output=True)

    with subprocess.Popen(
        train(images, cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        end = time.monotonic() + 300
        while not (cut / "checkpoint-2").is_dir() and time.monotonic() < end:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.kill()
    if (cut / "vmix.safetensors").exists():
        pytest.fail("it was done before it was killed")
    resume = train(images, cut, "--resume_from_checkpoint=latest")
    said = subprocess.run(resume, check=True, capture_output=True, text=True).stdout
    assert f"to {STEPS}" in said
    assert "steps 0 to" not in said
    for name in ("vmix.safetensors", "vmix-lora.safetensors"):
        first, second = load_file(whole / name), load_file(cut / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.equal(second[key]), f"{name}: {key} differs from the uninterrupted run"

    prompts, out = tmp_path / "prompts.txt", tmp_path / "eval"
    prompts.write_text("a red ball\na blue car\n")
    subprocess.run(
        [
            sys.executable, "-m", "vmix", "eval", f"--base={MODEL}", "--steps=3", "--guidance=3",
            f"--adapter={cut / 'vmix.safetensors'}", "--scales=0.5,1", f"--prompts={prompts}",
            f"--lora={cut / 'vmix-lora.safetensors'}", f"--out={out}", "--metrics=pixels",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert len(rows) >= 4
    drawn = {folder.name: sorted(folder.glob("*.png")) for folder in (out / "images").iterdir()}
    assert all(len(pictures) == 2 for pictures in drawn.values())
    pixels = {name: Image.open(pictures[0]).tobytes() for name, pictures in drawn.items()}
    base = pixels.pop("base")
    assert pixels.keys() == {"VMix-λ=0.5", "VMix-λ=1", "VMix-+-LoRA", "LoRA-only"}
    assert base not in pixels.values()
