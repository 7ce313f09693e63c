"""`vlopd check`: the table of a good pair, and one line with the remedy where something is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command import call

PAIRS = Path(__file__).parents[1] / "configs" / "pairs"
PUBLISHED = sorted(PAIRS.glob("qwen*.toml")) + sorted(PAIRS.glob("[dm]*.toml"))

CONFIG = """
name = "checked"
student = "{student}"
teacher = {{model = "{teacher}"{more}}}
[precision]
compute = "fp32"
[data]
type = "shapes"
modality = "{modality}"
[rollout]
max_new_tokens = 6
[train]
steps = 1
prompts_per_step = 4
[masks]
top = {{type = "top_fraction", of = "full", fraction = 0.1}}
[arms]
full = {{type = "distill", seed = 1}}
"""


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """(student, teacher, kind, flags, more of the teacher) -> (exit code, what was printed)."""

    def run(student, teacher, kind, *flags, more="") -> tuple[int, str]:
        path = tmp_path / "checked.toml"
        modality = "image" if kind == "vlm" else "text"
        path.write_text(
            CONFIG.format(student=student, teacher=teacher, modality=modality, more=more)
        )
        return call(monkeypatch, capsys, "check", path, *flags)

    return run


@pytest.fixture
def copied(folders, kind, tmp_path) -> dict[str, Path]:
    """Student and teacher folders of this kind that a test may break."""
    return {
        role: Path(shutil.copytree(folders[kind, role], tmp_path / role))
        for role in ("student", "teacher")
    }


def test_a_good_pair(kind, check, folders):
    """The table has prompts, tokens, agreement, memory dense and masked, and time; exit code 0."""
    code, out = check(folders[kind, "student"], folders[kind, "teacher"], kind)
    assert code == 0
    for row in ("prompt tokens", "prompt and completion, of context",
                "end tokens", "shared tokens", "mean reverse KL", "top-1 agreement",
                "top-16 overlap", "memory, all coordinates", "memory, mask top", "seconds a step"):  # fmt: skip
        assert row in out, row
    assert ("sees the image" in out) == (kind == "vlm")
    assert "NO" not in out.split()


def test_without_weights(kind, check, copied):
    """With --meta, folders without weights give parameters, prompts, memory and time; with it left out, exit code 1."""
    for folder in copied.values():
        (folder / "model.safetensors").unlink()
    code, out = check(copied["student"], copied["teacher"], kind, "--meta")
    assert code == 0
    for row in ("by component", "shared tokens", "prompt tokens, longest", "seconds a step"):
        assert row in out, row
    code, out = check(copied["student"], copied["teacher"], kind)
    assert code == 1 and "not ready" in out and "model.safetensors" in out


def test_a_config_alone_is_enough_for_meta(kind, check, copied):
    """Nothing but config.json: sizes, memory and time are told, tokens are said to be unchecked."""
    for folder in copied.values():
        for path in folder.iterdir():
            if path.name != "config.json":
                path.unlink()
    code, out = check(copied["student"], copied["teacher"], kind, "--meta")
    assert code == 0
    assert "not checked" in out and "prompt tokens, assumed" in out and "seconds a step" in out


def broken(how: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled weights":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no configuration":
        (folder / "config.json").unlink()
    elif how == "unknown family":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "another tokenizer":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["crimson"] = vocabulary.pop("red")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "how",
    ["truncated weights", "no weights", "pickled weights", "no configuration", "unknown family",
     "no tokenizer", "another tokenizer"],
)  # fmt: skip
def test_a_broken_folder_is_one_line(how, kind, check, copied):
    """Each broken teacher folder ends in one line that names it, and exit code 1."""
    broken(how, copied["teacher"])
    code, out = check(copied["student"], copied["teacher"], kind)
    lines = [line for line in out.splitlines() if "not ready" in line]
    assert code == 1 and len(lines) == 1
    assert str(copied["teacher"]) in lines[0] or "families.py" in lines[0]


def test_a_text_only_teacher_of_images(check, folders):
    """A blind teacher is refused with the remedy, before weights are read; with a caption it passes."""
    student, teacher = folders["vlm", "student"], folders["llm", "teacher"]
    code, out = check(student, teacher, "vlm")
    assert code == 1 and "caption" in out
    caption = ', context = {type = "caption", column = "caption"}'
    code, out = check(student, teacher, "vlm", more=caption)
    assert code == 0 and "reads a caption" in out


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=pytest.mark.slow if i % 8 else (), id=p.stem)
        for i, p in enumerate(PUBLISHED)
    ],
)
def test_a_published_pair_is_checked_without_a_hub(path, monkeypatch, capsys):
    """`vlopd check --meta` tells parameters, memory and time of every published pair, offline."""
    code, out = call(monkeypatch, capsys, "check", path, "--meta")
    assert code == 0
    assert "by component" in out
    assert "seconds a step" in out or "not estimated" in out
