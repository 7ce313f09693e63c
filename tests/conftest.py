"""Tiny, real, seeded models: a language pair and a vision-language pair, teacher and student of different
sizes and, where they have eyes, different towers and resolutions."""

from __future__ import annotations

import gc
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_MULTIPROC", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path

import lm_eval.api.task  # noqa: F401 - with the libraries that it needs
import pytest
import torch
from filelock import FileLock
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    ProcessorMixin,
    SiglipVisionConfig,
)
from transformers.image_processing_base import ImageProcessingMixin

from vlopd.config.arms import DistillArm
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.objective import RolloutConfig
from vlopd.config.recipe import ArmRecipe
from vlopd.models.load import BUILTIN
from vlopd.preflight import memory
from vlopd.seeding import uniforms
from vlopd.train.pair import ModelPair, load_pair
from vlopd.types import Completions, Prompts

KINDS = ("llm", "vlm")

memory.measure_device = cache(
    memory.measure_device
)  # half a second of probes, twice in every `check`
# a quarter of the time of loading a tiny model: transformers prints each for its log, which is off
for printed in (PreTrainedConfig, GenerationConfig, ProcessorMixin, ImageProcessingMixin):
    printed.__repr__ = object.__repr__


def pytest_collection_finish() -> None:
    """Takes the libraries' million objects out of all collections of garbage, of which a command makes one."""
    gc.collect()
    gc.freeze()


def tiny_language(vocabulary: int, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build(kind: str, role: str, folder: Path, dtype: torch.dtype, width: int | None = None) -> Path:
    """Saves a tiny random model with the processor of the built-in of its role."""
    torch.manual_seed(KINDS.index(kind) * 2 + (role == "teacher"))
    width = width or (48 if role == "teacher" else 32)
    processor = AutoProcessor.from_pretrained(BUILTIN / f"shapes-{role}")
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / f"shapes-{role}")
    language = tiny_language(len(tokenizer), width)
    if kind == "llm":
        model, processor = LlamaForCausalLM(language), tokenizer
    else:
        sizes = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        vision = (
            CLIPVisionConfig(**sizes, image_size=96, patch_size=32)
            if role == "teacher"
            else SiglipVisionConfig(**sizes, image_size=48, patch_size=16, vision_use_head=False)
        )
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=language,
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
        )
    with torch.no_grad():  # livelier than the default initialisation, so that inputs matter
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(8)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def copy_of(
    name: str, make: Callable[[Path], object], out: Path, factory: pytest.TempPathFactory
) -> None:
    """Copies to `out` what `make` writes into a folder, once for all of pytest-xdist's workers."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{shared}.lock"):
        if not (whole := shared.with_suffix(".whole")).exists():
            shutil.rmtree(
                shared, ignore_errors=True
            )  # a failed attempt, of which the other tests are told too
            shared.mkdir()
            make(shared)
            whole.touch()
    shutil.copytree(shared, out, dirs_exist_ok=True)


def sampled(pair: ModelPair, prompts: Prompts, tokens: int, seed: int = 0) -> Completions:
    """The student's own completions of the prompts, at temperature 1."""
    rollout = RolloutConfig(max_new_tokens=tokens)
    return pair.sample(prompts, rollout, uniforms(len(prompts), tokens, seed))


def pair_of(config: ExperimentConfig) -> ModelPair:
    """The experiment's models, loaded on the CPU."""
    return load_pair(
        config.student,
        config.teacher,
        compute=config.precision.compute,
        device="cpu",
        images=config.data.has_images,
    )


def recipe_of(config: ExperimentConfig, arm: str = "full") -> ArmRecipe:
    """The recipe of an arm that is trained."""
    about = config.arms[arm]
    assert isinstance(about, DistillArm)
    return config.recipe_of(about)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """{(kind, role): folder}, stored in bf16 as real checkpoints are."""
    root = tmp_path_factory.mktemp("models")
    return {
        (kind, role): build(kind, role, root / f"{kind}-{role}", torch.bfloat16)
        for kind in KINDS
        for role in ("student", "teacher")
    }


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def make_pair(make_config):
    """(kind, compute precision, **sections of the config) -> a freshly loaded pair."""

    def make(kind: str, compute: str = "fp32", **sections) -> ModelPair:
        return pair_of(make_config(kind, precision={"compute": compute}, **sections))

    return make


@pytest.fixture
def make_config(folders):
    """(kind, **top-level sections, None for none) -> a miniature experiment on the tiny models."""

    def make(kind: str, **sections) -> ExperimentConfig:
        base = {
            "name": f"mini-{kind}",
            "student": str(folders[kind, "student"]),
            "teacher": str(folders[kind, "teacher"]),
            "precision": {"compute": "fp32"},
            "data": {"type": "shapes", "modality": "image" if kind == "vlm" else "text"},
            "rollout": {"max_new_tokens": 6},
            "optim": {"learning_rate": 1e-3},
            "train": {"steps": 4, "prompts_per_step": 4, "save_every": 2, "sample_every": 2},
            "arms": {"full": {"type": "distill", "seed": 1}},
            "geometry": {"arms": ()},
        }
        return ExperimentConfig.model_validate({**base, **sections})

    return make


@pytest.fixture
def make_data():
    """(kind, n) -> n examples of the visual world."""
    from vlopd.data.shapes import ShapesDataset

    def make(kind: str, n: int = 6):
        world = ShapesDataset("train", n, seed=3, modality="image" if kind == "vlm" else "text")
        return list(world)

    return make
