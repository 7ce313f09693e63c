"""What "supported" means: every family of language and vision-language models, through our own path.

The reference is always transformers' own `model(...)`, `generate` and processors, given one unpadded
example; nothing in it comes from families.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)

from tests.families.llms import LLMS
from tests.families.openclip import build_tiny
from tests.families.vlms import VLMS
from vlopd.config.objective import ReverseKL
from vlopd.data.shapes import ShapesDataset
from vlopd.errors import ConfigError, UserError
from vlopd.models import families, parameter_names
from vlopd.models.cache_size import cache_bytes
from vlopd.models.load import load
from vlopd.models.loaded import LoadedModel
from vlopd.models.save import save
from vlopd.seeding import uniforms
from vlopd.train.checkpointing import recomputed
from vlopd.train.decoding import chosen_engine
from vlopd.train.generation import sample
from vlopd.train.losses import Sampled, TokenInputs, chunked_divergence
from vlopd.train.sparse import Trainable
from vlopd.types import Completions, Example, Prompts

VLMS = {**VLMS, "openclip_vlm": build_tiny}
FAMILIES = {**LLMS, **VLMS}
ATTENTION = dict.fromkeys(("gemma2", "paligemma2", "gpt_oss"), "eager")  # they have no other
PALIGEMMA = ("paligemma", "paligemma2")  # no template, always a picture, a prompt seen both ways


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> its folder, built on first use."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def folder(family: str):
        if family not in built:
            FAMILIES[family](root / family)
            built[family] = root / family
        return built[family]

    return folder


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(params=VLMS)
def seeing(request) -> str:
    return request.param


@pytest.fixture
def make(folders):
    """Family -> a freshly loaded model of it."""

    def make(family: str) -> LoadedModel:
        return load(
            str(folders(family)),
            torch.float32,
            attention=ATTENTION.get(family, "sdpa"),
            template="plain" if family in PALIGEMMA else None,
        )

    return make


def examples_of(family: str) -> list[Example]:
    """Prompts of several lengths; for a model with eyes: one picture, a wider one, two, none."""
    if family in LLMS:
        return list(ShapesDataset("train", 4, modality="text"))
    first, second, third = ShapesDataset("train", 3, modality="image")
    wide = second.images[0].resize((96, 48))
    found = [
        first,
        Example.ask("wide", f"{second.question} or {first.question}", images=(wide,)),
        Example.ask("two", "more red or blue", images=(third.images[0], wide)),
    ]
    if family not in PALIGEMMA:
        found.append(Example.ask("none", "how many red"))
    return found


def completions_of(lengths: Sequence[int], extra: int = 0) -> Completions:
    """Random words, right-padded, with `extra` columns of padding more."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), max(lengths) + extra)
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(10, 58, shape, generator=generator) * mask
    return Completions(ids, mask, torch.zeros(shape), mask.any(1))


def row(completions: Completions, k: int) -> Completions:
    """One row without its padding."""
    n = int(completions.mask[k].sum())
    return Completions(
        *(x[k : k + 1, :n] for x in (completions.ids, completions.mask)),
        *[completions.logprobs[k : k + 1, :n], completions.ended[k : k + 1]],
    )


