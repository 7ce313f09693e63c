"""The whole experiment, and what must fit together in it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vlopd.config.analysis import EvalConfig, GeometryConfig
from vlopd.config.arms import (
    RANDOM,
    ArmConfig,
    BaseArm,
    CheckpointArm,
    DistillArm,
    ImportedArm,
    TeacherArm,
    checkpoints_of,
    expand_seeds,
    mask_of,
)
from vlopd.config.base import Name, Section, Unique, distinct_names
from vlopd.config.masks import (
    FileMask,
    MaskConfig,
    RandomMask,
    Reference,
    TopFractionMask,
    WholeMask,
)
from vlopd.config.models import ModelConfig, PrecisionConfig, TeacherConfig, as_table
from vlopd.config.recipe import Recipe, RecipeSections
from vlopd.config.training import Muon
from vlopd.errors import ConfigError


class TrackingConfig(Section):
    """Where the training curves go besides metrics.jsonl, through accelerate."""

    trackers: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], Unique] = ()
    """wandb runs offline unless WANDB_MODE says otherwise."""


class ExperimentConfig(RecipeSections):
    """One experiment: everything that decides its numbers."""

    name: Name
    title: str = Field("", min_length=0)
    student: Annotated[ModelConfig, BeforeValidator(as_table)]
    precision: PrecisionConfig = PrecisionConfig()
    masks: dict[Name, MaskConfig] = Field(default_factory=dict)
    """A random one with `seeds = [7, 8]` is two, NAME-0 and NAME-1; so is an arm under it."""
    arms: dict[Name, ArmConfig]
    geometry: GeometryConfig = GeometryConfig()
    eval: EvalConfig = EvalConfig()
    tracking: TrackingConfig = TrackingConfig()

    def recipe_of(self, arm: DistillArm) -> Recipe:
        """How an arm is trained: its own sections merged into the run's.

        Raises ConfigError where they do not fit together.
        """
        sections = {name: section for name, section in self if name in Recipe.model_fields}
        if arm.own:
            sections |= {
                name: section.model_dump(mode="json")
                for name, section in sections.items()
                if name in arm.own and section is not None
            }
            merge(sections, arm.own)
        try:
            return Recipe.model_validate(sections)
        except ValidationError as error:
            raise ConfigError("; ".join(map(explain, error.errors()))) from None

    def checkpoint_of(self, arm: CheckpointArm) -> ModelConfig:
        """A foreign checkpoint, to be loaded as the student is."""
        return self.student.model_copy(update={"model": arm.model})

    def teacher_of(self, arm: TeacherArm) -> TeacherConfig:
        """The teacher that an arm is: the one it names, or the only one."""
        return self.teachers[arm.teacher or next(iter(self.teachers))]

    @model_validator(mode="before")
    @classmethod
    def expand(cls, tree: Any) -> Any:
        return expand_seeds(tree)

    @model_validator(mode="after")
    def check_references(self) -> ExperimentConfig:
        """Every mask and arm that is named exists, and what it is made from comes before it."""

        def need(names: Mapping[str, Any], name: str, where: str) -> None:
            if name not in names:
                raise ValueError(f"{where} names {name!r}, which is not among {sorted(names)}")

        distinct_names(self.arms, "arms")
        distinct_names(self.masks, "masks")
        if "images" in self.arms:
            raise ValueError("arms.images: evals/images/ is for the questions' pictures; rename it")
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
                    raise ValueError(
                        f"arms.{name}.teacher must say which of {sorted(self.teachers)} it is"
                    )
                need(
                    self.teachers, arm.teacher or next(iter(self.teachers)), f"arms.{name}.teacher"
                )
            for where, checkpoint in checkpoints_of(arm).items():
                self._check_checkpoint(checkpoint, f"arms.{name}.{where}")
            mask_name = mask_of(arm)
            if mask_name is not None:
                need(self.masks, mask_name, f"arms.{name}.mask")
            self._refuse_cycle(name)
            if (
                isinstance(arm, DistillArm)
                and arm.mask
                and isinstance(self.recipe_of(arm).optim, Muon)
            ):
                self._refuse_cut_matrices(name, arm.mask)
        for name in self.geometry.arms:
            need(self.arms, name, "geometry.arms")
            if isinstance(self.arms[name], (ImportedArm, CheckpointArm)):
                raise ValueError(
                    f"geometry.arms: {name} is no arm of this student; use `vlopd geometry SOURCE TRAINED`"
                )
            if isinstance(self.arms[name], BaseArm):
                raise ValueError(f"geometry.arms: {name} is the base itself and has no delta")
        for contrast in self.eval.contrasts or ():
            a, dash, b = contrast.partition(" - ")
            if not dash:
                raise ValueError(f'eval.contrasts: {contrast!r} is not "arm - arm"')
            need(self.arms, a, "eval.contrasts")
            need({**self.arms, RANDOM: None}, b, "eval.contrasts")
            if b == RANDOM and b not in self.arms and not self._has_random_arm():
                raise ValueError(
                    f'eval.contrasts: {contrast!r} needs an arm whose mask is of type "random"; there is none'
                )
        return self

    def _check_recipes(self) -> None:
        """The sections fit together as each arm trains with them."""
        for name, arm in self.arms.items():
            if isinstance(arm, DistillArm):
                try:
                    self.recipe_of(arm)
                except ConfigError as error:
                    raise ValueError(f"arms.{name}: {error}" if arm.own else str(error)) from None

    def _has_random_arm(self) -> bool:
        names = [mask_of(arm) for arm in self.arms.values()]
        return any(isinstance(self.masks[n], RandomMask) for n in names if n is not None)

    def _refuse_equal_draws(self) -> None:
        """Two random masks of one seed are one mask, and no two controls."""
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
        train = self.recipe_of(arm).train
        if reference.step not in train.keep_steps or reference.step > train.steps:
            raise ValueError(
                f"{where} names {text!r}, but of {train.steps} steps train.keep_steps keeps "
                f"{list(train.keep_steps)}; put {reference.step} there"
            )

    def _refuse_cut_matrices(self, arm: str, mask: str) -> None:
        """Before the first arm trains; the mask itself is looked at again before this one does."""
        if not self._takes_whole_matrices(mask):
            raise ValueError(
                f"arms.{arm}: Muon orthogonalises whole matrices, and the mask {mask!r} takes coordinates out "
                'of them; train all arms with another optimizer, such as optim.type = "adamw"'
            )

    def _takes_whole_matrices(self, mask: str) -> bool:
        """As far as the rule tells; what a file holds is seen when it is read."""
        rule = self.masks[mask]
        if isinstance(rule, RandomMask) and rule.match in ("global", "module"):
            return False
        if rule.combines:
            return all(self._takes_whole_matrices(other) for other in rule.combines)
        whole = isinstance(rule, TopFractionMask) and rule.fraction == 1
        return whole or isinstance(rule, (WholeMask, FileMask))

    def _refuse_cycle(self, arm: str) -> None:
        seen: list[str] = []
        for name in self.ancestors(arm):
            if name == arm:
                raise ValueError(f"arms.{arm} needs itself: {' <- '.join([arm, *seen, arm])}")
            seen.append(name)

    def ancestors(self, arm: str) -> list[str]:
        """The arms whose deltas `arm` is made from, nearest first (at most one visit each)."""
        found: list[str] = []
        queue = [arm]
        while queue:
            config = self.arms[queue.pop(0)]
            parents = [Reference.parse(text).arm for text in checkpoints_of(config).values()]
            mask = mask_of(config)
            if mask is not None:
                parents += [Reference.parse(text).arm for text in self.read_by(mask)]
            for parent in parents:
                if parent is not None and parent not in found:
                    found.append(parent)
                    queue.append(parent)
        return found

    def read_by(self, mask: str, above: tuple[str, ...] = ()) -> list[str]:
        """The checkpoints that a mask is made from, through all masks that it is made from."""
        if mask in above:
            raise ValueError(f"masks.{mask}: leads back to itself by {' <- '.join(above)}")
        rule = self.masks[mask]
        found = [] if rule.reads is None else [rule.reads]
        for other in rule.combines:
            if other in self.masks:
                found += self.read_by(other, (*above, mask))
        return list(dict.fromkeys(found))


def merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    """Merges `change` into `tree` in place, table by table; a table of another `type` replaces the old one."""
    for key, value in change.items():
        old = tree.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(old, dict)
            and value.get("type", old.get("type")) == old.get("type")
        ):
            merge(old, value)
        else:
            tree[key] = value


def explain(error: ErrorDetails) -> str:
    """One pydantic error as one line: the key, what is wrong, the value; the nearest known key of an unknown one."""
    where, known = key_of(error["loc"])
    value = error["input"]
    if error["type"] == "union_tag_not_found":
        return f"{where}.type is missing; it is one of {', '.join(tags_at(error['loc']))}"
    if error["type"] != "extra_forbidden":
        said = error["msg"].removeprefix("Value error, ")
        if error["type"] not in ("value_error", "too_short") and isinstance(
            value, (str, int, float)
        ):
            said += f", not {value!r}"
        return f"{where}: {said}" if where else said
    near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    return f"unknown key {where!r}{hint}"


def key_of(location: Sequence[int | str]) -> tuple[str, list[str]]:
    """A pydantic error path as the key that a user writes, and the keys that are known beside its last part.

    pydantic puts the `type` of a section into the path; the user does not.
    """
    keys, known, _ = walk(location)
    return ".".join(keys), known


def tags_at(location: Sequence[int | str]) -> list[str]:
    """The values of `type` that a section may have, by a pydantic error's path to it."""
    _, _, there = walk(location)
    return [tag for cls in sections_in(there) for tag in variant_tags(cls)]


