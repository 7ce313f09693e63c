"""Makes a run of invented answers with six tasks and its report, and pictures of the page at 1400 and 390 pixels, light
and dark.

    python scripts/report_screenshots.py OUT --chromium PATH [--questions 120]

No model is loaded. OUT gets run/ and light-1400.png, dark-1400.png, light-390.png and dark-390.png; a line a width says
what is wider than the page.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evals.compare import compare
from evals.report.build import build_report
from vlopd.config.experiment import ExperimentConfig
from vlopd.files import write_json, write_jsonl
from vlopd.run.folder import RunFolder

TASKS = ("mathvista", "chartqa", "pope", "aime25", "gsm8k", "hallusionbench_with_a_long_name")
LONG_NAME = "subnetwork-of-the-first-seed-with-five-percent-of-all-coordinates"
SKILL = {
    "base": 0.35,
    "teacher": 0.8,
    "full": 0.7,
    LONG_NAME: 0.66,
    "random-0": 0.5,
    "random-1": 0.52,
    "random-2": 0.48,
    "transplant": 0.42,
}
STEP = (
    "**Step {k}.** Let $x_{k}$ be the length of side {k}; by the law of cosines\n"
    "$$x_{k}^2 = a^2 + b^2 - 2ab\\cos\\theta, \\qquad \\theta = \\frac{{\\pi}}{{{d}}}$$\n"
    "- so \\(x_{k} \\approx {d}.{k}\\) < 100 & the price is $70,000.\n\n"
)
ODDITIES = "A </script> in a text, <img src=x onerror=alert(1)>, `x < 1` and $\\frac{1}{0$ stay as written.\n\n"
PROBE = """<script>
setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, math")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  parent.postMessage(JSON.stringify(wide.map(e => e.tagName + "." + e.className).slice(0, 20)), "*");
}, 1500);
</script>"""
"""Tells the frame around the page which elements are cut at the right."""


def config_of() -> ExperimentConfig:
    """A run with a subnetwork of a long name, three random controls and a transplant."""
    masks = {"visible": {"type": "top_fraction", "of": "full", "fraction": 0.05}}
    masks |= {f"random-{i}": {"type": "random", "like": "visible", "seed": i} for i in range(3)}
    arms = {
        "base": {"type": "base"},
        "teacher": {"type": "teacher"},
        "full": {"type": "distill", "seed": 0},
        LONG_NAME: {"type": "distill", "seed": 1, "mask": "visible"},
        **{f"random-{i}": {"type": "distill", "seed": 1, "mask": f"random-{i}"} for i in range(3)},
        "transplant": {"type": "transplant", "of": "full", "mask": "visible"},
    }
    tree = {
        "name": "invented",
        "title": "Invented answers on six tasks",
        "student": "builtin:student",
        "teacher": "builtin:teacher",
        "data": {"type": "shapes"},
        "train": {"steps": 200, "prompts_per_step": 64},
        "rollout": {"max_new_tokens": 1024},
        "masks": masks,
        "arms": arms,
        "geometry": {"arms": []},
        "eval": {"tasks": TASKS, "bootstrap_draws": 500},
    }
    return ExperimentConfig.model_validate(tree)


def write_picture(path: Path, seed: int) -> None:
    """A chart of five bars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (480, 320), "#f7f4ee")
    pen = ImageDraw.Draw(picture)
    for k, height in enumerate(np.random.default_rng(seed).integers(40, 280, 5)):
        pen.rectangle((30 + 90 * k, 310 - int(height), 90 + 90 * k, 310), fill="#2b6f9e")
    picture.save(path)


