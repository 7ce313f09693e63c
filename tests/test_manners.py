"""The command line's manners: templates, task list, bars, completion, upload, precision, settings without effect."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest
import torch
from huggingface_hub import constants
from rich.table import Table
from typer.testing import CliRunner

from evals.report.page import environment
from evals.task_list import list_tasks
from tests.command import call
from vlopd import pipeline
from vlopd.cli import init, main
from vlopd.cli.common import PlainConsole
from vlopd.cli.main import app
from vlopd.config.input import load_config
from vlopd.config.tracking import TrackingConfig
from vlopd.errors import CONTROLS
from vlopd.files import read_json
from vlopd.interrupts import CODES
from vlopd.run.folder import RunFolder

QUICK = ("train.steps=2", "train.prompts_per_step=4", "eval.limit=4", "eval.keep_images=1")
TEMPLATES = get_args(init.Template)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """The folder with every template, written by `vlopd init`."""
    folder = tmp_path_factory.mktemp("templates")
    for name in TEMPLATES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(init, "ROWS", {"image": 8, "text": 8})
            made = CliRunner().invoke(app, ["init", "--from", name, str(folder / f"{name}.toml")])
        assert made.exit_code == 0, made.output
        assert f"vlopd check {folder / name}.toml" in made.output.replace("\n", "")
    return folder


@pytest.fixture(scope="module")
def finished(templates, tmp_path_factory):
    """(run folder, stderr) of a few steps of the llm template, up to the evaluation of its subnetwork."""
    out = tmp_path_factory.mktemp("runs") / "llm"
    words = ["run", templates / "llm.toml", *QUICK, "--out", out, "--until", "evals"]
    made = CliRunner().invoke(app, [*map(str, words), "--arm", "subnetwork"])
    assert made.exit_code == 0, made.output
    return out, made.stderr


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_pass_the_checks_of_a_run(name, templates):
    """`vlopd init` writes configs in which `vlopd check` finds no problem and no setting without effect."""
    config = load_config(templates / f"{name}.toml", QUICK).with_compute("fp32")
    assert pipeline.find_problems(config, list(config.arms), True) == []
    assert load_config(templates / f"{name}.toml").all_notes == []


def test_init_does_not_overwrite(templates, monkeypatch, capsys):
    """An existing config is kept unless --force is passed."""
    path = templates / "llm.toml"
    before = path.read_text()
    code, said = call(monkeypatch, capsys, "init", path)
    assert code == 2 and "exists already" in said and path.read_text() == before
    code, said = call(monkeypatch, capsys, "init", templates, "--force")
    assert code == 2 and f"{templates} is a folder" in said


def test_init_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    """The config comes last: without it the data is written again, unless it is other data."""
    monkeypatch.setattr(init, "ROWS", {"image": 2, "text": 8})
    words = ("init", "--from", "llm", tmp_path / "a.toml")
    assert call(monkeypatch, capsys, *words)[0] == 0
    rows = (tmp_path / "a-data" / "train.jsonl").read_text()
    (tmp_path / "a.toml").unlink()
    assert call(monkeypatch, capsys, *words)[0] == 0
    assert (tmp_path / "a-data" / "train.jsonl").read_text() == rows
    (tmp_path / "a.toml").unlink()
    (tmp_path / "a-data" / "train.jsonl").write_text("mine")
    code, said = call(monkeypatch, capsys, *words)
    assert code == 2 and "train.jsonl exists already" in said
    assert not (tmp_path / "a.toml").exists()


def test_init_of_any_name(tmp_path, monkeypatch, capsys):
    """A name with quotes and spaces gives a config that loads; --force keeps other files of the data's folder."""
    monkeypatch.setattr(init, "ROWS", {"image": 2, "text": 2})
    path = tmp_path / 'a "b" \\.toml'
    code, said = call(monkeypatch, capsys, "init", path, "--from", "llm")
    assert code == 0 and f"vlopd check '{path}'" in said
    data = Path(load_config(path).data.path).parent
    (data / "mine.jsonl").write_text("kept")
    assert call(monkeypatch, capsys, "init", path, "--from", "llm", "--force")[0] == 0
    assert (data / "mine.jsonl").read_text() == "kept"


