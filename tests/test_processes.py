"""Several processes under a launcher train the arm that one process trains."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import together
from tests.test_pipeline import vlopd, written
from vlopd.data.load import pick
from vlopd.files import read_json, read_jsonl

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAINED = ("full", "subnetwork")


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(LAUNCHER, id="launched", marks=pytest.mark.slow),
        pytest.param([], id="forked"),  # for one import
    ],
)
def test_two_processes_do_what_one_does(launcher, folders, tmp_path, monkeypatch):
    """A whole run: loss, tokens and gradient norm of the first step agree to 1e-5 with one process's, for an arm under
    a mask and its `full`; two processes train both again after a change. Of the arms that two processes trained, one
    makes the same masks, geometry, overlap and evaluations, byte for byte.

    Two processes stay in step: where one alone meets a row without an answer, tokens or a sampler that are not
    finite, a full disk or held-out scores that fail, each raises one error, which names the process and the example.
    Where both processes' rows, one's or neither's have pictures, the weights are those that one process trains.
    """
    models = folders["llm", "student"].parent
    config = written(folders, "vlm", tmp_path / "mini.toml")
    words = ["-m", "tests.together", str(models), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = ("run", config, *together.WORDS)
    assert vlopd(monkeypatch, *one, "--until", "arms", "--out", tmp_path / "one") == 0
    check_first_steps(tmp_path)
    check_failures(tmp_path)
    check_measured_alike(monkeypatch, one, tmp_path)
    for which in ("both", "eyes"):
        check_pictures(which, models, tmp_path)


def check_first_steps(out: Path) -> None:
    """The arms' first steps agree, and after the change each arm has as many steps as it says."""
    first = {}
    for name, arms in (("one", out / "one" / "arms"), ("two", out / "before" / "arms")):
        for arm in TRAINED:
            rows = read_jsonl(arms / arm / "metrics.jsonl")
            assert len(rows) == 3
            first[name, arm] = rows[0]
        assert read_json(arms / "subnetwork" / "record.json")["off_mask_unmoved"] is True
    for arm in TRAINED:
        one, two = first["one", arm], first["two", arm]
        assert one["completion_tokens"] == two["completion_tokens"]
        for key in ("loss", "grad_norm", "student_entropy", "kl_quarter_2", "top_overlap_fraction"):
            # full's weights differ in their last bits, so that its mask may take another of two equals
            near = 1e-3 if (arm, key) == ("subnetwork", "grad_norm") else 1e-5
            assert two[key] == pytest.approx(one[key], rel=near), (arm, key)
        assert len(read_jsonl(out / "two" / "arms" / arm / "metrics.jsonl")) == 2


MEASURED = ("masks", "geometry", "evals")


def check_measured_alike(monkeypatch, command: tuple, out: Path) -> None:
    """One process makes of the arms the masks, geometry and evaluations that two have made."""
    alone = out / "alone"
    shutil.copytree(out / "before", alone)
    for folder in MEASURED:
        shutil.rmtree(alone / folder)
    for path in alone.glob("checksums/*"):
        if path.name.startswith(MEASURED):
            path.unlink()
    trained = (alone / "arms" / "subnetwork" / "metrics.jsonl").stat().st_mtime_ns
    assert vlopd(monkeypatch, *command, "--out", alone) == 0
    assert (alone / "arms" / "subnetwork" / "metrics.jsonl").stat().st_mtime_ns == trained
    for folder in (*MEASURED, "checksums"):
        one, two = (
            {p.relative_to(run): p for p in (run / folder).rglob("*") if p.is_file()}
            for run in (alone, out / "before")
        )
        assert one.keys() == two.keys()
        assert [n for n in one if one[n].read_bytes() != two[n].read_bytes()] == []
    for name in (
        *("masks/top.safetensors", "masks/leading.json", "geometry/moved/geometry.csv"),
        *("geometry/overlap.csv", "geometry/full/trajectory.csv", "evals/full/tokens_shapes.jsonl"),
        *("evals/full/samples_shapes_choice.jsonl", "evals/moved/base_kl.json"),
    ):
        assert (alone / name).stat().st_size


def check_failures(out: Path) -> None:
    """Each of the two processes raised the right thing."""
    raised = [json.loads((out / f"process-{k}.json").read_text()) for k in (0, 1)]
    told = {case: (raised[0][case], raised[1][case]) for case in raised[0]}
    for kind in ("llm", "vlm"):
        rows = pick(together.examples(kind, 2), 0, 2, together.SEED)
        broken = next(k for k, e in enumerate(rows) if e.id.endswith("-0"))
        what = f"example {rows[broken].id!r} has no answer"
        assert told[f"row {kind}"][broken].startswith(f"DataError: {what}")
        other = told[f"row {kind}"][1 - broken]
        assert other.startswith(f"OtherProcessFailed: process {broken} stopped: {what}")
        first, second = told[f"loss {kind}"]
        assert first == second
        assert f"not finite are the tokens of {rows[1].id} (process 1); the batch" in first
        for k in (0, 1):
            saved = out / f"loss-{kind}" / "not-finite" / f"process-{k}" / "examples.json"
            assert json.loads(saved.read_text())["not_finite"] == [rows[1].id] * k
    first, second = told["sampler llm"]
    assert first == second
    assert "(process 1); the batch" in first
    assert "loss is nan" not in first
    first, second = told["disk llm"]
    assert first.startswith(("FileExistsError", "NotADirectoryError"))
    assert second.startswith("OtherProcessFailed: process 0 stopped: ")
    failed = "ZeroDivisionError: division by zero"
    assert told["held-out llm"] == (f"OtherProcessFailed: process 1 stopped: {failed}", failed)
    assert told["sharing zero"] == (f"OtherProcessFailed: process 1 stopped: {failed}", failed)
    failed = "OSError: no such disk"
    assert told["sharing before"] == (f"OtherProcessFailed: process 1 stopped: {failed}", failed)
    first, second = told["sharing row"]
    assert (first, second) == ("UserError: row 1 is empty", "DataError: row 1 is empty")


def check_pictures(which: str, models: Path, out: Path) -> None:
    """Six steps with weight decay end in the weights of one process, the same bits on both; tower alone or all."""
    rows = together.every_other_with_picture()
    steps = [pick(rows, 2 * step, 2, together.SEED) for step in range(6)]
    assert {sum(bool(e.images) for e in step) for step in steps} == {0, 1, 2}
    alone = out / f"{which}-alone"
    expected = together.train_with_few_pictures(models, alone, which)
    first, second = (torch.load(out / f"{which}-{k}.pt") for k in (0, 1))
    for name, one in expected.items():
        assert torch.equal(first[name], second[name])
        # decay alone, where a value has no gradient, would be 1e-3
        torch.testing.assert_close(first[name], one, rtol=1e-3, atol=3e-4)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (out / which, alone)]
    norms = [[json.loads(line)["grad_norm"] for line in each] for each in lines]
    words = [json.loads(each[0])["words"] for each in lines]
    assert words[0] == words[1] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    if which == "eyes":
        assert norms[0].count(0.0) == sum(not any(e.images for e in step) for step in steps)
