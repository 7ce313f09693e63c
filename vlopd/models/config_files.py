"""A checkpoint folder's own description, read without importing any model's code."""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from vlopd.errors import RunError, first_line
from vlopd.files import read_settings
from vlopd.models.openclip import MODEL_TYPE as OPENCLIP


def config_of(folder: Path) -> PretrainedConfig | None:
    """The folder's config.json, None where it has none. Raises RunError where it is of no known model."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    about = read_settings(path)
    if isinstance(about, dict) and about.get("model_type") == OPENCLIP:
        from vlopd.models.openclip import vlm  # loads transformers' models

        vlm.register()
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # configurations check themselves, and raise what they like
        raise RunError(f"cannot read {path}: {first_line(error)}") from None


def is_known(about: object) -> bool:
    """Whether a config.json's content is of a model whose code is at hand, so that it says which weights there are."""
    kind = about.get("model_type") if isinstance(about, dict) else None
    ours = isinstance(kind, str) and (kind == OPENCLIP or kind in CONFIG_MAPPING)
    return ours and isinstance(about, dict) and not about.get("auto_map")