def test_bars_are_lines_where_stderr_is_no_terminal(finished):
    """A training step and an evaluation have bars with names; in a pipe they are whole lines."""
    _, said = finished
    assert "\r" not in said
    assert "full: steps: 100% 2/2" in said and "subnetwork: shapes_text: 100% 4/4" in said


def test_a_long_bar_prints_now_and_then():
    """In a pipe a bar prints one line every so many seconds and one at the end; a nested one none at its end."""
    script = """if True:
        import time
        from vlopd import progress
        progress.SECONDS_BETWEEN_LINES = 0.2
        for _ in progress.progress(range(6), title="outer: steps"): time.sleep(0.09)
        for _ in progress.progress(range(3), title="inner", leave=False): pass
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and "inner" not in done.stderr
    assert 2 <= len(lines) <= 4 and all(line.startswith("outer: steps: ") for line in lines)
    assert lines[-1].startswith("outer: steps: 100% 6/6")


def test_auto_precision_is_resolved_once_a_run(templates, tmp_path, monkeypatch):
    """`auto` becomes this device's precision; the run keeps it where another device would choose another."""

    def opened(amx: bool, *overrides: str):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        run, config = pipeline.prepare(templates / "llm.toml", overrides, tmp_path / "run")
        run.unlock()
        return run, config

    run, config = opened(True)
    assert config.precision.compute == "bf16"
    run.save_config(config)
    run, config = opened(False)
    assert config.precision.compute == "bf16" and run.changes == []
    assert opened(False, "precision.compute='fp32'")[0].changes == [
        'precision.compute: "bf16" -> "fp32"'
    ]
    assert RunFolder.open(tmp_path / "run")[1].precision.compute == "bf16"


def test_settings_that_come_too_late_are_said(finished):
    """Trackers and held-out evaluation have no effect on arms that are trained; the plan says so."""
    run, config = pipeline.prepare(finished[0], ["tracking.trackers=['tensorboard']"])
    planned = pipeline.plan(run, config, ["full", "random-0"], "arms")
    (line,) = pipeline.without_effect(run, config, planned)
    run.unlock()
    assert line == "tracking: only read while an arm trains, so not for full"


def test_how_a_step_is_split_is_no_input(finished):
    """Batches, chunks, engine and where tensors are kept: a finished arm stays as it is, which is said; its record has
    those it was made with. So has each setting that is proposed where memory does not suffice."""
    changes = ["train.micro_batch=1", "train.activation_checkpointing=true", "rollout.batch=1"]
    changes += ["rollout.engine='static'", "loss.chunk_tokens=64"]
    run, config = pipeline.prepare(finished[0], changes)
    planned = pipeline.plan(run, config, ["full"], "arms")
    (line,) = pipeline.without_effect(run, config, planned)
    run.unlock()
    assert planned["arms/full"] is None
    assert line.endswith("only read while an arm trains, so not for full")
    made = read_json(run.arm_record("full"))["execution"]
    assert made["rollout.engine"] == "eager" and made["train.activation_checkpointing"] is False
    assert {change.split("=")[0] for change in changes} <= made.keys()


