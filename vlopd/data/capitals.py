"""Questions on the capitals of the world's countries, from the table of the package countryinfo.

Countries are split by name, so a test country never occurs in training; training can restore the answer
format and knowledge that the student still has. Training also asks about continents and the country of a
capital. Left out: places of less than half a million people, countries whose capital repeats their name
(copying the question would be right), and all but the first of those that share a capital (the table holds
former countries beside their successors). The capitals are the table's: some are disputed or outdated,
equally for every evaluated model.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import dataclass
from typing import NamedTuple

from countryinfo import all_countries

from vlopd.data.answers import mentions_any, normalise
from vlopd.data.synthetic import Split, SyntheticDataset
from vlopd.types import Example

TEMPLATES = {
    "capital": (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "What is the name of {country}'s capital city?",
    ),
    "country": ("{capital} is the capital of which country?",),
    "continent": ("On which continent is {country}?",),
}
"""Questions by kind; evaluation uses the first kind only, each of its templates for every country."""

SHORT = " Answer in one short sentence."

MIN_POPULATION = 500_000

OBSOLETE = ("Hong Kong",)
"""Entries with an obsolete capital."""

ALIASES = {
    "Bern": ("Berne",),
    "Chișinău": ("Kishinev",),
    "Colombo": ("Kotte", "Sri Jayawardenepura Kotte"),
    "Kyiv": ("Kiev",),
    "Lobamba": ("Mbabane",),
    "Naypyidaw": ("Nay Pyi Taw",),
    "New Delhi": ("Delhi",),
    "Nur-Sultan": ("Astana",),
    "Pretoria": ("Cape Town", "Bloemfontein"),
    "Sucre": ("La Paz",),
    "Ulaanbaatar": ("Ulan Bator",),
    "Washington D.C.": ("Washington",),
}
"""Further accepted names and capitals."""


class Country(NamedTuple):
    """A row of the table, e.g. ("Peru", "Lima", "Americas")."""

    name: str
    capital: str
    continent: str


def mentions_capital(text: str, capital: str) -> bool:
    """Whether the text contains the capital, under any of its names, as whole words."""
    return mentions_any(text, (capital, *ALIASES.get(capital, ())))


@functools.lru_cache(maxsize=1)
def countries() -> tuple[Country, ...]:
    """All countries of the data set, sorted by name."""
    kept: dict[str, Country] = {}
    for entry in all_countries():
        name, capital, continent = entry.name(), entry.capital(), entry.region()
        if not isinstance(capital, str) or not continent:
            continue
        if (entry.population() or 0) < MIN_POPULATION:
            continue
        echoes = set(normalise(capital).split()) & set(normalise(name).split())
        if capital and not echoes and name not in OBSOLETE:
            kept.setdefault(normalise(capital), Country(name, capital, continent))
    return tuple(sorted(kept.values()))


def split_of(country: Country) -> Split:
    """Split by a hash of the name: two fifths train, one fifth validation, two fifths test."""
    share = int(hashlib.sha256(country.name.encode()).hexdigest(), 16) % 5
    return "train" if share < 2 else "validation" if share == 2 else "test"


@functools.lru_cache
def of_split(split: Split) -> tuple[Country, ...]:
    return tuple(country for country in countries() if split_of(country) == split)


def _question_row(country: Country, kind: str, template: int) -> dict[str, str]:
    """One question as a plain row: kind, question, answer, country, capital, continent."""
    about = {"country": country.name, "capital": country.capital, "continent": country.continent}
    question = TEMPLATES[kind][template].format(**about) + SHORT
    return {"kind": kind, "question": question, "answer": about[kind], **about}


def every_question(split: Split) -> list[dict[str, str]]:
    """Every question on a capital of a split, country by country."""
    return [
        {"id": f"capitals-{split}-{country.name}-{k}", **_question_row(country, "capital", k)}
        for country in of_split(split)
        for k in range(len(TEMPLATES["capital"]))
    ]


@dataclass(frozen=True)
class CapitalsDataset(SyntheticDataset):
    """Questions of one split, drawn with replacement; example `i` depends on (split, seed, i) alone.

    Every template is equally likely, so three questions of five ask for a capital.
    """

    def __getitem__(self, index) -> Example:  # type: ignore[override]
        rng = random.Random(f"capitals {self.split} {self.seed} {index}")
        country = rng.choice(of_split(self.split))
        kind, template = rng.choice([(k, i) for k, ts in TEMPLATES.items() for i in range(len(ts))])
        row = _question_row(country, kind, template)
        return Example.ask(
            id=f"capitals-{self.split}-{self.seed}-{index}",
            question=row["question"],
            answer=row["answer"],
            fields={**row, "aliases": ALIASES.get(row["capital"], ())},
        )
