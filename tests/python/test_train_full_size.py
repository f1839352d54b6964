"""Two steps on a base of Stable Diffusion 1.5's full size, random weights in a single file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from test_single_file import write
from vmix import Adapter
from vmix.train.single_file import CONFIGS

# The frozen base in f32 is 4.3 GB, the file it is read from 2.1 GB, the LoRA's and the adapter's
# weights, gradients and moments 1.6 GB; the rest is room for activations and libraries.
LIMIT = 12e9
RUN = """
import resource, sys
from vmix.train.loop import main
main(sys.argv[1:])
print("peak", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.full
def test_two_steps_within_memory(tmp_path: Path) -> None:
    base = write(tmp_path / "sd15.safetensors", CONFIGS / "sd15")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": "a photo of a cat"}
        rows.append({**row, "aesthetics": {"natural lighting": number}})
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "labels.toml").write_text('[[label]]\nname = "natural lighting"\n')
    done = subprocess.run(
        [
            sys.executable, "-c", RUN, f"--pretrained_model_name_or_path={base}",
            f"--train_data_dir={data}", f"--labels={tmp_path / 'labels.toml'}",
            f"--output_dir={out}", "--resolution=128", "--train_batch_size=1", "--cache_latents",
            "--gradient_checkpointing", "--max_train_steps=2", "--text_dropout=0",
            "--report_to=none",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    base.unlink()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("peak")[1]) < LIMIT
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert all(row["lr"] == 1e-4 for row in metrics), "the paper's rate for SD1.5"
    adapter = Adapter.open(out / "vmix.safetensors")
    assert (adapter.base, len(adapter.layers), adapter.context_tokens) == ("sd15", 16, 77)
    assert np.from_dlpack(adapter.tensors()["context.rows"]).any(), "nothing was learned"
    assert (out / "vmix.safetensors").stat().st_size < 1e6, "rows, and not matrices"
    with safe_open(out / "vmix-lora.safetensors", framework="pt") as lora:
        assert any(name.endswith("conv1.lora_down.weight") for name in lora.keys())  # noqa: SIM118
