"""A student and a teacher of different families: other processors, resolutions, image tokens, templates, ends."""

import pytest
import torch

from tests.conftest import pair_of, sampled
from tests.families.llms import LLMS
from tests.families.vlms import VLMS
from tests.test_families import by_hand, row
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.objective import ReverseKL
from vlopd.data.shapes import ShapesDataset
from vlopd.models import families
from vlopd.train.pair import ModelPair

PAIRS = (
    ("qwen2_5_vl", "internvl"),
    ("idefics3", "gemma3"),
    ("llava", "mistral3"),
    ("llava_onevision", "qwen3_vl"),
    ("paligemma", "llava"),
    ("qwen2", "llama"),
    ("gpt2", "phi3"),
)


def make_pair(student: str, teacher: str, folder) -> ModelPair:
    """Builds both families from different seeds and loads them as a pair."""
    models = {}
    for seed, (role, family) in enumerate((("student", student), ("teacher", teacher))):
        {**LLMS, **VLMS}[family](folder / family, seed)
        plain = {"template": "plain"} if family == "paligemma" else {}  # it has none of its own
        models[role] = {"model": str(folder / family), **plain}
    config = {
        "name": "cross",
        **models,
        "precision": {"compute": "fp32"},
        "data": {"type": "shapes", "modality": modality_of(student)},
        "train": {"steps": 1, "prompts_per_step": 1},
        "arms": {},
        "geometry": {"arms": []},
    }
    return pair_of(ExperimentConfig.model_validate(config))


def modality_of(student: str) -> str:
    return "image" if student in VLMS else "text"


def on_shared(logprobs: torch.Tensor, columns) -> torch.Tensor:
    chosen = logprobs[..., :columns] if isinstance(columns, int) else logprobs[..., columns]
    return chosen.log_softmax(-1)


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=str)
def test_a_pair_of_two_families_has_the_kl_worked_out_by_hand(student, teacher, tmp_path):
    """Per token, the pair's KL is that of two plain forward passes over the words that both have."""
    pair = make_pair(student, teacher, tmp_path)
    (grader,) = pair.teachers
    examples = list(ShapesDataset("train", 3, 0, modality_of(student)))
    prompts = pair.student.render(examples)
    completions = sampled(pair, prompts, 8, 0)
    if student in VLMS:
        counts = []
        for model, batch in ((pair.student, prompts), (grader.loaded, grader.render(examples))):
            ids = torch.tensor(list(model.placeholders.values()))
            counts.append(int(torch.isin(batch.input_ids, ids).sum()))
        assert min(counts) > 0  # both get the pictures, each as many tokens as it makes of them
    theirs = grader.translate(completions)
    ours = pair.divergence(ReverseKL(chunk_tokens=5), examples, prompts, completions)
    expected = []
    for k, example in enumerate(examples):
        q = by_hand(pair.student, student, example, row(completions, k).ids[0])
        p = by_hand(grader.loaded, teacher, example, row(theirs, k).ids[0])
        q, p = on_shared(q, pair.vocabulary.student), on_shared(p, pair.vocabulary.teachers[0])
        expected.append((q.exp() * (q - p)).sum(-1))
    torch.testing.assert_close(ours.loss.detach(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert families.sees_images(pair.student.model.config) == (student in VLMS)


def test_one_step_across_families_lowers_the_kl(tmp_path):
    """A Qwen2.5-VL student learns from an InternVL teacher on fixed completions: the KL halves and more."""
    pair = make_pair("qwen2_5_vl", "internvl", tmp_path)
    examples = list(ShapesDataset("train", 3, 0, "image"))
    prompts = pair.student.render(examples)
    completions = sampled(pair, prompts, 8, 0)
    optimizer = torch.optim.AdamW(pair.student.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = pair.divergence(ReverseKL(), examples, prompts, completions).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
