"""`vmix eval …`, `python -m vmix.eval …` or `accelerate launch -m vmix.eval …`."""

from __future__ import annotations

from vmix.eval.run import main

if __name__ == "__main__":
    main()
