"""Completions from the student, the teacher or the data, and what their rewards say."""

import pytest
import torch

from tests.conftest import recipe_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.objective import RewardConfig
from vlopd.errors import DataError
from vlopd.train.rewards import RULES, group_advantages, reward
from vlopd.train.rollouts import by_place, choose_writers, collect, from_data
from vlopd.types import Example


def rows_of(batches) -> list[tuple[list[int], str, str]]:
    """(tokens, example, writer) of each completion, prompt-major."""
    rows = [
        (place, ids[mask].tolist(), example.id, writer)
        for b in batches
        for place, ids, mask, example, writer in zip(
            b.places, b.completions.ids, b.completions.mask, b.examples, b.writers, strict=True
        )
    ]
    return [row[1:] for row in sorted(rows)]


# ------------------------------------------------------------------------------------------ sources


SPLITS = [
    ({}, None, None, 8),
    ({"micro_batch": 3}, 5, None, 8),  # a prompt's completions in two sampling batches
    ({"micro_tokens": 60}, 1, None, 8),
    ({"micro_batch": 1}, None, 130_000, 8),
    ({"micro_tokens": 1}, 4, None, 4),  # two processes
]
"""(of train, rollout.batch, bytes to sample in, prompts of a process)."""


@pytest.mark.parametrize("source", ["student", "teacher", "mixture"])
def test_what_is_written_does_not_depend_on_the_split(source, kind, make_pair, make_config):
    """The same completions by the same writers, whatever the sampling batches, the micro-batches and the processes'
    shares."""
    shares = {"type": "mixture", "student": 2, "teacher": 1, "data": 1}
    rollout = {
        "max_new_tokens": 6,
        "completions_per_prompt": 2,
        "source": shares if source == "mixture" else source,
    }
    pair = make_pair(kind, rollout=rollout)
    rendered = pair.render(list(_world(kind, 8)))
    found = []
    for how, batch, sampling_bytes, share in SPLITS:
        train = {"steps": 1, "prompts_per_step": 8, **how}
        config = make_config(kind, rollout={**rollout, "batch": batch}, train=train)
        rows = []
        for start in range(0, 8, share):
            part = range(start, start + share)
            own = rendered[start : start + share]
            batches = collect(pair, recipe_of(config), own, part, 5, 3, sampling_bytes)
            rows += rows_of(batches)
        found.append(rows)
    assert all(each == found[0] for each in found[1:])
    assert len(found[0]) == 16
    tokens, _, writers = zip(*found[0], strict=True)
    assert len(set(map(tuple, tokens))) > 6  # two completions of a prompt are two draws
    assert set(writers) == ({"student", "teacher", "data"} if source == "mixture" else {source})


def _world(kind: str, n: int):
    from vlopd.data.shapes import ShapesDataset

    return ShapesDataset("train", n, seed=3, modality="image" if kind == "vlm" else "text")


def test_data_completions_are_the_answers(kind, make_pair, make_data):
    """Each is the answer's tokens and an end token; cut at the limit it has no end."""
    pair = make_pair(kind)
    examples = make_data(kind)
    whole = from_data(pair, examples, 30)
    assert pair.student.decode(whole) == [example.answer for example in examples]
    assert bool(whole.ended.all())
    for ids, mask in zip(whole.ids, whole.mask, strict=True):
        assert int(ids[mask][-1]) in pair.student.end_ids
    lengths = whole.mask.sum(1)
    cut = from_data(pair, examples, 4)
    assert cut.ids.shape[1] == 4
    assert torch.equal(cut.ended, lengths <= 4)
    assert torch.equal(cut.ids, whole.ids[:, :4])


def test_answers_that_cannot_be_written_are_refused(make_pair):
    """No answer, and an answer with an image's placeholder, are one line with the example's id."""
    pair = make_pair("vlm")
    with pytest.raises(DataError, match=r"'q1' has no answer.*data\.answer"):
        from_data(pair, [Example.ask("q1", "what is at top-left")], 8)
    with pytest.raises(DataError, match="'q2': its answer has the token '<image>'"):
        from_data(pair, [Example.ask("q2", "what is at top-left", answer="red <image>")], 8)


def test_the_teacher_writes_as_the_teacher(kind, make_pair, make_config, make_data):
    """Its completions are likelier under the teacher than under the student, and the student's the other way."""
    gaps = {}
    for source in ("student", "teacher"):
        rollout = {"max_new_tokens": 6, "source": source, "completions_per_prompt": 20}
        pair = make_pair(kind, rollout=rollout)
        config = make_config(kind, rollout=rollout, train={"steps": 1, "prompts_per_step": 6})
        (batch,) = collect(pair, recipe_of(config), pair.render(make_data(kind)), range(6), 1, 0)
        ours = pair.student_logprobs(batch.prompts, batch.completions)
        theirs = pair.teacher_logprobs(batch.examples, batch.completions)
        gaps[source] = float((ours - theirs).mean())
        own = ours if source == "student" else theirs
        sampled = batch.completions.logprobs[batch.completions.mask]
        torch.testing.assert_close(sampled, own, rtol=0, atol=1e-4)
    assert gaps["student"] > 0.1
    assert gaps["teacher"] < -0.1


