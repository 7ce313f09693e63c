"""Checkpoints outside of a run: geometry and comparison as functions and commands, their pages, what a path is not."""

import html
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import typer.main
from matplotlib.figure import Figure
from rich.markup import render
from safetensors.torch import load_file, save_file

from evals.harness import read_scored_rows
from evals.report.geometry import draw_overlap
from evals.report.page import environment
from tests.command import call
from vlopd.api.checkpoints import folder_of, names_of, what_it_is
from vlopd.api.compare import compare, evaluate
from vlopd.api.geometry import geometry
from vlopd.api.masks import make_mask
from vlopd.cli.main import app
from vlopd.errors import ConfigError, RunError, UserError
from vlopd.files import read_json, write_jsonl
from vlopd.masks.files import save_mask
from vlopd.models.load import BUILTIN
from vlopd.models.parameter_names import classify
from vlopd.run.folder import RunFolder

ROOT = Path(__file__).parents[1]


def changed(folder: Path, out: Path, seed: int) -> Path:
    """A copy of a model with noise on its matrices."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    stream = torch.Generator().manual_seed(seed)
    for t in tensors.values():
        t += (0.05 * t.float().abs().mean() * torch.randn(t.shape, generator=stream)).to(t.dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def place(folders, tmp_path_factory) -> Path:
    """base, step-1 and step-2 of a tiny language model; scores of the built-in text student and teacher."""
    root = tmp_path_factory.mktemp("pages")
    (root / "base").symlink_to(folders["llm", "student"])
    for step in (1, 2):
        changed(root / "base", root / f"step-{step}", step)
    for role in ("student", "teacher"):
        evaluate(f"builtin:shapes-text-{role}", ["shapes_text"], out=root / "scores", limit=20)
    return root


@pytest.fixture(scope="module")
def measured(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return geometry("base", place / "step-1", place / "step-2", null_draws=5, workers=1)


def test_geometry_as_a_function(measured):
    """Tables are frames with their nulls, figures are figures; of two checkpoints there is an overlap, and no
    trajectory."""
    assert list(measured.folders) == ["step-1", "step-2"]
    head = measured.headline
    norm = head[head.label.eq("Relative norm of the update")]
    assert len(norm) == 2 and norm.excess.abs().max() < 1e-3 * norm.value.min()
    assert set(measured.rows.trained) == set(measured.folders) and "[all]" in set(
        measured.rows.name
    )
    assert not measured.overlap.empty and measured.trajectory.empty
    assert isinstance(measured.plot(), Figure) and "step-1-spectrum" in measured.figures
    assert "stable rank" in repr(measured).lower() and "<table" in measured._repr_html_()
    with pytest.raises(ConfigError, match="no figure 'spectra'; there are"):
        measured.plot("spectra")


def test_the_page_of_geometry_is_self_contained(measured):
    """One file without a link or a request, with every headline row, the groups, the figures and the digests."""
    page = measured.page.read_text()
    assert not re.search(r"https?://|<link (?!rel=\"icon\" href=\"data:)|src=", page)
    for label in measured.headline.label:
        assert label.replace("'", "&#39;") in page
    for group in ("Components", "Layers", "language 0", "Overlap of the updates", "Not measured"):
        assert group in page
    assert page.count("<svg") == len(measured.figures)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for folder in measured.folders.values():
        assert read_json(folder / "summary.json")["inputs"]["trained"][:16] in page


def test_the_page_says_what_p_can_mean(measured):
    """The power of its draws, what gaussian's p rejects, and how many small p a draw of the null itself would have, per
    update and null; directions beside their nulls. With fewer than five draws it says why there is no p."""
    page = " ".join(html.unescape(measured.page.read_text()).split())
    assert "an excess of 4.1 standard deviations of the null has p < 0.05" in page
    assert "rejects any optimizer" in page and "So no count over rows is a test" in page
    for folder in measured.folders.values():
        for null, its in read_json(folder / "summary.json")["flagged"].items():
            assert (
                f"Of {its['rows']:,} rows with a p against {null}, {its['p_below_0.05']:,}" in page
            )
            assert f"would have about {int(its['expected_of_the_null']):,}." in page
    assert "Cosine of the updates" in page and "Leading 16 left singular vectors" in page
    words = "{% from 'macros.html.j2' import how_nulls_are_read %}{{ how_nulls_are_read(3) }}"
    assert "3 draws: no p; geometry.null_draws = 5 or more" in environment().from_string(
        words
    ).render(figures={})


def test_many_pairs_are_one_map_of_cosines(measured):
    """Of more than ten pairs the figure is a map of the cosines, symmetric, in place of three lines a pair."""
    row = measured.overlap[measured.overlap.metric.eq("delta_cosine")].iloc[0]
    pairs = [(a, b) for b in range(6) for a in range(b)]
    table = pd.DataFrame(
        [{**row, "name": "[all]", "first": f"x{a}", "second": f"x{b}"} for a, b in pairs]
    )
    (drawing,) = draw_overlap(table).values()
    assert drawing.words == "Cosine of each pair of updates"
    shown = drawing.figure.axes[0].collections[0].get_array().reshape(6, 6)
    assert (shown == shown.T).all() and set(shown.diagonal()) == {1.0}
    (few,) = draw_overlap(measured.overlap).values()
    assert few.words.startswith("Coordinates moved by both")


def test_geometry_of_folders_needs_no_more(place, measured, tmp_path, monkeypatch, capsys):
    """`vlopd geometry A B` prints the headline and the paths, and writes into geometry-B; what was measured with the
    same settings is kept."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(measured.out, "geometry-step-1-and-1-more")
    out = Path("geometry-step-1-and-1-more")
    before = (out / "step-1" / "geometry.csv").stat().st_mtime_ns
    steps = ("geometry", place / "base", place / "step-1", place / "step-2", "--trajectory")
    words = ("--set", "null_draws=5", "--preset", "paper", "--workers", "1")
    code, said = call(monkeypatch, capsys, *steps, *words)
    assert code == 0 and f"page: {out}/geometry.html" in said, said
    assert "Stable rank, median over matrices" in said and "gaussian: " in said
    assert (out / "step-1" / "geometry.csv").stat().st_mtime_ns == before
    assert (out / "step-1/figures/spectrum.svg").read_text().startswith("<svg")
    assert (out / "trajectory.csv").exists() and not (out / "overlap.csv").exists()
    page = (out / "geometry.html").read_text()
    assert all(words in page for words in ("arXiv 2606.13657", "random walk"))
    assert "Overlap of the updates" not in page


