"""What a run was made from is known by content, and what it holds is checked: replaced inputs, flipped bits."""

import fcntl
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evals.scoring import Tasks
from evals.task_definition import files_of_task
from tests.conftest import copy_of
from tests.test_pipeline import vlopd
from vlopd import files
from vlopd.api.run import Run
from vlopd.digests import file_digest
from vlopd.files import whole_file, whole_folder, write_json
from vlopd.run.checksums import Checksums
from vlopd.run.folder import RunFolder
from vlopd.run.stage import stage
from vlopd.run.verify import records_without_checksums, verify_run

CONFIG = """
name = "mini"
student = {{model = "student", template = "student.jinja"}}
teacher = {{model = "teacher", template = "teacher.jinja"}}
[data]
type = "file"
path = "data/train.jsonl"
answer = "answer"
{image}
[precision]
compute = "fp32"
[rollout]
max_new_tokens = 4
[optim]
learning_rate = 3e-3
[train]
steps = 2
prompts_per_step = 4
keep_steps = [1]
[masks]
top = {{type = "top_fraction", of = "full", fraction = 0.1}}
random-0 = {{type = "random", like = "top", seed = 5}}
[arms]
base = {{type = "base"}}
teacher = {{type = "teacher"}}
full = {{type = "distill", seed = 1}}
subnetwork = {{type = "distill", seed = 2, mask = "top"}}
random-0 = {{type = "transplant", of = "full", mask = "random-0"}}
[geometry]
null_draws = 1
ratios = [0.1]
[eval]
include = "tasks"
tasks = ["demo"]
keep_images = 2
bootstrap_draws = 50
"""
TASK = """
task: demo
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function score.score
generation_kwargs: {until: [], max_gen_toks: 3}
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %} ="
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %} ="


@pytest.fixture
def project(folders, kind, tmp_path, tmp_path_factory, monkeypatch, make_data) -> Path:
    """A folder with everything that a finished experiment is made from, to be replaced piece by piece."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_project(folders, kind, make_data)
            assert vlopd(patch, "run", "mini.toml", "--out", "run") == 0

    copy_of(f"provenance-{kind}", make, tmp_path, tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_project(folders, kind: str, make_data) -> None:
    """Writes the experiment into the working directory."""
    for role in ("student", "teacher"):
        shutil.copytree(folders[kind, role], role)
        Path(f"{role}.jinja").write_text(TEMPLATE if kind == "vlm" else PLAIN)
    Path("data").mkdir()
    Path("tasks").mkdir()
    rows = []
    for k, example in enumerate(make_data(kind, 8)):
        row = {"question": example.question, "answer": example.answer}
        if example.images:
            example.images[0].save(f"data/{k}.png")
            row["picture"] = f"{k}.png"
        rows.append(row)
    write_rows("data/train.jsonl", rows)
    write_rows(
        "tasks/rows.jsonl", [{"question": r["question"], "answer": r["answer"]} for r in rows]
    )
    Path("tasks/demo.yaml").write_text(TASK)
    Path("tasks/rule.py").write_text("def right(text):\n    return float(len(text) % 2)\n")
    Path("tasks/score.py").write_text(
        "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\nimport rule\n"
        "def score(doc, results):\n    return {'right': rule.right(results[0])}\n"
    )
    image = 'image = "picture"' if kind == "vlm" else ""
    Path("mini.toml").write_text(CONFIG.format(image=image))


def write_rows(path: str, rows: list) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def records(run: Path) -> dict[str, tuple[int, int]]:
    """When each stage was last done, by its record."""
    patterns = ("arms/*/record.json", "masks/*.json", "geometry/*/summary.json")
    patterns += (
        "evals/*/results.json",
        "evals/*/tokens.json",
        "compare.json",
        "report/record.json",
    )
    paths = [path for pattern in patterns for path in run.glob(pattern)]
    return {
        str(path.relative_to(run)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths
    }


def stages(
    *arms: str, masks: bool = True, evals: tuple[str, ...] = (), tokens: tuple[str, ...] = ()
):
    """The records of arms, of their masks and geometry, of evaluations and token grades, and of what sums them up."""
    found = {f"arms/{arm}/record.json" for arm in arms}
    found |= {f"evals/{arm}/results.json" for arm in evals}
    found |= {f"evals/{arm}/tokens.json" for arm in tokens}
    if masks:
        found |= {"masks/top.json", "masks/random-0.json", "geometry/full/summary.json"}
    return found | {"compare.json", "report/record.json"}


TRAINED = ("full", "subnetwork", "random-0")
STUDENTS = ("base", *TRAINED)


def nudge(path: Path) -> None:
    """Other weights of the same shapes, in a file of the same size."""
    tensors = load_file(path)
    save_file(
        {n: t + torch.randn_like(t) * 0.01 for n, t in tensors.items()}, path, {"format": "pt"}
    )


def replacements(kind: str):
    """{what: (how it is replaced, what is made again)}"""

    def data():
        rows = list(map(json.loads, Path("data/train.jsonl").read_text().splitlines()))
        write_rows("data/train.jsonl", rows[::-1])

    def picture():
        shutil.copy("data/1.png", "data/0.png")

    def tokenizer():
        path = Path("student/tokenizer_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": "other"}))

    def template(role):
        path = Path(f"{role}.jinja")
        path.write_text(path.read_text() + " =")

    def edit(path, old, new):
        Path(path).write_text(Path(path).read_text().replace(old, new))

    trained = stages(*TRAINED, evals=TRAINED, tokens=TRAINED)
    with_teacher = stages(*TRAINED, "teacher", evals=(*TRAINED, "teacher"), tokens=STUDENTS)
    student = stages(*STUDENTS, evals=STUDENTS, tokens=STUDENTS)
    scored = stages(masks=False, evals=(*STUDENTS, "teacher"), tokens=STUDENTS)
    found = {
        "data": (data, trained),
        "teacher weights": (lambda: nudge(Path("teacher/model.safetensors")), with_teacher),
        "teacher template": (lambda: template("teacher"), with_teacher),
        "student weights": (lambda: nudge(Path("student/model.safetensors")), student),
        "student template": (lambda: template("student"), student),
        # what no longer reads the same may still train to the same weights
        "tokenizer": (tokenizer, student - stages() | stages(masks=False)),
        "task": (lambda: edit("tasks/demo.yaml", "max_gen_toks: 3", "max_gen_toks: 2"), scored),
        "task data": (lambda: edit("tasks/rows.jsonl", '"answer": "', '"answer": "x'), scored),
        "task module": (lambda: edit("tasks/rule.py", "% 2", "% 3"), scored),
    }
    return found | ({"picture": (picture, trained)} if kind == "vlm" else {})


