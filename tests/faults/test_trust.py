"""No one let in: what others wrote (run folders, task files, data, weights, answers) runs nothing and leaves its place.

Every attack writes a file OWNED, or would read or write a file outside; each has a valid twin that passes.
"""

import importlib.util
import json
import os
import pickle
import platform
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import markdown as python_markdown
import numpy as np
import pytest
import torch
from datasets import Dataset
from jinja2.exceptions import SecurityError
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, dynamic_module_utils

from evals import preflight
from evals.harness import without_places
from evals.report.examples import _data_uri, _read_rows
from evals.report.markdown import markdown
from evals.scoring import Tasks, load_task
from tests.command import call
from tests.conftest import copy_of
from vlopd import trust
from vlopd.api.push import push
from vlopd.api.run import Run
from vlopd.cli import main
from vlopd.config.analysis import EvalConfig
from vlopd.config.data import FileData
from vlopd.config.engines import VllmEngine
from vlopd.config.input import load_config
from vlopd.config.tracking import TrackingConfig
from vlopd.data.dataset import FileDataset
from vlopd.data.tables import open_table
from vlopd.engines.client import Client, EngineError
from vlopd.engines.process import started_vllm
from vlopd.errors import ConfigError, DataError, PluginError, RunError, UserError
from vlopd.files import is_abandoned, read_json, whole_file, whole_folder, write_json
from vlopd.masks.foreign import open_foreign
from vlopd.models.integrity import INDEX, read_headers
from vlopd.models.load import BUILTIN, load, load_model_config
from vlopd.plugins import Plugin
from vlopd.run.folder import RunFolder
from vlopd.run.provenance import provenance
from vlopd.train.log import open_trackers, refuse_trackers
from vlopd.train.teacher_context import with_template
from vlopd.types import Example
from vlopd.update_geometry.partial import load_partial
from vlopd.weights.reader import Weights

ROOT = Path(__file__).parents[2]
ATTACK = "from pathlib import Path\nPath('OWNED').write_text('')\n"
"""Module code that shows that it ran."""
CODE = """from datasets import Dataset
def dataset(**_):
    return {"test": Dataset.from_list([{"question": "what is at center", "answer": "red circle"}] * 2)}
def score(doc, results):
    return {"correct": float(results[0] == doc["answer"])}
def chance(docs):
    return {"all": 0.1}
"""
TASK = """task: NAME
custom_dataset: !function mine.dataset
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function mine.score
generation_kwargs: {until: [], do_sample: false, max_gen_toks: 2}
metric_list: [{metric: correct, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, chance: !function mine.chance}
"""
CONFIG = """name = "mine"
student = "builtin:shapes-text-student"
teacher = "builtin:shapes-text-teacher"
precision = {compute = "fp32"}
data = {type = "shapes", modality = "text"}
rollout = {max_new_tokens = 2}
train = {steps = 2, prompts_per_step = 1, keep_steps = [1]}
geometry = {nulls = [], null_draws = 0}
eval = {tasks = ["mine"], include = "tasks"}
[masks]
signs = {type = "rules:signs"}
[arms]
base = {type = "base"}
full = {type = "distill"}
"""


