"""The lm-eval model class for `LoadedModel`, for text and image tasks.

Tokenizes, truncates and decodes as lm-eval's own classes do, so that scores equal theirs; generates with
the training sampler. Text and image requests may be mixed in one call.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from vlopd.config.analysis import GenerationConfig, SampledConfig
from vlopd.digests import digest_json
from vlopd.distributed import share, share_of
from vlopd.errors import ConfigError, RunError
from vlopd.models.families import pad_left
from vlopd.models.loaded import LoadedModel
from vlopd.models.thinking import Reading
from vlopd.progress import progress
from vlopd.seeding import uniforms
from vlopd.train.distributions import logprobs_at
from vlopd.train.generation import sample
from vlopd.types import Completions, Example, Prompts, parts_at_marks

T = TypeVar("T")

PLACEHOLDER = "<image>"
"""lm-eval's image placeholder in prompts, whatever the model's own token is."""

DEFAULT_MAX_GEN_TOKS = 256
"""lm-eval's default."""


class GenerationSettings(BaseModel):
    """A task's supported `generation_kwargs`, under lm-eval's names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    until: str | list[str] | None = None
    max_gen_toks: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    do_sample: bool | None = None
    temperature: NonNegativeFloat | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: NonNegativeInt | None = None
    num_beams: Literal[1] = 1

    @classmethod
    def parse(cls, task: str, settings: Mapping[str, Any] | None) -> GenerationSettings:
        """Parses generation_kwargs. Raises ConfigError with the task and the setting."""
        try:
            return cls.model_validate(settings or {})
        except ValidationError as error:
            first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, 1)
            known = (
                f"did you mean {near[0]!r}?" if near else f"known are {', '.join(cls.model_fields)}"
            )
            raise ConfigError(f"task {task}: unknown generation_kwargs.{name}; {known}")
        rule = first["msg"].removeprefix("Input should be ")
        raise ConfigError(
            f"task {task}: generation_kwargs.{name} is {first['input']!r}; it must be {rule}"
        )

    @property
    def tokens(self) -> int:
        """Maximum new tokens, from the first of lm-eval's names that is set."""
        names = (self.max_gen_toks, self.max_new_tokens, self.max_tokens)
        return next(
            (n for n in (*names, self.max_completion_tokens) if n is not None), DEFAULT_MAX_GEN_TOKS
        )

    @property
    def stops(self) -> tuple[str, ...]:
        until = [self.until] if isinstance(self.until, str) else self.until or ()
        return tuple(stop for stop in until if stop)


class Decoding(NamedTuple):
    """Decoding settings of a request."""

    tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stops: tuple[str, ...]

    @classmethod
    def of(
        cls,
        asked: GenerationSettings,
        override: GenerationConfig | None = None,
        sampled: SampledConfig | None = None,
    ) -> Decoding:
        """A task's settings, under those of eval.sampled, under its own of eval.generation."""
        own = override or GenerationConfig()
        temperature = asked.temperature or 0.0
        if asked.do_sample is False:
            temperature = 0.0
        elif asked.do_sample and not temperature:
            temperature = 1.0
        top_p, top_k = asked.top_p or 1.0, asked.top_k or None
        if sampled is not None:
            temperature, top_p, top_k = sampled.temperature, sampled.top_p, sampled.top_k
        return cls(
            own.max_tokens or asked.tokens,
            temperature if own.temperature is None else own.temperature,
            own.top_p or top_p,
            own.top_k or top_k,
            asked.stops if own.stops is None else own.stops,
        )


class Generated(NamedTuple):
    """One generated answer."""

    reading: Reading
    tokens: int
    """Tokens that were generated, thought and end token included."""
    thought_tokens: int
    """Tokens of the thought's text, at most `tokens`; 0 without one."""
    stop: Literal["end", "stop_string", "length"]
    """What ended it: an end token, a stop string, or the largest number of tokens."""

    @property
    def answered(self) -> bool:
        """Whether there is an answer, after a closed thought if there is one."""
        return self.reading.closed and bool(self.reading.answer.strip())


