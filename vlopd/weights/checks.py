"""Whether a folder's weights are those that its config.json describes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from vlopd.errors import RunError
from vlopd.files import read_settings
from vlopd.models import integrity
from vlopd.weights import adapters

if TYPE_CHECKING:  # transformers' models load with it, and only layouts that differ need them
    pass
from vlopd.weights.pairing import paired, renamed_by, unwrapped
from vlopd.weights.reader import Weights


def refuse_unlike_config(folder: Path) -> None:
    """Raises RunError where a folder's weights are not those of its config.json: the first that is missing or unlike.

    Reads headers alone. Adapters, folders without a config.json and those of models that transformers does not know
    are accepted, as are tensors that the model has no place for: the pairing counts them.
    """
    path = folder / "config.json"
    if not path.is_file() or adapters.is_adapter(folder):
        return
    about = read_settings(path)
    if not isinstance(about, dict):
        raise RunError(f"{path} is no JSON object; give the config.json of the model, or remove it")
    from vlopd.models.config_files import config_of, is_known

    if not is_known(about):
        return
    from vlopd.models.layouts import fit

    config = config_of(folder)
    assert config is not None
    with Weights(folder) as weights:
        tensors = {name: weights.stored(name) for name in weights.names()}
        why = integrity.ragged(
            {n: integrity.Stored(d, tuple(weights.shape(n))) for n, d in tensors.items()}
        )
        if why is not None:
            raise RunError(f"{folder}: {why}")
        header = weights.header()
        named = unwrapped(header)
    try:
        found = fit(config, {bare: header[name] for bare, name in named.items()})
        if found is not None:  # once more with what is under another prefix
            pairs, changes = paired(found.lacking, found.unused)
            back = [(new, old) for old, new in changes]
            placed = {bare: its for bare, its in named.items() if bare not in found.unused}
            placed |= {own: named[other] for own, other in pairs.items()}
            others = found.unused.keys() - set(pairs.values())
            moved = renamed_by(back, {bare: named[bare] for bare in others})
            found = fit(config, {n: header[its] for n, its in (moved | placed).items()})
    except ValueError as error:
        said = " ".join(str(error).split())
        raise RunError(f"{path} describes no model ({said}); give the model's own") from None
    if found is None:
        return
    for name, (held, wanted) in sorted(found.unlike.items()):
        raise RunError(
            f"{folder}: {name} is {held} in its file and {wanted} in config.json; give the config.json that its "
            "weights were saved with"
        )
    lacking, unused = (sum(map(math.prod, its.values())) for its in (found.lacking, found.unused))
    if not lacking or (unused >= lacking and 2 * len(found.lacking) > len(header)):
        return  # in the second case they are there under names of a layout that we do not know
    raise RunError(
        f"{folder} is not whole: {integrity.few(sorted(found.lacking))} of config.json's model "
        f"{'are' if len(found.lacking) > 1 else 'is'} not in its file; save the whole model again, or give the "
        "config.json that its weights were saved with"
    )
