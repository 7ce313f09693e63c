"""Malformed task files: YAML of another shape, templates, functions that fail, answers that are no scores."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.harness import Case, Edit, Put, edits

CODE = """from datasets import Dataset
ROWS = [{"question": f"how many {k}", "answer": "1", "choices": ["1", "2"]} for k in range(3)]
def dataset(**_):
    return {"test": Dataset.from_list(ROWS)}
def score(doc, results):
    return {"correct": float(results[0] == doc["answer"])}
def chance(docs):
    return {"all": 0.1}
def mean(items):
    return sum(items) / len(items)
"""
LINES = {
    "task": "mine",
    "custom_dataset": "!function mine.dataset",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": '"{{question}}"',
    "doc_to_target": '"{{answer}}"',
    "process_results": "!function mine.score",
    "generation_kwargs": "{until: [], do_sample: false, max_gen_toks: 2}",
    "metric_list": "[{metric: correct, aggregation: mean, higher_is_better: true}]",
    "metadata": "{version: 1.0, chance: !function mine.chance}",
}
WORDS = (
    "compare",
    "student",
    "teacher",
    "--tasks",
    "mine",
    "--set",
    'include="tasks"',
    "--out",
    "cmp",
)


@dataclass(frozen=True)
class Task:
    """tasks/mine.yaml and mine.py: `lines` replace or add lines of the YAML (None leaves one out)."""

    lines: tuple[tuple[str, str | None], ...] = ()
    code: str = CODE

    def __call__(self, folder) -> None:
        lines = {**LINES, **dict(self.lines)}
        text = "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)
        Put("tasks/mine.yaml", text)(folder)
        Put("tasks/mine.py", self.code)(folder)


def scores(expression: str) -> str:
    return CODE.replace('{"correct": float(results[0] == doc["answer"])}', expression)


def function(body: str, name: str = "score", arguments: str = "doc, results") -> str:
    return f"{CODE}def {name}({arguments}):\n    {body}\n"


YAML: dict[str, tuple[str, dict[str, str | None]]] = {
    # name: (what the line names, lines)
    "no-name": ("mine", {"task": None}),
    "name-list": ("mine", {"task": "[mine]"}),
    "name-number": ("a task's name is no text", {"task": "5"}),
    "name-up": ("mine", {"task": "../mine"}),
    "dataset-gone": ("mine", {"custom_dataset": None}),
    "dataset-number": ("mine", {"custom_dataset": None, "dataset_path": "5"}),
    "dataset-list": ("mine", {"custom_dataset": None, "dataset_path": "[json]"}),
    "dataset-missing": ("mine", {"custom_dataset": None, "dataset_path": "gone/gone"}),
    "dataset-kwargs": (
        "mine",
        {"custom_dataset": None, "dataset_path": "json", "dataset_kwargs": "[1]"},
    ),
    "dataset-file": (
        "mine",
        {
            "custom_dataset": None,
            "dataset_path": "json",
            "dataset_kwargs": "{data_files: gone.json}",
        },
    ),
    "function-gone": ("mine", {"process_results": "!function mine.gone"}),
    "function-of-no-file": ("mine", {"process_results": "!function gone.score"}),
    "function-bare": ("!function score", {"process_results": "!function score"}),
    "split-unknown": ("mine", {"test_split": "train"}),
    "split-list": ("mine", {"test_split": "[test]"}),
    "split-none": ("mine", {"test_split": None}),
    "output-unknown": ("mine", {"output_type": "sing"}),
    "output-list": ("mine", {"output_type": "[generate_until]"}),
    "text-number": ("mine", {"doc_to_text": "5"}),
    "text-list": ("mine", {"doc_to_text": "[question]"}),
    "text-column": ("mine", {"doc_to_text": "nothing"}),
    "text-template": ("mine", {"doc_to_text": '"{{question"'}),
    "text-undefined": ("mine", {"doc_to_text": '"{{ nothing }}"'}),
    "text-divides": ("mine", {"doc_to_text": '"{{ 1 / 0 }}"'}),
    "text-attribute": ("mine", {"doc_to_text": '"{{ question.__class__ }}"'}),
    "text-endless": ("mine", {"doc_to_text": '"{% for i in range(10**9) %}x{% endfor %}"'}),
    "text-huge": ("mine", {"doc_to_text": '"{{ question * 10**9 }}"'}),
    "target-template": ("mine", {"doc_to_target": '"{% if %}"'}),
    "target-column": ("mine", {"process_results": None, "doc_to_target": "nothing"}),
    "generation-list": ("mine", {"generation_kwargs": "[1]"}),
    "generation-tokens": ("mine", {"generation_kwargs": "{max_gen_toks: many}"}),
    "generation-negative": ("mine", {"generation_kwargs": "{max_gen_toks: -1}"}),
    "generation-huge": ("mine", {"generation_kwargs": "{max_gen_toks: 1000000000000}"}),
    "generation-until": ("mine", {"generation_kwargs": "{until: 5}"}),
    "generation-temperature": (
        "mine",
        {"generation_kwargs": "{do_sample: true, temperature: hot}"},
    ),
    "metrics-number": ("mine", {"metric_list": "5"}),
    "metrics-text": ("mine", {"metric_list": "correct"}),
    "metrics-of-texts": ("mine", {"metric_list": "[correct]"}),
    "metrics-of-lists": ("mine", {"metric_list": "[[correct]]"}),
    "metrics-nameless": ("mine", {"metric_list": "[{aggregation: mean}]"}),
    "metric-list": ("mine", {"metric_list": "[{metric: [correct], aggregation: mean}]"}),
    "metric-number": ("mine", {"metric_list": "[{metric: 5, aggregation: mean}]"}),
    "metric-unknown": ("mine", {"process_results": None, "metric_list": "[{metric: gone}]"}),
    "metric-of-the-hub": (
        "hf_evaluate",
        {"process_results": None, "metric_list": "[{metric: accuracy, hf_evaluate: true}]"},
    ),
    "aggregation-unknown": ("mine", {"metric_list": "[{metric: correct, aggregation: best}]"}),
    "aggregation-list": ("mine", {"metric_list": "[{metric: correct, aggregation: [mean]}]"}),
    "better-text": (
        "mine",
        {"metric_list": "[{metric: correct, aggregation: mean, higher_is_better: maybe}]"},
    ),
    "better-list": (
        "mine",
        {"metric_list": "[{metric: correct, aggregation: mean, higher_is_better: [true]}]"},
    ),
    "metadata-text": ("mine", {"metadata": "new"}),
    "metadata-list": ("mine", {"metadata": "[1]"}),
    "chance-number": ("mine", {"metadata": "{version: 1.0, chance: 5}"}),
    "chance-text": ("mine", {"metadata": "{version: 1.0, chance: half}"}),
    "chance-list": ("mine", {"metadata": "{version: 1.0, chance: [0.5]}"}),
    "repeats-zero": ("mine", {"repeats": "0"}),
    "repeats-text": ("mine", {"repeats": "some"}),
    "repeats-huge": ("mine", {"repeats": "100000000"}),
    "repeats-list": ("mine", {"repeats": "[2]"}),
    "fewshot-negative": ("mine", {"num_fewshot": "-1"}),
    "fewshot-text": ("mine", {"num_fewshot": "few"}),
    "fewshot-huge": ("mine", {"num_fewshot": "1000000000"}),
    "fewshot-split": ("mine", {"num_fewshot": "1", "fewshot_split": "gone"}),
    "fewshot-config": ("mine", {"fewshot_config": "[1]"}),
    "filter-text": ("mine", {"filter_list": "first"}),
    "filter-of-texts": ("mine", {"filter_list": "[first]"}),
    "filter-unknown": (
        "mine",
        {"filter_list": "[{name: a, filter: [{function: gone}]}]"},
    ),
    "filter-nameless": ("mine", {"filter_list": "[{filter: [{function: take_first}]}]"}),
    "filter-pattern": (
        "mine",
        {"filter_list": "[{name: a, filter: [{function: regex, regex_pattern: '('}]}]"},
    ),
    "audio": ("mine", {"doc_to_audio": "question"}),
    "image-text": ("mine", {"doc_to_image": "question"}),
    "include-gone": ("mine", {"include": "gone.yaml"}),
    "include-itself": ("mine", {"include": "mine.yaml"}),
    "include-list": ("mine", {"include": "[[1]]"}),
    "include-up": ("mine", {"include": "/etc/passwd"}),
    "description-list": ("mine", {"description": "[1]"}),
    "delimiter-number": ("mine", {"target_delimiter": "5"}),
    "tag-number": ("mine", {"tag": "5"}),
    "tag-table": ("mine", {"tag": "{a: 1}"}),
    "unknown-key": ("mine", {"doc_to_txet": "question"}),
    "unsafe-text": ("mine", {"unsafe_code": "yes please"}),
    "choices-number": (
        "mine",
        {"output_type": "multiple_choice", "process_results": None, "doc_to_choice": "5"},
    ),
    "choices-column": (
        "mine",
        {"output_type": "multiple_choice", "process_results": None, "doc_to_choice": "gone"},
    ),
    "choices-empty": (
        "mine",
        {"output_type": "multiple_choice", "process_results": None, "doc_to_choice": "[]"},
    ),
    "target-beyond": (
        "mine",
        {
            "output_type": "multiple_choice",
            "process_results": None,
            "doc_to_choice": "choices",
            "doc_to_target": "7",
        },
    ),
}
FILES: dict[str, tuple[str, str | bytes]] = {
    # whole files
    "empty": ("mine", ""),
    "list": ("mine", "[1]"),
    "text": ("mine", "mine"),
    "binary": ("mine", b"\xff\xfe\x00"),
    "unclosed": ("mine.yaml", "task: mine\nmetric_list: [\n"),
    "tabs": ("mine.yaml", "task: mine\n\tdoc_to_text: x\n"),
    "tag": ("mine.yaml", "task: mine\ndoc_to_text: !!python/object/apply:os.system [id]\n"),
    "deep": ("mine", "task: mine\nmetadata: " + "{a: " * 3000 + "1" + "}" * 3000),
    "aliases": (
        "mine",
        "task: mine\n"
        + "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 8)}]\n" for k in range(1, 12)),
    ),
}
GROUPS: dict[str, tuple[str, str]] = {
    "of-itself": ("mine", "group: mine\ntask: [mine]\n"),
    "of-a-table-of-itself": ("mine", "group: mine\ntask: [{group: inner, task: [mine]}]\n"),
    "of-two-tables": (
        "mine",
        "group: mine\ntask: [{group: inner, task: [{group: third, task: [mine]}]}]\n",
    ),
    "of-nothing": ("mine", "group: mine\ntask: []\n"),
    "of-unknown": ("gone", "group: mine\ntask: [gone]\n"),
    "of-numbers": ("mine", "group: mine\ntask: [5]\n"),
    "of-text": ("mine", "group: mine\ntask: 5\n"),
    "of-lists": ("mine", "group: mine\ntask: [[own]]\n"),
    "metrics-text": (
        "mine",
        "group: mine\ntask: [own]\naggregate_metric_list: correct\n",
    ),
    "metrics-of-texts": (
        "mine",
        "group: mine\ntask: [own]\naggregate_metric_list: [correct]\n",
    ),
    "metrics-nameless": (
        "mine",
        "group: mine\ntask: [own]\naggregate_metric_list: [{weight_by_size: true}]\n",
    ),
    "aggregation": (
        "mine",
        "group: mine\ntask: [own]\naggregate_metric_list: [{metric: correct, aggregation: best}]\n",
    ),
    "weight": (
        "mine",
        "group: mine\ntask: [own]\naggregate_metric_list: [{metric: correct, weight_by_size: heavy}]\n",
    ),
    "metadata": ("mine", "group: mine\ntask: [own]\nmetadata: new\n"),
}
CODES: dict[str, tuple[str, str]] = {
    "syntax": ("mine.py", "def (\n"),
    "raises": ("mine", "raise ValueError('no')\n" + CODE),
    "exits": ("mine", "import sys; sys.exit(0)\n" + CODE),
    "stops": ("mine", "raise GeneratorExit\n" + CODE),
    "dataset-none": ("mine", function("return None", "dataset", "**_")),
    "dataset-list": ("mine", function("return [1]", "dataset", "**_")),
    "dataset-of-lists": ("mine", function("return {'test': [1, 2]}", "dataset", "**_")),
    "dataset-empty": ("mine", function("return {'test': Dataset.from_list([])}", "dataset", "**_")),
    "dataset-raises": ("mine", function("raise KeyError('x')", "dataset", "**_")),
    "dataset-exits": ("mine", function("raise SystemExit(0)", "dataset", "**_")),
    "dataset-stops": ("mine", function("raise GeneratorExit", "dataset", "**_")),
    "chance-raises": ("mine", function("raise KeyError('x')", "chance", "docs")),
    "chance-number": ("mine", function("return 5", "chance", "docs")),
    "chance-list": ("mine", function("return [5]", "chance", "docs")),
    "chance-nan": ("mine", function("return {'all': float('nan')}", "chance", "docs")),
    "chance-text": ("mine", function("return {'all': 'half'}", "chance", "docs")),
    "score-none": ("mine", function("return None")),
    "score-list": ("mine", function("return [1]")),
    "score-number": ("mine", function("return 1.0")),
    "score-empty": ("mine", function("return {}")),
    "score-nan": ("mine", function("return {'correct': float('nan')}")),
    "score-infinite": ("mine", function("return {'correct': float('inf')}")),
    "score-huge": ("mine", function("return {'correct': 10**400}")),
    "score-text": ("mine", function("return {'correct': 'yes'}")),
    "score-nothing": ("mine", function("return {'correct': None}")),
    "score-number-key": ("mine", function("return {5: 1.0}")),
    "score-some": ("mine", function("return {'correct': 1.0} if '1' in doc['question'] else {}")),
    "score-raises": ("mine", function("raise KeyError('x')")),
    "score-recurses": ("mine", function("return score(doc, results)")),
    "score-exits": ("mine", function("raise SystemExit(0)")),
    "score-stops": ("mine", function("raise GeneratorExit")),
    "score-arguments": ("mine", function("return {'correct': 1.0}", arguments="doc")),
}


def whole(content: str | bytes) -> Edit:
    return edits(Task(), Put("tasks/mine.yaml", content))


def group(content: str) -> Edit:
    own = Task((("task", "own"),))
    return edits(own, Rename("tasks/mine.yaml", "tasks/own.yaml"), Put("tasks/group.yaml", content))


@dataclass(frozen=True)
class Rename:
    """Moves a file."""

    path: str
    to: str

    def __call__(self, folder) -> None:
        (folder / self.path).rename(folder / self.to)


LATE = {name for name in CODES if name.startswith(("score", "chance"))} - {"score-arguments"}
"""Found when the first answers are scored."""


def cases() -> list[Case]:
    plain = Task()
    totals = "group: mine\ntask: [own]\naggregate_metric_list: [{metric: correct, weight_by_size: true}]\n"
    return [
        *(
            Case(WORDS, says, Task(tuple(lines.items())), mend=plain, name=f"task {name}")
            for name, (says, lines) in YAML.items()
        ),
        *(
            Case(WORDS, says, whole(content), mend=plain, name=f"task file {name}")
            for name, (says, content) in FILES.items()
        ),
        *(
            Case(WORDS, says, group(content), mend=group(totals), name=f"task group {name}")
            for name, (says, content) in GROUPS.items()
        ),
        *(
            Case(
                WORDS,
                says,
                Task(code=code),
                mend=plain,
                name=f"task code {name}",
                late=name in LATE,
            )
            for name, (says, code) in CODES.items()
        ),
    ]
