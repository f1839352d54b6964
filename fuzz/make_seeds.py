#!/usr/bin/env python3
"""The files that fuzzing starts from, seeds/file; fuzz_targets/calls.rs opens them too."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/hostile"))

import make  # noqa: E402

SEEDS = {
    "adapter": make.adapter(),
    "difference": make.difference(),
    "borrowing": make.borrowing(),
    "sd15": make.sd15(),
    "preset": make.preset(),
    "preset-f16": make.preset("F16"),
    "contrast": make.contrast(),
    "base": make.base(),
}

for name, parts in SEEDS.items():
    (HERE / "seeds/file" / f"{name}.safetensors").write_bytes(parts.file())
