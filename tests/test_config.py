"""Configs: strict, with errors that name the key and the nearest known one."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.conftest import recipe_of
from vlopd.config.experiment import ExperimentConfig, explain
from vlopd.config.input import load_config
from vlopd.errors import ConfigError
from vlopd.files import read_json
from vlopd.run.folder import RunFolder
from vlopd.train.checks import lower

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
    (tmp_path / "arms" / ".unfinished-0123456789abcdef").mkdir(parents=True)  # as a kill leaves it
    RunFolder.create(tmp_path, config).unlock()
    assert not list(tmp_path.rglob(".unfinished-*"))
    with pytest.raises(ConfigError, match=r"train\.steps: \d+ -> 3"):
        RunFolder.create(tmp_path, load_config(QUICKSTART, ["train.steps=3"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_comes_back_from_json(path):
    """run.json's lists and numbers give the same config again."""
    config = load_config(path)
    assert ExperimentConfig.model_validate(json.loads(config.model_dump_json())) == config


CONTEXT = "teacher={model='student', context={type='system', text='x'}, ema=0.5}"
MIXED = "teacher={type='mixed', teachers={a='A', b='B'}, weights={a=1, b=1}}"
REWARD = ["reward={rule='exact_match'}", "rollout.completions_per_prompt=8"]
MUON = ["optim={type='muon'}", "masks={}", "arms={full={type='distill'}}"]
NUMBERS: dict[str, list[str]] = {
    "optim.learning_rate": [], "optim.weight_decay": [], "optim.max_grad_norm": [],
    "optim.eps": [], "optim.component_rates.vision": [], "optim.betas": [],
    "optim.momentum": ["optim={type='sgd'}"], "optim.alpha": ["optim={type='rmsprop'}"],
    "optim.adamw_learning_rate": MUON, "optim.adamw_eps": MUON,
    "rollout.temperature": [], "rollout.top_p": [],
    "rollout.source.data": ["rollout.source={type='mixture', student=0.5}"],
    "loss.student_temperature": [], "loss.teacher_temperature": [],
    "loss.beta": ["loss={type='jsd'}"], "loss.alpha": ["loss={type='skew_forward_kl'}"],
    "loss.clip": ["loss={type='k1'}"], "reward.alpha": REWARD, "reward.clip": REWARD,
    "teacher.ema": [CONTEXT], "teacher.weights.b": [MIXED],
    "arms.e.factor": ["arms.e={type='extrapolate', of='full'}"],
    "masks.top.fraction": [], "masks.e.share": ["masks.e={type='energy'}"],
    "masks.v.atol": ["masks.v={type='visible'}"], "masks.v.rtol": ["masks.v={type='visible'}"],
    "masks.p.rank_fraction": ["masks.p={type='principal', fraction=0.1}"],
    "geometry.ratios": [], "geometry.max_exact_cost": [], "geometry.max_left_out": [],
    "eval.confidence": [], "eval.margin": [], "eval.sampled.temperature": [], "eval.sampled.top_p": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "value", ["inf", "-inf", "nan", "1e-300", "1e300", "5e-324", "true", "'3'"]
)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_finite_and_sensible(key, value):
    """No setting takes NaN, infinity, what vanishes or overflows where it is used, a truth value or a text."""
    written = {"optim.betas": f"[0.9, {value}]", "geometry.ratios": f"[0.1, {value}]"}
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [*NUMBERS[key], f"{key}={written.get(key, value)}"])
    assert f": {key}" in str(error.value) or f"with {key.partition('.')[2]} = " in str(error.value)


def test_all_numbers_are_tried():
    """The table above has every float of the configuration."""

    def floats(cls):
        for name, field in cls.model_fields.items():
            if "float" in str(field.annotation):
                yield name
            for section in sections(field.annotation):
                yield from floats(section)

    def sections(annotation):
        if isinstance(annotation, type):
            return [annotation] if hasattr(annotation, "model_fields") else []
        return [each for part in getattr(annotation, "__args__", ()) for each in sections(part)]

    tried = {key.split(".")[-1] for key in NUMBERS} | {
        "projector", "language", "embedding", "head", "adamw_betas", "student", "teacher", "weights",
    }  # fmt: skip
    assert set(floats(ExperimentConfig)) <= tried


