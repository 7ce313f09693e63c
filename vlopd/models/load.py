"""Loads one model with its own processor: a hub id, a local folder, or `builtin:NAME`."""

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

from vlopd.config.models import ModelConfig
from vlopd.errors import ConfigError, first_line
from vlopd.models import families, integrity
from vlopd.models.gguf import convert, smollm2
from vlopd.models.loaded import LoadedModel, ModelUnreadable
from vlopd.models.openclip import vlm
from vlopd.models.tokenizers import (
    PROBE,
    check_template_arguments,
    missing_row_message,
    read_template,
    template_text,
)

BUILTIN = Path(__file__).parents[1] / "builtin"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


TOKENIZER_FILES = (
    "; copy tokenizer.json, tokenizer_config.json and what lies beside them (a processor_config.json, for images) "
    "from the model's own folder"
)


def resolve(name: str) -> str:
    """A path or hub id. `builtin:NAME` becomes the packaged folder; a .gguf file its dequantised copy.

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


def load_model_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The model's configuration, without weights.

    Raises ModelUnreadable when it cannot be read, ConfigError where it is of an adapter or of packed weights.
    """
    vlm.register()
    where = resolve(name)
    try:
        adapter = find_adapter_config_file(where, revision=revision)
        config = None
        if adapter is None:
            config = AutoConfig.from_pretrained(
                where, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # configurations check themselves, and raise what they like
        if _does_not_exist(where, revision):
            raise ModelUnreadable(
                f"cannot read the configuration of {name!r}: there is no such folder, and as a model id of the hub "
                "it is not in the cache and could not be fetched"
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


def _does_not_exist(where: str, revision: str | None) -> bool:
    """Whether there is neither a folder or file of that name nor a hub's model in the cache."""
    if Path(where).exists():
        return False
    try:
        return try_to_load_from_cache(where, "config.json", revision=revision) is None
    except HFValidationError:  # no name of a hub's model
        return True


def _unreadable_error(what: str, error: Exception, remedy: str = "") -> ModelUnreadable:
    """What a library raised over a user's file, as one line of ours with its remedy where there is one."""
    said = str(error)
    if "trust_remote_code" in said:
        remedy = "; set trust_remote_code = true beside its `model` if you trust its code"
    elif "sdpa" in said:
        remedy = '; set attention = "eager" beside its `model`'
    return ModelUnreadable(f"cannot {what}: {first_line(error)}{remedy}")


def load_processor(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Any:
    """The processor of a vision-language model, or the tokenizer of a language model.

    `template` takes the place of its chat template: a .jinja file, or `plain`.

    Raises ConfigError when it cannot be read, has no chat template, or one that knows none of the arguments.
    """
    config = load_model_config(name, revision, trust_remote_code)
    _, processor_class = families.auto_classes(config)
    try:
        processor = processor_class.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # processors raise what they like
        raise _unreadable_error(
            f"read the tokenizer or processor of {name!r}", error, TOKENIZER_FILES
        ) from None
    if lacks := families.missing_parts(processor, families.sees_images(config)):
        raise ModelUnreadable(
            f"cannot read the tokenizer or processor of {name!r}: its files hold {lacks}{TOKENIZER_FILES}"
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
    check_template_arguments(name, template_text(processor), template_arguments or {})
    return processor


def load_generation_config(name: str, config: PretrainedConfig, revision: str | None = None) -> Any:
    """The model's generation config, without weights; made from its configuration where it has none."""
    where = resolve(name)
    try:
        return GenerationConfig.from_pretrained(where, revision=revision)
    except Exception as error:
        if isinstance(error, OSError) and not (Path(where) / "generation_config.json").exists():
            return GenerationConfig.from_model_config(config)
        raise _unreadable_error(f"read the generation_config.json of {name!r}", error) from None


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

    Raises ConfigError naming the model, and the tensor or token, where it is not whole: a file that is missing,
    truncated or pickled, tensors that are missing, packed, not finite or another model's, an adapter, no
    tokenizer, end tokens that are none, a chat template that leaves out the user's words.
    """
    _check_builtin(name)
    config = load_model_config(name, revision, trust_remote_code)
    model_class, _ = families.auto_classes(config)
    processor = load_processor(name, revision, trust_remote_code, template, template_arguments)
    # for its errors: transformers passes over a file that it cannot read
    load_generation_config(name, config, revision)
    where = resolve(name)
    is_folder = Path(where).is_dir()
    if is_folder:
        _check_files(name, Path(where))
    try:
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
    except Exception as error:  # loaders raise what they like
        raise _unreadable_error(f"load the weights of {name!r}", error) from None
    if not is_folder:
        _check_files(name, Path(where))
    integrity.refuse_partial(name, loading, model)
    model = model.to(device).eval()
    integrity.refuse_not_finite(name, model)
    families.check_logits(model)
    loaded = LoadedModel(name, model, processor, template_arguments or {}, Path(where))
    check_tokens(loaded)
    return loaded


def check_unloaded(config: ModelConfig) -> None:
    """Refuses what can be seen of a model without reading its weights."""
    where_from = (config.model, config.revision, config.trust_remote_code)
    load_processor(*where_from, config.template, config.template_arguments)
    where = Path(resolve(config.model))
    if where.is_dir():
        _check_files(config.model, where)


def _check_files(name: str, folder: Path) -> None:
    """Refuses weights that are damaged, packed, or short of a part of an expert; reads headers only."""
    stored = integrity.read_headers(folder)
    if packed := integrity.find_packed(stored):
        raise ConfigError(f"{name} is quantised: {packed}")
    if odd := integrity.find_complex(stored):
        raise ConfigError(f"{name}: {odd}")
    if short := integrity.find_incomplete_experts(stored):
        raise ConfigError(f"{name} is not whole: {short}")


def check_tokens(loaded: LoadedModel) -> None:
    """Refuses a model whose tokenizer and template are not of its vocabulary, or say nothing of the user's words."""
    name, tokenizer, rows = loaded.name, loaded.tokenizer, loaded.vocabulary_rows
    if set(loaded.end_ids) <= set(loaded.unsampleable_ids):
        raise ConfigError(
            f"{name}: none of its end tokens {loaded.end_ids} can be sampled (padding, images and ids without "
            "a token never are), so no completion would end; set eos_token_id in its generation_config.json"
        )
    added = tokenizer.get_added_vocab()
    ordinary = {i for word, i in tokenizer.get_vocab().items() if word not in added}
    if ordinary and max(ordinary) >= rows:
        lost = sum(i >= rows for i in ordinary)
        raise ConfigError(
            f"{missing_row_message(name, tokenizer, max(ordinary), rows)} ({lost} of {len(ordinary)} ordinary tokens have none)"
        )
    if not 0 <= loaded.pad_id < rows:
        raise ConfigError(f"padding: {missing_row_message(name, tokenizer, loaded.pad_id, rows)}")
    shown = [loaded.prints_user_text(content) for content in (PROBE, families.as_parts(PROBE))]
    if not any(shown) and False in shown:
        raise ConfigError(
            f"the chat template of {name} leaves out what the user says; set `template` beside its `model` to a "
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
    """The model that a config names or, with `folder`, a checkpoint of it, loaded in the same way."""
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
    """Refuses a packaged built-in whose files are not those it was shipped with."""
    folder = BUILTIN / name.removeprefix("builtin:")
    if not name.startswith("builtin:") or not folder.is_dir():
        return
    digests = json.loads((BUILTIN / "digests.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        known = digests.get(f"{folder.name}/{path.name}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != known:
            raise ConfigError(f"{path} is not the file that was shipped; reinstall vlopd")
