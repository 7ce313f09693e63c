"""LoRA adapters: merging a PEFT folder gives what PEFT's own merge gives; what is no plain LoRA is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.families import llms, vlms
from vlopd.config.analysis import GeometryConfig
from vlopd.errors import RunError
from vlopd.models.parameter_names import classify
from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows
from vlopd.weights.delta import match_report, stream

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION}),
    "all modules": ("llama", {"target_modules": EVERYTHING}),
    "rslora": ("llama", {"target_modules": EVERYTHING, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": EVERYTHING,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"v_proj": 32, r"model\.layers\.0\.self_attn\.q_proj": 7},
        },
    ),
    "patterns of rslora": (
        "llama",
        {
            "target_modules": EVERYTHING,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 9},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head saved whole": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms trained": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["norm"]}),
    "biases trained": ("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "conv1d and embeddings": (
        "gpt2",
        {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True, "use_rslora": True},
    ),
    "vision and language": ("llava", {"target_modules": [*ATTENTION, "linear_1", "fc1"]}),
    "convolution": ("llava", {"target_modules": ["patch_embedding", "q_proj"]}),
}


def make_base(family: str, folder: Path) -> Any:
    """Saves a tiny fp32 model; returns it loaded."""
    if family in llms.LLMS:
        llms.LLMS[family](folder)
        return AutoModelForCausalLM.from_pretrained(folder)
    vlms.build(family, folder)
    return AutoModelForImageTextToText.from_pretrained(folder)


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """Wraps a model in PEFT's LoRA with random factors, saves the adapter and returns the wrapped model."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("case", PLAIN)
def test_merged_as_peft_merges(case, tmp_path):
    """A checkpoint of the streamed tensors is PEFT's merge_and_unload to fp32 rounding; only what is adapted moved."""
    family, settings = PLAIN[case]
    model = make_base(family, tmp_path / "base")
    theirs = adapt(model, tmp_path / "adapter", **settings).merge_and_unload().state_dict()
    deltas = stream(tmp_path / "base", tmp_path / "adapter", classify)
    pairs = list(deltas)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert [pair.name for pair in pairs] == sorted(before)
    assert all(torch.equal(pair.base, before[pair.name]) for pair in pairs)
    moved = {pair.name for pair in pairs if pair.delta.any()}
    assert moved == set(deltas.report.adapted) and moved

    save_file({p.name: p.trained for p in pairs}, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(tmp_path / "base" / "config.json", tmp_path)
    ours = type(model).from_pretrained(tmp_path).state_dict()
    assert ours.keys() == theirs.keys()
    for name, merged in theirs.items():
        error = float((ours[name] - merged).abs().max() / merged.abs().max())
        assert ours[name].dtype == merged.dtype == torch.float32 and error < 3e-7, name


def test_a_bf16_base_is_rounded_once(tmp_path):
    """base + s B A is added in fp32 and rounded to the base's bf16; PEFT, which adds in bf16, is within one step."""
    make_base("llama", tmp_path / "fp32").bfloat16().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    wrapped = adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    theirs = wrapped.merge_and_unload().state_dict()
    checked = 0
    for pair in stream(tmp_path / "base", tmp_path / "adapter", classify):
        assert pair.trained.dtype == torch.bfloat16
        a, b = (
            factors.get(f"base_model.model.{pair.name.removesuffix('.weight')}.lora_{side}.weight")
            for side in "AB"
        )
        if a is None or b is None:
            assert torch.equal(pair.trained, pair.base)
            continue
        exact = pair.base.double() + 6 / 4 * b.double() @ a.double()
        step = 2.0**-8 * exact.abs()
        assert bool(((pair.trained.double() - exact).abs() <= 0.5001 * 2 * step).all())
        assert bool(((pair.trained.double() - theirs[pair.name].double()).abs() <= 4 * step).all())
        checked += 1
    assert checked == 4


def test_analysis_of_an_adapter_is_that_of_the_merged_model(tmp_path):
    """geometry.csv of base against adapter and of base against PEFT's merged checkpoint have one update."""
    model = make_base("llama", tmp_path / "base")
    adapt(
        model, tmp_path / "adapter", target_modules=EVERYTHING
    ).merge_and_unload().save_pretrained(tmp_path / "merged")
    config = GeometryConfig(null_draws=0, ratios=(0.1,))
    found = {}
    for trained in ("adapter", "merged"):
        out = tmp_path / f"{trained}-out"
        measure_checkpoint(
            tmp_path / "base", tmp_path / trained, out, config, {}, progress=False, workers=1
        )
        found[trained] = {
            (row["name"], row["metric"], row["parameter"]): row["value"] for row in read_rows(out)
        }
    assert found["adapter"].keys() == found["merged"].keys()
    smooth = ("relative_delta_fro", "stable_rank", "principal_projection_energy_ratio")
    compared = 0
    for key, value in found["adapter"].items():
        if key[1] in smooth and value:
            assert float(value) == pytest.approx(float(found["merged"][key]), rel=1e-4, abs=1e-7)
            compared += 1
    assert compared > 50
    ranks = [v for k, v in found["adapter"].items() if k[1:] == ("rank_tol", "tol=0.0001") and v]
    assert max(map(float, ranks)) == 4  # the adapter's rank, seen through the merge


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (
        {"use_dora": True},
        r"adapter_config\.json: use_dora is set .*; merge it with PEFT first",
    ),
    "biases of factors": ({"lora_bias": True}, "lora_bias is set"),
    "other method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is merged"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha: must be a number"),
    "another rank": ({"r": 8}, r"q_proj has rank 4, but adapter_config\.json says 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(case, tmp_path):
    """A setting that means more than W + s B A is refused in one line that names it."""
    changes, message = REFUSED[case]
    model = make_base("llama", tmp_path / "base")
    if case == "DoRA":
        adapt(model, tmp_path / "adapter", target_modules=ATTENTION, use_dora=True)
    else:
        adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RunError, match=message) as caught:
        match_report(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_a_pickled_adapter_is_refused(tmp_path):
    """adapter_model.bin is not opened; the line names it and says what to do."""
    model = make_base("llama", tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(RunError, match=r"adapter_model\.bin.*refused.*safetensors") as caught:
        match_report(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(tmp_path):
    """An adapter of a wider model, or of one with other modules, is refused by the first parameter without a place."""
    make_base("llama", tmp_path / "base")
    wide = LlamaForCausalLM(LlamaConfig(**{**llms.SHAPE, "hidden_size": 64}))
    adapt(wide, tmp_path / "wide", target_modules=ATTENTION)
    other = GPT2LMHeadModel(GPT2Config(**llms.CONFIGS["gpt2"]))
    adapt(other, tmp_path / "other", target_modules=["c_attn"], fan_in_fan_out=True)
    deep = LlamaForCausalLM(LlamaConfig(**{**llms.SHAPE, "num_hidden_layers": 3}))
    adapt(deep, tmp_path / "deep", target_modules=ATTENTION)
    for adapter, message in (
        (
            "wide",
            r"layers\.0\.self_attn\.q_proj\.weight is \(32, 32\) .*\(64, 64\).* not the same model",
        ),
        ("other", r"h\.0\.attn\.c_attn\.weight is not a parameter of"),
        ("deep", r"layers\.2\.self_attn\.q_proj\.weight is not a parameter of"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            match_report(tmp_path / "base", tmp_path / adapter)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ methods that change the base


CHANGING = {
    "pissa": "PiSSA",
    "pissa_niter_4": "PiSSA",
    "olora": "OLoRA",
    "OLoRA": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}


@pytest.mark.parametrize("method", CHANGING)
def test_methods_that_change_the_base_are_refused_by_name(method, tmp_path):
    """Their factors stand for what training changed and for a part of the base: one line says which, and what to do."""
    model = make_base("llama", tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
    set_config(tmp_path / "adapter", init_lora_weights=method)
    message = (
        rf"init_lora_weights is '{method}' \({CHANGING[method]} changes the base.*merge it with"
    )
    with pytest.raises(RunError, match=message) as caught:
        match_report(tmp_path / "base", tmp_path / "adapter")
    said = str(caught.value)
    assert "\n" not in said
    assert ("path_initial_model_for_weight_conversion" in said) == (method != "loftq")


@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal", "eva", "mica", None])
def test_methods_that_keep_the_base_are_merged(method, tmp_path):
    """Where an adapter begins does not matter as long as the base stays: W + s B A is the model."""
    model = make_base("llama", tmp_path / "base")
    theirs = adapt(model, tmp_path / "adapter", target_modules=ATTENTION).merge_and_unload()
    set_config(tmp_path / "adapter", init_lora_weights=method)
    merged = theirs.state_dict()
    for pair in stream(tmp_path / "base", tmp_path / "adapter", classify):
        assert torch.allclose(pair.trained, merged[pair.name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_converted_adapter_is_what_training_changed(method, rslora, tmp_path):
    """PEFT's conversion doubles the rank and writes init_lora_weights true: merged, it is the trained model; as it was
    saved before, without conversion, it is refused."""
    model = make_base("llama", tmp_path / "base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=EVERYTHING,
        init_lora_weights=method,
        use_rslora=rslora,
    )
    wrapped = peft.get_peft_model(model, settings)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = method
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "as it is")
    wrapped.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    with pytest.raises(RunError, match=f"init_lora_weights is '{method}'"):
        match_report(tmp_path / "base", tmp_path / "as it is")
    about = json.loads((tmp_path / "converted/adapter_config.json").read_text())
    assert about["init_lora_weights"] is True and about["r"] == 8
    trained = wrapped.merge_and_unload().state_dict()
    moved = 0
    for pair in stream(tmp_path / "base", tmp_path / "converted", classify):
        change = trained[pair.name] - before[pair.name]
        assert torch.allclose(pair.delta, change, rtol=0, atol=2e-6), pair.name
        moved += float(change.abs().max()) > 0.01
    assert moved == 14


OTHER_KINDS: dict[str, Any] = {
    "LOHA": lambda: peft.LoHaConfig(target_modules=ATTENTION),
    "LOKR": lambda: peft.LoKrConfig(target_modules=ATTENTION),
    "IA3": lambda: peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[]),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=ATTENTION, total_step=10),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapter_are_refused_by_name(kind, tmp_path):
    """As PEFT itself saves them."""
    model = make_base("llama", tmp_path / "base")
    peft.get_peft_model(model, OTHER_KINDS[kind]()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunError, match=f"peft_type is '{kind}'; only LORA is merged"):
        match_report(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices is set"),
        ({"kasa_config": {"a": 1}}, "kasa_config is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"a_method_of_tomorrow": 7}, "a_method_of_tomorrow is set, which is not supported here"),
        ({"init_lora_weights": "of_tomorrow"}, "'of_tomorrow' .not supported here"),
        ({"lora_alpha": float("nan")}, "lora_alpha: must be a finite number"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\('"),
    ],
)
def test_settings_that_are_not_understood_are_refused(settings, message, tmp_path):
    """What a setting does is known, or it is refused by name; those that only say how it was trained are not."""
    model = make_base("llama", tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=ATTENTION, lora_dropout=0.5)
    match_report(tmp_path / "base", tmp_path / "adapter")
    set_config(tmp_path / "adapter", **settings)
    with pytest.raises(RunError, match=message) as caught:
        match_report(tmp_path / "base", tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_trained_tokens_are_refused_as_peft_saves_them(tmp_path):
    """Rows of the embedding that were trained apart are no LoRA factor; refused by the setting's name."""
    model = make_base("llama", tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=ATTENTION, trainable_token_indices=[3, 5])
    with pytest.raises(RunError, match="trainable_token_indices is set"):
        match_report(tmp_path / "base", tmp_path / "adapter")


def test_a_square_matrix_that_lies_the_other_way_is_refused(tmp_path):
    """PEFT keeps one fan_in_fan_out for a Conv1D and a Linear; where the shape cannot show it, the family does."""
    model = make_base("gpt2", tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=["attn.c_proj"], fan_in_fan_out=True)
    assert len(match_report(tmp_path / "base", tmp_path / "adapter").adapted) == 2
    set_config(tmp_path / "adapter", fan_in_fan_out=False)
    with pytest.raises(RunError, match=r"fan_in_fan_out = false, but \S+c_proj\.weight is stored"):
        match_report(tmp_path / "base", tmp_path / "adapter")


def test_a_folder_that_holds_both_is_refused(tmp_path):
    """A merged model saved beside its adapter: which one is meant cannot be told. An adapter is no base either."""
    model = make_base("llama", tmp_path / "base")
    wrapped = adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
    with pytest.raises(RunError, match="is an adapter; the base is the model"):
        match_report(tmp_path / "adapter", tmp_path / "base")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "adapter")
    for folders in (("base", "adapter"), ("adapter", "base")):
        with pytest.raises(RunError, match=r"holds a model .* and an adapter"):
            match_report(*(tmp_path / name for name in folders))


def test_a_merge_that_overflows_is_refused(tmp_path):
    """Factors that lead out of the base's fp16 are named, not handed on as infinities."""
    make_base("llama", tmp_path / "fp32").half().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(model, tmp_path / "adapter", target_modules=ATTENTION)
    set_config(tmp_path / "adapter", lora_alpha=1e9)
    with pytest.raises(
        RunError, match=r"q_proj\.weight is not finite once merged in torch\.float16"
    ):
        list(stream(tmp_path / "base", tmp_path / "adapter", classify))


def set_config(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