def walk(location: Sequence[int | str]) -> tuple[list[str], list[str], Any]:
    """(the keys of a pydantic error's path, those known beside the last, the annotation there)."""
    here: Any = ExperimentConfig
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        variants = sections_in(here)
        tagged = [cls for cls in variants if part in variant_tags(cls)]
        if get_origin(bare(here)) is dict:
            here = get_args(bare(here))[1]
        elif len(variants) > 1 and tagged:
            here = tagged[0]
            continue
        elif get_origin(bare(here)) is tuple:
            here = get_args(bare(here))[0]
        else:
            known = sorted({key for cls in variants for key in cls.model_fields})
            fields = [cls.model_fields[part] for cls in variants if part in cls.model_fields]
            here = fields[0].annotation if fields else None
        keys.append(str(part))
    return keys, known, here


def bare(annotation: Any) -> Any:
    """A type without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    others = [each for each in get_args(annotation) if each is not type(None)]
    if type(None) in get_args(annotation) and len(others) == 1:
        return bare(others[0])
    return annotation


def variant_tags(cls: type[BaseModel]) -> tuple[str, ...]:
    field = cls.model_fields.get("type")
    return get_args(field.annotation) if field is not None else ()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The classes of a section, or of the variants of one; none of a table or list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (dict, tuple):
        return []
    return [cls for part in get_args(annotation) for cls in sections_in(part)]
