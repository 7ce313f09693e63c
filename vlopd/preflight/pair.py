"""The pre-flight of a pair before training: `vlopd check`.

Each row of the table is one property of every model side by side, and passes, fails, or only informs. They catch what
costs days elsewhere: teachers that never get the image, templates that differ, ids that disagree, wrong logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from rich.filesize import decimal
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from vlopd import seeding
from vlopd.config.arms import CheckpointArm, DistillArm
from vlopd.config.data import DataConfig
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import TopFractionMask
from vlopd.config.models import ModelConfig, TeacherConfig
from vlopd.config.objective import NLL, ReverseKL
from vlopd.data.dataset import StoredDataset
from vlopd.data.load import load_data
from vlopd.data.mixture import MixtureDataset
from vlopd.distributed import resolve_compute
from vlopd.errors import ConfigError, UserError
from vlopd.models import families
from vlopd.models.context_length import context_length
from vlopd.models.load import (
    DTYPES,
    check_tokens,
    load_configured,
    load_generation_config,
    load_model_config,
    load_processor,
)
from vlopd.models.loaded import LoadedModel, ModelUnreadable
from vlopd.models.meta import meta_model
from vlopd.models.vocabulary import SharedVocabulary
from vlopd.preflight import memory
from vlopd.preflight.fit import settings_that_fit
from vlopd.train.lora import adapter_size
from vlopd.train.losses import TOP_K, Sampled, token_divergence
from vlopd.train.pair import ModelPair, refuse_text_only, shared_vocabulary
from vlopd.train.teacher_context import teacher_view
from vlopd.types import Completions, Example, Prompts

FEW = 8
"""Examples of a check."""

ASSUMED_PROMPT_TOKENS = 512
"""Where there is no tokenizer."""


class CheckRow(NamedTuple):
    """One line of the table: a value a model, or one for all; `ok` is None for information."""

    what: str
    values: tuple[str, ...]
    ok: bool | None = None
    remedy: str = ""


@torch.no_grad()
def preflight(
    pair: ModelPair, config: ExperimentConfig, examples: Sequence[Example]
) -> list[CheckRow]:
    """The table for a loaded pair, on a few examples; one column for the student, one a teacher."""
    asked, device = config.precision.compute, pair.student.device
    config = config.with_compute(resolve_compute(asked, device))
    for arm in checkpoint_arms(config):
        # refused here rather than after training
        load_configured(arm, DTYPES[config.precision.resolved])
    models = (pair.student, *(teacher.loaded for teacher in pair.teachers))
    views = views_of(config.teachers, examples)
    lengths, prompt_facts = prompt_rows(models, views)

    def row(what: str, of: Callable[[LoadedModel], Any]) -> CheckRow:
        return CheckRow(what, tuple(str(of(model)) for model in models))

    rows = [
        row("model", lambda m: f"{m.name} ({m.model.config.model_type})"),
        row("parameters", lambda m: f"{m.model.num_parameters():,}"),
        row("precision", lambda m: str(m.model.dtype).removeprefix("torch.")),
        compute_row(asked, config, device),
        row("vocabulary rows", rows_and_tokens),
        row("special tokens", special_tokens),
        *shared_rows(pair.vocabulary),
        row("end tokens", lambda m: tokens_of(m, m.end_ids)),
        row("never sampled", lambda m: tokens_of(m, m.unsampleable_ids)),
        *prompt_facts,
        context_row(models, lengths, config.rollout.max_new_tokens),
        *thought_rows(list(config.teachers), models, views, learns_answers(config)),
        *data_rows(config),
    ]
    prompts = pair.student.render(examples)
    uniforms = seeding.uniforms(len(examples), config.rollout.max_new_tokens, "check")
    completions = pair.sample(prompts, config.rollout, uniforms)
    if any(example.images for example in examples):
        rows.append(sight_row(pair, examples, prompts, completions))
    rows += agreement_rows(pair, examples, prompts, completions)
    ids = completions.ids[0][completions.mask[0]].tolist()
    rows.append(
        CheckRow("completion", (repr(pair.student.transcript(ids)),)),
    )
    rows.append(CheckRow("reference", (repr(examples[0].answer),)))
    readers = [
        memory.Reader(m.model, length, m.model.config._attn_implementation)
        for m, length in zip(models, lengths, strict=True)
    ]
    return rows + estimate_rows(config, readers, device, must_fit=True)


def preflight_meta(
    config: ExperimentConfig,
    device: torch.device,
    architectures: Path,
    card: str | None = None,
) -> list[CheckRow]:
    """The table without weights, from configurations and, where present, tokenizers.

    A model's configuration is read from `architectures`/<its name>/config.json where there is one, without the hub.
    `card` names one to predict for in place of `device` (`memory.CARDS`).
    """
    asked, teachers = config.precision.compute, config.teachers
    config = config.with_compute(resolve_compute(asked, device))
    wanted = (config.student, *(each.loaded_from(config.student) for each in teachers.values()))
    found = [model_config(model, architectures) for model in wanted]
    if config.data.has_images:
        by_name = dict(zip(["student", *teachers], found, strict=True))
        refuse_text_only(config.student, teachers, by_name)
    for arm in checkpoint_arms(config):
        with suppress(ModelUnreadable):  # without weights, its files may be missing
            where = (arm.model, arm.revision, arm.trust_remote_code)
            load_processor(*where, arm.template, arm.template_arguments)
    models = [meta_model(about) for about in found]
    rows = [
        CheckRow(
            "model",
            tuple(f"{m.model} ({c.model_type})" for m, c in zip(wanted, found, strict=True)),
        ),
        CheckRow("configuration", tuple(about.name_or_path for about in found)),
        CheckRow("parameters", tuple(f"{model.num_parameters():,}" for model in models)),
        CheckRow("by component", tuple(components(model) for model in models)),
        compute_row(asked, config, device),
        CheckRow(
            "vocabulary rows",
            tuple(f"{m.get_output_embeddings().weight.shape[0]:,}" for m in models),
        ),
        CheckRow("sees images", tuple("yes" if families.sees_images(c) else "no" for c in found)),
        *vocabulary_rows_of(config.student, list(teachers.values())),
    ]
    lengths, prompts = meta_prompts(config, wanted, models)
    readers = [
        memory.Reader(model, length, each.attention or "sdpa")
        for model, length, each in zip(models, lengths, wanted, strict=True)
    ]
    known = [1] * len(models) if "assumed" in prompts[0].what else lengths  # a prompt has a token
    context = context_row(models, known, config.rollout.max_new_tokens)
    return [*rows, *prompts, context, *estimate_rows(config, readers, device, card=card)]


def checkpoint_arms(config: ExperimentConfig) -> list[ModelConfig]:
    """The models that are neither student nor teacher, as evaluation loads them."""
    arms = config.arms.values()
    return [config.checkpoint_of(arm) for arm in arms if isinstance(arm, CheckpointArm)]


def meta_prompts(
    config: ExperimentConfig, wanted: Sequence[ModelConfig], models: Sequence[PreTrainedModel]
) -> tuple[list[int], list[CheckRow]]:
    """(prompt tokens of each model, rows): from examples where data and tokenizers can be read, else assumed."""
    assumed = [ASSUMED_PROMPT_TOKENS] * len(models)
    assumption = assumed, [CheckRow("prompt tokens, assumed", tuple(map(str, assumed)))]
    loaded = []
    try:
        for each, model in zip(wanted, models, strict=True):
            where = (each.model, each.revision, each.trust_remote_code)
            processor = load_processor(*where, each.template, each.template_arguments)
            model.generation_config = load_generation_config(
                each.model, model.config, each.revision
            )
            loaded.append(LoadedModel(each.model, model, processor, each.template_arguments))
    except ModelUnreadable:
        return assumption
    for own in loaded:
        check_tokens(own)
    try:
        examples = first_examples(config.data, config.teachers)
    except UserError:
        return assumption
    views = views_of(config.teachers, examples)
    lengths, rows = prompt_rows(loaded, views)
    rows += thought_rows(list(config.teachers), loaded, views, learns_answers(config))
    return lengths, rows + data_rows(config)


def turn_row(models: Sequence[LoadedModel]) -> CheckRow:
    """Is the chat template's end of turn an end token? Else completions run on into further turns."""
    ends = [model.turn_end for model in models]
    open_ended = [
        f"{model.name} closes a turn with {tokens_of(model, [end])}, but its completions end at "
        f"{tokens_of(model, model.end_ids)}: add {end} to eos_token_id in its generation_config.json"
        for model, end in zip(models, ends, strict=True)
        if end is not None and end not in model.end_ids
    ]
    return CheckRow(
        "end of turn in the template",
        tuple("-" if i is None else tokens_of(m, [i]) for m, i in zip(models, ends, strict=True)),
        None if not any(end is not None for end in ends) else not open_ended,
        "; ".join(open_ended),
    )


