"""`vlopd.evaluate` and `vlopd.compare`: models, or finished evaluations, on lm-eval tasks without a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from evals import harness, preflight
from evals.compare import compare_arms
from evals.paired_scores import NOT_METRICS
from evals.report import figures, tables
from evals.report.checkpoints import write_comparison_page
from evals.report.verdict import verdict
from evals.stats import mean_with_error
from vlopd.api.checkpoints import (
    Checkpoint,
    is_scores,
    model_of,
    names_of,
    path_or_id,
    refuse_other_kinds,
    temporary_folder,
)
from vlopd.config.analysis import EvalConfig
from vlopd.config.arms import Role
from vlopd.config.input import value_of
from vlopd.config.models import ModelConfig
from vlopd.config.roles import Roles
from vlopd.digests import digest_json
from vlopd.distributed import Compute, accelerator, resolve_compute
from vlopd.errors import ConfigError
from vlopd.loop import Trained
from vlopd.models.load import DTYPES, check_unloaded, load_configured
from vlopd.models.loaded import LoadedModel
from vlopd.run.folder import RunFolder
from vlopd.run.resolve import model_content, no_such_model, samples_by_task
from vlopd.run.schemas.read import read_log, read_record
from vlopd.train.pair import without_weights

UNUSED = {
    "tasks": "name the tasks by the argument of that name (--tasks on the command line)",
    "during": "is of training; a comparison of finished models has none",
}
"""Fields of the section `eval` that are not settings here, with the reason."""
READ_BY_COMPARISON = {"confidence", "bootstrap_draws", "margin", "contrasts", "metric"}
"""Fields of the section `eval` that finished evaluations are compared by; the others are of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model, in the folder `out`."""

    out: Path
    name: str
    confidence: float

    @cached_property
    def results(self) -> dict[str, Any]:
        """results.json in lm-eval's format, with digests of the data and prompts."""
        return read_record(RunFolder(self.out).eval(self.name) / "results.json")

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row per question: task, question, target, completion and metrics."""
        folder = RunFolder(self.out).eval(self.name)
        tasks = list(self.results["data_digest"])
        found = [pd.DataFrame(read_log(folder / f"samples_{task}.jsonl")) for task in tasks]
        return pd.concat([t.assign(task=task) for task, t in zip(tasks, found, strict=True)])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per task and metric, the compared one first: n, mean, standard_error, low, high over questions."""
        rows = []
        for task, part in self.samples.groupby("task", sort=False):
            metrics = part.drop(columns=["task", *NOT_METRICS], errors="ignore")
            clusters = part.cluster if part.cluster.notna().all() else None
            # items of corpus metrics are lists
            for metric in metrics.dropna(axis="columns", how="all").select_dtypes("number"):
                if metrics[metric].between(0, 1).all():
                    found = mean_with_error(metrics[metric], clusters, self.confidence)
                    rows.append({"task": task, "metric": metric, **found.__dict__})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return f"Evaluation of {self.name} in {self.out}\n{self.scores.to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self.scores.to_html(index=False, border=0)


@dataclass(frozen=True)
class Comparison:
    """Scores of several models, each compared with the first, paired by question; in the folder `out`."""

    out: Path
    record: Mapping[str, Any]
    """The content of compare.json."""
    page: Path
    """The self-contained HTML page."""

    @property
    def tasks(self) -> list[str]:
        return list(self.record["tasks"])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per task and model: metric, n, mean, standard_error, low, high."""
        return pd.DataFrame(
            {"task": task, "model": name, "metric": entry["metric"], **tables.estimate(its)}
            for task, entry in self.record["tasks"].items()
            for name, its in entry["arms"].items()
        )

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """One row per task and contrast: task, a, b, difference (a - b, paired by question), low, high, p, p_holm."""
        return tables.differences(self.record)

    @cached_property
    def verdict(self) -> list[str]:
        """The comparison in sentences."""
        return verdict(self.record)

    def plot(self) -> Figure:
        """Scores of every model, and differences to the first, with intervals; one row per task."""
        return figures.comparison(self.scores, tables.contrasts(self.record))

    def __repr__(self) -> str:
        return "\n".join(
            [f"Comparison in {self.out}", self.scores.to_string(index=False), *self.verdict]
        )

    def _repr_html_(self) -> str:
        both = [table.to_html(index=False, border=0) for table in (self.scores, self.contrasts)]
        return "".join(both)


def evaluate(
    model: Checkpoint,
    tasks: Sequence[str] | str,
    *,
    out: Path | str | None = None,
    compute: Compute = "auto",
    template: Path | str | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluates one model on lm-eval tasks: built-in, lm-eval's own, or of `include`.

    Args:
        model: a folder, hub id, `builtin:NAME`, .gguf file, or the result of `distill`.
        tasks: their names, or one.
        out: folder for evals/NAME/; results there with unchanged inputs are kept. None: a temporary one.
        compute: "fp32", "bf16" or "auto", bf16 on accelerators and on CPUs with AMX.
        template: chat template of a model without one: a .jinja file, or "plain" for bare text.
        settings: fields of the section `eval` (docs/evaluation.md): limit, batch_size, fewshot, include, ...

    Returns an Evaluation. Raises ConfigError for unusable tasks, models and settings, before weights are read.

    >>> evaluate("builtin:shapes-text-student", "shapes_text", limit=200).scores
    """
    models = {names_of([model])[0]: model}
    config, run = _config_of(models, tasks, settings), _folder(out)
    _evaluate_all(run, models, config, compute, template)
    return Evaluation(run.root, next(iter(models)), config.confidence)


