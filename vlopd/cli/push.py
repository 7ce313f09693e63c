"""`vlopd push`: uploads an arm to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from vlopd.cli.common import console, say


def push(
    run: Annotated[Path, typer.Argument(help="run folder")],
    arm: Annotated[str, typer.Option(help="the arm to upload")],
    repo: Annotated[str, typer.Option(help="model repository, user/name; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="create it private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the files")] = False,
) -> None:
    """Uploads an arm to the Hugging Face hub: checkpoint, record, mask, model card with results."""
    from vlopd.api.push import push as upload

    for name, content in upload(run, arm, repo, private=private, dry_run=dry_run).items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        console.print(f"{name} ({decimal(size)})", soft_wrap=True, highlight=False)
    done = "would be uploaded to" if dry_run else "uploaded to"
    say(done, repo)