def first_examples(data: DataConfig, teachers: Mapping[str, TeacherConfig]) -> list[Example]:
    """The first examples. Raises UserError where the data cannot be read."""
    examples = load_data(data, FEW, 0, teachers.values())
    if isinstance(examples, MixtureDataset):
        return [examples[i] for i in examples.first(FEW)]
    return [examples[i] for i in range(min(FEW, len(examples)))]


def data_rows(config: ExperimentConfig) -> list[CheckRow]:
    """The number of rows of each source of the data; none for generated data."""
    data = load_data(config.data, FEW, 0, config.teachers.values())
    counts = data.counts() if isinstance(data, StoredDataset) else {}
    return [CheckRow("data", (f"{source}: {rows}",)) for source, rows in counts.items()]


def views_of(
    teachers: Mapping[str, TeacherConfig], examples: Sequence[Example]
) -> list[list[Example]]:
    """The examples as the student sees them, and as each teacher does, in its context."""
    contexts = [None, *(teacher.context for teacher in teachers.values())]
    return [[teacher_view(context, example) for example in examples] for context in contexts]


def learns_answers(config: ExperimentConfig) -> bool:
    """Whether an arm trains on the data's answers."""
    arms = [arm for arm in config.arms.values() if isinstance(arm, DistillArm)]
    return any("data" in config.recipe_of(arm).rollout.source.shares for arm in arms)


