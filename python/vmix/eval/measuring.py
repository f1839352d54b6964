"""Measuring rows once: what a metric says of the same files is kept beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from vmix.eval.errors import EvalError, one_line
from vmix.eval.metrics import Metric, Values
from vmix.eval.pictures import Gallery
from vmix.eval.rows import Row


def measure_rows(
    gallery: Gallery, rows: Sequence[Row], metrics: Sequence[Metric]
) -> dict[str, Values]:
    """Columns by row, in the order of the metrics."""
    found: dict[str, Values] = {row.name: {} for row in rows}
    total = len(rows) * len(metrics) * len(gallery.prompts)
    with tqdm(total=total, desc="measuring", unit="img") as bar:
        for metric in metrics:
            for row in rows:
                paths = gallery.paths(row)
                place = gallery.folder / "measured" / row.folder / f"{metric.name}.json"
                key = f"{metric.key()} {_state(paths)}"
                values = _kept(place, key)
                if values is None:
                    values = metric.measure(paths, gallery.prompts, bar.update)
                    columns = {name: column.tolist() for name, column in values.items()}
                    write_json(place, {"key": key, "values": columns})
                else:
                    bar.update(len(paths))
                found[row.name] |= values
    return found


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise EvalError(f"{path} could not be written: {one_line(error)}") from error


def _state(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _kept(path: Path, key: str) -> Values | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            return {n: np.array(v, dtype=np.float64) for n, v in content["values"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or something that has to be measured again
    return None
