"""Refused before training, not after: what a run needs of files, rows, models and tasks is looked at first."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from evals import preflight as tasks
from evals.compare import compare
from evals.harness import evaluate_arm
from evals.scoring import one_row_a_question
from tests.command import call
from tests.conftest import pair_of, recipe_of
from vlopd import pipeline
from vlopd.config.analysis import EvalConfig
from vlopd.config.models import ModelConfig
from vlopd.config.objective import RolloutConfig
from vlopd.errors import ConfigError, DataError, RunError
from vlopd.files import write_jsonl
from vlopd.loop import distill
from vlopd.masks.files import save_mask
from vlopd.models.context_length import context_length
from vlopd.models.load import load
from vlopd.models.parameter_names import classify
from vlopd.preflight import inputs
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm
from vlopd.train.pair import without_weights
from vlopd.train.rollouts import write
from vlopd.types import Example
from vlopd.weights.delta import match_report

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
    (line,) = inputs.find_problems(config, ["full"])
    tokens = int(line.split(": ")[1].split()[0])
    assert line.startswith("example 'row-5'") and tokens >= 300
    assert f"up to 6 of completion (rollout.max_new_tokens) are {tokens + 6}" in line
    assert "has 256 positions" in line and "1 more of 10 rows" in line
    data = rows_file(tmp_path / "data.jsonl", kind, questions[:5])
    config = make_config(kind, data=data)
    assert inputs.find_problems(config, ["full"]) == []
    far = config.rollout.model_copy(update={"max_new_tokens": 256})
    (line,) = inputs.find_problems(config.model_copy(update={"rollout": far}), ["full"])
    assert "row-0" in line and "4 more of 5 rows" in line


def test_the_count_of_tokens_is_the_models_own(kind, make_config, tmp_path):
    """A row that just fits passes, and one token more is refused; training agrees."""
    data = rows_file(tmp_path / "data.jsonl", kind, ["how many red " * 20])
    config = make_config(kind, data=data)
    pair = pair_of(config)
    example = Example.ask(
        "row-0", "how many red " * 20, (Image.open(tmp_path / "red.png"),) if kind == "vlm" else ()
    )
    lengths = [
        m.render([example]).input_ids.shape[1] for m in (pair.student, pair.teachers[0].loaded)
    ]
    most = 256 - max(lengths)
    for new, fits in ((most, True), (most + 1, False)):
        its = config.model_copy(update={"rollout": RolloutConfig(max_new_tokens=new)})
        assert (inputs.find_problems(its, ["full"]) == []) == fits
        uniforms = torch.rand(1, new, dtype=torch.float64)
        if lengths[0] == max(lengths):
            if fits:
                write(pair, its.rollout, pair.render([example]), ("student",), uniforms)
            else:
                with pytest.raises(DataError, match=r"'row-0': .* positions"):
                    write(pair, its.rollout, pair.render([example]), ("student",), uniforms)


def test_a_teachers_context_counts(kind, make_config, folders, tmp_path):
    """What a teacher is shown beside the question is counted; the same row fits the student alone."""
    data = rows_file(tmp_path / "data.jsonl", kind, ["how many red"])
    context = {"type": "system", "text": "look at all of the red objects " * 40}
    teacher = {"model": str(folders[kind, "teacher"]), "context": context}
    (line,) = inputs.find_problems(make_config(kind, data=data, teacher=teacher), ["full"])
    assert str(folders[kind, "teacher"]) in line and "256 positions" in line
    pair = pair_of(make_config(kind, data=data, teacher=teacher))
    example = Example.ask(
        "row-0", "how many red", (Image.open(tmp_path / "red.png"),) if kind == "vlm" else ()
    )
    done = write(
        pair,
        make_config(kind).rollout,
        pair.render([example]),
        ("student",),
        torch.rand(1, 6, dtype=torch.float64),
    )
    with pytest.raises(DataError, match=r"'row-0': .* positions"):
        pair.teacher_forward([example], done)


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
    lines = inputs.find_problems(make_config(kind, data=data, **sections), ["full"])
    assert len(lines) == 1 and "\n" not in lines[0]
    assert message in lines[0], lines


def test_freezing_all_that_a_model_has(kind, make_config):
    """A language model without its language, embedding and head has nothing to train; a vision-language model has."""
    train = {"steps": 1, "prompts_per_step": 2, "freeze": ["language", "embedding", "head"]}
    lines = inputs.find_problems(make_config(kind, train=train), ["full"])
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
    assert inputs.find_problems(config, ["full"]) == []
    write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0] | {"id": "last", "who": "c"}])
    (line,) = inputs.find_problems(config, ["full"])
    assert "'last'" in line and "'c'" in line
    write_jsonl(tmp_path / "data.jsonl", [*rows, rows[0] | {"id": "last", "image": "gone.png"}])
    (line,) = inputs.find_problems(config, ["full"])
    assert "row last" in line and "gone.png" in line


def test_a_mask_file_of_another_model(folders, make_config, tmp_path, monkeypatch):
    """A mask whose tensors are the teacher's is refused with the tensor; prompts must divide among processes."""
    shapes = without_weights(
        ModelConfig(model=str(folders["llm", "teacher"]))
    ).model.named_parameters()
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in shapes}
    save_mask(tmp_path / "m.safetensors", mask, {"rule": {"type": "whole"}, "base": "x"}, classify)
    masks = {"m": {"type": "file", "path": str(tmp_path / "m.safetensors")}}
    config = make_config("llm", masks=masks, arms={"full": {"type": "distill", "mask": "m"}})
    monkeypatch.setenv("WORLD_SIZE", "3")
    divides, other = inputs.find_problems(config, ["full"])
    assert divides == "train.prompts_per_step = 4 does not divide among 3 processes"
    assert (
        other.startswith("masks.m: ") and "lm_head.weight is (58, 48) there, (58, 32) here" in other
    )


