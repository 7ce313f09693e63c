"""One model in two layouts or under two names is one model: no delta, and a planted one where it was planted."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.command import call
from tests.families import llms, vlms
from vlopd.config.analysis import GeometryConfig
from vlopd.config.masks import VisibleMask
from vlopd.errors import RunError
from vlopd.files import read_json
from vlopd.masks.apply import transplanted
from vlopd.masks.files import check_shapes
from vlopd.masks.rules import build_mask
from vlopd.models.parameter_names import classify
from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows
from vlopd.update_geometry.overlap import write_overlap
from vlopd.update_geometry.trajectory import write_trajectory
from vlopd.weights.delta import stream, stream_whole

Tensors = dict[str, Tensor]
QUICK = GeometryConfig(null_draws=0, ratios=(0.1,))
MOE: dict[str, Any] = {
    **llms.SHAPE,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
}
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": llms.CONFIGS["mixtral"],  # w1, w2, w3 under block_sparse_moe
    "qwen3_moe": llms.CONFIGS["qwen3_moe"],  # gate_proj, up_proj, down_proj
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},  # and an expert for all tokens
    "phimoe": MOE,  # the router has another name too
    "deepseek_v3": {**MOE, **LATENT, "num_key_value_heads": 4, "q_lora_rank": 16, "n_group": 1,
                    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
}  # fmt: skip


def load(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def save(tensors: Tensors, folder: Path, like: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    if like is not None:
        shutil.copy(like / "config.json", folder)
    return folder


def two_layouts(family: str, root: Path) -> tuple[Path, Path]:
    """(as the hub stores it, as transformers 5 holds it in memory) of one tiny model."""
    torch.manual_seed(0)
    if family in EXPERTS:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS[family]))
        model.save_pretrained(root / "hub")
        AutoModelForCausalLM.from_pretrained(root / "hub").save_pretrained(
            root / "fused", save_original_format=False
        )
        return root / "hub", root / "fused"
    vlms.build(family, root / "built")
    model = AutoModelForImageTextToText.from_pretrained(root / "built")
    model.save_pretrained(root / "fused", save_original_format=False)
    stored = load(root / "built")
    if family == "qwen3_vl_moe":  # the hub's stacks are [experts, in, out]
        stored = {n: t.transpose(1, 2) if ".experts." in n else t for n, t in stored.items()}
    return save(stored, root / "hub", root / "built"), root / "fused"


def folders_of(family: str, direction: str, root: Path) -> tuple[Path, Path]:
    hub, fused = two_layouts(family, root)
    return (hub, fused) if direction == "hub first" else (fused, hub)


DIRECTIONS = ("hub first", "fused first")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", [*EXPERTS, "qwen3_vl_moe", "llava"])
def test_two_layouts_of_one_model_do_not_differ(family, direction, tmp_path):
    """Every parameter of the base is matched, in the base's naming and shape, and no coordinate differs."""
    base, trained = folders_of(family, direction, tmp_path)
    before, after = load(base), load(trained)
    assert {n: t.shape for n, t in before.items()} != {n: t.shape for n, t in after.items()}
    deltas = stream_whole(base, trained, classify)
    assert deltas.report.matched == tuple(sorted(before))
    assert deltas.report.left_out == deltas.report.missing == deltas.report.extra == ()
    for pair in deltas:
        assert torch.equal(pair.base, before[pair.name])
        assert torch.equal(pair.trained, pair.base) and not pair.delta.any()


