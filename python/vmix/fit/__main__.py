"""The command `vmix fit`: an adapter from words, for a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vmix import Adapter, VMixError
from vmix.fit.errors import FitError
from vmix.fit.labels import LABEL_SETS, FitLabel, read_labels
from vmix.fit.prompts import EVERY, bare, read_prompts
from vmix.fit.report import Effect, table
from vmix.fit.result import check_rank

DESCRIPTION = """\
Fit labels on a checkpoint from their words, and write the adapter.

A few prompts are drawn. What a label's words would change in every cross-attention layer is found
by least squares: forward passes alone, in the memory that drawing takes. The adapter is for this
checkpoint; on others of the same family it does roughly the same. docs/fitting.md says more."""

EPILOG = """\
Ctrl-C stops. Run the same command again to resume.

Examples:

  vmix fit --base dreamshaper.safetensors --out my.safetensors

  vmix fit --base sdxl.safetensors --label "light: bright | dark" --label "calm: calm mood"
  --out light.safetensors --preview light.png

  vmix fit --base turbo.safetensors --labels mine.toml --steps 4 --guidance 0
  --out my.safetensors """

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "vmix fit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("-b", "--base", required=True, metavar="CHECKPOINT", help="A .safetensors file as "
        "ComfyUI loads it, SD1.5 or SDXL; or a folder of a diffusers pipeline.")  # fmt: skip
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="The adapter to write.")
    add("-f", "--force", action="store_true", help="Replace it if there is one.")
    words = made.add_mutually_exclusive_group()
    words.add_argument("-L", "--labels", metavar="FILE", help="A fit_labels.toml, or a built-in "
        f"set: {', '.join(LABEL_SETS)} (default: default).")  # fmt: skip
    words.add_argument("-l", "--label", action="append", default=[], metavar="LABEL", help="A "
        'label as "NAME", "NAME: WORDS" or "NAME: WORDS | OPPOSITE WORDS"; may be '
        "repeated.")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="A prompt on each line; {words} is where a "
        "label's words go, else they are appended (default: forty built-in ones).")  # fmt: skip
    add("--steps", type=int, default=8, help="Sampling steps for each prompt (default: 8).")
    add("--guidance", type=float, help="Guidance scale that you draw with; 0 or 1 for models used "
        "without guidance (default: the pipeline's own).")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", help="The negative prompt that you draw with.")
    add("--clip-skip", type=int, metavar="N", help="Layers of the text encoder to skip, as "
        "diffusers counts: 1 is what ComfyUI calls -2.")  # fmt: skip
    add("--rank", type=_rank, default=4, metavar="N|bias", help="Value rows for each side of a "
        "label (default: 4); bias is one row that is equal for all tokens.")  # fmt: skip
    add("--size", type=int, metavar="PIXELS", help="Width and height of the pictures (default: "
        "the base's own).")  # fmt: skip
    add("--batch-size", type=int, default=1, help="Pictures drawn at once (default: 1).")
    add("--seed", type=int, default=0, help="Of the noise (default: 0).")
    add("--preview", type=Path, metavar="FILE", help="Also draw a grid of every label at several "
        "weights: two pictures, and eight for each label.")  # fmt: skip
    add("--device", help="cuda, mps, cpu … (default: a GPU if there is one).")
    add("--dtype", choices=tuple(DTYPES), help="Precision of the base (default: f16 on a GPU, f32 "
        "on a CPU).")  # fmt: skip
    add("--offload", action="store_true", help="Keep on the GPU only the model that computes.")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="What the base predicts, "
        "if its file does not say.")  # fmt: skip
    return made


def _rank(text: str) -> Any:
    if text == "bias":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number or bias, found {text!r}")
    return int(text)


def typed_label(text: str) -> FitLabel:
    """NAME, NAME: WORDS or NAME: WORDS | OPPOSITE WORDS"""
    name, colon, words = text.partition(":")
    positive, bar, negative = (words if colon else name).partition("|")
    return FitLabel(name.strip(), (positive.strip(),), (negative.strip(),) if bar else ())


def fit(args: argparse.Namespace) -> None:
    # What is wrong with the arguments is said before a base is loaded.
    if args.out.is_dir():
        raise FitError(f"--out {args.out}: expected a file, found a folder")
    if args.out.exists() and not args.force:
        raise FitError(f"{args.out}: exists; --force replaces it")
    for path in (args.out, args.preview):
        if path is not None and not path.parent.is_dir():
            raise FitError(f"{path}: no folder {path.parent}")
    if args.preview and args.preview.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise FitError(f"--preview {args.preview}: expected a .png, .jpg or .webp file")
    for key in ("steps", "batch_size", "size"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise FitError(f"--{key.replace('_', '-')}: expected 1 or more, found {value}")
    if args.size and args.size % 8:
        raise FitError(f"--size: expected a multiple of 8, found {args.size}")
    check_rank(args.rank, 77)
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise FitError(f"--guidance: expected a finite number, found {args.guidance}")
    labels = read_labels([*map(typed_label, args.label)] or args.labels or "default")
    prompts = read_prompts(args.prompts)

    from vmix.diffusers import fit_vmix

    pipe = _load(args)
    sums = _sums(args.out)
    if sums.exists():
        print(f"resuming from {sums}")
    made = {"base": Path(args.base).name, **_hash(Path(args.base))}
    adapter = fit_vmix(
        pipe,
        labels,
        prompts,
        args.steps,
        args.guidance,
        args.rank,
        height=args.size,
        width=args.size,
        seed=args.seed,
        batch_size=args.batch_size,
        call=_call(args),
        sums=sums,
        made=made,
    )
    adapter.save(args.out)
    sums.unlink(missing_ok=True)
    print(table({label.name: Effect(label.effect) for label in adapter.labels}))
    for warning in adapter.made.get("warnings", ()):
        print(f"warning: {warning}")
    if skipped := adapter.made.get("prompts_too_long"):
        print(f"left out, too long for the text encoder: {skipped} of the prompts")
    print(f"see {args.out}")
    if args.preview:
        try:
            _preview(args, pipe, adapter, prompts)
        except KeyboardInterrupt:
            raise _stopped(f"stopped before {args.preview} was drawn") from None


def _preview(args: argparse.Namespace, pipe: Any, adapter: Adapter, prompts: Sequence[str]) -> None:
    from vmix.diffusers.preview import draw_preview

    checks = [bare(prompt) for prompt in prompts[EVERY - 1 :: EVERY]]
    grid = draw_preview(
        pipe,
        adapter,
        (checks or [bare(prompts[-1])])[:2],
        guidance_scale=args.guidance,
        steps=max(args.steps, 20) if args.steps >= 8 else args.steps,
        size=args.size,
        batch_size=args.batch_size,
        seed=args.seed,
        call=_call(args),
    )
    grid.save(args.preview)
    print(f"see {args.preview}")


def _call(args: argparse.Namespace) -> dict[str, Any]:
    """Further arguments of the pipeline's call."""
    given = {"negative_prompt": args.negative_prompt, "clip_skip": args.clip_skip}
    return {name: value for name, value in given.items() if value is not None}


