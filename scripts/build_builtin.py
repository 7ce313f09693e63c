"""Trains the built-in pairs from scratch and writes them, with digests and cards, to vlopd/builtin/.

    python scripts/build_builtin.py                          # all four models, about 25 minutes on 2 cores
    python scripts/build_builtin.py shapes-student           # one of them
    python scripts/build_builtin.py shapes-early-student --out runs    # not shipped: the student of the harder pair

Supervised training on the shapes data set (vlopd/data/shapes.py), with several questions packed behind
one shared prompt prefix by a block mask. Phase 0 has only questions on single cells, until the loss is low
(without it, perception is not learned for thousands of steps); phase 1 has all kinds of questions.

The teacher keeps some entropy: label smoothing of 0.02. A teacher trained to zero entropy has
log-odds near 12 on every token, so reverse KL is almost a 0/1 loss; smoothing caps the
log-odds near 8 and costs no accuracy. It also learns to continue after mistakes: 10 % of its input
answer tokens (never the labels) are replaced by random ones. A student's rollouts contain many mistakes,
and a teacher trained on correct prefixes only has arbitrary log-probs after a mistake.

The student is trained to the end of its schedule, so that a later gain is not just annealing, but on
images of another palette (its red is magenta; the text student: scenes in another word order): it reasons well
under a domain shift to the teacher's data. (A student that lacked the skill instead, by a mix of questions with few
of four kinds, gained nothing from 32,000 on-policy questions: its samples contained no right answer to reinforce.)

The student of the harder pair (configs/pairs/shapes-early.toml) differs from it in a schedule of a third of the steps,
also annealed to its end: it scores 67 % on its own palette, so distillation that teaches it the teacher's colours ends
well below the teacher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vlopd.data import shapes
from vlopd.files import whole_folder
from vlopd.types import Example

OUT = Path(__file__).parents[1] / "vlopd" / "builtin"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %} <{{ message['role'] }}>"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %} "
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
HEAD_DIM = 64
EVERY_KIND = dict.fromkeys(shapes.KINDS, 1.0) | {"relation": 2.5}  # relations are learned last


@dataclass(frozen=True)
class Recipe:
    """Sizes, schedule and data of one model."""

    role: str
    vision: tuple[str, int, int, int, int] | None  # (tower, pixels, patch, width, layers)
    language: tuple[int, int, int]  # (width, layers, ffn)
    steps: int
    learning_rate: float
    label_smoothing: float = 0.0
    prefix_noise: float = 0.0
    palette: dict[str, tuple[int, int, int]] = field(default_factory=lambda: shapes.COLOURS)
    shade: int = 12
    place_first: bool = True
    seed: int = 0
    images_per_step: int = 64
    cell_loss_target: float = 0.05
    cell_steps_max: int = 600


RECIPES = {
    "shapes-teacher": Recipe(
        "teacher", ("clip", 96, 32, 128, 2), (192, 4, 512), 2000, 1.5e-3, 0.02, 0.1
    ),
    "shapes-student": Recipe(
        "student",
        ("siglip", 48, 16, 64, 2),
        (128, 3, 320),
        2000,
        2e-3,
        palette=shapes.STUDENTS_COLOURS,
        shade=shapes.STUDENTS_SHADE,
        seed=1,
    ),
    "shapes-text-teacher": Recipe("teacher", None, (128, 4, 320), 1600, 1.5e-3, 0.02, 0.1, seed=2),
    "shapes-text-student": Recipe(
        "student", None, (128, 3, 320), 900, 2e-3, place_first=False, seed=3
    ),
}
UNSHIPPED = {
    "shapes-early-student": replace(RECIPES["shapes-student"], steps=700, seed=4),
}
"""Models that are not in vlopd/builtin: a study builds them into a folder of its own."""


# ------------------------------------------------------------------------------ model and processor


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + shapes.vocabulary())}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
    """Builds a standard Hugging Face model, with fan-in initialisation, and its processor."""
    torch.manual_seed(recipe.seed)
    width, layers, ffn = recipe.language
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    if recipe.vision is None:
        model, processor = LlamaForCausalLM(language), tokenizer
    else:
        tower, pixels, patch, vision_width, vision_layers = recipe.vision
        sizes = dict(
            hidden_size=vision_width,
            intermediate_size=3 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_width // HEAD_DIM,
            image_size=pixels,
            patch_size=patch,
        )
        extra = 1 if tower == "clip" else 0  # CLIP's class token is one more image token
        if tower == "clip":
            vision = CLIPVisionConfig(**sizes)
            images = CLIPImageProcessor(
                size={"height": pixels, "width": pixels},
                do_center_crop=False,
                image_mean=[0.5] * 3,
                image_std=[0.5] * 3,
            )
        else:
            vision = SiglipVisionConfig(**sizes, vision_use_head=False)
            images = SiglipImageProcessor(size={"height": pixels, "width": pixels})
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=language,
                image_token_id=image_id,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                image_seq_length=(pixels // patch) ** 2 + extra,
                tie_word_embeddings=False,
            )
        )
        processor = LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=patch,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=extra,
            chat_template=CHAT_TEMPLATE,
        )
    initialise(model)
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")  # on CPU faster than SDPA, whose masked backward is slow
    return model, processor


@torch.no_grad()
def initialise(model) -> None:
    """Initialises with fan-in scale, unit embeddings, halved residual branch outputs and a small head."""
    residual = ("o_proj", "out_proj", "fc2", "down_proj")
    for name, p in model.named_parameters():
        if "embed_tokens" in name or "position_embedding" in name or "class_embedding" in name:
            p.normal_(0, 1)
        elif p.ndim >= 2:
            p.normal_(0, p[0].numel() ** -0.5 * (0.5 if any(r in name for r in residual) else 1.0))
    model.lm_head.weight.mul_(0.3)


# --------------------------------------------------------------------------------------------- data


def draw_turns(scene: shapes.Scene, rng: random.Random, phase: int) -> list[shapes.Question]:
    """Draws questions. Phase 0: every occupied cell and two empty ones. Phase 1: five of the mix, two cells."""
    empty = [cell for cell in range(9) if cell not in scene]
    cells = [*scene, *rng.sample(empty, 2)]
    rng.shuffle(cells)
    at = [
        shapes.Question(
            "attribute", f"what is at {shapes.CELLS[cell]}", shapes.at_cell(scene, cell)
        )
        for cell in cells
    ]
    if phase == 0:
        return at
    kinds = rng.choices(list(EVERY_KIND), list(EVERY_KIND.values()), k=5)
    return [shapes.draw_question(scene, rng, kind) for kind in kinds] + at[:2]


def pack(scenes, turns, tokenizer, n_image_tokens: int, place_first: bool):
    """Packs all turns of a scene behind one prefix; turns attend to the prefix and themselves only.

    Returns input_ids [B, T], the allowed-attention mask [B, 1, T, T], position_ids and labels [B, T].
    """
    vocabulary = tokenizer.get_vocab()
    rows = []
    for scene, questions in zip(scenes, turns, strict=True):
        ids = [1, vocabulary["<user>"]]
        if n_image_tokens:
            ids += [vocabulary["<image>"]] * n_image_tokens
        else:
            ids += [vocabulary[w] for w in shapes.scene_caption(scene, place_first).split()]
        prefix = len(ids)
        segment, position, labels = [0] * prefix, list(range(prefix)), [-100] * prefix
        for j, question in enumerate(questions):
            ask = [vocabulary[w] for w in question.text.split()] + [vocabulary["<assistant>"]]
            answer = [vocabulary[w] for w in question.answer.split()] + [2]
            n = len(ask) + len(answer)
            ids += ask + answer
            segment += [j + 1] * n
            position += range(prefix, prefix + n)
            labels += [-100] * len(ask) + answer
        rows.append((ids, segment, position, labels))
    length = 8 * math.ceil(max(len(row[0]) for row in rows) / 8)
    fill = (0, -1, 0, -100)
    ids, segment, position, labels = (
        torch.tensor([row[k] + [fill[k]] * (length - len(row[k])) for row in rows])
        for k in range(4)
    )
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return ids, (causal & same)[:, None], position, labels


def corrupt(batch, share: float, generator: torch.Generator):
    """Replaces a fraction of the input answer tokens by random answer tokens; labels are unchanged."""
    ids, allowed, position, labels = batch
    answers = labels[labels != -100]
    random_tokens = answers[torch.randint(len(answers), ids.shape, generator=generator)]
    chosen = (labels != -100) & (torch.rand(ids.shape, generator=generator) < share)
    return torch.where(chosen, random_tokens, ids), allowed, position, labels


def batch_loss(model, batch, pixel_values, smoothing: float):
    ids, allowed, position, labels = batch
    inputs = {} if pixel_values is None else {"pixel_values": pixel_values}
    with torch.autocast("cpu", torch.bfloat16):
        bias = torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, -1e4)
        hidden = model.model(
            input_ids=ids, attention_mask=bias, position_ids=position, use_cache=False, **inputs
        ).last_hidden_state
        keep = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][keep])
    return F.cross_entropy(logits.float(), labels[:, 1:][keep], label_smoothing=smoothing)


# ----------------------------------------------------------------------------------------- training


def train(name: str, recipe: Recipe, tokenizer):
    model, processor = build_model(recipe, tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count:,} parameters, {recipe.steps} steps", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    rng = random.Random(f"build {name} {recipe.seed}")
    noise = torch.Generator().manual_seed(recipe.seed)
    n_image_tokens = model.config.image_seq_length if recipe.vision else 0
    losses: list[float] = []
    started, phase = time.perf_counter(), 0
    for step in range(recipe.steps):
        progress = step / recipe.steps
        rate = min(1.0, (step + 1) / 60)
        if progress > 0.6:
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.6) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        floor = smoothing_floor(recipe.label_smoothing, len(tokenizer))
        slack = recipe.cell_loss_target + 2.5 * recipe.prefix_noise  # noise cannot be learned away
        learned = len(losses) > 20 and np.mean(losses[-10:]) - floor < slack
        if phase == 0 and (learned or step > recipe.cell_steps_max):
            phase = 1
            print(f"  step {step}: cells learned, now every kind", flush=True)
        scenes = [shapes.draw_scene(rng, "train") for _ in range(recipe.images_per_step)]
        turns = [draw_turns(scene, rng, phase) for scene in scenes]
        pixels = None
        if recipe.vision:
            pictures = [
                shapes.render(scene, rng.randrange(2**31), recipe.palette, recipe.shade)
                for scene in scenes
            ]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        batch = pack(scenes, turns, tokenizer, n_image_tokens, recipe.place_first)
        batch = corrupt(batch, recipe.prefix_noise, noise)
        loss = batch_loss(model, batch, pixels, recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            seconds = time.perf_counter() - started
            print(
                f"  step {step + 1} loss {np.mean(losses[-50:]):.4f} ({seconds:.0f} s)", flush=True
            )
        if step % 200 == 199:
            own, here = (
                greedy_accuracy(model, processor, recipe, "validation", 300, own_world)
                for own_world in (True, False)
            )
            print(
                f"  step {step + 1} validation, as trained {own}; in the world {here}", flush=True
            )
    return model.to(torch.bfloat16), processor


def smoothing_floor(epsilon: float, classes: int) -> float:
    """The lowest reachable cross-entropy under label smoothing."""
    right, wrong = 1 - epsilon + epsilon / classes, epsilon / classes
    return (
        0.0 if epsilon == 0 else -right * math.log(right) - (classes - 1) * wrong * math.log(wrong)
    )


@torch.no_grad()
def greedy_accuracy(
    model, processor, recipe: Recipe, split: shapes.Split, n: int, own_world: bool = False
) -> dict[str, float]:
    """Full-string exact match of greedy answers, with the unmodified processor and `generate`.

    On the standard data set or, with `own_world`, rendered as in the model's training.
    """
    model.eval()
    modality: shapes.Modality = "image" if recipe.vision else "text"
    world = shapes.ShapesDataset(split, n, seed=99, modality=modality)
    hits: dict[str, list[bool]] = {"all": []}
    for start in range(0, n, 250):
        examples = [world[i] for i in range(start, min(n, start + 250))]
        if own_world:
            examples = [as_trained_on(example, recipe) for example in examples]
        texts = [
            processor.apply_chat_template(
                list(e.messages), tokenize=False, add_generation_prompt=True
            )
            for e in examples
        ]
        if recipe.vision:
            batch = processor(
                text=texts,
                images=[e.images[0] for e in examples],
                return_tensors="pt",
                padding=True,
            )
            batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        else:
            batch = processor(texts, return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(**batch, max_new_tokens=14, do_sample=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        answers = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for example, answer in zip(examples, answers, strict=True):
            hit = answer.strip() == example.answer
            hits["all"].append(hit)
            hits.setdefault(str(example.fields["kind"]), []).append(hit)
    model.train()
    return {kind: round(float(np.mean(values)), 4) for kind, values in hits.items()}


def as_trained_on(example: Example, recipe: Recipe) -> Example:
    """The same question and scene, rendered as in the recipe's training."""
    fields = example.fields
    scene, question = shapes.scene_from_json(str(fields["scene"])), str(fields["question"])
    if recipe.vision:
        drawing = shapes.render(scene, int(fields["jitter"]), recipe.palette, recipe.shade)
        return Example.ask(example.id, question, [drawing], example.answer, fields)
    caption = shapes.scene_caption(scene, recipe.place_first)
    return Example.ask(example.id, f"{caption} {question}", (), example.answer, fields)


