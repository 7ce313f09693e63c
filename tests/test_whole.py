"""A model is whole or it is refused: one line that names the tensor, the token or the file, whoever reads it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.command import call
from tests.families.llms import build
from vlopd.errors import ConfigError, RunError, UserError
from vlopd.models import families, integrity
from vlopd.models.load import BUILTIN, load, load_model_config
from vlopd.models.parameter_names import classify
from vlopd.models.tokenizers import end_ids
from vlopd.types import Example
from vlopd.weights.checks import refuse_unlike_config
from vlopd.weights.delta import match_report, stream
from vlopd.weights.reader import Weights

QUESTION = Example.ask("q1", "how many red")


@pytest.fixture
def copied(folders, kind, tmp_path) -> Path:
    """A student's folder that a test may break."""
    return Path(shutil.copytree(folders[kind, "student"], tmp_path / "broken"))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / integrity.SINGLE)
    change(tensors)
    save_file(tensors, folder / integrity.SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, **keys) -> None:
    about = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**about, **keys}))


def named(folder: Path, end: str) -> str:
    """A tensor of the file whose name ends so, in the last layer."""
    return sorted(name for name in load_file(folder / integrity.SINGLE) if name.endswith(end))[-1]


def sharded(folder: Path) -> list[Path]:
    """Puts the weights into two shards with an index in place of the single file."""
    tensors = load_file(folder / integrity.SINGLE)
    (folder / integrity.SINGLE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        held = {tensor: tensors[tensor] for tensor, place in places.items() if place == name}
        save_file(held, folder / name, metadata={"format": "pt"})
    (folder / integrity.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / name for name in names]


def refusal(folder: Path, compute: torch.dtype = torch.float32) -> str:
    """The one line with which a folder is refused as a model."""
    with pytest.raises(UserError) as caught:
        load(str(folder), compute)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def delta_refusal(base: Path, trained: Path) -> str:
    """The one line with which a folder is refused as the trained side of a delta."""
    with pytest.raises(RunError) as caught:
        list(stream(base, trained, classify))
    assert "\n" not in str(caught.value)
    assert str(trained) in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------- missing, or another model's


@pytest.mark.parametrize("end", ["mlp.up_proj.weight", "lm_head.weight", "embed_tokens.weight"])
def test_a_missing_tensor_is_named(copied, end):
    """A matrix, a head that is not tied and an embedding that is not in the file are each named."""
    name = named(copied, end)
    edit_weights(copied, lambda tensors: tensors.pop(name))
    assert end in refusal(copied) and "incomplete" in refusal(copied)


def test_a_tied_head_may_be_stored_once(kind, copied):
    """A head or an embedding that is not in the file is whole where config.json ties the two; both gone is not."""
    head, embedding = named(copied, "lm_head.weight"), named(copied, "embed_tokens.weight")
    about = json.loads((copied / "config.json").read_text())
    about["tie_word_embeddings"] = True
    (about if kind == "llm" else about["text_config"])["tie_word_embeddings"] = True
    (copied / "config.json").write_text(json.dumps(about))
    before = load_file(copied / integrity.SINGLE)
    for gone, left in ((head, embedding), (embedding, head)):
        save_file(
            {n: t for n, t in before.items() if n != gone},
            copied / integrity.SINGLE,
            metadata={"format": "pt"},
        )
        model = load(str(copied), torch.bfloat16).model
        assert torch.equal(model.get_output_embeddings().weight, before[left])
        assert torch.equal(model.get_input_embeddings().weight, before[left])
    edit_weights(copied, lambda tensors: tensors.pop(head))
    assert "lm_head.weight" in refusal(copied)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_wrapped_names_are_refused(copied, prefix):
    """A checkpoint under a wrapper's names, which transformers would fill at random, is refused with both names."""
    edit_weights(copied, lambda t: [t.__setitem__(prefix + name, t.pop(name)) for name in list(t)])
    said = refusal(copied)
    assert "lm_head.weight" in said and prefix in said and "tensors in all" in said


def test_a_file_with_more_than_the_model_is_refused(folders, tmp_path):
    """Layers that config.json does not count, and a bias that it does not want, are not passed over."""
    fewer = Path(shutil.copytree(folders["llm", "student"], tmp_path / "fewer"))
    edit_json(fewer / "config.json", num_hidden_layers=1)
    assert "model.layers.1." in refusal(fewer)
    biased = Path(shutil.copytree(folders["llm", "student"], tmp_path / "biased"))
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(biased, lambda tensors: tensors.update({bias: torch.ones(32)}))
    assert bias in refusal(biased)


def test_constants_of_earlier_versions_are_passed_over(tmp_path):
    """Causal masks and rotary tables that old checkpoints hold are no parameters; the model makes its own."""
    build("gpt2", tmp_path)
    old = {"attn.bias": torch.ones(1, 1, 8, 8), "attn.masked_bias": torch.tensor(-1e4)}
    edit_weights(tmp_path, lambda t: t.update({f"transformer.h.0.{n}": x for n, x in old.items()}))
    load(str(tmp_path), torch.float32)


def test_another_shape_is_refused_with_both(copied):
    """A tensor of another shape than config.json says: its name, the shape in the file, the shape wanted."""
    name = named(copied, "mlp.up_proj.weight")
    edit_weights(copied, lambda tensors: tensors.update({name: tensors[name][:40].clone()}))
    said = refusal(copied)
    assert "mlp.up_proj.weight is (40, 32)" in said and "(64, 32)" in said


def test_a_shard_that_lacks_a_tensor_is_refused(copied):
    """A shard without a tensor that the index places there, a shard that is gone, and one that is cut."""
    first, second = sharded(copied)
    tensors = load_file(first)
    gone = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != gone}, first, metadata={"format": "pt"})
    assert gone.split(".", 1)[1] in refusal(copied)
    whole_bytes = second.read_bytes()
    second.write_bytes(whole_bytes[:-50])
    assert str(second) in refusal(copied) and "not a complete" in refusal(copied)
    second.unlink()
    assert f"{second} is missing" in refusal(copied)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_an_expert_without_a_matrix_is_named(family, tmp_path):
    """Experts stored one by one, of which one lacks a matrix or has one of another shape; transformers names none."""
    build(family, tmp_path / "fused")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    model.save_pretrained(tmp_path, save_original_format=True)
    AutoTokenizer.from_pretrained(tmp_path / "fused").save_pretrained(tmp_path)
    load(str(tmp_path), torch.float32)
    stored = load_file(tmp_path / integrity.SINGLE)
    name = next(name for name in sorted(stored) if "experts.1." in name)
    for change in (lambda t: t.pop(name), lambda t: t.update({name: t[name][:3].clone()})):
        save_file(stored, tmp_path / integrity.SINGLE, metadata={"format": "pt"})
        edit_weights(tmp_path, change)
        assert name in refusal(tmp_path)


