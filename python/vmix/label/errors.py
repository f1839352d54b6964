"""What ends the command with a sentence."""

from __future__ import annotations


class LabelError(Exception):
    """What the user has to put right; the message says it."""
