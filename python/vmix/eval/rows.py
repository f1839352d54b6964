"""The rows of a comparison: a base and what is added to it, from a YAML file or from flags."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vmix.eval.errors import EvalError, complain, one_line

PROMPT = "{prompt}"
FREEU: Mapping[str, Mapping[str, float]] = {
    "sd15": {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6},
    "sdxl": {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4},
}
"""What its authors recommend, by base."""


@dataclass(frozen=True)
class Row:
    name: str
    base: str
    """A file or folder, or a repository of the hub."""
    adapter: Path | None = None
    """A VMix adapter or preset."""
    selection: Any = None
    """Its labels: "all" unless given; a preset has none."""
    scale: float = 1.0
    """λ of eq. 9."""
    apply_to: str | None = None
    lora: Path | None = None
    lora_scale: float = 1.0
    freeu: Any = None
    """{s1, s2, b1, b2}, or True for those that are recommended."""
    embedding: Path | None = None
    """Of textual inversion."""
    token: str | None = None
    """The word that stands for it."""
    template: str = PROMPT
    """What {prompt} is put into."""

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        name = re.sub(r"\s*=\s*", "=", self.name)
        return re.sub(r"[^\w.+=-]+", "-", name).strip("-.")

    def text(self, prompt: str) -> str:
        return self.template.replace(PROMPT, prompt)

    def settings(self) -> dict[str, Any]:
        """All that pictures depend on; files by what is in them."""
        found: dict[str, Any] = {"base": base_digest(self.base)}
        if self.adapter:
            found |= {"adapter": digest(self.adapter), "selection": self.selection}
            found |= {"scale": self.scale, "apply_to": self.apply_to}
        if self.lora:
            found |= {"lora": digest(self.lora), "lora_scale": self.lora_scale}
        if self.embedding:
            found |= {"embedding": digest(self.embedding), "token": self.token}
        found |= {"freeu": self.freeu} if self.freeu else {}
        found |= {"template": self.template} if self.template != PROMPT else {}
        return found

    def files(self) -> list[Path]:
        return [file for file in (self.adapter, self.lora, self.embedding) if file]


@dataclass(frozen=True)
class Table:
    """Rows that are compared with the first of them."""

    title: str
    rows: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    rows: Sequence[Row]
    tables: Sequence[Table] = field(default_factory=tuple)


def check(comparison: Comparison) -> Comparison:
    """Everything about the rows that can be said without opening what they name."""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for row in comparison.rows:
        if not row.folder:
            problems.append(f"the name {row.name!r} has neither letters nor digits")
        elif row.folder.casefold() in seen:
            problems.append(
                f"{seen[row.folder.casefold()]!r} and {row.name!r} would share a folder"
            )
        seen[row.folder.casefold()] = row.name
        if row.embedding and not row.token:
            problems.append(f"row {row.name!r}: an embedding needs the token that stands for it")
        if row.embedding and row.token and row.token not in row.template:
            problems.append(f"row {row.name!r}: the template {row.template!r} lacks {row.token}")
        if PROMPT not in row.template:
            problems.append(f"row {row.name!r}: the template {row.template!r} lacks {PROMPT}")
        for file in row.files():
            if not file.is_file():
                problems.append(f"row {row.name!r}: no such file: {file}")
            elif file.suffix != ".safetensors":
                problems.append(f"row {row.name!r}: {file} is not a .safetensors file")
    names = [row.name for row in comparison.rows]
    for table in comparison.tables:
        unknown = [name for name in table.rows if name not in names]
        if unknown:
            problems.append(f"table {table.title!r}: there is no row {unknown[0]!r}")
    if not names:
        problems.append("there are no rows")
    complain("rows", problems)
    return comparison


def sweeps(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in λ alone, by λ; what they are without the adapter is their λ = 0."""
    groups: dict[Row, list[Row]] = {}
    bare = {_unnamed(row): row for row in reversed(rows) if not row.adapter}
    for row in rows:
        if row.adapter:
            groups.setdefault(_unnamed(row, scale=0.0), []).append(row)
    found = []
    for key, group in groups.items():
        group = list({row.scale: row for row in reversed(group)}.values())
        without = bare.get(replace(key, adapter=None, selection=None, apply_to=None, scale=1.0))
        if without and all(row.scale for row in group):
            group.append(replace(without, scale=0.0))
        if len(group) > 2:
            found.append(sorted(group, key=lambda row: row.scale))
    return found


def _unnamed(row: Row, **changes: Any) -> Row:
    hashable = {"selection": str(row.selection), "freeu": str(row.freeu)}
    if row.selection is None:
        hashable["selection"] = None  # type: ignore[assignment]
    return replace(row, name="", **{**hashable, **changes})


# --- from flags ----------------------------------------------------------------------------------


