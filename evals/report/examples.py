"""Examples for the report: the test questions with every arm's answers, and training samples.

Questions are rendered here, as HTML in JSON; the page makes cards of the few that it shows. The first INLINE_BYTES
stand in the page, the rest in files beside it, which are loaded as scripts, since a page opened from a disk can fetch
nothing.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from evals.report.prose import Typesetter, shortened
from evals.report.tables import ORDER
from vlopd.files import is_inside
from vlopd.models.thinking import split
from vlopd.run.folder import RunFolder
from vlopd.run.schemas.read import read_log

MOST_QUESTIONS = 2_000
INLINE_BYTES = 3_000_000
CHUNK_BYTES = 1_000_000
MOST_BYTES = 60_000_000
"""Size of all examples; questions beyond it are left out, and counted."""
SAMPLES_SHOWN = 4
"""Of several sampled answers of one arm to one question, those that are shown."""
TRAINING_SAMPLES_PER_ARM = 3
MOST_TOKENS = 300
"""Coloured tokens of one text."""
LARGEST_BYTES = 40_000
"""Larger images are embedded as JPEG of at most `LARGEST_SIDE` pixels a side."""
LARGEST_SIDE = 640
FORMATS = ("PNG", "JPEG", "WEBP")
LEAST_LOGPROB = -6.0
"""Teacher log-probability (nats) at and below which a token has the strongest colour."""
OUTCOMES = {"r": "right", "w": "wrong", "u": "unreadable", "c": "cut", "p": "partly right"}
"""Letters of the outcomes in the index."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass
class Examples:
    """The questions that a report shows: an index to filter by, and their contents in chunks.

    index: per question [task, kind, one letter of OUTCOMES per arm ("." none), one digit per arm, equal for equal
    scores]; tasks and kinds by number. chunks: JSON arrays of contents in the index's order, the first for the page;
    `starts` has the first question of each.
    """

    arms: list[str]
    tasks: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    index: list[list[Any]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0

    @property
    def outcomes(self) -> dict[str, str]:
        """The letters in use, with their words."""
        used = {letter for row in self.index for letter in row[2]}
        return {letter: word for letter, word in OUTCOMES.items() if letter in used}

    def head(self) -> str:
        """What the page needs to filter and to find contents, as JSON for a script block."""
        about = {key: value for key, value in self.__dict__.items() if key != "chunks"}
        return for_script({**about, "outcomes": self.outcomes})

    def write_beside(self, folder: Path) -> None:
        """Writes all chunks but the first to folder/N.js, if there are any."""
        for number, chunk in enumerate(self.chunks[1:], start=1):
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.js").write_text(f"received({number},{chunk});\n")


def for_script(value: Any) -> str:
    """A value as JSON that cannot end, or open, a script block."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for mark in ("</", "<!", "<s", "<S"):
        text = text.replace(mark, f"\\u003c{mark[1]}")
    return text


@dataclass(frozen=True)
class _Place:
    """A question before it is rendered: where it stands, and what it is chosen by."""

    task: str
    key: tuple[Any, Any]
    kind: str | None
    letters: str
    digits: str
    apart: bool
    pictured: bool


def collect(
    run: RunFolder, compared: Mapping[str, Any], setter: Typesetter | None = None
) -> Examples:
    """Up to MOST_QUESTIONS questions of the compared tasks, with all answers.

    Kinds and tasks alternate; questions on which full and a subnetwork differ come first, then others on which arms
    differ, among both those with a picture first.
    """
    setter = setter or Typesetter()
    roles = {arm: its["role"] for arm, its in compared["arms"].items()}
    arms = sorted(roles, key=lambda arm: ORDER.index(roles[arm]))
    found = Examples(arms)
    places: list[_Place] = []
    leaves = {task: entry for task, entry in compared["tasks"].items() if not entry.get("members")}
    for task, entry in leaves.items():
        own = list(_places(run, task, entry, arms, roles))
        found.total += len(own)
        places += _interleave(own)[:MOST_QUESTIONS]
    chosen = _interleave(places)[:MOST_QUESTIONS]
    contents: dict[tuple[str, Any], str] = {}
    for task in leaves:
        wanted = {place.key for place in chosen if place.task == task}
        contents |= _contents(
            run, task, arms, wanted, setter, bool(compared.get("sampled")), leaves
        )
    size = 0
    chunk: list[str] = []
    for place in chosen:
        content = contents[place.task, place.key]
        limit = CHUNK_BYTES if found.chunks else INLINE_BYTES
        if chunk and size + len(content) > limit:
            found.chunks.append(f"[{','.join(chunk)}]")
            chunk, size = [], 0
        if sum(map(len, found.chunks)) + size + len(content) > MOST_BYTES:
            break
        if not chunk:
            found.starts.append(len(found.index))
        chunk.append(content)
        size += len(content)
        where = [_number(found.tasks, place.task), _number(found.kinds, place.kind or "")]
        found.index.append([*where, place.letters, place.digits])
    if chunk:
        found.chunks.append(f"[{','.join(chunk)}]")
    found.pairs = _pairs(compared, arms)
    return found


def _places(
    run: RunFolder,
    task: str,
    entry: Mapping[str, Any],
    arms: Sequence[str],
    roles: Mapping[str, str],
) -> Iterator[_Place]:
    """The questions of a task that every arm has answered, as they stand in the rows."""
    tables = {arm: _marks(run, arm, task, entry) for arm in arms}
    if not all(tables.values()):
        return
    first = tables[arms[0]]
    for key, (_, _, kind, pictured) in first.items():
        if any(key not in tables[arm] for arm in arms):
            continue
        scores = [tables[arm][key][0] for arm in arms]
        distinct = sorted(set(scores), key=lambda x: (x is None, x))
        digits = "".join(DIGITS[min(distinct.index(score), len(DIGITS) - 1)] for score in scores)
        main = {
            d for d, arm in zip(digits, arms, strict=True) if roles[arm] in ("full", "subnetwork")
        }
        letters = "".join(tables[arm][key][1] for arm in arms)
        yield _Place(task, key, kind, letters, digits, len(main) > 1, pictured)


def _marks(
    run: RunFolder, arm: str, task: str, entry: Mapping[str, Any]
) -> dict[tuple[Any, Any], tuple[float | None, str, str | None, bool]]:
    """{question: (score, letter of its outcome, kind, whether it has a picture)} of an arm's rows."""
    found = {}
    fraction = entry.get("scale", "fraction") == "fraction"
    for row in _rows(run, arm, task):
        value = row.get(entry["metric"])
        score = float(value) if isinstance(value, (int, float)) else None
        letter = _letter(row, score) if fraction else "."
        pictured = bool(row.get("images") or row.get("image"))
        found[row["doc_id"], row["doc_hash"]] = (score, letter, row.get("group"), pictured)
    return found


def _letter(row: Mapping[str, Any], score: float | None) -> str:
    """The letter of a row's outcome, from its score where it has no such column (or one per sample)."""
    given = row.get("outcome")
    if isinstance(given, str) and given in OUTCOMES.values():
        return given[0]
    if score is None:
        return "."
    if 0 < score < 1:
        return "p"
    if score >= 1:
        return "r"
    if (row.get("truncated") or 0) >= 1:
        return "c"
    return "u" if (row.get("extraction_failure") or 0) >= 1 else "w"


def _rows(run: RunFolder, arm: str, task: str) -> list[dict[str, Any]]:
    return _read_rows(run, arm, f"samples_{task}.jsonl")


def _read_rows(run: RunFolder, arm: str, name: str) -> list[dict[str, Any]]:
    """The rows of a file of an arm's evaluation; none where it is missing, or outside of the run: a comparison that
    somebody sent names its arms and tasks."""
    path = run.eval(arm) / name
    return read_log(path) if is_inside(path, [run.root]) else []


def _contents(
    run: RunFolder,
    task: str,
    arms: Sequence[str],
    wanted: set[tuple[Any, Any]],
    setter: Typesetter,
    sampled: bool,
    leaves: Mapping[str, Mapping[str, Any]],
) -> dict[tuple[str, Any], str]:
    """{(task, question): its content as JSON} of the questions in `wanted`."""
    metric = leaves[task]["metric"]
    given: dict[tuple[Any, Any], dict[str, dict[str, Any]]] = {key: {} for key in wanted}
    for arm in arms if wanted else ():
        for row in _rows(run, arm, task):
            key = row["doc_id"], row["doc_hash"]
            if key in wanted:
                given[key][arm] = row
    divergences = {arm: _token_divergences(run, arm, task) for arm in arms} if wanted else {}
    found = {}
    for key, rows in given.items():
        first = rows[arms[0]]
        prompts: dict[str, list[int]] = {}
        answers: dict[Any, dict[str, Any]] = {}
        for number, arm in enumerate(arms):
            row = rows[arm]
            if row.get("prompt"):
                prompts.setdefault(shortened(str(row["prompt"])), []).append(number)
            # as text: of a corpus-level metric a row has an item, perhaps a list
            same = (str(row.get(metric)), row["completion"], row.get("thought"))
            if same in answers:
                answers[same]["arms"].append(number)
                continue
            answers[same] = {"arms": [number], "samples": _samples(row, setter, sampled)}
            value = row.get(metric)
            if isinstance(value, (int, float)):
                answers[same]["score"] = round(float(value), 4)
            if tokens := divergences[arm].get(row["doc_id"]):
                answers[same]["tokens"] = tokens
        pictures = first.get("images") or [first.get("image")]
        content = {
            "question": setter.html(str(first["question"]).strip()),
            "reference": setter.html(str(first["target"]).strip()),
            "prompts": list(prompts.items()),
            "pictures": [uri for name in pictures if (uri := _data_uri(run.root, name))],
            "answers": list(answers.values()),
        }
        found[task, key] = for_script(content)
    return found


def _samples(row: Mapping[str, Any], setter: Typesetter, sampled: bool) -> list[dict[str, str]]:
    """Each sampled answer of a row as HTML: its thought, its answer, and a line on its length and end."""
    # a task of temperature 0 has one answer in a sampled evaluation too
    sampled = sampled and str(row.get("stop") or "[").startswith("[")
    columns = {
        name: _listed(row.get(name), sampled)
        for name in ("completion", "thought", "outcome", "stop")
    }
    found = []
    for place, text in enumerate(columns["completion"][:SAMPLES_SHOWN]):
        own = {n: column[place] if place < len(column) else None for n, column in columns.items()}
        thought, answer = own["thought"], str(text)
        if not thought:
            reading = split(answer)
            thought, answer = reading.thought, reading.answer if reading.thought else answer
        sample = {"answer": setter.html(answer.strip())}
        if thought:
            sample["thought"] = setter.html(str(thought).strip())
        if sampled and own["outcome"]:
            sample["outcome"] = str(own["outcome"])
        if about := _about(row, own["stop"], sampled):
            sample["about"] = about
        found.append(sample)
    more = len(columns["completion"]) - len(found)
    if more > 0:
        found[-1]["about"] = f"{found[-1].get('about', '')} and {more} more samples".strip()
    return found


def _about(row: Mapping[str, Any], stop: Any, sampled: bool) -> str:
    """`410 tokens, 300 of them thought; stopped at the length limit`, as far as the row says."""
    parts = []
    if row.get("tokens") is not None:
        mean = "mean " if sampled else ""
        parts.append(f"{mean}{row['tokens']:,.0f} token{'s' if row['tokens'] != 1 else ''}")
        if row.get("thought_tokens"):
            parts[-1] += f", {row['thought_tokens']:,.0f} of them thought"
    if stop in ("length", "stop_string"):
        at = {"length": "cut at the length limit", "stop_string": "ended by a stop string"}
        parts.append(at[stop])
    return "; ".join(parts)


def _listed(value: Any, sampled: bool) -> list[Any]:
    """A column as the list of its samples; of a row with one answer, that one."""
    if sampled and isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) else [value]


