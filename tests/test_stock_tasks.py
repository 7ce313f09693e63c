"""lm-eval's kinds of tasks, metrics and groups: evaluated, imported and compared, each on its own scale."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from lm_eval.tasks._index import TaskIndex
from PIL import Image
from sklearn.metrics import f1_score, matthews_corrcoef

from evals import harness
from evals.corpus_metrics import CorpusMetric, CorpusStatistics
from evals.harness import cut_answers, evaluate_arm, import_scores
from evals.lm import within_pixels
from evals.paired_scores import outcome_of, read_results, read_tasks
from evals.report.verdict import verdict
from evals.task_index import index_of
from tests.command import call
from tests.test_harness import base_run, with_eval
from vlopd.api.compare import compare as compare_models
from vlopd.config.analysis import EvalConfig
from vlopd.errors import ConfigError, RunError
from vlopd.files import read_json, read_jsonl, write_json, write_jsonl
from vlopd.run.folder import RunFolder

WORDS = ("red circle", "blue square", "green triangle", "red square", "blue circle", "green circle")
ROWS = [
    {"question": f"how many {word}", "answer": str(i % 3), "gold": i % 2, "text": f"{word} top-left ; {word}"}
    for i, word in enumerate(WORDS * 2)
]  # fmt: skip
SHARED = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
CHOICE = "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: gold\n"
TEXT = (
    "output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    "generation_kwargs: {until: [';'], do_sample: false, max_gen_toks: 6}\n"
)
TASKS = {
    # the metrics and the aggregations of wikitext, lambada, hellaswag, cola, gsm8k, wmt16 and mmlu
    "pages": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\nmetric_list: "
             "[{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    "last_word": "output_type: loglikelihood\ndoc_to_text: question\ndoc_to_target: ' {{answer}}'\n"
                 "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "endings": CHOICE + "doc_to_choice: ['red', 'blue square and red']\n"
                        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "grammar": CHOICE + "doc_to_choice: ['no', 'yes']\nmetric_list: [{metric: mcc}, {metric: acc}]\n",
    "words": TEXT + "metric_list: [{metric: exact_match}]\nfilter_list:\n"
             "- {name: strict, filter: [{function: take_first}]}\n"
             "- {name: flexible, filter: [{function: regex, regex_pattern: '(.*)'}, {function: take_first}]}\n",
    "translation": TEXT + "metric_list: [{metric: bleu}, {metric: chrf}, {metric: ter}]\n",
    "subject_a": CHOICE + "doc_to_choice: ['2', '3']\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "subject_b": CHOICE + "doc_to_choice: ['yes', 'no way']\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
                          "process_docs: !function few.few\n",
}  # fmt: skip
GROUP = "group: subjects\ntask: [subject_a, subject_b]\naggregate_metric_list: [{metric: acc, weight_by_size: BY_SIZE}]"
ASKED = ["pages", "last_word", "endings", "grammar", "words", "translation", "subjects"]


def write_tasks(folder: Path, by_size: bool = True) -> Path:
    """The task files of TASKS over ROWS; one member of the group has a third of the questions."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "rows.jsonl", ROWS)
    shared = SHARED.format(data=folder / "rows.jsonl")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{shared}{text}")
    (folder / "few.py").write_text("def few(docs):\n    return docs.select(range(4))\n")
    (folder / "group.yaml").write_text(GROUP.replace("BY_SIZE", str(by_size).lower()))
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory, folders) -> tuple[RunFolder, object]:
    """Student and teacher evaluated on TASKS."""
    root = tmp_path_factory.mktemp("stock")
    out = root / "out"
    compared = compare_models(
        {"base": folders["llm", "student"], "other": folders["llm", "teacher"]},
        ASKED,
        out=out,
        compute="fp32",
        include=str(write_tasks(root / "tasks")),
        bootstrap_draws=500,
    )
    return RunFolder(out), compared


