"""Multiple choice in the built-in visual data set: every wrong choice is the right answer for a nearby scene.

A random walk through scenes, one object recoloured, reshaped or moved at a time, stops at four with
different answers to the question; the true scene is the first, second, third or fourth of them with equal
probability. So all choices have the form of an answer, and neither the prior over scenes nor the similarity of the
choices helps a model that ignores the image (accuracy 0.27, docs/tasks.md).

Scenes are those of `ShapesDataset`, so the held-out part is the combination: training has every object in every
cell, but never the object set of a test scene, whatever the seed (`shapes.split_of`) and question.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from functools import lru_cache
from typing import Any

from vlopd.data.shapes import (
    CELLS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    VERDICT,
    Scene,
    ShapesDataset,
    Split,
    at_cell,
    scene_from_json,
    unique_objects,
)

CHOICES = 4
RELATIONS = {"left-of": (1, -1), "right-of": (1, 1), "above": (0, -1), "below": (0, 1)}
"""Axis (0 row, 1 column) and the sign of `first - second` along it."""


def answer(scene: Scene, question: str) -> str | None:
    """The full answer to a question, in the vocabulary of shapes.py; None where it is ambiguous in the scene.

    >>> answer({0: ("red", "circle")}, "how many red")
    "top-left : 1"
    """
    match question.split():
        case ["what", "is", "at", cell]:
            return at_cell(scene, CELLS.index(cell))
        case ["list", name, "row"]:
            return " , ".join(at_cell(scene, 3 * ROWS.index(name) + j) for j in range(3))
        case ["list", name, "column"]:
            return " , ".join(at_cell(scene, 3 * j + COLUMNS.index(name)) for j in range(3))
        case ["how", "many", value]:
            cells = [CELLS[cell] for cell in sorted(scene) if value in scene[cell]]
            return f"{' '.join(cells) or 'none'}{VERDICT}{len(cells)}"
        case ["any", colour, shape]:
            found = [f"{CELLS[c]} {scene[c][1]}" for c in sorted(scene) if scene[c][0] == colour]
            verdict = "yes" if (colour, shape) in scene.values() else "no"
            return f"{' '.join(found) or 'none'}{VERDICT}{verdict}"
        case ["more", a, "or", b]:
            n_a, n_b = (sum(obj[0] == colour for obj in scene.values()) for colour in (a, b))
            verdict = a if n_a > n_b else b if n_b > n_a else "equal"
            return f"{a} {n_a} {b} {n_b}{VERDICT}{verdict}"
        case ["is", colour_a, shape_a, relation, colour_b, shape_b]:
            named = {scene[cell]: cell for cell in unique_objects(scene)}
            first, second = named.get((colour_a, shape_a)), named.get((colour_b, shape_b))
            if first is None or second is None:
                return None
            axis, sign = RELATIONS[relation]
            difference = divmod(first, 3)[axis] - divmod(second, 3)[axis]
            verdict = "yes" if difference * sign > 0 else "no"
            return f"{CELLS[first]} {CELLS[second]}{VERDICT}{verdict}"
    raise AssertionError(f"not a question of the shapes data set: {question}")


def _neighbour(scene: Scene, rng: random.Random) -> Scene:
    """Draws a neighbouring scene: one object recoloured, reshaped or moved.

    All scenes of n objects have equally many neighbours, and the relation is symmetric, so a random walk keeps the
    distribution of scenes and is reversible.
    """
    cell = rng.choice(sorted(scene))
    colour, shape = scene[cell]
    changes = [(cell, other, shape) for other in COLOURS if other != colour]
    changes += [(cell, colour, other) for other in SHAPES if other != shape]
    changes += [(empty, colour, shape) for empty in range(9) if empty not in scene]
    place, colour, shape = rng.choice(changes)
    return {**{c: obj for c, obj in scene.items() if c != cell}, place: (colour, shape)}


def _draw_choices(scene: Scene, question: str, rng: random.Random) -> list[str]:
    """The answers for four scenes of a random walk through this one, in random order."""
    true = answer(scene, question)
    assert true is not None
    choices = [true]
    before = rng.randrange(CHOICES)  # wrong choices before the true scene in the walk
    for length in (before, CHOICES - 1 - before):
        here = scene
        while length:
            here = _neighbour(here, rng)
            other = answer(here, question)
            if other is not None and other not in choices:
                choices.append(other)
                length -= 1
    rng.shuffle(choices)
    return choices


def _choice_row(world: ShapesDataset, index: int) -> dict[str, Any]:
    """Question `index` of the data set, with choices."""
    row = world.row(index)
    rng = random.Random(f"choices {row['id']}")
    scene = scene_from_json(str(row["scene"]))
    return {**row, "choices": _draw_choices(scene, str(row["question"]), rng)}


def _colour_row(world: ShapesDataset, index: int) -> dict[str, Any]:
    """A question for the colour of one object of scene `index`, by its cell; all four choices have its shape."""
    row = world.row(index)
    rng = random.Random(f"colour {row['id']}")
    scene = scene_from_json(str(row["scene"]))
    cell = rng.choice(sorted(scene))
    colours = list(COLOURS)
    rng.shuffle(colours)
    return {
        **row,
        "kind": scene[cell][1],
        "question": f"what is at {CELLS[cell]}",
        "answer": at_cell(scene, cell),
        "choices": [f"{colour} {scene[cell][1]}" for colour in colours],
    }


@lru_cache(maxsize=8)  # the same for every arm
def choice_rows(size: int, seed: int, split: Split) -> tuple[dict[str, Any], ...]:
    """The first `size` questions of a split, those of `ShapesDataset` of that seed, with choices."""
    world = ShapesDataset(split, size, seed)
    return tuple(_choice_row(world, i) for i in range(size))


@lru_cache(maxsize=8)
def colour_rows(size: int, seed: int, split: Split) -> tuple[dict[str, Any], ...]:
    """The colour question of each scene of those questions."""
    world = ShapesDataset(split, size, seed)
    return tuple(_colour_row(world, i) for i in range(size))


def training_answers(n: int = 20_000, seed: int = 0) -> dict[str, Counter[str]]:
    """Counts of each training question's answers over `n` examples: the prior of a model that ignores the image."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    world = ShapesDataset("train", n, seed)
    for i in range(n):
        row = world.row(i)
        answers[str(row["question"])][str(row["answer"])] += 1
    return answers
