"""Hidden states of completions that come again are computed once, and never wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlopd.config.recipe import Recipe
from vlopd.errors import ConfigError
from vlopd.loop import distill
from vlopd.models.loaded import LoadedModel
from vlopd.train.teacher_cache import TeacherCache

SOURCES = {
    "data": {"rollout": {"source": "data"}},
    "teacher": {"rollout": {"source": "teacher", "max_new_tokens": 6}},
}


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The rows of every forward pass of a teacher over completions."""
    rows, whole = [], LoadedModel.completion_hidden

    def counted(loaded, prompts, completions):
        if loaded.name.endswith("teacher"):
            rows.append(len(completions))
        return whole(loaded, prompts, completions)

    monkeypatch.setattr(LoadedModel, "completion_hidden", counted)
    return rows


@pytest.mark.parametrize("source", SOURCES)
def test_a_teacher_reads_a_completion_once(kind, source, make_pair, make_data, passes, tmp_path):
    """Over two epochs and in a second arm, each completion of the data passes the teacher once; the training is that
    without a cache, of other samples nothing is taken."""
    data = make_data(kind, 4)

    def train(out: str, cache: float | None, seed: int = 1):
        recipe = Recipe(
            train={"steps": 4, "prompts_per_step": 2, "teacher_cache_gb": cache},
            loss={"type": "forward_kl"},
            **SOURCES[source],
        )
        passes.clear()
        where = tmp_path / "cache"
        return distill(make_pair(kind), data, recipe, tmp_path / out, seed, teacher_cache=where)

    plain = train("plain", None)
    assert sum(passes) == 8
    first = train("first", 1.0)
    once = sum(passes)
    assert once == 4 if source == "data" else once <= 8
    second = train("second", 1.0)
    assert sum(passes) == 0
    for cached in (first, second):
        for (name, a), b in zip(
            plain.student.model.named_parameters(), cached.student.model.parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    if source == "data":
        train("other", 1.0, seed=5)
        assert sum(passes) == 0  # the data's answers do not depend on the seed


def test_a_cache_is_bounded_and_heals(tmp_path):
    """No more than the given bytes are kept, the oldest leave first; a damaged file is none, and is made again."""
    cache = TeacherCache(tmp_path, 3 * 4096)
    rows = {f"{k:02}" * 32: torch.full((10, 8), float(k)) for k in range(30)}
    for key, hidden in rows.items():
        cache.put(key, hidden)
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 3 * 4096
    last = list(rows)[-1]
    assert torch.equal(cache.get(last), rows[last]) and cache.get("00" * 32) is None
    assert (cache.hits, cache.misses) == (1, 1)
    path = next(tmp_path.glob(f"*/{last}.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    again = TeacherCache(tmp_path, 3 * 4096)
    assert again.get(last) is None and not path.exists()
    again.put(last, rows[last])
    path.write_bytes(path.read_bytes()[:40])
    assert again.get(last) is None
    again.put("x" * 64, torch.zeros(100_000))  # too large by itself
    assert again.get("x" * 64) is None


def test_a_full_disk_is_no_error(tmp_path, monkeypatch):
    """Training does not need the cache: where nothing can be written, nothing is kept."""
    cache = TeacherCache(tmp_path / "file" / "below", 10**6)
    (tmp_path / "file").write_text("where a folder should be")
    cache.put("a" * 64, torch.zeros(2, 2))
    assert cache.get("a" * 64) is None


def test_the_students_own_completions_do_not_come_again(make_pair, make_data, tmp_path):
    """On-policy a cache is refused, before training."""
    recipe = Recipe(train={"steps": 1, "prompts_per_step": 2, "teacher_cache_gb": 1})
    with pytest.raises(ConfigError, match="teacher_cache_gb"):
        distill(make_pair("llm"), make_data("llm"), recipe, tmp_path)


def test_a_teacher_in_memory_alone_is_not_cached(make_pair, tmp_path):
    """A teacher that no files tell apart is refused in a line."""
    teacher = make_pair("llm").teachers[0]
    in_memory = replace(teacher, loaded=replace(teacher.loaded, folder=None))
    with pytest.raises(ConfigError, match="no folder"):
        in_memory.with_cache(TeacherCache(tmp_path, 10**6))
