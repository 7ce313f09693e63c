"""MMMU-Pro, MMStar, HallusionBench, OCRBench, BLINK, CV-Bench, V*, HR-Bench: what a model sees, and invents.

Prompts are ours, so scores are comparable between arms, not with published ones. Schemas are those of lmms-eval's
tasks, of the hub's dataset cards and, for HallusionBench, of the authors' repository (tianyi-lab/HallusionBench);
docs/tasks.md says what could not be verified. Scores follow the authors' rules under their names where rules suffice
(MMMU-Pro, MMStar, OCRBench), with `careful`, our reading of the answer, beside them. Where the authors use a model as
judge (HallusionBench, BLINK, HR-Bench) or likelihoods (V*), answers are read by rules here.

Metrics of groups of questions (all of a figure right, the mean over subtasks) are aggregations of [group, right] pairs.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from evals.lm import PLACEHOLDER
from evals.tasks.benchmarks import documents
from evals.tasks.benchmarks.documents import (
    BASE64,
    Benchmark,
    Document,
    Row,
    document,
    outcome,
    text,
)
from evals.tasks.benchmarks.vision import choose, interleaved, listed, place_of
from vlopd.data.raw_values import cell_text
from vlopd.errors import DataError
from vlopd.grading.extraction import choice_letter, strip_reasoning, yes_or_no
from vlopd.grading.words import plain_words

PUNCTUATION = ",.!?;:'"
BY_LETTER = "{}\nAnswer with the letter of the right choice."
BLINK = (
    *("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test"),
    *("Jigsaw", "Multi-view_Reasoning", "Object_Localization", "Relative_Depth"),
    *("Relative_Reflectance", "Semantic_Correspondence", "Spatial_Relation"),
    *("Visual_Correspondence", "Visual_Similarity"),
)
"""The subtasks of BLINK, which are its hub configurations."""


def lettered(
    row: Row,
    prompt: str,
    question: str,
    letter: str,
    kind: str | None,
    choices: Sequence[str],
    pictures: Sequence[str],
    column: str = "answer",
    **more: Any,
) -> Document:
    """A question whose answer is a letter: scored by it, since two choices may have the same text."""
    answer = choices[place_of(letter, choices, column)]
    target = f"{letter}. {answer}"
    made = document(prompt, question, answer, kind, choices, pictures, **more)
    return {**made, "letter": letter, "target": target}


def mmmu_pro(row: Row) -> Document:
    """Ten or four options; images are placed at `<image 1>` in the question and its options."""
    asked, options = text(row, "question"), listed(row, "options")
    prompt, pictures = interleaved(choose(asked, options))
    letter, subject = text(row, "answer"), text(row, "subject")
    return lettered(row, prompt, asked, letter, subject, options, pictures)


def mmmu_pro_vision(row: Row) -> Document:
    """Question and options are only in the image."""
    asked = "Answer the question in the image with the letter of the right choice."
    options, letter, subject = listed(row, "options"), text(row, "answer"), text(row, "subject")
    return lettered(row, PLACEHOLDER + asked, asked, letter, subject, options, ["image"])


def mmstar(row: Row) -> Document:
    """The four options are within the question: `Options: A: ..., B: ..., C: ..., D: ...`."""
    asked, letter = text(row, "question"), text(row, "answer")
    prompt = PLACEHOLDER + BY_LETTER.format(asked)
    options = options_within(asked)
    if letter not in ascii_uppercase[: len(options)]:
        options = [f"option {each}" for each in "ABCD"]  # so only letters are read in the answer
    return lettered(row, prompt, asked, letter, text(row, "category"), options, ["image"])


def options_within(question: str) -> list[str]:
    """The options in a question's text: its lines `(A) ...`, else what follows `A:`, `A.`, `A)` or `(A)`.

    Empty where their letters are not in order.
    """
    for form in (r"^\(([A-H])\)\s*", r"(?:^|(?<=[\s,;:.]))(?:\(([A-H])\)|([A-H])[:.)])\s*"):
        marks = list(re.finditer(form, question, re.MULTILINE))
        letters = [next(filter(None, mark.groups())) for mark in marks]
        start = len(letters) - 1 - letters[::-1].index("A") if "A" in letters else len(letters)
        own = marks[start:]
        if len(own) < 2 or letters[start:] != list(ascii_uppercase[: len(own)]):
            continue
        ends = [mark.start() for mark in own[1:]] + [len(question)]
        found = [question[mark.end() : end] for mark, end in zip(own, ends, strict=True)]
        found[-1] = found[-1].split("\n")[0]
        return [each.strip().rstrip(",;").strip() for each in found]
    return []


def hallusion_bench(row: Row) -> Document:
    """A figure of a set, original or edited: questions of one figure and pairs across figures test consistency.

    A set is a cluster, since its figures share their questions.
    """
    parts = ("category", "subcategory", "set_id", "figure_id", "question_id")
    category, sub, its_set, figure, question = (text(row, each) for each in parts)
    gold = text(row, "gt_answer")
    if gold not in ("0", "1"):
        raise DataError(f"column 'gt_answer' is {gold!r}; it is 1 (yes) or 0 (no)")
    asked = text(row, "question")
    made = document(
        f"{PLACEHOLDER}{asked}\nAnswer yes or no.",
        asked,
        ("no", "yes")[int(gold)],
        f"{category} {sub}",
        ["yes", "no"],
        ["image"],
    )
    its_set = f"{category}_{sub}_{its_set}"
    groups = {"figure": f"{its_set}_{figure}", "pair": f"{its_set}_{question}"}
    return {**made, "cluster": its_set, **groups}


def ocrbench(row: Row) -> Document:
    """Text recognition, questions on text, key information, handwritten formulas; any of several answers is right."""
    asked, accepted = text(row, "question"), row["answer"]
    if isinstance(accepted, str):
        accepted = [accepted]
    accepted = [str(cell_text(each)) for each in accepted or () if each is not None]
    if not accepted or not all(each.strip() for each in accepted):
        raise DataError(f"column 'answer' holds {row['answer']!r} in place of a list of answers")
    return document(
        PLACEHOLDER + asked,
        asked,
        accepted[0],
        text(row, "question_type"),
        (),
        ["image"],
        accepted=accepted,
        formula=text(row, "dataset") == "HME100k",
    )


def blink(row: Row) -> Document:
    """One to four images before the authors' prompt, which ends with the choices; the answer is `(B)`."""
    pictures = [f"image_{k}" for k in range(1, 5) if row.get(f"image_{k}") is not None]
    if not pictures:
        raise DataError("column 'image_1' has no picture")
    prompt = PLACEHOLDER * len(pictures) + BY_LETTER.format(text(row, "prompt"))
    letter, kind = text(row, "answer").strip("()"), text(row, "sub_task")
    asked, choices = text(row, "question"), listed(row, "choices")
    return lettered(row, prompt, asked, letter, kind, choices, pictures)


