"""Thoughts: what a reasoning model thinks aloud is never graded, and a cut-off thought is no answer."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from evals.harness import Subject, _length_entries, _sample_row, evaluate
from evals.lm import ArmLM
from evals.scoring import Tasks, score_task
from tests.command import call
from tests.conftest import recipe_of, tiny_language
from vlopd.config.analysis import EvalConfig
from vlopd.config.models import ModelConfig
from vlopd.errors import ConfigError
from vlopd.grading.extraction import number_answer, strip_reasoning
from vlopd.models.load import load, load_configured
from vlopd.models.loaded import LoadedModel
from vlopd.models.thinking import HARMONY, MARKS, kept_tokens, marks_of, opened_by, pair, split
from vlopd.run.folder import RunFolder
from vlopd.train.rollouts import collect
from vlopd.types import Completions, Example

THINK = MARKS[0]
FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_every_family_is_read(mark):
    """Closed, opened by the prompt, cut off, cut off where the prompt opened it, and with no thought at all."""
    head = mark.header
    opening, closing = mark.opening[0] + head, mark.closing[0] + head
    assert split(f"{opening}1 or 23\n\n{closing}\n\n4")[1:3] == ("4", True)
    assert split(f"1 or 23{closing} 4", mark)[1:3] == ("4", True)
    assert split(f"1 or 23{closing} 4")[1:3] == ("4", True)
    assert split(f"{opening}1 or 23")[1:3] == ("", False)
    assert split("1 or 23", mark)[1:3] == ("", False)
    assert split("1 or 23") == (None, "1 or 23", True, None)
    assert strip_reasoning(f"{opening}1 or 23{closing}4") == "4"
    assert number_answer(f"{opening}1 or 23") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # several, nested, empty, and text before them
        ("<think>1</think>2<think>3</think>4", "4"),
        ("<think>1</think>2\n<think>3", None),
        ("<think>1<think>2</think>3</think>4", "4"),
        ("<think>1<think>2</think>3", None),
        ("<think>\n<think>\n1 or 23</think>4", "4"),
        ("<think>\n\n</think>\n\n4", "4"),
        ("<think>1 or 23</think>", ""),
        ("Let me see.\n<think>\n23</think>\n4", "4"),
        ("Let me see. <think>1 or 23", None),
        ("<think>1</think>23</think>4", "4"),
        ("<think>so <reasoning> 5</think>4", "4"),
        # tags in any case
        ("<Think>23</THINK>4", "4"),
        ("<THINK>23", None),
        ("23</Reflection>4", "4"),
        # mentions
        ("The `<think>` tag opens a thought. 4", "The `<think>` tag opens a thought. 4"),
        ("The <think> tag opens a thought. 4", None),  # in doubt it does
        ("Sure. <think> 23", None),
        ("I close with `</think>`: 4", "I close with `</think>`: 4"),
        ('the "<think>" of 23', 'the "<think>" of 23'),
        ("<think>they ask about <think> tags, 23</think>4", "4"),
        ("<think>`</think>` would end it. 23", None),
        ('<think>say "23"</think>"4"', '"4"'),
        # what surrounds the answer is no part of it
        (
            "<|begin_of_thought|>23<|end_of_thought|>\n<|begin_of_solution|>\n4<|end_of_solution|>",
            "4",
        ),
        ("<|begin_of_thought|>23<|begin_of_solution|>4", "4"),
        ("<|channel|>analysis<|message|>23" + FINAL + "4<|return|>", "4"),
        (
            "<|channel|>analysis<|message|>2<|end|><|start|>assistant<|channel|>commentary to=f <|constrain|>json"
            "<|message|>{}<|call|><|start|>assistant<|channel|>analysis<|message|>23" + FINAL + "4",
            "4",
        ),
        ("<|channel|>final <|constrain|>json<|message|>4", "4"),
        ("<|channel|> analysis<|message|> 23<|channel|> final<|message|> 4", "4"),
        ("<|channel|>analysis<|message|>23<|end|><|start|>assistant<|channel|>fin", None),
        ("<|channel|>analysis<|message|>23<|end|><|start|>assistant<|channel|>final<|mes", ""),
        ("<|channel|>commentary<|message|>23", None),
    ],
)
def test_what_is_the_answer(text, answer):
    """The answer is what follows the last thought; None is a thought that never closes."""
    reading = split(text)
    assert (reading.answer.strip() if reading.closed else None) == answer
    assert strip_reasoning(text) == (answer or "")


def test_a_channel_that_the_prompt_opened():
    """gpt-oss's prompt may end in the header of a message of thoughts, or of the answer."""
    assert opened_by("<|start|>assistant<|channel|>analysis<|message|>", "", MARKS) == HARMONY
    assert opened_by("<|start|>assistant<|channel|>final<|message|>", "", MARKS) is None
    assert split("1 or 23", HARMONY).closed is False
    assert split("1 or 23" + FINAL + "4", HARMONY).answer == "4"


