"""Tuned arms: candidates by validation scores alone, one choice a group, and what is kept, resumed and refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from evals.compare import _compared_with
from evals.sweeps import best_of
from vlopd import pipeline
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import load_config
from vlopd.config.sweeps import at_edge, candidate_name, points_of
from vlopd.errors import ConfigError
from vlopd.files import read_json
from vlopd.run.folder import RunFolder
from vlopd.run.verify import verify_run

RATES = [1e-3, 3e-2]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [red, blue]
doc_to_target: answer
{more}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def poison(folder: Path, wrong: bool, raises: bool = False) -> None:
    """Writes the tested task: with right or wrong golds, or whose documents raise when they are read."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{k}?", "answer": (k + wrong) % 2} for k in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in 3 * rows))
    more = "process_docs: !function poison.documents"
    for name, data, about in (("tested", "data", more), ("validated", "rest", "")):
        text = TASK.format(name=name, data=folder / f"{data}.jsonl", more=about)
        (folder / f"{name}.yaml").write_text(text)
    body = 'raise AssertionError("the test split was read")' if raises else "return docs"
    (folder / "poison.py").write_text(f"def documents(docs):\n    {body}\n")


@pytest.fixture
def tuned(make_config, tmp_path):
    """(**arms besides base and full, rates of the tuned ones) -> a config whose arms are tuned."""

    def make(rates=RATES, **arms) -> ExperimentConfig:
        sweep = {"optim.learning_rate": rates}
        full = {"type": "distill", "seed": 1, "sweep": sweep}
        given = {name: {"type": "distill", "sweep": sweep, **arm} for name, arm in arms.items()}
        return make_config(
            "llm",
            train={"steps": 2, "prompts_per_step": 2, "keep_steps": [1]},
            rollout={"max_new_tokens": 3},
            masks={
                "top": {"type": "top_fraction", "of": "full@1", "fraction": 0.1},
                "random": {"type": "random", "like": "top", "seeds": [5, 6]},
            },
            arms={"base": {"type": "base"}, "full": full, **given},
            eval={
                "tasks": ["tested"],
                "include": str(tmp_path / "tasks"),
                "batch_size": 32,
                "keep_images": 0,
                "validation": {"tasks": ["validated"], "limit": 12},
            },
        )

    return make


def run(
    config: ExperimentConfig, out: Path, until: str = "arms", check: bool = False
) -> tuple[RunFolder, list[str]]:
    """Makes a run and returns it with the artifacts that the plan called due."""
    folder, config = pipeline.prepare(config, out=out)
    names = list(config.arms)
    assert not pipeline.find_problems(config, names, False) if check else True
    planned = pipeline.plan(folder, config, names, until)
    folder.save_config(config)
    pipeline.run_all(folder, config, names, until, lambda *_: None)
    folder.unlock()
    return folder, [artifact for artifact, why in planned.items() if why is not None]


def made(out: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(pattern)}


def test_a_choice_is_made_without_the_test_split(tuned, tmp_path):
    """Poisoned test documents, which raise when read or carry wrong golds, change no choice and meet no candidate."""
    out, config = tmp_path / "run", tuned()
    poison(tmp_path / "tasks", wrong=False, raises=True)
    folder, _ = run(config, out, check=True)
    before = read_json(folder.sweep("full"))
    scores = [point["score"] for point in before["curve"]]
    best = max(scores)
    assert before["chosen"] == before["curve"][scores.index(best)]["settings"]
    assert [point["settings"]["optim.learning_rate"] for point in before["curve"]] == RATES
    for wrong, until in ((False, "evals"), (True, "report")):
        shutil.rmtree(tmp_path / "tasks")
        poison(tmp_path / "tasks", wrong)
        run(config, out, until)
        after = read_json(folder.sweep("full"))
        assert {**after, "inputs": None} == {**before, "inputs": None}
    assert {path.name for path in (out / "evals").iterdir()} == {"base", "full"}
    assert all(path.name.startswith("full.") for path in (out / "validation").iterdir())
    for path in (out / "validation").glob("*/results.json"):
        assert list(read_json(path)["results"]) == ["validated"]
    page = (out / "report" / "report.md").read_text()
    assert "Full is tuned on the validation split: optim.learning_rate" in page or (
        "full is tuned on the validation split: optim.learning_rate" in page
    )
    assert "chosen, at the edge of its grid" in page
    assert (out / "report" / "figures" / "tuning.svg").exists()


