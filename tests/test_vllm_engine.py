"""vLLM as teacher and sampler: the numbers of the model here, and nothing is trained on a doubtful answer.

`fake` is a server of ours that speaks vLLM's API; scripts/test-engines runs the tests with `engine` with vLLM itself.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from aiohttp import web

from tests.conftest import KINDS, build
from tests.families import vlms
from tests.served import Misbehaving, running
from tests.vllm_server import FakeVllm, Worker, application
from vlopd import seeding
from vlopd.config.engines import VllmEngine, VllmRollout
from vlopd.config.objective import RolloutConfig
from vlopd.config.recipe import Recipe
from vlopd.config.signal_nulls import SignalNull
from vlopd.engines import client as clients
from vlopd.engines import kept, vllm_sampler
from vlopd.engines.client import EngineError
from vlopd.engines.process import started_vllm
from vlopd.engines.vllm import connected
from vlopd.engines.vllm_sampler import VllmSampler
from vlopd.engines.wire import TOKEN
from vlopd.engines.worker.vlopd_worker import WeightCopy
from vlopd.errors import ConfigError
from vlopd.loop import Hooks, Trained, distill
from vlopd.models.load import load
from vlopd.train.generation import sample
from vlopd.train.pair import ModelPair, load_pair
from vlopd.types import Completions

PYTHON = os.environ.get("VLOPD_VLLM_PYTHON")
"""Of an environment with vLLM."""
REAL = pytest.param(
    "vllm", marks=[pytest.mark.engines, pytest.mark.skipif(not PYTHON, reason="no vLLM")]
)
FAST = {"timeout_seconds": 20, "attempts": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses between attempts take no time."""
    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)


# ----------------------------------------------------------------------------------- models and servers

Servers = dict[tuple[str, str], Any]
"""(kind, role) -> a server with a `url`."""


def build_wide(kind: str, role: str, folder: Path) -> Path:
    """Saves a tiny model whose heads are as wide as vLLM's attention on CPUs wants them."""
    width = 128 if role == "teacher" else 64
    if kind == "llm":
        return build(kind, role, folder, torch.float32, width)
    axes = [width // 16, width * 3 // 32, width * 3 // 32]
    text = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=axes),
    )
    vision = dict(embed_dim=64, hidden_size=width)
    processors = hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor
    vlms.save(vlms.qwen("qwen2_vl", *processors, vision, text), folder, role == "teacher")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """{(kind, role): folder} of models that vLLM can hold."""
    root = tmp_path_factory.mktemp("wide")
    return {
        (kind, role): build_wide(kind, role, root / f"{kind}-{role}")
        for kind in KINDS
        for role in ("student", "teacher")
    }


@pytest.fixture(scope="module")
def fakes(folders) -> Iterator[Servers]:
    """A server of ours for each model, in fp32."""
    servers: Servers = {}
    stack = []
    for key, folder in folders.items():
        its = FakeVllm(load(str(folder), torch.float32))
        context = running(application(its), its)
        servers[key] = context.__enter__()
        stack.append(context)
    yield servers
    for context in stack:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def reals(wide) -> Iterator[Servers]:
    """vLLM of each model, started when it is first asked for, with the extension; of one token."""

    class Starting(dict):
        def __missing__(self, key):
            engine = VllmEngine(type="vllm", python=PYTHON, arguments=["--enforce-eager"])
            words = ["--worker-extension-cls", "vlopd_worker.Extension", "--max-model-len", "128"]
            self[key] = started_vllm(engine, str(wide[key]), torch.float32, words)
            return self[key]

    yield Starting()


class Setting:
    """A place where models are held: their folders, and addresses of their servers."""

    def __init__(self, folders, servers: Servers, monkeypatch):
        self.folders, self.servers, self.monkeypatch = folders, servers, monkeypatch

    def engine(self, kind: str, role: str, **settings) -> dict[str, Any]:
        its = self.servers[kind, role]
        if isinstance(its, Misbehaving):
            its.fault, its.held.is_blind = None, False
            its.held.restart()
        else:
            self.monkeypatch.setenv(TOKEN, its.token)
            settings = {"timeout_seconds": 120, **settings}
        return {"type": "vllm", "url": its.url, **FAST, **settings}

    def pair(self, kind: str, there: bool = False, **settings) -> ModelPair:
        """Student and teacher; the teacher in vLLM if `there`."""
        teacher: dict[str, Any] = {"model": str(self.folders[kind, "teacher"])}
        if there:
            teacher["engine"] = self.engine(kind, "teacher", **settings)
        student = str(self.folders[kind, "student"])
        return load_pair(student, teacher, compute="fp32", device="cpu")

    def sampler(self, kind: str) -> VllmSampler:
        """The student's checkpoint as a sampler."""
        student = load(str(self.folders[kind, "student"]), torch.float32)
        engine = VllmRollout(**self.engine(kind, "student"))
        its = VllmSampler(connected(engine, str(engine.url)), "none", student)
        its.client.follows, its.client.version = False, None
        return its


