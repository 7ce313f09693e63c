"""Questions on capitals: split by country, scored by the name, and no answer in the question."""

import pytest
from countryinfo import all_countries
from lm_eval.tasks import TaskManager, get_task_dict

from evals.scoring import TASKS
from evals.tasks import capitals as task
from vlopd.data import capitals
from vlopd.data.answers import normalise
from vlopd.data.capitals import CapitalsDataset

SPLITS = ("train", "validation", "test")


def test_splits_share_no_country_and_no_capital():
    """Every country is in one split; each split has enough of them for an error bar."""
    for part in ("name", "capital"):
        sets = [{getattr(c, part) for c in capitals.of_split(split)} for split in SPLITS]
        assert sum(map(len, sets)) == len(set.union(*sets)) == len(capitals.countries())
        assert min(map(len, sets)) >= 20


def test_the_splits_are_these():
    """The split hangs on the name alone: moving a country would spoil earlier results."""
    split = {country.name: capitals.split_of(country) for country in capitals.countries()}
    assert split["Poland"] == split["Venezuela"] == "test"
    assert split["Switzerland"] == split["Canada"] == "train"
    assert split["Germany"] == split["Zambia"] == "validation"


def test_no_question_holds_its_answer():
    """Repeating the question names no capital, and those of Djibouti, Mexico and Panama are not asked for."""
    for split in SPLITS:
        for row in capitals.every_question(split):
            assert not capitals.mentions_capital(row["question"], row["capital"]), row["question"]
    names = {country.name for country in capitals.countries()}
    assert not names & {"Djibouti", "Singapore", "Mexico", "Panama", "El Salvador", "Guinea-Bissau"}


def test_every_overlap_of_name_and_capital_is_removed():
    """None of the sixteen countries of the package's table whose name and capital share a word is asked about."""
    asked = {country.name for country in capitals.countries()}
    overlapping = {
        entry.name()
        for entry in all_countries()
        if isinstance(entry.capital(), str)
        and set(normalise(entry.capital()).split()) & set(normalise(entry.name()).split())
    }
    assert {"Djibouti", "Singapore", "Guatemala", "Kuwait", "Luxembourg", "Monaco"} <= overlapping
    assert len(overlapping) == 16 and not overlapping & asked


def test_former_countries_are_not_asked_about():
    """Of entries that share a capital one is left: Serbia, not Serbia and Montenegro; Myanmar, not Burma."""
    names = {country.name for country in capitals.countries()}
    assert {"Serbia", "Myanmar", "Jamaica"} <= names
    assert not names & {"Serbia and Montenegro", "Burma", "Norfolk Island"}


@pytest.mark.parametrize(
    ("said", "capital", "right"),
    [
        ("The capital of Peru is Lima.", "Lima", True),
        ("LIMA", "Lima", True),
        ("It is Limassol.", "Lima", False),
        ("Bogota, of course", "Bogotá", True),
        ("It is Yaounde.", "Yaoundé", True),
        ("Yaound\u00e9 and Yaounde\u0301", "Yaoundé", True),
        ("Kiev is the capital", "Kyiv", True),
        ("Port au Prince", "Port-au-Prince", True),
        ("NDjamena", "N'Djamena", True),
        ("Sana\u2019a", "Sana'a", True),
        ("Saint George's", "St. George's", True),
        ("Washington, D.C.", "Washington D.C.", True),
        ("in Washington", "Washington D.C.", True),
        ("Buenos", "Buenos Aires", False),
        ("Aires Buenos", "Buenos Aires", False),
        ("", "Lima", False),
    ],
)
def test_a_capital_is_named_in_whole_words(said, capital, right):
    """Case, accents and punctuation do not count; parts of words and of names do not suffice; known aliases do."""
    assert capitals.mentions_capital(said, capital) is right


def test_aliases_are_of_capitals_that_are_asked_for():
    """No alias is dead, and none is the capital of another country."""
    known = {country.capital for country in capitals.countries()}
    assert capitals.ALIASES.keys() <= known
    others = {alias for aliases in capitals.ALIASES.values() for alias in aliases}
    assert not {normalise(a) for a in others} & {normalise(c) for c in known}


def test_examples_depend_on_split_seed_and_index_alone():
    """The same index gives the same question whatever the size and the order of asking; another seed another stream."""
    long, short = CapitalsDataset("train", 100, 3), CapitalsDataset("train", 5, 3)
    assert [e.id for e in short] == [long[i].id for i in range(5)]
    assert [e.question for e in short] == [long[i].question for i in range(5)]
    assert len(short) == 5 and len(list(short)) == 5
    assert len({e.id for e in long}) == 100
    other = [e.question for e in CapitalsDataset("train", 100, 4)]
    assert [e.question for e in long] != other


def test_training_asks_its_own_countries_all_kinds_of_questions():
    """Only training countries, every kind among them, and the answer is the fact that was asked for."""
    examples = list(CapitalsDataset("train", 400, 0))
    names = {country.name for country in capitals.of_split("train")}
    assert {e.fields["country"] for e in examples} == names
    assert {e.fields["kind"] for e in examples} == set(capitals.TEMPLATES)
    assert all(e.answer == e.fields[e.fields["kind"]] and not e.images for e in examples)
    share = sum(e.fields["kind"] == "capital" for e in examples) / len(examples)
    assert 0.5 < share < 0.7


def test_the_task_asks_every_held_out_country_in_every_way():
    """lm-eval's documents: all templates for all countries of the split, clustered by country; ids are unique."""
    for name, split in (("capitals", "test"), ("capitals_validation", "validation")):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        loaded = get_task_dict([name], manager)[name]
        docs = list(loaded.test_docs())
        assert {doc["country"] for doc in docs} == {c.name for c in capitals.of_split(split)}
        assert len({doc["id"] for doc in docs}) == len(docs)
        ways = len(capitals.TEMPLATES["capital"])
        assert len(docs) == ways * len({doc["cluster"] for doc in docs})
        assert loaded.doc_to_text(docs[0]) == docs[0]["question"]
        assert loaded.doc_to_target(docs[0]) == docs[0]["capital"]


def test_scoring_and_chance():
    """A right name scores 1, another 0, and no capital at all is no answer; chance is one in all capitals."""
    docs = task.dataset("test")["test"].to_list()
    other = next(doc["capital"] for doc in docs if doc["capital"] != docs[0]["capital"])
    for said, right, failed in (
        (docs[0]["capital"], 1.0, 0.0),
        (other, 0.0, 0.0),
        ("Atlantis", 0.0, 1.0),
    ):
        scores = task.process_results(docs[0], [f"It is {said}."])
        assert scores == {"capital_named": right, "extraction_failure": failed}
    levels = task.chance(docs)
    assert levels["all"] == pytest.approx(1 / len({c.capital for c in capitals.countries()}))
    assert levels.keys() == {"all", *(doc["kind"] for doc in docs)}
