"""A teacher in another process: the same numbers as here, and nothing is trained on a doubtful answer."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from aiohttp import web
from safetensors.torch import load_file

from tests.conftest import KINDS
from tests.served import Misbehaving, serving
from vlopd.cli.serve import serve
from vlopd.config.models import ModelConfig
from vlopd.config.objective import RolloutConfig
from vlopd.config.recipe import Recipe
from vlopd.data.load import pick
from vlopd.engines import client as clients
from vlopd.engines.client import EngineError
from vlopd.engines.process import started
from vlopd.engines.served import ServedModel
from vlopd.engines.wire import TYPE, BrokenMessage, decode, encode, is_loopback
from vlopd.engines.worker.vlopd_worker import WeightCopy, WrongUpdate, checksum
from vlopd.errors import ConfigError
from vlopd.files import read_json
from vlopd.loop import Hooks, distill
from vlopd.models.load import load
from vlopd.pipeline import make_arms
from vlopd.run.folder import RunFolder
from vlopd.train import rollouts
from vlopd.train.pair import ModelPair, load_pair
from vlopd.train.replay import Replay
from vlopd.train.sparse import Trainable
from vlopd.train.weight_updates import WeightUpdates, tensors_of

FAST = {"timeout_seconds": 20, "attempts": 3}


@pytest.fixture(scope="module")
def servers(folders) -> Iterator[dict[str, Misbehaving]]:
    """A server of each kind's teacher, in fp32."""
    loaded = {kind: load(str(folders[kind, "teacher"]), torch.float32) for kind in KINDS}
    with serving(loaded["llm"]) as llm, serving(loaded["vlm"]) as vlm:
        yield {"llm": llm, "vlm": vlm}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses between attempts take no time."""
    monkeypatch.setattr(clients.time, "sleep", lambda seconds: None)


@pytest.fixture
def joined(folders, servers) -> Callable[..., ModelPair]:
    """(kind, **settings of the engine) -> a pair whose teacher is behind the server."""

    def join(kind: str, **settings) -> ModelPair:
        servers[kind].fault = None
        engine = {"type": "vlopd", "url": servers[kind].url, **FAST, **settings}
        teacher = {"model": str(folders[kind, "teacher"]), "engine": engine}
        return load_pair(str(folders[kind, "student"]), teacher, compute="fp32", device="cpu")

    return join


def local(folders, kind: str) -> ModelPair:
    student, teacher = (str(folders[kind, role]) for role in ("student", "teacher"))
    return load_pair(student, teacher, compute="fp32", device="cpu")


# ------------------------------------------------------------------------------------ the same numbers

RECIPES = {
    "reverse KL": {},
    "the teacher writes": {"rollout": {"source": "teacher"}, "loss": {"type": "forward_kl"}},
    "top-k": {"loss": {"type": "reverse_kl", "support": {"type": "teacher_top_k", "k": 8}}},
    "sampled token": {"loss": {"type": "k1"}},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_bit_equal(kind, recipe, joined, folders, make_data, tmp_path):
    """With the teacher behind `vlopd serve`, losses and trained weights are those of the teacher here, to the bit."""
    settings = RECIPES[recipe]
    rollout = {"max_new_tokens": 6, **settings.get("rollout", {})}
    train = {"steps": 2, "prompts_per_step": 4}
    made = []
    for name, pair in (("here", local(folders, kind)), ("there", joined(kind))):
        whole = Recipe(**{"train": train, **settings, "rollout": rollout})
        made.append(distill(pair, make_data(kind, 8), whole, tmp_path / name))
    here, there = (its.student.model.state_dict() for its in made)
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert (made[0].metrics.loss == made[1].metrics.loss).all()


def test_the_teachers_weights_are_not_here(kind, joined):
    """Of a teacher elsewhere only the output layer is in memory; its size is known."""
    its = joined(kind).teachers[0].loaded
    assert isinstance(its, ServedModel)
    held = {name for name, _ in its.model.named_parameters()}
    assert held == {"head.weight"} and its.model.num_parameters() > its.model.head.weight.numel()
    assert its.client.url in repr(its)


def test_the_answer_depends_on_the_picture(joined, make_data):
    """Pictures reach the teacher: blanked, its log-probs are others."""
    pair, data = joined("vlm"), make_data("vlm")
    prompts = pair.student.render(data)
    uniforms = torch.rand(len(data), 6)
    completions = pair.sample(prompts, RolloutConfig(max_new_tokens=6), uniforms)
    seen = pair.teacher_logprobs(data, completions)
    blank = [replace(e, images=tuple(i.point(lambda _: 0) for i in e.images)) for e in data]
    assert not torch.allclose(seen, pair.teacher_logprobs(blank, completions), atol=1e-3)


# --------------------------------------------------------------------------------- rollouts elsewhere


@pytest.fixture(scope="module")
def samplers(folders) -> Iterator[dict[str, Misbehaving]]:
    """A server of each kind's student, in fp32."""
    loaded = {kind: load(str(folders[kind, "student"]), torch.float32) for kind in KINDS}
    with serving(loaded["llm"]) as llm, serving(loaded["vlm"]) as vlm:
        yield {"llm": llm, "vlm": vlm}


