"""Claims about compare.json and the report, on a miniature run folder made of files alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from evals.compare import _decide, compare
from evals.report.build import build_report
from evals.report.checkpoints import write_comparison_page
from evals.report.examples import collect
from evals.report.page import brackets, number
from evals.report.prose import Typesetter
from evals.report.verdict import TaskSentences, _rank, points, verdict
from vlopd.config.experiment import ExperimentConfig
from vlopd.errors import RunError
from vlopd.files import read_json, read_jsonl, write_json, write_jsonl
from vlopd.run.folder import RunFolder

KINDS = ("attribute", "row", "count", "exist")
SKILL = {
    "base": 0.42,
    "teacher": 0.96,
    "full": 0.78,
    "subnetwork": 0.73,
    "random-0": 0.61,
    "random-1": 0.60,
    "random-2": 0.63,
    "transplant": 0.55,
}


def make_config(**changes) -> ExperimentConfig:
    tree = {
        "name": "mini",
        "title": "A miniature <run> with invented numbers",
        "student": "builtin:student",
        "teacher": "builtin:teacher",
        "data": {"type": "shapes"},
        "train": {"steps": 40, "prompts_per_step": 4},
        "masks": {
            "visible": {"type": "top_fraction", "of": "full", "fraction": 0.05},
            **{f"random-{i}": {"type": "random", "like": "visible", "seed": i} for i in range(3)},
        },
        "arms": {
            "base": {"type": "base"},
            "teacher": {"type": "teacher"},
            "full": {"type": "distill", "seed": 0},
            "subnetwork": {"type": "distill", "seed": 1, "mask": "visible"},
            **{
                f"random-{i}": {"type": "distill", "seed": 1, "mask": f"random-{i}"}
                for i in range(3)
            },
            "transplant": {"type": "transplant", "of": "full", "mask": "visible"},
        },
        "eval": {"bootstrap_draws": 2000},
    }
    return ExperimentConfig.model_validate({**tree, **changes})


def make_run(root: Path, config: ExperimentConfig, n: int = 300, images: bool = True) -> RunFolder:
    """An invented run folder by the contract: arms answer the same questions with unlike skill."""
    run = RunFolder(root)
    rng = np.random.default_rng(0)
    resolved = json.loads(config.model_dump_json())
    write_json(
        root / "run.json",
        {
            "config": resolved,
            "seeds": {"full": 0},
            "precision": resolved["precision"],
            "versions": {"python": "3.11", "torch": "2.9"},
            "git": None,
            "machine": {"system": "Linux", "cores": 2},
            "created": "2026-11-22T10:00:00Z",
        },
    )
    if images:
        for i in range(12):
            make_picture(root / f"evals/images/shapes/{i}.png", i)
    ease = rng.normal(size=n)
    for arm, its in config.arms.items():
        make_evaluation(run, arm, ease, rng, images)
        trained = its.type == "distill"
        record = {"arm": arm, "type": its.type, "checkpoint_digest": "ab" * 32, "inputs": {}}
        record["precision"] = {"compute": "fp32", "stored": "bf16", "values": "fp32"}
        if its.type != "teacher":  # which is not measured, only named
            record |= {"total_parameters": 700_000, "trained_parameters": 0, "density": 0.0}
        if trained or its.type == "transplant":
            record |= {"mask": its.mask, "density": 0.05 if its.mask else 1.0}
            record["off_mask_unmoved"] = True if its.mask else None
        if trained:
            record["trained_parameters"] = 35_000 if its.mask else 700_000
            record |= {"seed": its.seed, "steps": 40, "seconds": 61.5, "device": "cpu"}
        write_json(run.arm_record(arm), record)
        if trained:
            make_training(run, arm, rng, images)
    for name in config.masks:
        by = {"vision": 0.05, "projector": 0.049, "language": 0.0503}
        write_json(run.mask_record(name), {"density": 0.05, "density_by_component": by})
    make_geometry(run, rng)
    return run


def make_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (96, 96), (30, 30, 34))
    pen = ImageDraw.Draw(picture)
    for x, y, colour in ((18, 18, "#eb3232"), (78, 46, "#3c5af5"), (46, 78, "#f5e132")):
        x = (x + 32 * seed) % 96
        pen.ellipse((x - 12, y - 12, x + 12, y + 12), fill=colour)
    picture.save(path)


def make_evaluation(run: RunFolder, arm: str, ease, rng, images: bool) -> None:
    n = len(ease)
    harder = np.array([0.9, 0.1, -0.4, 0.0])[np.arange(n) % 4]
    logit = np.log(SKILL[arm] / (1 - SKILL[arm])) + 1.2 * (ease + harder)
    right = rng.random(n) < 1 / (1 + np.exp(-logit))
    rows = [
        {
            "doc_id": i,
            "doc_hash": f"d{i}",
            "prompt_hash": f"p{i} {arm}",
            "target": f"top-left center : {i % 4}",
            "completion": f"top-left center : {i % 4}" if ok else f"top-left : {(i + 1) % 4}",
            "exact_match": int(ok),
            "verdict_match": int(ok),
            "group": KINDS[i % 4],
            "cluster": None,
            "question": "how many red | or <blue>",
            "image": f"evals/images/shapes/{i}.png" if images and i < 12 else None,
        }
        for i, ok in enumerate(right.tolist())
    ]
    write_jsonl(run.eval(arm) / "samples_shapes.jsonl", rows)
    results = {
        "arm": arm,
        "inputs": {},
        "checkpoint_digest": "ab" * 32,
        "primary_metric": {"shapes": "exact_match"},
        "data_digest": {"shapes": "cd" * 32},
        "chance": {
            "shapes": {"all": 0.21, "attribute": 0.3, "row": 0.1, "count": 0.2, "exist": 0.24}
        },
        "extraction_failure_fraction": {"shapes": 0.04 if arm == "base" else 0.0},
        "results": {"shapes": {"exact_match,none": float(right.mean())}},
    }
    write_json(run.eval(arm) / "results.json", results)


def make_training(run: RunFolder, arm: str, rng, images: bool) -> None:
    steps = np.arange(40)
    kl = (
        (0.2 + 1.4 * np.exp(-steps / 12))
        * (1 if arm == "full" else 1.3)
        * rng.gamma(30, 1 / 30, 40)
    )
    metrics = [
        {"step": int(s), "loss": float(k), "kl": float(k), "mean_completion_tokens": 4.2}
        | {"truncated_fraction": 0.01, "tokens_per_second": 512.0, "seconds": 1.5}
        for s, k in zip(steps, kl, strict=True)
    ]
    write_jsonl(run.arm(arm) / "metrics.jsonl", metrics)
    if images:
        make_picture(run.arm(arm) / "samples/0.png", 3)
    samples = [
        {
            "step": step,
            "id": f"shapes-train-0-{step}",
            "question": "how many red",
            "reference": "top-left center : 2",
            "completion": "top-left bottom-right : 3",
            "image": "samples/0.png" if images else None,
            "tokens": ["top-left", "bottom-right", ":", "3", "</s>"],
            "student_logprobs": [-0.2, -0.9, -0.01, -0.4, -0.001],
            "teacher_logprobs": [-0.1, -7.5, -0.02, -1.4, -0.001],
        }
        for step in (0, 10, 20, 30)
    ]
    write_jsonl(run.arm(arm) / "samples.jsonl", samples)


def make_geometry(run: RunFolder, rng) -> None:
    rows = []
    for component, layers in (("vision", 4), ("language", 6)):
        for layer in range(layers):
            for module in ("q", "k", "v", "o", "gate", "up", "down"):
                for metric, parameter, value, null in (
                    ("frac_delta_eq_0", "", 0.8 - 0.02 * layer, 0.78),
                    ("top_energy_ratio", "k=16", 0.4, 0.2),
                ):
                    value += rng.normal() / 50
                    place = [f"{component}.{layer}.{module}", component, layer, module, "64x64"]
                    numbers = [value, "iid", null, 0.004, value - null]
                    rows.append([*place, metric, parameter, *numbers, "ok", None])
    rows.append(["norm", "language", 0, "norm", "64", "top_energy_ratio", "k=16", *[None] * 5])
    rows[-1] += ["skipped", "not a matrix"]
    columns = (
        "name component layer module shape metric parameter value null null_mean null_sd excess"
    )
    frame = pd.DataFrame(rows, columns=[*columns.split(), "status", "reason"])
    folder = run.geometry("full")
    folder.mkdir(parents=True)
    frame.to_csv(folder / "geometry.csv", index=False)
    keys = ("name", "metric", "parameter", "value", "null_mean", "null_sd")
    headline = [
        ("[all]", "frac_delta_eq_0", "", 0.79, 0.78, 0.002),
        ("[median]", "top_energy_ratio", "k=16", 0.41, 0.2, 0.004),
        ("[part=ffn]", "energy_share", "", 0.66, 0.65, None),
        ("[all]", "relative_delta_fro", "", 0.0011, None, None),
    ]
    rows = [dict(zip(keys, row, strict=True)) for row in headline]
    left_out = {"summary": "1 tensor not compared, 0.30% of the base's parameters: v_head.weight"}
    summary = {"inputs": {}, "headline": rows, "left_out": left_out}
    write_json(folder / "summary.json", summary)


# ------------------------------------------------------------------------------------------ compare


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    config = make_config()
    run = make_run(tmp_path_factory.mktemp("module") / "run", config)
    return run, config, read_json(compare(run, config))


@pytest.fixture
def spoilable(compared, tmp_path):
    """A copy of the compared run, for tests that change files."""
    run, config, record = compared
    shutil.copytree(run.root, tmp_path / "run")
    return RunFolder(tmp_path / "run"), config, record


def test_every_arm_has_its_numbers(compared):
    """Each arm has n, mean, error, and its difference to full and recovery with intervals."""
    _, config, record = compared
    task = record["tasks"]["shapes"]
    assert task["n"] == 300 and set(task["arms"]) == set(config.arms)
    for arm in task["arms"].values():
        assert arm["n"] == 300 and arm["standard_error"] > 0
        assert arm["interval"][0] < arm["mean"] < arm["interval"][1]
        low, high = arm["difference_to_full"]["interval"]
        assert low <= arm["difference_to_full"]["mean"] <= high
        low, high = arm["recovery"]["interval"]
        assert arm["recovery"]["status"] == "ok" and low <= arm["recovery"]["value"] <= high
        assert set(arm["by_group"]) == set(KINDS)
    assert task["arms"]["full"]["recovery"]["value"] == 1
    assert task["arms"]["base"]["recovery"]["value"] == 0


def test_means_are_those_of_the_samples(compared):
    """The joined scores are the arms' own: means and differences follow from the sample files."""
    run, _, record = compared
    means = {
        arm: np.mean([r["exact_match"] for r in read_jsonl(run.eval(arm) / "samples_shapes.jsonl")])
        for arm in SKILL
    }
    task = record["tasks"]["shapes"]
    for arm, its in task["arms"].items():
        assert its["mean"] == pytest.approx(means[arm])
        assert its["difference_to_full"]["mean"] == pytest.approx(means[arm] - means["full"])
    assert task["gap_closed"]["value"] == pytest.approx(
        (means["full"] - means["base"]) / (means["teacher"] - means["base"])
    )


