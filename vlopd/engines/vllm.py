"""Asks vLLM (0.32, `/inference/v1/generate`): log-probs of completions, and completions with log-probs.

Prompts go as token ids with one placeholder a picture, and the pictures as they are; vLLM expands and encodes them
itself. An answer is used only if it names this very request, if the expanded prompt is that of the processor here, and
if a picture that is exchanged changes what it says.
"""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from vlopd.config.engines import VllmEngine
from vlopd.engines.client import Connection, Doubtful, EngineError, LostWeights, json_object
from vlopd.engines.sampler import HIGHEST_LOGPROB, refuse_other_completions
from vlopd.engines.wire import TOKEN, BrokenMessage, is_loopback
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.types import Completions, Example, Prompts

T = TypeVar("T")
Item = TypeVar("Item")
LOWEST_LOGPROB = -9000.0
"""vLLM writes -9999 for minus infinity and for NaN."""
BANNED = -1e4
"""Added to the logits of tokens that are not to be sampled."""
JSON = "application/json"


class RawPrompt(NamedTuple):
    """A prompt as vLLM reads it: one placeholder a picture, the pictures, and the ids that it makes of both."""

    ids: list[int]
    images: tuple[Image.Image, ...]
    expanded: list[int]


def raw_prompts(
    loaded: LoadedModel, prompts: Prompts, examples: Sequence[Example] | None
) -> list[RawPrompt]:
    """The prompts of a batch. examples: those that they are of, as the model reads them; None: of text."""
    found = []
    for row, mask in zip(prompts.input_ids.cpu(), prompts.attention_mask.cpu().bool(), strict=True):
        ids = row[mask].tolist()
        found.append(RawPrompt(ids, (), ids))
    for k, example in enumerate(examples or ()):
        if example.images and loaded.sees_images:
            ids = loaded.unexpanded_ids(example)
            found[k] = RawPrompt(ids, example.images, found[k].expanded)
    return found


