"""The front door: the public names, a pair distilled in a dozen lines, and a run's results as data frames."""

import gc
import re
import shutil
import subprocess
import sys
from importlib import import_module

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vlopd
from evals.compare import compare
from evals.report.build import build_report
from tests.families.llms import LLMS
from tests.test_architecture import MODULES
from vlopd.api.masks import MaskTensors, read_mask
from vlopd.config.data import ShapesData
from vlopd.errors import ConfigError, RunError
from vlopd.models.load import load
from vlopd.models.parameter_names import classify
from vlopd.run.folder import RunFolder
from vlopd.types import Example

FRESH = """
import sys, vlopd
heavy = {"torch", "transformers", "pandas", "pydantic", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
assert set(vlopd.__all__) <= set(dir(vlopd))
try:
    vlopd.nope
except AttributeError as error:
    print(error)
"""
TRAIN = {"steps": 2, "prompts_per_step": 2, "sample_every": 1}


def test_import_is_light():
    """`import vlopd` loads no heavy library, lists its names, and refuses others."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'vlopd' has no attribute 'nope'\n"


def test_every_public_name_has_one_module():
    """The names of `__all__` are those of the table, each is defined in its module, and no module hides it."""
    assert sorted(vlopd._MODULES) == vlopd.__all__
    assert vlopd.__version__ == "0.1.0"
    for name in set(vlopd.__all__) - {"geometry", "evaluate", "compare"}:
        assert getattr(vlopd, name).__module__ == vlopd._MODULES[name]
    for module in MODULES.keys() - {"vlopd"}:
        assert module.removeprefix("vlopd.") not in vlopd.__all__, module


def test_a_recipe_names_the_mistaken_key():
    """A mistake in a section made in Python is one line with the key and the nearest known one."""
    assert vlopd.Recipe(train=TRAIN).train.steps == 2
    with pytest.raises(
        ConfigError,
        match=r"^Recipe: train\.steps is missing; .*'train\.stepz'; did you mean 'steps'",
    ):
        vlopd.Recipe(train={"stepz": 1, "prompts_per_step": 2})
    with pytest.raises(
        vlopd.UserError, match=r"^Recipe: data is not a section of a recipe; give load_data"
    ):
        vlopd.Recipe(train=TRAIN, data={"type": "shapes"})
    with pytest.raises(
        ConfigError, match=r"^ShapesData: modality: must be one of 'image', 'text'; got 'txt'$"
    ):
        ShapesData(modality="txt")


def test_a_config_may_be_a_table():
    """load_config takes the tables of a TOML file as a dict, which it does not change."""
    table = {
        "name": "x",
        "student": "a",
        "teacher": "b",
        "data": {"type": "shapes"},
        "train": dict(TRAIN),
        "arms": {"full": {"type": "distill", "seed": 1}},
    }
    config = vlopd.load_config(table, ["train.steps=7"])
    assert config.recipe_of(config.arms["full"]).train.steps == 7
    assert table["train"]["steps"] == 2
    with pytest.raises(ConfigError, match=r"^config: unknown key 'trian'; did you mean 'train'"):
        vlopd.load_config({**table, "trian": {}})


def test_data_of_all_sources_is_read_alike(tmp_path):
    """A list of dicts, a datasets.Dataset and a file of the same rows give the same examples, pictures included."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"q": "which colour", "a": 7, "picture": "red.png"}\n{"q": "and now", "a": null, "picture": []}\n'
    )
    pictures = [[Image.open(tmp_path / "red.png")], []]
    answers = ["7", None]
    rows = [
        {"q": q, "a": a, "picture": p}
        for q, a, p in zip(("which colour", "and now"), answers, pictures, strict=True)
    ]
    columns = {"question": "q", "answer": "a", "image": "picture"}
    found = [
        vlopd.load_data(source, **columns)
        for source in (str(tmp_path / "rows.jsonl"), rows, datasets.Dataset.from_list(rows))
    ]
    for data in found:
        assert [example.answer for example in data] == answers
        assert [len(example.images) for example in data] == [1, 0]
        assert data[0].messages == found[0][0].messages
        assert data[0].images[0].tobytes() == found[0][0].images[0].tobytes()
    assert len(vlopd.load_data(rows, size=1, **columns)) == 1
    assert repr(found[1]) == "FileDataset(rows: 2 examples)"
    with pytest.raises(
        ConfigError, match=r"rows has no column 'question'; it has \['q', 'a', 'picture'\]"
    ):
        vlopd.load_data(rows)
    with pytest.raises(ConfigError, match=r"row 0 \(from 0\) is a str, not a dict"):
        vlopd.load_data(["2 + 2"])


