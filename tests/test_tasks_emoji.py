"""Recognition of emoji: another artist, other concepts, on four drawings of ours in the packages' layout."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from PIL import Image

from evals.scoring import TASKS
from evals.tasks import emoji as task
from vlopd.config.data import EmojiData
from vlopd.data import emoji
from vlopd.data.emoji import Emoji, EmojiDataset
from vlopd.data.load import load_data
from vlopd.errors import ConfigError, DataError

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_emoji.py"
CATEGORY = {word: category for category, word in emoji.GROUPS.items()}


def named(split: str, start: str) -> str:
    """The first of `start`a, `start`b, ... that falls into the split."""
    names = (f"{start}{chr(97 + k)}" for k in range(26))
    return next(name for name in names if emoji.split_of(Emoji(name, "", "", "")) == split)


FOOD, ANIMAL = named("train", "food_"), named("test", "animal_")
COLOURS = {"twitter": (250, 0, 0), "google": (0, 0, 250)}


def entry(short_name: str, category: str, order: int, google: bool = True) -> dict:
    return {
        "short_name": short_name,
        "name": short_name.upper(),
        "category": category,
        "image": f"1f{order}.png",
        "sort_order": order,
        "has_img_twitter": True,
        "has_img_google": google,
    }


@pytest.fixture
def drawings(tmp_path, monkeypatch) -> Path:
    """Two concepts by two artists, and two that are not asked about: a face, and one that Google never drew."""
    entries = [
        entry(ANIMAL, CATEGORY["nature"], 2),
        entry(FOOD, CATEGORY["food"], 1),
        entry("grin", "Smileys & Emotion", 3),
        entry("old", CATEGORY["food"], 4, google=False),
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    for artist, colour in COLOURS.items():
        folder = tmp_path / "img" / artist / "64"
        folder.mkdir(parents=True)
        for each in entries[:2]:
            Image.new("RGBA", (6, 6), (*colour, 255)).save(folder / each["image"])
    monkeypatch.setenv("VLOPD_EMOJI", str(tmp_path))
    return tmp_path


def test_only_concepts_of_both_artists_are_asked_about(drawings):
    """In Unicode's order, with one word for the group."""
    assert emoji.every_emoji(drawings) == (
        Emoji(FOOD, FOOD.upper(), "food", "1f1.png"),
        Emoji(ANIMAL, ANIMAL.upper(), "nature", "1f2.png"),
    )


def test_numbered_names_are_one_concept():
    """`cat` and `cat2` are in the same split, and so are the clocks."""
    for names in (("cat", "cat2"), [f"clock{hour}" for hour in range(1, 13)]):
        assert len({emoji.split_of(Emoji(name, "", "", "")) for name in names}) == 1


def test_training_shows_one_artist_and_its_own_concepts(drawings):
    """Only Twitter's drawings of training concepts; the same index is the same drawing."""
    examples = list(EmojiDataset("train", 8, 1))
    assert {e.fields["short_name"] for e in examples} == {FOOD}
    assert {e.images[0].getpixel((0, 0)) for e in examples} == {COLOURS["twitter"]}
    assert {e.answer for e in examples} == {"food"}
    assert [e.fields for e in examples[:3]] == [e.fields for e in EmojiDataset("train", 3, 1)]


def test_training_on_other_artists_is_asked_for(drawings):
    """`artists` adds Google's drawings, of the training concepts still; the default leaves run folders as they were."""
    data = EmojiData(artists=("twitter", "google"))
    shown = list(load_data(data, 12, 1))
    assert {e.images[0].getpixel((0, 0)) for e in shown} == set(COLOURS.values())
    assert {e.fields["artist"] for e in shown} == set(COLOURS)
    assert {e.fields["short_name"] for e in shown} == {FOOD}
    assert [e.id for e in load_data(EmojiData(), 12, 1)] == [e.id for e in shown]
    assert "artists" in data.model_dump() and "artists" not in EmojiData().model_dump()


def test_the_task_asks_what_training_never_shows(drawings):
    """The other artist's training concepts, the same artist's test concepts, and both; clustered by concept."""
    rows = emoji.held_out("test")
    asked = [(row["kind"], row["artist"], row["short_name"]) for row in rows]
    assert asked == [
        ("artist", "google", FOOD),
        ("concept", "twitter", ANIMAL),
        ("both", "google", ANIMAL),
    ]
    trained = {(e.fields["artist"], e.fields["short_name"]) for e in EmojiDataset("train", 20)}
    assert not trained & {its[1:] for its in asked}
    assert [row["cluster"] for row in rows] == [FOOD, ANIMAL, ANIMAL]
    assert rows[1]["digest"] != rows[2]["digest"]
    assert emoji.held_out("validation") == []