@dataclass
class VllmClient(Connection):
    """A connection to one vLLM server.

    version: the name of the weights that every answer must be of; None until the first. follows: whether they are a
    training's, which another version may have replaced.
    """

    server: str = "vLLM"
    version: str | None = None
    follows: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.has_seen, self.lock = False, Lock()

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object of an answer, asked for until there is one. Raises EngineError."""
        content = json.dumps(body or {}).encode()
        return self.persist(lambda: json_object(self.send("POST", path, content, JSON)))

    def each(self, ask: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """The answers to all items, `at_once` at a time. Raises what the first that fails raises."""
        with ThreadPoolExecutor(min(self.at_once, max(1, len(items))), "vlopd-vllm") as pool:
            futures = [pool.submit(ask, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def generate(
        self,
        prompt: RawPrompt,
        completion: Sequence[int],
        sampling: Mapping[str, Any],
        read: Callable[[dict[str, Any], dict[str, Any]], T],
    ) -> T:
        """What `read` makes of the answer and its choice; it raises Doubtful for one that cannot be used.

        completion: ids after the prompt, to be read. Raises EngineError, LostWeights.
        """
        if prompt.images and not self.has_seen:
            self._refuse_blind(prompt)
        return self._generate(prompt, completion, sampling, read)

    def _generate(
        self,
        prompt: RawPrompt,
        completion: Sequence[int],
        sampling: Mapping[str, Any],
        read: Callable[[dict[str, Any], dict[str, Any]], T],
    ) -> T:
        parts = [{"type": "image_url", "url": data_url(image)} for image in prompt.images]
        body = {
            "token_ids": [*prompt.ids, *completion],
            "return_token_ids": True,
            "sampling_params": {"detokenize": False, "n": 1, **sampling},
            **({"content_parts": parts} if parts else {}),
        }

        def once() -> T:
            name = secrets.token_hex(8)
            content = json.dumps({"request_id": name, **body}).encode()
            answer = json_object(self.send("POST", "/inference/v1/generate", content, JSON))
            try:
                if not str(answer["request_id"]).endswith(name):
                    raise Doubtful("it answered another request")
                (choice,) = answer["choices"]
                if choice["finish_reason"] not in ("stop", "length"):
                    raise Doubtful(f"it ended with {choice['finish_reason']!r}")
                if answer["prompt_token_ids"] != [*prompt.expanded, *completion]:
                    raise Doubtful(
                        f"it read {len(answer['prompt_token_ids'])} tokens that are not the "
                        f"{len(prompt.expanded) + len(completion)} of the processor here"
                    )
                self._refuse_other_weights(choice.get("weight_versions"))
                return read(answer, choice)
            except EngineError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise Doubtful(
                    f"its answer is of another form ({type(error).__name__}: {error})"
                ) from None

        return self.persist(once)

    def _refuse_other_weights(self, spans: Sequence[Mapping[str, Any]] | None) -> None:
        names = {str(span["version"]) for span in spans or ()}
        if self.version is None and not self.follows and len(names) == 1:
            (self.version,) = names
        if names == {self.version} or not (names or self.follows):
            return
        if self.follows:
            mine = str(self.version).partition("/")[0]
            if any("/" in name and name.partition("/")[0] != mine for name in names):
                raise EngineError(
                    f"{self.url} serves another training now; each needs a vLLM of its own"
                )
            raise LostWeights(f"it has the weights {', '.join(sorted(names)) or 'without a name'}")
        raise EngineError(
            f"{self.url} has other weights ({', '.join(sorted(names))}) than at the beginning ({self.version}); a "
            "teacher needs a vLLM of its own"
        )

    def _refuse_blind(self, prompt: RawPrompt) -> None:
        """Raises EngineError where another picture in a prompt's place changes no log-prob."""
        with self.lock:
            if self.has_seen:
                return
            other = prompt._replace(images=tuple(map(noise_like, prompt.images)))
            sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 0}

            def numbers(answer: dict[str, Any], choice: dict[str, Any]) -> list[float]:
                rows = [row for row in answer["prompt_logprobs"] if row]
                every = [each for row in rows for each in row.values()]
                every += choice["logprobs"]["content"]
                return [float(each["logprob"]) for each in every]

            one, two = (self._generate(each, (), sampling, numbers) for each in (prompt, other))
            if one == two:
                raise EngineError(
                    f"{self.url} does not look at pictures: its log-probs of a prompt are those with another picture; "
                    "start vLLM with the whole model, without --language-model-only"
                )
            self.has_seen = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is sampled; what was under way is aborted, and caches of old weights are emptied.

        Raises EngineError.
        """
        self.post("/pause?mode=abort")
        try:
            yield
        except BaseException:
            with suppress(EngineError, Doubtful):
                self.send("POST", "/resume", b"{}", JSON)
            raise
        self.post("/resume")

    def rpc(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """What a method of vLLM's workers returned, of each. Raises EngineError."""
        body = {"method": method, "kwargs": dict(arguments), "timeout": self.timeout_seconds}
        content = json.dumps(body).encode()

        def once() -> list[Any]:
            results = json_object(self.send("POST", "/collective_rpc", content, JSON)).get(
                "results"
            )
            if not isinstance(results, list) or not results:
                raise Doubtful("no worker answered")
            return results

        return self.persist(once)


def connected(
    engine: VllmEngine, url: str, token: str | None = None, log: Path | None = None
) -> VllmClient:
    """The client of a server. token, log: of one that was started here. Raises ConfigError, EngineError."""
    client = VllmClient(url, engine.timeout_seconds, engine.attempts, at_once=engine.at_once)
    if log is not None:
        client.server = f"vLLM (its messages: {log})"
    if token is not None:
        client.session.headers["Authorization"] = f"Bearer {token}"
    elif (
        not is_loopback(urlsplit(url).hostname or "")
        and "Authorization" not in client.session.headers
    ):
        raise ConfigError(
            f"engine.url = {url!r} is another machine's: set {TOKEN} to the --api-key of its vLLM, or open a tunnel "
            "and give its address on this machine"
        )
    client.persist(lambda: json_object(client.send("GET", "/v1/models")))
    return client