# ------------------------------------------------------------------------------------------------ packed


NARROW = (torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_integer_and_fp8_weights_are_refused(kind, folders, copied, dtype):
    """A weight stored as integers or fp8 under its own name, which transformers casts without a word."""
    name = named(copied, "mlp.up_proj.weight")
    edit_weights(copied, lambda t: t.update({name: (t[name].float() * 9).to(dtype)}))
    for said in (refusal(copied), delta_refusal(folders[kind, "student"], copied)):
        assert f"{name} is stored as" in said and "dequantised" in said


BESIDE = (
    ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale", ".weight_zero_point", ".SCB",
    ".weight.absmax", ".weight.quant_state.bitsandbytes__nf4", ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_packed", ".gate_up_proj_blocks", ".gate_up_proj_scales", ".W_q",
)  # fmt: skip


def test_scales_beside_the_weights_are_refused(kind, folders, copied):
    """The tensors that GPTQ, AWQ, bitsandbytes, compressed-tensors, fp8 and mxfp4 add, with no word in config.json."""
    base = folders[kind, "student"]
    name = named(copied, "mlp.up_proj.weight")
    plain = load_file(base / integrity.SINGLE)
    for end in BESIDE:
        beside = name.removesuffix(".weight") + end
        tensors = {**plain, beside: torch.ones(4)}
        save_file(tensors, copied / integrity.SINGLE, metadata={"format": "pt"})
        for said in (refusal(copied), delta_refusal(base, copied)):
            assert beside in said and "quantised" in said


def test_plain_checkpoints_are_not_taken_for_packed():
    """Position ids, causal masks and counters are integers and no weights; names with a scale of their own pass."""
    stored = {
        "vision.embeddings.position_ids": integrity.TensorHeader("I64", (1, 50)),
        "h.0.attn.bias": integrity.TensorHeader("U8", (1, 1, 16, 16)),
        "tower.norm.num_batches_tracked": integrity.TensorHeader("I64", ()),
        "layers.0.relative_position_index": integrity.TensorHeader("I64", (49, 49)),
        "layers.0.layer_scale.lambda1": integrity.TensorHeader("F32", (8,)),
        "logit_scale": integrity.TensorHeader("F32", ()),
        "layers.0.layer_scalar": integrity.TensorHeader("BF16", (1,)),
        "layers.0.altup.correct_output_scale": integrity.TensorHeader("BF16", (8,)),  # Gemma 3n's
        "layers.0.mlp.gate_up_proj": integrity.TensorHeader("F64", (2, 4)),
    }
    assert integrity.find_packed(stored) is None
    assert integrity.find_packed({"experts.gate_up_proj": integrity.TensorHeader("I8", (2, 4, 4))})
    assert integrity.find_packed({"norm.weight": integrity.TensorHeader("I8", (4,))})


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4"]
)
def test_a_quantization_config_is_refused(method, kind, folders, copied):
    """config.json's word is enough, at its top or within a part, for models, for deltas, and without weights."""
    base = folders[kind, "student"]
    about = json.loads((base / "config.json").read_text())
    part = about if kind == "llm" else about["text_config"]
    part["quantization_config"] = {"quant_method": method, "bits": 4}
    (copied / "config.json").write_text(json.dumps(about))
    for said in (refusal(copied), delta_refusal(base, copied)):
        assert f"quantization_config ({method})" in said and "dequantised" in said
    with pytest.raises(ConfigError, match="quantised"):
        load_model_config(str(copied))
    part["quantization_config"] = None
    (copied / "config.json").write_text(json.dumps(about))
    load_model_config(str(copied))


