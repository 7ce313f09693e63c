"""Functions of the user's own: those of docs/plugins.md as printed, what is refused, and what is recorded."""

import json
import re
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from tests.command import call
from tests.conftest import recipe_of
from vlopd import distributed
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.explain import explain_errors
from vlopd.config.input import config_of
from vlopd.config.masks import FunctionMask
from vlopd.config.models import FunctionContext
from vlopd.config.objective import FunctionLoss, LossConfig, RewardConfig
from vlopd.config.recipe import ArmRecipe, Recipe
from vlopd.config.training import COLUMNS
from vlopd.data.load import load_data, pick
from vlopd.errors import DataError, PluginError
from vlopd.files import read_json, read_jsonl
from vlopd.loop import distill
from vlopd.masks.files import load_mask
from vlopd.masks.rules import build_mask
from vlopd.pipeline import find_problems
from vlopd.plugins import Plugin, Use
from vlopd.plugins import call as call_plugin
from vlopd.train.checks import TrainingError
from vlopd.train.loss_formulas import divergence
from vlopd.train.losses import Sampled, token_divergence
from vlopd.train.metrics import summarise
from vlopd.train.rewards import reward
from vlopd.train.rollouts import collect
from vlopd.train.teacher_context import teacher_view
from vlopd.types import Example, TensorName
from vlopd.weights.delta import TensorDelta

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
BLOCK = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)
ASKED = Example.ask("q", "what is at top-left", answer="red circle")


def write_examples(folder: Path) -> None:
    """Writes the files that docs/plugins.md prints."""
    for name, text in BLOCK.findall(PAGE.read_text()):
        (folder / name).write_text(text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------ as documented


def test_the_pages_examples_run_and_are_recorded(here, monkeypatch, capsys):
    """Every function of docs/plugins.md, as printed, in one run: announced, used, recorded with its file's digest; a
    changed file outdates the arms and masks that were made with it, and `verify` lists it."""
    write_examples(here)
    code, out = call(monkeypatch, capsys, "run", "config.toml", "--until", "arms")
    assert code == 0, out
    for key, name in {
        "data": "sources:colours",
        "loss": "losses:blend",
        "teacher.context": "contexts:answered",
        "reward.rule": "rewards:brief",
        "train.metrics.0": "metrics:words",
        "masks.grown": "rules:signs",
    }.items():
        file = f"{name.partition(':')[0]}.py"
        assert (
            f"plug-in: {key} = {name}, from {file} (sha256 {Plugin.of(name).digest()[:12]})" in out
        )
    run = here / "runs" / "plugins"
    rows = read_jsonl(run / "arms" / "full" / "metrics.jsonl")
    of_engines = {"sent_bytes", "engine_gap", "rollout_lag", "synchronise_seconds"}
    assert set(rows[0]) == {*COLUMNS, "words"} - of_engines
    assert all(0 < row["words"] <= 8 for row in rows)
    mask, about = load_mask(run / "masks" / "grown.safetensors")
    assert 0 < sum(int(m.sum()) for m in mask.values()) < sum(m.numel() for m in mask.values())
    assert about["inputs"]["plugins"] == {"rules:signs": Plugin.of("rules:signs").digest()}
    inputs = read_json(run / "arms" / "full" / "record.json")["inputs"]
    assert set(inputs["plugins"]) == {
        "sources:colours", "losses:blend", "contexts:answered", "rewards:brief", "metrics:words"
    }  # fmt: skip
    samples = read_jsonl(run / "arms" / "full" / "samples.jsonl")
    assert all(row["id"].startswith("colours-") for row in samples)

    (here / "rules.py").write_text((here / "rules.py").read_text() + "\n# changed\n")
    code, out = call(monkeypatch, capsys, "verify", run)
    assert code == 0 and "input changed: masks/grown.json: plugins.rules:signs" in out
    assert "arms/full" not in out
    (here / "metrics.py").write_text("def words(example, completion):\n    return nothing\n")
    code, out = call(monkeypatch, capsys, "run", "config.toml", "--until", "arms")
    assert code == 2
    assert "arms/full (inputs changed: plugins.metrics:words)" in out
    assert "metrics:words fails on example 'colours-" in out and "(metrics.py, line 2)" in out
    assert "NameError: name 'nothing' is not defined" in out


# ----------------------------------------------------------------------------------------- refused

WRONG = {
    "no module": (None, "no module 'mine': neither .*mine.py nor an installed one"),
    "no function": ("def rewarded(e, c): pass", "no function 'reward' in mine.py; did you mean 'rewarded'?"),
    "not callable": ("reward = 3", "it is a int, not a function"),
    "import": ("import math\nmath.sqrt(-1)", r"importing .* fails: ValueError: .* \(mine.py, line 2\)"),
    "missing import": ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
    "syntax": ("def reward(e, c) 1", r"SyntaxError: .*\(mine.py, line 1\)"),
    "exit": ("import sys\nsys.exit(3)", "fails: SystemExit: 3"),
    "signature": ("def reward(example): pass", r"its signature \(example\) does not fit the call reward\(example, "),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_unusable_function_is_one_clear_line(what, here):
    """No module, function or import, and a signature that does not fit, are refused with key, name and reason."""
    text, message = WRONG[what]
    if text is not None:
        (here / "mine.py").write_text(text)
    with pytest.raises(PluginError, match=message) as error:
        Use("reward.rule", Plugin.of("mine:reward"), ("example", "completion")).check()
    assert str(error.value).startswith("reward.rule = mine:reward: ")
    assert "\n" not in str(error.value)


def test_a_misspelt_argument_has_the_nearest_name(here):
    """An argument that the function lacks is refused with its nearest argument or setting."""
    (here / "mine.py").write_text("def mine(student, teacher, alpha=1.0): pass")
    for wrong, near in {"alpa": "alpha", "suport": "support"}.items():
        loss = FunctionLoss.model_validate({"type": "mine:mine", wrong: 1})
        with pytest.raises(PluginError, match=f"argument '{wrong}'; did you mean '{near}'"):
            loss.use("loss").check()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"type": "nope"}, """loss.type: must be one of 'reverse_kl', .* or "module:function"; got 'nope'"""),
        ({"type": "my/losses.py:f"}, "loss.type: must be \"module:function\", as in 'my.losses:f'"),
        ({"type": 3}, "loss.type: must be one of"),
        ({"type": "a:b", "support": {"type": "full", "k": 3}}, "unknown key 'loss.support.k'"),
        ({"type": "a:b", "alpha": float("nan")}, "loss: argument 'alpha' must be text, finite numbers"),
        ({"type": "jsd", "betta": 1}, "unknown key 'loss.betta'; did you mean 'beta'"),
    ],
)  # fmt: skip
def test_errors_of_such_sections_are_in_the_users_words(table, message):
    """Also beside functions, errors have the keys that the user wrote."""
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"train": {"steps": 1, "prompts_per_step": 1}, "loss": table})
    assert re.search(message, explain_errors(error.value, Recipe))


