"""The documentation is complete, and what it shows runs."""

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from mkdocs.commands.build import build as build_site
from mkdocs.config import load_config as load_site
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.main import get_command

from tests.command import call
from tests.snippets import ROOT, module_of, smaller
from vlopd.cli.main import app
from vlopd.config.base import Section
from vlopd.config.experiment import merge
from vlopd.config.input import config_of, load_config
from vlopd.config.recipe import RecipeSections


def sections_below(cls: type) -> list[type]:
    return [cls, *(found for each in cls.__subclasses__() for found in sections_below(each))]


# ----------------------------------------------------------------------------- configuration reference


def test_the_reference_has_every_field_with_a_sentence_and_a_unit():
    """No field of any configuration class is missing from the reference, or stands there without a sentence; a number
    has a unit."""
    reference = module_of("scripts/config_reference.py")
    recipes = set(sections_below(RecipeSections))  # one field's sentence serves all of these

    def known_as(cls: type, name: str) -> tuple[type, str]:
        return (RecipeSections if cls in recipes else cls), name

    documented, incomplete = set(), []
    for part in reference.all_parts():
        for setting in part.settings:
            name = setting.key.rpartition(".")[2]
            documented |= {known_as(reference.owner(cls, name), name) for cls in part.classes}
            if not setting.sentence.endswith((".", ")")) or setting.unit == "?":
                incomplete.append(setting)
    assert not incomplete
    fields = {
        known_as(cls, name)
        for cls in sections_below(Section)
        if cls.__module__.startswith("vlopd.config.")
        for name in vars(cls).get("__annotations__", {})
        if name in cls.model_fields and name != "type"
    }
    missing = {f"{cls.__name__}.{name}" for cls, name in fields - documented}
    assert not missing and len(fields) > 100


def test_the_site_builds(tmp_path):
    """All pages are in the site, without a broken link, anchor or reference, and need nothing from elsewhere."""
    config = load_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build_site(config)  # strict: raises for a warning
    for page in tmp_path.glob("**/*.html"):
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?:', page.read_text()), page


# ----------------------------------------------------------------------------------------- snippets

