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
from functools import lru_cache
from typing import Any

from vlopd.data.shapes import (
    CELLS,
    COLOURS,
    SHAPES,
    Scene,
    ShapesDataset,
    Split,
    answer,
    at_cell,
    scene_from_json,
)

CHOICES = 4


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