@pytest.mark.parametrize("name", ["loss", "seconds", "<lambda>"])
def test_a_metric_does_not_replace_a_column(name):
    """A metric whose name is a column of metrics.jsonl, or no name, is refused."""
    metric = {"<lambda>": lambda example, completion: 1.0}.get(name, f"metrics:{name}")
    with pytest.raises(ValidationError, match=f"the column '{name}' of metrics.jsonl"):
        Recipe.model_validate(
            {"train": {"steps": 1, "prompts_per_step": 1, "metrics": [metric]}}
        )  # fmt: skip


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**400, None, "1", [1.0], torch.ones(2)]
)
def test_a_reward_is_a_finite_number(value):
    """Another value is refused with the function and the example; numbers of numpy and torch are taken."""
    config = RewardConfig(rule=lambda example, completion: value)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"<lambda> returned .* on example 'q'; it must return a"):
        reward(config, [ASKED], ["x"])
    for fine in (True, 2, torch.tensor(0.5)):
        config = RewardConfig(rule=lambda example, completion, fine=fine: fine)  # type: ignore[arg-type]
        assert reward(config, [ASKED], ["x"]).tolist() == [float(fine)]


LOGPROBS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda q, p: (q - p).mean(),
            "a floating-point tensor .3., the loss of each token in nats",
        ),
        (lambda q, p: [1.0] * 3, r"returned \[1.0, 1.0, 1.0\]"),
        (lambda q, p: (q.detach() - p).sum(-1), "without a gradient"),
        (lambda q, p: q.sum(-1) + p.clamp_(min=-5).sum(-1), "changes its inputs in place"),
        (lambda q, p: q[:, 7], r"IndexError: .*\(test_plugins.py, line \d+\)"),
    ],
    ids=["mean", "list", "detached", "in place", "raises"],
)
def test_a_loss_of_the_wrong_kind_is_refused(function, message):
    """A loss has a value for every token, with a gradient, and leaves its inputs as they are."""
    loss = FunctionLoss(type=Plugin.of(function))
    with pytest.raises(PluginError, match=message):
        divergence(loss, LOGPROBS.clone().requires_grad_(), LOGPROBS.clone())