def cv_bench(row: Row) -> Document:
    """2D (count, relation; of ADE20K and COCO) and 3D (depth, distance; of Omni3D); the answer is `(B)`."""
    letter, kind = text(row, "answer").strip("()"), f"{text(row, 'type')} {text(row, 'task')}"
    source = [text(row, "type"), text(row, "source")]
    prompt = PLACEHOLDER + BY_LETTER.format(text(row, "prompt"))
    asked, choices = text(row, "question"), listed(row, "choices")
    return lettered(row, prompt, asked, letter, kind, choices, ["image"], source=source)


def vstar(row: Row) -> Document:
    """The text has the options, a line each, and asks for the letter."""
    asked = text(row, "text")
    choices, kind = options_within(asked), text(row, "category")
    if not choices:
        raise DataError(f"column 'text' has no options (A) ..., (B) ...: {asked!r}")
    letter = text(row, "label")
    return lettered(row, PLACEHOLDER + asked, asked, letter, kind, choices, ["image"], "label")


def hrbench(row: Row) -> Document:
    """Each question is asked four times, with its options rotated."""
    asked = text(row, "question")
    last = max((k for k, each in enumerate("ABCD") if row[each] is not None), default=0)
    choices = [text(row, each) for each in "ABCD"[: last + 1]]
    prompt = PLACEHOLDER + choose(asked, choices)
    letter, kind, picture = text(row, "answer"), text(row, "category"), [f"{BASE64}image"]
    return lettered(row, prompt, asked, letter, kind, choices, picture)


