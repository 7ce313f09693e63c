"""On-policy distillation in one file: a built-in student learns from its teacher, with torch and transformers alone.

    python examples/opd_in_one_file.py                   # the vision-language pair, about a minute on two cores
    python examples/opd_in_one_file.py shapes-text 40    # the language pair, 40 steps

vlopd provides the two checkpoints and the questions; all else is written out here. Each step, the student samples
completions, the teacher scores them, and KL(student || teacher), averaged over the completions' tokens, is
minimised. `vlopd.distill` does the same with any pair, loss, reward, optimizer, mask and precision;
tests/test_examples.py compares the two, step by step.
"""

import hashlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)

import vlopd
from vlopd.data.shapes import ShapesDataset

BUILTIN = Path(vlopd.__file__).parent / "builtin"
MAX_NEW_TOKENS, WARMUP_STEPS = 14, 10


# ------------------------------------------------------------------------------------------- models
class Model(NamedTuple):
    """A model with its processor (vision-language) or tokenizer (language)."""

    model: torch.nn.Module
    processor: object

    @property
    def tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)


def load(name: str) -> Model:
    """Loads a checkpoint folder in fp32; transformers returns it without dropout (`eval`)."""
    folder = BUILTIN / name
    has_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    kind = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    processor = (AutoProcessor if has_images else AutoTokenizer).from_pretrained(folder)
    return Model(kind.from_pretrained(folder, dtype=torch.float32), processor)


def render(its: Model, examples: list) -> dict[str, Tensor]:
    """The examples as this model reads them: its own chat template, processor and image resolution; left-padded."""
    its.tokenizer.padding_side = "left"
    has_images = bool(examples[0].images)
    texts = []
    for example in examples:
        content = [{"type": "image"}] * has_images + [{"type": "text", "text": example.question}]
        turn = {"role": "user", "content": content if has_images else example.question}
        chat = its.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        texts.append(chat)
    images = {"images": [list(example.images) for example in examples]} if has_images else {}
    inputs = its.processor(
        text=texts, **images, padding=True, add_special_tokens=False, return_tensors="pt"
    )
    known = ("input_ids", "attention_mask", "pixel_values")
    return {name: inputs[name] for name in known if name in inputs}


def positions(mask: Tensor) -> Tensor:
    """Positions that do not depend on the padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


# -------------------------------------------------------------------------------------- random numbers
def stream(*names) -> torch.Generator:
    """A generator seeded by the stream's name, so that a resumed run would draw the same numbers."""
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pick(data, start: int, count: int, seed: int) -> list:
    """Examples `start` to `start + count` of the data, reshuffled every epoch."""
    found = []
    for position in range(start, start + count):
        epoch, place = divmod(position, len(data))
        order = torch.randperm(len(data), generator=stream("data order", seed, epoch))
        found.append(data[int(order[place])])
    return found


# --------------------------------------------------------------------------------------------- rollout
@torch.no_grad()
def sample(student: Model, prompts: dict[str, Tensor], uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Completions at temperature 1: ids [B, C], and a mask true up to and including the end token."""
    model, tokenizer = student.model, student.tokenizer
    banned = torch.tensor([tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<image>")])
    mask = prompts["attention_mask"]
    inputs, cache = dict(prompts), DynamicCache(config=model.config.get_text_config())
    alive = torch.ones(len(mask), dtype=torch.bool)
    tokens, masks = [], []
    for step in range(MAX_NEW_TOKENS):
        inputs["attention_mask"] = mask
        now = positions(mask)[:, -inputs["input_ids"].shape[1] :]
        hidden = model.base_model(
            **inputs, position_ids=now, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        logits = model.get_output_embeddings()(hidden).index_fill(1, banned, -torch.inf)
        cumulative = logits.double().softmax(-1).cumsum(-1)  # inverted at the uniform numbers
        wanted = uniforms[:, step, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
        tokens.append(torch.where(alive, drawn, tokenizer.pad_token_id))
        masks.append(alive)
        alive = alive & (tokens[-1] != tokenizer.eos_token_id)
        if not alive.any():
            break
        inputs = {"input_ids": tokens[-1][:, None]}
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return torch.stack(tokens, 1), torch.stack(masks, 1)


def logits_of(its: Model, prompts: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """[N, V] logits that predict each of the N completion tokens, after this model's own prompt."""
    length = prompts["attention_mask"].shape[1]
    rest = positions(prompts["attention_mask"])[:, -1:] + torch.arange(1, ids.shape[1] + 1)
    inputs = {
        **prompts,
        "input_ids": torch.cat([prompts["input_ids"], ids], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], mask.long()], 1),
        "position_ids": torch.cat([positions(prompts["attention_mask"]), rest], 1),
    }
    hidden = its.model.base_model(**inputs, use_cache=False).last_hidden_state
    return its.model.get_output_embeddings()(hidden[:, length - 1 : -1][mask])


def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probs, [N, V] each: softmax and log-softmax, with 2^x, which takes less time than e^x."""
    logprobs = logits - logits.amax(-1, keepdim=True)
    probs = (logprobs * (1 / math.log(2))).exp2()
    total = probs.sum(-1, keepdim=True)
    return probs * (1 / total), logprobs - total.log()


@torch.no_grad()
def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) [N] in nats from both models' logits [N, V]; its gradient in the student's, q (log q - log p - KL)."""
    (q, log_q), (_, log_p) = distribution(student), distribution(teacher)
    terms = q * (log_q - log_p)
    kl = terms.sum(-1)
    return kl, terms.addcmul(q, kl[:, None], value=-1)


# ------------------------------------------------------------------------------------------------ loop
def train(pair: str, steps: int, prompts_per_step: int, rate: float = 3e-4, seed: int = 1):
    """Trains the student; returns it with the loss of every step, in nats per token."""
    student, teacher = load(f"{pair}-student"), load(f"{pair}-teacher")
    modality = "text" if pair == "shapes-text" else "image"
    data = ShapesDataset("train", steps * prompts_per_step, 1, modality)
    values = list(student.model.parameters())
    optimizer = torch.optim.AdamW(values, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    losses = []
    for step in range(steps):
        # 1. the student samples a completion of each prompt
        examples = pick(data, step * prompts_per_step, prompts_per_step, seed)
        numbers = stream("rollout", seed, step, 0)
        shape = (MAX_NEW_TOKENS, prompts_per_step)
        uniforms = torch.rand(shape, generator=numbers, dtype=torch.float64).T.contiguous()
        prompts = render(student, examples)
        ids, mask = sample(student, prompts, uniforms)
        # 2. the teacher scores them, after its own prompt (both models have the same 58 tokens)
        with torch.no_grad():
            theirs = logits_of(teacher, render(teacher, examples), ids, mask)
        # 3. KL(student || teacher) at every completion token, averaged over the step's tokens
        ours = logits_of(student, prompts, ids, mask)
        kl, gradient = reverse_kl(ours, theirs)
        loss = kl.double().mean()
        optimizer.zero_grad()
        ours.backward(gradient * (1 / len(kl)))
        # 4. the update, at a rate that rises over the warm-up and falls linearly to 0
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        warm, left = min(1.0, (step + 1) / (WARMUP_STEPS + 1)), 1.0 - step / steps
        optimizer.param_groups[0]["lr"] = rate * left * warm
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: {losses[-1]:.4f} nats per token")
    return student, losses


if __name__ == "__main__":
    names, counts = sys.argv[1:2] or ["shapes"], sys.argv[2:] or ["120"]
    train(names[0], int(counts[0]), prompts_per_step=128)
