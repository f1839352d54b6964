"""Train the demo's adapter, and what the report compares it with: LoRAs and other adapters.

    python examples/demo/adapter.py

The pictures are drawn anew (examples/demo/base/data.py), with another seed than the base model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from demo import DEMO, HERE, article
from vmix.measures import HUE_BANDS

CACHE = Path.home() / ".cache" / "vmix-demo"

COUNT = 2400  # drawings
DATA = [f"--count={COUNT}", "--seed=1"]
COMMON = [
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=20",
    "--report_to=none",
    "--checkpointing_steps=250",
    "--resume_from_checkpoint=latest",
    "--license=CC-BY-4.0",
    "--author=vmix-adapter contributors",
    "--seed=0",
]
PICTURES = ["--train_batch_size=32", "--cache_latents", "--text_dropout=0.1"]
VMIX = ["--learning_rate=1e-2", "--max_train_steps=1000", "--rank=0"]
LORA = ["--lora_learning_rate=2e-4", "--rank=4"]
RUNS = {
    "adapter": [*VMIX, "--apply_to=cond", "--title=VMix demo adapter"],
    # For the report: the other way to train the unconditional pass, and the paper's table 3.
    "ablation/both": [*VMIX, "--apply_to=both", "--title=VMix demo adapter, both"],
    "ablation/joint": [*VMIX, *LORA, "--apply_to=cond"],
    "ablation/only": [*LORA, "--learning_rate=2e-4", "--max_train_steps=1000", "--no_vmix"],
    # No pictures: the base with the labels' words in its prompt is the teacher.
    "ablation/pairs": [
        *("--objective=text-pairs", f"--teachers={HERE / 'words.yaml'}", "--sample_guidance=3"),
        *("--train_batch_size=16", "--learning_rate=1e-2", "--max_train_steps=500"),
        "--title=VMix demo adapter, from words",
    ],
}


def prompts(path: Path) -> Path:
    """Every concept in three colours, with the place where words of the look go."""
    concepts = json.loads((HERE / "base" / "concepts.json").read_text(encoding="utf-8"))
    colours, lines = list(HUE_BANDS), []
    for index, concept in enumerate(concepts):
        for turn in range(3):
            colour = colours[(index + turn * 2) % len(colours)]
            lines.append(f"{article(colour)} {concept['name']}, {{words}}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=DEMO / "model")
    parser.add_argument("--out", type=Path, help="Where all files go.")
    parser.add_argument("--work", type=Path, default=CACHE / "adapter")
    parser.add_argument(
        "--only", choices=RUNS, action="append", help="Runs to do; all unless given."
    )
    args, more = parser.parse_known_args()

    images = args.work / "images"
    if not (images / "metadata.jsonl").exists():
        command = [sys.executable, str(HERE / "base" / "data.py"), f"--out={images}", *DATA]
        subprocess.run(command, check=True)
    for name in args.only or RUNS:
        folder = args.work / name
        command = [sys.executable, "-m", "vmix.train", *COMMON, *RUNS[name], *more]
        command += [
            f"--pretrained_model_name_or_path={args.base}",
            f"--labels={HERE / 'labels.toml'}",
            f"--output_dir={folder}",
            f"--cache_dir={args.work / 'cache'}",
        ]
        print(f"--- {name}", flush=True)
        if "--objective=text-pairs" in command:
            command.append(f"--prompts={prompts(args.work / 'prompts.txt')}")
        else:
            command += [*PICTURES, f"--train_data_dir={images}"]
        subprocess.run(command, check=True)
        for file, suffix in (("vmix", ""), ("vmix-lora", "-lora")):
            made = folder / f"{file}.safetensors"
            if made.exists():
                out = args.out or (DEMO if name == "adapter" else HERE)
                target = out / f"{name}{suffix}.safetensors"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(made, target)
                print(f"{target} {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