@pytest.mark.parametrize(
    ("prompt", "generation_prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False),
        ("Use <think>.<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>assistant\n", False),
        (
            "A: <think>\nOkay, so",
            "A: <think>\nOkay, so",
            True,
        ),  # a template that begins the thought
        ("A: <think>\nOkay, so", "", False),
        ("A conversation. User: 2+2? Assistant: <think>", "", True),  # a base model's prompt
        ("", "", False),
    ],
)
def test_which_prompts_open_a_thought(prompt, generation_prompt, opens):
    """A prompt's end decides; what a question says of the mark does not."""
    assert opened_by(prompt, generation_prompt, MARKS) == (THINK if opens else None)


def test_marks_of_a_model():
    """Known marks by tokens or template, unknown ones by their names, prose only where the template has it."""
    assert marks_of(["<think>", "</think>", "<|im_end|>"], "") == (THINK,)
    assert marks_of([], "{{ message.content.split('</think>')[-1] }}") == (THINK,)
    assert marks_of(["<Think>", "</Think>"], "") == (THINK,)
    assert marks_of(["<|think|>", "<|end_think|>"], "") == (pair("<|think|>", "<|end_think|>"),)
    assert kept_tokens(["<Think>", "</Think>", "<|im_end|>"], MARKS) == {"<Think>", "</Think>"}
    assert opened_by("assistant\n<Think>\n", "", MARKS) == THINK
    assert marks_of(["<|channel|>", "<|message|>", "<|end|>"], "") == (HARMONY,)
    assert [m.opening for m in marks_of(["<|channel>", "<channel|>"], "")] == [
        ("<|channel>thought",)
    ]
    assert marks_of(["<|end|>", "<|assistant|>", "<|think|>"], "{{ messages[0]['content'] }}") == ()
    (own,) = marks_of(["<|thinking_start|>", "<|thinking_end|>"], "")
    assert split("<|thinking_start|>23<|thinking_end|>4", None, (own,)).answer == "4"
    (granite,) = marks_of([], "First write 'Here is my thought process:', then your answer.")
    prose = "Here is my thought process: 23. Here is my response: 4"
    assert split(prose).answer == prose
    assert split(prose, None, (granite,)).answer == "4"


# ------------------------------------------------------------------------------------------- models

OPENS = (
    "{% if add_generation_prompt %}{% if enable_thinking is not defined or enable_thinking %} <think>"
    "{% else %} <think> </think>{% endif %}{% endif %}"
)


def thinking(folder: Path, kind: str, special: bool = True, opens: bool = False) -> LoadedModel:
    """The tiny model of the kind with <think> and </think> as added tokens; its template opens one, if so wanted."""
    loaded = load(str(folder), torch.float32)
    marks = [AddedToken(word, special=special) for word in ("<think>", "</think>")]
    loaded.tokenizer.add_tokens(marks, special_tokens=special)
    loaded.model.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    if opens:
        template = loaded.chat_template + OPENS
        loaded.tokenizer.chat_template = template
        loaded.processor.chat_template = template
    return loaded


def ids_of(loaded: LoadedModel, text: str) -> torch.Tensor:
    return torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])


