"""Arms of every kind from masks of every kind: what is proved of them, and what they were made from."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress

import pytest
import torch

from tests.conftest import build
from tests.test_pipeline import vlopd
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import load_config
from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError, RunError, UserError
from vlopd.files import read_json
from vlopd.masks.files import load_mask, save_mask
from vlopd.models.load import load_configured
from vlopd.models.parameter_names import classify
from vlopd.run.arms import ArmOptions
from vlopd.run.folder import RunFolder
from vlopd.run.geometry import make_geometry
from vlopd.run.make import make_arm, make_mask
from vlopd.run.resolve import arm_digest, read_tensors
from vlopd.run.stage import stage
from vlopd.weights.delta import stream

SECTIONS = {
    "precision": {"compute": "bf16"},
    "train": {"steps": 4, "prompts_per_step": 4, "keep_steps": [2]},
    "optim": {"learning_rate": 3e-3, "weight_decay": 0.1},
    "masks": {
        "early": {"type": "top_fraction", "of": "full@2", "fraction": 0.2},
        "ffn": {"type": "whole", "modules": ["ffn"]},
        "off": {"type": "principal", "which": "off_principal", "fraction": 0.3, "rank": 4},
        "both": {"type": "union", "masks": ["early", "ffn"]},
        "random": {"type": "random", "like": "early", "match": "magnitude", "seeds": [5, 6]},
    },
    "arms": {
        "base": {"type": "base"},
        "full": {"type": "distill"},
        "both": {"type": "distill", "mask": "both"},
        "off": {"type": "distill", "mask": "off"},
        "random": {"type": "distill", "mask": "random"},
        "locked": {"type": "distill", "subspace": {"of": "full@2", "rank": 2}},
        "further": {"type": "extrapolate", "of": "full@2", "norm_of": "full"},
        "transplant": {"type": "transplant", "of": "full@2", "mask": "ffn"},
    },
}


def tensors(run, arm):
    return read_tensors(run.checkpoint(arm))


def test_arms_of_every_kind(kind, make_config, tmp_path):
    """Each arm is what it says, bit for bit off its mask, and its record tells seeds, identity and inputs."""
    config = make_config(kind, **SECTIONS)
    run = RunFolder.create(tmp_path / "run", config)
    for name in config.arms:
        assert make_arm(run, config, name)
    records = {name: read_json(run.arm_record(name)) for name in config.arms}
    base, full = tensors(run, "base"), tensors(run, "full")

    # the proof, and its independent repetition here
    for name in ("both", "off", "random-0", "random-1", "transplant"):
        record, mask = records[name], load_mask(run.mask(config.arms[name].mask))[0]
        assert record["off_mask_unmoved"] is True and record["off_mask"]["moved"] == 0
        off = sum(int((~marked).sum()) for marked in mask.values())
        assert record["off_mask"]["coordinates"] == off
        if record["type"] == "distill":
            assert record["off_mask"]["moved_in_memory"] == 0
        after = tensors(run, name)
        assert any(bool((after[n] != base[n]).any()) for n in base)
        for n, marked in mask.items():
            assert torch.equal(after[n][~marked], base[n][~marked])
    assert records["full"]["off_mask"] is None

    # seeds of discovery and of retraining
    assert records["full"]["seed"] == 1 and records["both"]["seed"] == 2
    assert records["both"]["discovery_seeds"] == {"full": 1}
    assert records["off"]["discovery_seeds"] is None  # chosen by the base alone

    # identity to full at several tolerances, recomputed
    rows = records["both"]["identity"]["full"]
    both, mask = tensors(run, "both"), load_mask(run.mask("both"))[0]
    assert [row["tolerance"] for row in rows] == [0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4]
    for row in rows:
        for prefix, arm in (("", both), ("base_", base)):
            close = {
                n: (arm[n].double() - full[n].double()).abs() <= row["tolerance"] for n in full
            }
            everywhere = torch.cat([c.flatten() for c in close.values()])
            on_mask = torch.cat([c[mask[n]] for n, c in close.items()])
            assert row[f"{prefix}all"] == pytest.approx(float(everywhere.double().mean()))
            assert row[f"{prefix}on_mask"] == pytest.approx(float(on_mask.double().mean()))

    # the early checkpoint, its mask, what is extrapolated from it and transplanted
    early = read_tensors(run.step_checkpoint("full", 2))
    assert any(not torch.equal(early[n], full[n]) for n in full)
    assert load_mask(run.mask("early"))[1]["inputs"]["of"] == digest_checkpoint(
        run.step_checkpoint("full", 2)
    )
    norms = [
        sum(float((t[n].double() - base[n].double()).square().sum()) for n in base) ** 0.5
        for t in (early, full)
    ]
    further, moved = tensors(run, "further"), 0
    for n in base:
        exact = base[n].double() + norms[1] / norms[0] * (early[n].double() - base[n].double())
        # one rounding to bf16: half a unit of 2^-7, and the last bit of fp32 before it
        assert bool(
            ((further[n].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-30).all()
        )
        assert torch.equal(further[n][early[n] == base[n]], base[n][early[n] == base[n]])
        moved += int((further[n] != base[n]).sum())
    assert moved > 0
    ffn = load_mask(run.mask("ffn"))[0]
    after = tensors(run, "transplant")
    assert all(torch.equal(after[n], torch.where(ffn[n], early[n], base[n])) for n in base)
    auto = load_configured(config.student, torch.bfloat16, folder=run.step_checkpoint("full", 2))
    assert all(torch.equal(p, early[n]) for n, p in auto.model.named_parameters())

    # done is done
    for name in config.arms:
        assert make_arm(run, config, name) is False
    for random in ("random-0", "random-1"):
        counts = load_mask(run.mask(random))[1]["counts"]
        assert counts == load_mask(run.mask("early"))[1]["counts"]


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_a_fixed_teacher_stays_loaded_from_arm_to_arm(kind, make_config, tmp_path):
    """Two arms of one teacher use one loaded model, and the second ends as if it had loaded its own."""
    train = {"steps": 1, "prompts_per_step": 2}
    arms = {name: {"type": "distill", "seed": seed} for seed, name in enumerate(("full", "again"))}
    config = make_config(kind, train=train, arms={"base": {"type": "base"}, **arms})
    run = RunFolder.create(tmp_path / "run", config)
    options, models = ArmOptions(teachers={}), []
    for name in arms:
        make_arm(run, config, name, options)
        models += [loaded.model for loaded in options.teachers.values()]
    assert len(models) == 2 and models[0] is models[1]
    alone = RunFolder.create(tmp_path / "alone", config)
    make_arm(alone, config, "again")
    expected = tensors(alone, "again")
    assert all(torch.equal(x, expected[n]) for n, x in tensors(run, "again").items())


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_a_locked_arm_moves_inside_the_subspace(kind, make_config, tmp_path):
    """With plain SGD, whose steps are multiples of the gradient, the whole update of every matrix has the rank it
    was locked to and lies in the early update's right subspace; without locking it has not."""
    config = make_config(
        kind,
        precision={"compute": "fp32", "stored": "fp32"},
        train={"steps": 3, "prompts_per_step": 4, "keep_steps": [1]},
        optim={"type": "sgd", "learning_rate": 1e-1, "momentum": 0.0},
        arms={
            "base": {"type": "base"},
            "full": {"type": "distill", "seed": 1},
            "locked": {"type": "distill", "subspace": {"of": "full@1", "rank": 2}},
        },
    )
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "locked")
    early = stream(run.checkpoint("base"), run.step_checkpoint("full", 1), classify)
    bases = {}
    for pair in early:
        if pair.delta.ndim == 2 and pair.delta.any():
            _, s, vt = torch.linalg.svd(pair.delta.double(), full_matrices=False)
            if s[1] > 1e-3 * s[0]:
                bases[pair.name] = vt[:2].T
    assert len(bases) > 5
    outside = {}
    for arm in ("locked", "full"):
        for pair in stream(run.checkpoint("base"), run.checkpoint(arm), classify):
            if pair.name in bases and pair.delta.any():
                delta, v = pair.delta.double(), bases[pair.name]
                outside.setdefault(arm, []).append(
                    float((delta - delta @ v @ v.T).norm() / delta.norm())
                )
    assert len(outside["locked"]) > 5
    # stored fp32 weights of size 1 hold updates of 1e-4 to some 1e-3 of themselves
    assert max(outside["locked"]) < 0.05 < sorted(outside["full"])[len(outside["full"]) // 2]


# ---------------------------------------------------------------------------------- configuration


def experiment(**sections) -> ExperimentConfig:
    arms = {"base": {"type": "base"}, "full": {"type": "distill"}}
    base = {"name": "x", "student": "s", "teacher": "t", "data": {"type": "shapes"},
            "train": {"steps": 4, "prompts_per_step": 4, "keep_steps": [2]}, "geometry": {"arms": []}}  # fmt: skip
    return ExperimentConfig.model_validate(
        {**base, **sections, "arms": {**arms, **sections.get("arms", {})}}
    )


def test_seeds_make_several_masks_and_arms():
    """A list of seeds is as many masks, arms under it are as many arms; arms alone can have several seeds too."""
    masks = {"top": {"type": "top_fraction", "fraction": 0.1},
             "random": {"type": "random", "like": "top", "seeds": [7, 8, 9]}}  # fmt: skip
    config = experiment(
        masks=masks,
        arms={
            "random": {"type": "distill", "mask": "random"},
            "each": {"type": "distill", "mask": "random", "seeds": [3, 4, 5]},
            "sub": {"type": "distill", "mask": "top", "seeds": [2, 3]},
        },
    )
    assert [config.masks[f"random-{k}"].seed for k in range(3)] == [7, 8, 9]
    for k in range(3):
        assert config.arms[f"random-{k}"].mask == config.arms[f"each-{k}"].mask == f"random-{k}"
    assert [config.arms[f"random-{k}"].seed for k in range(3)] == [2, 2, 2]
    assert [config.arms[f"each-{k}"].seed for k in range(3)] == [3, 4, 5]
    assert [config.arms[f"sub-{k}"].seed for k in range(2)] == [2, 3]
    assert not {"random", "each", "sub"} & config.arms.keys()
    assert experiment(**json.loads(config.model_dump_json())) == config
    for wrong, message in (
        ({"seeds": [1, 2]}, "has 2 seeds, and its mask 'random' has 3"),
        ({"seeds": 4}, "must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            experiment(masks=masks, arms={"x": {"type": "distill", "mask": "random", **wrong}})
    with pytest.raises(ValueError, match="'sub-0' is given twice"):
        experiment(arms={"sub": {"type": "distill", "seeds": [1]}, "sub-0": {"type": "distill"}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"masks": {"m": {"type": "visible", "of": "full@3"}}}, r"keeps \[2\]; put 3 there"),
        ({"masks": {"m": {"type": "visible", "of": "base@2"}}}, "base is not trained"),
        ({"masks": {"m": {"type": "visible", "of": "full@x"}}}, "@ must be followed by a step number"),
        ({"masks": {"m": {"type": "visible", "of": "nope"}}}, "'nope', which is not among"),
        ({"masks": {"m": {"type": "union", "masks": ["m", "n"]}, "n": {"type": "complement", "mask": "m"}},
          "arms": {"a": {"type": "distill", "mask": "m"}}},
         "leads back to itself"),
        ({"masks": {"m": {"type": "complement", "mask": "n"}}}, "'n', which is not among"),
        ({"masks": {"m": {"type": "principal", "fraction": 0.1}}}, "either rank or rank_fraction"),
        ({"masks": {"m": {"type": "whole"}}}, "give components, layers or modules"),
        ({"arms": {"a": {"type": "extrapolate", "of": "full@2"}}}, "either factor or norm_of"),
        ({"arms": {"a/b": {"type": "base"}}}, "should match pattern"),
        ({"masks": {"m": {"type": "top_fraction", "of": "a", "fraction": 0.1}},
          "arms": {"a": {"type": "distill", "mask": "m"}}}, "needs itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_by_name(sections, message):
    """Unkept steps, circles, dangling names and half-given rules end when the config is read."""
    with pytest.raises(ValueError, match=message):
        experiment(**sections)


# ------------------------------------------------------------------------- other bases, files


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_another_bases_mask_needs_a_word_and_leaves_a_mark(
    kind, make_config, folders, tmp_path, monkeypatch, capsys
):
    """A mask file of another base is refused with the remedy; allowed, mask, arm, card, geometry and evaluation
    say so, and so do masks made of it. The same base needs no word; another architecture is always refused."""
    theirs = make_config(
        kind,
        student=str(folders[kind, "student"]),
        masks={"top": {"type": "magnitude", "fraction": 0.2}},
    )
    other = RunFolder.create(tmp_path / "other", theirs)
    make_mask(other, theirs, "top")
    ours = make_config(
        kind,
        precision={
            "compute": "fp32",
            "stored": "fp32",
        },  # another base: the same weights, stored otherwise
        masks={
            "theirs": {"type": "file", "path": str(other.mask("top"))},
            "rest": {"type": "complement", "mask": "theirs"},
        },
        arms={"base": {"type": "base"}, "full": {"type": "distill", "mask": "rest"}},
        eval={"tasks": ["shapes_text"], "limit": 2},
        train={"steps": 1, "prompts_per_step": 2},
    )
    run = RunFolder.create(tmp_path / "run", ours)
    with pytest.raises(
        RunError, match=r"top\.safetensors is from base checkpoint .* --allow-other-base"
    ):
        make_arm(run, ours, "full")
    assert not run.mask("theirs").exists()
    make_arm(run, ours, "full", ArmOptions(allow_other_base=True))
    mark = {str(other.mask("top")): arm_digest(other, "base")}
    assert read_json(run.mask_record("rest"))["inputs"]["other_base"] == mark
    assert read_json(run.arm_record("full"))["other_base"] == mark
    assert "another base" in (run.checkpoint("full") / "README.md").read_text()
    assert make_arm(run, ours, "full") is False  # done is done, and was allowed when it was made
    make_geometry(run, ours, "full")
    assert read_json(run.geometry("full") / "summary.json")["inputs"]["other_base"] == mark
    from evals.harness import evaluate_arm

    evaluate_arm(run, ours, "full")
    assert read_json(run.eval("full") / "results.json")["other_base"] == mark
    evaluate_arm(run, ours, "base")
    from evals.compare import compare
    from evals.report.verdict import verdict

    compared = read_json(compare(run, ours))
    assert compared["other_base"] == {"full": mark}
    assert any("came from another base checkpoint" in line for line in verdict(compared))

    same = RunFolder.create(
        tmp_path / "same", config := theirs.model_copy(update={"masks": ours.masks})
    )
    assert make_mask(same, config, "rest")
    assert "other_base" not in read_json(same.mask_record("rest"))["inputs"]

    wide = make_config(
        kind,
        student=str(folders[kind, "teacher"]),
        masks={"theirs": ours.masks["theirs"].model_dump()},
    )
    foreign = RunFolder.create(tmp_path / "foreign", wide)
    with pytest.raises(RunError, match=r"top\.safetensors: the mask is of another model"):
        make_mask(foreign, wide, "theirs", ArmOptions(allow_other_base=True))


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_the_mask_verbs(kind, make_config, tmp_path, monkeypatch, capsys):
    """make, combine, show and compare on files: the numbers they print and write are those of the functions; wrong
    words are one line and exit code 2."""
    masks = {
        "low": {"type": "magnitude", "fraction": 0.2},
        "high": {"type": "magnitude", "which": "high", "fraction": 0.1},
    }
    config = make_config(kind, arms={"base": {"type": "base"}}, masks=masks)
    run = RunFolder.create(tmp_path / "run", config)
    assert vlopd(monkeypatch, "mask", "make", run.root, "--mask", "low") == 0
    assert run.mask("low").exists() and not run.mask("high").exists()
    assert vlopd(monkeypatch, "mask", "make", run.root) == 0
    low, high, both = run.mask("low"), run.mask("high"), tmp_path / "both.safetensors"
    assert vlopd(monkeypatch, "mask", "combine", "union", low, high, "--out", both) == 0
    assert load_mask(both)[1]["density"] == pytest.approx(0.3, abs=0.01)

    drawn = tmp_path / "drawn.safetensors"
    rule = f"{{type='random', like='{both}', seed=1, match='visibility'}}"
    assert (
        vlopd(monkeypatch, "mask", "make", run.checkpoint("base"), "--rule", rule, "--out", drawn)
        == 0
    )
    assert load_mask(drawn)[1]["counts"] == load_mask(both)[1]["counts"]
    capsys.readouterr()
    assert vlopd(monkeypatch, "mask", "show", both) == 0
    shown = capsys.readouterr().out
    assert "union" in shown and "embedding" in shown and "language   1" in shown
    table = tmp_path / "compared.json"
    assert (
        vlopd(
            monkeypatch,
            "mask",
            "compare",
            low,
            both,
            "--base",
            run.checkpoint("base"),
            "--out",
            table,
        )
        == 0
    )
    found = read_json(table)["overall"]
    assert found["the whole model"]["coverage_of_a"] == 1
    assert found["the whole model"]["enrichment"] == pytest.approx(
        1 / load_mask(both)[1]["density"], rel=1e-6
    )
    # both masks are made of |w| alone: within its quantiles there is next to nothing left to explain
    assert 0.9 < found["each tensor's quantiles of |w|"]["enrichment"] < 1.3

    def refused(message, *words):
        capsys.readouterr()
        assert vlopd(monkeypatch, "mask", *words) == 2
        assert re.search(message, capsys.readouterr().err), message

    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    refused(r"empty\.safetensors is not a complete mask", "show", empty)
    refused(
        r"model\.safetensors is not a mask file",
        "show",
        run.checkpoint("base") / "model.safetensors",
    )
    refused("--mask nope: not in the config", "make", run.root, "--mask", "nope")
    refused("takes one file", "combine", "complement", low, high, "--out", both)
    refused(
        "give base and trained",
        "make",
        run.checkpoint("base"),
        "--rule",
        "{type='visible'}",
        "--out",
        both,
    )
    refused("rule: .*fraction", "make", run.root, "--rule", "{type='magnitude'}", "--out", both)
    mask, about = load_mask(low)
    save_mask(tmp_path / "else.safetensors", mask, {**about["inputs"], "base": "e" * 64}, classify)
    save_mask(
        tmp_path / "less.safetensors",
        {"x": torch.ones(2, dtype=torch.bool)},
        about["inputs"],
        classify,
    )
    refused(
        "--allow-other-base",
        "combine",
        "union",
        low,
        tmp_path / "else.safetensors",
        "--out",
        both,
    )
    refused("different models", "compare", low, tmp_path / "less.safetensors")
    words = (
        "combine",
        "union",
        low,
        tmp_path / "else.safetensors",
        "--out",
        both,
        "--allow-other-base",
    )
    assert vlopd(monkeypatch, "mask", *words) == 0
    assert load_mask(both)[1]["inputs"]["other_base"] == {
        str(tmp_path / "else.safetensors"): "e" * 64
    }


# ------------------------------------------------------------------------------- several at once


@pytest.mark.parametrize("kind", ["llm"], indirect=True)
def test_two_jobs_train_arms_of_one_run_at_once(kind, folders, tmp_path, monkeypatch):
    """While one job holds an arm another trains a different one, and a job that wants the held one waits for it."""
    config = tmp_path / "two.toml"
    config.write_text(
        f"""
name = "two"
student = "{folders[kind, "student"]}"
teacher = "{folders[kind, "teacher"]}"
precision = {{compute = "fp32"}}
data = {{type = "shapes", modality = "text"}}
rollout = {{max_new_tokens = 4}}
train = {{steps = 2, prompts_per_step = 2}}
geometry = {{arms = []}}
[arms]
base = {{type = "base"}}
full = {{type = "distill", seeds = [1, 2]}}
"""
    )
    out = tmp_path / "run"
    run = RunFolder.create(out, load_config(config))

    words = ["run", str(config), "--until", "arms", "--out", str(out), "--arm"]
    with run.lock_artifact("arms/full-0"):
        job = [sys.executable, "-m", "vlopd.cli.main", *words, "full-0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        waiting = subprocess.Popen(job, env=environment, **pipes, text=True)
        said = waiting.stderr.readline()  # it waits before the other arm is begun
        assert vlopd(monkeypatch, *words, "full-1") == 0
        assert waiting.poll() is None and not run.arm_record("full-0").exists()
    error = said + waiting.communicate(timeout=120)[1]
    assert waiting.returncode == 0 and "waiting for" in error and "full-0" in error
    assert f"process {os.getpid()}" in error
    records = {arm: read_json(run.arm_record(arm)) for arm in ("full-0", "full-1")}
    assert records["full-0"]["inputs"]["base"] == records["full-1"]["inputs"]["base"]
    assert records["full-0"]["checkpoint_digest"] != records["full-1"]["checkpoint_digest"]


def test_of_jobs_with_one_artifact_one_makes_it(tmp_path):
    """The others wait, with a line that names the holder; where it fails the next makes it, and the last finds it."""
    started, turns, made = threading.Event(), iter(("fails", "makes")), []

    def job(name: str) -> None:
        with suppress(ZeroDivisionError), stage(RunFolder(tmp_path), "masks/top") as its:
            if its.is_due(lambda _: {"rule": "top"}):
                started.set()
                while said.getvalue().count("waiting for") < 2:
                    time.sleep(0.01)
                if next(turns) == "fails":
                    raise ZeroDivisionError
                made.append(name)
                its.finish({"density": 0.5}, [])

    said = io.StringIO()
    with redirect_stderr(said), ThreadPoolExecutor(3) as jobs:
        first = jobs.submit(job, "a")
        started.wait(60)
        others = [jobs.submit(job, "b"), jobs.submit(job, "c")]
        for each in (first, *others):
            each.result(60)
    assert len(made) == 1 and made != ["a"]
    assert said.getvalue().count(f"masks/top, locked by process {os.getpid()} on ") == 2


def test_jobs_that_begin_a_run_with_different_configs_are_told(tmp_path):
    """The second stops with one line, and the first one's config stays; a later change is no conflict."""
    one, other = (experiment().with_compute(compute) for compute in ("bf16", "fp32"))
    first, second = RunFolder.prepare(tmp_path, one), RunFolder.prepare(tmp_path, other)
    first.save_config(one)
    with pytest.raises(
        ConfigError, match=r"another config .*precision.compute: \"bf16\" -> \"fp32\""
    ):
        second.save_config(other)
    assert first.read()["config"]["precision"]["compute"] == "bf16"
    RunFolder.prepare(tmp_path, one).save_config(one)
    RunFolder.prepare(tmp_path, other).save_config(other)
    assert first.read()["config"]["precision"]["compute"] == "fp32"


def test_what_a_killed_job_left_is_swept_when_nobody_else_is_there(tmp_path):
    """Unfinished files stay while another process works in the folder, and go when one opens it alone."""
    config = experiment().with_compute("fp32")
    first = RunFolder.create(tmp_path, config)
    left = tmp_path / "arms" / ".unfinished-0123456789abcdef"
    left.mkdir(parents=True)
    second = RunFolder.create(tmp_path, config)
    assert left.exists()
    first.unlock()
    second.unlock()
    RunFolder.create(tmp_path, config).unlock()
    assert not left.exists()


def test_what_the_stored_precision_does_not_hold_is_refused(kind, make_config, tmp_path):
    """With a student stored in fp16, trained or extrapolated values beyond 65,504 are refused by their tensor; no
    checkpoint, kept step or record is written, and the training state stays."""
    student = build(kind, "student", tmp_path / "fp16", torch.float16)
    sections = {
        "student": str(student),
        "train": {"steps": 2, "prompts_per_step": 2, "save_every": 1},
        "arms": {
            "base": {"type": "base"},
            "full": {"type": "distill", "role": "full", "optim": {"learning_rate": 1.0}},
            "far": {"type": "distill", "optim": {"learning_rate": 1e5}},
            "kept": {
                "type": "distill",
                "optim": {"learning_rate": 1e5},
                "train": {"keep_steps": [1]},
            },
            "further": {"type": "extrapolate", "of": "full", "factor": 1e6},
        },
    }
    config = make_config(kind, **sections)
    run = RunFolder.create(tmp_path / "run", config)
    assert make_arm(run, config, "full")
    for arm in ("far", "kept", "further"):
        message = (
            r"weight: \d+ of \d+ values are not finite in float16, in which it is to be stored"
        )
        with pytest.raises(UserError, match=message):
            make_arm(run, config, arm)
        left = {path.name for path in run.arm(arm).rglob("*")} if run.arm(arm).exists() else set()
        assert not left & {"checkpoint", "record.json", "step-1", "model.safetensors"}, left
        assert not any(name.startswith(".unfinished") for name in left)
        assert ("state.safetensors" in left) == (arm == "far")