def test_random_controls_are_pooled_and_ranked(compared):
    """The subnetwork stands against the mean of its own random masks, and its rank has a floor."""
    task = compared[2]["tasks"]["shapes"]
    (control,) = task["controls"]
    randoms = ["random-0", "random-1", "random-2"]
    assert (control["arm"], control["kind"]) == ("subnetwork", "random")
    assert control["arms"] == randoms and control["smallest_possible_p"] == 0.25
    mean = np.mean([task["arms"][arm]["mean"] for arm in randoms])
    assert control["pooled"]["mean"] == pytest.approx(mean)
    names = [contrast["name"] for contrast in task["contrasts"]]
    assert {"subnetwork - random-0", "full - base", "transplant - full"} <= set(names)
    assert (control["rank"], control["tied"]) == (1, 0)
    decided = {c["name"]: c for c in task["contrasts"] if not c["exploratory"]}
    assert set(decided) == {
        *("full - base", "teacher - base", "subnetwork - full", "subnetwork - base"),
        *("transplant - full", "subnetwork - random (mean of 3)"),
    }
    assert compared[2]["family"]["tests"] == len(decided)
    for contrast in task["contrasts"]:
        p, corrected = contrast["p"], contrast["p_holm"]
        assert corrected is None if contrast["exploratory"] else p <= corrected <= 1
        found = "above" if contrast["mean"] > 0 else "below"
        assert contrast["direction"] == (found if (corrected or p) <= 0.05 else None)