PLANTED: dict[str, tuple[str, str, str, Callable[[Tensor], Tensor]]] = {
    # family: its row hub first, fused first, the fused tensor, the matrix of the third expert within it
    "mixtral": (
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.1.mlp.experts.gate_up_proj[2][up]",
        "model.layers.1.mlp.experts.gate_up_proj",
        lambda t: t[2, 48:],
    ),
    "qwen3_moe": (
        "model.layers.0.mlp.experts.2.gate_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj[2][gate]",
        "model.layers.0.mlp.experts.gate_up_proj",
        lambda t: t[2, :16],
    ),
    "deepseek_v3": (
        "model.layers.1.mlp.experts.2.down_proj.weight",
        "model.layers.1.mlp.experts.down_proj[2]",
        "model.layers.1.mlp.experts.down_proj",
        lambda t: t[2],
    ),
    "qwen3_vl_moe": (
        "model.language_model.layers.0.mlp.experts.gate_up_proj[2][up]",
        "model.language_model.layers.0.mlp.experts.gate_up_proj[2][up]",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        lambda t: t[2, 24:],
    ),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", PLANTED)
def test_a_delta_planted_in_one_expert_comes_out_there(family, direction, tmp_path):
    """Of all rows only that expert's matrix moved, by just the norm that was planted, whichever side is fused."""
    hub, fused = two_layouts(family, tmp_path)
    hub_row, fused_row, stored, matrix = PLANTED[family]
    moved = load(fused)
    original = matrix(moved[stored]).clone()
    matrix(moved[stored])[3, 5] += 0.5
    matrix(moved[stored])[0, 1] -= 0.25
    change = matrix(moved[stored]) - original
    if direction == "hub first":
        base, trained, row = hub, save(moved, tmp_path / "moved", fused), hub_row
    else:  # the fused one is the base, so what comes out is the other way round
        base, trained, row = save(moved, tmp_path / "moved", fused), hub, fused_row
        change = -change
    measure_checkpoint(base, trained, tmp_path / "out", QUICK, {}, progress=False, workers=1)
    norms = {
        r["name"]: float(r["value"])
        for r in read_rows(tmp_path / "out")
        if r["metric"] == "delta_rms" and not r["name"].startswith("[")
    }
    assert len(norms) > 20 and {n for n, value in norms.items() if value} == {row}
    assert norms[row] == pytest.approx(float(change.norm()) / change.numel() ** 0.5)
    (pair,) = (p for p in stream(base, trained, classify) if p.delta.any())
    assert int((pair.delta != 0).sum()) == 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masks_and_transplants_across_layouts_are_in_the_bases_naming(direction, tmp_path):
    """The visible mask has the base's names and shapes, marks as much as the same checkpoints in one layout do, and
    a transplant of everything is the trained model in the base's layout."""
    hub, fused = two_layouts("mixtral", tmp_path)
    torch.manual_seed(1)
    noisy = {n: t + 0.1 * t * (torch.rand(t.shape) < 0.3) for n, t in load(fused).items()}
    moved = save(noisy, tmp_path / "moved", fused)
    base, trained = (hub, moved) if direction == "hub first" else (moved, hub)
    deltas = stream_whole(base, trained, classify)
    mask = build_mask(VisibleMask(of="x"), deltas)
    check_shapes(mask, {name: tensor.shape for name, tensor in load(base).items()})
    plain = build_mask(VisibleMask(of="x"), stream(fused, moved, classify))
    assert sum(map(Tensor.sum, mask.values())) == sum(map(Tensor.sum, plain.values()))
    whole = {p.name: transplanted(p, torch.ones_like(p.base).bool()) for p in deltas}
    back = stream(save(whole, tmp_path / "whole", base), trained, classify)
    assert not any(pair.delta.any() for pair in back)


def test_phi3_as_a_llama(tmp_path):
    """A Phi-3 whose fused projections were split for Llama's code is the same model; a change of k is found in k."""
    llms.build("phi3", tmp_path / "phi3")
    config = {**llms.CONFIGS["phi3"], "sliding_window": None}
    AutoConfig.for_model("llama", **config).save_pretrained(tmp_path / "llama")
    split: Tensors = {}
    for name, tensor in load(tmp_path / "phi3").items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", tensor.split([64, 32, 32]), strict=True):
                split[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                split[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            split[name] = tensor
    split = {n: t.clone() for n, t in split.items()}
    save(split, tmp_path / "llama")
    split["model.layers.0.self_attn.k_proj.weight"][1, 2] += 1
    save(split, tmp_path / "moved", tmp_path / "llama")
    for base, trained in (("phi3", "llama"), ("llama", "phi3")):
        deltas = stream_whole(tmp_path / base, tmp_path / trained, classify)
        assert len(deltas) == len(load(tmp_path / base))
        assert not any(pair.delta.any() for pair in deltas)
    (pair,) = (p for p in stream(tmp_path / "phi3", tmp_path / "moved", classify) if p.delta.any())
    assert pair.name == "model.layers.0.self_attn.qkv_proj.weight"
    assert pair.delta.nonzero().tolist() == [[64 + 1, 2]]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lost", ["an expert", "config.json", "a stack's order"])
def test_layouts_that_do_not_translate_for_sure_are_refused(lost, direction, tmp_path):
    """A missing expert, no config.json to tell the layout, or square stacks whose order nobody can tell: one line."""
    hub, fused = two_layouts("qwen3_moe", tmp_path)
    stored = load(hub)
    message = r"experts\S* \(.*\) \(in the (base|trained checkpoint) only\)"
    if lost == "an expert":
        del stored["model.layers.0.mlp.experts.1.up_proj.weight"]
        save(stored, hub)
    elif lost == "config.json":
        (hub / "config.json").unlink()
        (fused / "config.json").unlink()
        message += ".*config.json beside the weights"
    else:
        config = AutoConfig.from_pretrained(fused)
        config.moe_intermediate_size = 16
        vlms.build("qwen3_vl_moe", tmp_path / "vlm")
        about = json.loads((tmp_path / "vlm/config.json").read_text())
        about["text_config"]["moe_intermediate_size"] = (
            16  # twice that is the width: gate_up is square
        )
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**about))
        fused = tmp_path / "square"
        model.save_pretrained(fused, save_original_format=False)
        turned = {n: t.transpose(1, 2) if ".experts." in n else t for n, t in load(fused).items()}
        hub = save(turned, tmp_path / "turned", fused)
        message = r"gate_up_proj \(4, 32, 32\) is square"
    folders = (hub, fused) if direction == "hub first" else (fused, hub)
    with pytest.raises(RunError, match=message) as caught:
        stream(*folders, classify)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ wrapped names


def tiny(kind: str, folder: Path) -> Tensors:
    if kind == "llm":
        llms.build("llama", folder)
    else:
        vlms.build("llava", folder)
    return load(folder)


def in_the_middle(wrapper: str) -> Callable[[str], str]:
    return lambda name: name.replace(".self_attn.", f".{wrapper}.self_attn.").replace(
        ".mlp.", f".{wrapper}.mlp."
    )


WRAPPED: dict[str, Callable[[str], str]] = {
    "activation checkpointing": in_the_middle("_checkpoint_wrapped_module"),
    "torch.compile": lambda name: "_orig_mod." + name,
    "compiled layers": in_the_middle("_orig_mod"),
    "FSDP": lambda name: (
        "_fsdp_wrapped_module."
        + in_the_middle("_fsdp_wrapped_module._checkpoint_wrapped_module")(name)
    ),
    "DDP of compiled": lambda name: f"module._orig_mod.{name}",
    "DDP within": in_the_middle("module"),
    "PEFT's base": lambda name: (
        "base_model.model." + name.replace("_proj.weight", "_proj.base_layer.weight")
    ),
    "Lightning": lambda name: f"model._forward_module.{name}",
}


@pytest.mark.parametrize("kind", ["llm", "vlm"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_names_are_the_same_parameters(kind, wrapper, tmp_path):
    """On either side or, differently, on both: all are matched under the base's names, and only what moved moved."""
    before = tiny(kind, tmp_path / "before")
    after = {n: t.clone() for n, t in before.items()}
    moved = next(n for n in after if n.endswith("layers.1.mlp.up_proj.weight"))
    after[moved][2, 3] += 0.5
    wrap = WRAPPED[wrapper]
    other = WRAPPED["FSDP" if wrapper != "FSDP" else "DDP within"]
    plain, wrapped = lambda name: name, wrap
    for i, (here, there) in enumerate(((plain, wrapped), (wrapped, plain), (wrapped, other))):
        base = save({here(n): t for n, t in before.items()}, tmp_path / f"base-{i}")
        trained = save({there(n): t for n, t in after.items()}, tmp_path / f"trained-{i}")
        deltas = stream_whole(base, trained, classify)
        assert set(deltas.report.matched) == {here(n) for n in before}
        assert deltas.report.left_out == ()
        assert [pair.name for pair in deltas if pair.delta.any()] == [here(moved)]
        where = classify(here(moved))
        assert (where.module, where.layer) == ("up", 1)


def test_wrapped_names_and_another_layout_together(tmp_path):
    """Hub experts under FSDP's and PEFT's names against the fused model: matched in full."""
    hub, fused = two_layouts("mixtral", tmp_path)
    names = {n: "base_model.model." + in_the_middle("_orig_mod")(n) for n in load(hub)}
    wrapped = save({names[n]: t for n, t in load(hub).items()}, tmp_path / "wrapped")
    for base, trained in ((wrapped, fused), (fused, wrapped)):
        deltas = stream_whole(base, trained, classify)
        assert len(deltas) == len(load(base))
        assert not any(pair.delta.any() for pair in deltas)


def test_two_candidates_are_no_match(tmp_path):
    """Names that unwrap to one, and two copies that both fit under another prefix, are left out and refused."""
    before = tiny("llm", tmp_path / "before")
    twice = {
        f"{w}.{n}": t + i for i, w in enumerate(("module", "_orig_mod")) for n, t in before.items()
    }
    copies = {
        f"{p}.{n}": t + i for i, p in enumerate(("student", "ema")) for n, t in before.items()
    }
    for i, tensors in enumerate((twice, copies)):
        trained = save(tensors, tmp_path / f"trained-{i}")
        with pytest.raises(RunError, match="share no floating-point parameter"):
            stream(tmp_path / "before", trained, classify)


# ------------------------------------------------------------------------------- what is left out


def extended(folder: Path, **extra: Tensor) -> Path:
    save({**load(folder), **extra}, folder)
    return folder


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_what_is_left_out_is_said_everywhere(kind, tmp_path):
    """Below the limit: counted, with both shares, in match.json, summary.json, geometry.csv, overlap.csv and
    trajectory.csv; numbers of what is compared stay as they are."""
    before = tiny(kind, tmp_path / "before")
    after = {n: t + 0.01 * torch.randn_like(t) for n, t in before.items()}
    plain, more = save(after, tmp_path / "step-1"), save(after, tmp_path / "step-2")
    extended(more, **{"v_head.weight": torch.ones(1, 32)})
    ids = torch.arange(3)
    extended(tmp_path / "before", position_ids=ids, **{"rotary.inv_freq": torch.ones(4)})
    for folder in (plain, more):
        extended(folder, position_ids=ids)
    tables = {}
    for folder in (plain, more):
        out = tmp_path / f"{folder.name}-out"
        measure_checkpoint(tmp_path / "before", folder, out, QUICK, {}, progress=False, workers=1)
        tables[folder.name] = list(read_rows(out))
    trained = sum(t.numel() for t in before.values()) + 32
    own = {r["name"]: r for r in tables["step-2"] if r["metric"] == "left_out"}
    assert {n: (r["status"], r["reason"], r["value"]) for n, r in own.items()} == {
        "v_head.weight": ("skipped", "in the trained checkpoint only", ""),
        "rotary.inv_freq": ("skipped", "a constant, in the base only", ""),
        "position_ids": ("skipped", "a constant", ""),
    }
    shares = {
        r["parameter"]: float(r["value"])
        for r in tables["step-2"]
        if r["metric"] == "left_out_share"
    }
    assert shares == {
        "of=base": 0.0,  # constants are no parameters
        "of=trained": pytest.approx(32 / trained),
    }
    summary = read_json(tmp_path / "step-2-out/summary.json")["left_out"]
    assert summary["tensors"] == 3 and summary["largest"][0] == "v_head.weight"
    assert summary["base_share"] == shares["of=base"]
    assert summary["trained_share"] == shares["of=trained"]
    assert "v_head.weight (1, 32) (in the trained checkpoint only)" in summary["summary"]
    match = read_json(tmp_path / "step-2-out/match.json")
    assert match["missing"] == ["rotary.inv_freq"] and match["extra"] == ["v_head.weight"]
    compared = [
        [r for r in rows if not r["metric"].startswith("left_out")] for rows in tables.values()
    ]
    assert compared[0] == compared[1]

    both = {"plain": plain, "more": more}
    write_overlap(tmp_path / "before", both, tmp_path, QUICK, progress=False)
    steps = {1: plain, 2: more}
    write_trajectory(tmp_path / "before", steps, tmp_path, QUICK, progress=False)
    for name in ("overlap", "trajectory"):
        with (tmp_path / f"{name}.csv").open() as file:
            rows = [r for r in csv.DictReader(file) if r["metric"] == "left_out"]
        assert {r["name"] for r in rows} == set(own), name
        assert all(
            r["status"] == "skipped" and "only" in r["reason"]
            for r in rows
            if "ids" not in r["name"]
        )


def test_nothing_left_out_adds_no_row(tmp_path):
    """Where everything is compared summary.json says 0 and geometry.csv has no row of it."""
    before = tiny("llm", tmp_path / "before")
    save({n: t * 2 for n, t in before.items()}, tmp_path / "after")
    folders = (tmp_path / "before", tmp_path / "after", tmp_path / "out")
    measure_checkpoint(*folders, QUICK, {}, progress=False, workers=1)
    assert not any(row["metric"].startswith("left_out") for row in read_rows(tmp_path / "out"))
    said = read_json(tmp_path / "out/summary.json")["left_out"]
    assert said == {"tensors": 0, "base_share": 0, "trained_share": 0, "largest": [], "summary": ""}


LARGE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "vision tower": (
        lambda t: {n: v for n, v in t.items() if "vision_tower" not in n},
        r"vision_tower\.\S+ \(.*\) \(in the (base|trained checkpoint) only\)",
    ),
    "a tensor split over names": (
        lambda t: {
            m: p
            for n, v in t.items()
            for m, p in (
                zip((f"{n}.0", f"{n}.1"), v.chunk(2), strict=True) if "embed" in n else [(n, v)]
            )
        },
        r"embed_tokens\.weight",
    ),
    "another head": (
        lambda t: {n.replace("lm_head", "score"): v + n.count("lm_head") for n, v in t.items()},
        r"(lm_head|score)\.weight \(.*\) \(in the (base|trained checkpoint) only\)",
    ),
    "flattened by FSDP": (
        lambda t: {
            **{n: v for n, v in t.items() if "layers.1." not in n},
            "model.layers.1._fsdp_wrapped_module._flat_param": torch.cat(
                [v.flatten() for n, v in t.items() if "layers.1." in n]
            ),
        },
        r"_flat_param \(\d+,\) \(in the (base|trained checkpoint) only\)",
    ),
}


@pytest.mark.parametrize("side", ["base", "trained"])
@pytest.mark.parametrize("case", LARGE)
def test_too_much_left_out_is_refused(case, side, tmp_path):
    """Above one percent of either side: one line with the largest tensor, both shares and the remedy, of geometry and
    masks alike; a larger `max_left_out` measures the rest."""
    change, message = LARGE[case]
    before = tiny("vlm", tmp_path / "base")
    save({n: t + 0.01 for n, t in before.items()}, tmp_path / "trained", tmp_path / "base")
    save(change(load(tmp_path / side)), tmp_path / side)
    folders = (tmp_path / "base", tmp_path / "trained")
    with pytest.raises(RunError, match=message) as caught:
        stream(*folders, classify)
    said = str(caught.value)
    assert "\n" not in said and "% of the base" in said and "max_left_out" in said
    config = QUICK.model_copy(update={"max_left_out": 0.9})
    measure_checkpoint(*folders, tmp_path / "out", config, {}, progress=False, workers=1)
    assert read_json(tmp_path / "out/summary.json")["left_out"]["tensors"] > 0


@pytest.mark.parametrize("kind", ["llm", "vlm"])
def test_the_commands_say_what_is_left_out(kind, tmp_path, monkeypatch, capsys):
    """`vlopd geometry` and `vlopd mask make` print the line that summary.json has; above the limit both exit with 2."""
    before = tiny(kind, tmp_path / "before")
    after = save({**before, "v_head.weight": torch.ones(1, 32)}, tmp_path / "after")
    compared = ("geometry", tmp_path / "before", after, "--out", tmp_path / "out")
    rule = ("--rule", "{type='visible'}", "--out", tmp_path / "mask.safetensors")
    line = r"left out: 1 tensor not compared, 0\.00% .*v_head\.weight \(1, 32\)"
    code, said = call(monkeypatch, capsys, *compared, "--set", "null_draws=0")
    assert code == 0 and re.search(line, said)
    code, said = call(monkeypatch, capsys, "mask", "make", tmp_path / "before", after, *rule)
    assert code == 0 and re.search(line, said)
    assert read_json(tmp_path / "mask.json")["inputs"]["left_out"] == ["v_head.weight"]
    extended(after, copy=torch.ones(30, 32))
    for words in (compared, ("mask", "make", tmp_path / "before", after, *rule)):
        code, said = call(monkeypatch, capsys, *words)
        assert code == 2 and "copy (30, 32) (in the trained checkpoint only)" in said


def test_unmerged_adapters_are_refused_however_small(tmp_path):
    """A PEFT model's whole state dict holds base weights that did not move and factors that did: refused by name."""
    before = tiny("llm", tmp_path / "before")
    name = "model.layers.0.self_attn.q_proj"
    for i, (key, shape) in enumerate(
        {
            f"base_model.model.{name}.lora_A.default.weight": (1, 32),
            f"{name}.lora_B.weight": (32, 1),
            f"{name}.ia3_l.default": (1, 32),
            "model.norm.modules_to_save.default.weight": (32,),
        }.items()
    ):
        trained = save({**before, key: torch.ones(shape)}, tmp_path / f"trained-{i}")
        with pytest.raises(RunError, match=r"part of an unmerged adapter.*merge_and_unload"):
            stream(tmp_path / "before", trained, classify)


def test_rows_added_to_an_embedding_are_refused_by_name(tmp_path):
    """A vocabulary that grew: the embedding, both shapes and what to do."""
    before = tiny("llm", tmp_path / "before")
    grown = {n: torch.cat([t, t[:2]]) if len(t) == 58 else t for n, t in before.items()}
    with pytest.raises(RunError, match=r"\(58, 32\) in .*\(60, 32\) in .*resize_token_embeddings"):
        stream(tmp_path / "before", save(grown, tmp_path / "grown"), classify)


def test_what_is_built_from_an_update_needs_all_of_it(tmp_path):
    """Masks, transplants and extrapolations of a run refuse a parameter of the base without a partner, however small;
    what only the trained side has is no coordinate of theirs."""
    before = tiny("llm", tmp_path / "before")
    less = {n: t for n, t in before.items() if n != "model.norm.weight"}
    save(less, tmp_path / "less")
    assert stream(tmp_path / "before", tmp_path / "less", classify).report.missing
    with pytest.raises(RunError, match=r"model\.norm\.weight \(32,\) is in the base only"):
        stream_whole(tmp_path / "before", tmp_path / "less", classify)
    save({**before, "v_head.weight": torch.ones(1, 32)}, tmp_path / "more")
    assert len(stream_whole(tmp_path / "before", tmp_path / "more", classify)) == len(before)
