#!/usr/bin/env python3
"""The files that fuzzing starts from, seeds/file; fuzz_targets/calls.rs opens them too."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/hostile"))

import make  # noqa: E402

SEEDS = {
    "layernorm": make.adapter(),
    "linear": make.linear("BF16"),
    "bare": make.bare(),
    "sd15": make.sd15(),
    "preset": make.preset(),
    "preset-f16": make.preset("F16"),
    "contrast": make.contrast(),
    "init": make.init(),
    "init-sd15": make.sd15_init(),
    "matrices": make.matrices(),
}

for name, parts in SEEDS.items():
    (HERE / "seeds/file" / f"{name}.safetensors").write_bytes(parts.file())