def test_scores_are_compared_as_models_are(place, tmp_path, monkeypatch, capsys):
    """Evaluations made before, by folder and by file, are compared on the tasks that they share, with the same numbers
    as the models themselves."""
    scores = place / "scores" / "evals"
    models = {role: f"builtin:shapes-text-{role}" for role in ("student", "teacher")}
    (tmp_path / "x" / "evals").mkdir(parents=True)
    direct = compare(models, ["shapes_text"], out=place / "again", limit=20)
    before = (
        scores / "shapes-text-student",
        scores / "shapes-text-teacher" / "samples_shapes_text.jsonl",
    )
    code, said = call(monkeypatch, capsys, "compare", *before, "--out", tmp_path / "x")
    assert code == 0 and "tasks: shapes_text" in said and "page: " in said, said
    record = read_json(tmp_path / "x" / "compare.json")["tasks"]["shapes_text"]
    names = ("mean", "standard_error", "low", "high")
    table = direct.scores.set_index("model")
    for role, its in zip(models, record["arms"].values(), strict=True):
        found = (its["mean"], its["standard_error"], *its["interval"])
        assert found == tuple(table.loc[role, list(names)])
    assert record["contrasts"][0]["p"] == direct.contrasts.p[0]
    assert any(line.startswith("teacher minus student: ") for line in direct.verdict)
    assert isinstance(direct.plot(), Figure) and "<table" in direct._repr_html_()
    page = direct.page.read_text()
    assert all(line in html.unescape(page) for line in direct.verdict) and not re.search(
        r"https?://|src=", page
    )


