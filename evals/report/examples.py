"""Examples for the report: test questions on which arms disagree, and training samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from evals.report.tables import ORDER
from vlopd.files import read_jsonl
from vlopd.run.folder import RunFolder

EXAMPLES = 12
SAMPLES_PER_ARM = 3
LARGEST_BYTES = 40_000
"""Larger images are embedded as JPEG of at most `LARGEST_SIDE` pixels a side."""
LARGEST_SIDE = 384
FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_LOGPROB = -6.0
"""Teacher log-probability (nats) at and below which a token has the strongest colour."""
LARGEST_KL = 2.0
"""KL(arm || teacher) of a token (nats) at and above which it has the strongest colour."""


def questions(run: RunFolder, task: str, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Up to EXAMPLES questions of a task on which arms differ, interleaved over kinds.

    Questions with an image come first, among them those where full and a subnetwork differ. Arms with the same answer
    share a line.
    """
    arms = sorted(entry["arms"], key=lambda arm: ORDER.index(entry["arms"][arm]["role"]))
    roles = {arm: entry["arms"][arm]["role"] for arm in arms}
    tables = {arm: read_jsonl(run.eval(arm) / f"samples_{task}.jsonl") for arm in arms}
    divergences = {arm: _token_divergences(run, arm, task) for arm in arms}
    by_key = {arm: {(r["doc_id"], r["doc_hash"]): r for r in rows} for arm, rows in tables.items()}
    found = []
    for row in tables[arms[0]]:
        given = {arm: by_key[arm][row["doc_id"], row["doc_hash"]] for arm in arms}
        right = {arm: float(answer[entry["metric"]]) for arm, answer in given.items()}
        if len(set(right.values())) == 1:
            continue
        apart = {right[arm] for arm in arms if roles[arm] in ("full", "subnetwork")}
        answers: dict[tuple[float, str], list[str]] = {}
        for arm in arms:
            answers.setdefault((right[arm], given[arm]["completion"]), []).append(arm)
        tokens = {arm: divergences[arm].get(row["doc_id"]) for arm in arms}
        found.append(
            {
                "task": task,
                "kind": row["group"],
                "apart": len(apart) > 1,
                "question": row["question"],
                "reference": row["target"],
                "picture": next(iter(row.get("images") or [row.get("image")]), None),
                "answers": [
                    {
                        "score": score,
                        "text": text,
                        "arms": those,
                        "tokens": next((tokens[arm] for arm in those if tokens[arm]), None),
                    }
                    for (score, text), those in sorted(
                        answers.items(), key=lambda item: -item[0][0]
                    )
                ],
            }
        )
    # stable sort: within a rank, the data's own order
    found.sort(key=lambda q: not q["apart"])
    pictured = _interleave([q for q in found if q["picture"]])
    chosen = (pictured + _interleave([q for q in found if not q["picture"]]))[:EXAMPLES]
    for question in chosen:
        question["picture"] = _data_uri(run.root, question["picture"])
    return chosen


def _token_divergences(run: RunFolder, arm: str, task: str) -> dict[int, list[dict[str, Any]]]:
    """{doc_id: tokens of the arm's answer with KL(arm || teacher)}, for questions that have them."""
    path = run.eval(arm) / f"tokens_{task}.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    return {
        row["doc_id"]: [
            {"text": _display_text(text), "kl": kl, "strength": min(1.0, kl / LARGEST_KL)}
            for text, kl in zip(row["tokens"], row["kl"], strict=True)
        ]
        for row in rows
    }


def _display_text(token: str) -> str:
    """A vocabulary entry as text: byte-level and sentencepiece space marks become spaces."""
    return token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", " ")


def _interleave(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first question of every kind, then the second of every kind, and so on."""
    kinds: dict[Any, list[dict[str, Any]]] = {}
    for question in questions:
        kinds.setdefault(question["kind"], []).append(question)
    return [q for layer in zip_longest(*kinds.values()) for q in layer if q]


def generations(run: RunFolder, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Training samples of each arm, from the first, middle and last step, with a colour per token."""
    found = []
    for arm in arms:
        path = run.arm(arm) / "samples.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        steps = sorted({row["step"] for row in rows})
        if not steps:
            continue
        wanted = sorted({steps[round(i * (len(steps) - 1) / 2)] for i in range(SAMPLES_PER_ARM)})
        for step in wanted:
            row = next(row for row in rows if row["step"] == step)
            columns = {
                model: row[f"{model}_logprobs"]
                for model in ("student", "teacher")
                if f"{model}_logprobs" in row  # no teacher's where there is none
            }
            tokens = [
                _token_context(text, {model: column[k] for model, column in columns.items()})
                for k, text in enumerate(row["tokens"])
            ]
            picture = _data_uri(run.arm(arm), row["image"])
            found.append({**row, "arm": arm, "tokens": tokens, "picture": picture})
    return found


def _token_context(text: str, logprobs: Mapping[str, float | None]) -> dict[str, Any]:
    """A sampled token with its log-probs as title and the teacher's as colour; null is a banned token."""
    values = (
        f"{model} {'-inf' if x is None else format(x, '.2f')}" for model, x in logprobs.items()
    )
    teacher = logprobs.get("teacher", 0.0)
    strength = 1.0 if teacher is None else min(1.0, max(0.0, teacher / LEAST_LOGPROB))
    return {"text": _display_text(text), "title": f"{', '.join(values)} nats", "strength": strength}


def _data_uri(root: Path, name: str | None) -> str | None:
    """An image of the run as a data: URI, downscaled if large.

    None where `name` is no image file inside the run folder `root`: rows are untrusted, and must not embed other files
    into a report that is shared.
    """
    if not isinstance(name, str):
        return None
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            return None
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            kind = str(picture.format).lower()
            if len(content) > LARGEST_BYTES:
                small = picture.convert("RGB")
                small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
                buffer = io.BytesIO()
                small.save(buffer, "JPEG", quality=80)
                content, kind = buffer.getvalue(), "jpeg"
            else:
                picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