def pairs() -> list[TensorDelta]:
    shapes = {"a.weight": (2, 3), "b.weight": (4,)}
    return [
        TensorDelta(TensorName(name, "language", 0, name[0]), torch.zeros(shape), torch.ones(shape))
        for name, shape in shapes.items()
    ]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([True], "must return {parameter: bool tensor"),
        ({"a.weigt": torch.ones(2, 3).bool()}, "no parameter; did you mean 'a.weight'"),
        ({"a.weight": torch.ones(2, 3)}, "on a.weight; it must return"),
        ({"a.weight": torch.ones(6).bool()}, r"of shape \[6\] for a.weight, which is \[2, 3\]"),
    ],
)
def test_a_mask_is_of_the_parameters(found, message):
    """A mask of other names, types or shapes is refused; a parameter that is left out has no coordinate."""
    with pytest.raises(PluginError, match=message):
        build_mask(FunctionMask(type=Plugin.of(lambda pairs: found)), pairs())
    some = FunctionMask(type=Plugin.of(lambda pairs: {"b.weight": torch.ones(4).bool()}))
    assert {n: int(m.sum()) for n, m in build_mask(some, pairs()).items()} == {
        "a.weight": 0,
        "b.weight": 4,
    }


def test_data_and_contexts_give_examples(here):
    """What is no sequence, no Example, or has images where the section or the messages have none, is refused."""
    (here / "mine.py").write_text(
        "from PIL import Image\nfrom vlopd.types import Example\n"
        "def texts(size, seed): return ['a'] * size\n"
        "def lazily(size, seed): return (x for x in ())\n"
        "def seen(size, seed): return [Example.ask('s', 'x', (Image.new('RGB', (4, 4)),))]\n"
        "def view(example, blank=True): return Example('v', example.messages, (Image.new('RGB', (4, 4)),))\n"
    )

    def data(**table):
        return load_data(
            TypeAdapter(ArmRecipe.model_fields["data"].annotation).validate_python(table), 2, 1
        )

    with pytest.raises(PluginError, match="mine:texts returned 'a' on index 0"):
        data(type="mine:texts")[0]
    with pytest.raises(PluginError, match=r"must return a sequence of vlopd\.types\.Example"):
        data(type="mine:lazily")
    with pytest.raises(DataError, match=r"example 's' has images; set data\.images = true"):
        data(type="mine:seen")[0]
    assert data(type="mine:seen", images=True)[0].images
    with pytest.raises(DataError, match="has 1 images and 0 image parts"):
        teacher_view(FunctionContext(type=Plugin.of("mine:view")), ASKED)


def test_check_refuses_before_training(here, make_config):
    """`check` tries a loss on random log-probs and a reward on the first examples, and lists unusable ones alone."""
    (here / "mine.py").write_text(
        "def loss(q, p): return (q.exp() * (q - p)).sum(-1) * float('nan')\n"
        "def reward(example, completion): return example.fields['level']\n"
    )
    table = {"loss": {"type": "mine:loss"}}
    (line,) = find_problems(make_config("llm", **table), ["full"], False)
    assert line.startswith("loss = mine:loss: its value is not finite on random log-probs [2, ")
    table = {
        "reward": {"rule": "mine:reward"},
        "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2},
    }
    (line,) = find_problems(make_config("llm", **table), ["full"], False)
    assert line.startswith("mine:reward fails on example 'shapes-train-")
    assert line.endswith("KeyError 'level' (mine.py, line 2)")
    table["reward"]["rule"] = "mine:rewad"
    (line,) = find_problems(make_config("llm", **table), ["full"], False)
    assert line.endswith("no function 'rewad' in mine.py; did you mean 'reward'?")


# --------------------------------------------------------------------------------------------- used


def reverse_kl(student_logprobs, teacher_logprobs):
    weights = student_logprobs.exp()
    differences = (student_logprobs - teacher_logprobs).masked_fill(weights == 0, 0.0)
    return (weights * differences).sum(-1)


