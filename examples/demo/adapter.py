"""Train the demo's adapter, and the two LoRAs that the report compares it with.

    python examples/demo/adapter.py

The pictures are drawn anew (examples/demo/base/data.py), with another seed than the base model's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "comfy_nodes" / "demo"  # what the node pack brings along
CACHE = Path.home() / ".cache" / "vmix-demo"

DATA = ["--count=2400", "--seed=1"]
COMMON = [
    "--train_batch_size=32",
    "--cache_latents",
    "--lr_scheduler=cosine",
    "--lr_warmup_steps=20",
    "--text_dropout=0.1",
    "--report_to=none",
    "--checkpointing_steps=250",
    "--resume_from_checkpoint=latest",
    "--license=CC-BY-4.0",
    "--author=vmix-adapter contributors",
    "--seed=0",
]
VMIX = ["--learning_rate=1e-2", "--max_train_steps=1000", "--rank=0"]
LORA = ["--lora_learning_rate=2e-4", "--rank=4"]
RUNS = {
    "adapter": [*VMIX, "--apply_to=cond", "--title=VMix demo adapter"],
    # For the report: the other way to train the unconditional pass, and the paper's table 3.
    "ablation/both": [*VMIX, "--apply_to=both", "--title=VMix demo adapter, both"],
    "ablation/joint": [*VMIX, *LORA, "--apply_to=cond"],
    "ablation/only": [*LORA, "--learning_rate=2e-4", "--max_train_steps=1000", "--no_vmix"],
}


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
            f"--train_data_dir={images}",
            f"--labels={HERE / 'labels.toml'}",
            f"--output_dir={folder}",
            f"--cache_dir={args.work / 'cache'}",
        ]
        print(f"--- {name}", flush=True)
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
