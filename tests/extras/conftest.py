"""Tests of what is no requirement: bitsandbytes, and DeepSpeed, which is told that CPUs will do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent.parent / "python"))