# ------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_value_that_is_not_finite_is_named(copied, value, dtype):
    """One such value in one tensor of one of two shards, in any stored type: the tensor's name, and how many."""
    first, _ = sharded(copied)
    tensors = load_file(first)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    tensors[name] = tensors[name].to(dtype)
    tensors[name][1, 2] = value
    save_file(tensors, first, metadata={"format": "pt"})
    said = refusal(copied, torch.bfloat16)
    assert ": 1 of the" in said and name.rpartition("model.")[2] in said


def test_a_buffer_that_is_not_finite_is_named(copied):
    """A NaN in a buffer that is stored with the model is named like a parameter's."""
    model = load(str(copied), torch.float32).model
    model.register_buffer("running_mean", torch.tensor([1.0, float("nan")]))
    with pytest.raises(ConfigError, match="1 of the 2 values of running_mean are not finite"):
        integrity.refuse_not_finite("m", model)


def test_values_beyond_the_compute_precision_are_named(copied):
    """A weight that float64 holds and bf16 does not is infinite for the run, and named."""
    name = named(copied, "mlp.up_proj.weight")
    wide = load_file(copied / integrity.SINGLE)[name].double()
    wide[0, 0] = 1e300
    edit_weights(copied, lambda tensors: tensors.update({name: wide}))
    assert "mlp.up_proj.weight are not finite in bfloat16" in refusal(copied, torch.bfloat16)


def test_logits_that_overflow_are_not_laid_on_the_family(copied):
    """Finite weights whose logits are not finite are told apart from a family that changes its logits."""
    weights = load_file(copied / "model.safetensors")
    for name in weights:
        if name.endswith("model.norm.weight"):
            weights[name].fill_(3e38)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not finite in float32"):
        load(str(copied), torch.float32)


