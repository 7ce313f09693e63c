"""Loads an experiment's config from a TOML file and overrides."""

from __future__ import annotations

import copy
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlopd import trust
from vlopd.config.experiment import ExperimentConfig, merge
from vlopd.config.explain import explain_errors
from vlopd.errors import ConfigError, shown
from vlopd.files import DEEPEST, depth, is_endless, is_first_process


def load_config(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()
) -> ExperimentConfig:
    """Reads the config of an experiment.

    Args:
        source: a TOML file, or the same tables as a dict; with `extends`, over those of another file.
        overrides: TOML lines, as on the command line: `["train.steps=20", "name=other"]`.

    Returns a frozen ExperimentConfig. Raises ConfigError with the file, the key and the nearest known key.

    >>> config = load_config("mine.toml", ["train.steps=20"])
    >>> config.recipe_of(config.arms["full"]).optim.learning_rate
    2e-05
    """
    if isinstance(source, Mapping):
        tree, where = _extended(copy.deepcopy(dict(source)), Path("config"), ()), "config"
    elif isinstance(source, str | Path):
        tree, where = read_tables(source), str(source)
    else:
        raise ConfigError(f"a config is a TOML file or a dict, not a {type(source).__name__}")
    tree = merged(tree, overrides)
    trust.grant(tree)
    return config_of(tree, where)


def merged(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Merges TOML lines into `tree` in place, and returns it.

    The lines are one change: with `optim.type` among them, the others of `optim` hold for the new type, in any order.
    """
    change: dict[str, Any] = {}
    for line in [overrides] if isinstance(overrides, str) else overrides:
        _join(change, parse_override(line))
    merge(tree, change)
    return tree


def _join(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            _join(old, value)
        else:
            tree[key] = value


def read_tables(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML file over those of the files that it extends, without validation.

    Raises ConfigError for a file that cannot be read or extends itself.
    """
    return _extended(_read_toml(Path(path)), Path(path), (Path(path).resolve(),))


def _extended(tree: dict[str, Any], path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """`tree`, of the file `path`, over the tables of its `extends`, from which those of `remove` are dropped.

    below: the files whose `extends` led here. `name` must be given again and `title` is not inherited: results of
    another experiment would otherwise be made in the base's folder, or under its title.
    """
    remove = tree.pop("remove", [])
    if "extends" not in tree:
        if remove:
            raise ConfigError(f"{path}: remove: only with extends, whose tables it drops")
        return tree
    named = tree.pop("extends")
    if not isinstance(named, str):
        raise ConfigError(f'{path}: extends must name a file, as in "base.toml"; got {named!r}')
    if "name" not in tree:
        raise ConfigError(
            f"{path}: name is missing; with that of {named} it would share its run folder"
        )
    base_path = path.parent / named
    if (whole := base_path.resolve()) in below:
        chain = " <- ".join(each.name for each in (*below, whole))
        raise ConfigError(f"{path}: extends leads back to itself: {chain}")
    if not base_path.exists():
        raise ConfigError(f"{path}: extends: no config file {base_path}")
    base = _extended(_read_toml(base_path), base_path, (*below, whole))
    for key in ("name", "title"):
        base.pop(key, None)
    if not isinstance(remove, list) or not all(isinstance(key, str) for key in remove):
        raise ConfigError(f'{path}: remove must be a list of keys, as in ["arms.full"]')
    for key in remove:
        if not _drop(base, key):
            raise ConfigError(f"{path}: remove: {named} has no {key!r}")
    merge(base, tree)
    return base


def _drop(tree: dict[str, Any], key: str) -> bool:
    """Deletes `key`, as arms.full or masks.top-0.3, whose names may have dots; returns whether it was there."""
    if key in tree:
        del tree[key]
        return True
    parts = key.split(".")
    heads = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(
        isinstance(inner := tree.get(head), dict) and _drop(inner, key[len(head) + 1 :])
        for head in heads
    )


def _read_toml(path: Path) -> dict[str, Any]:
    if is_endless(path) and path.parent != Path("/dev/fd"):  # a shell's <(command)
        raise ConfigError(f"{path} is a pipe or a device; give a config file (TOML)")
    try:
        return _parse_toml(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a config file (TOML)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def _parse_toml(text: str, where: Path | str) -> dict[str, Any]:
    """Parses TOML within bounds. Raises TOMLDecodeError, and ConfigError for deep nesting and very long integers."""
    try:
        tree = tomllib.loads(text)
        deep = depth(tree) > DEEPEST
    except RecursionError:
        deep = True
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # of Python's `int`
        limit = f"{sys.get_int_max_str_digits():,}"
        raise ConfigError(
            f"{where}: an integer has more than {limit} digits; no setting needs one"
        ) from None
    if deep:
        raise ConfigError(
            f"{where}: lists or tables are nested more than {DEEPEST} levels deep; no setting is"
        )
    return tree


def config_of(tree: Any, where: Path | str) -> ExperimentConfig:
    """Validates a config table of a TOML file or a run.json. Raises ConfigError with the file and the key."""
    _rename(tree, where)
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain_errors(error, ExperimentConfig)}") from None


def _rename(tree: Any, where: Path | str) -> None:
    """Replaces values of earlier versions in place, with a line on stderr for each."""
    tables = {"precision": tree.get("precision")} if isinstance(tree, dict) else {}
    arms = tree.get("arms") if isinstance(tree, dict) else None
    tables |= {f"arms.{name}": arm for name, arm in arms.items()} if isinstance(arms, dict) else {}
    for name, table in tables.items():
        key, now = ("stored", "auto") if name == "precision" else ("type", "base")
        if isinstance(table, dict) and table.get(key) == "source":
            table[key] = now
            if is_first_process():
                print(f'vlopd: {where}: {name}.{key} = "source" is now "{now}"', file=sys.stderr)


def value_of(kind: Any, value: Any, where: str) -> Any:
    """Validates a table, or an object that is valid already, as a section, union or annotated type of the config.

    Raises ConfigError that begins with `where`.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain_errors(error, kind)}") from None


def parse_override(line: str) -> dict[str, Any]:
    """`optim.learning_rate=2e-4` -> {"optim": {"learning_rate": 2e-4}}; a bare word is a string."""
    if not isinstance(line, str):
        raise ConfigError(
            f"override {shown(line)} is a {type(line).__name__}; give each as a text of its own, such as "
            "'train.steps=20'"
        )
    key, equals, value = line.partition("=")
    if not equals:
        raise ConfigError(
            f"override {shown(line)} has no '='; write key=value, as in train.steps=20"
        )
    for text in (line, f'{key}="{value}"'):
        try:
            return _parse_toml(text, f"override {shown(line)}")
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError(f"override {shown(line)} is not a TOML line")
