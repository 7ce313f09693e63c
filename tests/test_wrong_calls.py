"""Wrong arguments to the functions of `vlopd`: one line with the argument and the remedy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch

import vlopd

STUDENT, TEACHER = "builtin:shapes-text-student", "builtin:shapes-text-teacher"
ROWS = [{"question": "how many red", "answer": "none : 0"}]


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    return {
        "pair": vlopd.load_pair(STUDENT, TEACHER, compute="fp32"),
        "data": vlopd.load_data("shapes", modality="text", size=4),
        "recipe": vlopd.Recipe(train={"steps": 1, "prompts_per_step": 2}),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pair": STUDENT}, r"pair is a str; load_pair\("),
        ({"recipe": {"train": {"steps": 1}}}, r"recipe is a dict; Recipe\("),
        ({"data": "train.jsonl"}, "data is a str; give a sequence of examples, as of load_data"),
        ({"data": ROWS}, r"data\[0\] is a dict, not an Example; load_data"),
        ({"seed": "1"}, "seed = '1': must be an integer"),
        ({"seed": -1}, "seed = -1: must be an integer"),
        ({"out": __file__}, "is a file; give a folder"),
        ({"mask": "mask.safetensors"}, "mask is a str; give"),
        ({"mask": {"type": "whole"}}, "the mask's 'type' is str, not a torch.bool tensor"),
        ({"mask": {"head": torch.ones(2)}}, "the mask's 'head' is torch.float32, not a torch.bool"),
        ({"mask": {"head": torch.ones(2).bool()}}, "the mask names 'head', which the model lacks"),
    ],
)
def test_distill_refuses(arguments: dict[str, Any], wrong: dict[str, Any], message: str) -> None:
    """`distill` refuses an argument of another type, before the first step, as a UserError."""
    with pytest.raises(vlopd.UserError, match=message) as error:
        vlopd.distill(**arguments | wrong)
    assert "\n" not in str(error.value)


def test_a_pair_trains_once(arguments: dict[str, Any]) -> None:
    """A second training of a pair's student, which the first changed in place, is refused with the remedy."""
    pair = vlopd.load_pair(STUDENT, TEACHER, compute="fp32")
    vlopd.distill(**arguments | {"pair": pair})
    with pytest.raises(
        vlopd.UserError, match="given to `distill` before, which trains it in place; load the pair"
    ):
        vlopd.distill(**arguments | {"pair": replace(pair)})


CONFIG = {
    "name": "wrong",
    "student": STUDENT,
    "teacher": TEACHER,
    "data": {"type": "shapes", "modality": "text"},
    "train": {"steps": 1, "prompts_per_step": 2},
    "arms": {"base": {"type": "base"}, "full": {"type": "distill"}},
}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vlopd.load_pair(STUDENT, compute="fp16"), "compute = 'fp16': must be one of"),  # type: ignore[arg-type]
        (lambda: vlopd.load_pair(STUDENT, device="gpu"), "device gpu: .*; cpu is always there"),
        (lambda: vlopd.load_data(5), "rows are a list of dicts or a datasets.Dataset, not a int"),  # type: ignore[arg-type]
        (lambda: vlopd.load_data(pd.DataFrame(ROWS)), r"frame.to_dict"),  # type: ignore[arg-type]
        (lambda: vlopd.load_data("shape"), "did you mean the built-in data set 'shapes'"),
        (lambda: vlopd.Run("nope"), "no config file or run folder nope"),
        (lambda: vlopd.load_data("shapes", size="10"), "size = '10': must be an integer"),  # type: ignore[arg-type]
        (lambda: vlopd.delta(STUDENT, None), "a checkpoint is a folder, .*, not a NoneType"),  # type: ignore[arg-type]
        (lambda: vlopd.geometry(STUDENT, [STUDENT]), "a checkpoint is a folder, .*, not a list"),  # type: ignore[arg-type]
        (lambda: vlopd.compare(STUDENT, ["shapes_text"]), "models is one model, .*; give a list"),
        (lambda: vlopd.Run(CONFIG).run(until="train"), "until = 'train': must be one of arms"),  # type: ignore[arg-type]
        (lambda: vlopd.Run(CONFIG).run(arms="ful"), "arm ful: not in the config"),
        (lambda: vlopd.Run(CONFIG, ["name=other"]), "each as a text of its own"),  # type: ignore[arg-type]
        (lambda: vlopd.load_config({}, [["train.steps=3"]]), "each as a text of its own"),  # type: ignore[list-item]
    ],
)
def test_other_functions_refuse(call: Callable[[], object], message: str) -> None:
    """The other functions name the argument and the remedy, too."""
    with pytest.raises(vlopd.UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_single_mask_in_place_of_masks() -> None:
    """`masks` without names is refused with the name to give."""
    mask = vlopd.make_mask({"type": "whole", "modules": ["ffn"]}, STUDENT)
    with pytest.raises(
        vlopd.UserError, match=r"masks is a single mask: give masks = \{'top': mask\}"
    ):
        vlopd.make_mask({"type": "random", "like": "top", "seed": 1}, masks=mask)  # type: ignore[arg-type]