FEW = ("picture", "task module")


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        pytest.param("vlm", FEW, id="some"),
        *(pytest.param(kind, None, id=kind, marks=pytest.mark.slow) for kind in ("llm", "vlm")),
    ],
    indirect=["kind"],
)
def test_what_is_replaced_is_made_again_and_nothing_else(kind, which, project, monkeypatch, capsys):
    """One input after the other is replaced under its own name: exactly what depends on it is made again."""
    before = records(project / "run")
    assert vlopd(monkeypatch, "run", "mini.toml", "--out", "run") == 0
    assert records(project / "run") == before
    found = replacements(kind)
    for what, (replace, expected) in {name: found[name] for name in which or found}.items():
        replace()
        assert vlopd(monkeypatch, "run", "mini.toml", "--out", "run") == 0, capsys.readouterr()
        after = records(project / "run")
        assert after.keys() == before.keys()
        again = {name for name in after if after[name] != before[name]}
        assert again == expected, (what, again ^ expected)
        before = after
    assert vlopd(monkeypatch, "verify", "run") == 0, capsys.readouterr()


LINKS = [
    ("arms/full/record.json", ("inputs", "recipe", "optim", "learning_rate"), 0.5),
    ("arms/full/record.json", ("inputs", "teachers", "teacher", "model.safetensors"), "0" * 64),
    ("arms/subnetwork/record.json", ("inputs", "mask"), "0" * 64),
    ("masks/top.json", ("inputs", "of"), "0" * 64),
    ("geometry/full/summary.json", ("inputs", "trained"), "0" * 64),
    ("geometry/full/summary.json", ("inputs", "settings", "null_draws"), 3),
    ("evals/full/results.json", ("checkpoint_digest",), "0" * 64),
    ("evals/full/results.json", ("inputs", "tasks", "demo", "batch_size"), 7),
    ("evals/full/tokens.json", ("inputs", "checkpoint", "model.safetensors"), "0" * 64),
    ("evals/full/tokens.json", ("inputs", "files", "teacher", "model.safetensors"), "0" * 64),
    ("evals/full/base_kl.json", ("inputs", "checkpoint", "model.safetensors"), "0" * 64),
    ("compare.json", ("inputs", "evals/full"), "0" * 64),
    ("compare.json", ("confidence",), 0.8),
    ("compare.json", ("arms", "subnetwork", "role"), "control"),
]
"""Entries of records by which those of another run or config are known, with another value."""


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_artifacts_of_another_run_are_not_shown(kind, project, monkeypatch, capsys):
    """Without or with checksums of its own: an artifact that was made from another arm or mask, or with other settings,
    is named by what shows it, and by `verify` and `show`. What was not mixed up is not, also where the config says
    compute = "auto" and the models are gone."""
    for role in ("student", "teacher"):
        Path(role).rename(f"{role}-gone")
    auto = Path("mini.toml").read_text().replace('compute = "fp32"', 'compute = "auto"')
    Path("auto.toml").write_text(auto)
    assert Run("run").problems == Run("auto.toml", out="run").problems == []
    assert vlopd(monkeypatch, "report", "run", "--out", "elsewhere") == 0
    for file, (*outer, last), value in LINKS:
        path = Path("run") / file
        held = path.read_text()
        inner = about = json.loads(held)
        for key in outer:
            inner = inner[key]
        assert inner[last] != value
        inner[last] = value
        path.write_text(json.dumps(about))
        run = RunFolder(Path("run"))
        (sums,) = [p for p in Path("run/checksums").iterdir() if f"  {file}\n" in p.read_text()]
        vouched = sums.read_bytes()
        artifact = sums.stem.replace("--", "/", 1)
        run.checksums.write(artifact, [run.root / name for name in run.checksums.read(artifact)])
        assert path in [problem.file for problem in Run("run").problems], (file, last)
        capsys.readouterr()
        assert vlopd(monkeypatch, "verify", "run") == 0
        assert file in capsys.readouterr().out.replace("\n", "")
        assert vlopd(monkeypatch, "report", "run", "--out", "elsewhere") == 2
        assert "was made by another run or config" in capsys.readouterr().err
        path.write_text(held)
        sums.write_bytes(vouched)
    assert Run("run").problems == []


