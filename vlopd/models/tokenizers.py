"""Checks of a tokenizer against its model: chat template, end tokens, rows of the embedding."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlopd.config.models import TEMPLATE_NAMES
from vlopd.errors import ConfigError, first_line
from vlopd.models import families

PROBE, ANSWER = "zyzzyva", "quokka"
"""Words for probing chat templates, which no template contains."""


def template_text(processor: Any) -> str:
    """The chat template that renders prompts; the default one of several."""
    template = getattr(processor, "chat_template", None)
    template = template or families.tokenizer_of(processor).chat_template or ""
    return template.get("default", "") if isinstance(template, dict) else str(template)


LONGEST_TEMPLATE, LARGEST_FACTOR = 1_000_000, 10_000
"""Characters of a chat template, and the largest number that one may multiply by."""


def check_template(name: str, template: str) -> None:
    """Raises ConfigError for a chat template whose size, nesting or arithmetic is without bounds."""
    remedy = "set `template` beside its `model` to another"
    if len(template) > LONGEST_TEMPLATE:
        raise ConfigError(
            f"the chat template of {name!r} has {len(template):,} characters, more than {LONGEST_TEMPLATE:,}; {remedy}"
        )
    try:
        tree = _parse_template(template)
    except RecursionError:
        raise ConfigError(f"the chat template of {name!r} is nested too deeply; {remedy}") from None
    except TemplateSyntaxError:
        return  # rendering raises it
    large = any(
        isinstance(side, nodes.Const)
        and isinstance(side.value, int)
        and side.value > LARGEST_FACTOR
        for product in tree.find_all(nodes.Mul)
        for side in (product.left, product.right)
    )
    if large or tree.find(nodes.Pow) is not None:
        raise ConfigError(
            f"the chat template of {name!r} has a power, or a multiplication by more than {LARGEST_FACTOR:,}, whose "
            f"result may be of any size; {remedy}"
        )


def _parse_template(template: str) -> nodes.Template:
    """Parses a chat template, without transformers' own tag, which jinja does not know."""
    plain = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


def check_template_arguments(name: str, template: str, arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument that the chat template never uses, and so would have no effect."""
    if not arguments:
        return
    try:
        known = meta.find_undeclared_variables(_parse_template(template))
    except TemplateSyntaxError:
        return  # rendering raises it
    known -= {*TEMPLATE_NAMES}
    for argument in arguments:
        if argument in known:
            continue
        near = get_close_matches(argument, known, 3, 0.4) or sorted(known)
        has = f"it has {', '.join(near)}" if near else "it has none"
        raise ConfigError(
            f"template_arguments: the chat template of {name!r} has no argument {argument!r}; {has}"
        )


def read_template(template: str) -> str:
    """Reads a chat template: a file, or the built-in "plain" one."""
    if template == "plain":
        return families.PLAIN_TEMPLATE
    try:
        return Path(template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the chat template {template!r} ({first_line(error)}); "
            'give a .jinja file, or "plain"'
        ) from None


def end_ids(name: str, generation: Any, tokenizer: Any, rows: int) -> list[int]:
    """Tokens that end a completion: the generation config's, or the tokenizer's.

    Raises ConfigError where there are none, or one is outside the `rows` of the vocabulary.
    """
    ends = generation.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    wrong = [i for i in ends if type(i) is not int or not 0 <= i < rows]
    if wrong or not ends:
        found = "no eos_token_id" if ends in ([], [None]) else f"eos_token_id {wrong[0]!r}"
        raise ConfigError(
            f"{name} has {found}, and valid ids are 0 to {rows - 1}: no completion would end; set eos_token_id in its "
            "generation_config.json to the ids of the tokens that end a turn"
        )
    return ends


def missing_row_message(name: str, tokenizer: Any, i: int, rows: int) -> str:
    """The error message for a token without a row in the model's embedding."""
    return (
        f"token {tokenizer.convert_ids_to_tokens(i)!r} {i} has no row in the {rows} of {name}; give the "
        "tokenizer that the model was trained with, or resize the model (resize_token_embeddings)"
    )