@pytest.fixture(autouse=True)
def nobody_is_known(monkeypatch):
    """Each test is a process of its own: no name of code is the user's, none is withheld."""
    monkeypatch.setattr(trust, "_own", set())
    monkeypatch.setattr(trust, "_received", {})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_task(folder: Path, name: str = "mine", code: str = CODE, **changes: str) -> None:
    """Writes NAME.yaml and mine.py; `changes` replaces lines of the YAML by their key."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = TASK.replace("NAME", name).splitlines()
    lines = [
        f"{k}: {changes[k]}" if (k := line.partition(":")[0]) in changes else line for line in lines
    ]
    (folder / "mine.yaml").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text(code)


def owned() -> bool:
    return Path("OWNED").exists()


# --------------------------------------------------------------------------------------- templates

ATTRIBUTES = "{{ question.__class__.__mro__[1].__subclasses__() }}"
CHANGES = "{% set _ = choices.append(1) %}{{ question }}"


@pytest.mark.parametrize("template", [ATTRIBUTES, CHANGES, "{{ question | attr('__class__') }}"])
def test_a_tasks_template_is_in_the_sandbox(template, here):
    """lm-eval's own rendering reads no internals and changes no value; the twin renders, also with lm-eval's filter."""
    code = CODE.replace('"answer":', '"choices": ["a"], "answer":')
    write_task(here / "tasks", code=code, doc_to_text=json.dumps(template))
    (line,) = preflight.find_problems(EvalConfig(tasks=("mine",), include="tasks"), {})
    assert line.startswith("task mine could not be loaded: access to attribute")
    assert "is unsafe" in line
    write_task(
        here / "tasks", code=code, doc_to_text="\"{{ question | regex_replace('what', 'who') }}\""
    )
    its = load_task(Tasks.of(["mine"], "tasks"), "mine", None)["tasks"]["mine"]
    assert its.doc_to_text(its.eval_docs[0]) == "who is at center"


def test_other_templates_are_in_the_sandbox():
    """A teacher's template and a tokenizer's chat template read no internals and change no value."""
    asked = Example.ask("q", "what", answer="red", fields={"choices": ["a"]})
    for template in (ATTRIBUTES, CHANGES):
        with pytest.raises(UserError, match=r"unsafe|not safely"):
            with_template(asked, template)
    assert "who" in str(with_template(asked, "who {{ choices[0] }}").messages)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "shapes-text-student")
    turns = [{"role": "user", "content": "what"}]
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        tokenizer.chat_template = template
        with pytest.raises(SecurityError):
            tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "what"


# ---------------------------------------------------------------------------------- task functions


def test_a_function_runs_from_the_named_folder_alone(here, capsys):
    """`!function` from beside the folder, by an absolute path, of the standard library, through a link or an included
    YAML is refused and not imported; one of the folder runs, and the screen names its file with its digest."""
    (here / "evil.py").write_text(ATTACK + CODE)
    (here / "evil.yaml").write_text("process_results: !function evil.score\n")
    write_task(here / "tasks")
    (here / "tasks" / "link.py").symlink_to(here / "evil.py")
    for attack in ("../evil.score", f"{here}/evil.score", "subprocess.run", "link.score"):
        write_task(here / "tasks", process_results=f"!function {attack}")
        with pytest.raises(ConfigError, match=r"must be FILE\.NAME|outside of the task's folder"):
            load_task(Tasks.of(["mine"], "tasks"), "mine", None)
    write_task(here / "tasks", process_results="null\ninclude: ../evil.yaml".replace("null\n", ""))
    text = (here / "tasks" / "mine.yaml").read_text().replace("process_results: ", "")
    (here / "tasks" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"evil\.py, outside of the task's folder"):
        load_task(Tasks.of(["mine"], "tasks"), "mine", None)
    assert not owned()
    capsys.readouterr()
    write_task(here / "tasks", code=f"# {here}\n{CODE}")
    load_task(Tasks.of(["mine"], "tasks"), "mine", None)
    assert f"task code: {here}/tasks/mine.py (sha256 " in capsys.readouterr().err


def test_a_metric_does_not_load_code(here):
    """A metric that lm-eval lacks is not looked up in a folder of that name, nor on the hub; lm-eval's own is used."""
    (here / "evil").mkdir()
    (here / "evil" / "evil.py").write_text(ATTACK)
    (here / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    for more, message in (
        ("", "no metric 'evil'"),
        (", hf_evaluate: true", "runs code of the hub"),
    ):
        metrics = f"[{{metric: evil, aggregation: mean, higher_is_better: true{more}}}]"
        write_task(here / "tasks", metric_list=metrics)
        yaml = here / "tasks" / "mine.yaml"
        kept = [line for line in yaml.read_text().splitlines() if "process_results" not in line]
        yaml.write_text("\n".join(kept))
        (line,) = preflight.find_problems(EvalConfig(tasks=("mine",), include="tasks"), {})
        assert message in line
    assert not owned()
    yaml.write_text(
        yaml.read_text().replace("metric: evil", "metric: exact_match").replace(more, "")
    )
    assert preflight.find_problems(EvalConfig(tasks=("mine",), include="tasks"), {}) == []


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", ".hidden", ".."])
def test_a_tasks_name_stays_in_the_folder(name, here):
    """The name of a task is part of file names: one with a slash or a leading dot is refused; others are not."""
    write_task(here / "tasks", name=f'"{name}"')
    (line,) = preflight.find_problems(EvalConfig(tasks=(name,), include="tasks"), {})
    assert f"task {name!r} cannot name files" in line
    write_task(here / "tasks", name="a task, the (2)+nd")
    config = EvalConfig(tasks=("a task, the (2)+nd",), include="tasks")
    assert preflight.find_problems(config, {}) == []


def test_a_task_does_not_take_an_installed_ones_place_silently(here, capsys):
    """A task with the name of a built-in one is used, and the screen says so; another is not mentioned."""
    write_task(here / "tasks", name="shapes")
    load_task(Tasks.of(["shapes"], "tasks"), "shapes", None)
    assert (
        "vlopd: task shapes is that of tasks/mine.yaml, not the installed one"
        in capsys.readouterr().err
    )
    write_task(here / "others", name="mine")
    load_task(Tasks.of(["mine"], "others"), "mine", None)
    assert "installed" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["import", "dataset", "score", "chance"])
