"""Checks that a checkpoint folder's weights match its config.json."""

from __future__ import annotations

import math
from pathlib import Path

from vlopd.errors import RunError
from vlopd.files import read_settings
from vlopd.models import integrity
from vlopd.weights import adapters
from vlopd.weights.name_matching import pair_names, rename_prefixes, strip_wrappers
from vlopd.weights.reader import Weights


def refuse_unlike_config(folder: Path) -> None:
    """Raises RunError naming the first tensor that is missing or mis-shaped for the folder's config.json.

    Reads headers only. Accepts adapters, folders without a config.json or of a model unknown to transformers, and
    tensors that are not parameters of the model: `match` counts those.
    """
    path = folder / "config.json"
    if not path.is_file() or adapters.is_adapter(folder):
        return
    about = read_settings(path)
    if not isinstance(about, dict):
        raise RunError(
            f"{path} is not a JSON object; give the config.json of the model, or remove it"
        )
    from vlopd.models.config_files import config_of, is_known

    if not is_known(about):
        return
    from vlopd.models.layouts import fit_checkpoint

    config = config_of(folder)
    assert config is not None
    with Weights(folder) as weights:
        tensors = {name: weights.stored(name) for name in weights.names()}
        problem = integrity.find_incomplete_experts(
            {n: integrity.TensorHeader(d, tuple(weights.shape(n))) for n, d in tensors.items()}
        )
        if problem is not None:
            raise RunError(f"{folder}: {problem}")
        header = weights.header()
        named = strip_wrappers(header)
    try:
        found = fit_checkpoint(config, {bare: header[name] for bare, name in named.items()})
        if found is not None:  # retry with the names under another prefix
            pairs, changes = pair_names(found.lacking, found.unused)
            back = [(new, old) for old, new in changes]
            placed = {bare: its for bare, its in named.items() if bare not in found.unused}
            placed |= {own: named[other] for own, other in pairs.items()}
            others = found.unused.keys() - set(pairs.values())
            moved = rename_prefixes(back, {bare: named[bare] for bare in others})
            found = fit_checkpoint(config, {n: header[its] for n, its in (moved | placed).items()})
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"{path} is not a valid model config ({reason}); give the config.json that the weights were saved with"
        ) from None
    if found is None:
        return
    for name, (held, wanted) in sorted(found.unlike.items()):
        raise RunError(
            f"{folder}: {name} is {held} in its file and {wanted} in config.json; give the config.json that the "
            "weights were saved with"
        )
    lacking, unused = (sum(map(math.prod, its.values())) for its in (found.lacking, found.unused))
    if not lacking or (unused >= lacking and 2 * len(found.lacking) > len(header)):
        return  # in the second case the weights are present in a layout that is not supported
    raise RunError(
        f"{folder} is incomplete: {integrity.first_names(sorted(found.lacking))} of config.json's model "
        f"{'are' if len(found.lacking) > 1 else 'is'} not in its file; save the whole model again, or give the "
        "config.json that the weights were saved with"
    )
