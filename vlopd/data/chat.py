"""Reads chat-format columns: lists of turns, as in TRL, verl, ShareGPT and LLaVA.

    [{"role": "user", "content": "..."}, {"role": "assistant", "content": [{"type": "text", "text": "..."}]}]
    [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]

A prompt ends with a user turn; an assistant turn after it is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlopd.data.images import shorten
from vlopd.errors import DataError
from vlopd.types import parts_at_marks

Turn = dict[str, Any]

KEYS = (("role", "content"), ("from", "value"))
ROLES = {r: r for r in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}
ENCODED_TURNS = re.compile(r"\s*\[?\s*\{.*\}\s*\]?\s*", re.DOTALL)
PICTURE_KEYS = ("image", "image_url", "url", "path")
"""Keys under which an image part holds its picture: a file name, bytes, or a table of either."""
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a turn whose content would be lost; rows that have them are refused."""


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, or a table of lists that makes one (`datasets`' older Sequence)."""
    if isinstance(value, Mapping):
        return any(
            isinstance(value.get(who), list) and isinstance(value.get(what), list)
            for who, what in KEYS
        )
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value)
    )


def refuse_encoded(text: str) -> None:
    """Raises DataError, without row and column, for turns serialised into a text, as CSV exports do.

    Matches JSON and the output of Python's and numpy's print, which would become the literal prompt.
    """
    if ENCODED_TURNS.fullmatch(text) and any(
        all(re.search(rf"""['"]{key}['"]\s*:""", text) for key in keys) for keys in KEYS
    ):
        raise DataError(
            "holds a text that is a serialised list of turns, which would become the literal prompt; store the column "
            "as a list of {role, content} (in JSONL or parquet), or put words before it if that text is meant"
        )


def read_turns(value: Any) -> list[Turn]:
    """Converts a value that `is_turns` to {"role", "content": parts}. Raises DataError, without row and column."""
    if isinstance(value, Mapping):
        names = [name for name, each in value.items() if isinstance(each, list)]
        if len({len(value[name]) for name in names}) > 1:
            raise DataError(f"has lists of different lengths under {names}; fix the row")
        value = [
            dict(zip(names, each, strict=True))
            for each in zip(*(value[name] for name in names), strict=True)
        ]
    return [_read_turn(turn, number) for number, turn in enumerate(value, 1)]


def _read_turn(turn: Mapping[str, Any], number: int) -> Turn:
    who, what = KEYS[0] if turn.get("role") is not None else KEYS[1]
    role = ROLES.get(str(turn.get(who)))
    if role is None:
        raise DataError(f"has turn {number} of {turn.get(who)!r}; roles are {', '.join(ROLES)}")
    for key in UNSUPPORTED_KEYS:
        if turn.get(key):
            raise DataError(
                f"has {key!r} in turn {number}, which is not supported; put it into the turn's {what!r}, or remove "
                "the row"
            )
    return {"role": role, "content": _read_parts(turn.get(what), f"turn {number}")}


def _read_parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Converts a turn's text, or its list of parts, to {"type": "text", "text"} and {"type": "image"}, with "image"
    where the picture is inside the part.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        kind = "nothing" if content is None or content == [] else f"a {type(content).__name__}"
        raise DataError(f"has {kind} for the content of {where}; text or a list of parts is wanted")
    parts = []
    for part in content:
        given = (
            {k: v for k, v in part.items() if v is not None} if isinstance(part, Mapping) else {}
        )
        if given.get("type") == "text" and isinstance(given.get("text"), str):
            parts.append({"type": "text", "text": given["text"]})
        elif given.get("type") in ("image", "image_url"):
            held = [key for key in PICTURE_KEYS if key in given]
            if len(held) > 1 or len(held) + 1 < len(given):
                raise DataError(
                    f"has an image part of {where} with {', '.join(sorted(given))}; type and one of "
                    f"{', '.join(PICTURE_KEYS)} are wanted"
                )
            picture = {"image": _picture(given[held[0]])} if held else {}
            parts.append({"type": "image", **picture})
        else:
            raise DataError(
                f"has a part of {where} that is neither text nor an image: {shorten(str(part))}"
            )
    return parts


def _picture(value: Any) -> Any:
    """The picture of a part: OpenAI's {"url"} is that name."""
    return value["url"] if isinstance(value, Mapping) and value.keys() == {"url"} else value