def test_leaving_from_a_task_is_an_error(place, here):
    """sys.exit(0) on import, in the questions, the scores or the chance level of a task is an error, not a success."""
    lines = CODE.splitlines()
    at = 0 if place == "import" else next(i for i, x in enumerate(lines) if f"def {place}" in x) + 1
    lines.insert(at, f"{'' if place == 'import' else '    '}raise SystemExit(0)")
    write_task(here / "tasks", code="\n".join(lines))
    lines = preflight.find_problems(EvalConfig(tasks=("mine",), include="tasks"), {})
    assert len(lines) == 1 and "task mine" in lines[0]


def test_leaving_from_anywhere_is_an_error(here, monkeypatch, capsys):
    """A command that foreign code ends by sys.exit(0) exits with 1 and says where; its own end is untouched."""
    (here / "c.toml").write_text(CONFIG)
    for what in ("SystemExit(0)", "SystemExit(3)"):
        place: dict = {"__name__": "foreign"}
        exec(compile(f"def leave(*a, **k):\n    raise {what}", "foreign.py", "exec"), place)
        monkeypatch.setattr(main, "load_config", place["leave"])
        code, said = call(monkeypatch, capsys, "check", "c.toml")
        assert code == 1 and "foreign.py, line 2, ended the command" in said
    code, said = call(monkeypatch, capsys, "--version")
    assert code == 0 and "ended" not in said


# -------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a plug-in, a task of its own and kept steps, made once for all workers."""
    folder = tmp_path_factory.mktemp("run")
    copy_of("sender", make_run, folder, tmp_path_factory)
    return folder / "runs" / "mine"


def make_run(folder: Path) -> None:
    """Makes runs/mine in a folder, whose config names the folder's files relatively."""
    write_task(folder / "tasks")
    (folder / "rules.py").write_text(
        "def signs(pairs):\n    return {p.name: p.delta > 0 for p in pairs}\n"
    )
    (folder / "c.toml").write_text(CONFIG)
    before = os.getcwd()
    os.chdir(folder)
    try:
        Run("c.toml", "tracking.trackers=['tensorboard']").run()
    finally:
        os.chdir(before)


@pytest.fixture
def received(run, here):
    """The run in another's working folder, with code of the names that its config gives."""
    shutil.copytree(run, here / "received")
    write_task(here / "tasks", code=ATTACK + CODE)
    rule = "def signs(pairs):\n    return {p.name: p.delta > 0 for p in pairs}\n"
    (here / "rules.py").write_text(ATTACK + rule)
    return here / "received"


def test_a_received_runs_code_needs_trust(received, monkeypatch, capsys):
    """Plug-ins and task files that run.json names do not run, on any command; with --trust, by name on the command line
    or from a config file of the user's own they do. What runs no code needs no trust."""
    for words in (["show", received], ["verify", received], ["report", received]):
        code, said = call(monkeypatch, capsys, *words)
        assert code == 0 and not owned(), said
    shutil.rmtree(received / "evals")
    for words in (["mask", "make", received], ["eval", received], ["run", received]):
        code, said = call(monkeypatch, capsys, *words)
        assert code == 2 and not owned(), said
        assert "named by" in said and "not by you" in said and "--trust" in said
    code, said = call(monkeypatch, capsys, "mask", "make", received, "--trust")
    assert code == 0 and owned(), said
    Path("OWNED").unlink()
    code, said = call(
        monkeypatch, capsys, "eval", received, "eval.include='tasks'", "--arm", "base"
    )
    assert code == 0 and owned(), said
    Path("OWNED").unlink()
    trust._own.clear()
    trust._received.clear()
    Run(received)
    with pytest.raises(PluginError, match="named by"):
        Plugin.of("rules:signs").load()
    Path("c.toml").write_text(CONFIG)
    load_config("c.toml")
    Plugin.of("rules:signs").load(fresh=True)