def test_writers_come_in_their_shares():
    """Of 20,000 completions each writer has its share within 4 standard errors; other steps draw others."""
    shares = {"student": 3.0, "data": 1.0}
    drawn = choose_writers(shares, 10_000, 2, seed=1, step=0)
    error = (0.75 * 0.25 / 20_000) ** 0.5
    assert drawn.count("student") / 20_000 == pytest.approx(0.75, abs=4 * error)
    assert drawn != choose_writers(shares, 10_000, 2, seed=1, step=1)


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    ("rule", "answer", "right", "wrong"),
    [
        ("exact_match", "top-left : 1", " top-left : 1\n", "top-left : 2"),
        ("verdict_match", "top-left : 1", "center right : 1", "top-left : 2"),
        ("verdict_match", "red circle", "red circle", "red : circle blue"),
        ("answer_named", "São Tomé", "it is Sao Tome, I think", "it is São"),
        ("answer_named", "12", "so the result is 12.", "so the result is 120."),
        ("mathematics", r"\frac{\sqrt{3}}{2}", r"so \boxed{\sqrt{3}/2}", r"so \boxed{\sqrt{3}}"),
        ("mathematics", "(1,2)", r"\boxed{(1, 2)}", r"\boxed{(2, 1)}"),
        ("number", "3 x 4 = 12\n#### 1,012", "It is \\boxed{1012}.", "The answer is 1013."),
        ("yes_no", "Yes", "yes, there is", "No."),
    ],
)
def test_rules_tell_right_from_wrong(rule, answer, right, wrong):
    """Each rule gives 1 for a right completion and 0 for a wrong one."""
    example = Example.ask("q", "?", answer=answer)
    config = RewardConfig(rule=rule)
    assert reward(config, [example, example], [right, wrong]).tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="'x' has no answer"):
        RULES[rule](Example.ask("x", "?"), right)


def test_rewards_read_with_the_question_in_sight():
    """As evaluation does: what is asked for decides which of two statements counts."""
    counted = Example.ask("q", "How many girls are there?", answer="18")
    assert RULES["number"](counted, "There are 18 girls and 12 boys.") == 1
    offered = Example.ask("q", "Is it convergent or divergent?", answer=r"\text{divergent}")
    assert RULES["mathematics"](offered, "The series is divergent.") == 1
    there = Example.ask("q", "Is there a dog in the image?", answer="no")
    assert RULES["yes_no"](there, "There is a cat. I see no dog. There is a tree.") == 1


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("B", ["a dog", "a cat"]),
        ("(b)", ("a dog", "a cat")),
        ("a cat", ["a dog", "a cat"]),
        ("B", {"label": ["A", "B"], "text": ["a dog", "a cat"]}),
        ("B", {"A": "a dog", "B": "a cat"}),
        ("a cat", None),
    ],
)
def test_choices_are_rewarded_by_letter_or_text(answer, choices):
    """The choices are a column, or lettered lines of the question; the gold is a letter or a choice's text."""
    fields = {} if choices is None else {"choices": choices}
    question = "What is it?" if choices else "What is it?\nA. a dog\nB. a cat"
    example = Example.ask("q", question, answer=answer, fields=fields)
    said = ["The answer is B", r"\boxed{B}", "The answer is A", "a cat", "I cannot say"]
    assert [RULES["choice"](example, text) for text in said] == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rule", "answer", "message"),
    [
        ("mathematics", r"\frac{1}{2", "braces are not balanced"),
        ("number", "a dozen", "it is not a number"),
        ("yes_no", "maybe", "neither yes nor no"),
        ("choice", "B", "'q' has no choices"),
        ("choice", "Z", "it is no letter of A to B"),
    ],
)
def test_golds_that_a_rule_cannot_read_are_named(rule, answer, message):
    """In one line with the row, whatever the completion is, so that the rows' check before a run refuses them."""
    fields = {"choices": ["a dog", "a cat"]} if answer == "Z" else {}
    example = Example.ask("q", "?", answer=answer, fields=fields)
    with pytest.raises(DataError, match=message) as error:
        RULES[rule](example, "")
    assert "'q'" in str(error.value) and "\n" not in str(error.value)


def test_capitals_are_named_under_any_of_their_names():
    """The capitals' rule takes other names of the capital; questions on other things want their answer."""
    fields = {"kind": "capital", "capital": "Kyiv", "aliases": ("Kiev",)}
    asked = Example.ask("q", "?", answer="Kyiv", fields=fields)
    where = Example.ask("q", "?", answer="Europe", fields={"kind": "continent", "capital": "Kyiv"})
    texts = ["It is Kiev.", "It is Kyiv.", "Paris"]
    assert [RULES["capital_named"](asked, t) for t in texts] == [1, 1, 0]
    assert [RULES["capital_named"](where, t) for t in ("In Europe.", "Kyiv")] == [1, 0]
    with pytest.raises(DataError, match="'z' has no field 'capital'"):
        RULES["capital_named"](Example.ask("z", "?", answer="a"), "a")


