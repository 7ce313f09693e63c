"""Equality of two LaTeX expressions by math-verify, in a process of its own with a limit of time and memory.

math-verify parses with a grammar and compares with sympy, which can take for ever on a tower of powers and is not
stopped by a signal in another thread. So one process of this file answers pair by pair and is ended by the kernel when
a pair takes too long; the next pair starts another. It starts with the first pair (sympy is not imported before) and
ends with the program. The limit is in seconds of the processor: a busy machine changes no verdict.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading

SECONDS = 5.0
"""Processor time of one pair; what takes longer is not equal."""
MEMORY_BYTES = 4 << 30
"""Address space of the process."""

_lock = threading.Lock()
_process: subprocess.Popen[str] | None = None


def equal(answer: str, gold: str) -> bool:
    """Whether two expressions in LaTeX are mathematically equal; False where one cannot be parsed."""
    with _lock:
        process = _running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([answer, gold, SECONDS]) + "\n")
        process.stdin.flush()
        said = process.stdout.readline()
        if not said:  # ended by its limits
            _end()
        return said == "1\n"


def _running() -> subprocess.Popen[str]:
    """Starts the process where none runs. Raises RuntimeError where it cannot start."""
    global _process
    if _process is None or _process.poll() is not None:
        _process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms
            start_new_session=True,  # Ctrl-C is for the program; the process ends with its input
        )
        assert _process.stdout is not None
        if _process.stdout.readline() != "ready\n":
            _end()
            raise RuntimeError("math-verify does not start: try `python -c 'import math_verify'`")
    return _process


@atexit.register
def _end() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _forget() -> None:
    """A forked child starts its own process."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _main() -> None:
    """Reads pairs and their limit as lines of JSON, writes 1 or 0; SIGPROF, which nothing handles, ends it."""
    import resource
    import signal

    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    config = LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            malformed_operators=True,
            nits=True,
            boxed="none",
            units=False,  # would take the t of x + 2t for a unit
        ),
    )

    def parsed(latex: str) -> list[object]:
        # LaTeX alone: math-verify's reader of plain expressions is sympy's, which evaluates Python
        found: list[object] = parse(
            f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None
        )
        return found

    print("ready", flush=True)
    for line in sys.stdin:
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        same = verify(
            parsed(gold), parsed(answer), allow_set_relation_comp=True, timeout_seconds=None
        )
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(same), flush=True)


if __name__ == "__main__":
    _main()