def test_memory_of_an_arm_is_recorded_beside_what_was_predicted(finished):
    """memory.json of a run's arm has the parts that `check` predicts; weights, moments and values are equal."""
    run = RunFolder.open(finished[0])[0]
    about = read_json(run.arm("full") / "memory.json")
    found, expected = about["parts_bytes"], about["predicted"]["parts_bytes"]
    assert found.keys() <= expected.keys()
    for part in ("student_weights", "teacher_weights", "values", "moments", "sampling"):
        assert found[part] == pytest.approx(expected[part], rel=0.02), part
    assert found["kv_cache"] <= expected["kv_cache"]  # completions may have ended early
    assert about["predicted"]["peak_bytes"].keys() == {"rollout", "teacher", "student", "update"}


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["tracking.project='x'"], "tracking.project: no effect without tracking.trackers"),
        (
            ["tracking={trackers=['tensorboard'], tags=['a']}"],
            "tracking.tags: no effect on tensorboard",
        ),
        (
            ["geometry={arms=[], null_draws=8}"],
            "geometry.null_draws: no effect without geometry.arms",
        ),
        (["masks.other={type='visible', of='full'}"], "masks other: no arm is made under them"),
        (
            ["rollout={source='data', temperature=0.5}", "loss.type='nll'"],
            "rollout.temperature: no effect on the data's answers",
        ),
        (
            [
                "reward.rule='exact_match'",
                "rollout.completions_per_prompt=2",
                "loss.type='forward_kl'",
            ],
            "loss forward_kl: no effect on training with reward.alpha = 0",
        ),
        (
            ["train.freeze=['vision']", "optim.component_rates.vision=0.1"],
            "optim.component_rates.vision: no effect on a component in train.freeze",
        ),
        (
            ["teacher={model='student', ema=0.9, attention='eager'}"],
            "teacher.attention: no effect on a teacher that is the student",
        ),
    ],
)
def test_settings_without_effect_are_said(settings, note, templates):
    """A setting that nothing reads in its combination has a note with its name; the template itself has none."""
    notes = load_config(templates / "llm.toml", settings).all_notes
    assert any(line.startswith(note) for line in notes), notes


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_openmp_is_set_before_torch_loads(given, found, monkeypatch, capsys):
    """The command line makes OpenMP's threads sleep where idle unless the user set it, as `scripts/env` does."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    call(monkeypatch, capsys, "--help")
    assert os.environ["OMP_WAIT_POLICY"] == found
    environment = (Path(__file__).parents[1] / "scripts" / "env").read_text()
    for name, value in main.THREADS.items():
        assert f'export {name}="${{{name}:-{value}}}"' in environment
    if given is None:  # libgomp reads it once
        loads = "import sys, vlopd.cli.main; print('torch' in sys.modules)"
        out = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True)
        assert out.stdout.strip() == "False", out.stderr


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_while_libraries_are_imported(number):
    """It ends the command in one line, with the exit code that it has later."""
    code = f"""
import os, sys
from vlopd.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == "vlopd.pipeline":
            os.kill(os.getpid(), {int(number)})

sys.meta_path.insert(0, Finder())
main()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == CODES[number]
    assert found.stderr == "vlopd: interrupted; run the same command again to go on\n"


def test_controls_of_a_terminal_are_escaped():
    """What a run of somebody else says reaches neither the terminal nor a page with its escape sequences."""
    text = "red\x1b[31m \x07\u202e[bold]"
    out = io.StringIO()
    console = PlainConsole(file=out, markup=False, width=80)
    table = Table("a", title=text)
    table.add_row(text)
    console.print(table, text)
    assert not CONTROLS.search(out.getvalue()) and "u202e[bold]" in out.getvalue()
    page = environment().from_string("{{ text }}").render(text=text)
    assert page == r"red\x1b[31m \x07\u202e[bold]"


def test_tracker_arguments():
    """wandb gets project, group, entity, tags and mode; others what they have a place for; unset ones are left out."""
    plain = TrackingConfig(trackers=("wandb", "trackio", "tensorboard"))
    assert plain.arguments("wandb", "mine", "run-3", "full") == {
        "project": "mine",
        "group": "run-3",
        "name": "full",
    }
    full = plain.model_copy(
        update={"project": "p", "group": "g", "entity": "e", "tags": ("t",), "mode": "online"}
    )
    assert full.arguments("wandb", "mine", "run-3", "full") == {
        "project": "p",
        "group": "g",
        "entity": "e",
        "tags": ["t"],
        "mode": "online",
        "name": "full",
    }
    assert full.arguments("trackio", "mine", "r", "full") == {
        "project": "p",
        "group": "g",
        "name": "full",
    }
    assert full.arguments("tensorboard", "mine", "r", "full") == {"project": "mine-full"}


