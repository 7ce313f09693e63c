"""Memory and time of a training step, estimated from configurations alone: no weights, no tokenizer.

Saved activations and FLOPs of a forward pass do not come from a formula for one architecture: the model is built on
torch's meta device, which computes shapes and no values, and its own forward is run there once. Everything else is
counted from parameters as train/sparse.py, generation.py and losses.py hold them. Not counted: loading a checkpoint,
the device's context, allocator fragmentation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PreTrainedModel

from vlopd.errors import UserError
from vlopd.models import parameter_names
from vlopd.models.cache_size import SAMPLER_BYTES, cache_bytes
from vlopd.models.meta import on_meta

STUDENT_LOGIT_BYTES, TEACHER_LOGIT_BYTES = 24, 8
"""A vocabulary entry and token, losses.py: logits and log-probs in fp32, the student's gradients and products."""


LOGIT_PASSES = 6
"""Times that these bytes move: written once, read twice, and all again in the backward pass."""


UPDATE_BYTES = 44
"""Moved for a trained value: AdamW reads four and writes three fp32 values, clipping two, rounding two."""


CALLS_PER_PARAMETER = 8
"""Overhead of a forward pass per parameter tensor, in tiny `nn.Linear` calls (on a CPU: 4 to 9)."""


class Reader(NamedTuple):
    """A model, real or on the meta device, and the size of its prompts."""

    model: PreTrainedModel
    prompt_tokens: int
    """Tokens of one prompt, image tokens included."""
    attention: str = "sdpa"
    patches: int | None = None
    """Image patches of one prompt (0 without images); None: one image, or a prompt full of them (`patches_of`)."""


class DeviceSpeed(NamedTuple):
    """Peak rates of a device (`measure_device`)."""

    matmul_flops: float  # a second
    memory_bytes_per_second: float
    memory_bytes: int  # free now
    call_seconds: float  # of one tiny nn.Linear: the overhead of a call


class Memory(NamedTuple):
    """Bytes of a training step, by kind."""

    student_weights: int
    teacher_weights: int
    values: int  # fp32, of the trained coordinates; 0 where they are the fp32 weights themselves
    indices: int  # int32 or packed bits, whichever is less, where a mask chooses coordinates
    gradients: int  # fp32, of the trained coordinates
    moments: int  # AdamW's two, fp32
    kv_cache: int  # of one micro-batch at its full length
    sampling: int  # the sampler's arrays over the vocabulary
    activations: int  # what autograd keeps of one micro-batch
    working: (
        int  # one layer of the largest model: a forward without gradients, or a layer's backward
    )
    logits: int  # one chunk of completion tokens: both models' logits, log-probs and gradients
    dense_gradient: (
        int  # the largest parameter's before its trained coordinates are taken, and an addend
    )


class Seconds(NamedTuple):
    """Of one training step, with all completions at their full length."""

    rollout: float
    teacher: float
    student: float  # forward and backward
    update: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes, by kind and at the peak of each phase, and seconds of one step."""

    memory: Memory
    rollout_bytes: int
    gradient_bytes: int
    update_bytes: int
    seconds: Seconds

    @property
    def peak_bytes(self) -> int:
        return max(self.rollout_bytes, self.gradient_bytes, self.update_bytes)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters by component (`parameter_names.classify`), in the model's order; tied ones once."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = parameter_names.classify(name).component
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts


def grouped_flops(rows: Sequence[int], experts: Sequence[int], *rest: Any, **named: Any) -> int:
    """Of one grouped product: rows [R, in], each with one of the experts [E, in, out]."""
    return 2 * rows[0] * rows[1] * experts[-1]


ROUTED_FLOPS = {torch.ops.aten._grouped_mm: grouped_flops}
"""torch's counter does not know the product that routed experts run on; without this they would be free."""


class Forward(NamedTuple):
    """One sequence through one model, without its output layer."""

    flops: float
    kept_bytes: int  # by autograd
    tower_flops: float  # of `flops`, those of the vision tower
    working_bytes: int  # one decoder layer's share of what is kept


