"""`extends`: a config over another file's."""

import pytest

from vlopd.config.input import load_config
from vlopd.errors import ConfigError

BASE = """
name = "base"
title = "The base"
student = "builtin:shapes-text-student"
teacher = "builtin:shapes-text-teacher"
[data]
type = "shapes"
modality = "text"
[train]
steps = 7
prompts_per_step = 4
[masks]
top = {type = "top_fraction", of = "full", fraction = 0.1}
"random-0.3" = {type = "random", like = "top", seeds = [1, 2]}
[arms]
base = {type = "base"}
full = {type = "distill", seed = 1}
subnetwork = {type = "distill", mask = "top"}
"random-0.3" = {type = "distill", mask = "random-0.3"}
"""


@pytest.fixture
def write(tmp_path):
    """(file name, text) -> its path; the file base.toml is there."""

    def write(name: str, text: str):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    write("base.toml", BASE)
    return write


def test_a_file_is_merged_over_the_chain_that_it_extends(write):
    """Tables are merged key by key, a section of another type is replaced, names with dots can be removed."""
    write(
        "middle.toml",
        'extends = "base.toml"\nname = "middle"\n[optim]\ntype = "sgd"\nmomentum = 0.5',
    )
    path = write(
        "more/leaf.toml",
        'extends = "../middle.toml"\nname = "leaf"\nremove = ["masks.random-0.3", "arms.random-0.3"]\n'
        "[train]\nprompts_per_step = 3\n[arms.full]\nseed = 5",
    )
    config = load_config(path, ["train.save_every=2"])
    assert (config.name, config.title) == ("leaf", "")  # neither is inherited
    assert list(config.arms) == ["base", "full", "subnetwork"] and list(config.masks) == ["top"]
    assert config.arms["full"].seed == 5 and config.optim.momentum == 0.5
    assert (config.train.steps, config.train.prompts_per_step, config.train.save_every) == (7, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "base.toml"', "name is missing; with that of base.toml"),
        ('name = "x"\nextends = "not.toml"', "no config file .*not.toml"),
        ('name = "x"\nextends = 3', "extends must name a file"),
        ('name = "x"\nextends = "bad.toml"', "leads back to itself: bad.toml <- bad.toml"),
        ('name = "x"\nextends = "base.toml"\nremove = ["arms.no"]', "base.toml has no 'arms.no'"),
        ('name = "x"\nextends = "base.toml"\nremove = "arms"', "remove must be a list"),
        ('name = "x"\nremove = ["arms"]', "remove: only with extends"),
        ('name = "x"\nextends = "base.toml"\nremove = ["masks.top"]', "'top', which is not among"),
    ],
)
def test_what_cannot_be_extended_is_one_line(write, text, message):
    """A cycle, a missing file or key, and a shared run folder are refused by name."""
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write("bad.toml", text))
    assert "\n" not in str(error.value)
