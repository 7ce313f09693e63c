"""Masks of others: every name, shape and index is accounted for, and what is exported comes back."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.command import call
from vlopd.config.experiment import ExperimentConfig
from vlopd.errors import RunError, UserError
from vlopd.files import read_json
from vlopd.masks.exporting import export_mask
from vlopd.masks.files import load_mask, save_mask
from vlopd.masks.foreign import open_foreign
from vlopd.masks.importing import import_mask
from vlopd.models.load import BUILTIN
from vlopd.models.parameter_names import classify
from vlopd.run.folder import RunFolder
from vlopd.run.make import make_mask
from vlopd.run.verify import verify_run
from vlopd.weights.reader import Weights

STUDENT = BUILTIN / "shapes-text-student"
Q = "model.layers.0.self_attn.q_proj.weight"
DOCS = Path(__file__).parents[1] / "docs" / "masks.md"


def shapes_of(folder):
    with Weights(folder) as weights:
        return {name: tuple(weights.shape(name)) for name in sorted(weights.names())}


def drawn(shapes, density=0.03, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def shapes():
    return shapes_of(STUDENT)


@pytest.fixture(scope="module")
def mask(shapes):
    return drawn(shapes)


@pytest.fixture(scope="module")
def linear(mask):
    """The mask within linear layers, which is what SHiRA can hold; layer 0's query has the fewest coordinates."""
    found = {n: m & bool(re.search(r"_proj|lm_head", n)) for n, m in mask.items()}
    found[Q] = torch.zeros_like(found[Q])
    found[Q][3, 5] = found[Q][0, 127] = True
    return found


def saved(path, mask):
    save_mask(path, mask, {"rule": {"type": "test"}, "base": "b" * 64}, classify)
    return path


# ------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("format", ["booleans", "indices"])
def test_what_is_exported_is_imported(tmp_path, mask, format):
    """A mask survives the way through another format bit for bit, and its origin is recorded."""
    file = saved(tmp_path / "mask.safetensors", mask)
    assert export_mask(file, tmp_path / "theirs.safetensors", format) == []
    found, inputs = import_mask(tmp_path / "theirs.safetensors", STUDENT)
    empty = [name for name, marked in mask.items() if format == "indices" and not marked.any()]
    assert same(found.mask, mask) and found.unmentioned == empty
    assert inputs["rule"]["type"] == "imported" and inputs["rule"]["format"] == format
    assert list(inputs["files"]) == ["theirs.safetensors"] and len(inputs["base"]) == 64


