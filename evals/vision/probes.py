"""Compares a vision tower's features before and after distillation: linear probes, CKA and cosine drift, zero-shot.

Features are the tower's outputs at the projector, averaged over an image's tokens, in any family: the language model
gets no other input from an image. Linear probes measure the decodable information, linear CKA and cosines the drift,
and an open_clip tower can be put back into its CLIP for zero-shot classification.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from evals import stats
from evals.compare import estimate_to_json
from evals.vision.alignment import PREFIX, Rows, Scorer, batches, digest_tensors
from vlopd.data import shapes
from vlopd.errors import ConfigError, RunError, first_line
from vlopd.files import without_nan
from vlopd.models.loaded import LoadedModel
from vlopd.models.openclip.vlm import OpenClipVlmForConditionalGeneration
from vlopd.models.parameter_names import classify
from vlopd.train.generation import sample
from vlopd.types import Example

Features = NDArray[np.float64]
Label = str | int
SHUFFLES = 10


class LabelledImages(NamedTuple):
    """Images with one or more named labels: {"red": [0, 2, 1]}."""

    images: Sequence[Image.Image]
    labels: Mapping[str, Sequence[Label]]


def shapes_pictures(split: shapes.Split, n: int, seed: int = 0) -> LabelledImages:
    """Shapes images with labels: number of objects, of red objects, of circles; presence of a red circle.

    Splits are by scene (`shapes.split_of`), so no scene is in two splits.
    """
    rows = list(shapes.ShapesDataset(split, n, seed))
    scenes = [[*shapes.scene_from_json(str(row.fields["scene"])).values()] for row in rows]
    labels: dict[str, list[Label]] = {
        "objects": [len(scene) for scene in scenes],
        "red": [sum(colour == "red" for colour, _ in scene) for scene in scenes],
        "circle": [sum(shape == "circle" for _, shape in scene) for scene in scenes],
        "red circle": [int(("red", "circle") in scene) for scene in scenes],
    }
    return LabelledImages([row.images[0] for row in rows], labels)


# ------------------------------------------------------------------------------------------- features


def tower_features(
    loaded: LoadedModel, images: Sequence[Image.Image], batch_size: int = 32
) -> Features:
    """The vision tower's outputs at the projector, averaged over each image's tokens: [I, W] float64.

    Each image goes through the model as a prompt, with the family's own processor and forward pass.
    Images of one size are batched; others go one by one. Raises RunError for a text-only model, and
    for one whose projector is not in vlopd/models/parameter_names.py.
    """
    projectors = _projector_modules(loaded.model)
    if not projectors:
        raise RunError(
            f"{loaded.name} has no projector that vlopd/models/parameter_names.py matches, so the end of its vision "
            "tower is unknown; use a vision-language model, or add its projector's name there"
        )
    inputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        inputs.append(next(x for x in values if x.is_floating_point()))

    hooks = [each.register_forward_pre_hook(record, with_kwargs=True) for each in projectors]
    alike = len({image.size for image in images}) == 1
    found = []
    try:
        for some in batches(images, batch_size if alike else 1):
            inputs.clear()
            asked = [Example.ask("", "what is this", [image]) for image in some]
            sample(loaded, loaded.render(asked), 1, temperature=0.0)
            # image by image in every family, as [I, S, W] or flat
            tokens = inputs[0].reshape(len(some), -1, inputs[0].shape[-1])
            found.append(tokens.double().mean(1).cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(found)


def _projector_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules whose parameters all belong to the projector."""
    components = defaultdict(set)
    for name, _ in model.named_parameters():
        pieces = name.split(".")
        for depth in range(1, len(pieces)):
            components[".".join(pieces[:depth])].add(classify(name).component)
    own = {name for name, parts in components.items() if parts == {"projector"}}
    return [model.get_submodule(name) for name in own if name.rpartition(".")[0] not in own]


# -------------------------------------------------------------------------------------------- measures


def linear_cka(x: Features, y: Features) -> float:
    """Linear centred kernel alignment of features of the same n images, [n, W] and [n, W']: 0 to 1.

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (arXiv 1905.00414, eq. 5). 1 where they differ by a
    rotation and scale; nan where either is constant. High by chance for few images relative to the width.
    """
    x, y = x - x[0], y - y[0]  # constant features become exactly 0
    x, y = x - x.mean(0), y - y.mean(0)
    across = np.linalg.norm(y.T @ x) ** 2
    within = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(across / within) if within else float("nan")


def _mean_cosine(x: Features, y: Features) -> float:
    """Mean over images of the cosine of their features, [n, W] both; nan where some are all 0."""
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.mean((x * y).sum(1) / lengths)) if lengths.all() else float("nan")


def drift(x: Features, y: Features, seed: int = 0) -> dict[str, Any]:
    """Linear CKA and mean cosine of two towers' features, and their means over shuffled images.

    The cosine is null where the widths differ.
    """
    same_width = x.shape[1] == y.shape[1]
    rng = np.random.default_rng(seed)
    shuffled = [y[rng.permutation(len(y))] for _ in range(SHUFFLES)]
    return {
        "n": len(x),
        "width": [x.shape[1], y.shape[1]],
        "linear_cka": linear_cka(x, y),
        "linear_cka_shuffled": float(np.mean([linear_cka(x, s) for s in shuffled])),
        "cosine": _mean_cosine(x, y) if same_width else None,
        "cosine_shuffled": float(np.mean([_mean_cosine(x, s) for s in shuffled]))
        if same_width
        else None,
    }


