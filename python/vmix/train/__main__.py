"""Run the trainer: `accelerate launch -m vmix.train …` or `python -m vmix.train …`."""

from __future__ import annotations

from vmix.train.loop import main

if __name__ == "__main__":
    main()
