"""Evaluates and compares models or imported scores outside a run: `vlopd compare A B --tasks ...`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from evals import preflight
from evals.compare import compare_arms
from evals.harness import Subject, evaluate, import_scores
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import Role
from vlopd.config.models import ModelConfig
from vlopd.config.roles import Roles
from vlopd.digests import digest_json
from vlopd.errors import ConfigError
from vlopd.files import shortest_distinct_names
from vlopd.models.load import DTYPES, check_unloaded, load_configured
from vlopd.models.loaded import LoadedModel
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import model_content
from vlopd.train.pair import without_weights


def compare_models(
    models: Sequence[str], config: EvalConfig, out: Path, compute: str, device: torch.device
) -> Path:
    """Evaluates each model on the tasks and compares the others with the first, paired by question.

    models: checkpoint folders, hub ids, `builtin:NAME`, or lm-eval output folders. Writes out/evals/<name>/ and
    out/compare.json, whose path it returns. Earlier evaluations in `out` are reused.
    """
    names, run = _short_names(models), RunFolder(out)
    first, *others = names
    of: dict[str, Role] = {first: "base", **dict.fromkeys(others, "other")}
    roles = Roles(of)
    try:
        roles.contrasts(config.contrasts or ())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for model in models:
        if not _is_scores(model):
            check_unloaded(ModelConfig(model=model))  # all of them, before the first evaluation
    if not all((out / "evals" / name / "results.json").exists() for name in names):
        _refuse_unready(names, config)
    for name, model in names.items():
        if _is_scores(model):
            import_scores(run, Path(model), name, config)
            continue
        about = ModelConfig(model=model)

        def open_model(about: ModelConfig = about):
            return load_configured(about, DTYPES[compute], device)

        def content(whole: bool, about: ModelConfig = about):
            return model_content(about, whole)

        evaluate(run, Subject(name, content, compute, open_model, {"model": model}), config)
    inputs = {"config": digest_json(config.model_dump(mode="json"))}
    return compare_arms(run, roles, config, inputs, {})


def _refuse_unready(names: Mapping[str, str], config: EvalConfig) -> None:
    """Raises ConfigError for unusable tasks, models and scores, before any weights are read."""
    loaded: dict[str, LoadedModel] = {}
    lines: list[str] = []
    for name, model in names.items():
        if _is_scores(model):
            lines += preflight.find_import_problems(config.tasks, Path(model))
        else:
            loaded[name] = without_weights(ModelConfig(model=model))
    lines += preflight.find_problems(config, loaded)
    if lines:
        raise ConfigError("; ".join(lines))


def _is_scores(model: str) -> bool:
    """Whether this is an lm-eval output folder, not a model."""
    folder = Path(model)
    return (
        folder.is_dir()
        and not (folder / "config.json").exists()
        and any(folder.rglob("results_*.json"))
    )


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """{short name: model}. Raises ConfigError for a model given twice."""
    parts = [re.sub(r"[^\w./-]", "-", model).strip("/").split("/") for model in models]
    return dict(zip(shortest_distinct_names(parts), models, strict=True))