def test_a_digest_of_a_plug_in_imports_nothing(here, monkeypatch):
    """The digest of a module in a package, with which a plan is made, does not import the package; `load` does."""
    (here / "site" / "evil").mkdir(parents=True)
    (here / "site" / "evil" / "__init__.py").write_text(ATTACK)
    (here / "site" / "evil" / "inner.py").write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(str(here / "site"))
    assert Plugin.of("evil.inner:f").digest() and not owned()
    Plugin.of("evil.inner:f").load()
    assert owned()
    for name in ("evil", "evil.inner"):
        sys.modules.pop(name, None)


def test_a_received_runs_remote_code_and_engines_need_trust(received, monkeypatch):
    """`trust_remote_code` and an engine's address in run.json count only with trust; also for the run's checkpoints."""
    model = received.parent / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    its = "from transformers import PretrainedConfig\nclass Config(PretrainedConfig):\n    model_type = 'evil'\n"
    (model / "evil.py").write_text(ATTACK + its)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(received.parent / "modules"))
    about = read_json(received / "run.json")
    about["config"]["student"] |= {"model": str(model), "trust_remote_code": True}
    about["config"]["rollout"]["engine"] = {"type": "vlopd", "url": "http://127.0.0.1:9"}
    write_json(received / "run.json", about)
    (received / "checksums" / "run.sha256").unlink()
    with pytest.raises(ConfigError):  # off by default
        load_model_config(str(model))
    Run(received)
    for name in (str(model), str(received / "arms" / "base" / "checkpoint")):
        with pytest.raises(ConfigError, match=r"remote code of .*not by you.*--trust"):
            load_model_config(name, trust_remote_code=True)
    with pytest.raises(EngineError, match=r"engine at http://127\.0\.0\.1:9: named by"):
        Client("http://127.0.0.1:9")
    assert not owned()
    Run(received, trust=True)
    Client("http://127.0.0.1:9")
    load_model_config(str(received / "arms" / "base" / "checkpoint"), trust_remote_code=True)
    assert not owned()
    load_model_config(str(model), trust_remote_code=True)
    assert owned()


def test_a_received_runs_engine_program_needs_trust(received):
    """A program, its arguments and a folder for weights in run.json count only with trust, or from the user."""
    started = received.parent / "evil.sh"
    started.write_text(f"#!/bin/sh\ntouch {received.parent / 'started'}\n")
    started.chmod(0o755)
    table = {"type": "vllm", "python": str(started), "arguments": ["--x"], "start_seconds": 5}
    about = read_json(received / "run.json")
    about["config"]["rollout"]["engine"] = {**table, "folder": str(received.parent)}
    write_json(received / "run.json", about)
    (received / "checksums" / "run.sha256").unlink()
    Run(received)
    engine = VllmEngine(**table)
    with pytest.raises(EngineError, match=r"engine's program .*evil.sh --x: named by .*--trust"):
        started_vllm(engine, "model", torch.float32, [])
    assert not (received.parent / "started").exists()
    assert trust.why_withheld(trust.exchange(str(received.parent)))
    trust.grant({"rollout": {"engine": {**table, "arguments": ["--y"]}}})  # another command
    with pytest.raises(EngineError, match="named by"):
        started_vllm(engine, "model", torch.float32, [])
    trust.grant({"rollout": {"engine": table}})
    with pytest.raises(EngineError, match="did not start"):
        started_vllm(engine, "model", torch.float32, [])
    assert (received.parent / "started").exists()


def leads_out(kind: str, folder: Path, secret: Path) -> None:
    """Makes a data folder one of whose files is elsewhere."""
    if kind == "README.md":
        rows = f"configs:\n- config_name: default\n  data_files: {secret}\n"
        (folder / "README.md").write_text(f"---\n{rows}---\n")
        shutil.copy(secret, folder / "rows.jsonl")
    elif kind == "link":
        (folder / "rows.jsonl").symlink_to(secret)
    else:
        Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(folder)
        (shard,) = folder.glob("*.arrow")
        shard.rename(folder.parent / "elsewhere.arrow")
        about = read_json(folder / "state.json")
        about["_data_files"] = [{"filename": "../elsewhere.arrow"}]
        write_json(folder / "state.json", about)