def test_built_in_data_by_name():
    """A built-in data set is a name with its section's settings, the same as its table and its section."""
    by_name = vlopd.load_data("shapes", modality="text", size=3, seed=5)
    table = vlopd.load_data({"type": "shapes", "modality": "text"}, size=3, seed=5)
    section = vlopd.load_data(ShapesData(), modality="text", size=3, seed=5)
    assert list(by_name) == list(table) == list(section) and len(by_name) == 3
    with pytest.raises(ConfigError, match="unknown key 'modallity'; did you mean 'modality'"):
        vlopd.load_data("shapes", modallity="text")
    with pytest.raises(ConfigError, match="size = 0"):
        vlopd.load_data("shapes", size=0)


def test_an_example_shows_itself():
    """In a notebook an example is its picture, question and answer, with markup escaped."""
    example = Example.ask("q<1>", "is 1 < 2", [Image.new("RGB", (4, 4))], "<yes>")
    shown = example._repr_html_()
    assert (
        'src="data:image/png;base64,' in shown and "is 1 &lt; 2" in shown and "&lt;yes&gt;" in shown
    )


def renamed(folder, out):
    """A copy of a checkpoint whose tensors have the names of another prefix, as older hub checkpoints do."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    other = {name.replace("model.", "", 1): t for name, t in tensors.items()}
    assert other.keys() != tensors.keys()
    save_file(other, out / "model.safetensors", {"format": "pt"})
    return out


def test_load_distill_mask_retrain(kind, folders, tmp_path):
    """Pair, recipe, data, delta, mask, retraining: masks hold to the bit, logs are frames, objects show themselves.

    The mask has the names of the student's checkpoint, which may differ from the parameters' in memory.
    """
    student = folders[kind, "student"]
    if kind == "llm":  # the vlm's file has other names already
        student = renamed(student, tmp_path / "student")
    teacher = {"model": str(folders[kind, "teacher"])}
    data = vlopd.load_data("shapes", modality="image" if kind == "vlm" else "text", size=20)
    recipe = vlopd.Recipe(train=TRAIN, optim={"learning_rate": 1e-3}, rollout={"max_new_tokens": 4})
    pair = vlopd.load_pair(student, teacher, compute="fp32", images=kind == "vlm")
    assert "58 shared tokens, float32 on cpu" in repr(pair) and len(repr(pair)) < 400
    full = vlopd.distill(pair, data, recipe)
    assert full.out.is_dir() and full.metrics.step.tolist() == [0, 1]
    assert {"question", "completion"} <= set(full.samples) and full.held_out.empty
    assert "2 steps" in repr(full) and "<svg" in full._repr_html_()
    assert [axes.get_xlabel() for axes in full.plot().axes] == ["optimizer step"] * 2

    update = vlopd.delta(student, full)
    frame = update.frame.set_index("tensor")
    assert len(frame) == len(update) and frame.parameters.sum() == full.trainable.total
    pairs = {pair.name: pair for pair in update}
    name = next(name for name in pairs if classify(name).module == "down")
    assert frame.changed[name] == int((pairs[name].delta != 0).sum()) > 0
    assert frame.delta_norm[name] == pytest.approx(float(pairs[name].delta.norm()))
    assert update.by_component().changed["all"] == frame.changed.sum()
    assert f"{len(update)} tensors" in repr(update) and "language" in update._repr_html_()

    with pytest.raises(ConfigError, match="was given to `distill` before"):
        vlopd.distill(pair, data, recipe)

    mask = vlopd.make_mask({"type": "top_fraction", "fraction": 0.1}, student, full)
    assert mask.density == pytest.approx(0.1, abs=0.01)
    assert mask.frame.selected.sum() == sum(int(m.sum()) for m in mask.values())
    pair = vlopd.load_pair(student, teacher, compute="fp32")
    sparse = vlopd.distill(pair, data, recipe, tmp_path / "sparse", seed=2, mask=mask)
    moved = {pair.name: pair.delta != 0 for pair in vlopd.delta(student, sparse)}
    assert any(bool(its.any()) for its in moved.values())
    assert not any(bool((its & ~mask[name]).any()) for name, its in moved.items())
    folder = full.out
    del full, update
    gc.collect()
    assert not folder.exists()


def test_a_trained_model_with_a_tied_head_is_saved_tied(tmp_path):
    """What is saved and loaded again computes what was trained, though the head is the embedding by another name."""
    LLMS["qwen3"](tmp_path / "student")
    pair = vlopd.load_pair(tmp_path / "student", compute="fp32")
    recipe = vlopd.Recipe(rollout={"source": "data"}, loss={"type": "nll"}, train=TRAIN)
    trained = vlopd.distill(pair, vlopd.load_data("shapes", modality="text", size=4), recipe)
    trained.save(tmp_path / "trained")
    assert "lm_head.weight" not in load_file(tmp_path / "trained" / "model.safetensors")
    ids = torch.arange(8)[None]
    again = load(str(tmp_path / "trained"), torch.float32).model
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pair.student.model(ids).logits)


@pytest.fixture(scope="module")
def whole():
    return vlopd.make_mask({"type": "whole", "modules": ["ffn"]}, "builtin:shapes-text-student")


def test_masks_of_masks_and_files(whole, tmp_path):
    """Rules combine masks by name or file without a checkpoint; a saved mask is read back with its provenance."""
    path = whole.save(tmp_path / "ffn.safetensors")
    again = read_mask(path)
    assert again.inputs == whole.inputs and all(torch.equal(again[n], whole[n]) for n in whole)
    random = vlopd.make_mask({"type": "random", "like": "ffn", "seed": 3}, masks={"ffn": whole})
    assert random.density == whole.density and random.inputs["base"] == whole.inputs["base"]
    rest = vlopd.make_mask({"type": "complement", "mask": str(path)})
    both = vlopd.make_mask({"type": "union", "masks": ["a", "b"]}, masks={"a": again, "b": rest})
    assert both.density == 1 and rest.density == pytest.approx(1 - whole.density)
    assert repr(rest).startswith("MaskTensors(complement: ") and "ffn" not in repr(rest)
    assert "down" in whole._repr_html_()
    plain = {name: marked.clone() for name, marked in whole.items()}
    with pytest.raises(RunError, match="base checkpoint is unknown"):
        vlopd.make_mask({"type": "complement", "mask": "m"}, masks={"m": plain}).save(
            tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        ({"type": "visible"}, {}, "reads checkpoints; give base and trained"),
        ({"type": "magnitude", "fraction": 0.1}, {}, "reads checkpoints; give base$"),
        ({"type": "visible"}, {"base": 1}, "reads the update; give base and trained"),
        ({"type": "whole", "modules": ["ffn"]}, {"base": 1, "trained": 1}, "leave out trained"),
        ({"type": "visible", "of": "full"}, {"base": 1, "trained": 1}, "names an arm of a run"),
        ({"type": "complement", "mask": "m"}, {}, "no mask 'm': there is no such file$"),
        ({"type": "visibel"}, {}, "rule: type: must be one of 'visible'"),
        ({"type": "union", "masks": ["a", "b"]}, {"masks": 1}, "belong to different models"),
    ],
)
def test_masks_that_cannot_be_made(rule, given, message):
    """A rule without what it reads, or with what it does not read, is refused with the remedy."""
    student = "builtin:shapes-text-student"
    given = {name: student for name in given if name != "masks"} | (
        {"masks": {"a": {"x": torch.ones(2).bool()}, "b": {"y": torch.ones(2).bool()}}}
        if "masks" in given
        else {}
    )
    with pytest.raises(vlopd.UserError, match=message):
        vlopd.make_mask(rule, **given)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A finished miniature run."""
    config = {
        "name": "mini",
        "student": str(folders["llm", "student"]),
        "teacher": str(folders["llm", "teacher"]),
        "precision": {"compute": "fp32"},
        "data": {"type": "shapes", "modality": "text"},
        "train": {"steps": 2, "prompts_per_step": 4, "sample_every": 1},
        "rollout": {"max_new_tokens": 4},
        "optim": {"learning_rate": 1e-3},
        "masks": {"top": {"type": "top_fraction", "fraction": 0.1}},
        "arms": {
            "base": {"type": "base"},
            "full": {"type": "distill"},
            "subnetwork": {"type": "distill", "mask": "top"},
        },
        "geometry": {"null_draws": 1, "ratios": [0.1]},
        "eval": {"tasks": ["shapes_text"], "limit": 8, "bootstrap_draws": 100},
    }
    return vlopd.Run(config, "train.steps=1", out=tmp_path_factory.mktemp("run") / "mini").run()


