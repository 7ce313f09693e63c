"""On the same saved checkpoint our numbers are those of lm-eval's own model classes, question by question."""

import json

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from evals.lm import ArmLM
from evals.scoring import TASKS, Tasks, score_task
from vlopd.config.analysis import EvalConfig
from vlopd.config.models import ModelConfig
from vlopd.models.load import BUILTIN, load_configured

TEXT_TASKS = ("shapes_text", "shapes_choice_text")
LIMIT = 10


def open_model(folder):
    return load_configured(ModelConfig(model=str(folder)), torch.float32, "cpu")


def theirs(model: str, folder, task: str, **how):
    """lm-eval's own evaluation of a folder, as its command line makes it."""
    return lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=LIMIT,
        batch_size=4,
        device="cpu",
        bootstrap_iters=1,
        **how,
    )


def ours(folder, task: str, batch_size: int, **settings):
    config = EvalConfig(tasks=(task,), batch_size=batch_size, **settings)
    lm = ArmLM(open_model(folder), batch_size, quiet=True)
    return score_task(lm, task, Tasks.of([task]), config, LIMIT, "ours")


def answers(results, task: str):
    """What every question got: texts as they are, log-probabilities to 1e-4."""
    rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    found = []
    for row in rows:
        for (response,) in row["resps"]:
            if isinstance(response, str):
                found.append(response)
            else:
                found.append((pytest.approx(float(response[0]), abs=1e-4), str(response[1])))
    return found


def plain(found):
    return [x if isinstance(x, str) else (x[0].expected, x[1]) for x in found]


@pytest.mark.parametrize("task", TEXT_TASKS)
@pytest.mark.parametrize("templated", [True, False], ids=["chat", "plain"])
def test_text_tasks_equal_lm_evals(task, templated, folders):
    """Generation and multiple choice of a text model, with and without the chat template: the same prompts,
    answers, log-probabilities and scores, for batches of 1, 4 and 16."""
    folder = folders["llm", "student"]
    expected = theirs(
        "hf", folder, task, apply_chat_template=templated, fewshot_as_multiturn=templated
    )
    for batch_size in (1, 4, 16):
        got = ours(folder, task, batch_size, chat_template=templated)
        assert plain(answers(got, task)) == answers(expected, task)
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert got["results"][task][name] == value, name
        for a, b in zip(got["samples"][task], expected["samples"][task], strict=True):
            assert a["prompt_hash"] == b["prompt_hash"] and a["doc_hash"] == b["doc_hash"]


def test_image_generation_equals_lm_evals():
    """A trained student's answers to pictures equal those of lm-eval's hf-multimodal on the same folder.

    (A random model says image placeholders too, which our sampler never does.)
    """
    folder = BUILTIN / "shapes-student"
    expected = theirs(
        "hf-multimodal", folder, "shapes", apply_chat_template=True, fewshot_as_multiturn=True
    )
    for batch_size in (1, 4, 16):
        got = ours(folder, "shapes", batch_size)
        assert answers(got, "shapes") == answers(expected, "shapes")
        assert (
            got["results"]["shapes"]["exact_match,none"]
            == (expected["results"]["shapes"]["exact_match,none"])
        )


def test_long_prompts_are_cut_as_lm_eval_cuts_them(folders, tmp_path):
    """A prompt beyond the context loses its beginning, for generation and for log-likelihood."""
    rows = [{"question": "how many red " * 120 + tail, "answer": "2"} for tail in ("blue", "green")]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    shared = f"""dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "long_generation.yaml").write_text(
        f"task: long_generation\n{shared}output_type: generate_until\ndoc_to_target: answer\n"
        "generation_kwargs: {until: [], do_sample: false, max_gen_toks: 20}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n".replace(
            "\\\n", "\n"
        )
    )
    (tmp_path / "long_choice.yaml").write_text(
        f"task: long_choice\n{shared}output_type: multiple_choice\ndoc_to_target: 0\n"
        'doc_to_choice: ["2", "3 : red"]\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n".replace(
            "\\\n", "\n"
        )
    )
    folder = folders["llm", "student"]
    manager = Tasks(include_path=str(tmp_path), include_defaults=False)
    for task in ("long_generation", "long_choice"):
        expected = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32"},
            tasks=[task],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
            bootstrap_iters=1,
        )
        lm = ArmLM(open_model(folder), 2, quiet=True)
        got = score_task(
            lm, task, manager, EvalConfig(tasks=(task,), chat_template=False), None, "ours"
        )
        assert plain(answers(got, task)) == answers(expected, task)