def test_row_order_does_not_matter(spoilable):
    """Arms are joined by question, not by line number."""
    run, config, record = spoilable
    path = run.eval("full") / "samples_shapes.jsonl"
    write_jsonl(path, read_jsonl(path)[::-1])
    again = read_json(compare(run, config))
    assert again["inputs"] != record["inputs"]
    assert again["tasks"] == record["tasks"]


def test_incomparable_arms_are_refused(spoilable):
    """Different data or questions, or a missing evaluation, end in one line, not in a number."""
    run, config, _ = spoilable
    results = run.eval("full") / "results.json"
    good = read_json(results)
    write_json(results, {**good, "data_digest": {"shapes": "other"}})
    with pytest.raises(RunError, match=r"base and full .* different data_digest on shapes"):
        compare(run, config)
    write_json(results, good)
    path = run.eval("full") / "samples_shapes.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [{**rows[0], "exact_match": 42.0}, *rows[1:]])
    with pytest.raises(
        RunError, match=r"question \d+ has exact_match = 42\.0, .* evaluate full again"
    ):
        compare(run, config)
    write_jsonl(path, rows[:-1])
    with pytest.raises(RunError, match=r"full \(299\)"):
        compare(run, config)
    results.unlink()
    with pytest.raises(RunError, match="no evaluation of full; run `vlopd eval") as error:
        compare(run, config)
    assert "\n" not in str(error.value)


def test_a_run_of_few_arms(tmp_path):
    """Without full OPD, a teacher or masks there is still a comparison and a report."""
    config = make_config(
        arms={"base": {"type": "base"}, "full": {"type": "distill", "seed": 0}}, masks={}
    )
    run = make_run(tmp_path / "two", config, n=40, images=False)
    record = read_json(compare(run, config))
    task = record["tasks"]["shapes"]
    assert not any("gap" in line for line in verdict(record))
    assert task["gap_closed"] is None and task["controls"] == []
    assert "Full OPD scores" in build_report(run, config).read_text()
    only = make_config(arms={"base": {"type": "base"}}, masks={}, geometry={"arms": []})
    run = make_run(tmp_path / "one", only, n=40, images=False)
    base = read_json(compare(run, only))["tasks"]["shapes"]["arms"]["base"]
    assert base["difference_to_full"] is None and base["recovery"]["value"] is None
    assert build_report(run, only).exists()


# ------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def page(compared):
    return build_report(*compared[:2]).read_text()