def flip(path: Path, bit: int) -> bytes:
    """Flips one bit of a file, its times put back, and returns what it held."""
    held, times = path.read_bytes(), path.stat()
    changed = bytearray(held)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(changed))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return held


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_every_flipped_bit_is_named(project, monkeypatch, capsys):
    """`vlopd verify` names the file of a single flipped bit, over all kinds of files; an altered arm, tokenizer or
    mask is not worked from; what was made from replaced files is told too."""
    run = project / "run"
    kinds: dict[str, Path] = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name != ".lock" and ".locks" not in path.parts:
            kinds.setdefault("/".join([*path.relative_to(run).parts[::2], path.suffix]), path)
            kinds.setdefault(path.name, path)
    chosen = sorted(set(kinds.values()))
    assert len(chosen) >= 20
    draws = random.Random(0)
    for path in chosen:
        held = flip(path, draws.randrange(8 * path.stat().st_size))
        problems = verify_run(RunFolder(Path("run"))).problems
        assert path.relative_to(project) in [problem.file for problem in problems]
        path.write_bytes(held)
    held = flip(weights := run / "arms" / "full" / "checkpoint" / "model.safetensors", 99999)
    capsys.readouterr()
    assert vlopd(monkeypatch, "verify", "run") == 1
    said = capsys.readouterr().out.replace("\n", "")
    assert "run/arms/full/checkpoint/model.safetensors has changed since it was written" in said
    weights.write_bytes(held)
    assert vlopd(monkeypatch, "verify", "run") == 0

    tokenizer = run / "arms" / "full" / "checkpoint" / "tokenizer.json"
    for verb, path in (
        ("run mini.toml --out run", weights),
        ("eval run", tokenizer),
        ("retrain run", run / "masks" / "top.safetensors"),
    ):
        held = flip(path, 8 * path.stat().st_size - 9)
        assert vlopd(monkeypatch, *verb.split()) == 2
        assert path.relative_to(project).as_posix() in capsys.readouterr().err
        path.write_bytes(held)
    # the remedy that is named is one
    path = run / "evals" / "full" / "tokens_demo.jsonl"
    flip(path, 9)
    assert vlopd(monkeypatch, "run", "mini.toml", "--out", "run") == 2
    assert f"delete {run.relative_to(project)}/evals/full/tokens.json" in capsys.readouterr().err
    (run / "evals" / "full" / "tokens.json").unlink()
    assert vlopd(monkeypatch, "run", "mini.toml", "--out", "run") == 0
    assert vlopd(monkeypatch, "verify", "run") == 0
    nudge(project / "teacher" / "model.safetensors")
    capsys.readouterr()
    assert vlopd(monkeypatch, "verify", "run") == 0
    said = capsys.readouterr().out
    assert "full" in said and "teacher" in said and "model.safetensors" in said


