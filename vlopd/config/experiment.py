"""The config of an experiment, with the checks across its sections."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vlopd.config.analysis import EvalConfig, GeometryConfig
from vlopd.config.arms import (
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ImportedArm,
    TeacherArm,
    checkpoints_of,
    expand_seeds,
    mask_of,
    masks_read,
    replay_of,
)
from vlopd.config.base import LONGEST_NAME, Name, distinct_names
from vlopd.config.data import DataConfig, FileData
from vlopd.config.explain import explain_errors
from vlopd.config.masks import (
    FileMask,
    FunctionMask,
    MaskConfig,
    RandomMask,
    Reference,
    TopFractionMask,
    WholeMask,
)
from vlopd.config.models import ModelConfig, PrecisionConfig, TeacherConfig, as_table
from vlopd.config.objective import RolloutConfig
from vlopd.config.recipe import EXECUTION, ArmRecipe, RecipeSections
from vlopd.config.roles import Roles, roles_of
from vlopd.config.sweeps import Point, candidate_name, nested, points_of, words_of
from vlopd.config.tracking import TrackingConfig
from vlopd.config.training import Muon
from vlopd.errors import ConfigError
from vlopd.plugins import Use

DECIDES_PROMPTS: Any = {
    "data": True,
    "rollout": set(RolloutConfig.model_fields) - EXECUTION["rollout"],
    "train": {"steps", "prompts_per_step"},
}
"""The part of a recipe that decides what completions are of."""

TAKEN = {"images", "vision", "overlap", "groups"}
"""Names of the run folder's own files beside those of arms, in evals/ and geometry/."""


