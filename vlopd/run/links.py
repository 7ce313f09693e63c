"""Whether a run's artifacts were made from each other: a folder may have been put together from several runs.

Only the digests in records are compared. Models, data and plug-ins may be gone from a finished run's machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from vlopd.config.arms import DistillArm, TeacherArm, checkpoints_of, replay_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.masks import Reference
from vlopd.digests import digest_scores, digest_weights
from vlopd.errors import RunError
from vlopd.run.checksums import Problem, is_among
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_record

MEASUREMENTS = ("geometry", "evals", "validation", "tokens", "base_kl")
"""Kinds of artifacts that an arm has one of each of."""


def check_links(run: RunFolder, config: ExperimentConfig, *those: str) -> None:
    """Raises RunError for the first of `wrong_links`."""
    for problem in wrong_links(run, config, *those):
        raise RunError(str(problem))


def wrong_links(run: RunFolder, config: ExperimentConfig, *those: str) -> list[Problem]:
    """Artifacts of the config that were made from another arm or mask than the run has, or by other settings.

    those: artifacts or kinds of artifacts (`arms/full`, `arms`); all without any.
    """
    found: list[Problem] = []
    for artifact, links in _Links(run, config.with_candidates()).of.items():
        if not those or is_among(artifact, those):
            found += links()
    return found


class _Links:
    """`of`: {artifact: a function for its problems}."""

    def __init__(self, run: RunFolder, config: ExperimentConfig):
        self.run, self.config = run, config
        self.records = {name: self.read(f"arms/{name}") for name in config.arms}
        self.digests = {
            name: str(its["checkpoint_digest"]) for name, its in self.records.items() if its
        }
        self.masks = {name: self.read(f"masks/{name}") for name in config.masks}
        self.of_base = self.read(f"arms/{config.base_arm}")
        self.base = self.of_base.get("checkpoint_digest")
        self.teachers = {
            arm.teacher or next(iter(config.teachers)): self.digests[name]
            for name, arm in config.arms.items()
            if isinstance(arm, TeacherArm) and name in self.digests
            if not config.teacher_of(arm).is_student
        }
        """Digests of the teachers that are arms, by their names."""
        self.of: dict[str, Callable[[], Iterable[Problem]]] = {}
        self.of |= {f"arms/{name}": partial(self.of_arm, name) for name in config.arms}
        self.of |= {f"masks/{name}": partial(self.of_mask, name) for name in config.masks}
        for kind in MEASUREMENTS:
            names = {f"{kind}/{name}": name for name in config.arms}
            self.of |= {a: partial(self.of_measurement, a, name) for a, name in names.items()}
        self.of |= {f"sweeps/{name}": partial(self.of_sweep, name) for name in config.sweep_groups}
        self.of |= {
            "geometry/overlap": self.of_overlap,
            "geometry/groups": self.of_groups,
            "compare": self.of_comparison,
        }

    def read(self, artifact: str) -> dict[str, Any]:
        """The record of an artifact; empty where it is not made."""
        path = self.run.checksums.record(artifact)
        return read_record(path) if path.exists() else {}

    def last_of(self, text: str) -> str | None:
        """The digest of the last checkpoint of an arm of this run; None of other checkpoints."""
        arm, _, step = Reference.parse(text)
        return None if arm is None or step is not None else self.digests.get(arm)

    def compare(
        self, artifact: str, found: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """A problem for what differs; what either lacks is of another version of vlopd, or not made yet."""
        for key, value in wanted.items():
            if found.get(key) is not None and value is not None and not _agree(found[key], value):
                sums = self.run.checksums
                what = f"was made by another run or config ({key} differs)"
                yield Problem(sums.record(artifact), what, sums.remedy(artifact))

    def of_arm(self, name: str) -> Iterator[Problem]:
        record = self.records[name]
        if not record:
            return
        config = self.run.with_choice(self.config, name)
        arm = config.arms[name]
        wanted: dict[str, Any] = {"base": self.base}
        if isinstance(arm, DistillArm) and not config.candidates(name):
            wanted |= config.settings_of(arm)
            if config.precision.compute == "auto":  # of a config file; the run has it resolved
                del wanted["recipe"]["precision"]["compute"]
            wanted["replayed"] = self.digests.get(replay_of(arm) or "")
            wanted["mask"] = self.masks.get(arm.mask or "", {}).get("digest")
            wanted["student"] = self.of_base.get("inputs")
            own = config.recipe_of(arm).teachers
            same = {n: d for n, d in self.teachers.items() if own.get(n) == config.teachers[n]}
            record = {**record, "inputs": self.with_teachers(record["inputs"], "teachers")}
            wanted["teachers"] = same
        for key, text in checkpoints_of(arm).items():
            wanted[key] = self.last_of(text)
        yield from self.compare(f"arms/{name}", record["inputs"], wanted)

    def of_mask(self, name: str) -> Iterator[Problem]:
        rule, found = self.config.masks[name], self.masks[name].get("inputs", {})
        wanted: dict[str, Any] = {"rule": rule.model_dump(mode="json"), "base": self.base}
        if rule.reads is not None:
            wanted["of"] = self.last_of(rule.reads)
        wanted["masks"] = {other: self.masks[other].get("digest") for other in rule.combines}
        yield from self.compare(f"masks/{name}", found, wanted)

    def of_measurement(self, artifact: str, name: str) -> Iterator[Problem]:
        """Of an arm's geometry or evaluation."""
        about, its = self.read(artifact), self.config
        inputs, digest = about.get("inputs", {}), self.digests.get(name)
        kind = artifact.split("/")[0]
        if about and digest is None:
            missing = self.run.arm_record(name)
            yield Problem(missing, f"is missing, of which there is {artifact}", "run again")
            return
        if kind == "geometry":
            wanted = {"trained": digest, "base": self.base, "settings": its.geometry.of_update}
            if name in its.geometry.arms:
                yield from self.compare(artifact, inputs, wanted)
        elif kind in ("tokens", "base_kl"):
            found = self.with_teachers(inputs, "files")
            found["checkpoint"] = digest_weights(inputs["checkpoint"]) if inputs else None
            wanted = {"checkpoint": digest, "files": self.teachers if kind == "tokens" else None}
            yield from self.compare(artifact, found, wanted)
        else:
            yield from self.compare(artifact, about, {"checkpoint_digest": digest})
            if kind == "evals" and isinstance(inputs.get("tasks"), Mapping):  # no imported scores
                wanted = {"tasks": dict.fromkeys(its.eval.tasks, its.eval.of_task)}
                yield from self.compare(artifact, inputs, wanted)

    def with_teachers(self, inputs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """The inputs with the digests of the teachers' weights in place of their files."""
        files = inputs.get(key)
        found = {n: digest_weights(its) for n, its in files.items() if its} if files else None
        return {**inputs, key: found}

    def of_sweep(self, group: str) -> Iterator[Problem]:
        """Of the choice of a group of tuned arms."""
        found = self.read(f"sweeps/{group}").get("inputs", {})
        scores = {}
        for name in found.get("scores", ()):
            folder = self.run.root / "validation" / name
            if (folder / "results.json").exists():
                scores[name] = digest_scores(folder)
        yield from self.compare(f"sweeps/{group}", found, {"scores": scores})

    def of_overlap(self) -> Iterator[Problem]:
        found = self.read("geometry/overlap").get("inputs", {})
        if set(found.get("arms", ())) == set(self.config.geometry.arms):  # else of a config before
            wanted = {"base": self.base, "arms": self.digests}
            yield from self.compare("geometry/overlap", found, wanted)

    def of_groups(self) -> Iterator[Problem]:
        sums, found = self.run.checksums, self.read("geometry/groups").get("inputs", {})
        wanted = {}
        for table in found.get("tables", ()):
            file = "geometry/overlap" if table == "geometry/overlap" else f"{table}/geometry"
            sum_of = sums.read(table) if sums.path(table).exists() else {}
            if (digest := sum_of.get(f"{file}.parquet")) is not None:
                wanted[table] = digest
        yield from self.compare("geometry/groups", found, {"tables": wanted})

    def of_comparison(self) -> Iterator[Problem]:
        record, its = self.read("compare"), self.config.eval
        about = record.get("inputs", {})
        wanted: dict[str, Any] = {"confidence": its.confidence, "margin": its.margin}
        wanted["arms"] = {arm: {"role": role} for arm, role in self.config.roles.of.items()}
        yield from self.compare("compare", record, wanted)
        wanted = {}
        for arm in self.config.arms:
            folder = self.run.eval(arm)
            if (folder / "results.json").exists() and f"evals/{arm}" in about:
                wanted[f"evals/{arm}"] = digest_scores(folder)
        yield from self.compare("compare", about, wanted)


def _agree(found: Any, wanted: Any) -> bool:
    """Whether two values are equal in all that both have."""
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_agree, found, wanted))
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return all(_agree(found[key], wanted[key]) for key in found.keys() & wanted.keys())
    return bool(found == wanted)