# ------------------------------------------------------------------------------------ what is no model


def test_adapters_are_no_models(kind, folders, copied):
    """An adapter's folder, with or without a model in it, is refused as a model and as the base of a delta."""
    (copied / integrity.ADAPTER).write_text(json.dumps({"peft_type": "LORA"}))
    assert "merge it into its base" in refusal(copied)
    with pytest.raises(RunError, match=r"is an adapter|and an adapter"):
        match_report(copied, folders[kind, "student"])
    (copied / "config.json").unlink()
    assert "merge it into its base" in refusal(copied)


BROKEN_CONFIGS = {
    "{": "is not JSON",
    "[]": "is not a JSON object",
    '{"model_type": "nonesuch"}': "nonesuch",
    '{"model_type": "llama", "hidden_size": "wide"}': "hidden_size",
    '{"model_type": "llama", "num_attention_heads": 0}': "num_attention_heads is 0",
    '{"model_type": "llama", "hidden_act": "nonesuch"}': "nonesuch",
    '{"model_type": "xx", "auto_map": {"AutoConfig": "configuration_x.X"}}': "trust_remote_code = true",
}


@pytest.mark.parametrize("text", BROKEN_CONFIGS)
def test_whatever_a_configuration_raises_is_one_line(copied, text):
    """Any exception of the libraries over a config.json is one line with its reason, and the remedy if it is known."""
    (copied / "config.json").write_text(text)
    assert BROKEN_CONFIGS[text] in refusal(copied)


def test_weights_that_are_no_weights_are_one_line(copied):
    """A file of another kind, an index that is none, pickles alone and no weights at all are each said."""
    (copied / integrity.SINGLE).write_bytes(b"not weights" * 9)
    assert integrity.SINGLE in refusal(copied)
    (copied / integrity.SINGLE).unlink()
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        (copied / integrity.INDEX).write_text(text)
        assert integrity.INDEX in refusal(copied)
        with pytest.raises(RunError, match=integrity.INDEX):
            Weights(copied)
    (copied / integrity.INDEX).unlink()
    assert "no weights" in refusal(copied)
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pickled weights (pytorch_model.bin)" in refusal(copied)


def test_encoders_are_refused():
    """BERT has a head of transformers' causal models and sees both ways; GPT-NeoX says as little and does not."""
    for kind in ("bert", "roberta", "electra"):
        with pytest.raises(ConfigError, match=f"'{kind}' is an encoder"):
            families.auto_classes(AutoConfig.for_model(kind))
    families.auto_classes(AutoConfig.for_model("gpt_neox"))


def test_a_model_that_sees_ahead_is_refused(folders, monkeypatch):
    """A language model whose attention is not causal is found by its states."""
    model = load(str(folders["llm", "student"]), torch.float32).model
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None
    )
    with pytest.raises(ConfigError, match="is not causal"):
        families.check_logits(model)


# ------------------------------------------------------------------------------------------------ tokens


def test_no_tokenizer_is_refused(kind, copied):
    """Without its tokenizer's files a folder is refused, though transformers may make one up from its model type."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
        assert "tokenizer" in refusal(copied)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "cohere", "gpt_neox"])
def test_a_tokenizer_that_was_made_up_is_refused(family, tmp_path):
    """Families for which transformers gives a tokenizer of special tokens alone."""
    build(family, tmp_path)
    for path in [*tmp_path.glob("*token*"), *tmp_path.glob("*.jinja")]:
        path.unlink()
    assert "no tokens but added ones" in refusal(tmp_path)


def test_a_processor_without_images_is_refused(tmp_path):
    """The tokenizer of a vision-language model alone, which AutoProcessor may return, cannot read pictures."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "shapes-student")
    assert families.missing_parts(tokenizer, with_images=False) is None
    assert families.missing_parts(tokenizer, with_images=True) == "no image processor"


