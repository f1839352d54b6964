"""The command line of `vmix label`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vmix.label.choice import BY_DIMENSION, CLIP_IQA, LAION, Pair, Quantiles
from vmix.label.pixels import DETAIL, WHOLE

DESCRIPTION = """\
Score images by measures and label the ends of each: the lowest share as negative, the highest as
positive, the rest as unknown. Writes aesthetics.jsonl into the set, which training reads, and a
contact sheet per label to look at. Labels that the images bring along (metadata.jsonl, side-cars,
shards) are not touched and win over these.

Edit `aesthetics` in aesthetics.jsonl where a label is wrong: what was edited survives the next run.
Scores are kept in it too, so that another cut takes no time."""

EPILOG = """\
These labels are automatic, and crude: a measure is not a judge. The paper's images were selected
and labelled partly by people. Look at the sheets before training.

Examples:

  vmix label images

  vmix label images --labels labels.toml --quantiles 0.2,0.8 --quantiles "sharp focus=0.5,0.7"

  vmix label "shards/train-*.tar" --clip-iqa clip-vit-large-patch14
  --pair "calm mood=a calm picture|a hectic picture" """


def parser() -> argparse.ArgumentParser:
    measures = ", ".join((*WHOLE, *DETAIL, CLIP_IQA, LAION))
    defaults = ", ".join(f"{dimension}: {name}" for dimension, name in BY_DIMENSION.items())
    made = argparse.ArgumentParser(
        "vmix label",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("data", type=Path, metavar="DATA", help="A folder of images with metadata.jsonl or "
        "side-cars, or .tar shards of webdataset (a folder, a file or a pattern).")  # fmt: skip
    add("-L", "--labels", type=Path, metavar="FILE",
        help="A labels.toml. Without it, the seven default labels.")  # fmt: skip
    add("--quantiles", type=_quantiles, action="append", default=[], metavar="[LABEL=]LOW,HIGH",
        help="Shares of the set where labels are cut: 0.3,0.7 unless given. With LABEL= for one "
        "label; may be repeated.")  # fmt: skip
    add("--measure", type=_measure, action="append", default=[], metavar="LABEL=MEASURE",
        help=f"What a label is cut by: {measures}; a minus before it where lower is better. May be "
        f"repeated. Without it, the label's dimension decides: {defaults}; where that is taken or "
        f"missing, {CLIP_IQA}.")  # fmt: skip
    add(f"--{CLIP_IQA}", type=Path, metavar="DIR", help="Folder of a CLIP in transformers' layout, "
        "for pairs of texts.")  # fmt: skip
    add("--pair", type=_pair, action="append", default=[], metavar="LABEL=POSITIVE|NEGATIVE",
        help=f"The two texts of a label for {CLIP_IQA}. Without it, the label's positive text and "
        "a contrary for its dimension. May be repeated.")  # fmt: skip
    add(f"--{LAION}", type=Path, metavar="DIR", help="Folder of CLIP ViT-L/14 in transformers' "
        "layout together with the head of LAION's aesthetic predictor.")  # fmt: skip
    add("--resolution", type=_count, default=512, metavar="PIXELS",
        help="What will be trained at: sharpness is measured at this scale. Default 512; "
        "1024 for SDXL.")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="Folder of the contact sheets. Without it, "
        "DATA-aesthetics, beside the set.")  # fmt: skip
    add("--rescore", action="store_true", help="Score anew what has scores.")
    add("--workers", type=_count, default=os.cpu_count() or 1, metavar="N",
        help="Images that are decoded at a time; as many as processors unless given.")  # fmt: skip
    return made


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv)


def _quantiles(text: str) -> tuple[str, Quantiles]:
    """("", …) for all labels."""
    label, _, shares = text.rpartition("=")
    try:
        low, high = (float(share) for share in shares.split(","))
    except ValueError:
        low = high = -1.0
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"expected [LABEL=]LOW,HIGH within 0..1, found '{text}'")
    return label, (low, high)


def _measure(text: str) -> tuple[str, str]:
    label, _, measure = text.rpartition("=")
    if not label or not measure:
        raise argparse.ArgumentTypeError(f"expected LABEL=MEASURE, found '{text}'")
    return label, measure


def _pair(text: str) -> tuple[str, Pair]:
    label, _, texts = text.partition("=")
    positive, _, negative = (part.strip() for part in texts.partition("|"))
    if not label or not positive or not negative:
        raise argparse.ArgumentTypeError(f"expected LABEL=POSITIVE|NEGATIVE, found '{text}'")
    return label, (positive, negative)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found '{text}'")
    return int(text)
