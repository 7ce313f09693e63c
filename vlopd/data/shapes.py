"""The built-in visual data set: coloured shapes on a 3 x 3 grid, and questions about them.

A scene is a mapping from cell to (colour, shape). Scenes, images and questions are generated from seeds,
so training data are unlimited and example `i` of a split is always the same.
Answers state their evidence and then the verdict (`top-left center : 2`), so that a completion has
several tokens, an early mistake changes the rest, and being on-policy matters.

Limits: no natural language (a vocabulary of 60 words, split at white space) and no clutter
(every shape lies within its cell). Both let a 0.7 M-parameter student learn it in minutes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw

from vlopd.data.synthetic import Split, SyntheticDataset
from vlopd.types import Example

Scene = Mapping[int, tuple[str, str]]
Modality = Literal["image", "text"]

COLOURS = {
    "red": (235, 50, 50),
    "green": (50, 205, 70),
    "blue": (60, 90, 245),
    "yellow": (245, 225, 50),
}
STUDENTS_COLOURS = {
    "red": (200, 40, 140),
    "green": (150, 200, 50),
    "blue": (50, 160, 220),
    "yellow": (238, 120, 45),
}
"""The palette that the built-in student learned: its red is magenta, green lime, blue cyan, yellow orange."""
STUDENTS_SHADE = 20
SHAPES = ("circle", "cross", "triangle")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
CELLS = tuple(f"{row}-{column}" for row in ROWS for column in COLUMNS)
KINDS = ("attribute", "row", "count", "exist", "compare", "relation")
VERDICT = " : "
CELL_PIXELS = 32
IMAGE_PIXELS = 3 * CELL_PIXELS


class Question(NamedTuple):
    """One question with its full answer, e.g. ("count", "how many red", "top-left center : 2")."""

    kind: str
    text: str
    answer: str


def draw_scene(rng: random.Random, split: Split | None = None) -> Scene:
    """Draws a scene of 2 to 5 objects, of the given split."""
    while True:
        cells = sorted(rng.sample(range(9), rng.randint(2, 5)))
        scene = {cell: (rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in cells}
        if split is None or split_of(scene) == split:
            return scene


def split_of(scene: Scene) -> Split:
    """Split by a hash of the scene: a test scene never occurs in training, whatever the seed."""
    digest = hashlib.sha256(scene_to_json(scene).encode()).digest()
    return "test" if digest[0] % 10 == 0 else "validation" if digest[0] % 10 == 1 else "train"


def scene_to_json(scene: Scene) -> str:
    return json.dumps({CELLS[cell]: list(scene[cell]) for cell in sorted(scene)})


def scene_from_json(text: str) -> Scene:
    return {
        CELLS.index(cell): (colour, shape) for cell, (colour, shape) in json.loads(text).items()
    }


def scene_caption(scene: Scene, place_first: bool = True) -> str:
    """The scene as text, for the text-only pair: `top-left red circle , center blue cross ;`.

    Without `place_first`: `red circle top-left , blue cross center ;`.
    """
    phrases = [(CELLS[cell], at_cell(scene, cell)) for cell in sorted(scene)]
    return " , ".join(" ".join(words if place_first else words[::-1]) for words in phrases) + " ;"


def render(
    scene: Scene,
    jitter: int = 0,
    palette: Mapping[str, tuple[int, int, int]] = COLOURS,
    shade: int = 12,
) -> Image.Image:
    """Draws the scene, 96 x 96 RGB. `jitter` seeds background, sizes, offsets and shades (up to +-`shade`)."""
    rng = random.Random(f"render {jitter}")
    grey = rng.randint(10, 50)
    image = Image.new("RGB", (IMAGE_PIXELS, IMAGE_PIXELS), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for cell, (colour, shape) in scene.items():
        r = rng.randint(11, 14)
        x = CELL_PIXELS * (cell % 3) + CELL_PIXELS // 2 + rng.randint(-1, 1)
        y = CELL_PIXELS * (cell // 3) + CELL_PIXELS // 2 + rng.randint(-1, 1)
        fill = tuple(min(255, max(0, v + rng.randint(-shade, shade))) for v in palette[colour])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "cross":
            pen.rectangle((x - r, y - 3, x + r, y + 3), fill=fill)
            pen.rectangle((x - 3, y - r, x + 3, y + r), fill=fill)
        else:
            pen.polygon([(x, y - r), (x + r, y + r - 1), (x - r, y + r - 1)], fill=fill)
    return image


# ---------------------------------------------------------------------------------------- questions


def draw_question(scene: Scene, rng: random.Random, kind: str | None = None) -> Question:
    """Draws a question about the scene; `kind` is one of KINDS, or uniform over them."""
    kind = kind or rng.choice(KINDS)
    if kind == "relation" and len(unique_objects(scene)) < 2:
        kind = "attribute"  # a relation needs two objects that can be named without ambiguity
    text = ASK[kind](scene, rng)
    right = answer(scene, text)
    assert right is not None
    return Question(kind, text, right)


def unique_objects(scene: Scene) -> list[int]:
    counts = Counter(scene.values())
    return [cell for cell in scene if counts[scene[cell]] == 1]


def at_cell(scene: Scene, cell: int) -> str:
    return " ".join(scene[cell]) if cell in scene else "nothing"


def ask_attribute(scene: Scene, rng: random.Random) -> str:
    cell = rng.randrange(9) if rng.random() < 0.3 else rng.choice(list(scene))
    return f"what is at {CELLS[cell]}"


def ask_row(scene: Scene, rng: random.Random) -> str:
    i = rng.randrange(3)
    return f"list {ROWS[i]} row" if rng.random() < 0.5 else f"list {COLUMNS[i]} column"


def ask_count(scene: Scene, rng: random.Random) -> str:
    feature = rng.randrange(2)  # 0 colour, 1 shape
    values = (list(COLOURS), SHAPES)[feature]
    value = rng.choice(values) if rng.random() < 0.25 else rng.choice(list(scene.values()))[feature]
    return f"how many {value}"


def ask_exist(scene: Scene, rng: random.Random) -> str:
    colour, shape = rng.choice(list(scene.values()))
    if rng.random() < 0.5:
        shape = rng.choice(SHAPES)
    return f"any {colour} {shape}"


def ask_compare(scene: Scene, rng: random.Random) -> str:
    first = rng.choice(list(scene.values()))[0]
    second = rng.choice([colour for colour in COLOURS if colour != first])
    a, b = (first, second) if rng.random() < 0.5 else (second, first)
    return f"more {a} or {b}"


def ask_relation(scene: Scene, rng: random.Random) -> str:
    a, b = rng.sample(unique_objects(scene), 2)
    wanted = rng.random() < 0.5
    relation = rng.choice([name for name in RELATIONS if holds(name, a, b) == wanted])
    return f"is {at_cell(scene, a)} {relation} {at_cell(scene, b)}"


ASK = {
    "attribute": ask_attribute,
    "row": ask_row,
    "count": ask_count,
    "exist": ask_exist,
    "compare": ask_compare,
    "relation": ask_relation,
}
RELATIONS = {"left-of": (1, -1), "right-of": (1, 1), "above": (0, -1), "below": (0, 1)}
"""Axis (0 row, 1 column) and the sign of `first - second` along it."""


def holds(relation: str, first: int, second: int) -> bool:
    axis, sign = RELATIONS[relation]
    return (divmod(first, 3)[axis] - divmod(second, 3)[axis]) * sign > 0


def answer(scene: Scene, question: str) -> str | None:
    """The full answer to a question; None where the scene leaves it ambiguous.

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
            verdict = "yes" if holds(relation, first, second) else "no"
            return f"{CELLS[first]} {CELLS[second]}{VERDICT}{verdict}"
    raise AssertionError(f"not a question of the visual world: {question}")