def rows_of_flags(args: argparse.Namespace) -> Comparison:
    base = Row("base", args.base)
    rows = [base]
    if args.freeu:
        rows.append(replace(base, name="FreeU", freeu=True))
    mixed = []
    if args.adapter:
        scales = [scale for scale in args.scales if scale != 0]  # the base, to the bit
        for scale in scales:
            name = f"VMix, λ = {scale:g}" if len(scales) > 1 else "VMix"
            selection = args.selection
            mixed.append(
                replace(base, name=name, adapter=args.adapter, scale=scale, selection=selection)
            )
    methods = list(rows)
    if args.lora:
        methods.append(replace(base, name="LoRA only", lora=args.lora, lora_scale=args.lora_scale))
    if mixed:
        one = min(mixed, key=lambda row: abs(row.scale - 1))
        methods.append(one)
        if args.lora:
            name = "VMix + LoRA" if one.scale == 1 else f"VMix + LoRA, λ = {one.scale:g}"
            methods.append(replace(one, name=name, lora=args.lora, lora_scale=args.lora_scale))
    rows = [*methods, *(row for row in mixed if row not in methods)]
    tables = []
    if len(mixed) > 1:
        tables.append(Table("Strength λ", [base.name, *(row.name for row in mixed)]))
    if args.freeu or args.lora or not tables:
        tables.insert(0, Table("Methods", [row.name for row in methods]))
    return check(Comparison([_with_defaults(row) for row in rows], tables))


def _with_defaults(row: Row) -> Row:
    """All labels positive where nothing is said of an adapter's; a preset's are in its values."""
    if row.adapter is None or row.selection is not None or not row.adapter.is_file():
        return row
    from vmix import Adapter, VMixError, open

    try:
        source = open(row.adapter)
    except (VMixError, OSError) as error:
        raise EvalError(f"row {row.name!r}: {one_line(error)}") from error
    return replace(row, selection="all") if isinstance(source, Adapter) else row


# --- from a YAML file ----------------------------------------------------------------------------


def rows_of_file(path: Path, base: str | None) -> Comparison:
    """`rows`, a list of what Row has, and `tables`, {title: names}; files relative to this one."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EvalError(f"--rows {path}: {one_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise EvalError(f"--rows {path}: expected `rows:` with a list of them")
    unknown = sorted(content.keys() - {"base", "rows", "tables"})
    problems = [f"there is no {key!r} beside rows" for key in unknown]
    default = base or content.get("base")
    if default is not None and base is None:
        default = _place(path.parent, str(default))
    rows = []
    for number, entry in enumerate(content["rows"], 1):
        try:
            rows.append(_row(entry, default, path.parent))
        except ValueError as error:
            name = entry.get("name") if isinstance(entry, dict) else None
            problems.append(f"row {name!r}: {error}" if name else f"row {number}: {error}")
    given = content.get("tables") or {}
    tables = []
    if not isinstance(given, dict) or not all(isinstance(names, list) for names in given.values()):
        problems.append("tables: expected {title: [names of rows]}")
    else:
        tables = [Table(str(title), [str(n) for n in names]) for title, names in given.items()]
    complain(f"--rows {path}", problems)
    if not tables:
        tables = [Table("All rows", [row.name for row in rows])]
    return check(Comparison([_with_defaults(row) for row in rows], tables))


KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "base", "apply_to", "token", "template"), (str,)),
    **dict.fromkeys(("adapter", "lora", "embedding"), (str,)),
    **dict.fromkeys(("scale", "lora_scale"), (int, float)),
    "selection": (str, list, dict),
    "freeu": (bool, dict),
}


def _row(entry: Any, base: str | None, folder: Path) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"expected `name:` and what the row adds to the base, found {entry!r}")
    known = [f.name for f in fields(Row)]
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"there is no {key!r}; known are {', '.join(known)}")
        kinds = KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = {
                str: "a text",
                int: "a number",
                list: "a list",
                dict: "a table",
                bool: "true",
            }
            words = " or ".join(expected[kind] for kind in kinds if kind is not float)
            raise ValueError(f"{key}: expected {words}, found {value!r}")
    if not entry.get("name"):
        raise ValueError("it has no name")
    own = dict(entry)
    own["base"] = _place(folder, own["base"]) if "base" in own else base
    if own["base"] is None:
        raise ValueError("neither it nor --base says what the base is")
    for key in ("adapter", "lora", "embedding"):
        if key in own:
            own[key] = Path(_place(folder, own[key]))
    if isinstance(own.get("freeu"), dict):
        freeu = own["freeu"]
        numbers = [
            v for v in freeu.values() if isinstance(v, (int, float)) and not isinstance(v, bool)
        ]
        if sorted(freeu) != ["b1", "b2", "s1", "s2"] or len(numbers) != 4:
            raise ValueError(f"freeu: expected numbers for s1, s2, b1 and b2, found {freeu!r}")
    return Row(**own)


def _place(folder: Path, name: str) -> str:
    """Relative to the YAML file if there is such a file; else as it is, for names of the hub."""
    path = Path(name).expanduser()
    return str(folder / path) if (folder / path).exists() else str(path)


# --- what files hold -----------------------------------------------------------------------------


def digest(path: Path) -> str:
    """Of all of a file."""
    try:
        stat = path.stat()
        return _digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise EvalError(f"{path}: {one_line(error)}") from error


@cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            found.update(part)
    return found.hexdigest()[:16]


def base_digest(base: str) -> str:
    """Of names, sizes and samples: bases are large. A repository of the hub is its name."""
    path = Path(base)
    if not path.exists():
        return base
    found = hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        if file.suffix not in (".safetensors", ".bin", ".json", ".txt"):
            continue  # a README says nothing about pictures
        size = file.stat().st_size
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        found.update(f"{name} {size}".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - 2**20)):
                opened.seek(place)
                found.update(opened.read(2**20))
    return found.hexdigest()[:16]
