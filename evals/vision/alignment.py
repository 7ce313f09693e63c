"""How well captions fit their images by an open_clip model (CLIPScore), beside what that scorer can tell at all.

A score is comparable with scores of the same scorer only, by digest of its weights. It knows little of counts,
relations and writing, and flatters a student whose vision tower is the scorer's own. So every result has a ceiling
(the references' own score), a floor (captions beside other images) and the scorer's retrieval on the references.
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
from evals.compare import plain
from vlopd.data import shapes
from vlopd.errors import ConfigError, RunError, UserError, first_line
from vlopd.files import without_nan
from vlopd.models.loaded import LoadedModel
from vlopd.models.names import classify
from vlopd.models.openclip.assemble import check_weights
from vlopd.train.sampler import sample
from vlopd.types import Example

PREFIX = "A photo depicts "
WEIGHT = 2.5
"""Both of CLIPScore (arXiv 2104.08718)."""

Rows = list[dict[str, Any]]
T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Captioned(NamedTuple):
    """An image, what was said of it, and what is right to say."""

    image: Image.Image
    caption: str
    reference: str


# ---------------------------------------------------------------------------------------- the scorer


@dataclass(frozen=True)
class Scorer:
    """A CLIP of open_clip with its own tokenizer and image transform. `digest` is of its weights."""

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
        """Whether each caption, with its prefix, is longer than the context (77 tokens in most), so is cut."""
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
    """An open_clip model by name with `pretrained` (a .safetensors file, or a tag), or `local-dir:FOLDER`.

    With `plumbing_check`, weights may be left out: they are then random (seed 0), and what comes of them is
    called `plumbing_check`, never a score. Raises ConfigError for that without being asked, for pickles, and for
    what cannot be loaded.
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
                f"the scorer {name!r} has no weights, and what random ones say is no score: name some by "
                "`pretrained`, or ask for a plumbing_check"
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
    """One sha256 over names, types, shapes and bytes, whichever file they came from."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(content(tensor))
    return total.hexdigest()


def content(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def shared_tower_fraction(scorer: Scorer, student: LoadedModel) -> float:
    """Share of the matrices of the scorer's vision tower that the student's vision tower has too, bit for bit.

    In bf16, so that how either is stored does not matter, and by content, so that names do not; the scorer's
    fused q, k, v may be three matrices there. Matrices of one value throughout are left out.
    """
    known = {
        fingerprint(parameter)
        for name, parameter in student.model.named_parameters()
        if classify(name).component == "vision" and parameter.ndim >= 2
    }
    shared = []
    for _, parameter in scorer.clip.visual.named_parameters():
        if parameter.ndim < 2 or bool((parameter == parameter.flatten()[0]).all()):
            continue
        thirds = parameter.chunk(3) if parameter.shape[0] % 3 == 0 else ()
        shared.append(
            fingerprint(parameter) in known
            or (len(thirds) == 3 and known >= {fingerprint(third) for third in thirds})
        )
    return float(np.mean(shared)) if shared else 0.0


def fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(content(tensor.to(torch.bfloat16))).hexdigest()


# ----------------------------------------------------------------------------------------- the scores


def clip_score(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """CLIPScore of cosines of image and caption: 2.5 max(cos, 0) (arXiv 2104.08718)."""
    return WEIGHT * np.maximum(cosine, 0.0)


def retrieval(images: Tensor, texts: Tensor) -> dict[str, Any]:
    """R@1 among n images [n, D] and their texts [n, D], all different, beside chance, 1/n.

    The share of images whose own text has the highest cosine, and the reverse. A tie is a miss.
    """
    cosines = images @ texts.T
    own = cosines.diagonal()

    def first(rows: Tensor) -> dict[str, Any]:
        hits = (rows >= own[:, None]).sum(1) == 1
        return plain(stats.mean_with_error(hits.numpy()))

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
    """Alignment of captions with their images: (summary, a row a pair), both ready for JSON.

    The score is `clip_score`, or `plumbing_check` where the scorer's weights are random. `students` are the
    models whose captions these are; a trained one's base belongs here too, since training moves the tower.
    `mismatched` is the mean score of captions beside the other images (null for a single pair). Retrieval is
    over the pairs whose reference has not come before. Raises RunError where there are no pairs.
    """
    if not pairs:
        raise RunError(
            "there are no captions to score; give at least one (image, caption, reference)"
        )
    name = "plumbing_check" if scorer.random else "clip_score"
    images = scorer.images([pair.image for pair in pairs], batch_size)
    said = scorer.captions([pair.caption for pair in pairs], batch_size)
    right = scorer.captions([pair.reference for pair in pairs], batch_size)
    own, reference = ((images * texts).sum(1).numpy() for texts in (said, right))
    scores, ceiling = clip_score(own), clip_score(reference)
    every = clip_score((images @ said.T).numpy())  # [image, caption]
    n = len(pairs)
    floor = float(every.sum() - scores.sum()) / (n * (n - 1)) if n > 1 else None
    firsts = list({pair.reference: i for i, pair in reversed([*enumerate(pairs)])}.values())
    found = retrieval(images[firsts], right[firsts])
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
        name: plain(stats.mean_with_error(scores)),
        "cosine": plain(stats.mean_with_error(own)),
        "reference": plain(stats.mean_with_error(ceiling)),
        "minus_reference": plain(stats.paired_difference(scores, ceiling)),
        "mismatched": floor,
        "truncated_captions": int(cut.sum()),
        "retrieval": found,
        "shared_tower_fraction": shared,
        "warnings": warnings_of(found, shared, int(cut.sum())),
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


def warnings_of(found: Mapping[str, Any], shared: Mapping[str, float], cut: int) -> list[str]:
    """What a reader of the score must know."""
    said = []
    for way in ("image_to_text", "text_to_image"):
        if not found[way]["interval"][0] > found["chance"]:
            said.append(
                f"the scorer's own {way} retrieval on the references ({found[way]['mean']:.3f}) is not above "
                f"chance ({found['chance']:.3f}): its scores mean nothing"
            )
    for student, fraction in shared.items():
        if fraction > 0:
            said.append(
                f"{fraction:.0%} of the matrices of the scorer's vision tower are {student}'s own: "
                "it flatters that model"
            )
    if cut:
        said.append(f"{cut} captions are longer than the scorer's context and were cut")
    return said


def difference(rows: Rows, others: Rows) -> dict[str, Any]:
    """Paired difference of two models' scores of the same pictures: rows - others.

    Raises RunError where scorer or pictures differ.
    """
    name = next(key for key in ("clip_score", "plumbing_check") if key in rows[0])
    for key, what in (("scorer_digest", "scorers"), ("reference", "pictures")):
        if [row[key] for row in rows] != [row[key] for row in others]:
            raise RunError(
                f"scores by different {what} cannot be compared; score both models on the same"
            )
    a, b = ([row[name] for row in side] for side in (rows, others))
    return without_nan(plain(stats.paired_difference(a, b)))


# --------------------------------------------------------------------------------------- the captions


def answers(
    loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """The likeliest completion of each prompt, token by token."""
    texts = []
    for some in batches(examples, batch_size):
        prompts = loaded.render(some)
        completions = sample(loaded, prompts, max_new_tokens, temperature=0.0)
        texts += loaded.decode(completions, prompts)
    return texts


def told_by_rows(loaded: LoadedModel, images: Sequence[Image.Image]) -> list[str]:
    """Descriptions of pictures of the visual world by a model that answers its questions and cannot caption.

    Its answers to `list top row`, `list middle row` and `list bottom row`, joined by `in_words`.
    """
    asked = [
        Example.ask(f"{i}", f"list {row} row", [image])
        for i, image in enumerate(images)
        for row in shapes.ROWS
    ]
    return [in_words(rows) for rows in batches(answers(loaded, asked, 14), len(shapes.ROWS))]


def in_words(rows: Sequence[str]) -> str:
    """Answers about the three rows as one description, in the words of `shapes.scene_in_words`.

    Empty cells are not mentioned. Whatever else is said of a cell stays, right or wrong; what comes after the
    third cell of a row has no place and is dropped.

    >>> in_words(["red circle , nothing , nothing", "nothing , blue cross , nothing", "nothing , nothing , nothing"])
    "top-left red circle , middle-center blue cross ;"
    """
    said = [cell for row in rows for cell in (row.split(" , ") + ["nothing"] * 3)[:3]]
    told = [
        f"{place} {words}"
        for place, words in zip(shapes.CELLS, said, strict=True)
        if words not in ("", "nothing")
    ]
    return " , ".join(told) + " ;"


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
    """Has a model caption `n` pictures of the visual world, and scores what it says, as `score_captions`.

    With `prompt` it is asked that of each picture; without, what is in each row (`told_by_rows`). The
    references are the scenes in words; `exact_match` is the share of captions that are theirs to the letter.
    """
    world = list(shapes.ShapesDataset(split, n, seed))
    images = [example.images[0] for example in world]
    if prompt is None:
        captions = told_by_rows(loaded, images)
    else:
        asked = [Example.ask(e.id, prompt, e.images) for e in world]
        captions = answers(loaded, asked, max_new_tokens)
    references = [str(example.fields["caption"]) for example in world]
    pairs = [Captioned(*each) for each in zip(images, captions, references, strict=True)]
    summary, rows = score_captions(pairs, scorer, [loaded, *bases])
    exact = stats.mean_with_error(
        [float(c == r) for c, r in zip(captions, references, strict=True)]
    )
    about = {"model": loaded.name, "split": split, "seed": seed, "prompt": prompt or "list ... row"}
    return {**about, **summary, "exact_match": plain(exact)}, rows