def row(task: str, i: int, outcome: str, rng: np.random.Generator, pictured: bool) -> dict:
    """A row of samples_<task>.jsonl: short answers on pope, else about 4,000 characters."""
    steps = "".join(STEP.format(k=k, d=int(rng.integers(2, 9))) for k in range(1, 20))
    answer = f"\\boxed{{{i}}}" if outcome == "right" else f"\\boxed{{{i + 1}}}"
    text = ("Yes" if outcome == "right" else "No") if task == "pope" else ODDITIES + steps
    text += (
        "" if task == "pope" or outcome == "cut" else f"### Final answer\nThe answer is {answer}."
    )
    thought = None if task != "aime25" else f"<think>\n{steps}</think>"
    tokens = 2 if task == "pope" else int(rng.integers(600, 1400))
    pictures = [f"evals/images/{task}/{i % 8}.png"] if pictured else []
    return {
        "doc_id": i,
        "doc_hash": f"{task}{i}",
        "prompt_hash": f"{task}{i}",
        "question": f"In the figure, $\\angle ABC = {i}^\\circ$. What is the length of side $x_{{{i}}}$?",
        "prompt": f"<|user|>\n<image>In the figure, what is x_{i}?\nAnswer with a number.<|assistant|>\n",
        "images": pictures,
        "target": str(i),
        "completion": text,
        "thought": thought,
        "tokens": tokens,
        "thought_tokens": tokens // 2 if thought else 0,
        "stop": "length" if outcome == "cut" else "end",
        "truncated": int(outcome == "cut"),
        "outcome": outcome,
        "exact_match": float(outcome == "right"),
        "extraction_failure": float(outcome in ("unreadable", "cut")),
        "group": ("algebra", "geometry", "counting")[i % 3],
        "cluster": None,
    }


def write_run(root: Path, questions: int) -> tuple[RunFolder, ExperimentConfig]:
    """The run folder, as the stages would leave it, without weights."""
    config, run = config_of(), RunFolder(root)
    rng = np.random.default_rng(0)
    resolved = json.loads(config.model_dump_json())
    about = {"config": resolved, "created": "2026-11-28T04:00:00Z", "format": 2, "history": []}
    write_json(
        root / "run.json", about | {"seeds": {"full": 0}, "precision": resolved["precision"]}
    )
    for arm, its in config.arms.items():
        for task in TASKS:
            pictured = task not in ("aime25", "gsm8k")
            rows = []
            for i in range(questions):
                wrong = str(rng.choice(["wrong", "wrong", "unreadable", "cut"]))
                outcome = "right" if rng.random() < SKILL[arm] else wrong
                rows.append(row(task, i, outcome, rng, pictured))
                if pictured and i < 8:
                    write_picture(root / rows[-1]["images"][0], i)
            write_jsonl(run.eval(arm) / f"samples_{task}.jsonl", rows)
        failures = dict.fromkeys(TASKS, 0.1)
        results = {
            "arm": arm,
            "inputs": {},
            "checkpoint_digest": "ab" * 32,
            "primary_metric": dict.fromkeys(TASKS, "exact_match"),
            "data_digest": dict.fromkeys(TASKS, "cd" * 32),
            "chance": {"pope": {"all": 0.5}},
            "extraction_failure_fraction": failures,
            "not_compared": {"ocrbench": "its metric is of the whole corpus"},
            "leaves": {task: [task] for task in TASKS},
            "higher_is_better": {task: {"exact_match": True} for task in TASKS},
            "results": {},
        }
        write_json(run.eval(arm) / "results.json", results)
        write_record(run, config, arm)
        if its.type == "distill":
            write_training(run, arm, rng)
    return run, config


def write_record(run: RunFolder, config: ExperimentConfig, arm: str) -> None:
    """record.json of an arm, and memory.json of a trained one."""
    its = config.arms[arm]
    record = {"arm": arm, "type": its.type, "checkpoint_digest": "ab" * 32, "inputs": {}}
    record["precision"] = {"compute": "bf16", "stored": "bfloat16", "values": "fp32"}
    if its.type == "distill":
        record |= {"seed": its.seed, "mask": its.mask, "density": 0.05 if its.mask else 1.0}
        record |= {"trained_parameters": 37_000, "total_parameters": 739_200, "steps": 200}
        record |= {"seconds": 5400.0, "device": "cuda:0", "processes": 8}
        memory = {"device": "NVIDIA H100", "peak_bytes": {"student": 7e10}, "peak_of": "allocated"}
        write_json(run.arm(arm) / "memory.json", memory)
    write_json(run.arm_record(arm), record)