def data_url(image: Image.Image) -> str:
    """A picture in three colours as a lossless data URL."""
    png = io.BytesIO()
    image.convert("RGB").save(png, "png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def noise_like(image: Image.Image) -> Image.Image:
    """Noise of a picture's size."""
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (image.height, image.width, 3), generator=source, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def score(
    client: VllmClient,
    prompts: Sequence[RawPrompt],
    completions: Sequence[Sequence[int]],
    k: int,
    rows: int,
) -> Tensor:
    """[N, 2 (1 + k)] of each completion token: its id and those of the model's k likeliest, then their log-probs.

    rows: of the vocabulary. Raises EngineError.
    """
    sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": k}

    def ask(pair: tuple[RawPrompt, Sequence[int]]) -> list[list[float]]:
        prompt, completion = pair

        def read(answer: dict[str, Any], choice: dict[str, Any]) -> list[list[float]]:
            found = answer["prompt_logprobs"]
            if len(found) != len(prompt.expanded) + len(completion):
                raise Doubtful(f"log-probs of {len(found)} tokens")
            last = found[len(found) - len(completion) :]
            return [
                token_scores(token, row, k, rows)
                for token, row in zip(completion, last, strict=True)
            ]

        return client.generate(prompt, completion, sampling, read)

    every = client.each(ask, list(zip(prompts, completions, strict=True)))
    flat = [row for each in every for row in each]
    return torch.tensor(flat, dtype=torch.float64).view(-1, 2 * (1 + k)).float()


def token_scores(token: int, row: Mapping[str, Any], k: int, rows: int) -> list[float]:
    """One token's row of `score`, from vLLM's {id: {logprob}}. Raises Doubtful where these are none."""
    every = {int(i): float(each["logprob"]) for i, each in row.items()}
    own = every[token]
    likeliest = sorted(every, key=lambda i: -every[i])
    if len(every) == k + 1:  # the token is not among them
        likeliest.remove(token)
    if len(likeliest) != k or not all(0 <= i < rows for i in every):
        raise Doubtful(f"{len(every)} log-probs of a token where its own and {k} were asked for")
    found = [own, *(every[i] for i in likeliest)]
    if not all(LOWEST_LOGPROB < each <= HIGHEST_LOGPROB for each in found):
        raise Doubtful("log-probs that are none")
    if sum(map(math.exp, found[1:])) > 1 + 1e-3 or (k and own > found[1] + 1e-6):
        raise Doubtful("log-probs that are of no distribution")
    return [token, *likeliest, *found]


def sample(
    client: VllmClient,
    loaded: LoadedModel,
    prompts: Sequence[RawPrompt],
    max_new_tokens: int,
    temperature: float,
    uniforms: Tensor,
    top_k: int | None,
    top_p: float,
    banned_ids: Sequence[int],
) -> Completions:
    """One completion a prompt, on the CPU, as of train.generation.sample over the whole vocabulary of the model.

    vLLM draws its own random numbers, from a seed that uniforms [B, C] decide. Raises EngineError, LostWeights.
    """
    banned = [*loaded.unsampleable_ids, *banned_ids]
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k or 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": max_new_tokens,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": loaded.end_ids,
        "logit_bias": dict.fromkeys(banned, BANNED),
    }
    allowed = torch.arange(loaded.vocabulary_rows)
    allowed = allowed[~torch.isin(allowed, torch.tensor(banned, dtype=torch.long))]
    ends = set(loaded.end_ids)

    def ask(row: int) -> tuple[list[int], list[float]]:
        def read(answer: dict[str, Any], choice: dict[str, Any]) -> tuple[list[int], list[float]]:
            ids, content = choice["token_ids"], choice["logprobs"]["content"]
            if [each["token_id"] for each in content] != ids or not ids:
                raise Doubtful("its completion has tokens without log-probs")
            if ends & set(ids[:-1]) or (len(ids) < max_new_tokens and ids[-1] not in ends):
                raise Doubtful(
                    f"a completion of {len(ids)} tokens that goes on after its end, or has none"
                )
            own = [float(each["logprob"]) for each in content]
            if min(own) < LOWEST_LOGPROB:
                raise Doubtful("log-probs that are none")
            its = completions_of([(ids, own)], loaded)
            try:
                refuse_other_completions(its, 1, max_new_tokens, allowed)
            except BrokenMessage as error:
                raise Doubtful(f"its completion cannot be used: {error}") from None
            return ids, own

        seed = int(float(uniforms[row, 0]) * 2**53)
        return client.generate(prompts[row], (), {**sampling, "seed": seed}, read)

    return completions_of(client.each(ask, range(len(prompts))), loaded)


def completions_of(
    rows: Sequence[tuple[Sequence[int], Sequence[float]]], loaded: LoadedModel
) -> Completions:
    """Rows of ids and log-probs as one batch."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), loaded.pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(rows), longest)
    for k, (own, theirs) in enumerate(rows):
        ids[k, : len(own)], mask[k, : len(own)] = torch.tensor(own), True
        logprobs[k, : len(own)] = torch.tensor(theirs)
    last = torch.tensor([own[-1] for own, _ in rows])
    return Completions(ids, mask, logprobs, torch.isin(last, torch.tensor(loaded.end_ids)))
