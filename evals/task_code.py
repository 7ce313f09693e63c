"""What task files may run: templates in jinja's sandbox, functions of trusted folders alone, metrics that lm-eval has.

lm-eval renders templates without a sandbox, imports `!function` from any place that a YAML names, and looks up unknown
metrics in a library that runs code of the hub, or of a folder of that name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
from jinja2 import Environment
from lm_eval import utils
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import _yaml_loader

from vlopd.errors import ConfigError
from vlopd.files import is_first_process
from vlopd.models.sandbox import Sandbox
from vlopd.trust import task_files, why_withheld

PACKAGES = (Path(__file__).parent.resolve(), Path(lm_eval.__file__).parent.resolve())
"""Folders of the task files that are installed with this package and with lm-eval."""
FUNCTION = re.compile(r"\w+(\.\w+)+")
TASK = re.compile(r"[^\W_][\w.,:+()@ -]*")
"""Names of tasks, which are parts of file names."""
FAILURES = (Exception, SystemExit, GeneratorExit)
"""What code of a task may raise: anything, also what would end the process as if all were well."""

_shown: set[tuple[Path, str]] = set()
"""What was named on the screen: files of code with their digests, and of tasks with their names."""


def sandboxed(plain: Environment) -> Sandbox:
    """lm-eval's environment in jinja's sandbox: no attribute of Python's internals, no change of a value."""
    found = Sandbox(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    found.filters.update(plain.filters)
    return found


if not utils.env.sandboxed:
    utils.env = sandboxed(utils.env)  # read by `apply_template` whenever it renders


def is_packaged(path: Path | str) -> bool:
    return any(folder in Path(path).resolve().parents for folder in PACKAGES)


def refuse_name(name: str, where: Any) -> None:
    """Raises ConfigError for the name of a task that is no part of a file name: `../../x` leaves the run folder."""
    if not TASK.fullmatch(name):
        raise ConfigError(
            f"{where}: task {name!r} cannot name files; begin with a letter or digit, and use no slash"
        )


def note_replaced(task: str, path: Any) -> None:
    """Says once that a task stands in the place of an installed one."""
    if (noted := (Path(path), task)) not in _shown and is_first_process():
        _shown.add(noted)
        print(f"vlopd: task {task} is that of {path}, not the installed one", file=sys.stderr)


@contextmanager
def only_trusted(folders: Sequence[Path], own: bool) -> Iterator[None]:
    """Loads tasks whose functions are in the packages or in `folders`, the files of which are named on the screen.

    own: whether a task is of these folders. Raises ConfigError where a run folder names them and nobody trusts it.
    """
    for folder in folders if own else ():
        if why := why_withheld(task_files(folder)):
            raise ConfigError(why)
    import_function, get_metric = _yaml_loader._import_func_in_yml, lm_eval.api.task.get_metric

    def function(name: str, folder: Path) -> Any:
        _refuse_untrusted(name, folder, folders)
        return import_function(name, folder)

    def metric(name: str, from_hub: bool = False) -> Any:
        if own and from_hub:
            raise ConfigError(
                f"metric {name!r}: hf_evaluate runs code of the hub; write it as a function beside the task's file "
                "(metric: !function FILE.NAME)"
            )
        return None if own and name not in metric_registry else get_metric(name, from_hub)

    _yaml_loader._import_func_in_yml, lm_eval.api.task.get_metric = function, metric
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = import_function
        lm_eval.api.task.get_metric = get_metric


def _refuse_untrusted(name: str, folder: Path, folders: Sequence[Path]) -> None:
    """Raises ConfigError for a `!function` of another file than of the packages and `folders`; shows those of these."""
    here = f"{folder}: !function {name}"
    if not FUNCTION.fullmatch(name):
        raise ConfigError(f"{here}: must be FILE.NAME, a function of a file beside the task's")
    module = name.rpartition(".")[0]
    file = (folder / f"{module.replace('.', '/')}.py").resolve()
    if not file.exists():
        top = None
        with suppress(ImportError, ValueError):
            top = importlib.util.find_spec(module.partition(".")[0])
        file = Path(top.origin).resolve() if top and top.origin else file
    if is_packaged(file):
        return
    if not any(each.resolve() in file.parents for each in folders):
        raise ConfigError(
            f"{here} is in {file}, outside of the task's folder; put the function into a file beside the task's, or "
            "the folder of both into eval.include"
        )
    shown = (file, hashlib.sha256(file.read_bytes()).hexdigest()[:12])
    if shown not in _shown and is_first_process():
        _shown.add(shown)
        print(f"vlopd: task code: {file} (sha256 {shown[1]})", file=sys.stderr)
