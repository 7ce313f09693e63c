"""A training run's logs as data frames, and its curves as a figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from vlopd.files import read_jsonl

CURVES = {
    "loss": "loss (nats per token)",
    "kl": "KL to the teacher (nats per token)",
    "reward": "reward",
}
"""Columns of metrics.jsonl that are drawn, where a run has them, with their labels."""


class Drawing(Figure):
    """A matplotlib figure that a notebook displays as SVG, whether or not pyplot is imported."""

    def _repr_svg_(self) -> str:
        text = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            self.savefig(text, format="svg")
        return text.getvalue()


def read_frame(path: Path) -> pd.DataFrame:
    """The rows of a JSON-lines file; empty where it does not exist."""
    return frame_of(read_jsonl(path, "step") if path.exists() else [])


def frame_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of a log as a data frame, in which columns of numbers and nulls are numeric."""
    frame = pd.DataFrame(rows)
    empty = [name for name in frame if frame[name].isna().all()]
    return frame.astype({name: float for name in empty if name != "image"})


def plot_curves(metrics: pd.DataFrame, held_out: pd.DataFrame, title: str) -> Drawing:
    """Loss, KL and reward by optimizer step (every step faint, a running mean on top), and held-out scores by task."""
    drawn = [name for name in CURVES if name in metrics and metrics[name].notna().any()]
    panels = len(drawn) + (not held_out.empty)
    figure = Drawing(figsize=(3.4 * max(panels, 1), 2.6), layout="constrained")
    axes = figure.subplots(1, max(panels, 1), squeeze=False)[0]
    for each, name in zip(axes, drawn, strict=False):
        smooth = metrics[name].rolling(max(1, len(metrics) // 40), min_periods=1, center=True)
        each.plot(metrics.step, metrics[name], lw=0.5, alpha=0.3, color="C0")
        each.plot(metrics.step, smooth.mean(), lw=1.5, color="C0")
        each.set_title(CURVES[name], fontsize=9, loc="left")
    if not held_out.empty:
        for task, part in held_out.groupby("task", sort=False):
            about = ("step", "task", "limit", "seconds")
            metric = next(name for name in part if name not in about and part[name].notna().any())
            axes[-1].plot(part.step, part[metric], "o-", ms=3, label=f"{task}: {metric}")
        axes[-1].set_title("held-out score", fontsize=9, loc="left")
        axes[-1].legend(fontsize=8, frameon=False)
    for each in axes:
        each.set_xlabel("optimizer step")
        each.grid(alpha=0.15)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    return figure


def curves_html(metrics: pd.DataFrame, held_out: pd.DataFrame, title: str) -> str:
    """The curves and the last step's metrics, for a notebook."""
    shown = [name for name in (*CURVES, "completion_tokens", "seconds") if name in metrics]
    svg = plot_curves(metrics, held_out, title)._repr_svg_()
    return svg[svg.index("<svg") :] + metrics.tail(1)[["step", *shown]].to_html(index=False)
