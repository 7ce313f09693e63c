"""Host memory for what a device need not hold all the time: values and optimizer state, resting teachers.

Values and optimizer state (train.offload_optimizer). The optimizer runs on the host, where its state lies: an AdamW
moves 28 bytes a coordinate through the processor, but only a gradient (2 bytes in bf16) and a rounded weight (2)
through the bus, against 24 both ways if values and moments were streamed to the device and back. Gradients are copied
as they are made, on a stream of their own, while the backward pass goes on; weights are rounded on the host while
those before them are on their way back.

Teachers (train.offload_teacher). Weights are in host memory but for the teacher's phase, once a step; the output layer,
which the loss needs, stays on the device.

On a CPU "device" and host are the same memory; all copies are made nevertheless.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlopd.train.teacher import Teacher

HOST = torch.device("cpu")

PENDING_BYTES = 1 << 29
"""Gradients on their way to host memory at once: bounds the memory of both sides."""


def pinned(like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised host tensor of the shape, page-locked where `device` has copy engines to use it."""
    return torch.empty(like.shape, dtype=dtype, device=HOST, pin_memory=device.type == "cuda")


def staged(values: Tensor, parameter: Tensor) -> Tensor:
    """Host values [...] in the parameter's dtype, ready for an asynchronous copy to its device."""
    return pinned(values, parameter.dtype, parameter.device).copy_(values)


class Downloads:
    """Copies of gradients to host memory, which overlap with the backward pass that makes them.

    `start` returns at once; the copy is handed on by `finish`, or when more than `most_bytes` are under way.
    """

    def __init__(self, most_bytes: int = PENDING_BYTES):
        self.most_bytes, self.bytes = most_bytes, 0
        self.pending: deque[tuple[Tensor, torch.Event | None, Callable[[Tensor], None]]] = deque()
        self.stream: torch.Stream | None = None

    def start(self, tensor: Tensor, receive: Callable[[Tensor], None]) -> None:
        """Begins to copy a device tensor; `receive` will get the copy. Copies are received in order."""
        copy, event = pinned(tensor, tensor.dtype, tensor.device), None
        if tensor.device.type == "cpu":
            copy.copy_(tensor)
        else:
            event = self._copy_on_stream(tensor, copy)
        self.pending.append((copy, event, receive))
        self.bytes += copy.nbytes
        while self.bytes > self.most_bytes:
            self._receive()

    def _copy_on_stream(self, tensor: Tensor, copy: Tensor) -> torch.Event:
        if self.stream is None:
            self.stream = torch.Stream(tensor.device)
        made = torch.accelerator.current_stream(tensor.device)
        self.stream.wait_stream(made)
        with self.stream:
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # not to be reused before it is copied
        return self.stream.record_event()

    def _receive(self) -> None:
        copy, event, receive = self.pending.popleft()
        self.bytes -= copy.nbytes
        if event is not None:
            event.synchronize()
        receive(copy)

    def finish(self) -> None:
        """Waits for all copies and hands them on."""
        while self.pending:
            self._receive()

    def drop(self) -> None:
        """Forgets the copies under way (of a step that failed)."""
        self.pending.clear()
        self.bytes = 0


class Resting:
    """Teachers whose weights are in host memory except within `awake`, also after the training.

    Output layers, and what they share with embeddings, stay on the device. Nothing is written back: outside of `awake`
    the parameters are the host's tensors, so that a moving average may update them there. If not `rests`, all stay.
    """

    def __init__(self, teachers: Iterable[Teacher], device: torch.device, rests: bool = True):
        self.device, self.moves = device, 0
        """Where they are awake, and the times that they were brought there."""
        self.parameters: list[nn.Parameter] = []
        for model in {teacher.loaded.model: None for teacher in teachers}:
            if not rests:
                model.to(device)  # from where an earlier training left them
                continue
            stay = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
            for parameter in model.parameters():
                if id(parameter) not in stay:
                    held = pinned(parameter, parameter.dtype, device)
                    parameter.data = held.copy_(parameter.data)
                    self.parameters.append(parameter)

    @contextmanager
    def awake(self, on: bool = True) -> Iterator[None]:
        """A context in which the weights are on their device; nothing if not `on`."""
        if not on or not self.parameters:
            yield
            return
        resting = [parameter.data for parameter in self.parameters]
        self.moves += 1
        try:
            for parameter in self.parameters:
                parameter.data = parameter.data.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            for parameter, held in zip(self.parameters, resting, strict=True):
                parameter.data = held