def refuse_pictures(turns: Sequence[Turn], column: str) -> None:
    """Raises DataError, without row and column, for a picture inside a turn."""
    for number, turn in enumerate(turns, 1):
        if any("image" in part for part in turn["content"]):
            raise DataError(
                f'has a picture inside turn {number}; set data.image = "{column}", the same column, to read it, or '
                'leave {"type": "image"} in its place and name the column of the pictures'
            )


def take_pictures(turns: Sequence[Turn]) -> tuple[list[Turn], list[Any]]:
    """(turns whose image parts are bare, the pictures inside them). Raises DataError for a part without one."""
    bare, pictures = [], []
    for number, turn in enumerate(turns, 1):
        for part in turn["content"]:
            if part["type"] == "image" and "image" not in part:
                raise DataError(
                    f"has an image part of turn {number} without a picture; put it under one of "
                    f"{', '.join(PICTURE_KEYS)}"
                )
            pictures += [part["image"]] if part["type"] == "image" else []
        parts = [{k: v for k, v in part.items() if k != "image"} for part in turn["content"]]
        bare.append({**turn, "content": parts})
    return bare, pictures


def names_inside(value: Any) -> Iterator[str]:
    """The file names of pictures inside turns; what is malformed raises when its row is read."""
    try:
        turns = read_turns(value) if is_turns(value) else []
    except DataError:
        return
    for picture in (part.get("image") for turn in turns for part in turn["content"]):
        if isinstance(picture, Mapping):
            picture = None if picture.get("bytes") else picture.get("path")
        if isinstance(picture, str):
            yield picture


def split_answer(turns: Sequence[Turn]) -> tuple[list[Turn], str | None]:
    """Splits turns into the prompt, which ends with a user turn, and the text of an assistant turn after it, if any.

    Raises DataError, without row and column, where there is no such prompt.
    """
    answer = None
    if turns and turns[-1]["role"] == "assistant":
        *turns, last = turns
        answer = _turn_text(last)
    if not turns or turns[-1]["role"] != "user":
        raise DataError(
            "has no user turn at its end, or before the assistant turn at its end; fix or remove the row"
        )
    if not any(part["type"] == "text" and part["text"].strip() for part in turns[-1]["content"]):
        raise DataError("holds no text in its last user turn; fill it in or remove the row")
    return list(turns), answer


def completion_text(value: Any) -> str:
    """The text of a column of one assistant turn (TRL's `completion_text`). Raises DataError."""
    turns = read_turns(value)
    if [turn["role"] for turn in turns] != ["assistant"]:
        raise DataError(
            f"holds {len(turns)} turns; an answer is text, a number or one assistant turn (leave data.answer out "
            "where the answer is the last turn of the column that data.question names)"
        )
    return _turn_text(turns[0])


def _turn_text(turn: Turn) -> str:
    if any(part["type"] != "text" for part in turn["content"]):
        raise DataError("has a picture in its last assistant turn; an answer is text")
    return "\n".join(part["text"] for part in turn["content"])


def insert_images(turns: Sequence[Turn], images: int, mark: str | None) -> list[Turn]:
    """Inserts an image part per image: at the marks in user turns, or at existing image parts, or else before the
    first user turn's text.

    Raises DataError, without the row, where the counts differ.
    """
    placed = []
    for turn in turns:
        parts = turn["content"]
        if mark is not None and turn["role"] == "user":
            parts = [
                new
                for part in parts
                for new in (
                    parts_at_marks(part["text"], mark) if part["type"] == "text" else [part]
                )
            ]
        placed.append({**turn, "content": parts})
    marked = sum(part["type"] == "image" for turn in placed for part in turn["content"])
    if mark is None and not marked:
        first = next(i for i, turn in enumerate(placed) if turn["role"] == "user")
        parts = [{"type": "image"} for _ in range(images)] + placed[first]["content"]
        placed[first] = {**placed[first], "content": parts}
    elif marked != images:
        what = f"{mark!r}" if mark is not None else "image parts"
        raise DataError(
            f"the question has {marked} {what} and the row {images} images; fix the row or "
            + ("data.image_mark" if mark is not None else "name its pictures: data.image")
        )
    return placed


def prepend_system(turns: Sequence[Turn], text: str | None) -> list[Turn]:
    """Prepends a system turn of `text`, if given. Raises DataError where the turns already have one."""
    if text is None:
        return list(turns)
    if any(turn["role"] == "system" for turn in turns):
        raise DataError("has a system turn of its own, beside data.system; leave one of them out")
    return [{"role": "system", "content": [{"type": "text", "text": text}]}, *turns]