def write_training(run: RunFolder, arm: str, rng: np.random.Generator) -> None:
    """metrics.jsonl and heldout.jsonl of an arm."""
    steps = np.arange(200)
    level = 0.2 + 1.5 * np.exp(-steps / (20 if arm == "full" else 50))
    noise = rng.gamma(30, 1 / 30, (4, 200))
    rows = [
        {"step": int(s), "loss": float(k), "kl": float(k), "student_entropy": float(0.5 * e)}
        | {
            "mean_completion_tokens": float(700 * n),
            "truncated_fraction": 0.03,
            "reward": float(1 / (1 + k)),
        }
        | {"grad_norm": float(2 * g), "tokens_per_second": 9000.0, "seconds": 27.0}
        for s, k, e, n, g in zip(steps, level * noise[0], *noise[1:], strict=True)
    ]
    write_jsonl(run.arm(arm) / "metrics.jsonl", rows)
    scores = [
        {
            "step": s,
            "task": "mathvista_validation",
            "exact_match": 0.35 + 0.3 * s / 200 * SKILL[arm],
        }
        for s in range(0, 201, 50)
    ]
    write_jsonl(run.arm(arm) / "heldout.jsonl", scores)


def photograph(page: Path, out: Path, chromium: str, height: int) -> None:
    """The four pictures of a page; prints what is cut at the right.

    A window cannot be narrower than 500 pixels, so the narrow page stands in a frame of 390.
    """
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    for width in (1400, 390):
        for scheme in ("light", "dark"):
            shown = page.with_name(f"{scheme}.html")
            shown.write_text(
                f'<body style="margin:0;color-scheme:{scheme}"><iframe src="{page.name}" '
                f'style="border:0;width:{width}px;height:{height}px;color-scheme:{scheme}">'
            )
            words = [
                f"--window-size={max(width, 500)},{height}",
                f"--screenshot={out}/{scheme}-{width}.png",
            ]
            words.append(f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
            browse(chromium, [*words, shown.as_uri()])
            shown.unlink()
        frame = page.with_name("frame.html")
        frame.write_text(
            "<title>unknown</title><script>onmessage = event => {document.title = event.data}</script>"
            f'<iframe src="{probed.name}" style="border:0;width:{width}px;height:{height}px"></iframe>'
        )
        words = [f"--window-size=1500,{height}", "--dump-dom", frame.as_uri()]
        title = re.search(r"<title>(.*?)</title>", browse(chromium, words))
        print(f"{width} pixels: cut at the right: {title[1] if title else 'unknown'}")
        frame.unlink()
    probed.unlink()


def browse(chromium: str, words: list[str]) -> str:
    common = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=6000",
    ]
    done = subprocess.run([chromium, *common, *words], capture_output=True, text=True, timeout=180)
    return done.stdout


def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("out", type=Path)
    asked.add_argument("--chromium", default="chromium", help="the browser's path")
    asked.add_argument("--questions", type=int, default=120, help="questions a task")
    asked.add_argument("--height", type=int, default=4000, help="pixels of a picture")
    asked.add_argument("--open", action="store_true", help="unfold everything first")
    given = asked.parse_args()
    run, config = write_run(given.out / "run", given.questions)
    compare(run, config)
    page = build_report(run, config)
    shown = page.with_name("shown.html")
    text = page.read_text()
    shown.write_text(text.replace("<details", "<details open") if given.open else text)
    photograph(shown.resolve(), given.out.resolve(), given.chromium, given.height)
    shown.unlink()


if __name__ == "__main__":
    main()
