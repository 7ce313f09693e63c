"""Training starts from the student's stored values: no update is the rounding of one precision in another."""

import json
import shutil
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.conftest import build, pair_of, recipe_of, sampled
from tests.families.llms import LLMS
from vlopd import distributed
from vlopd.bits import different, holds
from vlopd.config.masks import VisibleMask
from vlopd.config.objective import ReverseKL
from vlopd.errors import UserError
from vlopd.files import read_json
from vlopd.loop import follow_student
from vlopd.masks.rules import build_mask
from vlopd.models.load import load
from vlopd.models.parameter_names import classify
from vlopd.models.save import save
from vlopd.run.arms import ArmOptions
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_arm
from vlopd.run.resolve import read_tensors
from vlopd.train.optimizers import build_optimizer
from vlopd.train.sparse import Trainable
from vlopd.weights.delta import stream
from vlopd.weights.stored import rounded_on_load, stored_tensors

SHIPPED = ("fp32", "fp16", "bf16", "mixed")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TINY = {
    "rollout": {"max_new_tokens": 3},
    "train": {"steps": 1, "prompts_per_step": 1, "save_every": 100, "sample_every": 100},
    "masks": {"low": {"type": "magnitude", "fraction": 0.3}},
}


def dtype_of(base: str, name: str) -> torch.dtype:
    """Of a tensor in a checkpoint; a mixed one has all three, by the tensor's name."""
    choice = list(DTYPES)[zlib.crc32(name.encode()) % 3] if base == "mixed" else base
    return DTYPES[choice]


def restore(folder, base):
    """Writes a checkpoint's tensors again with other values, none of which is 0, in the dtypes of `base`."""
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(7)
    tensors = {
        n: (t.float() + 0.01 * torch.randn(t.shape, generator=generator)).to(dtype_of(base, n))
        for n, t in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def students(folders, tmp_path_factory):
    """{(kind, base dtype): folder}, of the same values but for their rounding."""
    root, found = tmp_path_factory.mktemp("precision"), {}
    for kind in ("llm", "vlm"):
        whole = build(kind, "student", root / kind, torch.float32)
        for base in SHIPPED:
            found[kind, base] = root / f"{kind}-{base}"
            restore(shutil.copytree(whole, found[kind, base]), base)
    return found


def exact(kind, folder) -> dict[str, torch.Tensor]:
    """transformers' own reading of all floating-point tensors in fp32, by the model's names."""
    auto = AutoModelForImageTextToText if kind == "vlm" else AutoModelForCausalLM
    state = auto.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {n: t for n, t in state.items() if t.is_floating_point()}


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.view(torch.int32 if a.element_size() == 4 else torch.int16),
        b.view(torch.int32 if b.element_size() == 4 else torch.int16),
    )


