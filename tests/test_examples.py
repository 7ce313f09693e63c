"""The examples do what they say: one file is the training loop, thirty lines are the front door."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import pair_of, recipe_of
from tests.snippets import ROOT, module_of, smaller
from vlopd.config.input import config_of
from vlopd.data.load import load_data
from vlopd.files import read_jsonl
from vlopd.loop import distill


@pytest.mark.parametrize("pair", ["shapes", "shapes-text"])
def test_one_file_is_the_training_loop(pair, tmp_path):
    """Three steps of examples/opd_in_one_file.py end in the weights of vlopd.distill, bit for bit; losses to 1e-12."""
    steps, prompts = 3, 16
    student, losses = module_of("examples/opd_in_one_file.py").train(pair, steps, prompts)
    config = config_of(
        {
            "name": "one-file",
            "student": f"builtin:{pair}-student",
            "teacher": f"builtin:{pair}-teacher",
            "precision": {"compute": "fp32"},
            "data": {"type": "shapes", "modality": "text" if pair == "shapes-text" else "image"},
            "rollout": {"max_new_tokens": 14},
            "optim": {
                "learning_rate": 3e-4,
                "betas": [0.9, 0.98],
                "warmup_steps": 10,
                "schedule": "linear",
            },
            "train": {"steps": steps, "prompts_per_step": prompts},
            "arms": {"full": {"type": "distill"}},
        },
        "test",
    )
    data = load_data(config.data, steps * prompts)
    trained = distill(pair_of(config), data, recipe_of(config), tmp_path)
    assert losses == pytest.approx(
        [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")], abs=1e-12
    )
    expected = dict(trained.student.model.named_parameters())
    for name, value in student.model.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_thirty_lines_run_with_the_installed_wheel(tmp_path):
    """The script of at most 30 lines runs outside the repository, with nothing of it but what a wheel installs."""
    source, installed, away = tmp_path / "source", tmp_path / "installed", tmp_path / "away"
    away.mkdir()
    for package in ("vlopd", "evals"):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--target", installed]
    subprocess.run([*pip, *options, source], check=True)
    code = (ROOT / "examples" / "thirty_lines.py").read_text()
    assert len(code.splitlines()) <= 30
    (away / "script.py").write_text(smaller(code) + "print(vlopd.__file__)\n")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=away,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(installed))
    assert (away / "compared.svg").stat().st_size > 0
