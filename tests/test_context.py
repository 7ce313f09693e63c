"""What a teacher is shown: only its own view changes, and what cannot be shown names the example."""

import pytest
import torch
from PIL import Image

from vlopd.config.models import CaptionContext, ImageContext, SystemContext, TemplateContext
from vlopd.data.shapes import ShapesDataset
from vlopd.errors import ConfigError, UserError
from vlopd.models.load import load, load_processor
from vlopd.train.teacher_context import (
    teacher_view,
    with_caption,
    with_images,
    with_system,
    with_template,
)
from vlopd.types import Example

PICTURE = Image.linear_gradient("L").resize((20, 10)).convert("RGB")
SMALL = Image.new("RGB", (3, 4), "red")


def ask(images=(PICTURE,), answer="two", **fields):
    return Example.ask("e7", "how many?", images, answer, fields)


def kinds(example, turn=-1):
    return [part["type"] for part in example.messages[turn]["content"]]


CONTEXTS = [
    SystemContext(text="be brief"),
    TemplateContext(template="{{ question }} Hint: {{ hint }} {{ answer }}"),
    ImageContext(column="zoom"),
    CaptionContext(column="hint"),
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.type)
def test_a_view_is_another_example_of_the_same_id_and_answer(context):
    """Every context changes what is read, keeps id, answer and fields, and leaves the student's example alone."""
    example = ask(hint="look left", zoom=SMALL)
    before = repr(example)
    view = teacher_view(context, example)
    assert (view.messages, view.images) != (example.messages, example.images)
    assert (view.id, view.answer, view.fields) == (example.id, example.answer, example.fields)
    assert sum(kinds(view, i).count("image") for i in range(len(view.messages))) == len(view.images)
    assert repr(example) == before


def test_a_system_text_goes_first():
    """A system turn is put first; where there is one, its text follows the teacher's after a blank line."""
    once = with_system(ask(), "one")
    assert [m["role"] for m in once.messages] == ["system", "user"]
    assert once.messages[1:] == ask().messages
    for content in ("two", [{"type": "text", "text": "two"}]):
        own = Example("e", ({"role": "system", "content": content}, *ask().messages))
        view = with_system(own, "one")
        assert [m["role"] for m in view.messages] == ["system", "user"]
        assert view.messages[0]["content"] == [{"type": "text", "text": "one\n\ntwo"}]


def test_a_template_takes_the_last_questions_place():
    """The last user turn's text is rendered anew; earlier turns and pictures stay where they are."""
    turns = (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look:"},
                {"type": "image"},
                {"type": "text", "text": "how many?"},
            ],
        },
    )
    example = Example("e7", turns, (PICTURE,), "two", {"hint": "left", "answer": "a field's"})
    view = with_template(example, "{{ question }} ({{ hint }}: {{ answer }})")
    assert view.messages[:2] == turns[:2] and view.images == example.images
    assert kinds(view) == ["text", "image"]
    assert view.messages[-1]["content"][0]["text"] == "look: how many? (left: two)"
    assert kinds(with_template(ask(), "x")) == ["image", "text"]


@pytest.mark.parametrize(
    "template, kind, match",
    [
        ("{{ clue }}", ConfigError, "'e7'.*'clue' is undefined; known names: answer, hint, none_"),
        ("{{ hint.deeper }}", ConfigError, "'e7'.*no attribute 'deeper'"),
        ("{{ none_here }}", UserError, r"'e7'.*missing \(no value here: none_here\)"),
        ("{{ question", ConfigError, "line 1: unexpected end of template"),
        ("{{ 1 / 0 }}", ConfigError, "'e7'.*division by zero"),
        ("{{ hint.__class__.__mro__ }}", ConfigError, "'e7'.*unsafe"),
        ("{% if none_here %}x{% endif %} ", UserError, "'e7'.*leaves no text"),
    ],
)
def test_a_template_that_cannot_be_filled_says_why(template, kind, match):
    """An unknown name, a null, a fault in the template or an empty result is one line; never the word None."""
    with pytest.raises(kind, match=match) as caught:
        with_template(ask(hint="left", none_here=None), template)
    assert "\n" not in str(caught.value)


def test_an_example_without_an_answer_prints_none_and_says_so():
    """`{{ answer }}` of an example that has none is refused; asking for it in an `if` is fine."""
    example = ask(answer=None)
    with pytest.raises(UserError, match=r"'e7'.*no value here: answer"):
        with_template(example, "It is {{ answer }}")
    view = with_template(example, "{{ question }}{% if answer %} {{ answer }}{% endif %}")
    assert view.question == "how many?"


