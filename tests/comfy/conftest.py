from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import pytest

# Random model files are made once and kept: writing them takes longer than most tests.
MODELS = Path(os.environ.get("VMIX_TEST_MODELS") or host.ROOT / "target" / "comfy-models")


@pytest.fixture(scope="session")
def comfyui() -> None:
    """Skips the test, and says why, where no ComfyUI can be run."""
    if host.missing:
        pytest.skip(host.missing)


@pytest.fixture(scope="session")
def model_file(comfyui: None) -> Any:
    """A function: name of a file of checkpoints.py → its path; it is written if it is not there."""
    import checkpoints

    def get(name: str) -> Path:
        path = MODELS / f"{name}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            checkpoints.files()[name](part)
            part.rename(path)
        return path

    return get


@pytest.fixture(scope="session", autouse=True)
def _inference() -> Iterator[None]:
    """Nodes run in inference mode, as ComfyUI's executor runs them."""
    if host.missing:
        yield
        return
    import torch

    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names what did not run, so that nobody takes it for tested."""
    skipped: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        if "tests/comfy/" in report.nodeid and isinstance(report.longrepr, tuple):
            file, _, name = report.nodeid.partition("::")
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
            test = f"{Path(file).stem}::{name.partition('[')[0]}" if name else Path(file).stem
            skipped.setdefault(reason, []).append(test)
    if skipped:
        terminalreporter.section("ComfyUI nodes: NOT TESTED", yellow=True)
    for reason, tests in skipped.items():
        terminalreporter.line(f"{len(tests)} skipped: {reason}")
        terminalreporter.line("  " + ", ".join(dict.fromkeys(tests)))