@pytest.fixture
def fake(folders, fakes, monkeypatch) -> Setting:
    return Setting(folders, fakes, monkeypatch)


@pytest.fixture(params=["fake", REAL])
def engine(request, monkeypatch) -> Setting:
    """Our server, and vLLM where scripts/test-engines names one."""
    names = ("folders", "fakes") if request.param == "fake" else ("wide", "reals")
    folders, servers = (request.getfixturevalue(name) for name in names)
    return Setting(folders, servers, monkeypatch)


def completions_of(pair: ModelPair, data, tokens: int = 6) -> Completions:
    uniforms = seeding.uniforms(len(data), tokens, "test")
    prompts = pair.student.render(data)
    return pair.sample(prompts, RolloutConfig(max_new_tokens=tokens), uniforms)


def blanked(data):
    return [replace(e, images=tuple(i.point(lambda _: 0) for i in e.images)) for e in data]


# --------------------------------------------------------------------------------- the numbers of a teacher

TOP = {"type": "teacher_top_k", "k": 8}
LOSSES: dict[str, dict[str, Any]] = {
    "k1": {"type": "k1"},
    "k2": {"type": "k2"},
    "forward": {"type": "forward_kl", "support": TOP},
    "renormalised": {"type": "reverse_kl", "support": {**TOP, "tail": "renormalise"}},
    "no tail": {"type": "jsd", "support": {**TOP, "tail": "none"}},
    "student at 2": {"type": "reverse_kl", "support": TOP, "student_temperature": 2.0},
    "some tokens": {"type": "k3", "tokens": {"by": "student_entropy", "fraction": 0.5}},
}


def test_a_teachers_logprobs_are_those_here(kind, engine, make_data):
    """Log-probs of the sampled tokens are within 1e-5 of those of the same weights in this process; every token's own
    of 3 likeliest too, and they change with the picture."""
    here, there, data = engine.pair(kind), engine.pair(kind, there=True), make_data(kind)
    completions = completions_of(here, data)
    ours, theirs = (its.teacher_logprobs(data, completions) for its in (here, there))
    print(f"\nteacher {kind}: {float((ours - theirs).abs().max()):.2g}")
    assert float((ours - theirs).abs().max()) < 1e-5
    teacher = there.teachers[0]
    scores = replace(teacher, top_k=3).hidden(data, completions)
    logits = here.teacher_logits(data, completions)
    top = logits.log_softmax(-1).topk(3)
    assert torch.equal(scores[:, 1:4].long(), top.indices)
    assert float((scores[:, 5:] - top.values).abs().max()) < 1e-5
    if kind == "vlm":
        assert not torch.allclose(
            theirs, there.teacher_logprobs(blanked(data), completions), atol=1e-3
        )


def test_losses_of_few_logprobs_are_those_here(engine, make_data):
    """Values and gradients of the losses that vLLM's log-probs are enough for are those of the whole distribution;
    diagnostics that need it are absent."""
    data, pairs = make_data("llm", 4), [engine.pair("llm", there) for there in (False, True)]
    completions = completions_of(pairs[0], data)
    for settings in LOSSES.values():
        loss, found = Recipe(train={"steps": 1, "prompts_per_step": 2}, loss=settings).loss, []
        for pair in pairs:
            pair.student.model.zero_grad()
            tokens = pair.divergence(loss, data, pair.student.render(data), completions)
            tokens.loss.sum().backward()
            gradients = {n: p.grad for n, p in pair.student.model.named_parameters()}
            found.append((tokens, gradients))
        (ours, here), (theirs, there) = found
        torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-4)
        for name, gradient in here.items():
            torch.testing.assert_close(gradient, there[name], atol=2e-4, rtol=1e-3)
        assert ours.reverse_kl is not None
        absent = (theirs.reverse_kl, theirs.teacher_entropy, theirs.top_overlap)
        assert absent == (None, None, None)