HALLUSION = ("category", "subcategory", "set_id", "figure_id", "question_id", "question")
PRO = ("question", "options", "answer", "subject", "image_1")
HR = ("index", "question", "image", "answer", "category", "A", "B", "C", "D", "cycle_category")

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mmmu_pro_10", "MMMU/MMMU_Pro", "test", PRO, mmmu_pro, "standard (10 options)"),
        Benchmark("mmmu_pro_4", "MMMU/MMMU_Pro", "test", PRO, mmmu_pro, "standard (4 options)"),
        Benchmark(
            "mmmu_pro_vision",
            "MMMU/MMMU_Pro",
            "test",
            ("image", "options", "answer", "subject"),
            mmmu_pro_vision,
            "vision",
        ),
        Benchmark(
            "mmstar",
            "Lin-Chen/MMStar",
            "val",
            ("question", "image", "answer", "category"),
            mmstar,
            files="mmstar",
        ),
        Benchmark(
            "hallusion_bench",
            "lmms-lab-encoder/HallusionBench",
            "image",
            (*HALLUSION, "gt_answer", "image"),
            hallusion_bench,
            formerly="lmms-lab/HallusionBench",
        ),
        Benchmark(
            "ocrbench",
            "echo840/OCRBench",
            "test",
            ("dataset", "question", "question_type", "answer", "image"),
            ocrbench,
        ),
        Benchmark(
            "blink",
            "BLINK-Benchmark/BLINK",
            "val",
            ("question", "sub_task", "image_1", "choices", "answer", "prompt"),
            blink,
            BLINK,
        ),
        Benchmark(
            "cv_bench",
            "nyu-visionx/CV-Bench",
            "test",
            ("type", "task", "image", "question", "choices", "answer", "prompt", "source"),
            cv_bench,
        ),
        Benchmark(
            "vstar",
            "lmms-lab-encoder/vstar-bench",
            "test",
            ("image", "text", "category", "label"),
            vstar,
            formerly="lmms-lab/vstar-bench",
        ),
        *(
            Benchmark(
                f"hrbench_{size}",
                "DreamMr/HR-Bench",
                f"hrbench_{size}",
                HR,
                hrbench,
                "hrbench_version_split",
                f"hr_bench_{size}",
            )
            for size in ("4k", "8k")
        ),
    )
}


def dataset(benchmark: str, **_: Any) -> dict[str, Dataset]:
    return documents.documents(BENCHMARKS[benchmark])


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    return documents.pictures(BENCHMARKS[doc["benchmark"]], doc)


chance = documents.chance


# ------------------------------------------------------------------------------------------ scoring

Item = Sequence[Any]
"""[group, whether right] of one question."""


def score_letter(doc: Mapping[str, Any], results: list[str], metric: str = "acc") -> dict[str, Any]:
    """Accuracy of the chosen letter."""
    extracted = choice_letter(results[0], doc["choices"])
    return outcome(extracted, extracted == doc["letter"], metric)