def test_an_evaluation_as_a_function(place):
    """Scores have every metric with its error; samples are the questions."""
    found = evaluate("builtin:shapes-text-student", "shapes_text", out=place / "scores", limit=20)
    first = found.scores.iloc[0]
    assert first.metric == "exact_match" and first.n == 20 == len(found.samples)
    assert first["mean"] == pytest.approx(found.samples.exact_match.mean())
    assert isinstance(found.scores, pd.DataFrame) and "exact_match" in repr(found)
    with pytest.raises(ConfigError, match="unknown key 'limits'; did you mean 'limit'"):
        evaluate("builtin:shapes-text-student", ["shapes_text"], limits=3)
    with pytest.raises(ConfigError, match="during: is of training"):
        evaluate("builtin:shapes-text-student", ["shapes_text"], during={"every": 3})


@pytest.fixture(scope="module")
def others(place) -> dict[str, Path]:
    """Paths of everything that is not a model."""
    root = place / "others"
    (root / "empty").mkdir(parents=True)
    (root / "mine.toml").write_text("")
    (root / "notes.txt").write_text("")
    (root / "model.pt").write_text("")
    run, arm = root / "run", root / "run" / "arms" / "teacher"
    arm.mkdir(parents=True)
    (root / "run" / "run.json").write_text("{}")
    (arm / "record.json").write_text('{"model": "org/teacher"}')
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    save_mask(
        root / "masks" / "m.safetensors",
        {"w": torch.ones(2, dtype=torch.bool)},
        {"base": "x"},
        classify,
    )
    names = ("empty", "mine.toml", "notes.txt", "model.pt", "run", "adapter", "masks")
    found = {name: root / name for name in names}
    found |= {"arm": arm, "mask": root / "masks" / "m.safetensors", "run": run, "models": place}
    return found | {"file": place / "step-1" / "model.safetensors", "gone": Path("gone")}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "an empty folder"),
        ("mine.toml", "a config; use `vlopd run "),
        ("notes.txt", "not a checkpoint folder, nor results_"),
        ("model.pt", "pickled weights, which are refused"),
        ("run", "a run folder; give "),
        ("arm", "an arm without a checkpoint of its own; give its model, org/teacher"),
        ("masks", "a folder of mask files"),
        ("mask", "a mask file"),
        ("file", "a file of weights; give its folder"),
        ("models", "a folder of checkpoints; give one of them (base, step-1, step-2)"),
        ("adapter", "is an adapter"),
        ("gone", "gone: no such file or folder, and not a hub id"),
    ],
)
def test_a_path_says_what_it_is_not(what, message, others, place, tmp_path, monkeypatch, capsys):
    """compare and geometry refuse what is no model in one line that says what it is, before any work."""
    out, path = tmp_path / "out", others[what]
    words = ("compare", place / "step-1", path, "--tasks", "shapes_text", "--out", out)
    code, said = call(monkeypatch, capsys, *words)
    assert code == 2 and message in said and len(said.strip().splitlines()) == 1, said
    code, said = call(monkeypatch, capsys, "geometry", path, place / "step-1", "--out", out)
    assert code == 2 and len(said.strip().splitlines()) == 1 and not out.exists(), said


def test_checkpoints_have_short_names(place):
    """An arm's folder is its checkpoint; names are the shortest ends that differ."""
    arm = place / "others2" / "arms" / "full"
    arm.mkdir(parents=True)
    (arm / "checkpoint").symlink_to(place / "step-1")
    assert folder_of(arm) == arm / "checkpoint" and what_it_is(place / "step-1") is None
    names = names_of(["builtin:shapes-student", "a/b", "c/b", arm / "checkpoint"])
    assert names == ["shapes-student", "a-b", "c-b", "arms-full"]
    assert folder_of("builtin:shapes-student") == BUILTIN / "shapes-student"
    with pytest.raises(ConfigError, match="a/b is given twice"):
        names_of(["a/b", "a/b"])
    with pytest.raises(UserError, match="share none"):
        compare({"a": place / "scores/evals/shapes-text-student", "b": _other_task(place)})


