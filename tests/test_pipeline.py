"""Every verb, in order, on a miniature; what is done is not done again; mistakes are one line and exit code 2."""

import gc
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from evals.token_kl import _recorded_prompts
from tests.conftest import copy_of
from tests.test_pair import by_hand
from vlopd.cli import main
from vlopd.models.load import load_configured
from vlopd.run.folder import RunFolder
from vlopd.run.verify import verify_run
from vlopd.train.generation import sample
from vlopd.train.pair import load_pair

MINIATURE = """
name = "mini"
student = "{student}"
teacher = "{teacher}"
[precision]
compute = "bf16"
[data]
type = "shapes"
modality = "{modality}"
[rollout]
max_new_tokens = 6
[optim]
learning_rate = 3e-3
[train]
steps = 3
prompts_per_step = 6
save_every = 2
[masks]
visible = {{type = "visible", of = "full"}}
top = {{type = "top_fraction", of = "full", fraction = 0.1}}
random-0 = {{type = "random", like = "top", seed = 5}}
[arms]
base = {{type = "base"}}
teacher = {{type = "teacher"}}
full = {{type = "distill", seed = 1}}
subnetwork = {{type = "distill", seed = 2, mask = "top"}}
transplant = {{type = "transplant", of = "full", mask = "top"}}
random-0 = {{type = "distill", seed = 2, mask = "random-0"}}
[geometry]
arms = ["full", "random-0"]
null_draws = 1
ratios = [0.1]
[eval]
tasks = ["{task}"]
limit = 12
batch_size = 6
keep_images = 2
bootstrap_draws = 500
"""
ARMS = ("base", "teacher", "full", "subnetwork", "transplant", "random-0")