def test_chance_is_the_commonest_training_group(drawings):
    """Who always says food is right for the training concept alone."""
    levels = task.chance(emoji.held_out("test"))
    assert levels == {"all": pytest.approx(1 / 3), "artist": 1.0, "concept": 0.0, "both": 0.0}


class ByColour(LM):
    """Finds red pictures likeliest to be nature and blue ones to be food; a model of what looks at nothing else."""

    MULTIMODAL = True

    def loglikelihood(self, requests, disable_tqdm=False):
        found = []
        for prompt, choice, visual in (request.args for request in requests):
            assert prompt == "<image>" + emoji.QUESTION
            red = visual["visual"][0].getpixel((0, 0)) == COLOURS["twitter"]
            found.append((0.0 if choice.strip() == ("nature" if red else "food") else -1.0, False))
        return found

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def test_through_lm_eval(drawings):
    """Every question is asked with its own artist's drawing, and the likeliest choice is scored."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(ByColour(), tasks=["emoji"], task_manager=manager, bootstrap_iters=1)
    samples = {row["doc"]["kind"]: row for row in results["samples"]["emoji"]}
    assert {kind: row["acc"] for kind, row in samples.items()} == {
        "artist": 1.0,  # blue, food
        "concept": 1.0,  # red, nature
        "both": 0.0,  # blue, yet nature
    }
    assert all(row["target"] == row["doc"]["answer"] for row in samples.values())


def test_missing_drawings_are_one_line(tmp_path, drawings, monkeypatch):
    """A folder without drawings names the script; one drawing gone is named."""
    (drawings / "img" / "google" / "64" / "1f2.png").unlink()
    with pytest.raises(DataError, match=rf"emoji '{ANIMAL}': no .*1f2\.png; run scripts/download"):
        task.dataset("test")
    (drawings / "img" / "twitter" / "64" / "1f2.png").write_text("not an image")
    with pytest.raises(DataError, match=rf"emoji '{ANIMAL}': .*1f2\.png is not an image") as error:
        emoji.open_drawing(emoji.every_emoji(drawings)[1], "twitter")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("VLOPD_EMOJI", str(tmp_path / "nowhere"))
    for ask in (lambda: task.dataset("test"), lambda: EmojiDataset("train", 1)[0]):
        with pytest.raises(
            ConfigError, match=r"no emoji\.json in .*nowhere: run .*download_emoji\.py"
        ):
            ask()


@pytest.fixture
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("download_emoji", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_keeps_what_is_needed(script, tmp_path):
    """Of a package: the table and the artist's small drawings; no sheets, no other artist, nothing outside."""
    archive = tmp_path / "package.tgz"
    names = [
        "package/emoji.json",
        "package/img/twitter/64/1f35f.png",
        "package/img/twitter/sheets/64.png",
        "package/img/apple/64/1f35f.png",
        "package/img/twitter/64/../../../../outside.png",
        "outside.png",
    ]
    with tarfile.open(archive, "w:gz") as members:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            members.addfile(info, io.BytesIO(name.encode()))
    script.extract(archive, "twitter", tmp_path / "out")
    kept = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert kept == {"emoji.json", "img/twitter/64/1f35f.png"}
    assert not (tmp_path / "outside.png").exists()


def test_the_script_refuses_another_archive(script, tmp_path):
    """One byte more than what we know, and nothing is unpacked."""
    archive = tmp_path / "package.tgz"
    archive.write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"package\.tgz has SHA-512 .*; nothing was kept"):
        script.check(archive, script.SHA512["google"])


@pytest.mark.skipif(not Path(emoji.DEFAULT).is_dir(), reason="needs scripts/download_emoji.py")
def test_the_real_drawings():
    """857 concepts of five groups, by two artists; every split has all groups, and every drawing opens."""
    every = emoji.every_emoji(Path(emoji.DEFAULT))
    assert len(every) == 857
    for split in ("train", "validation", "test"):
        assert {e.group for e in emoji.of_split(split)} == set(emoji.GROUPS.values())
    for each in every[::40]:
        for artist in ("twitter", "google"):
            assert emoji.open_drawing(each, artist).size == (64, 64)
