"""Arms that learn nothing from a teacher need none: supervised fine-tuning on the data, and rewards alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import pair_of, recipe_of
from tests.test_pipeline import vlopd
from vlopd.config.data import ShapesData
from vlopd.config.recipe import Recipe
from vlopd.data.load import load_data
from vlopd.errors import ConfigError
from vlopd.files import read_jsonl
from vlopd.loop import distill
from vlopd.train.pair import load_pair
from vlopd.types import Example

SFT = {"loss": {"type": "nll"}, "rollout": {"max_new_tokens": 6, "source": "data"}}
RLVR = {
    "reward": {"rule": "answer_named"},
    "rollout": {"max_new_tokens": 6, "completions_per_prompt": 4},
}
OBJECTIVES = {"SFT": SFT, "RLVR": RLVR, "RLVR, k1": {**RLVR, "loss": {"type": "k1"}}}
OF_TEACHER = {
    *("kl", "kl_quarter_1", "kl_quarter_2", "kl_quarter_3", "kl_quarter_4", "teacher_entropy"),
    *("top_overlap_fraction", "student_shared_mass_fraction", "teacher_shared_mass_fraction"),
}
"""Metrics that compare with a teacher."""


@pytest.mark.parametrize("chunk_tokens", [5, 1024])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_teacher_that_only_observes_changes_no_bit(
    objective, chunk_tokens, kind, make_config, tmp_path
):
    """Trained without a teacher and beside one, the student's weights are the same bits; so are all metrics but those
    that compare with the teacher, which are null without it, and the samples have no log-probs of it."""
    sections = {**OBJECTIVES[objective], "train": {"steps": 3, "prompts_per_step": 3}}
    sections["loss"] = {"type": "reverse_kl", **sections.get("loss", {})}
    sections["loss"]["chunk_tokens"] = chunk_tokens
    found = {}
    for name, more in (("with", {}), ("without", {"teacher": None})):
        config = make_config(kind, **sections, **more)
        recipe, pair = recipe_of(config), pair_of(config)
        assert len(pair.teachers) == (name == "with")
        rows = load_data(recipe.data, recipe.prompts)
        # an answer that random models say now and then, so that rewards differ
        head = pair.student.model.get_output_embeddings().weight.data
        head[pair.student.tokenizer.convert_tokens_to_ids("red")] *= 2
        asked = [Example(e.id, e.messages, e.images, "red", e.fields) for e in rows]
        trained = distill(pair, asked if "RLVR" in objective else rows, recipe, tmp_path / name)
        rows = read_jsonl(trained.out / "metrics.jsonl")
        metrics = [{k: v for k, v in r.items() if "second" not in k} for r in rows]
        samples = [json.loads(x) for x in (trained.out / "samples.jsonl").read_text().splitlines()]
        found[name] = (dict(pair.student.model.named_parameters()), metrics, samples)
    (one, beside, told), (other, alone, untold) = found["with"], found["without"]
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert beside[0]["grad_norm"] > 0
    for a, b in zip(beside, alone, strict=True):
        assert a.keys() == b.keys()
        assert {k for k in a if a[k] != b[k]} <= OF_TEACHER
        assert a["kl"] is not None and all(b[key] is None for key in OF_TEACHER)
    assert all("teacher_logprobs" in row for row in told)
    for a, b in zip(told, untold, strict=True):
        assert {k: v for k, v in a.items() if k != "teacher_logprobs"} == b


@pytest.mark.parametrize(
    ("sections", "who"),
    [
        ({}, "loss reverse_kl needs a teacher"),
        ({"rollout": {"source": "data"}}, "loss reverse_kl needs a teacher"),
        ({**SFT, "rollout": {"source": "teacher"}}, "rollout.source = 'teacher' needs a teacher"),
        ({**RLVR, "reward": {"rule": "exact_match", "alpha": 0.5}}, "loss reverse_kl needs a"),
        ({**SFT, "arms": {"a": {"type": "distill", "loss": {"type": "k2"}, "rollout": {"source": "student"}}}},
         r"arms\.a: loss k2 needs a teacher"),
        ({**SFT, "arms": {"t": {"type": "teacher"}}}, r"arms\.t is a teacher, and there is none"),
    ],
)  # fmt: skip
def test_a_config_that_needs_a_teacher_says_so(sections, who, make_config):
    """A loss, a source of completions or an arm that needs a teacher without one is a line with the key to set."""
    with pytest.raises(ValueError, match=rf"{who}.*set teacher = MODEL"):
        make_config("llm", teacher=None, **sections)


def test_a_teacher_may_be_an_arms_own(make_config, folders):
    """Without a teacher for all, one arm distils from its own, another is fine-tuned; each has its objective."""
    arms = {
        "sft": {"type": "distill", **SFT},
        "opd": {"type": "distill", "teacher": {"model": str(folders["llm", "teacher"])}},
    }
    config = make_config("llm", teacher=None, arms=arms)
    sft, opd = (recipe_of(config, name) for name in arms)
    assert not sft.teachers and sft.objective == "loss nll on the data"
    assert list(opd.teachers) == ["teacher"] and opd.objective.startswith("loss reverse_kl from /")


def test_an_arm_keeps_the_nulls_of_its_run(make_config):
    """A setting that the run turns off stays off in an arm that changes another setting of the same section."""
    arms = {"a": {"type": "distill", "optim": {"learning_rate": 1e-5}}}
    config = make_config("llm", optim={"max_grad_norm": None}, arms=arms)
    assert recipe_of(config, "a").optim.max_grad_norm is None


def test_distill_in_a_notebook(kind, folders, tmp_path):
    """Names, a recipe and a folder are enough: the metrics are at hand, and the saved student is what was trained. A
    recipe refuses a pair without the teacher that it needs, a pair with another teacher, and no data; a mask is of
    bools."""
    modality = "image" if kind == "vlm" else "text"
    recipe = Recipe(
        teacher=str(folders[kind, "teacher"]),
        optim={"learning_rate": 1e-3},
        train={"steps": 2, "prompts_per_step": 2},
    )
    student = str(folders[kind, "student"])
    data = load_data(ShapesData(modality=modality), recipe.prompts)
    trained = distill(
        load_pair(student, recipe.teacher, compute="bf16"), data, recipe, out=tmp_path / "x", seed=1
    )
    assert trained.metrics.step.tolist() == [0, 1]
    trained.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}  # as in the student's checkpoint
    before, again = (
        load_pair(folder, compute="bf16") for folder in (student, str(tmp_path / "saved"))
    )
    old = dict(before.student.model.named_parameters())
    now = dict(trained.student.model.named_parameters())
    reread = dict(again.student.model.named_parameters())
    assert all(torch.equal(reread[name], now[name]) for name in now)
    assert any(not torch.equal(now[name], old[name]) for name in now)
    with pytest.raises(ConfigError, match=r"loss reverse_kl needs a teacher: load_pair\("):
        distill(again, data, recipe, out=tmp_path / "y")
    pair = load_pair(student, student)
    with pytest.raises(
        ConfigError, match=r"the pair's teachers are .*-student'\], the recipe's .*-teacher'\]"
    ):
        distill(pair, data, recipe, out=tmp_path / "y")
    pair = load_pair(student, recipe.teacher, compute="bf16")
    with pytest.raises(ConfigError, match="y: the data has no examples"):
        distill(pair, [], recipe, out=tmp_path / "y")
    mask = {name: torch.ones_like(its) for name, its in pair.student.model.named_parameters()}
    with pytest.raises(ValueError, match=r"the mask's .* is torch\.bfloat16, not a torch\.bool"):
        distill(pair, data, recipe, out=tmp_path / "y", mask=mask)
    assert not (tmp_path / "y").exists()


MINIATURE = """
name = "alone"
student = "{student}"
[data]
type = "shapes"
modality = "{modality}"
{objective}
[optim]
learning_rate = 3e-3
[train]
steps = 3
prompts_per_step = 4
sample_every = 2
[masks]
top = {{type = "top_fraction", of = "full", fraction = 0.1}}
[arms]
base = {{type = "base"}}
full = {{type = "distill"}}
subnetwork = {{type = "distill", mask = "top"}}
[geometry]
null_draws = 1
ratios = [0.1]
[eval]
tasks = ["{task}"]
limit = 6
batch_size = 6
keep_images = 2
bootstrap_draws = 200
"""
TABLES = {
    "SFT": 'loss = {type = "nll"}\nrollout = {source = "data", max_new_tokens = 6}',
    "RLVR": 'reward = {rule = "answer_named"}\nrollout = {completions_per_prompt = 4, max_new_tokens = 6}',
}


@pytest.mark.parametrize(
    ("kind", "objective"), [("llm", "SFT"), ("vlm", "RLVR")], indirect=["kind"]
)
def test_a_whole_run_without_a_teacher(objective, kind, folders, tmp_path, monkeypatch, capsys):
    """From `vlopd check` to the report: records, cards, curves and samples, and no KL to a teacher anywhere."""
    config, run = tmp_path / "alone.toml", tmp_path / "run"
    text = MINIATURE.format(
        student=folders[kind, "student"],
        modality="image" if kind == "vlm" else "text",
        task="shapes" if kind == "vlm" else "shapes_text",
        objective="",
    )
    config.write_text(f"{TABLES[objective]}\n{text}")
    assert vlopd(monkeypatch, "check", config) == 0
    assert vlopd(monkeypatch, "check", "--meta", config) == 0
    out = capsys.readouterr().out
    assert "sampler against trainer" in out and "mean reverse KL" not in out
    assert vlopd(monkeypatch, "run", config, "--out", run) == 0, capsys.readouterr()
    for arm in ("full", "subnetwork"):
        folder = run / "arms" / arm
        assert json.loads((folder / "record.json").read_text())["inputs"]["teachers"] == {}
        card = (folder / "checkpoint" / "README.md").read_text()
        assert ("loss nll on the data" if objective == "SFT" else "reward answer_named") in card
        assert not list((run / "evals" / arm).glob("tokens*"))
    page = (run / "report" / "report.html").read_text()
    curve = "Training loss" if objective == "SFT" else "Mean reward"
    assert "no teacher" in page and f"{curve} over optimizer steps" in page
    assert "KL(student || teacher)" not in page
    training = (run / "report" / "tables" / "training.csv").read_text().splitlines()
    assert len(training) == 1 + 2 * 3
    assert vlopd(monkeypatch, "run", config, "--out", run) == 0
