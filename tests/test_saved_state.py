"""Saved states are written in the background: the same bytes, one at a time, and no error is lost."""

import resource
from threading import Event

import pytest
import torch
from safetensors import safe_open

from tests.conftest import recipe_of
from vlopd.data.load import load_data
from vlopd.errors import RunError
from vlopd.loop import distill
from vlopd.train.optimizers import build_optimizer
from vlopd.train.resume import BackgroundWriter, save_state
from vlopd.train.sparse import Trainable


@pytest.fixture
def state(make_pair, make_config):
    """(trainable, optimizer) after one step, some values masked."""
    model = make_pair("vlm", "bf16").student.model
    draws = torch.Generator().manual_seed(0)
    mask = {n: torch.rand(p.shape, generator=draws) < 0.3 for n, p in model.named_parameters()}
    trainable = Trainable(model, mask)
    optimizer = build_optimizer(make_config("vlm").optim, trainable)
    for slot in trainable.slots.values():
        slot.values.grad = torch.randn(slot.values.shape, generator=draws)
    optimizer.step(1e-3)
    return trainable, optimizer


def read(path):
    """Metadata, digest included (safetensors orders it by chance), and the bytes of every tensor."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        bits = {n: (t.dtype, t.shape, t.numpy().tobytes()) for n, t in tensors.items()}
        return file.metadata(), bits


def test_a_background_save_has_the_bytes_of_its_moment(state, tmp_path):
    """Values and moments that change right after the save are not in its file, which equals a foreground one."""
    trainable, optimizer = state
    save_state(tmp_path / "now", 3, trainable, optimizer, [], "x")
    with BackgroundWriter() as writer:
        folder = tmp_path / "later"
        save_state(folder, 3, trainable, optimizer, [], "x", writer=writer)
        for slot in trainable.slots.values():
            slot.values.data.zero_()
        optimizer.step(1.0)
    now, later = (read(tmp_path / name / "state.safetensors") for name in ("now", "later"))
    assert now == later


def test_a_full_disk_is_one_line_with_the_file(state, tmp_path):
    """The library's error names no file; nothing unfinished is left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*state\.safetensors \(.*\); make room"):
            save_state(tmp_path, 1, *state, [], "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_one_piece_of_work_at_a_time():
    """`start` returns before its work is done, and waits for the work before; the block waits for the last."""
    gate, order = Event(), []
    with BackgroundWriter() as writer:
        writer.start(lambda: order.append("first") if gate.wait(60) else None)
        order.append("meanwhile")
        gate.set()
        writer.start(lambda: order.append("second"))
        assert order[:2] == ["meanwhile", "first"]
    assert order == ["meanwhile", "first", "second"]


def test_the_last_write_is_waited_for_after_an_error():
    """An error of the block is raised as it is, after the work under way has ended."""
    gate, order = Event(), []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.start(lambda: order.append("written") if gate.wait(60) else None)
        gate.set()
        raise KeyboardInterrupt
    assert order == ["written"]


@pytest.mark.parametrize("save_every", [1, 2])
def test_a_write_that_fails_stops_the_training(save_every, make_pair, make_config, tmp_path):
    """An unwritable folder is the OSError of today, at the next save (after step 2) or the end of the training."""
    (tmp_path / "state").write_text("where a folder should be")
    train = {"steps": 3, "prompts_per_step": 2, "save_every": save_every}
    config = make_config("llm", train=train)
    data = load_data(config.data, 6, 1)
    with pytest.raises(FileExistsError, match="state"):
        distill(make_pair("llm"), data, recipe_of(config), tmp_path, 1, identity="x")
    steps = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    assert steps == (2 if save_every == 1 else 3)
    assert not list(tmp_path.glob(".unfinished-*"))
