"""What ends a training with a sentence."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence


class TrainingError(Exception):
    """What the user has to put right; the message says it, or lists it."""


class StoppedError(Exception):
    """Ctrl-C, or a polite request to end."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number
        """The signal."""


class OtherError(TrainingError):
    """Another process has the error, and says it."""


class DivergedError(TrainingError):
    """A loss or a gradient that is no number."""


class OutOfMemoryError(TrainingError):
    """The device's memory was not enough for a step, which has changed nothing."""


class CheckpointError(TrainingError):
    """No checkpoint could be written."""


def complain(title: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one error that lists the problems, or return when there are none."""
    if problems:
        more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
        raise TrainingError("\n  ".join([f"{title}:", *problems[:limit], *more]))


def no_memory(error: Exception) -> str:
    """What torch says of it in paragraphs, and what helps."""
    first = re.split(r"(?<=\.)\s", str(error).strip(), maxsplit=2)[:2]
    return (
        f"{' '.join(first)} Less is needed with --gradient_checkpointing, --cache_latents, "
        "--use_8bit_adam, or a smaller --train_batch_size, --rank or --resolution: "
        "docs/training.md has a table"
    )


def sentence(error: Exception) -> str:
    """What the error says, also where a worker process has wrapped it in its own traceback."""
    lines = str(error).strip().splitlines()
    if not any(line.startswith("Original Traceback") for line in lines):
        return str(error)
    return re.sub(r"^[\w.]+Error: ", "", lines[-1])
