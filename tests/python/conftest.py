"""One thread for each test process: most models here are so small that sharing out their work takes
longer than doing it, and several tests run at a time. No GPU: all machines compute alike."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch

# OpenMP takes a list, too: a number for each level of nesting.
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))

# Where SIGINT was ignored before (a shell's background job), processes would not notice Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