@pytest.mark.parametrize("account", [{"entity": "theirs"}, {"mode": "online"}])
def test_a_received_run_does_not_choose_where_logs_go(account, run, here):
    """An account of wandb, or that logs go online, is used where the user names it, not by a run.json."""
    shutil.copytree(run, received := here / "received")
    about = read_json(received / "run.json")
    about["config"]["tracking"] |= {"trackers": ["wandb"], **account}
    write_json(received / "run.json", about)
    (received / "checksums" / "run.sha256").unlink()
    tracking = Run(received).config.tracking
    with pytest.raises(ConfigError, match=r"of wandb.*: named by .*not by you.*--trust"):
        refuse_trackers(tracking)
    trust.grant({"tracking": tracking.model_dump()})
    with suppress(ConfigError):  # where wandb is not installed
        refuse_trackers(tracking)
    assert not trust.why_withheld(trust.account(tracking.entity, tracking.mode))


@pytest.mark.parametrize("kind", ["README.md", "link", "state.json"])
def test_a_data_folder_reads_no_file_elsewhere(kind, tmp_path):
    """A file that a data folder's README, state.json or link names outside of it is refused; beside it, it is read."""
    folder, secret = tmp_path / "data", tmp_path / "secret.jsonl"
    folder.mkdir()
    secret.write_text('{"question": "q", "answer": "a"}\n')
    leads_out(kind, folder, secret)
    with pytest.raises(ConfigError, match=f"{folder} names .*, which leads out of it"):
        open_table(FileData(type="file", path=str(folder)))
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copy(secret, folder / "rows.jsonl")
    assert len(open_table(FileData(type="file", path=str(folder)))) == 1


def test_only_what_a_stage_wrote_is_uploaded(received):
    """A file that came into a checkpoint otherwise is not among those of `push`."""
    before = push(received, "full", "a/b", dry_run=True)
    (received / "arms" / "full" / "checkpoint" / "secret.env").write_text("KEY")
    assert push(received, "full", "a/b", dry_run=True) == before


LINKS = {
    "a file": "arms/full/samples.jsonl",
    "weights": "arms/full/checkpoint/model.safetensors",
    "a folder": "evals",
    "a lock, which would be overwritten": ".locks/run",
    "the lock": ".lock",
    "a record": "compare.json",
    "where a tracker writes": "arms/full/trackers",
}


def test_logs_of_trackers_are_their_own(received, tmp_path):
    """What a tracker logs after an arm's end is no change of the run, nor is the link out that wandb makes to its own
    log, where nothing is written again."""
    run = Run(received)
    ended = received / "arms" / "full" / "trackers" / "wandb" / "offline-run-1"
    (ended / "logs").mkdir(parents=True)
    (tmp_path / "core.log").touch()
    (ended / "logs" / "debug-core.log").symlink_to(tmp_path / "core.log")
    (ended / "logs" / "debug.log").write_text("after the end")
    found = run.verify()
    assert not found.problems and not found.unknown
    RunFolder.open(received, locked=False)


@pytest.mark.parametrize("place", LINKS)
def test_links_out_of_a_run_are_refused(place, received, monkeypatch, capsys):
    """A link out of the folder, or a pipe, is refused before anything is read or written through it; a link within the
    run, and with trust any, is followed."""
    outside, path = received.parent / "mine", received / LINKS[place]
    if path.is_dir():
        path.rename(outside)
    else:
        outside.write_text("mine")
        path.unlink(missing_ok=True)
    path.symlink_to(outside)
    for words in (["show", received], ["report", received], ["eval", received]):
        code, said = call(monkeypatch, capsys, *words)
        assert code == 2 and f"{path} is a link out of the run folder" in said
    with pytest.raises(RunError, match="link out of the run folder"):
        push(received, "full", "a/b", dry_run=True)
    assert any(problem.file == path for problem in Run(received, trust=True).verify().problems)
    assert outside.is_dir() or outside.read_text() == "mine"
    RunFolder.open(received, locked=False, altered=True, trust=True)
    path.unlink()
    if outside.is_dir():
        outside.rename(received / "kept")
        path.symlink_to(received / "kept")
        RunFolder.open(received, locked=False)
    else:
        os.mkfifo(path)
        with pytest.raises(RunError, match="no plain file"):
            RunFolder.open(received, locked=False)


