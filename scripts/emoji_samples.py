"""Draws questions of the emoji pair with the models' answers: docs/assets/emoji-samples.png.

    python scripts/emoji_samples.py runs/study/e docs/assets/emoji-samples.png

The drawings are those of scripts/download_emoji.py (VLOPD_EMOJI). A column for each group of emoji; the first row has a
drawing by the artist that the teacher alone knows, the second one by the student's artist of a concept that neither was
trained on: the first question on which base and full differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from evals.tasks.emoji import doc_to_image
from vlopd.data import emoji
from vlopd.files import read_jsonl

ARMS = ("base", "teacher", "full-0")
ROWS = ("artist", "concept")
RIGHT, WRONG = "#009e73", "#d55e00"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(words)
    answers = {
        arm: {
            row["doc_id"]: row
            for row in read_jsonl(given.run / "evals" / arm / "samples_emoji.jsonl")
        }
        for arm in ARMS
    }
    base, full = answers["base"], answers["full-0"]
    docs = emoji.held_out("test")
    targets = list(dict.fromkeys(row["target"] for row in base.values()))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.35 * len(targets), 2.2 * len(ROWS)))
        panels = figure.subplots(len(ROWS), len(targets), squeeze=False)
        figure.subplots_adjust(hspace=0.75, top=0.93, bottom=0.17, left=0.02, right=0.98)
        for row, group in zip(panels, ROWS, strict=True):
            for axes, target in zip(row, targets, strict=True):
                own = [
                    k for k, it in base.items() if (it["group"], it["target"]) == (group, target)
                ]
                differ = [k for k in own if base[k]["acc"] != full[k]["acc"]]
                chosen = (differ or own)[0]
                axes.imshow(doc_to_image(docs[chosen])[0])
                axes.set_axis_off()
                axes.set_title(target, fontsize=9)
                for k, arm in enumerate(ARMS):
                    its = answers[arm][chosen]
                    axes.text(
                        0.5,
                        -0.14 - 0.17 * k,
                        f"{arm.removesuffix('-0')}: {its['completion']}",
                        color=RIGHT if its["acc"] else WRONG,
                        ha="center",
                        transform=axes.transAxes,
                    )
        figure.savefig(given.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
