"""Runs a command until it ends or standard input closes, as it does when the process that started this is killed.

Then all that the command started ends with it. A script of its own, which imports nothing of vlopd.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_SECONDS = 10.0
"""Between the request to end and the end."""


def main() -> int:
    """Returns the command's exit status."""
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal's Ctrl-C is for who started this
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def to_all(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def end_with_input() -> None:
        sys.stdin.buffer.read()
        to_all(signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            to_all(signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda *_: to_all(signal.SIGTERM))
    threading.Thread(target=end_with_input, daemon=True).start()
    status = child.wait()
    to_all(signal.SIGKILL)
    return status


if __name__ == "__main__":
    sys.exit(main())