def test_a_run_as_frames(run):
    """A run opened from its folder has the results as tables, without a model being loaded or a file written."""
    before = {p: p.stat().st_mtime_ns for p in run.folder.root.rglob("*")}
    again = vlopd.Run(run.folder.root)
    assert again.config == run.config and again.config.train.steps == 1
    arms = again.arms.set_index("arm")
    assert arms.made.all() and (arms.evaluated == "yes").all()
    assert arms.role.to_dict() == {"base": "base", "full": "full", "subnetwork": "subnetwork"}
    assert arms.density["subnetwork"] == pytest.approx(0.1, abs=0.01)
    assert 0 < arms.changed_fraction["subnetwork"] <= arms.density["subnetwork"]
    assert again.masks["mask"].tolist() == ["top"]
    assert again.metrics("full").step.tolist() == [0] and len(again.samples("full")) == 4
    geometry = again.geometry
    assert set(geometry.arm) == {"full"} and {"value", "null", "null_mean", "p"} <= set(geometry)
    scores = again.scores.set_index("arm")
    assert set(scores.task) == {"shapes_text"} and (scores.n == 8).all()
    versus = again.contrasts.set_index(["a", "b"]).loc[("subnetwork", "full")]
    gap = scores["mean"]["subnetwork"] - scores["mean"]["full"]
    assert versus.difference == pytest.approx(gap) and versus.low <= gap <= versus.high
    assert again.verdict and again.report.is_file()
    assert (
        "3 of 3 arms made, with comparison" in repr(again) and "subnetwork" in again._repr_html_()
    )
    assert before == {p: p.stat().st_mtime_ns for p in run.folder.root.rglob("*")}


