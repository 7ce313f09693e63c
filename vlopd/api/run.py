"""`Run`: an experiment in its folder: runs it, and reads its results as data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vlopd import pipeline
from vlopd.config.experiment import ExperimentConfig
from vlopd.errors import ConfigError, RunError
from vlopd.run.checksums import Problem
from vlopd.run.folder import RunFolder
from vlopd.run.links import wrong_links
from vlopd.run.schemas.read import read_log, read_record

if TYPE_CHECKING:
    import pandas as pd

    from vlopd.run.verify import Verified

Stages = Literal["arms", "geometry", "evals", "report"]


class Run:
    """An experiment in its folder.

    Args:
        source: a run folder, or a config: a TOML file, the same tables as a dict, or an ExperimentConfig.
        overrides: TOML lines over the config, as on the command line.
        out: the folder of a config's run; by default runs/NAME, NAME being the config's.
        altered: read a run folder's files even where they do not match their checksums.
        trust: run the code that a run folder's config names (plug-ins, task files, a model's remote code), and follow
            links out of the folder. Without, only what you name yourself runs; a config file of yours is trusted.

    Opening a run writes nothing and loads no models; results are read from its files whenever they are asked for.
    Raises ConfigError for an invalid config, RunError for a folder that is not a run, and in reading where a file was
    changed since it was written.

    >>> run = Run("mine.toml", "train.steps=20", out="runs/short").run()
    >>> run.contrasts[["a", "b", "difference", "low", "high"]]
    >>> Run("runs/short").metrics("full").plot(x="step", y="kl")
    """

    def __init__(
        self,
        source: str | Path | Mapping[str, Any] | ExperimentConfig,
        *overrides: str,
        out: str | Path | None = None,
        altered: bool = False,
        trust: bool = False,
    ):
        root, self.config = pipeline.find_run(source, overrides, out, altered, trust)
        self.folder, self.trust, self._altered = RunFolder(root), trust, altered

    def run(
        self,
        *,
        until: Stages = "report",
        arms: Sequence[str] | None = None,
        allow_other_base: bool = False,
        on_plan: pipeline.OnPlan | None = None,
        on_artifact: pipeline.OnArtifact = lambda what, where, made: None,
    ) -> Run:
        """Makes the experiment, stage by stage; what is up to date is kept, and a killed run resumes.

        Args:
            until: the last stage: arms, geometry, evals, or report.
            arms: only these and what they are made from; the comparison and the report need all.
            allow_other_base: use masks and checkpoints of another base (recorded in every later artifact).
            on_plan: called with the RunFolder, the config and the Plan before anything is made.
            on_artifact: called with description, path, and whether it was made, after each artifact.

        Returns the run itself. Raises UserError with all known problems before the first stage.

        >>> Run("mine.toml").run(until="arms", arms=["full"]).arms
        """
        if until not in get_args(Stages):
            raise ConfigError(f"until = {until!r}: must be one of {', '.join(get_args(Stages))}")
        folder, config = pipeline.prepare(self.config, out=self.folder.root, trust=self.trust)
        self.folder, self.config = folder, config
        names = pipeline.select_arms(config, arms, list(config.arms))
        planned = pipeline.plan(folder, config, names, until)
        pipeline.begin(folder, config, planned, on_plan=on_plan)
        pipeline.run_all(folder, config, names, until, on_artifact, allow_other_base)
        return self

    @property
    def arms(self) -> pd.DataFrame:
        """One row an arm: arm, role, type, made, mask, density, seed, steps, evaluated, and from its record:

        trained_parameters and total_parameters are counts of coordinates, changed_fraction the share of them whose
        stored bits differ from the base, seconds the training's. `evaluated` is "yes", "no" or, of an arm that was
        made again since, "as it was before".
        """
        import pandas as pd

        self._check("arms", "evals")
        rows = []
        for name, arm in self.config.arms.items():
            path = self.folder.arm_record(name)
            record = read_record(path) if path.exists() else {}
            kept = {key: record.get(key) for key in ("mask", "density", "seed", "steps")}
            counts = {key: record.get(key) for key in ("trained_parameters", "total_parameters")}
            rows.append(
                {
                    "arm": name,
                    "role": self.config.roles.of[name],
                    "type": arm.type,
                    "made": bool(record),
                    **kept,
                    "evaluated": self._evaluated(name, record.get("checkpoint_digest")),
                    **counts,
                    "changed_fraction": _changed_fraction(record),
                    "seconds": record.get("seconds"),
                }
            )
        frame = pd.DataFrame(rows)
        integers = ("seed", "steps", "trained_parameters", "total_parameters")
        types: dict[str, Any] = dict.fromkeys(integers, "Int64")
        return frame.astype(
            types | dict.fromkeys(("density", "changed_fraction", "seconds"), float)
        )

    def _evaluated(self, arm: str, digest: str | None) -> str:
        path = self.folder.eval(arm) / "results.json"
        if not path.exists():
            return "no"
        return "yes" if read_record(path)["checkpoint_digest"] == digest else "as it was before"

    @property
    def problems(self) -> list[Problem]:
        """Files that were changed or removed since they were written, by size and time (`verify` hashes them), and
        records of artifacts that were not made from this run's arms and masks.
        """
        sums = self.folder.checksums
        changed = [
            problem
            for artifact in sums.artifacts()
            for problem in sums.problems(artifact, whole=False)
        ]
        return changed or wrong_links(self.folder, self.config)

    def verify(self) -> Verified:
        """Hashes every file of the run, and the inputs it was made from.

        Returns problems (changed, missing or unreadable files), unknown files, changed inputs, and counts.
        """
        from vlopd.run.verify import verify_run

        return verify_run(self.folder)

    @property
    def masks(self) -> pd.DataFrame:
        """One row a mask that is made: mask, rule, density, and the density in each component of the model."""
        from evals.report import tables

        self._check("masks")
        return tables.masks(self.folder, self.config)

    def metrics(self, arm: str) -> pd.DataFrame:
        """The training log of an arm, one row a step (metrics.jsonl, docs/run-folder.md).

        Raises ConfigError for an unknown arm, RunError for one without a log.
        """
        return self._log(arm, "metrics.jsonl")

    def samples(self, arm: str) -> pd.DataFrame:
        """Completions of an arm that were sampled in training, one a row (samples.jsonl), with both models' log-probs.

        Raises ConfigError for an unknown arm, RunError for one without a log.
        """
        return self._log(arm, "samples.jsonl")

    def _check(self, *those: str) -> None:
        """Raises RunError where a file of these (kinds of) artifacts was changed, unless it was opened `altered`."""
        if not self._altered:
            self.folder.checksums.check_finished(*those)

    def _log(self, arm: str, name: str) -> pd.DataFrame:
        from vlopd.train.curves import frame_of

        pipeline.select_arms(self.config, [arm], [])
        self._check(f"arms/{arm}")
        if not (rows := read_log(self.folder.arm(arm) / name)):
            raise RunError(f"arm {arm} has no {name}: it is not trained, or not yet")
        return frame_of(rows)

    @property
    def geometry(self) -> pd.DataFrame:
        """The rows of all measured arms' geometry.csv (docs/geometry.md), each value beside its null and p."""
        from evals.report import tables

        self._check("geometry")
        tidy, _ = tables.geometry(self.folder, self.config)
        return tidy[["arm", *tidy.columns.drop("arm")]] if len(tidy) else tidy

    @property
    def geometry_groups(self) -> pd.DataFrame:
        """What the signal adds: each measure of the real arms against each null's, over training seeds (groups.csv).

        One row a measure and null, with difference, interval, p, q and equivalence (docs/geometry.md). Empty for a run
        without null arms in geometry.arms.
        """
        from evals.report import tables

        self._check("geometry")
        return tables.geometry_groups(self.folder, self.config)

    @property
    def _compared(self) -> dict[str, Any]:
        if not self.folder.compare.exists():
            raise RunError(f"{self.folder.root} has no comparison yet; .run() makes it")
        self._check("arms", "compare")
        return read_record(self.folder.compare)

    @property
    def scores(self) -> pd.DataFrame:
        """One row a task and arm: arm, role, task, metric, mean, standard_error, n, low, high, recovery, density.

        Means are in [0, 1] over questions, low and high bound their interval; controls also appear pooled. Raises
        RunError before the comparison is made.
        """
        from evals.report import tables

        frame = tables.scores(self._compared, tables.arm_records(self.folder, self.config))
        first = ["arm", "role", "task", "metric", "mean", "standard_error", "n", "low", "high"]
        return frame[[*first, "recovery", "recovery_low", "recovery_high", "density"]]

    @property
    def contrasts(self) -> pd.DataFrame:
        """One row a task and contrast: task, a, b, difference (a - b, paired by question), low, high, p, p_holm, n.

        recovery is the share of full's gain over the base that `a` has. `b` names all pooled controls. Raises
        RunError before the comparison is made.
        """
        from evals.report import tables

        return tables.differences(self._compared)

    @property
    def verdict(self) -> list[str]:
        """The result in sentences. Raises RunError before the comparison is made."""
        from evals.report.verdict import verdict

        return verdict(self._compared)

    @property
    def report(self) -> Path:
        """The path of the report, one self-contained HTML file. Raises RunError before it is made."""
        path = self.folder.report / "report.html"
        if not path.exists():
            raise RunError(f"{self.folder.root} has no report yet; .run() makes it")
        return path

    def __repr__(self) -> str:
        made = sum(self.folder.arm_record(name).exists() for name in self.config.arms)
        state = "with" if self.folder.compare.exists() else "without"
        return (
            f"Run({self.config.name} in {self.folder.root}: {made} of {len(self.config.arms)} arms made, "
            f"{state} comparison)"
        )

    def _repr_html_(self) -> str:
        from html import escape

        sentences = self.verdict if self.folder.compare.exists() else []
        columns = ["arm", "role", "type", "made", "mask", "density", "steps", "evaluated"]
        shown = {"density": lambda x: f"{x:.2%}", "steps": lambda x: f"{x}"}
        table = self.arms[columns].to_html(index=False, na_rep="", formatters=shown)
        return f"<p>{escape(repr(self))}</p>{table}<p>{'<br>'.join(map(escape, sentences))}</p>"


def _changed_fraction(record: Mapping[str, Any]) -> float | None:
    """The share of an arm's coordinates whose bits differ from the base; None where it is not counted."""
    parts = [record[key] for key in ("on_mask", "off_mask") if record.get(key)]
    if not parts:
        return None
    return sum(part["moved"] for part in parts) / sum(part["coordinates"] for part in parts)
