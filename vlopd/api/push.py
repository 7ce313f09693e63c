"""Uploads an arm of a run to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlopd.config.arms import mask_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.input import config_of
from vlopd.errors import ConfigError, RunError, first_line
from vlopd.run.folder import RunFolder
from vlopd.run.links import check_links
from vlopd.run.schemas.read import read_record


def push(
    run: Path | str, arm: str, repo: str, *, private: bool = False, dry_run: bool = False
) -> dict[str, Path | bytes]:
    """Uploads an arm's checkpoint, record, mask and model card with results to a model repository of the hub.

    repo: "user/name", created where it does not exist; `private` applies then. Needs a token (`hf auth login`).
    Returns {file in the repository: local file, or content}; with `dry_run` nothing is uploaded. Raises
    ConfigError for an invalid repository name, RunError for an arm without a checkpoint, and where the hub refuses.
    """
    folder = RunFolder(run)
    folder.refuse_foreign_files()
    config = config_of(folder.read()["config"], folder.root / "run.json")
    found = _files_of(folder, config, arm)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo: {first_line(error)}") from None
    if dry_run:
        return found

    operations = [CommitOperationAdd(name, content) for name, content in found.items()]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"{config.name}: arm {arm}")
    except Exception as error:  # no token, no access, no network
        raise RunError(
            f"{repo}: the upload failed: {first_line(error)}; it needs a token (`hf auth login`) and HF_HUB_OFFLINE=0"
        ) from None
    return found


def _files_of(run: RunFolder, config: ExperimentConfig, arm: str) -> dict[str, Path | bytes]:
    if arm not in config.arms:
        raise RunError(f"{run.root} has no arm {arm!r}; it has {', '.join(config.arms)}")
    checkpoint, record = run.checkpoint(arm), run.arm_record(arm)
    if not record.exists() or not checkpoint.is_dir():
        raise RunError(f"{run.root} has no checkpoint of arm {arm!r}; make it with `vlopd run`")
    run.checksums.check(f"arms/{arm}")
    check_links(run, config, f"arms/{arm}", f"masks/{mask_of(config.arms[arm])}", f"evals/{arm}")
    written = run.checksums.read(f"arms/{arm}")
    found: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path
        for path in map(run.root.joinpath, sorted(written))
        if path.is_relative_to(checkpoint)
    }
    found["README.md"] = _model_card(run, config, arm).encode()
    found["record.json"] = record
    if (mask := mask_of(config.arms[arm])) is not None:
        run.checksums.check(f"masks/{mask}")
        found |= {"mask/mask.safetensors": run.mask(mask), "mask/mask.json": run.mask_record(mask)}
    return found


def _model_card(run: RunFolder, config: ExperimentConfig, arm: str) -> str:
    """The checkpoint's model card with the arm's scores."""
    card = (run.checkpoint(arm) / "README.md").read_text().replace("../record.json", "record.json")
    if mask_of(config.arms[arm]) is not None:
        card += "The trained coordinates are in mask/.\n"
    results = run.eval(arm) / "results.json"
    if not results.exists() or not (rows := _score_rows(read_record(results))):
        return card
    return "\n".join([card, "| task | metric | mean | questions |", "|---|---|---|---|", *rows, ""])


def _score_rows(results: dict[str, Any]) -> list[str]:
    rows = []
    for task, metric in results["primary_metric"].items():
        mean = results["results"][task].get(f"{metric},none")
        count = results.get("n-samples", {}).get(task, {}).get("effective", "")
        if mean is not None:
            rows.append(f"| {task} | {metric} | {mean:.4f} | {count} |")
    return rows
