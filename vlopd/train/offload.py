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
    """Models whose weights are in host memory except within `awake`.

    Output layers, and what they share with embeddings, stay where they are. Nothing is written back: outside of
    `awake` the parameters are the host's tensors, so that a moving average may update them there. As a context
    manager, it brings them back to their device at the end.
    """

    def __init__(self, teachers: Iterable[Teacher]):
        self.parameters: list[tuple[nn.Parameter, torch.device]] = []
        self.moves = 0
        """Times that the weights were brought to their device."""
        for model in {teacher.loaded.model: None for teacher in teachers}:
            stay = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
            for parameter in model.parameters():
                if id(parameter) not in stay:
                    self.parameters.append((parameter, parameter.device))
                    held = pinned(parameter, parameter.dtype, parameter.device)
                    parameter.data = held.copy_(parameter.data)

    @contextmanager
    def awake(self, on: bool = True) -> Iterator[None]:
        """A context in which the weights are on their device; nothing if not `on`."""
        if not on:
            yield
            return
        resting = [parameter.data for parameter, _ in self.parameters]
        self.moves += bool(resting)
        try:
            for parameter, device in self.parameters:
                parameter.data = parameter.data.to(device, non_blocking=True, copy=True)
            yield
        finally:
            for (parameter, _), held in zip(self.parameters, resting, strict=True):
                parameter.data = held

    def __enter__(self) -> Resting:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:  # else the device may be full
            for parameter, device in self.parameters:
                parameter.data = parameter.data.to(device)
        self.parameters.clear()
