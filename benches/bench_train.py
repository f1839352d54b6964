"""What training VMix costs, next to the same loop training only a LoRA of rank 16.

    python benches/bench_train.py [--side 128] [--batch 2] [--turns 5] [--threads 2]

A base of Stable Diffusion 1.5's shape with random weights, f32, on the CPU: what a GPU of its own
kernels makes of it differs, the work to be done does not. Every row is the trainer in a process of
its own. They take turns, a step of the optimizer each, so that a busy machine slows all of them;
printed are medians of the ratios to the first row in the same turn, and their range. "peak" is the
largest resident size in the turns, which the base has a large share in: its files are mapped by all
rows. With a cache the autoencoder and the text encoder are let go of, as they would leave a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REFERENCE = "LoRA 16 only"
WHOLE = "VMix + LoRA 64"
ROWS: dict[str, list[str]] = {
    REFERENCE: ["--no_vmix", "--rank=16"],
    "VMix only": ["--rank=0"],
    WHOLE: ["--rank=64"],
    f"{WHOLE}, no cache": ["--rank=64"],
    f"{WHOLE}, checkpointing": ["--rank=64", "--gradient_checkpointing"],
}
"""Checkpointing is that of gradients."""


def make_base(folder: Path) -> None:
    """A diffusers folder in f32, which processes map and share."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))
    from test_single_file import write
    from vmix.train.single_file import CONFIGS, load_pipeline

    file = write(folder / "base.safetensors", CONFIGS / "sd15")
    load_pipeline(str(file)).save_pretrained(folder / "base")
    file.unlink()


def make_images(folder: Path, side: int, count: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        labels = {"natural lighting": number % 2, "sharp focus": number // 2 % 2}
        line = {"file_name": f"{number}.jpg", "text": "a photo of a cat", "aesthetics": labels}
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
    labels_file = "".join(f'[[label]]\nname = "{name}"\n' for name in labels)
    (folder / "labels.toml").write_text(labels_file, "utf-8")


# --- a row, in a process of its own --------------------------------------------------------------


def serve(row: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Steps of a row's training, as they are asked for on stdin: "go", "reset" and "end"."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the trainer says
    import torch
    from vmix.train.loop import Run
    from vmix.train.options import parse_args

    torch.set_num_threads(arguments.threads)
    cached = not row.endswith("no cache")
    run = Run(
        parse_args(
            [
                f"--pretrained_model_name_or_path={folder / 'base'}",
                f"--train_data_dir={folder / 'images'}",
                f"--labels={folder / 'images' / 'labels.toml'}",
                f"--output_dir={folder / 'out'}", f"--resolution={arguments.side}",
                f"--train_batch_size={arguments.batch}", "--report_to=none", *ROWS[row],
                *([f"--cache_dir={folder / 'cache'}"] if cached else []),
            ]
        )
    )  # fmt: skip
    if cached:
        for module in (run.base.pipe.vae, *run.base.encoders()):
            module.to("meta")
    gc.collect()
    started = 0.0

    def wait() -> None:
        nonlocal started
        for line in sys.stdin:
            if line == "go\n":
                started = time.perf_counter()
                return
            if line == "reset\n":
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")
            if line == "end\n":
                said.write(f"{peak()}\n")
                os._exit(0)

    def pause(*_: Any) -> None:
        said.write(f"{time.perf_counter() - started}\n")
        wait()

    run._note = pause  # type: ignore[method-assign]
    said.write("ready\n")
    wait()
    run._steps([])


def peak() -> int:
    """Bytes of the largest resident size since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Row:
    """The process of a row."""

    def __init__(self, row: str, folder: Path, given: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *given, "--row", row, "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "log").open("a"),
            text=True, bufsize=1,
        )  # fmt: skip
        self.log = folder / "log"
        self.hear()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.log.read_text()[-3000:])
        return line.strip()


def measure(folder: Path, turns: int, given: list[str]) -> tuple[Any, Any]:
    Row(REFERENCE, folder, given).tell("end")  # fills the cache
    rows = {}
    for name in ROWS:
        print(f"starting {name}", file=sys.stderr, flush=True)
        rows[name] = Row(name, folder, given)
    times: dict[str, list[float]] = {name: [] for name in rows}
    try:
        for turn in range(turns + 1):  # the first one warms up, and makes the optimizer's state
            for name, row in rows.items():
                row.tell("go")
                seconds = float(row.hear())
                if turn:
                    times[name].append(seconds)
                else:
                    row.tell("reset")
        peaks = {}
        for name, row in rows.items():
            row.tell("end")
            peaks[name] = int(row.hear())
    finally:
        for row in rows.values():
            row.process.kill()
    return times, peaks


def ratio(times: dict[str, list[float]], name: str, to: str) -> str:
    each = [a / b for a, b in zip(times[name], times[to], strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        serve(arguments.row, arguments.folder, arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder)
        make_images(folder / "images", arguments.side, 4 * arguments.batch)
        times, peaks = measure(folder, arguments.turns, sys.argv[1:])
    import torch

    print(
        f"SD1.5's shape, {arguments.side} px, batch {arguments.batch}, f32, "
        f"{arguments.threads} threads, torch {torch.__version__}; {arguments.turns} turns\n"
    )
    print(f"{'':32}{'step, s':>9}{'to ' + REFERENCE:>20}{'peak, GB':>10}{'ratio':>7}")
    for name in ROWS:
        step = statistics.median(times[name])
        share = peaks[name] / peaks[REFERENCE]
        print(
            f"{name:32}{step:9.2f}{ratio(times, name, REFERENCE):>20}"
            f"{peaks[name] / 1e9:10.2f}{share:7.2f}"
        )
    off = f"{WHOLE}, no cache"
    print(
        f"\n{WHOLE}, with a cache to without: step {ratio(times, WHOLE, off)}, "
        f"peak {peaks[WHOLE] / peaks[off]:.2f}"
    )


if __name__ == "__main__":
    main()
