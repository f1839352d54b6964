"""Where the models that measure are, and what to put where if they are not there."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vmix.eval.errors import EvalError
from vmix.eval.rows import digest

FOLDER = Path("~/.cache/vmix")
INCEPTION = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
)
"""As pytorch-fid and as torch-fidelity publish it: one file under two names."""
CLIP = "clip-vit-large-patch14"
AESTHETIC = (
    "sac+logos+ava1-l14-linearMSE.pth",
    "sac+logos+ava1-l14-linearMSE.safetensors",
)
METRICS = ("pixels", "fid", "clip", "aes")


@dataclass(frozen=True)
class Weights:
    """Paths of what there is, and why there is no more, a sentence by metric."""

    inception: Path | None
    clip: Path | None
    aesthetic: Path | None
    absent: dict[str, str]


def find_weights(args: argparse.Namespace, references: int) -> Weights:
    """EvalError for what was asked for, by name or by path, and is not there."""
    named: Path = args.weights or FOLDER
    folder = named.expanduser()
    for option in ("inception", "clip", "aesthetic"):
        given = getattr(args, option)
        if given is not None and not given.exists():
            raise EvalError(f"--{option} {given}: no such file or folder")
    inception = args.inception or _first(folder, INCEPTION)
    clip = args.clip or _first(folder, (CLIP,))
    aesthetic = args.aesthetic or _first(folder, AESTHETIC)
    absent = {}
    if inception is None:
        absent["fid"] = (
            f"FID needs Inception's weights: put {INCEPTION[0]} (of pytorch-fid's release "
            f"fid_weights on GitHub) into {named}, or give --inception FILE"
        )
    elif references < 2:
        absent["fid"] = (
            "FID needs reference images: give --reference FOLDER, or --prompts with a folder "
            "that has images"
        )
    elif not (find_spec("torchmetrics") and find_spec("torch_fidelity")):
        absent["fid"] = (
            "FID needs torchmetrics and torch-fidelity: pip install 'vmix-adapter[eval]'"
        )
    if clip is None:
        absent["clip"] = (
            f"the CLIP score needs CLIP: put the folder {CLIP} (openai/clip-vit-large-patch14, "
            f"or one of open_clip) into {named}, or give --clip FOLDER"
        )
    if aesthetic is None or clip is None:
        missing = [] if clip else [f"the folder {CLIP}"]
        missing += [] if aesthetic else [f"{AESTHETIC[0]} (improved-aesthetic-predictor on GitHub)"]
        absent["aes"] = (
            f"the Aes score needs CLIP ViT-L/14 and LAION's predictor: put {' and '.join(missing)} "
            f"into {named}, or give --clip FOLDER and --aesthetic FILE"
        )
    wanted = args.metrics
    for metric in wanted or ():
        if metric in absent:
            raise EvalError(absent[metric])
    skipped = [] if wanted is None else [m for m in METRICS if m not in wanted]
    return Weights(
        None if "fid" in absent or "fid" in skipped else inception,
        None if "clip" in absent else clip,
        None if "aes" in absent or "aes" in skipped else aesthetic,
        {metric: why for metric, why in absent.items() if metric not in skipped},
    )


def is_standard(inception: Path) -> bool:
    """Whether it is the file that published numbers are made with: its name has its digest."""
    return digest(inception).startswith("6726825d")


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)