@pytest.mark.parametrize(
    ("base", "stored"),
    [
        pytest.param(
            base,
            stored,
            marks=()
            if {base, stored} & {"auto"} or {base, stored} == {"fp32", "bf16"}
            else pytest.mark.slow,
        )
        for base in SHIPPED
        for stored in ("auto", "fp32", "bf16")
    ],
)
def test_an_arm_that_does_not_move_is_the_base(base, stored, students, make_config, tmp_path):
    """At a learning rate of next to nothing a dense and a masked arm are the base rounded once to `stored`, bit for
    bit, as `base` is; their delta from the student is that rounding, and none of it where `stored` is its own."""
    row, column = SHIPPED.index(base), ["auto", "fp32", "bf16"].index(stored)
    compute = ("fp32", "bf16")[(row + column) % 2]  # each with every base, precision and kind
    kind = ("llm", "vlm")[(row // 2 + column) % 2]
    student = students[kind, base]
    config = make_config(
        kind,
        **TINY,
        student=str(student),
        precision={"compute": compute, "stored": stored},
        optim={"learning_rate": 1e-30, "weight_decay": 0.1},
        arms={
            "base": {"type": "base"},
            "dense": {"type": "distill", "seed": 1},
            "sparse": {"type": "distill", "seed": 1, "mask": "low"},
        },
    )
    run = RunFolder.create(tmp_path / "run", config)
    values = exact(kind, student)
    with stored_tensors(load(str(student), torch.bfloat16)) as own:
        own = {n: own.dtypes[n] for n in values}
    if base == "mixed":
        assert set(own.values()) == set(DTYPES.values())
    expected = {n: t.to(own[n] if stored == "auto" else DTYPES[stored]) for n, t in values.items()}
    for arm in config.arms:
        make_arm(run, config, arm)
        found = read_tensors(run.checkpoint(arm))
        assert all(same_bits(found[n], expected[n]) for n in found), arm
        assert found.keys() == expected.keys()
        for pair in stream(run.checkpoint("base"), run.checkpoint(arm), classify):
            assert not pair.delta.any()
        pairs = stream(student, run.checkpoint(arm), classify)
        assert len(pairs) == len(found)
        for pair in pairs:
            _, name = pairs.report.names(pair.name)
            assert torch.equal(pair.delta, expected[name].float() - values[name])
        visible = build_mask(VisibleMask(), pairs)
        lossless = all(holds(expected[n].dtype, own[n]) for n in found)
        assert any(bool(marked.any()) for marked in visible.values()) is not lossless
        assert bool(pairs.report.narrowed) is not lossless
        if stored == "bf16":  # both sides rounded alike, nothing is left
            alike = build_mask(VisibleMask(precision="bf16"), pairs)
            assert not any(bool(marked.any()) for marked in alike.values())

        dtypes = {t.dtype for t in found.values()}
        about = json.loads((run.checkpoint(arm) / "config.json").read_text())
        told = dtypes.pop() if len(dtypes) == 1 else torch.float32
        parts = [about, *(part for key, part in about.items() if key.endswith("_config"))]
        assert {part["dtype"] for part in parts} == {str(told).removeprefix("torch.")}
        again = exact(kind, run.checkpoint(arm))  # what is stored loads without loss
        assert all(torch.equal(again[n], expected[n].float()) for n in again)
        record = read_json(run.arm_record(arm))
        names = {str(t.dtype).removeprefix("torch.") for t in found.values()}
        assert record["precision"]["stored"] == "+".join(sorted(names))
    for arm in ("dense", "sparse"):
        record = read_json(run.arm_record(arm))
        assert record["on_mask"]["moved"] == 0
        assert record["on_mask"]["coordinates"] >= record["trained_parameters"] > 0
    assert record["off_mask"]["moved"] == record["off_mask"]["moved_in_memory"] == 0


@pytest.mark.parametrize("mask", ["dense", "sparse"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("base", SHIPPED)
def test_the_stored_result_is_adamw_of_the_base_in_float64(
    base, compute, mask, students, make_config, make_data
):
    """Three steps at 1e-6 from the gradients that training saw: AdamW in float64, started from the student's stored
    values and rounded once, gives what is stored, but for values within fp32's last bits of a tie; the update is not
    the rounding to the compute precision."""
    kind = ("llm", "vlm")[(SHIPPED.index(base) + (compute == "bf16")) % 2]
    config = make_config(
        kind,
        student=str(students[kind, base]),
        precision={"compute": compute},
        optim={"learning_rate": 1e-6, "weight_decay": 0.1, "max_grad_norm": None},
    )
    optim, pair, data = config.optim, pair_of(config), make_data(kind, 2)
    model = pair.student.model
    generator = torch.Generator().manual_seed(0)
    marked = {
        n: torch.rand(p.shape, generator=generator) < (0.3 if mask == "sparse" else 2.0)
        for n, p in model.named_parameters()
    }
    with rounded_on_load(pair.student) as stored:
        trainable = Trainable(model, marked if mask == "sparse" else None, stored=stored)
    with stored_tensors(pair.student) as tensors:
        before = {n: tensors[n] for n in marked}
    w = {n: t.double() for n, t in before.items()}
    m, v = ({n: torch.zeros_like(t) for n, t in w.items()} for _ in range(2))
    optimizer = build_optimizer(optim, trainable)
    prompts = pair.student.render(data)
    completions = sampled(pair, prompts, 4)
    for step in range(1, 4):
        trainable.zero_grad()
        pair.divergence(ReverseKL(), data, prompts, completions).loss.mean().backward()
        for n, slot in trainable.slots.items():
            if slot.values.grad is None:
                continue  # LLaVA leaves its tower's last norm out: torch does not step it at all
            g = torch.zeros_like(w[n])
            if slot.values.shape == g.shape:
                g += slot.values.grad
            else:
                g[marked[n]] = slot.values.grad.double()
            m[n] = optim.betas[0] * m[n] + (1 - optim.betas[0]) * g
            v[n] = optim.betas[1] * v[n] + (1 - optim.betas[1]) * g**2
            adam = m[n] / (1 - optim.betas[0] ** step)
            adam = adam / ((v[n] / (1 - optim.betas[1] ** step)).sqrt() + optim.eps)
            w[n] -= optim.learning_rate * marked[n] * (optim.weight_decay * w[n] + adam)
        optimizer.step(optim.learning_rate)
        trainable.write_back()
    merged, apart, total = trainable.merged(before), 0, 0
    moved, meant = [], []
    for n, ours in merged.items():
        assert ours.dtype == before[n].dtype
        # the values themselves: three steps in fp32, with two roundings each (2^-24 of the value) and
        # the decay's factor, 1 - 1e-7, rounded to fp32
        slot = trainable.slots[n]
        theirs = w[n] if slot.values.shape == w[n].shape else w[n][marked[n]]
        error = (slot.values.data.double() - theirs).abs()
        assert bool((error <= 7 * 2.0**-24 * theirs.abs() + 1e-3 * optim.learning_rate).all()), n
        # what is stored: exact, but where that error is across a tie
        different = ours != w[n].to(ours.dtype)
        apart, total = apart + int(different.sum()), total + different.numel()
        assert not bool((different & ~marked[n]).any())
        if ours.dtype != torch.float32:
            step = torch.finfo(ours.dtype).eps * w[n].abs()
            assert bool((((ours.double() - w[n]).abs() <= 0.51 * step) | ~different).all())
        moved.append(
            (
                slot.values.data.double() - before[n].double()[marked[n]].view_as(slot.values)
            ).flatten()
        )
        meant.append((theirs - before[n].double()[marked[n]].view_as(theirs)).flatten())
    if base in ("fp16", "bf16"):
        assert apart < 1e-3 * total
    cosine = torch.nn.functional.cosine_similarity(torch.cat(moved), torch.cat(meant), dim=0)
    assert float(cosine) > 0.999
    # in memory: the values, rounded once
    for n, parameter in model.named_parameters():
        slot = trainable.slots[n]
        here = parameter.data if slot.values.shape == parameter.shape else parameter.data[marked[n]]
        assert torch.equal(here, slot.values.data.to(parameter.dtype))
    assert trainable.moved_off_mask(before) == 0


@pytest.mark.parametrize("storage", ["whole", "listed", "packed", "dense"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("base", [*DTYPES, "fp64"])
def test_every_storage_starts_from_the_stored_values(base, compute, storage):
    """Before any step, the values of every storage are the stored ones, and merged with any rounding of the base
    they give that rounding, bit for bit, with the sign of its zeros; in memory they are rounded once."""
    torch.manual_seed(0)
    stored = torch.randn(40, 30, dtype=torch.float64).to({**DTYPES, "fp64": torch.float64}[base])
    stored[0, :2] = torch.tensor([0.0, -0.0])
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(stored.to(DTYPES[compute], copy=True))
    if storage == "dense" and not holds(model.weight.dtype, stored.dtype):
        storage = "packed"  # values that share the parameter's memory are none of another precision
    if storage == "dense" and compute == "bf16":
        storage = "listed"
    marked = torch.rand(40, 30) < 0.6 if storage != "whole" else torch.ones(40, 30).bool()
    marked[0, :2] = True
    own = {} if holds(model.weight.dtype, stored.dtype) else {"weight": stored}
    trainable = Trainable(model, {"weight": marked}, choose=lambda *_: storage, stored=own)
    slot = trainable.slots["weight"]
    values = slot.trained(slot.values.data).flatten()
    assert torch.equal(values, stored[marked].to(torch.promote_types(stored.dtype, torch.float32)))
    for dtype in (stored.dtype, torch.float32, torch.bfloat16):
        rounded = stored.to(dtype)
        merged = trainable.merged({"weight": rounded})["weight"]
        assert not different(merged, rounded).any() and merged.dtype == dtype
        slot.values.data.view(-1)[0] = -0.0  # where +0 was: no update
        assert not different(trainable.merged({"weight": rounded})["weight"], rounded).any()
    trainable.write_back()
    assert torch.equal(model.weight, stored.to(DTYPES[compute]))
    assert trainable.moved_off_mask({"weight": stored}) == 0


@pytest.mark.parametrize("base", ["fp32", "mixed"])
def test_a_moving_average_starts_from_the_stored_values(kind, base, students, make_config):
    """A teacher that follows the student averages what the student trains: its fp32 values are the student's."""
    config = make_config(
        kind,
        student=str(students[kind, base]),
        teacher={"model": "student", "ema": 0.9},
        precision={"compute": "bf16"},
    )
    pair = pair_of(config)
    with rounded_on_load(pair.student) as stored:
        trainable = Trainable(pair.student.model, stored=stored)
    ((average, _),) = follow_student(pair, recipe_of(config), distributed.accelerator(), None)
    before = average.state()
    assert all(torch.equal(values, before[n]) for n, values in trainable.state().items())
    with stored_tensors(pair.student) as tensors:
        assert all(torch.equal(values, tensors[n].float()) for n, values in before.items())


def test_arms_of_arms_keep_each_tensors_dtype(kind, students, make_config, tmp_path):
    """Early checkpoints, transplants and extrapolations of a mixed student have its dtypes, and config.json's; a
    transplant of another precision's run is stored in the one that holds both, and its proof says what moved."""
    config = make_config(
        kind,
        **{**TINY, "train": {**TINY["train"], "steps": 2, "keep_steps": [1]}},
        student=str(students[kind, "mixed"]),
        precision={"compute": "bf16"},
        arms={
            "base": {"type": "base"},
            "full": {"type": "distill", "seed": 1},
            "moved": {"type": "transplant", "of": "full@1", "mask": "low"},
            "far": {"type": "extrapolate", "of": "full@1", "factor": 2.0},
            "one": {"type": "extrapolate", "of": "full@1", "factor": 1.0},
        },
    )
    run = RunFolder.create(tmp_path / "run", config)
    for arm in config.arms:
        make_arm(run, config, arm)
    base = read_tensors(run.checkpoint("base"))
    early = read_tensors(run.step_checkpoint("full", 1))
    for folder in (run.step_checkpoint("full", 1), *(run.checkpoint(arm) for arm in config.arms)):
        found = read_tensors(folder)
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in base.items()}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    one = read_tensors(run.checkpoint("one"))
    assert all(torch.equal(one[n], early[n]) for n in early)  # once the delta is the checkpoint
    assert read_json(run.arm_record("moved"))["on_mask"]["moved"] > 0

    other = make_config(
        kind,
        **TINY,
        student=str(students[kind, "mixed"]),
        precision={"compute": "bf16", "stored": "bf16"},
        arms={
            "base": {"type": "base"},
            "moved": {"type": "transplant", "of": str(run.arm("full")), "mask": "low"},
        },
    )
    narrow = RunFolder.create(tmp_path / "narrow", other)
    make_arm(narrow, other, "moved", ArmOptions(allow_other_base=True))
    record = read_json(narrow.arm_record("moved"))
    assert record["off_mask_unmoved"] is True and record["on_mask"]["moved"] > 0
    own = {str(torch.promote_types(t.dtype, torch.bfloat16)) for t in base.values()}
    assert record["precision"]["stored"] == "+".join(sorted(t.removeprefix("torch.") for t in own))


def test_stored_in_fp16_and_refused_where_that_overflows(students, make_config, tmp_path):
    """`stored = "fp16"` rounds to it; a value beyond its range is one line that names tensor and remedy."""
    student = students["llm", "fp32"]
    config = make_config(
        "llm",
        student=str(student),
        precision={"compute": "bf16", "stored": "fp16"},
        arms={"base": {"type": "base"}},
    )
    run = RunFolder.create(tmp_path / "run", config)
    make_arm(run, config, "base")
    values = exact("llm", student)
    for name, tensor in read_tensors(run.checkpoint("base")).items():
        assert same_bits(tensor, values[name].half())
    large = shutil.copytree(student, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    config = config.model_copy(
        update={"student": config.student.model_copy(update={"model": str(large)})}
    )
    run = RunFolder.create(tmp_path / "other", config)
    with pytest.raises(UserError, match=r"model\.norm\.weight: 1 of 32 values.*float16.*\"fp32\""):
        make_arm(run, config, "base")
    assert not run.checkpoint("base").exists()


def test_a_model_that_was_changed_in_memory_is_not_its_checkpoint(students, make_config):
    """Values that would be read past a change to the loaded model are refused, with the parameter's name."""
    config = make_config("llm", student=str(students["llm", "fp32"]), precision={"compute": "bf16"})
    pair = pair_of(config)
    pair.student.model.lm_head.weight.data[0, 0] += 1
    with (
        rounded_on_load(pair.student) as stored,
        pytest.raises(UserError, match=r"lm_head\.weight: 1 of .* load that"),
    ):
        Trainable(pair.student.model, stored=stored)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3"])
def test_converted_tensors_are_those_that_transformers_makes(family, tmp_path):
    """Experts that are stored one by one, in several dtypes, and ties: values and names are those of transformers'
    fp32 loading; what several tensors are fused into has the widest dtype of theirs, and a saved copy keeps it."""
    LLMS[family](tmp_path)
    restore(tmp_path, "mixed")
    expected = exact("llm", tmp_path)
    loaded = load(str(tmp_path), torch.bfloat16)
    with stored_tensors(loaded) as tensors:
        assert set(tensors) == set(expected)
        for name, tensor in tensors.items():
            assert tensor.dtype == tensors.dtypes[name]
            assert torch.equal(tensor.float(), expected[name]), name
            # none is wider than its values need
            assert tensor.dtype != torch.float32 or not torch.equal(
                tensor, tensor.bfloat16().float()
            )
        fused = [n for n in tensors if n.endswith("gate_up_proj")]
        assert all(tensors.dtypes[n] == torch.float32 for n in fused)
        assert bool(fused) is (family != "qwen3")


def test_config_json_says_what_loads_without_loss(students, tmp_path):
    """A tensor that the class keeps in fp32 anyway does not widen the dtype of the rest."""
    loaded = load(str(students["llm", "bf16"]), torch.bfloat16)
    state = dict(loaded.model.state_dict())
    state["model.norm.weight"] = state["model.norm.weight"].float() + 1e-4
    for kept, told in ((None, "float32"), (["norm"], "bfloat16")):
        loaded.model._keep_in_fp32_modules_strict = kept
        folder = tmp_path / told
        save(loaded, folder, "card", dict(state))
        assert json.loads((folder / "config.json").read_text())["dtype"] == told