@pytest.mark.parametrize("value", ["true", "1.5", "2.0", "'3'", "-1", str(10**30), "[1]", "inf"])
@pytest.mark.parametrize(
    "key",
    ["train.steps", "arms.full.seed", "masks.random-0.seed", "eval.limit", "optim.warmup_steps"],
)
def test_a_whole_number_is_one(key, value):
    """Counts and seeds are integers of a sensible size, not what could be converted to one."""
    with pytest.raises(ConfigError, match=f": {key}: "):
        load_config(QUICKSTART, [f"{key}={value}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["geometry.ratios=[0.1, 0.1]"], "geometry.ratios: 0.1 is given twice"),
        (["geometry.ratios=[0]"], r"geometry.ratios.0: 0.0 is not between"),
        (["geometry.ratios=[1]"], r"geometry.ratios.0: 1.0 is not between"),
        (["geometry.arms=['full', 'full']"], "geometry.arms: 'full' is given twice"),
        (["eval.tasks=['shapes', 'shapes']"], "eval.tasks: 'shapes' is given twice"),
        (["eval.tasks=['']"], "eval.tasks.0: String should have at least 1"),
        (["student=''"], "student.model: String should have at least 1"),
        (["masks.a={type='complement', mask='a'}"], "masks.a: leads back to itself"),
        (
            ["masks.a={type='union', masks=['b', 'top']}", "masks.b={type='complement', mask='a'}"],
            "masks.a: leads back to itself by a <- b",
        ),
        (
            ["train.freeze=['vision', 'projector', 'language', 'embedding', 'head']"],
            "train: freeze names all of .*: nothing is left to train",
        ),
        (["train.keep_steps=[121]"], "keep_steps has 121, but there are steps = 120"),
        (
            ["arms.less={type='distill', train={steps=5}}", "train.keep_steps=[20]"],
            "arms.less: train",
        ),
        (["masks.r={type='random', like='top', seeds=[7, 7]}"], "seeds = .7, 7. has a seed twice"),
        (["masks.r={type='random', like='top', seed=100}"], "masks.r is masks.random-0 again"),
        (["masks.TOP={type='magnitude', fraction=0.1}"], "'top' and 'TOP' differ only by case"),
        (["arms.FULL={type='base'}"], "'full' and 'FULL' differ only by case"),
        (["arms.con={type='base'}"], "arms.con.*no file name on every system"),
        (["arms.images={type='base'}"], "arms.images"),
        (['arms.".."={type="base"}'], "String should match pattern"),
        (["arms.x={type='distill', loss={student_temperature=inf}}"], "arms.x: loss.student_temp"),
        (["eval.chat_template=1"], "eval.chat_template: .* valid boolean, not 1"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, message):
    """Values that repeat, name themselves, leave nothing to do or cannot be files are refused with the key."""
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)


def test_a_warm_up_beyond_the_end_is_said():
    """A rate that never reaches what the config says is noted, in the log and the arm's record."""
    assert not recipe_of(load_config(QUICKSTART)).notes
    (note,) = recipe_of(load_config(QUICKSTART, ["train.steps=5"])).notes
    assert "optim.warmup_steps = 10 of train.steps = 5" in note


def test_a_run_of_refused_settings_is_one_clear_line(tmp_path):
    """A run.json that an older version took, with what is now refused, is an error with file and key."""
    RunFolder.create(tmp_path, load_config(QUICKSTART)).unlock()
    written = read_json(tmp_path / "run.json")
    written["config"]["rollout"]["temperature"] = 1e-300
    (tmp_path / "run.json").write_text(json.dumps(written))
    (tmp_path / "checksums" / "run.sha256").unlink()  # older versions wrote none
    with pytest.raises(
        ConfigError, match=r"run\.json: rollout\.temperature: 1e-300 is not between"
    ):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"contrasts": ["full - random"]}}, "'full - random' needs an arm whose mask is of type \"random\""),
        ({"optim": {"weight_decay": 1e38}}, "optim.weight_decay: 1e+38"),
        ({"optim": {"component_rates": {"language": 1e38}}}, "optim.component_rates.language: 1e+38"),
        ({"loss": {"student_temperature": 2.0}}, "loss.type is missing; it is one of reverse_kl, forward_kl"),
        ({"masks": {"m": {"fraction": 0.1}}}, "masks.m.type is missing; it is one of visible"),
        ({"geometry": {"arms": [], "nulls": [{"rank": 3}]}}, "geometry.nulls.0.type is missing; it is one of gaussian"),
    ],
)  # fmt: skip
def test_settings_that_would_come_to_nothing(sections, message, make_config):
    """Contrasts without their arms, rates that only overflow, sections without a type: the key and the remedy."""
    with pytest.raises(ValidationError) as error:
        make_config("llm", **sections)
    assert message in "; ".join(map(explain, error.value.errors()))


def test_a_very_high_rate_is_left_to_the_loop(make_config):
    """A learning rate is as wide as float32; the loop says what it led to."""
    assert make_config("llm", optim={"learning_rate": 1e38}).optim.learning_rate == 1e38
    assert "weight_decay" in lower(1e-3, 1e6)
    assert "learning_rate" in lower(1e38, 0.0)