def test_training_with_a_teacher_in_vllm(kind, engine, make_data, tmp_path):
    """Steps end at the weights of the teacher here but for rounding; `kl` is null, not made up."""
    train, loss = {"steps": 2, "prompts_per_step": 3}, LOSSES["forward"]
    rollout = {"max_new_tokens": 6}
    data, made = make_data(kind, 6), []
    for there in (False, True):
        recipe = Recipe(train=train, loss=loss, rollout=rollout, optim={"type": "sgd"})
        made.append(distill(engine.pair(kind, there), data, recipe, tmp_path / str(there)))
    here, theirs = (its.student.model.state_dict() for its in made)
    for name in here:
        torch.testing.assert_close(here[name], theirs[name], atol=1e-5, rtol=1e-4)
    assert made[1].metrics.kl.isna().all() and not made[0].metrics.kl.isna().any()


# --------------------------------------------------------------------------------------------- sampling


def test_a_samples_logprobs_are_those_here(kind, engine, make_data):
    """Greedy completions are those of this process; sampled ones have the log-probs that the weights here give them,
    the same for the same random numbers, others for others; a placeholder is never sampled."""
    sampler, data = engine.sampler(kind), make_data(kind)
    pair = engine.pair(kind)
    student, prompts = pair.student, pair.student.render(data)
    columns, where = student.vocabulary_rows, {"device": student.device, "examples": data}
    greedy = (8, 0.0, torch.zeros(len(data), 8), columns)
    ours = sample(student, prompts, *greedy)
    theirs = sampler.sample(prompts, *greedy, **where)
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.ended, theirs.ended)
    assert float((ours.logprobs - theirs.logprobs).abs().max()) < 1e-5
    one, two, three = (
        sampler.sample(prompts, 8, 1.0, seeding.uniforms(len(data), 8, name), columns, **where)
        for name in ("a", "a", "b")
    )
    assert torch.equal(one.ids, two.ids) and one.ids.tolist() != three.ids.tolist()
    again = pair.student_logprobs(prompts, three)
    print(f"\nsampled {kind}: {float((three.logprobs[three.mask] - again).abs().max()):.2g}")
    assert float((three.logprobs[three.mask] - again).abs().max()) < 1e-5
    banned = torch.tensor(student.unsampleable_ids)
    assert not torch.isin(three.ids[three.mask], banned).any()
    rows = [0, 0, 1]
    uniforms = seeding.uniforms(3, 8, "a")
    several = sampler.sample(prompts, 8, 1.0, uniforms, columns, 5, 0.9, rows=rows, **where)
    assert len(several) == 3


# ----------------------------------------------------------------------------- weights that follow the training


def fifth(pair: ModelPair) -> dict[str, torch.Tensor]:
    """A mask of every fifth coordinate of the matrices."""
    marks = {}
    for name, parameter in pair.student.model.named_parameters():
        if parameter.ndim > 1:
            marks[name] = torch.zeros(parameter.numel(), dtype=torch.bool)
            marks[name][::5] = True
            marks[name] = marks[name].view_as(parameter)
    return marks


def trained(
    setting: Setting, kind: str, data, out: Path, masked=True, steps=3, lag=0, hooks=None,
    identity=None, train=None, **settings,
) -> Trained:  # fmt: skip
    """A training whose student samples in vLLM."""
    pair = setting.pair(kind)
    engine = setting.engine(kind, "student", **settings)
    recipe = Recipe(
        train={"steps": steps, "prompts_per_step": 2, **(train or {})},
        rollout={"max_new_tokens": 4, "engine": engine, "max_lag": lag},
        optim={"type": "adamw", "learning_rate": 1e-2},
    )
    mask = fifth(pair) if masked else None
    return distill(pair, data, recipe, out, mask=mask, hooks=hooks or Hooks(), identity=identity)


