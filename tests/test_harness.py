"""The harness: nothing runs twice, nothing is shared by mistake, and models or scores from elsewhere are arms too."""

import json

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from evals import harness, stats
from evals.compare import compare, estimate_to_json
from evals.harness import evaluate_arm
from evals.lm import ArmLM, GenerationSettings
from evals.report.verdict import TaskSentences, non_inferiority_text, p_value, points, verdict
from evals.scoring import TASKS, Tasks, score_task
from vlopd.config.analysis import EvalConfig
from vlopd.config.models import ModelConfig
from vlopd.errors import ConfigError, RunError
from vlopd.files import read_json, read_jsonl
from vlopd.models.load import BUILTIN, load_configured
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm
from vlopd.run.resolve import score_files

TEXT = {"llm": "shapes_text", "vlm": "shapes"}


def base_run(make_config, kind, tmp_path, **sections):
    """A run whose base arm is made."""
    config = make_config(
        kind, arms={"base": {"type": "base"}, **sections.pop("arms", {})}, **sections
    )
    run = RunFolder.create(tmp_path / "run", config)
    for arm in config.arms:
        make_arm(run, config, arm)
    return run, config


def with_eval(config, **changes):
    return config.model_copy(update={"eval": config.eval.model_copy(update=changes)})


def asked(monkeypatch) -> list[str]:
    """The tasks that are really evaluated from here on."""
    found: list[str] = []
    original = harness.score_task

    def counting(lm, task, *rest):
        found.append(task)
        return original(lm, task, *rest)

    monkeypatch.setattr(harness, "score_task", counting)
    return found


def test_nothing_is_evaluated_twice(kind, make_config, tmp_path, monkeypatch):
    """A further task is added to what is there; other settings, another checkpoint or a changed definition of a task
    make it run again."""
    task = TEXT[kind]
    run, config = base_run(
        make_config, kind, tmp_path, eval={"tasks": [task], "limit": 3, "keep_images": 1}
    )
    found = asked(monkeypatch)
    assert evaluate_arm(run, config, "base") and not evaluate_arm(run, config, "base")
    assert found == [task]
    more = with_eval(config, tasks=(task, f"{task}_validation"))
    assert evaluate_arm(run, more, "base") and found == [task, f"{task}_validation"]
    results = read_json(run.eval("base") / "results.json")
    assert set(results["primary_metric"]) == set(results["results"]) == set(more.eval.tasks)
    assert results["chat_template_digest"] and len(results["prompt_digest"]) == 2
    assert bool(results["processor_digest"]) == (kind == "vlm")
    assert evaluate_arm(run, with_eval(more, limit=2), "base") and len(found) == 4
    # another checkpoint in its place, as if it had been written so
    tokenizer = run.checkpoint("base") / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    run.checksums.write(
        "arms/base", [path for path in run.arm("base").rglob("*") if path.is_file()]
    )
    assert evaluate_arm(run, with_eval(more, limit=2), "base") and len(found) == 6


