"""Step time and memory of the trainer, as ratios to the same loop training a LoRA of rank 16 alone.

    make bench-train

The command's own code on a base of SD1.5's full size (random weights, a single file), at 256 px,
one image a step, f32 on the CPU. Runs take turns, each in a process of its own; times are medians
over all steps but each run's first. Memory is what steps add to what was loaded before them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))

SIDE, IMAGES = 256, 8
REFERENCE = "LoRA 16 alone"
ROWS: dict[str, list[str]] = {
    REFERENCE: ["--no_vmix", "--rank=16", "--cache_latents"],
    "VMix": ["--rank=0", "--cache_latents"],
    "VMix and LoRA 64 (default)": ["--cache_latents"],
    "… without cache": [],
    "… with gradient checkpointing": ["--cache_latents", "--gradient_checkpointing"],
}
RUN = """
import json, sys
from pathlib import Path
from vmix.train.loop import Run
from vmix.train.options import parse_args

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

run = Run(parse_args(sys.argv[1:]))
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
before = status("VmRSS")
run._steps([])
print(json.dumps({"peak": status("VmHWM") - before, "loaded": before}))
"""


def prepare(work: Path) -> Path:
    from test_single_file import write
    from vmix.train.single_file import CONFIGS

    base, data = work / "sd15.safetensors", work / "images"
    if not base.exists():
        work.mkdir(parents=True, exist_ok=True)
        write(base.with_suffix(".part"), CONFIGS / "sd15")
        base.with_suffix(".part").replace(base)
    data.mkdir(exist_ok=True)
    lines = []
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"a photo of a cat, {number}"}
        lines.append(json.dumps({**row, "aesthetics": {"natural lighting": number % 2}}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    (work / "labels.toml").write_text('[[label]]\nname = "natural lighting"\n')
    return base


def measure(work: Path, name: str, steps: int) -> tuple[list[float], float]:
    """Seconds of every step but the first, and bytes."""
    out = work / "out"
    done = subprocess.run(
        [
            sys.executable, "-c", RUN,
            f"--pretrained_model_name_or_path={work / 'sd15.safetensors'}",
            f"--train_data_dir={work / 'images'}", f"--labels={work / 'labels.toml'}",
            f"--output_dir={out}", f"--cache_dir={work / 'cache'}", f"--resolution={SIDE}",
            "--train_batch_size=1", f"--max_train_steps={steps}", "--report_to=none", *ROWS[name],
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    metrics = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").unlink()
    ends = [json.loads(line)["seconds"] for line in metrics]
    peak = float(json.loads(done.stdout.splitlines()[-1])["peak"])
    return [b - a for a, b in pairwise(ends)], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "bench-train")
    args = parser.parse_args()
    prepare(args.work)
    measure(args.work, REFERENCE, 1)  # fills the cache
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    peaks: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(args.rounds):
        for name in ROWS:
            seconds, peak = measure(args.work, name, args.steps)
            times[name] += seconds
            peaks[name].append(peak)
    time, memory = (
        {name: statistics.median(values) for name, values in part.items()}
        for part in (times, peaks)
    )
    print(f"{'':<32}{'step':>9}{'ratio':>8}{'memory':>10}{'ratio':>8}")
    for name in ROWS:
        print(
            f"{name:<32}{time[name]:>7.2f} s{time[name] / time[REFERENCE]:>8.2f}"
            f"{memory[name] / 1e9:>7.2f} GB{memory[name] / memory[REFERENCE]:>8.2f}"
        )


if __name__ == "__main__":
    main()
