"""A `vlopd serve` in this process that misbehaves on request, and a pair whose teacher is behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from aiohttp import web

from vlopd.digests import digest_checkpoint
from vlopd.models.loaded import LoadedModel
from vlopd.serve.app import Held, application

Fault = Callable[[web.Request, web.Response], Awaitable[web.StreamResponse]]
"""(request, the right answer) -> what is sent."""


@dataclass
class Misbehaving:
    """A server at `url`; the next `times` answers to `path` are what `fault` makes of them."""

    url: str
    held: Any
    fault: Fault | None = None
    path: str = ""
    times: int = 0
    seen: list[str] = field(default_factory=list)

    def next(self, path: str, fault: Fault, times: int = 1) -> None:
        self.path, self.fault, self.times = path, fault, times

    async def __call__(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        self.seen.append(request.path)
        if self.fault is None or not self.times or request.path != self.path:
            return answer
        self.times -= 1
        return await self.fault(request, answer)


@contextmanager
def serving(loaded: LoadedModel, token: str | None = None) -> Iterator[Misbehaving]:
    """Serves a model from a thread of this process."""
    assert loaded.folder is not None
    held = Held(loaded, digest_checkpoint(loaded.folder))
    with running(application(held, token), held) as its:
        yield its


@contextmanager
def running(app: web.Application, held: Any) -> Iterator[Misbehaving]:
    """Runs a server from a thread of this process. held: what it holds, for tests."""
    its = Misbehaving("", held)

    @web.middleware
    async def misbehave(request, handler):
        answer = await handler(request)
        return await its(request, answer)

    app.middlewares.insert(0, misbehave)
    loop, ready = asyncio.new_event_loop(), threading.Event()
    runner = web.AppRunner(app, access_log=None)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        its.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield its
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def get(url: str, **headers: str) -> requests.Response:
    return requests.get(url, headers=headers, timeout=30)
