r"""AIME 2024 and 2025, MATH-500, GSM8K and Geometry3K: boxed answers, compared as mathematics.

Prompts are ours, so scores are comparable between arms, not with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from PIL import Image

from evals.lm import PLACEHOLDER
from evals.tasks.benchmarks import documents
from evals.tasks.benchmarks.documents import Benchmark, Document, Row, document, outcome, text
from vlopd.errors import DataError
from vlopd.grading.equality import number, same_math, same_number, unreadable
from vlopd.grading.extraction import math_answer, number_answer

ASK = "{}\n\nWork it out step by step and put the final answer in \\boxed{{}}."


def problem(row: Row, question: str, answer: str, kind: str | None = None) -> Document:
    """Raises DataError where no output could equal the answer."""
    asked, gold = text(row, question), text(row, answer)
    if why := unreadable(gold):
        raise DataError(f"column {answer!r} holds {gold!r}, which nothing can equal: {why}")
    return document(ASK.format(asked), asked, gold, kind)


def whole(made: Document, answer: str) -> Document:
    """Raises DataError where a document's answer is not a number."""
    if number(made["answer"]) is None:
        raise DataError(
            f"column {answer!r} holds {made['answer']!r}, which cannot be read as a number"
        )
    return made


def aime24(row: Row) -> Document:
    return whole(problem(row, "Problem", "Answer"), "Answer")


def aime25(row: Row) -> Document:
    return whole(problem(row, "problem", "answer"), "answer")


def math500(row: Row) -> Document:
    return problem(row, "problem", "answer", text(row, "subject"))


def gsm8k(row: Row) -> Document:
    """The answer is the number after the #### of the solution."""
    asked, solution = text(row, "question"), text(row, "answer")
    if "####" not in solution:
        raise DataError("column 'answer' has no #### before the result")
    return whole(
        document(ASK.format(asked), asked, solution.rpartition("####")[2].strip()), "answer"
    )


def geometry3k(row: Row) -> Document:
    made = problem(row, "problem", "answer")
    columns = [f"images[{k}]" for k in range(len(row["images"] or []))]
    if not columns:
        raise DataError("column 'images' has no picture")
    return {**made, "prompt": PLACEHOLDER * len(columns) + made["prompt"], "pictures": columns}


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("aime24", "Maxwell-Jia/AIME_2024", "train", ("Problem", "Answer"), aime24),
        Benchmark("aime25", "math-ai/aime25", "test", ("problem", "answer"), aime25),
        Benchmark(
            "math500", "HuggingFaceH4/MATH-500", "test", ("problem", "answer", "subject"), math500
        ),
        Benchmark("gsm8k", "openai/gsm8k", "test", ("question", "answer"), gsm8k, "main"),
        Benchmark(
            "geometry3k", "hiyouga/geometry3k", "test", ("images", "problem", "answer"), geometry3k
        ),
    )
}


def dataset(benchmark: str, **_: Any) -> dict[str, Dataset]:
    return documents.documents(BENCHMARKS[benchmark])


def doc_to_image(doc: Mapping[str, Any]) -> list[Image.Image]:
    return documents.pictures(BENCHMARKS[doc["benchmark"]], doc)


def score_number(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of numbers, as of AIME's whole numbers.

    GSM8K's own rule takes the number after ####, which chat models do not write unless shown; here it is one marker
    of several, so an output with #### before its result scores the same under both.
    """
    extracted = number_answer(results[0], doc.get("question", ""))
    right = extracted is not None and same_number(extracted, doc["answer"])
    return outcome(extracted, right, "exact_match")


def score_math(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Mathematical equality of expressions."""
    extracted = math_answer(results[0], doc.get("question", ""))
    right = extracted is not None and same_math(extracted, doc["answer"])
    return outcome(extracted, right, "exact_match")