def prompt_rows(
    models: Sequence[LoadedModel], views: Sequence[Sequence[Example]]
) -> tuple[list[int], list[CheckRow]]:
    """(the longest prompt of each model, rows on prompts), without using the models' weights."""
    encoded = [model.prompts_of(own) for model, own in zip(models, views, strict=True)]
    texts = [model.render_text(own[0]) for model, own in zip(models, views, strict=True)]
    lengths = [prompts.input_ids.shape[1] for prompts in encoded]
    placeholders = [torch.tensor(list(model.placeholders.values())) for model in models]
    images = [
        int(torch.isin(prompts.input_ids[0], ids).sum())
        for prompts, ids in zip(encoded, placeholders, strict=True)
    ]
    return lengths, [
        turn_row(models),
        CheckRow("prompt", tuple(map(repr, texts))),
        CheckRow("prompt tokens", tuple(str(int(p.attention_mask[0].sum())) for p in encoded)),
        CheckRow("prompt tokens, longest", tuple(map(str, lengths))),
        CheckRow("image tokens and markers", tuple(map(str, images))),
    ]


def thought_rows(
    teachers: Sequence[str],
    models: Sequence[LoadedModel],
    views: Sequence[Sequence[Example]],
    learns_answers: bool,
) -> list[CheckRow]:
    """Each model's marks of a thought and whether its prompt opens one, with the mismatches."""
    opened = [
        model.opened_by(model.render_text(own[0])) for model, own in zip(models, views, strict=True)
    ]
    marks = [
        ", ".join(map(str, dict.fromkeys([*model.own_marks, *([mark] if mark else [])]))) or "none"
        for model, mark in zip(models, opened, strict=True)
    ]
    values = [
        f"{own}{'; its prompt opens one' if mark else ''}"
        for own, mark in zip(marks, opened, strict=True)
    ]
    rows = [CheckRow("thoughts", tuple(values))]
    for name, mark in zip(teachers, opened[1:], strict=True):
        if bool(mark) != bool(opened[0]):
            inside, outside = (name, "student") if mark else ("student", name)
            note = (
                f"the prompt of {inside} opens a thought and that of {outside} does not: one reads the "
                "completion as a thought, the other as an answer; see template_arguments"
            )
            rows.append(CheckRow("thoughts differ", (note,)))
    if opened[0] and learns_answers:
        note = (
            "the student's prompt opens a thought: the data's answers are learnt as thoughts unless each begins "
            "with one and closes it; see student.template_arguments"
        )
        rows.append(CheckRow("thoughts of the data", (note,)))
    return rows


