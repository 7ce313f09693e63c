"""`vlopd init`: writes a commented config that runs as it is."""

from __future__ import annotations

import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from vlopd.cli.common import say
from vlopd.errors import ConfigError
from vlopd.files import write_text

Template = Literal["quickstart", "vlm", "llm", "compare"]

PARTS: dict[Template, tuple[str, ...]] = {
    "quickstart": ("quickstart",),
    "vlm": ("vlm", "training", "arms"),
    "llm": ("llm", "training", "arms"),
    "compare": ("compare", "training"),
}
"""The files of cli/templates/ that each template is joined from."""

OWN_DATA: dict[str, Literal["image", "text"]] = {"vlm": "image", "llm": "text"}
"""Templates with a data file, and the modality of its rows."""

ROWS = {"image": 128, "text": 4096}
"""Rows of a generated data file; of fewer texts the student learns the rows, not the task."""


def template(name: Template, data: Path) -> str:
    """The text of a template; `data` is the folder of its data file."""
    folder = files("vlopd.cli") / "templates"
    text = "".join((folder / f"{part}.toml").read_text() for part in PARTS[name])
    return text.replace("@DATA@", json.dumps(data.as_posix(), ensure_ascii=False)[1:-1])


def init(
    file: Annotated[Path, typer.Argument(help="config file to write")] = Path("vlopd.toml"),
    of: Annotated[
        Template,
        typer.Option(
            "--from",
            help="quickstart: the built-in experiment; vlm, llm: your own data and models; compare: subnetwork, "
            "controls and contrasts",
        ),
    ] = "quickstart",
    force: Annotated[bool, typer.Option("--force", help="overwrite")] = False,
) -> None:
    """Writes a commented config that runs as it is; vlm and llm come with a small data file."""
    assert set(get_args(Template)) == set(PARTS)
    data = file.with_name(f"{file.stem}-data")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name the file to write, as {file / 'vlopd.toml'}")
    # the config last: without it, an earlier command was stopped, and its data is written again
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already; name another file, or pass --force")
    if of in OWN_DATA:
        write_rows(data, OWN_DATA[of], force)
        say("wrote", data / "train.jsonl")
    write_text(file, template(of, data))
    say("wrote", file)
    say("next", f"vlopd check {shlex.quote(str(file))}")


def write_rows(folder: Path, modality: Literal["image", "text"], force: bool = True) -> None:
    """Writes train.jsonl with questions of the built-in data set, and their pictures beside it; other files stay.

    Raises ConfigError for other rows there, without `force`.
    """
    from vlopd.data.shapes import ShapesDataset

    rows, pictures = [], {}
    for k, example in enumerate(ShapesDataset("train", ROWS[modality], seed=1, modality=modality)):
        row = {"question": example.question, "answer": example.answer}
        for image in example.images:
            row["image"] = name = f"{k:03}.png"
            pictures[name] = image
        rows.append(json.dumps(row) + "\n")
    path, text = folder / "train.jsonl", "".join(rows)
    if path.exists() and not force and path.read_text() != text:
        raise ConfigError(f"{path} exists already; name another file, or pass --force")
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in pictures.items():
        image.save(folder / name)
    write_text(path, text)
