"""Malformed checkpoints, tokenizers, chat templates and adapters."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.faults.harness import All, Case, Cut, Edit, Put, Remove, edits, sets

TRAIN = ("run", "c.toml", "--out", "out", "--until", "arms", "--arm", "full")
BASE = ("run", "c.toml", "--out", "out", "--until", "arms", "--arm", "base")
MEASURE = ("geometry", "teacher", "student", "--out", "g", "--set", "null_draws=0")
ADAPTED = ("geometry", "student", "adapter", "--out", "g", "--set", "null_draws=0")
CONFIG, TOKENIZER, SETTINGS = (
    "student/config.json",
    "student/tokenizer.json",
    "student/tokenizer_config.json",
)
WEIGHTS, INDEX = "student/model.safetensors", "student/model.safetensors.index.json"
TEMPLATE, ENDS = "student/chat_template.jinja", "student/generation_config.json"
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Tensors:
    """Rewrites a safetensors file by a function of its tensors."""

    path: str
    change: Callable[[dict[str, torch.Tensor]], None]

    def __call__(self, folder: Path) -> None:
        tensors = load_file(folder / self.path)
        self.change(tensors)
        save_file(tensors, folder / self.path, {"format": "pt"})


@dataclass(frozen=True)
class Header:
    """Replaces a safetensors file's header, or its stated length, and keeps the data."""

    path: str
    header: bytes | None = None
    length: int | None = None

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size] if self.header is None else self.header
        length = len(header) if self.length is None else self.length
        path.write_bytes(struct.pack("<Q", length) + header + content[8 + size :])


@dataclass(frozen=True)
class Pipe:
    """Puts a pipe in a file's place, whose reading does not end."""

    path: str

    def __call__(self, folder: Path) -> None:
        (folder / self.path).unlink(missing_ok=True)
        os.mkfifo(folder / self.path)


@dataclass(frozen=True)
class Circle:
    """Puts a link to itself in a file's place."""

    path: str

    def __call__(self, folder: Path) -> None:
        path = folder / self.path
        path.unlink(missing_ok=True)
        path.symlink_to(path.name)


def header(entries: Mapping[str, Any], path: str = WEIGHTS) -> Header:
    return Header(path, json.dumps(entries).encode())


def shards(names: Mapping[str, str] | Any) -> All:
    """The student's weights behind an index that names these shards."""

    def split(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "student/part.safetensors")

    if isinstance(names, dict) and names:
        names = {"metadata": {}, **names}
    return edits(split, Put(INDEX, json.dumps(names)))


def one(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"lm_head.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"]


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].clone()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = float("inf")


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2, 2)


def _complex(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.complex64)


def _empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["x.weight"] = tensors.pop("model.norm.weight")