class ArmLM(LM):
    """lm-eval's interface to one loaded model; results do not depend on the batch size in fp32.

    `sampled` and, above it, `overrides` (by task) override the tasks' decoding settings; `draw` numbers the pass, and
    each question has its own random stream in each pass. Pictures larger than `max_pixels` are downscaled. `processes`
    share the batches, within `in_step`, and each gets all answers.
    """

    MULTIMODAL = True  # lm-eval checks this before it sends requests with images

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int = 16,
        title: str = "",
        quiet: bool = False,
        sampled: SampledConfig | None = None,
        max_pixels: int | None = None,
        processes: Accelerator | None = None,
    ):
        super().__init__()
        self.loaded, self.batch_size, self.title, self.quiet = loaded, batch_size, title, quiet
        self.sampled, self.draw, self.max_pixels = sampled, 0, max_pixels
        self.processes = processes
        self.overrides: Mapping[str, GenerationConfig] = {}
        self.generated: dict[tuple[str, int], list[Generated]] = {}
        self.largest_picture: dict[str, tuple[int, int]] = {}
        self._device = loaded.device

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.name.replace("/", "__")

    @property
    def max_length(self) -> int:
        """The model's context length in tokens; without a limit, lm-eval's default."""
        own = self.loaded.context_length
        return own or resolve_max_length(self.loaded.model.config, self.loaded.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template's text, for lm-eval's record."""
        return self.loaded.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages, with images as <image>, by this model's chat template."""
        messages = [{**turn, "content": image_parts(turn["content"])} for turn in chat_history]
        return self.loaded.render_text(Example("", tuple(messages)), add_generation_prompt)

    # ------------------------------------------------------------------------------ lm-eval's requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates answers, each cut at the first stop string of its request; reasoning is removed, not cut.

        Equals lm-eval's own classes with `think_end_token`, except that an answer is empty where the reasoning was cut
        off. `generated` keeps the reasoning, the lengths and what ended each answer.
        """
        # a task with `repeats` sends the same request several times
        occurrences: Counter[str] = Counter()
        names = []
        for request in requests:
            question = f"{request.task_name} {request.doc_id} {request.idx} {request.args[0]}"
            names.append((question, self.draw, occurrences[question]))
            occurrences[question] += 1

        def answer(indices: Sequence[int]) -> list[tuple[str, Generated]]:
            batch = [requests[i] for i in indices]
            how = self.decoding(batch[0])
            draws = None
            if how.temperature > 0:
                draws = torch.cat([uniforms(1, how.tokens, "eval", *names[i]) for i in indices])
            prompts = self.encode(batch, self.max_length - how.tokens)

            def enough(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                """Whether generation may stop: a stop string occurred; but blank lines may precede reasoning."""
                texts = self.decode(ids, mask, prompts)
                kept = [cut_at_stops(text, how.stops) for text in texts]
                thinks = bool(self.loaded.own_marks)
                found = [
                    k != t and (bool(k.strip()) or not thinks)
                    for k, t in zip(kept, texts, strict=True)
                ]
                return torch.tensor(found, device=ids.device)

            completions = sample(
                self.loaded,
                prompts,
                how.tokens,
                temperature=how.temperature,
                uniforms=draws,
                top_k=how.top_k,
                top_p=how.top_p,
                enough=enough if how.stops else None,
            )
            readings = self.loaded.read(completions.ids, completions.mask, prompts)
            answers = [cut_at_stops(reading.answer, how.stops) for reading in readings]
            return [
                (kept, self.generated_row(completions, k, reading, kept != reading.answer))
                for k, (kept, reading) in enumerate(zip(answers, readings, strict=True))
            ]

        answered = self.in_batches(requests, answer, disable_tqdm, key=self.decoding)
        for request, (_, found) in zip(requests, answered, strict=True):
            place = (str(request.task_name), request.doc_id)
            self.generated.setdefault(place, []).append(found)
        return [kept for kept, _ in answered]

    def generated_row(
        self, completions: Completions, k: int, reading: Reading, cut: bool
    ) -> Generated:
        """Row k of the completions; `cut`: whether its answer ended at a stop string."""
        ids = completions.ids[k][completions.mask[k]].tolist()
        thought = 0
        if reading.thought is not None:
            text = self.loaded.tokenizer(reading.thought, add_special_tokens=False)
            thought = min(len(text["input_ids"]), len(ids)) if reading.closed else len(ids)
        if cut:
            return Generated(reading, len(ids), thought, "stop_string")
        if ids and ids[-1] in self.loaded.end_ids:
            return Generated(reading, len(ids), thought, "end")
        stopped = bool(completions.ended[k])
        return Generated(reading, len(ids), thought, "stop_string" if stopped else "length")

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether it is the greedy one) per request.

        Raises ConfigError where the prompt opens a reasoning block, which would contain the continuation.
        """
        for request in requests:
            self.refuse_open_thought(str(request.task_name), request.args[0])

        def score(indices: Sequence[int]) -> list[tuple[float, bool]]:
            batch = [requests[i] for i in indices]
            if _has_images(batch[0]):
                return self.score_after_images(batch)
            pairs = [self.pair_ids(r.args[0], r.args[1]) for r in batch]
            # truncated on the left, as in lm-eval
            contexts = [c[-max(1, self.max_length + 1 - len(row)) :] for c, row in pairs]
            return self.score(self.prompts(contexts), [row for _, row in pairs])

        return self.in_batches(requests, score, disable_tqdm)

    def refuse_open_thought(self, task: str, prompt: str) -> None:
        """Raises ConfigError where a prompt for scored choices opens a reasoning block."""
        if self.loaded.opened_by(prompt):
            raise ConfigError(
                f"task {task}: {self.loaded.name}'s prompt opens a thought, within which choices would be "
                "scored; disable thinking (template_arguments = {enable_thinking = false}, if its template has "
                "that), set eval.chat_template = false, or use a generative task"
            )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of the model's context length."""

        def score(indices: Sequence[int]) -> list[float]:
            ids = self.text_ids(requests[indices[0]].args[0])
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(ids, self.prefix_id, self.max_length - 1, 1),
            )
            total = 0.0
            for context, continuation in windows:
                total += self.score(self.prompts([context]), [continuation])[0][0]
            return [total]

        return self.in_batches(requests, score, disable_tqdm, size=1)

    # ----------------------------------------------------------------------------------------- helpers

    def in_batches(
        self,
        requests: Sequence[Instance],
        answer: Callable[[Sequence[int]], list[T]],
        disable_tqdm: bool,
        key: Callable[[Instance], Any] = lambda r: 0,
        size: int | None = None,
    ) -> list[T]:
        """Answers requests in batches of one kind (images or not, then `key`), longest prompt first.

        `size`: requests a batch, by default the batch size. Batches are the same however many processes share them.
        Returns the answers in request order.
        """
        size = size or self.batch_size
        kinds = [(_has_images(request), key(request)) for request in requests]
        groups: dict[Any, list[int]] = {}
        for i, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(i)
        batches = []
        for group in groups.values():
            group.sort(key=lambda i: -len(requests[i].args[0]))
            batches += [group[start : start + size] for start in range(0, len(group), size)]

        def digest(batch: Sequence[int]) -> str:
            return digest_json([f"{requests[i].doc_id} {requests[i].args[0]}" for i in batch])

        total = sum(map(len, share_of(self.processes, batches)))
        with self.bar(requests, total, disable_tqdm) as bar:

            def work(batch: Sequence[int]) -> tuple[str, list[T], dict[str, tuple[int, int]]]:
                found = answer(batch)
                bar.update(len(batch))
                return digest(batch), found, dict(self.largest_picture)

            shared = share(self.processes, work, batches)
        answers: dict[int, T] = {}
        for batch, (asked, found, largest) in zip(batches, shared, strict=True):
            if asked != digest(batch):
                raise RunError(
                    f"task {requests[batch[0]].task_name}: its questions differ from one process to another; "
                    "evaluate it in one process"
                )
            answers |= zip(batch, found, strict=True)
            for task, picture in largest.items():
                self.note_picture(task, picture)
        return [answers[i] for i in range(len(requests))]

    def bar(self, requests: Sequence[Instance], total: int, disable: bool) -> Any:
        """The progress bar of a task's requests, such as "full: shapes"; `total` of them are this process's."""
        tasks = sorted({str(request.task_name) for request in requests})
        title = f"{self.title}: {', '.join(tasks[:3])}{', ...' if len(tasks) > 3 else ''}"
        unit = "request"
        return progress(title=title, total=total, unit=unit, disable=disable or self.quiet)

    def decoding(self, request: Instance) -> Decoding:
        """The decoding settings of a request."""
        task = str(request.task_name)
        asked = GenerationSettings.parse(task, request.args[1])
        return Decoding.of(asked, self.overrides.get(task), self.sampled)

    @property
    def prefix_id(self) -> int:
        """The token before a text without context."""
        bos = self.loaded.tokenizer.bos_token_id
        return self.loaded.end_ids[0] if bos is None else bos

    def text_ids(self, text: str) -> list[int]:
        """Tokenizes a text, with the tokenizer's BOS unless the text begins with it."""
        tokenizer = self.loaded.tokenizer
        prefix = tokenizer.decode([self.prefix_id])
        return tokenizer(text, add_special_tokens=not text.startswith(prefix))["input_ids"]

    def encode(
        self, batch: Sequence[Instance], longest: int | None = None, scored: bool = False
    ) -> Prompts:
        """Encodes prompts of one kind. Text beyond `longest` tokens is truncated on the left; image prompts cannot be.

        Of a prompt whose continuations are `scored`, white space at the end belongs to these (`pair_ids`).

        Raises ConfigError where a prompt with images is longer, or a text prompt does not fit at all.
        """
        task = batch[0].task_name
        if longest is not None and longest < 1:
            raise ConfigError(
                f"task {task} needs more new tokens than {self.loaded.name}'s context of "
                f"{self.max_length}; lower its max_gen_toks (eval.generation.{task}.max_tokens)"
            )
        texts = [request.args[0].rstrip() if scored else request.args[0] for request in batch]
        if not _has_images(batch[0]):
            return self.prompts([self.text_ids(text)[-(longest or 0) :] for text in texts])
        prompts = self.loaded.encode(texts, [self.pictures(request) for request in batch])
        if longest is not None and prompts.input_ids.shape[1] > longest:
            raise ConfigError(
                f"task {task}: a prompt with its pictures has {prompts.input_ids.shape[1]} tokens, and "
                f"{self.loaded.name} has room for {longest}; lower max_gen_toks or the image size (eval.max_pixels)"
            )
        return prompts

    def pictures(self, request: Instance) -> list[Image.Image]:
        """A request's images within `max_pixels`; the largest of each task is noted."""
        shown = [within_pixels(image, self.max_pixels) for image in images_of(request)]
        task = str(request.task_name)
        for image in shown:
            self.note_picture(task, image.size)
        return shown

    def note_picture(self, task: str, size: tuple[int, int]) -> None:
        """Keeps a picture's size where it is the task's largest; of equal ones the first."""
        largest = self.largest_picture.get(task, (0, 0))
        self.largest_picture[task] = max(largest, size, key=math.prod)

    def prompts(self, rows: Sequence[Sequence[int]]) -> Prompts:
        """Token ids -> model inputs, left-padded."""
        ids = [torch.tensor([row], dtype=torch.long) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        padded = Prompts(pad_left(ids, self.loaded.pad_id), pad_left(masks, 0))
        self.loaded.check_prompts(padded)
        return padded.to(self.loaded.device, self.loaded.model.dtype)

    def pair_ids(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids after it), by lm-eval's convention."""
        if not context:
            ids = self.loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"]
            return ([self.prefix_id], ids) if ids[0] != self.prefix_id else (ids[:1], ids[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        own = self.text_ids(context)
        return own, self.text_ids(context + continuation)[len(own) :]

    def decode(
        self, ids: torch.Tensor, mask: torch.Tensor, prompts: Prompts | None = None
    ) -> list[str]:
        """Decodes the answer of each row, without special tokens and reasoning (LoadedModel.read)."""
        return [reading.answer for reading in self.loaded.read(ids, mask, prompts)]

    def score_after_images(self, batch: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Scores continuations of prompts with images.

        Choices of one question that differ in their last token alone share a forward pass.
        """
        rows = [self.pair_ids(request.args[0], request.args[1])[1] for request in batch]
        questions = [
            (request.args[0], id(request.args[2]), tuple(row[:-1]))
            for request, row in zip(batch, rows, strict=True)
        ]
        first = {question: k for k, question in reversed(list(enumerate(questions)))}
        asked = {question: place for place, question in enumerate(first)}
        prompts = self.encode([batch[k] for k in first.values()], scored=True)
        return self.score(prompts, rows, [asked[question] for question in questions])

    @torch.no_grad()
    def score(
        self, prompts: Prompts, rows: list[list[int]], after: Sequence[int] | None = None
    ) -> list[tuple[float, bool]]:
        """(total log-probability, whether greedy) of each row of tokens after its prompt.

        `after` has each row's prompt, by default one each; rows of one prompt may differ in their last token alone.
        """
        after = range(len(rows)) if after is None else after
        passed = dict(zip(after, rows, strict=True))  # the tokens in each prompt's forward pass
        lengths = [len(passed[prompt]) for prompt in range(len(passed))]
        ids = torch.zeros(len(passed), max(lengths), dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for prompt, row in passed.items():
            ids[prompt, : len(row)] = torch.tensor(row)
            mask[prompt, : len(row)] = True
        tokens = torch.tensor([token for row in rows for token in row])
        self.loaded.check_ids(tokens)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places = [
            ends[prompt] - len(row) + k
            for prompt, row in zip(after, rows, strict=True)
            for k in range(len(row))
        ]
        ids, mask, tokens = (each.to(self.device) for each in (ids, mask, tokens))
        given = Completions(
            ids, mask, torch.zeros(ids.shape), torch.ones(len(ids), dtype=torch.bool)
        )
        hidden = self.loaded.completion_hidden(prompts, given)[places]
        logits = self.loaded.logits(hidden, self.loaded.vocabulary_rows).float()
        logprobs = logprobs_at(logits, tokens)
        greedy = logits.argmax(-1) == tokens
        counts = [len(row) for row in rows]
        return [
            (float(values.double().sum()), bool(agrees.all()))
            for values, agrees in zip(logprobs.split(counts), greedy.split(counts), strict=True)
        ]


def image_parts(content: str | list[Any]) -> str | list[Any]:
    """Splits `<image>how many` into an image part and a text part; text without images stays a string."""
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return content
    return parts_at_marks(content, PLACEHOLDER)


def _has_images(request: Instance) -> bool:
    return bool(images_of(request))


def images_of(request: Instance) -> list[Image.Image]:
    if len(request.args) < 3:
        return []
    return [image.convert("RGB") for image in request.args[2].get("visual") or []]


def within_pixels(image: Image.Image, most: int | None) -> Image.Image:
    """Downscales an image to at most `most` pixels in area, keeping its shape; returns smaller ones as they are."""
    width, height = image.size
    if most is None or width * height <= most:
        return image
    scale = math.sqrt(most / (width * height))
    # a side of 1 leaves the whole area to the other
    short = max(1, int(min(width, height) * scale))
    long = max(1, min(int(max(width, height) * scale), most // short))
    size = (long, short) if width >= height else (short, long)
    return image.resize(size, Image.Resampling.LANCZOS)


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
