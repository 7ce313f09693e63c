"""Disks that are full, broken, read-only or gone, and clocks that go back: one line with file and remedy."""

import codecs
import errno
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.faults.commands import Fault, call
from tests.faults.experiment import experiment_of, left_over, moments  # noqa: F401
from vlopd.errors import CannotWrite
from vlopd.files import whole_file, whole_folder
from vlopd.run.checksums import Checksums

MOST = 2000
"""Faults after which an experiment must have ended."""
REMEDY = {
    errno.ENOSPC: "make room",
    errno.EIO: "check the disk",
    errno.EROFS: "make its folder writable",
}


@pytest.mark.parametrize("code", REMEDY)
def test_errors_of_writing_name_the_file(code, tmp_path):
    """An error of the system, by Python or by a library that names no file, has the file, reason and remedy in a line;
    one of another file passes, and nothing unfinished stays."""
    path = tmp_path / "a.json"
    of_a_library = f"Error while serializing: I/O error: (os error {code})"
    for error in (OSError(code, "x"), SafetensorError(of_a_library), Exception(of_a_library)):
        for write in (whole_file, whole_folder):
            with pytest.raises(CannotWrite) as raised, write(path):
                raise error
            assert str(raised.value).startswith(
                f"cannot write {path} ({os.strerror(code)}); {REMEDY[code]}"
            )
    with pytest.raises(OSError, match="other") as other, whole_file(path):
        raise OSError(code, "x", str(tmp_path / "other" / "b"))
    assert not isinstance(other.value, CannotWrite)
    with pytest.raises(ValueError, match="not of the system"), whole_file(path):
        raise ValueError("not of the system")
    assert not list(tmp_path.iterdir())


def check_refusal(command, code: int, run: str) -> None:
    """Exit code 2, and one line with a file of the run and the remedy."""
    assert command.end() == 2, command.said
    (line,) = command.lines
    assert f"{run}/" in line and REMEDY[code] in line and "run the same command again" in line, line
    assert "Traceback" not in command.said
    assert ".unfinished" not in line, line


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_every_write_fails_once(kind, code, experiment_of, record_property):  # noqa: F811
    """Each file that is opened, written by a library, flushed, renamed, and each folder that is made, fails once: one
    line each time, no stage that had ended is lost, and the experiment ends with the bytes of an undisturbed one."""
    experiment = experiment_of(kind)
    name = f"failed-{code}"
    run = experiment.folder / name
    fault = Fault(run, experiment.folder / f"seen-{code}", "error", code)
    done: set[str] = set()
    for failures in range(MOST):  # noqa: B007
        (command,) = experiment.start(name, fault=fault)
        ended = command.end() == 0
        now = set(Checksums(run).records())
        assert done <= now, done - now
        assert not [p for p in left_over(run) if ".unfinished-" in p]
        done = now
        if ended:
            break
        check_refusal(command, code, name)
    assert ended
    experiment.finish(name)
    experiment.remove(name)
    record_property(
        "figures", f"writes that failed with {errno.errorcode[code]}, {kind}: {failures}"
    )
    assert failures > 100


def mount(*words: object) -> bool:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True)
    return done.returncode == 0