def context_row(
    models: Sequence[LoadedModel | PreTrainedModel], lengths: Sequence[int], new_tokens: int
) -> CheckRow:
    """Does the longest prompt leave room for a completion?"""
    limits = [
        context_length(m.model.config if isinstance(m, LoadedModel) else m.config) for m in models
    ]
    fits = [
        limit is None or n + new_tokens <= limit for n, limit in zip(lengths, limits, strict=True)
    ]
    return CheckRow(
        "prompt and completion, of context",
        tuple(
            f"{n} + {new_tokens} of {'any' if limit is None else format(limit, ',')}"
            for n, limit in zip(lengths, limits, strict=True)
        ),
        all(fits),
        "lower rollout.max_new_tokens, shorten the prompts, or use a model with a longer context",
    )


def model_config(model: ModelConfig, architectures: Path) -> PretrainedConfig:
    """A model's configuration, from `architectures` or, where it is not there, its own."""
    folder = architectures / model.model
    if (folder / "config.json").is_file():
        return load_model_config(str(folder))
    try:
        return load_model_config(model.model, model.revision, model.trust_remote_code)
    except ModelUnreadable as error:
        raise ConfigError(f"{error}; put its config.json into {folder}") from None


def components(model: PreTrainedModel) -> str:
    counts = memory.parameter_counts(model)
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def vocabulary_rows_of(student: ModelConfig, teachers: Sequence[TeacherConfig]) -> list[CheckRow]:
    """The tokens that all models share, where all tokenizers can be read."""
    try:
        vocabulary = shared_vocabulary(student, teachers)
    except ModelUnreadable as error:
        return [CheckRow("shared tokens", (f"not checked: {error}",))]
    return shared_rows(vocabulary)


def shared_rows(vocabulary: SharedVocabulary) -> list[CheckRow]:
    """The number of shared tokens, and the notes on those mapped or left out."""
    return [
        CheckRow("shared tokens", (f"{vocabulary.size:,}",)),
        *(CheckRow("vocabulary", (note,)) for note in vocabulary.notes),
    ]


def compute_row(asked: str, config: ExperimentConfig, device: torch.device) -> CheckRow:
    """The resolved precision.compute, and the reason."""
    compute, why = config.precision.resolved, "as set"
    if asked == "auto":
        has = "with" if compute == "bf16" else "without"
        why = f"auto: a CPU {has} AMX" if device.type == "cpu" else "auto: a GPU"
    return CheckRow("precision.compute", (f"{compute} ({why})",))