def test_a_report_embeds_nothing_from_outside(received):
    """Rows that name a picture by an absolute path, with `..` or through a link, and a comparison that names tasks or
    arms outside, show nothing; a picture of the run is shown."""
    Image.new("RGB", (4, 4), "red").save(received.parent / "private.png")
    Image.new("RGB", (4, 4), "red").save(received / "own.png")
    (received / "link.png").symlink_to("../private.png")
    outside = (
        "../private.png",
        str(received.parent / "private.png"),
        "link.png",
        "/etc/hostname",
        ".",
        3,
        None,
    )
    assert [_data_uri(received, name) for name in outside] == [None] * len(outside)
    assert str(_data_uri(received, "own.png")).startswith("data:image/png;base64,")
    (received.parent / "samples_x.jsonl").write_text('{"doc_id": 0}\n')
    folder = RunFolder(received)
    (received / "evals" / "samples_").mkdir()
    assert _read_rows(folder, "../..", "samples_x.jsonl") == []
    assert _read_rows(folder, "samples_", "../../../samples_x.jsonl") == []
    assert len(_read_rows(folder, "base", "samples_mine.jsonl")) == 2


# --------------------------------------------------------------------------- data, weights, pickles


def test_names_of_images_stay_in_the_datas_folder(here):
    """An absolute name, one with `..` and a link out of the data's folder are refused with the remedy; a picture beside
    the data, a link within, and one in a folder of data.image_folders are read."""
    data, elsewhere = here / "data", here / "elsewhere"
    for folder in (data, elsewhere):
        folder.mkdir()
        Image.new("RGB", (4, 4), "red").save(folder / "x.png")
    (data / "link.png").symlink_to(elsewhere / "x.png")
    (data / "inner.png").symlink_to("x.png")
    names = ["../elsewhere/x.png", str(elsewhere / "x.png"), "link.png", "x.png", "inner.png"]
    rows = [{"question": "q", "image": name} for name in names]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileDataset(FileData(path="data/rows.jsonl", image="image"))
    for each in (source, source.with_headers_only()):
        for index in range(3):
            with pytest.raises(DataError, match=r"leads out of data; .*data\.image_folders"):
                each[index]
        assert [each[index].images[0].size for index in (3, 4)] == [(4, 4)] * 2
    more = FileData(path="data/rows.jsonl", image="image", image_folders=("elsewhere",))
    assert [example.images[0].size for example in FileDataset(more)] == [(4, 4)] * 5
    assert (
        "image_folders" not in FileData(path="data/rows.jsonl").model_dump()
    )  # older runs stay valid


def test_shards_stay_in_their_folder(here):
    """An index of shards that names a file elsewhere is refused by both readers; one beside it is read."""
    save_file({"w": torch.ones(2)}, here / "outside.safetensors")
    folder = here / "model"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "a.safetensors")
    for name in ("../outside.safetensors", str(here / "outside.safetensors")):
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
        for read in (Weights, read_headers):
            with pytest.raises(UserError, match=r"only \*\.safetensors beside it are read"):
                read(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}))
    assert Weights(folder).read("w").tolist() == [1, 1] and set(read_headers(folder)) == {"w"}


class Attack:
    """Unpickled, it writes OWNED."""

    def __reduce__(self):
        return open, ("OWNED", "w")


def test_pickles_are_refused(here):
    """Pickled weights, adapters, masks, arrays and scripts beside data are not read; their safe twins are."""
    model = here / "model"
    shutil.copytree(BUILTIN / "shapes-text-student", model)
    (model / "model.safetensors").rename(here / "model.safetensors")
    pickled = pickle.dumps({"w": Attack()})
    (model / "pytorch_model.bin").write_bytes(pickled)
    with pytest.raises(ConfigError, match="only pickled weights"):
        load(str(model), torch.float32)
    for file in ("adapter_model.bin", "model.pt"):
        folder = here / file.partition(".")[0]
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(pickled)
        with pytest.raises(RunError, match=r"pickle|no weights"):
            Weights(folder)
    (here / "mask.pt").write_bytes(pickled)
    with pytest.raises(RunError, match="is a pickle, which is refused"):
        open_foreign(here / "mask.pt")
    np.savez(here / "a.npz", about=np.array(Attack(), dtype=object), allow_pickle=True)
    assert load_partial(here / "a.npz") is None  # as anything damaged
    (here / "rows").mkdir()
    (here / "rows" / "rows.py").write_text(ATTACK)
    with pytest.raises(ConfigError, match="Dataset scripts are no longer supported"):
        FileDataset(FileData(path="rows"))
    (here / "rows" / "rows.py").unlink()
    (here / "rows" / "rows.jsonl").write_text('{"question": "q"}\n')
    assert FileDataset(FileData(path="rows"))[0].id == "rows-0"
    (here / "model.safetensors").rename(model / "model.safetensors")
    assert load(str(model), torch.float32).model.num_parameters() > 0
    assert not owned()