def _load(args: argparse.Namespace) -> Any:
    import diffusers
    import transformers

    from vmix.train.errors import TrainingError
    from vmix.train.single_file import load_pipeline

    # Settings that a base needs are warned of as old.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    device = args.device or _default_device()
    dtype = DTYPES[args.dtype or ("f32" if device == "cpu" else "f16")]
    try:
        pipe = load_pipeline(args.base, prediction_type=args.prediction_type, dtype=dtype)
    except TrainingError as error:
        raise FitError(f"--base: {error}") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FitError(f"--base {args.base}: {' '.join(str(error).split())}") from error
    try:
        if args.offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise FitError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return pipe


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _hash(base: Path) -> dict[str, str]:
    """SHA-256 of a single file, or of a folder's U-Net."""
    unet = base / "unet"
    files = [base] if base.is_file() else sorted(unet.glob("*.safetensors"))
    if not files:
        return {}
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**24):
                found.update(block)
    return {"base_sha256": found.hexdigest()}


def _sums(out: Path) -> Path:
    """Where what was collected is kept meanwhile."""
    return out.with_name(f"{out.name}.sums")


def _stopped(what: str) -> SystemExit:
    print(f"\nvmix fit: {what}", file=sys.stderr)
    return SystemExit(130)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C stops, wherever it comes. Python drops what is raised in a finalizer: so it is raised
    once more after a second."""

    def interrupt(*_: Any) -> None:
        signal.alarm(1)
        raise KeyboardInterrupt

    if not hasattr(signal, "alarm") or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGALRM)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logger = logging.getLogger("vmix")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it warns of is printed below the table
    try:
        with _interruptible():
            fit(args)
    except (FitError, VMixError) as error:
        raise SystemExit(f"vmix fit: {error}") from None
    except torch.OutOfMemoryError as error:
        first = " ".join(re.split(r"(?<=\.)\s", str(error).strip(), maxsplit=2)[:2])
        raise SystemExit(
            f"vmix fit: {first} Less is needed with --offload, --dtype f16, a smaller --size or "
            "--batch-size, or fewer labels"
        ) from None
    except OSError as error:
        raise SystemExit(f"vmix fit: {error}") from None
    except KeyboardInterrupt:
        saved = _sums(args.out).exists()
        how = "Run the same command again to resume" if saved else "Nothing was saved yet"
        raise _stopped(f"stopped. {how}") from None
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    main()