@pytest.mark.parametrize("tail", [None, "bucket", "renormalise", "none"])
def test_a_reverse_kl_of_ones_own_is_the_built_in_one(tail):
    """In value and gradient to rounding, in diagnostics bit for bit, at other temperatures and on every kind of
    support, with banned tokens."""
    draws = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 50, generator=draws) for _ in range(2))
    logits[:, 3] = teacher[:, 3] = -torch.inf
    more = {"student_temperature": 0.7, "teacher_temperature": 1.3}
    if tail is not None:
        more["support"] = {"type": "teacher_top_k", "k": 5, "tail": tail}
    found = []
    for kind in ("reverse_kl", reverse_kl):
        loss = TypeAdapter(LossConfig).validate_python({"type": kind, **more})
        student = logits.clone().requires_grad_()
        sampled = Sampled(torch.zeros(6, dtype=torch.long), torch.zeros(6))
        tokens = token_divergence(loss, student, teacher, sampled)
        tokens.loss.sum().backward()
        found.append([student.grad, *(x for x in tokens if x is not None)])
    (gradient, value, *columns), (own_gradient, own_value, *own_columns) = found
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(own_value, value, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(own_columns, columns, strict=True))


def length(example, completion):
    return len(completion) + example.id.endswith("1")


@pytest.mark.parametrize("size", [1, 3, None])
def test_a_metric_is_the_mean_over_the_steps_completions(size, make_pair, make_config, make_data):
    """However the step is split: the mean that is worked out by hand from all completions."""
    train = {"steps": 1, "prompts_per_step": 4, "micro_batch": size, "metrics": [length]}
    rollout = {"max_new_tokens": 6, "completions_per_prompt": 2}
    config = make_config("llm", rollout=rollout, train=train)
    pair = make_pair("llm")
    batches = collect(pair, recipe_of(config), pair.render(make_data("llm", 4)), range(4), 1, 0)
    every = [
        length(example, text)
        for batch in batches
        for example, text in zip(
            batch.examples, pair.student.decode(batch.completions, batch.prompts), strict=True
        )
    ]
    tokens = [
        pair.divergence(recipe_of(config).loss, b.examples, b.prompts, b.completions)
        for b in batches
    ]
    row = summarise(0, 1.0, 1.0, batches, tokens, 2, distributed.accelerator())
    assert row["length"] == sum(every) / 8


def test_functions_themselves_are_used_in_python(tmp_path, make_pair, make_config, make_data):
    """A lambda trains as the built-in rule of the same value does; functions are dumped by their names."""
    sections = {
        "rollout": {"max_new_tokens": 4, "completions_per_prompt": 2},
        "train": {"steps": 2, "prompts_per_step": 2, "metrics": (length,)},
    }
    found = []
    for rule in ("exact_match", lambda example, text: text.strip() == example.answer.strip()):
        base = recipe_of(make_config("llm", **sections))
        kept = {name: section for name, section in base if name not in ("data", "reward")}
        recipe = Recipe(**kept, reward={"rule": rule, "alpha": 0.5})
        data = make_data("llm", 2)
        trained = distill(make_pair("llm"), data, recipe, tmp_path / str(len(found)))
        found.append(trained.metrics.loss.tolist())
    assert found[0] == found[1]
    assert recipe.reward is not None
    assert json.loads(recipe.model_dump_json())["reward"]["rule"].endswith(".<lambda>")
    assert recipe.model_copy().train.metrics[0].load() is length


def test_an_arms_own_function_reaches_its_recipe(make_config):
    """Given in an arm's table, it is that arm's; a key alone changes an argument of the run's function."""
    arms = {
        "full": {"type": "distill"},
        "own": {"type": "distill", "loss": {"type": reverse_kl, "chunk_tokens": 7}},
        "other": {"type": "distill", "loss": {"alpha": 0.5}},
    }
    config = make_config(
        "llm", loss={"type": "losses:blend", "alpha": 0.3, "chunk_tokens": 9}, arms=arms
    )
    recipes = {name: recipe_of(config, name) for name in arms}
    own, other = recipes["own"].loss, recipes["other"].loss
    assert isinstance(own, FunctionLoss) and own.type.load() is reverse_kl
    assert isinstance(other, FunctionLoss)
    assert (other.type, other.arguments, other.chunk_tokens) == ("losses:blend", {"alpha": 0.5}, 9)
    assert [use.key for use in config.plugins_of(arms)] == [
        "loss",
        "arms.own.loss",
        "arms.other.loss",
    ]
    assert config.roles.of == {"full": "full", "own": "variant", "other": "variant"}
    again = config_of(json.loads(config.model_dump_json()), "run.json")
    assert recipe_of(again, "other") == recipes["other"]
    with pytest.raises(PluginError, match=r"no function 'f\.<locals>\.g' in ") as error:
        Use("loss", Plugin.of("tests.test_plugins:f.<locals>.g"), ()).check()
    assert "\n" not in str(error.value)


