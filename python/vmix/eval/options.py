"""The command line of `vmix eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmix.eval.errors import complain
from vmix.eval.pipelines import DTYPES
from vmix.eval.weights import FOLDER, METRICS


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "vmix eval",
        description="Compare adapters, strengths and baselines on prompts, by the paper's "
        "protocol: DDIM, 25 steps, guidance 7.5, no negative prompt. docs/evaluating.md says more.",
        epilog="The same command goes on where it was stopped. On several GPUs: "
        "accelerate launch -m vmix.eval …",
    )
    _compared(made.add_argument_group("what is compared"))
    _drawn(made.add_argument_group("what is drawn"))
    _measured(made.add_argument_group("how it is measured"))
    _chosen(made.add_argument_group("preference"))
    return made


def _compared(group: Any) -> None:
    add = group.add_argument
    add("--rows", type=Path, metavar="FILE", help="YAML file with the rows and tables; else the "
        "flags below say what they are.")  # fmt: skip
    add("--base", help="The base: a .safetensors file as ComfyUI loads, a diffusers folder, or a "
        "repository of the hub.")  # fmt: skip
    add("--adapter", type=Path, help="A VMix adapter or preset.")
    add("--selection", type=_names, help="Labels, as A,B or A=0.5,B=1; all unless given.")
    add("--scales", type=_numbers, default=[1.0], help="λ of the rows with it, as 0.5,1,1.5,2.")
    add("--lora", type=Path, help="A LoRA: rows with it alone, and beside the adapter.")
    add("--lora-scale", type=float, default=1.0)
    add("--freeu", action="store_true", help="A row with FreeU on the base.")


def _drawn(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, required=False, help="Folder for pictures and results.")
    add("--prompts", type=Path, help="A text file with a prompt on each line; a folder like "
        "MJHQ-30K's; or a set of images with captions.")  # fmt: skip
    add("--limit", type=int, help="Only the first N prompts.")
    add("--samples", type=int, default=1, help="Pictures for each prompt.")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=25)
    add("--guidance", type=float, default=7.5)
    add("--size", type=int, help="Side in pixels; the base's own unless given.")
    add("--batch-size", type=int, default=8)
    add("--dtype", choices=tuple(DTYPES), help="f16 on GPUs, else f32, unless given.")
    add("--remake", action="store_true", help="Make pictures anew that were made with other "
        "settings, instead of refusing.")  # fmt: skip


def _measured(group: Any) -> None:
    add = group.add_argument
    add("--metrics", type=_metrics, help=f"Some of {','.join(METRICS)}, all needed; else those "
        "whose weights are there.")  # fmt: skip
    add("--reference", type=Path, help="Images for FID; those of --prompts unless given.")
    add("--weights", type=Path, metavar="FOLDER", help=f"Where weights are looked for; {FOLDER}.")
    add("--inception", type=Path, metavar="FILE", help="Inception's, for FID.")
    add("--clip", type=Path, metavar="FOLDER", help="CLIP, of transformers or open_clip.")
    add("--aesthetic", type=Path, metavar="FILE", help="LAION's predictor, for the Aes score.")


def _chosen(group: Any) -> None:
    add = group.add_argument
    add("--preference", nargs=2, metavar=("A", "B"), help="Write preference.html, on which people "
        "choose between two rows; without --prompts, of the pictures that --out has.")  # fmt: skip
    add("--pairs", type=int, default=300, help="Pairs on the page, as in the paper.")
    add("--tally", type=Path, nargs="+", metavar="FILE", help="Sum up what the page exported, and "
        "nothing else.")  # fmt: skip


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> Any:
    if text in ("all", "none"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if "=" not in text:
        return parts
    pairs = [part.rpartition("=") for part in parts]
    return {
        name if sign else weight: float(weight) if sign else 1.0 for name, sign, weight in pairs
    }


def _metrics(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser().parse_args(argv)
    if args.tally:
        return args
    problems = []
    if args.out is None:
        problems.append("--out is missing")
    elif args.out.exists() and not args.out.is_dir():
        problems.append(f"--out {args.out} is not a folder")
    if args.prompts is None and not (args.preference and args.out):
        problems.append("--prompts is missing")
    if args.prompts and args.rows is None and args.base is None:
        problems.append("--base is missing, or --rows")
    if args.rows:
        flags = [n for n in ("adapter", "selection", "lora", "freeu") if getattr(args, n)]
        if flags:
            problems.append(f"--rows says what is compared; leave --{', --'.join(flags)} out")
    elif args.selection and not args.adapter:
        problems.append("--selection needs --adapter")
    for key in ("limit", "samples", "steps", "size", "batch_size", "pairs"):
        value = getattr(args, key)
        if value is not None and value < 1:
            problems.append(f"--{key.replace('_', '-')} {value} is not positive")
    complain("arguments", problems)
    return args
