"""The command `vmix`, also as `python -m vmix`."""

import signal
import sys

from vmix._native import run_command


def main() -> None:
    # Python would note Ctrl-C and wait for the native code to return.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(run_command(["vmix", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