def test_files_are_whole_and_have_the_umasks_permissions(tmp_path):
    """Files and folders appear whole, replace what was there, and are as private as the umask says."""
    old = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("one")
            temporary.chmod(0o600)
        with whole_folder(tmp_path / "b") as folder:
            (folder / "sub").mkdir(mode=0o700)
            (folder / "sub" / "c").write_text("two")
            (folder / "sub" / "c").chmod(0o600)
        with whole_folder(tmp_path / "b") as folder:
            (folder / "d").write_text("three")
    finally:
        os.umask(old)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["d"]
    modes = [
        path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "b", tmp_path / "b/d")
    ]
    assert modes == [0o640, 0o750, 0o640]


def test_the_sweep_takes_only_its_own(tmp_path, make_config):
    """A run opened above another leaves the other's unfinished files alone, and a user's file of a like name."""
    config = make_config("llm")
    inner = RunFolder.create(tmp_path / "outer" / "inner", config)
    live = inner.root / "arms" / ".unfinished-0123456789abcdef"
    live.mkdir(parents=True)
    own = tmp_path / "outer" / "arms" / ".unfinished-0123456789abcdef"
    own.mkdir(parents=True)
    mine = tmp_path / "outer" / "mine"
    mine.mkdir()
    (mine / ".unfinished-fedcba9876543210").write_text("mine")
    link = tmp_path / "outer" / "arms" / ".unfinished-00000000deadbeef"
    link.symlink_to(mine)
    users = [
        tmp_path / "outer" / name
        for name in (".unfinished-notes.txt", ".unfinished-0123456789abcdefg")
    ]
    for path in users:
        path.write_text("mine")
    RunFolder.create(tmp_path / "outer", config).unlock()
    assert link.is_symlink() and len(list(mine.iterdir())) == 1
    assert live.exists() and all(path.exists() for path in users) and not own.exists()
    inner.unlock()


def test_a_digest_follows_content_not_times(tmp_path, monkeypatch):
    """A change that keeps size and modification time is seen, and without a cache digests are right too."""
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    monkeypatch.setenv("VLOPD_CACHE", str(tmp_path / "cache"))
    first = file_digest(path)
    times = path.stat()
    path.write_bytes(b"a" * 999 + b"b")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = file_digest(path)
    assert first != second
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("VLOPD_CACHE", str(tmp_path / "taken"))
    assert file_digest(path) == second == file_digest(path, whole=True)


def test_a_tasks_files_are_all_known(tmp_path, monkeypatch):
    """Quoted and listed includes, packages, data by a pattern, and the pictures that rows name decide a task."""
    monkeypatch.chdir(tmp_path)
    Path("tasks/kit").mkdir(parents=True)
    for name in ("one", "two"):
        Path(f"tasks/{name}.yaml").write_text("output_type: generate_until\n")
    Path("tasks/kit/__init__.py").write_text("from kit import inner\n")
    Path("tasks/kit/inner.py").write_text("def score(doc, results): return {}\n")
    Path("tasks/grade.py").write_text("import kit\ndef score(doc, results): return {}\n")
    Path("data").mkdir()
    write_rows("data/rows-0.jsonl", [{"question": "q", "answer": "a", "picture": "p/0.png"}])
    Path("data/p").mkdir()
    Path("data/p/0.png").write_bytes(b"picture")
    Path("tasks/t.yaml").write_text(
        'task: t\ninclude: ["one.yaml", "two.yaml"]\ndataset_path: json\ntest_split: test\n'
        'dataset_kwargs: {data_files: {test: "data/rows-*.jsonl"}}\n'
        'process_results: !function "grade.score"\ndoc_to_text: question\ndoc_to_target: answer\n'
    )
    found = files_of_task(Tasks(include_path="tasks", include_defaults=False).task_index, "t")
    names = {str(path.resolve().relative_to(tmp_path)) for path in found}
    assert names == {
        *("tasks/t.yaml", "tasks/one.yaml", "tasks/two.yaml", "tasks/grade.py"),
        *("tasks/kit/__init__.py", "tasks/kit/inner.py", "data/rows-0.jsonl", "data/p/0.png"),
    }


