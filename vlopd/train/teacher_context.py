"""The teacher's view of an example: privileged context that the student does not see.

Pure functions Example -> Example. They change the messages or the pictures and nothing else: id, answer and
fields stay those of the student's example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError
from PIL import Image

from vlopd.config.models import (
    CaptionContext,
    ContextConfig,
    FunctionContext,
    ImageContext,
    SystemContext,
    TemplateContext,
)
from vlopd.data.functions import refuse_unlike_images
from vlopd.data.raw_values import cell_text, nested_field
from vlopd.errors import ConfigError, UserError
from vlopd.models.sandbox import Sandbox
from vlopd.plugins import call, wrong_value
from vlopd.types import Example

Part = Mapping[str, Any]


def teacher_view(context: ContextConfig | None, example: Example) -> Example:
    """The example with a teacher's context, if any. Raises UserError with the example's id."""
    match context:
        case None:
            return example
        case SystemContext():
            return with_system(example, context.text)
        case TemplateContext():
            return with_template(example, context.template)
        case ImageContext():
            return with_images(example, context.column)
        case CaptionContext():
            return with_caption(example, context.column)
        case FunctionContext():
            return with_function(example, context)


def with_system(example: Example, text: str) -> Example:
    """Prepends a system turn; where there is one, prepends `text` to it, a blank line between."""
    first, *rest = example.messages
    if first["role"] == "system":
        text = f"{text}\n\n{text_of(parts_of(first))}"
    else:
        rest = [first, *rest]
    system = {"role": "system", "content": [text_part(text)]}
    return replace(example, messages=(system, *rest))


def with_template(example: Example, template: str) -> Example:
    """Replaces the last user turn's text with the rendered template; its pictures keep their places.

    The template's variables are the example's fields and, over fields of the same name, `question` (that turn's
    text) and `answer`. It runs in jinja's sandbox.

    Raises ConfigError for a template that is not jinja, or has an unknown variable; UserError where a printed value
    is missing, or the rendered text is empty.
    """
    index = last_user_turn(example)
    parts = parts_of(example.messages[index])
    names = {**example.fields, "question": text_of(parts), "answer": example.answer}
    here = f"example {example.id!r}: teacher.context.template"
    ready = compiled(template)
    try:
        text = ready.render(names)
    except UndefinedError as error:
        known = ", ".join(sorted(names))
        raise ConfigError(f"{here}: {error.message}; known names: {known}") from None
    except MissingValue:
        empty = ", ".join(sorted(name for name, value in names.items() if value is None))
        raise UserError(
            f"{here} prints a value that is missing (no value here: {empty or 'inside a field'}); "
            "fill the column or put the expression in {% if %}"
        ) from None
    except Exception as error:  # an expression of the user's may raise anything
        raise ConfigError(f"{here} fails: {error}") from None
    if not text.strip():
        raise UserError(f"{here} leaves no text")
    before = next((i for i, part in enumerate(parts) if part["type"] == "text"), len(parts))
    others = [part for part in parts if part["type"] != "text"]
    return with_turn(example, index, [*others[:before], text_part(text), *others[before:]])


def with_images(example: Example, column: str) -> Example:
    """Replaces the pictures with those of a field: one, a list of them, or a crop of the example's first picture.

    A crop is a box [x0, y0, x1, y1] in pixels of that picture as the student sees it (upright), x1 and y1
    exclusive; fractions of a pixel are rounded. New pictures go where the first one was, or before the last user
    turn's text.

    Raises UserError for a field that is missing or of another type, and a box that is empty or exceeds the picture.
    """
    value = field_of(example, column)
    pictures = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(pictures) == 4 and all(is_number(each) for each in pictures):
        pictures = [crop(example, column, pictures)]
    if not pictures or not all(isinstance(each, Image.Image) for each in pictures):
        kinds = " and ".join(sorted({type(each).__name__ for each in pictures})) or "nothing"
        raise UserError(
            f"example {example.id!r}: field {column!r} holds {kinds}; the teacher's image context needs "
            "a picture, a list of pictures, or a box [x0, y0, x1, y1]"
        )
    return with_parts_for_pictures(example, [{"type": "image"} for _ in pictures], tuple(pictures))


def with_caption(example: Example, column: str) -> Example:
    """Replaces the pictures with the text of a field, for a text-only teacher.

    Raises UserError where the field holds no text, or the example has no picture.
    """
    value = field_of(example, column)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"example {example.id!r}: field {column!r} holds no text; the caption must be filled in "
            "for every row"
        )
    if not example.images:
        raise UserError(
            f"example {example.id!r} has no picture for its caption to replace; set data.image, "
            'or use teacher.context = {type = "template", ...}'
        )
    return with_parts_for_pictures(example, [text_part(value)], ())


def with_function(example: Example, context: FunctionContext) -> Example:
    """The example with the messages and images that a plug-in gives it; the rest stays.

    Raises PluginError where it fails or returns no Example, DataError where images and image parts do not match.
    """
    where = f"example {example.id!r}"
    view = call(context.type, where, example, **context.arguments)
    if not isinstance(view, Example):
        raise wrong_value(context.type, where, view, "a vlopd.types.Example")
    refuse_unlike_images(f"{context.type}: {where}", view)
    return replace(example, messages=view.messages, images=view.images)


# ------------------------------------------------------------------------------------------ messages


def parts_of(message: Mapping[str, Any]) -> list[Part]:
    content = message["content"]
    return [text_part(content)] if isinstance(content, str) else list(content)


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def text_of(parts: Sequence[Part]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def last_user_turn(example: Example) -> int:
    """The index of the last user turn. Raises UserError where there is none."""
    for index in reversed(range(len(example.messages))):
        if example.messages[index]["role"] == "user":
            return index
    raise UserError(f"example {example.id!r} has no user turn for the teacher's context")


def with_turn(example: Example, index: int, parts: Sequence[Part]) -> Example:
    """The example with the content of one turn replaced."""
    messages = list(example.messages)
    messages[index] = {**messages[index], "content": list(parts)}
    return replace(example, messages=tuple(messages))


def with_parts_for_pictures(
    example: Example, new: Sequence[Part], images: tuple[Image.Image, ...]
) -> Example:
    """Puts `new` parts where the first picture was (or before the last user turn's text) and drops all pictures.

    A turn that is left with text alone becomes one part: some templates join parts without a space.
    """
    turns = [parts_of(message) for message in example.messages]
    places = [
        (i, j) for i, parts in enumerate(turns) for j, p in enumerate(parts) if p["type"] == "image"
    ]
    turn, place = places[0] if places else (last_user_turn(example), 0)
    for i in {turn, *(i for i, _ in places)}:
        at = place if i == turn else 0
        parts = [part for part in turns[i][at:] if part["type"] != "image"]
        parts = [*turns[i][:at], *(new if i == turn else ()), *parts]
        if all(part["type"] == "text" for part in parts):
            parts = [text_part(text_of(parts))]
        example = with_turn(example, i, parts)
    return replace(example, images=images)


# -------------------------------------------------------------------------------------------- fields


def field_of(example: Example, column: str) -> Any:
    """A field's value. Raises UserError with the known names where there is no such field, or it is null."""
    try:
        value = nested_field(example.fields, column)
    except KeyError:
        raise UserError(
            f"example {example.id!r} has no field {column!r} (teacher.context.column); it has "
            f"{', '.join(sorted(example.fields)) or 'none'}"
        ) from None
    if value is None:
        raise UserError(
            f"example {example.id!r}: field {column!r} is empty, but teacher.context.column needs it; "
            "fill it in or remove the row"
        )
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def crop(example: Example, column: str, box: Sequence[float]) -> Image.Image:
    """Crops the example's first picture. Refuses a side under 2 pixels: fractions given for pixels."""
    here = f"example {example.id!r}: field {column!r}, box {list(box)}"
    if not example.images:
        raise UserError(f"{here}: the example has no picture to crop; set data.image")
    if not all(math.isfinite(edge) for edge in box):
        raise UserError(f"{here}: every edge must be a finite number of pixels")
    width, height = example.images[0].size
    x0, y0, x1, y1 = (round(edge) for edge in box)
    if x1 - x0 < 2 or y1 - y0 < 2:
        raise UserError(
            f"{here} is {x1 - x0} x {y1 - y0} pixels, at least 2 x 2 needed; "
            "boxes are [x0, y0, x1, y1] in pixels"
        )
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise UserError(f"{here} exceeds the picture of {width} x {height} pixels")
    return example.images[0].crop((x0, y0, x1, y1))


# ----------------------------------------------------------------------------------------- templates


class MissingValue(Exception):
    """A template prints a null."""


def as_written(value: Any) -> Any:
    """Refuses to print a null as the word None, and prints booleans as JSON does."""
    if value is None:
        raise MissingValue
    return cell_text(value) if isinstance(value, bool) else value


@lru_cache
def compiled(template: str) -> Template:
    """Raises ConfigError with the line for a template that is not jinja."""
    environment = Sandbox(undefined=StrictUndefined, finalize=as_written)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"teacher.context.template, line {error.lineno}: {error.message}"
        ) from None
