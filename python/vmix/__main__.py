"""The command `vmix`, also as `python -m vmix`."""

import contextlib
import os
import signal
import sys
from importlib import import_module

from vmix._native import run_command

COMMANDS = {
    "fit": "Make an adapter for a checkpoint from words",
    "train": "Train an adapter, from images or from the base's own pictures",
    "label": "Score images and propose labels for training",
    "eval": "Compare adapters, strengths and baselines on prompts",
}
"""What is written in Python: `vmix.<name>`, with what the extra `train` installs."""


def main() -> None:
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        try:
            command = import_module(f"vmix.{name}.__main__")
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("vmix"):
                raise
            extra = {"eval": "eval", "fit": "diffusers"}.get(name, "train")
            sys.exit(f"vmix {name} needs {error.name}: pip install 'vmix-adapter[{extra}]'")
        sys.argv = [f"vmix {name}", *arguments[1:]]
        command.main()
        return
    # Python would note Ctrl-C and wait for the native code to return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    status = run_command(["vmix", *arguments])
    if (arguments, status) in (([], 2), (["-h"], 0), (["--help"], 0)):
        listing = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
        with contextlib.suppress(OSError):  # whoever reads no further has read enough
            os.write(2 if status else 1, f"\nWritten in Python:\n{listing}\n".encode())
    sys.exit(status)


if __name__ == "__main__":
    main()
