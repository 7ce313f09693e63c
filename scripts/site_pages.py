"""mkdocs' hook: the pages of the site that are generated, from the README, the classes, the commands, the notebooks."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import config_reference  # noqa: E402

# ------------------------------------------------------------------------------------------- pages


def index() -> str:
    """The README, with links as from within docs/."""
    return inside_docs((ROOT / "README.md").read_text())


def contributing() -> str:
    return inside_docs((ROOT / "CONTRIBUTING.md").read_text())


def inside_docs(text: str) -> str:
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")


def configuration() -> str:
    return config_reference.markdown()


def commands() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from vlopd.cli.main import app

    lines = [
        "# Commands",
        "",
        "Every command exits with 0, or with 2 and one line on stderr for a user error (`check` and "
        "`verify`: 1 for what they find). See [the command line](../command-line.md) and "
        "[the run folder](../run-folder.md).",
        "",
    ]

    def add(command: Any, name: str) -> None:
        if inner := getattr(command, "commands", None):
            for word, each in inner.items():
                add(each, f"{name} {word}")
            return
        lines.extend([f"## `{name}`", "", command.help or "", ""])
        rows = [parameter_row(each) for each in command.params if each.name != "help"]
        if rows:
            lines.extend(["| argument or option | default | meaning |", "|---|---|---|", *rows, ""])

    add(get_command(app), "vlopd")
    return "\n".join(lines)


def parameter_row(parameter: Any) -> str:
    """One row of a command's table."""
    is_option = parameter.param_type_name == "option"
    names = ", ".join(parameter.opts) if is_option else parameter.name.upper()
    if parameter.required:
        default = "required"
    elif parameter.default in (None, False, ()):
        default = ""
    else:
        default = f"`{parameter.default}`"
    meaning = re.sub(r"(?<!`)<\w+>", r"`\g<0>`", (parameter.help or "").replace("|", "\\|"))
    return f"| `{names}` | {default} | {meaning} |"


RESULTS = [
    "vlopd.types.Example",
    "vlopd.loop.Trained",
    "vlopd.loop.Hooks",
    "vlopd.api.delta.Delta",
    "vlopd.api.masks.MaskTensors",
    "vlopd.api.geometry.Geometry",
    "vlopd.api.compare.Evaluation",
    "vlopd.api.compare.Comparison",
    "vlopd.api.paper.Paper",
]
"""What these functions take and return."""

WITHOUT_MEMBERS = {"Recipe", "UserError"}
"""A recipe's fields are settings, which have their own page."""


def python() -> str:
    """The names of `import vlopd`, and what they take and return, from their docstrings."""
    lines = [
        "# Python",
        "",
        "The names of `import vlopd`; each is loaded when it is first used. Settings, such as the sections of `Recipe` "
        "and the keyword arguments of `geometry`, `evaluate` and `compare`, are those of the "
        "[configuration](configuration.md). What a user can mend is raised as a `UserError`, one line with the remedy.",
        "",
    ]
    for name, home in front_door().items():
        lines += entry(f"vlopd.{name}", home, name not in WITHOUT_MEMBERS)
    lines += ["## What they take and return", ""]
    for home in RESULTS:
        lines += entry(home.rpartition(".")[2], home, True, 3)
    return "\n".join(lines)


def entry(heading: str, home: str, members: bool, level: int = 2) -> list[str]:
    """mkdocstrings' directive for one object."""
    options = {"heading": heading, "toc_label": heading, "heading_level": level}
    if not members:
        options["members"] = "false"
    return [f"::: {home}", "    options:", *(f"      {k}: {v}" for k, v in options.items()), ""]


def front_door() -> dict[str, str]:
    """Each public name with its path, from the imports in vlopd/__init__.py, in the order of its docstring."""
    tree = ast.parse((ROOT / "vlopd" / "__init__.py").read_text())
    text = ast.get_docstring(tree) or ""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in imports
        if str(node.module).startswith("vlopd.")
        for alias in node.names
    }
    return dict(sorted(found.items(), key=lambda each: text.find(each[0]) % (len(text) + 1)))


def tutorial(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that scripts/run_tutorials.py saved."""
    pieces = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        pieces.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        pieces += map(shown, cell.get("outputs", ()))
    heading, *rest = pieces
    download = f"[Download this notebook]({path.name}){{: download }}"
    return "\n\n".join([heading, download, *rest])


def shown(output: dict[str, Any]) -> str:
    """One output of a notebook's cell as Markdown."""
    data = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
    if picture := data.get("image/png"):
        return f'<img alt="output" src="data:image/png;base64,{picture.strip()}">'
    if drawing := data.get("image/svg+xml"):
        encoded = base64.b64encode(drawing.encode()).decode()
        return f'<img alt="output" src="data:image/svg+xml;base64,{encoded}">'
    if page := data.get("text/html"):
        page = re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)
        page = re.sub(r"<table[^>]*>", "<table>", page)  # the site's own style
        lines = [line.strip() for line in page.splitlines() if line.strip()]
        return f"<div>{''.join(lines)}</div>"
    text = data.get("text/plain") or "".join(output.get("text", ()))
    return f"```text\n{text.rstrip()}\n```"


# -------------------------------------------------------------------------------------------- hook


def pages() -> dict[str, str]:
    """All generated pages, by their path in the site."""
    notebooks = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
    return {
        "index.md": index(),
        "contributing.md": contributing(),
        "reference/configuration.md": configuration(),
        "reference/commands.md": commands(),
        "reference/python.md": python(),
        **{f"tutorials/{path.stem}.md": tutorial(path) for path in notebooks},
    }


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links of `docs/NAME.md` in text that docstrings have, too."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"(?<!\]\()(?<![\w/`\[])docs/([\w-]+)\.md", rf"[\1]({up}\1.md)", markdown)
