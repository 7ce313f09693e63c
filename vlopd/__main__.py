"""`python -m vlopd`: the command line without an installed script."""

import os
import sys
from pathlib import Path

if Path.cwd() != Path(__file__).resolve().parents[1]:
    # a folder of data that a command is run in must not stand in for packages
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]

from vlopd.cli.main import main

main()
