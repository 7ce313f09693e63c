"""Configs: strict, with errors that name the key and the nearest known one."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from tests.conftest import recipe_of
from vlopd.config.analysis import GeometryConfig
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.explain import explain_errors
from vlopd.config.input import load_config, merged, value_of
from vlopd.config.masks import MaskConfig
from vlopd.errors import ConfigError
from vlopd.files import read_json
from vlopd.run.folder import RunFolder
from vlopd.train.checks import lower

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.toml"))
QUICKSTART = Path(__file__).parent / "configs" / "three_randoms.toml"


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.source='source'", "rollout.source.type: must be one of 'student', "),
        ("precision.compute='fp8'", "precision.compute: must be one of 'auto', 'fp32', 'bf16'; got 'fp8'"),
        ("masks.top.fraction='x'", "masks.top.fraction: must be a number; got 'x'"),
        ("arms.full.optim={type='adam'}", "arms.full: optim.type: must be one of 'adamw', "),
        ("geometry.nulls=[{type='low_rank', rank=0}]", "geometry.nulls.0.rank: must be greater than 0"),
        ("masks.m={type='energy'}", "masks.m.share is missing"),
        ("train.steps=true", "train.steps: must be an integer; got True"),
        ("eval.tasks='shapes'", "eval.tasks: must be a list; got 'shapes'"),
        ("arms=[]", "arms: must be a table"),
        ("masks=3", "masks: must be a table; got 3"),
    ],
)  # fmt: skip
def test_errors_are_in_the_users_words(override, message):
    """An error has the key path without a union tag, and a plain phrase."""
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    assert str(error.value).startswith(f"{QUICKSTART}: {message}")


def test_values_of_earlier_versions_are_read(capsys):
    """`source` of an arm and of the stored precision is read as `base` and `auto`, with a line each."""
    old = load_config(QUICKSTART, ["arms.base.type='source'", "precision.stored='source'"])
    said = capsys.readouterr().err
    assert 'arms.base.type = "source" is now "base"' in said
    assert 'precision.stored = "source" is now "auto"' in said
    assert old == load_config(QUICKSTART) and not capsys.readouterr().err


def test_errors_of_a_section_alone_have_its_keys():
    """Errors of a single section or union have paths and nearest keys relative to that section."""
    with pytest.raises(
        ConfigError, match=r"^geometry: nulls\.0\.rank: must be greater than 0; got 0$"
    ):
        value_of(GeometryConfig, merged({}, ["nulls=[{type='low_rank', rank=0}]"]), "geometry")
    with pytest.raises(ConfigError, match=r"^geometry: unknown key 'null_drawss'; did you mean"):
        value_of(GeometryConfig, merged({}, ["null_drawss=1"]), "geometry")
    with pytest.raises(ValidationError) as error:
        TypeAdapter(MaskConfig).validate_python({"type": "energy", "share": 2.0})
    assert explain_errors(error.value, MaskConfig).startswith("share: must be between")


def test_overrides_reach_what_they_name():
    """Dotted TOML lines override the file; a bare word is a string."""
    config = load_config(QUICKSTART, ["optim.learning_rate=2e-4", "name=other", "arms.full.seed=9"])
    assert (config.optim.learning_rate, config.name, config.arms["full"].seed) == (2e-4, "other", 9)


def test_overrides_hold_together():
    """Those of one section hold for its new `type`, in any order; none is dropped for a later one."""
    lines = ["optim.learning_rate=2e-4", "optim.type='sgd'"]
    for order in (lines, lines[::-1]):
        optim = load_config(QUICKSTART, order).optim
        assert (optim.type, optim.learning_rate) == ("sgd", 2e-4)
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.betas'"):
        load_config(QUICKSTART, ["optim.betas=[0.5, 0.5]", "optim.type='sgd'"])


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path):
    """No file, or one that is not TOML, is refused with its path."""
    with pytest.raises(ConfigError, match=r"no config file .*nope\.toml"):
        load_config(tmp_path / "nope.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        load_config(tmp_path / "bad.toml")


def test_a_run_folder_grows_but_for_its_student(tmp_path):
    """With the same config it is the same run; another config joins it, and the one before its history; another student
    or stored precision is refused with the difference, and changes nothing."""
    config = load_config(QUICKSTART)
    RunFolder.create(tmp_path, config).unlock()
    RunFolder.create(tmp_path, config).unlock()
    (tmp_path / "arms" / ".unfinished-0123456789abcdef").mkdir(parents=True)  # as a kill leaves it
    RunFolder.create(tmp_path, config).unlock()
    assert not list(tmp_path.rglob(".unfinished-*"))
    assert read_json(tmp_path / "run.json")["history"] == []
    grown = load_config(QUICKSTART, ["train.steps=3", "title=more"])
    run = RunFolder.create(tmp_path, grown)
    assert [line.split(": ")[0] for line in run.changes] == ["train.steps", "title"]
    run.unlock()
    about = read_json(tmp_path / "run.json")
    assert about["config"]["train"]["steps"] == 3
    (before,) = about["history"]
    assert ExperimentConfig.model_validate(before["config"]) == config and before["versions"]
    for line in ("student.model='elsewhere'", "student.revision=x", "precision.stored=fp32"):
        with pytest.raises(ConfigError, match=f"another student.*{line.split('=')[0]}: "):
            RunFolder.create(tmp_path, load_config(QUICKSTART, [line]))
    assert read_json(tmp_path / "run.json") == about


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
    "loss.advantage": ["loss={type='constant_advantage'}"], "loss.clip": ["loss={type='k1'}"],
    "loss.tokens.fraction": ["loss.tokens={by='position'}"], "reward.alpha": REWARD, "reward.clip": REWARD,
    "teacher.ema": [CONTEXT], "teacher.weights.b": [MIXED],
    "train.teacher_cache_gb": [], "teacher.engine.timeout_seconds": ["teacher.engine={type='vlopd'}"],
    "teacher.engine.start_seconds": ["teacher.engine={type='vllm', url='http://x'}"],
    "rollout.engine.tolerance": ["rollout.engine={type='vllm', url='http://x'}"],
    "arms.e.factor": ["arms.e={type='extrapolate', of='full'}"],
    "arms.m.scale": ["arms.m={type='merge', of=['full']}"],
    "arms.m.density": ["arms.m={type='merge', of=['full'], method='ties'}"],
    "masks.top.fraction": [], "masks.e.share": ["masks.e={type='energy'}"],
    "masks.v.atol": ["masks.v={type='visible'}"], "masks.v.rtol": ["masks.v={type='visible'}"],
    "masks.p.rank_fraction": ["masks.p={type='principal', fraction=0.1}"],
    "geometry.ratios": [], "geometry.max_exact_cost": [], "geometry.max_left_out": [],
    "geometry.equal_ratio": [], "geometry.equal_difference": [],
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
        (["geometry.ratios=[0]"], r"geometry.ratios.0: must be between"),
        (["geometry.ratios=[1]"], r"geometry.ratios.0: must be between"),
        (["geometry.arms=['full', 'full']"], "geometry.arms: 'full' is given twice"),
        (["eval.tasks=['shapes', 'shapes']"], "eval.tasks: 'shapes' is given twice"),
        (["eval.tasks=['']"], "eval.tasks.0: must have at least 1 character"),
        (["student=''"], "student.model: must have at least 1 character"),
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
        (["arms.con={type='base'}"], "arms.con.*not a valid file name on every system"),
        (["arms.images={type='base'}"], "arms.images"),
        (['arms.".."={type="base"}'], "must match"),
        (["arms.x={type='distill', loss={student_temperature=inf}}"], "arms.x: loss.student_temp"),
        (["eval.chat_template=1"], "eval.chat_template: must be true or false; got 1"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, message):
    """Values that repeat, name themselves, leave nothing to do or cannot be files are refused with the key."""
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)


# ------------------------------------------------------------------------------------------ roles

DATA = "rollout={source='data'}, loss={type='nll'}"
LOW = [
    "masks.low={type='magnitude', fraction=0.05}",
    "arms.low={type='distill', mask='low', role='control'}",
]
BINNED = [
    "masks.binned={type='random', like='top', seed=5, match='magnitude'}",
    "arms.binned={type='distill', mask='binned'}",
]


def trained_roles(*overrides: str) -> dict[str, str]:
    roles = load_config(QUICKSTART, overrides).roles.of
    return {arm: role for arm, role in roles.items() if role in ("full", "replicate", "variant")}


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ([], {"full": "full"}),
        (["arms.full.loss={type='jsd'}"], {"full": "full"}),  # own sections, but the only one
        (["arms.b={type='distill', seed=7}"], {"full": "full", "b": "replicate"}),
        (["arms.b={type='distill', loss={type='jsd'}}"], {"full": "full", "b": "variant"}),
        ([f"arms.full={{type='distill', {DATA}}}", "arms.b={type='distill', loss={type='jsd'}}"],
         {"full": "variant", "b": "full"}),  # SFT is full only where nothing else could be
        ([f"arms.full={{type='distill', {DATA}}}"], {"full": "full"}),
        (["arms.b={type='distill', loss={type='jsd'}, role='full'}"], {"full": "variant", "b": "full"}),
        (["arms.b={type='distill', seeds=[3, 4], loss={type='jsd'}, role='full'}", "arms.full.role='variant'"],
         {"full": "variant", "b-0": "full", "b-1": "replicate"}),
        (["arms.b={type='distill', seed=7, train={save_every=7}}"], {"full": "full", "b": "replicate"}),
        (["arms.full.role='variant'"], {"full": "variant"}),
        (["arms.b={type='checkpoint', model='m', role='full'}"], {"full": "variant", "b": "full"}),
    ],
)  # fmt: skip
def test_roles_are_said_or_follow_without_a_doubt(overrides, roles):
    """Full is the arm that says so, else the one without own sections, else the only one; what differs from it in the
    seed alone is a replicate, and the rest are variants."""
    assert trained_roles(*overrides) == roles


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arms.full.loss={type='jsd'}", "arms.b={type='distill', loss={type='k1'}}"],
         r"arms\.full and arms\.b could each be the full arm .*loss\.type jsd -> k1; give .* role = \"full\""),
        (["arms.full.role='full'", "arms.b={type='distill', optim={learning_rate=1e-4}, role='full'}"],
         r"arms\.full and arms\.b both have role = \"full\" and differ in optim\.learning_rate 0\.0003 -> 0\.0001"),
        (["arms.b={type='distill', loss={type='jsd'}, role='replicate'}"],
         r"arms\.b: role = \"replicate\" .* loss\.type reverse_kl -> jsd; give it role = \"variant\""),
        (["arms.full.role='variant'", "arms.b={type='distill', role='replicate'}"], "needs an arm with role"),
        (["arms.b={type='distill', role='subnetwork'}"], "under a mask; give it a mask"),
        (["arms.b={type='extrapolate', of='full', factor=2.0, role='control'}"], "under a mask; give it a mask"),
        (["arms.b={type='distill', role='base'}"], r"arms\.b\.role: .*'full', 'replicate'.*; got 'base'"),
        (["arms.b={type='checkpoint', model='m', role='base'}"], r"arms\.base and arms\.b are both the base"),
        (["eval.contrasts=['full - random']"], r"'full - random' needs an arm under a mask of type \"random\""),
        (["eval.contrasts=['full - nope']"], "eval.contrasts names 'nope'"),
        (["eval.contrasts=['full']"], '\'full\' is not "arm - arm"'),
        (["eval.contrasts=['full - full']"], "'full - full' compares an arm with itself"),
        (["eval.contrasts=['full - base', 'base - full']"], "'full - base' and 'base - full' are one comparison"),
        (["eval.contrasts=['subnetwork - random']", "arms.subnetwork.optim={learning_rate=1e-4}"],
         r"there is none \(random-0 is not pooled .* optim\.learning_rate 0\.0001 -> 0\.0003\)"),
        (["eval.contrasts=['subnetwork - random']", *BINNED],
         "use one of 'subnetwork - random, tensor-matched', 'subnetwork - random, \w+-matched'"),
    ],
)  # fmt: skip
def test_roles_that_are_in_doubt_are_refused(overrides, message):
    """Two arms that could each be full, roles that an arm cannot have, contrasts of what there is not: one line with
    the names and the remedy, when the config is read."""
    with pytest.raises(ConfigError, match=message) as error:
        load_config(QUICKSTART, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "groups", "apart"),
    [
        ([], [("random-0", "random-1", "random-2")], []),
        (["arms.random-1.seed=9"], [("random-0", "random-1", "random-2")], []),
        (["arms.random-1.optim={learning_rate=1e-4}"], [("random-0", "random-2")],
         [("random-1", "optim.learning_rate 0.0003 -> 0.0001")]),
        (["arms.random-1.train={steps=60}"], [("random-0", "random-2")], [("random-1", "train.steps 120 -> 60")]),
        (["arms.random-1.loss={type='jsd'}"], [("random-0", "random-2")],
         [("random-1", "loss.type reverse_kl -> jsd")]),
        (["arms.random-1.train={save_every=7}"], [("random-0", "random-1", "random-2")], []),
        (LOW, [("random-0", "random-1", "random-2"), ("low",)], []),
        (BINNED, [("random-0", "random-1", "random-2"), ("binned",)], []),
        (["masks.random-2.like='random-0'"], [("random-0", "random-1", "random-2")], []),
        (["arms.random-0={type='transplant', of='full', mask='random-0'}"],
         [("random-1", "random-2"), ("random-0",)], []),
    ],
)  # fmt: skip
def test_controls_are_pooled_where_only_the_draw_differs(overrides, groups, apart):
    """Controls are averaged where they agree with the arm that they control in all but mask and seed, and with each
    other in the rule of the mask; one that does not is named with what differs."""
    roles = load_config(QUICKSTART, overrides).roles
    assert [group.arms for group in roles.controls] == groups
    assert [(its.arm, its.differences[0]) for its in roles.unpooled] == apart


def test_a_contrast_may_be_of_any_two_arms():
    """Variants, controls and pooled controls of any kind can be declared, and are the comparison that they name."""
    declared = [
        "random-0 - random-1",
        "subnetwork - random",
        "subnetwork - low-magnitude",
        "base - low",
    ]
    roles = load_config(QUICKSTART, [*LOW, f"eval.contrasts={declared}"]).roles
    randoms = ("random-0", "random-1", "random-2")
    expected = [
        ("random-0", "random-1"),
        ("subnetwork", randoms),
        ("subnetwork", ("low",)),
        ("base", "low"),
    ]
    assert [roles.contrast(text) for text in declared] == expected


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
    (tmp_path / "checksums" / "run.sha256").unlink()  # as a kill may leave it
    with pytest.raises(
        ConfigError, match=r"run\.json: rollout\.temperature: must be between .*; got 1e-300"
    ):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"contrasts": ["full - random"]}}, "'full - random' needs an arm under a mask of type \"random\""),
        ({"optim": {"weight_decay": 1e38}}, "optim.weight_decay: must be 0 or between"),
        ({"optim": {"component_rates": {"language": 1e38}}}, "optim.component_rates.language: must be between"),
        ({"loss": {"student_temperature": 2.0}}, "loss.type is missing; it is one of reverse_kl, forward_kl"),
        ({"masks": {"m": {"fraction": 0.1}}}, "masks.m.type is missing; it is one of visible"),
        ({"geometry": {"arms": [], "nulls": [{"rank": 3}]}}, "geometry.nulls.0.type is missing; it is one of gaussian"),
    ],
)  # fmt: skip
def test_settings_that_would_come_to_nothing(sections, message, make_config):
    """Contrasts without their arms, rates that only overflow, sections without a type: the key and the remedy."""
    with pytest.raises(ValidationError) as error:
        make_config("llm", **sections)
    assert message in explain_errors(error.value, ExperimentConfig)


def test_a_very_high_rate_is_left_to_the_loop(make_config):
    """A learning rate is as wide as float32; the loop says what it led to."""
    assert make_config("llm", optim={"learning_rate": 1e38}).optim.learning_rate == 1e38
    assert "weight_decay" in lower(1e-3, 1e6)
    assert "learning_rate" in lower(1e38, 0.0)


def test_a_type_given_later_keeps_the_table():
    """`optim.type=...` over a table without a type keeps its other keys; one that does not fit is refused by name."""
    sections = {
        "name": "x",
        "student": "s",
        "teacher": "t",
        "data": {"type": "shapes"},
        "arms": {"base": {"type": "base"}},
        "train": {"steps": 1, "prompts_per_step": 1},
        "optim": {"learning_rate": 0.5},
        "geometry": {"arms": []},
    }
    assert load_config(sections, ["optim.type='sgd'"]).optim.learning_rate == 0.5
    with pytest.raises(ConfigError, match=r"optim\.betas"):
        load_config({**sections, "optim": {"betas": [0.9, 0.9]}}, ["optim.type='sgd'"])