def test_stock_tasks_are_compared_on_their_own_scale(stock):
    """A group, perplexities, correlations, BLEU and plain accuracy: the compared values are lm-eval's own results,
    nothing is left out, and a group's total stands before its tasks and for them."""
    run, compared = stock
    record = compared.record
    assert record["not_compared"] == {}
    assert list(record["tasks"]) == [*ASKED, "subject_a", "subject_b"]
    for arm in ("base", "other"):
        results = read_json(run.eval(arm) / "results.json")["results"]
        for task, entry in record["tasks"].items():
            name = {"words": "strict"}.get(task, "none")
            expected = results[task][f"{entry['metric']},{name}"]
            assert entry["arms"][arm]["mean"] == pytest.approx(expected, rel=1e-9), (task, arm)
    about = {
        task: (its["metric"], its["scale"], its["higher_is_better"], its["in_family"])
        for task, its in record["tasks"].items()
    }
    assert about["pages"] == ("word_perplexity", "own", False, True)
    assert about["last_word"] == ("perplexity", "own", False, True)
    assert about["translation"] == ("bleu", "own", True, True)
    assert about["endings"] == ("acc", "fraction", True, True)
    assert about["subject_a"] == ("acc", "fraction", True, False)
    total = record["tasks"]["subjects"]
    assert total["members"] == ["subject_a", "subject_b"] and total["n"] == 16
    assert record["tasks"]["subject_b"]["group"] == "subjects" and total["group"] is None
    (contrast,) = record["tasks"]["pages"]["contrasts"]
    assert contrast["test"] == "paired_bootstrap" and contrast["draws"] == 500
    low, high = contrast["interval"]
    assert low < contrast["mean"] < high and 0 < contrast["p"] <= 1
    assert any("to detect a difference of" in line and "pages:" in line for line in verdict(record))
    assert compared.page.exists()


