"""From values per picture to results.json and results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmix.eval.metrics import BETTER, FID, Values
from vmix.eval.pictures import Gallery
from vmix.eval.rows import Comparison, Row, Table

DRAWS = 4000
FEW = 10_000
"""Pictures below which FID is known to be far too high: it is fitted to 2,048 dimensions."""
Interval = dict[str, float | None]


def interval(values: NDArray[np.float64]) -> Interval:
    """Mean and 95 % bootstrap interval; pictures without a value (no object) are left out."""
    values = values[np.isfinite(values)]
    count = len(values)
    if not count:
        return {"mean": None, "low": None, "high": None, "n": 0}
    random = np.random.default_rng(0)
    rows = max(1, 2**22 // count)  # of as many draws at a time as memory allows
    means = [
        values[random.integers(count, size=(min(rows, DRAWS - start), count))].mean(1)
        for start in range(0, DRAWS, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": count}


def results(
    comparison: Comparison,
    gallery: Gallery,
    values: Mapping[str, Values],
    references: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    levels = {
        row: {name: interval(column) for name, column in columns.items()}
        for row, columns in values.items()
    }
    return {
        "pictures": len(gallery.prompts),
        "references": references,
        "protocol": {**vars(gallery.protocol), "batch_size": gallery.batch_size},
        "notes": list(notes),
        "rows": [
            {
                "name": row.name,
                "what": describe(row),
                "settings": row.settings(),
                "values": levels[row.name],
            }
            for row in comparison.rows
        ],
        "tables": [
            {
                "title": table.title,
                "rows": list(table.rows),
                "differences": _differences(table, values),
            }
            for table in comparison.tables
        ],
    }


def _differences(table: Table, values: Mapping[str, Values]) -> dict[str, dict[str, Interval]]:
    """Within pairs of pictures, same prompt and same noise, from the table's first row."""
    first = values[table.rows[0]]
    return {
        row: {
            name: interval(column - first[name])
            for name, column in values[row].items()
            if name != FID
        }
        for row in table.rows[1:]
    }


def text(result: Mapping[str, Any], rows: Sequence[Row], plots: Sequence[tuple[str, str]]) -> str:
    """results.md."""
    protocol = result["protocol"]
    levels = {row["name"]: row["values"] for row in result["rows"]}
    size = "the base's own size" if protocol["size"] is None else f"{protocol['size']} px"
    parts = [
        "# Results",
        f"{result['pictures']} pictures per row, {protocol['steps']} DDIM steps, guidance "
        f"{protocol['guidance']:g}, no negative prompt, {size}, {protocol['dtype']}, seed "
        f"{protocol['seed']}; prompt and noise of a picture are the same in all rows. Square "
        "brackets are 95 % bootstrap intervals over pictures; differences are from the first row, "
        "picture by picture.",
        *(["\n".join(f"- {note}" for note in result["notes"])] if result["notes"] else []),
    ]
    for table in result["tables"]:
        columns = list(levels[table["rows"][0]])
        header = ["", *(f"{name} {BETTER.get(name, '')}".strip() for name in columns)]
        lines = [
            [row, *(_number(levels[row][name]["mean"]) for name in columns)]
            for row in table["rows"]
        ]
        parts += [f"## {table['title']}", markdown(header, lines)]
        paired = [name for name in columns if name != FID]
        if table["differences"] and paired:
            lines = [
                [row, *(_cell(found[name]) for name in paired)]
                for row, found in table["differences"].items()
            ]
            first = table["rows"][0]
            parts += [f"Differences from {first}:", markdown(["", *paired], lines)]
    parts += [f"![{title}]({file})" for title, file in plots]
    parts += ["## Rows", "\n".join(f"- {row.name}: {describe(row)}" for row in rows)]
    return "\n\n".join(parts) + "\n"


def describe(row: Row) -> str:
    parts = [row.base.rstrip("/").rpartition("/")[2]]
    if row.adapter:
        labels = "" if row.selection is None else f", labels {_selection(row.selection)}"
        policy = f", {row.apply_to}" if row.apply_to else ""
        parts.append(f"VMix {row.adapter.name}{labels}, λ = {row.scale:g}{policy}")
    if row.lora:
        parts.append(f"LoRA {row.lora.name} at {row.lora_scale:g}")
    if row.freeu:
        values = "" if row.freeu is True else f" {_selection(row.freeu)}"
        parts.append(f"FreeU{values}")
    if row.embedding:
        parts.append(f"embedding {row.embedding.name}")
    if row.template != "{prompt}":
        parts.append(f"prompts as `{row.template}`")
    return "; ".join(parts)


def _selection(selection: Any) -> str:
    if isinstance(selection, Mapping):
        return ", ".join(f"{name} {weight:g}" for name, weight in selection.items())
    return selection if isinstance(selection, str) else ", ".join(selection)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    cells = [[cell.replace("|", "\\|") for cell in line] for line in [header, rule, *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "—"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def _cell(found: Interval) -> str:
    mean, low, high = (_number(found[key], "+") for key in ("mean", "low", "high"))
    return mean if found["mean"] is None else f"{mean} [{low}, {high}]"