def completions_of(loaded: LoadedModel, text: str) -> Completions:
    ids = ids_of(loaded, text)
    return Completions(
        ids, torch.ones_like(ids).bool(), torch.zeros(ids.shape), torch.ones(1).bool()
    )


def teach(loaded: LoadedModel, example: Example, text: str) -> None:
    """Trains the model to answer the example with the text and an end token."""
    prompts, said = loaded.render([example]), completions_of(loaded, text)
    ids = torch.cat([said.ids, torch.tensor([[loaded.end_ids[0]]])], 1)
    said = Completions(
        ids, torch.ones_like(ids).bool(), torch.zeros(ids.shape), torch.ones(1).bool()
    )
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    for _ in range(200):
        hidden = loaded.completion_hidden(prompts, said)
        logprobs = loaded.logits(hidden, loaded.vocabulary_rows).log_softmax(-1)
        right = logprobs.gather(1, ids.T)
        if right.exp().min() > 0.9:
            return
        optimizer.zero_grad()
        (-right.mean()).backward()
        optimizer.step()
    raise AssertionError("not learnt")


def ask(loaded: LoadedModel, example: Example, **settings) -> tuple[str, ArmLM]:
    """The model's answer to the example as lm-eval gets it."""
    arguments = (loaded.render_text(example), {"max_gen_toks": 40, **settings})
    if example.images:
        arguments += ({"visual": list(example.images)},)
    lm = ArmLM(loaded, 2, quiet=True)
    request = Instance("generate_until", {}, arguments, 0, metadata=("asked", 0, 1))
    return lm.generate_until([request], True)[0], lm


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_added_tokens(kind, special, folders):
    """Special or not, tokens that mark a thought end it: for rewards, evaluation, templates that open one."""
    loaded = thinking(folders[kind, "student"], kind, special)
    texts = {
        "<think> red 2 </think> blue": "blue",
        "<think> red 2": "",
        "red 2 <eos>": "red 2",
        "red </think> blue": "blue",
    }
    for text, answer in texts.items():
        said = completions_of(loaded, text)
        assert loaded.decode(said) == [answer]
        assert ArmLM(loaded).decode(said.ids, said.mask) == [answer]
    opened = thinking(folders[kind, "student"], kind, special, opens=True)
    said = completions_of(opened, "red 2")
    assert opened.decode(said) == [""]
    assert opened.decode(completions_of(opened, "red </think> blue")) == ["blue"]
    off = replace(opened, template_arguments={"enable_thinking": False})
    assert off.render_text(Example.ask("", "red")).endswith("<think> </think>")
    assert off.decode(said) == ["red 2"]


def test_text_without_thoughts_is_untouched(kind, folders):
    """A model that could think and does not gives what the tokenizer's own decoding gives, byte for byte."""
    loaded = thinking(folders[kind, "student"], kind)
    torch.manual_seed(0)
    ids = torch.randint(0, len(loaded.tokenizer) - 2, (8, 30))
    mask = torch.rand(ids.shape) < 0.9
    rows = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    plain = loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert ArmLM(loaded).decode(ids, mask) == plain
    assert [loaded.transcript(row) for row in rows] == [text.strip() for text in plain]


def test_a_thought_is_neither_graded_nor_cut(kind, folders, make_data, make_config, make_pair):
    """lm-eval gets the answer alone; a stop string ends the answer, not the thought; what was thought is kept."""
    loaded = thinking(folders[kind, "student"], kind, opens=True)
    example = make_data(kind, 1)[0]
    teach(loaded, example, "red 2 green </think> blue red yellow")
    assert ask(loaded, example)[0] == "blue red yellow"
    answer, lm = ask(loaded, example, until=["red"])
    assert answer == "blue "
    (found,) = lm.generated["asked", 0]
    assert found.reading.closed and "red 2 green" in found.reading.thought
    assert found.stop == "stop_string" and 4 <= found.thought_tokens < found.tokens
    answer, lm = ask(loaded, example, max_gen_toks=3)
    (found,) = lm.generated["asked", 0]
    assert answer == "" and not found.reading.closed and not found.answered
    assert (found.tokens, found.thought_tokens, found.stop) == (3, 3, "length")
    sampled = loaded.render([example])
    assert loaded.opened_thoughts(sampled) == [THINK]
    assert loaded.decode(completions_of(loaded, "red 2"), sampled) == [""]