def test_a_group_shares_a_choice_and_a_grid_grows(tuned, tmp_path):
    """Arms of one name choose by their mean; what is chosen is theirs to the bit; only new points are trained."""
    poison(tmp_path / "tasks", wrong=False)
    out = tmp_path / "run"
    config = tuned(random={"mask": "random"}, full={"seed": 1, "sweep": None})
    assert config.sweep_groups == ["random"]
    folder, due = run(config, out)
    curve = read_json(folder.sweep("random"))
    for point in curve["curve"]:
        each = [point["arms"][arm]["score"] for arm in ("random-0", "random-1")]
        assert point["score"] == pytest.approx(sum(each) / 2) and point["n"] == 12
    for arm in ("random-0", "random-1"):
        record = read_json(folder.arm_record(arm))
        chosen = folder.arm(record["candidate"])
        for path in (p for p in folder.arm(arm).rglob("*") if p.is_file()):
            its = chosen / path.relative_to(folder.arm(arm))
            assert path.name == "record.json" or path.samefile(its)
        assert record["sweep"]["chosen"] == curve["chosen"]
        assert record["sweep"]["budget"] == {"settings": 2, "completions": 8}
        assert record["sweep"]["at_edge"] == ["optim.learning_rate"]
    points = [f"arms/random-{k}.learning_rate-{rate:g}" for k in (0, 1) for rate in RATES]
    assert set(points) < set(due) and due.index("sweeps/random") < due.index("arms/random-0")
    assert run(config, out)[1] == []
    assert not verify_run(folder).problems and not verify_run(folder).unknown
    trained = made(out, "arms/*.learning_rate-*/record.json")
    shutil.rmtree(
        folder.arm("random-1.learning_rate-0.03")
    )  # as of a run that was killed before it
    (out / "checksums" / "arms--random-1.learning_rate-0.03.sha256").unlink()
    _, due = run(
        tuned([*RATES, 1e-4], random={"mask": "random"}, full={"seed": 1, "sweep": None}), out
    )
    kept = made(out, "arms/*.learning_rate-*/record.json")
    again = {path.parent.name for path, when in kept.items() if trained.get(path) != when}
    new = {f"{arm}.learning_rate-0.0001" for arm in ("random-0", "random-1")}
    assert again == {"random-1.learning_rate-0.03", *new}
    assert len(read_json(folder.sweep("random"))["curve"]) == 3


def test_equal_scores_choose_the_first_of_the_grid():
    """Means over arms of as many right answers are equal though their sums round differently; NaN is never chosen."""
    scores = [math.nan, np.mean([1 / 3, 2 / 3, 1.0]) - 1e-15, np.mean([1.0, 2 / 3, 1 / 3]), 0.5]
    assert scores[1] < scores[2]
    assert best_of([{"score": score} for score in scores])["score"] == scores[1]
    assert best_of([{"score": 0.5}, {"score": 0.5 + 1e-6}])["score"] > 0.5


def test_a_grid_is_a_product_with_names_for_files():
    """The last key varies fastest; names are the same in a larger grid, and of any value."""
    grid = {"optim.learning_rate": (1e-3, 0.1 + 0.2), "optim.betas": ((0.9, 0.95),)}
    points = points_of(grid)
    assert points == [
        {"optim.learning_rate": r, "optim.betas": (0.9, 0.95)} for r in (1e-3, 0.1 + 0.2)
    ]
    names = [candidate_name("full", point) for point in points]
    assert names[0].startswith("full.learning_rate-0.001.betas-")
    assert names[1].startswith("full.learning_rate-0.30000000000000004.betas-")
    same = candidate_name("x", {"rollout.temperature": 1.0, "loss.temperature": 2.0})
    assert same == "x.rollout.temperature-1.loss.temperature-2"
    assert at_edge({"a.b": (1, 2, 3), "a.c": ("x", "y")}, {"a.b": 2, "a.c": "x"}) == []
    assert at_edge({"a.b": (1, 2, 3)}, {"a.b": 3}) == ["a.b"]


def test_tuned_arms_have_the_roles_of_what_is_chosen_for_them(tuned):
    """A swept key is no difference between tuned arms; a fixed rate is one, and so is a choice of its own."""
    config = tuned(
        sub={"mask": "top"},
        random={"mask": "random"},
        own={"mask": "random", "sweep_group": "own", "role": "control"},
        fixed={"mask": "random", "sweep": None},
    )
    roles = config.roles
    assert roles.of["full"] == "full" and roles.of["sub"] == "subnetwork"
    assert {group.arms for group in roles.controls} == {
        ("random-0", "random-1"),
        ("own-0", "own-1"),
    }
    apart = {its.arm: its.differences for its in roles.unpooled}
    assert apart.keys() == {"fixed-0", "fixed-1"} and "sweep" in str(apart["fixed-0"])
    assert config.with_candidates().roles == roles
    declared = {
        "arms": {**config.arms, "full": config.arms["full"].model_copy(update={"role": "full"})}
    }
    declared = config.model_copy(update=declared)
    assert declared.with_candidates().roles == declared.roles
    again = ExperimentConfig.model_validate(json.loads(config.model_dump_json()))
    assert again == config and again.sweep_group("random-1") == "random"
    assert config.budget_of("fixed-0") == {"settings": 1, "completions": 4}