def test_pictures_come_from_a_field():
    """One picture or a list takes the place of the student's, with as many image parts."""
    assert with_images(ask(zoom=SMALL), "zoom").images == (SMALL,)
    view = with_images(ask(zoom=[SMALL, PICTURE]), "zoom")
    assert (view.images, kinds(view)) == ((SMALL, PICTURE), ["image", "image", "text"])
    blind = with_images(ask(images=(), zoom=SMALL), "zoom")
    assert (blind.images, kinds(blind)) == ((SMALL,), ["image", "text"])


def test_a_box_is_a_crop_of_the_first_picture():
    """[x0, y0, x1, y1] is in pixels, right and bottom edges excluded, rounded."""
    view = with_images(ask(images=(PICTURE, SMALL), box=[5, 2, 9.2, 10]), "box")
    assert [image.size for image in view.images] == [(4, 8)] and kinds(view) == ["image", "text"]
    assert view.images[0].getpixel((0, 0)) == PICTURE.getpixel((5, 2))
    assert view.images[0].getpixel((3, 7)) == PICTURE.getpixel((8, 9))
    whole = with_images(ask(box=[0, 0, 20, 10]), "box")
    assert whole.images[0].tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    "value, match",
    [
        ([5, 2, 5, 10], "is 0 x 8 pixels"),
        ([9, 2, 5, 10], "is -4 x 8 pixels"),
        ([0.1, 0.2, 0.9, 1.0], "boxes are .* in pixels"),
        ([-1, 0, 5, 5], "exceeds the picture of 20 x 10"),
        ([0, 0, 21, 5], "exceeds the picture of 20 x 10"),
        ([0, 0, float("nan"), 5], "finite"),
        ([0, 0, 5], "holds int"),
        ([True] * 4, "holds bool"),
        ([SMALL, "b.png"], "holds Image and str"),
        ("b.png", "holds str; the teacher's image context needs"),
        ([], "holds nothing"),
        (None, "is empty"),
    ],
)
def test_a_field_that_is_no_picture_names_its_example(value, match):
    """A value that is neither pictures nor a box inside the picture is one line with id and field."""
    with pytest.raises(UserError, match=match) as caught:
        with_images(ask(zoom=value), "zoom")
    message = str(caught.value)
    assert "'e7'" in message and "'zoom'" in message and "\n" not in message


def test_a_box_needs_a_picture():
    """A crop of nothing is refused."""
    with pytest.raises(UserError, match=r"'e7'.*no picture to crop"):
        with_images(ask(images=(), zoom=[0, 0, 4, 4]), "zoom")


def test_a_caption_takes_the_pictures_place():
    """The caption is read where the first picture was, in one text with the question; no picture is left."""
    view = with_caption(ask(images=(PICTURE, SMALL), told="a ramp"), "told")
    assert view.images == () and view.question == "a ramp how many?"
    assert view.messages[-1]["content"] == [{"type": "text", "text": "a ramp how many?"}]
    turns = (
        {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and?"}]},
    )
    view = with_caption(Example("e", turns, (SMALL, SMALL), None, {"told": "two"}), "told")
    assert [m["content"] for m in view.messages] == [
        [{"type": "text", "text": "see two"}],
        "yes",
        [{"type": "text", "text": "and?"}],
    ]


@pytest.mark.parametrize(
    "fields, images, match",
    [
        ({}, (SMALL,), "has no field 'told' .*it has none"),
        ({"hint": "x"}, (SMALL,), "has no field 'told' .*it has hint"),
        ({"told": None}, (SMALL,), "'told' is empty"),
        ({"told": "  "}, (SMALL,), "'told' holds no text"),
        ({"told": ["a"]}, (SMALL,), "'told' holds no text"),
        ({"told": "a ramp"}, (), "no picture for its caption"),
    ],
)
def test_a_caption_that_is_missing_names_its_example(fields, images, match):
    """No field, no text in it, or no picture to replace: one line with the id."""
    with pytest.raises(UserError, match=match) as caught:
        with_caption(ask(images, **fields), "told")
    assert "'e7'" in str(caught.value)


def test_captions_let_the_text_teacher_read_the_visual_world():
    """With captions the built-in text teacher gets, token for token, the prompts of the text modality."""
    teacher = load("builtin:shapes-text-teacher", torch.float32)
    seen = [teacher_view(CaptionContext(column="caption"), e) for e in ShapesDataset("test", 5)]
    told = list(ShapesDataset("test", 5, modality="text"))
    assert torch.equal(teacher.render(seen).input_ids, teacher.render(told).input_ids)


def test_views_with_more_pictures_render():
    """A vision-language model's template writes a placeholder for each picture of the view, and the system turn."""
    processor = load_processor("builtin:shapes-teacher")
    example = ask(zoom=[SMALL, SMALL, SMALL])
    view = with_images(with_system(example, "be brief"), "zoom")
    text = processor.apply_chat_template(list(view.messages), tokenize=False)
    one = processor.apply_chat_template(list(example.messages), tokenize=False)
    assert text.count(processor.image_token) == 3 * one.count(processor.image_token) > 0
