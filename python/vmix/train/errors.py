"""What ends a training with a sentence."""

from __future__ import annotations

from collections.abc import Sequence


class TrainingError(Exception):
    """What the user has to put right; the message says it, or lists it."""


class StoppedError(Exception):
    """Ctrl-C, or a polite request to end."""


class CheckpointError(TrainingError):
    """No checkpoint could be written."""


def complain(title: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one error that lists the problems, or return when there are none."""
    if problems:
        more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
        raise TrainingError("\n  ".join([f"{title}:", *problems[:limit], *more]))
