"""Configs: strict, with errors that name the key and the nearest known one."""

from pathlib import Path

import pytest

from vlopd.checkpoint import RunFolder
from vlopd.config import ConfigError, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.toml"))
QUICKSTART = CONFIGS[[p.name for p in CONFIGS].index("quickstart.toml")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    """Each file under configs/ is valid and names itself."""
    assert load_config(path).name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1e-3", "did you mean 'learning_rate'"),
        ("arms.full.sed=3", "did you mean 'seed'"),
        ("nam='x'", "did you mean 'name'"),
        ("train.steps=0", r"train\.steps: .*greater than 0"),
        ("loss.type='nope'", "reverse_kl"),
        ("arms.x={type='distill', seed=1, mask='nope'}", "'nope', which is not among"),
        ("geometry.arms=['nope']", "'nope', which is not among"),
        ("masks.top.of='subnetwork'", "needs itself"),
        ("masks.random-0.like='random-0'", "leads back to itself"),
        ("no equals sign", "has no '='"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(override, message):
    """Unknown keys, bad values, dangling names and circles are refused by name."""
    with pytest.raises(ConfigError, match=message) as error:
        load_config(QUICKSTART, [override])
    assert "\n" not in str(error.value)


def test_overrides_reach_what_they_name():
    """Dotted TOML lines override the file; a bare word is a string."""
    config = load_config(QUICKSTART, ["optim.learning_rate=2e-4", "name=other", "arms.full.seed=9"])
    assert (config.optim.learning_rate, config.name, config.arms["full"].seed) == (2e-4, "other", 9)


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path):
    """No file, or one that is not TOML, is refused with its path."""
    with pytest.raises(ConfigError, match=r"no config file .*nope\.toml"):
        load_config(tmp_path / "nope.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        load_config(tmp_path / "bad.toml")


def test_a_run_folder_refuses_another_config(tmp_path):
    """Opening a folder with a changed config shows what differs; with the same config it is the same run."""
    config = load_config(QUICKSTART)
    RunFolder.create(tmp_path, config).unlock()
    RunFolder.create(tmp_path, config).unlock()
    (tmp_path / "arms" / ".unfinished-x").mkdir(parents=True)  # as a kill leaves it
    RunFolder.create(tmp_path, config).unlock()
    assert not list(tmp_path.rglob(".unfinished-*"))
    with pytest.raises(ConfigError, match=r"train\.steps: \d+ -> 3"):
        RunFolder.create(tmp_path, load_config(QUICKSTART, ["train.steps=3"]))
