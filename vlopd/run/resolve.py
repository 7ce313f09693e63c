"""Resolves the checkpoints, masks and scores that a config names to paths, with their digests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from vlopd.config.arms import CheckpointArm, ImportedArm, TeacherArm
from vlopd.config.data import DataConfig
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import FileMask, Reference
from vlopd.config.models import ModelConfig, TeacherConfig
from vlopd.data.load import files_of
from vlopd.digests import digest_checkpoint, digest_json, digest_text, file_digest
from vlopd.errors import RunError, first_line
from vlopd.masks.files import check_mask, check_shapes, load_mask
from vlopd.masks.foreign import is_foreign, open_foreign
from vlopd.masks.importing import align_with_checkpoint, origin, under_names_of
from vlopd.masks.rules import Mask
from vlopd.models import parameter_names
from vlopd.models.load import resolve
from vlopd.models.tokenizers import read_template
from vlopd.plugins import Use
from vlopd.progress import downloads
from vlopd.run.checksums import check_within_run
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record
from vlopd.weights import delta
from vlopd.weights.matching import known_config
from vlopd.weights.reader import Weights

MODEL_FILES = (
    *(".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".tiktoken", ".spm", ".vocab"),
)
"""Suffixes of files a model is loaded from: weights, configs, tokenizer, templates, code."""
NOT_MODEL_FILES = re.compile(
    r"(\w+_)?results\.json|trainer_\w+\.jsonl?|requirements.*\.txt|(license|notice|readme).*",
    re.IGNORECASE,
)
"""Files beside a model that loading does not read."""
MAX_LISTED_FILES = 16
"""Data files of one suffix that a record lists one by one."""


def arm_digest(run: RunFolder, name: str) -> str:
    return read_record(run.arm_record(name))["checkpoint_digest"]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def no_such_model(model: str) -> RunError:
    """The error for a path of nothing that has no hub id's form."""
    return RunError(f"{model}: no such file or folder, and not a hub id (those are OWNER/NAME)")


def hub_folder(model: str, revision: str | None) -> Path:
    """A model's folder: the path itself, or the local snapshot of a hub id."""
    if Path(model).is_dir():
        return Path(model)
    wanted = [f"*{ending}" for ending in MODEL_FILES]
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=wanted, tqdm_class=downloads(model)
            )
        )
    except Exception as error:  # no such folder, no such id, no network
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise no_such_model(model) from None
        raise RunError(
            f"no folder {model!r}, and no such model on the hub: {first_line(error)}"
        ) from None


def _folder_content(folder: Path, whole: bool = False) -> dict[str, str]:
    """{file: sha256} of the files a model folder is loaded from; `whole` as in digests.file_digest."""
    paths = [path for part in ("*", "additional_chat_templates/*") for path in folder.glob(part)]
    paths = sorted(
        path
        for path in paths
        if path.suffix in MODEL_FILES and not NOT_MODEL_FILES.fullmatch(path.name)
    )
    return {str(path.relative_to(folder)): file_digest(path, whole) for path in paths}


def model_content(model: ModelConfig, whole: bool = False) -> dict[str, str]:
    """{file: sha256} of the files a configured model is loaded from, including its chat template."""
    content = _folder_content(hub_folder(resolve(model.model), model.revision), whole)
    if model.template is not None:
        content["template"] = digest_text(read_template(model.template))
    return content


def teacher_content(
    run: RunFolder, config: ExperimentConfig, teacher: TeacherConfig, whole: bool = False
) -> dict[str, str]:
    """`model_content` of a teacher; of the base where the teacher is the student."""
    if teacher.is_student:
        return _folder_content(run.checkpoint(config.base_arm), whole)
    return model_content(teacher, whole)


def data_content(
    data: DataConfig, teachers: Sequence[TeacherConfig], whole: bool = False
) -> dict[str, str]:
    """{file: sha256} of an arm's data files; more than MAX_LISTED_FILES of one suffix are combined into one digest."""
    by_ending: dict[str, list[Path]] = {}
    for path in files_of(data, teachers):
        by_ending.setdefault(path.suffix, []).append(path)
    content: dict[str, str] = {}
    for ending, paths in by_ending.items():
        digests = {str(path): file_digest(path, whole) for path in paths}
        many = len(paths) > MAX_LISTED_FILES
        content |= {f"{len(paths)} *{ending}": digest_json(digests)} if many else digests
    return content


