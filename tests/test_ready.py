"""Refused before training, not after: what a run needs of files, rows, models and tasks is looked at first."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from evals import ready as tasks
from evals.compare import compare
from evals.harness import evaluate_arm
from evals.scoring import one_row_a_question
from vlopd import cli, ready, stages
from vlopd.checkpoint import RunError, RunFolder, write_jsonl
from vlopd.config import DataError, EvalConfig, ModelConfig, RolloutConfig
from vlopd.masks import save_mask
from vlopd.models.atlas import classify
from vlopd.models.length import context_length
from vlopd.pair import load_pair, without_weights
from vlopd.sources import write
from vlopd.types import Example

TASK = {"llm": "shapes_text", "vlm": "shapes"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "tokens"),
    [
        ("gpt2", {"n_positions": 32}, 32),
        ("gpt2", {"max_position_embeddings": 32}, 32),
        ("qwen2", {"max_position_embeddings": 32}, 32),
        ("qwen2", {"max_position_embeddings": 32, "rope_scaling": YARN}, 128),
        ("llama", {"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 2.0}}, 64),
        ("llama", {"max_position_embeddings": 128, "rope_scaling": LLAMA3}, 128),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 8}, 64),
        ("gemma3_text", {"max_position_embeddings": 64, "sliding_window": 8}, 64),
        ("llava", {"text_config": {"model_type": "llama", "max_position_embeddings": 48}}, 48),
        ("mpt", {"max_seq_len": 32}, None),
        ("mamba", {}, None),
        ("bloom", {}, None),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_the_context_of_a_family(family, settings, tokens):
    """Learned and rotary positions count, scaled ones as they were lengthened; windows, biases and states do not."""
    assert context_length(AutoConfig.for_model(family, **settings)) == tokens


def rows_file(path, kind, questions, **more):
    """A data file of questions, with pictures for a vision-language model; its [data]."""
    Image.new("RGB", (48, 48), "red").save(path.with_name("red.png"))
    rows = [
        {"id": f"row-{i}", "question": q, "answer": "yes", **more} for i, q in enumerate(questions)
    ]
    write_jsonl(path, [{**row, "image": "red.png"} for row in rows] if kind == "vlm" else rows)
    image = {"image": "image"} if kind == "vlm" else {}
    return {"type": "file", "path": str(path), "id": "id", "answer": "answer", **image}


def test_a_row_beyond_the_context(kind, make_config, tmp_path):
    """A long question among short ones is named with its tokens, the new tokens and the context, for both models."""
    questions = ["how many red"] * 5 + ["red " * 300] + ["how many blue"] * 3 + ["blue " * 400]
    data = rows_file(tmp_path / "data.jsonl", kind, questions)
    config = make_config(kind, data=data)
    (line,) = ready.findings(config, ["full"])
    tokens = int(line.split(": ")[1].split()[0])
    assert line.startswith("example 'row-5'") and tokens >= 300
    assert f"up to 6 of completion (rollout.max_new_tokens) are {tokens + 6}" in line
    assert "has 256 positions" in line and "1 more of 10 rows" in line
    data = rows_file(tmp_path / "data.jsonl", kind, questions[:5])
    config = make_config(kind, data=data)
    assert ready.findings(config, ["full"]) == []
    far = config.rollout.model_copy(update={"max_new_tokens": 256})
    (line,) = ready.findings(config.model_copy(update={"rollout": far}), ["full"])
    assert "row-0" in line and "4 more of 5 rows" in line


def test_the_count_of_tokens_is_the_models_own(kind, make_config, tmp_path):
    """A row that just fits passes, and one token more is refused; training agrees."""
    data = rows_file(tmp_path / "data.jsonl", kind, ["how many red " * 20])
    config = make_config(kind, data=data)
    pair = load_pair(config, "cpu")
    example = Example.ask(
        "row-0", "how many red " * 20, (Image.open(tmp_path / "red.png"),) if kind == "vlm" else ()
    )
    lengths = [
        m.render([example]).input_ids.shape[1] for m in (pair.student, pair.teachers[0].loaded)
    ]
    most = 256 - max(lengths)
    for new, fits in ((most, True), (most + 1, False)):
        its = config.model_copy(update={"rollout": RolloutConfig(max_new_tokens=new)})
        assert (ready.findings(its, ["full"]) == []) == fits
        uniforms = torch.rand(1, new, dtype=torch.float64)
        if lengths[0] == max(lengths):
            if fits:
                write(pair, its, [example], ("student",), uniforms)
            else:
                with pytest.raises(DataError, match=r"'row-0': .* positions"):
                    write(pair, its, [example], ("student",), uniforms)


def test_a_teachers_context_counts(kind, make_config, folders, tmp_path):
    """What a teacher is shown beside the question is counted; the same row fits the student alone."""
    data = rows_file(tmp_path / "data.jsonl", kind, ["how many red"])
    context = {"type": "system", "text": "look at all of the red objects " * 40}
    teacher = {"model": str(folders[kind, "teacher"]), "context": context}
    (line,) = ready.findings(make_config(kind, data=data, teacher=teacher), ["full"])
    assert str(folders[kind, "teacher"]) in line and "256 positions" in line
    pair = load_pair(make_config(kind, data=data, teacher=teacher), "cpu")
    example = Example.ask(
        "row-0", "how many red", (Image.open(tmp_path / "red.png"),) if kind == "vlm" else ()
    )
    done = write(
        pair, make_config(kind), [example], ("student",), torch.rand(1, 6, dtype=torch.float64)
    )
    with pytest.raises(DataError, match=r"'row-0': .* positions"):
        pair.grade([example], done.completions)


@pytest.mark.parametrize(
    ("sections", "more", "message"),
    [
        ({"rollout": {"source": "data"}, "loss": {"type": "nll"}}, {"answer": None}, "'row-0' has no answer"),
        ({"rollout": {"source": "data"}, "loss": {"type": "nll"}}, {"answer": " "}, "'row-0' has an empty answer"),
        ({"reward": {"rule": "exact_match"}, "rollout": {"completions_per_prompt": 2}}, {"answer": ""},
         "'row-0' has an empty answer"),
        ({"rollout": {"source": "data"}, "loss": {"type": "nll"}}, {"answer": "<image>"}, "its answer has the token"),
        ({"reward": {"rule": "exact_match"}, "rollout": {"completions_per_prompt": 2}}, {"answer": None},
         "'row-0' has no answer"),
        ({"reward": {"rule": "capital_named"}, "rollout": {"completions_per_prompt": 2}}, {},
         "no field 'capital'"),
        ({"masks": {"m": {"type": "whole", "components": ["elsewhere"]}},
          "arms": {"full": {"type": "distill", "mask": "m"}}}, {}, "masks.m: components: the model has no"),
        ({"masks": {"m": {"type": "whole", "components": ["language"]}},
          "train": {"steps": 1, "prompts_per_step": 2, "freeze": ["language"]},
          "arms": {"full": {"type": "distill", "mask": "m"}}}, {}, "leaves nothing of mask 'm' to train"),
        ({"masks": {"m": {"type": "file", "path": "gone.safetensors"}},
          "arms": {"full": {"type": "distill", "mask": "m"}}}, {}, "no mask gone.safetensors"),
        ({"masks": {"m": {"type": "visible", "of": "runs/gone/arms/full"}},
          "arms": {"full": {"type": "distill", "mask": "m"}}}, {}, "no checkpoint runs/gone/arms/full"),
        ({"arms": {"full": {"type": "distill", "subspace": {"of": "runs/gone/x"}}}}, {}, "no checkpoint runs/gone/x"),
        ({"arms": {"full": {"type": "imported", "results": "gone"}}}, {}, "no results_"),
        ({"arms": {"full": {"type": "checkpoint", "model": "./gone"}}}, {}, "gone"),
        ({"tracking": {"trackers": ["wandb"]}}, {}, "tracking.trackers names 'wandb', which is not installed"),
    ],
)  # fmt: skip
def test_what_would_stop_an_arm_later(kind, sections, more, message, make_config, tmp_path):
    """Answers, rewards, masks, freezing, checkpoints and trackers that cannot be: one line before anything is made."""
    data = rows_file(tmp_path / "data.jsonl", kind, ["how many red"] * 3, **more)
    lines = ready.findings(make_config(kind, data=data, **sections), ["full"])
    assert len(lines) == 1 and "\n" not in lines[0]
    assert message in lines[0], lines


def test_freezing_all_that_a_model_has(kind, make_config):
    """A language model without its language, embedding and head has nothing to train; a vision-language model has."""
    train = {"steps": 1, "prompts_per_step": 2, "freeze": ["language", "embedding", "head"]}
    lines = ready.findings(make_config(kind, train=train), ["full"])
    if kind == "vlm":
        assert lines == []
    else:
        (line,) = lines
        assert "leaves nothing to train: the model has embedding, head, language" in line


def test_rows_that_no_teacher_is_for_and_pictures_that_are_gone(folders, make_config, tmp_path):
    """The last row's field or picture is found, not only the first's."""
    teachers = {"a": str(folders["vlm", "teacher"]), "b": str(folders["vlm", "teacher"])}
    data = rows_file(tmp_path / "data.jsonl", "vlm", ["how many red"] * 30)
    rows = [json.loads(line) | {"who": "a"} for line in (tmp_path / "data.jsonl").open()]
    config = make_config(
        "vlm",
        data=data,
        teacher={"type": "routed", "field": "who", "teachers": teachers},
        train={"steps": 30, "prompts_per_step": 4},
    )
    write_jsonl(tmp_path / "data.jsonl", rows)
    assert ready.findings(config, ["full"]) == []
    write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0] | {"id": "last", "who": "c"}])
    (line,) = ready.findings(config, ["full"])
    assert "'last'" in line and "'c'" in line
    write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0] | {"id": "last", "image": "gone.png"}])
    (line,) = ready.findings(config, ["full"])
    assert "row last" in line and "gone.png" in line


def test_a_mask_file_of_another_model(folders, make_config, tmp_path, monkeypatch):
    """A mask whose tensors are the teacher's is refused with the tensor; prompts must divide among processes."""
    shapes = without_weights(
        ModelConfig(model=str(folders["llm", "teacher"]))
    ).model.named_parameters()
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in shapes}
    save_mask(
        tmp_path / "m.safetensors", mask, {"rule": {"type": "whole"}, "source": "x"}, classify
    )
    masks = {"m": {"type": "file", "path": str(tmp_path / "m.safetensors")}}
    config = make_config("llm", masks=masks, arms={"full": {"type": "distill", "mask": "m"}})
    monkeypatch.setenv("WORLD_SIZE", "3")
    divides, other = ready.findings(config, ["full"])
    assert divides == "train.prompts_per_step = 4 does not divide among 3 processes"
    assert (
        other.startswith("masks.m: ") and "lm_head.weight is (58, 48) there, (58, 32) here" in other
    )


