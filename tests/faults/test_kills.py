"""Killed at any moment, an experiment ends as if it had not been: same command, same bytes, nothing left over."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.commands import Fault
from tests.faults.experiment import experiment_of, moments, stop_others, wait_for  # noqa: F401
from vlopd.run.checksums import Checksums

pytestmark = pytest.mark.slow
MOST = 2000
"""Faults after which an experiment must have ended."""


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_killed_at_random_moments(kind, experiment_of, record_property):  # noqa: F811
    """kill -9 at 20 moments spread over the whole experiment: run again, it leaves what an undisturbed run leaves."""
    experiment = experiment_of(kind)

    def disturb(case: tuple[int, float]) -> bool:
        k, moment = case
        name = f"killed-{k}"
        (command,) = experiment.start(name)
        while not command.kill_at(moment):  # no two runs take the same time
            experiment.remove(name)
            moment *= 0.8
            (command,) = experiment.start(name)
        killed = command.end() == -signal.SIGKILL
        experiment.finish(name)
        experiment.remove(name)
        return killed

    cases = list(enumerate(moments(20, 0.95 * experiment.seconds[0], kind)))
    with ThreadPoolExecutor(2) as pool:
        killed = sum(pool.map(disturb, cases))
    record_property("figures", f"kills, {kind}: {killed} of 20")
    assert killed == 20


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_killed_under_two_processes(kind, experiment_of, record_property):  # noqa: F811
    """One of two processes killed at 6 moments of its work, the other ended as by torchrun: as with one process."""
    experiment = experiment_of(kind, 2)
    killed = 0
    for k, part in enumerate(moments(6, 0.9, f"two {kind}")):
        name, rank = f"killed-{k}", k % 2
        commands = experiment.start(name)
        killed += commands[rank].kill_at(part * experiment.seconds[rank])
        codes = stop_others(commands)
        assert codes[rank] == -signal.SIGKILL
        experiment.finish(name)
        experiment.remove(name)
    record_property("figures", f"kills of one of two processes, {kind}: {killed} of 6")
    assert killed == 6


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_killed_before_every_write(kind, experiment_of, record_property):  # noqa: F811
    """Killed before each file that is opened, flushed, renamed or removed, one after another, the experiment ends, and
    no stage that had ended is lost on the way."""
    experiment = experiment_of(kind)
    run = experiment.folder / "killed"
    fault = Fault(run, experiment.folder / "seen")
    done: set[str] = set()
    for kills in range(MOST):  # noqa: B007
        (command,) = experiment.start("killed", fault=fault)
        code = command.end()
        now = set(Checksums(run).records())
        assert done <= now, done - now
        done = now
        if code == 0:
            break
        assert code == -signal.SIGKILL, command.said
    assert code == 0
    experiment.finish("killed")
    record_property("figures", f"kills at writes, {kind}: {kills}")
    assert kills > 200


def test_slow_renames_and_two_jobs(experiment_of):  # noqa: F811
    """Two jobs of one command and folder, with slow renames: one makes an artifact, the other waits, one result."""
    experiment = experiment_of("llm")
    run = experiment.folder / "shared"
    fault = Fault(run, experiment.folder / "none", "delay")
    first, second = (
        *experiment.start("shared", fault=fault),
        *experiment.start("shared", fault=fault, log="second"),
    )
    assert first.end() == 0, first.said
    assert second.end() == 0, second.said
    experiment.compare("shared")
    waits = [line for each in (first, second) for line in each.lines if "waiting for" in line]
    assert waits and all("locked by process" in line for line in waits)


def test_the_lock_of_a_killed_holder_is_free(experiment_of):  # noqa: F811
    """A job that waits for an arm says for whom in one line, and goes on when that process is killed."""
    experiment = experiment_of("llm")
    lock = experiment.folder / "held" / ".locks" / "arms--full"
    (holder,) = experiment.start("held")
    wait_for(lambda: lock.exists() and lock.read_text())
    os.kill(holder.pid, signal.SIGSTOP)
    (other,) = experiment.start("held", log="other")
    wait_for(lambda: f"locked by process {holder.pid}" in other.said)
    os.kill(holder.pid, signal.SIGKILL)
    assert other.end() == 0, other.said
    experiment.compare("held")