def _token_divergences(run: RunFolder, arm: str, task: str) -> dict[int, list[list[Any]]]:
    """{doc_id: [[token, KL(arm || teacher) in nats], ...]} of the questions that have them."""
    rows = _read_rows(run, arm, f"tokens_{task}.jsonl")
    return {
        row["doc_id"]: [
            [shortened(_display_text(text)), round(kl, 2)]
            for text, kl in zip(row["tokens"][:MOST_TOKENS], row["kl"], strict=False)
        ]
        for row in rows
    }


def _display_text(token: str) -> str:
    """A vocabulary entry as text: byte-level and sentencepiece space marks become spaces."""
    return token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", " ")


def _interleave(places: Sequence[_Place]) -> list[_Place]:
    """By rank (see `collect`); within one the first of every task and kind, then the second of every one, ..."""
    ranks: dict[Any, dict[Any, list[_Place]]] = {}
    for place in places:
        differ = len(set(place.digits)) > 1
        rank = (not place.apart, not differ, not place.pictured)
        ranks.setdefault(rank, {}).setdefault((place.task, place.kind), []).append(place)
    return [
        place
        for rank in sorted(ranks)
        for layer in zip_longest(*ranks[rank].values())
        for place in layer
        if place
    ]


def _pairs(compared: Mapping[str, Any], arms: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of arms to filter differences by, as numbers: those of the contrasts, declared ones first, 24 at most."""
    contrasts = [its for entry in compared["tasks"].values() for its in entry["contrasts"]]
    contrasts.sort(key=lambda its: not its.get("declared"))
    pairs = {
        (arms.index(its["a"]), arms.index(its["b"])): None
        for its in contrasts
        if isinstance(its["a"], str) and isinstance(its["b"], str)
    }
    return list(pairs)[:24]


def _number(names: list[str], name: str) -> int:
    """The position of a name in a list, to which it is added."""
    if name not in names:
        names.append(name)
    return names.index(name)


def training_samples(run: RunFolder, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Training samples of each arm, from the first, middle and last step, with a colour per token."""
    found = []
    for arm in arms:
        path = run.arm(arm) / "samples.jsonl"
        rows = read_log(path)
        steps = sorted({row["step"] for row in rows})
        if not steps:
            continue
        n = TRAINING_SAMPLES_PER_ARM
        wanted = sorted({steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)})
        for step in wanted:
            row = next(row for row in rows if row["step"] == step)
            columns = {
                model: row[f"{model}_logprobs"]
                for model in ("student", "teacher")
                if f"{model}_logprobs" in row  # no teacher's where there is none
            }
            tokens = [
                _token_context(text, {model: column[k] for model, column in columns.items()})
                for k, text in enumerate(row["tokens"][:MOST_TOKENS])
            ]
            picture = _data_uri(run.arm(arm), row["image"])
            more = len(row["tokens"]) - len(tokens)
            found.append({**row, "arm": arm, "tokens": tokens, "more": more, "picture": picture})
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
        path = root / name
        if not is_inside(path, [root]) or not path.is_file():
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