def test_a_teacher_of_another_shape_has_no_geometry(kind, make_config):
    """geometry.arms takes no arm whose tensors are not the student's, and the base has no delta."""
    arms = {"teacher": {"type": "teacher"}}
    config = make_config(kind, arms=arms, geometry={"arms": ["teacher"]})
    (line,) = inputs.find_problems(config, ["teacher"])
    assert "geometry.arms: teacher is of another shape" in line
    # of an arm that is there already, when its geometry is added
    with pytest.raises(ConfigError, match=r"geometry\.arms: teacher is of another shape"):
        pipeline.refuse_unready(config, {"arms/teacher": None, "geometry/teacher": "new"})
    pipeline.refuse_unready(config, {"arms/teacher": None, "geometry/teacher": None})
    with pytest.raises(ValueError, match="base is the base itself"):
        make_config(kind, arms={"base": {"type": "base"}}, geometry={"arms": ["base"]})


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
         "question 2 (from 0): its doc_to_target reads answer, which is empty"),
        ([*ROWS, {"question": "how many", "answer": ""}], [], "", "question 2 (from 0): its target is ''"),
        ([{"question": "is it", "answer": i} for i in (1, 2)], [*CHOICE, "doc_to_target: answer"], "",
         "question 1 (from 0): its target is 2, which is none of its 2 choices"),
        ([{"question": "is it", "answer": "perhaps"}], [*CHOICE, "doc_to_target: answer"], "",
         "is 'perhaps', which is none"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': float('nan')}",
         "question 0 (from 0): its score is nan"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': float('inf') if doc['answer'] == '1' else 1.0}",
         "question 1 (from 0): its score is inf"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': 100.0}", None),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': (1, 2)}", "nothing could be compared"),
        (ROWS, SCORED, "def score(doc, r):\n    return {'score': 1 / 0}", "division by zero"),
        (ROWS, ["generation_kwargs: {until: [], max_gen_toks: 300}"], "",
         "needs up to 300 new tokens (max_gen_toks)"),
        ([*ROWS, {"question": "red " * 300, "answer": "1"}], [], "", "question 2 (from 0): 3"),
        (ROWS, ["doc_to_image: !function module.image"], "def image(doc):\n    return []", None),
        (ROWS, ["num_fewshot: 1", "fewshot_split: train"], "", "train"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked(kind, rows, changes, code, message, task, folders):
    """Columns, targets, scores, contexts and splits of a user's task: one line with the question, no weights read."""
    student = without_weights(ModelConfig(model=str(folders[kind, "student"])))
    lines = tasks.find_problems(task(rows, changes, code), {"student": student})
    if message is None:
        assert lines == []
    else:
        assert len(lines) == 1 and message in lines[0] and "\n" not in lines[0], lines


def row(answer, **more):
    return {"question": "how many", "answer": answer, **more}


def filters(*steps):
    return [f"filter_list: [{{name: f, filter: [{', '.join(steps)}, {{function: take_first}}]}}]"]


def settings(**generation):
    return [f"generation_kwargs: {json.dumps({'until': [], 'max_gen_toks': 4, **generation})}"]


WRONG = [
    # what is right is what the file says
    ([row("1"), row(None)], [], "question 1 (from 0): its doc_to_target reads answer, which is empty"),
    ([row("1"), row(None)], ["doc_to_target: '{{answer|trim}}'"], "question 1 (from 0): its doc_to_target reads"),
    ([row({"x": "1"}), row({"x": None})], ["doc_to_target: '{{answer.x}}'"], "question 1 (from 0): its doc_to_target"),
    ([row("1"), row(None)], ["doc_to_target: \"{{answer or 'x'}}\""], None),
    ([row(3), row(2.5)], [], "question 0 (from 0): its doc_to_target is '3.0' where the data file has '3'"),
    ([row(3), row(2.5)], ["doc_to_target: answer"], "question 0 (from 0): its doc_to_target is '3.0' where the"),
    ([row({"x": 3}), row({"x": 2.5})], ["doc_to_target: '{{answer.x}}'"], "'3.0' where the data file has '3'"),
    ([row(3), row(2.5)], ["doc_to_target: '{{answer|int}}'"], None),
    ([row(3), row(4)], [], None),
    ([row("2024-01-31"), row("2024-02-01")], [], "is '2024-01-31 00:00:00' where the data file has '2024-01-31'"),
    ([row("1", n=3), row("1", n=2.5)], [], None),
    ([row("1", n=3), row("1", n=2.5)], ["doc_to_text: '{{n}} and'"], "its doc_to_text is '3.0 and' where"),
    (ROWS, ["doc_to_target: ''"], "its doc_to_target is empty"),
    (ROWS, ["doc_to_target: anwser"], "doc_to_target names a column 'anwser', but the rows have question, answer"),
    (ROWS, ["doc_to_text: asked"], "doc_to_text names a column 'asked'"),
    (ROWS, ["doc_to_image: [picture]"], "doc_to_image names a column 'picture'"),
    # a choice of digits is no place
    ([row("4"), row("5")], [*CHOICE, 'doc_to_choice: ["4", "5"]'], "its target 4 is read as an index"),
    ([row("1"), row("2")], [*CHOICE, 'doc_to_choice: ["1", "2", "3"]'], "its target 1 is read as an index"),
    ([row("1"), row("2")], [*CHOICE, 'doc_to_choice: ["1", "2"]', "doc_to_target: answer"], None),
    (ROWS, [*CHOICE, "doc_to_choice: options"], "doc_to_choice names a column 'options', which the rows lack"),
    # filters, metrics and settings
    (ROWS, filters('{function: regex, regex_pattern: "("}'), "its filter 'f' (filter_list) fails on the answer '0'"),
    (ROWS, filters("{function: lowercase, nonesuch: 3}"), "its filter 'f' (filter_list) fails"),
    (ROWS, filters("{function: take_first_k}"), "its filter 'f' (filter_list) fails"),
    (ROWS, filters("{function: nonesuch}"), "nonesuch"),
    (ROWS, filters('{function: regex, regex_pattern: "([0-9])"}'), None),
    (ROWS, settings(until=3), "generation_kwargs.until is 3"),
    (ROWS, settings(until=[3]), "generation_kwargs.until"),
    (ROWS, settings(max_gen_toks=0), "generation_kwargs.max_gen_toks is 0; it must be greater than 0"),
    (ROWS, settings(max_gen_toks=-1), "generation_kwargs.max_gen_toks is -1"),
    (ROWS, settings(max_gen_toks="many"), "generation_kwargs.max_gen_toks is 'many'"),
    (ROWS, settings(do_sample=True, temperature=-1.0), "generation_kwargs.temperature is -1.0"),
    (ROWS, settings(temperature="hot"), "hot"),
    (ROWS, settings(top_p=2), "generation_kwargs.top_p is 2"),
    (ROWS, settings(max_new_token=3), "generation_kwargs.max_new_token; did you mean 'max_new_tokens'?"),
    (ROWS, settings(num_beams=4), "generation_kwargs.num_beams is 4"),
    (ROWS, ["metric_list: [{metric: exact_match, aggregation: maen, higher_is_better: true}]"],
     "exact_match's aggregation 'maen' is unknown to lm-eval, did you mean 'mean'?"),
    (ROWS, ["metric_list: [{metric: exact_mach}]"], "no metric 'exact_mach', did you mean 'exact_match'?"),
    (ROWS, ["metric_list: [{metric: exact_mach, aggregation: mean, higher_is_better: true}]"],
     "no metric 'exact_mach', did you mean 'exact_match'?"),
    (ROWS, ["metric_list: [{metric: exact_match, aggregation: f1, higher_is_better: true}]"],
     "exact_match is a number per question, but its aggregation fails on it"),
    (ROWS, ["repeats: many"], "repeats: must be an integer"),
    (ROWS, ["num_fewshot: -1"], "num_fewshot: must be at least 0"),
    (ROWS, ["num_fewshot: 5"], "lower eval.fewshot, or the task's num_fewshot"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "changes", "message"), WRONG)
def test_a_task_that_says_what_is_not_so(rows, changes, message, task, folders):
    """Guessed and empty cells, digits for choices, and filters, metrics and settings that would fail after training:
    one line; what is right passes."""
    changes = list({c.partition(":")[0]: c for c in changes}.values())
    student = without_weights(ModelConfig(model=str(folders["llm", "student"])))
    lines = tasks.find_problems(task(rows, changes), {"student": student})
    if message is None:
        assert lines == []
    else:
        assert len(lines) == 1 and message in lines[0] and "\n" not in lines[0], lines


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("007", "8"), "question 0 (from 0): its doc_to_target is '7' where the data file has '007'"),
        (("7", "NA"), "question 0 (from 0): its doc_to_target is '7.0' where the data file has '7'"),
        (("yes", "NA"), "question 1 (from 0): its doc_to_target is 'None' where the data file has 'NA'"),
        (("2.50", "3.5"), "question 0 (from 0): its doc_to_target is '2.5' where the data file has '2.50'"),
        (("7", "8"), None),
        (("2.5", "True"), None),
    ],
)  # fmt: skip
def test_golds_of_a_csv_keep_their_words(cells, message, task, tmp_path):
    """`datasets` makes 7 of 007 and nothing of NA in a CSV file: refused with the question and both words."""
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"how,{c}\n" for c in cells))
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.csv'}}}}}"
    lines = tasks.find_problems(task(ROWS, ["dataset_path: csv", data]), {})
    assert [message in line for line in lines] == ([] if message is None else [True]), lines


