"""`vlopd serve`: holds a model for other processes."""

from __future__ import annotations

import os
import sys
import threading
from typing import Annotated, Literal

import typer

from vlopd.errors import ConfigError


def serve(
    model: Annotated[str, typer.Argument(help="folder, hub id, .gguf file or builtin:NAME")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8100,
    host: Annotated[
        str, typer.Option(help="address to listen at; others than this machine's need a token")
    ] = "127.0.0.1",
    compute: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="as the run's precision.compute")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="such as cuda:1; default: a GPU if any")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="attention kernel, as in a config")] = None,
    revision: Annotated[str | None, typer.Option(help="of a hub id")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code of the model's repository")
    ] = False,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
) -> None:
    """Holds a model in this process for trainings elsewhere: teacher.engine = {type = "vlopd", url = ...}.

    Listens to this machine alone, unless the environment variable VLOPD_ENGINE_TOKEN holds a secret that clients have
    too.
    """
    from vlopd.engines.process import READY
    from vlopd.engines.wire import TOKEN, is_loopback
    from vlopd.serve.run import listen

    token = os.environ.get(TOKEN)
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"--host {host} lets other machines in; set the environment variable {TOKEN} to a secret on both "
            "sides, or listen at 127.0.0.1"
        )
    settings = {
        "attention": attention,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if with_parent:
        threading.Thread(target=end_with_parent, daemon=True).start()
    listen(
        model,
        host,
        port,
        compute,
        device,
        token,
        settings,
        lambda url: print(READY + url, flush=True),
    )


def end_with_parent() -> None:
    """Ends this process when its standard input closes."""
    sys.stdin.read()
    os._exit(0)
