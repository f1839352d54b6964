"""The README's Python, run as it stands."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vmix
from PIL import Image
from vmix.fit import read_labels

ROOT = Path(__file__).parents[2]


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for folder in ("comfy_nodes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    with Image.open("apple.png") as picture, Image.open("dark.png") as dark:
        assert picture.size == dark.size == (64, 64)
        assert np.asarray(dark).mean() < np.asarray(picture).mean() - 50
    assert vmix.Adapter.open("light.safetensors").made["method"] == "fitted"
    assert Path("vibrant.safetensors").stat().st_size > 1000


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (commands,) = [block for block in blocks if "vmix init" in block]
    for folder in ("comfy_nodes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    as_installed = f'vmix() {{ "{sys.executable}" -W ignore -m vmix "$@"; }}\n'
    script = "set -e\n" + as_installed + commands
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-5:] == [
        "new.safetensors: a valid init file",
        "light.safetensors: a valid adapter",
        "color.safetensors: a valid adapter",
        "preset.safetensors: a valid preset",
        "small.safetensors: a valid preset",
    ]


def test_the_fitting_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "fitting.md").read_text("utf-8")
    (python,), (toml,) = (
        re.findall(rf"```{x}\n(.*?)```", text, re.DOTALL) for x in ("python", "toml")
    )
    for folder in ("comfy_nodes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "fitting.md", "exec"), {})
    assert [label.name for label in vmix.Adapter.open("light.safetensors").labels] == ["light"]
    Path("labels.toml").write_text(toml, "utf-8")
    (label,) = read_labels("labels.toml")
    assert (len(label.positive), len(label.negative), label.range) == (2, 2, (-1.5, 1.5))


def test_labels_in_the_documentation() -> None:
    text = (ROOT / "docs" / "labels.md").read_text("utf-8")
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(python, "labels.md", "exec"), {})
    assert said.getvalue() == "".join(re.findall(r"^# (.*\n)", python, re.MULTILINE))


def test_the_example_of_a_list_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "labels.md").read_text("utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "labels.toml").write_text(toml, "utf-8")
    (label,) = vmix.read_label_list(tmp_path / "labels.toml")
    assert (label.positive, label.negative) == (["soft natural lighting"], ["sks"])
    assert (label.range, label.neutral) == ((0, 1), 0)
    assert label.display_names == {"de": "natürliches Licht", "zh": "自然光照"}


def test_every_link_leads_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "comfy_nodes").glob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