@contextmanager
def mounted(folder: Path, *words: object):
    """A folder with something mounted on it; skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if not mount(*words, folder):
        pytest.skip("cannot mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_a_disk_that_fills_up(kind, experiment_of, record_property):  # noqa: F811
    """A real disk with a little more room after each failure: one line each time, and in the end the same bytes."""
    experiment = experiment_of(kind)
    run, size, failures = experiment.folder / "full", 16, 0
    with mounted(run, "-t", "tmpfs", "-o", f"size={size}k", "none"):
        while True:
            (command,) = experiment.start("full")
            if command.end() == 0:
                break
            check_refusal(command, errno.ENOSPC, "full")
            failures, size = failures + 1, size + 200
            assert mount("-o", f"remount,size={size}k", run)
        experiment.finish("full")
    record_property("figures", f"full disks, {kind}: {failures}")
    assert failures > 20


@pytest.mark.slow
def test_a_read_only_run(experiment_of, tmp_path):  # noqa: F811
    """A finished run on a read-only disk is shown and verified, reported to another place, and compared with others;
    what must write into it is refused in a line."""
    experiment = experiment_of("llm")
    run = tmp_path / "run"
    shutil.copytree(experiment.folder / "first", tmp_path / "source")
    with mounted(run, "--bind", tmp_path / "source"):
        assert mount("-o", "remount,ro,bind", run)
        for words in (
            "show run",
            "verify run",
            "report run --out reported",
            "compare run/evals/base run/evals/full --out compared",
            "paper run",
            "mask show run/masks/top.safetensors",
        ):
            code, command = call(
                words.split(), tmp_path, tmp_path / "log", environment=experiment.environment
            )
            assert code == 0, (words, command.said)
        assert (tmp_path / "reported" / "report.html").stat().st_size > 100_000
        for words in ("report run", "eval run", "geometry run", "run run"):
            code, command = call(
                words.split(), tmp_path, tmp_path / "log", environment=experiment.environment
            )
            assert code == 2, (words, command.said)
            (line,) = command.lines
            assert (
                "run/" in line
                and "Read-only file system" in line
                and "make its folder writable" in line
            )


@pytest.mark.slow
def test_another_users_run(experiment_of, tmp_path):  # noqa: F811
    """A run in folders that this user may only read is shown, reported elsewhere and compared."""
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    experiment = experiment_of("llm")
    shutil.copytree(experiment.folder / "first", tmp_path / "run")
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o055)
    own = tmp_path / "own"
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    for words in (
        "show ../run",
        "report ../run --out reported",
        "compare ../run/evals/base ../run/evals/full --out compared",
    ):
        environment = {"VLOPD_CACHE": str(own / "cache"), "HOME": str(own)}
        code, command = call(
            words.split(), own, tmp_path / "log", environment=environment, before=become_nobody
        )
        assert code == 0, (words, command.said)


def become_nobody() -> None:
    codecs.lookup("unicode-escape")  # of Python's library, which that user may not read
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.slow
def test_a_clock_that_goes_back(experiment_of):  # noqa: F811
    """With a clock that runs backwards, a run that is killed and one that goes on end with the same bytes."""
    experiment = experiment_of("llm")
    (command,) = experiment.start("clock", before=turn_back)
    assert command.kill_at(experiment.seconds[0] / 2) and command.end() == -signal.SIGKILL
    experiment.finish("clock", before=turn_back)


def turn_back() -> None:
    """Makes this process's clock run backwards from a year ago."""
    seconds, nanoseconds, start = time.time, time.time_ns, time.time()
    year = 365 * 24 * 3600
    time.time = lambda: 2 * start - seconds() - year
    time.time_ns = lambda: int(2e9 * start) - nanoseconds() - year * 10**9


@pytest.mark.slow
def test_a_run_that_is_removed_under_way(experiment_of, record_property):  # noqa: F811
    """A folder that is removed during the run is one line, and the same command starts anew."""
    experiment = experiment_of("llm")
    stopped = 0
    for k, moment in enumerate(moments(5, 0.8 * experiment.seconds[0], "removed")):
        name = f"removed-{k}"
        (command,) = experiment.start(name)
        assert command.kill_at(moment, signal.SIGSTOP)
        shutil.rmtree(experiment.folder / name)
        os.kill(command.pid, signal.SIGCONT)
        if command.end() != 0:  # else it had all it needed in memory
            (line,) = command.lines
            assert command.end() == 2 and name in line and "Traceback" not in command.said, (
                command.said
            )
            stopped += 1
        experiment.finish(name)
        experiment.remove(name)
    record_property("figures", f"removed folders: {stopped} of 5 in one line")
    assert stopped
