"""Examples and snippets of the documentation, cut down for tests."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]

SMALLER = {
    r'"steps": \d+': '"steps": 1',
    r'"prompts_per_step": \d+': '"prompts_per_step": 4',
    r"size=\d+": "size=4",
    r"limit=\d+": "limit=4",
    r"null_draws=\d+": "null_draws=1",
    r"geometry\((\w+), (\w+)\)": r"geometry(\1, \2, null_draws=1, ratios=[0.1])",
    r"STEPS = \d+": "STEPS = 1",
    r"QUESTIONS = \d+": "QUESTIONS = 4",
}
"""What steps, prompts and questions are cut down to."""


def smaller(code: str) -> str:
    for pattern, less in SMALLER.items():
        code = re.sub(pattern, less, code)
    return code


def module_of(path: str) -> ModuleType:
    """The module in a file of the repository, by its path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