def linear_probe(
    train: Features, train_labels: Sequence[Label], test: Features
) -> NDArray[np.generic]:
    """Predicts the test images' labels by logistic regression on standardised features (L2, C = 1): [n_test].

    Raises RunError where the training images have a single label.
    """
    if len(set(train_labels)) < 2:
        raise RunError(f"every training picture has the label {train_labels[0]!r}; add others")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(train, train_labels).predict(test)


# ---------------------------------------------------------------------------------------------- probes


def train_test_features(
    loaded: LoadedModel, train: LabelledImages, test: LabelledImages
) -> tuple[Features, Features]:
    """A tower's features of the training and the test images."""
    learned, asked = (tower_features(loaded, each.images) for each in (train, test))
    return learned, asked


def probe_towers(
    base: LoadedModel,
    trained: LoadedModel,
    train: LabelledImages,
    test: LabelledImages,
    before: tuple[Features, Features] | None = None,
) -> tuple[dict[str, Any], Rows]:
    """Drift of a model's vision tower between two checkpoints: (summary, one row per test image and label).

    For each label a linear probe is fitted on each tower's features of `train` and tested on `test`; `chance`
    is the majority class's accuracy, `difference` is trained - base, paired by image. `drift` is of the features of
    `test`. `before`: precomputed `train_test_features` of the base.
    """
    before = before or train_test_features(base, train, test)
    after = train_test_features(trained, train, test)
    probes, rows = {}, []
    for name, truth in test.labels.items():
        learned = train.labels[name]
        guesses = [linear_probe(side[0], learned, side[1]) for side in (before, after)]
        right = [(guess == np.array(truth)).astype(float) for guess in guesses]
        commonest = Counter(learned).most_common(1)[0][0]
        probes[name] = {
            "classes": len(set(learned)),
            "chance": float(np.mean([value == commonest for value in truth])),
            "base": estimate_to_json(stats.mean_with_error(right[0])),
            "trained": estimate_to_json(stats.mean_with_error(right[1])),
            "difference": estimate_to_json(stats.paired_difference(right[1], right[0])),
        }
        rows += [
            {"id": i, "label": name, "truth": t, "base": a, "trained": b}
            for i, (t, a, b) in enumerate(
                zip(truth, guesses[0].tolist(), guesses[1].tolist(), strict=True)
            )
        ]
    summary = {
        "base": base.name,
        "trained": trained.name,
        "n_train": len(train.images),
        "drift": drift(before[1], after[1]),
        "probes": probes,
    }
    return without_nan(summary), rows


def zero_shot(
    scorers: Sequence[Scorer],
    images: Sequence[Image.Image],
    labels: Sequence[str],
    templates: Sequence[str] = (f"{PREFIX}{{}}",),
) -> list[dict[str, Any]]:
    """Zero-shot accuracy of each CLIP by the nearest class name; one dict per scorer.

    Class names are the distinct labels, each in every template (open_clip's build_zero_shot_classifier).
    `chance` is 1 / classes; `difference` is to the first scorer, paired by image.
    """
    from open_clip import build_zero_shot_classifier

    names = sorted(set(labels))
    truth = torch.tensor([names.index(label) for label in labels])
    found: list[dict[str, Any]] = []
    rights = []
    for scorer in scorers:
        weights = build_zero_shot_classifier(
            scorer.clip, scorer.tokenizer, names, templates, device=scorer.device
        )
        guess = (scorer.images(images) @ weights.double().cpu()).argmax(1)
        rights.append((guess == truth).double().numpy())
        found.append(
            {
                "scorer": scorer.name,
                "digest": scorer.digest,
                "classes": len(names),
                "chance": 1 / len(names),
                "accuracy": estimate_to_json(stats.mean_with_error(rights[-1])),
                "difference": estimate_to_json(stats.paired_difference(rights[-1], rights[0])),
            }
        )
    return without_nan(found)


def with_tower_of(scorer: Scorer, student: LoadedModel) -> Scorer:
    """Replaces the CLIP's vision tower by a student's, for a zero-shot probe of that tower.

    Raises ConfigError unless the student is an OpenCLIP student (`openclip.assemble`) with the same tower architecture.
    """
    model = student.model
    if not isinstance(model, OpenClipVlmForConditionalGeneration):
        raise ConfigError(
            f"{student.name} has no open_clip tower and cannot be probed by class names; use probe_towers"
        )
    clip = copy.deepcopy(scorer.clip)
    state = {
        name: tensor.float().cpu() for name, tensor in model.model.vision_tower.state_dict().items()
    }
    try:
        clip.visual.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"{student.name}'s vision tower does not fit {scorer.name}: {first_line(error)}; use the CLIP that the "
            "student was assembled from"
        ) from None
    name, digest = (
        f"{scorer.name} with the tower of {student.name}",
        digest_tensors(clip.state_dict()),
    )
    return dataclasses.replace(scorer, name=name, clip=clip, digest=digest)