@pytest.mark.parametrize(
    "how, kind", [("masked", "llm"), ("masked", "vlm"), ("dense", "llm"), ("whole", "vlm")]
)
def test_weights_follow_the_training(how, kind, engine, make_data, tmp_path):
    """After every update vLLM's log-probs are those of the training's weights within 1e-4; of a mask, after the first
    update, only its values are sent; completions have the log-probs of the weights that train on them."""
    is_real = not isinstance(engine.servers[kind, "student"], Misbehaving)
    steps = 20 if is_real and how == "masked" else 3
    settings = {"weights": "whole"} if how == "whole" else {}
    data = make_data(kind, 16)
    made = trained(engine, kind, data, tmp_path, how != "dense", steps, **settings)
    rows = made.metrics
    assert len(rows) == steps and rows.engine_gap.notna().sum() == steps - 1
    assert rows.engine_gap.max() < 1e-4 and rows.logprob_gap_max.max() < 1e-4
    size = sum(p.nbytes for p in made.student.model.parameters())
    density = 1.0 if how == "whole" else made.trainable.count / made.trainable.total
    assert 0 < rows.sent_bytes.max() <= 1.05 * density * size
    base = load(str(engine.folders[kind, "student"]), torch.float32).model.state_dict()
    moved = [not torch.equal(base[n], p) for n, p in made.student.model.state_dict().items()]
    assert any(moved)
    print(
        f"\n{how} {kind}: largest gap {rows.engine_gap.max():.2g}, {rows.logprob_gap_max.max():.2g}"
    )


def stale(worker, whole, tensors):
    """Says that it took the weights, and keeps the old ones."""


def partial(worker, whole, tensors):
    whole(weights_iterator=tensors[::2])


def wrong(worker, whole, tensors):
    whole(weights_iterator=[(name, tensor * 1.01) for name, tensor in tensors])


RELOADING = {"stale": stale, "partial": partial, "wrong": wrong}
PATCHES = {
    "stale": lambda apply, update: None,
    "partial": lambda apply, update: apply(dict(list(update.items())[:2])),
    "wrong": lambda apply, update: apply(
        {n: t * 1.001 if t.is_floating_point() else t for n, t in update.items()}
    ),
}


@pytest.mark.parametrize("fault", RELOADING)
def test_weights_that_vllm_did_not_load_are_noticed(fault, fake, make_data, tmp_path, monkeypatch):
    """A copy that is right and was loaded as another one is caught by the log-probs, and loaded again."""
    reload, calls = Worker.reload_weights, []

    def faulty(worker, weights_iterator):
        tensors = list(weights_iterator)
        calls.append(1)
        if len(calls) == 3:
            RELOADING[fault](worker, lambda **its: reload(worker, **its), tensors)
        else:
            reload(worker, weights_iterator=tensors)

    monkeypatch.setattr(Worker, "reload_weights", faulty)
    made = trained(fake, "llm", make_data("llm", 8), tmp_path)
    assert made.metrics.engine_gap.max() < 1e-4 and len(calls) == 4


@pytest.mark.parametrize("fault", PATCHES)
def test_a_patch_that_a_worker_did_not_merge_is_noticed(
    fault, fake, make_data, tmp_path, monkeypatch
):
    """A copy that lacks a bit of an update is caught by its checksum, and made anew, at every update if need be."""
    apply = WeightCopy.apply

    def faulty(copy, update):
        if copy.places:  # not of everything
            PATCHES[fault](lambda its: apply(copy, its), update)
        else:
            apply(copy, update)

    monkeypatch.setattr(WeightCopy, "apply", faulty)
    made = trained(fake, "llm", make_data("llm", 8), tmp_path)
    size = sum(p.nbytes for p in made.student.model.parameters())
    assert made.metrics.engine_gap.max() < 1e-4
    assert (made.metrics.sent_bytes.dropna() > size).all()


