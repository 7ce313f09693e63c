"""Plug-ins, functions named "module:function" in a config: import, checks, digests, calls.

A module is a file of the working folder (`rewards` is rewards.py, `my.rewards` is my/rewards.py), else an installed
one. Nothing is imported before a function is checked or called. A process imports a file once, and again where it has
changed at the start of a check, a training or a mask, so that the digest recorded is that of the code that runs.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, SupportsFloat

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from vlopd import trust
from vlopd.errors import PluginError, first_line, is_out_of_memory

NAME = trust.PLUGIN

_modules: dict[Path, tuple[str, ModuleType]] = {}
"""Imported files of the working folder, with the digest of the source that was executed."""
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
"""Imported functions by working folder and name."""


class Plugin(str):
    """A function by its name "module:function"; in Python also the function itself, which is then used as it is.

    >>> Plugin.of("my.rewards:brief").module, Plugin.of("my.rewards:brief").label
    ("my.rewards", "brief")
    """

    given: Callable[..., Any] | None = None

    @classmethod
    def of(cls, value: Any) -> Plugin:
        """Raises ValueError for what is neither "module:function" nor a function."""
        if isinstance(value, Plugin):
            return value
        if inspect.isroutine(value):
            plugin = cls(f"{value.__module__}:{value.__qualname__}")
            plugin.given = value
            return plugin
        if not isinstance(value, str):
            raise ValueError(f'must be "module:function" or a function; got {value!r}')
        if not NAME.fullmatch(value):
            file, _, name = value.partition(":")
            module = file.removesuffix(".py").strip("./").replace("/", ".")
            right = f"{module}:{name}" if name else "rewards:brief"
            example = right if NAME.fullmatch(right) else "rewards:brief"
            raise ValueError(f'must be "module:function", as in {example!r}; got {value!r}')
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of,
            serialization=core_schema.to_string_ser_schema(),
            json_schema_input_schema=core_schema.str_schema(),
        )

    @property
    def module(self) -> str:
        return self.partition(":")[0]

    @property
    def function(self) -> str:
        return self.partition(":")[2]

    @property
    def label(self) -> str:
        """The function's own name."""
        return self.function.rpartition(".")[2]

    def load(self, fresh: bool = False) -> Callable[..., Any]:
        """The function; with `fresh`, of the file as it is now.

        Raises PluginError where there is no such module or function, the import fails, or a run folder that is not
        trusted names it.
        """
        if self.given is not None:
            return self.given
        if why := trust.why_withheld(trust.plugin(self)):
            raise PluginError(why)
        key = os.getcwd(), str(self)
        if fresh or key not in _functions:
            _functions[key] = self._find(_import(self))
        return _functions[key]

    def _find(self, module: ModuleType) -> Callable[..., Any]:
        try:
            found = operator.attrgetter(self.function)(module)
        except AttributeError:
            named = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
            near = difflib.get_close_matches(self.function, named, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(named) or 'none'}"
            raise PluginError(
                f"{self}: no function {self.function!r} in {self.file}; {hint}"
            ) from None
        if not callable(found):
            raise PluginError(f"{self}: it is a {type(found).__name__}, not a function")
        return found

    @property
    def file(self) -> str:
        """The file that the function is defined in, relative to the working folder where it is inside."""
        file, _ = self._source()
        with suppress(ValueError):
            file = file.relative_to(Path.cwd())
        return str(file)

    def digest(self) -> str:
        """The sha256 of the function's file; of its source alone, in a notebook or a script's `__main__`.

        Does not import the module. Raises PluginError where there is none.
        """
        return hashlib.sha256(self._source()[1]).hexdigest()

    def _source(self) -> tuple[Path, bytes]:
        """(file, the source that the digest is of)."""
        if self.given is not None:
            return _source_of(self, self.given)
        file = _working_file(self.module)
        if file is None:
            spec = _installed(self.module)
            if spec is None:
                raise _no_module(self)
            if not spec.has_location or spec.origin is None:
                raise PluginError(
                    f"{self}: {self.module} has no file; put a function that calls it into a file"
                )
            file = Path(spec.origin)
        return file, file.read_bytes()


def _source_of(plugin: Plugin, function: Callable[..., Any]) -> tuple[Path, bytes]:
    """(file, source) of a function given as an object: the file's where its name can be imported, else its own."""
    try:
        file = Path(inspect.getsourcefile(function) or "")
        if plugin.module != "__main__" and "<" not in plugin.function and file.is_file():
            return file, file.read_bytes()
        return file, inspect.getsource(function).encode()
    except (OSError, TypeError):
        raise PluginError(
            f'{plugin}: its source cannot be read; put it into a file and name it "module:function"'
        ) from None


def _no_module(plugin: Plugin) -> PluginError:
    path = Path.cwd().joinpath(*plugin.module.split("."))
    defined = "<" in plugin.function or plugin.module == "__main__"
    more = "; it was defined in a Python session: put it into a file" if defined else ""
    if plugin.module.endswith(".py"):
        more = f"; write {plugin.module.removesuffix('.py')}:{plugin.function}"
    return PluginError(
        f"{plugin}: no module {plugin.module!r}: neither {path}.py nor an installed one; run in its folder{more}"
    )