def test_archives_are_refused(here):
    """Packed data, a file or in a folder, are not unpacked, wherever their members would go; plain ones are read."""
    (here / "rows").mkdir()
    for name in ("rows.zip", "rows/rows.zip"):
        with zipfile.ZipFile(here / name, "w") as archive:
            archive.writestr("../OWNED", "")
            archive.writestr("train.jsonl", '{"question": "q"}\n')
    (here / "rows.tar").write_bytes(b"")
    for path in ("rows.zip", "rows", "rows.tar"):
        with pytest.raises(ConfigError, match=r"unpack it|supported"):
            FileDataset(FileData(path=path))
    (here / "rows" / "rows.zip").unlink()
    (here / "rows" / "train.jsonl").write_text('{"question": "q"}\n')
    assert len(FileDataset(FileData(path="rows"))) == 1
    assert not owned() and not (here.parent / "OWNED").exists()


def test_the_working_folder_stands_in_for_no_package(here):
    """`python -m vlopd`, run in a folder with a module of an installed one's name, does not import it."""
    (here / "rich").mkdir()
    (here / "rich" / "__init__.py").write_text(ATTACK)
    (here / "tomllib.py").write_text(ATTACK)
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "vlopd", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, env=found)
    assert done.returncode == 0 and "vlopd" in done.stdout and not owned(), done.stderr


# --------------------------------------------------------------------------------------- clean-up


def test_the_sweep_removes_only_what_a_killed_process_left(here):
    """Unfinished files of a killed process go; one whose writer lives, another's of a like name, a link, and all
    outside of the stages' folders stay."""
    run = RunFolder(here / "run")
    arms, notes = run.root / "arms", run.root / "notes"
    for folder in (arms, notes):
        folder.mkdir(parents=True)
        (folder / ".unfinished-0123456789abcdef").write_text("left")
        (folder / ".unfinished-by-hand").write_text("mine")
    (arms / ".unfinished-fedcba9876543210").mkdir()
    (arms / ".unfinished-00000000deadbeef").symlink_to(notes)
    (run.root / ".unfinished-0123456789abcdef").write_text("left")
    with whole_file(arms / "a.json") as file, whole_folder(arms / "b") as folder:
        file.write_text("{}")
        (folder / "c").write_text("")
        assert not is_abandoned(file) and not is_abandoned(folder)
        run.lock()
        run.unlock()
    assert (arms / "a.json").read_text() == "{}" and (arms / "b" / "c").exists()
    left = {str(path.relative_to(run.root)) for path in run.root.rglob(".unfinished-*")}
    assert left == {
        "arms/.unfinished-by-hand",
        "arms/.unfinished-00000000deadbeef",
        "notes/.unfinished-by-hand",
        "notes/.unfinished-0123456789abcdef",
    }


def test_what_a_kill_leaves_after_the_record_is_cleaned(received, monkeypatch):
    """An arm's state and the partial results of a geometry, left by a kill between record and clean-up, go with the
    next run; nothing is made again."""
    left = [
        received / "arms" / "full" / "state",
        received / "geometry" / "full" / "partial",
        received / "geometry" / "full" / "steps" / "1" / "partial",
    ]
    for folder in left:
        assert folder.parent.is_dir()
        folder.mkdir()
        (folder / "x").write_text("")
    made = []
    Run(received, trust=True).run(
        until="geometry", on_artifact=lambda what, _, new: made.append((what, new))
    )
    assert not any(folder.exists() for folder in left)
    assert made and not any(new for _, new in made)


# --------------------------------------------------------------------------------------- artifacts


def test_artifacts_name_no_machine(run):
    """No file of a run has the host's name, the kernel's version, or the folder of a task file; permissions are those
    of the umask."""
    secrets = {platform.release(), "sender", str(ROOT)}
    umask = os.umask(0)
    os.umask(umask)
    for path in run.rglob("*"):
        assert f".{socket.gethostname()}." not in path.name
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
        if path.is_file():
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert all(not path.read_text() for path in (run / ".locks").iterdir())
    assert socket.gethostname() not in json.dumps(provenance()["machine"])
    results = read_json(run / "evals" / "full" / "results.json")
    assert results["configs"]["mine"]["metadata"]["config_source"] == "mine.yaml"