DAMAGE: dict[str, Callable[[dict, dict], dict]] = {
    "stale": lambda now, before: before,
    "partial": lambda now, before: dict(list(now.items())[: len(now) // 2]),
    "wrong": lambda now, before: {name: tensor * 1.05 for name, tensor in now.items()},
}
"""What is sent in place of an update's values, from these and those of the update before."""


@pytest.mark.parametrize("damage, lasts", [*((name, False) for name in DAMAGE), ("wrong", True)])
def test_a_patch_of_other_values_is_noticed(
    damage, lasts, engine, make_data, tmp_path, monkeypatch
):
    """Values that are not the training's, sent with a checksum of their own, are caught by the log-probs at once: then
    everything is sent again, or training stops in one line."""
    write, sent = VllmSampler._write, []

    def damaged(self, where, parts):
        parts = [dict(part) for part in parts]
        sent.append(parts[-1])
        if len(sent) == 3 or (lasts and len(sent) > 3):  # of the second step
            now, before = (
                {n: t for n, t in each.items() if n.startswith("values/")}
                for each in sent[-1:-3:-1]
            )
            others = {n: t for n, t in parts[-1].items() if n not in now}
            parts[-1] = others | DAMAGE[damage](now, before)
        return write(self, where, parts)

    monkeypatch.setattr(VllmSampler, "_write", damaged)
    args = (engine, "llm", make_data("llm", 8), tmp_path)
    if lasts:
        with pytest.raises(EngineError, match="does not hold the weights that it was") as raised:
            trained(*args)
        assert "\n" not in str(raised.value) and len(sent) == 4
    else:
        made = trained(*args)
        assert made.metrics.engine_gap.max() < 1e-4 and len(sent) == 4


def test_an_engine_that_was_started_again_gets_its_weights(fake, make_data, tmp_path):
    """A server that forgot everything, before an update or before sampling, gets all of it again."""
    its, data = fake.servers["llm", "student"], make_data("llm", 16)

    async def forget(request, answer):
        its.held.restart()
        return web.Response(status=503)

    for path in ("/inference/v1/generate", "/collective_rpc"):
        calls = []

        async def later(request, answer, calls=calls):
            calls.append(1)
            return await forget(request, answer) if len(calls) == 7 else answer

        engine = fake.engine

        def faulty(*args, path=path, later=later, engine=engine, **settings):
            found = engine(*args, **settings)
            its.next(
                path,
                later if path.startswith("/inf") else forget,
                99 if path.startswith("/inf") else 1,
            )
            return found

        fake.engine = faulty
        made = trained(fake, "llm", data, tmp_path / path.replace("/", "-"))
        fake.engine = engine
        assert made.metrics.engine_gap.max() < 1e-4 and made.metrics.logprob_gap_max.max() < 1e-4


def test_another_trainings_weights_stop_the_first(fake, make_data, tmp_path):
    """A server that a second training sends its weights to stops the first, in one line."""
    its = fake.servers["llm", "student"]
    version = {}

    async def taken(request, answer):
        version["label"] = its.held.version = "0123456789abcdef/3"
        return answer

    engine = fake.engine

    def faulty(*args, **settings):
        found = engine(*args, **settings)
        its.next("/resume", taken)
        return found

    fake.engine = faulty
    with pytest.raises(EngineError, match="serves another training now"):
        trained(fake, "llm", make_data("llm", 16), tmp_path)


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "always"])
def test_a_full_disk_is_waited_for(lasts, fake, make_data, tmp_path, monkeypatch):
    """A shared folder without space is tried again, then named in one line; nothing is left in it."""
    save, calls = vllm_sampler.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) == 2 or (lasts and len(calls) > 2):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(vllm_sampler, "save_file", full)
    shared = tmp_path / "shared"
    args = (fake, "llm", make_data("llm", 16), tmp_path / "x")
    if lasts:
        with pytest.raises(EngineError, match=r"written to .*shared.*No space left on device"):
            trained(*args, folder=str(shared))
    else:
        assert len(trained(*args, folder=str(shared)).metrics) == 3
    assert list(shared.iterdir()) == []