PREFIXES = {
    "peft": lambda name: f"base_model.model.{name}",
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "fsdp": lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
    "none": lambda name: name.removeprefix("model."),
    "vlm": lambda name: name.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("format", ["booleans", "indices"])
def test_prefixes_and_wrappers_are_seen_through(tmp_path, mask, prefix, format):
    """Names with the prefixes of other programs, or without ours, mark the same coordinates."""
    theirs = {PREFIXES[prefix](name): marked for name, marked in mask.items()}
    if format == "indices":
        theirs = {name: marked.flatten().nonzero()[:, 0] for name, marked in theirs.items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert same(import_mask(tmp_path / "theirs.safetensors", STUDENT)[0].mask, mask)


def test_parameters_that_are_not_mentioned_are_counted(tmp_path, mask, shapes, monkeypatch, capsys):
    """They are out of the mask, in a printed line and in the record; `show` repeats it."""
    path, out = tmp_path / "theirs.safetensors", tmp_path / "mine.safetensors"
    save_file({Q: mask[Q].to(torch.uint8), "extra": torch.ones(2)}, path)
    words = ("mask", "import", path, "--base", "builtin:shapes-text-student", "--out", out)
    code, text = call(monkeypatch, capsys, *words)
    assert code == 2 and "the base has no parameter extra; nearest is" in text and not out.exists()
    code, text = call(monkeypatch, capsys, *words, "--ignore-unknown")
    coordinates = sum(m.numel() for n, m in mask.items() if n != Q)
    assert code == 0
    assert f"{len(shapes) - 1} of {len(shapes)} parameters ({coordinates:,} coordinates)" in text
    found, about = load_mask(out)
    assert about["inputs"]["unmentioned"] == [name for name in sorted(shapes) if name != Q]
    assert about["inputs"]["ignored"] == ["extra"]
    assert {name for name, marked in found.items() if marked.any()} == {Q}
    _, text = call(monkeypatch, capsys, "mask", "show", out)
    assert f"not in the file: {len(shapes) - 1} parameters" in text and "format=booleans" in text


BAD = {
    "shape": ({Q: torch.ones(4, 4)}, rf"{Q} is \(4, 4\), {Q} of the base \(128, 128\)"),
    "shape under a prefix": ({f"module.{Q}": torch.ones(4, 4)}, r"is \(4, 4\), model"),
    "nan": ({Q: torch.full((128, 128), float("nan"))}, f"{Q} holds nan"),
    "half": ({Q: torch.full((128, 128), 0.5)}, f"{Q} holds 0.5 .*threshold"),
    "counts": ({Q: torch.full((128, 128), 255, dtype=torch.uint8)}, f"{Q} holds 255"),
    "empty": ({Q: torch.zeros(128, 128)}, "the mask is empty"),
    "negative": ({Q: torch.tensor([0, -1])}, f"{Q} holds the negative index -1"),
    "out of range": ({f"{Q}.indices": torch.tensor([128 * 128])}, rf"{Q}\.indices holds index 16384"),
    "twice": ({Q: torch.tensor([5, 7, 5])}, f"{Q} holds index 5 twice"),
    "name twice": ({Q: torch.tensor([5]), f"{Q}.indices": torch.tensor([5])}, "is given twice"),
    "not flat": ({Q: torch.ones(2, 2, dtype=torch.int64)}, r"\(2, 2\) is not flat"),
    "both": ({Q: torch.tensor([5]), "norm.weight": torch.ones(2)}, "norm.weight is F32; a file of indices"),
    "no tensors": ({}, "has no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_mask_is_one_line_with_the_tensor(tmp_path, kind):
    """Shapes, values and indices that cannot be are refused by name."""
    tensors, message = BAD[kind]
    save_file(tensors, tmp_path / "theirs.safetensors")
    with pytest.raises(RunError, match=message) as caught:
        import_mask(tmp_path / "theirs.safetensors", STUDENT)
    assert "\n" not in str(caught.value) and "theirs.safetensors" in str(caught.value)


def test_files_of_another_kind_name_the_remedy(tmp_path, mask):
    """Pickles, folders, texts, our own masks, and foreign masks in place of ours: each says what to do."""
    torch.save({Q: mask[Q]}, tmp_path / "mask.pt")
    (tmp_path / "mask.txt").write_text("no")
    own = saved(tmp_path / "own.safetensors", mask)
    export_mask(own, tmp_path / "theirs.safetensors", "booleans")
    for name, message in {
        "mask.pt": "is a pickle, which is refused.*weights_only=True",
        "mask.txt": "is not a complete safetensors file",
        "own.safetensors": "is a mask file of vlopd already",
        "gone.safetensors": "no mask",
        ".": "is a folder without adapter_config",
    }.items():
        with pytest.raises(RunError, match=message):
            open_foreign(tmp_path / name)
    for name, message in {
        ".": "is a folder; .*`vlopd mask import`",
        "mask.txt": "is not a complete mask .*name a .safetensors file",
        "theirs.safetensors": "is not a mask file of vlopd; .*`vlopd mask import",
    }.items():
        with pytest.raises(RunError, match=message):
            load_mask(tmp_path / name)
    with pytest.raises(RunError, match="a file of indices holds only flat index lists"):
        open_foreign(tmp_path / "theirs.safetensors", "indices")


# ------------------------------------------------------------------------------------ models' layouts


def test_a_tied_head_and_its_embedding_are_one_parameter(tmp_path):
    """Under either name, or both if they agree; masks of the two that differ are refused."""
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = LlamaConfig(**sizes, num_attention_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    marked, path = torch.eye(16, 8) == 1, tmp_path / "theirs.safetensors"
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for names in ((head,), (embedding,), (head, embedding)):
        save_file({name: marked.clone() for name in names}, path)
        found, _ = import_mask(path, tmp_path / "tied")
        assert torch.equal(found.mask[embedding], marked) and head not in found.mask
    save_file({head: marked, embedding: ~marked}, path)
    with pytest.raises(RunError, match=r"one parameter \(tied\), but their masks differ"):
        import_mask(path, tmp_path / "tied")


def test_experts_in_one_tensor_are_those_in_many(tmp_path):
    """A mask of the model in memory fits the checkpoint that stores each expert by itself."""
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, num_local_experts=2)
    )
    model.save_pretrained(tmp_path / "base")
    stacked = drawn({name: tuple(p.shape) for name, p in model.named_parameters()}, 0.3)
    save_file(stacked, tmp_path / "theirs.safetensors")
    found, _ = import_mask(tmp_path / "theirs.safetensors", tmp_path / "base")
    assert found.mask.keys() == shapes_of(tmp_path / "base").keys() != stacked.keys()
    gates = stacked["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(2):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}"
        assert torch.equal(found.mask[f"{name}.w1.weight"], gates[expert, :12])
        assert torch.equal(found.mask[f"{name}.w3.weight"], gates[expert, 12:])


# --------------------------------------------------------------------------------------------- SHiRA


@pytest.fixture(scope="module")
def peft_adapter(tmp_path_factory):
    """An adapter that PEFT trained (here: drew) and saved, and its modules' indices."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    config = ShiraConfig(r=2, target_modules=["q_proj"], random_seed=1, modules_to_save=["lm_head"])
    model = get_peft_model(model, config)
    model.save_pretrained(folder)
    indices = {
        name.removeprefix("base_model.model.") + ".weight": module.shira_indices["default"]
        for name, module in model.named_modules()
        if hasattr(module, "shira_indices")
    }
    return folder, indices


def test_an_adapter_of_peft_is_a_mask(peft_adapter, shapes):
    """Its coordinates are those of its modules' indices; modules that train whole are in it whole."""
    folder, indices = peft_adapter
    found, inputs = import_mask(folder, STUDENT)
    assert inputs["rule"]["format"] == "shira" and len(inputs["files"]) == 2
    for name, (rows, columns) in indices.items():
        expected = torch.zeros(shapes[name], dtype=torch.bool)
        expected[rows.long(), columns.long()] = True
        assert torch.equal(found.mask[name], expected) and int(expected.sum()) == 2 * 256
    assert bool(found.mask["lm_head.weight"].all())
    assert len(found.unmentioned) == len(shapes) - len(indices) - 1


DAMAGE = {
    "row out of range": (lambda x: torch.cat([x[:, :-1], torch.tensor([[128], [0]]).int()], 1), "holds row 128"),
    "twice": (lambda x: torch.cat([x[:, :1], x[:, :-1]], 1), "holds index .* twice"),
    "count": (lambda x: x[:, :-1].contiguous(), "wanted are"),
    "gone": (lambda x: None, "no shira_indices beside it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_names_the_module(tmp_path, peft_adapter, kind):
    """Indices that cannot be, or are not there, are refused by name."""
    folder, _ = peft_adapter
    damage, message = DAMAGE[kind]
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("shira_indices"))
    tensors[name] = damage(tensors[name])
    kept = {name: its for name, its in tensors.items() if its is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(RunError, match=f"{message}") as caught:
        import_mask(tmp_path, STUDENT)
    assert "q_proj" in str(caught.value)


def test_peft_loads_what_is_exported(tmp_path, linear):
    """With the update of a trained checkpoint the adapted model gives its logits; with zeros, the base's."""
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    state = {name: value.clone() for name, value in base.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, marked in linear.items():
        state[name] += marked * 0.1 * torch.randn(marked.shape, generator=generator)
    base.save_pretrained(tmp_path / "trained", state_dict=state)
    file = saved(tmp_path / "mask.safetensors", linear)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = {
            "trained": AutoModelForCausalLM.from_pretrained(tmp_path / "trained")(ids).logits
        }
        expected["base"] = base(ids).logits
        assert (expected["trained"] - expected["base"]).abs().max() > 1e-3
        for name, trained in (("trained", tmp_path / "trained"), ("base", None)):
            folder = tmp_path / f"adapter-{name}"
            assert export_mask(file, folder, "shira", tmp_path / "base", trained) == []
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            logits = PeftModel.from_pretrained(plain, folder)(ids).logits
            torch.testing.assert_close(logits, expected[name], rtol=1e-5, atol=1e-5)
            assert same(import_mask(folder, STUDENT)[0].mask, linear)


def test_shira_holds_linear_layers_of_enough_room(tmp_path, mask, linear):
    """Embeddings and norms are refused or counted; so is a density that r (in + out) of the smallest module exceeds."""
    file = saved(tmp_path / "mask.safetensors", mask)
    with pytest.raises(
        RunError, match=r"SHiRA adapts linear layers alone, not model\.embed_tokens"
    ):
        export_mask(file, tmp_path / "a", "shira", STUDENT)
    (line,) = export_mask(file, tmp_path / "a", "shira", STUDENT, linear_only=True)
    lost = sum(int(m.sum()) for n, m in mask.items() if not re.search(r"_proj|lm_head", n))
    assert line.startswith(f"{lost:,} coordinates are not of linear layers: model.embed_tokens")
    dense = {**linear, "model.layers.0.mlp.up_proj.weight": torch.ones(320, 128, dtype=torch.bool)}
    with pytest.raises(RunError, match=r"needs r = 92, for which lm_head\.weight"):
        export_mask(saved(tmp_path / "dense.safetensors", dense), tmp_path / "b", "shira", STUDENT)
    with pytest.raises(RunError, match="give --base"):
        export_mask(file, tmp_path / "c", "shira")


def test_other_adapters_hold_no_mask(tmp_path):
    """A LoRA folder names the command that makes a mask of its update."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        RunError, match=r"adapter of type LORA, which holds no mask; .*`vlopd mask make"
    ):
        open_foreign(tmp_path)


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_takes_masks_in_any_format(tmp_path, mask, linear):
    """A config may name a foreign file, an adapter, or a file imported for the student's own checkpoint."""
    file = saved(tmp_path / "mask.safetensors", linear)
    export_mask(file, tmp_path / "indices.safetensors", "indices")
    export_mask(file, tmp_path / "adapter", "shira", STUDENT)
    found, inputs = import_mask(tmp_path / "indices.safetensors", STUDENT)
    save_mask(tmp_path / "imported.safetensors", found.mask, inputs, classify)
    names = ("indices.safetensors", "adapter", "imported.safetensors")
    config = ExperimentConfig.model_validate(
        {
            "name": "foreign",
            "student": "builtin:shapes-text-student",
            "teacher": "builtin:shapes-text-teacher",
            "precision": {"compute": "fp32"},
            "data": {"type": "shapes", "modality": "text"},
            "optim": {"learning_rate": 1e-3},
            "train": {"steps": 1, "prompts_per_step": 1},
            "masks": {Path(n).stem: {"type": "file", "path": str(tmp_path / n)} for n in names},
            "arms": {"base": {"type": "base"}},
            "geometry": {"arms": ()},
        }
    )
    run = RunFolder.create(tmp_path / "run", config)
    for name in config.masks:
        make_mask(run, config, name)
        made, about = load_mask(run.mask(name))
        assert same(made, linear) and "other_base" not in about["inputs"]
    recorded = read_json(run.mask_record("adapter"))["inputs"]["imported"]
    assert recorded["format"] == "shira" and Q not in recorded["unmentioned"]
    assert verify_run(run).inputs == []
    export_mask(
        saved(tmp_path / "mask.safetensors", mask), tmp_path / "indices.safetensors", "indices"
    )
    assert any("indices.safetensors" in line for line in verify_run(run).inputs)
    (tmp_path / "indices.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a complete"):
        make_mask(run, config, "indices")


def test_the_documented_reader_reads_a_mask(tmp_path, mask):
    """The numpy code of docs/masks.md, as printed, and the digest by its formula."""
    import hashlib

    file = saved(tmp_path / "mask.safetensors", mask)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    read = namespace["read_mask"](file)
    assert same({name: torch.from_numpy(marked) for name, marked in read.items()}, mask)
    about = json.loads(file.with_suffix(".json").read_text())
    digest = about.pop("digest")
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, packed in sorted(load_file(file).items()):
        total.update(f"\n{name} {packed.numel()} ".encode() + packed.numpy().tobytes())
    assert total.hexdigest() == digest