def ours(model: LoadedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """[N, V] log-probs by our path."""
    with torch.no_grad():
        hidden = model.completion_hidden(prompts, completions)
        return model.logits(hidden, model.vocabulary_rows).log_softmax(-1)


def processed(model: LoadedModel, family: str, example: Example) -> dict[str, Tensor]:
    """The processor's or tokenizer's own outputs for one example."""
    text = model.render_text(example)
    if family in LLMS:
        return dict(model.tokenizer([text], return_tensors="pt", add_special_tokens=False))
    if family in PALIGEMMA:
        text = text.removesuffix("\n")  # its processor adds one
    images = [list(example.images)] if example.images else None
    out = model.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    return {name: value for name, value in out.items() if name != "labels"}


def by_hand(model: LoadedModel, family: str, example: Example, completion: Tensor) -> Tensor:
    """[C, V] log-probs by one plain, unpadded forward pass of the whole model."""
    inputs = processed(model, family, example)
    inputs.pop("attention_mask")
    for name, value in inputs.items():
        if name in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            kind = torch.full_like(completion, int(family in PALIGEMMA))
            after = completion if name == "input_ids" else kind
            inputs[name] = torch.cat([value, after[None]], 1)
    if family in LLMS:
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        logits = model.model(**inputs).logits
    return logits[0, -len(completion) - 1 : -1].log_softmax(-1)


def assert_equal(got: Tensor, expected: Tensor, atol: float, what: str) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")


def test_logprobs_equal_one_plain_forward_pass(family, make):
    """In a padded batch of prompts with 0, 1 and 2 pictures, log-probs are those of the unpadded example."""
    model, examples = make(family), examples_of(family)
    completions = completions_of([5, 3, 6, 4][: len(examples)])
    together = ours(model, model.render(examples), completions)
    pieces = together.split(completions.mask.sum(1).tolist())
    for k, (example, piece) in enumerate(zip(examples, pieces, strict=True)):
        expected = by_hand(model, family, example, row(completions, k).ids[0])
        assert_equal(piece, expected, 1e-5, example.id)


@pytest.mark.parametrize(
    "family", ["gpt_oss", "qwen3_5_text", "qwen3_5", "qwen3_vl_moe", "gemma3", "openclip_vlm"]
)
def test_recomputed_layers_have_the_same_gradients(family, make):
    """Activation checkpointing changes no bit of a gradient and halves what autograd keeps, with experts, linear
    attention, two kinds of layers, pictures, and the tower of another library."""
    model, examples = make(family), examples_of(family)
    prompts, completions = model.render(examples), completions_of([5, 3, 6, 4][: len(examples)])
    own = {parameter.data_ptr() for parameter in model.model.parameters()}
    gradients, held = [], []
    for on in (False, True):
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with Trainable(model.model) as trainable:
            with hooks, recomputed(model.model, on, note):
                hidden = model.completion_hidden(prompts, completions)
            held.append(sum(kept.values()))
            model.logits(hidden, 50).log_softmax(-1)[:, 7].sum().backward()
            gradients.append({n: slot.values.grad for n, slot in trainable.slots.items()})
    assert held[1] < 0.5 * held[0]
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


def test_prompts_with_like_pictures_are_read_as_one_by_one(seeing, make):
    """A batch whose pictures are alike, which goes through the processor at once, gives the inputs of single ones."""
    model = make(seeing)
    first, second = ShapesDataset("train", 2, modality="image")
    longer = Example.ask("longer", f"{second.question} or {first.question}", second.images)
    together = model.render([first, longer])
    copied = model.with_own_processor()  # as the thread that reads ahead has it
    apart = [copied.render([example]) for example in (first, longer)]
    for k, one in enumerate(apart):
        kept = together.attention_mask[k].bool()
        assert torch.equal(together.input_ids[k][kept], one.input_ids[0])
        for name, values in one.per_token.items():
            assert torch.equal(together.per_token[name][k][kept], values[0]), name
    assert together.per_image.keys() == apart[0].per_image.keys()
    for name, values in together.per_image.items():
        assert torch.equal(values, torch.cat([one.per_image[name] for one in apart])), name


def test_the_caches_size_is_what_is_counted(family, make):
    """Keys and values after a forward pass take the bytes that are counted; states of linear attention are not."""
    if family in ("gpt_neox", "opt"):
        pytest.skip("they ignore the num_key_value_heads that their tiny config has")
    model = make(family)
    config = model.model.config
    ids = torch.randint(5, 10, (2, 5), generator=torch.Generator().manual_seed(0))
    for tokens in (1, 5):
        cache = DynamicCache(config=config.get_text_config())
        with torch.no_grad():
            families.backbone(model.model)(input_ids=ids[:, :tokens], past_key_values=cache)
        held = [
            x
            for layer in cache.layers
            if hasattr(layer, "keys")
            for x in (layer.keys, layer.values)
        ]
        assert sum(x.nbytes for x in held) == 2 * cache_bytes(config, torch.float32, tokens)


def test_logprobs_equal_those_of_generate(family, make):
    """`generate`, made to emit the same tokens with its own cache and masks, has the same log-probs."""
    model, examples = make(family), examples_of(family)
    completions = completions_of([5, 3, 6, 4][: len(examples)])
    for k, example in enumerate(examples):
        one = row(completions, k)
        expected = generated(model, processed(model, family, example), one.ids[0])
        got = ours(model, model.render([example]), one)
        assert_equal(got, expected, 1e-4, example.id)


def generated(model: LoadedModel, inputs: dict[str, Tensor], completion: Tensor) -> Tensor:
    """[C, V] log-probs by `generate` made to emit the completion."""
    start = inputs["input_ids"].shape[1]
    out = model.model.generate(
        **inputs,
        prefix_allowed_tokens_fn=lambda _, ids: [int(completion[len(ids) - start])],
        max_new_tokens=len(completion),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(out.logits).log_softmax(-1)


def test_padding_and_chunks_change_nothing(family, make):
    """More padding on either side, and small chunks of the loss, leave log-probs and divergence as they are."""
    model, examples = make(family), examples_of(family)
    lengths = [5, 3, 6, 4][: len(examples)]
    completions, prompts = completions_of(lengths), model.render(examples)
    plain = ours(model, prompts, completions)
    wider = Prompts(
        *(torch.nn.functional.pad(x, (7, 0)) for x in (prompts.input_ids, prompts.attention_mask)),
        {k: torch.nn.functional.pad(v, (7, 0)) for k, v in prompts.per_token.items()},
        prompts.per_image,
    )
    padded = Completions(
        *(torch.nn.functional.pad(x, (0, 3)) for x in (completions.ids, completions.mask)),
        torch.nn.functional.pad(completions.logprobs, (0, 3)),
        completions.ended,
    )
    torch.testing.assert_close(ours(model, wider, padded), plain, rtol=0, atol=1e-5)

    other = disturbed(model)
    hidden, others = (m.completion_hidden(prompts, completions) for m in (model, other))
    columns = torch.arange(10, 50)
    inputs = TokenInputs(
        hidden,
        lambda h: model.logits(h, columns),
        others,
        lambda h: other.logits(h, columns),
        Sampled(torch.zeros(len(hidden), dtype=torch.long), torch.zeros(len(hidden))),
    )
    small, whole = (chunked_divergence(ReverseKL(chunk_tokens=size), inputs) for size in (4, 1000))
    torch.testing.assert_close(small.loss, whole.loss, rtol=0, atol=1e-5)
    assert float(whole.loss.detach().max()) > 1e-2  # there is something to compare


def disturbed(model: LoadedModel, share: float = 0.5) -> LoadedModel:
    """Another model of the family: every parameter moved by noise of `share` of its own spread."""
    other = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in other.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise * (share * p.std(correction=0) + 0.02))
    return LoadedModel(model.name, other, model.processor)


# ------------------------------------------------------------------------------------------ sampling


def test_samplers_logprobs_equal_rescored_ones(family, make):
    """Two completions of each prompt, read once and sampled by either engine, have the log-probs that scoring gives."""
    model, examples = make(family), examples_of(family)
    rows = [k for k in range(len(examples)) for _ in range(2)]
    prompts, numbers = model.render(examples), uniforms(len(rows), 12, 0)
    completions = sample(model, prompts, 12, 1.0, numbers, rows=rows)
    rescored = ours(model, model.render([examples[k] for k in rows]), completions)
    rescored = rescored.gather(1, completions.ids[completions.mask][:, None])[:, 0]
    torch.testing.assert_close(completions.logprobs[completions.mask], rescored, rtol=0, atol=1e-4)
    assert chosen_engine(model, "static") == ("static", None)
    static = sample(model, prompts, 12, 1.0, numbers, rows=rows, engine="static")
    assert torch.equal(static.ids, completions.ids)
    assert torch.equal(static.mask, completions.mask)


def test_greedy_completions_equal_those_of_generate(family, make):
    """Token for token, from prompts of two lengths, each twice; the first of which end early and leave the batch."""
    model, examples = make(family), examples_of(family)[-2:]
    prompts, rows = model.render(examples), [0, 0, 1, 1]
    ends = model.model.generation_config
    seen = sample(model, prompts, 8, 0.0)
    ends.eos_token_id = [*model.end_ids, int(seen.ids[0, :3][-1])]
    model.__dict__.pop("end_ids")
    found = [sample(model, prompts, 8, 0.0, rows=rows, engine=e) for e in ("eager", "static")]
    for k, example in enumerate(examples):
        inputs = processed(model, family, example)
        expected = model.model.generate(
            **inputs, max_new_tokens=8, do_sample=False, suppress_tokens=model.unsampleable_ids
        )[0, inputs["input_ids"].shape[1] :]
        for completions in found:
            for copy_of in (2 * k, 2 * k + 1):
                assert row(completions, copy_of).ids[0].tolist() == expected.tolist()
    assert found[0].mask[0].sum() <= 3 and bool(found[0].ended[0])


def test_nothing_is_left_of_an_earlier_batch(family, make):
    """Sampling from and scoring another batch before (other pictures, none, another size) changes nothing."""
    used, examples = make(family), examples_of(family)
    for first, then in ((examples, examples[-1:]), (examples[:1], examples[1:])):
        fresh = make(family)
        sample(used, used.render(first), 4, 0.0)
        prompts = used.render(then)
        after = sample(used, prompts, 6, 0.0)
        ours(used, used.render(first), completions_of([3] * len(first)))
        expected = sample(fresh, prompts, 6, 0.0)
        assert torch.equal(after.ids, expected.ids)
        torch.testing.assert_close(after.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        scores = ours(used, prompts, after).gather(1, after.ids[after.mask][:, None])[:, 0]
        torch.testing.assert_close(scores, after.logprobs[after.mask], rtol=0, atol=1e-4)


QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
PLACEHOLDERS = {
    "<image>": ("llava", "llava_onevision", "idefics3", "smolvlm", "openclip_vlm", *PALIGEMMA),
    "<video>": ("llava_onevision", "internvl"),
    "<|image_pad|>": QWEN_VL,
    "<|video_pad|>": QWEN_VL,
    "<|vision_start|>": QWEN_VL,
    "<|vision_end|>": QWEN_VL,
    "<fake_token_around_image>": ("idefics3", "smolvlm"),
    "<global-img>": ("idefics3", "smolvlm"),
    "<row_1_col_1>": ("idefics3", "smolvlm"),
    "<IMG_CONTEXT>": ("internvl",),
    "<img>": ("internvl",),
    "</img>": ("internvl",),
    "<image_soft_token>": ("gemma3",),
    "<start_of_image>": ("gemma3",),
    "<end_of_image>": ("gemma3",),
    "[IMG]": ("mistral3", "pixtral"),
    "[IMG_BREAK]": ("mistral3", "pixtral"),
    "[IMG_END]": ("mistral3", "pixtral"),
}
"""Token -> the families of vlms.py that use it so."""


def placeholders_of(family: str) -> list[str]:
    found = [token for token, users in PLACEHOLDERS.items() if family in users]
    assert found, f"say which placeholders {family} has"
    return found


def test_placeholders_are_never_sampled(seeing, make):
    """A model that finds placeholders and padding likelier than all else emits neither."""
    model = make(seeing)
    prompts = model.render(examples_of(seeing))
    ids = model.tokenizer.convert_tokens_to_ids(placeholders_of(seeing))
    ids.append(model.tokenizer.pad_token_id)
    assert model.tokenizer.unk_token_id not in ids
    completions = completions_of([6] * len(prompts))
    with torch.no_grad():
        hidden = model.completion_hidden(prompts, completions)
        model.model.get_output_embeddings().weight[ids] = 5 * hidden.mean(0)
        likeliest = ours(model, prompts, completions).argmax(-1)
    assert set(likeliest.tolist()) & set(ids)
    completions = sample(model, prompts, 12, 1.0, uniforms(len(prompts), 12, 0))
    assert not set(completions.ids[completions.mask].tolist()) & set(ids)


def test_end_tokens_stay_sampleable(family, make):
    """No end of turn is among what the sampler must not emit."""
    model = make(family)
    assert not set(model.end_ids) & set(model.unsampleable_ids)


# -------------------------------------------------------------------------------------------- prompts


def test_the_picture_matters(seeing, make):
    """Another picture, a blank one and two in the other order each change the log-probs."""
    model = make(seeing)
    one, _, two = examples_of(seeing)[:3]
    blank = Image.new("RGB", one.images[0].size)
    pairs = [
        (one, Example(one.id, one.messages, (blank,))),
        (one, Example(one.id, one.messages, (two.images[0],))),
        (two, Example(two.id, two.messages, two.images[::-1])),
    ]
    completions = completions_of([4])
    for before, after in pairs:
        seen, other = (ours(model, model.render([e]), completions) for e in (before, after))
        assert float((seen - other).abs().max()) > 1e-3


def test_placeholders_in_the_users_words_are_words(seeing, make):
    """A question that holds a placeholder's string is tokenized with as many placeholders as pictures need."""
    model = make(seeing)
    picture = examples_of(seeing)[0].images
    ids = model.tokenizer.convert_tokens_to_ids(placeholders_of(seeing))

    def count(question: str) -> list[int]:
        found = model.render([Example.ask("q", question, images=picture)]).input_ids
        return [int((found == i).sum()) for i in ids]

    for token in placeholders_of(seeing):
        assert count(f"what is {token} at") == count("what is at")


def test_the_plain_template_is_bare_text(folders):
    """`template = "plain"`: a line a message, and what the tokenizer itself puts first; it survives saving."""
    model = load(str(folders("gpt2")), torch.float32, template="plain")
    example = Example(
        "q", ({"role": "system", "content": "list red"}, {"role": "user", "content": "how many"})
    )
    assert model.render_text(example) == "list red\nhow many\n"
    assert model.decode(completions_of([2])) != []


def test_the_plain_template_places_pictures(make):
    """PaliGemma's prompt has its pictures' tokens, then the text with one line break at its end."""
    model = make("paligemma")
    example = examples_of("paligemma")[0]
    expected = model.processor(
        text="<image>" + example.question, images=example.images[0], return_tensors="pt"
    )
    got = model.render([example])
    assert torch.equal(got.input_ids, expected["input_ids"])
    assert torch.equal(got.per_token["token_type_ids"], expected["token_type_ids"])
    where = families.position_ids(model.model, model.render(examples_of("paligemma")), 2)
    assert int(where["position_ids"].min()) == 1  # as its own forward counts


def test_a_template_that_refuses_a_system_message_is_heard(make):
    """The refusal names the example; nothing is merged into another turn."""
    model = make("gemma2")
    families.set_template(
        model.processor,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    )
    messages = ({"role": "system", "content": "x"}, {"role": "user", "content": "y"})
    with pytest.raises(UserError, match=r"'q7'.*no system role"):
        model.render([Example("q7", messages)])


def test_a_template_of_plain_strings_is_refused_for_a_model_with_eyes(make):
    """A template that would print the parts' Python text into the prompt raises."""
    model = make("llava")
    families.set_template(
        model.processor, "<image>{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="plain strings"):
        model.render(examples_of("llava")[:1])
    asked = "what is [{'type': 'text'}]"  # such words in a question are no sign of it
    make("llava").render([Example.ask("q", asked, images=examples_of("llava")[0].images)])


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if i % 2 else ()) for i, f in enumerate(FAMILIES)],
    indirect=True,
)
def test_distillation_reaches_the_teacher_and_moves_nothing_else(family, make):
    """On one batch the reverse KL falls below 5 % of its start within 50 steps; the teacher, and all off a mask, stay
    bit for bit."""
    student, examples = make(family), examples_of(family)
    teacher = disturbed(student)
    teacher.model.requires_grad_(False)
    prompts = student.render(examples)
    completions = completions_of([4, 3, 5, 2][: len(examples)])
    with torch.no_grad():
        target = teacher.completion_hidden(prompts, completions)

    def train(student: LoadedModel, mask: dict[str, Tensor] | None, steps: int) -> list[float]:
        trainable = Trainable(student.model, mask)
        optimizer = torch.optim.AdamW(trainable.parameters(), lr=1e-2, weight_decay=0.1)
        losses = []
        for _ in range(steps):
            trainable.zero_grad()
            inputs = TokenInputs(
                student.completion_hidden(prompts, completions),
                lambda h: student.logits(h, 58),
                target,
                lambda h: teacher.logits(h, 58),
                Sampled(completions.ids[completions.mask], completions.logprobs[completions.mask]),
            )
            loss = chunked_divergence(ReverseKL(), inputs).loss.mean()
            loss.backward()
            optimizer.step()
            trainable.write_back()
            losses.append(float(loss))
            if losses[-1] < 0.05 * losses[0]:
                break
        return losses

    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    untouched = {n: p.detach().clone() for n, p in teacher.model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    mask = {n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in before.items()}
    train(student, mask, 1)
    after = dict(student.model.named_parameters())
    assert all(torch.equal(before[n][~mask[n]], after[n][~mask[n]]) for n in before)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    losses = train(make(family), None, 50)
    assert losses[-1] < 0.05 * losses[0], losses[::10]
    assert all(torch.equal(untouched[n], p) for n, p in teacher.model.named_parameters())


def test_saved_and_reloaded_by_transformers_bit_for_bit(family, make, tmp_path):
    """`save` writes a folder that the Auto classes read: same weights and names, same ties, all its files."""
    model = make(family)
    model = disturbed(model)
    save(model, tmp_path, "# a card")
    auto = AutoModelForImageTextToText if family in VLMS else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path, attn_implementation=ATTENTION.get(family, "sdpa"))
    state, loaded = model.model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[n], loaded[n]) for n in state)
    assert ties(model.model) == ties(again)
    reader = AutoProcessor if family in VLMS else AutoTokenizer
    processor = reader.from_pretrained(tmp_path)
    assert families.tokenizer_of(processor).get_vocab() == model.tokenizer.get_vocab()
    assert processor.chat_template == model.processor.chat_template
    if family in VLMS:
        assert "image_processor" in json.loads((tmp_path / "processor_config.json").read_text())
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == model.end_ids
    assert "# a card" in (tmp_path / "README.md").read_text()


