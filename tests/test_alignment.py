"""CLIPScore, what the scorer itself can tell, and probes of a vision tower before and after training."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from evals import stats
from evals.vision import probes
from evals.vision.alignment import (
    Captioned,
    caption_by_rows,
    clip_score,
    difference,
    greedy_answers,
    join_rows,
    load_scorer,
    retrieval,
    score_captions,
    score_shapes,
    shared_tower_fraction,
)
from tests.conftest import tiny_language
from tests.families.openclip import build_language
from tests.families.vlms import VLMS
from vlopd.data import shapes
from vlopd.errors import ConfigError, RunError
from vlopd.models.load import load
from vlopd.models.loaded import LoadedModel
from vlopd.models.openclip.assemble import assemble
from vlopd.types import Example

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def save_clip(folder: Path, seed: int = 0) -> str:
    """Saves a CLIP with weights from a seed as open_clip's folders are, and returns its name."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**CLIP)
    for parameter in clip.parameters():  # livelier than the default, so that inputs matter
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    save_file(
        {n: t.contiguous() for n, t in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    """Names of two CLIPs that differ in their weights."""
    root = tmp_path_factory.mktemp("clips")
    return [save_clip(root / str(seed), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def scorer(clips):
    return load_scorer(clips[0])


@pytest.fixture(scope="module")
def pairs() -> list[Captioned]:
    """Test scenes whose captions are those of the next scene."""
    world = list(shapes.ShapesDataset("test", 12, seed=5))
    told = [str(example.fields["caption"]) for example in world]
    return [
        Captioned(example.images[0], told[(i + 1) % 12], told[i]) for i, example in enumerate(world)
    ]


@pytest.fixture(scope="module")
def student() -> LoadedModel:
    return load("builtin:shapes-student", torch.float32, attention="eager")


@pytest.fixture(scope="module")
def blind(student) -> LoadedModel:
    """The same student with a tower that sees nothing."""
    model = copy.deepcopy(student.model)
    torch.nn.init.zeros_(model.model.vision_tower.embeddings.patch_embedding.weight)
    return LoadedModel("blind", model, student.processor)


@pytest.fixture(scope="module")
def assembled(clips, tmp_path_factory) -> LoadedModel:
    """An OpenCLIP student on the first CLIP's tower, in bf16."""
    language = build_language(tmp_path_factory.mktemp("language"))
    model, processor = assemble(clips[0], language, dtype=torch.bfloat16)
    return LoadedModel("assembled", model, processor)


# --------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def test_clip_score_is_the_formula(clips, scorer, pairs):
    """2.5 max(cos, 0) of the image and "A photo depicts <caption>", by open_clip's own calls, for either sign."""
    clip, _, transform = open_clip.create_model_and_transforms(clips[0])
    tokenizer = open_clip.get_tokenizer(clips[0])
    summary, rows = score_captions(pairs, scorer, batch_size=5)
    expected = []
    for pair in pairs:
        image = clip.eval().encode_image(transform(pair.image)[None])[0]
        text = clip.encode_text(tokenizer(["A photo depicts " + pair.caption]))[0]
        expected.append(float(image @ text / (image.norm() * text.norm())))
    assert {np.sign(cosine) for cosine in expected} == {-1.0, 1.0}
    assert [row["cosine"] for row in rows] == pytest.approx(expected, abs=1e-5)
    scores = [2.5 * max(cosine, 0.0) for cosine in expected]
    assert [row["clip_score"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert summary["clip_score"]["mean"] == pytest.approx(np.mean(scores), abs=1e-5)
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    assert summary["clip_score"]["standard_error"] == pytest.approx(error, abs=1e-5)


def test_references_and_other_images_bracket_the_score(scorer, pairs):
    """Captions that are the references score as they do; `mismatched` is the mean over all other images."""
    right = [pair._replace(caption=pair.reference) for pair in pairs]
    summary, rows = score_captions(right, scorer)
    assert summary["clip_score"] == summary["reference"]
    assert summary["minus_reference"]["mean"] == 0
    images, texts = (
        scorer.images([p.image for p in right]),
        scorer.captions([p.caption for p in right]),
    )
    every = clip_score((images @ texts.T).numpy())
    others = [every[i, j] for i in range(12) for j in range(12) if i != j]
    assert summary["mismatched"] == pytest.approx(np.mean(others), abs=1e-6)
    assert {row["scorer_digest"] for row in rows} == {summary["scorer"]["digest"]}
    json.dumps([summary, rows], allow_nan=False)


def test_one_pair_is_no_error(scorer, pairs):
    """A single pair has a score, no error, nothing to be mismatched with, and nothing to tell apart from."""
    summary, _ = score_captions(pairs[:1], scorer)
    assert summary["clip_score"]["standard_error"] is None and summary["mismatched"] is None
    assert "are meaningless" in summary["warnings"][0]
    json.dumps(summary, allow_nan=False)
    with pytest.raises(RunError, match="no captions"):
        score_captions([], scorer)


def test_random_weights_give_no_score(tmp_path, pairs):
    """Without weights a scorer is refused; as a plumbing check it runs, and nothing of it is called a score."""
    (tmp_path / "tiny-clip-of-tests.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path)
    with pytest.raises(ConfigError, match=r"tiny-clip-of-tests.*no weights.*plumbing_check"):
        load_scorer("tiny-clip-of-tests")
    state = torch.get_rng_state()
    checked = load_scorer("tiny-clip-of-tests", plumbing_check=True)
    assert torch.equal(torch.get_rng_state(), state)
    summary, rows = score_captions(pairs, checked)
    assert "clip_score" not in json.dumps([summary, rows])
    assert summary["plumbing_check"]["n"] == 12 and "plumbing_check" in rows[0]
    assert difference(rows, rows)["mean"] == 0


def test_only_safetensors_are_read(clips, tmp_path):
    """Pickles, cut files and missing folders are one line that names them."""
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    whole = Path(clips[0].removeprefix("local-dir:"))
    config = (whole / "open_clip_config.json").read_bytes()
    weights = (whole / "open_clip_model.safetensors").read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    (tmp_path / "open_clip_config.json").write_bytes(config)
    (cut / "open_clip_config.json").write_bytes(config)
    (cut / "open_clip_model.safetensors").write_bytes(weights[:-100])
    for arguments, said in [
        ((f"local-dir:{tmp_path}",), "only safetensors"),
        (("ViT-B-32", str(tmp_path / "open_clip_pytorch_model.bin")), "only safetensors"),
        ((f"local-dir:{tmp_path / 'nowhere'}",), "nowhere"),
        (("no-such-clip", "weights.safetensors"), "no-such-clip"),
        ((f"local-dir:{cut}",), "cut"),
    ]:
        with pytest.raises(ConfigError, match=said) as caught:
            load_scorer(*arguments)
        assert "\n" not in str(caught.value)


def test_long_captions_are_counted(scorer, pairs):
    """What fits the context to the token is whole; a token more is cut, counted and warned of."""
    frame = len(scorer.tokenizer.encode("A photo depicts ")) + 2  # with start and end
    room = scorer.tokenizer.context_length - frame
    captions = ["red " * room, "red " * (room + 1), "red " * 200, ""]
    assert scorer.truncated(captions).tolist() == [False, True, True, False]
    long = [p._replace(caption=c) for p, c in zip(pairs, captions, strict=False)]
    summary, rows = score_captions(long, scorer)
    assert summary["truncated_captions"] == 2 and any(
        "2 captions" in w for w in summary["warnings"]
    )
    assert [row["truncated"] for row in rows] == [False, True, True, False]


def test_differences_are_paired_and_of_one_scorer(clips, scorer, pairs):
    """Two models' captions are compared picture by picture; other scorers and other pictures are refused."""
    right = [pair._replace(caption=pair.reference) for pair in pairs]
    a, b = score_captions(pairs, scorer)[1], score_captions(right, scorer)[1]
    found = difference(a, b)
    x, y = ([row["clip_score"] for row in rows] for rows in (a, b))
    expected = stats.paired_difference(x, y)
    assert found["mean"] == expected.mean and found["interval"] == [expected.low, expected.high]
    with pytest.raises(RunError, match="scorers"):
        difference(a, score_captions(pairs, load_scorer(clips[1]))[1])
    with pytest.raises(RunError, match="pictures"):
        difference(a, b[::-1])


# ----------------------------------------------------------------------------- what the scorer can tell


def test_retrieval_of_a_perfect_and_of_a_shuffled_scorer():
    """Embeddings that agree find every text and image; shifted by one they find none, as do those all alike."""
    images = torch.nn.functional.normalize(
        torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1
    )
    perfect, shuffled = retrieval(images, images), retrieval(images, images.roll(1, 0))
    constant = retrieval(images[:1].expand(30, -1), images[:1].expand(30, -1))
    for way in ("image_to_text", "text_to_image"):
        assert perfect[way]["mean"] == 1 and perfect[way]["interval"][0] > perfect["chance"]
        assert shuffled[way]["mean"] == 0 == constant[way]["mean"]
    assert perfect["chance"] == 1 / 30 and perfect["n"] == 30
    one_way = retrieval(torch.eye(2), torch.tensor([[1.0, 0.0], [0.9, 0.1]]))
    assert one_way["image_to_text"]["mean"] == 1 and one_way["text_to_image"]["mean"] == 0.5


def test_retrieval_leaves_repeated_references_out(scorer, pairs):
    """A reference that comes twice is one text to find, so that chance is what it says."""
    summary, _ = score_captions([*pairs, pairs[0], pairs[3]], scorer)
    assert summary["n"] == 14 and summary["retrieval"]["n"] == 12
    assert summary["retrieval"] == score_captions(pairs, scorer)[0]["retrieval"]


def test_untrained_scorers_are_found_out(scorer, pairs):
    """Random weights in a file pass for weights, but not for a scorer: retrieval is no better than chance."""
    warnings = score_captions(pairs, scorer)[0]["warnings"]
    assert sum("are meaningless" in warning for warning in warnings) == 2


def llava_on(clip: open_clip.CLIP, student: LoadedModel) -> LoadedModel:
    """A LLaVA whose CLIP tower has the matrices of an open_clip tower, under transformers' names."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    token = student.tokenizer.convert_tokens_to_ids("<image>")
    language = tiny_language(len(student.tokenizer), 32)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_id=token)
    )
    tower, visual = model.model.vision_tower, clip.visual
    copies = {tower.embeddings.patch_embedding.weight: visual.conv1.weight}
    copies[tower.embeddings.position_embedding.weight] = visual.positional_embedding
    for layer, block in zip(tower.encoder.layers, visual.transformer.resblocks, strict=True):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for own, theirs in zip(projections, block.attn.in_proj_weight.chunk(3), strict=True):
            copies[own.weight] = theirs
        copies[attention.out_proj.weight] = block.attn.out_proj.weight
        copies[layer.mlp.fc1.weight] = block.mlp.c_fc.weight
        copies[layer.mlp.fc2.weight] = block.mlp.c_proj.weight
    with torch.no_grad():
        for own, theirs in copies.items():
            own.copy_(theirs)
    return LoadedModel("llava", model, student.processor)


def test_the_students_own_tower_is_recognised(clips, scorer, assembled, student, pairs):
    """Under open_clip's names and transformers', fused and split, stored in bf16; never another's tower."""
    assert shared_tower_fraction(scorer, assembled) == 1
    assert shared_tower_fraction(load_scorer(clips[1]), assembled) == 0
    # all but the projection into the joint space, which a LLaVA does not have
    assert shared_tower_fraction(scorer, llava_on(scorer.clip, student)) == pytest.approx(10 / 11)
    own, _ = score_captions(pairs, scorer, [assembled])
    other, _ = score_captions(pairs, scorer, [student])
    assert any("assembled's" in warning for warning in own["warnings"])
    assert not any("own:" in warning for warning in other["warnings"])
    assert other["shared_tower_fraction"] == {"builtin:shapes-student": 0}


# -------------------------------------------------------------------------------------------- captions


def test_rows_in_words_are_the_scene_in_words():
    """The right answers to the three rows come to the reference; a wrong word stays, a fourth cell goes."""
    for example in shapes.ShapesDataset("test", 20, seed=1):
        scene = shapes.scene_from_json(str(example.fields["scene"]))
        rows = [" , ".join(shapes.at_cell(scene, 3 * i + j) for j in range(3)) for i in range(3)]
        assert join_rows(rows) == example.fields["caption"]
    assert join_rows(["cross , red , nothing , yes", "", "no"]) == (
        "top-left cross , top-center red , bottom-left no ;"
    )


def test_the_built_in_teacher_describes_its_pictures(scorer):
    """By its answers about rows: nearly every scene to the letter, and what it says depends on the picture."""
    teacher = load("builtin:shapes-teacher", torch.float32, attention="eager")
    summary, rows = score_shapes(teacher, scorer, n=20)
    assert summary["exact_match"]["mean"] >= 0.9
    assert summary["n"] == 20 == len({row["caption"] for row in rows})
    assert summary["shared_tower_fraction"] == {"builtin:shapes-teacher": 0}


def test_a_prompt_of_ones_own(scorer, student):
    """Any prompt may be asked; the captions are the model's greedy completions of it."""
    _, rows = score_shapes(student, scorer, n=3, prompt="list top row", max_new_tokens=14)
    world = shapes.ShapesDataset("test", 3, 0)
    asked = [Example.ask(e.id, "list top row", e.images) for e in world]
    assert [row["caption"] for row in rows] == greedy_answers(student, asked, 14, batch_size=1)
    assert all(row["caption"].count(",") == 2 for row in rows)
    assert caption_by_rows(student, [world[0].images[0]])[0].endswith(" ;")


# ---------------------------------------------------------------------------------------------- probes


def test_cka_is_one_for_features_turned_and_zero_for_nothing_shared():
    """1 for identical, rotated, scaled and shifted features; Kornblith's HSIC by hand; near 0 for noise."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)), rng.normal(size=(400, 4))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert probes.linear_cka(x, x) == pytest.approx(1)
    assert probes.linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1)
    mixed = np.column_stack([x[:, :2], y])
    centre = np.eye(400) - 1 / 400
    k, m = (centre @ (f @ f.T) @ centre for f in (x, mixed))
    by_hand = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    assert probes.linear_cka(x, mixed) == pytest.approx(by_hand)
    assert probes.linear_cka(x, y) < 0.05 < 0.2 < by_hand < 0.8
    assert np.isnan(probes.linear_cka(x, np.ones((400, 2)) / 3))
    found = probes.drift(x, 3 * x @ turn)
    assert found["linear_cka_shuffled"] < 0.05 and abs(found["cosine_shuffled"]) < 0.1
    assert probes.drift(x, y)["cosine"] is None


def test_features_are_what_the_projector_reads(student, assembled):
    """The mean of the tower's last hidden states (LLaVA) or tokens (OpenCLIP), for any batch size."""
    images = list(probes.shapes_pictures("test", 5).images)
    with torch.no_grad():
        pixels = student.render([Example.ask("", "x", [i]) for i in images]).per_image
        out = student.model.model.vision_tower(**pixels, output_hidden_states=True)
    expected = out.hidden_states[-1].double().mean(1).numpy()
    for batch_size in (1, 2, 32):
        found = probes.tower_features(student, images, batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    tower = assembled.model.model.vision_tower
    with torch.no_grad():
        pixels = assembled.render([Example.ask("", "x", [images[0]])]).per_image["pixel_values"]
        tokens = tower.forward_intermediates(pixels, indices=[-1], normalize_intermediates=True)
    mean = tokens["image_intermediates"][0].flatten(2).double().mean(2).numpy()
    np.testing.assert_allclose(probes.tower_features(assembled, images[:1]), mean, atol=0.02)
    assert not student.model.model.multi_modal_projector._forward_pre_hooks


def test_features_of_pictures_of_several_sizes(tmp_path):
    """Where the tower's tokens lie flat and a larger picture has more of them (Qwen2-VL), each is its own mean."""
    VLMS["qwen2_vl"](tmp_path)
    model = load(str(tmp_path), torch.float32)
    images = [*probes.shapes_pictures("test", 2).images]
    images.insert(1, images[1].resize((192, 120)))
    together = probes.tower_features(model, images)
    alone = [probes.tower_features(model, [image])[0] for image in images]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert np.abs(together[0] - together[2]).max() > 1e-2


def test_probes_tell_a_blind_tower_from_the_same_tower(student, blind):
    """Nothing differs between identical towers; a tower that sees nothing is at chance, and significantly worse."""
    train, test = probes.shapes_pictures("train", 150), probes.shapes_pictures("test", 160)
    same, rows = probes.probe_towers(student, student, train, test)
    assert same["drift"]["linear_cka"] == pytest.approx(1)
    assert same["drift"]["cosine"] == pytest.approx(1)
    assert same["drift"]["linear_cka_shuffled"] < 0.5
    assert all(row["base"] == row["trained"] for row in rows)
    worse, _ = probes.probe_towers(student, blind, train, test)
    for name, found in same["probes"].items():
        assert found["difference"]["mean"] == 0 and found["base"] == found["trained"]
        assert found["base"]["interval"][0] > found["chance"], name
        assert worse["probes"][name]["base"] == found["base"]
        assert worse["probes"][name]["trained"]["mean"] == pytest.approx(found["chance"])
        assert worse["probes"][name]["difference"]["interval"][1] < 0
    assert len(rows) == 4 * 160
    json.dumps([worse, rows], allow_nan=False)


def test_what_cannot_be_probed_is_refused(student, scorer, folders):
    """Models without eyes, labels of one value, and towers of another library: one line each."""
    image = Image.new("RGB", (96, 96))
    with pytest.raises(RunError, match="no projector"):
        probes.tower_features(load(str(folders["llm", "student"]), torch.float32), [image])
    with pytest.raises(RunError, match="'red'"):
        probes.linear_probe(np.eye(3), ["red"] * 3, np.eye(3))
    with pytest.raises(ConfigError, match="shapes-student has no open_clip tower"):
        probes.with_tower_of(scorer, student)


@torch.no_grad()
def test_zero_shot_by_hand_and_before_and_after(scorer, assembled):
    """The nearest class name's; a student's unmoved tower gives the CLIP's own answers, a moved one others."""
    images = probes.shapes_pictures("test", 40).images
    names = [f"{colour} {shape}" for colour in shapes.COLOURS for shape in shapes.SHAPES]
    texts = scorer.captions(names)
    guess = (scorer.images(images) @ texts.T).argmax(1).tolist()
    labels = names + [names[g] for g in guess[len(names) :]]
    expected = np.mean([names[g] == label for g, label in zip(guess, labels, strict=True)])
    exact = dataclasses.replace(scorer, clip=copy.deepcopy(scorer.clip).bfloat16().float())
    same = probes.with_tower_of(exact, assembled)  # which is stored in bf16
    other = copy.deepcopy(assembled.model)
    torch.nn.init.zeros_(other.model.vision_tower.conv1.weight)
    moved = probes.with_tower_of(exact, dataclasses.replace(assembled, model=other))
    found = probes.zero_shot([scorer], images, labels)
    assert found[0]["accuracy"]["mean"] == expected and found[0]["chance"] == 1 / len(names)
    found = probes.zero_shot([exact, same, moved], images, labels)
    assert found[1]["difference"]["mean"] == 0 == found[1]["difference"]["standard_error"]
    assert len(set((moved.images(images) @ texts.T).argmax(1).tolist())) == 1 < len({*guess})
    assert found[2]["difference"]["interval"][1] < 0
    assert same.digest != moved.digest


# ------------------------------------------------------------------------------- the scorer of our own


def test_the_trained_scorer_loads_and_knows_every_word(tmp_path):
    """scripts/train_scorer.py writes a folder that open_clip reads, whose words are those of every description."""
    path = Path(__file__).parents[1] / "scripts" / "train_scorer.py"
    spec = importlib.util.spec_from_file_location("train_scorer", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path / "scorer", steps=2, scenes_per_step=8, test_scenes=8)
    scorer = load_scorer(f"local-dir:{tmp_path / 'scorer'}")
    assert not scorer.random
    told = [str(e.fields["caption"]) for e in shapes.ShapesDataset("test", 50, 0)]
    ids = scorer.tokenizer(["A photo depicts " + caption for caption in told])
    assert not (ids == script.WORDS.index("<unk>")).any() and not scorer.truncated(told).any()
    back = scorer.tokenizer.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert back == ["A photo depicts " + caption for caption in told]
    assert "R@1" in (tmp_path / "scorer" / "README.md").read_text()