def test_a_chosen_metric_needs_no_new_evaluation(stock):
    """eval.metric takes any metric or filter that the rows hold, for one task or the members of a group; another is
    refused with those that there are."""
    run, _ = stock
    results = read_results(run.root / "evals", ["base", "other"])

    def read(**metric):
        config = EvalConfig(tasks=tuple(ASKED), metric=metric)
        return {
            its.task: its
            for its in read_tasks(run.root / "evals", results, ["base", "other"], config)[0]
        }

    found = read(endings="acc_norm", words="exact_match,flexible", last_word="acc")
    assert found["endings"].metric == "acc_norm" and found["last_word"].corpus is None
    assert found["words"].metric == "exact_match,flexible"
    assert read(words="exact_match,strict")["words"].metric == "exact_match"
    assert set(found["endings"].further) == {"acc"}
    chosen = read(subjects="acc_norm")
    assert {chosen[name].metric for name in ("subjects", "subject_a", "subject_b")} == {"acc_norm"}
    assert chosen["subjects"].weights is None
    assert read()["grammar"].metric == "mcc"  # the task's order, not that of lm-eval's rows
    # groups and tags without a total choose for their tasks; a task of two groups is in the first
    about = results["base"]
    made = {**about["leaves"], "few": ["grammar", "endings"]}
    within = {**about["group_subtasks"], "inner": ["subject_a"], "subjects": ["inner", "subject_b"]}
    totals = {**about["totals"], "inner": {**about["totals"]["subjects"], "members": ["subject_a"]}}
    results["base"] = {**about, "leaves": made, "group_subtasks": within, "totals": totals}
    chosen = read(few="acc", inner="acc_norm")
    assert {name: its.metric for name, its in chosen.items() if its.metric != "acc"} == {
        "pages": "word_perplexity", "last_word": "perplexity", "words": "exact_match",
        "translation": "bleu", "subject_a": "acc_norm", "inner": "acc_norm",
    }  # fmt: skip
    assert chosen["subject_a"].group == "subjects" and chosen["inner"].group is None
    assert list(read()) == [*ASKED, "subject_a", "subject_b", "inner"]
    results["base"] = about
    for metric, message in (
        ({"endings": "f1"}, "endings has no metric 'f1'; it has acc; acc_norm"),
        ({"subjects": "f1"}, "subject_a has no metric 'f1'"),
        ({"ending": "acc"}, "'ending' is no task"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(**metric)


def test_totals_that_are_not_by_size(tmp_path, folders):
    """With weight_by_size false every task counts the same, as in lm-eval's total."""
    tasks = write_tasks(tmp_path / "tasks", by_size=False)
    run = RunFolder(tmp_path / "out")
    config = {"include": str(tasks), "bootstrap_draws": 100, "compute": "fp32", "out": run.root}
    models = {name: folders["llm", name] for name in ("student", "teacher")}
    compare_models(models, ["subjects"], **config)
    results = read_results(run.root / "evals", list(models))
    (total, *_), _ = read_tasks(
        run.root / "evals", results, list(models), EvalConfig(tasks=("subjects",))
    )
    assert total.weights is not None and total.weights.mean() == pytest.approx(1)
    for arm, its in results.items():
        mean = float((total.weights * total.scores[arm]).mean())
        assert mean == pytest.approx(its["results"]["subjects"]["acc,none"])


def as_lm_eval(run: RunFolder, arm: str, out: Path) -> Path:
    """The files that lm-eval's command line would have written of an arm's evaluation of `pages` and the group."""
    out.mkdir()
    results = read_json(run.eval(arm) / "results.json")
    kept = ("pages", "subject_a", "subject_b")
    for task in kept:
        rows = read_jsonl(run.eval(arm) / f"samples_{task}.jsonl")
        metrics = list(results["metrics"][task])
        listed = [
            {
                **{key: row[key] for key in ("doc_id", "doc_hash", "prompt_hash", "target", *metrics)},
                "doc": {"question": row["question"]},
                "arguments": {"gen_args_0": {"arg_0": row["prompt"], "arg_1": " x"}},
                "filtered_resps": [row["completion"]],
                "filter": "none",
                "metrics": metrics,
            }
            for row in rows
        ]  # fmt: skip
        write_jsonl(out / f"samples_{task}_2026-01-01T00-00-00.0.jsonl", listed)
    entries = ("results", "groups", "group_subtasks", "configs", "higher_is_better")
    written = out / "results_2026-01-01T00-00-00.0.json"
    write_json(written, {key: results[key] for key in entries})
    return written


def test_lm_evals_files_give_the_same_comparison(stock, tmp_path, monkeypatch, capsys):
    """Results files and samples files of lm-eval, with a group and a perplexity, give the numbers of the models; a
    broken file is one line."""
    run, compared = stock
    files = {arm: as_lm_eval(run, arm, tmp_path / arm) for arm in ("base", "other")}
    theirs = compare_models(files, out=tmp_path / "theirs", bootstrap_draws=500).record["tasks"]
    assert list(theirs) == ["pages", "subjects", "subject_a", "subject_b"]
    corrected = {"p_holm", "direction", "exploratory"}  # over the tasks that are compared

    def numbers(entry):
        return [
            {key: value for key, value in its.items() if key not in corrected}
            for its in entry["contrasts"]
        ]

    for task, entry in theirs.items():
        own = compared.record["tasks"][task]
        for key in ("metric", "n", "scale", "higher_is_better", "members", "group"):
            assert entry[key] == own[key], (task, key)
        assert numbers(entry) == numbers(own)
        assert all(its["outcomes"] is None for its in entry["arms"].values())
    # an aggregation that is not known here is named on the screen
    rows = read_jsonl(next(files["base"].parent.glob("samples_pages*")))
    for path in files.values():
        results = read_json(path)
        results["configs"]["odd"] = {
            "metric_list": [{"metric": "m", "aggregation": "def f(items): ..."}]
        }
        write_json(path, results)
        odd = [{**row, "metrics": ["m"], "m": [1, 2]} for row in rows]
        write_jsonl(path.parent / "samples_odd_2026-01-01T00-00-00.0.jsonl", odd)
    monkeypatch.chdir(tmp_path)
    code, said = call(
        monkeypatch,
        capsys,
        "compare",
        *files.values(),
        "--out",
        "screen",
        "--set",
        "bootstrap_draws=50",
    )
    assert code == 0 and "word_perplexity (lower is better)" in said
    assert (
        "not shown: the 2 tasks of subjects" in said
        and "not compared: odd: m has no number per question" in said
    )
    record = read_json(tmp_path / "screen" / "compare.json")
    assert list(record["not_compared"]) == ["odd"] and len(record["tasks"]) == 4
    for path in files.values():  # a later metric is compared, and the first one named
        own = path.parent / "samples_odd_2026-01-01T00-00-00.0.jsonl"
        both = [{**row, "metrics": ["m", "n"], "m": [1, 2], "n": 0.5} for row in read_jsonl(own)]
        write_jsonl(own, both)
    odd = compare_models(files, ["odd"], out=tmp_path / "odd").record
    assert odd["tasks"]["odd"]["metric"] == "n" and list(odd["not_compared"]) == ["odd (m)"]
    samples = {arm: next(path.parent.glob("samples_pages*")) for arm, path in files.items()}
    alone = compare_models(samples, out=tmp_path / "alone", bootstrap_draws=500)
    assert numbers(alone.record["tasks"]["pages"]) == numbers(theirs["pages"])
    config = EvalConfig(tasks=("subjects",), metric={"subjects": "acc_norm"})
    import_scores(RunFolder(tmp_path / "run"), files["base"], "x", config)
    names = {path.name for path in (tmp_path / "run" / "evals" / "x").glob("samples_*")}
    assert names == {"samples_subject_a.jsonl", "samples_subject_b.jsonl"}
    files["base"].write_text("[1]")
    with pytest.raises((RunError, ConfigError), match="is not lm-eval's results") as error:
        compare_models(files, out=tmp_path / "again")
    assert "\n" not in str(error.value)


def test_rows_have_lengths_and_outcomes(stock):
    """Rows hold the prompt, the number of tokens and what ended an answer; with them results tell what was cut."""
    run, compared = stock
    rows = read_jsonl(run.eval("base") / "samples_words.jsonl")
    results = read_json(run.eval("base") / "results.json")
    for row in rows:
        assert row["question"] in row["prompt"] and row["images"] == []
        assert 0 < row["tokens"] <= 8 and row["stop"] in ("end", "stop_string", "length")
        assert row["truncated"] == (row["stop"] == "length") and row["thought_tokens"] == 0
        assert row["outcome"] == outcome_of(row["exact_match"], row["truncated"] == 1, False)
    assert results["mean_tokens"]["words"] == np.mean([row["tokens"] for row in rows])
    entry = compared.record["tasks"]["words"]["arms"]["base"]
    assert entry["mean_tokens"] == results["mean_tokens"]["words"]
    assert sum(entry["outcomes"].values()) == pytest.approx(1)
    assert entry["outcomes"]["cut"] == np.mean([row["outcome"] == "cut" for row in rows])
    choice = read_jsonl(run.eval("base") / "samples_endings.jsonl")[0]
    assert choice["tokens"] is choice["outcome"] is choice["stop"] is None and choice["prompt"]
    assert [outcome_of(x, cut, bad) for x, cut, bad in (
        (1, True, True), (0, True, True), (0, False, True), (0, False, False), (0.5, False, False))
    ] == ["right", "cut", "unreadable", "wrong", None]  # fmt: skip
    thinking = {
        "arm": "full",
        "thinking": {"words": {}},
        "thought_truncated_fraction": {"words": 0.5},
    }
    assert cut_answers(thinking | {"truncated_fraction": {"words": 0.1}}) == []
    (line,) = cut_answers(thinking | {"truncated_fraction": {"words": 0.6}})
    assert "60 % of full's answers" in line and "eval.generation.words.max_tokens" in line


def test_generation_settings_are_overridden_by_task(make_config, tmp_path, monkeypatch):
    """Largest length and stop strings of a task, its group or all; only the tasks that they reach are made again. Names
    of no task are refused."""
    tasks = write_tasks(tmp_path / "tasks")
    names = ["words", "endings", "translation"]
    run, config = base_run(
        make_config, "llm", tmp_path, eval={"tasks": names, "include": str(tasks)}
    )
    made: list[str] = []
    original = harness.score_task
    monkeypatch.setattr(
        harness,
        "score_task",
        lambda lm, task, *rest: (made.append(task), original(lm, task, *rest))[1],
    )

    def rows(task, **generation):
        its = EvalConfig.model_validate({**config.eval.model_dump(), "generation": generation})
        evaluate_arm(run, config.model_copy(update={"eval": its}), "base")
        return read_jsonl(run.eval("base") / f"samples_{task}.jsonl")

    plain = rows("words")
    assert made == ["words", "endings", "translation"]
    short = rows("words", words={"max_tokens": 2, "stops": ()})
    assert made[3:] == ["words"] and {row["tokens"] for row in short} <= {1, 2}
    assert any(row["truncated"] for row in short) and [r["prompt"] for r in short] == [
        r["prompt"] for r in plain
    ]
    # another setting for all reaches what is generated or not, and a task's own counts more
    longer = rows("translation", **{"*": {"max_tokens": 1}, "translation": {"max_tokens": 3}})
    assert max(row["tokens"] for row in longer) in (2, 3)
    sampled = {"n": 2, "temperature": 2.0}
    changes = {"generation": {"words": {"temperature": 0}}, "sampled": sampled}
    its = EvalConfig.model_validate({**config.eval.model_dump(), **changes})
    evaluate_arm(run, config.model_copy(update={"eval": its}), "base")
    table = {task: read_jsonl(run.eval("base") / f"samples_{task}.jsonl") for task in its.tasks}
    # greedy by its own setting and choices by likelihood are answered once, others twice
    assert [row["completion"] for row in table["words"]] == [row["completion"] for row in plain]
    assert len(json.loads(table["translation"][0]["completion"])) == 2
    assert not table["endings"][0]["completion"].startswith("[")
    with pytest.raises(
        ConfigError, match=r"eval.generation: 'word' is no task .* did you mean 'words'"
    ):
        rows("words", word={"max_tokens": 2})


def test_pictures_have_a_pixel_budget(make_config, tmp_path):
    """Larger pictures are downscaled in their shape, smaller ones are not touched; results say what was shown."""
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 300, (50, 2)).tolist():
        image = within_pixels(Image.new("RGB", (width, height)), 1000)
        assert math.prod(image.size) <= 1000
        if width * height <= 1000:
            assert image.size == (width, height)
        elif min(image.size) > 8:
            assert image.size[0] / image.size[1] == pytest.approx(width / height, rel=0.15)
    run, config = base_run(
        make_config, "vlm", tmp_path, eval={"tasks": ["shapes"], "limit": 2, "keep_images": 1}
    )
    evaluate_arm(run, config, "base")
    whole = read_json(run.eval("base") / "results.json")["picture_size"]["shapes"]
    assert whole["max_pixels"] is None
    evaluate_arm(run, with_eval(config, max_pixels=300), "base")
    small = read_json(run.eval("base") / "results.json")["picture_size"]["shapes"]
    assert small["max_pixels"] == 300 and 250 < math.prod(small["largest"]) <= 300
    first, second = read_jsonl(run.eval("base") / "samples_shapes.jsonl")
    (saved,) = first["images"]
    with Image.open(run.root / saved) as image:
        assert list(image.size) == small["largest"]
    assert second["images"] == []


def test_a_model_without_a_chat_template_is_given_one(folders, tmp_path):
    """A template reaches the models that have none, or the one that it names; a wrong name is refused."""
    models = {"a": folders["llm", "student"], "b": folders["llm", "teacher"]}
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}ask {{ m['content'] }} tell {% endfor %}")
    settings = {"tasks": ["capitals"], "limit": 2, "compute": "fp32", "bootstrap_draws": 10}
    out = tmp_path / "out"
    compare_models(models, template={"b": template}, out=out, **settings)
    prompts = [
        read_jsonl(out / "evals" / name / "samples_capitals.jsonl")[0]["prompt"] for name in "ab"
    ]
    assert prompts[1].startswith("ask ") and prompts[1].endswith(" tell ")
    assert not prompts[0].startswith("ask ")
    with pytest.raises(ConfigError, match="no model 'c'; there are a, b"):
        compare_models(models, template={"c": template}, **settings)
    with pytest.raises(ConfigError, match="a, b has one of its own"):
        compare_models(models, template=template, **settings)


