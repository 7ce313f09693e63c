"""Memory of a training, by part and phase; and the error where it does not suffice.

Parts have the names of `vlopd.preflight.memory.Memory`, which predicts them. Weights, values, indices, gradients and
optimizer state are the bytes of their tensors; activations are what autograd keeps of the first step's largest
micro-batch; logits are the most bytes at once, forward and backward, of tensors [*, V], counted as operations make
them; cache and sampler are computed from the size of the largest sampling batch. Peaks are the allocator's, reset at
the start of each phase, on a GPU of CUDA. Elsewhere they are the resident set's, libraries included, which is never
reset: of the phases that raised it.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlopd.config.objective import RolloutConfig
from vlopd.errors import is_out_of_memory, out_of_memory
from vlopd.models.cache_size import cache_bytes, sampler_bytes
from vlopd.models.loaded import LoadedModel
from vlopd.train.allocations import Allocations
from vlopd.train.checkpointing import recomputed
from vlopd.train.decoding import chosen_engine
from vlopd.train.optimizers import Optimizers
from vlopd.train.pair import ModelPair
from vlopd.train.rollouts import Batch
from vlopd.train.sparse import Trainable, local
from vlopd.types import Completions, Prompts


class MemoryUse:
    """The memory of one training. As a context manager, turns failed allocations into OutOfMemory.

    `enter` begins a phase; within `saved`, what autograd keeps is counted, until `about` is called.
    """

    def __init__(
        self,
        pair: ModelPair,
        rollout: RolloutConfig,
        trainable: Trainable,
        optimizer: Optimizers,
        averages: Iterable[Trainable] = (),
    ):
        self.pair, self.rollout = pair, rollout
        self.trainable, self.optimizer = trainable, optimizer
        self.averages = tuple(averages)
        self.device = pair.student.device
        self.phase = "start"
        self.peaks: dict[str, int] = {}
        self.counts = True
        self.kept = {"activations": 0, "logits": 0}
        self.cache = 0
        self.sampling_batch: dict[str, Any] | None = None
        self.shapes: dict[str, int] = {}
        self.prompt_tokens = [0] * (1 + len(pair.teachers))
        # by their storage: sharded weights come and go in the same one
        self.own = {t.untyped_storage()._cdata for t in tensors_of(pair.student.model)}
        read_peak(self.device)

    def __enter__(self) -> MemoryUse:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and is_out_of_memory(error):
            raise out_of_memory(self.phase, error, self.held())

    def enter(self, phase: str) -> None:
        """Ends the phase under way, and begins another."""
        peak = read_peak(self.device)
        if self.device.type == "cuda" or peak > max(self.peaks.values(), default=0):
            self.peaks[self.phase] = max(peak, self.peaks.get(self.phase, 0))
        self.phase = phase

    @contextmanager
    def saved(self, checkpointing: bool = False) -> Iterator[None]:
        """A context around the student's forward pass and the loss, in which what autograd keeps is counted."""
        if not self.counts:
            with recomputed(self.pair.student.model, checkpointing):
                yield
            return
        models = [self.pair.student, *(its.loaded for its in self.pair.teachers)]
        widths = {self.pair.vocabulary.size, *(each.vocabulary_rows for each in models)}
        sizes: dict[int, int] = {}

        def is_wide(tensor: Tensor) -> bool:
            return tensor.ndim > 1 and tensor.shape[-1] in widths

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and not is_wide(tensor):
                sizes[storage.data_ptr()] = storage.nbytes()
            return (
                tensor.detach()
            )  # not the tensor itself, which would own its graph and be owned by it

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            recomputed(self.pair.student.model, checkpointing, note),
            Allocations(is_wide) as wide,
        ):
            yield
        for part, size in (("activations", sum(sizes.values())), ("logits", wide.peak)):
            self.kept[part] = max(self.kept[part], size)

    def sampled(self, loaded: LoadedModel, prompts: Prompts, completions: Completions) -> None:
        """Notes the sizes of a sampling batch."""
        rows, new = completions.ids.shape
        engine, why = chosen_engine(loaded, self.rollout.decode)
        tokens = prompts.input_ids.shape[1]
        length = tokens + (new if engine == "eager" else self.rollout.max_new_tokens)
        cache = rows * cache_bytes(loaded.model.config, loaded.model.dtype, length)
        if self.sampling_batch is None or cache > self.cache:
            self.cache = cache
            self.sampling_batch = {
                "model": loaded.name,
                "rows": rows,
                "prompt_tokens": tokens,
                "completion_tokens": new,
                "engine": engine,
                "why": why,
            }

    def rolled_out(self, batches: Sequence[Batch]) -> None:
        """Notes the sizes of a step's micro-batches."""
        for batch in batches:
            rows, columns = batch.completions.ids.shape
            tokens = max(each.student.n_tokens for each in batch.rendered) + columns
            for each in batch.rendered:
                for k, prompts in {-1: each.student, **each.teachers}.items():
                    self.prompt_tokens[k + 1] = max(self.prompt_tokens[k + 1], prompts.n_tokens)
            for name, size in {
                "rows": rows,
                "tokens": tokens,
                "completion_tokens": columns,
            }.items():
                self.shapes[name] = max(size, self.shapes.get(name, 0))

    def held(self) -> dict[str, int]:
        """Bytes of each part that is in memory now, on the device or the host."""
        own, slots = self.pair.student.model, list(self.trainable.slots.values())
        every = [s for t in (self.trainable, *self.averages) for s in t.slots.values()]
        models = [own, *(its.loaded.model for its in self.pair.teachers)]
        shared = {t.data_ptr() for model in models for t in tensors_of(model)}
        state = (x for entries in self.optimizer.state().values() for x in entries.values())
        gradients = [s.values.grad for s in slots if s.values.grad is not None]
        return {
            "student_weights": total_bytes(tensors_of(own)),
            "teacher_weights": sum(total_bytes(tensors_of(model)) for model in models[1:]),
            "values": total_bytes(s.values for s in every if s.values.data_ptr() not in shared),
            "indices": sum(s.index_bytes for s in every),
            "gradients": total_bytes(gradients),
            "moments": total_bytes(x for x in state if isinstance(x, Tensor) and x.ndim),
        }

    def on_host(self) -> list[str]:
        """The parts that are in host memory though the device is another."""
        if self.device.type == "cpu":
            return []
        slots = list(self.trainable.slots.values())
        found = ["values", "gradients", "moments"] if slots and slots[0].offload else []
        resting = any(its.loaded.device != self.device for its in self.pair.teachers)
        return [*found, "teacher_weights"] if resting else found

    def about(self) -> dict[str, Any]:
        """The content of memory.json; ends the counting."""
        self.counts = False
        dense = max(slot.parameter.nbytes for slot in self.trainable.slots.values())
        sampler = self.pair.vocabulary.size * sampler_bytes(self.rollout)
        parts = {
            **self.held(),
            "kv_cache": self.cache,
            "sampling": 0 if self.sampling_batch is None else self.sampling_batch["rows"] * sampler,
            **self.kept,
            "dense_gradient": dense,
        }
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if on_gpu else self.device.type,
            "parts_bytes": parts,
            "on_host": self.on_host(),
            "peak_bytes": dict(self.peaks),
            "peak_of": "torch.cuda.max_memory_allocated" if on_gpu else "resident set",
            "largest_batch": dict(self.shapes),
            "sampling_batch": self.sampling_batch,
            "prompt_tokens": self.prompt_tokens,
        }


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, tied ones once; of sharded ones this process's part."""
    return [local(each) for each in (*model.parameters(), *model.buffers())]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def read_peak(device: torch.device) -> int:
    """The most bytes allocated on a GPU since the last call; on a CPU, the largest resident set so far."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage's, which in a child begins with its parent's peak
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