def test_golds_that_a_task_passes_on(task):
    """A task's process_docs that leaves the guessed golds alone is refused too; one that mends them passes."""
    process = ["process_docs: !function module.process"]
    code = "def process(d):\n    return d.map(lambda r: {'more': r['question'] + '?'})"
    (line,) = tasks.find_problems(task([row(3), row(2.5)], process, code), {})
    assert "its doc_to_target is '3.0' where the data file has '3'" in line
    code = "def process(d):\n    return d.map(lambda r: {'gold': f\"{r['answer']:g}\"}, remove_columns=['answer'])"
    mended = [*process, "doc_to_target: gold"]
    assert tasks.find_problems(task([row(3), row(2.5)], mended, code), {}) == []


def test_a_task_file_that_is_no_yaml(tmp_path):
    """A broken file of the task's name is named, instead of a task that is not there."""
    (tmp_path / "broken.yaml").write_text("task: broken\ndoc_to_text: '{{question")
    (line,) = tasks.find_problems(EvalConfig(tasks=("broken",), include=str(tmp_path)), {})
    assert f"{tmp_path / 'broken.yaml'}, which names task 'broken', cannot be read as YAML" in line


def test_marks_are_as_many_as_pictures(task, folders):
    """A task whose prompt marks another number of pictures than it shows, and a text-only model of pictures."""
    code = "from PIL import Image\ndef image(doc):\n    return [Image.new('RGB', (48, 48))]"
    picture = "doc_to_image: !function module.image"
    loaded = {
        kind: without_weights(ModelConfig(model=str(folders[kind, "student"])))
        for kind in ("llm", "vlm")
    }
    (line,) = tasks.find_problems(task(ROWS, [picture], code), {"student": loaded["vlm"]})
    assert (
        "question 0 (from 0): doc_to_text marks 0 pictures with <image> and doc_to_image returns 1"
        in line
    )
    marked = [picture, "doc_to_text: '<image>{{question}}'"]
    assert tasks.find_problems(task(ROWS, marked, code), {"student": loaded["vlm"]}) == []
    (line,) = tasks.find_problems(task(ROWS, marked, code), {"student": loaded["llm"]})
    assert "task mine has pictures, but student" in line and "is text-only" in line


