"""Arms that train a LoRA: PEFT's own layers, files and formulas, in the same loop as masks."""

import json

import pytest
import torch
from peft import PeftModel

from tests.conftest import recipe_of, sampled
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.lora import Lora
from vlopd.errors import ConfigError
from vlopd.loop import distill
from vlopd.models import parameter_names
from vlopd.models.load import load_configured
from vlopd.preflight.inputs import find_problems
from vlopd.run.dependencies import arm_inputs
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm, make_mask
from vlopd.run.resolve import read_mask, read_tensors
from vlopd.train.lora import LoraTrainable, adapter_size
from vlopd.weights.merged_adapter import AdaptedWeights
from vlopd.weights.reader import Weights

SECTIONS = {
    "train": {"steps": 3, "prompts_per_step": 4, "keep_steps": [2]},
    "optim": {"learning_rate": 1e-2},
    "masks": {
        "top": {"type": "top_fraction", "of": "full", "fraction": 0.2},
        "learned": {"type": "top_fraction", "of": "lora", "fraction": 0.1},
    },
    "arms": {
        "base": {"type": "base"},
        "full": {"type": "distill", "train": {"steps": 1, "keep_steps": []}, "role": "full"},
        "lora": {"type": "distill", "seed": 2, "lora": {"like": "top"}},
    },
}


@torch.no_grad()
def logits(loaded, examples):
    """Of a few prompts, [B, P, V]."""
    prompts = loaded.render(examples)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    return loaded.model(**inputs, **prompts.per_token, **prompts.per_image).logits


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_at_its_start_the_adapted_model_is_the_base(kind, make_pair, make_data):
    """To the bit, in bf16; the factors, of every linear layer but the head, are fp32 and alone have gradients, and
    folding puts the base's own parameters back."""
    pair, examples = make_pair(kind, "bf16"), make_data(kind, 3)
    student = pair.student
    before, base = values(student.model), logits(student, examples)
    trainable = LoraTrainable(student, Lora(rank=3))
    assert torch.equal(logits(student, examples), base)
    linear = {n for n, m in before.items() if m.ndim == 2 and not n.startswith("lm_head")}
    linear = {n for n in linear if "embed" not in n}
    assert {f"{name}.weight" for name in trainable.layers} == linear
    assert trainable.count == sum(3 * sum(before[n].shape) for n in linear)
    assert trainable.total == sum(p.numel() for p in before.values())
    prompts = student.render(examples)
    completions = sampled(pair, prompts, 4)
    student.completion_hidden(prompts, completions).float().square().sum().backward()
    got = {name for name, slot in trainable.slots.items() if bool(slot.values.grad.any())}
    assert {name for name in trainable.slots if "lora_B" in name} == got  # A's are 0 while B is
    assert all(slot.values.dtype == torch.float32 for slot in trainable.slots.values())
    assert all(p.grad is None for p in student.model.parameters())
    assert trainable.merged(before).keys() == before.keys()
    trainable.close()
    trainable.fold()
    after = values(student.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_an_arm_is_its_adapter_merged(kind, make_config, make_data, tmp_path):
    """PEFT loads the adapter onto the base and has the checkpoint's weights before they are rounded; so does our
    reader. The update's rank is at most the adapter's, whose size is the nearest to the mask's. A mask of the arm and
    its early checkpoint are as any other arm's."""
    config: ExperimentConfig = make_config(kind, **SECTIONS)
    run = RunFolder.create(tmp_path / "run", config)
    assert make_mask(run, config, "learned")
    base, arm = run.checkpoint("base"), run.arm("lora")
    before, after = read_tensors(base), read_tensors(run.checkpoint("lora"))

    about = json.loads((arm / "record.json").read_text())["lora"]
    wanted = sum(int(marked.sum()) for marked in read_mask(run, config, "top").values())
    each = about["parameters"] // about["rank"]  # of rank one
    assert about["wanted_parameters"] == wanted
    assert abs(about["parameters"] - wanted) <= each / 2
    assert about["alpha"] == 2 * about["rank"] > 2

    loaded = load_configured(config.student, torch.float32, folder=base)
    peft = PeftModel.from_pretrained(loaded.model, arm / "adapter")
    examples = make_data(kind, 3)
    adapted = logits(loaded, examples)
    plain = peft.merge_and_unload()
    exact = {name: p.detach() for name, p in plain.named_parameters()}
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16(), after[name]), name
    merged = load_configured(config.student, torch.float32, folder=run.checkpoint("lora"))
    apart = (logits(merged, examples) - adapted).abs().max()
    moved = (logits(load_configured(config.student, torch.float32), examples) - adapted).abs().max()
    assert float(apart) < 0.1 * float(moved)  # the rounding to bf16, beside the update

    with Weights(base) as weights:
        read = AdaptedWeights(arm / "adapter", weights)
        assert len(read.adapted) == about["layers"]
        assert all(torch.equal(read.read(name), after[name]) for name in after)
    for name in read.adapted:
        spectrum = torch.linalg.svdvals(exact[name].double() - before[name].double())
        beyond = spectrum[about["rank"] :]
        assert not len(beyond) or float(beyond[0]) < 1e-5 * float(exact[name].norm())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and changed <= set(read.adapted)
    learned = read_mask(run, config, "learned")
    assert all(bool(learned[name].any()) for name in changed)
    early = read_tensors(run.step_checkpoint("lora", 2))
    assert early.keys() == after.keys()
    assert any(not torch.equal(early[name], after[name]) for name in changed)
    assert not make_arm(run, config, "lora")  # up to date


