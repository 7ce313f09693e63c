"""Reads a checkpoint folder's config.json without importing model code."""

from __future__ import annotations

from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from vlopd.errors import RunError, first_line
from vlopd.files import read_settings
from vlopd.models.openclip import MODEL_TYPE as OPENCLIP
from vlopd.models.sizes import find_bad_number


def config_of(folder: Path) -> PretrainedConfig | None:
    """The folder's config; None without a config.json. Raises RunError for a model that transformers does not know."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    about = read_settings(path)
    if (wrong := find_bad_number(about)) is not None:
        raise RunError(f"{path}: {wrong}; give the one that the weights were saved with")
    if isinstance(about, dict) and about.get("model_type") == OPENCLIP:
        from vlopd.models.openclip import vlm  # loads transformers' models

        vlm.register()
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # config classes raise arbitrary exceptions
        raise RunError(f"cannot read {path}: {first_line(error)}") from None


def is_known(about: object) -> bool:
    """Whether a config.json is of a model that transformers or vlopd implements, so that its weights are known."""
    kind = about.get("model_type") if isinstance(about, dict) else None
    ours = isinstance(kind, str) and (kind == OPENCLIP or kind in CONFIG_MAPPING)
    return ours and isinstance(about, dict) and not about.get("auto_map")