def test_advantages_compare_completions_of_one_prompt():
    """(r - mean) / std within a group, or r - mean; 0 in a group that scores all the same."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)
    scaled = group_advantages(rewards, 4, "std")
    assert scaled.view(3, 4).sum(1).abs().max() < 1e-12
    expected = [(1 - 0.25) / 0.1875**0.5, *[-0.25 / 0.1875**0.5] * 3, 0, 0, 0, 0, 1, 1, -1, -1]
    torch.testing.assert_close(scaled, torch.tensor(expected, dtype=torch.float64))
    plain = group_advantages(rewards, 4, "none")
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, 0.5, 0.5, -0.5, -0.5]
    thirds = torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)
    assert float(thirds.std(correction=0)) > 0  # by rounding, which is not to be divided by
    assert group_advantages(thirds, 3, "std").tolist() == [0, 0, 0]


def test_groups_may_span_micro_batches(kind, make_pair, make_config, make_data):
    """Advantages are the same for micro-batches that cut through groups, and belong to their completions."""
    found = []
    for size in (None, 5):
        sections = {
            "rollout": {"max_new_tokens": 6, "completions_per_prompt": 4},
            "reward": {"rule": "answer_named"},
            "train": {"steps": 1, "prompts_per_step": 6, "micro_batch": size},
        }
        config = make_config(kind, **sections)
        pair = make_pair(kind, **sections)
        examples = [
            Example(e.id, e.messages, e.images, "red", e.fields) for e in make_data(kind)
        ]  # an answer that random models say now and then
        with torch.no_grad():
            head = pair.student.model.get_output_embeddings().weight
            head[pair.student.tokenizer.convert_tokens_to_ids("red")] *= 2
        batches = collect(pair, recipe_of(config), pair.render(examples), range(6), 2, 0)
        found.append(by_place(batches, [b.advantages for b in batches]))
        rewards = by_place(batches, [b.rewards for b in batches])
        torch.testing.assert_close(
            found[-1].double(), group_advantages(rewards, 4, "std"), rtol=1e-6, atol=1e-6
        )
        for b in batches:
            texts = pair.student.decode(b.completions)
            assert b.rewards.tolist() == [float("red" in text.split()) for text in texts]
        assert 0 < float(rewards.mean()) < 1
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"type": "nll"}}, "only repeats them"),
        ({"loss": {"type": "k1"}, "rollout": {"source": "data"}}, "student's own samples"),
        ({"reward": {"rule": "exact_match"}}, "completions_per_prompt"),
        (
            {
                "reward": {"rule": "exact_match"},
                "rollout": {"source": "teacher", "completions_per_prompt": 4},
            },
            "student's own samples",
        ),
        ({"rollout": {"source": {"type": "mixture"}}}, "share above 0"),
        ({"rollout": {"source": "web"}}, "'student', 'teacher', 'data'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(sections, message, make_config):
    """A loss or reward that needs the student's own samples, or groups, says so before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        make_config("llm", **sections)


def test_mixed_teachers_cannot_write(make_config, folders):
    """A geometric mean of teachers has no sampler; the config says so."""
    teacher = {"type": "mixed", "teachers": {"a": str(folders["llm", "teacher"])}}
    with pytest.raises(ValueError, match="cannot sample"):
        make_config("llm", teacher=teacher, rollout={"source": "teacher"})


def test_an_arm_has_sections_of_its_own(make_config):
    """They are put over the run's: a table of another type replaces, one of the same is merged."""
    config: ExperimentConfig = make_config(
        "llm",
        loss={"type": "jsd", "beta": 0.3},
        arms={
            "a": {"type": "distill", "seed": 1, "loss": {"type": "k1"}, "train": {"steps": 9}},
            "b": {"type": "distill", "seed": 1, "loss": {"normalised": True}},
            "c": {"type": "distill", "seed": 1},
        },
    )
    a, b, c = (recipe_of(config, name) for name in "abc")
    assert (a.loss.type, a.train.steps, a.train.prompts_per_step) == ("k1", 9, 4)
    assert (b.loss.beta, b.loss.normalised, b.train) == (0.3, True, config.train)
    assert all(section == getattr(config, name) for name, section in c)
    with pytest.raises(ValueError, match=r"arms\.a: unknown key 'loss\.betta'.*'beta'"):
        make_config("llm", arms={"a": {"type": "distill", "seed": 1, "loss": {"type": "jsd", "betta": 1}}})  # fmt: skip


def test_settings_that_bias_an_estimator_are_noted(make_config):
    """A sampling temperature, top-k or nucleus under k1 is allowed, and said; full divergences need no note."""
    for key, value in (("temperature", 0.7), ("top_k", 5), ("top_p", 0.9)):
        config = make_config("llm", loss={"type": "k1"}, rollout={key: value})
        assert any("unbiased" in note for note in recipe_of(config).notes)
        assert not recipe_of(make_config("llm", rollout={key: value})).notes
    assert not recipe_of(make_config("llm", loss={"type": "k1"})).notes
    config = make_config("llm", rollout={"source": "teacher"})
    assert "logprob_gap" in recipe_of(config).notes[0]