def test_a_teacher_of_another_shape_has_no_geometry(kind, make_config):
    """geometry.arms takes no arm whose tensors are not the student's, and the source has no delta."""
    arms = {"teacher": {"type": "teacher"}}
    config = make_config(kind, arms=arms, geometry={"arms": ["teacher"]})
    (line,) = ready.findings(config, ["teacher"])
    assert "geometry.arms: teacher is of another shape" in line
    with pytest.raises(ValueError, match="base is the source itself"):
        make_config(kind, arms={"base": {"type": "source"}}, geometry={"arms": ["base"]})


# --------------------------------------------------------------------------------------------- tasks

YAML = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path):
    """(rows, lines over the YAML, code of its module) -> the [eval] of a task of the user's."""

    def make(rows, changes=(), code="") -> EvalConfig:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        lines = YAML.format(data=tmp_path / "rows.jsonl").splitlines()
        keys = [change.partition(":")[0] for change in changes]
        lines = [line for line in lines if line.partition(":")[0] not in keys]
        (tmp_path / "mine.yaml").write_text("\n".join([*lines, *changes]))
        (tmp_path / "module.py").write_text(code)
        return EvalConfig(tasks=("mine",), include=str(tmp_path))

    return make


ROWS = [{"question": f"how many {c}", "answer": str(i)} for i, c in enumerate(("red", "blue"))]
CHOICE = ["output_type: multiple_choice", 'doc_to_choice: ["yes", "no"]',
          "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"]  # fmt: skip
