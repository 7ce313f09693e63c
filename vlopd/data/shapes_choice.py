"""Multiple choice in the built-in visual world: every wrong choice is the right answer about a scene nearby.

A random walk through scenes, one object recoloured, reshaped or moved at a time, stops at four that have
different answers to the question; the true scene is the first, second, third or fourth of them with equal
probability. So every choice has the form of an answer, and what scenes are usually like, or how the choices
resemble each other, tells a guesser who does not look next to nothing (0.27 right, docs/tasks.md).

Scenes are those of `ShapesWorld`, so what is held out is a combination: training shows every object in every
cell, but never the set of objects of a test scene, whatever the seed (`shapes.split_of`), in no question.
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
    ShapesWorld,
    Split,
    answer,
    at_cell,
    scene_from_json,
)

CHOICES = 4


def step(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one object recoloured, reshaped or moved.

    A scene of n objects has as many such neighbours as any other, and is a neighbour of each of them: a walk
    of such steps keeps the distribution of scenes, and its two ends look alike.
    """
    cell = rng.choice(sorted(scene))
    colour, shape = scene[cell]
    changes = [(cell, other, shape) for other in COLOURS if other != colour]
    changes += [(cell, colour, other) for other in SHAPES if other != shape]
    changes += [(empty, colour, shape) for empty in range(9) if empty not in scene]
    place, colour, shape = rng.choice(changes)
    return {**{c: obj for c, obj in scene.items() if c != cell}, place: (colour, shape)}


def draw_choices(scene: Scene, question: str, rng: random.Random) -> list[str]:
    """The answers about four scenes of a walk through this one, in random order."""
    true = answer(scene, question)
    assert true is not None
    choices = [true]
    before = rng.randrange(CHOICES)  # the others that stand before the true scene in the walk
    for length in (before, CHOICES - 1 - before):
        here = scene
        while length:
            here = step(here, rng)
            said = answer(here, question)
            if said is not None and said not in choices:
                choices.append(said)
                length -= 1
    rng.shuffle(choices)
    return choices


def choice_row(world: ShapesWorld, index: int) -> dict[str, Any]:
    """Question `index` of the world as it is, with its choices."""
    row = world.row(index)
    rng = random.Random(f"choices {row['id']}")
    scene = scene_from_json(str(row["scene"]))
    return {**row, "choices": draw_choices(scene, str(row["question"]), rng)}


def colour_row(world: ShapesWorld, index: int) -> dict[str, Any]:
    """The colour of one object of scene `index`: its place is named, its shape is the same in all four choices."""
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


@lru_cache(maxsize=8)  # every arm is asked the same
def choice_rows(size: int, seed: int, split: Split) -> tuple[dict[str, Any], ...]:
    """The first `size` questions of a split, those of `ShapesWorld` of that seed, with choices."""
    world = ShapesWorld(split, size, seed)
    return tuple(choice_row(world, i) for i in range(size))


@lru_cache(maxsize=8)
def colour_rows(size: int, seed: int, split: Split) -> tuple[dict[str, Any], ...]:
    """The colour question of each scene of those questions."""
    world = ShapesWorld(split, size, seed)
    return tuple(colour_row(world, i) for i in range(size))
