"""What a client and `vlopd serve` send each other: tensors as safetensors, with a JSON value in the header.

Nothing else is decoded, so that neither side can make the other run code.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlopd.types import Completions, Prompts

PROTOCOL = 1
TYPE = "application/x-safetensors"
TOKEN = "VLOPD_ENGINE_TOKEN"
"""Environment variable with the secret that both sides need where the address is not this machine's own."""
LARGEST_HEADER = 2**24


class BrokenMessage(ValueError):
    """Bytes that are no message."""


def encode(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """A message of tensors on any device and a JSON object."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(host, {"about": json.dumps(dict(about))})


def decode(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the JSON object of a message. Raises BrokenMessage."""
    try:
        size = int.from_bytes(body[:8], "little")
        if not 0 < size <= min(LARGEST_HEADER, len(body) - 8):
            raise BrokenMessage(f"{len(body)} bytes with a header of {size}")
        about = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["about"])
        if not isinstance(about, dict):
            raise BrokenMessage("its header is no object")
        return load(body), about
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BrokenMessage(f"{type(error).__name__}: {error}") from None


def digest_bytes(body: bytes) -> str:
    """What an answer repeats of its request."""
    return hashlib.sha256(body).hexdigest()


def pack_prompts(prompts: Prompts) -> dict[str, Tensor]:
    """The tensors of a batch of prompts, by name."""
    found = {"prompt/input_ids": prompts.input_ids, "prompt/attention_mask": prompts.attention_mask}
    for kind, tensors in (("per_token", prompts.per_token), ("per_image", prompts.per_image)):
        found |= {f"{kind}/{name}": tensor for name, tensor in tensors.items()}
    return found


def unpack_prompts(tensors: Mapping[str, Tensor]) -> Prompts:
    """The inverse of `pack_prompts`. Raises BrokenMessage where something is missing or of another shape."""
    own = {
        kind: {n.split("/", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{kind}/")}
        for kind in ("prompt", "per_token", "per_image")
    }
    ids, mask = own["prompt"].get("input_ids"), own["prompt"].get("attention_mask")
    if ids is None or mask is None or ids.ndim != 2 or ids.shape != mask.shape:
        raise BrokenMessage("no input_ids and attention_mask of one shape [B, P]")
    if any(tensor.shape[:2] != ids.shape[:2] for tensor in own["per_token"].values()):
        raise BrokenMessage("an input per token is not of the shape of input_ids")
    return Prompts(ids, mask, own["per_token"], own["per_image"])


def pack_completions(completions: Completions) -> dict[str, Tensor]:
    """The tensors of completions, by name."""
    return {f"completion/{name}": tensor for name, tensor in vars(completions).items()}


def unpack_completions(tensors: Mapping[str, Tensor]) -> Completions:
    """The inverse of `pack_completions`. Raises BrokenMessage where something is missing or of another shape."""
    names = ("ids", "mask", "logprobs", "ended")
    try:
        found = Completions(*(tensors[f"completion/{name}"] for name in names))
    except KeyError as error:
        raise BrokenMessage(f"no {error}") from None
    shapes = {found.ids.shape, found.mask.shape, found.logprobs.shape}
    if len(shapes) > 1 or found.ids.ndim != 2 or found.ended.shape != found.ids.shape[:1]:
        raise BrokenMessage("completions are not of one shape [B, C]")
    return found


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