def _other_task(place: Path) -> Path:
    """Scores of another task."""
    folder = place / "of-another-task"
    folder.mkdir()
    source = place / "scores/evals/shapes-text-student/samples_shapes_text.jsonl"
    shutil.copy(source, folder / "samples_other_2026-01-01T00-00-00.000001.jsonl")
    return folder / "samples_other_2026-01-01T00-00-00.000001.jsonl"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("geometry RUN --out x", "--out: "),
        ("geometry RUN --trajectory", "--trajectory: "),
        ("geometry RUN --preset paper --set ratios=[0.2]", "--preset paper: "),
        ("geometry RUN --set null_drawss=1", "unknown key 'geometry.null_drawss'"),
        ("geometry RUN --workers 0", "workers 0: "),
        ("geometry RUN --device tpu", "device tpu: "),
        ("geometry RUN RUN/arms/base", "RUN/arms/base is no override"),
        ("geometry MODEL MODEL --set out=3", "--set out: "),
        ("geometry MODEL MODEL --set arms=[]", "arms: "),
        ("compare RUN --tasks a", "--tasks: "),
        ("compare RUN --out x", "--out: "),
        ("compare RUN --compute fp32", "--compute: "),
        ("compare SCORES SCORES/samples_shapes_text.jsonl --compute fp32", "compute: "),
        ("compare SCORES SCORES/samples_shapes_text.jsonl --set limit=3", "limit: "),
        ("geometry RUN --set arms=[]", "geometry.arms is empty"),
        ("retrain RUN", "no arm is derived"),
        ("mask export MASK --format booleans --out x.safetensors --base MODEL", "--base, "),
        ("compare RUN --set limits=3", "unknown key 'eval.limits'"),
        ("mask make RUN --out x", "--out: "),
        ("mask make RUN --rule {type='visible'}", "--rule: "),
        ("mask make MODEL MODEL --rule {type='visible'} --out x --mask m", "--mask: "),
    ],
)
def test_no_option_is_ignored(words, named, make_config, place, tmp_path, monkeypatch, capsys):
    """An option that has no effect for a run, or outside of one, is refused by its name in one line."""
    monkeypatch.chdir(tmp_path)
    RunFolder.create("RUN", make_config("llm", arms={"base": {"type": "base"}}))
    Path("MODEL").symlink_to(place / "step-1")
    Path("SCORES").symlink_to(place / "scores" / "evals" / "shapes-text-student")
    if "MASK" in words:
        make_mask({"type": "whole", "modules": ["ffn"]}, "MODEL").save("MASK")
    code, said = call(monkeypatch, capsys, *words.split())
    assert code == 2 and len(said.strip().splitlines()) == 1 and named in said, said


def test_nothing_printed_is_markup(make_config, tmp_path, monkeypatch, capsys):
    """A run in a folder r[x], of a config named so, prints its paths whole; no help text and no printed text of ours
    holds markup."""
    run = RunFolder.create(tmp_path / "r[x]", make_config("llm", arms={"base": {"type": "base"}}))
    code, said = call(monkeypatch, capsys, "run", run.root, "--until", "arms")
    assert code == 0 and f"arm base: {run.root}/arms/base/record.json" in said
    code, said = call(monkeypatch, capsys, "verify", run.root)
    assert code == 0 and f"of {run.root}, 0 altered" in said
    code, said = call(monkeypatch, capsys, "show", run.root)
    assert code == 0 and "base" in said

    def texts(command):
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for inner in getattr(command, "commands", {}).values():
            yield from texts(inner)

    for text in texts(typer.main.get_command(app)):
        assert render(text).plain == text
    for path in (ROOT / "vlopd" / "cli").glob("*.py"):
        assert not re.search(r"\[/\]|rich.markup|\[bold\]", path.read_text()), path


SAMPLE = {
    "doc_id": 0,
    "doc_hash": "h",
    "doc": {},
    "target": "a",
    "prompt_hash": "p",
    "exact_match": 1.0,
}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows; evaluate the model again with --log_samples"),
        ([3], "line 1 is not a JSON object"),
        ([{"doc_id": 0}], "line 1 is not a row of this file: doc_hash is missing"),
        ([SAMPLE], "line 1 is not a row of this file: question is missing"),
        ([SAMPLE | {"metrics": ["exact_match"], "filter": "none"}], "arguments is missing"),
    ],
)  # fmt: skip
def test_samples_of_another_version_are_one_clear_line(rows, message, tmp_path):
    """A samples file that lacks what is read of it is refused by its path, not with a traceback."""
    path = tmp_path / "samples_t.jsonl"
    write_jsonl(path, rows)
    with pytest.raises(RunError, match=message) as error:
        read_scored_rows("t", path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