def plugin_content(uses: Iterable[Use], whole: bool = False) -> dict[str, str]:
    """{function: sha256 of its file}, and {file: sha256} of existing files that are named by their arguments."""
    content: dict[str, str] = {}
    for use in uses:
        content[use.plugin] = use.plugin.digest()
        for text in use.arguments.values():
            if isinstance(text, str) and Path(text).is_file():
                content[text] = file_digest(Path(text), whole)
    return {str(name): content[name] for name in sorted(content)}


def arm_content(
    run: RunFolder, config: ExperimentConfig, name: str, whole: bool = False
) -> dict[str, str]:
    """{file: sha256} of the files an arm is evaluated from.

    Raises RunError where a file of the arm was changed.
    """
    arm = config.arms.get(name)
    if isinstance(arm, TeacherArm):
        return teacher_content(run, config, config.teacher_of(arm), whole)
    if isinstance(arm, CheckpointArm):
        return model_content(config.checkpoint_of(arm), whole)
    if isinstance(arm, ImportedArm):
        return {path.name: file_digest(path, whole) for path in score_files(Path(arm.results))}
    run.checksums.check(f"arms/{name}", whole)
    return _folder_content(run.checkpoint(name), whole)


def teacher_folder(run: RunFolder, config: ExperimentConfig, teacher: TeacherConfig) -> Path:
    """A teacher's checkpoint folder; the base's where the teacher is the student."""
    return run.checkpoint(config.base_arm) if teacher.is_student else Path(resolve(teacher.model))


def arm_folder(run: RunFolder, config: ExperimentConfig, name: str) -> Path:
    """An arm's checkpoint folder; a teacher's is its local folder or hub snapshot."""
    arm = config.arms.get(name)
    if not isinstance(arm, TeacherArm):
        return run.checkpoint(name)
    teacher = config.teacher_of(arm)
    return hub_folder(str(teacher_folder(run, config, teacher)), teacher.revision)


def checkpoint_folder(run: RunFolder, config: ExperimentConfig, text: str) -> Path:
    """The folder of a checkpoint reference (config.masks.Reference). Raises RunError where it does not exist."""
    arm, path, step = Reference.parse(text)
    if arm is not None:
        folder = arm_folder(run, config, arm) if step is None else run.step_checkpoint(arm, step)
    else:
        folder = Path(str(path))
        if step is not None:
            folder = folder / "checkpoints" / f"step-{step}"
        elif (folder / "checkpoint").is_dir():
            folder = folder / "checkpoint"
    if not folder.is_dir():
        again = f"; delete {run.arm(arm)} to train it again" if arm is not None else ""
        raise RunError(f"no checkpoint {folder}, which {text!r} names{again}")
    return folder


def checkpoint_digest(
    run: RunFolder, config: ExperimentConfig, text: str, whole: bool = False
) -> str:
    """The digest of the weights of a checkpoint reference.

    Raises RunError where it names an arm of this run whose files were changed.
    """
    arm, _, step = Reference.parse(text)
    if arm is not None and not isinstance(config.arms.get(arm), TeacherArm):
        run.checksums.check(f"arms/{arm}", whole)
    if arm is not None and step is None:
        return arm_digest(run, arm)
    return digest_checkpoint(checkpoint_folder(run, config, text), whole)


def other_base(run: RunFolder, config: ExperimentConfig, text: str) -> dict[str, str]:
    """{reference: digest of its base} where it names a checkpoint of another run with another base; else {}."""
    path = Reference.parse(text).path
    if path is None or not (record := Path(path) / "record.json").exists():
        return {}
    its = read_record(record)["inputs"].get("base")
    return {} if its in (None, arm_digest(run, config.base_arm)) else {text: its}


def refuse_other_base(found: Mapping[str, str], ours: str, allow: bool) -> None:
    for what, its in found.items():
        if not allow:
            raise RunError(
                f"{what} is from base checkpoint {its[:12]}, this run's is {ours[:12]}; use one of this "
                "base, or pass --allow-other-base (recorded in every later artifact)"
            )