def ties(model) -> set[frozenset[str]]:
    """Names that share storage."""
    by_place: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_place.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(names) for names in by_place.values() if len(names) > 1}


# -------------------------------------------------------------------------------------------- refusals


def test_logits_are_known_for_every_family(family, make):
    """The check that a family's logits are not post-processed in an unknown way passes."""
    families.check_logits(make(family).model)


def test_unknown_logits_are_refused(make, monkeypatch):
    """A family that caps its logits by a field that no table knows is refused by name."""
    model = make("gemma2")
    monkeypatch.setattr(families, "AFTER_HEAD", ())
    with pytest.raises(ConfigError, match=r"'gemma2'.*AFTER_HEAD in vlopd/models/families\.py"):
        families.check_logits(model.model)


@pytest.mark.parametrize(
    ("kind", "inside"),
    [("t5", {}), ("florence2", {}), ("blip-2", {"text_config": {"model_type": "t5"}})],
)
def test_encoder_decoders_are_refused(kind, inside):
    """A model whose prompt goes through an encoder is refused, naming the file to look at."""
    with pytest.raises(ConfigError, match=r"encoder-decoder; vlopd/models/families\.py"):
        families.auto_classes(AutoConfig.for_model(kind, **inside))


def test_models_without_a_body_are_refused():
    """BLIP-2 on OPT has no part that stops before the output layer: refused, naming the file to add it to."""
    one = {"num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "blip-2", vision_config=one, qformer_config=one, text_config={"model_type": "opt", **one}
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ConfigError, match=r"'blip-2'.*vlopd/models/families\.py"):
        families.backbone(model)