def test_report_is_one_file_that_says_it_all(compared, page):
    """The page needs no network, holds the verdict, every arm and pictures, and escapes text."""
    _, config, record = compared
    assert not re.search(r"https?://|@import|<link(?! rel=\"icon\" href=\"data:)", page)
    assert len(page) < 5_000_000 and "data:image/png;base64," in page
    assert page.count("<svg") == 6
    assert "<blue>" not in page and "&lt;blue&gt;" in page
    plain = page.replace("&#39;", "'").replace("&lt;", "<")
    assert all(sentence in plain for sentence in verdict(record))
    assert all(f'<th scope="row">{arm}' in page for arm in config.arms)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_report_has_files_beside_the_page(compared, page):
    """Markdown, SVG figures and CSV tables hold the same numbers for other tools."""
    run, _, record = compared
    markdown = (run.report / "report.md").read_text()
    assert all(sentence in markdown for sentence in verdict(record))
    shown = re.findall(r"\]\((figures/[^)]*)\)", markdown)
    assert len(shown) == page.count("<svg") and "</" not in markdown
    for figure in shown:
        assert (run.report / figure).read_text().startswith("<svg")
    rows = re.findall(r'<th scope="row">', page)
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == len(
        rows
    ) + 2 * page.count("<table")
    score = record["tasks"]["shapes"]["arms"]["subnetwork"]["mean"]
    assert f"| subnetwork | {100 * score:.1f} ± " in markdown
    table = pd.read_csv(run.report / "tables/arms.csv").set_index("arm")
    for arm, its in record["tasks"]["shapes"]["arms"].items():
        assert table.loc[arm, "mean"] == pytest.approx(its["mean"])
    names = {path.stem for path in (run.report / "tables").iterdir()}
    assert names == {
        "arms",
        "contrasts",
        "kinds",
        "training",
        "masks",
        "geometry",
        "seeds",
        "further",
    }
    assert "how many red" not in markdown and "- Loss: reverse kl" in markdown


