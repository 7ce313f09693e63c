"""Starts `vlopd serve` or vLLM on this machine, and ends it with this process."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests
import torch

from vlopd.config.engines import VllmEngine
from vlopd.config.models import ModelConfig
from vlopd.engines.client import EngineError
from vlopd.engines.kept import GRACE_SECONDS
from vlopd.trust import program, why_withheld

WORKER = Path(__file__).parent / "worker"
"""The folder with what vLLM's workers import of vlopd."""

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
    token: str | None = None
    """What it wants to be asked with."""
    log: Path | None = None
    """What it prints; the file stays where it ended by itself."""


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
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - the server's, as long as it runs
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=plain_environment(),
    )
    url = _first_address(process, timeout_seconds)
    if url is None:
        end(process)
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
        why = lines[-1] if lines else f"nothing within {timeout_seconds:g} s"
        raise EngineError(f"vlopd serve {config.model} did not start: {why}")
    return _kept(Server(url, process))


def started_vllm(
    engine: VllmEngine, model: str, dtype: torch.dtype, words: Sequence[str]
) -> Server:
    """Starts a vLLM server of a model's folder, on this machine's own address, and waits until it answers.

    words: further arguments, before the configured ones. Raises EngineError with the reason where it does not start.
    """
    assert engine.python is not None
    if why := why_withheld(program(engine.python, engine.arguments)):
        raise EngineError(why)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [engine.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", str(dtype).split(".")[1]]
    command += ["--generation-config", "vllm", "--max-logprobs", "-1", "--enable-scale-out"]
    command += ["--disable-uvicorn-access-log", *words, *engine.arguments]
    token = secrets.token_hex(16)
    env = plain_environment() | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": token}
    env["PYTHONPATH"] = str(WORKER)
    if engine.device is not None:
        env["CUDA_VISIBLE_DEVICES"] = engine.device.rpartition(":")[2]
    handle, name = tempfile.mkstemp(".log", "vlopd-vllm-")
    kept = [sys.executable, str(WORKER.parent / "kept.py"), *command]
    process = subprocess.Popen(
        kept, stdin=subprocess.PIPE, stdout=handle, stderr=subprocess.STDOUT, text=True, env=env
    )
    os.close(handle)
    server = _kept(Server(f"http://127.0.0.1:{port}", process, token, Path(name)))
    deadline = time.monotonic() + engine.start_seconds
    while time.monotonic() < deadline:
        with suppress(requests.RequestException):
            if requests.get(f"{server.url}/health", timeout=5).status_code == 200:
                return server
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            break
    end(process)
    text = Path(name).read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line and "Engine core init" not in line]
    why = (named or lines or [f"nothing within {engine.start_seconds:g} s"])[-1]
    raise EngineError(f"vLLM of {model} did not start: {why[-300:]} (all of it: {name})")


def plain_environment() -> dict[str, str]:
    """The environment without what makes a process one of a launcher's."""
    return {key: value for key, value in os.environ.items() if key not in LAUNCHERS}


def _kept(server: Server) -> Server:
    """The server, which ends with the object, and so at the interpreter's exit."""
    weakref.finalize(server, _end_with_log, server.process, server.log)
    return server


def _end_with_log(process: subprocess.Popen[Any], log: Path | None) -> None:
    is_running = process.poll() is None
    end(process)
    if is_running and log is not None:
        log.unlink(missing_ok=True)


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
        process.wait(2 * GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