def vocabulary() -> list[str]:
    """Every word a question or an answer can hold, sorted."""
    words = "what is at nothing list row column how many none any yes no more or equal , : ; 0 1 2 3 4 5"
    return sorted({*words.split(), *COLOURS, *SHAPES, *CELLS, *ROWS, *COLUMNS, *RELATIONS})


# ----------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class ShapesDataset(SyntheticDataset):
    """Examples of one split, by index; `len` is `size`, but any index is valid.

    Example `i` depends on (split, seed, i) alone, so a resumed run gets the same data as an uninterrupted one.
    One question per scene, so test questions are independent and need no clustered errors. An example with an
    image has the text modality's scene description in its field `caption`.
    """

    modality: Modality = "image"

    def row(self, index: int) -> dict[str, str | int]:
        """Example `index` as a plain row: id, kind, question, answer, verdict, scene, jitter."""
        rng = random.Random(f"shapes {self.split} {self.seed} {index}")
        scene = draw_scene(rng, self.split)
        question = draw_question(scene, rng)
        return {
            "id": f"shapes-{self.split}-{self.seed}-{index}",
            "kind": question.kind,
            "question": question.text,
            "answer": question.answer,
            "scene": scene_to_json(scene),
            "jitter": rng.randrange(2**31),
        }

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        row = self.row(index)
        scene = scene_from_json(str(row["scene"]))
        caption, question, answer = scene_caption(scene), str(row["question"]), str(row["answer"])
        if self.modality == "text":
            return Example.ask(str(row["id"]), f"{caption} {question}", (), answer, row)
        images = [render(scene, int(row["jitter"]))]
        return Example.ask(str(row["id"]), question, images, answer, {**row, "caption": caption})


Counts = Mapping[str, Counter[str]]


@lru_cache(maxsize=1)
def training_answers(n: int = 20_000, seed: int = 0) -> tuple[Counts, Counts]:
    """How often `n` training questions were answered with what, by their text and by their kind.

    That is all that can be known without looking.
    """
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    world = ShapesDataset("train", n, seed)
    for row in map(world.row, range(n)):
        by_text[str(row["question"])][str(row["answer"])] += 1
        by_kind[str(row["kind"])][str(row["answer"])] += 1
    return dict(by_text), dict(by_kind)


@lru_cache(maxsize=1)
def blind_guesser() -> tuple[dict[str, str], dict[str, str]]:
    """The best answer without looking: the commonest training answer to the same words, then to the kind.

    Returns (answer by question text, answer by kind). Its accuracy on test questions is chance level.
    """
    by_text, by_kind = (
        {asked: counts.most_common(1)[0][0] for asked, counts in answers.items()}
        for answers in training_answers()
    )
    return by_text, by_kind