def vlopd(monkeypatch, *words) -> int:
    """Runs the command line in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["vlopd", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main.main()
    code = stop.value.code or 0
    del stop
    gc.collect()  # a command's process would have ended here, and its lock on the run folder with it
    return code


def written(folders, kind: str, path: Path) -> Path:
    path.write_text(
        MINIATURE.format(
            student=folders[kind, "student"],
            teacher=folders[kind, "teacher"],
            modality="image" if kind == "vlm" else "text",
            task="shapes" if kind == "vlm" else "shapes_text",
        )
    )
    return path


@pytest.fixture
def miniature(folders, kind, tmp_path) -> Path:
    return written(folders, kind, tmp_path / "mini.toml")


@pytest.fixture
def finished(folders, kind, tmp_path, tmp_path_factory) -> Path:
    """A run that was made verb by verb, with its config beside it as mini.toml."""

    def make(folder: Path) -> None:
        config, run = written(folders, kind, folder / "mini.toml"), folder / "run"
        first = ("--until", "arms", "--arm", "base", "--arm", "teacher", "--arm", "full")
        with pytest.MonkeyPatch.context() as patch:
            assert vlopd(patch, "check", config) == 0
            assert vlopd(patch, "run", config, "--out", run, *first) == 0
            for verb in ("mask make", "retrain", "geometry", "eval", "compare", "report", "show"):
                assert vlopd(patch, *verb.split(), run) == 0, verb

    copy_of(f"pipeline-{kind}", make, tmp_path, tmp_path_factory)
    return tmp_path / "run"


FULL = ("--until", "arms", "--arm", "full")
"""Of `run`: trains full OPD and stops."""


def files_and_times(root: Path) -> dict[str, int]:
    return {
        str(p.relative_to(root)): p.stat().st_mtime_ns
        for p in root.rglob("*")
        if p.is_file() and p.name != ".lock" and p.parent.name != ".locks"
    }


def test_every_verb_in_order(kind, finished, tmp_path, monkeypatch):
    """The stages one by one leave the run folder of the contract, and `run` then finds nothing to do."""
    run = finished
    for arm in ARMS:
        record = json.loads((run / "arms" / arm / "record.json").read_text())
        assert (
            record["checkpoint_digest"]
            and record["inputs"]
            and record["precision"]["values"] == "fp32"
        )
        assert (run / "evals" / arm / "results.json").exists()
    for arm in ("full", "subnetwork", "random-0"):
        assert len((run / "arms" / arm / "metrics.jsonl").read_text().splitlines()) == 3
    for name in ("masks/top.safetensors", "masks/top.json", "geometry/full/geometry.csv",
                 "geometry/full/summary.json", "geometry/full/match.json",
                 "geometry/full/geometry.parquet", "geometry/overlap.csv", "report/report.html",
                 "report/report.md", "arms/full/samples.jsonl"):  # fmt: skip
        assert (run / name).exists(), name
    compared = json.loads((run / "compare.json").read_text())
    (task,) = compared["tasks"].values()
    for arm in ARMS:
        row = task["arms"][arm]
        assert row["n"] == 12
        assert {"mean", "standard_error", "interval", "difference_to_full", "recovery"} <= set(row)

    before = files_and_times(run)
    assert vlopd(monkeypatch, "run", tmp_path / "mini.toml", "--out", run) == 0
    assert files_and_times(run) == before

    # the mask held, the transplant is what it says, and plain transformers loads every checkpoint
    tensors = {
        a: load_file(run / "arms" / a / "checkpoint" / "model.safetensors")
        for a in ARMS
        if a != "teacher"
    }
    from vlopd.masks.files import load_mask

    mask, _ = load_mask(run / "masks" / "top.safetensors")
    for name, base in tensors["base"].items():
        marked = mask[name]
        assert torch.equal(tensors["subnetwork"][name][~marked], base[~marked])
        assert torch.equal(tensors["transplant"][name][~marked], base[~marked])
        assert torch.equal(tensors["transplant"][name][marked], tensors["full"][name][marked])
    for arm in ("full", "subnetwork", "transplant", "random-0"):
        squares = [
            float((tensor.double() - tensors["base"][name].double()).square().sum())
            for name, tensor in tensors[arm].items()
        ]
        norm, found = sum(squares) ** 0.5, compared["arms"][arm]
        assert found["delta_norm"] == pytest.approx(norm, rel=1e-9) and norm > 0
        measured = json.loads((run / "evals" / arm / "base_kl.json").read_text())
        assert found["kl_to_base"] == measured["kl_to_base"] > 0
    assert compared["arms"]["base"]["kl_to_base"] is None
    for arm in ("subnetwork", "transplant", "random-0"):
        assert (
            json.loads((run / "arms" / arm / "record.json").read_text())["off_mask_unmoved"] is True
        )
    auto = AutoModelForImageTextToText if kind == "vlm" else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        run / "arms" / "full" / "checkpoint", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    full = dict(model.named_parameters())
    assert all(torch.equal(full[n], t) for n, t in tensors["full"].items() if n in full)


def test_kl_to_the_base_is_that_of_two_forward_passes(kind, finished):
    """The mean over all tokens of the arm's greedy answers to the first questions, worked out by hand."""
    run, config = RunFolder.open(finished, locked=False)
    arm, base = (
        load_configured(config.student, torch.bfloat16, folder=run.checkpoint(name))
        for name in ("full", "base")
    )
    pair = load_pair(config.student, compute="bf16", student_folder=run.checkpoint("full"))
    ((_, examples),) = _recorded_prompts(config.eval.tasks[0], config.eval).items()
    prompts = pair.student.render(examples)
    longest = int(examples[0].fields["tokens"])
    answers = sample(pair.student, prompts, longest, 0, columns=pair.vocabulary.student)
    found = []
    for example, ids, mask in zip(examples, answers.ids, answers.mask, strict=True):
        q, p = (by_hand(model, example, ids[mask].tolist()).double() for model in (arm, base))
        found.append((q.exp() * (q - p)).sum(-1))
    measured = json.loads((finished / "evals" / "full" / "base_kl.json").read_text())
    every = torch.cat(found)
    assert measured["tokens"] == len(every) and len(examples) == 2
    assert measured["kl_to_base"] == pytest.approx(float(every.mean()), rel=0.05)


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_a_finished_run_grows(kind, finished, tmp_path, monkeypatch, capsys):
    """Two arms and a task more: what is kept, what is made and why is said first, nothing else is touched, a kill in
    between resumes, the report has them, and run.json has the config before."""
    run, miniature = finished, tmp_path / "mini.toml"
    before = files_and_times(run)
    text = miniature.read_text()
    second = "capitals"
    text = text.replace(
        "[geometry]",
        """random-1 = {type = "distill", seed = 2, mask = "random-1"}
early = {type = "transplant", of = "full", mask = "visible"}
[geometry]""",
    ).replace("[arms]", 'random-1 = {type = "random", like = "top", seed = 6}\n[arms]')
    task = "shapes" if kind == "vlm" else "shapes_text"
    text = text.replace(f'tasks = ["{task}"]', f'tasks = ["{second}", "{task}"]')
    miniature.write_text(text)
    capsys.readouterr()

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("vlopd.run.make.write_transplant", killed)
        vlopd(patch, "run", miniature, "--out", run)
    gc.collect()
    out = capsys.readouterr().out
    (kept,) = [line for line in out.splitlines() if line.startswith("kept: ")]
    made = [line for line in out.splitlines() if line.startswith("to be made: ")]
    assert "config: eval.tasks: " in out and "config: arms.random-1: new" in out
    for artifact in (
        "arms/base",
        "arms/full",
        "arms/random-0",
        "masks/top",
        "geometry/full",
        "geometry/overlap",
    ):
        assert artifact in kept
    assert "arms/random-1" in made[0] and "masks/random-1" in made[0] and made[0].endswith("(new)")
    assert any("evals/full" in line and f"tasks.{second}" in line for line in made)
    assert (run / "arms" / "random-1" / "record.json").exists()
    trained = files_and_times(run / "arms" / "random-1")

    assert vlopd(monkeypatch, "run", miniature, "--out", run) == 0
    after = files_and_times(run)
    assert files_and_times(run / "arms" / "random-1") == trained
    renewed = {name for name in before if after.get(name) != before[name]}
    rewritten = set()
    for record, name in (("results", "evals"), ("tokens", "tokens"), ("base_kl", "base_kl")):
        rewritten |= {f"evals/{arm}/{record}.json" for arm in ARMS}
        rewritten |= {f"checksums/{name}--{arm}.sha256" for arm in ARMS}
    rewritten |= {"run.json", "checksums/run.sha256", "compare.json", "checksums/compare.sha256"}
    rewritten |= {"checksums/report.sha256"} | {n for n in before if n.startswith("report/")}
    assert renewed <= rewritten, renewed - rewritten
    compared = json.loads((run / "compare.json").read_text())
    assert set(compared["tasks"]) == {task, second}
    assert {"random-1", "early"} <= set(compared["tasks"][second]["arms"])
    page = (run / "report" / "report.html").read_text()
    assert "random-1" in page and second in page
    about = json.loads((run / "run.json").read_text())
    assert [entry["config"]["eval"]["tasks"] for entry in about["history"]] == [[task]]

    # the other way round: a task and an arm less leave the results of the others as they are
    numbers = json.loads((run / "evals" / "full" / "results.json").read_text())["results"][task]
    done = files_and_times(run)
    assert vlopd(monkeypatch, "eval", run, "--arm", "full", f"eval.tasks=['{task}']") == 0
    results = json.loads((run / "evals" / "full" / "results.json").read_text())
    assert set(results["results"]) == {task} and results["results"][task] == numbers
    rows = f"evals/full/samples_{task}.jsonl"
    assert files_and_times(run)[rows] == done[rows]
    assert not (run / "evals" / "full" / f"samples_{second}.jsonl").exists()
    # and nothing is left of results of which nothing is kept
    assert vlopd(monkeypatch, "eval", run, "--arm", "full", f"eval.tasks=['{second}']") == 0
    assert not verify_run(RunFolder(run)).unknown


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_what_a_config_invalidates_is_made_again(miniature, tmp_path, monkeypatch, capsys):
    """Another number of steps trains again, and what is made from it; the base and the teacher stay. Nothing of the
    arm before is left: neither its steps' numbers nor its early checkpoints."""
    run = tmp_path / "run"
    words = ("run", miniature, "--out", run, "--until", "geometry", "geometry.arms=['full']")
    assert vlopd(monkeypatch, *words, "train.keep_steps=[1, 2]") == 0
    full = run / "arms" / "full"
    assert (full / "checkpoints" / "step-1").is_dir()
    before = files_and_times(run)
    capsys.readouterr()
    assert vlopd(monkeypatch, *words, "train.keep_steps=[2]", "train.steps=2") == 0
    made = [line for line in capsys.readouterr().out.splitlines() if "to be made: " in line]
    assert any("arms/full" in line and "train.steps: 3 -> 2" in line for line in made), made
    assert any("masks/top" in line and "depends on arms/full" in line for line in made), made
    after = files_and_times(run)
    same = {n for n in before if n.startswith(("arms/base/", "arms/teacher/"))}
    assert same and all(after[name] == before[name] for name in same)
    assert len((full / "metrics.jsonl").read_text().splitlines()) == 2
    assert [path.name for path in (full / "checkpoints").iterdir()] == ["step-2"]
    assert not (run / "geometry" / "full" / "steps" / "1").exists()


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_results_of_an_earlier_config_are_not_reported(finished, monkeypatch, capsys):
    """Arms that another config has trained again are not reported with the evaluation, tokens or geometry before:
    `compare` and `report` name what is due, and `show` the arms. What the config no longer asks for goes."""
    run = finished
    page = (run / "report" / "report.html").read_text()
    assert vlopd(monkeypatch, "run", run, "--until", "arms", "train.steps=2") == 0
    for verb, artifact in (("compare", "evals/full"), ("report", "geometry/full")):
        capsys.readouterr()
        assert vlopd(monkeypatch, verb, run) == 2
        error = capsys.readouterr().err
        assert f"{artifact} is outdated" in error and "vlopd run" in error, error
    assert (run / "report" / "report.html").read_text() == page
    assert vlopd(monkeypatch, "show", run) == 0
    shown = capsys.readouterr().out
    (full,) = [line for line in shown.splitlines() if " full " in line and "distill" in line]
    assert "as it was before" in full, shown
    assert vlopd(monkeypatch, "eval", run) == 0
    assert vlopd(monkeypatch, "compare", run) == 0
    capsys.readouterr()
    assert vlopd(monkeypatch, "report", run) == 2
    assert "geometry/full is outdated" in capsys.readouterr().err
    assert vlopd(monkeypatch, "geometry", run) == 0
    assert vlopd(monkeypatch, "report", run) == 0

    assert list((run / "evals" / "full").glob("tokens*"))
    assert vlopd(monkeypatch, "eval", run, "eval.keep_images=0") == 0
    assert not list(run.glob("evals/*/tokens*")) and not list(run.glob("checksums/tokens*"))
    assert vlopd(monkeypatch, "report", run) == 0


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_what_was_measured_of_arms_before_is_not_shown(finished, monkeypatch):
    """After a change of the arms the report has no geometry, overlap or probes of the arms before; a mask that
    no arm uses is made again with them; the pictures that earlier rows show stay vouched for."""
    run = finished
    assert vlopd(monkeypatch, "vision", run, "--pictures", 24, "--arm", "full") == 0
    assert vlopd(monkeypatch, "report", run) == 0
    tables = run / "report" / "tables"
    assert set(pd.read_csv(tables / "geometry.csv").arm) == {"full", "random-0"}
    assert set(pd.read_csv(tables / "probes.csv").arm) == {"full"}
    assert list((run / "report" / "figures").glob("geometry-overlap*"))
    before = files_and_times(run)

    changed = ("train.steps=2", "geometry.arms=['full']", "eval.keep_images=1")
    early = "arms.early={type='transplant', of='full', mask='visible'}"
    assert vlopd(monkeypatch, "run", run, *changed, "--until", "arms") == 0
    assert files_and_times(run)["masks/visible.json"] != before["masks/visible.json"]
    assert vlopd(monkeypatch, "run", run, early) == 0
    assert set(pd.read_csv(tables / "geometry.csv").arm) == {"full"}
    assert not (tables / "probes.csv").exists()
    assert not list((run / "report" / "figures").glob("geometry-overlap*"))
    pictures = sorted(p.name for p in (run / "evals" / "images" / "shapes").glob("*.png"))
    assert pictures == ["0.png", "1.png"]
    found = verify_run(RunFolder(run))
    assert not found.problems and not found.unknown and not found.inputs


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_mistakes_are_one_line_and_exit_code_2(finished, tmp_path, monkeypatch, capsys):
    """An unknown key, a missing data file, another config, an unknown arm, task or model."""
    run, miniature = finished, tmp_path / "mini.toml"
    capsys.readouterr()

    empty = tmp_path / "empty.toml"
    sections = "data = {type = 'shapes'}\ntrain = {steps = 1, prompts_per_step = 1}\n"
    sections += "arms = {}\ngeometry = {arms = []}\n"
    empty.write_text(f"name = 'x'\nstudent = '{tmp_path}'\nteacher = '{tmp_path}'\n{sections}")

    def refused(message: str, *words) -> None:
        assert vlopd(monkeypatch, *words) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("vlopd: ")]
        assert len(lines) == 1 and message in lines[0], error
        assert "Traceback" not in error

    refused("did you mean 'steps'", "run", miniature, "train.step=3", "--out", tmp_path / "x")
    refused("arms is empty", "run", empty, "--out", tmp_path / "x")
    refused("student.model: ", "run", miniature, "student='elsewhere'", "--out", run)
    refused('precision.stored: "auto" -> "fp32"', "eval", run, "precision.stored=fp32")
    refused("arms/full is outdated (inputs changed: recipe.train.steps: 3 -> 4",
            "eval", run, "train.steps=4", "--arm", "full")  # fmt: skip
    refused("no data file", "run", miniature, "data={type='file', path='gone.jsonl'}",
            "--out", tmp_path / "y", "--arm", "full")  # fmt: skip
    refused("arm nope: not in the config", "run", miniature, "--out", run, "--arm", "nope")
    refused("not a run folder", "eval", tmp_path)
    refused("eval.tasks: no task", "run", miniature, "eval.tasks=['nope']",
            "--out", tmp_path / "z", "--arm", "base")  # fmt: skip


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_a_foreign_or_damaged_mask_is_refused(miniature, folders, tmp_path, monkeypatch, capsys):
    """A mask of another base, truncated or with a flipped bit ends in one line that names the file."""
    run, other = tmp_path / "run", tmp_path / "other"
    assert vlopd(monkeypatch, "run", miniature, *FULL, "--out", run, "--arm", "base") == 0
    assert vlopd(monkeypatch, "run", miniature, *FULL, "--out", run) == 0
    assert vlopd(monkeypatch, "mask", "make", run) == 0
    path = run / "masks" / "top.safetensors"
    good = path.read_bytes()

    def refused(message: str) -> None:
        capsys.readouterr()
        assert vlopd(monkeypatch, "retrain", run, "--arm", "subnetwork") == 2
        error = capsys.readouterr().err
        assert message in error and "top" in error and "Traceback" not in error, error

    path.write_bytes(good[: len(good) // 2])
    refused("top.safetensors")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused("top.safetensors")
    teacher_as_student = f"student='{folders['llm', 'teacher']}'"
    assert vlopd(monkeypatch, "run", miniature, teacher_as_student, *FULL, "--out", other) == 0
    assert vlopd(monkeypatch, "mask", "make", other) == 0
    path.write_bytes((other / "masks" / "top.safetensors").read_bytes())
    refused("mask")