def score_mmmu_pro(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """The authors' accuracy; but where they draw a letter at random, the answer is wrong."""
    found = mmmu_pro_letter(strip_reasoning(results[0]), doc["choices"])
    return {"acc": float(found == doc["letter"]), **score_letter(doc, results, "careful")}


def mmmu_pro_letter(said: str, choices: Sequence[str]) -> str | None:
    """The letter that the authors' parser finds (MMMU-Benchmark/MMMU, mmmu-pro/evaluate.py); None where it draws one.

    The only letter after the last "Answer:", else the last of the letters in brackets, before a space, before a full
    stop, or else (in more than five words) of the choices whose text occurs.
    """
    letters = ascii_uppercase[: len(choices)]
    _, mark, end = said.rpartition("Answer:")
    after = [letter for letter in letters if letter in end]
    if mark and len(after) == 1:
        return after[0]
    said = f" {said.strip(PUNCTUATION)} "
    for form in ("({})", "{} ", "{}."):
        if found := [letter for letter in letters if form.format(letter) in said]:
            whole = "({})" if form == "({})" else " {} "
            return max(found, key=lambda letter: said.rfind(whole.format(letter)))
    if len(said.split()) > 5:
        spoken = said.lower()
        places = {
            letter: spoken.rfind(choice.lower())
            for letter, choice in zip(letters, choices, strict=True)
        }
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return None


def score_mmstar(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """The authors' accuracy: the answer begins with the letter, `(`, "option" or "the answer is" before it.

    The rule is in lmms-eval's first version of the task, as brought from the authors' code.
    """
    said, letter = strip_reasoning(results[0]).lower().strip(), doc["letter"].lower()
    right = re.match(rf"(?:\(|option |the answer is )?{letter}", said) is not None
    return {"acc": float(right), **score_letter(doc, results, "careful")}


def score_hallusion_bench(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """aAcc, and what fAcc and qAcc are computed from; the authors ask GPT-4 whether an answer agrees."""
    extracted = yes_or_no(results[0], doc.get("question", ""))
    right = extracted == doc["answer"]
    groups = {"fAcc": [doc["figure"], right], "qAcc": [doc["pair"], right]}
    return {**outcome(extracted, right, "aAcc"), **groups}


def score_ocrbench(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Whether an accepted answer occurs, in lower case; formulas (HME100k) as written, but without spaces.

    `careful`: as whole words, so that 10 does not hold 1; formulas and texts that are not in Latin letters as above.
    """
    said = strip_reasoning(results[0]).strip()
    plain = without_spaces if doc["formula"] else lower
    right = any(plain(each) in plain(said) for each in doc["accepted"])
    careful = right if doc["formula"] else any(in_words(each, said) for each in doc["accepted"])
    found = outcome(said or None, right, "ocrbench_accuracy")
    scores = {"careful": float(careful), "final_score": [None, right]}
    return {"ocrbench_accuracy": found.pop("ocrbench_accuracy"), **scores, **found}


def without_spaces(said: str) -> str:
    return said.strip().replace("\n", " ").replace(" ", "")


def lower(said: str) -> str:
    return said.lower().strip().replace("\n", " ")


def in_words(accepted: str, said: str) -> bool:
    """Whether an answer's words occur in a text, next to each other; full-width letters count as plain ones."""
    wanted, words = (unicodedata.normalize("NFKC", each).lower() for each in (accepted, said))
    if not wanted.isascii() or not plain_words(wanted):
        return lower(wanted) in lower(words)
    return f" {plain_words(wanted)} " in f" {plain_words(words)} "


def score_blink(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    found = score_letter(doc, results)
    return {**found, "total": [doc["kind"], found["acc"]]}


def score_cv_bench(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    found = score_letter(doc, results)
    return {**found, "cv_bench": [*doc["source"], found["acc"]]}


def score_hrbench(doc: Mapping[str, Any], results: list[str]) -> dict[str, Any]:
    """Accuracy, which is the authors' average over the rotations, and whether a question is right in all of them."""
    found = score_letter(doc, results)
    question = f"{doc['digests'][0]} {doc['question']}"
    return {**found, "all_rotations": [question, found["acc"]]}


def by_group(items: Sequence[Item]) -> dict[Any, list[float]]:
    found: defaultdict[Any, list[float]] = defaultdict(list)
    for group, right in items:
        found[group].append(float(right))
    return found


def all_right(items: Sequence[Item]) -> float:
    """The fraction of groups whose questions are all right."""
    return float(np.mean([min(each) for each in by_group(items).values()]))


def mean_of_groups(items: Sequence[Item]) -> float:
    """The mean of the groups' accuracies."""
    return float(np.mean([np.mean(each) for each in by_group(items).values()]))


def out_of_1000(items: Sequence[Item]) -> float:
    """OCRBench's final score, the number of right answers to its 1,000 questions; of fewer, in proportion."""
    return 1000 * float(np.mean([right for _, right in items]))


def cv_bench_accuracy(items: Sequence[Item]) -> float:
    """((ADE20K + COCO) / 2 + Omni3D) / 2 of the accuracies by source (arXiv 2406.16860, appendix C)."""
    types = {part for part, _, _ in items}
    each = [mean_of_groups([item[1:] for item in items if item[0] == part]) for part in types]
    return float(np.mean(each))
