"""Several processes for one import: forks of a process that has imported everything and started nothing."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable


def run(n: int, work: Callable[[], None]) -> None:
    """Runs `work` in n connected processes, as a launcher would. Exits where one fails, and then ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(n):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in {**place, **where}.items()})
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children[child] = rank
    while children:
        ended, status = os.wait()
        children.pop(ended)
        if status:
            for child in children:
                os.kill(child, 9)
            raise SystemExit(f"a process of {n} ended with {status}")