def test_answers_of_a_thinking_model_are_counted(folders, make_data):
    """Of a model that never closes its thought, rows and results say that it was cut and answered nothing; of one that
    does, how long it thought."""
    loaded = thinking(folders["llm", "student"], "llm", opens=True)
    example = make_data("llm", 1)[0]
    config = EvalConfig(tasks=("shapes_text",), generation={"*": {"max_tokens": 12}})
    manager = Tasks.of(["shapes_text"])
    for text, answered in (("red 2 green </think> blue", 1), ("red red red", 0)):
        teach(loaded, example, text)
        lm = ArmLM(loaded, 2, quiet=True)
        rows = score_task(lm, "shapes_text", manager, config, 1, "x")["samples"]["shapes_text"]
        (generated,) = rows[0]["generated"]
        found = _length_entries(rows, "exact_match")
        row = _sample_row(rows[0], {}, "exact_match")
        assert found["mean_tokens"] == row["tokens"] <= 12
        assert 0 < row["thought_tokens"] <= row["tokens"] and row["thought"]
        assert found["thinking"]["answered_fraction"] == float(generated.answered) == answered
        assert (
            found["thinking"]["stopped_fraction"]
            == 1 - row["truncated"]
            == float(generated.stop == "end")
        )
        assert found["thinking"]["correct_fraction"] == 0


def test_choices_are_not_scored_inside_a_thought(kind, folders):
    """A choice right after an opened thought would be scored as a thought: refused, as lm-eval does."""
    loaded = thinking(folders[kind, "student"], kind, opens=True)
    example = Example.ask("", "red")
    for model, refused in (
        (loaded, True),
        (replace(loaded, template_arguments={"enable_thinking": False}), False),
    ):
        request = Instance(
            "loglikelihood", {}, (model.render_text(example), " blue"), 0, metadata=("choice", 0, 1)
        )
        if refused:
            with pytest.raises(ConfigError, match=r"task choice: .* opens a thought"):
                ArmLM(model, quiet=True).loglikelihood([request], True)
        else:
            assert len(ArmLM(model, quiet=True).loglikelihood([request], True)) == 1


@pytest.mark.parametrize("ends", [True, False], ids=["closed", "cut off"])
def test_rewards_read_the_answer(kind, ends, folders, make_pair, make_config, make_data):
    """A right word in a thought earns nothing where the thought is cut off, or where another answer follows."""
    example = make_data(kind, 1)[0]
    example = replace(example, answer="red", fields={})
    sections = {
        "rollout": {"max_new_tokens": 8 if ends else 3, "completions_per_prompt": 2},
        "reward": {"rule": "answer_named"},
        "train": {"steps": 1, "prompts_per_step": 1},
    }
    pair = make_pair(kind, **sections)
    loaded = thinking(folders[kind, "student"], kind, opens=True)
    for text, worth in (("red </think> blue", 0.0), ("blue </think> red", 1.0 if ends else 0.0)):
        text = text if ends else text.replace(" </think>", " 2 2 </think>")
        teach(loaded, example, text)
        rows = range(len(loaded.tokenizer))
        vocabulary = replace(pair.vocabulary, student=len(rows))
        own = replace(pair, student=loaded, vocabulary=vocabulary)
        config = make_config(
            kind, **{**sections, "rollout": {**sections["rollout"], "temperature": 0.05}}
        )
        (batch,) = collect(own, recipe_of(config), own.render([example]), range(1), 0, 0)
        assert batch.rewards.tolist() == [worth, worth]


# ------------------------------------------------------------------------- plain text, and a whole task