# -------------------------------------------------------------------------------------- corpus metrics


def statistics(metric: str, *items, clusters=None, draws=2000, better=True) -> CorpusStatistics:
    arms = dict(zip("abc", items, strict=False))
    config = EvalConfig(bootstrap_draws=draws)
    return CorpusStatistics(CorpusMetric(metric, arms), clusters, config, better)


def test_corpus_metrics_are_those_of_their_libraries():
    """Values are scikit-learn's, sacrebleu's and lm-eval's formulas; so are those of a resample."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 2, (60, 2)).tolist()
    classes = rng.integers(0, 4, (60, 2)).tolist()
    words = [
        "a red circle is here",
        "two blue squares are there",
        "no green thing at all",
        "one big red square",
    ]
    texts = [(words[i], words[j] + " now") for i, j in rng.integers(0, 4, (30, 2))]
    said, gold = [text for _, text in texts], [[ref for ref, _ in texts]]
    loglikelihoods = np.stack([-rng.random(40) * 50, rng.integers(5, 30, 40)], 1).tolist()
    ratio = -sum(x for x, _ in loglikelihoods) / sum(n for _, n in loglikelihoods)
    expected = {
        "f1": (pairs, f1_score(*zip(*pairs, strict=True))),
        "matthews_corrcoef": (classes, matthews_corrcoef(*zip(*classes, strict=True))),
        "bleu": (texts, sacrebleu.corpus_bleu(said, gold).score),
        "chrf": (texts, sacrebleu.corpus_chrf(said, gold).score),
        "ter": (texts, sacrebleu.corpus_ter(said, gold).score),
        "weighted_perplexity": (loglikelihoods, math.exp(ratio)),
        "bits_per_byte": (loglikelihoods, ratio / math.log(2)),
        "perplexity": ([-1.0, -2.0], math.exp(1.5)),
        "median": ([3.0, 1.0, 2.0, 9.0], 3.0),
    }
    for name, (items, value) in expected.items():
        found = CorpusMetric(name, {"a": items}).values(None, 3)["a"]
        assert found[0] == pytest.approx(value, rel=1e-9), name
    # a resample of two clusters is one of them twice, or both
    clusters = ["x"] * 20 + ["y"] * 40
    parts = {
        round(f1_score(*zip(*part, strict=True)), 9) for part in (pairs[:20], pairs[20:], pairs)
    }
    drawn = CorpusMetric("f1", {"a": pairs}).values(clusters, 50)["a"]
    assert {round(x, 9) for x in drawn.tolist()} == parts


def test_a_tasks_own_aggregation_is_called_on_every_resample():
    """A function of a task's file, of which there are fewer resamples; one that fails is one line."""
    name = "evals/tasks/benchmarks/vision.py:f1"
    parts = np.random.default_rng(1).integers(-1, 2, 80).astype(float)
    tested = statistics(name, parts.tolist(), (-np.abs(parts)).tolist(), draws=5000)
    found = tested.values["a"]
    agreed, disagreed = (parts == 1).sum(), (parts == 0).sum()
    assert found[0] == pytest.approx(2 * agreed / (2 * agreed + disagreed))
    assert len(found) == 1001 and found[1:].std() > 0.01
    assert tested.is_fraction
    with pytest.raises(RunError, match="cannot be loaded"):
        statistics("evals/tasks/nowhere.py:f1", [1.0, 2.0]).values  # noqa: B018


