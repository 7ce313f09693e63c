"""Starts `vlopd serve` on this machine, and ends it with this process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from typing import IO, Any

import torch

from vlopd.config.models import ModelConfig
from vlopd.engines.client import EngineError

READY = "vlopd serve: ready at "
"""Begins the line that `vlopd serve` prints once it answers; the address follows."""

LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables of torchrun and accelerate, of which the server is no process."""


@dataclass(frozen=True)
class Server:
    """A server that ends when its standard input closes, so also when this process is killed."""

    url: str
    process: subprocess.Popen[str]


def started(
    config: ModelConfig, device: str | None, dtype: torch.dtype, timeout_seconds: float
) -> Server:
    """Starts a server of the model and waits until it answers. Raises EngineError with its last line if it ends."""
    compute = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    words = [
        sys.executable,
        "-m",
        "vlopd",
        "serve",
        config.model,
        "--port",
        "0",
        "--compute",
        compute,
    ]
    words += ["--with-parent"] + (["--device", device] if device else [])
    words += ["--attention", config.attention] if config.attention else []
    words += ["--revision", config.revision] if config.revision else []
    words += ["--trust-remote-code"] if config.trust_remote_code else []
    env = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the server's, as long as it runs
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
    )
    url = _first_address(process, timeout_seconds)
    if url is None:
        end(process)
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
        why = lines[-1] if lines else f"nothing within {timeout_seconds:g} s"
        raise EngineError(f"vlopd serve {config.model} did not start: {why}")
    server = Server(url, process)
    weakref.finalize(server, end, process)  # also at the interpreter's exit
    return server


def _first_address(process: subprocess.Popen[str], timeout_seconds: float) -> str | None:
    """The address of the READY line; None where the process ends or is silent too long."""
    found: list[str] = []

    def read(lines: IO[str]) -> None:
        for line in lines:
            if line.startswith(READY):
                found.append(line.removeprefix(READY).strip())
                return

    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    reader.join(timeout_seconds)
    return found[0] if found else None


def end(process: subprocess.Popen[Any]) -> None:
    """Closes the server's input, and kills it where it does not end."""
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