def test_models_of_no_language_are_refused():
    """A bare vision tower is refused, naming the file to add it to."""
    with pytest.raises(ConfigError, match=r"'siglip_vision_model'.*vlopd/models/families\.py"):
        families.auto_classes(AutoConfig.for_model("siglip_vision_model"))


# ------------------------------------------------------------------------------------------- the atlas


def test_every_parameter_is_classified(family, make):
    """No parameter is "other", and both components of a decoder's layers are told apart by number."""
    model = make(family).model
    found = [parameter_names.classify(name) for name, _ in model.named_parameters()]
    unknown = [each for each in found if "other" in (each.component, each.module)]
    assert not unknown
    components = {each.component for each in found}
    assert components - {"head"} == (
        {"vision", "projector", "language", "embedding"}
        if family in VLMS
        else {"language", "embedding"}
    )
    assert {each.layer for each in found if each.component == "language"} >= {0, 1}


EXACT = {
    "model.layers.3.self_attn.q_proj.weight": ("language", 3, "q"),
    "model.layers.3.self_attn.q_norm.weight": ("language", 3, "norm"),
    "model.layers.0.self_attn.qkv_proj.weight": ("language", 0, "qkv"),
    "model.layers.0.mlp.gate_up_proj.weight": ("language", 0, "gate_up"),
    "model.layers.0.mlp.gate_proj.weight": ("language", 0, "gate"),
    "model.layers.0.mlp.gate.weight": ("language", 0, "router"),
    "model.layers.0.mlp.experts.gate_up_proj": ("language", 0, "expert_gate_up"),
    "model.layers.0.mlp.experts.down_proj": ("language", 0, "expert_down"),
    "model.norm.weight": ("language", None, "norm"),
    "lm_head.weight": ("head", None, "head"),
    "transformer.wte.weight": ("embedding", None, "embedding"),
    "transformer.wpe.weight": ("language", None, "position"),
    "transformer.h.1.attn.c_attn.bias": ("language", 1, "qkv"),
    "transformer.h.1.attn.c_proj.weight": ("language", 1, "o"),
    "transformer.h.1.mlp.c_proj.weight": ("language", 1, "down"),
    "gpt_neox.layers.1.attention.query_key_value.weight": ("language", 1, "qkv"),
    "gpt_neox.layers.1.attention.dense.weight": ("language", 1, "o"),
    "gpt_neox.embed_in.weight": ("embedding", None, "embedding"),
    "model.visual.blocks.2.attn.qkv.weight": ("vision", 2, "qkv"),
    "model.visual.blocks.2.attn.proj.weight": ("vision", 2, "o"),
    "model.visual.patch_embed.proj.weight": ("vision", None, "patch"),
    "model.visual.merger.mlp.0.weight": ("projector", None, "projection"),
    "model.visual.deepstack_merger_list.0.linear_fc1.weight": ("projector", None, "projection"),
    "model.visual.pos_embed.weight": ("vision", None, "position"),
    "model.vision_tower.embeddings.class_embedding": ("vision", None, "token"),
    "model.vision_tower.embeddings.cls_token": ("vision", None, "token"),
    "model.vision_tower.embeddings.patch_embeddings.projection.weight": ("vision", None, "patch"),
    "model.vision_tower.encoder.layer.1.lambda_1": ("vision", 1, "scale"),
    "model.vision_tower.encoder.layer.1.attention.projection_layer.weight": ("vision", 1, "o"),
    "model.vision_tower.patch_conv.weight": ("vision", None, "patch"),
    "model.vision_tower.transformer.layers.0.feed_forward.up_proj.weight": ("vision", 0, "up"),
    "model.vision_tower.pre_layrnorm.weight": ("vision", None, "norm"),
    "model.image_newline": ("projector", None, "token"),
    "model.multi_modal_projector.mm_input_projection_weight": ("projector", None, "projection"),
    "model.multi_modal_projector.patch_merger.merging_layer.weight": (
        "projector",
        None,
        "projection",
    ),
    "model.connector.modality_projection.proj.weight": ("projector", None, "projection"),
    "model.text_model.layers.1.mlp.up_proj.weight": ("language", 1, "up"),
    "model.language_model.embed_tokens.weight": ("embedding", None, "embedding"),
}