def test_a_tasks_digest_follows_what_it_is_made_of(tmp_path):
    """The digest changes with the YAML, with what it includes and with the module of its functions, and with nothing
    else in the folder."""
    (tmp_path / "a.yaml").write_text("include: b.yaml\ntask: a\n")
    (tmp_path / "b.yaml").write_text(
        "task: b\ndataset_path: json\ntest_split: test\nprocess_results: !function c.f\n"
    )
    (tmp_path / "c.py").write_text("def f(doc, results): return {}\n")

    def digest():
        return Tasks(include_path=str(tmp_path), include_defaults=False).digest("a")

    seen = [digest()]
    (tmp_path / "d.py").write_text("")
    assert digest() == seen[0]
    for name in ("a.yaml", "b.yaml", "c.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        seen.append(digest())
    assert len(set(seen)) == 4


def test_few_shot_examples_bring_their_pictures(make_pair):
    """Before each question stand two solved ones with their own pictures, in the order of their marks in the prompt."""
    model = make_pair("vlm").student
    prompts = []

    class Looking(ArmLM):
        def encode(self, batch, longest=None):
            prompts.extend((r.args[0], r.args[2]["visual"]) for r in batch)
            return super().encode(batch, longest)

    lm = Looking(model, 2, quiet=True)
    config = EvalConfig(tasks=("shapes",), fewshot=2)
    results = score_task(lm, "shapes", Tasks.of(["shapes"]), config, 3, "few")
    plain = score_task(
        ArmLM(model, 2, quiet=True), "shapes", Tasks.of(["shapes"]), EvalConfig(), 3, "none"
    )
    own = Tasks.of(["shapes"]).load(["shapes"])["tasks"]["shapes"].own_image
    assert len(prompts) == 3
    for prompt, pictures in prompts:
        assert prompt.count("<image>") == len(pictures) == 3
    for row, bare in zip(results["samples"]["shapes"], plain["samples"]["shapes"], strict=True):
        shown = next(p for text, p in prompts if row["arguments"][0][0] == text)
        assert shown[-1].tobytes() == own(row["doc"])[0].tobytes()
        assert row["doc_hash"] == bare["doc_hash"]
        assert row["prompt_hash"] != bare["prompt_hash"]


def test_sampled_answers_are_means_with_pass_at_k(kind, make_config, tmp_path):
    """mean@n is the mean of n seeded draws' scores and pass@n whether any was right; batches change nothing."""
    task = TEXT[kind]
    run, config = base_run(make_config, kind, tmp_path, eval={"tasks": [task], "limit": 4})
    sampled = {"n": 3, "temperature": 1.5}
    both = []
    for batch_size in (1, 4):
        its = with_eval(
            config,
            batch_size=batch_size,
            sampled=EvalConfig.model_validate({"sampled": sampled}).sampled,
        )
        evaluate_arm(run, its, "base")
        both.append(read_jsonl(run.eval("base") / f"samples_{task}.jsonl"))
    assert both[0] == both[1]
    for row in both[0]:
        texts = json.loads(row["completion"])
        right = [text.strip() == row["target"].strip() for text in texts]
        assert len(texts) == 3 and row["exact_match"] == pytest.approx(sum(right) / 3)
        assert row["pass@3"] == float(any(right))
    assert len({text for row in both[0] for text in json.loads(row["completion"])}) > 4
    results = read_json(run.eval("base") / "results.json")
    assert results["pass_at"][task] == ["pass@2", "pass@3"]
    compared = read_json(compare(run, its))["tasks"][task]["arms"]["base"]
    assert set(compared["pass_at"]) == {"pass@2", "pass@3"}


def lm_evals_output(folder, out, task: str, limit: int) -> None:
    """What lm-eval's command line leaves with --output_path and --log_samples."""
    tracker = EvaluationTracker(output_path=str(out))
    results = lm_eval.simple_evaluate(
        model="hf-multimodal" if task == "shapes" else "hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=limit,
        batch_size=4,
        device="cpu",
        bootstrap_iters=1,
        apply_chat_template=True,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    tracker.save_results_samples(task, samples[task])


def test_scores_and_models_from_elsewhere_are_arms(make_config, tmp_path):
    """lm-eval's own output and the same model evaluated here give the same rows; both stand beside the run's arms."""
    folder = BUILTIN / "shapes-text-student"
    lm_evals_output(folder, tmp_path / "theirs", "shapes_text", 5)
    run, config = base_run(
        make_config,
        "llm",
        tmp_path,
        arms={
            "theirs": {"type": "imported", "results": str(tmp_path / "theirs")},
            "here": {"type": "checkpoint", "model": str(folder)},
        },
        eval={"tasks": ["shapes_text"], "limit": 5},
    )
    for arm in config.arms:
        assert evaluate_arm(run, config, arm) and not evaluate_arm(run, config, arm)
    theirs, here = (
        read_jsonl(run.eval(arm) / "samples_shapes_text.jsonl") for arm in ("theirs", "here")
    )
    no_lengths = dict.fromkeys(("tokens", "thought_tokens", "stop", "truncated", "outcome"))
    assert theirs == [row | no_lengths for row in here]
    assert all(row["tokens"] > 0 and row["outcome"] in ("right", "wrong") for row in here)
    compared = read_json(compare(run, config))
    roles = {arm: its["role"] for arm, its in compared["tasks"]["shapes_text"]["arms"].items()}
    assert roles == {"base": "base", "theirs": "other", "here": "other"}
    assert any("theirs minus base" in line for line in verdict(compared))
    lacking = with_eval(config, tasks=("shapes_text", "capitals"))
    with pytest.raises(RunError, match="no samples of task capitals; it has shapes_text"):
        evaluate_arm(run, lacking, "theirs")
    with pytest.raises(RunError, match=r"no results_\*\.json"):
        score_files(tmp_path / "run")
    fewer = with_eval(config, limit=4)
    with pytest.raises(RunError, match=r"evals/base/results.json was made by another .*tasks"):
        compare(run, fewer)
    for arm in ("base", "here"):
        assert evaluate_arm(run, fewer, arm)
    with pytest.raises(RunError, match="different data_digest on shapes_text"):
        compare(run, fewer)


def test_bad_tasks_are_one_clear_line(folders, tmp_path):
    """A task without questions and one whose column the data lacks. (test_pipeline.py has one that does not exist.)"""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "how many", "answer": "2"}) + "\n")
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_target: answer\n"
        "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 2}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "none.yaml").write_text(
        f"task: none\n{shared}doc_to_text: question\nprocess_docs: !function none.nothing\n"
    )
    (tmp_path / "none.py").write_text("def nothing(docs): return docs.select(range(0))\n")
    (tmp_path / "wrong.yaml").write_text(f"task: wrong\n{shared}doc_to_text: '{{{{asked}}}}'\n")
    manager = Tasks(include_path=str(tmp_path), include_defaults=False)
    loaded = load_configured(
        ModelConfig(model=str(folders["llm", "student"])), torch.float32, "cpu"
    )
    lm = ArmLM(loaded, 2, quiet=True)
    for task, message in (
        ("none", "task none has no questions"),
        ("wrong", "wrong could not be loaded: 'asked'"),
    ):
        with pytest.raises(RunError, match=message) as error:
            score_task(lm, task, manager, EvalConfig(), None, "bad")
        assert "\n" not in str(error.value)