def test_report_says_what_geometry_left_out(compared, page):
    """The page and the Markdown repeat summary.json's line about parameters that are not compared."""
    run, _, _ = compared
    said = read_json(run.geometry("full") / "summary.json")["left_out"]["summary"]
    assert f"Left out: {said}." in page.replace("&#39;", "'")
    assert f"Left out: {said}." in (run.report / "report.md").read_text()


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = """
<script>
const set = async (name, value) => {
  const it = document.getElementById(name);
  it.value = value; it.dispatchEvent(new Event("change"));
  await new Promise(done => setTimeout(done, 20));
};
const cards = () => document.querySelectorAll("#cards .card").length;
(async () => {
  const seen = {};
  await new Promise(done => setTimeout(done, 50));
  seen.cards = cards(); seen.all = found.length;
  await set("kind", "count");
  seen.count = found.length;
  await set("arm", "0"); await set("outcome", "w");
  seen.wrong = found.length;
  await set("apart", "some");
  seen.apart = found.length; seen.words = document.getElementById("shown").textContent;
  for (const name of ["kind", "arm", "outcome", "apart"]) await set(name, "");
  document.querySelector(".after").click();
  await new Promise(done => setTimeout(done, 20));
  seen.second = document.querySelector(".pager span").textContent;
  seen.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  seen.broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  seen.texts = document.querySelectorAll("#cards .prose img, #cards .prose script").length;
  document.title = JSON.stringify(seen);
})();
</script>
"""
"""Plays a reader, and leaves what it saw in the page's title."""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (400, True)], ids=["desk", "phone"])
def test_the_page_works_in_a_browser(page, tmp_path, width, dark):
    """In headless Chromium the page logs no error and loads all its pictures, the filters of the example browser
    choose, and nothing but tables scrolls sideways, at a desk and on a dark phone."""
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</body>", DRIVER + "</body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    words += [
        f"--window-size={width},900",
        "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    words += ["--force-dark-mode"] if dark else []
    done = subprocess.run(
        [str(BROWSER), *words, driven.as_uri()], capture_output=True, text=True, timeout=120
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    found = json.loads(title)
    assert found["cards"] == 20 and found["all"] == 300 and found["count"] == 75
    assert found["count"] > found["wrong"] >= found["apart"] > 0
    assert found["words"] == f"{found['apart']} of 300 questions"
    assert found["second"] == "page 2 of 15"
    assert not found["wide"] and not found["broken"] and not found["texts"]


def test_the_verdict_is_what_the_numbers_say(compared):
    """Recovery, differences and the rank in the sentences are those of compare.json."""
    record = compared[2]
    task = record["tasks"]["shapes"]
    sentences = verdict(record)
    text = " ".join(sentences)
    recovery = task["arms"]["subnetwork"]["recovery"]
    low, high = recovery["interval"]
    assert f"recovers {recovery['value']:.2f} [{low:.2f}, {high:.2f}] of full OPD's gain" in text
    assert sentences[0].startswith("The 5 % subnetwork")
    (control,) = task["controls"]
    assert f"ranks {control['rank']} of {control['of']}" in text
    tested = next(c for c in task["contrasts"] if c["name"] == "subnetwork - full")
    said = (
        "no worse by 2 pp" if tested["non_inferiority"]["holds"] else "not shown to be within 2 pp"
    )
    assert said in text
    effect = 100 * task["minimum_detectable_effect"]
    assert f"80 % power to detect a difference of {effect:.1f} pp" in text
    seeds = {its["name"]: its for its in task["seeds"]}
    assert seeds["subnetwork - random"]["seeds_b"] == 3
    assert seeds["subnetwork - random"]["levels"] == {"a": "one arm", "b": "mask seeds"}
    assert "Over mask seeds as well as questions, subnetwork - random (1 and 3 arms): +" in text
    lacking = "the training noise of subnetwork (one training seed) and the controls is not in the"
    assert lacking in text and "Over training seeds" not in text


def test_numbers_that_round_to_zero_have_no_minus():
    """A difference is +0.0 and not -0.0, and an interval without one bound says so."""
    assert points({"mean": -0.0001, "interval": [-0.0002, 0.05]}) == "+0.0 pp [+0.0, +5.0]"
    assert points({"mean": -0.2, "interval": [None, -0.1]}, "own") == "-0.2 (-\u221e, -0.1]"
    assert number(-0.00001) == "0.0" and brackets(None, None) == ""


def test_declared_contrasts_are_the_family_of_holm(spoilable):
    """Holm's adjustment is over the declared contrasts; others keep their p and have no adjusted one."""
    run, config, _ = spoilable
    declared = ("subnetwork - full", "subnetwork - random", "full - base")
    of = config.eval.model_copy(update={"contrasts": declared})
    task = read_json(compare(run, config.model_copy(update={"eval": of})))["tasks"]["shapes"]
    adjusted = {c["name"]: c for c in task["contrasts"] if c["p_holm"] is not None}
    assert len(adjusted) == 3 and "subnetwork - random (mean of 3)" in adjusted
    smallest = min(adjusted.values(), key=lambda c: c["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["p"]))
    for wrong, message in (("full", '"arm - arm"'), ("full - nope", "nope")):
        with pytest.raises(ValueError, match=message):
            make_config(eval={"contrasts": [wrong]})


def test_words_follow_the_corrected_p(compared):
    """Only a contrast that p after correction decides is called distinguishable; an interval without zero beside a
    corrected p above 0.05 is not established, and outside the family the words say so. The family spans the tasks."""
    task = compared[2]["tasks"]["shapes"]
    found = dict(mean=0.05, interval=[0.003, 0.097], p=0.04, p_holm=0.12, direction=None)
    sentences = TaskSentences(task, compared[2]["arms"])
    assert sentences.finding({**found, "exploratory": False}) == (
        "+5.0 pp [+0.3, +9.7], p = 0.04 (0.12 after Holm): not established"
    )
    decided = {**found, "p_holm": 0.045, "direction": "above", "exploratory": False}
    assert sentences.finding(decided).endswith(": distinguishably better")
    outside = {**found, "p_holm": None, "direction": "above", "exploratory": True}
    assert sentences.finding(outside).endswith("p = 0.04 (exploratory, uncorrected): better")
    low_is_good = TaskSentences(
        {**task, "higher_is_better": False, "scale": "own"}, compared[2]["arms"]
    )
    assert low_is_good.finding({**decided, "mean": 1.5}).startswith(
        "+1.5 [+0.003, +0.097], p = 0.04"
    )
    assert low_is_good.finding(decided).endswith("distinguishably worse")
    config = make_config().eval
    contrasts = [{"a": "full", "b": "base", "p": p, "mean": 0.1} for p in (0.01, 0.02, 0.03, 0.001)]
    entries = {
        str(i): {"contrasts": [its], "in_family": i < 3, "higher_is_better": True, "arms": {}, "controls": []}
        for i, its in enumerate(contrasts)
    }  # fmt: skip
    family = _decide(entries, make_config().roles, config)
    assert (family["tests"], family["tasks"]) == (3, ["0", "1", "2"])
    assert [its["p_holm"] for its in contrasts] == [pytest.approx(0.03), 0.04, 0.04, None]
    assert [its["exploratory"] for its in contrasts] == [False] * 3 + [True]


def test_variants_alone_are_compared_with_the_base(tmp_path, monkeypatch):
    """Where no arm is full, each variant has a sentence against the base and a place in the family; equal arms are
    tied with their controls in words."""
    arms = {"base": {"type": "base"}}
    for name in ("jsd", "k1"):
        arms[name] = {"type": "distill", "seed": 0, "role": "variant", "loss": {"type": name}}
    config = make_config(arms=arms, masks={}, geometry={"arms": []}, eval={"bootstrap_draws": 200})
    _, record = invented(tmp_path / "run", config, monkeypatch, jsd=0.9, k1=0.6)
    assert record["family"]["tests"] == 2
    lines = verdict(record)
    assert any(line.startswith("jsd minus base: +") and "after Holm" in line for line in lines)
    tied = {"rank": 4, "of": 4, "tied": 3}
    assert _rank(tied) == "1 to 4 of 4, tied with 3" and _rank({**tied, "tied": 0}) == "4 of 4"


def with_arms(**arms) -> dict:
    """The miniature's arms and masks, with these arms added or changed."""
    config = make_config()
    every = {
        name: its.model_dump(mode="json", exclude_none=True) for name, its in config.arms.items()
    }
    masks = {name: its.model_dump(mode="json") for name, its in config.masks.items()}
    return {"arms": {name: {**every.get(name, {}), **its} for name, its in {**every, **arms}.items()},
            "masks": masks}  # fmt: skip


def invented(root: Path, config: ExperimentConfig, monkeypatch, **skill: float):
    """(run, compare.json) of a miniature of these arms."""
    for arm, its in skill.items():
        monkeypatch.setitem(SKILL, arm, its)
    run = make_run(root, config, n=120, images=False)
    return run, read_json(compare(run, config))


def test_a_study_whose_arms_all_name_their_loss(tmp_path, monkeypatch):
    """With one of them said to be full there are recovery and every declared contrast, between variants and between
    controls too; exactly these are Holm's family, and what follows from the roles stands beside, uncorrected."""
    jsd = {"loss": {"type": "jsd"}}
    declared = ["k1 - skew", "random-0 - random-1", "subnetwork - random", "base - teacher"]
    config = make_config(
        **with_arms(
            full={**jsd, "role": "full"},
            k1={"type": "distill", "seed": 0, "loss": {"type": "k1"}},
            skew={"type": "distill", "seed": 0, "loss": {"type": "skew_reverse_kl"}},
        ),
        eval={"contrasts": declared, "bootstrap_draws": 200},
    )
    run, record = invented(tmp_path / "run", config, monkeypatch, k1=0.9, skew=0.6)
    task = record["tasks"]["shapes"]
    roles = {arm: its["role"] for arm, its in record["arms"].items()}
    assert (roles["full"], roles["k1"], roles["skew"]) == ("full", "variant", "variant")
    assert task["arms"]["k1"]["recovery"]["status"] == "ok"
    by_name = {its["name"]: its for its in task["contrasts"]}
    family = {name for name, its in by_name.items() if its["p_holm"] is not None}
    assert family == {*declared[:2], "subnetwork - random (mean of 3)", declared[3]}
    assert family == {name for name, its in by_name.items() if its["declared"]}
    assert {"k1 - full", "subnetwork - full", "full - base"} <= set(by_name)
    right = {arm: task["arms"][arm]["mean"] for arm in roles}
    assert by_name["k1 - skew"]["mean"] == pytest.approx(right["k1"] - right["skew"])
    smallest = min((by_name[name] for name in family), key=lambda its: its["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 4 * smallest["p"]))
    assert any(line.startswith("k1 minus skew: +") for line in verdict(record))
    build_report(run, config)
    assert "Holm's correction is over the declared contrasts" in (
        run.report / "report.html"
    ).read_text().replace("&#39;", "'")


def test_controls_that_differ_in_more_than_the_mask_are_not_averaged(tmp_path, monkeypatch):
    """A random arm with another learning rate is named with it and left out of the mean; a low-magnitude control is
    no random one; and the numbers of what is pooled are those of the pooled arms."""
    sections = with_arms(
        **{"random-1": {"optim": {"learning_rate": 3e-4}}},
        low={"type": "distill", "seed": 1, "role": "control", "mask": "low"},
    )
    sections["masks"]["low"] = {"type": "magnitude", "fraction": 0.05}
    config = make_config(**sections, eval={"bootstrap_draws": 200})
    run, record = invented(tmp_path / "run", config, monkeypatch, low=0.3)
    task = record["tasks"]["shapes"]
    random, low = task["controls"]
    assert (random["arms"], low["arms"]) == (["random-0", "random-2"], ["low"])
    means = [task["arms"][arm]["mean"] for arm in random["arms"]]
    assert random["pooled"]["mean"] == pytest.approx(np.mean(means))
    assert low["difference"]["name"] == "subnetwork - low-magnitude"
    of_low = [c["name"] for c in task["contrasts"] if "low" in c["b"] and c["a"] == "subnetwork"]
    assert of_low == [low["difference"]["name"]]  # the mean of one is the one: one test
    differs = "optim.learning_rate 1e-06 -> 0.0003"
    assert record["not_pooled"] == [
        {"arm": "random-1", "of": "subnetwork", "differences": [differs]}
    ]
    (alone,) = [its for its in task["contrasts"] if its["name"] == "subnetwork - random-1"]
    means = {arm: task["arms"][arm]["mean"] for arm in ("subnetwork", "random-1")}
    assert alone["mean"] == pytest.approx(means["subnetwork"] - means["random-1"])
    said = f"random-1 is not pooled with the controls of subnetwork: {differs}"
    build_report(run, config)
    for name in ("report.html", "report.md"):
        assert said in (run.report / name).read_text().replace("-&gt;", "->")


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({"rollout": {"source": "data"}, "loss": {"type": "nll"}}, "SFT"),
        ({"rollout": {"source": "data"}}, "off-policy distillation"),
        ({"rollout": {"source": "teacher"}, "loss": {"type": "nll"}}, "sequence-level distillation"),
        ({"rollout": {"completions_per_prompt": 4}, "reward": {"rule": "exact_match"}}, "RLVR"),
        ({}, "OPD"),
    ],
)  # fmt: skip
def test_training_is_called_what_it_is(tmp_path, recipe, name):
    """What was trained on data, or on a reward alone, is called OPD neither in the verdict nor in the report."""
    arms = {"base": {"type": "base"}, "full": {"type": "distill", "seed": 0}}
    config = make_config(**recipe, arms=arms, masks={}, eval={"bootstrap_draws": 200})
    run = make_run(tmp_path / "run", config, n=60, images=False)
    lines = verdict(read_json(compare(run, config)))
    assert any(line.startswith(f"Full {name} scores ") for line in lines)
    pages = []
    if name in ("SFT", "RLVR", "OPD"):  # the others have these parts
        build_report(run, config)
        pages = [(run.report / page).read_text() for page in ("report.html", "report.md")]
    assert all(("OPD" in text) == (name == "OPD") for text in (" ".join(lines), *pages))


def test_a_comparison_of_an_older_version_is_one_line(spoilable):
    """Without what the sentences need they are one line, and the comparison is made again."""
    run, config, record = spoilable
    old = {key: value for key, value in record.items() if key not in ("arms", "not_pooled")}
    old["inputs"] = {key: value for key, value in record["inputs"].items() if key != "format"}
    write_json(run.compare, old)
    assert ["vlopd compare" in line for line in verdict(old)] == [True]
    assert read_json(compare(run, config)) == record


def test_replicates_are_taken_as_a_sample_of_seeds(tmp_path):
    """Arms that differ in the seed alone are compared as groups, with a deviation between seeds; held-out scores give
    final, last-five and peak scores, and several densities a figure."""
    base = make_config()
    arms = {name: arm.model_dump(mode="json", exclude_none=True) for name, arm in base.arms.items()}
    arms["full-b"] = {"type": "distill", "seed": 7}
    arms["sparser"] = {"type": "distill", "seed": 1, "mask": "sparser"}
    sparser = {"type": "top_fraction", "of": "full", "fraction": 0.01}
    masks = {name: mask.model_dump(mode="json") for name, mask in base.masks.items()}
    SKILL.update({"full-b": 0.77, "sparser": 0.5})
    config = make_config(arms=arms, masks={**masks, "sparser": sparser})
    run = make_run(tmp_path / "run", config, n=120, images=False)
    record = read_json(run.arm_record("sparser"))
    write_json(run.arm_record("sparser"), {**record, "density": 0.01})
    evaluations = [
        {"step": s, "task": "shapes_validation", "exact_match": s / 50} for s in (0, 20, 40)
    ]
    evaluations[1]["exact_match"] = 0.9
    write_jsonl(run.arm("full") / "heldout.jsonl", evaluations)
    seeds = {
        its["name"]: its for its in read_json(compare(run, config))["tasks"]["shapes"]["seeds"]
    }
    assert (seeds["full - base"]["seeds_a"], seeds["full - base"]["seeds_b"]) == (2, 1)
    assert seeds["full - base"]["sd_a"] > 0 and seeds["full - base"]["sd_b"] is None
    assert seeds["full - base"]["levels"] == {"a": "training seeds", "b": "one arm"}
    assert seeds["full - base"]["two_level"] and not seeds["subnetwork - full"]["two_level"]
    text = build_report(run, config).read_text()
    table = pd.read_csv(run.report / "tables/held_out.csv").iloc[0]
    assert (table.final, table.peak, table.peak_step) == (0.8, 0.9, 20)
    assert table["last"] == pytest.approx((0.9 + 0.8) / 2)  # without the base, step 0
    assert 'data-name="held-out-shapes-validation"' in text
    assert "density-shapes" in text and "Peak (step)" in text


def test_report_without_comparison(spoilable):
    """A run that was only trained has a report too, which names the next step."""
    run, config, _ = spoilable
    run.compare.unlink()
    shutil.rmtree(run.root / "evals")
    assert "vlopd compare" in build_report(run, config).read_text()


# ----------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "</script><img src=x onerror=alert(1)>",
            "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;",
        ),
        (r"$\frac{1}{0$", r"$\frac{1}{0$"),
        (r"$\unknown x$", r"$\unknown x$"),
        ("from $70,000 to $80,000", "from $70,000 to $80,000"),
        ("**x** `a<b`", "<strong>x</strong> <code>a&lt;b</code>"),
        (r"$x^2$", "<math><msup><mi>x</mi><mn>2</mn></msup></math>"),
        (r"\(y\)", "<math><mi>y</mi></math>"),
        (r"$$y$$", '<math display="block"><mi>y</mi></math>'),
        (r"\[y\]", '<math display="block"><mi>y</mi></math>'),
        (r"$\text{<script>}$", "<math><mtext>&lt;script&gt;</mtext></math>"),
        (r"$\href{javascript:x}{y}$", "<math><mi>y</mi></math>"),
        ("a\n$$y$$\n- b\x00\ue0000\ue001", 'a<math display="block"><mi>y</mi></math>\u2022 b0'),
        (
            "$" + r"\frac{1}{" * 200 + "x" + "}" * 200 + "$",
            "$" + r"\frac{1}{" * 200 + "x" + "}" * 200 + "$",
        ),
        ("\ud83d \u2028 \u202e<b>", "? \u2028 \u202e&lt;b&gt;"),
    ],
)
def test_a_models_text_is_safe_and_its_mathematics_set(text, shown):
    """No tag of a text survives, formulas become MathML without links or styles, and what cannot be read stays."""
    assert Typesetter().html(text).replace("<mrow>", "").replace("</mrow>", "") == shown


def test_setting_text_is_bounded():
    """Hostile texts take a moment, a long one loses its middle, and without time formulas stay as written."""
    started = time.process_time()
    for part in ("$", r"\(", "**", "*a", r"\begin{align}", r"\boxed{", "```\n", "$x"):
        Typesetter().html(part * (20_000 // len(part)))
    assert time.process_time() - started < 3
    assert "[... 80,000 characters left out ...]" in Typesetter().html("a" * 100_000)
    assert Typesetter(0).html("$x$") == "$x$"


def long_run(root: Path, questions: int, answer: str, **columns) -> RunFolder:
    """Two arms' rows of one task, in the format with lengths and outcomes."""
    run = RunFolder(root)
    for arm in ("base", "full"):
        rows = [
            {
                "doc_id": i,
                "doc_hash": str(i),
                "question": f"what is {i}?",
                "prompt": f"<user> what is {i}?",
                "images": [],
                "target": "1",
                "completion": f"{arm} {i} {answer}",
                "score": float(i % 2 and arm == "full"),
                "outcome": "right" if i % 2 and arm == "full" else ("cut", "unreadable")[i % 2],
                "tokens": 1200,
                "thought_tokens": 800,
                "stop": "length",
                "group": None,
                **columns,
            }
            for i in range(questions)
        ]
        write_jsonl(run.eval(arm) / "samples_t.jsonl", rows)
    return run


TWO_ARMS = {
    "arms": {"base": {"role": "base"}, "full": {"role": "full"}},
    "tasks": {"t": {"metric": "score", "contrasts": [{"a": "full", "b": "base"}]}},
}


def test_the_index_has_what_the_filters_read(tmp_path):
    """Outcome and score of every arm, disagreements first; contents have prompt, lengths and thoughts."""
    found = collect(long_run(tmp_path, 6, "x", thought="so </script>"), TWO_ARMS)
    assert found.arms == ["full", "base"] and found.pairs == [(0, 1)] and found.total == 6
    assert (
        found.index[:3] == [[0, 0, "ru", "10"]] * 3 and found.index[3:] == [[0, 0, "cc", "00"]] * 3
    )
    (chunk,) = found.chunks
    assert "</" not in chunk and "<s" not in chunk
    first = json.loads(chunk)[0]
    assert first["prompts"] == [["<user> what is 1?", [0, 1]]]
    sample = first["answers"][0]["samples"][0]
    assert sample["about"] == "1,200 tokens, 800 of them thought; cut at the length limit"
    assert sample["thought"] == "so &lt;/script&gt;" and sample["answer"] == "full 1 x"


def test_examples_of_a_large_run_stand_beside_the_page(tmp_path):
    """Two thousand questions with answers of 1,000 characters are built in seconds; the page has a part of them."""
    run = long_run(tmp_path, 2_000, "word $x^2$ " * 90)
    started = time.process_time()
    found = collect(run, TWO_ARMS)
    assert time.process_time() - started < 20
    assert len(found.index) == 2_000 and len(found.chunks) == len(found.starts) > 2
    assert len(found.chunks[0]) < 3_100_000 and len(found.head()) < 100_000
    found.write_beside(tmp_path / "examples")
    files = sorted((tmp_path / "examples").iterdir())
    assert len(files) == len(found.chunks) - 1
    text = (tmp_path / "examples/1.js").read_text()
    rest = json.loads(text.removeprefix("received(1,").removesuffix(");\n"))
    assert len(rest) == found.starts[2] - found.starts[1]


def test_groups_units_and_outcomes_are_shown(compared, tmp_path):
    """A group stands before its folded tasks, a perplexity in its own unit (higher is worse in mark and word), weak and
    half-open recoveries are flagged, and answers are split by what became of them."""
    task = json.loads(json.dumps(compared[2]["tasks"]["shapes"]))
    for its in task["arms"].values():
        its["outcomes"] = {"right": 0.5, "wrong": 0.25, "unreadable": 0.125, "cut": 0.125}
        its["mean_tokens"], its["truncated_fraction"], its["mean_thought_tokens"] = 321.0, 0.2, 99.0
        its["answered_fraction"] = 0.875
    for its in task["contrasts"]:
        its["direction"] = "above" if its["name"] == "full - base" else None
    group = {**task, "members": ["leaf"], "group": None}
    words = {**task, "metric": "word_perplexity", "scale": "own", "higher_is_better": False}
    words["arms"] = json.loads(json.dumps(task["arms"]))
    weak = {"value": 0.4, "interval": [0.21, None], "status": "weak"}
    words["arms"]["subnetwork"]["recovery"] = weak
    words["arms"]["transplant"]["recovery"] = {**weak, "interval": [None, None]}
    record = {
        **compared[2],
        "not_compared": {"odd": "its metrics are of the corpus"},
        "tasks": {"group": group, "leaf": {**task, "group": "group"}, "words": words},
    }
    models = {arm: f"path/{arm}" for arm in record["arms"]}
    page = write_comparison_page(tmp_path, record, models, {}).read_text()
    assert page.count('<details class="task">') == 2 and "1 task of group" in page
    assert "odd: its metrics are of the corpus" in page and "lower is better" in page
    assert '<td data-label="Answered, %">87.5</td>' in page and "the thought was closed" in page
    mean = task["arms"]["full"]["mean"]
    assert f"<td>{mean:.4g} ± " in page
    assert 'class="mark right" title="above' in page and 'class="mark wrong" title="above' in page
    assert "0.40 [0.21, \u221e) weak" in page and "0.40 (unbounded) weak" in page
    assert "better on 1 of 2 tasks (group; +" in page and "worse on 1 (words)" in page
    assert (
        'data-label="Mean tokens">321<' in page
        and 'class="unreadable" style="width:12.50%"' in page
    )


def test_geometry_without_nulls_describes_none(spoilable):
    """Where no null was drawn no null is described, and there is no empty column."""
    run, config, _ = spoilable
    path = run.geometry("full") / "summary.json"
    summary = read_json(path)
    for row in summary["headline"]:
        row["null_mean"] = row["null_sd"] = None
    write_json(path, {**summary, "matrices": 3, "matrices_not_moved": 3})
    geometry = config.geometry.model_copy(update={"null_draws": 0})
    page = build_report(run, config.model_copy(update={"geometry": geometry})).read_text()
    assert "No null was drawn" in page and '<th scope="col">Null</th>' not in page
    assert "the two checkpoints are the same" in page
    assert "computed in fp32, stored as bf16" in page, (
        "the records' precision, not the config's auto"
    )


def test_no_torch_is_needed():
    """Comparing and reporting read files only: importing them does not import torch."""
    code = "import sys, evals.compare, evals.report.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