def test_a_task_with_a_dataset_function_is_loaded(tmp_path):
    """`--load` reads the questions of a task of one's own whose rows come from a function (docs/how-to/own-task.md)."""
    (tmp_path / "signs.py").write_text(
        "from datasets import Dataset\n\n\ndef dataset(**_):\n"
        '    return {"test": Dataset.from_list([{"question": "how many red", "answer": "1"}] * 3)}\n'
    )
    (tmp_path / "signs.yaml").write_text(
        "task: signs\ncustom_dataset: !function signs.dataset\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    )
    (row,) = list_tasks("signs", str(tmp_path), load=True)
    assert (row.questions, row.reachable) == ("3", "yes")


def test_tasks_are_listed_without_their_data(tmp_path, monkeypatch):
    """Tasks of a folder stand beside ours; missing files and hub data sets that are not cached are said to be so."""
    task = {
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_choice": ["a", "b", "c", "d"],
    }
    for name, file in {"here": tmp_path / "rows.jsonl", "gone": tmp_path / "gone.jsonl"}.items():
        own = {**task, "task": name, "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(own))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    rows = {row.task: row for row in list_tasks(include=str(tmp_path))}
    assert rows["here"].reachable == "yes" and rows["here"].chance == "0.25"
    assert rows["gone"].reachable == f"no: {tmp_path / 'gone.jsonl'} is missing"
    assert rows["shapes"][1:] == ("built-in", "image", "exact_match", "measured", "3,000", "yes")
    gsm8k = rows["vlopd_gsm8k"]
    assert gsm8k.source == "openai/gsm8k" and gsm8k.reachable.startswith("no: not cached")
    assert [row.task for row in list_tasks("shapes_t*")] == [
        "shapes_text",
        "shapes_text_validation",
    ]


def test_versions_and_completion(templates):
    """--version names the libraries; the shell completes an option's arms from the config before it."""
    said = CliRunner().invoke(app, ["--version"]).output
    assert all(f"{name} " in said for name in ("vlopd", "torch", "transformers", "python"))
    words = f"vlopd run {templates / 'compare.toml'} --arm ra"
    environment = {"_VLOPD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    said = CliRunner().invoke(app, prog_name="vlopd", env=environment).output
    assert said.split() == ["random-0", "random-1", "random-2"]


class Hub(BaseHTTPRequestHandler):
    """The three requests of a commit to the hub, with every file sent inline."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        url, answer = f"http://{self.headers['host']}/me/mine", {}
        self.server.asked.append((self.path, body))
        if self.path.endswith("/repos/create"):
            answer = {"url": url, "name": "me/mine"}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{"path": name, **mode} for name in names]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_an_arm_is_pushed_with_its_record_and_mask(finished, monkeypatch, capsys):
    """`vlopd push` commits checkpoint, record, mask and a model card with the scores; --dry-run sends nothing."""
    words = ("push", finished[0], "--arm", "subnetwork", "--repo", "me/mine")
    files = {"README.md", "model.safetensors", "record.json", "mask/mask.safetensors"}
    code, said = call(monkeypatch, capsys, *words, "--dry-run")
    assert code == 0 and all(f"{name} (" in said for name in files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, said = call(monkeypatch, capsys, *words)
    assert code == 2 and "me/mine: the upload failed" in said and said.count("\n") == 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    code, said = call(monkeypatch, capsys, *words, "--private")
    server.shutdown()
    assert code == 0 and "uploaded to: me/mine" in said
    assert json.loads(dict(server.asked)["/api/repos/create"])["visibility"] == "private"
    (commit,) = [body for path, body in server.asked if "/commit/" in path]
    lines = [json.loads(line)["value"] for line in commit.splitlines()]
    by_name = {line["path"]: line for line in lines if "path" in line}
    assert files <= by_name.keys()
    card = base64.b64decode(by_name["README.md"]["content"]).decode()
    assert "| shapes_text | exact_match |" in card
