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
        ({"pair": STUDENT}, "pair is a str; make it with load_pair"),
        ({"recipe": {"train": {"steps": 1}}}, "recipe is a dict; make it with Recipe"),
        ({"data": "train.jsonl"}, "data is not a sequence of examples; make it with load_data"),
        ({"data": ROWS}, "data is not a sequence of examples; make it with load_data"),
        ({"seed": "1"}, "seed = '1': must be an integer"),
        ({"seed": -1}, "seed = -1: must be an integer"),
        ({"mask": "mask.safetensors"}, "mask is not a table of bool tensors"),
        ({"mask": {"type": "whole"}}, "mask is not a table of bool tensors"),
        ({"mask": {"head": torch.ones(2)}}, "mask is not a table of bool tensors"),
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
    with pytest.raises(vlopd.UserError, match="trained in place by an earlier call; load the pair"):
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
        (lambda: vlopd.load_pair(STUDENT, device="gpu"), "device = 'gpu': no such device"),
        (lambda: vlopd.load_data(5), "the data is of type int; give a list of dicts"),  # type: ignore[arg-type]
        (lambda: vlopd.load_data(pd.DataFrame(ROWS)), r"give its rows, frame.to_dict"),  # type: ignore[arg-type]
        (lambda: vlopd.load_data("shapes", size="10"), "size = '10': must be an integer"),  # type: ignore[arg-type]
        (lambda: vlopd.delta(STUDENT, None), "a NoneType is no checkpoint"),  # type: ignore[arg-type]
        (lambda: vlopd.geometry(STUDENT, [STUDENT]), "a list is no checkpoint"),  # type: ignore[arg-type]
        (lambda: vlopd.compare(STUDENT, ["shapes_text"]), "is one model; give a list"),
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
        vlopd.UserError, match=r"masks is a single mask; give masks = \{'top': mask\}"
    ):
        vlopd.make_mask({"type": "random", "like": "top", "seed": 1}, masks=mask)  # type: ignore[arg-type]