class ExperimentConfig(RecipeSections):
    """All settings that determine the results of an experiment."""

    name: Name
    """Name of the experiment; the run folder is `runs/NAME` unless `--out` is given."""
    title: str = Field("", min_length=0)
    """Title of the report; empty for the name."""
    student: Annotated[ModelConfig, BeforeValidator(as_table)]
    """The model that is trained: a name, or a table."""
    data: DataConfig
    """The prompts, with answers where a reward or supervised training needs them."""
    precision: PrecisionConfig = PrecisionConfig()
    """Precision of the computation and of checkpoints."""
    masks: dict[Name, MaskConfig] = Field(default_factory=dict)
    """Mask rules by name. A random mask with `seeds = [7, 8]` expands to NAME-0 and NAME-1, as does an arm with it."""
    arms: dict[Name, ArmConfig]
    """The models of the experiment by name, each made, trained or referenced as its `type` says."""
    geometry: GeometryConfig = GeometryConfig()
    """Geometry of the arms' updates."""
    eval: EvalConfig = EvalConfig()
    """Evaluation of the arms and their comparison."""
    tracking: TrackingConfig = TrackingConfig()
    """Trackers for training curves."""

    @property
    def base_arm(self) -> str:
        """The name of the arm that is the untrained student; every run has one."""
        return next((n for n, arm in self.arms.items() if isinstance(arm, BaseArm)), "base")

    def settings_of(self, arm: DistillArm) -> dict[str, Any]:
        """The settings that determine a trained arm, its own and its recipe's, as an arm's inputs have them."""
        recipe = self.recipe_of(arm)
        # plug-ins are inputs of their own; the completions that are kept change nothing
        not_inputs: Any = {
            **EXECUTION,
            "train": EXECUTION["train"] | {"metrics", "keep_completions"},
            # absent where it changes nothing, so that older runs stay up to date
            "rollout": EXECUTION["rollout"]
            | ({"max_lag"} if not recipe.rollout.max_lag else set()),
            "teacher": {"engine": True, "teachers": {"__all__": {"engine"}}},
        }
        return {
            "arm": arm.model_dump(
                mode="json", include={"type", "seed", "mask", "subspace", "lora"}
            ),
            "recipe": self.model_dump(mode="json", include={"student", "precision"})
            | recipe.model_dump(mode="json", exclude=not_inputs),
        }

    def recipe_of(self, arm: DistillArm) -> ArmRecipe:
        """How an arm is trained: its own sections merged into the run's.

        Raises ConfigError where they do not fit together.
        """
        sections = {name: section for name, section in self if name in ArmRecipe.model_fields}
        if arm.own:
            sections |= {
                name: section.model_dump()  # not JSON, which would lose functions
                for name, section in sections.items()
                if name in arm.own and section is not None
            }
            merge(sections, arm.own)
        try:
            return ArmRecipe.model_validate(sections)
        except ValidationError as error:
            raise ConfigError(explain_errors(error, ArmRecipe)) from None

    def candidates(self, name: str) -> dict[str, DistillArm]:
        """The arms among which a tuned arm is chosen, in the order of its grid; empty for any other arm.

        They are trained like other arms but stay out of roles, geometry and the evaluation on eval.tasks.
        """
        arm = self.arms.get(name)
        if not isinstance(arm, DistillArm) or arm.sweep is None:
            return {}
        return {candidate_name(name, p): self.at_point(arm, p) for p in points_of(arm.sweep)}

    def at_point(self, arm: DistillArm, point: Point) -> DistillArm:
        """A tuned arm at one point of its grid, as an arm of its own."""
        own = copy.deepcopy(arm.own)
        merge(own, nested(point))
        return arm.model_copy(update={"sweep": None, "sweep_group": None, **own})

    def with_candidates(self) -> ExperimentConfig:
        """This config with the candidates of tuned arms among its arms, for making and checking them."""
        found = {c: arm for name in self.arms for c, arm in self.candidates(name).items()}
        return self.model_copy(update={"arms": self.arms | found}) if found else self

    def with_points(self, chosen: Mapping[str, Point]) -> ExperimentConfig:
        """This config with tuned arms at these points of their grids, for what is said of their recipes."""
        arms: dict[str, ArmConfig] = dict(self.arms)
        for name, point in chosen.items():
            if isinstance(arm := arms[name], DistillArm):
                arms[name] = self.at_point(arm, point)
        return self.model_copy(update={"arms": arms})

    def sweep_group(self, name: str) -> str | None:
        """The group of a tuned arm; None for any other arm."""
        arm = self.arms.get(name)
        if isinstance(arm, DistillArm) and arm.sweep is not None:
            return arm.sweep_group or name
        return None

    def follows(self, name: str) -> str | None:
        """The group of tuned arms whose choice an arm takes without being tried itself; None for any other arm."""
        arm = self.arms.get(name)
        return arm.sweep_group if isinstance(arm, DistillArm) and arm.sweep is None else None

    def grid_of(self, name: str) -> Mapping[str, tuple[Any, ...]]:
        """The grid from which an arm's settings are chosen, its own or that of the group that it follows, or empty."""
        if (group := self.follows(name)) is not None:
            return dict(self.arms[self.sweep_members(group)[0]])["sweep"]
        arm = self.arms[name]
        return (arm.sweep or {}) if isinstance(arm, DistillArm) else {}

    def forms(self, name: str, arm: DistillArm) -> list[DistillArm]:
        """What a trained arm may be: itself, or at each point of the grid from which its settings are chosen."""
        grid = self.grid_of(name)
        return [self.at_point(arm, point) for point in points_of(grid)] if grid else [arm]

    def sweep_members(self, group: str) -> list[str]:
        """The tuned arms of a group, which share one choice."""
        return [name for name in self.arms if self.sweep_group(name) == group]

    @property
    def sweep_groups(self) -> list[str]:
        found = [its for name in self.arms if (its := self.sweep_group(name)) is not None]
        return list(dict.fromkeys(found))

    def budget_of(self, name: str) -> dict[str, int] | None:
        """What a trained arm's settings may have cost: how many it, or the group whose choice it takes, has tried, and
        the completions of all of them; None for other arms."""
        arm = self.arms[name]
        if not isinstance(arm, DistillArm):
            return None
        tried = self.forms(name, arm)
        recipes = [self.recipe_of(each) for each in tried]
        completions = sum(its.prompts * its.rollout.completions_per_prompt for its in recipes)
        return {"settings": len(tried), "completions": completions}

    def with_compute(self, compute: Literal["fp32", "bf16"]) -> ExperimentConfig:
        """This config with `precision.compute` resolved."""
        precision = self.precision.model_copy(update={"compute": compute})
        return self.model_copy(update={"precision": precision})

    @property
    def roles(self) -> Roles:
        """What each arm is for: as it says itself, or by the defaults of config/roles.py. Candidates have no role."""
        hidden = {candidate for name in self.arms for candidate in self.candidates(name)}
        arms = {name: arm for name, arm in self.arms.items() if name not in hidden}
        trained = {name: arm for name, arm in arms.items() if isinstance(arm, DistillArm)}
        recipes = {name: self.recipe_of(arm) for name, arm in trained.items()}
        return roles_of(arms, self.masks, recipes, {n: self.grid_of(n) for n in trained})

    @property
    def notes(self) -> list[str]:
        """Settings that have no effect in this combination, one line each; those of training are in `Recipe.notes`."""
        found = self.tracking.notes
        its, default = self.geometry, GeometryConfig()
        changed = [f"geometry.{k}" for k, v in its if k != "arms" and v != dict(default)[k]]
        if changed and not its.arms:
            found.append(f"{', '.join(changed)}: no effect without geometry.arms")
        elif its.null_draws == 0 and its.nulls != default.nulls:
            found.append("geometry.nulls: no effect with geometry.null_draws = 0")
        used = {mask for arm in self.arms.values() for mask in masks_read(arm)}
        used |= {other for mask in self.masks.values() for other in mask.combines}
        if unused := [name for name in self.masks if name not in used]:
            found.append(
                f"masks {', '.join(unused)}: no arm is made under them (`vlopd mask make`)"
            )
        if self.eval.validation is not None and not self.sweep_groups:
            found.append("eval.validation: no effect without a tuned arm (arms.NAME.sweep)")
        if isinstance(self.data, FileData) and self.data.image_mark and self.data.image is None:
            found.append("data.image_mark: no effect without data.image")
        return [*found, *self.roles.nulls_alone]

    @property
    def all_notes(self) -> list[str]:
        """`notes`, and those of every trained arm's recipe, with the arm's name where it has sections of its own."""
        found = self.notes
        for name, arm in self.arms.items():
            if isinstance(arm, DistillArm):
                where = f"arms.{name}: " if arm.own else ""
                found += [f"{where}{note}" for note in self.recipe_of(arm).notes]
        return list(dict.fromkeys(found))

    def plugins_of(self, names: Iterable[str]) -> list[Use]:
        """The plug-ins that these arms are made with: of their recipes and masks, each once.

        The key of a section that an arm has for itself begins with the arm: `arms.full.reward.rule`.
        """
        found: list[Use] = []
        for name in names:
            arm = self.arms[name]
            found += [use for mask in masks_read(arm) for use in self.plugins_of_mask(mask)]
            if isinstance(arm, DistillArm):
                own = tuple(arm.own)
                for use in self.recipe_of(arm).plugins:
                    where = f"arms.{name}." if use.key.startswith(own) else ""
                    found.append(use._replace(key=f"{where}{use.key}"))
        return list({use.key: use for use in found}.values())

    def plugins_of_mask(self, mask: str) -> list[Use]:
        """The plug-ins that a mask is made with, directly or through other masks."""
        rule = self.masks[mask]
        found = [use for other in rule.combines for use in self.plugins_of_mask(other)]
        return [*found, rule.use(f"masks.{mask}")] if isinstance(rule, FunctionMask) else found

    @property
    def replayed(self) -> set[str]:
        """The arms whose completions other arms replay, with the candidates of a tuned one."""
        found = {its for arm in self.arms.values() if (its := replay_of(arm)) is not None}
        return found.union(*map(self.candidates, found))

    def checkpoint_of(self, arm: CheckpointArm) -> ModelConfig:
        """The settings of a foreign checkpoint, loaded like the student."""
        return self.student.model_copy(update={"model": arm.model})

    def teacher_of(self, arm: TeacherArm) -> TeacherConfig:
        """The teacher of a teacher arm: the one it names, or the only one."""
        return self.teachers[arm.teacher or next(iter(self.teachers))]

    @model_validator(mode="before")
    @classmethod
    def expand(cls, tree: Any) -> Any:
        tables = isinstance(tree, Mapping) and [tree.get(key, {}) for key in ("masks", "arms")]
        well_formed = tables and all(isinstance(table, Mapping) for table in tables)
        return expand_seeds(tree) if well_formed else tree

    @model_validator(mode="after")
    def check_references(self) -> ExperimentConfig:
        """Checks that all named masks and arms exist, and that no mask or arm depends on itself."""

        def need(names: Mapping[str, Any], name: str, where: str) -> None:
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not among {sorted(names)}")

        distinct_names(self.arms, "arms")
        distinct_names(self.masks, "masks")
        for name in (name for name in self.arms if name.casefold() in TAKEN):
            raise ValueError(
                f"arms.{name}: the run folder has a file of its own by this name; rename it"
            )
        for name in self.arms:
            if (group := self.follows(name)) is not None:
                need(dict.fromkeys(self.sweep_groups), group, f"arms.{name}.sweep_group")
        self._refuse_equal_draws()
        self._check_recipes()
        for name, mask in self.masks.items():
            for other in mask.combines:
                key = "like" if isinstance(mask, RandomMask) else "mask(s)"
                need(self.masks, other, f"masks.{name}.{key}")
            if mask.reads is not None:
                self._check_checkpoint(mask.reads, f"masks.{name}.of")
        for name in self.masks:
            self.read_by(name)
        for name, arm in self.arms.items():
            if isinstance(arm, TeacherArm):
                if not self.teachers:
                    raise ValueError(
                        f"arms.{name} is a teacher, and there is none; set teacher = MODEL, or leave the arm out"
                    )
                if arm.teacher is None and len(self.teachers) > 1:
                    raise ValueError(f"arms.{name}.teacher must be one of {sorted(self.teachers)}")
                need(
                    self.teachers, arm.teacher or next(iter(self.teachers)), f"arms.{name}.teacher"
                )
            for where, checkpoint in checkpoints_of(arm).items():
                self._check_checkpoint(checkpoint, f"arms.{name}.{where}")
            if isinstance(arm, DistillArm) and arm.null is not None and arm.null.replay is not None:
                need(self.arms, arm.null.replay, f"arms.{name}.null.replay")
                self._check_replay(name, arm, arm.null.replay)
            for mask_name in masks_read(arm):
                key = "mask" if mask_name == mask_of(arm) else "lora.like"
                need(self.masks, mask_name, f"arms.{name}.{key}")
            self._refuse_cycle(name)
            if isinstance(arm, DistillArm) and arm.mask:
                tried = self.forms(name, arm)
                if any(isinstance(self.recipe_of(each).optim, Muon) for each in tried):
                    self._refuse_cut_matrices(name, arm.mask)
        self._check_sweeps()
        for name in self.geometry.arms:
            need(self.arms, name, "geometry.arms")
            if isinstance(self.arms[name], (ImportedArm, CheckpointArm)):
                raise ValueError(
                    f"geometry.arms: {name} is no arm of this student; use `vlopd geometry BASE TRAINED`"
                )
            if isinstance(self.arms[name], BaseArm):
                raise ValueError(f"geometry.arms: {name} is the base itself and has no delta")
        self.roles.contrasts(self.eval.contrasts or ())
        return self

    def _check_recipes(self) -> None:
        """The sections fit together as each arm trains with them."""
        for name, arm in self.arms.items():
            if isinstance(arm, DistillArm):
                try:
                    recipe = self.recipe_of(arm)
                except ConfigError as error:
                    raise ValueError(f"arms.{name}: {error}" if arm.own else str(error)) from None
                if arm.lora and any(its.ema is not None for its in recipe.teachers.values()):
                    raise ValueError(
                        f"arms.{name}.lora: a teacher with `ema` averages the student's weights, which a LoRA does not "
                        "train; give this arm a fixed teacher"
                    )
                grid = self.grid_of(name)
                for point in points_of(grid) if grid else [{}]:
                    where = f"arms.{name}" + (f".sweep ({words_of(point)})" if point else "")
                    try:
                        recipe = self.recipe_of(self.at_point(arm, point))
                        if arm.null is not None:
                            arm.null.refuse_other_recipes(recipe)
                    except (ConfigError, ValueError) as error:
                        raise ValueError(f"{where}: {error}") from None

    def _check_replay(self, name: str, arm: DistillArm, replayed: str) -> None:
        """Raises ValueError where an arm replays completions of other prompts than its own."""
        where, real = f"arms.{name}.null.replay", self.arms[replayed]
        if not isinstance(real, DistillArm):
            raise ValueError(f"{where} names {replayed!r}, which is not trained")
        if replayed == name:
            raise ValueError(f"{where} names the arm itself; name its real arm")
        if real.null is not None and real.null.replay is not None:
            raise ValueError(f"{where}: {replayed} replays {real.null.replay}; name that")
        forms = [*self.forms(name, arm), *self.forms(replayed, real)]
        own, *others = (
            {"seed": a.seed} | self.recipe_of(a).model_dump(mode="json", include=DECIDES_PROMPTS)
            for a in forms
        )
        differs = [key for its in others for key in own if own[key] != its[key]]
        if differs:
            swept = " at some point of a sweep" if len(forms) > 2 else ""
            raise ValueError(
                f"{where} names {replayed!r}, which has another {differs[0]}{swept}; a replay needs the same seed, "
                "data, rollout, train.steps and train.prompts_per_step"
            )

    def _refuse_equal_draws(self) -> None:
        """Raises ValueError for two random masks with the same settings and seed, which are the same mask."""
        drawn: dict[RandomMask, str] = {}
        for name, mask in self.masks.items():
            if isinstance(mask, RandomMask):
                other = drawn.setdefault(mask, name)
                if other != name:
                    raise ValueError(
                        f"masks.{name} is masks.{other} again: seed = {mask.seed}, like = {mask.like!r}; "
                        "give it another seed"
                    )

    def _check_checkpoint(self, text: str, where: str) -> None:
        reference = Reference.parse(text)
        if reference.path is not None:
            return
        if reference.arm not in self.arms:
            raise ValueError(f"{where} names {text!r}, which is not among {sorted(self.arms)}")
        if reference.step is None:
            return
        arm = self.arms[reference.arm]
        if not isinstance(arm, DistillArm):
            raise ValueError(f"{where} names {text!r}, but {reference.arm} is not trained")
        for each in self.forms(reference.arm, arm):
            train = self.recipe_of(each).train
            if reference.step not in train.keep_steps or reference.step > train.steps:
                raise ValueError(
                    f"{where} names {text!r}, but of {train.steps} steps train.keep_steps keeps "
                    f"{list(train.keep_steps)}; put {reference.step} there"
                )

    def _check_sweeps(self) -> None:
        """Raises ValueError for tuned arms that cannot be chosen among: without a split, or tied to one another."""
        if (tuned := next(iter(self.sweep_groups), None)) and self.eval.validation is None:
            name = self.sweep_members(tuned)[0]
            raise ValueError(
                f"arms.{name}.sweep needs a split to choose on: set eval.validation = {{tasks = [...], limit = ...}}"
            )
        for group in self.sweep_groups:
            first, *others = members = self.sweep_members(group)
            for name in others:
                grids = [dict(self.arms[each])["sweep"] for each in (first, name)]
                if grids[0] != grids[1]:
                    raise ValueError(
                        f"arms.{first} and arms.{name} share the sweep {group!r} but have other grids; give them one"
                    )
            for name in members:
                for above in self.ancestors(name):
                    if above in members:
                        raise ValueError(
                            f"arms.{name} is made from arms.{above}, so they cannot share the sweep {group!r}; give "
                            "them other names of sweep_group"
                        )
        made = [c for name in self.arms for c in self.candidates(name)]
        distinct_names(dict.fromkeys([*self.arms, *made]), "arms")
        for name in made:
            if name in self.arms:
                raise ValueError(f"arms.{name} is also what a sweep makes; rename it")
            if len(name) > LONGEST_NAME:
                raise ValueError(
                    f"the sweep's {name!r} is too long for a file name; rename its arm"
                )

    def _refuse_cut_matrices(self, arm: str, mask: str) -> None:
        """Raises ValueError for Muon with a mask that takes parts of matrices, as far as the rule determines it."""
        if not self._takes_whole_matrices(mask):
            raise ValueError(
                f"arms.{arm}: Muon orthogonalises whole matrices, and the mask {mask!r} takes coordinates out "
                'of them; train all arms with another optimizer, such as optim.type = "adamw"'
            )

    def _takes_whole_matrices(self, mask: str) -> bool:
        """Whether the rule selects whole matrices only; true for files and functions, which are checked on loading."""
        rule = self.masks[mask]
        if isinstance(rule, RandomMask) and rule.match in ("global", "module"):
            return False
        if rule.combines:
            return all(self._takes_whole_matrices(other) for other in rule.combines)
        whole = isinstance(rule, TopFractionMask) and rule.fraction == 1
        return whole or isinstance(rule, (WholeMask, FileMask, FunctionMask))

    def _refuse_cycle(self, arm: str) -> None:
        seen: list[str] = []
        for name in self.ancestors(arm):
            if name == arm:
                raise ValueError(f"arms.{arm} needs itself: {' <- '.join([arm, *seen, arm])}")
            seen.append(name)

    def is_derived(self, arm: str) -> bool:
        """Whether an arm is made from others: under a mask, by a transplant, from an early checkpoint."""
        its = self.arms[arm]
        return mask_of(its) is not None or bool(checkpoints_of(its))

    def ancestors(self, arm: str, replayed: bool = True) -> list[str]:
        """The arms that `arm` is made from, nearest first: by their deltas and, if `replayed`, by their completions or
        the choice among their settings."""
        found: list[str] = []
        queue = [arm]
        while queue:
            name = queue.pop(0)
            config = self.arms[name]
            parents = [Reference.parse(text).arm for text in checkpoints_of(config).values()]
            for mask in masks_read(config):
                parents += [Reference.parse(text).arm for text in self.read_by(mask)]
            if replayed:
                group = self.follows(name)
                parents += [replay_of(config), *(self.sweep_members(group) if group else ())]
            for parent in parents:
                if parent is not None and parent not in found:
                    found.append(parent)
                    queue.append(parent)
        return found

    def read_by(self, mask: str, above: tuple[str, ...] = ()) -> list[str]:
        """The checkpoints that a mask depends on, directly or through other masks."""
        if mask in above:
            raise ValueError(f"masks.{mask}: leads back to itself by {' <- '.join(above)}")
        rule = self.masks[mask]
        found = [] if rule.reads is None else [rule.reads]
        for other in rule.combines:
            if other in self.masks:
                found += self.read_by(other, (*above, mask))
        return list(dict.fromkeys(found))


def merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Merges `change` into `tree` in place, table by table; a table of another `type` replaces the old one.

    An old table without a `type` is kept: what does not fit the new type is then refused by its key, not lost.
    """
    for key, value in change.items():
        old = tree.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and ("type" not in old or value.get("type", old["type"]) == old["type"])
        ):
            merge(old, value)
        else:
            tree[key] = value
