"""Asks a server: retries what failed, and refuses every answer that may not be that to its question."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.exceptions import MaxRetryError

from vlopd import trust
from vlopd.engines.wire import PROTOCOL, TOKEN, TYPE, BrokenMessage, decode, digest_bytes, encode
from vlopd.errors import ConfigError, RunError, first_line

T = TypeVar("T")
LONGEST_PAUSE = 30.0
"""Seconds between two attempts, at most; the first pause is a second."""
CONNECT_SECONDS = 10.0


class EngineError(RunError):
    """An engine that does not answer, or whose answers cannot be used."""


class Doubtful(Exception):
    """An answer that is not used; the request is sent again."""


class LostWeights(Exception):
    """The engine does not hold the weights that it was sent, for example since it was started again."""


@dataclass
class Connection:
    """A connection to a server; what it does not answer well is asked again.

    server: what is to run at the address, for messages. at_once: requests at a time, each of a thread.
    """

    url: str
    timeout_seconds: float = 600.0
    attempts: int = 10
    server: str = "`vlopd serve`"
    at_once: int = 1
    session: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        """Raises EngineError for an address that a run folder names and nobody trusts: it gets weights."""
        if why := trust.why_withheld(trust.engine(self.url)):
            raise EngineError(why)
        self.session.trust_env = False  # no proxies between the two processes
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=self.at_once))
        if token := os.environ.get(TOKEN):
            self.session.headers["Authorization"] = f"Bearer {token}"

    def send(self, method: str, path: str, body: bytes | None = None, kind: str = TYPE) -> bytes:
        """One request; the answer's body. Raises Doubtful for what may pass, EngineError for what will not."""
        deadline = time.monotonic() + self.timeout_seconds  # of the whole: a body may come in drops
        content = bytearray()
        try:
            with self.session.request(
                method,
                f"{self.url}{path}",
                data=body,
                headers={"Content-Type": kind} if body else None,
                timeout=(min(CONNECT_SECONDS, self.timeout_seconds), self.timeout_seconds),
                allow_redirects=False,
                stream=True,
            ) as answer:
                for chunk in answer.iter_content(2**20):
                    content += chunk
                    if time.monotonic() > deadline:
                        raise requests.Timeout
        except requests.Timeout:
            raise Doubtful(f"no answer within {self.timeout_seconds:g} s") from None
        except (requests.RequestException, OSError) as error:
            raise Doubtful(shortest(error)) from None
        if answer.status_code == 200:
            return bytes(content)
        why = reason(bytes(content)) or answer.reason
        if answer.status_code in (401, 403):
            raise EngineError(
                f"{self.url} wants another token; set {TOKEN} here to the one it was started with"
            )
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
            raise EngineError(f"{self.url} refuses the request: {why}")
        raise Doubtful(f"it failed with status {answer.status_code}: {why}")

    def persist(self, once: Callable[[], T]) -> T:
        """Tries until it succeeds, `attempts` times at most, at growing intervals."""
        pause = 1.0
        for attempt in range(1, self.attempts + 1):
            try:
                return once()
            except Doubtful as error:
                if attempt == self.attempts:
                    raise EngineError(
                        f"{self.url}: {error} ({attempt} attempts); see that {self.server} runs there, and "
                        "run this again: it goes on from the last saved state"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("attempts is at least 1")


@dataclass
class Client(Connection):
    """A connection to one `vlopd serve`.

    `expected`: what `about` said at first; answers by other weights are refused.
    """

    expected: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What the server holds: model, weights (digest), dtype, hidden_size, rows. Raises EngineError."""

        def ask() -> dict[str, Any]:
            answer = json_object(self.send("GET", "/about"))
            if answer.get("protocol") != PROTOCOL:
                raise EngineError(
                    f"{self.url} speaks protocol {answer.get('protocol')!r} of `vlopd serve`, and this is "
                    f"{PROTOCOL}; start it with the same version of vlopd"
                )
            return answer

        return self.persist(ask)

    def ask(
        self,
        path: str,
        tensors: Mapping[str, Tensor],
        about: Mapping[str, Any],
        check: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The answer's tensors and header. check(tensors, header) raises Doubtful for one that cannot be used.

        An answer is used only if it is whole, names this very request by its digest, and was made with the weights
        that were there at the beginning.
        """
        body = encode(tensors, about)
        asked = digest_bytes(body)

        def once() -> tuple[dict[str, Tensor], dict[str, Any]]:
            received = self.send("POST", path, body)
            try:
                found, header = decode(received)
            except BrokenMessage as error:
                raise Doubtful(f"its answer is damaged ({error})") from None
            if header.get("request") != asked:
                raise Doubtful("it answered another request")
            if self.expected is not None and header.get("weights") != self.expected["weights"]:
                raise EngineError(
                    f"{self.url} holds other weights of {self.expected['model']} than at the beginning; "
                    "start it again with those, and go on"
                )
            check(found, header)
            return found, header

        return self.persist(once)


def json_object(received: bytes) -> dict[str, Any]:
    """The JSON object of an answer's body. Raises Doubtful."""
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):
        raise Doubtful("its answer is no JSON") from None
    if not isinstance(answer, dict):
        raise Doubtful("its answer is no object")
    return answer


def reason(content: bytes) -> str:
    """What the body of a refusal says: the message of vLLM's JSON, else its beginning."""
    try:
        text = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        text = content[:300].decode(errors="replace")
    return " ".join(str(text)[:300].split())


def shortest(error: BaseException) -> str:
    """The system's reason within a network error, such as "Connection refused"; else the beginning of its message."""
    inner: object = error
    for _ in range(10):
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        if isinstance(inner, MaxRetryError):
            inner = inner.reason
        elif isinstance(inner, BaseException):
            first = inner.args[0] if inner.args else None
            inner = (
                first if isinstance(first, BaseException) else inner.__cause__ or inner.__context__
            )
    return first_line(error)[:200]


def refuse_other_precision(client: Client, dtype: torch.dtype) -> None:
    """Raises ConfigError where the server computes in another precision."""
    wanted, its = str(dtype).removeprefix("torch."), (client.expected or {}).get("dtype")
    if its != wanted:
        raise ConfigError(
            f"{client.url} computes in {its}, and this run in {wanted} (precision.compute); start `vlopd serve` with "
            "the same --compute"
        )


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())