def estimate_rows(
    config: ExperimentConfig,
    readers: Sequence[memory.Reader],
    device: torch.device,
    must_fit: bool = False,
    card: str | None = None,
) -> list[CheckRow]:
    """Memory and seconds of a step on this device, or on a described card: dense, under each mask of known density,
    with each LoRA of known size, in the other precision; settings that would fit where it does not."""
    compute = config.precision.resolved
    other: Literal["fp32", "bf16"] = "fp32" if compute == "bf16" else "bf16"
    speed = _speed(device, card, compute)
    densities = {"all coordinates": 1.0}
    for name, mask in config.masks.items():
        if isinstance(mask, TopFractionMask):
            densities[f"mask {name}"] = mask.fraction
    total = readers[0].model.num_parameters()
    for arm in config.arms.values():
        if isinstance(arm, DistillArm) and arm.lora is not None:
            lora, fraction = arm.lora, densities.get(f"mask {arm.lora.like}")
            if lora.like is not None and fraction is not None:
                lora = lora.with_parameters(max(1, round(fraction * total)))
            if lora.like is None:
                freeze = config.recipe_of(arm).train.freeze
                size = adapter_size(readers[0].model, lora, freeze)
                densities[f"LoRA of rank {size.rank}"] = size.parameters / total
    if must_fit:  # the weights are loaded already
        loaded = sum(each.model.num_parameters() for each in readers) * DTYPES[compute].itemsize
        speed = speed._replace(memory_bytes=speed.memory_bytes + loaded)
    rows = [
        CheckRow(
            "device" if card is None else "device, as published",
            (
                f"{card or device.type}: {decimal(speed.memory_bytes)} for training, "
                f"{speed.matmul_flops / 1e9:,.0f} GFLOP/s, {decimal(int(speed.memory_bytes_per_second))}/s",
            ),
        )
    ]
    if config.sweep_groups:
        budgets = [its for name in config.arms if (its := config.budget_of(name)) is not None]
        trainings, completions = (
            sum(its[key] for its in budgets) for key in ("settings", "completions")
        )
        text = f"{trainings} of {len(budgets)} arms, one a point of a tuned arm's grid; {completions:,} completions"
        rows.append(CheckRow("trainings", (text,)))
    try:
        traces = [memory.trace(each, config.rollout.max_new_tokens) for each in readers]
    except UserError as error:
        return [*rows, CheckRow("memory and time", (f"not estimated: {error}",))]

    def arguments(
        compute: Literal["fp32", "bf16"], speed: memory.DeviceSpeed, density: float = 1.0
    ) -> tuple[Any, ...]:
        """Those of an estimate."""
        dtype = DTYPES[compute]
        costs = [
            memory.forward_cost(each, dtype, one) for each, one in zip(readers, traces, strict=True)
        ]
        return config, readers[0], readers[1:], speed, dtype, density, costs

    shown: list[tuple[str, memory.Estimate]] = []
    for coordinates, density in densities.items():
        args = arguments(compute, speed, density)
        one, fit = memory.estimate(*args), settings_that_fit(*args)
        needed = ", ".join(
            f"{what.replace('_', ' ')} {decimal(size)}"
            + (" (in host memory)" if what in one.on_host else "")
            for what, size in one.memory._asdict().items()
            if size
        )
        remedy, limit = "", decimal(speed.memory_bytes)
        if fit is None:
            remedy = "no settings would fit: a mask, train.freeze, a smaller model or a larger device would"
        elif fit.changes:
            remedy = f"would fit: {fit} ({decimal(fit.estimate.peak_bytes)})"
        text = f"{decimal(one.peak_bytes)}, {'fits' if not remedy else f'does not fit {limit}; {remedy}'}"
        shown.append((f"; {fit}" if fit and fit.changes else "", fit.estimate if fit else one))
        rows.append(
            CheckRow(
                f"memory, {coordinates}",
                (f"{text} ({needed})",),
                not remedy if must_fit else None,
                remedy,
            )
        )
    changes, first = shown[0]
    laps = ", ".join(f"{name} {rounded(value)}" for name, value in first.seconds._asdict().items())
    hours = first.seconds.total * config.train.steps / 3600
    there = memory.estimate(*arguments(other, _speed(device, card, other)))
    return [
        *rows,
        CheckRow(
            "completions at once",
            (f"rollout {first.rollout_batch}, training {first.micro_batch}{changes}",),
        ),
        CheckRow("seconds a step", (f"about {rounded(first.seconds.total)} ({laps}){changes}",)),
        CheckRow(
            "hours of training", (f"about {rounded(hours)} ({config.train.steps} steps){changes}",)
        ),
        CheckRow(
            f"with compute = {other}",
            (f"{decimal(there.peak_bytes)}, about {rounded(there.seconds.total)} seconds a step",),
        ),
    ]


def rounded(value: float) -> str:
    """Two digits that count: 690, 8.5, 0.012."""
    return format(float(f"{value:.2g}"), ",g")


def _speed(device: torch.device, card: str | None, compute: str) -> memory.DeviceSpeed:
    """The device's rates, or a described card's (whose fp32 products run at an eighth of bf16's)."""
    if card is None:
        return memory.measure_device(device, DTYPES[compute])
    found = memory.described_device(card)
    share = 1 if compute == "bf16" else 8
    return found._replace(matmul_flops=found.matmul_flops / share)


