"""A GGUF file as a Hugging Face folder of plain safetensors, made once and kept in a cache.

transformers reads the file and takes its blocks apart; every weight of the result is an ordinary tensor
that can be trained and saved. What comes out is what the file holds, rounded to bf16: a four-bit model
dequantised, not the checkpoint that was once quantised. The folder is the student: deltas are measured from
it. The tokenizer is transformers' reading of the file too, which takes the plain byte-level splitting for
families whose own splits numbers or white space otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import gguf
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vlopd.digests import cache, file_digest
from vlopd.errors import ConfigError
from vlopd.files import remove_abandoned, whole_folder

VERSION = 1
"""Of the converter: part of the cache's keys, to be raised where the same file would come out otherwise."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

PLAIN_TYPES = ("F32", "F16", "BF16", "F64")
"""Storage types of GGUF tensors that hold values as they are, rather than blocks of a few bits each."""

END_FIELDS = ("eos", "eot", "eom")
"""Tokens that end a text, a turn, or a message: a chat model's completion ends at any of them."""


def converted(path: Path, dtype: str = "bf16") -> Path:
    """The folder with the model, tokenizer and model card of a GGUF file; made if the cache has none yet.

    Raises ConfigError with the file's name where it is missing, truncated, no GGUF file, or of an
    architecture that transformers cannot read.
    """
    if not path.is_file():
        raise ConfigError(f"no GGUF file {path}")
    key = f"{path.stem}-{file_digest(path)[:16]}-{dtype}-v{VERSION}"
    return made_once(key, lambda folder: convert(path, folder, dtype))


def convert(path: Path, folder: Path, dtype: str) -> None:
    """Writes the dequantised model, its tokenizer and a model card into an empty folder."""
    try:
        card, ends = describe(path, dtype)
        model, loading = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            # without it the weights may stay in packed blocks, which can be neither trained nor saved
            quantization_config=GgufConfig(dequantize=True),
            dtype=DTYPES[dtype],
            output_loading_info=True,
        )
        if absent := sorted(loading["missing_keys"]):
            raise ValueError(f"no weights for {absent[0]} and {len(absent) - 1} more")
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # readers of a damaged file raise what they like
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot read {path} ({why}); is it a whole GGUF file?") from None
    if ends:
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def describe(path: Path, dtype: str) -> tuple[str, list[int]]:
    """The model card, and the ids of the tokens that end a completion, from the file's own fields."""
    reader = gguf.GGUFReader(path)

    def field(name: str) -> str | int | None:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    parameters: Counter[str] = Counter()
    for tensor in reader.tensors:
        parameters[tensor.tensor_type.name] += int(tensor.n_elements)
    if not parameters:
        raise ValueError("no tensors")
    stored = parameters.most_common(1)[0][0]
    packed = any(name not in PLAIN_TYPES for name in parameters)
    counts = ", ".join(f"{name} {count:,}" for name, count in parameters.most_common())
    name = field("general.name") or path.stem
    ends = {field(f"tokenizer.ggml.{end}_token_id") for end in END_FIELDS}
    card = f"""# {name} ({stored}{", dequantised" if packed else ""})

The weights of a GGUF file as plain {dtype} tensors, written by vlopd's converter (version {VERSION}).
{"They carry the rounding of the file's quantisation: this is not the checkpoint it was made from." if packed else ""}

| | |
|---|---|
| source file | {path.name} |
| sha256 | {file_digest(path)} |
| quantisation | {stored} |
| parameters by storage type | {counts} |
| architecture | {field("general.architecture")} |
| organization | {field("general.organization") or "not stated"} |
| licence | {field("general.license") or "not stated"} |
| read with | transformers {version("transformers")}, gguf {version("gguf")} |
"""
    return card, sorted(int(end) for end in ends if end is not None)


# --------------------------------------------------------------------------------------------- cache


def made_once(key: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder `key`, filled by `make` the first time; processes that want it at once wait for one.

    The folder appears whole or not at all. Raises ConfigError where the cache cannot be written.
    """
    folder = cache() / key / "model"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / ".lock").acquire()
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache {cache()} ({error.strerror}); set VLOPD_CACHE to another folder"
        ) from None
    with lock:
        if not folder.is_dir():
            remove_abandoned(folder.parent.iterdir())
            with whole_folder(folder) as unfinished:
                make(unfinished)
    return folder