CONFIGS: dict[str, Edit] = {
    "list": Put(CONFIG, "[]"),
    "null": Put(CONFIG, "null"),
    "text": Put(CONFIG, '"llama"'),
    "empty": Put(CONFIG, ""),
    "empty-object": Put(CONFIG, "{}"),
    "truncated": Cut(CONFIG, 0.5),
    "binary": Put(CONFIG, b"\xff\xfe\x00"),
    "deep": Put(CONFIG, DEEP),
    "missing": Remove(CONFIG),
    "unknown-type": sets(CONFIG, {"model_type": "llamo"}),
    "number-type": sets(CONFIG, {"model_type": 7}),
    "no-type": sets(CONFIG, {"model_type": None}),
    "heads-0": sets(CONFIG, {"num_attention_heads": 0}),
    "heads-negative": sets(CONFIG, {"num_attention_heads": -2}),
    "heads-text": sets(CONFIG, {"num_attention_heads": "two"}),
    "heads-float": sets(CONFIG, {"num_attention_heads": 2.5}),
    "heads-odd": sets(CONFIG, {"num_attention_heads": 3}),
    "heads-list": sets(CONFIG, {"num_attention_heads": [2]}),
    "kv-heads-0": sets(CONFIG, {"num_key_value_heads": 0}),
    "kv-heads-more": sets(CONFIG, {"num_key_value_heads": 5}),
    "kv-heads-text": sets(CONFIG, {"num_key_value_heads": "one"}),
    "layers-0": sets(CONFIG, {"num_hidden_layers": 0}),
    "layers-negative": sets(CONFIG, {"num_hidden_layers": -1}),
    "layers-text": sets(CONFIG, {"num_hidden_layers": "two"}),
    "layers-more": sets(CONFIG, {"num_hidden_layers": 3}),
    "layers-fewer": sets(CONFIG, {"num_hidden_layers": 1}),
    "layers-huge": sets(CONFIG, {"num_hidden_layers": 10**9}),
    "hidden-0": sets(CONFIG, {"hidden_size": 0}),
    "hidden-negative": sets(CONFIG, {"hidden_size": -32}),
    "hidden-text": sets(CONFIG, {"hidden_size": "32"}),
    "hidden-float": sets(CONFIG, {"hidden_size": 32.5}),
    "hidden-null": Put(CONFIG, '{"model_type": "llama", "hidden_size": null}'),
    "hidden-other": sets(CONFIG, {"hidden_size": 48}),
    "hidden-huge": sets(CONFIG, {"hidden_size": 2**40}),
    "hidden-exabytes": sets(CONFIG, {"hidden_size": 2**62}),
    "inner-0": sets(CONFIG, {"intermediate_size": 0}),
    "inner-negative": sets(CONFIG, {"intermediate_size": -64}),
    "inner-text": sets(CONFIG, {"intermediate_size": "64"}),
    "inner-other": sets(CONFIG, {"intermediate_size": 65}),
    "head-dim-0": sets(CONFIG, {"head_dim": 0}),
    "head-dim-text": sets(CONFIG, {"head_dim": "16"}),
    "vocabulary-0": sets(CONFIG, {"vocab_size": 0}),
    "vocabulary-negative": sets(CONFIG, {"vocab_size": -1}),
    "vocabulary-text": sets(CONFIG, {"vocab_size": "58"}),
    "vocabulary-other": sets(CONFIG, {"vocab_size": 61}),
    "vocabulary-huge": sets(CONFIG, {"vocab_size": 2**50}),
    "positions-0": sets(CONFIG, {"max_position_embeddings": 0}),
    "positions-text": sets(CONFIG, {"max_position_embeddings": "many"}),
    "positions-few": sets(CONFIG, {"max_position_embeddings": 5}),
    "activation": sets(CONFIG, {"hidden_act": "swoosh"}),
    "activation-number": sets(CONFIG, {"hidden_act": 3}),
    "norm-eps-text": sets(CONFIG, {"rms_norm_eps": "small"}),
    "rope-list": sets(CONFIG, {"rope_parameters": [1]}),
    "rope-type": sets(CONFIG, {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}),
    "dtype": sets(CONFIG, {"dtype": "float33"}),
    "dtype-list": sets(CONFIG, {"dtype": [1]}),
    "kernel": sets(CONFIG, {"_attn_implementation": "somebody/kernel"}),
    "kernel-of-a-part": sets(CONFIG, {"text_config": {"attn_implementation": "somebody/kernel"}}),
    "labels-huge": sets(CONFIG, {"num_labels": 10**9}),
    "pipe": Pipe(CONFIG),
    "pipe-beside": Pipe(SETTINGS),
    "circular-link": Circle(SETTINGS),
    "tied-text": sets(CONFIG, {"tie_word_embeddings": "yes"}),
    "quantised": sets(CONFIG, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    "quantised-list": sets(CONFIG, {"quantization_config": [4]}),
}

FILES: dict[str, tuple[Edit, str]] = {
    "missing": (Remove(WEIGHTS), "student"),
    "empty": (Put(WEIGHTS, b""), "model.safetensors"),
    "truncated-header": (Cut(WEIGHTS, 0.005), "model.safetensors"),
    "truncated-data": (Cut(WEIGHTS, 0.7), "model.safetensors"),
    "text": (Put(WEIGHTS, "weights"), "model.safetensors"),
    "zeros": (Put(WEIGHTS, b"\x00" * 64), "model.safetensors"),
    "pickle": (edits(Remove(WEIGHTS), Put("student/pytorch_model.bin", b"\x80\x04.")), "pickled"),
    "length-exabytes": (Header(WEIGHTS, length=2**60), "model.safetensors"),
    "length-max": (Header(WEIGHTS, length=2**64 - 1), "model.safetensors"),
    "length-0": (Header(WEIGHTS, length=0), "model.safetensors"),
    "header-list": (Header(WEIGHTS, b"[]"), "model.safetensors"),
    "header-deep": (Header(WEIGHTS, DEEP.encode()), "model.safetensors"),
    "header-binary": (Header(WEIGHTS, b"\xff" * 40), "model.safetensors"),
    "header-empty": (Header(WEIGHTS, b"{}"), "model.safetensors"),
    "shape-huge": (header(one(shape=[2**62, 2**62])), "model.safetensors"),
    "shape-negative": (header(one(shape=[-1])), "model.safetensors"),
    "shape-text": (header(one(shape="1")), "model.safetensors"),
    "shape-missing": (
        header({"lm_head.weight": {"dtype": "F32", "data_offsets": [0, 4]}}),
        "model.safetensors",
    ),
    "offsets-beyond": (header(one(offsets=[0, 2**60], shape=[2**58])), "model.safetensors"),
    "offsets-backwards": (header(one(offsets=[4, 0])), "model.safetensors"),
    "dtype-unknown": (header(one(dtype="F33")), "model.safetensors"),
    "twice": (
        Header(
            WEIGHTS,
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        ),
        "model.safetensors",
    ),
    "no-tensors": (Tensors(WEIGHTS, _empty), "student"),
    "a-tensor-less": (Tensors(WEIGHTS, _drop), "up_proj"),
    "a-tensor-more": (Tensors(WEIGHTS, _extra), "layers.9"),
    "a-tensor-renamed": (Tensors(WEIGHTS, _renamed), "norm"),
    "a-tensor-narrower": (Tensors(WEIGHTS, _narrow), "model.norm.weight"),
    "nan": (Tensors(WEIGHTS, _nan), "model.norm.weight"),
    "infinity": (Tensors(WEIGHTS, _infinite), "model.norm.weight"),
    "integers": (Tensors(WEIGHTS, _integers), "model.norm.weight"),
    "complex": (Tensors(WEIGHTS, _complex), "model.norm.weight"),
    "index-list": (shards([]), "index.json"),
    "index-empty": (shards({}), "index.json"),
    "index-map-list": (shards({"weight_map": ["part.safetensors"]}), "index.json"),
    "index-map-empty": (shards({"weight_map": {}}), "student"),
    "index-number": (shards({"weight_map": {"lm_head.weight": 5}}), "index.json"),
    "index-list-shard": (
        shards({"weight_map": {"lm_head.weight": ["part.safetensors"]}}),
        "index.json",
    ),
    "index-missing-shard": (
        shards({"weight_map": {"lm_head.weight": "gone.safetensors"}}),
        "gone.safetensors",
    ),
    "index-few": (shards({"weight_map": {"lm_head.weight": "part.safetensors"}}), "student"),
    "index-deep": (edits(Remove(WEIGHTS), Put(INDEX, DEEP)), "index.json"),
    "index-truncated": (edits(Remove(WEIGHTS), Put(INDEX, '{"weight_map": {')), "index.json"),
}
OUTSIDE = {
    "index-outside": "../outside.safetensors",
    "index-absolute": "/etc/outside.safetensors",
    "index-hidden-up": "a/../../outside.safetensors",
    "index-pickle": "part.bin",
}
for _label, _shard in OUTSIDE.items():
    FILES[_label] = (shards({"weight_map": {"lm_head.weight": _shard}}), "index.json")

TOKENIZERS: dict[str, tuple[Edit, str]] = {
    "missing": (Remove(TOKENIZER), "tokenizer"),
    "empty": (Put(TOKENIZER, ""), "tokenizer"),
    "list": (Put(TOKENIZER, "[]"), "tokenizer"),
    "null": (Put(TOKENIZER, "null"), "tokenizer"),
    "object": (Put(TOKENIZER, "{}"), "tokenizer"),
    "truncated": (Cut(TOKENIZER, 0.5), "tokenizer"),
    "deep": (Put(TOKENIZER, DEEP), "tokenizer"),
    "binary": (Put(TOKENIZER, b"\xff\xfe"), "tokenizer"),
    "model-text": (sets(TOKENIZER, {"model": "words"}), "tokenizer"),
    "model-type": (sets(TOKENIZER, {"model.type": "Magic"}), "tokenizer"),
    "vocabulary-list": (sets(TOKENIZER, {"model.vocab": ["a"]}), "tokenizer"),
    "vocabulary-negative": (sets(TOKENIZER, {"model.vocab": {"a": -1}}), "tokenizer"),
    "vocabulary-huge": (sets(TOKENIZER, {"model.vocab": {"red": 2**31}}), "student"),
    "added-list": (sets(TOKENIZER, {"added_tokens": [1]}), "tokenizer"),
    "settings-list": (Put(SETTINGS, "[]"), "tokenizer"),
    "settings-null": (Put(SETTINGS, "null"), "tokenizer"),
    "settings-text": (Put(SETTINGS, '"fast"'), "tokenizer"),
    "settings-truncated": (Cut(SETTINGS, 0.5), "tokenizer"),
    "settings-deep": (Put(SETTINGS, DEEP), "tokenizer"),
    "settings-class-number": (sets(SETTINGS, {"tokenizer_class": 5}), "tokenizer"),
    "settings-eos-number": (sets(SETTINGS, {"eos_token": 5}), "tokenizer"),
    "settings-eos-list": (sets(SETTINGS, {"eos_token": ["a"]}), "tokenizer"),
    "settings-pad-new": (sets(SETTINGS, {"pad_token": "<|nowhere|>"}), "nowhere"),
    "settings-length-text": (sets(SETTINGS, {"model_max_length": "long"}), "student"),
    "settings-added-text": (sets(SETTINGS, {"added_tokens_decoder": "x"}), "tokenizer"),
    "settings-added-key": (
        sets(SETTINGS, {"added_tokens_decoder": {"x": {"content": "a"}}}),
        "tokenizer",
    ),
}

TEMPLATES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "student"),
    "constant": ("hello", "student"),
    "binary": (b"\xff\xfe", "student"),
    "unclosed-tag": ("{% for m in messages %}{{ m.content }}", "template"),
    "unclosed-expression": ("{{ messages[0].content", "template"),
    "unknown-tag": ("{% frobnicate %}{{ messages[0].content }}", "template"),
    "unknown-filter": ("{{ messages[0].content | frobnicate }}", "template"),
    "unknown-function": ("{{ frobnicate(messages) }}", "template"),
    "raises": ("{{ raise_exception('not for you') }}", "not for you"),
    "divides-by-zero": ("{{ messages[0].content }}{{ 1 / 0 }}", "template"),
    "undefined-attribute": ("{{ messages[0].body.text.more }}", "template"),
    "loops-for-ever": (
        "{% for i in range(10000000000) %}x{% endfor %}{{ messages[0].content }}",
        "template",
    ),
    "huge-text": ("{{ messages[0].content }}{{ 'x' * 10000000000 }}", "template"),
    "huge-power": ("{{ messages[0].content }}{{ 9 ** 9 ** 9 }}", "template"),
    "recursion": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages[0].content) }}",
        "template",
    ),
    "deep": ("{{ " + "(" * 5000 + "messages[0].content" + ")" * 5000 + " }}", "template"),
    "deep-ifs": (
        "{% if true %}" * 500 + "{{ messages[0].content }}" + "{% endif %}" * 500,
        "template",
    ),
    "private": ("{{ messages.__class__.__mro__ }}{{ messages[0].content }}", "template"),
    "system-missing": ("{{ messages[7].content }}", "template"),
    "includes": ("{% include 'other.jinja' %}{{ messages[0].content }}", "template"),
    "no-user": (
        "{% for m in messages %}{% if m.role == 'robot' %}{{ m.content }}{% endif %}{% endfor %}",
        "template",
    ),
}