def with_token(folder: Path, token: str, special: bool = True) -> int:
    """Adds a token to a folder's tokenizer, not to its model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=special)
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(token)


def test_a_token_without_a_row_is_refused_where_it_occurs(kind, copied):
    """An added token that the model was not resized for: fine unless the template or a question has it."""
    i = with_token(copied, "<|turn|>")
    loaded = load(str(copied), torch.float32)
    loaded.render([QUESTION])
    with pytest.raises(UserError, match=rf"'q2'.*'<\|turn\|>' {i} has no row in the {i} of"):
        loaded.render([QUESTION, Example.ask("q2", "how many <|turn|> red")])
    for path in copied.glob("*.jinja"):
        path.write_text("<|turn|>" + path.read_text())
    assert f"'<|turn|>' {i} has no row" in refusal(copied)


def test_padding_without_a_row_is_refused(copied):
    """The padding token is read by the model too."""
    i = with_token(copied, "[PAD]")
    edit_json(copied / "tokenizer_config.json", pad_token="[PAD]")
    assert f"padding: token '[PAD]' {i} has no row" in refusal(copied)


@pytest.mark.parametrize("eos", [-1, 10**6, "x", 2.0, True, [2, None], [2, 10**6], []])
def test_ends_outside_the_vocabulary_are_refused(copied, eos):
    """End ids that are negative, too large, no integers or none at all: no completion would end."""
    edit_json(copied / "generation_config.json", eos_token_id=eos)
    assert "eos_token_id" in refusal(copied) and "no completion would end" in refusal(copied)


def test_an_end_that_is_never_sampled_is_refused(copied):
    """Padding, and a row without a token, end no completion."""
    edit_json(copied / "generation_config.json", eos_token_id=0)
    assert "none of its end tokens [0] can be sampled" in refusal(copied)


def test_a_model_without_an_end_is_refused(folders):
    """No end in the generation config and none in the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folders["llm", "student"])
    tokenizer.eos_token = None
    loaded = load(str(folders["llm", "student"]), torch.float32)
    loaded.model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="m has no eos_token_id"):
        end_ids("m", loaded.model.generation_config, tokenizer, 58)


def test_a_generation_config_that_cannot_be_read_is_refused(copied):
    """transformers would fall back on config.json's end tokens without a word."""
    for text in ("{", "[]"):
        (copied / "generation_config.json").write_text(text)
        assert "generation_config.json" in refusal(copied)


# --------------------------------------------------------------------------------------------- templates


PARTS = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %} total"


def test_a_template_of_parts_is_given_parts(copied):
    """A template that prints the text of parts gets parts, also of a turn that is a string (as lm-eval's are)."""
    (copied / "chat_template.jinja").write_text(PARTS)
    loaded = load(str(copied), torch.float32)
    assert loaded.render_text(QUESTION) == "how many red total"
    turns = ({"role": "system", "content": "list "}, {"role": "user", "content": "how many"})
    assert loaded.render_text(Example("q", turns)) == "list how many total"


@pytest.mark.parametrize("template", ["total", "{% for m in messages %}{{ m.text }}\n{% endfor %}"])
def test_a_template_without_the_users_words_is_refused(copied, template):
    """A prompt that is empty, or says nothing of the question, is refused on loading."""
    (copied / "chat_template.jinja").write_text(template)
    assert "omits the user's text" in refusal(copied)


def test_a_prompt_of_no_tokens_is_refused(folders):
    """An example whose prompt comes out empty is named."""
    loaded = load(str(folders["llm", "student"]), torch.float32)
    families.set_template(loaded.processor, "{{ messages[0].content }}")
    with pytest.raises(UserError, match=r"'q2'.*empty"):
        loaded.render([QUESTION, Example.ask("q2", "")])


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", "{{ x.y }}"])
def test_a_template_that_raises_names_the_example(copied, template):
    """A template's own refusal, its syntax error and an unknown name are said with the example's id."""
    (copied / "chat_template.jinja").write_text(template)
    loaded = load(str(copied), torch.float32)
    with pytest.raises(UserError, match=r"example 'q1'.*cannot read its prompt"):
        loaded.render([QUESTION])


