"""The command line: the installed script `vlopd`, or `python -m vlopd` without one."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vlopd.interrupts import CODES


def main() -> None:
    """Runs the command line; a signal while its libraries are imported, or after its end, is one line too."""
    for number in CODES:
        signal.signal(number, _stop)
    from vlopd.cli.main import main as run

    run()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"vlopd: interrupted; run the same command again to go on\n")
    os._exit(CODES[signal.Signals(number)])


if __name__ == "__main__":
    if Path.cwd() != Path(__file__).resolve().parents[1]:
        # a folder of data that a command is run in must not stand in for packages
        sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
    main()