def forward_cost(reader: Reader, dtype: torch.dtype, new_tokens: int) -> Forward:
    """The cost of reading one prompt and its completion."""
    layers = reader.model.config.get_text_config().num_hidden_layers
    flops, kept = language_cost(reader, dtype, reader.prompt_tokens + new_tokens)
    tower_flops, tower_kept = tower_cost(reader, dtype)
    return Forward(flops + tower_flops, kept + tower_kept, tower_flops, kept // layers)


def language_cost(reader: Reader, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """(FLOPs, bytes that autograd keeps) of the language model's forward on one sequence of `tokens`.

    Counted, not derived: it runs alone on the meta device, with eager attention and in bf16, and every tensor
    that it saves for the backward pass counts once, at 4 bytes where fp32 and else in `dtype`. Fused kernels
    save all but the [T, T] probabilities (arXiv 2205.14135), so those count for eager attention only. The
    closed form, 34 T H + 5 heads T^2 bytes a layer in half precision with dropout (arXiv 2205.05198),
    misses what today's norms, rotary positions and gated or routed MLPs keep. Attention counts in full,
    not its causal half; windows are ignored where the kernel ignores them.

    Raises UserError for a family whose forward depends on values (gated linear attention, for one).
    """
    tokens |= 1  # no width of a model is odd, so [T, T] means probabilities
    model = on_meta(AutoModel, reader.model.config.get_text_config())
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = tensor
        return tensor

    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    with (
        torch.enable_grad(),  # also within no_grad
        FlopCounterMode(display=False, custom_mapping=ROUTED_FLOPS) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        try:
            out = model(input_ids=ids, attention_mask=ids, use_cache=False)
        except RuntimeError as error:
            raise UserError(
                f"model type {reader.model.config.model_type!r} cannot be estimated without its weights: its "
                f"forward needs values ({str(error).splitlines()[0]}); measure a short run instead"
            ) from error
    del out  # held until here, so that no storage's id was reused
    square = (tokens, tokens)
    return counter.get_total_flops(), sum(
        tensor.untyped_storage().nbytes()
        // tensor.itemsize
        * (max(tensor.itemsize, dtype.itemsize) if tensor.is_floating_point() else tensor.itemsize)
        for tensor in kept.values()
        if reader.attention == "eager" or tensor.shape[-2:] != square
    )


def tower_cost(reader: Reader, dtype: torch.dtype) -> tuple[float, int]:
    """(FLOPs, bytes that autograd keeps) of the vision tower and projector on one prompt's images.

    A matrix [out, in] takes 2 out in FLOPs a patch, and its input and output are kept, which for a plain
    transformer block is what autograd keeps. Attention takes 4 W FLOPs for a pair of patches, W the width
    of the output projection. Windows are ignored, probabilities taken as not kept, and the projector as
    reading patches (after a merge it reads fewer).
    """
    patches = patches_of(reader)
    flops = kept = 0
    for name, parameter in reader.model.named_parameters():
        where = parameter_names.classify(name)
        if where.component in ("vision", "projector") and parameter.ndim >= 2:
            rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
            flops += 2 * rows * columns * patches
            kept += (rows + columns) * patches * dtype.itemsize
            if where.component == "vision" and where.module == "o":
                flops += 4 * columns * patches**2
    return flops, kept


def patches_of(reader: Reader) -> int:
    """Image patches of one prompt: as given, one image of the tower's size, or what fills the prompt.

    The last, an upper bound, is for towers that take images of any size (their configs name the patches
    that are merged into a token).
    """
    if reader.patches is not None:
        return reader.patches
    values = reader.model.config.to_dict()
    vision = values.get("vision_config") or {}
    merge = vision.get("spatial_merge_size") or values.get("spatial_merge_size")
    if merge or "image_size" not in vision or "patch_size" not in vision:
        return values.get("image_seq_length") or reader.prompt_tokens * (merge or 1) ** 2
    size, patch = (
        each[0] if isinstance(each, (list, tuple)) else each
        for each in (vision["image_size"], vision["patch_size"])
    )
    return (size // patch) ** 2


def estimate(
    student: Reader,
    teachers: Sequence[Reader],
    speed: DeviceSpeed,
    *,
    dtype: torch.dtype,
    completions_per_step: int,
    max_new_tokens: int,
    chunk_tokens: int,
    micro_batch: int | None = None,
    trained_fraction: float = 1.0,
    costs: Sequence[Forward] | None = None,
) -> Estimate:
    """Memory and time of one step on one device, with all completions at `max_new_tokens`.

    Every teacher reads every completion, which for routed teachers is an upper bound. `completions_per_step` is
    the share of one process. A `trained_fraction` under 1 is a mask's density, spread over all tensors.
    `costs` are those of student and teachers by `forward_cost`, to compute them once for several estimates.

    Seconds are the sum of arithmetic at `matmul_flops`, bytes moved at `memory_bytes_per_second` (weights,
    what is kept written and read, the cache three times a token because it grows by concatenation), and
    calls. A backward pass is two forward passes (arXiv 2001.08361: 6N FLOPs a token in all).

    Raises UserError for a model family that cannot be traced (`language_cost`).
    """
    item, new = dtype.itemsize, max_new_tokens
    batch = min(micro_batch or completions_per_step, completions_per_step)
    batches = math.ceil(completions_per_step / batch)
    own, *theirs = costs or [forward_cost(each, dtype, new) for each in (student, *teachers)]
    rows = min(output_weight(reader).shape[0] for reader in (student, *teachers))

    # memory
    weights = student.model.num_parameters()
    trained = round(trained_fraction * weights)
    masked = trained < weights
    memory = Memory(
        student_weights=weights * item,
        teacher_weights=sum(teacher.model.num_parameters() for teacher in teachers) * item,
        values=4 * trained if masked or item < 4 else 0,
        indices=min(4 * trained, weights // 8) if masked else 0,
        gradients=4 * trained,
        moments=8 * trained,
        kv_cache=batch * cache_bytes(student.model.config, dtype, student.prompt_tokens + new),
        sampling=batch * rows * SAMPLER_BYTES,
        activations=batch * own.kept_bytes,
        working=batch * max(cost.working_bytes for cost in (own, *theirs)),
        logits=min(chunk_tokens, batch * new)
        * rows
        * (STUDENT_LOGIT_BYTES + TEACHER_LOGIT_BYTES * len(teachers)),
        dense_gradient=2 * item * max(p.numel() for p in student.model.parameters()),
    )
    held = sum(memory[:4]) + memory.moments
    graph = memory.activations + max(memory.logits, memory.working)
    # gradients grow while the graph shrinks; a second micro-batch finds those of the first
    graph = graph + memory.gradients if batches > 1 else max(graph, memory.gradients)

    # seconds
    def seconds(flops: float, moved: float, calls: float = 0.0) -> float:
        return (
            flops / speed.matmul_flops
            + moved / speed.memory_bytes_per_second
            + calls * speed.call_seconds
        )

    def forward(reader: Reader, cost: Forward, share: float = 1.0) -> float:
        """All micro-batches through the body, `share` of each sequence."""
        moved = batches * reader.model.num_parameters() * item
        moved += 2 * share * completions_per_step * cost.kept_bytes
        return seconds(share * completions_per_step * cost.flops, moved, batches * calls_of(reader))

    def head(reader: Reader) -> float:
        """The output layer once on every completion token."""
        return seconds(2 * completions_per_step * new * output_weight(reader).numel(), 0)

    length = student.prompt_tokens + new
    one_token = completions_per_step * (own.flops - own.tower_flops) / length
    cached = completions_per_step * (student.prompt_tokens + new / 2)
    decode = new * seconds(
        one_token,
        batches * memory.student_weights
        + 3 * cached * cache_bytes(student.model.config, dtype)
        + 2 * completions_per_step * rows * SAMPLER_BYTES,
        batches * calls_of(student),
    )
    loss_bytes = memory.logits // min(chunk_tokens, batch * new) * completions_per_step * new
    return Estimate(
        memory,
        rollout_bytes=held
        + memory.gradients
        + memory.kv_cache
        + max(memory.sampling, memory.working),
        gradient_bytes=held + memory.dense_gradient + graph,
        update_bytes=held + memory.gradients,
        seconds=Seconds(
            rollout=forward(student, own, student.prompt_tokens / length) + decode + head(student),
            # a chunk's output layers run again in the backward pass
            teacher=sum(
                forward(teacher, cost) + 2 * head(teacher)
                for teacher, cost in zip(teachers, theirs, strict=True)
            ),
            student=3 * forward(student, own)
            + 4 * head(student)
            + seconds(0, LOGIT_PASSES * loss_bytes),
            update=seconds(0, UPDATE_BYTES * trained),
        ),
    )


def output_weight(reader: Reader) -> Tensor:
    return reader.model.get_output_embeddings().weight


def calls_of(reader: Reader) -> int:
    """Overhead of one forward pass of the model, in tiny calls."""
    return CALLS_PER_PARAMETER * len(list(reader.model.parameters()))


def measure_device(device: torch.device | str, dtype: torch.dtype) -> DeviceSpeed:
    """A probe of about a second: the best of repeated matrix products, copies and tiny calls."""
    device = torch.device(device)
    on_cpu = device.type == "cpu"

    def best(run: Callable[[], object]) -> float:
        taken: list[float] = []
        while len(taken) < 2 or (sum(taken) < 0.2 and len(taken) < 100):
            start = time.perf_counter()
            run()
            if not on_cpu:
                torch.accelerator.synchronize(device)
            taken.append(time.perf_counter() - start)
        return min(taken)

    size, copied, repeats = (512, 2**26, 200) if on_cpu else (8192, 2**30, 200)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    layer, row = nn.Linear(8, 8, device=device), torch.ones(1, 8, device=device)
    with torch.no_grad():
        return DeviceSpeed(
            matmul_flops=2 * size**3 / best(lambda: matrix @ matrix),
            memory_bytes_per_second=2 * copied / best(lambda: target.copy_(source)),
            memory_bytes=torch.cuda.mem_get_info(device)[0]
            if device.type == "cuda"
            else psutil.virtual_memory().available,
            call_seconds=best(lambda: [layer(row) for _ in range(repeats)]) / repeats,
        )