def test_groups_and_tasks_from_a_folder(make_config, tmp_path):
    """Task files of a folder of the user's are found, and a group is evaluated as its members."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"how many {c}", "answer": "2"} for c in ("red", "blue", "green")]
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, choices in (("mine_a", '["2", "3"]'), ("mine_b", '["yes", "2"]')):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\n"
            f"doc_to_target: answer\ndoc_to_choice: {choices}\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [mine_a, mine_b]\n")
    run, config = base_run(
        make_config, "llm", tmp_path, eval={"tasks": ["mine"], "include": str(tmp_path)}
    )
    assert evaluate_arm(run, config, "base") and not evaluate_arm(run, config, "base")
    compared = read_json(compare(run, config))["tasks"]
    assert set(compared) == {"mine_a", "mine_b"} and compared["mine_a"]["n"] == 3
    rows = read_jsonl(run.eval("base") / "samples_mine_b.jsonl")
    assert {row["completion"] for row in rows} <= {"yes", "2"}
    with pytest.raises(ConfigError, match="no folder 'nowhere'"):
        Tasks.of(["mine"], "nowhere")


def test_an_interval_that_is_not_there():
    """Two tied questions of one cluster have a difference and no interval: the verdict says no nan."""
    found = stats.paired_difference(np.array([0.5, 0.25]), np.array([0.5, 0.25]), ["one", "one"])
    entry = estimate_to_json(found)
    assert np.isnan(entry["interval"]).all()
    for bounds in (entry["interval"], [None, None]):
        tested = {"margin": 0.05, "holds": False, "p": None, "low": bounds[0], "why": None}
        its = {**entry, "interval": bounds, "non_inferiority": tested}
        assert points(its) == "+0.0 pp" and "nan" not in non_inferiority_text(its)
        task = {"arms": {}, "contrasts": [], "n": 2, "scale": "fraction", "higher_is_better": True,
                "minimum_detectable_effect": bounds[0],
                "minimum_detectable_effect_of": "a - b"}  # fmt: skip
        assert TaskSentences(task, {}).limits() == []
    assert p_value(float("nan")) == p_value(None) == "-"


def test_a_task_that_fails_while_it_is_scored(make_config, folders, tmp_path):
    """What a task's code raises on an answer is one line with the task; what our model class raises is not hidden."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "how many", "answer": "2"}) + "\n")
    (tmp_path / "module.py").write_text("def score(doc, results):\n    return {'score': 1 / 0}\n")
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
        "generation_kwargs: {until: [], max_gen_toks: 2}\nprocess_results: !function module.score\n"
        "metric_list: [{metric: score, aggregation: mean, higher_is_better: true}]\n"
    )
    config = EvalConfig(tasks=("mine",), include=str(tmp_path))
    model = load_configured(
        ModelConfig(model=str(folders["llm", "student"])), torch.float32, torch.device("cpu")
    )
    manager = Tasks.of(["mine"], str(tmp_path))
    lm = ArmLM(model, quiet=True)
    with pytest.raises(
        RunError, match=r"task mine cannot be scored: ZeroDivisionError: division by zero; fix"
    ):
        score_task(lm, "mine", manager, config, None, "student")
    lm.batch_size = None
    with pytest.raises(TypeError):
        score_task(lm, "mine", manager, config, None, "student")


def test_new_tokens_under_lm_evals_other_names():
    """A limit on new tokens counts under each name that lm-eval knows, in its order."""
    assert GenerationSettings.parse("t", {"max_new_tokens": 3, "max_tokens": 5}).tokens == 3
    assert GenerationSettings.parse("t", {"max_completion_tokens": 5}).tokens == 5
    assert GenerationSettings.parse("t", {"max_new_tokens": 3, "max_gen_toks": 9}).tokens == 9
    assert GenerationSettings.parse("t", None).tokens == 256


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("task: 7\n", "a task's name is no text"),
        ("group: mine\ntask: [mine]\n", "the group mine is a member of itself"),
        ("task: mine\ndataset_path: json\nmetadata: [1]\n", "metadata: must be a table"),
    ],
)
def test_task_files_of_another_shape_are_named(yaml, message, tmp_path):
    """A task file whose name, members or metadata are not what they must be is one line with its place."""
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(ConfigError, match=message) as raised:
        Tasks.of(["mine"], str(tmp_path))
    assert str(tmp_path) in str(raised.value)
