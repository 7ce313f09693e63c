"""The one place that asks accelerate for the device and for the processes of a launcher."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from vlopd.config import ConfigError


def accelerator() -> Accelerator:
    """This process's accelerator: a GPU where there is one, else the CPU (gloo between processes).

    Raises ConfigError where the processes of a launcher do not know of each other: each would do
    everything, over the others.
    """
    state = Accelerator(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise ConfigError(
            f"{started} processes were started but accelerate sees {state.num_processes}; start them "
            "with `accelerate launch`"
        )
    return state


def main_process_first():
    """A context: of several processes one does the work; the others wait, and then find it done."""
    return accelerator().main_process_first()
