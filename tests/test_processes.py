"""Several processes under a launcher train the arm that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import together
from tests.test_pipeline import MINIATURE
from vlopd.data.load import pick

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("kind", ["vlm"], indirect=True)
def test_two_processes_make_the_step_of_one(kind, folders, tmp_path):
    """Loss, tokens and gradient norm of the first step agree to 1e-5, for an arm under a mask and its `full`; and two
    processes train both again after a change."""
    config = tmp_path / "mini.toml"
    config.write_text(
        MINIATURE.format(
            student=folders[kind, "student"],
            teacher=folders[kind, "teacher"],
            modality="image",
            task="shapes",
        )
    )
    # fp32, to compare closely
    words = [
        "-m",
        "vlopd.cli.main",
        "run",
        str(config),
        "precision.compute=fp32",
        "--arm",
        "subnetwork",
    ]
    words += ["eval.limit=1", "eval.keep_images=0", "geometry.arms=[]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = {}
    for name, start in (("one", []), ("two", LAUNCHER)):
        out = tmp_path / name
        until = [] if start else ["--until", "arms"]
        command = [sys.executable, *start, *words, *until, "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        for arm in ("full", "subnetwork"):
            lines = (out / "arms" / arm / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == 3
            first[name, arm] = json.loads(lines[0])
        record = json.loads((out / "arms" / "subnetwork" / "record.json").read_text())
        assert record["off_mask_unmoved"] is True
    for arm in ("full", "subnetwork"):
        one, two = first["one", arm], first["two", arm]
        assert one["completion_tokens"] == two["completion_tokens"]
        for key in ("loss", "grad_norm", "student_entropy", "kl_quarter_2", "top_overlap_fraction"):
            # full's weights differ in their last bits, so that its mask may take another of two equals
            near = 1e-3 if (arm, key) == ("subnetwork", "grad_norm") else 1e-5
            assert two[key] == pytest.approx(one[key], rel=near), (arm, key)
    words += ["train.steps=2", "--until", "arms", "--out", str(tmp_path / "two")]
    command = [sys.executable, *LAUNCHER, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for arm in ("full", "subnetwork"):
        lines = (tmp_path / "two" / "arms" / arm / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 2


def test_one_process_cannot_leave_another_behind(folders, tmp_path):
    """Two processes stay in step. Where one alone meets a row without an answer, tokens or a sampler that are not
    finite, a full disk or held-out scores that fail, each raises one error, which names the process and the example.
    Where both processes' rows, one's or neither's have pictures, the weights are those that one process trains."""
    models = folders["llm", "student"].parent
    words = ["-m", "tests.together", str(models), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHER, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_failures(tmp_path)
    for which in ("both", "eyes"):
        check_pictures(which, models, tmp_path)


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
    assert told["held-out llm"] == (failed, f"OtherProcessFailed: process 0 stopped: {failed}")


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
