"""The published pairs: configs that load, models that are what they say, tasks that exist."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from evals.scoring import Tasks
from tests.snippets import module_of
from vlopd.config.input import load_config
from vlopd.models import families

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = CONFIGS / "pairs"
LOCAL = ("builtin-text", "emoji", "shapes-early", "smollm2")
"""Pairs whose models are at hand: they need no architecture file."""

PUBLISHED = sorted(path for path in PAIRS.glob("*.toml") if path.stem not in LOCAL)
ROW = re.compile(r"\| `([^`]+/[^`]+)` \| ([\d,]+) \| ([\d,]+) \|")
COUNTS = {
    name: (int(computed.replace(",", "")), int(published.replace(",", "")))
    for name, computed, published in ROW.findall((PAIRS / "README.md").read_text())
}
"""By model, from the table in configs/pairs/README.md: parameters computed and published."""


script = module_of("scripts/predict_pairs.py")
LINE, predicted = script.LINE, script.predicted
NUMBER = r"\d[\d,]*\.?\d*"
PREDICTED_IN_SUITE = ("qwen2.5-vl-3b-noisyrollout",)
"""Of which the suite computes the prediction again; of the others with the slow tests."""


def models_of(path: Path) -> set[str]:
    """The models that a pair names, its student under its own name."""
    config = load_config(path)
    teachers = {t.model for t in config.teachers.values() if not t.is_student}
    return {config.student.model, *teachers}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_config_loads_and_is_called_as_its_file(path):
    """Each file under configs/ is valid, and its run folder will have its name (a part of the study: study-NAME)."""
    part_of = "study-" if path.parent.name == "study" else ""
    assert load_config(path).name == part_of + path.stem


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_every_model_of_a_pair_is_in_the_table_and_has_an_architecture(path):
    """No pair names a model that cannot be built without a hub."""
    for name in models_of(path):
        assert name in COUNTS
        assert (PAIRS / "architectures" / name / "config.json").is_file()


def test_no_architecture_is_left_over():
    """The table, the architecture files and the pairs name the same models."""
    files = {
        str(path.parent.relative_to(PAIRS / "architectures"))
        for path in PAIRS.glob("architectures/*/*/config.json")
    }
    assert files == set(COUNTS) == set().union(*map(models_of, PUBLISHED))


@pytest.mark.parametrize("name", COUNTS)
def test_an_architecture_gives_the_published_number_of_parameters(name):
    """Built on the meta device, it has exactly the computed number, within 2 % of the published one."""
    config = AutoConfig.from_pretrained(PAIRS / "architectures" / name)
    model_class, _ = families.auto_classes(config)
    with torch.device("meta"):
        count = model_class.from_config(config).num_parameters()
    computed, published = COUNTS[name]
    assert count == computed
    assert count == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_student_and_teacher_differ_in_padding_rows_alone(path):
    """Output layers of one pair differ by a few rows; two vocabularies would differ by far more."""
    rows = [
        AutoConfig.from_pretrained(PAIRS / "architectures" / name).get_text_config().vocab_size
        for name in models_of(path)
    ]
    assert max(rows) - min(rows) < 1000


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if p.stem in PREDICTED_IN_SUITE else pytest.mark.slow, id=p.stem)
        for p in PUBLISHED
    ],
)
def test_the_predicted_memory_and_time_are_those_of_check(path):
    """The comment of a pair has what `vlopd check --meta --device-like` predicts now, and the settings fit the card."""
    written = LINE.search(path.read_text())
    assert written, "scripts/predict_pairs.py writes it"
    computed = predicted(path, written[1].lower())
    assert re.sub(NUMBER, "#", written[0]) == re.sub(NUMBER, "#", computed)
    numbers = [
        [float(n.replace(",", "")) for n in re.findall(NUMBER, line.split(":", 1)[1])]
        for line in (written[0], computed)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.03)
    assert "fit" not in computed


def test_every_task_of_a_pair_exists():
    """The tasks that the published pairs are scored on exist under these names; reasoning is averaged over the samples
    that the papers take."""
    configs = [load_config(path) for path in PUBLISHED]
    manager = Tasks.of(sorted({task for config in configs for task in config.eval.tasks}))
    for config in configs:
        manager.refuse_unknown_names(config.eval)
        if "vlopd_aime24" in config.eval.tasks:
            assert config.eval.sampled.n in (8, 16)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_decides_the_numbers_says_where_it_comes_from(path):
    """Every setting of rollout, optimizer and length has its base, or `unpublished`, beside it."""
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif section in ("rollout", "optim", "train") and re.match(r"(?!type)\w+ = ", line):
            assert " # " in line, line