def test_our_tasks_are_ready(folders):
    """Every question of the built-in worlds has a target that its own rule reads."""
    for kind, names in (
        ("llm", ("shapes_text", "shapes_choice_text")),
        ("vlm", ("shapes", "shapes_colour")),
    ):
        student = without_weights(ModelConfig(model=str(folders[kind, "student"])))
        assert tasks.find_problems(EvalConfig(tasks=names, limit=50), {"student": student}) == []


def test_a_target_that_our_rule_cannot_read(monkeypatch, tmp_path, folders):
    """A benchmark's row whose answer is no number would be wrong for everybody: its question is named."""
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": "how many", "answer": f"so #### {x}"} for x in ("4", "some")]
    write_jsonl(folder / "test.jsonl", rows)
    monkeypatch.setenv("VLOPD_BENCHMARKS", str(tmp_path))
    (line,) = tasks.find_problems(EvalConfig(tasks=("vlopd_gsm8k",)), {})
    assert "row 1 (from 0): column 'answer' holds 'some', which cannot be read as a number" in line


def test_a_score_that_depends_on_the_answer(kind, make_config, task, tmp_path):
    """A NaN that no target shows is found when it comes, with the question, and nothing is compared."""
    code = (
        "def score(doc, r):\n    return {'score': 1.0 if r[0] == doc['answer'] else float('nan')}"
    )
    config = make_config(kind, arms={"base": {"type": "base"}})
    config = config.model_copy(update={"eval": task(ROWS, SCORED, code)})
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "base")
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
    """Where no metric can be compared there is no empty comparison, but one line."""
    config = make_config("llm", arms={"base": {"type": "base"}})
    eval_config = task(ROWS, SCORED, "def score(doc, r):\n    return {'score': (1, 2)}")
    eval_config = eval_config.model_copy(update={"tasks": ("mine",)})
    config = config.model_copy(update={"eval": eval_config})
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "base")
    text = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("aggregation: mean", "aggregation: bypass"))
    evaluate_arm(run, config, "base")
    with pytest.raises(
        RunError, match=r"nothing can be compared \(mine: score's aggregation 'bypass' is unknown"
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
base = {{type = "base"}}
full = {{type = "distill"}}
[eval]
tasks = ["{task}"]
include = "gone"
limit = 3
"""


def test_a_run_is_refused_before_anything_is_made(kind, folders, monkeypatch, capsys, tmp_path):
    """Tasks of a folder that is not there, one for pictures under a text-only student and a long completion
    stop `run`, with no arm made;
    `check` says the same, and `distill`, which asks no task, says what concerns it."""
    path, out = tmp_path / "early.toml", tmp_path / "run"
    modality = "image" if kind == "vlm" else "text"
    student, teacher = folders[kind, "student"], folders[kind, "teacher"]
    path.write_text(CONFIG.format(student=student, teacher=teacher, modality=modality, task="mine"))
    code, said = call(monkeypatch, capsys, "run", path, "rollout.max_new_tokens=256", "--out", out)
    assert code == 2 and "no folder 'gone'" in said and "256 of completion" in said
    assert len(said.strip().splitlines()) == 1 and not (out / "arms").exists()
    code, said = call(monkeypatch, capsys, "check", path, "rollout.max_new_tokens=256")
    lines = [line for line in said.splitlines() if line.startswith("not ready: ")]
    assert code == 1 and "256 of completion" in lines[0] and "no folder 'gone'" in lines[1]
    code, said = call(
        monkeypatch,
        capsys,
        "run",
        path,
        "rollout.max_new_tokens=256",
        "--until",
        "arms",
        "--out",
        tmp_path / "d",
    )
    assert code == 2 and "256 of completion" in said and "gone" not in said
    if kind == "llm":
        code, said = call(
            monkeypatch,
            capsys,
            "run",
            path,
            "eval.tasks=['shapes']",
            f"eval.include='{tmp_path}'",
            "--out",
            tmp_path / "e",
        )
        assert code == 2 and "task shapes has pictures, but student" in said


def test_a_comparison_of_models_is_refused_before_they_are_loaded(
    folders, monkeypatch, capsys, tmp_path
):
    """Tasks of a folder that is not there, settings that make no sense and a folder that is none: one line,
    nothing written."""
    model, out = folders["llm", "student"], tmp_path / "out"
    for words, message in (
        ((model, model, "--tasks", "shapes_text"), "is given twice"),
        (
            (model, folders["llm", "teacher"], "--tasks", "mine", "--set", "include=gone"),
            "no folder 'gone'",
        ),
        ((model, folders["llm", "teacher"], "--tasks", "shapes"), "is text-only"),
        ((model, folders["llm", "teacher"], "--tasks", "shapes_text,"), "eval.tasks.1|tasks.1"),
        ((model, folders["llm", "teacher"], "--tasks", "shapes_text", "--set", "limit=0"), "limit"),
        ((model, tmp_path / "gone", "--tasks", "shapes_text"), "gone"),
    ):
        code, said = call(monkeypatch, capsys, "compare", *words, "--out", out)
        assert code == 2 and any(m in said for m in message.split("|")), said
        assert len(said.strip().splitlines()) == 1 and not (out / "evals").exists(), said


def test_a_comparison_of_models_follows_its_settings(folders, monkeypatch, capsys, tmp_path):
    """Other contrasts or another confidence compare anew what was evaluated."""
    student, teacher, out = folders["llm", "student"], folders["llm", "teacher"], tmp_path / "out"
    words = ("compare", student, teacher, "--tasks", "shapes_text", "--out", out)
    words += ("--set", "limit=4", "--set", "bootstrap_draws=50")
    contrasts = ("--set", "contrasts=['llm-student - llm-teacher']", "--set", "confidence=0.9")
    assert call(monkeypatch, capsys, *words)[0] == 0
    evaluated = (out / "evals" / "llm-student" / "results.json").stat().st_mtime_ns
    assert call(monkeypatch, capsys, *words, *contrasts)[0] == 0
    record = json.loads((out / "compare.json").read_text())
    declared = {its["name"]: its["declared"] for its in record["tasks"]["shapes_text"]["contrasts"]}
    assert declared == {"llm-teacher - llm-student": False, "llm-student - llm-teacher": True}
    assert record["confidence"] == 0.9
    assert (out / "evals" / "llm-student" / "results.json").stat().st_mtime_ns == evaluated


WHOLE = {"type": "whole", "components": ["language"]}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"w": {"type": "whole", "modules": ["nonesuch"]}}, "masks.w: modules: the model has no 'nonesuch'"),
        ({"w": {"type": "whole", "layers": [99]}}, "masks.w: layers: the model has no '99'"),
        ({"w": {"type": "random", "like": "v", "seed": 1}, "v": {"type": "whole", "layers": [99]}}, "masks.v: layers"),
        ({"w": {"type": "union", "masks": ["u", "v"]}, "u": WHOLE, "v": {"type": "file", "path": "gone.safetensors"}},
         "masks.v: no mask gone.safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("arm", ["transplant", "extrapolate"])
def test_masks_of_arms_that_do_not_train(kind, arm, wrong, named, make_config):
    """A mask of another model is found before the arm that it is put over is trained, once and by its name."""
    x = {"type": arm, "of": "full", "mask": "w"} | ({"factor": 2.0} if arm == "extrapolate" else {})
    arms = {"full": {"type": "distill"}, "x": x, "y": x}
    (line,) = inputs.find_problems(make_config(kind, masks=wrong, arms=arms), ["full", "x", "y"])
    assert line.startswith(named)


def changed(folder, out, change):
    """A copy of a model with its tensors changed."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def lose(tensors):
    del tensors[next(n for n in sorted(tensors) if n.endswith("layers.1.mlp.up_proj.weight"))]


def spoil(tensors):
    name = next(n for n in sorted(tensors) if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize(
    "arm",
    [
        {"type": "transplant", "of": "FOLDER", "mask": "w"},
        {"type": "extrapolate", "of": "FOLDER", "factor": 2.0},
        {"type": "extrapolate", "of": "full", "norm_of": "FOLDER"},
        {"type": "distill", "subspace": {"of": "FOLDER"}},
        {"type": "distill", "mask": "v"},
        {"type": "distill", "teacher": {"model": "FOLDER"}},
    ],
    ids=lambda arm: " ".join([arm["type"], *(k for k, v in arm.items() if v != arm["type"])]),
)
def test_folders_that_later_arms_read(kind, arm, folders, make_config, tmp_path):
    """A folder that lacks a tensor or holds a NaN is found before the first arm is trained; a whole one passes."""
    for change in (lose, spoil, lambda tensors: None):
        name = {lose: "lost", spoil: "spoilt"}.get(change, "whole")
        folder = changed(folders[kind, "student"], tmp_path / name, change)
        x = json.loads(json.dumps(arm).replace("FOLDER", str(folder)))
        masks = {"w": WHOLE, "v": {"type": "visible", "of": str(folder)}}
        config = make_config(kind, masks=masks, arms={"full": {"type": "distill"}, "x": x})
        lines = inputs.find_problems(config, ["full", "x"])
        if name == "whole":
            assert lines == []
            continue
        (line,) = lines
        assert "layers.1.mlp.up_proj.weight" in line and name in line
        assert ("finite" in line) == (name == "spoilt")


@pytest.mark.parametrize("change", [lose, spoil])
def test_models_of_other_arms_are_loaded_before_training(
    kind, change, folders, make_config, tmp_path
):
    """A model to be scored that is not whole stops the run while no arm is trained yet."""
    folder = changed(folders[kind, "student"], tmp_path / "broken", change)
    arms = {"full": {"type": "distill"}, "x": {"type": "checkpoint", "model": str(folder)}}
    run, config = RunFolder(tmp_path / "run"), make_config(kind, arms=arms)
    run.root.mkdir()
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        pipeline.make_arms(run, config, ["full", "x"], lambda *_: None)
    assert not run.arm_record("full").exists()


BOTH = {"type": "intersection", "masks": ["p", "q"]}


@pytest.mark.parametrize(
    ("masks", "freeze", "left"),
    [
        ({"m": BOTH, "p": {"type": "whole", "layers": [0]}, "q": {"type": "whole", "layers": [1]}}, [], False),
        ({"m": BOTH, "p": WHOLE, "q": {"type": "magnitude", "fraction": 0.5}}, [], True),
        ({"m": BOTH, "p": {"type": "whole", "components": ["head"]}, "q": {"type": "magnitude", "fraction": 0.5}},
         ["head"], False),
        ({"m": {"type": "complement", "mask": "p"}, "p": {"type": "magnitude", "fraction": 1.0}}, [], False),
        ({"m": {"type": "complement", "mask": "p"}, "p": WHOLE}, [], True),
        ({"m": {"type": "complement", "mask": "p"}, "p": {"type": "complement", "mask": "q"},
          "q": {"type": "whole", "components": ["head"]}}, ["head"], False),
        ({"m": {"type": "difference", "masks": ["p", "q"]}, "p": {"type": "whole", "layers": [0]}, "q": WHOLE},
         ["vision"], False),
        ({"m": {"type": "union", "masks": ["p", "q"]}, "p": {"type": "whole", "layers": [0]}, "q": WHOLE},
         ["language"], False),
        ({"m": {"type": "random", "like": "p", "seed": 1}, "p": {"type": "whole", "components": ["head"]}},
         ["head"], False),
        ({"m": {"type": "random", "like": "p", "seed": 1, "match": "global"},
          "p": {"type": "whole", "components": ["head"]}}, ["head"], True),
    ],
)  # fmt: skip
def test_masks_that_leave_nothing_to_train(masks, freeze, left, make_config):
    """Combinations are judged as far as their rules tell: an arm that could only be the base is refused."""
    train = {"steps": 1, "prompts_per_step": 2, "freeze": freeze}
    arms = {"x": {"type": "distill", "mask": "m"}}
    lines = inputs.find_problems(make_config("llm", masks=masks, arms=arms, train=train), ["x"])
    assert bool(lines) != left
    assert all("arms.x: " in line and "'m'" in line for line in lines)


def test_training_refuses_an_empty_mask(kind, make_pair, make_config, make_data, tmp_path):
    """An empty mask, known only when it is drawn, is an error and no finished arm."""
    pair = make_pair(kind)
    config = make_config(kind, masks={"m": WHOLE}, arms={"x": {"type": "distill", "mask": "m"}})
    empty = {n: torch.zeros_like(p).bool() for n, p in pair.student.model.named_parameters()}
    with pytest.raises(ConfigError, match=r"x: nothing is left to train: the mask"):
        distill(pair, make_data(kind, 4), recipe_of(config, "x"), tmp_path / "x", 2, empty)


def test_one_line_of_what_is_missing(make_config, monkeypatch, capsys, folders, tmp_path):
    """A missing model or imported results are one finding each; a folder that is none is said to be none."""
    path = tmp_path / "c.toml"
    student, teacher = folders["llm", "student"], folders["llm", "teacher"]
    text = CONFIG.format(student=student, teacher=teacher, modality="text", task="shapes_text")
    path.write_text(text.replace('include = "gone"\n', ""))
    for arm, said in (
        ("{type='checkpoint', model='nofolder'}", "there is no such folder"),
        ("{type='imported', results='nofolder'}", "no results_"),
    ):
        code, out = call(monkeypatch, capsys, "check", path, f"arms.x={arm}")
        lines = [line for line in out.splitlines() if line.startswith("not ready: ")]
        assert code == 1 and sum("nofolder" in line for line in lines) == 1, lines
        assert any(said in line and "arms.x: " in line for line in lines)


def test_a_broken_config_and_complex_weights_of_a_users_model(folders, tmp_path):
    """The remedy for a model's own file is another copy; complex weights are called complex, not quantised."""
    student = folders["llm", "student"]
    shutil.copytree(student, tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not JSON .*; copy it again"):
        match_report(student, tmp_path / "cut")

    def turn(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.complex64)

    folder = changed(student, tmp_path / "complex", turn)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight is stored as C64, complex"):
        load(str(folder), torch.float32)
