"""Loads a model and serves it until interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from vlopd import distributed
from vlopd.config.input import value_of
from vlopd.config.models import ModelConfig
from vlopd.digests import digest_checkpoint
from vlopd.errors import ConfigError
from vlopd.models.load import DTYPES, load_configured
from vlopd.serve.app import Held, application


def listen(
    model: str,
    host: str,
    port: int,
    compute: distributed.Compute,
    device: str | None,
    token: str | None,
    settings: Mapping[str, Any],
    on_ready: Callable[[str], None],
) -> None:
    """Serves a model; returns after Ctrl-C. on_ready gets the address. Raises ConfigError."""
    config: ModelConfig = value_of(ModelConfig, {"model": model, **settings}, "model")
    where = distributed.accelerator().device if device is None else device
    distributed.refuse_missing_device(where)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:  # before the model is loaded
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another --port"
        ) from None
    with listening:
        loaded = load_configured(config, DTYPES[distributed.resolve_compute(compute, where)], where)
        assert loaded.folder is not None
        app = application(Held(loaded, digest_checkpoint(loaded.folder, whole=True)), token)
        shown = f"[{host}]" if ":" in host else host

        async def ready(_: web.Application) -> None:
            on_ready(f"http://{shown}:{listening.getsockname()[1]}")

        app.on_startup.append(ready)
        web.run_app(app, sock=listening, print=None, access_log=None)