def _working_file(module: str) -> Path | None:
    """The file of a module in the working folder, if there is one."""
    path = Path.cwd().joinpath(*module.split("."))
    files = (path.parent / f"{path.name}.py", path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _installed(module: str) -> ModuleSpec | None:
    """The spec of an installed module, found without importing it or its parents; None where there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for i in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = ".".join([top, *rest[: i + 1]])
            spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return spec


def _import(plugin: Plugin) -> ModuleType:
    """The module, from the working folder first; executed again where its file has changed."""
    file = _working_file(plugin.module)
    try:
        if file is None:
            return importlib.import_module(plugin.module)
        source = file.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        if file not in _modules or _modules[file][0] != digest:
            _modules[file] = digest, _execute(plugin.module, file, source)
        return _modules[file][1]
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if file is None and missing and f"{plugin.module}.".startswith(f"{missing}."):
            raise _no_module(plugin) from None
        where = file or plugin.module
        raise PluginError(f"{plugin}: importing {where} fails: {_in_short(error)}") from error


def _execute(name: str, file: Path, source: bytes) -> ModuleType:
    """Executes a file of the working folder as the module `name`."""
    is_package = file.name == "__init__.py" and name.rpartition(".")[2] == file.parent.name
    inside = [str(file.parent)] if is_package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    ours = [known for _, known in _modules.values()]
    with _working_folder_first():
        if parent := name.rpartition(".")[0]:
            with suppress(ImportError):
                importlib.import_module(parent)
        before = sys.modules.get(name)
        if before is None or any(before is known for known in ours):
            sys.modules[name] = module  # another module of this name stays what others import
        try:
            exec(compile(source, str(file), "exec"), vars(module))
        except BaseException:
            if sys.modules.get(name) is module:
                del sys.modules[name]
            raise
    return module


@contextmanager
def _working_folder_first() -> Iterator[None]:
    """Puts the working folder first on sys.path, for what a module imports from beside it."""
    folder = os.getcwd()
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        with _same_working_folder():
            yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


@contextmanager
def _same_working_folder() -> Iterator[None]:
    """Restores the working folder, to which modules and the paths of a run are relative."""
    folder = os.getcwd()
    try:
        yield
    finally:
        if os.getcwd() != folder:
            os.chdir(folder)


def _in_short(error: BaseException) -> str:
    """`KeyError: 'a' (rewards.py, line 3)`: the error, and where in the user's file it was raised."""
    text = first_line(error)
    kind = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    users = [f for f in users if "importlib" not in f.filename]
    at = next((f for f in reversed(users) if f.filename == users[0].filename), None)
    where = "" if at is None else f" ({Path(at.filename).name}, line {at.lineno})"
    return f"{text if text.startswith(kind) else f'{kind}: {text}'}{where}"


# ----------------------------------------------------------------------------------------- in use


class Use(NamedTuple):
    """A function at its place in a config: what it is called with, and the names of the section's settings."""

    key: str
    plugin: Plugin
    takes: tuple[str, ...]
    """Positional arguments, by name."""
    arguments: Mapping[str, Any] = {}
    settings: tuple[str, ...] = ()

    def check(self) -> None:
        """Imports the function as its file is now. Raises PluginError where it cannot be called as it would be."""
        try:
            function = self.plugin.load(fresh=True)
        except PluginError as error:
            raise PluginError(f"{self.key} = {error}") from error.__cause__
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return  # of a function written in C
        try:
            signature.bind(*self.takes, **self.arguments)
        except TypeError as error:
            takes = len(self.takes)
            own = [name for name in list(signature.parameters)[takes:] if name[0] != "*"]
            unknown = [name for name in self.arguments if name not in signature.parameters]
            near = [difflib.get_close_matches(n, [*own, *self.settings], 1) for n in unknown]
            hint = next((f"; did you mean {names[0]!r}?" for names in near if names), "")
            given = [*self.takes, *(f"{name}=..." for name in self.arguments)]
            raise PluginError(
                f"{self.key} = {self.plugin}: its signature {signature} does not fit the call "
                f"{self.plugin.label}({', '.join(given)}): {error}{hint}"
            ) from None

    @property
    def line(self) -> str:
        """For the screen: key, function, file and the first digits of its digest."""
        plugin = self.plugin
        return f"{self.key} = {plugin}, from {plugin.file} (sha256 {plugin.digest()[:12]})"


def call(plugin: Plugin, where: str, *values: Any, **arguments: Any) -> Any:
    """The function's value. Raises PluginError, naming the function and `where`, for any error in it."""
    function = plugin.load()
    with _named(plugin, where):
        return function(*values, **arguments)


def item(plugin: Plugin, where: str, sequence: Any, index: Any) -> Any:
    """An item of the sequence that a function returned. Raises PluginError as `call` does."""
    with _named(plugin, where):
        return sequence[index]


@contextmanager
def _named(plugin: Plugin, where: str) -> Iterator[None]:
    """Raises PluginError, naming the function and `where`, for any error in code of the function's module."""
    try:
        with _same_working_folder():
            yield
    except (Exception, SystemExit) as error:  # a function of the user's may raise anything
        if is_out_of_memory(error):
            raise
        raise PluginError(f"{plugin} fails on {where}: {_in_short(error)}") from error


def number(plugin: Plugin, where: str, *values: Any) -> float:
    """As `call`, of a function that returns a number. Raises PluginError for another value, NaN or infinity."""
    value = call(plugin, where, *values)
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if isinstance(value, SupportsFloat) and math.isfinite(found := float(value)):
            return found
    raise wrong_value(plugin, where, value, "a finite number")


def wrong_value(plugin: Plugin, where: str, value: Any, wanted: str) -> PluginError:
    shown = " ".join(repr(value).split())
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return PluginError(f"{plugin} returned {shown} on {where}; it must return {wanted}")