SCORED = [
    "process_results: !function module.score",
    "metric_list: [{metric: score, aggregation: mean, higher_is_better: true}]",
]


@pytest.mark.parametrize(
    ("rows", "changes", "code", "message"),
    [
        (ROWS, ["doc_to_text: '{{asked}}'"], "", "'asked'"),
        (ROWS, ["test_split: nope"], "", "task mine"),
        ([*ROWS, {"question": "how many", "answer": None}], ["doc_to_target: answer"], "",
         "question 2 (from 0): its target is None"),
        ([*ROWS, {"question": "how many", "answer": ""}], [], "", "question 2 (from 0): its target is ''"),
        ([{"question": "is it", "answer": i} for i in (1, 2)], [*CHOICE, "doc_to_target: answer"], "",
         "question 1 (from 0): its target is 2, which is none of its 2 choices"),
        ([{"question": "is it", "answer": "perhaps"}], [*CHOICE, "doc_to_target: answer"], "",
         "is 'perhaps', which is none"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': float('nan')}",
         "question 0 (from 0): its score is nan"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': float('inf') if doc['answer'] == '1' else 1.0}",
         "question 1 (from 0): its score is inf"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': 100.0}", "scores that are compared lie in [0, 1]"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': (1, 2)}", "nothing could be compared"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': 1 / 0}", "division by zero"),
        (ROWS, ["generation_kwargs: {until: [], max_gen_toks: 300}"], "",
         "asks for up to 300 new tokens (max_gen_toks)"),
        ([*ROWS, {"question": "red " * 300, "answer": "1"}], [], "", "question 2 (from 0): 3"),
        (ROWS, ["doc_to_image: !function module.image"], "def image(doc):\n    return []", None),
        (ROWS, ["num_fewshot: 1", "fewshot_split: train"], "", "train"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked(kind, rows, changes, code, message, task, folders):
    """Columns, targets, scores, contexts and splits of a user's task: one line with the question, no weights read."""
    student = without_weights(ModelConfig(model=str(folders[kind, "student"])))
    lines = tasks.findings(task(rows, changes, code), {"student": student})
    if message is None:
        assert lines == []
    else:
        assert len(lines) == 1 and message in lines[0] and "\n" not in lines[0], lines


def test_marks_are_as_many_as_pictures(task, folders):
    """A task whose prompt marks another number of pictures than it shows, and a text-only model of pictures."""
    code = "from PIL import Image\ndef image(doc):\n    return [Image.new('RGB', (48, 48))]"
    picture = "doc_to_image: !function module.image"
    loaded = {
        kind: without_weights(ModelConfig(model=str(folders[kind, "student"])))
        for kind in ("llm", "vlm")
    }
    (line,) = tasks.findings(task(ROWS, [picture], code), {"student": loaded["vlm"]})
    assert (
        "question 0 (from 0): doc_to_text marks 0 pictures with <image> and doc_to_image gives 1"
        in line
    )
    marked = [picture, "doc_to_text: '<image>{{question}}'"]
    assert tasks.findings(task(ROWS, marked, code), {"student": loaded["vlm"]}) == []
    (line,) = tasks.findings(task(ROWS, marked, code), {"student": loaded["llm"]})
    assert "task mine shows pictures, and student" in line and "is text-only" in line


def test_our_tasks_are_ready(folders):
    """Every question of the built-in worlds has a target that its own rule reads."""
    for kind, names in (
        ("llm", ("shapes_text", "shapes_choice_text")),
        ("vlm", ("shapes", "shapes_colour")),
    ):
        student = without_weights(ModelConfig(model=str(folders[kind, "student"])))
        assert tasks.findings(EvalConfig(tasks=names, limit=50), {"student": student}) == []


def test_a_target_that_our_rule_cannot_read(monkeypatch, tmp_path, folders):
    """A benchmark's row whose answer is no number would be wrong for everybody: its question is named."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": "how many", "answer": f"so #### {x}"} for x in ("4", "some")]
    write_jsonl(folder / "test.jsonl", rows)
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    (line,) = tasks.findings(EvalConfig(tasks=("vlopd_gsm8k",)), {})
    assert "task vlopd_gsm8k, question 1 (from 0): its target 'some' is graded 0" in line


def test_a_score_that_depends_on_the_answer(kind, make_config, task, tmp_path):
    """A NaN that no target shows is found when it comes, with the question, and nothing is compared."""
    code = (
        "def score(doc, r):\n    return {'score': 1.0 if r[0] == doc['answer'] else float('nan')}"
    )
    config = make_config(kind, arms={"base": {"type": "source"}})
    config = config.model_copy(update={"eval": task(ROWS, SCORED, code)})
    run = RunFolder.create(tmp_path / "run", config)
    stages.make_arm(run, config, "base")
    with pytest.raises(
        RunError, match=r"task mine, question 0 \(from 0, 'how many red'\): its score is nan"
    ):
        evaluate_arm(run, config, "base")
    with pytest.raises(RunError, match="no evaluation of base"):
        compare(run, config)


def test_rows_whose_scores_are_not_numbers():
    """Another lm-eval's rows with NaN, infinity or a missing metric are refused by question."""

    def row(doc_id, **scores):
        about = {"doc_id": doc_id, "doc": {}, "filter": "none", "filtered_resps": ["x"]}
        return {**about, "metrics": list(scores), **scores}

    assert [r["numbers"] for r in one_row_a_question("t", [row(0, acc=1.0, f1=(1, 2))])] == [
        {"acc": 1.0}
    ]
    for bad, message in (
        (row(1, acc=float("nan")), "question 1 .from 0.: its acc is nan"),
        (row(1, acc=float("-inf")), "question 1 .from 0.: its acc is -inf"),
        (row(1, f1=(1, 2)), "question 1 .from 0.: no acc, which other questions have"),
    ):
        with pytest.raises(RunError, match=message):
            one_row_a_question("t", [row(0, acc=1.0), bad])


def test_a_comparison_of_nothing_is_refused(make_config, task, tmp_path):
    """Where no metric is a number a question there is no empty comparison, but one line."""
    config = make_config("llm", arms={"base": {"type": "source"}})
    eval_config = task(ROWS, SCORED, "def score(doc, r):\n    return {'score': (1, 2)}")
    eval_config = eval_config.model_copy(update={"tasks": ("mine",)})
    config = config.model_copy(update={"eval": eval_config})
    run = RunFolder.create(tmp_path / "run", config)
    stages.make_arm(run, config, "base")
    (tmp_path / "mine.yaml").write_text(
        (tmp_path / "mine.yaml")
        .read_text()
        .replace("aggregation: mean", "aggregation: !function module.total")
    )
    (tmp_path / "module.py").write_text(
        "def score(doc, r):\n    return {'score': (1, 2)}\ndef total(items):\n    return 0.5\n"
    )
    evaluate_arm(run, config, "base")
    with pytest.raises(
        RunError, match=r"nothing can be compared \(mine: its metrics are of all questions"
    ):
        compare(run, config)


# ------------------------------------------------------------------------------------------- the verbs

CONFIG = """
name = "early"
student = "{student}"
teacher = "{teacher}"
[precision]
compute = "fp32"
[data]
modality = "{modality}"
type = "shapes"
[rollout]
max_new_tokens = 6
[train]
steps = 1
prompts_per_step = 2
[arms]
base = {{type = "source"}}
full = {{type = "distill"}}
[eval]
tasks = ["{task}"]
include = "gone"
limit = 3
"""


def called(monkeypatch, capsys, *words) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["vlopd", *map(str, words)])
    monkeypatch.setattr(cli.console, "_width", 220)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return stop.value.code or 0, said.out + said.err


def test_a_run_is_refused_before_anything_is_made(kind, folders, monkeypatch, capsys, tmp_path):
    """Tasks of a folder that is not there, one for pictures under a text-only student and a long completion
    stop `run`, with no arm made;
    `check` says the same, and `distill`, which asks no task, says what concerns it."""
    path, out = tmp_path / "early.toml", tmp_path / "run"
    modality = "image" if kind == "vlm" else "text"
    student, teacher = folders[kind, "student"], folders[kind, "teacher"]
    path.write_text(CONFIG.format(student=student, teacher=teacher, modality=modality, task="mine"))
    code, said = called(
        monkeypatch, capsys, "run", path, "rollout.max_new_tokens=256", "--out", out
    )
    assert code == 2 and "no folder 'gone'" in said and "256 of completion" in said
    assert len(said.strip().splitlines()) == 1 and not (out / "arms").exists()
    code, said = called(monkeypatch, capsys, "check", path, "rollout.max_new_tokens=256")
    lines = [line for line in said.splitlines() if line.startswith("not ready: ")]
    assert code == 1 and "256 of completion" in lines[0] and "no folder 'gone'" in lines[1]
    code, said = called(
        monkeypatch, capsys, "distill", path, "rollout.max_new_tokens=256", "--out", tmp_path / "d"
    )
    assert code == 2 and "256 of completion" in said and "gone" not in said
    if kind == "llm":
        code, said = called(
            monkeypatch,
            capsys,
            "run",
            path,
            "eval.tasks=['shapes']",
            f"eval.include='{tmp_path}'",
            "--out",
            tmp_path / "e",
        )
        assert code == 2 and "task shapes shows pictures, and student" in said


def test_a_comparison_of_models_is_refused_before_they_are_loaded(
    folders, monkeypatch, capsys, tmp_path
):
    """Tasks of a folder that is not there, settings that make no sense and a folder that is none: one line,
    nothing written."""
    model, out = folders["llm", "student"], tmp_path / "out"
    for words, message in (
        ((model, model, "--tasks", "shapes_text"), "is named twice"),
        (
            (model, folders["llm", "teacher"], "--tasks", "mine", "--set", "include=gone"),
            "no folder 'gone'",
        ),
        ((model, folders["llm", "teacher"], "--tasks", "shapes"), "is text-only"),
        ((model, folders["llm", "teacher"], "--tasks", "shapes_text,"), "eval.tasks.1|tasks.1"),
        ((model, folders["llm", "teacher"], "--tasks", "shapes_text", "--set", "limit=0"), "limit"),
        ((model, tmp_path / "gone", "--tasks", "shapes_text"), "gone"),
    ):
        code, said = called(monkeypatch, capsys, "compare", *words, "--out", out)
        assert code == 2 and any(m in said for m in message.split("|")), said
        assert len(said.strip().splitlines()) == 1 and not (out / "evals").exists(), said