RECORD = {
    "inputs": {"a": 1},
    "type": "distill",
    "checkpoint_digest": "x",
    "precision": {"compute": "fp32", "stored": "fp32", "values": "fp32"},
}


def test_what_a_kill_left_outside_of_runs_goes_with_the_next_write(tmp_path, monkeypatch):
    """Unfinished files and folders in a folder that is written to are removed once they are a minute old and their
    writer is gone; new ones, those of a living writer and the user's stay."""
    monkeypatch.setattr(files, "_swept", set())
    names = [f".unfinished-{k:016x}" for k in range(4)]
    for name in names[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    (tmp_path / names[3]).write_text("half")
    (tmp_path / ".unfinished-notes").write_text("mine")
    for name in (names[0], names[2], names[3], ".unfinished-notes"):
        os.utime(tmp_path / name, (1, 1))
    handle = os.open(tmp_path / names[2], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    try:
        files.write_text(tmp_path / "done.txt", "done")
    finally:
        os.close(handle)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"done.txt", ".unfinished-notes", names[1], names[2]}


def test_records_are_deleted_before_an_artifact_is_made_again(tmp_path):
    """While an artifact is made again it has no record or checksums; a record without checksums is named."""
    run, record = RunFolder(tmp_path), tmp_path / "arms" / "full" / "record.json"
    record.parent.mkdir(parents=True)
    rows = record.parent / "metrics.jsonl"
    rows.write_text("{}\n")
    write_json(tmp_path / "run.json", {})
    run.checksums.write("run", [tmp_path / "run.json"])
    run.checksums.finish("arms/full", RECORD, [rows])
    assert run.checksums.outdated("arms/full", {"a": 1}) is None
    assert run.checksums.outdated("arms/full", {"a": 2}) == "inputs changed: a: 1 -> 2"
    sums = run.checksums.path("arms/full")
    held = sums.read_bytes()
    sums.unlink()
    (problem,) = records_without_checksums(run)
    assert problem.file == record and "arms/full" in problem.remedy
    sums.write_bytes(held)
    assert not records_without_checksums(run)
    run.checksums.start("arms/full")
    rows.write_text("half a li")
    assert not record.exists() and not sums.exists() and not records_without_checksums(run)


def test_other_processes_do_not_read_what_the_first_withdraws(tmp_path, monkeypatch):
    """While several processes look whether an arm is up to date, the first one withdraws its record: the others find it
    due all the same."""
    run = RunFolder(tmp_path)
    rows = tmp_path / "arms" / "full" / "metrics.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("{}\n")
    run.checksums.finish("arms/full", RECORD, [rows])
    asked = []

    def inputs(whole: bool):
        asked.append(whole)
        if len(asked) == 2:
            run.checksums.start("arms/full")
        return {"a": 2}

    monkeypatch.setenv("RANK", "1")
    with stage(run, "arms/full") as its:
        assert its.is_due(inputs) and its.inputs == {"a": 2}


def test_checksums_are_sha256sums(tmp_path):
    """The files of checksums are those of `sha256sum`."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "a.jsonl").write_text("{}\n")
    sums = Checksums(tmp_path)
    sums.write("evals/a", [tmp_path / "evals" / "a.jsonl"])
    told = (tmp_path / "checksums" / "evals--a.sha256").read_text().splitlines()
    assert told[0] == f"{file_digest(tmp_path / 'evals' / 'a.jsonl')}  evals/a.jsonl"
    command = ["sha256sum", "--check", "--strict", "checksums/evals--a.sha256"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
