"""Image-text alignment of captions by an open_clip model (CLIPScore), with the scorer's own limits.

Scores are comparable only for the same scorer, by digest of its weights. CLIP is weak on counts, relations and text in
images, and biased upward for a student whose vision tower is the scorer's. So every result has a ceiling (the
references' score), a floor (captions with other images) and the scorer's retrieval accuracy on the references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from evals import stats
from evals.compare import estimate_to_json
from vlopd.data import shapes
from vlopd.errors import ConfigError, RunError, UserError, first_line
from vlopd.files import without_nan
from vlopd.models.loaded import LoadedModel
from vlopd.models.openclip.assemble import check_weights
from vlopd.models.parameter_names import classify
from vlopd.train.generation import sample
from vlopd.types import Example

PREFIX = "A photo depicts "
WEIGHT = 2.5
"""Both of CLIPScore (arXiv 2104.08718)."""

Rows = list[dict[str, Any]]
T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Captioned(NamedTuple):
    """An image with a model's caption and the reference caption."""

    image: Image.Image
    caption: str
    reference: str


# ---------------------------------------------------------------------------------------- the scorer


@dataclass(frozen=True)
class Scorer:
    """An open_clip CLIP with its tokenizer and image transform. `digest`: of its weights."""

    name: str
    clip: Any
    tokenizer: Any
    transform: Callable[[Image.Image], Tensor]
    digest: str
    random: bool = False

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """Embeddings of unit length, [I, D] float64."""
        found = []
        for some in batches(images, batch_size):
            pixels = torch.stack([self.transform(image.convert("RGB")) for image in some])
            found.append(self.clip.encode_image(pixels.to(self.device), normalize=True))
        return torch.cat(found).double().cpu()

    @torch.no_grad()
    def captions(self, captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embeddings of "A photo depicts <caption>", of unit length, [I, D] float64."""
        found = []
        for some in batches(captions, batch_size):
            tokens = self.tokenizer([PREFIX + caption for caption in some])
            found.append(self.clip.encode_text(tokens.to(self.device), normalize=True))
        return torch.cat(found).double().cpu()

    def truncated(self, captions: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each caption, with its prefix, exceeds the context length (mostly 77 tokens) and is truncated."""
        longer = self.tokenizer.context_length + 1
        pad = self.tokenizer([""], longer)[0, -1]
        tokens = self.tokenizer([PREFIX + caption for caption in captions], longer)
        return (tokens[:, -1] != pad).numpy()


def load_scorer(
    name: str,
    pretrained: str | None = None,
    *,
    plumbing_check: bool = False,
    device: torch.device | str = "cpu",
) -> Scorer:
    """Loads an open_clip model by name with `pretrained` (a .safetensors file, or a tag), or `local-dir:FOLDER`.

    With `plumbing_check`, weights may be omitted: they are then random (seed 0), and results are named
    `plumbing_check` instead of a score. Raises ConfigError for missing weights otherwise, for pickles, and where
    loading fails.
    """
    import open_clip

    schema = name.startswith(("local-dir:", "hf-hub:"))
    random = pretrained is None and not schema
    try:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ConfigError(
                f"open_clip has no model {name!r}; `open_clip.list_models()` has the names, a folder "
                "is local-dir:PATH"
            )
        if random and not plumbing_check:
            raise ConfigError(
                f"the scorer {name!r} has no weights, and random ones give no score: set `pretrained`, "
                "or request a plumbing_check"
            )
        check_weights(name, pretrained, bool(config.get("quick_gelu", False)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained, pretrained_text=False, device=device
            )
        tokenizer = open_clip.get_tokenizer(name)
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"cannot load the scorer {name!r}: {first_line(error)}") from None
    digest = digest_tensors(clip.state_dict())
    label = name if pretrained is None else f"{name}, {pretrained}"
    return Scorer(label, clip.eval(), tokenizer, transform, digest, random)


def digest_tensors(state: Mapping[str, Tensor]) -> str:
    """One sha256 over names, dtypes, shapes and bytes, independent of the file."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_tensor_bytes(tensor))
    return total.hexdigest()


def _tensor_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def shared_tower_fraction(scorer: Scorer, student: LoadedModel) -> float:
    """Fraction of the matrices of the scorer's vision tower that the student's vision tower contains bit for bit.

    Compared in bf16, independent of stored dtypes, and by content, independent of names; the scorer's
    fused qkv may be three matrices there. Constant matrices are left out.
    """
    known = {
        _fingerprint(parameter)
        for name, parameter in student.model.named_parameters()
        if classify(name).component == "vision" and parameter.ndim >= 2
    }
    shared = []
    for _, parameter in scorer.clip.visual.named_parameters():
        if parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all()):
            continue
        thirds = parameter.chunk(3) if parameter.shape[0] % 3 == 0 else ()
        shared.append(
            _fingerprint(parameter) in known
            or (len(thirds) == 3 and known >= {_fingerprint(third) for third in thirds})
        )
    return float(np.mean(shared)) if shared else 0.0


def _fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(_tensor_bytes(tensor.to(torch.bfloat16))).hexdigest()


# ----------------------------------------------------------------------------------------- the scores


def clip_score(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """CLIPScore of cosines of image and caption: 2.5 max(cos, 0) (arXiv 2104.08718)."""
    return WEIGHT * np.maximum(cosine, 0.0)


def retrieval(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """R@1 among n images [n, D] and their texts [n, D], all distinct, with chance 1/n.

    The fraction of images whose own text has the highest cosine, and vice versa. A tie is a miss.
    """
    cosines = images @ texts.T
    own = cosines.diagonal()

    def first(rows: Tensor) -> dict[str, Any]:
        hits = (rows >= own[:, None]).sum(1) == 1
        return estimate_to_json(stats.mean_with_error(hits.numpy()))

    n = len(images)
    return {
        "n": n,
        "chance": 1 / n,
        "image_to_text": first(cosines),
        "text_to_image": first(cosines.T),
    }


def score_captions(
    pairs: Sequence[Captioned],
    scorer: Scorer,
    students: Sequence[LoadedModel] = (),
    batch_size: int = 64,
) -> tuple[dict[str, Any], Rows]:
    """Alignment of captions with their images: (summary, one row per pair), both ready for JSON.

    The score is `clip_score`, or `plumbing_check` where the scorer's weights are random. `students`: the models that
    wrote the captions, and for a trained one also its base, whose tower may be the scorer's. `mismatched`: the
    mean score of captions with the other images (null for a single pair). Retrieval is over the pairs with distinct
    references. Raises RunError where there are no pairs.
    """
    if not pairs:
        raise RunError(
            "there are no captions to score; give at least one (image, caption, reference)"
        )
    name = "plumbing_check" if scorer.random else "clip_score"
    images = scorer.images([pair.image for pair in pairs], batch_size)
    captions = scorer.captions([pair.caption for pair in pairs], batch_size)
    references = scorer.captions([pair.reference for pair in pairs], batch_size)
    own, reference = ((images * texts).sum(1).numpy() for texts in (captions, references))
    scores, ceiling = clip_score(own), clip_score(reference)
    every = clip_score((images @ captions.T).numpy())  # [image, caption]
    n = len(pairs)
    floor = float(every.sum() - scores.sum()) / (n * (n - 1)) if n > 1 else None
    firsts = list({pair.reference: i for i, pair in reversed([*enumerate(pairs)])}.values())
    found = retrieval(images[firsts], references[firsts])
    cut = scorer.truncated([pair.caption for pair in pairs])
    shared = {student.name: shared_tower_fraction(scorer, student) for student in students}
    summary = {
        "scorer": {
            "name": scorer.name,
            "digest": scorer.digest,
            "random": scorer.random,
            "context_length": scorer.tokenizer.context_length,
        },
        "n": n,
        name: estimate_to_json(stats.mean_with_error(scores)),
        "cosine": estimate_to_json(stats.mean_with_error(own)),
        "reference": estimate_to_json(stats.mean_with_error(ceiling)),
        "minus_reference": estimate_to_json(stats.paired_difference(scores, ceiling)),
        "mismatched": floor,
        "truncated_captions": int(cut.sum()),
        "retrieval": found,
        "shared_tower_fraction": shared,
        "warnings": _warnings_of(found, shared, int(cut.sum())),
    }
    rows = [
        {
            "id": i,
            "caption": pair.caption,
            "reference": pair.reference,
            "cosine": float(own[i]),
            name: float(scores[i]),
            "reference_cosine": float(reference[i]),
            "truncated": bool(cut[i]),
            "scorer_digest": scorer.digest,
        }
        for i, pair in enumerate(pairs)
    ]
    return without_nan(summary), rows


def _warnings_of(found: Mapping[str, Any], shared: Mapping[str, float], cut: int) -> list[str]:
    """Caveats on the score."""
    warnings = []
    for way in ("image_to_text", "text_to_image"):
        if not found[way]["interval"][0] > found["chance"]:
            warnings.append(
                f"the scorer's own {way} retrieval on the references ({found[way]['mean']:.3f}) is not above "
                f"chance ({found['chance']:.3f}): its scores are meaningless"
            )
    for student, fraction in shared.items():
        if fraction > 0:
            warnings.append(
                f"{fraction:.0%} of the matrices of the scorer's vision tower are {student}'s: "
                "its score for that model is biased upward"
            )
    if cut:
        warnings.append(f"{cut} captions exceed the scorer's context length and were truncated")
    return warnings


def difference(rows: Rows, others: Rows) -> dict[str, Any]:
    """Paired difference of two models' scores of the same images: rows - others.

    Raises RunError where scorers or images differ.
    """
    name = next(key for key in ("clip_score", "plumbing_check") if key in rows[0])
    for key, what in (("scorer_digest", "scorers"), ("reference", "pictures")):
        if [row[key] for row in rows] != [row[key] for row in others]:
            raise RunError(
                f"scores by different {what} cannot be compared; score both models on the same"
            )
    a, b = ([row[name] for row in side] for side in (rows, others))
    return without_nan(estimate_to_json(stats.paired_difference(a, b)))


# --------------------------------------------------------------------------------------- the captions


def greedy_answers(
    loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """The greedy completion of each prompt."""
    texts = []
    for some in batches(examples, batch_size):
        prompts = loaded.render(some)
        completions = sample(loaded, prompts, max_new_tokens, temperature=0.0)
        texts += loaded.decode(completions, prompts)
    return texts


def caption_by_rows(loaded: LoadedModel, images: Sequence[Image.Image]) -> list[str]:
    """Captions of shapes images by a model that answers questions on them but cannot caption.

    Joins its answers to `list top row`, `list middle row` and `list bottom row` with `join_rows`.
    """
    asked = [
        Example.ask(f"{i}", f"list {row} row", [image])
        for i, image in enumerate(images)
        for row in shapes.ROWS
    ]
    return [
        join_rows(rows) for rows in batches(greedy_answers(loaded, asked, 14), len(shapes.ROWS))
    ]


def join_rows(rows: Sequence[str]) -> str:
    """Joins the answers for three rows into one caption, in the format of `shapes.scene_caption`.

    Omits empty cells. Keeps any other text of a cell, right or wrong; drops text after the third cell of a row.

    >>> join_rows(["red circle , nothing , nothing", "nothing , blue cross , nothing", "nothing , nothing , nothing"])
    "top-left red circle , middle-center blue cross ;"
    """
    cells = [cell for row in rows for cell in (row.split(" , ") + ["nothing"] * 3)[:3]]
    phrases = [
        f"{place} {words}"
        for place, words in zip(shapes.CELLS, cells, strict=True)
        if words not in ("", "nothing")
    ]
    return " , ".join(phrases) + " ;"


def score_shapes(
    loaded: LoadedModel,
    scorer: Scorer,
    n: int = 500,
    seed: int = 0,
    split: shapes.Split = "test",
    prompt: str | None = None,
    max_new_tokens: int = 64,
    bases: Sequence[LoadedModel] = (),
) -> tuple[dict[str, Any], Rows]:
    """Has a model caption `n` shapes images, and scores the captions as `score_captions`.

    Captions come from `prompt` or, without one, from `caption_by_rows`. The references are the scene descriptions;
    `exact_match` is the fraction of captions identical to them.
    """
    world = list(shapes.ShapesDataset(split, n, seed))
    images = [example.images[0] for example in world]
    if prompt is None:
        captions = caption_by_rows(loaded, images)
    else:
        asked = [Example.ask(e.id, prompt, e.images) for e in world]
        captions = greedy_answers(loaded, asked, max_new_tokens)
    references = [str(example.fields["caption"]) for example in world]
    pairs = [Captioned(*each) for each in zip(images, captions, references, strict=True)]
    summary, rows = score_captions(pairs, scorer, [loaded, *bases])
    exact = stats.mean_with_error(
        [float(c == r) for c, r in zip(captions, references, strict=True)]
    )
    about = {"model": loaded.name, "split": split, "seed": seed, "prompt": prompt or "list ... row"}
    return {**about, **summary, "exact_match": estimate_to_json(exact)}, rows