def byte_level(folder: Path, template: str, added=()) -> Path:
    """A tiny language model with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=own, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in added])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>"
    )
    fast.chat_template = template
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_language(len(fast), 32))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = CHATML + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
MAGISTRAL = CHATML.replace("m.content", "m.content.split('[/THINK]')[-1]")
R1 = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>")


@pytest.mark.parametrize(
    ("template", "added", "said"),
    [
        (QWEN, (), "<think>\n2\n\n3</think>\n\n4\n\n5"),
        (R1, (), "2\n\n3 perhaps\n</think>\n4\n\n5"),
        (MAGISTRAL, (), "\n\n[THINK]2\n\n3[/THINK]4\n\n5"),
        (CHATML, HARMONY_TOKENS, "<|channel|>analysis<|message|>2\n\n3" + FINAL + "4\n\n5"),
        (
            CHATML,
            ("<|begin_of_thought|>",),
            "<|begin_of_thought|>2\n\n3<|end_of_thought|>\n<|begin_of_solution|>4\n\n",
        ),
    ],
    ids=["text", "opened by the template", "brackets", "channels", "half special"],
)
def test_a_task_grades_the_answer_alone(template, added, said, tmp_path):
    """Through lm-eval, with a task that stops at a blank line: the answer is right, and a cut-off thought is wrong."""
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "how many", "answer": "4"}) + "\n")
    for name, tokens in (("whole", 99), ("cut", 30 if added == HARMONY_TOKENS else 13)):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            'test_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
            "output_type: generate_until\n"
            f'generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: {tokens}}}\n'
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
        )
    loaded = load(str(byte_level(tmp_path / "model", template, added)), torch.float32)
    teach(loaded, Example.ask("", "how many"), said)
    config = EvalConfig(tasks=("whole", "cut"), include=str(tmp_path))
    subject = Subject("arm", lambda whole: {"weights": "x"}, "fp32", lambda: loaded, {})
    evaluate(RunFolder(tmp_path), subject, config)
    results = json.loads((tmp_path / "evals" / "arm" / "results.json").read_text())
    out = tmp_path / "evals" / "arm"
    assert results["results"]["whole"]["exact_match,none"] == 1
    assert results["results"]["cut"]["exact_match,none"] == 0
    assert results["thought_truncated_fraction"] == {"whole": 0, "cut": 1}
    (whole,) = map(json.loads, (out / "samples_whole.jsonl").read_text().splitlines())
    (cut,) = map(json.loads, (out / "samples_cut.jsonl").read_text().splitlines())
    assert whole["completion"] == "4" and "2\n\n3" in whole["thought"]
    assert cut["completion"] == "" and cut["thought"] and cut["thought_truncated"] == 1


# --------------------------------------------------------------------------------- template_arguments


def test_template_arguments_reach_the_template(tmp_path):
    """They are a setting of the model: rendered, evaluated under and recorded; another value is another evaluation."""
    folder = byte_level(tmp_path / "model", QWEN)
    question = Example.ask("", "how many")
    plain = load_configured(ModelConfig(model=str(folder)), torch.float32)
    off = ModelConfig(model=str(folder), template_arguments={"enable_thinking": False})
    told = load_configured(off, torch.float32)
    assert told.render_text(question) == plain.render_text(question) + "<think>\n\n</think>\n\n"
    assert told.opened_thoughts(told.render([question])) == [None]
    other = ModelConfig(model="elsewhere", template_arguments={"enable_thinking": False})
    again = load_configured(other, torch.float32, folder=folder)
    assert again.render_text(question) == told.render_text(question)  # an arm's own checkpoint
    lm = ArmLM(told, quiet=True)
    assert lm.apply_chat_template([{"role": "user", "content": "how many"}]) == told.render_text(
        question
    )


def test_results_record_template_arguments(kind, folders, tmp_path):
    """results.json has them, and a task that was evaluated under others is evaluated again."""
    config = EvalConfig(tasks=("shapes_text",), limit=1)
    asked = []
    for value in (True, True, False):
        arguments = {"enable_thinking": value}

        def opened(arguments=arguments):
            asked.append(arguments)
            loaded = thinking(folders[kind, "student"], kind, opens=True)
            return replace(loaded, template_arguments=arguments)

        subject = Subject("arm", lambda whole: {"weights": "x"}, "fp32", opened, {}, arguments)
        evaluate(RunFolder(tmp_path), subject, config)
        results = json.loads((tmp_path / "evals" / "arm" / "results.json").read_text())
        assert results["template_arguments"] == arguments
    assert asked == [{"enable_thinking": True}, {"enable_thinking": False}]


def test_a_teacher_that_is_the_student_has_its_own_arguments(kind, make_config):
    """Self-distillation from thoughts: the student's arguments, with the teacher's over them."""
    student = {"model": "s", "template_arguments": {"enable_thinking": False, "date": "d"}}
    teacher = {"model": "student", "template_arguments": {"enable_thinking": True}}
    config = make_config(kind, student=student, teacher=teacher)
    told = config.teachers["teacher"].loaded_from(config.student)
    assert told.model == "s"
    assert told.template_arguments == {"enable_thinking": True, "date": "d"}
    assert config.student.template_arguments["enable_thinking"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"tools": []}, "tools"),
        ({"bos_token": "<s>"}, "bos_token"),
        ({"budget": float("nan")}, "finite"),
        ({"date": torch.device("cpu")}, "JSON"),
    ],
)
def test_refused_template_arguments(arguments, message):
    """Names that belong to every rendering, and values that JSON does not have."""
    with pytest.raises(ValueError, match=message):
        ModelConfig(model="m", template_arguments=arguments)


def test_unknown_template_arguments_are_refused(tmp_path):
    """An argument that the template never mentions would change nothing; the near ones are named."""
    folder = byte_level(tmp_path / "model", QWEN)
    for name in ("enable_thinkin", "enable-thinking"):
        with pytest.raises(ConfigError, match=rf"no argument '{name}'; it has enable_thinking"):
            load(str(folder), torch.float32, template_arguments={name: False})
    with pytest.raises(ConfigError, match="it has none"):
        load(str(folder), torch.float32, template="plain", template_arguments={"a": 1})


# ---------------------------------------------------------------------------------------------- check

CHECKED = """
name = "checked"
student = {{model = "{folder}", template_arguments = {{{arguments}}}}}
teacher = "{teacher}"
[precision]
compute = "fp32"
[data]
type = "shapes"
modality = "text"
[rollout]
max_new_tokens = 6
[train]
steps = 1
prompts_per_step = 2
[arms]
full = {{type = "distill", seed = 1}}
sft = {{type = "distill", seed = 1, rollout = {{source = "data"}}, loss = {{type = "nll"}}}}
"""


def test_check_says_who_thinks(tmp_path, monkeypatch, capsys):
    """The marks of each model, whose prompt opens a thought, and what does not go together there."""
    opens = QWEN.replace("{% endif %}", "{% endif %}", 1) + (
        "{% if add_generation_prompt and enable_thinking is not defined %}<think>\n{% endif %}"
    )
    student = byte_level(tmp_path / "student", opens)
    teacher = byte_level(tmp_path / "teacher", CHATML)
    path = tmp_path / "checked.toml"
    path.write_text(CHECKED.format(folder=student, teacher=teacher, arguments=""))
    code, out = call(monkeypatch, capsys, "check", path)
    out = " ".join(out.split())
    assert code == 0
    assert "<think> ... </think>; its prompt opens one" in out and "none" in out
    assert "the prompt of student opens a thought and that of teacher does not" in out
    assert "the data's answers are learnt as thoughts" in out
    path.write_text(
        CHECKED.format(folder=student, teacher=teacher, arguments="enable_thinking = false")
    )
    code, out = call(monkeypatch, capsys, "check", path)
    assert code == 0 and "opens a" not in out
    path.write_text(CHECKED.format(folder=student, teacher=teacher, arguments="thinking = false"))
    code, out = call(monkeypatch, capsys, "check", path)
    assert code == 1 and "no argument 'thinking'; it has enable_thinking" in " ".join(out.split())