def tokens_of(model: LoadedModel, ids: Sequence[int]) -> str:
    """Token strings with their ids; of many, the first few and the count."""
    words = model.tokenizer.convert_ids_to_tokens(list(ids[:4]))
    named = [f"{word} {i}" for word, i in zip(words, ids, strict=False)]
    return ", ".join(named) + (f", ... ({len(ids)} in all)" if len(ids) > len(named) else "")


def special_tokens(model: LoadedModel) -> str:
    """First, last and padding token, with their ids."""
    own = model.tokenizer
    named = {"first": own.bos_token_id, "last": own.eos_token_id, "padding": own.pad_token_id}
    return ", ".join(
        f"{what} {tokens_of(model, [i])}" for what, i in named.items() if i is not None
    )


def rows_and_tokens(model: LoadedModel) -> str:
    """Rows of the output layer, and those without a token."""
    nameless = model.vocabulary_rows - len(set(model.tokenizer.get_vocab().values()))
    return f"{model.vocabulary_rows:,}" + (f" ({nameless:,} padded)" if nameless > 0 else "")


def sight_row(
    pair: ModelPair, examples: Sequence[Example], prompts: Prompts, completions: Completions
) -> CheckRow:
    """Does each model use the image? Its mean log-prob change when every image is blanked must not be 0.

    A teacher that reads a caption instead has no picture to blank.
    """
    blank = [blanked(example) for example in examples]
    blind = pair.student_logprobs(pair.student.render(blank), completions)
    changes = [mean_change(pair.student_logprobs(prompts, completions), blind)]
    values = [f"{changes[0]:.4f} nats a token"]
    for teacher in pair.teachers:
        if not any(teacher.view(example).images for example in examples):
            values.append("reads a caption")
            continue
        seen, blind = (teacher.logprobs(each, completions) for each in (examples, blank))
        changes.append(mean_change(seen, blind))
        values.append(f"{changes[-1]:.4f} nats a token")
    return CheckRow(
        "sees the image",
        tuple(values),
        min(changes) > 0,
        "blanking the picture changes nothing: check the data's image column and the processors",
    )


def blanked(example: Example) -> Example:
    """The example with black pictures of the same sizes, those in its fields included."""

    def black(value: Any) -> Any:
        if isinstance(value, Image.Image):
            return Image.new("RGB", value.size)
        return [black(each) for each in value] if isinstance(value, list) else value

    fields = {name: black(value) for name, value in example.fields.items()}
    return replace(example, images=tuple(map(black, example.images)), fields=fields)


def mean_change(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().mean())


def agreement_rows(
    pair: ModelPair, examples: Sequence[Example], prompts: Prompts, completions: Completions
) -> list[CheckRow]:
    """Sampler against trainer, and the divergence of student and teacher, on the student's own completions."""
    hidden = pair.student.completion_hidden(prompts, completions)
    student = pair.student.logits(hidden, pair.vocabulary.student)
    has_logits = pair.teachers and pair.has_whole_teachers
    teacher = pair.teacher_logits(examples, completions) if has_logits else None
    sampled = Sampled(pair.vocabulary.targets(completions), completions.logprobs[completions.mask])
    tokens = token_divergence(NLL() if teacher is None else ReverseKL(), student, teacher, sampled)
    gap = float((tokens.student_logprobs - sampled.logprobs).abs().max())
    bound = 1e-3 if pair.student.model.dtype == torch.float32 else 0.5
    consistency = CheckRow(
        "sampler against trainer",
        (f"{gap:.1e} nats at most",),
        gap < bound,
        "sampling and scoring disagree: check the family's positions in vlopd/models/families.py",
    )
    entropies = [e for e in (tokens.student_entropy, tokens.teacher_entropy) if e is not None]
    entropy = CheckRow("mean entropy", tuple(f"{each.mean():.4f} nats" for each in entropies))
    if teacher is None or tokens.top_overlap is None:
        return [consistency, entropy]
    top1 = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    return [
        consistency,
        CheckRow("mean reverse KL", (f"{tokens.loss.mean():.4f} nats a token",)),
        entropy,
        CheckRow("top-1 agreement", (f"{top1:.1%} of {completions.n_tokens} tokens",)),
        CheckRow(
            f"top-{min(TOP_K, pair.vocabulary.size)} overlap", (f"{tokens.top_overlap.mean():.1%}",)
        ),
    ]
