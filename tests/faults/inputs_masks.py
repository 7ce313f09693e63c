"""Malformed mask files, of vlopd and of other formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.harness import Case, Cut, Edit, Put
from tests.faults.inputs_models import Header, Tensors

MASK = "visible.safetensors"
SHOW = ("mask", "show", MASK)
PARTS = ("student", "teacher", "visible.*", "c.toml", "rows.jsonl", "booleans.*", "indices.*")
USED = (
    *("run", "c.toml", "--out", "out", "--until", "arms", "--arm", "sub"),
    f"masks.top={{type='file', path='{MASK}'}}",
)


@dataclass(frozen=True)
class About:
    """Replaces the metadata of a mask file; with `signed`, also its digest, as a program would that writes masks."""

    change: Callable[[dict[str, Any]], Any]
    signed: bool = True

    def __call__(self, folder: Path) -> None:
        path = folder / MASK
        packed = load_file(path)
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["mask"])
        recorded = about.pop("digest")
        changed = self.change(about)
        about = about if changed is None else changed
        if isinstance(about, dict):
            about["digest"] = _digest(about, packed) if self.signed else recorded
        save_file(packed, path, {"mask": json.dumps(about)})


def _digest(about: dict[str, Any], packed: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(packed):
        total.update(f"\n{name} {packed[name].numel()} ".encode())
        total.update(packed[name].numpy().tobytes())
    return total.hexdigest()


def at(key: str, value: Any, signed: bool = True) -> About:
    """Sets an entry of the metadata; `shapes.*` of its first shape; None deletes it."""

    def change(about: dict[str, Any]) -> None:
        inner, last = about, key
        if "." in key:
            outer, last = key.split(".", 1)
            inner = about[outer]
        last = next(iter(inner)) if last == "*" else last
        if value is None:
            del inner[last]
        else:
            inner[last] = value

    return About(change, signed)


def whole(value: Any) -> About:
    return About(lambda about: value)


ABOUT: dict[str, Edit] = {
    "list": whole([1]),
    "text": whole("mask"),
    "number": whole(7),
    "true": whole(True),
    "empty": whole({"x": 1}),
    "shapes-missing": at("shapes", None),
    "shapes-list": at("shapes", [1]),
    "shapes-text": at("shapes", "large"),
    "shapes-empty": at("shapes", {}),
    "shape-huge": at("shapes.*", [2**62, 2**62]),
    "shape-exabytes": at("shapes.*", [2**60]),
    "shape-negative": at("shapes.*", [-1, -64]),
    "shape-text": at("shapes.*", "58x32"),
    "shape-of-text": at("shapes.*", ["58", "32"]),
    "shape-float": at("shapes.*", [58.0, 32.0]),
    "shape-true": at("shapes.*", [True]),
    "shape-number": at("shapes.*", 1856),
    "shape-nested": at("shapes.*", [[58, 32]]),
    "shape-other": at("shapes.*", [3, 5]),
    "shape-missing": at("shapes.*", None),
    "shape-many": at("shapes.*", [1] * 100),
    "shape-more": at("shapes.lm_tail.weight", [8]),
    "counts-missing": at("counts", None),
    "counts-list": at("counts", [1]),
    "counts-text": at("counts.*", "many"),
    "counts-wrong": at("counts.*", 5),
    "inputs-missing": at("inputs", None),
    "inputs-list": at("inputs", []),
    "inputs-empty": at("inputs", {}),
    "base-missing": at("inputs.base", None),
    "base-number": at("inputs.base", 5),
    "rule-missing": at("inputs.rule", None),
    "rule-text": at("inputs.rule", "visible"),
    "rule-list": at("inputs.rule", [1]),
    "density-text": at("density", "half"),
    "unsigned": at("density", 0.9, signed=False),
}


def _header(text: bytes) -> Header:
    body = {"__metadata__": {"mask": text.decode()}}
    return Header(MASK, json.dumps(body).encode())


FILES: dict[str, Edit] = {
    "empty": Put(MASK, b""),
    "text": Put(MASK, "mask"),
    "truncated": Cut(MASK, 0.9),
    "truncated-header": Cut(MASK, 0.1),
    "length-exabytes": Header(MASK, length=2**62),
    "length-max": Header(MASK, length=2**64 - 1),
    "length-zero": Header(MASK, length=0),
    "header-list": Header(MASK, b"[]"),
    "header-deep": Header(MASK, b"[" * 50_000),
    "header-not-utf-8": Header(MASK, b"\xff" * 30),
    "metadata-number": Header(MASK, b'{"__metadata__": {"mask": 5}}'),
    "metadata-list": Header(MASK, b'{"__metadata__": []}'),
    "metadata-empty": _header(b""),
    "metadata-truncated": _header(b'{"shapes": {'),
    "metadata-deep": _header(b"[" * 50_000),
    "metadata-nan": _header(b'{"density": NaN}'),
    "metadata-digits": _header(b'{"density": ' + b"9" * 5000 + b"}"),
    "metadata-null": _header(b"null"),
    "no-metadata": Header(MASK, b"{}"),
    "flipped": lambda folder: _flip(folder / MASK),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _twos(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.uint8) + 1


def _nans(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].float() * float("nan")


def _turned(tensors: dict[str, torch.Tensor]) -> None:
    name = next(
        n for n in sorted(tensors) if tensors[n].ndim == 2 and len(set(tensors[n].shape)) == 2
    )
    tensors[name] = tensors[name].T.contiguous()


def _unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["x.weight"] = torch.ones(2, dtype=torch.bool)


def _none(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def _negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))] = torch.tensor([-1])


def _beyond(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))] = torch.tensor([2**60])


def _twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))] = torch.tensor([1, 1])


def _matrix(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))] = torch.ones(2, 2, dtype=torch.int64)


def _mixed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["x.weight"] = torch.tensor([1])


FOREIGN: dict[str, tuple[str, Edit]] = {
    "booleans-twos": ("booleans", Tensors("booleans.safetensors", _twos)),
    "booleans-nan": ("booleans", Tensors("booleans.safetensors", _nans)),
    "booleans-turned": ("booleans", Tensors("booleans.safetensors", _turned)),
    "booleans-unknown": ("booleans", Tensors("booleans.safetensors", _unknown)),
    "booleans-none": ("booleans", Tensors("booleans.safetensors", _none)),
    "booleans-mixed": ("booleans", Tensors("booleans.safetensors", _mixed)),
    "booleans-empty": ("booleans", Put("booleans.safetensors", b"")),
    "booleans-truncated": ("booleans", Cut("booleans.safetensors", 0.5)),
    "booleans-length": ("booleans", Header("booleans.safetensors", length=2**61)),
    "indices-negative": ("indices", Tensors("indices.safetensors", _negative)),
    "indices-beyond": ("indices", Tensors("indices.safetensors", _beyond)),
    "indices-twice": ("indices", Tensors("indices.safetensors", _twice)),
    "indices-matrix": ("indices", Tensors("indices.safetensors", _matrix)),
    "indices-none": ("indices", Tensors("indices.safetensors", _none)),
    "indices-truncated": ("indices", Cut("indices.safetensors", 0.7)),
}


def cases() -> list[Case]:
    found = [
        Case(SHOW, MASK, edit, parts=PARTS, name=f"mask about {n}") for n, edit in ABOUT.items()
    ]
    found += [
        Case(SHOW, MASK, edit, parts=PARTS, name=f"mask file {n}") for n, edit in FILES.items()
    ]
    for name in (
        "shape-huge",
        "shapes-list",
        "base-missing",
        "shape-other",
        "counts-text",
        "inputs-list",
    ):
        found.append(Case(USED, MASK, ABOUT[name], parts=PARTS, name=f"used mask about {name}"))
    for name in ("truncated", "length-max", "metadata-deep", "flipped", "header-list"):
        found.append(Case(USED, MASK, FILES[name], parts=PARTS, name=f"used mask file {name}"))
    for name, (kind, edit) in FOREIGN.items():
        words = (
            "mask",
            "import",
            f"{kind}.safetensors",
            "--base",
            "student",
            "--out",
            "m.safetensors",
        )
        found.append(Case(words, f"{kind}.safetensors", edit, parts=PARTS, name=f"mask of {name}"))
    return found
