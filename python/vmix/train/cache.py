"""Latents and text features on disk, so that they are computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PART = 256
"""Entries of a file."""


class Store:
    """Named tensors under keys, in the safetensors files of a folder.

    Files are written whole or not at all and never changed, so that a run that was stopped leaves
    what it had done, and several processes can write at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where: dict[str, tuple[Path, list[str]]] = {}
        self._opened: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Takes note of what is there now, by whomever it was written."""
        known = {file for file, _ in self.where.values()}
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in known:
                continue
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
            except (SafetensorError, OSError):
                continue  # not ours, or damaged: what it held is computed again
            for name in names:
                key, _, part = name.partition("/")
                self.where.setdefault(key, (file, []))[1].append(part)

    def __contains__(self, key: str) -> bool:
        return key in self.where

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        file, parts = self.where[key]
        if file not in self._opened:
            if len(self._opened) > 256:
                self._opened.clear()
            self._opened[file] = safe_open(file, framework="pt")
        opened = self._opened[file]
        return {part: opened.get_tensor(f"{key}/{part}") for part in parts}

    def __getstate__(self) -> dict[str, Any]:  # for worker processes
        return {**self.__dict__, "_opened": {}}

    def put(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Writes one file with all of the entries."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key_of(*entries)}.safetensors"
        part = file.with_suffix(f".{os.getpid()}.part")
        named = {
            f"{key}/{name}": tensor.detach().cpu().clone().contiguous()  # no views: they save all
            for key, tensors in entries.items()
            for name, tensor in tensors.items()
        }
        try:
            save_file(named, part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        for key, tensors in entries.items():
            self.where[key] = (file, list(tensors))


def key_of(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


def in_parts(items: Iterable[Any], size: int) -> list[list[Any]]:
    everything = list(items)
    return [everything[start : start + size] for start in range(0, len(everything), size)]


def store_texts(
    base: Any, store: Store, captions: Iterable[str], bar: Any, rank: int, world: int
) -> None:
    """Text features that are not there yet; each process does its part, whatever the others have
    written by now."""
    todo = [text for text in sorted(set(captions))[rank::world] if key_of(text) not in store]
    for part in bar(in_parts(todo, PART), desc="Captions"):
        entries: dict[str, dict[str, Tensor]] = {}
        for few in in_parts(part, 64):
            for caption, *both in zip(few, *base.text(few), strict=True):
                entries[key_of(caption)] = dict(zip(("context", "pooled"), both, strict=True))
        store.put(entries)