def test_a_null_takes_the_choice_of_its_real_arm(tuned, tmp_path):
    """With the group's name and no sweep of its own a null trains at the chosen point, again where another is chosen,
    on the completions of what was chosen; it is a null of the tuned arm, and one at a fixed rate says why it is not."""
    poison(tmp_path / "tasks", wrong=False)
    own = {"sweep": None, "null": "rademacher"}
    nulls = {
        "taken": {**own, "sweep_group": "full"},
        "fixed": own,
        "again": {**own, "sweep_group": "full", "null": {"type": "rademacher", "replay": "full"}},
        "tuned": {"null": "rademacher"},
    }
    config = tuned(**nulls)
    groups = {(its.null, its.of, its.arms) for its in config.roles.nulls}
    assert groups == {
        ("rademacher", ("full",), ("taken",)),
        ("rademacher", ("full",), ("tuned",)),
        ("rademacher, replayed", ("full",), ("again",)),
    }
    (line,) = config.roles.nulls_alone
    assert "arms.fixed:" in line and 'sweep_group = "full"' in line and line in config.notes
    assert config.budget_of("taken") == config.budget_of("full")
    assert tuned(taken=nulls["taken"]).roles.nulls_alone == ()

    few = {"again": nulls["again"]}
    for rates in ([3e-2], [1e-3]):
        folder, due = run(tuned(rates, **few), tmp_path / "run")
        rate = read_json(folder.sweep("full"))["chosen"]["optim.learning_rate"]
        records = {name: read_json(folder.arm_record(name)) for name in few}
        found = {its["inputs"]["recipe"]["optim"]["learning_rate"] for its in records.values()}
        assert found == {rate} and "arms/again" in due
        sampled = folder.arm("full") / "completions" / "step-000001.safetensors"
        assert sampled.exists()
    assert run(tuned([1e-3], **few), tmp_path / "run")[1] == []
    assert not verify_run(folder).problems and not verify_run(folder).inputs


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"x": {"sweep": None, "sweep_group": "ful"}}, "x.sweep_group names 'ful'"),
        (
            {
                "x": {
                    "sweep": {"train.steps": [2, 3]},
                    "null": {"type": "rademacher", "replay": "full"},
                }
            },
            "another train at some point of a sweep",
        ),
        (
            {"x": {"sweep": None, "null": {"type": "rademacher", "replay": "x"}}},
            "names the arm itself",
        ),
        (
            {"x": {"sweep": {"optim.betas": [[0.9, 0.9]], "optim": {"betas": [[0.8, 0.9]]}}}},
            "twice",
        ),
        (
            {"x": {"sweep": {"loss.tokens": [None], "loss.tokens.fraction": [0.1]}}},
            "is of a part of it",
        ),
        ({"sub": {"mask": "top", "sweep": {"optim.rate": [1.0]}}}, "sub.*optim.rate"),
        ({"sub": {"mask": "top", "sweep": {"eval.limit": [1]}}}, "must be a key of data, "),
        ({"sub": {"mask": "top", "sweep": {"train.steps": []}}}, "at least one value"),
        ({"sub": {"mask": "top", "sweep": {"train.steps": [2, 2]}}}, "2 is given twice"),
        ({"sub": {"mask": "top", "sweep_group": "full"}}, "sub is made from arms.full"),
        ({"x": {"sweep_group": "full", "sweep": {"train.steps": [2, 3]}}}, "have other grids"),
        ({"full.learning_rate-0.03": {"sweep": None}}, "also what a sweep makes"),
    ],
)
def test_sweeps_that_cannot_be_made_are_refused(tuned, arms, message):
    """Unknown keys, empty and unequal grids, arms that are made from each other, names that are taken."""
    with pytest.raises((ConfigError, ValueError), match=message):
        tuned(**arms)


def test_validation_is_another_split(tuned):
    """A tuned arm needs eval.validation, whose tasks are none of eval.tasks, with or without their pictures."""
    config = tuned().model_dump(mode="json")
    for tasks, message in (
        (["tested"], "'tested' is in eval.tasks too"),
        (["tested@no_picture"], "is in eval.tasks too"),
    ):
        config["eval"]["validation"]["tasks"] = tasks
        with pytest.raises(ValueError, match=message):
            ExperimentConfig.model_validate(config)
    config["eval"]["validation"] = None
    with pytest.raises(ValueError, match=r"full\.sweep needs a split to choose on"):
        ExperimentConfig.model_validate(config)


def test_a_subnetwork_is_set_against_full_at_its_own_seed():
    """Where full was trained from the subnetwork's seed too, that replicate stands for it; else full does."""
    path = Path(__file__).parents[1] / "configs" / "quickstart.toml"
    roles = load_config(path).roles
    assert roles.of["replicate"] == "replicate"
    assert roles.full_at_seed_of("subnetwork") == "replicate"
    assert _compared_with(roles, "subnetwork", "full") == ["replicate"]
    assert (
        load_config(path, ["arms.replicate.seed=7"]).roles.full_at_seed_of("subnetwork") == "full"
    )
