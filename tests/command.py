"""The command line, run in this process."""

import sys

import pytest

from vlopd.cli import main


def call(monkeypatch, capsys, *words) -> tuple[int, str]:
    """(exit code, all that was printed) of `vlopd WORDS`."""
    monkeypatch.setattr(sys, "argv", ["vlopd", *map(str, words)])
    monkeypatch.setattr(main.console, "_width", 220)
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code or 0, "".join(capsys.readouterr())