def checkpoint_deltas(run: RunFolder, config: ExperimentConfig, text: str) -> delta.Deltas:
    """The deltas of a checkpoint reference from this run's base, tensor by tensor."""
    base = run.checkpoint(config.base_arm)
    return delta.stream_whole(base, checkpoint_folder(run, config, text), parameter_names.classify)


SAMPLES = re.compile(r"samples_(.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
"""Names of files with one row per question: samples_<task>_<time>.jsonl of lm-eval, samples_<task>.jsonl of a run."""


def is_score_file(path: Path) -> bool:
    """Whether a file's name is that of evaluation results or samples."""
    return bool(SAMPLES.fullmatch(path.name) or re.fullmatch(r"results(_.*)?\.json", path.name))


def score_files(path: Path) -> list[Path]:
    """The files of finished evaluations: results, then one samples file per task.

    path: an output folder of lm-eval (the latest results_*.json, with the samples of the same time stamp), a run's
    evals/<arm>, or one file of either. A samples file alone has no results. Raises RunError where files are missing,
    and for a run's that were changed.
    """
    check_within_run(path)
    if SAMPLES.fullmatch(path.name) and path.is_file():
        return [path]
    found = [path] if path.is_file() else [path / "results.json"]
    if not found[0].is_file():
        found = sorted(path.rglob("results_*.json"), key=lambda each: each.name)
    if not found:
        raise RunError(f"{path} has no results_*.json; name an output folder of lm-eval")
    last = found[-1]
    stamp = last.stem.removeprefix("results")
    samples = sorted(last.parent.glob(f"samples_*{stamp}.jsonl"))
    if not samples:
        raise RunError(
            f"{last} has no samples_*{stamp}.jsonl beside it; run lm-eval with --log_samples"
        )
    return [last, *samples]


def samples_by_task(path: Path) -> dict[str, Path]:
    """{task: its samples file} of `score_files`."""
    found = {SAMPLES.fullmatch(each.name): each for each in score_files(path)}
    return {name[1]: each for name, each in found.items() if name is not None}


def _mask_shapes(run: RunFolder, base: str) -> dict[str, tuple[int, ...]]:
    with Weights(run.checkpoint(base)) as weights:
        return weights.parameter_shapes()


def read_file_mask(
    run: RunFolder, config: ExperimentConfig, rule: FileMask
) -> tuple[Mask, dict[str, Any]]:
    """The mask of a file and its inputs: `file`, its digest, and `base`, or how it was imported from another format.

    Raises RunError where it cannot be read.
    """
    path = Path(rule.path)
    if is_foreign(path):
        foreign = open_foreign(path)
        found = align_with_checkpoint(foreign, run.checkpoint(config.base_arm))
        return found.mask, {"imported": {"format": foreign.format, **origin(foreign, found)}}
    mask, about = load_mask(path)
    given = about["inputs"]
    others = {"other_base": given["other_base"]} if "other_base" in given else {}
    return mask, {"file": about["digest"], "base": given["base"], **others}


def mask_of_file(run: RunFolder, config: ExperimentConfig, rule: FileMask) -> Mask:
    """The mask of a file under the names of this run's base. Raises RunError where it is of another model."""
    base = config.base_arm
    shapes = _mask_shapes(run, base)
    mask, _ = read_file_mask(run, config, rule)
    mask = under_names_of(mask, shapes, known_config(run.checkpoint(base)))
    try:
        check_shapes(mask, shapes)
    except RunError as error:
        raise RunError(f"{rule.path}: {error}") from None
    return mask


def read_mask(run: RunFolder, config: ExperimentConfig, name: str) -> Mask:
    """Loads a mask of this run. Raises RunError where it was made for another model or base."""
    base = config.base_arm
    mask, metadata = load_mask(run.mask(name))
    try:
        check_mask(mask, metadata, _mask_shapes(run, base), arm_digest(run, base))
    except RunError as error:
        raise RunError(f"{run.mask(name)}: {error}") from None
    return mask