def test_rollouts_ahead_go_on_after_a_kill(fake, make_data, tmp_path):
    """With max_lag = 1 each row says its lag; a training that was killed goes on to the same bits, as seeds belong to
    the run's seed, the step and the row."""
    data, train, kind = make_data("llm", 8), {"save_every": 2, "steps": 4}, "llm"
    whole = trained(fake, kind, data, tmp_path / "whole", lag=1, identity="x", train=train)
    assert list(whole.metrics.rollout_lag) == [0, 1, 1, 1]
    calls = []

    def dies(student):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return {}

    args = (fake, kind, data, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        hooks = Hooks(evaluate=dies, evaluate_every=1)
        trained(*args, lag=1, identity="x", train=train, hooks=hooks)
    again = trained(*args, lag=1, identity="x", train=train)
    one, two = (its.student.model.state_dict() for its in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------- faults


def changed(change: Callable[[dict[str, Any]], Any]):
    """A fault: the right answer, changed."""

    async def fault(request: web.Request, answer: web.Response) -> web.Response:
        found = json.loads(bytes(answer.body))
        found = change(found) or found
        return web.Response(body=json.dumps(found).encode())

    return fault


def raw(body: bytes, status: int = 200):
    async def fault(request: web.Request, answer: web.Response) -> web.Response:
        return web.Response(body=body, status=status)

    return fault


async def drops_the_connection(request, answer):
    request.transport.abort()
    return answer


async def hangs(request, answer):
    await asyncio.sleep(3)
    return answer


def of_last(change: Callable[[dict[str, Any]], Any]):
    """A fault in the log-probs of the last token."""
    return changed(lambda found: change(found["prompt_logprobs"][-1]))


def every(logprob: float):
    def change(row):
        for each in row.values():
            each["logprob"] = logprob

    return change


FAULTS = {
    "drops the connection": drops_the_connection,
    "hangs": hangs,
    "status 500": raw(b'{"error": {"message": "EngineDeadError"}}', 500),
    "status 503": raw(b"busy", 503),
    "an empty body": raw(b""),
    "a page": raw(b"<html>gateway</html>"),
    "a cut body": raw(b'{"request_id": "x", "choi'),
    "a list": raw(b"[]"),
    "another request's answer": changed(lambda a: a | {"request_id": "generate-tokens-other"}),
    "no choice": changed(lambda a: a | {"choices": []}),
    "aborted": changed(lambda a: a["choices"][0].update(finish_reason="abort")),
    "a prompt less": changed(lambda a: a["prompt_token_ids"].pop()),
    "no log-probs": changed(lambda a: a | {"prompt_logprobs": None}),
    "a token less": changed(lambda a: a["prompt_logprobs"].pop()),
    "another token": of_last(lambda row: row.update(dict(zip("9876", row.values(), strict=False)))),
    "no likeliest": of_last(lambda row: [row.pop(i) for i in list(row)[1:]]),
    "NaN": of_last(every(math.nan)),
    "NaN as vLLM writes it": of_last(every(-9999.0)),
    "above 0": of_last(every(0.5)),
    "no distribution": of_last(every(-0.1)),
    "text": of_last(every("x")),
}
"""What may pass: asked again, it heals; always, it is one line."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_heals_a_lasting_one_is_one_line(fault, fake, make_data):
    """An answer that cannot be used is asked for again; at every attempt, the address, the reason and the remedy."""
    pair, data = (
        fake.pair("llm", there=True, timeout_seconds=1, attempts=2, at_once=2),
        make_data("llm", 2),
    )
    pair = replace(pair, by_name={n: replace(t, top_k=4) for n, t in pair.by_name.items()})
    completions = completions_of(fake.pair("llm"), data)
    expected = pair.teacher_forward(data, completions)[0].hidden
    its = fake.servers["llm", "teacher"]
    its.next("/inference/v1/generate", FAULTS[fault])
    assert torch.equal(pair.teacher_forward(data, completions)[0].hidden, expected)
    assert its.times == 0
    its.next("/inference/v1/generate", FAULTS[fault], times=99)
    with pytest.raises(EngineError, match=its.url) as raised:
        pair.teacher_forward(data, completions)
    assert "2 attempts" in str(raised.value) and "\n" not in str(raised.value)


FINAL = {
    "status 400": (
        raw(b'{"error": {"message": "too long"}}', 400),
        "refuses the request: too long$",
    ),
    "status 401": (raw(b"", 401), "another token"),
    "status 404": (raw(b"Not Found", 404), "Not Found"),
    "other weights": (
        changed(lambda a: a["choices"][0].update(weight_versions=[{"version": "step-3"}])),
        "other weights .*step-3",
    ),
}


@pytest.mark.parametrize("fault", FINAL)
def test_a_final_fault_stops_at_once(fault, fake, make_data):
    """What will not pass is not asked for again."""
    pair, data = fake.pair("llm", there=True, at_once=1), make_data("llm", 1)
    completions = completions_of(fake.pair("llm"), data)
    pair.teacher_logprobs(data, completions)
    how, words = FINAL[fault]
    its = fake.servers["llm", "teacher"]
    its.next("/inference/v1/generate", how, times=9)
    with pytest.raises(EngineError, match=words):
        pair.teacher_forward(data, completions)
    assert its.times == 8


def of_choice(change: Callable[[dict[str, Any]], Any]):
    return changed(lambda found: change(found["choices"][0]))


def longer(choice):
    choice["token_ids"] += [9] * 9
    choice["logprobs"]["content"] += [{"token_id": 9, "logprob": -1.0}] * 9


def sampled_end_first(choice):
    choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = 2


def first_is(token: int):
    def change(choice):
        choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = token

    return change


SAMPLES = {
    "too long": of_choice(longer),
    "a placeholder": of_choice(first_is(4)),
    "a token outside": of_choice(first_is(10**6)),
    "goes on after its end": of_choice(first_is(2)),
    "a token less": of_choice(lambda c: c["token_ids"].pop()),
    "no tokens": of_choice(lambda c: c.update(token_ids=[], logprobs={"content": []})),
    "no log-probs": of_choice(lambda c: c.update(logprobs=None)),
    "NaN": of_choice(lambda c: c["logprobs"]["content"][0].update(logprob=math.nan)),
    "minus infinity": of_choice(lambda c: c["logprobs"]["content"][0].update(logprob=-9999.0)),
    "above 0": of_choice(lambda c: c["logprobs"]["content"][0].update(logprob=1.0)),
}


@pytest.mark.parametrize("fault", SAMPLES)
def test_completions_that_no_sampler_writes_are_refused(fault, fake, make_data):
    """Lengths, tokens and log-probs of completions are checked; a second answer heals, none is one line."""
    sampler, data = fake.sampler("llm"), make_data("llm", 2)
    student = sampler.student
    prompts = student.render(data)
    uniforms = torch.full((2, 6), 0.3)
    ask = (prompts, 6, 1.0, uniforms, student.vocabulary_rows)
    right = sampler.sample(*ask, device=student.device)
    its = fake.servers["llm", "student"]
    its.next("/inference/v1/generate", SAMPLES[fault])
    assert torch.equal(sampler.sample(*ask, device=student.device).ids, right.ids)
    assert its.times == 0
    its.next("/inference/v1/generate", SAMPLES[fault], times=99)
    with pytest.raises(EngineError, match="3 attempts"):
        sampler.sample(*ask, device=student.device)


def test_an_engine_without_sight_is_refused(fake, make_data):
    """A server that expands placeholders and does not look at the pictures is noticed with the first of them."""
    pair, data = fake.pair("vlm", there=True), make_data("vlm", 2)
    completions = completions_of(fake.pair("vlm"), data)
    fake.servers["vlm", "teacher"].held.is_blind = True
    with pytest.raises(EngineError, match="does not look at pictures"):
        pair.teacher_logprobs(data, completions)


def test_dropped_pictures_are_noticed(fake, make_data):
    """An answer to a prompt whose pictures were dropped is not used."""
    pair, data = fake.pair("vlm", there=True, attempts=2), make_data("vlm", 2)
    completions = completions_of(fake.pair("vlm"), data)
    pair.teacher_logprobs(data, completions)

    def unexpanded(found):
        ids = found["prompt_token_ids"]
        return found | {"prompt_token_ids": list(dict.fromkeys(ids))}

    fake.servers["vlm", "teacher"].next("/inference/v1/generate", changed(unexpanded), times=99)
    with pytest.raises(EngineError, match=r"are not the .* of the processor here"):
        pair.teacher_logprobs(data, completions)


# ---------------------------------------------------------------------------------------- before training

ENGINE = {"type": "vllm", "url": "http://127.0.0.1:9"}
TEACHER = {"model": "x", "engine": ENGINE}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the whole vocabulary": ({}, "loss reverse_kl with support 'full' needs"),
    "the student's likeliest": (
        {"loss": {"type": "forward_kl", "support": {"type": "student_top_k"}}},
        "support 'student_top_k' needs",
    ),
    "a teacher's temperature": (
        {"loss": {"type": "forward_kl", "support": TOP, "teacher_temperature": 2.0}},
        "loss.teacher_temperature needs",
    ),
    "tokens by divergence": (
        {"loss": {"type": "k1", "tokens": {"by": "divergence", "fraction": 0.5}}},
        "divergence",
    ),
    "a teacher that writes": (
        {"loss": {"type": "nll"}, "rollout": {"source": "teacher"}},
        "does not write them",
    ),
    "a mixture": (
        {
            "loss": {"type": "k1"},
            "teacher": {"type": "mixed", "teachers": {"a": TEACHER, "b": "y"}},
        },
        "a mixture needs whole",
    ),
    "nothing to start with": (
        {"rollout": {"engine": {"type": "vllm"}}, "loss": {"type": "k1"}},
        "either url .* or python",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_give_is_refused_with_the_remedy(case):
    """A recipe that needs more of a teacher than vLLM gives is refused when it is read, and names what has it."""
    sections, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as raised:
        Recipe(**{"train": {"steps": 1, "prompts_per_step": 1}, "teacher": TEACHER, **sections})
    assert "vlopd" in str(raised.value) or "python" in str(raised.value)


def test_what_fits_is_not_refused():
    """Losses of few log-probs, and rewards alone, take a teacher in vLLM; a run's other rollouts may be ahead."""
    for loss in LOSSES.values():
        Recipe(train={"steps": 1, "prompts_per_step": 1}, teacher=TEACHER, loss=loss)
    rollout = {"completions_per_prompt": 2, "engine": ENGINE, "max_lag": 1}
    found = Recipe(
        train={"steps": 1, "prompts_per_step": 1},
        teacher=TEACHER,
        reward={"rule": "exact_match"},
        rollout=rollout,
    )
    assert any("vLLM samples with random numbers of its own" in note for note in found.notes)


def test_a_pair_that_does_not_fit_the_loss_is_refused(fake, make_data, tmp_path):
    """Where the recipe has no teacher of its own, the pair's is checked before training; so are signal nulls."""
    train = {"steps": 1, "prompts_per_step": 2}
    with pytest.raises(ConfigError, match="needs the teacher's whole distribution"):
        distill(fake.pair("llm", there=True), make_data("llm"), Recipe(train=train), tmp_path)
    recipe = Recipe(train=train, loss=LOSSES["forward"])
    null = SignalNull(type="shuffled_teacher")
    with pytest.raises(ConfigError, match="null shuffled_teacher needs"):
        distill(fake.pair("llm", there=True), make_data("llm"), recipe, tmp_path, null=null)


def test_pairs_that_share_a_part_of_the_tokens_are_refused(fake, make_data, tmp_path):
    """vLLM's log-probs are over all of a model's tokens: where a pair shares fewer, it neither scores nor samples."""
    pair = fake.pair("llm", there=True)
    part = replace(pair.vocabulary, size=pair.vocabulary.size - 1)
    with pytest.raises(ConfigError, match=r"has 58 tokens, of which the student shares 57.*vlopd"):
        replace(pair.teachers[0], vocabulary=part)
    engine = fake.engine("llm", "student")
    rollout = {"max_new_tokens": 4, "engine": engine}
    recipe = Recipe(train={"steps": 1, "prompts_per_step": 2}, rollout=rollout)
    with pytest.raises(ConfigError, match=r"has 58 tokens, of which 57 are shared.*vlopd"):
        distill(replace(fake.pair("llm"), vocabulary=part), make_data("llm"), recipe, tmp_path)


def test_another_machines_address_needs_a_token(fake, monkeypatch):
    """Nothing is sent to another machine without a secret."""
    monkeypatch.delenv(TOKEN, raising=False)
    engine = VllmEngine(type="vllm", url="http://192.0.2.1:8000")
    with pytest.raises(ConfigError, match=f"another machine.*{TOKEN}"):
        connected(engine, str(engine.url))


def test_a_vllm_that_cannot_start_says_why(tmp_path, monkeypatch):
    """The reason is the last error that it printed; all that it printed stays in a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = VllmEngine(type="vllm", python=sys.executable, start_seconds=60)
    with pytest.raises(
        EngineError, match=r"did not start: .*[Nn]o module.* vllm|did not start: .*vllm"
    ):
        started_vllm(engine, "x", torch.float32, ())
    assert "vllm" in next(tmp_path.glob("vlopd-vllm-*.log")).read_text()


def test_what_was_started_ends_with_who_started_it(tmp_path):
    """A command, and what it started itself, end when standard input closes, as it does with a killed training."""
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; wait"
    words = [sys.executable, str(Path(kept.__file__)), "sh", "-c", script]
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    end = time.monotonic() + 20
    while not pids.exists():
        assert time.monotonic() < end
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    for pid in pids.read_text().split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.engines
@pytest.mark.skipif(not PYTHON, reason="no vLLM")
def test_training_starts_vllm_itself(wide, make_data, tmp_path):
    """`python` names where vLLM is installed: teacher and sampler are started, and the training ends."""
    settings = {
        "type": "vllm",
        "python": PYTHON,
        "arguments": ["--enforce-eager", "--max-model-len", "128"],
    }
    teacher = {"model": str(wide["llm", "teacher"]), "engine": settings}
    pair = load_pair(str(wide["llm", "student"]), teacher, compute="fp32", device="cpu")
    recipe = Recipe(
        train={"steps": 2, "prompts_per_step": 4},
        loss=LOSSES["forward"],
        rollout={"max_new_tokens": 6, "engine": settings},
    )
    made = distill(pair, make_data("llm", 8), recipe, tmp_path)
    assert made.metrics.engine_gap.max() < 1e-4
