"""Pairwise preference, the paper's user study: a page to choose on, and the sum of its exports."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Sequence
from importlib.resources import files
from math import sqrt
from pathlib import Path
from typing import Any

from PIL import Image

from vmix.eval.errors import EvalError, complain, one_line
from vmix.eval.measuring import write_text
from vmix.eval.pictures import origin_of
from vmix.eval.results import markdown
from vmix.eval.rows import Row

LARGE = 64 * 2**20
"""Bytes of pictures from which on the page has them as WebP."""
FORMAT = "vmix.preference"


def write_page(folder: Path, names: Sequence[str], limit: int, seed: int) -> Path:
    """`preference.html` with pictures of two rows that `vmix eval` has made in the folder."""
    pairs = _pairs(folder, names)
    random.Random(seed).shuffle(pairs)
    pairs = sorted(pairs[:limit])
    large = sum(file.stat().st_size for _, _, both in pairs for file in both) > LARGE
    data: dict[str, Any] = {
        "rows": list(names),
        "pairs": [
            {"index": i, "prompt": prompt, "images": [_as_url(file, large) for file in both]}
            for i, prompt, both in pairs
        ],
    }
    # What is chosen is kept in the browser under this name, so another page begins anew.
    page = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    content = json.dumps({"page": page, **data}, ensure_ascii=False).replace("<", "\\u003c")
    template = files("vmix.eval").joinpath("preference.html").read_text(encoding="utf-8")
    path = folder / "preference.html"
    write_text(path, template.replace("__DATA__", content))
    return path


def _pairs(folder: Path, names: Sequence[str]) -> list[tuple[int, str, list[Path]]]:
    """(index, prompt, the two files) of everything that both rows have, of one noise."""
    places = [folder / "images" / Row(name, "").folder for name in names]
    if len(set(places)) != 2:
        raise EvalError(f"--preference: expected two rows, found {names[0]!r} twice")
    for name, place in zip(names, places, strict=True):
        if not place.is_dir():
            made = sorted(p.name for p in place.parent.glob("*")) if place.parent.is_dir() else []
            raise EvalError(
                f"--preference: {folder} has no pictures of {name!r}; it has "
                f"{', '.join(made) or 'none at all'}"
            )
    pairs, problems = [], []
    for file in sorted(places[0].glob("*.png")):
        both = [place / file.name for place in places]
        if not both[1].is_file():
            continue
        origins = [origin_of(path) for path in both]
        if not all(origins):
            problems.append(f"{file.name} is no picture that vmix eval made")
            continue
        first, second = (origin or {} for origin in origins)
        differ = [key for key in ("prompt", "seed", "size") if first.get(key) != second.get(key)]
        if differ:
            problems.append(f"{file.name}: the rows differ in {' and '.join(differ)}")
            continue
        pairs.append((int(file.stem), str(first["prompt"]), both))
    complain("--preference", problems)
    if not pairs:
        raise EvalError(
            f"--preference: the two rows have no picture of the same prompt in {folder}"
        )
    return pairs


def _as_url(file: Path, large: bool) -> str:
    """Without what it was made with: who chooses must not know."""
    content, kind = io.BytesIO(), "webp" if large else "png"
    try:
        with Image.open(file) as image:
            plain = image.convert("RGB")
    except OSError as error:
        raise EvalError(f"{file}: {one_line(error)}") from error
    plain.save(content, format=kind, **({"quality": 92} if large else {}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def tally(exports: Sequence[Path]) -> str:
    """The choices of all exports as a table; Wilson's 95 % interval of the decided ones."""
    rows: list[str] = []
    page, counts, problems = None, dict[str, int](), list[str]()
    for file in exports:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            choices = [str(choice["choice"]) for choice in content["choices"]]
            found = [str(name) for name in content["rows"]]
            unknown = set(choices) - {*found, "tie"}
            if len(found) != 2 or unknown:
                raise ValueError(f"choices are of {found}, and one is {min(unknown, default='')!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{file} is no export of a preference page: {one_line(error)}")
            continue
        if page not in (None, content["page"]):
            problems.append(f"{file} is of another page than the first")
            continue
        page, rows = content["page"], found
        for choice in choices:
            counts[choice] = counts.get(choice, 0) + 1
    complain("--tally", problems)
    first, second = (counts.get(name, 0) for name in rows)
    decided = first + second
    lines = [
        [rows[0], str(first), _share(first, decided)],
        [rows[1], str(second), _share(second, decided)],
    ]
    lines.append(["no difference", str(counts.get("tie", 0)), ""])
    people = f"{len(exports)} export{'s' if len(exports) > 1 else ''}"
    return f"{people}\n\n{markdown(['', 'choices', 'of those decided'], lines)}"


def _share(count: int, total: int) -> str:
    if not total:
        return "—"
    z, share = 1.96, count / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return f"{share:.0%} [{middle - half:.0%}, {middle + half:.0%}]"