def compare(
    models: Mapping[str, Checkpoint] | Sequence[Checkpoint],
    tasks: Sequence[str] | str | None = None,
    *,
    out: Path | str | None = None,
    compute: Compute = "auto",
    template: Path | str | Mapping[str, Path | str] | None = None,
    **settings: Any,
) -> Comparison:
    """Evaluates models, or imports finished evaluations, and compares the others with the first, paired by question.

    Args:
        models: {name: model}, or a list, named by the ends of their paths. A model is as in `evaluate`; a finished
            evaluation is an output folder of lm-eval, a run's evals/ARM, or a results_*.json or samples_*.jsonl.
        tasks: names of tasks; may be left out where all are evaluations, for the tasks that they share.
        out: folder for evals/NAME/, compare.json and compare.html; evaluations there are reused. None: a temporary one.
        compute: as in `evaluate`.
        template: chat template (a .jinja file, or "plain") of the models without one; or {name: template}, which
            replaces that model's own.
        settings: fields of the section `eval` (docs/evaluation.md): limit, confidence, margin, ...

    Returns a Comparison. Raises ConfigError for unusable tasks, models and settings, before weights are read.

    >>> compare({"base": "builtin:shapes-text-student", "full": trained}, ["shapes_text"], limit=200).contrasts
    """
    if isinstance(models, str | Path | Trained):
        raise ConfigError(
            f"models is one model, {path_or_id(models)}; give a list or {{name: model}}"
        )
    named = (
        dict(models)
        if isinstance(models, Mapping)
        else dict(zip(names_of(models), models, strict=True))
    )
    for name, model in named.items():
        refuse_other_kinds(model)
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\.][^/\\]*", name):
            raise ConfigError(
                f"models: {name!r} is no name; a name is text without slashes and without a dot at its start"
            )
    if len(named) < 2:
        raise ConfigError("a comparison needs two or more models or evaluations")
    if all(not isinstance(model, Trained) and is_scores(Path(model)) for model in named.values()):
        unread = [
            key for key in settings if key in EvalConfig.model_fields.keys() - READ_BY_COMPARISON
        ]
        unread = [key for key in unread if key not in UNUSED] + ["compute"] * (compute != "auto")
        unread += ["template"] * (template is not None)
        if unread:
            raise ConfigError(
                f"{unread[0]}: is of an evaluation, and all of these are finished; leave it out"
            )
    config, run = _config_of(named, tasks, settings), _folder(out)
    first, *others = named
    of: dict[str, Role] = {first: "base", **dict.fromkeys(others, "other")}
    roles = Roles(of)
    try:
        roles.contrasts(config.contrasts or ())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sources = _evaluate_all(run, named, config, compute, template)
    content = config.model_dump(mode="json")
    path = compare_arms(run, roles, config, {"config": digest_json(content)}, {})
    record = read_record(path)
    page = write_comparison_page(run.root, record, sources, {"compute": compute, **content})
    return Comparison(run.root, record, page)


