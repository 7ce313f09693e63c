"""A teacher: one model with its context and its place in the shared vocabulary; or a mixture of several.

Both have the same interface: the hidden states that predict each completion token, and the logits of such states
over the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vlopd.config.models import ContextConfig
from vlopd.config.objective import SCORES_ALONE, Divergence, LossConfig, TopK, whole_teacher_need
from vlopd.digests import digest_checkpoint
from vlopd.engines.scored import ScoredModel
from vlopd.errors import ConfigError
from vlopd.models.loaded import LoadedModel
from vlopd.models.vocabulary import SharedVocabulary
from vlopd.train.distributions import logprobs_at
from vlopd.train.teacher_cache import TeacherCache, key_of, rows_of
from vlopd.train.teacher_context import teacher_view
from vlopd.types import Completions, Example, Prompts

ByTeacher = Mapping[int, Prompts]
"""One example as its teachers read it, by their index: single prompts."""


@dataclass(frozen=True)
class Teacher:
    """One model in its context. `index` is its place in the shared vocabulary; `ema` the configured decay."""

    loaded: LoadedModel
    vocabulary: SharedVocabulary
    index: int = 0
    context: ContextConfig | None = None
    ema: float | None = None
    cache: TeacherCache | None = None
    """Keeps the hidden states of completions that come again."""

    @property
    def members(self) -> tuple[Teacher, ...]:
        return (self,)

    @property
    def is_whole(self) -> bool:
        """Whether `logits` are the model's own, over the whole shared vocabulary."""
        return True

    def for_loss(self, loss: LossConfig) -> Teacher:
        """The same teacher, which gives what a loss reads. Raises ConfigError where it cannot."""
        return self

    def view(self, example: Example) -> Example:
        """The example with this teacher's context."""
        return teacher_view(self.context, example)

    def render(self, examples: Sequence[Example]) -> Prompts:
        """The examples as this teacher reads them: context added, then its own template and resolution."""
        return self.loaded.render([self.view(example) for example in examples])

    def translate(self, completions: Completions) -> Completions:
        """The student's completions in this teacher's ids."""
        return self.vocabulary.translate(completions, self.index, self.loaded.pad_id)

    def with_own_processors(self) -> Teacher:
        """The same teacher with a copy of its processor, for another thread."""
        return replace(self, loaded=self.loaded.with_own_processor())

    def with_cache(self, cache: TeacherCache) -> Teacher:
        """The same teacher, which keeps hidden states. Raises ConfigError for a model in memory alone."""
        if self.loaded.folder is None:
            raise ConfigError(
                f"train.teacher_cache_gb: the teacher {self.loaded.name} has no folder to tell its weights by; save "
                "it and load that, or leave the setting out"
            )
        return replace(self, cache=cache)

    def collate(
        self, examples: Sequence[Example], rendered: Sequence[ByTeacher] | None = None
    ) -> Prompts:
        """As `render`, from what is already rendered, if it is."""
        if rendered is None:
            return self.render(examples)
        return self.loaded.collate([each[self.index] for each in rendered])

    @torch.no_grad()
    def hidden(
        self,
        examples: Sequence[Example],
        completions: Completions,
        rendered: Sequence[ByTeacher] | None = None,
    ) -> Tensor:
        """[N, H'] hidden states that predict each token of the student's completions."""
        if self.cache is not None and self.ema is None:
            return self._cached(self.cache, examples, completions, rendered)
        prompts = self.collate(examples, rendered)
        self.loaded.refuse_too_long(examples, prompts, completions.ids.shape[1])
        return self._read(examples, prompts, self.translate(completions))

    def _read(
        self, examples: Sequence[Example], prompts: Prompts, completions: Completions
    ) -> Tensor:
        """As `hidden`, of examples as this teacher reads them and completions in its ids."""
        return self.loaded.completion_hidden(prompts, completions)

    def _cached(
        self,
        cache: TeacherCache,
        examples: Sequence[Example],
        completions: Completions,
        rendered: Sequence[ByTeacher] | None,
    ) -> Tensor:
        """As `hidden`, of which only what is not kept is computed."""
        if rendered is None:
            own = self.loaded.render_each([self.view(example) for example in examples])
            rendered = [{self.index: each} for each in own]
        weights = f"{self.weights} {self.kind}"
        tokens = rows_of(self.translate(completions))
        keys = [
            key_of(weights, each[self.index], ids)
            for each, ids in zip(rendered, tokens, strict=True)
        ]
        found = [cache.get(key) for key in keys]
        missing = [i for i, hidden in enumerate(found) if hidden is None]
        if missing:
            rows = completions.take(missing).trimmed()
            plain = replace(self, cache=None)
            new = plain.hidden([examples[i] for i in missing], rows, [rendered[i] for i in missing])
            for i, hidden in zip(missing, new.split(rows.mask.sum(1).tolist()), strict=True):
                cache.put(keys[i], hidden)
                found[i] = hidden
        return torch.cat([each.to(self.loaded.device) for each in found if each is not None])

    @property
    def kind(self) -> str:
        """What decides hidden states besides weights, prompt and completion."""
        return str(self.loaded.model.dtype)

    @cached_property
    def weights(self) -> str:
        """A digest of the checkpoint that it was loaded from."""
        assert self.loaded.folder is not None, "of a model in memory nothing is kept"
        return digest_checkpoint(self.loaded.folder)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H'] -> [N, V] over the shared vocabulary, in the student's order."""
        return self.loaded.logits(hidden, self.vocabulary.teachers[self.index])

    def logprobs(self, examples: Sequence[Example], completions: Completions) -> Tensor:
        """This teacher's log-probability of every token of the student's completions, [N] nats."""
        logits = self.logits(self.hidden(examples, completions))
        return logprobs_at(logits, self.vocabulary.targets(completions))


@dataclass(frozen=True)
class ScoredTeacher(Teacher):
    """A model of whose distributions some log-probs are known: of the completion's token and the `top_k` likeliest.

    In place of hidden states [N, H'] there are these ids and log-probs, [N, 2 (1 + k)]. Logits made of them are right
    at those tokens, and in the sum over all others, which share it evenly: enough for losses of these alone.
    """

    top_k: int = 0

    def __post_init__(self) -> None:
        size, rows = self.vocabulary.size, self.loaded.vocabulary_rows
        if size != rows:
            raise ConfigError(
                f"{self.loaded.name} has {rows} tokens, of which the student shares {size}, and vLLM's log-probs are "
                'over all: set teacher.engine = {type = "vlopd"}, which gives those over the shared ones'
            )

    @property
    def is_whole(self) -> bool:
        return False

    def for_loss(self, loss: LossConfig) -> ScoredTeacher:
        """The same teacher, which is asked for as many log-probs as the loss reads. Raises ConfigError."""
        if need := whole_teacher_need(loss):
            raise ConfigError(f"{need} {SCORES_ALONE}")
        k = loss.support.k if isinstance(loss, Divergence) and isinstance(loss.support, TopK) else 0
        return replace(self, top_k=min(k, self.vocabulary.size))

    @property
    def kind(self) -> str:
        return f"{super().kind} top {self.top_k}"

    def _read(
        self, examples: Sequence[Example], prompts: Prompts, completions: Completions
    ) -> Tensor:
        assert isinstance(self.loaded, ScoredModel)
        views = [self.view(example) for example in examples]
        return self.loaded.completion_scores(views, prompts, completions, self.top_k)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, 2 (1 + k)] -> [N, V] log-probs in the student's order, of which those of other tokens are their mean."""
        ids, known = hidden.double().chunk(2, 1)
        columns = self._columns.to(hidden.device)[ids.long()]
        is_likely = (columns[:, 1:] == columns[:, :1]).any(1, keepdim=True)
        mass = known[:, 1:].exp().sum(1, keepdim=True) + known[:, :1].exp() * ~is_likely
        others = self.vocabulary.size - self.top_k - (~is_likely).double()
        rest = (1 - mass).clamp(min=SMALLEST_MASS).log() - others.clamp(min=1).log()
        found = rest.expand(-1, self.vocabulary.size).clone()
        return found.scatter_(1, columns, known).float()

    @cached_property
    def _columns(self) -> Tensor:
        """[V] the column of each of the teacher's ids."""
        theirs = self.vocabulary.teachers[self.index]
        return torch.arange(theirs) if isinstance(theirs, int) else theirs.cpu().argsort()


SMALLEST_MASS = 1e-12
"""Of all other tokens together, where what is left of 1 is rounding."""


@dataclass(frozen=True)
class Mixture:
    """Several teachers as one distribution: log p = sum_k w_k log p_k + const, weights summing to 1."""

    members: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all members are."""
        return all(its.is_whole for its in self.members)

    def for_loss(self, loss: LossConfig) -> Mixture:
        """The same mixture."""
        return self

    def with_own_processors(self) -> Mixture:
        """The same mixture with copies of its processors, for another thread."""
        return replace(self, members=tuple(its.with_own_processors() for its in self.members))

    def with_cache(self, cache: TeacherCache) -> Mixture:
        """The same mixture whose members keep hidden states."""
        return replace(self, members=tuple(its.with_cache(cache) for its in self.members))

    def hidden(
        self,
        examples: Sequence[Example],
        completions: Completions,
        rendered: Sequence[ByTeacher] | None = None,
    ) -> Tensor:
        """The members' hidden states, concatenated: [N, H'_1 + H'_2 + ...]."""
        return torch.cat([its.hidden(examples, completions, rendered) for its in self.members], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, sum H'] -> [N, V]: the weighted sum of log-probs, fp32 (softmax normalises it)."""
        sizes = [member.loaded.hidden_size for member in self.members]
        mixed = torch.zeros((), device=hidden.device)
        for member, weight, own in zip(
            self.members, self.weights, hidden.split(sizes, -1), strict=True
        ):
            mixed = mixed + weight * torch.log_softmax(member.logits(own).float(), -1)
        return mixed


@dataclass(frozen=True)
class PermutedTeacher:
    """A teacher with its logits in another order: column v has those of column `order[v]`."""

    teacher: Teacher | Mixture | PermutedTeacher
    order: Tensor  # [V]

    @property
    def is_whole(self) -> bool:
        """As the teacher."""
        return self.teacher.is_whole

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H'] -> [N, V] over the shared vocabulary."""
        return self.teacher.logits(hidden)[:, self.order.to(hidden.device)]


AnyTeacher = Teacher | Mixture
