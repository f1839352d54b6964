"""The prompts of a fit, and where a label's words go in them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vmix.fit.errors import FitError
from vmix.fit.labels import FitLabel

__all__ = ["PROMPTS", "Plan", "Prompts", "Side", "bare", "read_prompts", "with_words"]

Prompts: TypeAlias = str | os.PathLike[str] | Sequence[str] | None
"""A text file with a prompt on each line, or the prompts; None for those of the package."""

PROMPTS = Path(__file__).with_name("prompts.txt")
PLACE = "{words}"
"""Where in a prompt a label's words go."""
EVERY = 4
"""Every fourth prompt is kept for checking."""


def read_prompts(prompts: Prompts = None) -> tuple[str, ...]:
    """Prompts without those that come twice."""
    if prompts is None:
        prompts = PROMPTS
    if isinstance(prompts, (str, os.PathLike)):
        path = Path(prompts)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise FitError(f"{path}: not a text file in UTF-8: {error}") from None
        except OSError as error:
            raise FitError(f"{path}: {error.strerror}. Expected a file of prompts") from None
        prompts = [line for line in lines if not line.startswith("#")]
    if not isinstance(prompts, Sequence) or not all(isinstance(one, str) for one in prompts):
        raise FitError(f"prompts: expected a file or a list of texts, found {prompts!r}")
    found = tuple(dict.fromkeys(prompt.strip() for prompt in prompts if prompt.strip()))
    for prompt in found:
        for place in re.findall(r"\{\w*\}", prompt):
            if place != PLACE:
                raise FitError(f"prompt {prompt!r}: expected no place but {PLACE}, found {place}")
    if len(found) < 2:
        raise FitError(
            "prompts: expected at least 2 different ones, one of them to check with; found "
            f"{len(found)}"
        )
    return found


def with_words(prompt: str, words: str) -> str:
    """The prompt with a label's words in it: at `{words}`, else at its end."""
    if PLACE in prompt:
        return prompt.replace(PLACE, words)
    return f"{prompt.rstrip(' ,.')}, {words}"


def bare(prompt: str) -> str:
    """The prompt without any label's words, as it is drawn."""
    if PLACE not in prompt:
        return prompt
    text = re.sub(r"\s*,\s*(?=,|$)|^\s*,\s*", "", prompt.replace(PLACE, ""))
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip()


@dataclass(frozen=True)
class Side:
    """One side of a label, and the prompts that its words fit into."""

    label: str
    side: str
    phrasings: tuple[str, ...]
    prompts: tuple[int, ...]


class Plan:
    """Which prompts are drawn, and with which words each is compared.

    A prompt that is too long for one chunk of the text encoder is left out; so is a pair of prompt
    and side where the words do not fit.
    """

    def __init__(
        self,
        labels: Sequence[FitLabel],
        prompts: Sequence[str],
        count: Callable[[str], int],
        context_tokens: int,
    ) -> None:
        """`count` gives a text's tokens, without those of start and end."""
        longest = context_tokens - 2
        self.labels = tuple(labels)
        lengths = {prompt: count(bare(prompt)) for prompt in prompts}
        self.too_long = tuple(prompt for prompt in prompts if lengths[prompt] > longest)
        self.prompts = tuple(prompt for prompt in prompts if lengths[prompt] <= longest)
        self.lengths = tuple(lengths[prompt] for prompt in self.prompts)
        if len(self.prompts) < 2:
            raise FitError(
                f"prompts: expected at least 2 of at most {longest} tokens, found "
                f"{len(self.prompts)} among {len(prompts)}"
            )
        self.sides = tuple(
            Side(
                label.name,
                side,
                phrasings,
                tuple(
                    i
                    for i, prompt in enumerate(self.prompts)
                    if all(count(with_words(prompt, words)) <= longest for words in phrasings)
                ),
            )
            for label in self.labels
            for side, phrasings in label.sides.items()
        )
        for side in self.sides:
            checks = sum(map(self.checks, side.prompts))
            if not checks or checks == len(side.prompts):
                raise FitError(
                    f"label {side.label!r}: its {side.side} words fit into {len(side.prompts)} of "
                    f"{len(self.prompts)} prompts, which is too few: expected shorter words or "
                    f"prompts, at most {longest} tokens together"
                )
        # Sides that are compared on the same prompts share the moments of the attention.
        self.groups = tuple(dict.fromkeys(side.prompts for side in self.sides))

    def checks(self, prompt: int) -> bool:
        """Whether it is one to check with."""
        count = len(self.prompts)
        return prompt % EVERY == EVERY - 1 if count >= EVERY else prompt == count - 1

    @property
    def largest_group(self) -> int:
        """The one with most prompts, which tells most of how the base attends."""
        return max(range(len(self.groups)), key=lambda group: len(self.groups[group]))

    def group(self, side: Side) -> int:
        return self.groups.index(side.prompts)

    def words(self, prompt: int) -> list[tuple[int, str]]:
        """The texts that a prompt is compared with: position of the side, and the text."""
        return [
            (i, with_words(self.prompts[prompt], words))
            for i, side in enumerate(self.sides)
            if prompt in side.prompts
            for words in side.phrasings
        ]