def test_imported_results_name_no_machine():
    """lm-eval's description of the machine and the folders of task files are left out; the rest is kept."""
    its = {"pretty_env_info": "OS: Linux", "acc": [0.5], "configs": {
        "a": {"metadata": {"config_source": "/home/me/lm_eval/tasks/a/b.yaml"}},
        "c": {"metadata": {"config_source": "/home/me/tasks/c.yaml", "version": 1}},
    }}  # fmt: skip
    assert without_places(its) == {"acc": [0.5], "configs": {
        "a": {"metadata": {"config_source": "lm_eval/tasks/a/b.yaml"}},
        "c": {"metadata": {"config_source": "c.yaml", "version": 1}},
    }}  # fmt: skip


def test_trackers_files_name_no_machine(tmp_path):
    """tensorboard's files have no host's name in theirs."""
    tracking = TrackingConfig(trackers=("tensorboard",))
    (tracker,) = open_trackers(tracking, "e", "r", "a", tmp_path, {"x": 1})
    tracker.finish()
    names = [path.name for path in tmp_path.rglob("events.*")]
    assert names and all(name.split(".")[4] == "vlopd" for name in names)


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    """Also where its writer made it private, as tempfile does, or in a folder that is written as a whole."""
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a") as file:
            file.chmod(0o600)
        with whole_folder(tmp_path / "b") as folder:
            (folder / "c").write_text("")
            (folder / "c").chmod(0o600)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b", "b/c")]
    assert modes == [0o640, 0o750, 0o640]


HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[text](https://evil.example)",
    "![text](https://evil.example/x.png)",
    "<https://evil.example>",
    "[a]: https://evil.example",
    "# heading",
    "> quoted",
    "- item",
    "1. item",
    "---",
    "`code` *em* __strong__ _em_",
    "\\<b>",
    "a | b \\| c",
    "&lt;b&gt; &#60;i>",
)


class _Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("text", HOSTILE)
def test_report_md_shows_names_and_answers_as_they_are(text):
    """Markdown and HTML in a text of the report are shown, not set: rendered, it is a paragraph and a cell of it."""
    from html import escape

    page = f'<p>{escape(text)}</p><table><tr><th scope="col">h</th></tr><tr><td>{escape(text)}</td></tr></table>'
    shown = _Tags(python_markdown.markdown(markdown(page), extensions=["tables"]))
    assert set(shown.tags) == {"p", "table", "thead", "tbody", "tr", "th", "td"}, text
    whole = "".join(shown.texts).replace("\n", "")
    assert whole == f"{text}h{text}"


# ------------------------------------------------------------------------------------------ supply


def _audit():
    spec = importlib.util.spec_from_file_location("audit_pins", ROOT / "scripts" / "audit_pins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_audit_fails_for_an_advisory_and_for_other_pins(tmp_path):
    """An advisory that the index serves, a pin older than the list's remedy, and pins that the list was not read
    against are one line each; the present pins have none."""
    audit, page = _audit(), (ROOT / "docs" / "advisories.md").read_text()
    pinned = audit.pins((ROOT / "constraints.txt").read_text())
    assert audit.problems_listed(pinned, page) == []
    (line,) = audit.problems_listed({**pinned, "attrs": "1.0"}, page)
    assert "read against other pins" in line
    _, line = audit.problems_listed({**pinned, "jinja2": "3.1.5"}, page)
    assert line == "Jinja2 3.1.5: CVE-2025-27516, fixed in 3.1.6"
    found = tmp_path / "found.json"
    assert audit.problems_found(found) == ([], -1)
    vulnerable = {"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}
    found.write_text(
        json.dumps({"dependencies": [vulnerable, {"name": "b", "skip_reason": "unknown"}]})
    )
    assert audit.problems_found(found) == (["a 1: X-1, fixed in 2"], 1)


def test_the_locks_have_the_same_versions():
    """The locks for CPU and CUDA pin what constraints.txt pins, but for PyTorch's build and CUDA's packages."""
    audit = _audit()
    wanted, cpu, cuda = (
        audit.pins((ROOT / f"constraints{kind}.txt").read_text()) for kind in ("", "-cpu", "-cuda")
    )
    assert {n: v.partition("+")[0] for n, v in cuda.items()} == wanted
    assert cuda["torch"].endswith("+cu130") and cpu["torch"].endswith("+cpu")
    assert wanted.items() - {n: v.partition("+")[0] for n, v in cpu.items()}.items() == {
        (n, v) for n, v in wanted.items() if n.startswith(("nvidia-", "cuda-")) or n == "triton"
    }
