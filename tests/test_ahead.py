"""Examples that are read and rendered ahead, and how a step's completions are put into batches."""

import json
import random
import threading
import time

import pytest

from tests.conftest import recipe_of
from vlopd.data.load import load_data
from vlopd.errors import DataError
from vlopd.loop import Hooks, distill
from vlopd.train.packing import micro_batches, packed
from vlopd.train.prefetch import ahead


def workers() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("vlopd-data")]


def test_one_step_is_made_ahead_and_an_error_waits_for_its_step():
    """Results come in order, at most one is made beyond the present, and what is raised is raised at its step."""
    made = []

    def make(step: int) -> int:
        if step == 3:
            raise DataError("row 3 is broken")
        made.append(step)
        return step * step

    stream = ahead(make, range(6))
    for step in range(3):
        assert next(stream) == step * step
        assert len(made) <= step + 2
    with pytest.raises(DataError, match="row 3 is broken"):
        next(stream)
    assert made == [0, 1, 2]
    assert not workers()


def test_closing_waits_for_the_step_in_work_and_makes_no_other():
    """A reader that is left early leaves no thread behind."""
    made = []
    stream = ahead(lambda step: time.sleep(0.02) or made.append(step), range(100))
    next(stream)
    stream.close()
    assert made in ([0], [0, 1])
    assert not workers()
    assert list(ahead(made.append, range(5, 5))) == []


class Watched:
    """Data that remembers who read what."""

    def __init__(self, examples):
        self.examples, self.reads = examples, []

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        self.reads.append((threading.current_thread().name, index))
        return self.examples[index]


def test_data_is_read_by_one_thread_and_once_a_step(kind, make_pair, make_config, tmp_path):
    """In training a single worker reads each prompt once; it ends with the training, also with one that is
    interrupted."""
    train = {"steps": 3, "prompts_per_step": 2, "keep_steps": [1], "micro_batch": 1}
    config = make_config(kind, train=train, rollout={"max_new_tokens": 3})
    data = Watched(list(load_data(config.data, 6, 1)))

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(make_pair(kind), data, recipe_of(config), tmp_path, hooks=Hooks(keep=interrupt))
    assert not workers()
    data.reads.clear()
    distill(make_pair(kind), data, recipe_of(config), tmp_path)
    assert not workers()
    in_worker = [index for name, index in data.reads if name.startswith("vlopd-data")]
    assert sorted(in_worker) == list(range(6))
    assert (
        len(data.reads) - len(in_worker) == 2
    )  # checks of the first row and the first prompt, before


def test_samples_do_not_depend_on_the_micro_batches(kind, make_pair, make_config, tmp_path):
    """samples.jsonl has the first completion of the first four prompts, however the step is split."""
    found = []
    for how in ({}, {"micro_batch": 3}):
        train = {"steps": 1, "prompts_per_step": 5, **how}
        sections = {"train": train, "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2}}
        config = make_config(kind, **sections)
        data = load_data(config.data, 5, 1)
        out = tmp_path / str(len(found))
        distill(make_pair(kind), data, recipe_of(config), out)
        found.append(
            [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        )
    assert len({row["id"] for row in found[0]}) == 4
    for row, other in zip(*found, strict=True):
        for name in ("student_logprobs", "teacher_logprobs"):
            assert other.pop(name) == pytest.approx(row.pop(name), abs=2e-4)
        assert other == row


def test_a_resumed_run_samples_in_the_memory_that_was_free(
    make_pair, make_config, tmp_path, monkeypatch, capsys
):
    """The free memory of the first start is in the state; what a later start finds free does not count. A step that
    does not fit is said once."""
    given = []

    def watched(*words, **named):
        given.append(words[6])  # sampling_bytes
        return collect(*words, **named)

    from vlopd.train.rollouts import collect

    monkeypatch.setattr("vlopd.loop.collect", watched)
    for steps, free in ((2, 1000), (4, 10**9)):
        monkeypatch.setattr("vlopd.loop.sampling_budget", lambda *_, free=free: free)
        train = {"steps": steps, "prompts_per_step": 2, "save_every": 1}
        config = make_config("llm", train=train, rollout={"max_new_tokens": 2})
        data = load_data(config.data, 8, 1)
        distill(make_pair("llm"), data, recipe_of(config), tmp_path, identity="x")
    assert given == [1000] * 4
    said = capsys.readouterr()
    assert (said.out + said.err).count("of 2 completions at least 1 are sampled at once") == 2


def test_batches_have_every_place_once_and_fit():
    """All at once in their order where they fit; else longest first, full, and one that fits nowhere alone."""
    draws, most = random.Random(0), 300
    for n in (1, 7, 60):
        lengths = {k: (draws.randint(1, 40), draws.randint(1, 90)) for k in range(n)}
        found = packed(lengths, lambda rows, prompt, new: rows * (prompt + new) <= most)
        assert sorted(place for part in found for place in part) == list(range(n))
        sizes = [sum(lengths[place]) for each in found for place in each]
        assert len(found) == 1 or sizes == sorted(sizes, reverse=True)
        for part, after in zip(found, [*found[1:], None], strict=True):
            width = [max(lengths[place][axis] for place in part) for axis in (0, 1)]
            assert len(part) == 1 or len(part) * sum(width) <= most
            if after is not None:  # the next one would have been too much
                wider = [max(w, lengths[after[0]][axis]) for axis, w in enumerate(width)]
                assert (len(part) + 1) * sum(wider) > most
        assert packed(lengths, lambda *_: True) == [list(range(n))]


def test_micro_batches_by_completions_or_tokens(make_config):
    """Sorted by length, ties in order; one completion alone where micro_tokens hold no whole one; not both settings."""
    lengths = [(4, 2), (4, 6), (4, 2), (4, 5)]

    def parts(**how):
        train = make_config("llm", train={"steps": 1, "prompts_per_step": 4, **how}).train
        return micro_batches(train, lengths)

    assert parts() == parts(micro_batch=4) == parts(micro_tokens=40) == [[0, 1, 2, 3]]
    assert parts(micro_batch=3) == [[1, 3, 0], [2]]
    assert parts(micro_tokens=20) == [[1, 3], [0, 2]]
    assert parts(micro_tokens=1) == [[1], [3], [0], [2]]
    with pytest.raises(ValueError, match="micro_batch = 2 and micro_tokens = 9: give one"):
        parts(micro_batch=2, micro_tokens=9)