GENERATION: dict[str, tuple[Edit, str]] = {
    "list": (Put(ENDS, "[]"), "generation_config"),
    "null": (Put(ENDS, "null"), "generation_config"),
    "truncated": (Cut(ENDS, 0.5), "generation_config"),
    "deep": (Put(ENDS, DEEP), "generation_config"),
    "eos-text": (sets(ENDS, {"eos_token_id": "two"}), "eos_token_id"),
    "eos-negative": (sets(ENDS, {"eos_token_id": -2}), "eos_token_id"),
    "eos-beyond": (sets(ENDS, {"eos_token_id": 10**6}), "eos_token_id"),
    "eos-empty": (sets(ENDS, {"eos_token_id": []}), "eos_token_id"),
    "eos-float": (sets(ENDS, {"eos_token_id": 2.5}), "eos_token_id"),
    "eos-true": (sets(ENDS, {"eos_token_id": True}), "eos_token_id"),
    "eos-nested": (sets(ENDS, {"eos_token_id": [[2]]}), "eos_token_id"),
    "eos-padding": (sets(ENDS, {"eos_token_id": [0]}), "student"),
}

LORA = "adapter/adapter_config.json"
FACTORS = "adapter/adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Edit, str]] = {
    "list": (Put(LORA, "[]"), "adapter_config"),
    "null": (Put(LORA, "null"), "adapter_config"),
    "empty": (Put(LORA, ""), "adapter_config"),
    "empty-object": (Put(LORA, "{}"), "adapter_config"),
    "truncated": (Cut(LORA, 0.5), "adapter_config"),
    "deep": (Put(LORA, DEEP), "adapter_config"),
    "type-other": (sets(LORA, {"peft_type": "IA3"}), "IA3"),
    "type-number": (sets(LORA, {"peft_type": 1}), "peft_type"),
    "rank-0": (sets(LORA, {"r": 0}), "r"),
    "rank-negative": (sets(LORA, {"r": -2}), "r"),
    "rank-text": (sets(LORA, {"r": "two"}), "r"),
    "rank-true": (sets(LORA, {"r": True}), "r"),
    "rank-list": (sets(LORA, {"r": [2]}), "r"),
    "rank-other": (sets(LORA, {"r": 3}), "rank"),
    "rank-half": (sets(LORA, {"r": 2.5}), "r"),
    "rank-missing": (sets(LORA, {"r": None}), "r"),
    "alpha-text": (sets(LORA, {"lora_alpha": "16"}), "lora_alpha"),
    "alpha-missing": (sets(LORA, {"lora_alpha": None}), "lora_alpha"),
    "alpha-nan": (Put(LORA, '{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}'), "lora_alpha"),
    "alpha-huge": (sets(LORA, {"lora_alpha": 10**400}), "lora_alpha"),
    "pattern-list": (sets(LORA, {"rank_pattern": ["q_proj"]}), "rank_pattern"),
    "pattern-text": (sets(LORA, {"rank_pattern": "q_proj"}), "rank_pattern"),
    "pattern-number": (sets(LORA, {"alpha_pattern": 3}), "alpha_pattern"),
    "pattern-expression": (sets(LORA, {"rank_pattern": {"(": 2}}), "rank_pattern"),
    "pattern-value": (sets(LORA, {"rank_pattern": {"q_proj": "two"}}), "rank"),
    "pattern-zero": (sets(LORA, {"rank_pattern": {"q_proj": 0}}), "rank"),
    "alpha-pattern-value": (sets(LORA, {"alpha_pattern": {"q_proj": []}}), "alpha_pattern"),
    "pattern-slow": (sets(LORA, {"rank_pattern": {"(.*.*.*.*.*.*.*.*.*.*)*x": 2}}), "rank_pattern"),
    "dora": (sets(LORA, {"use_dora": True}), "use_dora"),
    "unknown-setting": (sets(LORA, {"use_magic": True}), "use_magic"),
    "initialisation": (sets(LORA, {"init_lora_weights": "pissa"}), "init_lora_weights"),
    "initialisation-list": (sets(LORA, {"init_lora_weights": [1]}), "init_lora_weights"),
    "weights-missing": (Remove(FACTORS), "adapter"),
    "weights-empty": (Put(FACTORS, b""), "adapter_model"),
    "weights-truncated": (Cut(FACTORS, 0.6), "adapter_model"),
    "weights-header": (Header(FACTORS, length=2**63), "adapter_model"),
    "weights-none": (Tensors(FACTORS, _empty), "adapter"),
}