def test_a_finished_run_is_kept(run):
    """Running again makes nothing but the comparison and the report, which are derived, and reports a plan."""
    made, plans = [], []
    vlopd.Run(run.folder.root).run(
        on_artifact=lambda what, where, new: made.append((what, new)),
        on_plan=lambda folder, config, planned: plans.append(planned),
    )
    assert [what for what, new in made if new] == ["comparison", "report"]
    assert set(plans[0].values()) == {None}


@pytest.mark.parametrize(
    ("file", "reads"),
    [
        ("arms/full/metrics.jsonl", [lambda its: its.metrics("full")]),
        ("arms/full/record.json", [lambda its: its.arms, lambda its: its.scores]),
        ("evals/full/results.json", [lambda its: its.arms]),
        ("masks/top.json", [lambda its: its.masks]),
        ("geometry/full/geometry.csv", [lambda its: its.geometry]),
        ("compare.json", [lambda its: its.scores, lambda its: its.verdict]),
    ],
)
def test_results_that_were_changed_are_refused(file, reads, run, tmp_path):
    """A file that still parses but is not as it was written is named, with the remedy, by frames, tables of the paper,
    reports and comparisons that would show it; `altered` reads it."""
    shutil.copytree(run.folder.root, tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_text(f"{path.read_text().rstrip()} \n")
    message = f"{path} has changed since it was written; restore it, or delete"
    folder, config = RunFolder.open(tmp_path / "run", locked=False)
    more = [
        lambda _: vlopd.paper(tmp_path / "run"),
        lambda _: build_report(folder, config, tmp_path / "out"),
    ]
    if file.startswith("arms"):
        more.append(lambda _: compare(folder, config))
    if file.startswith("masks"):
        more.pop(0)  # which shows none of it
    for read in [*reads, *more]:
        with pytest.raises(RunError, match=re.escape(message)):
            read(vlopd.Run(tmp_path / "run"))
    for read in reads:
        read(vlopd.Run(tmp_path / "run", altered=True))
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_read(run, tmp_path):
    """Unknown arms, logs and results that are not there, folders that are no run: one line with the name."""
    for ask, message in (
        (
            lambda: run.metrics("nope"),
            "arm nope: not in the config, which has base, full, subnetwork",
        ),
        (lambda: run.samples("base"), "arm base has no samples.jsonl"),
        (lambda: vlopd.Run(tmp_path), "is not a run folder"),
        (lambda: vlopd.Run(run.config, out=tmp_path / "new").scores, "has no comparison yet"),
        (lambda: vlopd.Run(run.config, out=tmp_path / "new").run(arms=["nope"]), "arm nope"),
        (lambda: vlopd.Run(run.config, out=tmp_path / "new").run(arms="nope"), "arm nope"),
        (
            lambda: vlopd.Run(run.config, out=tmp_path / "new").run(until="end"),
            "until = 'end': must",
        ),
    ):
        with pytest.raises(vlopd.UserError, match=message):
            ask()
    fresh = vlopd.Run(run.config, "train.steps=9", out=tmp_path / "other")
    assert not fresh.arms.made.any() and fresh.config.train.steps == 9
    assert not (tmp_path / "other").exists()


def test_what_the_api_returns_is_a_mask_of_distill(whole):
    """MaskTensors is a dict of bool tensors, so that it goes wherever a mask goes."""
    assert isinstance(whole, MaskTensors) and isinstance(whole, dict)
    assert {marked.dtype for marked in whole.values()} == {torch.bool}
    assert import_module("vlopd.masks.compare").density(whole) == whole.density


WRONG = {
    "data is a generator": {"data": (row for row in ())},
    "data is a dict; ": {"data": {}},
    r"data\[0\] is a dict, not an Example": {"data": [{"question": "2 + 2"}]},
    "recipe is a dict; Recipe": {"recipe": {"train": TRAIN}},
    "pair is a str; load_pair": {"pair": "builtin:shapes-text-student"},
    "seed = '1': must be an integer": {"seed": "1"},
    "mask is a str; give": {"mask": "mask.safetensors"},
    "'a' is torch.int64, not a torch.bool tensor": {"mask": {"a": torch.ones(2).long()}},
    "'a' is list, not a torch.bool tensor": {"mask": {"a": [True]}},
    "names 'a', which the model lacks": {"mask": {"a": torch.ones(2).bool()}},
}


@pytest.fixture(scope="module")
def untrained(folders):
    return [vlopd.load_pair(folders["llm", "student"], compute="fp32") for _ in range(2)]


@pytest.mark.parametrize("message", WRONG)
def test_arguments_of_another_kind(message, untrained, tmp_path):
    """distill names the argument and what makes the right one; a pair that it refused so can be trained afterwards."""
    recipe = vlopd.Recipe(train=TRAIN, loss={"type": "nll"}, rollout={"source": "data"})
    data = vlopd.load_data("shapes", modality="text", size=2)
    given = {"pair": untrained[0], "data": data, "recipe": recipe} | WRONG[message]
    with pytest.raises(vlopd.UserError, match=message):
        vlopd.distill(**given, out=tmp_path)


def test_a_mask_is_of_its_base(whole, untrained, tmp_path):
    """A mask of another base checkpoint is refused, even where names and shapes agree."""
    recipe = vlopd.Recipe(train=TRAIN, loss={"type": "nll"}, rollout={"source": "data"})
    data = vlopd.load_data("shapes", modality="text", size=2)
    student = untrained[1].student
    shapes = {name: its.shape for name, its in student.model.named_parameters()}
    other = MaskTensors({n: torch.ones(s).bool() for n, s in shapes.items()}, whole.inputs)
    with pytest.raises(ConfigError, match=f"from base checkpoint {whole.inputs['base'][:12]}"):
        vlopd.distill(untrained[1], data, recipe, tmp_path, mask=other)
    assert (
        vlopd.distill(untrained[1], data, recipe, tmp_path, mask=dict(other)).metrics.step[1] == 1
    )


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: vlopd.delta(1, 2), "a checkpoint is a folder, .* not a int"),
        (lambda: vlopd.evaluate(None, "shapes"), "not a NoneType"),
        (lambda: vlopd.compare({"../x": "a", "b": "b"}, ["shapes"]), "'../x' is no name"),
        (lambda: vlopd.compare("builtin:shapes-student", ["shapes"]), "models is one model"),
        (
            lambda: vlopd.load_pair("builtin:shapes-student", compute="fp8"),
            "compute = 'fp8': must be",
        ),
        (lambda: vlopd.load_pair("builtin:shapes-student", device="abacus"), "device abacus: "),
        (lambda: vlopd.load_data(iter([{}])), "not a list_iterator; list"),
        (lambda: vlopd.load_data({"train": []}), "this one has train; of a DatasetDict"),
        (lambda: vlopd.load_data("shapes", size=2.5), "size = 2.5: must be an integer"),
        (lambda: vlopd.load_config(3), "not a int"),
        (lambda: vlopd.Run(3), "not a int"),
    ],
)
def test_values_of_another_kind(ask, message):
    """Each function names what it was given and what it takes."""
    with pytest.raises(vlopd.UserError, match=message):
        ask()


def test_rows_are_sliced_like_a_list():
    """A slice of rows in memory is the same rows again."""
    data = vlopd.load_data([{"question": str(n)} for n in range(5)])
    assert [its.id for its in data[1:4][1:]] == ["rows-2", "rows-3"] and len(data[:2]) == 2
    assert MaskTensors({}).frame.empty
