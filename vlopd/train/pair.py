"""A student and its teacher or teachers, if any, which share a vocabulary and nothing else.

Each model renders its own prompt, with its own template, processor and image resolution; what they share
is the completion's tokens. Losses are over the shared vocabulary at the completion's positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from vlopd import distributed
from vlopd.config.engines import VllmEngine
from vlopd.config.input import value_of
from vlopd.config.models import (
    CaptionContext,
    FunctionContext,
    MixedTeachers,
    ModelConfig,
    RoutedTeachers,
    TeacherConfig,
    TeachersConfig,
    as_table,
    teachers_by_name,
)
from vlopd.config.objective import LossConfig, RewardConfig, RolloutConfig
from vlopd.data.raw_values import cell_text, nested_value
from vlopd.engines.scored import ScoredModel, scored_model
from vlopd.engines.served import ServedModel, served_model
from vlopd.errors import ConfigError, DataError, UserError
from vlopd.models import families
from vlopd.models.load import (
    DTYPES,
    load_configured,
    load_generation_config,
    load_model_config,
    load_processor,
    local_folder,
)
from vlopd.models.loaded import LoadedModel
from vlopd.models.meta import meta_model
from vlopd.models.vocabulary import SharedVocabulary, read_vocabulary, share_vocabulary
from vlopd.train.decoding import chosen_engine
from vlopd.train.distributions import logprobs_at
from vlopd.train.generation import sample
from vlopd.train.losses import (
    Sampled,
    TokenDivergence,
    TokenInputs,
    by_column,
    chunked_divergence,
)
from vlopd.train.teacher import (
    AnyTeacher,
    ByTeacher,
    Mixture,
    PermutedTeacher,
    ScoredTeacher,
    Teacher,
)
from vlopd.train.teacher_cache import TeacherCache
from vlopd.train.token_selection import at_selected
from vlopd.types import Completions, Example, Prompts

LoadedTeachers = dict[tuple[Any, ...], LoadedModel]
"""Fixed teachers by configuration, precision, device and folder: what `load_pair` keeps from one pair to the next."""


Draw = Callable[
    [Prompts, RolloutConfig, Tensor, Sequence[int] | None, Sequence[Example] | None], Completions
]
"""(prompts, settings, uniforms [B', C], rows [B'], examples [B]) -> completions, as of `ModelPair.sample`."""


class Rendered(NamedTuple):
    """An example as each model of a pair that reads it does: single prompts, on the CPU."""

    example: Example
    student: Prompts
    teachers: ByTeacher


class TeacherForward(NamedTuple):
    """A teacher's forward pass over its rows of a batch: hidden states [N_k, H'] that predict their tokens."""

    teacher: AnyTeacher | PermutedTeacher
    rows: list[int]
    hidden: Tensor

    def to(self, device: torch.device) -> TeacherForward:
        """With the hidden states on a device."""
        return self._replace(hidden=self.hidden.to(device))


@dataclass(frozen=True, repr=False)
class ModelPair:
    """Student and teachers, loaded; without a teacher, sampling and the losses that need none.

    `by_name` are the teachers that score examples, a mixture as one. Of several, an example's field `field` names
    its own; None where there is one at most.
    """

    student: LoadedModel
    by_name: Mapping[str, AnyTeacher]
    vocabulary: SharedVocabulary
    field: str | None = None
    sampler: Draw | None = None
    """Samples in place of this process's student."""

    def __repr__(self) -> str:
        models = [f"student {self.student}", *(f"teacher {its.loaded}" for its in self.teachers)]
        device, dtype = self.student.device, str(self.student.model.dtype).removeprefix("torch.")
        return f"ModelPair({', '.join(models)}; {self.vocabulary.size:,} shared tokens, {dtype} on {device})"

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All teacher models, the members of a mixture included."""
        return tuple(member for teacher in self.by_name.values() for member in teacher.members)

    def without_teachers(self) -> ModelPair:
        """The student alone, which still samples only the tokens that it shares with its teachers."""
        return replace(self, by_name={}, field=None)

    def with_teacher_cache(self, cache: TeacherCache) -> ModelPair:
        """The same pair, whose teachers keep hidden states of completions."""
        return replace(self, by_name={n: its.with_cache(cache) for n, its in self.by_name.items()})

    def for_loss(self, loss: LossConfig) -> ModelPair:
        """The same pair, whose teachers give what a loss reads. Raises ConfigError where one cannot."""
        return replace(self, by_name={n: its.for_loss(loss) for n, its in self.by_name.items()})

    @property
    def has_whole_teachers(self) -> bool:
        """Whether all teachers' whole distributions are known."""
        return all(its.is_whole for its in self.by_name.values())

    def with_own_processors(self) -> ModelPair:
        """The same pair with copies of its processors, for another thread."""
        return replace(
            self,
            student=self.student.with_own_processor(),
            by_name={name: its.with_own_processors() for name, its in self.by_name.items()},
        )

    def render(self, examples: Sequence[Example]) -> list[Rendered]:
        """Each example as the student and its teachers read it, on the CPU, in the models' dtypes."""
        theirs: list[dict[int, Prompts]] = [{} for _ in examples]
        students = on_host(self.student, examples)
        for teacher, rows in self.assign(examples):
            for member in teacher.members:
                views = [member.view(examples[i]) for i in rows]
                for i, prompts in zip(rows, on_host(member.loaded, views), strict=True):
                    theirs[i][member.index] = prompts
        return [Rendered(*each) for each in zip(examples, students, theirs, strict=True)]

    def sample(
        self,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """The student's completions, of shared tokens only: one a prompt, or of the prompts `rows` [B'].

        `uniforms` [B', max_new_tokens]. `examples` are those that the prompts are of: vLLM gets their pictures.
        """
        if self.sampler is not None:
            return self.sampler(prompts, rollout, uniforms, rows, examples)
        return sample(
            self.student,
            prompts,
            rollout.max_new_tokens,
            rollout.temperature,
            uniforms,
            self.vocabulary.student,
            rollout.top_k,
            rollout.top_p,
            rows=rows,
            engine=rollout.decode,
        )

    def engine_notes(self, rollout: RolloutConfig) -> list[str]:
        """Says which engine runs the decode steps where another than eager is asked for, and why it is not that."""
        if rollout.decode == "eager":
            return []
        shares = rollout.source.shares
        models = [self.student] if "student" in shares else []
        models += [its.loaded for its in self.teachers] if "teacher" in shares else []
        found = [(its.name, *chosen_engine(its, rollout.decode)) for its in models]
        return [f"{name}: {why or f'decode steps by {engine!r}'}" for name, engine, why in found]

    def teacher_sample(
        self,
        teacher: Teacher,
        prompts: Prompts,
        rollout: RolloutConfig,
        uniforms: Tensor,
        rows: Sequence[int] | None = None,
        examples: Sequence[Example] | None = None,
    ) -> Completions:
        """As `sample`, of a teacher whose prompts these are, as the student's ids.

        Of shared tokens only, and without either model's image placeholders.
        """
        unsampleable = torch.tensor(self.student.unsampleable_ids, dtype=torch.long)
        banned = unsampleable[self.vocabulary.contains(unsampleable)]
        its = teacher.loaded
        theirs = (its.sample if isinstance(its, ServedModel) else partial(sample, its))(
            prompts,
            rollout.max_new_tokens,
            rollout.temperature,
            uniforms,
            self.vocabulary.teachers[teacher.index],
            rollout.top_k,
            rollout.top_p,
            self.vocabulary.in_teacher(banned, teacher.index).tolist(),
            rows=rows,
            engine=rollout.decode,
        )
        return self.vocabulary.translate_back(theirs, teacher.index, self.student.pad_id)

    def teacher_forward(
        self,
        examples: Sequence[Example],
        completions: Completions,
        rendered: Sequence[Rendered] | None = None,
    ) -> list[TeacherForward]:
        """The teachers' forward passes over the completions: the costly, gradient-free half of the loss.

        `rendered` are the examples as `render` gives them; None: they are rendered here.
        """
        forwards = []
        for teacher, rows in self.assign(examples):
            theirs = None if rendered is None else [rendered[i].teachers for i in rows]
            hidden = teacher.hidden([examples[i] for i in rows], completions.take(rows), theirs)
            forwards.append(TeacherForward(teacher, rows, hidden))
        return forwards

    def divergence(
        self,
        loss: LossConfig,
        examples: Sequence[Example],
        prompts: Prompts,
        completions: Completions,
        diagnostics: bool = True,
    ) -> TokenDivergence:
        """The loss at every completion token, [N]; gradients flow to the student only.

        `prompts` are the examples as the student reads them; teachers render their own. Under autograd the gradient
        of all logits is kept, [N, V]; training back-propagates in chunks instead (`loss_of`).
        """
        pair = self.for_loss(loss)
        forwards = pair.teacher_forward(examples, completions)
        return pair.loss_of(loss, forwards, prompts, completions, diagnostics=diagnostics)

    def loss_of(
        self,
        loss: LossConfig,
        forwards: Sequence[TeacherForward],
        prompts: Prompts,
        completions: Completions,
        reward: RewardConfig | None = None,
        advantages: Tensor | None = None,
        weights: Tensor | None = None,
        diagnostics: bool = True,
        learned: Sequence[TeacherForward] | None = None,
    ) -> TokenDivergence:
        """As `divergence`, from the teachers' forward passes, with a reward's `advantages` [B] mixed in.

        With `weights` [N], the sum of weight * loss is back-propagated here, a chunk of tokens at a time; where
        `learned` is given, the loss against these instead, and that against `forwards` is returned.
        """
        hidden = self.student.completion_hidden(prompts, completions)
        # the chunks' gradients meet here, so that the backbone's backward pass is one
        student_hidden = hidden
        if weights is not None:
            student_hidden = hidden.detach().requires_grad_(hidden.requires_grad)
        per_token = None if advantages is None else spread(advantages, completions.mask)
        no_teacher = (None, list(range(len(completions.ids))), None)

        def against(
            theirs: Sequence[TeacherForward], weights: Tensor | None, diagnostics: bool
        ) -> TokenDivergence:
            pieces, order = [], []
            # over the whole vocabulary, of which some teachers give a few log-probs alone
            diagnostics = diagnostics and all(its.teacher.is_whole for its in theirs)
            for teacher, rows, teacher_hidden in theirs or (no_teacher,):
                tokens, mine = tokens_of_rows(completions, rows), completions.take(rows)

                def own(column: Tensor | None, tokens: Tensor | None = tokens) -> Any:
                    return column if column is None or tokens is None else column[tokens]

                sampled = Sampled(self.vocabulary.targets(mine), mine.logprobs[mine.mask])
                if per_token is not None:
                    sampled = sampled._replace(advantages=own(per_token))
                inputs = TokenInputs(
                    own(student_hidden),
                    lambda hidden: self.student.logits(hidden, self.vocabulary.student),
                    teacher_hidden,
                    None if teacher is None else teacher.logits,
                    sampled,
                    own(weights),
                )
                if loss.tokens is None:
                    pieces.append(chunked_divergence(loss, inputs, reward, diagnostics))
                else:
                    pieces.append(at_selected(loss, mine.mask, inputs, reward, diagnostics))
                order.append(tokens)
            return by_column(lambda column: in_order(column, order), pieces)

        if learned is None:
            found = against(forwards, weights, diagnostics)
        else:
            with torch.no_grad():
                found = against(forwards, None, diagnostics)
            against(learned, weights, False)
        if weights is not None and student_hidden.grad is not None:
            hidden.backward(student_hidden.grad)
        return found

    def assign(self, examples: Sequence[Example]) -> list[tuple[AnyTeacher, list[int]]]:
        """Each teacher with its rows of the batch; none without a teacher.

        Raises UserError with the example's id where its field names no teacher.
        """
        if self.field is None:
            return [(teacher, list(range(len(examples)))) for teacher in self.by_name.values()]
        rows: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            try:
                name = cell_text(nested_value(example.fields, self.field))
            except DataError as error:
                raise UserError(
                    f"example {example.id!r}: field {self.field!r} (teacher.field) {error}"
                ) from None
            if name is None or name not in self.by_name:
                raise UserError(
                    f"example {example.id!r}: field {self.field!r} is {name!r}, which is not among the "
                    f"teachers {', '.join(self.by_name)} (teacher.teachers)"
                )
            rows.setdefault(name, []).append(i)
        return [(self.by_name[name], mine) for name, mine in rows.items()]

    def check_teachers_prompt(self, examples: Sequence[Example]) -> None:
        """Raises UserError where a teacher cannot read these: a picture for a text-only model, a missing field."""
        for teacher, rows in self.assign(examples):
            for member in teacher.members:
                member.loaded.render_each([member.view(examples[i]) for i in rows])

    @torch.no_grad()
    def student_logprobs(
        self, prompts: Prompts, completions: Completions, chunk: int | None = None
    ) -> Tensor:
        """The student's log-probability of every completion token, [N] nats; logits of `chunk` tokens at once."""
        hidden = self.student.completion_hidden(prompts, completions)
        targets, size = self.vocabulary.targets(completions), chunk or len(hidden)
        pieces = [
            logprobs_at(self.student.logits(part, self.vocabulary.student), at)
            for part, at in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def teacher_logits(self, examples: Sequence[Example], completions: Completions) -> Tensor:
        """Each example's teacher's logits at every completion token, [N, V], unchunked."""
        pieces, order = [], []
        for teacher, rows, hidden in self.teacher_forward(examples, completions):
            pieces.append(teacher.logits(hidden))
            order.append(tokens_of_rows(completions, rows))
        return in_order(pieces, order)

    def teacher_logprobs(self, examples: Sequence[Example], completions: Completions) -> Tensor:
        """Each example's teacher's log-probability of every completion token, [N] nats."""
        logits = self.teacher_logits(examples, completions)
        return logprobs_at(logits, self.vocabulary.targets(completions))


def on_host(loaded: LoadedModel, examples: Sequence[Example]) -> list[Prompts]:
    """Examples -> single prompts on the CPU, in the model's dtype. Raises as `LoadedModel.render_each`."""
    return [each.to("cpu", loaded.model.dtype) for each in loaded.render_each(examples)]


def in_order(pieces: Sequence[Tensor], order: Sequence[Tensor | None]) -> Tensor:
    """Pieces [N_k, ...] for the flat tokens `order` [N_k] of a batch, as one [N, ...]."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces))[torch.cat([o for o in order if o is not None]).argsort()]


def spread(per_row: Tensor, mask: Tensor) -> Tensor:
    """[B] values, [B, C] mask -> [N]: each row's value at each of its tokens."""
    return per_row[:, None].expand(mask.shape)[mask]


def tokens_of_rows(completions: Completions, rows: Sequence[int]) -> Tensor | None:
    """Indices of the rows' tokens among the batch's flat completion tokens; None where it is all of them."""
    if list(rows) == list(range(len(completions.ids))):
        return None
    flat = torch.full_like(completions.ids, -1)
    flat[completions.mask] = torch.arange(completions.n_tokens, device=flat.device)
    part = torch.tensor(rows, device=flat.device)
    return flat[part][completions.mask[part]]


def shared_vocabulary(
    student: ModelConfig, teachers: Iterable[TeacherConfig] = ()
) -> SharedVocabulary:
    """Lines up the teachers' vocabularies with the student's; no weights are read. Raises ConfigError."""
    own = read_vocabulary(student)
    others = [own if each.is_student else read_vocabulary(each) for each in teachers]
    return share_vocabulary(own, others)


def refuse_text_only(
    student: ModelConfig,
    teachers: Mapping[str, TeacherConfig],
    known: Mapping[str, PretrainedConfig] | None = None,
) -> None:
    """Raises ConfigError for a text-only model of data with images, unless it is a teacher that reads a caption, or
    what a function makes of an example (checked where it is rendered).

    `known` are model configurations by name ("student", a teacher's); the others are read.
    """
    for name, model in {"student": student, **teachers}.items():
        if isinstance(model, TeacherConfig):
            if isinstance(model.context, (CaptionContext, FunctionContext)) or model.is_student:
                continue
            remedy = f'give it a text view: {name}.context = {{type = "caption", column = ...}}'
        else:
            remedy = "use a vision-language model, or data without images"
        own = (known or {}).get(name)
        if own is None:
            own = load_model_config(model.model, model.revision, model.trust_remote_code)
        if not families.sees_images(own):
            raise ConfigError(
                f"the data has images, but {name} {model.model} is text-only; {remedy}"
            )


def without_weights(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: Any = "meta",
    folder: Path | str | None = None,
    as_loaded: bool = False,
) -> LoadedModel:
    """A model's tokenizer or processor with its parameters' names and shapes; takes the place of `load_configured`.

    as_loaded: in `dtype` and with the attention of the config, for weights that follow.
    """
    name, revision = str(folder or config.model), None if folder else config.revision
    about = load_model_config(name, revision, config.trust_remote_code)
    model = meta_model(about, dtype, config.attention) if as_loaded else meta_model(about)
    model.generation_config = load_generation_config(name, about, revision)
    arguments = config.template_arguments
    processor = load_processor(name, revision, config.trust_remote_code, config.template, arguments)
    return LoadedModel(name, model, processor, arguments, local_folder(name, revision))


def load_pair(
    student: ModelConfig | Mapping[str, Any] | str | Path,
    teacher: TeachersConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    compute: Literal["auto", "fp32", "bf16"] = "auto",
    device: torch.device | str | None = None,
    images: bool = False,
    student_folder: Path | str | None = None,
    load: Callable[..., LoadedModel] = load_configured,
    kept: LoadedTeachers | None = None,
    with_teachers: bool = True,
    sharded: bool = False,
) -> ModelPair:
    """Loads student and teachers.

    Args:
        student: a folder, hub id, .gguf file or `builtin:NAME`; a table as in a config's [student] (docs/models.md).
        teacher: the same, or a table as in [teacher], with a context or several teachers; None for losses without.
        compute: precision of weights and activations; "auto" is bf16 on accelerators and on CPUs with bf16
            instructions, else fp32.
        device: by default the one that training uses.
        images: whether the data has images, which a text-only model is then refused for.
        student_folder: takes the place of the configured student.
        load: loads one model of a config.
        kept: teachers loaded for the pair before, reused where they are the same and fixed; replaced by this pair's.
        with_teachers: whether the teachers' weights are loaded; without, the pair has their vocabulary alone.
        sharded: whether of several processes the first alone loads the student's weights, into host memory, for
            train.sharding = "full" (`distill` splits them).

    Returns a ModelPair. Raises ConfigError, before any weights are read, where a model cannot be read, vocabularies
    disagree or, with `images`, a model is text-only.

    >>> load_pair("builtin:shapes-student", "builtin:shapes-teacher", images=True)
    ModelPair(student builtin:shapes-student (0.7 M parameters with images), teacher builtin:shapes-teacher
    (2.6 M parameters with images); 58 shared tokens, bfloat16 on cpu)
    """
    own: ModelConfig = value_of(ModelConfig, as_table(student), "student")
    plan = None if teacher is None else value_of(TeachersConfig, teacher, "teacher")
    configs = teachers_by_name(plan)
    if compute not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"compute = {compute!r}: must be one of auto, fp32, bf16")
    device = distributed.accelerator().device if device is None else device
    distributed.refuse_missing_device(device)
    dtype = DTYPES[distributed.resolve_compute(compute, device)]
    if images:
        refuse_text_only(own, configs)
    vocabulary = shared_vocabulary(own, configs.values())

    def load_student() -> LoadedModel:
        state = distributed.accelerator() if sharded else None
        if state is None or state.num_processes == 1:
            return load(own, dtype, device, student_folder)
        with distributed.together(state):
            if state.is_main_process:
                return load(own, dtype, "cpu", student_folder)
            return without_weights(own, dtype, folder=student_folder, as_loaded=True)

    if not with_teachers:
        return ModelPair(load_student(), {}, vocabulary)
    teachers: dict[str, Teacher] = {}
    kept = {} if kept is None else kept
    keys = []
    for its in configs.values():
        model = its.loaded_from(own).model_dump_json(include={*ModelConfig.model_fields, "engine"})
        keys.append((model, dtype, str(device), str(student_folder) if its.is_student else None))
    fixed = {key for key, its in zip(keys, configs.values(), strict=True) if its.ema is None}
    for key in kept.keys() - fixed:
        del kept[key]  # before others are loaded beside it
    for index, (key, (name, its)) in enumerate(zip(keys, configs.items(), strict=True)):
        loaded = None if its.ema is not None else kept.get(key)
        if loaded is None:
            folder = student_folder if its.is_student else None
            if its.engine is not None and load is load_configured:
                shapes, where = without_weights(its, dtype), torch.device(device)
                if isinstance(its.engine, VllmEngine):
                    loaded = scored_model(shapes, its, its.engine, dtype, where)
                else:
                    loaded = served_model(shapes, its, its.engine, dtype, where)
            else:
                loaded = load(its.loaded_from(own), dtype, device, folder)
            loaded.model.requires_grad_(False)
        if its.ema is None:
            kept[key] = loaded
        of = ScoredTeacher if isinstance(loaded, ScoredModel) else Teacher
        teachers[name] = of(loaded, vocabulary, index, its.context, its.ema)
    trained = load_student()
    if isinstance(plan, RoutedTeachers):
        return ModelPair(trained, teachers, vocabulary, plan.field)
    if isinstance(plan, MixedTeachers):
        weights = [plan.weights.get(name, 1.0) for name in teachers]
        total = sum(weights)
        mixture = Mixture(tuple(teachers.values()), tuple(weight / total for weight in weights))
        return ModelPair(trained, {"mixture": mixture}, vocabulary)
    return ModelPair(trained, teachers, vocabulary)