def test_differences_of_perplexity_are_paired():
    """Documents that are hard for both do not widen the interval; equal arms have p = 1; the interval agrees with the
    delta method; where lower is better a recovery is still of the gain."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 200)
    hard = -lengths * rng.normal(3, 0.5, 200)
    easier = hard + lengths * rng.normal(0.3, 0.05, 200)
    half = (hard + easier) / 2
    items = [np.stack([x, lengths], 1).tolist() for x in (hard, easier, half)]
    tested = statistics("weighted_perplexity", *items, better=False)
    gap = tested.difference("b", "a")
    assert tested.difference("a", "a")["p"] == 1 and gap["p"] < 0.01 and gap["mean"] < 0
    assert gap["standard_error"] < tested.estimate("a")["standard_error"] / 2
    residual = hard - lengths * hard.sum() / lengths.sum()
    delta = tested.values["a"][0] * np.sqrt((residual**2).sum()) / lengths.sum()
    assert tested.estimate("a")["standard_error"] == pytest.approx(delta, rel=0.1)
    recovered = tested.recovery("c", "a", "b")
    assert recovered["status"] == "ok" and 0.4 < recovered["value"] < 0.6
    assert tested.recovery("c", "b", "a")["status"] == "negative"
    assert not tested.non_inferiority("c", "b")["holds"] and not tested.is_fraction
    seeds = tested.over_seeds(("b", "c"), ("a",))  # half the gap between two seeds of b
    assert (seeds.seeds_a, seeds.seeds_b) == (2, 1) and seeds.sd_a == pytest.approx(
        abs(tested.values["b"][0] - tested.values["c"][0]) / 2**0.5
    )
    assert seeds.high - seeds.low > 4 * gap["standard_error"]


def test_few_differing_documents_are_no_evidence_by_the_bootstrap():
    """Equal answers have no interval and are not non-inferior; of three differing documents p is not below the
    smallest of their signs; many equal ones are said to be too few."""
    said = np.arange(40) % 2
    mended = said.copy()
    mended[[1, 3, 5]] = 0
    gold = np.where(np.isin(np.arange(40), (1, 3, 5)), 0, said)
    tested = statistics("f1", *(np.stack([gold, x], 1).tolist() for x in (said, mended, said)))
    same = tested.contrast("a", "c")
    assert same["p"] == 1 and np.isnan(same["interval"]).all()
    assert np.isnan(same["minimum_detectable_effect"])
    refused = tested.non_inferiority("a", "c")
    assert not refused["holds"] and refused["why"] == "0 differing documents of the 10 needed"
    assert tested.differing("a", "b") == 3 and tested.difference("b", "a")["p"] >= 0.25


def test_the_index_of_tasks_follows_its_files(tmp_path, monkeypatch):
    """The kept index is lm-eval's own; a changed file, or what is no index, has it read again."""
    monkeypatch.setenv("VLOPD_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "tasks").mkdir()
    (folder / "base").write_text("output_type: generate_until\ntag: all\n")
    (folder / "a.yaml").write_text("include: base\ntask: a\ndoc_to_text: !function f.text\n")
    whole = TaskIndex.build([folder])
    assert whole.keys() == {"a", "all"}
    assert index_of(folder) == whole
    with monkeypatch.context() as patch:
        patch.setattr(TaskIndex, "build", None)
        assert index_of(folder) == whole
    (folder / "base").write_text("output_type: multiple_choice\ntag: all\n")
    assert index_of(folder)["a"].cfg["output_type"] == "multiple_choice"
    (tmp_path / "cache" / "tasks.json").write_bytes(b"no index")
    assert index_of(folder)["a"].cfg["output_type"] == "multiple_choice"
