"""SIGTERM and SIGINT: the step ends, the state is saved, one line says how to go on, and so does the same command."""

import os
import signal
import time

import pytest

from tests.conftest import recipe_of
from tests.faults.experiment import experiment_of, moments, results_of, wait_for  # noqa: F401
from vlopd import interrupts
from vlopd.data.load import load_data
from vlopd.errors import Interrupted
from vlopd.files import read_jsonl
from vlopd.loop import Hooks, distill

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
NONE = Hooks()
GO_ON = "run the same command again to go on"


@pytest.fixture
def listening():
    """The handlers of the command line."""
    with interrupts.heeded():
        yield


def test_a_signal_ends_the_step_and_saves_the_state(
    kind, make_pair, make_config, tmp_path, listening
):
    """A training that gets SIGTERM in its second step ends with it, saved, and goes on to the weights of a whole one;
    outside of stages a signal is a KeyboardInterrupt."""
    during = {"tasks": ["shapes_text"], "every": 1, "limit": 1}
    config = make_config(kind, train={"steps": 3, "prompts_per_step": 2, "save_every": 100})
    data = load_data(config.data, 6, 1)

    def train(name: str, hooks: Hooks = NONE):
        made = distill(
            make_pair(kind), data, recipe_of(config), tmp_path / name, 1, hooks=hooks, identity="x"
        )
        return {name: value.clone() for name, value in made.trainable.state().items()}

    def ask(student) -> dict:
        begun = (tmp_path / "stopped" / "metrics.jsonl").read_text()
        if begun and interrupts._holds and not interrupts.asked():
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with (
        pytest.raises(Interrupted, match=f"stopped: stopped after step 2 of 3; {GO_ON}"),
        interrupts.held("arms/stopped"),
    ):
        train("stopped", Hooks(evaluate=ask, evaluate_every=during["every"]))
    assert interrupts.exit_code() == 75
    assert len(read_jsonl(tmp_path / "stopped" / "metrics.jsonl")) == 2
    interrupts._received = None
    resumed, whole = train("stopped"), train("whole")
    assert all(value.equal(resumed[name]) for name, value in whole.items())
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert interrupts.exit_code() == 130


def test_a_notebook_is_left_alone():
    """Without the command line's handlers nothing listens, and work that would hold a signal does nothing else."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts.held("work"):
        assert not interrupts.asked() and signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_signals_at_random_moments(experiment_of, record_property):  # noqa: F811
    """10 signals spread over an experiment: exit code 75 or 130, one line that says how to go on, and the same bytes
    in the end."""
    stopped = 0
    for k, part in enumerate(moments(10, 0.9, "signals")):
        experiment = experiment_of("vlm" if k % 2 else "llm")
        number, name = list(CODES)[k // 2 % 2], f"stopped-{k}"
        (command,) = experiment.start(name)
        assert command.kill_at(part * experiment.seconds[0], number)
        assert command.end() == CODES[number], (part, command.end(), command.said)
        assert command.lines and command.lines[-1].endswith(GO_ON), command.said
        assert len([line for line in command.lines if "stops at the next" not in line]) == 1
        assert "Traceback" not in command.said
        experiment.finish(name)
        experiment.remove(name)
        stopped += 1
    record_property("figures", f"signals: {stopped} of 10")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_in_training_saves_the_step(number, processes, experiment_of):  # noqa: F811
    """Without a state on disk, a signal to one process (of two, to the second) ends all at one step, which is saved;
    the command goes on from it."""
    experiment = experiment_of("llm", processes)
    words = ("train.steps=30", "train.save_every=100", "--until", "arms", "--arm", "full")
    for command in experiment.start("whole", *words):
        assert command.end() == 0, command.said
    name = f"signalled-{number.name}"
    run = experiment.folder / name
    log = run / "arms" / "full" / "metrics.jsonl"
    commands = experiment.start(name, *words)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2)
    os.kill(commands[-1].pid, number)
    codes = [command.end() for command in commands]
    # of the others too, which did not get it
    assert codes[-1] == CODES[number] and set(codes[:-1]) <= {75}
    steps = len(read_jsonl(log))
    assert 3 <= steps < 30 and f"stopped after step {steps} of 30; {GO_ON}" in commands[0].lines[-1]
    assert (run / "arms" / "full" / "state" / "state.safetensors").exists()
    (again, *others) = experiment.start(name, *words, log="again")
    assert again.end() == 0, again.said
    assert all(command.end() == 0 for command in others)
    assert f"{steps}/30" not in again.said
    assert results_of(run) == results_of(experiment.folder / "whole")


@pytest.mark.slow
def test_a_second_signal_ends_at_once(experiment_of):  # noqa: F811
    """Two signals within one step end the process by the second; the command goes on as after a kill."""
    experiment = experiment_of("llm")
    log = experiment.folder / "twice" / "arms" / "full" / "metrics.jsonl"
    (command,) = experiment.start("twice", before=slow_steps)
    wait_for(lambda: log.exists() and log.read_text())
    os.kill(command.pid, signal.SIGTERM)
    wait_for(lambda: "stops at the next" in command.said)
    os.kill(command.pid, signal.SIGTERM)
    assert command.end() == -signal.SIGTERM
    experiment.finish("twice")


def slow_steps() -> None:
    """Makes each step of this process take a second."""
    from vlopd.train import log

    step = log.TrainingLog.step

    def slow(self, row) -> None:
        step(self, row)
        for _ in range(100):
            time.sleep(0.01)

    log.TrainingLog.step = slow