def fifth(pair: ModelPair) -> dict[str, torch.Tensor]:
    """A mask of every fifth coordinate of the matrices."""
    named = pair.student.model.named_parameters()
    marks = {n: torch.zeros(p.numel(), dtype=torch.bool) for n, p in named if p.ndim > 1}
    for marked in marks.values():
        marked[::5] = True
    return {n: marks[n].view_as(p) for n, p in pair.student.model.named_parameters() if n in marks}


def trained(folders, kind: str, data, out: Path, engine="eager", masked=False, steps=4, **settings):
    """A training of a fresh pair whose student samples in `engine`."""
    pair = local(folders, kind)
    rollout = {"max_new_tokens": 6, "engine": engine}
    optim = {"type": "adamw", "learning_rate": 1e-2}
    recipe = Recipe(
        train={"steps": steps, "prompts_per_step": 4}, rollout=rollout, optim=optim, **settings
    )
    return distill(pair, data, recipe, out, mask=fifth(pair) if masked else None)


def same_weights(one, other) -> bool:
    a, b = (its.student.model.state_dict() for its in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_rollouts_elsewhere_are_those_here(kind, masked, folders, samplers, make_data, tmp_path):
    """A student that samples in another process, whose weights follow, trains to the same bits; of a mask its
    coordinates are sent once, then values alone."""
    samplers[kind].fault = None
    data = make_data(kind, 16)
    engine = {"type": "vlopd", "url": samplers[kind].url, **FAST}
    here = trained(folders, kind, data, tmp_path / "here", masked=masked)
    there = trained(folders, kind, data, tmp_path / "there", engine, masked)
    assert same_weights(here, there)
    assert (here.metrics.loss == there.metrics.loss).all()
    sent = there.metrics.sent_bytes.dropna()
    dense = sum(p.nbytes for p in there.student.model.parameters())
    density = there.trainable.count / there.trainable.total
    assert len(sent) == 3 and 0 < sent.max() <= 1.2 * density * dense


def test_an_update_of_bf16_weights_is_what_changed(folders, make_data):
    """Of a wholly trained bf16 model, index and value of the coordinates that changed; the whole where that is less."""
    pair = load_pair(str(folders["llm", "student"]), compute="bf16", device="cpu")
    model = pair.student.model
    with Trainable(model) as trainable:
        updates, copy = WeightUpdates(trainable, model), WeightCopy(tensors_of(load_copy(folders)))
        copy.apply(updates.next())
        assert updates.bytes == sum(p.nbytes for p in model.parameters())
        name, slot = next((n, s) for n, s in trainable.slots.items() if "up_proj" in n)
        slot.values.data.view(-1)[:3] += 1.0
        slot.values.data.view(-1)[3] *= 1 + 2.0**-12  # below half an ulp
        trainable.write_back()
        update = updates.next()
        assert set(update) == {f"places-now/{name}", f"values-now/{name}"}
        assert updates.bytes == 3 * (4 + 2)
        assert copy.checksum() != updates.checksum()
        copy.apply(update)
        assert copy.checksum() == updates.checksum()
        slot.values.data += 1.0
        trainable.write_back()
        assert set(updates.next()) == {f"whole/{name}"}
        copy.reset()
        assert copy.checksum() == checksum(tensors_of(load_copy(folders)))


def load_copy(folders):
    return load(str(folders["llm", "student"]), torch.bfloat16).model


WRONG_UPDATES = {
    "no such parameter": {"whole/x": torch.zeros(1)},
    "another shape": {"whole/model.norm.weight": torch.zeros(3)},
    "another precision": {"whole/model.norm.weight": torch.zeros(32, dtype=torch.float64)},
    "values without places": {"values/model.norm.weight": torch.zeros(2)},
    "a place outside": {
        "places/model.norm.weight": torch.tensor([-1, 0], dtype=torch.int32),
        "values/model.norm.weight": torch.zeros(2),
    },
    "places of fractions": {
        "places/model.norm.weight": torch.zeros(2),
        "values/model.norm.weight": torch.zeros(2),
    },
    "another kind": {"x/model.norm.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("update", WRONG_UPDATES)
def test_a_wrong_update_changes_nothing(update, folders):
    """An update that does not fit is refused as a whole, with the parameter."""
    copy = WeightCopy(tensors_of(load(str(folders["llm", "student"]), torch.float32).model))
    before, first = copy.checksum(), "model.layers.0.mlp.up_proj.weight"
    right = {f"whole/{first}": torch.zeros_like(copy.tensors[first].data)}
    with pytest.raises(WrongUpdate, match=r"x|norm"):
        copy.apply(right | WRONG_UPDATES[update])
    assert copy.checksum() == before


def forgets(held):
    held.session = held.version = None
    held.copy.reset()


def stale(held):
    held.copy.apply = lambda update: None


def partial_update(held):
    whole = held.copy.apply
    held.copy.apply = lambda update: whole(dict(list(update.items())[::2]))


def wrong_values(held):
    whole = held.copy.apply

    def apply(update):
        whole({n: t * 1.001 if t.is_floating_point() else t for n, t in update.items()})

    held.copy.apply = apply


def a_bit_flips(held):
    whole = held.copy.apply

    def apply(update):
        whole(update)
        held.loaded.model.lm_head.weight.data.view(-1)[7] += 1e-6

    held.copy.apply = apply


@pytest.mark.parametrize("fault", [stale, partial_update, wrong_values, a_bit_flips])
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "always"])
def test_weights_that_did_not_arrive_are_noticed(
    fault, lasts, folders, samplers, make_data, tmp_path
):
    """A stale, partial or wrong update is caught when it is sent: all weights are sent again, or training stops."""
    its, data, kind = samplers["llm"], make_data("llm", 16), "llm"
    its.fault, whole, seen = None, its.held.copy.apply, []

    def apply(update):
        seen.append(1)
        if len(seen) == 2 or (lasts and len(seen) > 2):  # the first step's
            fault(its.held)
            its.held.copy.apply, damaged = apply, its.held.copy.apply
            damaged(update)
        else:
            whole(update)

    def rewired(update):
        its.held.copy.apply = whole
        apply(update)
        its.held.copy.apply = rewired

    its.held.copy.apply = rewired
    engine = {"type": "vlopd", "url": its.url, **FAST}
    try:
        if lasts:
            with pytest.raises(EngineError, match=r"not hold the weights|without their"):
                trained(folders, kind, data, tmp_path / "there", engine, masked=True)
        else:
            there = trained(folders, kind, data, tmp_path / "there", engine, masked=True)
            here = trained(folders, kind, data, tmp_path / "here", masked=True)
            assert same_weights(here, there) and len(seen) == 5
    finally:
        its.held.copy.apply = whole


def test_a_sampler_that_was_started_again_gets_its_weights(folders, samplers, make_data, tmp_path):
    """An engine that forgot everything between two steps is brought up to date, and the training is the same."""
    its, data = samplers["llm"], make_data("llm", 16)

    async def forget(request, answer):
        forgets(its.held)
        return web.Response(status=503)

    engine = {"type": "vlopd", "url": its.url, **FAST}
    here = trained(folders, "llm", data, tmp_path / "here", masked=True)
    for path in ("/sample", "/weights"):
        its.next(path, forget)
        there = trained(folders, "llm", data, tmp_path / path[1:], engine, masked=True)
        assert same_weights(here, there) and its.times == 0


def ahead(folders, kind: str, data, out: Path, url: str, hooks=Hooks(), identity="x", **train):  # noqa: B008
    """A training whose rollouts are one step ahead, with a state after every second of four steps."""
    engine = {"type": "vlopd", "url": url, **FAST}
    recipe = Recipe(
        train={
            "steps": 4,
            "prompts_per_step": 4,
            "save_every": 2,
            "keep_completions": True,
            **train,
        },
        rollout={"max_new_tokens": 6, "engine": engine, "max_lag": 1},
        optim={"type": "adamw", "learning_rate": 1e-2},
    )
    return distill(local(folders, kind), data, recipe, out, hooks=hooks, identity=identity)


def test_rollouts_ahead_are_of_weights_one_step_older(kind, folders, samplers, make_data, tmp_path):
    """With max_lag = 1 the first two steps' completions are the base's, the third's those of the weights after one
    update; each row of metrics says the lag; a training that was killed goes on to the same bits."""
    samplers[kind].fault = None
    data, url = make_data(kind, 16), samplers[kind].url
    whole = ahead(folders, kind, data, tmp_path / "whole", url)
    assert list(whole.metrics.rollout_lag) == [0, 1, 1, 1]

    def sampled(step: int, updates: int):
        """What the weights after some updates of `whole` sample at a step."""
        pair = local(folders, kind)
        recipe = whole.recipe.model_copy(
            update={
                "train": whole.recipe.train.model_copy(update={"steps": updates}),
                "rollout": RolloutConfig(max_new_tokens=6),
            }
        )
        if updates:
            replay = tmp_path / "whole"
            distill(pair, data, recipe, tmp_path / f"first-{updates}", replay=replay)
        rendered = pair.render(pick(data, 4 * step, 4, 1))
        return rollouts.completions_of(pair, recipe, rendered, range(4), 1, step).ids

    for step, updates in ((1, 0), (2, 1)):
        kept = load_file(Replay(tmp_path / "whole").path(step))["ids"]
        assert torch.equal(kept, sampled(step, updates)), step

    calls = []

    def dies(student):
        calls.append(1)
        if len(calls) == 4:  # after the third step, one beyond the state
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        hooks = Hooks(evaluate=dies, evaluate_every=1)
        ahead(folders, kind, data, tmp_path / "killed", url, hooks)
    again = ahead(folders, kind, data, tmp_path / "killed", url)
    assert same_weights(whole, again)
    assert list(again.metrics.rollout_lag) == [0, 1, 1, 1]


@pytest.mark.parametrize("identity", [None, "x"], ids=["", "saves"])
def test_weights_that_were_lost_while_sampling_ahead_are_sent_again(
    identity, folders, samplers, make_data, tmp_path
):
    """An engine that forgets its weights between two steps gets the newest, whose completions have no lag, also where
    the step before saves the state."""
    its, data = samplers["llm"], make_data("llm", 16)

    async def forget(request, answer):
        forgets(its.held)
        return web.Response(status=503)

    its.next("/sample", forget)
    made = ahead(folders, "llm", data, tmp_path / "x", its.url, identity=identity, save_every=1)
    assert its.times == 0 and set(made.metrics.rollout_lag) <= {0, 1}


def test_a_lag_needs_an_engine():
    """Rollouts ahead in this process, or of other writers than the student, are refused."""
    for rollout in ({"max_lag": 1}, {"max_lag": 1, "source": "data", "engine": {"type": "vlopd"}}):
        with pytest.raises(ConfigError, match="max_lag"):
            Recipe(train={"steps": 1, "prompts_per_step": 1}, rollout=rollout)


def test_two_trainings_do_not_share_a_sampler(folders, samplers, make_data, tmp_path):
    """An engine that another training took over stops the first, in one line."""
    its = samplers["llm"]

    async def taken(request, answer):
        its.held.session = "another"
        return await sent_back(request, answer)

    async def sent_back(request, answer):
        tensors, about = decode(bytes(answer.body))
        return web.Response(body=encode(tensors, {**about, "session": "another"}))

    its.next("/sample", taken)
    engine = {"type": "vlopd", "url": its.url, **FAST}
    with pytest.raises(EngineError, match="serves another training now"):
        trained(folders, "llm", make_data("llm", 16), tmp_path / "x", engine)


def test_a_teacher_is_not_read_from_a_sampler(folders, joined, servers, make_data):
    """Weights that a training sent are no teacher's."""
    pair, data = joined("llm"), make_data("llm")
    completions = completions_of(pair, data)
    held = servers["llm"].held
    held.session, held.version = "x", 3
    try:
        with pytest.raises(EngineError, match="a teacher needs"):
            pair.teacher_logprobs(data, completions)
    finally:
        held.session = held.version = None


def test_a_lora_has_no_weights_to_send(folders, make_data, tmp_path):
    """A LoRA and an engine for rollouts are refused together, before anything is started."""
    recipe = Recipe(
        train={"steps": 1, "prompts_per_step": 2}, rollout={"engine": {"type": "vlopd"}}
    )
    with pytest.raises(ConfigError, match="LoRA"):
        distill(local(folders, "llm"), make_data("llm"), recipe, tmp_path, lora={"rank": 1})


# --------------------------------------------------------------------------------------------- faults


def changed(change: Callable[[dict, dict], tuple[dict, dict]]):
    """A fault: the right answer's tensors and header, changed."""

    async def fault(request: web.Request, answer: web.Response) -> web.Response:
        tensors, about = change(*decode(bytes(answer.body)))
        return web.Response(body=encode(tensors, about))

    return fault


def hidden_changed(change: Callable[[torch.Tensor], torch.Tensor]):
    return changed(lambda tensors, about: ({"hidden": change(tensors["hidden"])}, about))


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


async def cuts_the_body(request, answer):
    return web.Response(body=bytes(answer.body)[:-7])


async def promises_more(request, answer):
    its = web.StreamResponse(headers={"Content-Length": str(len(answer.body) + 9)})
    await its.prepare(request)
    await its.write(bytes(answer.body))
    request.transport.close()
    return its


async def dribbles(request, answer):
    its = web.StreamResponse(headers={"Content-Length": str(len(answer.body))})
    await its.prepare(request)
    for start in range(0, len(answer.body), len(answer.body) // 10):
        await its.write(bytes(answer.body)[start : start + len(answer.body) // 10])
        await asyncio.sleep(0.2)
    return its


async def redirects(request, answer):
    return web.Response(status=302, headers={"Location": "http://127.0.0.1:9/hidden"})


def with_nan(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.index_fill(0, torch.tensor([1]), math.nan)


FAULTS = {
    "drops the connection": drops_the_connection,
    "hangs": hangs,
    "comes in drops": dribbles,
    "status 500": raw(b"RuntimeError: no", 500),
    "status 503": raw(b"busy", 503),
    "status 429": raw(b"slower", 429),
    "out of memory": raw(b"OutOfMemoryError", 507),
    "an empty body": raw(b""),
    "no message": raw(b"\x80\x04\x95 a pickle"),
    "a page": raw(b"<html>gateway</html>"),
    "a header of 2^60 bytes": raw((2**60).to_bytes(8, "little") + b"{}"),
    "a cut body": cuts_the_body,
    "a body shorter than promised": promises_more,
    "another request's answer": changed(lambda t, a: (t, {**a, "request": "0" * 64})),
    "no request": changed(lambda t, a: (t, {"weights": a["weights"]})),
    "NaN": hidden_changed(with_nan),
    "infinity": hidden_changed(lambda h: h.clone().fill_(math.inf)),
    "a row less": hidden_changed(lambda h: h[:-1]),
    "a row more": hidden_changed(lambda h: torch.cat([h, h[:1]])),
    "another width": hidden_changed(lambda h: h[:, :-1]),
    "half the precision": hidden_changed(lambda h: h.half()),
    "flat": hidden_changed(lambda h: h.flatten()),
    "no hidden states": changed(lambda t, a: ({}, a)),
}
"""What may pass: asked again, it heals; always, it is one line."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_heals(fault, joined, servers, make_data):
    """After one answer that cannot be used the request is sent again, and the result is the right one."""
    pair, data = joined("llm", timeout_seconds=1), make_data("llm")
    completions = completions_of(pair, data)
    expected = pair.teacher_logprobs(data, completions)
    servers["llm"].next("/hidden", FAULTS[fault])
    before = len(servers["llm"].seen)
    assert torch.equal(pair.teacher_logprobs(data, completions), expected)
    assert servers["llm"].seen[before:] == ["/hidden"] * 2


LASTING = ("drops the connection", "hangs", "status 500", "a cut body", "no request", "NaN")


@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_is_one_line(fault, joined, servers, make_data):
    """What fails at every attempt stops with the address, the reason and the remedy."""
    pair, data = joined("llm", timeout_seconds=1, attempts=2), make_data("llm")
    completions = completions_of(pair, data)
    servers["llm"].next("/hidden", FAULTS[fault], times=9)
    with pytest.raises(EngineError, match=servers["llm"].url) as raised:
        pair.teacher_forward(data, completions)
    assert "2 attempts" in str(raised.value) and "\n" not in str(raised.value)


FINAL = {
    "other weights": (changed(lambda t, a: (t, {**a, "weights": "1" * 64})), "other weights"),
    "status 400": (raw(b"no such tensor", 400), "refuses the request: no such tensor"),
    "status 401": (raw(b"", 401), "another token"),
    "status 404": (raw(b"not here", 404), "not here"),
    "status 413": (raw(b"too large", 413), "too large"),
}
"""What asking again does not change: (fault, what the message says)."""


@pytest.mark.parametrize("fault", FINAL)
def test_a_final_fault_stops_at_once(fault, joined, servers, make_data):
    """What will not pass is not asked for again."""
    pair, data = joined("llm"), make_data("llm")
    completions = completions_of(pair, data)
    how, words = FINAL[fault]
    servers["llm"].next("/hidden", how, times=9)
    with pytest.raises(EngineError, match=words):
        pair.teacher_forward(data, completions)
    assert servers["llm"].times == 8


def test_redirects_are_not_followed(joined, servers, make_data):
    """An answer from another address than the configured one is none."""
    pair, data = joined("llm", attempts=2), make_data("llm")
    completions = completions_of(pair, data)
    servers["llm"].next("/hidden", redirects, times=9)
    with pytest.raises(EngineError, match="status 302"):
        pair.teacher_forward(data, completions)


SAMPLES = {
    "a token outside": lambda t: {**t, "completion/ids": t["completion/ids"] * 0 + 10**6},
    "too long": lambda t: {n: widen(x) for n, x in t.items()},
    "a mask with gaps": lambda t: {**t, "completion/mask": without_first(t["completion/mask"])},
    "log-probs above 0": lambda t: {**t, "completion/logprobs": t["completion/logprobs"] + 9},
    "a log-prob of NaN": lambda t: {
        **t,
        "completion/logprobs": t["completion/logprobs"] * math.nan,
    },
    "a row less": lambda t: {n: x[:-1] for n, x in t.items()},
    "other types": lambda t: {**t, "completion/ids": t["completion/ids"].int()},
    "no tokens": lambda t: {n: x for n, x in t.items() if n != "completion/ids"},
}


def without_first(mask: torch.Tensor) -> torch.Tensor:
    return mask.index_fill(1, torch.tensor([0]), False)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor] * 3, 1) if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("fault", SAMPLES)
def test_completions_that_no_sampler_writes_are_refused(fault, joined, servers, make_data):
    """Lengths, tokens and log-probs of an engine's completions are checked; a second answer heals."""
    pair, data = joined("llm"), make_data("llm")
    teacher, rollout = pair.teachers[0], RolloutConfig(max_new_tokens=6)
    uniforms = torch.linspace(0.05, 0.95, 6 * len(data)).view(len(data), 6)
    prompts = teacher.render(data)
    right = pair.teacher_sample(teacher, prompts, rollout, uniforms)
    fault_ = changed(lambda tensors, about: (SAMPLES[fault](tensors), about))
    servers["llm"].next("/sample", fault_)
    again = pair.teacher_sample(teacher, prompts, rollout, uniforms)
    assert torch.equal(right.ids, again.ids)
    servers["llm"].next("/sample", fault_, times=9)
    with pytest.raises(EngineError, match="completions cannot be used"):
        pair.teacher_sample(teacher, prompts, rollout, uniforms)


def completions_of(pair: ModelPair, data):
    rollout = RolloutConfig(max_new_tokens=6)
    return pair.sample(pair.student.render(data), rollout, torch.full((len(data), 6), 0.4))


# ------------------------------------------------------------------------------------- before training


def test_another_engine_than_the_configured_is_refused(joined, servers, folders, monkeypatch):
    """Another model, precision or protocol is refused before anything is trained, with both sides' values."""
    url = servers["llm"].url
    with pytest.raises(ConfigError, match=r"holds other weights .*correct teacher.engine.url"):
        teacher = {"model": str(folders["llm", "student"]), "engine": {"url": url}}
        load_pair(str(folders["llm", "student"]), teacher, compute="fp32", device="cpu")
    with pytest.raises(ConfigError, match=r"float32.* bfloat16"):
        teacher = {"model": str(folders["llm", "teacher"]), "engine": {"url": url}}
        load_pair(str(folders["llm", "student"]), teacher, compute="bf16", device="cpu")

    async def newer(request, answer):
        return web.json_response({**servers["llm"].held.about, "protocol": 99})

    joined("llm")
    servers["llm"].next("/about", newer)
    with pytest.raises(EngineError, match="protocol 99"):
        teacher = {"model": str(folders["llm", "teacher"]), "engine": {"url": url}}
        load_pair(str(folders["llm", "student"]), teacher, compute="fp32", device="cpu")
    servers["llm"].next("/head", changed(lambda t, a: ({n: x[:, :-1] for n, x in t.items()}, a)))
    with pytest.raises(EngineError, match="output layer is not that of"):
        joined_now(folders, url)


def joined_now(folders, url: str) -> ModelPair:
    teacher = {"model": str(folders["llm", "teacher"]), "engine": {"url": url, **FAST}}
    return load_pair(str(folders["llm", "student"]), teacher, compute="fp32", device="cpu")


def test_nobody_listens(folders):
    """An address without a server is one line with the address and what to do."""
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9: .*refused.*\(3 attempts\)"):
        joined_now(folders, "http://127.0.0.1:9")


def test_a_token_is_needed_where_one_is_set(folders, monkeypatch):
    """A server with a token answers nobody without it."""
    loaded = load(str(folders["llm", "teacher"]), torch.float32)
    with serving(loaded, token="secret") as its:
        assert requests.get(f"{its.url}/about", timeout=9).status_code == 401
        with pytest.raises(EngineError, match="VLOPD_ENGINE_TOKEN"):
            joined_now(folders, its.url)
        monkeypatch.setenv("VLOPD_ENGINE_TOKEN", "secret")
        assert joined_now(folders, its.url).teachers


def test_other_machines_need_a_token(monkeypatch):
    """Beyond this machine's own addresses nothing is served without a secret."""
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org") and not is_loopback("::")
    monkeypatch.delenv("VLOPD_ENGINE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="VLOPD_ENGINE_TOKEN"):
        serve("builtin:shapes-text-teacher", host="0.0.0.0")


BAD_REQUESTS = {
    "no message": b"nothing",
    "no prompts": encode({}, {}),
    "other shapes": encode(
        {
            "prompt/input_ids": torch.ones(1, 3, dtype=torch.long),
            "prompt/attention_mask": torch.ones(1, 2),
        },
        {},
    ),
    "a token without a row": encode(
        {
            "prompt/input_ids": torch.full((1, 3), 10**7),
            "prompt/attention_mask": torch.ones(1, 3, dtype=torch.long),
            "completion/ids": torch.ones(1, 2, dtype=torch.long),
            "completion/mask": torch.ones(1, 2, dtype=torch.bool),
            "completion/logprobs": torch.zeros(1, 2),
            "completion/ended": torch.ones(1, dtype=torch.bool),
        },
        {},
    ),
}


@pytest.mark.parametrize("body", BAD_REQUESTS)
@pytest.mark.parametrize("path", ["/hidden", "/sample"])
def test_a_bad_request_is_refused_and_the_server_stays(path, body, servers):
    """What is no message, or not of this model, gets status 400 with the reason; the next request is answered."""
    servers["llm"].fault = None
    url, headers = servers["llm"].url + path, {"Content-Type": TYPE}
    answer = requests.post(url, data=BAD_REQUESTS[body], headers=headers, timeout=30)
    assert answer.status_code == 400 and answer.text and "\n" not in answer.text
    assert requests.get(servers["llm"].url + "/about", timeout=30).status_code == 200


def test_other_sites_pages_cannot_use_a_server(servers):
    """A body of a type that a browser sends without asking first is not read."""
    servers["llm"].fault = None
    answer = requests.post(servers["llm"].url + "/weights", data=encode({}, {}), timeout=30)
    assert answer.status_code == 415


def test_messages_are_tensors_and_json_alone():
    """A message comes back to the bit; other bytes are refused, pickles among them."""
    tensors = {"a": torch.randn(3, 2).bfloat16(), "b": torch.arange(4)}
    found, about = decode(encode(tensors, {"x": [1, "y"]}))
    assert about == {"x": [1, "y"]} and all(torch.equal(found[n], tensors[n]) for n in tensors)
    for body in (b"", b"\0" * 8, b"\x80\x04K\x01.", encode(tensors, {})[:-3]):
        with pytest.raises(BrokenMessage):
            decode(body)


def test_a_run_goes_on_wherever_the_teacher_is(make_config, servers, folders, tmp_path):
    """Where the teacher's weights are is no input: an arm that was trained with an engine is kept without one, and its
    memory.json has the teacher's output layer alone."""
    servers["llm"].fault = None
    engine = {"type": "vlopd", "url": servers["llm"].url, **FAST}
    teacher = {"model": str(folders["llm", "teacher"]), "engine": engine}
    there, here = make_config("llm", teacher=teacher), make_config("llm")
    run, made = RunFolder.create(tmp_path / "run", there), []
    for config in (there, here):
        make_arms(run, config, ["full"], lambda *artifact: made.append(artifact[2]))
    assert made == [True, False]
    head = local(folders, "llm").teachers[0].loaded.model.get_output_embeddings().weight
    held = read_json(run.arm("full") / "memory.json")["parts_bytes"]["teacher_weights"]
    assert held == head.nbytes


# ------------------------------------------------------------------------------------ its own process


def test_a_started_server_ends_with_its_pair(folders, make_data):
    """Without an address a server is started here, gives the same numbers, and ends when the pair is gone."""
    teacher = {"model": str(folders["llm", "teacher"]), "engine": {"type": "vlopd"}}
    pair = load_pair(str(folders["llm", "student"]), teacher, compute="fp32", device="cpu")
    data = make_data("llm")
    completions = completions_of(pair, data)
    theirs = local(folders, "llm").teacher_logprobs(data, completions)
    assert torch.equal(pair.teacher_logprobs(data, completions), theirs)
    process = pair.teachers[0].loaded.server.process
    pid = process.pid
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    with pytest.raises(EngineError, match="refused"):
        pair.teacher_logprobs(data, completions)
    del pair
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_cannot_start_says_why(tmp_path):
    """The reason why a started server ended is that of its own last line."""
    with pytest.raises(EngineError, match=r"did not start: .*nowhere"):
        started(ModelConfig(model=str(tmp_path / "nowhere")), None, torch.float32, 60)


def test_a_server_ends_with_a_killed_parent(folders):
    """A training that is killed leaves no server behind."""
    code = (
        "import subprocess, sys\n"
        "words = [sys.executable, *sys.argv[1:]]\n"
        "pipe = subprocess.PIPE\n"
        "its = subprocess.Popen(words, stdin=pipe, stdout=pipe)\n"
        "its.stdout.readline()\n"
        "print(its.pid, flush=True)\n"
        "its.wait()\n"
    )
    serve = ["-m", "vlopd", "serve", str(folders["llm", "teacher"]), "--port", "0"]
    words = [sys.executable, "-c", code, *serve, "--with-parent"]
    root = Path(__file__).parents[1]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end and alive(pid):
        pass
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
