"""Trains a small CLIP on shapes images and scene descriptions, to score captions without network access.

    python scripts/train_scorer.py          # about eight minutes -> runs/scorer

`evals.vision.alignment.load_scorer("local-dir:runs/scorer")` loads it.

Scenes are of the train split, which no model is evaluated on. Every image comes with a hard negative: one object has
another colour, shape or cell, or two have swapped cells, so that the scorer must bind objects to cells. Training starts
with scenes of one object, until cells are learned. (In a trial with 70 such steps of 700 they were not: R@1 was 0.81,
and a description with one object in a wrong cell scored below the right one in 0.53 of cases.)

Prints, on scenes of the test split, the retrieval R@1 of both directions with chance, and how often the right
description scores higher than the hard negative's (chance: 0.5).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import typer
from open_clip.loss import ClipLoss
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.stats import mean_with_error
from evals.vision.alignment import PREFIX, Scorer, clip_score, load_scorer, retrieval
from vlopd.data import shapes
from vlopd.files import whole_folder, write_json, write_text

ALONE = 0.25
"""Fraction of the steps with scenes of one object."""
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
WORDS = [*SPECIAL, *PREFIX.split(), *shapes.vocabulary()]
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": shapes.IMAGE_PIXELS,
            "patch_size": shapes.CELL_PIXELS,
            "width": 128,
            "head_width": 32,
            "layers": 3,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": len(WORDS),
            "hf_tokenizer_name": "words",  # from a local-dir, the folder's own tokenizer
            "width": 128,
            "heads": 4,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": WORDS.index("<eos>"),
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words split at white space, between <bos> and <eos>."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(w, WORDS.index(w)) for w in ("<bos>", "<eos>")]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def draw(rng: random.Random, split: shapes.Split, alone: bool = False) -> shapes.Scene:
    """Draws a scene of the split or, with `alone`, of one object (108 scenes, of no split)."""
    if not alone:
        return shapes.draw_scene(rng, split)
    return {rng.randrange(9): (rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES))}


def hard_negative(scene: shapes.Scene, rng: random.Random) -> shapes.Scene:
    """Draws a hard negative: one object has another cell, colour or shape, or two have swapped cells."""
    values: list[Sequence[Any]] = [range(9), list(shapes.COLOURS), shapes.SHAPES]
    while True:
        objects = [[cell, *scene[cell]] for cell in scene]
        feature, one, two = rng.randrange(3), rng.choice(objects), rng.choice(objects)
        if rng.random() < 0.5:
            one[feature], two[feature] = two[feature], one[feature]
        else:
            one[feature] = rng.choice(values[feature])
        other = {cell: (colour, shape) for cell, colour, shape in sorted(objects)}
        if other != scene and len(other) == len(scene):
            return other


def batch(rng: random.Random, size: int, alone: bool) -> list[shapes.Scene]:
    """Draws `size` training scenes, every second one a hard negative of the one before."""
    found: list[shapes.Scene] = []
    while len(found) < size:
        scene = draw(rng, "train", alone)
        other = hard_negative(scene, rng)
        if alone or shapes.split_of(other) == "train":
            found += [scene, other]
    return found


def train(steps: int, scenes_per_step: int, learning_rate: float, seed: int) -> open_clip.CLIP:
    """Contrastive training (open_clip's loss) with AdamW, constant rate for half of the steps, then cosine."""
    torch.manual_seed(seed)
    rng = random.Random(f"scorer {seed}")
    clip, tokenizer, loss_of = open_clip.CLIP(**CONFIG["model_cfg"]), build_tokenizer(), ClipLoss()
    transform = image_transform_v2(
        PreprocessCfg(size=shapes.IMAGE_PIXELS, **CONFIG["preprocess_cfg"]), is_train=False
    )
    print(f"{sum(p.numel() for p in clip.parameters()):,} parameters, {steps} steps", flush=True)
    optimizer = torch.optim.AdamW(
        clip.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        late = max(0.0, 2 * step / steps - 1)
        rate = min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * late)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        scenes = batch(rng, scenes_per_step, alone=step < steps * ALONE)
        drawn = [transform(shapes.render(scene, rng.randrange(2**31))) for scene in scenes]
        tokens = tokenizer(
            [PREFIX + shapes.scene_caption(scene) for scene in scenes],
            padding="max_length",
            max_length=CONFIG["model_cfg"]["text_cfg"]["context_length"],
            return_tensors="pt",
        ).input_ids
        images = clip.encode_image(torch.stack(drawn), normalize=True)
        texts = clip.encode_text(tokens, normalize=True)
        loss = loss_of(images, texts, clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            mean, seconds = sum(losses[-50:]) / 50, time.perf_counter() - started
            print(f"  step {step + 1} loss {mean:.3f} ({seconds:.0f} s)", flush=True)
    return clip.eval()


def measure(scorer: Scorer, n: int, seed: int = 0) -> str:
    """Measures the scorer on `n` distinct scenes of the test split; returns a sentence."""
    rng = random.Random(f"scorer test {seed}")
    distinct: dict[str, shapes.Scene] = {}
    while len(distinct) < n:
        scene = draw(rng, "test")
        distinct[shapes.scene_to_json(scene)] = scene
    scenes = list(distinct.values())
    images = scorer.images([shapes.render(scene, rng.randrange(2**31)) for scene in scenes])
    right, wrong = (
        scorer.captions([shapes.scene_caption(scene) for scene in each])
        for each in (scenes, [hard_negative(scene, rng) for scene in scenes])
    )
    found = retrieval(images, right)
    to_text, to_image = (
        f"{found[way]['mean']:.3f} +- {found[way]['standard_error']:.3f}"
        for way in ("image_to_text", "text_to_image")
    )
    own, other = ((images * texts).sum(1).numpy() for texts in (right, wrong))
    wins = mean_with_error((own > other).astype(float))
    return (
        f"on {n} scenes of the test split: R@1 {to_text} image to text, {to_image} text to image (chance "
        f"{found['chance']:.4f}); the right description scores higher than the hard negative's in "
        f"{wins.mean:.3f} +- {wins.standard_error:.3f} (chance 0.5); mean CLIPScore {clip_score(own).mean():.2f} "
        f"right, {clip_score(other).mean():.2f} the hard negative's"
    )


def main(
    out: Path = Path("runs/scorer"),
    steps: int = 900,
    scenes_per_step: Annotated[int, typer.Option(help="half of them hard negatives")] = 96,
    learning_rate: float = 1e-3,
    seed: int = 0,
    test_scenes: int = 500,
) -> None:
    """Trains, saves and measures the scorer."""
    clip = train(steps, scenes_per_step, learning_rate, seed)
    with whole_folder(out) as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in clip.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
        write_json(folder / "open_clip_config.json", CONFIG)
        build_tokenizer().save_pretrained(folder)
    summary = measure(load_scorer(f"local-dir:{out}"), test_scenes)
    write_text(out / "README.md", f"# {out.name}\n\n{steps} steps, seed {seed}; {summary}.\n")
    print(f"{out}: {summary}")


if __name__ == "__main__":
    typer.run(main)