def test_a_changed_file_is_imported_again(here):
    """At a check, and only there: within a training a function stays as it was. Files beside it can be imported, and
    the working folder is not left on sys.path."""
    import sys

    before = list(sys.path)
    (here / "beside.py").write_text("TWO = 2.0")
    (here / "package").mkdir()
    (here / "package" / "mine.py").write_text("from beside import TWO\ndef f(e, c): return TWO")
    plugin = Plugin.of("package.mine:f")
    use, first = Use("reward.rule", plugin, ("e", "c")), plugin.digest()
    use.check()
    assert plugin.load()(0, 0) == 2.0
    (here / "package" / "mine.py").write_text("def f(e, c): return 3.0")
    assert plugin.load()(0, 0) == 2.0 and plugin.digest() != first
    use.check()
    assert plugin.load()(0, 0) == 3.0
    assert sys.path == before


def test_the_working_folder_stays(here):
    """A module or function that changes the working folder, or exits, does not move the run or end the process."""
    (here / "mine.py").write_text(
        "import os, sys\nos.chdir('/')\n"
        "def reward(e, c):\n    os.chdir('/')\n    return sys.exit(1) if c else 1.0\n"
    )
    plugin = Plugin.of("mine:reward")
    assert call_plugin(plugin, "x", ASKED, "") == 1.0 and Path.cwd() == here
    with pytest.raises(
        PluginError, match=r"mine:reward fails on x: SystemExit: 1 \(mine.py, line 5"
    ):
        call_plugin(plugin, "x", ASKED, "red")
    with pytest.raises(PluginError, match=r"; write mine:reward$"):
        Plugin.of("mine.py:reward").load()


def test_the_working_folder_comes_before_installed_modules(here, monkeypatch):
    """A file of the working folder is used though a module of its name is imported, which others keep."""
    import statistics

    (here / "statistics.py").write_text("def mean(example, completion): return 7.0")
    assert Plugin.of("statistics:mean").load()(0, 0) == 7.0
    assert __import__("statistics") is statistics and statistics.mean([1, 3]) == 2
    installed = Plugin.of("vlopd.train.rewards:exact_match")
    assert installed.load()(ASKED, "red circle") == 1.0 and installed.file.endswith("rewards.py")


def test_a_loss_that_is_not_finite_in_training_is_named(
    tmp_path, make_pair, make_config, make_data
):
    """The error at its step has the function and the examples."""
    loss = {"type": lambda q, p: reverse_kl(q, p) / 0}
    recipe = replace_loss(make_config("llm"), loss)
    with pytest.raises(TrainingError, match=r"shapes-train-.*check the loss .*<lambda>"):
        distill(make_pair("llm"), make_data("llm", 4), recipe, tmp_path / "out")


def replace_loss(config: ExperimentConfig, loss) -> Recipe:
    kept = {name: s for name, s in recipe_of(config) if name != "data"}
    return Recipe(**{**kept, "loss": loss})


def test_a_source_of_a_mixture(here):
    """A function is a source of a mixture beside the built-in ones, and is listed among the run's own functions."""
    write_examples(here)
    sources = {"own": {"type": "sources:colours"}, "shapes": {"type": "shapes", "modality": "text"}}
    mixture = {"type": "mixture", "sources": sources}
    sections = {"data": mixture, "teacher": "t", "train": {"steps": 1, "prompts_per_step": 4}}
    recipe = ArmRecipe.model_validate(sections)
    assert [use.key for use in recipe.plugins] == ["data.sources.own"]
    data = load_data(recipe.data, 40, 1)
    drawn = [example.id for example in pick(data, 0, 20, 1)]
    assert {name.partition("/")[0] for name in drawn} == {"own", "shapes"}, drawn
