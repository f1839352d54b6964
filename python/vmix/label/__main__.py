"""Run it: `vmix label …` or `python -m vmix.label …`."""

from __future__ import annotations

from vmix.label.command import main

if __name__ == "__main__":
    main()
