"""Loads a model with its processor from a hub id, a local folder, a .gguf file or `builtin:NAME`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from vlopd import trust
from vlopd.config.models import ModelConfig
from vlopd.errors import (
    ConfigError,
    RunError,
    first_line,
    is_out_of_memory,
    one_line_out_of_memory,
    shown,
)
from vlopd.files import is_endless, read_settings
from vlopd.models import families, integrity
from vlopd.models.bars import bars_where_drawn
from vlopd.models.gguf import convert, smollm2
from vlopd.models.loaded import LoadedModel, ModelUnreadable
from vlopd.models.openclip import vlm
from vlopd.models.sizes import find_bad_number, find_code_of_the_hub
from vlopd.models.tokenizers import (
    PROBE,
    check_template,
    check_template_arguments,
    missing_row_message,
    read_template,
    template_text,
)

BUILTIN = Path(__file__).parents[1] / "builtin"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


TOKENIZER_FILES = (
    "; copy tokenizer.json, tokenizer_config.json and the files beside them (processor_config.json for images) "
    "from the model's original folder"
)


def resolve(name: str) -> str:
    """Resolves a model name to a path or hub id: `builtin:NAME` to the packaged folder, a .gguf file to its dequantised
    copy.

    Raises ConfigError for an unknown built-in.
    """
    if name.endswith(".gguf"):
        return str(convert.converted(Path(name)))
    if not name.startswith("builtin:"):
        return name
    short = name.removeprefix("builtin:")
    if short in smollm2.NAMES:
        return str(smollm2.folder(short))
    if (BUILTIN / short / "config.json").is_file():
        return str(BUILTIN / short)
    shipped = [path.name for path in sorted(BUILTIN.iterdir()) if path.is_dir()]
    known = ", ".join(f"builtin:{each}" for each in [*shipped, *smollm2.NAMES])
    raise ConfigError(f"no built-in model {name!r}; there are {known}")


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model's files on this machine; None of a hub id that was not downloaded."""
    where = resolve(name)
    if Path(where).is_dir():
        return Path(where)
    try:
        return Path(snapshot_download(where, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def load_model_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Loads the model's config, without weights.

    Raises ModelUnreadable where it cannot be read, ConfigError for an adapter or quantised weights, and for remote code
    that a run folder names and nobody trusts.
    """
    vlm.register()
    if trust_remote_code and (why := trust.why_remote_code_withheld(name)):
        raise ConfigError(why)
    where = resolve(name)
    if Path(where).is_dir():
        _refuse_special_files(Path(where))
    if (own := Path(where) / "config.json").is_file():
        _check_config(name, own)
    try:
        adapter = find_adapter_config_file(where, revision=revision)
        config = None
        if adapter is None:
            config = AutoConfig.from_pretrained(
                where, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # config classes raise arbitrary exceptions
        if _does_not_exist(where, revision):
            raise ModelUnreadable(
                f"cannot read the configuration of {name!r}: there is no such folder, and no such hub model in the "
                "cache or that could be fetched; check the name"
            ) from None
        raise _unreadable_error(f"read the configuration of {name!r}", error) from None
    if config is None:
        raise ConfigError(
            f"{name} is an adapter (it has {integrity.ADAPTER}), not a model; merge it into its base (PEFT's "
            "merge_and_unload, then save_pretrained) and give the merged folder"
        )
    if packed := integrity.find_quantisation(config.to_dict()):
        raise ConfigError(f"{name} is quantised: {packed}")
    return config


def _refuse_special_files(folder: Path) -> None:
    """Raises ModelUnreadable for a pipe, a device or a circular link in a model's folder."""
    for path in sorted(folder.iterdir()):
        if is_endless(path):
            raise ModelUnreadable(f"{path} is a pipe or a device; copy it again from the model")
        try:
            path.resolve()
        except (OSError, RuntimeError):  # which Python 3.11 raises for a circle
            raise ModelUnreadable(
                f"{path} is a link to itself; copy it again from the model"
            ) from None


def _check_config(name: str, path: Path) -> None:
    """Raises ConfigError for a config.json that is no JSON object, has a size that no model has, or is of quantised
    weights."""
    try:
        about = read_settings(path)
    except RunError as error:
        raise ModelUnreadable(str(error)) from None
    if not isinstance(about, dict):
        raise ModelUnreadable(f"{path} is not a JSON object; copy it again from the model")
    if packed := integrity.find_quantisation(about):
        raise ConfigError(f"{name} is quantised: {packed}")
    if code := find_code_of_the_hub(about):
        raise ConfigError(f"{path}: {code}; remove it, and set `attention` beside `model` instead")
    if (wrong := find_bad_number(about)) is not None:
        raise ModelUnreadable(
            f"{name}: config.json: {wrong}; give the one that its weights were saved with"
        )


def _does_not_exist(where: str, revision: str | None) -> bool:
    """Whether the name is neither a local path nor a hub model in the cache."""
    if Path(where).exists():
        return False
    try:
        return try_to_load_from_cache(where, "config.json", revision=revision) is None
    except HFValidationError:  # not a valid hub id
        return True


def _unreadable_error(what: str, error: Exception, remedy: str = "") -> ModelUnreadable:
    """A library's exception as a one-line error, with a remedy where one is known."""
    message = str(error)
    if "trust_remote_code" in message:
        remedy = "; set trust_remote_code = true beside its `model` if you trust its code"
    elif "sdpa" in message:
        remedy = '; set attention = "eager" beside its `model`'
    return ModelUnreadable(f"cannot {what}: {first_line(error)}{remedy}")


def load_processor(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Loads the processor of a vision-language model, or the tokenizer of a language model.

    `template` replaces its chat template: a .jinja file, or `plain`.

    Raises ConfigError where it cannot be read, has no chat template, or one that lacks an argument of
    `template_arguments`.
    """
    config = load_model_config(name, revision, trust_remote_code)
    _, processor_class = families.auto_classes(config)
    try:
        processor = processor_class.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # processors raise arbitrary exceptions
        raise _unreadable_error(
            f"read the tokenizer or processor of {name!r}", error, TOKENIZER_FILES
        ) from None
    if lacks := families.missing_parts(processor, families.sees_images(config)):
        raise ModelUnreadable(
            f"cannot read the tokenizer or processor of {name!r}: its files hold {lacks}{TOKENIZER_FILES}"
        )
    if families.sees_images(config) and (wrong := find_bad_number(processor.to_dict())):
        raise ModelUnreadable(f"{name}: its processor's {wrong}{TOKENIZER_FILES}")
    limit = families.tokenizer_of(processor).model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise ModelUnreadable(
            f"{name}: tokenizer_config.json: model_max_length is {shown(limit)}; it must be a number"
        )
    if template is not None:
        families.set_template(processor, read_template(template))
    if (
        families.tokenizer_of(processor).chat_template is None
        and getattr(processor, "chat_template", None) is None
    ):
        raise ConfigError(
            f'{name!r} has no chat template; set template = "plain" (bare text) or a .jinja file '
            "beside its `model`"
        )
    check_template(name, template_text(processor))
    check_template_arguments(name, template_text(processor), template_arguments or {})
    return processor


def load_generation_config(name: str, config: PretrainedConfig, revision: str | None = None) -> Any:
    """Loads the model's generation config; derived from its config where it has none."""
    where = resolve(name)
    try:
        return GenerationConfig.from_pretrained(where, revision=revision)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(where) / "generation_config.json").exists():
            return GenerationConfig.from_model_config(config)
        raise _unreadable_error(f"read the generation_config.json of {name!r}", error) from None


@one_line_out_of_memory("load")
def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads weights from safetensors only, in `dtype`, in evaluation mode (no dropout).

    Raises ConfigError naming the model, and the tensor or token: for missing, truncated or pickled files; missing,
    quantised, non-finite or mismatched tensors; an adapter; a missing tokenizer; invalid end tokens; a chat template
    that omits the user's text.
    """
    _check_builtin(name)
    config = load_model_config(name, revision, trust_remote_code)
    model_class, _ = families.auto_classes(config)
    processor = load_processor(name, revision, trust_remote_code, template, template_arguments)
    # for its errors: transformers silently ignores an unreadable file
    load_generation_config(name, config, revision)
    where = resolve(name)
    is_folder = Path(where).is_dir()
    if is_folder:
        check_files(name, Path(where))
    try:
        with bars_where_drawn():
            model, loading = model_class.from_pretrained(
                where,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                revision=revision,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # integrity.refuse_partial names them
            )
        if not is_folder:
            where = snapshot_download(where, revision=revision, local_files_only=True)
    except Exception as error:  # loaders raise arbitrary exceptions
        if is_out_of_memory(error):
            raise
        raise _unreadable_error(f"load the weights of {name!r}", error) from None
    if not is_folder:
        check_files(name, Path(where))
    integrity.refuse_partial(name, loading, model)
    model = model.to(device).eval()
    integrity.refuse_not_finite(name, model)
    families.check_logits(model)
    loaded = LoadedModel(name, model, processor, template_arguments or {}, Path(where))
    check_tokens(loaded)
    return loaded


def check_unloaded(config: ModelConfig) -> None:
    """Runs all checks of a model that need no weights. Raises ConfigError."""
    where_from = (config.model, config.revision, config.trust_remote_code)
    load_processor(*where_from, config.template, config.template_arguments)
    where = Path(resolve(config.model))
    if where.is_dir():
        check_files(config.model, where)


def check_files(name: str, folder: Path) -> None:
    """Raises ConfigError for damaged or quantised weights or incomplete experts; reads headers only."""
    stored = integrity.read_headers(folder)
    index = folder / integrity.INDEX
    if not (folder / integrity.SINGLE).exists() and integrity.read_index(index).metadata is None:
        raise ConfigError(
            f"{index} has no metadata, which transformers wants; save the model again"
        )
    if packed := integrity.find_packed(stored):
        raise ConfigError(f"{name} is quantised: {packed}")
    if odd := integrity.find_complex(stored):
        raise ConfigError(f"{name}: {odd}")
    if short := integrity.find_incomplete_experts(stored):
        raise ConfigError(f"{name} is incomplete: {short}")


def check_tokens(loaded: LoadedModel) -> None:
    """Raises ConfigError for a tokenizer that does not fit the model, or a template that omits the user's text."""
    name, tokenizer, rows = loaded.name, loaded.tokenizer, loaded.vocabulary_rows
    if set(loaded.end_ids) <= set(loaded.unsampleable_ids):
        raise ConfigError(
            f"{name}: none of its end tokens {loaded.end_ids} can be sampled (padding, image placeholders and ids "
            "without a token never are), so no completion would end; set eos_token_id in its generation_config.json"
        )
    added = tokenizer.get_added_vocab()
    ordinary = {i for word, i in tokenizer.get_vocab().items() if word not in added}
    if ordinary and max(ordinary) >= rows:
        lost = sum(i >= rows for i in ordinary)
        message = missing_row_message(name, tokenizer, max(ordinary), rows)
        raise ConfigError(f"{message} ({lost} of {len(ordinary)} ordinary tokens have none)")
    if not 0 <= loaded.pad_id < rows:
        raise ConfigError(f"padding: {missing_row_message(name, tokenizer, loaded.pad_id, rows)}")
    shown = [loaded.prints_user_text(content) for content in (PROBE, families.as_parts(PROBE))]
    if not any(shown) and False in shown:
        raise ConfigError(
            f"the chat template of {name} omits the user's text; set `template` beside its `model` to a "
            '.jinja file, or "plain"'
        )
    if any(shown):
        text = loaded.apply_template([loaded.text_turn("user", PROBE)])
        loaded.check_ids(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))


def load_configured(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    folder: Path | str | None = None,
) -> LoadedModel:
    """Loads a config's model or, with `folder`, a checkpoint of it with the same settings."""
    return load(
        str(folder or config.model),
        dtype,
        device,
        attention=config.attention,
        revision=None if folder else config.revision,
        trust_remote_code=config.trust_remote_code,
        template=config.template,
        template_arguments=config.template_arguments,
    )


def _check_builtin(name: str) -> None:
    """Raises ConfigError for a built-in whose files differ from the shipped ones."""
    folder = BUILTIN / name.removeprefix("builtin:")
    if not name.startswith("builtin:") or not folder.is_dir():
        return
    digests = json.loads((BUILTIN / "digests.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        known = digests.get(f"{folder.name}/{path.name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise ConfigError(f"{path} differs from the shipped file; reinstall vlopd")