CARD = """---
license: apache-2.0
library_name: transformers
tags: [vlopd, builtin]
---
# {title}

The {role} of vlopd's {pair} {modality} pair: {architecture}, {parameters:,} parameters stored in
bfloat16, trained from nothing by `scripts/build_builtin.py` (seed {seed}, {steps} steps of
{images_per_step} scenes, label smoothing {label_smoothing}, prefix noise {prefix_noise}) on the visual world of
`vlopd/data/shapes.py`{drawings}.

Held-out scenes (the {split} split; split by content), {n} questions, full-string exact match of greedy answers:
**{score[all]:.4f}** (standard error {error:.4f}); by kind {by_kind}. A blind guesser who knows the
training answers gets {chance:.4f}.

For experiments and tests only: its vocabulary is {vocabulary} words.
"""


def save(name: str, recipe: Recipe, model, processor, out: Path, n: int = 3000) -> None:
    """Writes out/NAME with a card, whole or not at all. A study's own model is scored on the validation split."""
    split: shapes.Split = "test" if name in RECIPES else "validation"
    score = greedy_accuracy(model, processor, recipe, split, n)
    own = greedy_accuracy(model, processor, recipe, split, n, own_world=True)["all"]
    by_text, by_kind = shapes.blind_guesser()
    rows = [shapes.ShapesDataset(split, n, 99).row(i) for i in range(n)]
    blind = np.mean(
        [by_text.get(str(r["question"]), by_kind[str(r["kind"])]) == r["answer"] for r in rows]
    )
    card = CARD.format(
        title=f"builtin:{name}" if name in RECIPES else name,
        pair="built-in" if name in RECIPES else "harder",
        role=recipe.role,
        modality="image-text" if recipe.vision else "text",
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        seed=recipe.seed,
        steps=recipe.steps,
        images_per_step=recipe.images_per_step,
        label_smoothing=recipe.label_smoothing,
        prefix_noise=recipe.prefix_noise,
        drawings=""
        if recipe.role == "teacher"
        else f", told in another word order, in which it scores {own:.4f}"
        if recipe.vision is None
        else f", drawn in another palette ({recipe.palette}, shades +-{recipe.shade}), where it scores {own:.4f}",
        n=n,
        split=split,
        score=score,
        error=math.sqrt(score["all"] * (1 - score["all"]) / n),
        by_kind={k: v for k, v in score.items() if k != "all"},
        chance=float(blind),
        vocabulary=model.config.get_text_config().vocab_size,
    )
    with whole_folder(out / name) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card)
    print(f"{name}: {split} exact match {score} (blind {blind:.4f}) -> {out / name}", flush=True)


def write_digests() -> None:
    digests = {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(OUT.glob("*/*"))
        if path.is_file()
    }
    (OUT / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    print(f"{sum(p.stat().st_size for p in OUT.glob('*/*')) / 2**20:.1f} MiB in {OUT}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = {**RECIPES, **UNSHIPPED}
    parser.add_argument(
        "names", nargs="*", default=list(RECIPES), help=f"any of {', '.join(known)}"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the models' folders")
    given = parser.parse_args()
    if given.out == OUT and not set(given.names) <= set(RECIPES):
        parser.error(f"{', '.join(UNSHIPPED)}: not shipped; give --out")
    torch.set_num_threads(2)
    for each in given.names:
        save(each, known[each], *train(each, known[each], build_tokenizer()), given.out)
    if given.out == OUT:
        write_digests()
