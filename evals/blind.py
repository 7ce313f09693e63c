"""Variants of image tasks without their pictures: `TASK@no_picture` and `TASK@other_picture`.

What a model scores on them it does not owe to the picture. `no_picture` asks the question alone; `other_picture` shows
another question's pictures. Questions, scores, chance levels and clusters are the task's.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from lm_eval.tasks._index import Entry

from evals.lm import PLACEHOLDER
from vlopd.errors import ConfigError

Key = tuple[str, ...]
"""The digests of a question's pictures."""


def variant_of(name: str) -> tuple[str, str]:
    """(task, variant) of `task@variant`; the variant of any other name is empty."""
    task, _, variant = name.rpartition("@")
    return (task, variant) if variant in VARIANTS and task else (name, "")


def full_name(task: str, variant: str) -> str:
    return f"{task}@{variant}"


class Index(dict[str, Entry]):
    """lm-eval's task index, in which the variants of its tasks and groups are found too; they are not listed."""

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name):
            return True
        task, variant = variant_of(str(name))
        return variant != "" and task in self

    def __missing__(self, name: str) -> Entry:
        task, variant = variant_of(name)
        if not variant:
            raise KeyError(name)
        entry = self[task]
        settings, members = entry.cfg, (entry.cfg or {}).get("task")
        if settings is not None and isinstance(members, list):
            own = [full_name(each, variant) if isinstance(each, str) else each for each in members]
            settings = {**settings, "task": own}
        tags = {full_name(each, variant) for each in entry.tags}
        return replace(entry, name=name, cfg=settings, tags=tags)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


def refuse_unknown_variant(name: str, index: Mapping[str, Any]) -> None:
    """Raises ConfigError for a name with @ that is neither a task nor one of its variants."""
    task, mark, variant = name.rpartition("@")
    if mark and name not in index and variant not in VARIANTS:
        known = " and ".join(full_name(task, each) for each in VARIANTS)
        raise ConfigError(f"eval.tasks: {name!r}: no variant {variant!r}; there are {known}")
    if mark and variant_of(task)[1]:
        raise ConfigError(f"eval.tasks: {name!r} is a variant of a variant; name {task!r} instead")


def rename(loaded: dict[str, Any], variant: str) -> dict[str, Any]:
    """lm-eval's loaded tasks and groups with their names and those of all members ending in the variant."""
    for task in loaded["tasks"].values():
        task.config.task = full_name(task.task_name, variant)
    for group in loaded["groups"].values():
        group.name = full_name(group.name, variant)
    for group in loaded["groups"].values():
        children = list(group)
        for name in group.child_names:
            group.pop(name)
        for child in children:
            group.add(child)
    return {
        "tasks": {task.task_name: task for task in loaded["tasks"].values()},
        "groups": {group.name: group for group in loaded["groups"].values()},
        "group_map": {group.name: group.child_names for group in loaded["groups"].values()},
    }


def apply(task: Any) -> None:
    """Takes a loaded task's pictures away, or exchanges them, if its name says so.

    Raises ConfigError for a task without pictures.
    """
    name, variant = variant_of(task.task_name)
    if not variant:
        return
    if task.config.doc_to_image is None:
        raise ConfigError(
            f"task {task.task_name}: {name} has no pictures; name it without @{variant}"
        )
    VARIANTS[variant](task)


def _without_pictures(task: Any) -> None:
    """Patches a task to show no pictures, of examples neither, and to mark none in its prompts."""
    ask = task.doc_to_text

    def unmarked(*args: Any) -> Any:
        text = ask(*args)
        return [_unmarked(each) for each in text] if isinstance(text, list) else _unmarked(text)

    task.doc_to_text = unmarked
    task.config.doc_to_image = None
    task.MULTIMODAL = False


def _unmarked(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    return text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "")


def _with_other_pictures(task: Any) -> None:
    """Patches a task to show another question's pictures; examples keep their own."""
    task.own_image = OtherPictures(task)


class OtherPictures:
    """The pictures shown instead of a question's own: those of the next question in the order of their digests.

    The choice depends on the task's questions only, so all arms see the same. Questions on the same pictures share
    the others too, and remain a cluster. None of the pictures is one of the question's own. They come from one
    question with as many pictures or, where there is none, from several; the task's `metadata` then counts such
    questions as `pictures_of_several`.
    """

    def __init__(self, task: Any):
        self.task = task
        self.own: Callable[..., list[Any]] = task.own_image
        self.docs: Sequence[Any] | Dataset = ()
        self.chosen: dict[Key, list[tuple[int, int]]] = {}
        """The document and the place in it of each picture that is shown instead of those of a key."""

    def __call__(self, doc: Any) -> list[Any]:
        if not self.chosen:
            self._choose()
        chosen = self.chosen[self._key(doc)]
        shown = {index: self.own(self.docs[index]) for index, _ in chosen}
        return [shown[index][place] for index, place in chosen]

    def _choose(self) -> None:
        """Raises ConfigError where all questions show the same pictures."""
        docs = self.task.eval_docs
        self.docs = docs if isinstance(docs, Dataset) else list(docs)
        keys = [self._key(doc) for doc in self.docs]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        alike: defaultdict[int, list[Key]] = defaultdict(list)
        single: dict[str, tuple[int, int]] = {}
        for key in sorted(first):
            alike[len(key)].append(key)
            single |= {digest: (first[key], place) for place, digest in enumerate(key)}
        digests = sorted(single)
        several = set()
        for key in first:
            if not key:
                self.chosen[key] = []
                continue
            other = next((k for k in after(alike[len(key)], key) if not {*k} & {*key}), None)
            if other is not None:
                self.chosen[key] = [(first[other], place) for place in range(len(key))]
                continue
            several.add(key)
            pool = [single[each] for each in after(digests, key[0]) if each not in key]
            if not pool:
                raise ConfigError(
                    f"task {self.task.task_name}: its questions all show the same pictures, so there are no others; "
                    "leave it out"
                )
            self.chosen[key] = [pool[place % len(pool)] for place in range(len(key))]
        if count := sum(key in several for key in keys):
            metadata = {**(self.task.config.metadata or {}), "pictures_of_several": count}
            self.task.config.metadata = metadata

    def _key(self, doc: Any) -> Key:
        if isinstance(doc, Mapping) and "benchmark" in doc and "digests" in doc:
            return tuple(doc["digests"])  # of a published benchmark, without decoding
        return tuple(map(_digest, self.own(doc)))


def after(ordered: Sequence[Any], own: Any) -> Iterator[Any]:
    """The other elements of a sorted sequence, from the one after `own` around to the one before it."""
    at = bisect_right(ordered, own)
    for step in range(len(ordered) - 1):
        yield ordered[(at + step) % len(ordered)]


def _digest(image: Any) -> str:
    about = f"{image.mode} {image.size} ".encode()
    return hashlib.sha256(about + image.tobytes()).hexdigest()


VARIANTS: Mapping[str, Callable[[Any], None]] = {
    "no_picture": _without_pictures,
    "other_picture": _with_other_pictures,
}