def test_the_token_that_ends_a_turn_is_found(copied):
    """What the template puts after the model's own turn, if that is a token of its own."""
    text = "{{ m.content if m.content is string else m.content[0].text }}"
    for after, expected in (
        ("<eos>", 2),
        (" <pad>\n", 0),
        ("<assistant> <eos>", 2),
        (" total", None),
    ):
        template = "{% for m in messages %}" + text + after + "{% endfor %}"
        (copied / "chat_template.jinja").write_text(template)
        assert load(str(copied), torch.float32).turn_end == expected


# -------------------------------------------------------------------------------------- the command line


def experiment(tmp_path: Path, kind: str, student: Path, teacher: Path, arms: str = "") -> Path:
    path = tmp_path / "whole.toml"
    path.write_text(
        f'name = "whole"\nstudent = "{student}"\nteacher = "{teacher}"\n[precision]\ncompute = "fp32"\n'
        f'[data]\ntype = "shapes"\nmodality = "{"image" if kind == "vlm" else "text"}"\n'
        '[rollout]\nmax_new_tokens = 4\n[train]\nsteps = 1\nprompts_per_step = 2\n[arms]\nbase = {type = "base"}\n'
        f'full = {{type = "distill", seed = 1}}\n{arms}'
        f'[eval]\ntasks = ["shapes{"" if kind == "vlm" else "_text"}"]\nlimit = 12\n'
    )
    return path


def nan(folder: Path) -> None:
    name = named(folder, "mlp.up_proj.weight")
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_students_and_teachers_are_refused_alike(
    role, kind, folders, copied, tmp_path, monkeypatch, capsys
):
    """check says "not ready" and exits 1; run says the same line and exits 2, with no arm trained."""
    nan(copied)
    other = folders[kind, "teacher"]
    path = experiment(tmp_path, kind, *((copied, other) if role == "student" else (other, copied)))
    code, out = call(monkeypatch, capsys, "check", path)
    assert code == 1 and "not ready" in out and "not finite" in out
    code, out = call(monkeypatch, capsys, "run", path, "--until", "arms", "--out", tmp_path / "run")
    assert code == 2 and "not finite" in out and "Traceback" not in out
    assert not (tmp_path / "run" / "arms" / "full" / "checkpoint").exists()


def test_checkpoint_arms_are_refused_before_they_are_evaluated(
    kind, folders, copied, tmp_path, monkeypatch, capsys
):
    """check --meta knows an adapter; a checkpoint arm that is one, or has a NaN, is refused by check and by run."""
    (copied / integrity.ADAPTER).write_text(json.dumps({"peft_type": "LORA"}))
    student, teacher = folders[kind, "student"], folders[kind, "teacher"]
    path = experiment(tmp_path, kind, copied, teacher)
    code, out = call(monkeypatch, capsys, "check", path, "--meta")
    assert code == 1 and "is an adapter" in out
    path = experiment(
        tmp_path, kind, student, teacher, f'other = {{type = "checkpoint", model = "{copied}"}}\n'
    )
    for flags in ((), ("--meta",)):
        code, out = call(monkeypatch, capsys, "check", path, *flags)
        assert code == 1 and "is an adapter" in out
    (copied / integrity.ADAPTER).unlink()
    nan(copied)
    code, out = call(monkeypatch, capsys, "check", path)
    assert code == 1 and "not finite" in out
    code, out = call(monkeypatch, capsys, "run", path, "--out", tmp_path / "run", "--arm", "other")
    assert code == 2 and "not finite" in out


def test_a_turn_that_ends_elsewhere_is_not_ready(
    kind, folders, copied, tmp_path, monkeypatch, capsys
):
    """A template that closes turns with a token at which no completion ends: check says so, also without weights."""
    word = AutoTokenizer.from_pretrained(copied).convert_tokens_to_ids("red")
    edit_json(copied / "generation_config.json", eos_token_id=word)
    path = experiment(tmp_path, kind, copied, folders[kind, "teacher"])
    for flags in ((), ("--meta",)):
        code, out = call(monkeypatch, capsys, "check", path, *flags)
        line = " ".join(out.split("not ready", 1)[1].split())
        assert code == 1
        assert f"{copied} closes a turn with <eos> 2, but its completions end at red {word}" in line
        assert "eos_token_id" in line and str(folders[kind, "teacher"]) not in line
    edit_json(copied / "generation_config.json", eos_token_id=[word, 2])
    assert call(monkeypatch, capsys, "check", path)[0] == 0