@pytest.mark.parametrize("name", EXACT)
def test_classification_is_exact(name):
    """Component, layer and module of a parameter of each kind."""
    where = parameter_names.classify(name)
    assert (where.component, where.layer, where.module) == EXACT[name]


def test_parts_tile_every_tensor(family, make):
    """The parts of a tensor cover each of its entries once, and each matrix is a matrix."""
    model = make(family).model
    for name, parameter in model.named_parameters():
        covered = torch.zeros(parameter.shape, dtype=torch.int)
        for part in parameter_names.parts(
            parameter_names.classify(name), parameter.shape, model.config
        ):
            covered[part.index] += 1
            assert covered[part.index].ndim == parameter.ndim - (part.expert is not None)
        assert bool((covered == 1).all()), name


def parts_of(model, name: str) -> dict[str, Tensor]:
    tensor = dict(model.named_parameters())[name]
    return {
        part.module if part.expert is None else f"{part.module} {part.expert}": (
            tensor[part.index].T if part.transposed else tensor[part.index]
        )
        for part in parameter_names.parts(
            parameter_names.classify(name), tensor.shape, model.config
        )
    }


def caught(model, module: str, run) -> tuple[Tensor, Tensor]:
    """(input, output) of a submodule while `run()` runs the model."""
    seen = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, inputs, out: seen.append((inputs[0].detach(), out))
    )
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("family", "module", "fused"),
    [
        ("phi3", "model.layers.0.self_attn", "qkv_proj"),
        ("gpt2", "transformer.h.0.attn", "c_attn"),
        *((family, "model.visual.blocks.0.attn", "qkv") for family in QWEN_VL if family in VLMS),
    ],
)
def test_parts_of_a_fused_qkv_are_those_that_the_forward_uses(
    family, module, fused, make, monkeypatch
):
    """Attention gets, as queries, keys and values, the products with our q, k and v."""
    loaded = make(family)
    model = loaded.model
    prompts, completions = loaded.render(examples_of(family)[:1]), completions_of([3])
    seen: list[tuple[Tensor, ...]] = []

    def spy(layer, q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return real(layer, q, k, v, *args, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    real = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    x, _ = caught(
        model, f"{module}.{fused}", lambda: loaded.completion_hidden(prompts, completions)
    )
    weights = parts_of(model, f"{module}.{fused}.weight")
    biases = {}
    if model.get_submodule(f"{module}.{fused}").bias is not None:
        biases = parts_of(model, f"{module}.{fused}.bias")
    x = x.reshape(-1, x.shape[-1])
    q, k, v = seen[0]
    assert set(weights) == {"q", "k", "v"}
    for name, theirs in {"q": q, "k": k, "v": v}.items():  # [1, heads, length, head]
        theirs = theirs[0].transpose(0, 1)
        mine = x @ weights[name].T + biases.get(name, 0.0)
        mine = mine.reshape(len(mine), *theirs.shape[1:])[: len(theirs)]
        if name != "v":  # rotated after the split, which keeps lengths
            mine, theirs = mine.norm(dim=-1), theirs.norm(dim=-1)
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


def test_fused_halves_and_experts_are_those_that_the_forward_uses(make):
    """Phi-3's gate and up, and each expert's three matrices, reproduce the forward's output."""
    loaded = make("phi3")
    prompts, completions = loaded.render(examples_of("phi3")[:1]), completions_of([3])
    run = lambda: loaded.completion_hidden(prompts, completions)  # noqa: E731
    x, out = caught(loaded.model, "model.layers.0.mlp", run)
    part = parts_of(loaded.model, "model.layers.0.mlp.gate_up_proj.weight")
    down = loaded.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    mine = (torch.nn.functional.silu(x @ part["gate"].T) * (x @ part["up"].T)) @ down.T
    torch.testing.assert_close(mine, out, rtol=0, atol=1e-5)

    loaded = make("qwen3_moe")
    prompts = loaded.render(examples_of("qwen3_moe")[:1])
    x, out = caught(
        loaded.model,
        "model.layers.0.mlp",
        lambda: loaded.completion_hidden(prompts, completions),
    )
    name = "model.layers.0.mlp.experts"
    part = parts_of(loaded.model, f"{name}.gate_up_proj") | parts_of(
        loaded.model, f"{name}.down_proj"
    )
    router = loaded.model.get_parameter("model.layers.0.mlp.gate.weight")
    x = x.reshape(-1, x.shape[-1])
    share, chosen = (x @ router.T).softmax(-1).topk(2)
    share = share / share.sum(-1, keepdim=True) if loaded.model.config.norm_topk_prob else share
    mine = torch.zeros_like(x)
    for e in range(4):
        gate, up = x @ part[f"gate {e}"].T, x @ part[f"up {e}"].T
        product = (torch.nn.functional.silu(gate) * up) @ part[f"down {e}"].T
        mine += product * (share * (chosen == e)).sum(-1, keepdim=True)
    torch.testing.assert_close(mine, out.reshape(mine.shape), rtol=0, atol=1e-5)


def test_interleaved_heads_are_left_whole(make):
    """GPT-NeoX interleaves heads within its fused qkv: one part, called qkv."""
    assert set(
        parts_of(make("gpt_neox").model, "gpt_neox.layers.0.attention.query_key_value.weight")
    ) == {"qkv"}


def test_input_first_matrices_are_said_to_be(make):
    """GPT-2's matrices, GPT-OSS's experts and Gemma 3's projector map in to out only when transposed."""
    model = make("gpt2").model
    assert parts_of(model, "transformer.h.0.mlp.c_fc.weight")["up"].shape == (128, 32)
    model = make("gpt_oss").model  # its gate and up take turns: left whole
    experts = "model.layers.0.mlp.experts"
    assert parts_of(model, f"{experts}.down_proj")["down 3"].shape == (32, 48)
    assert parts_of(model, f"{experts}.gate_up_proj")["gate_up 3"].shape == (96, 32)
    model = make("gemma3").model
    name = "model.multi_modal_projector.mm_input_projection_weight"
    wide = model.config.text_config.hidden_size, model.config.vision_config.hidden_size
    assert parts_of(model, name)["projection"].shape == wide