PAGES = [
    path
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    if "```" in path.read_text()
]
FENCE = re.compile(
    r'(?:^<!-- (?P<mark>.+?) -->\n+)?^```(?P<language>\w+)(?: title="(?P<title>.+?)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
"""A code block. Under `<!-- run -->` its commands run, under `<!-- not run: why -->` Python is only compiled; a block
with a title is the file of that name, which later blocks of the page use."""

BASE = """
name = "mine"
student = "builtin:shapes-student"
teacher = "builtin:shapes-teacher"
data = {type = "shapes"}
train = {steps = 20, prompts_per_step = 4}
[masks]
top = {type = "top_fraction", fraction = 0.05}
random = {type = "random", like = "top", seeds = [100, 101]}
[arms]
base = {type = "base"}
full = {type = "distill", role = "full"}
subnetwork = {type = "distill", mask = "top"}
random = {type = "distill", mask = "random"}
jsd = {type = "distill", loss = {type = "jsd"}}
k1 = {type = "distill", loss = {type = "k1"}}
"""
"""The config that fragments and overrides are merged into, where the page has no `mine.toml` of its own."""


def blocks(page: Path) -> list[dict[str, str]]:
    return [match.groupdict() for match in FENCE.finditer(page.read_text())]


@pytest.fixture
def folder(request, tmp_path, monkeypatch, folders):
    """A working folder with the files that the page shows, the pictures these name, two checkpoints if it has such."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(BASE)
    if '"base", "trained"' in request.getfixturevalue("page").read_text():
        shutil.copytree(folders["llm", "student"], tmp_path / "base")
        shutil.copytree(tmp_path / "base", tmp_path / "trained")
        weights = load_file(tmp_path / "base" / "model.safetensors")
        moved = {name: value * 1.01 for name, value in weights.items()}
        save_file(moved, tmp_path / "trained" / "model.safetensors", {"format": "pt"})
    for block in blocks(request.getfixturevalue("page")):
        if block["title"]:
            path = tmp_path / block["title"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
            for picture in re.findall(r'"([\w/]+\.png)"', block["text"]):
                (path.parent / picture).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (96, 96), (235, 50, 50)).save(path.parent / picture)
    return tmp_path


def pages_with(language: str):
    found = [page for page in PAGES if any(b["language"] == language for b in blocks(page))]
    return pytest.mark.parametrize("page", found, ids=lambda page: str(page.relative_to(ROOT)))


def test_every_code_block_is_tested():
    """Blocks are of the languages below; a longer comment before one says why it is not run."""
    for page in PAGES:
        text = page.read_text()
        assert text.count("\n```") == 2 * len(
            re.findall(r"^```[^\n]*\n.*?^```$", text, re.M | re.S)
        )
        for block in blocks(page):
            assert block["language"] in ("toml", "bash", "python", "json", "yaml"), page
            assert block["language"] not in ("json", "yaml") or block["title"], page
            mark = block["mark"] or "run"
            assert mark == "run" or (mark.startswith("not run: ") and len(mark) > 20), page


@pages_with("toml")
def test_configs_are_valid(page, folder):
    """A TOML block with a title is a config; another is valid within one."""
    for block in blocks(page):
        if block["language"] == "toml" and block["title"]:
            load_config(folder / block["title"])
        elif block["language"] == "toml":
            tree = tomllib.loads(BASE)
            merge(tree, tomllib.loads(block["text"]))
            config_of(tree, page.name)


def words_of(text: str) -> list[list[str]]:
    """The commands of a bash block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pages_with("bash")
def test_commands_exist(page, folder, monkeypatch, capsys):
    """Each command of vlopd's has these arguments and options, its overrides are valid, and scripts exist; the
    commands of a block under `<!-- run -->` succeed."""
    for block in blocks(page):
        for words in words_of(block["text"]) if block["language"] == "bash" else ():
            if words[:2] == ["accelerate", "launch"]:
                words = ["vlopd", *words[words.index("vlopd") + 1 :]]
            if words[0] == "vlopd":
                check_command(words[1:], folder)
                if block["mark"] == "run":
                    code, said = call(monkeypatch, capsys, *words[1:])
                    assert code == 0, said
            elif words[0] in ("bash", "python"):
                assert (ROOT / words[1]).exists(), words
            else:
                assert words[0] in ("export", "for", "pip", "sbatch", "vllm") or words[
                    0
                ].startswith("arms="), words


def check_command(words: list[str], folder: Path) -> None:
    """Parses a command line without running it; configs and overrides are read."""
    command, words = get_command(app), list(words)
    while inner := vars(command).get("commands"):
        assert words[0] in inner, words
        command = inner[words.pop(0)]
    parameters = command.make_context("vlopd", words).params
    overrides = [word for word in words if "=" in word and re.match(r"^\w+\.[\w.]+=", word)]
    target = parameters.get("target")
    if target is not None and target.suffix == ".toml":
        shipped = target.parts[0] == "configs"  # any other name is the reader's
        known = target if (folder / target).exists() else folder / "mine.toml"
        load_config(ROOT / target if shipped else known, overrides)
    elif overrides:
        load_config(folder / "mine.toml", overrides)


def test_tutorials_run(tmp_path, monkeypatch):
    """Every cell of every tutorial runs with a step and four questions, and what it shows has a form in HTML."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    shell = InteractiveShell(user_module=ModuleType("tutorial"))
    del sys.modules["tutorial"]  # where the shell has put it, beyond this test
    shell.history_manager.enabled = False
    shell.display_formatter.active_types = ["text/plain", "text/html"]
    paths = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
    assert len(paths) >= 3
    for path in paths:
        (tmp_path / path.stem).mkdir()
        monkeypatch.chdir(tmp_path / path.stem)
        shell.reset()
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                shell.run_cell(smaller(cell.source)).raise_error()


@pages_with("python")
def test_python_runs(page, folder):
    """The Python blocks of a page run in turn, with fewer steps and questions; those of files compile."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if block["language"] == "python":
            code = compile(smaller(block["text"]), page.name, "exec")
            if not block["title"] and not (block["mark"] or "").startswith("not run"):
                exec(code, names)