def shared_tasks(models: Mapping[str, Checkpoint]) -> list[str]:
    """The tasks that finished evaluations share. Raises ConfigError for a model, or if there are none."""
    found: dict[str, list[str]] = {}
    for name, model in models.items():
        if isinstance(model, Trained) or not is_scores(Path(model)):
            _model(model)  # raises for a path that is no model either
            raise ConfigError(
                f"tasks: {name} is a model, not finished evaluations; name the tasks to evaluate it on, as in "
                "shapes_text or gsm8k (--tasks on the command line)"
            )
        found[name] = list(samples_by_task(Path(model)))
    first, *others = found.values()
    shared = [task for task in first if all(task in its for its in others)]
    if not shared:
        held = "; ".join(f"{name}: {', '.join(its) or 'none'}" for name, its in found.items())
        raise ConfigError(f"tasks: the evaluations share none ({held})")
    return shared


def _folder(out: Path | str | None) -> RunFolder:
    return RunFolder(temporary_folder() if out is None else out)


def _config_of(
    models: Mapping[str, Checkpoint], tasks: Sequence[str] | str | None, settings: Mapping[str, Any]
) -> EvalConfig:
    for key in UNUSED.keys() & settings.keys():
        raise ConfigError(f"{key}: {UNUSED[key]}")
    tasks = shared_tasks(models) if tasks is None else [tasks] if isinstance(tasks, str) else tasks
    return value_of(EvalConfig, {**settings, "tasks": tuple(tasks)}, "eval")


def _evaluate_all(
    run: RunFolder,
    models: Mapping[str, Checkpoint],
    config: EvalConfig,
    compute: Compute,
    template: Path | str | Mapping[str, Path | str] | None,
) -> dict[str, str]:
    """Evaluates models and imports scores into evals/NAME/; returns {name: path or id}. Checks all before the first.

    Raises ConfigError for unusable tasks, models and settings, before any weights are read.
    """
    device = accelerator().device
    resolved = resolve_compute(compute, device)
    scored = {n: m for n, m in models.items() if not isinstance(m, Trained) and is_scores(Path(m))}
    sources = {n: str(m) if n in scored else _model(m) for n, m in models.items()}
    abouts = {name: ModelConfig(model=its) for name, its in sources.items() if name not in scored}
    for about in abouts.values():
        check_unloaded(about)
    abouts = _with_template(abouts, template)
    if not all((run.eval(name) / "results.json").exists() for name in models):
        _refuse_unready({n: Path(sources[n]) for n in scored}, abouts, config)
    for name, source in sources.items():
        if name in scored:
            harness.import_scores(run, Path(source), name, config)
            continue
        subject = _subject(name, abouts[name], resolved, device)
        harness.evaluate(run, subject, config)
    return sources


def _with_template(
    models: Mapping[str, ModelConfig], template: Path | str | Mapping[str, Path | str] | None
) -> dict[str, ModelConfig]:
    """The models with a chat template, those without one if it is for all. Raises ConfigError where it reaches none."""
    if template is None:
        return dict(models)
    if not isinstance(template, Mapping):
        lacking = [n for n, its in models.items() if without_weights(its).chat_template is None]
        if not lacking:
            raise ConfigError(
                f"template: {', '.join(models) or 'none of these'} has one of its own; name the model to replace it: "
                "{NAME: FILE} (--chat-template NAME=FILE on the command line)"
            )
        template = dict.fromkeys(lacking, template)
    for name in template:
        if name not in models:
            raise ConfigError(f"template: no model {name!r}; there are {', '.join(models)}")
    own = {n: ModelConfig(model=models[n].model, template=str(t)) for n, t in template.items()}
    return {**models, **own}


def _model(checkpoint: Checkpoint) -> str:
    """The path or id that a model is loaded from. Raises RunError for a path of nothing that has no hub id's form."""
    model = model_of(checkpoint)
    if not Path(model).exists() and not model.startswith("builtin:") and model.count("/") != 1:
        try:
            check_unloaded(ModelConfig(model=model))
        except ConfigError:
            raise no_such_model(model) from None
    return model


def _subject(name: str, about: ModelConfig, compute: str, device: torch.device) -> harness.Subject:
    return harness.Subject(
        name,
        lambda whole: model_content(about, whole),
        compute,
        lambda: load_configured(about, DTYPES[compute], device),
        {"model": about.model},
    )


def _refuse_unready(
    scores: Mapping[str, Path], models: Mapping[str, ModelConfig], config: EvalConfig
) -> None:
    """Raises ConfigError for unusable tasks, models and scores, before any weights are read."""
    lines = preflight.find_import_problems(config.tasks, list(scores.values()))
    loaded: dict[str, LoadedModel] = {n: without_weights(about) for n, about in models.items()}
    if loaded:  # imported scores need no definition of their task
        lines += preflight.find_problems(config, loaded)
    if lines:
        raise ConfigError("; ".join(lines))
