"""Teachers' hidden states of completions that come again (the data's, a teacher's, recorded ones), kept on disk.

One file a completion, named by a digest of all that decides its content: the teacher's weights and precision, the
prompt as it reads it with its pictures, and the completion. Arms of one run share them. What is damaged is computed
again. (A completion is read beside others, whose padding moves its last bits: kept are those of its first time.)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlopd.files import whole_file
from vlopd.types import Completions, Prompts


class TeacherCache:
    """Hidden states [C, H] by key, at most `most_bytes` of them; those used longest ago leave first.

    Several processes may share the folder; each counts what it has seen of it. hits, misses: of `get`.
    """

    def __init__(self, folder: Path, most_bytes: int):
        self.folder, self.most_bytes = folder, most_bytes
        files = [(path.stat().st_mtime_ns, path) for path in folder.glob("*/*.safetensors")]
        self.sizes = OrderedDict((path, path.stat().st_size) for _, path in sorted(files))
        self.held = sum(self.sizes.values())
        self.hits = self.misses = 0

    def get(self, key: str) -> Tensor | None:
        """What is kept under a key, on the CPU."""
        path = self._path(key)
        found = _read(path)
        if found is None:
            self.misses += 1
            self.held -= self.sizes.pop(path, 0)
            return None
        self.hits += 1
        if path in self.sizes:
            self.sizes.move_to_end(path)
        return found

    def put(self, key: str, hidden: Tensor) -> None:
        """Keeps a completion's hidden states [C, H]; nothing where they alone are too large, or the disk is full."""
        path = self._path(key)
        if hidden.nbytes > self.most_bytes or path in self.sizes:
            return
        while self.sizes and self.held + hidden.nbytes > self.most_bytes:
            oldest, size = self.sizes.popitem(last=False)
            oldest.unlink(missing_ok=True)
            self.held -= size
        own = hidden.cpu().contiguous()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file({"hidden": own}, temporary, {"digest": digest_tensor(own)})
        except (OSError, SafetensorError):
            self.most_bytes = 0  # training does not need it
            return
        self.sizes[path] = path.stat().st_size
        self.held += self.sizes[path]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _read(path: Path) -> Tensor | None:
    """The hidden states of a file; None where there is none, or a damaged one, which is removed."""
    try:
        with safe_open(path, "pt") as file:
            found, digest = file.get_tensor("hidden"), (file.metadata() or {}).get("digest")
        if digest == digest_tensor(found):
            return found
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    path.unlink(missing_ok=True)
    return None


def digest_tensor(tensor: Tensor) -> str:
    """A sha256 of a tensor's dtype, shape and bits."""
    own = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{own.dtype} {tuple(own.shape)}\n".encode())
    found.update(own.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def key_of(weights: str, prompt: Prompts, ids: Sequence[int]) -> str:
    """The key of one completion: weights names the teacher's weights and precision, prompt is a single one."""
    found = hashlib.sha256(weights.encode())
    tensors = {"ids": prompt.input_ids, **prompt.per_token, **prompt.per_image}
    for name in sorted(tensors):
        found.update(f"{name} {digest_tensor(tensors[name])}\n".encode())
    found.update(repr(list(ids)).encode())
    return found.hexdigest()


def rows_of(completions: Completions) -> list[list[int]]:
    """The tokens of each completion."""
    pairs = zip(completions.ids.cpu(), completions.mask.cpu(), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]