def _half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_A" in name)]


def _flat(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name].flatten().clone()


def _scalar(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.tensor(1.0)


def _wide(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.ones(2, 77)


def _rank_zero(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name] = (
            tensors[name][:0].clone() if "lora_A" in name else tensors[name][:, :0].clone()
        )


def _nan_factor(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name] * float("nan")


def _elsewhere(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("q_proj", "z_proj")] = tensors.pop(name)


for _label, _change, _says in (
    ("half", _half, "LoRA"),
    ("flat", _flat, "q_proj"),
    ("scalar", _scalar, "q_proj"),
    ("wide", _wide, "q_proj"),
    ("rank-zero-tensors", _rank_zero, "q_proj"),
    ("nan", _nan_factor, "not finite"),
    ("elsewhere", _elsewhere, "z_proj"),
):
    ADAPTERS[f"weights-{_label}"] = (Tensors(FACTORS, _change), _says)


PROCESSORS: dict[str, dict[str, Any]] = {
    "std-zero": {"image_processor.image_std": [0, 0, 0]},
    "std-text": {"image_processor.image_std": ["wide"]},
    "mean-nan": {"image_processor.image_mean": [float("nan")] * 3},
    "mean-huge": {"image_processor.image_mean": [10**400] * 3},
    "rescale-zero": {"image_processor.rescale_factor": 0},
    "rescale-infinite": {"image_processor.rescale_factor": float("inf")},
    "size-huge": {"image_processor.size": {"height": 10**12, "width": 48}},
    "size-zero": {"image_processor.size": {"height": 0, "width": 48}},
    "size-text": {"image_processor.size": {"height": "tall", "width": 48}},
    "patch-zero": {"patch_size": 0},
    "patch-text": {"patch_size": "small"},
    "patch-other": {"patch_size": 8},
    "tokens-huge": {"num_additional_image_tokens": 10**9},
    "tokens-negative": {"num_additional_image_tokens": -1},
    "tokens-other": {"num_additional_image_tokens": 3},
    "strategy": {"vision_feature_select_strategy": "default"},
}
"""Of a student that sees images: numbers that no processor has, or that do not fit its model."""
PICTURES = ("run", "vlm.toml", "--out", "out", "--until", "arms", "--arm", "base")


def cases() -> list[Case]:
    found = [
        Case(TRAIN, "student", edit, late=n == "layers-fewer", name=f"config.json {n}")
        for n, edit in CONFIGS.items()
    ]
    for label, (edit, says) in FILES.items():
        late = label in ("nan", "infinity", "a-tensor-more")
        found.append(Case(TRAIN, says, edit, late=late, name=f"weights {label}"))
    for label in (
        "truncated-data",
        "length-exabytes",
        "index-outside",
        "shape-huge",
        "a-tensor-less",
        "nan",
        "integers",
        "no-tensors",
    ):
        edit, says = FILES[label]
        words = ("geometry", "other", "student", "--out", "g", "--set", "null_draws=0")
        found.append(
            Case(
                words,
                says,
                edits(_copy, edit),
                mend=_copy,
                late=label == "nan",
                name=f"measured weights {label}",
            )
        )
    for label, (edit, says) in TOKENIZERS.items():
        found.append(Case(TRAIN, says, edit, name=f"tokenizer {label}"))
    for label, (text, says) in TEMPLATES.items():
        found.append(Case(TRAIN, says, Put(TEMPLATE, text), name=f"chat template {label}"))
    for label, (edit, says) in GENERATION.items():
        found.append(Case(TRAIN, says, edit, name=f"generation config {label}"))
    for label, (edit, says) in ADAPTERS.items():
        found.append(
            Case(
                ADAPTED,
                says,
                edit,
                parts=("student", "adapter"),
                late=label == "weights-nan",
                name=f"adapter {label}",
            )
        )
    for label, entries in PROCESSORS.items():
        found.append(
            Case(
                PICTURES,
                "vlm-student",
                sets("vlm-student/processor_config.json", entries),
                parts=("vlm.toml", "vlm-student", "vlm-teacher", "pictures"),
                late=label in ("patch-other", "tokens-other", "strategy"),
                name=f"processor {label}",
            )
        )
    return found


def _copy(folder: Path) -> None:
    shutil.copytree(folder / "student", folder / "other")