def test_compare_and_geometry_refuse_in_one_line(
    kind, folders, copied, tmp_path, monkeypatch, capsys
):
    """compare, geometry and mask make end in one line and exit code 2 for an fp8 model, and for a name of nothing."""
    base = folders[kind, "student"]
    name = named(copied, "mlp.up_proj.weight")
    edit_weights(copied, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    words = ("--tasks", "shapes_validation", "--out", tmp_path / "compared")
    rule = ("--rule", '{type = "visible"}', "--out", tmp_path / "mask.safetensors")
    for command in (
        ("compare", base, copied, *words),
        ("geometry", base, copied, "--out", tmp_path / "tables"),
        ("geometry", copied, base, "--out", tmp_path / "tables"),
        ("mask", "make", base, copied, *rule),
    ):
        code, out = call(monkeypatch, capsys, *command)
        assert code == 2 and "stored as F8_E4M3" in out and "Traceback" not in out, command
    assert not (tmp_path / "compared").exists()
    code, out = call(monkeypatch, capsys, "compare", base, tmp_path / "nothing", *words)
    assert code == 2 and str(tmp_path / "nothing") in out


# ------------------------------------------------------------------------- two folders that lack the same


def without_the_norm(folder: Path) -> str:
    edit_weights(folder, lambda tensors: tensors.pop(norm_of(tensors)))
    return "incomplete: .*norm.weight"


def norm_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("model.norm.weight"))


def with_a_narrower_norm(folder: Path) -> str:
    edit_weights(folder, lambda tensors: tensors.update({norm_of(tensors): torch.ones(8)}))
    return r"norm.weight is \(8,\) in its file and \(32,\) in config.json"


def described_as(**keys) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        about = json.loads((folder / "config.json").read_text())
        about.get("text_config", about).update(keys)
        (folder / "config.json").write_text(json.dumps(about))
        return "config.json"

    return change


def with_a_list_for_config(folder: Path) -> str:
    (folder / "config.json").write_text("[]")
    return "not a JSON object"


@pytest.mark.parametrize(
    "damage",
    [
        without_the_norm,
        with_a_narrower_norm,
        described_as(num_hidden_layers=3),
        described_as(num_attention_heads=0),
        described_as(intermediate_size=80),
        with_a_list_for_config,
    ],
)
def test_checkpoints_that_lack_the_same_are_refused(damage, copied, monkeypatch, capsys, tmp_path):
    """What both sides lack shows against config.json: geometry and masks refuse it, in one line and before work."""
    refuse_unlike_config(copied)
    message = damage(copied)
    out = str(tmp_path / "out")
    rule = ["--rule", "{type='visible'}", "--out", out]
    for words in (["geometry"], ["mask", "make"]):
        arguments = [*words, str(copied), str(copied)]
        arguments += ["--out", out] if words == ["geometry"] else rule
        code, said = call(monkeypatch, capsys, *arguments)
        assert code == 2 and re.search(message, " ".join(said.split())), said
        assert not (tmp_path / "out").exists()


def test_folders_that_say_nothing_of_their_weights_are_accepted(copied):
    """Without a config.json, of an unknown model, with a value head, or under another prefix."""
    edit_weights(copied, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)}))
    refuse_unlike_config(copied)
    edit_weights(copied, lambda ts: [ts.update({f"policy.{n}": ts.pop(n)}) for n in list(ts)])
    refuse_unlike_config(copied)
    edit_weights(copied, lambda tensors: tensors.pop(next(n for n in tensors if "norm" in n)))
    with pytest.raises(RunError, match="incomplete"):
        refuse_unlike_config(copied)
    edit_json(copied / "config.json", model_type="nonesuch")
    refuse_unlike_config(copied)
    (copied / "config.json").unlink()
    refuse_unlike_config(copied)
