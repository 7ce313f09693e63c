"""`vlopd serve`: a model that other processes read completions with, and sample from, over HTTP.

    GET  /about    {protocol, model, weights, dtype, hidden_size, rows, device}
    POST /head     the output layer's tensors
    POST /hidden   prompts and completions -> hidden states [N, H] that predict each completion token
    POST /sample   prompts, random numbers and settings -> completions
    POST /weights  what changed in a student's weights -> a checksum over all of the copy's

Bodies are messages of engines/wire.py. Every answer names its request and the checkpoint by their digests, and the
training and version whose weights it is of, if any were sent. Requests are served one after the other, by one thread.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from aiohttp import web
from torch import Tensor

from vlopd.engines.wire import (
    PROTOCOL,
    TYPE,
    BrokenMessage,
    decode,
    digest_bytes,
    encode,
    pack_completions,
    unpack_completions,
    unpack_prompts,
)
from vlopd.engines.worker.vlopd_worker import WeightCopy, WrongUpdate
from vlopd.errors import UserError, first_line, is_out_of_memory
from vlopd.models.loaded import LoadedModel
from vlopd.train.generation import sample
from vlopd.train.weight_updates import tensors_of
from vlopd.types import Completions, Prompts

LARGEST_REQUEST = 2**32
"""Bytes."""

Tensors = dict[str, Tensor]
Header = dict[str, Any]
Answer = Callable[[Tensors, Header], tuple[Tensors, Header]]


class Held:
    """A model and what it answers; one thread uses it at a time."""

    def __init__(self, loaded: LoadedModel, weights: str):
        self.loaded, self.weights = loaded, weights
        loaded.model.requires_grad_(False)
        self.copy = WeightCopy(tensors_of(loaded.model))
        self.session: str | None = None
        self.version: int | None = None

    @property
    def about(self) -> Header:
        model = self.loaded.model
        return {
            "protocol": PROTOCOL,
            "model": self.loaded.name,
            "weights": self.weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "hidden_size": self.loaded.hidden_size,
            "rows": self.loaded.vocabulary_rows,
            "device": str(model.device),
        }

    @property
    def state(self) -> Header:
        """Whose weights these are: the training's name and its version; none for those of the checkpoint."""
        return {"session": self.session, "version": self.version}

    def head(self, tensors: Tensors, about: Header) -> tuple[Tensors, Header]:
        """The output layer's tensors."""
        return dict(self.loaded.model.get_output_embeddings().state_dict()), {}

    @torch.no_grad()
    def hidden(self, tensors: Tensors, about: Header) -> tuple[Tensors, Header]:
        """{"hidden": [N, H]}."""
        prompts, completions = self._prompts(tensors), unpack_completions(tensors)
        self._refuse_other_rows(prompts, completions)
        return {
            "hidden": self.loaded.completion_hidden(prompts, completions.to(self.loaded.device))
        }, {}

    def take(self, update: Tensors, about: Header) -> tuple[Tensors, Header]:
        """Brings the weights of a training to a version, from the version `before` or the checkpoint's.

        The answer says `lost` where those before are not here. A repeated update is not applied again.
        """
        try:
            session, version, before = str(about["session"]), int(about["version"]), about["before"]
        except (KeyError, TypeError) as error:
            raise BrokenMessage(first_line(error)) from None
        held = (self.session, self.version)
        if before is None:
            self.copy.reset()
        elif held != (session, version) and held != (session, before):
            return {}, {"lost": True}
        if before is None or held != (session, version):
            self.session = self.version = None
            self.copy.apply(update)
            self.session, self.version = session, version
        return {}, {"checksum": self.copy.checksum()}

    def sample(self, tensors: Tensors, about: Header) -> tuple[Tensors, Header]:
        """The completions of the prompts `rows` with the random numbers `uniforms`."""
        prompts = self._prompts(tensors)
        try:
            rows, columns = tensors["rows"], tensors["columns"]
            found = sample(
                self.loaded,
                prompts,
                int(about["max_new_tokens"]),
                float(about["temperature"]),
                tensors["uniforms"],
                columns,
                about["top_k"],
                float(about["top_p"]),
                list(about["banned_ids"]),
                rows=rows.tolist(),
                engine=about["engine"],
            )
        except (KeyError, TypeError) as error:
            raise BrokenMessage(first_line(error)) from None
        return pack_completions(found), {}

    def _prompts(self, tensors: Tensors) -> Prompts:
        prompts = unpack_prompts(tensors).to(self.loaded.device, self.loaded.model.dtype)
        self.loaded.check_prompts(prompts)
        return prompts

    def _refuse_other_rows(self, prompts: Prompts, completions: Completions) -> None:
        if len(prompts) != len(completions) or completions.mask.dtype != torch.bool:
            raise BrokenMessage(f"{len(prompts)} prompts and {len(completions)} completions")
        self.loaded.check_ids(completions.ids[completions.mask])


def application(held: Held, token: str | None = None) -> web.Application:
    """The server. token: every request must bear it, if given."""
    worker = ThreadPoolExecutor(1, "vlopd-serve")

    @web.middleware
    async def guard(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return web.Response(status=401, text="a token is needed")
        return await handler(request)

    async def about(request: web.Request) -> web.Response:
        return web.json_response(held.about)

    def answers(answer: Answer) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if request.content_type != TYPE:  # what a page of another site may not send
                return web.Response(status=415, text=f"the body must be {TYPE}")
            body = await request.read()
            loop = asyncio.get_running_loop()
            status, content = await loop.run_in_executor(worker, work, answer, body)
            if status != 200:
                return web.Response(status=status, text=content.decode())
            return web.Response(body=content, content_type=TYPE)

        return handle

    def work(answer: Answer, body: bytes) -> tuple[int, bytes]:
        try:
            tensors, header = decode(body)
            found, about = answer(tensors, header)
        except (BrokenMessage, WrongUpdate, UserError) as error:
            return 400, first_line(error).encode()
        except Exception as error:  # whatever a model raises: the server stays
            status = 507 if is_out_of_memory(error) else 500
            return status, f"{type(error).__name__}: {first_line(error)}".encode()
        names = {"request": digest_bytes(body), "weights": held.weights}
        return 200, encode(found, {**names, **held.state, **about})

    app = web.Application(middlewares=[guard], client_max_size=LARGEST_REQUEST)
    app.router.add_get("/about", about)
    posts = {"/head": held.head, "/hidden": held.hidden, "/sample": held.sample}
    for path, answer in {**posts, "/weights": held.take}.items():
        app.router.add_post(path, answers(answer))
    return app
