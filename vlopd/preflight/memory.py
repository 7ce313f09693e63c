"""Memory and time of a training step, predicted from configurations alone: no weights, no tokenizer.

Saved activations and FLOPs of a forward pass do not come from a formula for one architecture: the model is built on
torch's meta device, which computes shapes and no values, and its own forward is run there once; so is the loss, whose
peak depends on its type. Everything else is counted from parameters as train/sparse.py, generation.py and offload.py
hold them. Not counted: loading a checkpoint, the device's context, allocator fragmentation, pictures as pixels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from vlopd.config.engines import VllmEngine
from vlopd.config.models import MixedTeachers
from vlopd.config.objective import FunctionLoss, LossConfig, ReverseKL, RewardConfig
from vlopd.config.recipe import RecipeSections
from vlopd.errors import ConfigError, UserError
from vlopd.models import parameter_names
from vlopd.models.cache_size import cache_bytes, sampler_bytes
from vlopd.models.meta import on_meta
from vlopd.train.allocations import Allocations
from vlopd.train.losses import Sampled, TokenInputs, chunked_divergence
from vlopd.train.optimizers import moments
from vlopd.train.packing import SAMPLING_SHARE

UPDATE_BYTES = 44
"""Moved for a trained value: AdamW reads four and writes three fp32 values, clipping two, rounding two."""


CALLS_PER_PARAMETER = 8
"""Overhead of a forward pass per parameter tensor, in tiny `nn.Linear` calls (on a CPU: 4 to 9)."""


CALLS_OF_REPLAY = 100
"""Overhead of a decode step where a captured graph replaces the forward pass, assumed: its replay, and the output layer
and the draw outside of it."""


DOWNLOAD_BYTES = 1 << 29
"""Gradients on their way to host memory at once, with train.offload_optimizer."""


HOST_BYTES_PER_SECOND = 5e10
"""Assumed of host memory (optimizer steps there) and of the bus to it (a resting teacher's weights)."""


class Reader(NamedTuple):
    """A model, real or on the meta device, and the size of its prompts."""

    model: PreTrainedModel
    prompt_tokens: int
    """Tokens of one prompt, image tokens included."""
    attention: str = "sdpa"
    patches: int | None = None
    """Image patches of one prompt (0 without images); None: one image, or a prompt full of them (`patches_of`)."""


class DeviceSpeed(NamedTuple):
    """Peak rates of a device (`measure_device`, or `described_device` where it is not at hand)."""

    matmul_flops: float  # a second
    memory_bytes_per_second: float
    memory_bytes: int  # free now
    call_seconds: float  # of one tiny nn.Linear: the overhead of a call
    type: Literal["cuda", "cpu"] = "cuda"


CARDS = {"a100": (312, 2.04, 78), "h100": (989, 3.35, 78), "h200": (989, 4.8, 138)}
"""By name: published dense bf16 TFLOP/s and TB/s, and GiB that a process can use."""


MATMUL_SHARE, BANDWIDTH_SHARE, CALL_SECONDS = 0.35, 0.9, 1e-5
"""Assumed of a described card: parts of its published rates that eager code reaches (forward passes of 1.5 to 8 B on an
H100), and overhead of a call (its decode steps)."""


class Memory(NamedTuple):
    """Bytes of a training step, by part."""

    student_weights: int
    teacher_weights: int
    values: int  # fp32, of the trained coordinates; 0 where they are the fp32 weights themselves
    indices: int  # int32 or packed bits, whichever is less, where a mask chooses coordinates
    gradients: int  # fp32, of the trained coordinates
    moments: int  # the optimizer's state: two of AdamW, in fp32 or 8 bits
    kv_cache: int  # of one rollout batch at its full length
    sampling: int  # the sampler's arrays over the vocabulary
    activations: (
        int  # what autograd keeps of one micro-batch; with checkpointing the layers' inputs
    )
    working: (
        int  # one layer of the largest model: a forward without gradients, or a layer's backward
    )
    logits: (
        int  # one chunk of completion tokens: the most that the loss holds, forward and backward
    )
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
    """Memory in bytes, by part and at the peak of each phase on the device, and seconds of one step."""

    memory: Memory
    rollout_batch: int
    """Completions sampled at once; what is chosen where rollout.batch is null."""
    micro_batch: int
    """Completions of one forward and backward pass at full length."""
    on_host: tuple[str, ...]
    """Parts of `memory` that are in host memory (a resting teacher's but for its output layer and its phase)."""
    rollout_bytes: int
    teacher_bytes: int
    gradient_bytes: int
    update_bytes: int
    seconds: Seconds

    @property
    def peak_bytes(self) -> int:
        return max(self.rollout_bytes, self.teacher_bytes, self.gradient_bytes, self.update_bytes)

    @property
    def host_bytes(self) -> int:
        return sum(self.memory._asdict()[part] for part in self.on_host)


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
    input_bytes: int  # of all layers, which checkpointing keeps
    mask_bytes: (
        int  # of the [T, T] masks of padded sequences, which fused attention keeps for each layer
    )


class Trace(NamedTuple):
    """The language model's forward pass on one sequence, in no precision yet."""

    tokens: int
    flops: int
    kept: Mapping[tuple[int, bool, bool], int]
    """Entries of kept tensors by (bytes of one in bf16 code, whether floating-point, whether [T, T])."""


def trace(reader: Reader, new_tokens: int) -> Trace:
    """FLOPs and kept tensors of reading one prompt and its completion.

    Counted, not derived: the language model runs alone on the meta device, with eager attention and in bf16, and every
    tensor that it saves for the backward pass counts once; of more than two equal layers only two run. The closed form,
    34 T H + 5 heads T^2 bytes a layer in half precision with dropout (arXiv 2205.05198), misses what today's norms,
    rotary positions and gated or routed MLPs keep. Attention counts in full, not its causal half; windows are ignored
    where the kernel ignores them.

    Raises UserError for a family whose forward depends on values (gated linear attention, for one).
    """
    tokens = (
        reader.prompt_tokens + new_tokens
    ) | 1  # no width is odd, so [T, T] means probabilities
    text = copy.deepcopy(reader.model.config.get_text_config())
    layers = text.num_hidden_layers
    try:
        if layers < 3 or not _has_equal_layers(reader.model):
            return _traced(text, tokens)
        one, two = (_traced(_with_layers(text, n), tokens) for n in (1, 2))
    except RuntimeError as error:
        raise UserError(
            f"model type {reader.model.config.model_type!r} cannot be estimated without its weights: its "
            f"forward needs values ({str(error).splitlines()[0]}); measure a short run instead"
        ) from error
    kept = {
        kind: two.kept[kind] + (layers - 2) * (two.kept[kind] - one.kept.get(kind, 0))
        for kind in two.kept
    }
    return Trace(tokens, two.flops + (layers - 2) * (two.flops - one.flops), kept)


def _has_equal_layers(model: PreTrainedModel) -> bool:
    """Whether all layers of the language model have parameters of the same names and shapes."""
    shapes: dict[str, set[tuple[str, torch.Size]]] = {}
    for name, parameter in model.named_parameters():
        if parameter_names.classify(name).component == "language":
            before, _, after = name.partition(".layers.")
            index, _, rest = after.partition(".")
            if index.isdigit():
                shapes.setdefault(before + index, set()).add((rest, parameter.shape))
    kinds = list(shapes.values())
    return len(kinds) > 0 and all(each == kinds[0] for each in kinds)


def _with_layers(text: PretrainedConfig, n: int) -> PretrainedConfig:
    """The configuration with the first `n` layers."""
    fewer = copy.deepcopy(text)
    if fewer.to_dict().get("layer_types"):
        fewer.layer_types = fewer.layer_types[:n]
    fewer.num_hidden_layers = n
    return fewer


def _traced(text: PretrainedConfig, tokens: int) -> Trace:
    model = on_meta(AutoModel, text)
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
        out = model(input_ids=ids, attention_mask=ids, use_cache=False)
    del out  # held until here, so that no storage's id was reused
    sizes: dict[tuple[int, bool, bool], int] = {}
    for tensor in kept.values():
        is_square = tensor.shape[-2:] == (tokens, tokens)
        kind = (tensor.itemsize, tensor.is_floating_point(), is_square)
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        sizes[kind] = sizes.get(kind, 0) + size
    return Trace(tokens, counter.get_total_flops(), sizes)


def kept_bytes(traced: Trace, attention: str, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a traced forward in `dtype`: 4 each where fp32 in bf16 code too.

    Fused kernels save all but the [T, T] probabilities (arXiv 2205.14135), so those count for eager attention only.
    """
    return sum(
        n * (max(item, dtype.itemsize) if is_float else item)
        for (item, is_float, is_square), n in traced.kept.items()
        if attention == "eager" or not is_square
    )


def forward_cost(reader: Reader, dtype: torch.dtype, traced: Trace) -> Forward:
    """The cost of reading one prompt and its completion, as traced."""
    text, tokens = reader.model.config.get_text_config(), traced.tokens
    layers, kept = text.num_hidden_layers, kept_bytes(traced, reader.attention, dtype)
    tower_flops, tower_kept, tower_inputs = tower_cost(reader, dtype)
    return Forward(
        traced.flops + tower_flops,
        kept + tower_kept,
        tower_flops,
        kept // layers,
        layers * tokens * text.hidden_size * dtype.itemsize + tower_inputs,
        layers * tokens**2 * dtype.itemsize if reader.attention != "eager" else 0,
    )


def tower_cost(reader: Reader, dtype: torch.dtype) -> tuple[float, int, int]:
    """(FLOPs, bytes that autograd keeps, bytes of its layers' inputs) of the vision tower and projector on one prompt's
    images.

    A matrix [out, in] takes 2 out in FLOPs a patch, and its input and output are kept, which for a plain
    transformer block is what autograd keeps. Attention takes 4 W FLOPs for a pair of patches, W the width
    of the output projection. Windows are ignored, probabilities taken as not kept, and the projector as
    reading patches (after a merge it reads fewer).
    """
    patches = patches_of(reader)
    flops = kept = inputs = 0
    for name, parameter in reader.model.named_parameters():
        where = parameter_names.classify(name)
        if where.component in ("vision", "projector") and parameter.ndim >= 2:
            rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
            flops += 2 * rows * columns * patches
            kept += (rows + columns) * patches * dtype.itemsize
            if where.component == "vision" and where.module == "o":
                flops += 4 * columns * patches**2
                inputs += rows * patches * dtype.itemsize
    return flops, kept, inputs


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


class LossCost(NamedTuple):
    """Bytes of the loss: the most at once, and moved for each token."""

    held: int
    moved: float


@cache
def loss_cost(
    loss: LossConfig,
    tokens: int,
    rows: int,
    teachers: int,
    reward: RewardConfig | None,
    dtype: torch.dtype,
) -> LossCost:
    """The cost of the loss over [tokens, rows] logits, forward and backward, counted on the meta device.

    `teachers` score a token together (a mixture), one, or none.
    """

    def head(weight: Tensor, hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    def mixed(hidden: Tensor) -> Tensor:
        if teachers == 1:
            return head(weights[1], hidden)
        total = torch.zeros((), device="meta")
        for _ in range(teachers):
            total = total + torch.log_softmax(head(weights[1], hidden).float(), -1) / teachers
        return total

    with torch.enable_grad(), torch.device("meta"):
        hidden = torch.zeros(tokens, 1, dtype=dtype, requires_grad=True)
        weights = [torch.zeros(rows, 1, dtype=dtype, requires_grad=own) for own in (True, False)]
        sampled = Sampled(torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens))
        if reward is not None:
            sampled = sampled._replace(advantages=torch.zeros(tokens))
        their_hidden, their_head = (hidden.detach(), mixed) if teachers else (None, None)
        with Allocations() as counted:
            inputs = TokenInputs(
                hidden,
                partial(head, weights[0]),
                their_hidden,
                their_head,
                sampled,
                torch.ones(tokens),
            )
            chunked_divergence(loss, inputs, reward)
    return LossCost(counted.peak, counted.moved / tokens)


def weights_here(recipe: RecipeSections, teachers: Sequence[Reader]) -> int:
    """Weights of the teachers in this process: of one that an engine holds the output layer alone, in vLLM none."""
    configured = list(recipe.teachers.values())
    if len(configured) != len(teachers):
        return sum(teacher.model.num_parameters() for teacher in teachers)
    found = 0
    for its, teacher in zip(configured, teachers, strict=True):
        if its.engine is None:
            found += teacher.model.num_parameters()
        elif not isinstance(its.engine, VllmEngine):
            found += output_weight(teacher).numel()
    return found


def estimate(
    recipe: RecipeSections,
    student: Reader,
    teachers: Sequence[Reader],
    speed: DeviceSpeed,
    dtype: torch.dtype,
    trained_fraction: float = 1.0,
    costs: Sequence[Forward] | None = None,
) -> Estimate:
    """Memory and time of one step of a single process, with all completions at rollout.max_new_tokens.

    Every teacher reads every completion, which for routed teachers is an upper bound. A `trained_fraction` under 1 is a
    mask's density, spread over all tensors. `costs` are those of student and teachers by `forward_cost`, to compute
    them once for several estimates. With `rollout.engine = "graphs"` decode steps count as captured, for any family.

    Seconds are the sum of arithmetic at `matmul_flops`, bytes moved at `memory_bytes_per_second` (weights, what is kept
    written and read, the cache once a token, the loss's arrays), and calls. A backward pass is two forward passes
    (arXiv 2001.08361: 6N FLOPs a token in all), and one more with activation checkpointing.

    Raises UserError for a model family that cannot be traced (`trace`).
    """
    train, rollout, loss = recipe.train, recipe.rollout, recipe.loss
    item, new = dtype.itemsize, rollout.max_new_tokens
    completions = train.prompts_per_step * rollout.completions_per_prompt
    length = student.prompt_tokens + new
    own, *theirs = costs or [
        forward_cost(each, dtype, trace(each, new)) for each in (student, *teachers)
    ]
    rows = min(output_weight(reader).shape[0] for reader in (student, *teachers))
    by_tokens = train.micro_tokens and max(1, train.micro_tokens // length)
    batch = min(by_tokens or train.micro_batch or completions, completions)
    batches = math.ceil(completions / batch)
    together = len(teachers) if isinstance(recipe.teacher, MixedTeachers) else min(1, len(teachers))
    reward = recipe.reward and recipe.reward.model_copy(update={"rule": "exact"})  # it has run
    # more than one chunk costs what two do
    shape = (min(batch * new, 2 * loss.chunk_tokens), rows, together, reward, dtype)
    try:
        of_loss = loss_cost(loss, *shape)
    except Exception:  # a plug-in's own code, which may need values
        if not isinstance(loss, FunctionLoss):
            raise
        of_loss = loss_cost(ReverseKL(chunk_tokens=loss.chunk_tokens), *shape)

    # memory
    weights = student.model.num_parameters()
    trained = round(trained_fraction * weights)
    masked, offload = trained < weights, train.offload_optimizer
    averages = sum(its.ema is not None for its in recipe.teachers.values())
    padding = int(batch > 1)  # a single sequence has no mask
    kept = own.input_bytes if train.activation_checkpointing else own.kept_bytes
    layers = 1 if train.activation_checkpointing else 0  # whose masks are kept at once, of all
    masks = padding * own.mask_bytes
    if layers:
        masks //= student.model.config.get_text_config().num_hidden_layers
    memory = Memory(
        student_weights=weights * item,
        teacher_weights=weights_here(recipe, teachers) * item,
        values=4 * trained * (1 + averages) if masked or item < 4 or offload else 0,
        indices=min(4 * trained, weights // 8) * (1 + averages) if masked else 0,
        gradients=4 * trained,
        moments=round(4 * moments(recipe.optim) * trained),
        kv_cache=0,
        sampling=0,
        activations=batch * (kept + masks),
        working=batch * max(cost.working_bytes for cost in (own, *theirs)),
        logits=of_loss.held,
        dense_gradient=2 * item * max(p.numel() for p in student.model.parameters()),
    )
    on_host = ("values", "gradients", "moments") if offload else ()
    heads = sum(output_weight(teacher).numel() for teacher in teachers) * item
    resting = memory.teacher_weights - heads if train.offload_teacher else 0
    held = memory.student_weights + memory.teacher_weights + memory.indices - resting
    held += 0 if offload else memory.values + memory.moments
    gradients = min(memory.gradients, DOWNLOAD_BYTES) if offload else memory.gradients

    # a rollout batch
    cache_of_one = cache_bytes(student.model.config, dtype, length)
    prefill = own.working_bytes * student.prompt_tokens // length
    prefill //= rollout.completions_per_prompt
    drawing = rows * sampler_bytes(rollout)
    each = cache_of_one + max(drawing, prefill)
    fitting = max(1, int(SAMPLING_SHARE[speed.type] * (speed.memory_bytes - held) / each))
    sampled = min(completions, rollout.batch or fitting)
    memory = memory._replace(kv_cache=sampled * cache_of_one, sampling=sampled * drawing)

    # gradients grow while the graph shrinks; a second micro-batch finds those of the first
    recomputed = memory.working if train.activation_checkpointing else 0
    graph = memory.activations + max(memory.logits, recomputed)
    graph = graph + gradients if batches > 1 else max(graph, gradients + memory.working)

    # seconds
    def seconds(flops: float, moved: float, calls: float = 0.0) -> float:
        return (
            flops / speed.matmul_flops
            + moved / speed.memory_bytes_per_second
            + calls * speed.call_seconds
        )

    def forward(reader: Reader, cost: Forward, share: float = 1.0, passes: int = batches) -> float:
        """All sequences through the body in `passes`, `share` of each sequence."""
        moved = passes * reader.model.num_parameters() * item
        moved += 2 * share * completions * cost.kept_bytes
        return seconds(share * completions * cost.flops, moved, passes * calls_of(reader))

    def head(reader: Reader) -> float:
        """The output layer once on every completion token."""
        return seconds(2 * completions * new * output_weight(reader).numel(), 0)

    passes = math.ceil(completions / sampled)
    one_token = completions * (own.flops - own.tower_flops) / length
    cached = completions * cache_of_one * (student.prompt_tokens + new / 2) / length
    is_captured = rollout.decode == "graphs" and speed.type == "cuda"
    decode = new * seconds(
        one_token,
        passes * memory.student_weights + cached + 2 * completions * drawing,
        passes * (CALLS_OF_REPLAY if is_captured else calls_of(student, language_only=True)),
    )
    prompts = student.prompt_tokens / length / rollout.completions_per_prompt
    updates, again = train.updates_per_rollout, int(train.activation_checkpointing)
    moved = UPDATE_BYTES * trained
    at = HOST_BYTES_PER_SECOND if offload else speed.memory_bytes_per_second
    return Estimate(
        memory,
        rollout_batch=sampled,
        micro_batch=batch,
        on_host=(*on_host, *(("teacher_weights",) if resting else ())),
        rollout_bytes=held + memory.kv_cache + max(memory.sampling, sampled * prefill),
        teacher_bytes=held
        + resting
        + (gradients if batches > 1 and not resting else 0)
        + batch * max((cost.working_bytes for cost in theirs), default=0),
        gradient_bytes=held + memory.dense_gradient + graph,
        update_bytes=held + gradients,
        seconds=Seconds(
            rollout=forward(student, own, prompts, passes) + decode + head(student),
            teacher=resting / HOST_BYTES_PER_SECOND
            + sum(
                forward(teacher, cost) + head(teacher)
                for teacher, cost in zip(teachers, theirs, strict=True)
            ),
            student=updates
            * (
                (3 + again) * forward(student, own)
                + 3 * head(student)
                + seconds(0, of_loss.moved * completions * new)
            ),
            update=updates * moved / at,
        ),
    )


def output_weight(reader: Reader) -> Tensor:
    return reader.model.get_output_embeddings().weight


@lru_cache(16)
def calls_of(reader: Reader, language_only: bool = False) -> int:
    """Overhead of one forward pass of the model, in tiny calls; `language_only` without the vision tower."""
    towers = ("vision", "projector") if language_only else ()
    names = [name for name, _ in reader.model.named_parameters()]
    return CALLS_PER_PARAMETER * sum(
        parameter_names.classify(name).component not in towers for name in names
    )


def described_device(name: str) -> DeviceSpeed:
    """A card that is not at hand, by its published figures. Raises ConfigError for an unknown name."""
    if name not in CARDS:
        raise ConfigError(f"no figures of a card {name!r}; there are {', '.join(CARDS)}")
    teraflops, terabytes, gibibytes = CARDS[name]
    return DeviceSpeed(
        matmul_flops=MATMUL_SHARE * teraflops * 1e12,
        memory_bytes_per_second=BANDWIDTH_SHARE * terabytes * 1e12,
        memory_bytes=gibibytes << 30,
        call_seconds=CALL_SECONDS,
    )


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
            type="cpu" if on_cpu else "cuda",
        )