def test_distill_returns_the_merged_student(make_pair, make_config, make_data, tmp_path):
    """In Python: the student is a plain model again, with the saved checkpoint's values in its own precision; the
    adapter alone can be saved too, also where the state of the optimizer is in host memory."""
    sections = {"train": {"steps": 2, "prompts_per_step": 2, "offload_optimizer": True}}
    pair = make_pair("llm", **sections)
    names = values(pair.student.model).keys()
    recipe = recipe_of(make_config("llm", **sections))
    trained = distill(pair, make_data("llm"), recipe, tmp_path / "out", lora={"parameters": 2000})
    trained.save(tmp_path / "merged")
    trained.save_adapter(tmp_path / "adapter")
    assert values(pair.student.model).keys() == names
    with Weights(tmp_path / "merged") as merged, Weights(pair.student.folder) as base:
        read = AdaptedWeights(tmp_path / "adapter", base)
        for name, parameter in pair.student.model.named_parameters():
            assert torch.equal(parameter.to(torch.bfloat16), merged.read(name))
            assert torch.equal(read.read(name), merged.read(name))


def test_frozen_components_get_no_factors(make_pair):
    """The vision tower and the projector in train.freeze are left as they are; the model is left as it was."""
    model = make_pair("vlm").student.model
    every = adapter_size(model, Lora(rank=2))
    part = adapter_size(model, Lora(rank=2), ["vision", "projector"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    parameter_names.freeze(model, ["vision", "projector"])
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    components = [parameter_names.classify(f"{name}.weight").component for name in linear]
    assert part.layers == components.count("language") < every.layers == len(linear) - 1


REFUSED = {
    "a mask": ({"mask": "top", "lora": {"rank": 1}}, "leave mask out"),
    "two sizes": ({"lora": {"rank": 1, "like": "top"}}, "give one of rank, like"),
    "no such mask": ({"lora": {"like": "topp"}}, "arms.lora.lora.like names 'topp'"),
    "no regular expression": ({"lora": {"rank": 1, "targets": "("}}, "no regular expression"),
    "its own mask": ({"lora": {"like": "learned"}}, "arms.lora needs itself"),
    "an average": (
        {
            "lora": {"rank": 1},
            "teacher": {
                "model": "student",
                "ema": 0.5,
                "context": {"type": "template", "template": "{{ answer }}"},
            },
        },
        "averages the student's weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lora_cannot_be_combined_with_is_refused(case, make_config):
    """With the setting, when the config is read."""
    its, message = REFUSED[case]
    arms = {**SECTIONS["arms"], "lora": {"type": "distill", **its}}
    with pytest.raises(ValueError, match=message):
        make_config("llm", **{**SECTIONS, "arms": arms})


TARGETS = {
    "unknown": (["q_prj"], "q_prj"),
    "a norm": (["norm"], "not supported"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_cannot_be_adapted_are_found_before_the_run(case, make_config):
    """On the model without weights, with PEFT's reason."""
    targets, message = TARGETS[case]
    lora = {"type": "distill", "lora": {"rank": 1, "targets": targets}}
    config = make_config("llm", arms={"base": {"type": "base"}, "lora": lora})
    (problem,) = find_problems(config, ["lora"])
    assert "lora.targets" in problem and message in problem


def test_a_tied_layer_is_refused(make_pair):
    """An update of a head that is also the embedding would reach one of the two alone."""
    model = make_pair("llm").student.model
    modules = [type(module) for module in model.modules()]
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"lm_head.weight is also .*embed_tokens.weight"):
        adapter_size(model, Lora(rank=1, targets=["lm_head"]))
    assert [type(module) for module in model.modules()] == modules  # as it was


def test_arms_without_a_lora_keep_their_inputs(make_config, tmp_path):
    """The key is not among the inputs of other arms, so that older runs stay up to date; of a LoRA's mask only the
    number of coordinates is."""
    config = make_config("llm", **SECTIONS)
    run = RunFolder.create(tmp_path / "run", config)
    make_mask(run, config, "top")
    assert arm_inputs(run, config, "full")["arm"].keys() == {"type", "seed", "mask", "subspace"}
    inputs = arm_inputs(run, config, "lora")
    assert inputs["arm"]["lora"]["like"] == "top" and inputs["like"].keys() == {"parameters"}
    assert config.roles.of["lora"] == "variant"
