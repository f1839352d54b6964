"""What ends an evaluation with a sentence."""

from __future__ import annotations

from collections.abc import Sequence


class EvalError(Exception):
    """What the user has to put right; the message says it, or lists it."""


class PictureError(EvalError):
    """One process of several could not make a picture; the others know nothing of it."""


def complain(title: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one error that lists the problems, or return when there are none."""
    if len(problems) == 1:
        raise EvalError(f"{title}: {problems[0]}")
    if problems:
        more = [f"… and {len(problems) - limit} more"] if len(problems) > limit else []
        raise EvalError("\n  ".join([f"{title}:", *problems[:limit], *more]))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
